// out [m, n] fp32 = or += A [m, k] @ B [k, n] in bf16, each with rows or columns contiguous. Strides are in elements.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ENTROPY_PO_AVX512_BF16 1
#endif

namespace entropy_po {

struct GemmBf16Args {
  const uint16_t *a, *b;
  float* out;
  int64_t m, n, k, a_stride, b_stride, out_stride;
  bool a_transposed;  // a holds [k, m]
  bool b_transposed;  // b holds [n, k]
  bool accumulate;
  int threads;
};

bool gemm_bf16_supported();                // by the processor that runs
bool gemm_bf16(const GemmBf16Args& args);  // false when memory for the packed operands could not be had

}  // namespace entropy_po
