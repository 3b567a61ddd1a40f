// Every CPU kernel on memory that ends where a page may not be touched, against arithmetic in double: a program without
// Python, to be run under a sanitizer or valgrind (tests/test_sanitizers.py). Arguments: a seed, and how many cases.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "gemm.h"
#include "half.h"
#include "tile_cpu.h"

using namespace entropy_po;
using host::BFloat16;
using host::Float16;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr int64_t kIgnore = -100;
constexpr int64_t kVocabStart = 1000;

std::mt19937_64 random_bits;
std::string what;  // the case that runs, for a failure's message

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }
bool maybe(double p = 0.5) { return std::bernoulli_distribution(p)(random_bits); }
double normal(double scale = 1.0) { return scale * std::normal_distribution<double>()(random_bits); }

[[noreturn]] void fail(const char* message, double ours, double exact) {
  std::fprintf(stderr, "%s: %s: %.9g instead of %.9g\n", what.c_str(), message, ours, exact);
  std::exit(1);
}

// n values of T between two pages that may not be touched, against the second of them, or against the first.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t n, bool at_the_front = maybe()) : size_(n) {
    const size_t page = sysconf(_SC_PAGESIZE), bytes = n * sizeof(T), whole = (bytes + page - 1) / page * page;
    bytes_ = whole + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || (whole && mprotect(base_ + page, whole, PROT_READ | PROT_WRITE))) std::abort();
    values_ = reinterpret_cast<T*>(base_ + page + (at_the_front ? 0 : whole - bytes));
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, bytes_); }
  T* get() { return values_; }
  T& operator[](int64_t i) { return values_[i]; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  size_t bytes_;
  char* base_;
  T* values_;
};

template <class T> double value_of(T v) { return host::to<double>(host::to<float>(v)); }
template <> double value_of(double v) { return v; }
template <class T> T rounded(double v) { return host::Rounded<T>::from(static_cast<float>(v)); }
template <> double rounded(double v) { return v; }

template <class T> constexpr DType kDType = DType::kFloat32;
template <> constexpr DType kDType<double> = DType::kFloat64;
template <> constexpr DType kDType<BFloat16> = DType::kBFloat16;
template <> constexpr DType kDType<Float16> = DType::kFloat16;
template <class T> constexpr double kUnit = 6e-8;
template <> constexpr double kUnit<double> = 2e-16;
template <> constexpr double kUnit<BFloat16> = 4e-3;
template <> constexpr double kUnit<Float16> = 5e-4;

void close(const char* message, double ours, double exact, double tolerance) {
  if (std::isnan(ours) || std::fabs(ours - exact) > tolerance) fail(message, ours, exact);
}

