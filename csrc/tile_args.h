// What crosses from Python to the tile functions, on the CPU and on CUDA: raw pointers and sizes, no torch, no Python.
#pragma once

#include <cstdint>

namespace entropy_po {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// One tile [n_rows, n_cols] and what the two functions need of it. Strides are in elements, not bytes. T is double for a
// float64 tile and float for every other; `state`, `bias`, `temperature` and the upstream gradients are arrays of T.
struct TileArgs {
  const void* tile;
  void* out;  // grad only: may be `tile` itself, and may have another dtype if its rows start where the tile's rows do
  int64_t n_rows, n_cols, tile_stride, out_stride;
  const int64_t* labels;  // [n_rows], ids in the whole vocabulary
  int64_t vocab_start;    // id of column 0
  int64_t ignore_index;
  void* state;  // [5 or 8][state_stride]: m, s, t, label_d, label_z, q, c, live
  int64_t state_stride;
  const void* g_logp;                        // [n_rows] or null
  const void* g_entropy;                     // [n_rows] or null
  double logit_scale, softcap, temperature;  // softcap 0: none
  const void* row_temperature;               // [n_rows] or null
  const void* bias;                          // [n_cols] or null
  const uint8_t* keep;                       // [n_rows, n_cols] bytes or null; 0 removes an entry from the softmax
  int64_t keep_stride;
  DType dtype, out_dtype;
  int level;    // tile.h, Level
  int threads;  // of the CPU; CUDA has its own launch plan
  bool first;   // fold only: of its rows' tiles. The state is written and not read, that of an ignored row too
};

// A complete state, and where its outputs go: arrays [n_rows] of T, or null for one that is not wanted.
struct StatsArgs {
  const void* state;
  int64_t state_stride, n_rows;
  bool is_double;  // T
  void *logps, *entropy, *lse, *mean_logit, *log_sum_sq_probs;
  uint8_t* is_top1;
};

}  // namespace entropy_po
