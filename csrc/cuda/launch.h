// How a tile becomes a grid, and the one way a kernel is launched.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../half.h"
#include "../tile_args.h"

namespace entropy_po {
namespace ENTROPY_PO_ISA {

// Per block. Two blocks fit a multiprocessor: 64 registers a lane, of which fp64 needs twice as many.
template <class Src>
constexpr int kMaxLanes = sizeof(Src) == 8 ? 256 : 512;
constexpr int kMaxParts = 32;  // one warp merges a row
constexpr int kSums = 6;       // m, s, t, q, c, live: what a part leaves in the workspace

struct LaunchPlan {
  unsigned blocks;
  int lanes;    // per block
  int parts;    // blocks per row
  int columns;  // of a part
};

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it was ours: the next caller of the runtime must not find it
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, int lanes, cudaStream_t stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(unsigned(lanes));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Instantiated by one translation unit per dtype of the logits.
template <class Src, class T>
void fold_dtype(const TileArgs&, const LaunchPlan&, void* workspace, cudaStream_t);
template <class Src, class Out, class T>
void grad_dtype(const TileArgs&, const LaunchPlan&, cudaStream_t);

}  // namespace ENTROPY_PO_ISA
}  // namespace entropy_po
