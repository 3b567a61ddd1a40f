// The CPU kernels for x86-64-v3 (AVX2 and FMA). Standard headers come before the target is set: an inline function
// of theirs must not be emitted with instructions that another machine lacks.
#include "tile_cpu.h"

#ifdef ENTROPY_PO_X86_LEVELS
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#pragma GCC target("arch=x86-64-v3")
#define ENTROPY_PO_ISA x86_v3
#include "tile_cpu_impl.h"

namespace entropy_po {
static bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
const CpuKernels kCpuKernelsX86V3 = {"x86-64-v3", supported, x86_v3::fold, x86_v3::grad, x86_v3::stats};
}  // namespace entropy_po
#endif