// One tile of `Src`, its gradient written as `Out`; T is the arithmetic's type.
template <class Src, class Out, class T>
void tile_case(const CpuKernels& kernels) {
  static const int64_t kCols[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 1023, 1024, 1025, 2049};
  const int64_t rows = maybe(0.2) ? pick(20, 40) : pick(0, 6), cols = kCols[pick(0, 15)];
  const bool in_place = maybe() && sizeof(Src) == sizeof(Out);
  const int64_t stride = cols + pick(0, 3), out_stride = in_place ? stride : cols + pick(0, 3);
  const auto extent = [&](int64_t step) { return rows ? (rows - 1) * step + cols : 0; };
  Guarded<Src> tile(extent(stride));
  Guarded<Out> other(in_place ? 0 : extent(out_stride));
  Out* const out = in_place ? reinterpret_cast<Out*>(tile.get()) : other.get();
  Guarded<int64_t> labels(rows);
  Guarded<T> bias(cols), temperatures(rows), g_logp(rows), g_entropy(rows);
  const int level = static_cast<int>(pick(0, 2));
  Guarded<T> state((level == 2 ? 8 : 5) * rows);
  const int64_t keep_stride = maybe() ? cols : 0;
  Guarded<uint8_t> keep(rows ? (rows - 1) * keep_stride + cols : 0);

  TileArgs args{};
  const bool has_bias = maybe(0.3), has_keep = maybe(0.3), has_temperatures = maybe(0.3),
             has_entropy = level && maybe();
  args.first = maybe();  // then nobody writes the state before
  args.softcap = maybe(0.3) ? 5.0 : 0.0;
  args.logit_scale = maybe(0.3) ? 0.7 : 1.0;
  args.temperature = maybe(0.3) ? 1.7 : 1.0;
  const double offset = std::is_same_v<Src, float> && maybe(0.2) ? 4096.0 : 0.0;  // exact beside the logits below
  const double jump = maybe(0.2) ? 2048.0 : 0.0;  // what was summed before is nothing beside it
  for (int64_t i = 0; i < tile.size(); ++i) {
    const double fine = std::round(normal(3.0) * 64) / 64;
    // the next block's, in the kernels
    const double later = std::is_same_v<Src, float> && i % stride >= 1024 ? jump : 0.0;
    tile[i] = rounded<Src>(maybe(0.05) ? -kInf : fine + offset + later);
  }
  if (!in_place)
    for (int64_t i = 0; i < other.size(); ++i) other[i] = rounded<Out>(77.0);
  for (int64_t j = 0; j < cols; ++j) bias[j] = T(std::round(normal() * 64) / 64);
  for (int64_t i = 0; i < keep.size(); ++i) keep[i] = maybe(0.8);
  for (int64_t i = 0; i < rows; ++i) {
    labels[i] = kVocabStart + (maybe(0.8) ? pick(0, cols - 1) : maybe() ? -1 : cols);  // or in another tile
    if (maybe(0.1)) labels[i] = kIgnore;
    temperatures[i] = T(0.5 + pick(0, 8) / 4.0);
    g_logp[i] = maybe(0.1) ? T(0) : maybe(0.03) ? T(NAN) : T(normal());
    g_entropy[i] = T(normal());
    for (int64_t k = 0; k < state.size() / rows && !args.first; ++k) state[k * rows + i] = T(0);
    for (int k : {0, 3, 4})
      if (!args.first) state[k * rows + i] = T(-kInf);  // m, and the label's two
    if (maybe(0.05))
      for (int64_t j = 0; j < cols; ++j) tile[i * stride + j] = rounded<Src>(-kInf);
  }
  args.tile = tile.get();
  args.n_rows = rows, args.n_cols = cols, args.tile_stride = stride;
  args.labels = labels.get();
  args.vocab_start = kVocabStart, args.ignore_index = kIgnore;
  args.state = state.get(), args.state_stride = rows;
  args.bias = has_bias ? bias.get() : nullptr;
  args.keep = has_keep ? keep.get() : nullptr;
  args.keep_stride = keep_stride;
  args.row_temperature = has_temperatures ? temperatures.get() : nullptr;
  args.dtype = kDType<Src>, args.level = level;
  args.threads = static_cast<int>(pick(1, 4));
  what = std::string(kernels.isa) + " rows " + std::to_string(rows) + " cols " + std::to_string(cols) + " dtype " +
         std::to_string(static_cast<int>(args.dtype)) + " level " + std::to_string(level) + " threads " +
         std::to_string(args.threads);

  std::vector<double> z(rows * cols), slope(rows * cols, 1.0);  // logits after the transform, and dz/dx
  std::vector<Src> before(tile.get(), tile.get() + tile.size());
  for (int64_t i = 0; i < rows; ++i) {
    const double temperature = has_temperatures ? temperatures[i] : args.temperature;
    for (int64_t j = 0; j < cols; ++j) {
      double x = value_of(tile[i * stride + j]) + (has_bias ? bias[j] : 0.0);
      double dx = args.logit_scale / temperature;
      if (has_keep && !keep[i * keep_stride + j]) x = -kInf;
      x *= args.logit_scale;
      if (args.softcap != 0.0 && x != -kInf) {
        const double tanh_x = std::tanh(x / args.softcap);
        x = args.softcap * tanh_x;
        dx *= 1 - tanh_x * tanh_x;
      }
      z[i * cols + j] = x / temperature;
      slope[i * cols + j] = dx;
    }
  }
  kernels.fold(args);
  const bool has_logp = !has_entropy || maybe(0.8);
  args.g_logp = has_logp ? g_logp.get() : nullptr;
  args.g_entropy = has_entropy ? g_entropy.get() : nullptr;
  args.out = out, args.out_stride = out_stride, args.out_dtype = kDType<Out>;
  std::vector<T> folded(state.get(), state.get() + state.size());
  kernels.grad(args);

  const double unit = kUnit<T> * (1 + offset + jump);  // without FMA a temperature rounds beside the offset
  for (int64_t i = 0; i < rows; ++i) {
    const bool ignored = labels[i] == kIgnore;
    const double* row = &z[i * cols];
    double m = -kInf, s = 0, t = 0;
    for (int64_t j = 0; j < cols; ++j) m = std::max(m, row[j]);
    for (int64_t j = 0; j < cols; ++j) {
      const double d = row[j] - m, e = m == -kInf ? 0.0 : std::exp(d);
      s += e;
      t += e == 0.0 ? 0.0 : e * d;
    }
    if (ignored) m = args.first ? 0 : -kInf, s = args.first, t = 0;
    if (m == -kInf ? folded[i] != T(-kInf) : !(std::fabs(folded[i] - m) <= 40 * unit * (1 + std::fabs(m)))) {
      fail("m", folded[i], m);
    }
    const double slack = 400 * unit * (1 + std::fabs(t) / (s + 1e-300));
    close("s", folded[rows + i], s, slack * s);
    if (level) close("t", folded[2 * rows + i], t, slack * (s - t));
    const int64_t label = labels[i] - kVocabStart;
    const bool here = label >= 0 && label < cols;
    for (int64_t j = 0; j < cols; ++j) {
      const double ours = value_of(out[i * out_stride + j]);
      if (ignored || m == -kInf) {
        close("gradient of an empty row", ours, 0.0, 0.0);
        continue;
      }
      if (has_logp && std::isnan(g_logp[i])) {
        if (row[j] != -kInf && !std::isnan(ours)) fail("gradient from a NaN", ours, NAN);
        continue;
      }
      const double p = std::exp(row[j] - m) / s, gl = has_logp ? double(g_logp[i]) : 0.0,
                   ge = has_entropy ? double(g_entropy[i]) : 0.0;
      double exact = gl * ((here && j == label) - p);
      if (p > 0) exact -= ge * p * (row[j] - m - t / s);
      exact = (row[j] == -kInf && !(here && j == label) ? 0.0 : exact) * slope[i * cols + j];
      if (row[j] == -kInf && here && j == label) continue;  // log p is -inf: the caller hears of it from the value
      const double size = std::fabs(gl) + std::fabs(ge) * (1 - t / s);
      close("gradient", ours, exact,
            kUnit<Out> * std::fabs(exact) + (1e-6 * kUnit<Out> + slack) * size + 1e-7 * (sizeof(Out) == 2));
    }
  }
  for (int64_t i = 0; i + 1 < rows; ++i) {  // between the rows nothing is written
    for (int64_t j = cols; j < out_stride; ++j) {
      const double wanted = in_place ? value_of(before[i * stride + j]) : value_of(rounded<Out>(77.0));
      const double ours = value_of(out[i * out_stride + j]);
      if (ours != wanted) fail("between two rows", ours, wanted);
    }
  }
}

