// out [m, n] fp32 = or += A [m, k] @ B [k, n], both bf16 or both fp32, each with rows or columns contiguous. Strides are in
// elements. The result may go elsewhere: factor times it, rounded to the operands' dtype, into `scaled`. What `out` then holds
// is not defined; of fp32 operands the two may be the same memory.
#pragma once

#include <cstdint>

#include "tile_args.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ENTROPY_PO_AVX512_GEMM 1
#endif

namespace entropy_po {

struct GemmArgs {
  const void *a, *b;
  float* out;
  DType dtype;
  int64_t m, n, k, a_stride, b_stride, out_stride;
  bool a_transposed;  // a holds [k, m]
  bool b_transposed;  // b holds [n, k]
  bool accumulate;
  int threads;
  void* scaled = nullptr;
  int64_t scaled_stride = 0;
  float factor = 1;
};

bool is_amd();                    // the processor that runs
bool gemm_supported(DType);       // by it
bool gemm(const GemmArgs& args);  // false when memory for the packed operands could not be had

}  // namespace entropy_po
