// fold and grad of a tile on CUDA, for one dtype of logits per translation unit (tile_*.cu).
//
// One block owns one row, and reads it once (fold), or reads and writes it once (grad). Where there are too few rows to
// fill the device, `parts` blocks share one: a grad block needs nothing of the others; fold blocks leave their sums in
// the workspace, and a second launch merges them, in a fixed order. Row and part lie on gridDim.x, which holds 2^31.
#pragma once

#include "lane.h"
#include "launch.h"

namespace entropy_po {
namespace ENTROPY_PO_ISA {

constexpr int kWarp = 32;

// What every kernel of a launch needs to find its columns. `columns` is a multiple of 16 bytes of logits.
struct Parts {
  int parts, columns;  // per row; of a part

  EP_DEVICE int64_t row() const { return blockIdx.x / unsigned(parts); }
  EP_DEVICE int begin() const { return int(blockIdx.x % unsigned(parts)) * columns; }
  EP_DEVICE int size(int n_cols) const { return max(0, min(columns, n_cols - begin())); }
};

// Sums between lanes, through shared or global memory. What the level leaves out is not read, so it costs nothing before.
template <int kLevel, class T>
EP_DEVICE void put_sums(const RowState<T>& state, T* sums) {
  sums[0] = state.m;
  sums[1] = state.s;
  sums[2] = kLevel >= kEntropy ? state.t : T(0);
  sums[3] = kLevel >= kExtras ? state.q : T(0);
  sums[4] = kLevel >= kExtras ? state.c : T(0);
  sums[5] = kLevel >= kExtras ? state.live : T(0);
}

template <class T>
EP_DEVICE RowState<T> get_sums(const T* sums) {
  return {sums[0], sums[1], sums[2], 0, 0, sums[3], sums[4], sums[5]};
}

// After this every lane of the warp has the sums of all of them.
template <int kLevel, class T>
EP_DEVICE void merge_warp(RowState<T>& state) {
  T top = state.m;
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) top = fmax(top, __shfl_xor_sync(~0u, top, step));
  state.rescale(top);
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) {
    state.s += __shfl_xor_sync(~0u, state.s, step);
    if (kLevel >= kEntropy) state.t += __shfl_xor_sync(~0u, state.t, step);
    if (kLevel >= kExtras) {
      state.q += __shfl_xor_sync(~0u, state.q, step);
      state.c += __shfl_xor_sync(~0u, state.c, step);
      state.live += __shfl_xor_sync(~0u, state.live, step);
    }
  }
}

// After this the lanes of the first warp have the sums of all lanes of the block.
template <int kLevel, class T>
EP_DEVICE void merge_block(RowState<T>& state) {
  __shared__ T of_warp[kWarp][kSums];
  merge_warp<kLevel>(state);
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  if (lane == 0) put_sums<kLevel>(state, of_warp[threadIdx.x / kWarp]);
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  state = lane < warps ? get_sums(of_warp[lane]) : RowState<T>::empty();
  merge_warp<kLevel>(state);
}

// Merge the sums of the tile's columns into the row's state, and the label's logit if it is one of them.
template <class Src, class T, bool kPlain>
EP_DEVICE void finish_row(const TileArgs& a, const RowReader<Src, T, kPlain>& reader, int64_t row, int level,
                          const RowState<T>& sums) {
  T* const st = static_cast<T*>(a.state) + row;
  const int64_t stride = a.state_stride;
  auto state = a.first ? RowState<T>::empty() : RowState<T>::load(st, stride, level);
  state.merge(sums);
  const int label = label_column(a, row);
  if (label >= 0) {
    const T u = reader.at(label);
    state.label_d = relative(u, reader.k, state.m);
    state.label_z = product(u, reader.k);  // rounded as the maximum is, so that the two compare exactly
  }
  state.store(st, stride, level);
}

template <class Src, class T, int kLevel, bool kPlain>
__global__ void __launch_bounds__(kMaxLanes<Src>, 2)
    fold_kernel(const TileArgs a, const LogitScales<T> scales, const Parts parts, T* workspace) {
  const int64_t row = parts.row();
  if (a.labels[row] == a.ignore_index) {
    if (a.first && parts.begin() == 0 && threadIdx.x == 0) {
      RowState<T>::ignored().store(static_cast<T*>(a.state) + row, a.state_stride, kLevel);
    }
    return;
  }
  const RowReader<Src, T, kPlain> reader(a, scales, row);
  const Segment segment(reader.x, parts.begin(), parts.size(int(a.n_cols)), threadIdx.x);
  RowState<T> state = RowState<T>::empty();
  fold_lane<kLevel>(reader, segment, threadIdx.x, blockDim.x, state);
  merge_block<kLevel>(state);
  if (threadIdx.x != 0) return;
  if (parts.parts == 1) {
    finish_row(a, reader, row, kLevel, state);
  } else {
    put_sums<kLevel>(state, workspace + int64_t(blockIdx.x) * kSums);
  }
}

// One warp per row, one lane per part.
template <class Src, class T>
__global__ void __launch_bounds__(kWarp)
    merge_kernel(const TileArgs a, const LogitScales<T> scales, const int parts, const T* workspace) {
  const int64_t row = blockIdx.x;
  if (a.labels[row] == a.ignore_index) return;
  RowState<T> state = RowState<T>::empty();
  if (int(threadIdx.x) < parts) state = get_sums(workspace + (row * parts + threadIdx.x) * kSums);
  merge_warp<kExtras>(state);
  if (threadIdx.x == 0) finish_row(a, RowReader<Src, T, false>(a, scales, row), row, a.level, state);
}