// The outputs of a state, each asked for or not.
template <class T>
void stats_case(const CpuKernels& kernels) {
  const int64_t rows = pick(0, 9), stride = rows + pick(0, 2);
  const bool extras = maybe();
  Guarded<T> state(rows ? ((extras ? 8 : 5) - 1) * stride + rows : 0);
  for (int64_t i = 0; i < state.size(); ++i) state[i] = T(normal());
  for (int64_t i = 0; i < rows; ++i) {
    for (int k : {1, 5, 7})  // s, q, live
      if (k < (extras ? 8 : 5)) state[k * stride + i] = T(1 + std::fabs(normal()));
  }
  Guarded<T> logps(rows), entropy(rows), lse(rows), mean_logit(rows), log_sum_sq_probs(rows);
  Guarded<uint8_t> is_top1(rows);
  StatsArgs args{};
  args.state = state.get(), args.state_stride = stride, args.n_rows = rows;
  args.is_double = std::is_same_v<T, double>;
  args.logps = maybe() ? logps.get() : nullptr;
  args.entropy = maybe() ? entropy.get() : nullptr;
  args.lse = maybe() ? lse.get() : nullptr;
  args.is_top1 = maybe() ? is_top1.get() : nullptr;
  args.mean_logit = extras && maybe() ? mean_logit.get() : nullptr;
  args.log_sum_sq_probs = extras && maybe() ? log_sum_sq_probs.get() : nullptr;
  what = std::string(kernels.isa) + " stats of rows " + std::to_string(rows);
  kernels.stats(args);
  for (int64_t i = 0; i < rows; ++i) {
    const auto at = [&](int k) { return double(state[k * stride + i]); };
    const double log_s = std::log(at(1)), unit = 8 * kUnit<T>;
    if (args.logps) close("logps", logps[i], at(3) - log_s, unit * (std::fabs(at(3)) + log_s));
    if (args.entropy) {
      const double exact = std::max(0.0, log_s - at(2) / at(1));
      close("entropy", entropy[i], exact, unit * (log_s + std::fabs(at(2))));
    }
    if (args.lse) close("lse", lse[i], at(0) + log_s, unit * (std::fabs(at(0)) + log_s));
    if (args.is_top1) close("is_top1", is_top1[i], at(4) >= at(0), 0.0);
    if (args.mean_logit) {
      const double mean_d = at(6) / at(7);
      close("mean_logit", mean_logit[i], at(0) + mean_d, unit * (std::fabs(at(0)) + std::fabs(mean_d)));
    }
    if (args.log_sum_sq_probs) {
      close("log_sum_sq_probs", log_sum_sq_probs[i], std::log(at(5)) - 2 * log_s, unit * (std::log(at(5)) + 2 * log_s));
    }
  }
}

