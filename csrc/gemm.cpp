// Products of bf16 or fp32 matrices with fp32 results, for processors with AVX-512.
//
// A product of two bf16 numbers is exact in fp32, and VDPBF16PS sums in fp32; what loses the digits of a logit is only the
// rounding of the result, which no CPU library lets one leave out. So this keeps it, at the rate of the bf16 unit. fp32 is the
// same loops over another element: the library that torch brings has no code of its own for AMD's AVX-512, and how it sums
// depends on every size.
//
// Both operands are packed into words of 32 bits, an fp32 or a pair of bf16 that are neighbours in k: blocks of 12 rows of
// A and panels of 32 columns of B, so that one kernel with 24 accumulators in registers serves every layout. One operand, as
// a rule the smaller, is packed by all threads for all; of the other a thread packs a strip at a time and owns that strip's
// part of the result. How a sum is split depends on k alone: neither threads nor the other sizes change its bits.
#include "gemm.h"

#ifdef ENTROPY_PO_AVX512_GEMM
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#pragma GCC target("arch=x86-64-v4,avx512bf16,prfchw")

namespace entropy_po {
namespace {

constexpr int64_t kRows = 12;  // 12 x 2 accumulators + 2 panel vectors + 1 broadcast of the 32 registers
constexpr int64_t kCols = 32;  // two vectors of fp32 sums

constexpr int64_t kWords = 1024;  // of k per pass over the result; a panel of them is 128 KiB of L2
// Of the shared operand per step, which streams from L3 fast enough; the other is packed again for each.
constexpr int64_t kSharedBytes = int64_t{4} << 20;
constexpr int64_t kStripBytes = int64_t{256} << 10;  // of the owned operand, in L2
// What a thread packs next is on its way to L2 while it multiplies, if no more of the shared operand than this passes through there
// in between, which would evict it.
constexpr int64_t kAheadBytes = int64_t{512} << 10;
constexpr int64_t kStripsPerThread = 8;  // at least, if there are as many blocks: the others wait for its last one

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Words from one packed block to the next. Odd, for many blocks are written side by side: at a power of two their lines
// would evict each other.
int64_t pitch_of(int64_t words) { return words | 1; }

inline __mmask32 first_lanes(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1u; }

// What is different in the two kinds of elements: how words are read, and what is done with them.
struct BFloat16 {
  using Element = uint16_t;
  static constexpr int64_t kPerWord = 2;  // neighbours in k

  // 16 words of a row of k, of which `live` elements are there; the rest are 0.
  static __m512i along_k(const Element* row, int64_t live) { return _mm512_maskz_loadu_epi16(first_lanes(live), row); }
  // Words of 16 columns, from the row of k at `row` and, if it is there, the next.
  static __m512i across_k(const Element* row, int64_t stride, bool has_next, __mmask16 mask) {
    const __mmask16 next_mask = has_next ? mask : 0;
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(next_mask, row + stride));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)b, (__m512bh)a);
  }
  static void store(Element* to, __mmask16 mask, __m512 values) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(values));
  }
};

struct Float32 {
  using Element = float;
  static constexpr int64_t kPerWord = 1;

  static __m512i along_k(const Element* row, int64_t live) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(first_lanes(live)), row);
  }
  static __m512i across_k(const Element* row, int64_t, bool, __mmask16 mask) {
    return _mm512_maskz_loadu_epi32(mask, row);
  }
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  static void store(Element* to, __mmask16 mask, __m512 values) { _mm512_mask_storeu_ps(to, mask, values); }
};

// A as rows of k, or B as columns of k: `size` of them, packed in blocks of `width`.
template <class E>
struct Operand {
  const typename E::Element* data;
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

// Past the caches if it is for all threads: lines that they read two steps ago would first have to be taken from them, which
// between two L3s takes longer than all the rest of packing.
template <int kLanes, bool kForAll>
inline void store(uint32_t* to, __m512i words) {
  if constexpr (kLanes == 16 && kForAll) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), words);
  } else if constexpr (kLanes == 16) {
    _mm512_store_si512(to, words);
  } else {
    static_assert(kLanes == 12);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(words));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm512_extracti32x4_epi32(words, 2));
  }
}

