// What one lane (thread) does with its share of a row: 16-byte loads, the transform, and the row mathematics of tile.h.
//
// A row segment is cut at 16-byte boundaries: vectors go round the lanes of a block, kInFlight of them on their way per
// lane; what is left on either side, less than a vector each, goes to one lane per column. Nothing here waits for another
// lane: barriers and shuffles are the kernels'.
#pragma once

#include "../half.h"
#include "../tile.h"
#include "../tile_args.h"
#include "ptx.h"

#define EP_DEVICE __device__ __forceinline__

namespace entropy_po {
namespace ENTROPY_PO_ISA {

// Loads per lane before the first use. 1,024 lanes on a multiprocessor then have 64 KiB on their way, or 32 KiB beside
// the registers of a softcap; an H200 needs about 25 KiB (4.8 TB/s x 0.7 us over 132 multiprocessors).
template <bool kPlain>
constexpr int kInFlight = kPlain ? 4 : 2;
template <class Src>
constexpr int kPerVector = 16 / int(sizeof(Src));

template <class E, int kCount>
struct alignas(sizeof(E) * kCount) Vector {
  E x[kCount];
};

// exp for the sums and the probabilities: that of the special function unit, 16 a clock on a multiprocessor. A bf16 fold
// at 4.8 TB/s (H200: 132 multiprocessors, about 1.75 GHz) needs 10.4 a clock and has 12 instruction slots per logit. This
// exp takes 2 of the 9.3 that are used; with the polynomial of tile.h, which takes 13, the loop would be bound by them.
// Relative error: 2.4e-7 (2 units in the last place) of the instruction, and 6e-8 |d log2 e| of the rounded product. In s
// and t they weigh by p, against a bar of 2e-5 nats: 5e-7 where the mean |d| is 4, even if all were of one sign.
EP_DEVICE float lane_exp(float d) { return ex2_approx(d * Numeric<float>::kLog2e); }
EP_DEVICE double lane_exp(double d) { return exp_floored(floored(d)); }

// floored() in one instruction, for d as a factor: lane_exp takes -inf as it is.
EP_DEVICE float lane_floored(float d) { return max_or_nan(d, Numeric<float>::kFloor); }
EP_DEVICE double lane_floored(double d) { return floored(d); }

// tanh(v) and its derivative, of the same unit's instructions: half as many as tile.h's, which serve fp64. Neither cancels
// where tanh saturates, nor tanh near 0.
EP_DEVICE void lane_tanh_and_slope(float v, float& tanh_v, float& slope) {
  // e = exp(-2 v); past 2^60 nothing changes any more, and inf / inf would be NaN
  const float e = ex2_approx(-max_or_nan(v * (2.0f * Numeric<float>::kLog2e), -60.0f));
  const float inverse = rcp_approx(1.0f + e);
  // below 0.3, where 1 - e cancels: v + v^3 p(v^2) with p at Chebyshev nodes, relative error 4.3e-8
  const float w = v * v;
  const float p = (w * -0.05113268f + 0.13323874f) * w - 0.33333286f;
  tanh_v = std::fabs(v) < 0.3f ? v * w * p + v : (1.0f - e) * inverse;
  slope = 4.0f * e * inverse * inverse;
}
EP_DEVICE void lane_tanh_and_slope(double v, double& tanh_v, double& slope) { tanh_and_slope(v, tanh_v, slope); }

// Columns [begin, begin + size) of a row as vectors. `edge_column` is this lane's column outside of them, or -1.
struct Segment {
  int first_vector_column, vectors, edge_column;