template <class E>
void gemm_case() {
  const bool large = maybe(0.2);
  GemmArgs g{};
  g.dtype = kDType<E>;
  g.m = pick(0, large ? 130 : 40), g.n = pick(0, large ? 300 : 70), g.k = pick(0, large ? 600 : 40);
  g.a_transposed = maybe(), g.b_transposed = maybe(), g.accumulate = maybe();
  g.threads = static_cast<int>(pick(1, 4));
  const int64_t a_rows = g.a_transposed ? g.k : g.m, a_cols = g.a_transposed ? g.m : g.k;
  const int64_t b_rows = g.b_transposed ? g.n : g.k, b_cols = g.b_transposed ? g.k : g.n;
  g.a_stride = a_cols + pick(0, 3), g.b_stride = b_cols + pick(0, 3), g.out_stride = g.n + pick(0, 3);
  const auto extent = [](int64_t rows, int64_t cols, int64_t stride) {
    return rows && cols ? (rows - 1) * stride + cols : 0;
  };
  Guarded<E> a(extent(a_rows, a_cols, g.a_stride)), b(extent(b_rows, b_cols, g.b_stride));
  Guarded<float> out(extent(g.m, g.n, g.out_stride));
  for (int64_t i = 0; i < a.size(); ++i) a[i] = rounded<E>(normal());
  for (int64_t i = 0; i < b.size(); ++i) b[i] = rounded<E>(normal());
  for (int64_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(normal());
  g.a = a.get(), g.b = b.get(), g.out = out.get();
  const bool scales = maybe(0.3);
  g.scaled_stride = g.n + pick(0, 3);
  Guarded<E> scaled(scales ? extent(g.m, g.n, g.scaled_stride) : 0);
  for (int64_t i = 0; i < scaled.size(); ++i) scaled[i] = rounded<E>(normal());
  if (scales) g.scaled = scaled.get(), g.factor = static_cast<float>(normal());
  const std::vector<E> scaled_before(scaled.get(), scaled.get() + scaled.size());
  what = "gemm dtype " + std::to_string(static_cast<int>(g.dtype)) + " m " + std::to_string(g.m) + " n " +
         std::to_string(g.n) + " k " + std::to_string(g.k);
  std::vector<float> before(out.get(), out.get() + out.size());
  if (!gemm(g)) fail("out of memory", 0, 0);
  for (int64_t i = 0; i < g.m; ++i) {
    for (int64_t j = 0; j < g.out_stride && i * g.out_stride + j < out.size(); ++j) {
      const int64_t at = i * g.out_stride + j;
      if (j >= g.n) {
        if (out[at] != before[at]) fail("between two rows", out[at], before[at]);
        continue;
      }
      double exact = g.accumulate ? before[at] : 0.0, size = std::fabs(exact);
      for (int64_t k = 0; k < g.k; ++k) {
        const double left = value_of(a[g.a_transposed ? k * g.a_stride + i : i * g.a_stride + k]);
        const double term = left * value_of(b[g.b_transposed ? j * g.b_stride + k : k * g.b_stride + j]);
        exact += term, size += std::fabs(term);
      }
      if (scales) {
        const double whole = g.factor * exact, unit = std::fabs(g.factor) * size;
        close("scaled product", value_of(scaled[i * g.scaled_stride + j]), whole,
              std::fabs(whole) * kUnit<E> + 1e-6 * unit + 1e-30);
        continue;
      }
      close("product", out[at], exact, 1e-6 * size + 1e-30);
    }
    for (int64_t at = i * g.scaled_stride + g.n; at < std::min((i + 1) * g.scaled_stride, scaled.size()); ++at) {
      if (value_of(scaled[at]) != value_of(scaled_before[at])) fail("between two scaled rows", i, at);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  random_bits.seed(std::strtoull(argv[1], nullptr, 10));
  const long cases = std::strtol(argv[2], nullptr, 10);
  std::vector<const CpuKernels*> kernels;
#ifdef ENTROPY_PO_X86_LEVELS
  for (const CpuKernels* k : {&kCpuKernelsX86V4, &kCpuKernelsX86V3})
    if (k->supported()) kernels.push_back(k);
#endif
  if (kCpuKernelsBaseline.supported()) kernels.push_back(&kCpuKernelsBaseline);
  for (long i = 0; i < cases; ++i) {
    for (const CpuKernels* k : kernels) {
      tile_case<float, float, float>(*k);
      tile_case<float, BFloat16, float>(*k);
      tile_case<BFloat16, BFloat16, float>(*k);
      tile_case<Float16, Float16, float>(*k);
      tile_case<double, double, double>(*k);
      stats_case<float>(*k);
      stats_case<double>(*k);
    }
    if (gemm_supported(DType::kBFloat16)) gemm_case<BFloat16>();
    if (gemm_supported(DType::kFloat32)) gemm_case<float>();
  }
  std::printf("%ld rounds of %zu instruction sets%s\n", cases, kernels.size(),
              gemm_supported(DType::kFloat32) ? is_amd() ? ", gemm, on AMD" : ", gemm" : "");
}