template <class Src, class Out, class T, bool kWantEntropy, bool kPlain>
__global__ void __launch_bounds__(kMaxLanes<Src>, 2)
    grad_kernel(const TileArgs a, const LogitScales<T> scales, const Parts parts) {
  constexpr int n = kPerVector<Src>, kLoads = kInFlight<kPlain>;
  // A narrow row overlays the front of its wide one: a vector lands on columns of itself and of ones before it, that a
  // slower warp may still have to read. So each round is read by all before any is written, and the edges come last.
  constexpr bool kNarrows = sizeof(Out) < sizeof(Src);
  const int lane = threadIdx.x, lanes = blockDim.x;
  const int64_t row = parts.row();
  const int begin = parts.begin(), size = parts.size(int(a.n_cols));
  Out* const out = static_cast<Out*>(a.out) + row * a.out_stride;
  const T* const st = static_cast<const T*>(a.state) + row;
  const T g_logp = a.g_logp ? static_cast<const T*>(a.g_logp)[row] : T(0);
  const T g_entropy = kWantEntropy ? static_cast<const T*>(a.g_entropy)[row] : T(0);
  const T s = st[a.state_stride];

  // An ignored row, a row nobody differentiates (0 * NaN must stay 0) and a row without a live entry have no gradient.
  if (a.labels[row] == a.ignore_index || (g_logp == T(0) && g_entropy == T(0)) || s == T(0)) {
    constexpr int n_out = kPerVector<Out>;
    const Segment segment(out, begin, size, lane);
    const T zeros[n_out] = {};
    for (int v = lane; v < segment.vectors; v += lanes) {
      store<n_out>(out + segment.first_vector_column + v * n_out, zeros);
    }
    if (segment.edge_column >= 0) store<1>(out + segment.edge_column, zeros);
    return;
  }

  const RowReader<Src, T, kPlain> reader(a, scales, row);
  const Segment segment(reader.x, begin, size, lane);
  const RowGradient<T> gradient(st[0], s, kWantEntropy ? st[2 * a.state_stride] : T(0), g_logp, g_entropy);
  // The label's is another formula, and its one store the last: to look for it among all columns would cost more. Its logit
  // is read first: another warp may soon write over it.
  const int label = label_column(a, row);
  const bool has_label = lane == 0 && label >= begin && label < begin + size;
  const T at_label = has_label ? label_gradient(reader, gradient, label) : T(0);
  __syncthreads();
  Src edge{};
  if (segment.edge_column >= 0) edge = reader.x[segment.edge_column];
  for (int first = 0; first < segment.vectors; first += kLoads * lanes) {
    Vector<Src, n> raw[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int v = first + i * lanes + lane;
      if (v < segment.vectors) raw[i] = load_streaming(reader.x + segment.first_vector_column + v * n);
    }
    if (kNarrows) __syncthreads();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int v = first + i * lanes + lane;
      if (v < segment.vectors) {
        const int col = segment.first_vector_column + v * n;
        T dz[n];
        grad_values<kWantEntropy, n>(reader, gradient, raw[i].x, col, dz);
        store<n>(out + col, dz);
      }
    }
  }
  if (kNarrows) __syncthreads();
  if (segment.edge_column >= 0) {
    T dz;
    grad_values<kWantEntropy, 1>(reader, gradient, &edge, segment.edge_column, &dz);
    store<1>(out + segment.edge_column, &dz);
  }
  __syncthreads();
  if (has_label) store<1>(out + label, &at_label);
}

inline bool is_plain(const TileArgs& a) { return !a.bias && !a.keep && a.softcap == 0.0; }

template <class T>
LogitScales<T> scales_of(const TileArgs& a) {
  return {a.logit_scale, a.softcap, a.row_temperature ? 1.0 : a.temperature};
}

template <class Src, class T, int kLevel>
void fold_level(const TileArgs& a, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  const Parts parts{plan.parts, plan.columns};
  const auto kernel = is_plain(a) ? fold_kernel<Src, T, kLevel, true> : fold_kernel<Src, T, kLevel, false>;
  launch(kernel, plan.blocks, plan.lanes, stream, a, scales_of<T>(a), parts, static_cast<T*>(workspace));
}

template <class Src, class T>
void fold_dtype(const TileArgs& a, const LaunchPlan& plan, void* workspace, cudaStream_t stream) {
  switch (a.level) {
    case kLogps: fold_level<Src, T, kLogps>(a, plan, workspace, stream); break;
    case kEntropy: fold_level<Src, T, kEntropy>(a, plan, workspace, stream); break;
    default: fold_level<Src, T, kExtras>(a, plan, workspace, stream);
  }
  if (plan.parts == 1) return;
  const auto* sums = static_cast<const T*>(workspace);
  launch(merge_kernel<Src, T>, unsigned(a.n_rows), kWarp, stream, a, scales_of<T>(a), plan.parts, sums);
}

template <class Src, class Out, class T>
void grad_dtype(const TileArgs& a, const LaunchPlan& plan, cudaStream_t stream) {
  const Parts parts{plan.parts, plan.columns};
  auto kernel = is_plain(a) ? grad_kernel<Src, Out, T, false, true> : grad_kernel<Src, Out, T, false, false>;
  if (a.g_entropy) kernel = is_plain(a) ? grad_kernel<Src, Out, T, true, true> : grad_kernel<Src, Out, T, true, false>;
  launch(kernel, plan.blocks, plan.lanes, stream, a, scales_of<T>(a), parts);
}

}  // namespace ENTROPY_PO_ISA
}  // namespace entropy_po