  template <class E>
  EP_DEVICE Segment(const E* row, int begin, int size, int lane) {
    constexpr int n = kPerVector<E>;
    const int past = int(reinterpret_cast<uintptr_t>(row + begin) / sizeof(E)) & (n - 1);
    const int head = min(size, (n - past) & (n - 1));
    vectors = (size - head) / n;
    first_vector_column = begin + head;
    const int edges = size - vectors * n;  // fewer than 2 n <= 16, and a block has at least 32 lanes
    edge_column = lane < head ? begin + lane : lane < edges ? begin + lane + vectors * n : -1;
  }
};

template <class E, int kCount>
EP_DEVICE bool is_aligned(const E* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Vector<E, kCount>) == 0;
}

// p[0, kCount) of something that stays in the caches.
template <int kCount, class E>
EP_DEVICE Vector<E, kCount> load_cached(const E* p) {
  constexpr int n = kCount < kPerVector<E> ? kCount : kPerVector<E>;
  Vector<E, kCount> v;
  if (is_aligned<E, n>(p)) {
    for (int i = 0; i < kCount; i += n) {
      const auto part = *reinterpret_cast<const Vector<E, n>*>(p + i);
      for (int j = 0; j < n; ++j) v.x[i + j] = part.x[j];
    }
  } else {
    for (int i = 0; i < kCount; ++i) v.x[i] = p[i];
  }
  return v;
}

// 16 bytes of logits, marked first to be evicted: nothing reads them again before a cache has been written over.
template <class Src>
EP_DEVICE Vector<Src, kPerVector<Src>> load_streaming(const Src* p) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
  Vector<Src, kPerVector<Src>> v;
  memcpy(&v, &bits, 16);
  return v;
}

// The logits as numbers. Two bf16 are the halves of a word shifted into place; one by one they cost an extraction more.
template <int kCount, class Src, class T>
EP_DEVICE void widen(const Src* raw, T* u) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) u[i] = to<T>(raw[i]);
}
template <int kCount>
EP_DEVICE void widen(const BFloat16* raw, float* u) {
  uint32_t word = raw[0].bits;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (kCount > 1 && i % 2 == 0) memcpy(&word, raw + i, 4);
    u[i] = as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
  }
}

// `kPlain`: no bias, softcap or keep mask. Both kinds serve every logit scale and temperature.
template <class Src, class T, bool kPlain>
struct RowReader : LogitScales<T> {
  const Src* x;         // the row's column 0
  const T* bias;        // or null
  const uint8_t* keep;  // the row's column 0, or null

  EP_DEVICE RowReader(const TileArgs& a, const LogitScales<T>& scales, int64_t row)
      : LogitScales<T>(scales),
        x(static_cast<const Src*>(a.tile) + row * a.tile_stride),
        bias(static_cast<const T*>(a.bias)),
        keep(a.keep ? a.keep + row * a.keep_stride : nullptr) {
    if (a.row_temperature) this->divide_by(static_cast<const T*>(a.row_temperature)[row]);
  }

  // u of the logits `raw` at columns col.., and tanh's slope if there is a softcap, under which -inf stays -inf.
  template <bool kSlope, int kCount>
  EP_DEVICE void transform(const Src* raw, int col, T* u, T* slope) const {
    constexpr T kMinusInf = Numeric<T>::kMinusInf;
    widen<kCount>(raw, u);
    if (kPlain) return;
    if (bias) {
      const auto b = load_cached<kCount>(bias + col);
#pragma unroll
      for (int i = 0; i < kCount; ++i) u[i] += b.x[i];
    }
    if (keep) {  // before the softcap: the slope at what it removes, a NaN perhaps, is 0
      const auto kept = load_cached<kCount>(keep + col);
#pragma unroll
      for (int i = 0; i < kCount; ++i) u[i] = kept.x[i] ? u[i] : kMinusInf;
    }
    if (this->before_tanh != T(0)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        T y, dy;
        lane_tanh_and_slope(u[i] * this->before_tanh, y, dy);
        u[i] = u[i] == kMinusInf ? kMinusInf : y;
        if (kSlope) slope[i] = dy;
      }
    }
  }

  EP_DEVICE T at(int col) const {
    T u;
    transform<false, 1>(x + col, col, &u, nullptr);
    return u;
  }
};

// z - m, or z itself while nothing is live: any finite reference gives exact zeros, and still lets a NaN through.
template <class T>
EP_DEVICE T relative(T u, T k, T m) {
  return fma(u, k, m == Numeric<T>::kMinusInf ? T(0) : -m);
}

template <int kLevel, int kCount, class T>
EP_DEVICE void fold_values(const T* u, T k, RowState<T>& state) {
  T top = u[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) top = fmax(top, u[i]);
  state.rescale(product(top, k));
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const T d = relative(u[i], k, state.m);
    const T e = lane_exp(d);
    state.s += e;
    if (kLevel >= kEntropy) state.t += e * lane_floored(d);
    if (kLevel >= kExtras) {
      const bool alive = d != Numeric<T>::kMinusInf;
      state.q += e * e;
      state.c += alive ? d : T(0);
      state.live += alive ? T(1) : T(0);
    }
  }
}

