// The CPU kernels for x86-64-v4 (AVX-512). Standard headers come before the target is set: an inline function
// of theirs must not be emitted with instructions that another machine lacks.
#include "tile_cpu.h"

#ifdef ENTROPY_PO_X86_LEVELS
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#pragma GCC target("arch=x86-64-v4")
#define ENTROPY_PO_ISA x86_v4
#include "tile_cpu_impl.h"

namespace entropy_po {
static bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
}
const CpuKernels kCpuKernelsX86V4 = {"x86-64-v4", supported, x86_v4::fold, x86_v4::grad, x86_v4::stats};
}  // namespace entropy_po
#endif
