// out [n, v] fp32 = hidden [n, D] bf16 @ weight [v, D].T bf16. Strides are in elements; D is even; rows are contiguous.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ENTROPY_PO_AVX512_BF16 1
#endif

namespace entropy_po {

struct GemmBf16Args {
  const uint16_t* hidden;
  const uint16_t* weight;
  float* out;
  int64_t n, v, d, hidden_stride, weight_stride, out_stride;
  int threads;
};

bool gemm_bf16_supported();                // by the processor that runs
bool gemm_bf16(const GemmBf16Args& args);  // false when memory for a panel could not be had

}  // namespace entropy_po