// kInFlight vectors of this lane, the first at index v; `kWhole`: all of them are in the segment. One vector at a time
// meets the maximum: all at once would save a comparison per vector, and need 24 more registers than there are.
template <int kLevel, bool kWhole, class Src, class T, bool kPlain>
EP_DEVICE void fold_vectors(const RowReader<Src, T, kPlain>& row, const Segment& part, int v, int lanes,
                            RowState<T>& state) {
  constexpr int n = kPerVector<Src>, kLoads = kInFlight<kPlain>;
  Vector<Src, n> raw[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int index = v + i * lanes;
    if (kWhole || index < part.vectors) raw[i] = load_streaming(row.x + part.first_vector_column + index * n);
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int index = v + i * lanes;
    if (kWhole || index < part.vectors) {
      T u[n];
      row.template transform<false, n>(raw[i].x, part.first_vector_column + index * n, u, nullptr);
      fold_values<kLevel, n>(u, row.k, state);
    }
  }
}

// After this `state` has the columns of one lane.
template <int kLevel, class Src, class T, bool kPlain>
EP_DEVICE void fold_lane(const RowReader<Src, T, kPlain>& row, const Segment& part, int lane, int lanes,
                         RowState<T>& state) {
  const int round = kInFlight<kPlain> * lanes;
  int first = 0;
  for (; first + round <= part.vectors; first += round) {
    fold_vectors<kLevel, true>(row, part, first + lane, lanes, state);
  }
  if (first < part.vectors) fold_vectors<kLevel, false>(row, part, first + lane, lanes, state);
  if (part.edge_column >= 0) {
    const T u = row.at(part.edge_column);
    fold_values<kLevel, 1>(&u, row.k, state);
  }
}

// The column of the row's label, or -1 if it is a column of another tile or of none.
EP_DEVICE int label_column(const TileArgs& a, int64_t row) {
  const int64_t column = a.labels[row] - a.vocab_start;
  return column >= 0 && column < a.n_cols ? int(column) : -1;
}

// d loss / d x of columns col.., in dz, (4) of kernels/README.md without the label's term.
template <bool kWantEntropy, int kCount, class Src, class T, bool kPlain>
EP_DEVICE void grad_values(const RowReader<Src, T, kPlain>& row, const RowGradient<T>& gradient, const Src* raw,
                           int col, T* dz) {
  T u[kCount], slope[kCount];
  row.template transform<true, kCount>(raw, col, u, slope);
  const T scale = -row.chain / gradient.s;
  const T logp_scale = gradient.from_logp * scale, entropy_scale = gradient.from_entropy * scale;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const T d = fma(u[i], row.k, -gradient.m);
    dz[i] =
        lane_exp(d) * (kWantEntropy ? logp_scale + entropy_scale * (lane_floored(d) - gradient.mean_d) : logp_scale);
    if (!kPlain && row.before_tanh != T(0)) dz[i] *= slope[i];
  }
}

// The same of the label's column.
template <class Src, class T, bool kPlain>
EP_DEVICE T label_gradient(const RowReader<Src, T, kPlain>& row, const RowGradient<T>& gradient, int col) {
  T u, slope = T(1);
  row.template transform<true, 1>(row.x + col, col, &u, &slope);
  const T dz = gradient.at_label(fma(u, row.k, -gradient.m)) * row.chain;
  return !kPlain && row.before_tanh != T(0) ? dz * slope : dz;
}

template <int kCount, class Out, class T>
EP_DEVICE void store(Out* out, const T* dz) {
  if (is_aligned<Out, kCount>(out)) {
    Vector<Out, kCount> v;
#pragma unroll
    for (int i = 0; i < kCount; ++i) v.x[i] = Rounded<Out>::from(dz[i]);
    *reinterpret_cast<Vector<Out, kCount>*>(out) = v;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = Rounded<Out>::from(dz[i]);
  }
}

}  // namespace ENTROPY_PO_ISA
}  // namespace entropy_po
