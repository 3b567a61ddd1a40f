// The four instructions that CUDA C++ has no portable name for. Outside nvcc, tests/cuda_on_host gives them meaning.
#pragma once

#include <cuda_runtime.h>

#ifdef __CUDACC__
// 2^x to 2 units in the last place in one instruction of the special function unit; below the normal range exactly 0.
__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 unit in the last place, likewise; for x of the normal range.
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger one, or NaN if either is: fmaxf would drop a NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// a * b, rounded. `a * b` in a later subtraction may be contracted into an FMA, which does not round it.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }
#endif