// Blocks of x from `first` on, of k from `begin` on, as [blocks][pitch words][kWidth], of which the first words are written;
// zero past the end of x or of an odd k.
template <int kWidth, bool kForAll, class E>
void pack_as(const Operand<E>& x, int64_t first, int64_t blocks, int64_t begin, int64_t depth, int64_t pitch,
             uint32_t* out) {
  constexpr int kLanes = kWidth % 16 == 0 ? 16 : kWidth;
  const int64_t words = ceil_div(depth, E::kPerWord);
  if (x.along_k) {
    for (int64_t i = first * kWidth; i < (first + blocks) * kWidth; i += kLanes) {
      const int64_t live = std::min<int64_t>(x.size - i, kLanes);
      uint32_t* to = out + (i / kWidth - first) * pitch * kWidth + i % kWidth;
      for (int64_t p = 0; p < words; p += 16) {
        const int64_t done = E::kPerWord * p;
        const auto* from = x.data + i * x.stride + begin + done;
        __m512i r[16];
        for (int row = 0; row < 16; ++row) {
          r[row] = row < live ? E::along_k(from + row * x.stride, depth - done) : _mm512_setzero_si512();
        }
        transpose(r);
        for (int64_t q = 0; q < std::min<int64_t>(words - p, 16); ++q)
          store<kLanes, kForAll>(to + (p + q) * kWidth, r[q]);
      }
    }
    return;
  }
  // All blocks of a word's rows before the next: rows of a tile lie pages apart, and a line would be evicted in between.
  // Few instructions: a large B that few rows of A are multiplied with is packed for them alone.
  constexpr __mmask16 kWholeBlock = static_cast<__mmask16>((1u << kLanes) - 1u);
  const int64_t whole = std::clamp<int64_t>(x.size / kWidth - first, 0, blocks);
  const auto* row = x.data + begin * x.stride + first * kWidth;
  for (int64_t p = 0; p < words; ++p, row += E::kPerWord * x.stride) {
    const bool has_next = E::kPerWord * p + 1 < depth;
    uint32_t* to = out + p * kWidth;
    for (int64_t block = 0; block < blocks; ++block, to += pitch * kWidth) {
      for (int64_t lane = 0; lane < kWidth; lane += kLanes) {
        const auto* from = row + block * kWidth + lane;
        if (block < whole) {
          store<kLanes, kForAll>(to + lane, E::across_k(from, x.stride, has_next, kWholeBlock));
        } else {
          const int64_t live = std::min<int64_t>(x.size - (first + block) * kWidth - lane, kLanes);
          const auto mask = static_cast<__mmask16>(first_lanes(live));
          store<kLanes, kForAll>(to + lane, E::across_k(from, x.stride, has_next, mask));
        }
      }
    }
  }
}

template <bool kForAll, class E>
void pack(const Operand<E>& x, int64_t first, int64_t blocks, int64_t begin, int64_t depth, int64_t pitch,
          uint32_t* out) {
  (x.width == kRows ? pack_as<kRows, kForAll, E> : pack_as<kCols, kForAll, E>)(x, first, blocks, begin, depth, pitch,
                                                                               out);
}

// Piece `i` of `pieces` of that work for many blocks. Where rows of memory lie across k a piece is a range of k and not of
// blocks, so that whole rows are read, one after the other.
template <class E>
void pack_piece(int64_t i, int64_t pieces, const Operand<E>& x, int64_t first, int64_t blocks, int64_t begin,
                int64_t depth, int64_t pitch, uint32_t* out) {
  if (x.along_k) {
    const int64_t from = i * blocks / pieces, to = (i + 1) * blocks / pieces;
    pack<true>(x, first + from, to - from, begin, depth, pitch, out + from * pitch * x.width);
  } else {
    const int64_t words = ceil_div(depth, E::kPerWord), from = i * words / pieces, to = (i + 1) * words / pieces;
    const int64_t deep = std::min(to * E::kPerWord, depth) - from * E::kPerWord;
    pack<true>(x, first, blocks, begin + from * E::kPerWord, deep, pitch, out + from * x.width);
  }
  _mm_sfence();
}

// Where the result goes, scaled, as elements of the operands' own kind.
template <class E>
struct Scaled {
  typename E::Element* to;
  int64_t stride;
  float factor;
};

