// Products of bf16 matrices with fp32 results, for processors with AVX512_BF16.
//
// A bf16 product of two bf16 numbers is exact in fp32, and VDPBF16PS sums in fp32; what loses the digits of a logit is
// only the rounding of the result, which no CPU library lets one leave out. So this keeps it, at the rate of the bf16 unit.
//
// Both operands are packed into [k / 2] pairs, blocks of 12 rows of A and panels of 32 columns of B, so that one kernel
// with 24 accumulators in registers serves every layout. The smaller operand is packed by all threads for all; of the
// larger one a thread packs a strip at a time and owns that strip's part of the result. How a sum is split depends on k
// alone: neither threads nor the other sizes change its bits.
#include "gemm_bf16.h"

#ifdef ENTROPY_PO_AVX512_BF16
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#pragma GCC target("arch=x86-64-v4,avx512bf16,prfchw")

namespace entropy_po {
namespace {

constexpr int64_t kRows = 12;  // 12 x 2 accumulators + 2 panel vectors + 1 broadcast of the 32 registers
constexpr int64_t kCols = 32;  // two vectors of fp32 sums

constexpr int64_t kDepth = 2048;  // of k per pass over the result; a panel of it is 128 KiB of L2
// Of the shared operand per step, which streams from L3 fast enough; the larger operand is packed again for each.
constexpr int64_t kSharedBytes = int64_t{4} << 20;
constexpr int64_t kStripBytes = int64_t{256} << 10;  // of the larger operand, in L2

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// A as rows of k, or B as columns of k: `size` of them, packed in blocks of `width`.
struct Operand {
  const uint16_t* data;
  int64_t stride, size, width;
  bool along_k;  // neighbours in memory are neighbours in k

  int64_t blocks() const { return ceil_div(size, width); }
};

// 16 x 16 dwords.
inline void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

template <int kLanes>
inline void store(uint32_t* to, __m512i pairs) {
  if constexpr (kLanes == 16) {
    _mm512_store_si512(to, pairs);
  } else {
    static_assert(kLanes == 12);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(pairs));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm512_extracti32x4_epi32(pairs, 2));
  }
}

inline __mmask32 first_lanes(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1u; }

// Blocks of x from `first` on, of k from `begin` on, as [blocks][pairs][kWidth]; zero past the end of x or of an odd k.
template <int kWidth>
void pack_as(const Operand& x, int64_t first, int64_t blocks, int64_t begin, int64_t depth, uint32_t* out) {
  constexpr int kLanes = kWidth % 16 == 0 ? 16 : kWidth;
  const int64_t pairs = (depth + 1) / 2;
  if (x.along_k) {
    for (int64_t i = first * kWidth; i < (first + blocks) * kWidth; i += kLanes) {
      const int64_t live = std::min<int64_t>(x.size - i, kLanes);
      uint32_t* to = out + (i / kWidth - first) * pairs * kWidth + i % kWidth;
      for (int64_t p = 0; p < pairs; p += 16) {
        const __mmask32 mask = first_lanes(depth - 2 * p);
        const uint16_t* from = x.data + i * x.stride + begin + 2 * p;
        __m512i r[16];
        for (int row = 0; row < 16; ++row) {
          r[row] = row < live ? _mm512_maskz_loadu_epi16(mask, from + row * x.stride) : _mm512_setzero_si512();
        }
        transpose(r);
        for (int64_t q = 0; q < std::min<int64_t>(pairs - p, 16); ++q) store<kLanes>(to + (p + q) * kWidth, r[q]);
      }
    }
    return;
  }
  // all blocks of two rows before the next two: rows of a tile lie pages apart, and a line would be evicted in between
  for (int64_t p = 0; p < pairs; ++p) {
    const uint16_t* row = x.data + (begin + 2 * p) * x.stride;
    const bool has_next = 2 * p + 1 < depth;
    for (int64_t i = first * kWidth; i < (first + blocks) * kWidth; i += kLanes) {
      const __mmask16 mask = static_cast<__mmask16>(first_lanes(std::min<int64_t>(x.size - i, kLanes)));
      const __mmask16 next_mask = has_next ? mask : 0;
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + i));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(next_mask, row + x.stride + i));
      uint32_t* to = out + ((i / kWidth - first) * pairs + p) * kWidth + i % kWidth;
      store<kLanes>(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

void pack(const Operand& x, int64_t first, int64_t blocks, int64_t begin, int64_t depth, uint32_t* out) {
  (x.width == kRows ? pack_as<kRows> : pack_as<kCols>)(x, first, blocks, begin, depth, out);
}

// out (+)= one block of rows times one panel of columns, of which `rows` and `cols` are the matrix's.
void multiply(const uint32_t* block, const uint32_t* panel, int64_t pairs, float* out, int64_t stride, int64_t rows,
              int64_t cols, bool accumulate) {
  // Unrolled throughout, or gcc keeps the sums in memory.
  __m512 sum[kRows][2];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    // no prefetcher foresees a tile of the result, and waiting for its 24 lines is 5 % of a call
    if (i >= rows) continue;
    __builtin_prefetch(out + i * stride, 1);
    if (cols > 16) __builtin_prefetch(out + i * stride + 16, 1);
  }
  for (int64_t p = 0; p < pairs; ++p) {
    const __m512bh b0 = (__m512bh)_mm512_load_si512(panel + p * kCols);
    const __m512bh b1 = (__m512bh)_mm512_load_si512(panel + p * kCols + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(block[p * kRows + i]));
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], b0, a);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], b1, a);
    }
  }
  const __mmask16 mask0 = static_cast<__mmask16>(first_lanes(cols));
  const __mmask16 mask1 = static_cast<__mmask16>(first_lanes(cols - 16));
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) continue;
    float* to = out + i * stride;
    if (accumulate) {
      sum[i][0] = _mm512_add_ps(sum[i][0], _mm512_maskz_loadu_ps(mask0, to));
      sum[i][1] = _mm512_add_ps(sum[i][1], _mm512_maskz_loadu_ps(mask1, to + 16));
    }
    _mm512_mask_storeu_ps(to, mask0, sum[i][0]);
    _mm512_mask_storeu_ps(to + 16, mask1, sum[i][1]);
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint32_t, Free>;

