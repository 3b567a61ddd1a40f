// The CPU kernels for the platform's baseline: SSE2 on x86-64, NEON on 64-bit Arm.
#define ENTROPY_PO_ISA baseline
#include "tile_cpu_impl.h"

namespace entropy_po {
static bool supported() { return true; }
const CpuKernels kCpuKernelsBaseline = {"baseline", supported, baseline::fold, baseline::grad, baseline::stats};
}  // namespace entropy_po
