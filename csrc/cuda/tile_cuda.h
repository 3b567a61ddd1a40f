// The CUDA tile functions behind the Python binding. They launch on the given stream of the given device and return: no
// allocation, no synchronisation, so a CUDA graph can capture them. A launch that fails throws std::runtime_error.
//
// They make the device the thread's current one and leave it so: what was current before, the runtime linked in here need not
// know, since torch has one of its own. The caller asks torch to make it current, and to restore (dispatch.py, on_device).
#pragma once

#include "../tile_args.h"

namespace entropy_po {

// Bytes of device memory that `cuda_fold` wants for this tile: 0 unless the rows are so few that each is split.
int64_t cuda_fold_workspace(const TileArgs&, int device);
void cuda_fold(const TileArgs&, void* workspace, int device, void* stream);  // workspace null: no row is split
void cuda_stats(const StatsArgs&, int device, void* stream);
void cuda_grad(const TileArgs&, int device, void* stream);

}  // namespace entropy_po
