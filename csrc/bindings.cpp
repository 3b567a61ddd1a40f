// The Python face of the compiled core: integers in, nothing of torch. entropy_po/tiles.py is its only caller and has
// checked shapes, strides and dtypes; what is checked here is what would otherwise crash.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#ifdef ENTROPY_PO_CUDA_ARCHS
#include "cuda/tile_cuda.h"
#endif
#include "gemm.h"
#include "tile_cpu.h"

namespace py = pybind11;
using entropy_po::CpuKernels;
using entropy_po::DType;
using entropy_po::StatsArgs;
using entropy_po::TileArgs;

namespace {

std::vector<const CpuKernels*> cpu_kernels() {
  std::vector<const CpuKernels*> all;
#ifdef ENTROPY_PO_X86_LEVELS
  all.push_back(&entropy_po::kCpuKernelsX86V4);
  all.push_back(&entropy_po::kCpuKernelsX86V3);
#endif
  all.push_back(&entropy_po::kCpuKernelsBaseline);
  std::vector<const CpuKernels*> usable;
  for (const CpuKernels* k : all) {
    if (k->supported()) usable.push_back(k);
  }
  return usable;
}

const CpuKernels& resolve_isa(const std::string& isa) {
  static const std::vector<const CpuKernels*> usable = cpu_kernels();
  if (isa.empty()) return *usable.front();
  for (const CpuKernels* k : usable) {
    if (isa == k->isa) return *k;
  }
  throw std::invalid_argument("isa '" + isa + "' is not one this processor can run; cpu_isas() lists those");
}

DType dtype_from_code(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("dtype code " + std::to_string(code) + " is not one of 0..3");
  return static_cast<DType>(code);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

TileArgs with_level(TileArgs a, int level, bool first) {
  if (level < 0 || level > 2) throw std::invalid_argument("level " + std::to_string(level) + " is not one of 0..2");
  a.level = level;
  a.first = first;
  return a;
}

TileArgs with_gradient(TileArgs a, uintptr_t g_logp, uintptr_t g_entropy, uintptr_t out, int out_dtype,
                       int64_t out_stride) {
  a.g_logp = pointer<const void>(g_logp);
  a.g_entropy = pointer<const void>(g_entropy);
  a.out = pointer<void>(out);
  a.out_dtype = dtype_from_code(out_dtype);
  a.out_stride = out_stride;
  const bool narrowing = a.dtype == DType::kFloat32 && a.out_dtype == DType::kBFloat16;
  if (a.out_dtype != a.dtype && !narrowing) {
    throw std::invalid_argument("out dtype must be the tile's, or bfloat16 for a float32 tile");
  }
  return a;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled tile kernels of entropy_po. Private: use entropy_po.tiles.";

  py::class_<TileArgs>(m, "TileArgs", py::dynamic_attr(), py::module_local())
      .def(py::init([](uintptr_t tile, int dtype, int64_t n_rows, int64_t n_cols, int64_t tile_stride, uintptr_t labels,
                       int64_t vocab_start, int64_t ignore_index, uintptr_t state, int64_t state_stride,
                       double logit_scale, double softcap, double temperature, uintptr_t row_temperature,
                       uintptr_t bias, uintptr_t keep, int64_t keep_stride, int threads) {
             TileArgs a{};
             a.tile = pointer<const void>(tile);
             a.dtype = dtype_from_code(dtype);
             a.n_rows = n_rows;
             a.n_cols = n_cols;
             a.tile_stride = tile_stride;
             a.labels = pointer<const int64_t>(labels);
             a.vocab_start = vocab_start;
             a.ignore_index = ignore_index;
             a.state = pointer<void>(state);
             a.state_stride = state_stride;
             a.logit_scale = logit_scale;
             a.softcap = softcap;
             a.temperature = temperature;
             a.row_temperature = pointer<const void>(row_temperature);
             a.bias = pointer<const void>(bias);
             a.keep = pointer<const uint8_t>(keep);
             a.keep_stride = keep_stride;
             a.threads = threads < 1 ? 1 : threads;
             return a;
           }),
           py::kw_only(), py::arg("tile"), py::arg("dtype"), py::arg("n_rows"), py::arg("n_cols"),
           py::arg("tile_stride"), py::arg("labels"), py::arg("vocab_start"), py::arg("ignore_index"), py::arg("state"),
           py::arg("state_stride"), py::arg("logit_scale"), py::arg("softcap"), py::arg("temperature"),
           py::arg("row_temperature"), py::arg("bias"), py::arg("keep"), py::arg("keep_stride"), py::arg("threads"));

  py::class_<StatsArgs>(m, "StatsArgs", py::module_local())
      .def(py::init([](uintptr_t state, int64_t state_stride, int64_t n_rows, bool is_double, uintptr_t logps,
                       uintptr_t entropy, uintptr_t lse, uintptr_t is_top1, uintptr_t mean_logit,
                       uintptr_t log_sum_sq_probs) {
             return StatsArgs{pointer<const void>(state),
                              state_stride,
                              n_rows,
                              is_double,
                              pointer<void>(logps),
                              pointer<void>(entropy),
                              pointer<void>(lse),
                              pointer<void>(mean_logit),
                              pointer<void>(log_sum_sq_probs),
                              pointer<uint8_t>(is_top1)};
           }),
           py::kw_only(), py::arg("state"), py::arg("state_stride"), py::arg("n_rows"), py::arg("is_double"),
           py::arg("logps"), py::arg("entropy"), py::arg("lse"), py::arg("is_top1"), py::arg("mean_logit"),
           py::arg("log_sum_sq_probs"));

  m.def(
      "fold",
      [](const TileArgs& args, int level, bool first, const std::string& isa) {
        const TileArgs a = with_level(args, level, first);
        const CpuKernels& kernels = resolve_isa(isa);
        py::gil_scoped_release release;
        kernels.fold(a);
      },
      py::arg("args"), py::arg("level"), py::arg("first"), py::arg("isa") = "");
  m.def(
      "grad",
      [](const TileArgs& args, uintptr_t g_logp, uintptr_t g_entropy, uintptr_t out, int out_dtype, int64_t out_stride,
         const std::string& isa) {
        const TileArgs a = with_gradient(args, g_logp, g_entropy, out, out_dtype, out_stride);
        const CpuKernels& kernels = resolve_isa(isa);
        py::gil_scoped_release release;
        kernels.grad(a);
      },
      py::arg("args"), py::arg("g_logp"), py::arg("g_entropy"), py::arg("out"), py::arg("out_dtype"),
      py::arg("out_stride"), py::arg("isa") = "");

  m.def(
      "stats", [](const StatsArgs& args, const std::string& isa) { resolve_isa(isa).stats(args); }, py::arg("args"),
      py::arg("isa") = "");

#ifdef ENTROPY_PO_CUDA_ARCHS
  m.def("cuda_fold_workspace", &entropy_po::cuda_fold_workspace, py::arg("args"), py::arg("device"));
  m.def(
      "cuda_fold",
      [](const TileArgs& args, int level, bool first, uintptr_t workspace, int device, uintptr_t stream) {
        entropy_po::cuda_fold(with_level(args, level, first), pointer<void>(workspace), device, pointer<void>(stream));
      },
      py::arg("args"), py::arg("level"), py::arg("first"), py::arg("workspace"), py::arg("device"), py::arg("stream"));
  m.def(
      "cuda_stats",
      [](const StatsArgs& args, int device, uintptr_t stream) {
        entropy_po::cuda_stats(args, device, pointer<void>(stream));
      },
      py::arg("args"), py::arg("device"), py::arg("stream"));
  m.def(
      "cuda_grad",
      [](const TileArgs& args, uintptr_t g_logp, uintptr_t g_entropy, uintptr_t out, int out_dtype, int64_t out_stride,
         int device, uintptr_t stream) {
        const TileArgs a = with_gradient(args, g_logp, g_entropy, out, out_dtype, out_stride);
        entropy_po::cuda_grad(a, device, pointer<void>(stream));
      },
      py::arg("args"), py::arg("g_logp"), py::arg("g_entropy"), py::arg("out"), py::arg("out_dtype"),
      py::arg("out_stride"), py::arg("device"), py::arg("stream"));
#endif

  m.def("is_amd", &entropy_po::is_amd, "Whether the processor is AMD's.");
  m.def(
      "gemm_supported", [](int dtype) { return entropy_po::gemm_supported(dtype_from_code(dtype)); }, py::arg("dtype"),
      "Whether this processor can run gemm on operands of a dtype.");
  m.def(
      "gemm",
      [](uintptr_t a, uintptr_t b, uintptr_t out, int dtype, int64_t m, int64_t n, int64_t k, int64_t a_stride,
         int64_t b_stride, int64_t out_stride, bool a_transposed, bool b_transposed, bool accumulate, int threads,
         uintptr_t scaled, int64_t scaled_stride, float factor) {
        const DType element = dtype_from_code(dtype);
        if (!entropy_po::gemm_supported(element)) {
          throw std::runtime_error("this processor cannot run gemm on dtype code " + std::to_string(dtype));
        }
        py::gil_scoped_release release;
        const bool done =
            entropy_po::gemm({pointer<const void>(a), pointer<const void>(b), pointer<float>(out), element, m, n, k,
                              a_stride, b_stride, out_stride, a_transposed, b_transposed, accumulate,
                              threads < 1 ? 1 : threads, pointer<void>(scaled), scaled_stride, factor});
        if (!done) throw std::bad_alloc();
      },
      py::kw_only(), py::arg("a"), py::arg("b"), py::arg("out"), py::arg("dtype"), py::arg("m"), py::arg("n"),
      py::arg("k"), py::arg("a_stride"), py::arg("b_stride"), py::arg("out_stride"), py::arg("a_transposed"),
      py::arg("b_transposed"), py::arg("accumulate"), py::arg("threads"), py::arg("scaled") = 0,
      py::arg("scaled_stride") = 0, py::arg("factor") = 1.0f);

  m.def(
      "cpu_isas",
      [] {
        std::vector<std::string> names;
        for (const CpuKernels* k : cpu_kernels()) names.push_back(k->isa);
        return names;
      },
      "Instruction sets compiled in and usable on this processor, fastest first.");
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["flags"] = ENTROPY_PO_BUILD_FLAGS;
#ifdef _OPENMP
    info["openmp"] = _OPENMP;
#else
    info["openmp"] = 0;
#endif
#ifdef ENTROPY_PO_CUDA_ARCHS
    info["cuda"] = ENTROPY_PO_CUDA_ARCHS;
#else
    info["cuda"] = py::none();
    info["no_cuda"] = ENTROPY_PO_NO_CUDA;
#endif
    return info;
  });
}
