// fold and grad over the rows of a tile. Included once per instruction set by tile_cpu_*.cpp, after the target is set.
//
// One thread takes whole rows. A row is walked in blocks that stay in L1: load and transform into a local buffer, then
// one or two vectorised passes over the buffer. DRAM sees one read per fold, one read and one write per grad.
#include <type_traits>

#include "half.h"
#include "tile.h"
#include "tile_cpu.h"

namespace entropy_po {
namespace ENTROPY_PO_ISA {

constexpr int64_t kBlock = 1024;  // 4 KiB of fp32; grad has three such buffers
// Rows cost alike, but a shared machine's cores do not: whoever is free takes the next.
constexpr int64_t kRowsPerGrab = 4;
constexpr int64_t kElementsPerThread = 1 << 14;  // below this a second thread costs more than it brings

// The logit transform of one row: `apply` makes u, and the passes form z - m as u * k - m (LogitScales).
template <class T>
struct RowTransform : LogitScales<T> {
  const T* bias;  // [n_cols] or null
  const uint8_t* keep;

  RowTransform(const TileArgs& a, int64_t row)
      : LogitScales<T>(a.logit_scale, a.softcap, a.row_temperature ? 1.0 : a.temperature),
        bias(static_cast<const T*>(a.bias)),
        keep(a.keep ? a.keep + row * a.keep_stride : nullptr) {
    if (a.row_temperature) this->divide_by(static_cast<const T*>(a.row_temperature)[row]);
  }

  // u of x[0, n), columns col.. of the tile, in `u` or, where there is nothing to do, x itself; kSlope: tanh's too. A
  // logit of -inf stays -inf under a softcap: it means "not in the vocabulary", not "minus the cap".
  template <bool kSlope, class Src>
  EP_INLINE const T* apply(const Src* x, int64_t col, int64_t n, T* u, T* slope) const {
    constexpr T kMinusInf = Numeric<T>::kMinusInf;
    const T before_tanh = this->before_tanh;
    if constexpr (std::is_same_v<Src, T>) {
      if (!bias && !keep && before_tanh == T(0)) return x;
    }
    if (bias) {
      const T* b = bias + col;
      for (int64_t j = 0; j < n; ++j) u[j] = to<T>(x[j]) + b[j];
    } else {
      for (int64_t j = 0; j < n; ++j) u[j] = to<T>(x[j]);
    }
    if (keep) {  // before the softcap: the slope at what it removes, a NaN perhaps, is 0
      const uint8_t* keep_block = keep + col;
      for (int64_t j = 0; j < n; ++j) u[j] = keep_block[j] ? u[j] : kMinusInf;
    }
    if (before_tanh != T(0)) {
      for (int64_t j = 0; j < n; ++j) {
        T y, dy;
        tanh_and_slope(u[j] * before_tanh, y, dy);
        u[j] = u[j] == kMinusInf ? kMinusInf : y;
        if (kSlope) slope[j] = dy;
      }
    }
    return u;
  }
};

template <class T>
EP_INLINE T block_max(const T* u, int64_t n) {
  T m = Numeric<T>::kMinusInf;
#pragma omp simd reduction(max : m)
  for (int64_t j = 0; j < n; ++j) m = u[j] > m ? u[j] : m;
  return m;
}

template <int kLevel, class T>
EP_INLINE void fold_block(const T* u, int64_t n, T k, RowState<double>& row) {
  row.rescale(block_max(u, n) * k);
  // Nothing but -inf so far: any finite reference gives exact zeros, and still lets a NaN through.
  const T m = row.m == Numeric<double>::kMinusInf ? T(0) : T(row.m);
  T s = 0, t = 0, q = 0, c = 0, live = 0;
#pragma omp simd reduction(+ : s, t, q, c, live)
  for (int64_t j = 0; j < n; ++j) {
    const T raw = u[j] * k - m;
    const T d = floored(raw);
    const T e = exp_floored(d);
    s += e;
    if (kLevel >= kEntropy) t += e * d;
    if (kLevel >= kExtras) {
      const bool alive = raw != Numeric<T>::kMinusInf;
      q += e * e;
      c += alive ? raw : T(0);
      live += alive ? T(1) : T(0);
    }
  }
  row.s += s;
  row.t += t;
  row.q += q;
  row.c += c;
  row.live += live;
}

template <class Src, class T, int kLevel>
void fold_rows(const TileArgs& a) {
  T* state = static_cast<T*>(a.state);
  const int64_t stride = a.state_stride;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, kRowsPerGrab)
  for (int64_t i = 0; i < a.n_rows; ++i) {
    T* st = state + i;
    if (a.labels[i] == a.ignore_index) {
      if (a.first) RowState<double>::ignored().store(st, stride, kLevel);
      continue;
    }
    const Src* x = static_cast<const Src*>(a.tile) + i * a.tile_stride;
    const RowTransform<T> transform(a, i);
    const int64_t label = a.labels[i] - a.vocab_start;
    auto row = a.first ? RowState<double>::empty() : RowState<double>::load(st, stride, kLevel);
    alignas(64) T buffer[kBlock];
    for (int64_t col = 0; col < a.n_cols; col += kBlock) {
      const int64_t n = a.n_cols - col < kBlock ? a.n_cols - col : kBlock;
      const T* u = transform.template apply<false>(x + col, col, n, buffer, static_cast<T*>(nullptr));
      fold_block<kLevel>(u, n, transform.k, row);
      if (label >= col && label < col + n) {
        const double label_u = u[label - col];
        row.label_z = T(u[label - col] * transform.k);  // rounded as the maximum is, so that the two compare exactly
        row.label_d = label_u * transform.k - (std::isinf(row.m) ? 0.0 : row.m);
      }
    }
    row.store(st, stride, kLevel);
  }
}

template <class Src, class Out, class T, bool kEntropyGradient>
void grad_rows(const TileArgs& a) {
  const T* state = static_cast<const T*>(a.state);
  const T* g_logp = static_cast<const T*>(a.g_logp);
  const T* g_entropy = static_cast<const T*>(a.g_entropy);
  const int64_t stride = a.state_stride;
#pragma omp parallel for num_threads(a.threads) schedule(dynamic, kRowsPerGrab)
  for (int64_t i = 0; i < a.n_rows; ++i) {
    const Src* x = static_cast<const Src*>(a.tile) + i * a.tile_stride;
    Out* out = static_cast<Out*>(a.out) + i * a.out_stride;
    const T gl = g_logp ? g_logp[i] : T(0);
    const T ge = kEntropyGradient ? g_entropy[i] : T(0);
    const double m = state[i], s = state[i + stride];
    // An ignored row, a row nobody differentiates (0 * NaN must stay 0) and a row without a live entry have no gradient.
    if (a.labels[i] == a.ignore_index || (gl == T(0) && ge == T(0)) || s == 0.0) {
      std::memset(static_cast<void*>(out), 0, sizeof(Out) * a.n_cols);
      continue;
    }
    const RowTransform<T> transform(a, i);
    const RowGradient<double> gradient(m, s, state[i + 2 * stride], gl, ge);
    const bool capped = transform.before_tanh != T(0);
    const T k = transform.k, chain = transform.chain;
    const T row_m = T(m), mean_d = T(gradient.mean_d);
    const T inv_s = T(1.0 / s);
    const T logp_scale = -gl * inv_s * chain, entropy_scale = -ge * inv_s * chain;
    const int64_t label = a.labels[i] - a.vocab_start;
    alignas(64) T buffer[kBlock];
    alignas(64) T dz[kBlock];
    alignas(64) T slope[kBlock];
    for (int64_t col = 0; col < a.n_cols; col += kBlock) {
      const int64_t n = a.n_cols - col < kBlock ? a.n_cols - col : kBlock;
      const T* u = capped ? transform.template apply<true>(x + col, col, n, buffer, slope)
                          : transform.template apply<false>(x + col, col, n, buffer, slope);
      const bool has_label = label >= col && label < col + n;
      const double label_d = has_label ? double(u[label - col]) * k - m : 0.0;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const T d = floored(u[j] * k - row_m);
        const T e = exp_floored(d);
        dz[j] = e * (kEntropyGradient ? logp_scale + entropy_scale * (d - mean_d) : logp_scale);
      }
      if (has_label) dz[label - col] = T(gradient.at_label(label_d)) * chain;
      if (capped) {
        for (int64_t j = 0; j < n; ++j) dz[j] *= slope[j];
      }
      for (int64_t j = 0; j < n; ++j) out[col + j] = Rounded<Out>::from(dz[j]);
    }
  }
}

