// Row mathematics of a vocabulary tile, once, for every backend compiled from C++ (derivation: kernels/README.md).
//
// A row of transformed logits z is summarised relative to its running maximum m:
//   s = sum exp(z - m)      t = sum exp(z - m) * (z - m)       label_d = z[label] - m     label_z = z[label]
//   q = sum exp(z - m)^2    c = sum (z - m) over live entries  live = number of entries with z > -inf
// so that lse = m + log s, logp = label_d - log s and entropy = log s - t / s never subtract two large numbers.
//
// Each instruction set compiles this header into its own namespace: an inline function emitted with AVX-512 under a
// shared name could be the copy that the linker keeps for a machine without it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "tile_args.h"

#if defined(__CUDACC__)
#define EP_INLINE __host__ __device__ __forceinline__
#else
#define EP_INLINE inline __attribute__((always_inline))
#endif

#ifndef ENTROPY_PO_ISA
#define ENTROPY_PO_ISA host
#endif

namespace entropy_po {
namespace ENTROPY_PO_ISA {

// What a fold accumulates. A lower level is a separate compiled variant and pays nothing for the higher ones.
enum Level : int { kLogps = 0, kEntropy = 1, kExtras = 2 };

template <class T>
struct Numeric;

template <>
struct Numeric<float> {
  using Bits = uint32_t;
  static constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  // exp(kFloor) comes out as an exact 0: its power of two is the one below all normals
  static constexpr float kFloor = -88.2f;
  static constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float kLog2e = 1.44269504088896341f;
  static constexpr float kLn2Hi = 0.693359375f;
  static constexpr float kLn2Lo = -2.12194440e-4f;
  static constexpr Bits kExponentBias = 127;
  static constexpr int kMantissaBits = 23;
  // (exp(r) - 1 - r) / r^2 on |r| <= ln2 / 2, interpolated at Chebyshev nodes: relative error of exp 1.1e-8,
  // against a rounding unit of 6e-8.
  static EP_INLINE float exp_tail(float r) {
    float p = 0.0013926250394433737f;
    p = p * r + 0.0083632329478860f;
    p = p * r + 0.04166655242443085f;
    p = p * r + 0.16666576266288757f;
    return p * r + 0.5f;
  }
};

template <>
struct Numeric<double> {
  using Bits = uint64_t;
  static constexpr double kMinusInf = -std::numeric_limits<double>::infinity();
  static constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  static constexpr double kFloor = -709.2;
  static constexpr double kRoundMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kLn2Hi = 6.93147180369123816490e-01;
  static constexpr double kLn2Lo = 1.90821492927058770002e-10;
  static constexpr Bits kExponentBias = 1023;
  static constexpr int kMantissaBits = 52;
  // Taylor through r^13 / 13!: the next term is 4e-18 on |r| <= ln2 / 2.
  static EP_INLINE double exp_tail(double r) {
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    return p * r + 0.5;
  }
};

// d, but no lower than where exp is 0 anyway: -inf becomes finite, so that 0 * d is 0; a NaN stays a NaN. One select and
// no second comparison: two on the same value are threaded into a branch, and the loop is scalar.
template <class T>
EP_INLINE T floored(T d) {
  return d < Numeric<T>::kFloor ? Numeric<T>::kFloor : d;
}

// exp(d) = scale * (1 + tail) for kFloor <= d <= 0. Branch-free, no libm call, so the loops around it vectorise. An
// exponent under the normal range gives scale = 0 exactly, which is how an entry of -inf contributes nothing at all
// (what is dropped with it is below 1.2e-38 against s >= 1). A NaN stays a NaN: tail carries it.
template <class T>
EP_INLINE void exp_parts(T d, T& scale, T& tail) {
  using N = Numeric<T>;
  using Bits = typename N::Bits;  // unsigned: the shift drops what is above the exponent
  const T shifted = d * N::kLog2e + N::kRoundMagic;
  const T n = shifted - N::kRoundMagic;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof(T));
  bits = (bits + N::kExponentBias) << N::kMantissaBits;
  std::memcpy(&scale, &bits, sizeof(T));
  const T r = (d - n * N::kLn2Hi) - n * N::kLn2Lo;
  tail = r + r * r * N::exp_tail(r);
}

template <class T>
EP_INLINE T exp_floored(T d) {
  T scale, tail;
  exp_parts(d, scale, tail);
  return scale * tail + scale;
}

// tanh(v) and its derivative from e = exp(-2|v|) and e - 1: neither cancels near 0, nor where tanh saturates.
template <class T>
EP_INLINE void tanh_and_slope(T v, T& tanh_v, T& slope) {
  T scale, tail;
  exp_parts(floored(T(-2) * std::fabs(v)), scale, tail);
  const T e = scale * tail + scale;
  const T em1 = scale * tail + (scale - T(1));
  const T denominator = T(2) + em1;
  const T magnitude = -em1 / denominator;
  tanh_v = v < T(0) ? -magnitude : magnitude;
  slope = T(4) * e / (denominator * denominator);
}

// From logits to z = k * u with k > 0, for one temperature (u: the transform before k):
//   without a softcap: u = x + bias,                             k = logit_scale / temperature
//   with one:          u = tanh((x + bias) * logit_scale / cap),  k = cap / temperature
// z - m is then fma(u, k, -m), rounded once: a temperature does not turn a common offset of the logits into an error.
template <class T>
struct LogitScales {
  T k;
  T chain;        // dz/dx, but for tanh's slope
  T before_tanh;  // 0: no softcap

