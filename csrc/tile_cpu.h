// The CPU tile functions behind the Python binding.
#pragma once

#include "tile_args.h"

namespace entropy_po {

struct CpuKernels {
  const char* isa;
  bool (*supported)();
  void (*fold)(const TileArgs&);
  void (*grad)(const TileArgs&);
  void (*stats)(const StatsArgs&);
};

// Fastest first; `supported` asks the processor that runs, not the one that compiled.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ENTROPY_PO_X86_LEVELS 1
extern const CpuKernels kCpuKernelsX86V4;
extern const CpuKernels kCpuKernelsX86V3;
#endif
extern const CpuKernels kCpuKernelsBaseline;

}  // namespace entropy_po