template <class Src, class T>
void fold_dtype(const TileArgs& a) {
  switch (a.level) {
    case kLogps: return fold_rows<Src, T, kLogps>(a);
    case kEntropy: return fold_rows<Src, T, kEntropy>(a);
    default: return fold_rows<Src, T, kExtras>(a);
  }
}

template <class Src, class Out, class T>
void grad_dtype(const TileArgs& a) {
  if (a.g_entropy) return grad_rows<Src, Out, T, true>(a);
  return grad_rows<Src, Out, T, false>(a);
}

inline TileArgs with_useful_threads(const TileArgs& a) {
  TileArgs b = a;
  const int64_t useful = a.n_rows * a.n_cols / kElementsPerThread + 1;
  if (useful < b.threads) b.threads = static_cast<int>(useful);
  return b;
}

void fold(const TileArgs& args) {
  const TileArgs a = with_useful_threads(args);
  switch (a.dtype) {
    case DType::kFloat32: return fold_dtype<float, float>(a);
    case DType::kBFloat16: return fold_dtype<BFloat16, float>(a);
    case DType::kFloat16: return fold_dtype<Float16, float>(a);
    case DType::kFloat64: return fold_dtype<double, double>(a);
  }
}

void grad(const TileArgs& args) {
  const TileArgs a = with_useful_threads(args);
  if (a.dtype == DType::kFloat32 && a.out_dtype == DType::kBFloat16) return grad_dtype<float, BFloat16, float>(a);
  switch (a.dtype) {
    case DType::kFloat32: return grad_dtype<float, float, float>(a);
    case DType::kBFloat16: return grad_dtype<BFloat16, BFloat16, float>(a);
    case DType::kFloat16: return grad_dtype<Float16, Float16, float>(a);
    case DType::kFloat64: return grad_dtype<double, double, double>(a);
  }
}

void stats(const StatsArgs& a) {
  for (int64_t i = 0; i < a.n_rows; ++i) a.is_double ? write_stats<double>(a, i) : write_stats<float>(a, i);
}

}  // namespace ENTROPY_PO_ISA
}  // namespace entropy_po
