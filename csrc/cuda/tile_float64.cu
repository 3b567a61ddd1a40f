// The CUDA kernels for float64 logits.
#define ENTROPY_PO_ISA gpu
#include "tile_cuda_impl.h"

namespace entropy_po {
namespace gpu {
template void fold_dtype<double, double>(const TileArgs&, const LaunchPlan&, void*, cudaStream_t);
template void grad_dtype<double, double, double>(const TileArgs&, const LaunchPlan&, cudaStream_t);
}  // namespace gpu
}  // namespace entropy_po