// out (+)= one block of rows times one panel of columns, of which `rows` and `cols` are the matrix's.
template <class E>
void multiply(const uint32_t* block, const uint32_t* panel, int64_t words, float* out, int64_t stride, int64_t rows,
              int64_t cols, bool accumulate, Scaled<E> scaled) {
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
  for (int64_t p = 0; p < words; ++p) {
    const __m512i b0 = _mm512_load_si512(panel + p * kCols), b1 = _mm512_load_si512(panel + p * kCols + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const __m512i a = _mm512_set1_epi32(static_cast<int32_t>(block[p * kRows + i]));
      sum[i][0] = E::multiply_add(sum[i][0], a, b0);
      sum[i][1] = E::multiply_add(sum[i][1], a, b1);
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
    if (scaled.to) {
      const __m512 factor = _mm512_set1_ps(scaled.factor);
      auto* const row = scaled.to + i * scaled.stride;
      E::store(row, mask0, _mm512_mul_ps(sum[i][0], factor));
      E::store(row + 16, mask1, _mm512_mul_ps(sum[i][1], factor));
      continue;
    }
    _mm512_mask_storeu_ps(to, mask0, sum[i][0]);
    _mm512_mask_storeu_ps(to + 16, mask1, sum[i][1]);
  }
}

// The memory of some blocks of x, line by line.
template <class E>
class Lines {
 public:
  Lines(const Operand<E>& x, int64_t first, int64_t blocks, int64_t begin, int64_t depth) {
    if (blocks <= 0 || depth == 0) return;
    const int64_t start = first * x.width, size = std::min(blocks * x.width, x.size - start);
    const int64_t rows = x.along_k ? size : depth, length = x.along_k ? depth : size;
    row_ = x.data + (x.along_k ? start * x.stride + begin : begin * x.stride + start);
    stride_ = x.stride;
    per_row_ = ceil_div(length, kElements) + 1;  // a row may begin within a line
    left_ = rows * per_row_;
  }

  int64_t left() const { return left_; }

  void fetch(int64_t count) {
    for (count = std::min(count, left_); count > 0; --count, --left_) {
      _mm_prefetch(reinterpret_cast<const char*>(row_ + line_ * kElements), _MM_HINT_T1);
      if (++line_ == per_row_) line_ = 0, row_ += stride_;
    }
  }

 private:
  static constexpr int64_t kElements = 64 / sizeof(typename E::Element);
  const typename E::Element* row_ = nullptr;
  int64_t stride_ = 0, per_row_ = 0, left_ = 0, line_ = 0;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint32_t, Free>;

Buffer buffer(int64_t bytes) {
  return Buffer(static_cast<uint32_t*>(std::aligned_alloc(64, static_cast<size_t>(ceil_div(bytes, 64) + 1) * 64)));
}

template <class E>
bool product(const GemmArgs& g) {
  using Element = typename E::Element;
  const Operand<E> a{static_cast<const Element*>(g.a), g.a_stride, g.m, kRows, !g.a_transposed};
  const Operand<E> b{static_cast<const Element*>(g.b), g.b_stride, g.n, kCols, g.b_transposed};
  // The smaller one; but where whole rows of B can be read if it is shared, and a line of each if not, it is B, as long as
  // A has strips for every thread.
  const bool share_a = g.m <= g.n && (b.along_k || a.blocks() < kStripsPerThread * g.threads);
  const Operand<E>& shared = share_a ? a : b;
  const Operand<E>& owned = share_a ? b : a;

  // passes of equal depth, in whole words; k = 0 is one pass of none
  const int64_t passes = std::max<int64_t>(ceil_div(g.k, kWords * E::kPerWord), 1);
  const int64_t most_words = std::max<int64_t>(ceil_div(g.k, E::kPerWord * passes), 1);
  const int64_t depth = most_words * E::kPerWord;
  const int64_t shared_block = most_words * shared.width * 4;  // bytes
  const int64_t owned_block = most_words * owned.width * 4;

  const int64_t useful = g.m * g.n * g.k / (1 << 18) + 1;  // below that many products a second thread costs more
  const int threads = static_cast<int>(std::min<int64_t>(useful, g.threads));
  const int64_t group = std::clamp<int64_t>(kSharedBytes / shared_block, 1, shared.blocks());
  const int64_t fair = std::max<int64_t>(owned.blocks() / (kStripsPerThread * threads), 1);
  const int64_t strip = std::clamp<int64_t>(kStripBytes / owned_block, 1, fair);
  const int64_t strips = ceil_div(owned.blocks(), strip);
  const bool fetches = group * shared_block <= kAheadBytes;

  // The shared operand comes in steps, each a group of blocks and a pass over k. While one is multiplied the next is
  // packed, so that threads wait for each other once a step.
  struct Step {
    int64_t from, blocks, begin, depth, words, pitch;
  };
  const int64_t steps = ceil_div(shared.blocks(), group) * passes;
  const auto step_at = [&](int64_t step) {
    if (step < 0 || step >= steps) return Step{};
    const int64_t from = step / passes * group, begin = step % passes * depth;
    const int64_t deep = std::min(depth, g.k - begin), words = ceil_div(deep, E::kPerWord);
    return Step{from, std::min(group, shared.blocks() - from), begin, deep, words, pitch_of(words)};
  };
  const auto packed_blocks = [&](int64_t count, int64_t width) {
    return buffer(count * pitch_of(most_words) * width * 4);
  };
  const Buffer common[2] = {packed_blocks(group, shared.width), packed_blocks(steps > 1 ? group : 0, shared.width)};
  if (!common[0] || !common[1]) return false;
  bool out_of_memory = false;
#pragma omp parallel num_threads(threads)
  {
    const Buffer own = packed_blocks(strip, owned.width);
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
          pack_piece(item - multiplied, next.blocks, shared, next.from, next.blocks, next.begin, next.depth, next.pitch,
                     packing);
          continue;
        }
        const int64_t first = item * strip;
        const int64_t count = std::min(strip, owned.blocks() - first);
        pack<false>(owned, first, count, now.begin, now.depth, now.pitch, own.get());
        const uint32_t* blocks = share_a ? packed : own.get();
        const uint32_t* panels = share_a ? own.get() : packed;
        const int64_t row = (share_a ? now.from : first) * kRows;
        const int64_t col = (share_a ? first : now.from) * kCols;
        const int64_t rows = std::min((share_a ? now.blocks : count) * kRows, g.m - row);
        const int64_t cols = std::min((share_a ? count : now.blocks) * kCols, g.n - col);
        float* out = g.out + row * g.out_stride + col;
        const bool is_last = now.begin + now.depth == g.k && g.scaled;
        Element* last = is_last ? static_cast<Element*>(g.scaled) + row * g.scaled_stride + col : nullptr;
        const int64_t then = item + threads;  // threads take strips in turn, as a rule
        const int64_t then_count = fetches ? std::min(strip, owned.blocks() - then * strip) : 0;
        Lines<E> ahead(owned, then * strip, then_count, now.begin, now.depth);
        const int64_t lines_each = ceil_div(ahead.left(), ceil_div(rows, kRows) * ceil_div(cols, kCols));
        for (int64_t j = 0; j < cols; j += kCols) {
          for (int64_t i = 0; i < rows; i += kRows) {
            ahead.fetch(lines_each);
            const Scaled<E> scaled{last ? last + i * g.scaled_stride + j : nullptr, g.scaled_stride, g.factor};
            multiply<E>(blocks + i * now.pitch, panels + j * now.pitch, now.words, out + i * g.out_stride + j,
                        g.out_stride, rows - i, cols - j, g.accumulate || now.begin > 0, scaled);
          }
        }
      }
    }
  }
  return !out_of_memory;
}

}  // namespace

bool is_amd() { return __builtin_cpu_is("amd"); }

bool gemm_supported(DType dtype) {
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (dtype == DType::kBFloat16) return avx512 && __builtin_cpu_supports("avx512bf16");
  return dtype == DType::kFloat32 && avx512;
}

bool gemm(const GemmArgs& g) {
  if (g.m == 0 || g.n == 0) return true;
  return g.dtype == DType::kBFloat16 ? product<BFloat16>(g) : product<Float32>(g);
}

}  // namespace entropy_po

#else

namespace entropy_po {
bool is_amd() { return false; }
bool gemm_supported(DType) { return false; }
bool gemm(const GemmArgs&) { return false; }
}  // namespace entropy_po

#endif