Buffer buffer(int64_t bytes) {
  return Buffer(static_cast<uint32_t*>(std::aligned_alloc(64, static_cast<size_t>(ceil_div(bytes, 64) + 1) * 64)));
}

}  // namespace

bool gemm_bf16_supported() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool gemm_bf16(const GemmBf16Args& g) {
  if (g.m == 0 || g.n == 0) return true;
  const Operand a{g.a, g.a_stride, g.m, kRows, !g.a_transposed};
  const Operand b{g.b, g.b_stride, g.n, kCols, g.b_transposed};
  const bool share_a = g.m <= g.n;
  const Operand& shared = share_a ? a : b;
  const Operand& owned = share_a ? b : a;

  // passes of equal depth, whole pairs; k = 0 is one pass of none
  const int64_t passes = std::max<int64_t>(ceil_div(g.k, kDepth), 1);
  const int64_t depth = std::max<int64_t>(ceil_div(g.k, 2 * passes), 1) * 2;
  const int64_t shared_block = depth * shared.width * 2;  // bytes
  const int64_t owned_block = depth * owned.width * 2;

  const int64_t useful = g.m * g.n * g.k / (1 << 18) + 1;  // below that many products a second thread costs more
  const int threads = static_cast<int>(std::min<int64_t>(useful, g.threads));
  const int64_t group = std::clamp<int64_t>(kSharedBytes / shared_block, 1, shared.blocks());
  // a thread's last strip is what the others wait for: several each, however few there are
  const int64_t fair = std::max<int64_t>(owned.blocks() / (8 * threads), 1);
  const int64_t strip = std::clamp<int64_t>(kStripBytes / owned_block, 1, fair);
  const int64_t strips = ceil_div(owned.blocks(), strip);

  // The shared operand comes in steps, each a group of blocks and a pass over k. While one is multiplied the next is
  // packed, so that threads wait for each other once a step.
  struct Step {
    int64_t from, blocks, begin, depth, pairs;
  };
  const int64_t steps = ceil_div(shared.blocks(), group) * passes;
  const auto step_at = [&](int64_t step) {
    if (step < 0 || step >= steps) return Step{};
    const int64_t from = step / passes * group, begin = step % passes * depth;
    const int64_t deep = std::min(depth, g.k - begin);
    return Step{from, std::min(group, shared.blocks() - from), begin, deep, (deep + 1) / 2};
  };
  const Buffer common[2] = {buffer(group * shared_block), buffer(steps > 1 ? group * shared_block : 0)};
  if (!common[0] || !common[1]) return false;
  bool out_of_memory = false;
#pragma omp parallel num_threads(threads)
  {
    const Buffer own = buffer(strip * owned_block);
    for (int64_t step = -1; step < steps; ++step) {
      const Step now = step_at(step), next = step_at(step + 1);
      uint32_t* const packed = common[step & 1].get();
      uint32_t* const packing = common[(step + 1) & 1].get();
      const int64_t multiplied = step < 0 ? 0 : strips;
#pragma omp for schedule(dynamic, 1)
      for (int64_t item = 0; item < multiplied + next.blocks; ++item) {
        if (!own) {
#pragma omp atomic write
          out_of_memory = true;
          continue;
        }
        if (item >= multiplied) {
          const int64_t s = item - multiplied;
          pack(shared, next.from + s, 1, next.begin, next.depth, packing + s * next.pairs * shared.width);
          continue;
        }
        const int64_t first = item * strip;
        const int64_t count = std::min(strip, owned.blocks() - first);
        pack(owned, first, count, now.begin, now.depth, own.get());
        const uint32_t* blocks = share_a ? packed : own.get();
        const uint32_t* panels = share_a ? own.get() : packed;
        const int64_t row = (share_a ? now.from : first) * kRows;
        const int64_t col = (share_a ? first : now.from) * kCols;
        const int64_t rows = std::min((share_a ? now.blocks : count) * kRows, g.m - row);
        const int64_t cols = std::min((share_a ? count : now.blocks) * kCols, g.n - col);
        float* out = g.out + row * g.out_stride + col;
        for (int64_t j = 0; j < cols; j += kCols) {
          for (int64_t i = 0; i < rows; i += kRows) {
            multiply(blocks + i * now.pairs, panels + j * now.pairs, now.pairs, out + i * g.out_stride + j,
                     g.out_stride, rows - i, cols - j, g.accumulate || now.begin > 0);
          }
        }
      }
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