  LogitScales(double logit_scale, double softcap, double temperature)  // softcap 0: none
      : k(T((softcap != 0.0 ? softcap : logit_scale) / temperature)),
        chain(T(logit_scale / temperature)),
        before_tanh(softcap != 0.0 ? T(logit_scale / softcap) : T(0)) {}

  EP_INLINE void divide_by(T temperature) {
    k /= temperature;
    chain /= temperature;
  }
};

// Row state in registers. The CPU keeps it in double: a row sums up to 10^6 terms, and this is touched once per block.
// A GPU lane keeps its own few hundred terms in the tile's arithmetic.
template <class T>
struct RowState {
  T m, s, t, label_d, label_z, q, c, live;

  // No column yet: a label that no tile has held reads NaN, not 0.
  static EP_INLINE RowState empty() {
    return {Numeric<T>::kMinusInf, 0, 0, Numeric<T>::kNan, Numeric<T>::kNan, 0, 0, 0};
  }
  // Of a row that is not computed: everything that `write_stats` makes of it is 0.
  static EP_INLINE RowState ignored() { return {0, 1, 0, 0, -1, 1, 0, 1}; }

  // Row `at` of TileArgs::state, of which a level below kExtras has five numbers, not eight.
  template <class Stored>
  static EP_INLINE RowState load(const Stored* at, int64_t stride, int level) {
    RowState r{at[0], at[stride], at[2 * stride], at[3 * stride], at[4 * stride], 0, 0, 0};
    if (level >= kExtras) {
      r.q = at[5 * stride];
      r.c = at[6 * stride];
      r.live = at[7 * stride];
    }
    return r;
  }
  template <class Stored>
  EP_INLINE void store(Stored* at, int64_t stride, int level) const {
    at[0] = Stored(m);
    at[stride] = Stored(s);
    at[2 * stride] = level >= kEntropy ? Stored(t) : Stored(0);  // below, it was moved along and never summed
    at[3 * stride] = Stored(label_d);
    at[4 * stride] = Stored(label_z);
    if (level >= kExtras) {
      at[5 * stride] = Stored(q);
      at[6 * stride] = Stored(c);
      at[7 * stride] = Stored(live);
    }
  }

  // Make `new_m` the reference maximum. After this every sum is relative to it. `m` = -inf means nothing is summed yet.
  EP_INLINE void rescale(T new_m) {
    if (!(new_m > m)) return;
    if (m != Numeric<T>::kMinusInf) {
      const T delta = m - new_m;
      const T shrink = std::exp(delta);
      t = shrink == T(0) ? T(0) : (t + s * delta) * shrink;
      s *= shrink;
      q *= shrink * shrink;
      c += live * delta;
      label_d += delta;
    }
    m = new_m;
  }

  // Add the sums of other columns of the row. The label stays this one's.
  EP_INLINE void merge(RowState other) {
    rescale(other.m);
    other.rescale(m);
    s += other.s;
    t += other.t;
    q += other.q;
    c += other.c;
    live += other.live;
  }
};

// What a complete state says of its row, (3) of kernels/README.md, for the outputs that are wanted. Differences are taken in
// double: two numbers a row, once per call.
template <class T>
EP_INLINE void write_stats(const StatsArgs& a, int64_t row) {
  const T* const at = static_cast<const T*>(a.state) + row;
  const bool extras = a.mean_logit || a.log_sum_sq_probs;
  const auto state = RowState<double>::load(at, a.state_stride, extras ? kExtras : kEntropy);
  const double log_s = std::log(state.s), entropy = log_s - state.t / state.s;
  if (a.logps) static_cast<T*>(a.logps)[row] = T(state.label_d - log_s);
  if (a.entropy) static_cast<T*>(a.entropy)[row] = T(entropy < 0.0 ? 0.0 : entropy);
  if (a.lse) static_cast<T*>(a.lse)[row] = T(state.m + log_s);
  if (a.is_top1) a.is_top1[row] = state.label_z >= state.m;
  if (a.mean_logit) static_cast<T*>(a.mean_logit)[row] = T(state.m + state.c / state.live);
  if (a.log_sum_sq_probs) static_cast<T*>(a.log_sum_sq_probs)[row] = T(std::log(state.q) - 2.0 * log_s);
}

// d loss / d z of a row: -p_j * (from_logp + from_entropy * ((z_j - m) - mean_d)), plus from_logp at the label, where
//   d logp / d z_j = 1[j = label] - p_j        d entropy / d z_j = -p_j (log p_j + entropy) = -p_j ((z_j - m) - t / s)
// because log p_j + entropy = (z_j - m) - log s + log s - t / s. No log is needed, and no common offset enters.
template <class T>
struct RowGradient {
  T m, s, mean_d, from_logp, from_entropy;

  EP_INLINE RowGradient(T m_, T s_, T t, T g_logp, T g_entropy)
      : m(m_), s(s_), mean_d(t / s_), from_logp(g_logp), from_entropy(g_entropy) {}

  // At the label, 1 - p is formed as -expm1(log p), which keeps its digits when p rounds to 1.
  EP_INLINE T at_label(T d) const {
    if (d == Numeric<T>::kMinusInf) return T(0);
    const T log_p = d - std::log(s);
    return -from_logp * std::expm1(log_p) - from_entropy * std::exp(log_p) * (d - mean_d);
  }
};

}  // namespace ENTROPY_PO_ISA
}  // namespace entropy_po
