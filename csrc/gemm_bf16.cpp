// hidden [n, D] @ weight [v, D].T in bf16 with fp32 results, for processors with AVX512_BF16.
//
// A bf16 product of two bf16 numbers is exact in fp32, and VDPBF16PS sums in fp32; what loses the digits of a logit is
// only the rounding of the result, which no CPU library lets one leave out. So this keeps it, at the rate of the bf16 unit.
//
// A thread takes 32 columns at a time: it lays their weights out as [D / 2][32] pairs, once, and walks down the rows 12 at
// a time, 24 accumulators in registers, no store until a sum is complete. The panel (64 * D bytes) stays in L2.
#include "gemm_bf16.h"

#ifdef ENTROPY_PO_AVX512_BF16
#include <immintrin.h>

#include <cstdlib>
#include <memory>

#pragma GCC target("arch=x86-64-v4,avx512bf16")

namespace entropy_po {
namespace {

constexpr int64_t kPanel = 32;  // columns: two vectors of fp32 sums
constexpr int kRows = 12;       // 12 x 2 accumulators + 2 panel vectors of the 32 registers

// [D / 2][32] pairs of panel columns; columns past `live` are zero.
void pack_panel(const uint16_t* weight, int64_t stride, int64_t live, int64_t pairs, uint32_t* panel) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int half = 0; half < 2; ++half) {
    const int64_t rows = live - 16 * half < 0 ? 0 : (live - 16 * half > 16 ? 16 : live - 16 * half);
    const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1u);
    const uint16_t* base = weight + 16 * half * stride;
    // 64-bit lane offsets: a row of the weight may start past 2^31 bytes from the panel's first
    const __m512i step = _mm512_mullo_epi64(_mm512_set1_epi64(stride * 2), _mm512_cvtepi32_epi64(_mm512_castsi512_si256(lanes)));
    const __m512i upper = _mm512_add_epi64(step, _mm512_set1_epi64(stride * 2 * 8));
    for (int64_t p = 0; p < pairs; ++p) {
      const uint16_t* at = base + 2 * p;
      const __m256i zero = _mm256_setzero_si256();
      const __m256i low = _mm512_mask_i64gather_epi32(zero, static_cast<__mmask8>(mask), step, at, 1);
      const __m256i high = _mm512_mask_i64gather_epi32(zero, static_cast<__mmask8>(mask >> 8), upper, at, 1);
      _mm512_store_si512(panel + p * kPanel + 16 * half, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
  }
}

template <int kM>
inline void multiply(const uint16_t* hidden, int64_t stride, const uint32_t* panel, int64_t pairs, float* out,
                     int64_t out_stride, __mmask16 mask0, __mmask16 mask1) {
  __m512 sum[kM][2];
  for (int i = 0; i < kM; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    const __m512bh w0 = (__m512bh)_mm512_load_si512(panel + p * kPanel);
    const __m512bh w1 = (__m512bh)_mm512_load_si512(panel + p * kPanel + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kM; ++i) {
      int32_t pair;
      std::memcpy(&pair, hidden + i * stride + 2 * p, 4);
      const __m512bh h = (__m512bh)_mm512_set1_epi32(pair);
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], w0, h);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], w1, h);
    }
  }
  for (int i = 0; i < kM; ++i) {
    _mm512_mask_storeu_ps(out + i * out_stride, mask0, sum[i][0]);
    _mm512_mask_storeu_ps(out + i * out_stride + 16, mask1, sum[i][1]);
  }
}

template <int kM>
void multiply_tail(int64_t rows, const uint16_t* hidden, int64_t stride, const uint32_t* panel, int64_t pairs, float* out,
                   int64_t out_stride, __mmask16 mask0, __mmask16 mask1) {
  if constexpr (kM > 0) {
    if (rows == kM) return multiply<kM>(hidden, stride, panel, pairs, out, out_stride, mask0, mask1);
    multiply_tail<kM - 1>(rows, hidden, stride, panel, pairs, out, out_stride, mask0, mask1);
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

}  // namespace

bool gemm_bf16_supported() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool gemm_bf16(const GemmBf16Args& a) {
  const int64_t pairs = a.d / 2;
  const int64_t panels = (a.v + kPanel - 1) / kPanel;
  const int64_t useful = a.n * a.v * a.d / (1 << 18) + 1;  // below that many products a second thread costs more
  const int threads = static_cast<int>(useful < a.threads ? useful : a.threads);
  bool out_of_memory = false;
#pragma omp parallel num_threads(threads)
  {
    const std::unique_ptr<uint32_t, Free> panel(
        static_cast<uint32_t*>(std::aligned_alloc(64, sizeof(uint32_t) * kPanel * (pairs + 1))));
#pragma omp for schedule(dynamic, 1)
    for (int64_t j = 0; j < panels; ++j) {
      if (!panel) {
#pragma omp atomic write
        out_of_memory = true;
        continue;
      }
      const int64_t col = j * kPanel;
      const int64_t live = a.v - col < kPanel ? a.v - col : kPanel;
      const __mmask16 mask0 = live >= 16 ? 0xffff : static_cast<__mmask16>((1u << live) - 1u);
      const __mmask16 mask1 = live <= 16 ? 0 : static_cast<__mmask16>((1u << (live - 16)) - 1u);
      pack_panel(a.weight + col * a.weight_stride, a.weight_stride, live, pairs, panel.get());
      int64_t i = 0;
      for (; i + kRows <= a.n; i += kRows) {
        multiply<kRows>(a.hidden + i * a.hidden_stride, a.hidden_stride, panel.get(), pairs, a.out + i * a.out_stride + col,
                        a.out_stride, mask0, mask1);
      }
      multiply_tail<kRows - 1>(a.n - i, a.hidden + i * a.hidden_stride, a.hidden_stride, panel.get(), pairs,
                               a.out + i * a.out_stride + col, a.out_stride, mask0, mask1);
    }
  }
  return !out_of_memory;
}

}  // namespace entropy_po

#else

namespace entropy_po {
bool gemm_bf16_supported() { return false; }
bool gemm_bf16(const GemmBf16Args&) { return false; }
}  // namespace entropy_po

#endif
