// The launch plan, and the way from a dtype code to the kernels of that dtype.
#define ENTROPY_PO_ISA gpu
#include "tile_cuda.h"

#include <algorithm>
#include <cstdint>

#include "../tile.h"
#include "launch.h"

namespace entropy_po {
namespace {

using namespace gpu;

constexpr int64_t kLaneBytes = 4 * 64;           // a lane's share of a row: 4 rounds of what it has on its way at once
constexpr int64_t kMinPartBytes = 8192;          // below this a block waits for its first load and for little else
constexpr int64_t kBlocksPerMultiprocessor = 4;  // about what is resident
constexpr int64_t kColumnMultiple = 64;          // parts of a row start at one alignment, that of the row

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4;
    case DType::kFloat64: return 8;
    default: return 2;
  }
}

int64_t multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// One block per row, as wide as leaves it several rounds to read: a block begins and merges in some 1.5 us, while others
// on the multiprocessor must keep the memory busy. Where rows would leave half of the device idle, several blocks to a
// row. Not yet measured: the numbers above come from counting (README.md).
LaunchPlan plan_launch(const TileArgs& a, int device, bool may_split) {
  if (a.n_cols > INT32_MAX - kMaxParts * kColumnMultiple) throw std::invalid_argument("n_cols is past 2^31 - 2049");
  const int64_t bytes = element_bytes(a.dtype);
  const int64_t resident = kBlocksPerMultiprocessor * multiprocessors(device);
  int64_t parts = 1;
  if (may_split && 2 * a.n_rows < resident) {
    parts = std::min({ceil_div(resident, a.n_rows), a.n_cols * bytes / kMinPartBytes, int64_t(kMaxParts)});
    parts = std::max<int64_t>(parts, 1);
  }
  const int64_t columns = ceil_div(ceil_div(a.n_cols, parts), kColumnMultiple) * kColumnMultiple;
  const int most = a.dtype == DType::kFloat64 ? kMaxLanes<double> : kMaxLanes<float>;
  int lanes = 128;
  while (lanes < most && lanes * kLaneBytes < columns * bytes) lanes *= 2;
  if (a.n_rows * parts > INT32_MAX) throw std::invalid_argument("n_rows is past 2^31");
  return {unsigned(a.n_rows * parts), lanes, int(parts), int(columns)};
}

constexpr int kStatsLanes = 128;

template <class T>
__global__ void __launch_bounds__(kStatsLanes) stats_kernel(const StatsArgs a) {
  const int64_t row = int64_t(blockIdx.x) * kStatsLanes + threadIdx.x;
  if (row < a.n_rows) write_stats<T>(a, row);
}

bool is_empty(const TileArgs& a) { return a.n_rows == 0 || a.n_cols == 0; }

}  // namespace

int64_t cuda_fold_workspace(const TileArgs& a, int device) {
  if (is_empty(a)) return 0;
  const LaunchPlan plan = plan_launch(a, device, true);
  return plan.parts == 1 ? 0 : int64_t(plan.blocks) * kSums * (a.dtype == DType::kFloat64 ? 8 : 4);
}

void cuda_fold(const TileArgs& a, void* workspace, int device, void* stream_handle) {
  if (is_empty(a)) return;
  check(cudaSetDevice(device));
  const LaunchPlan plan = plan_launch(a, device, workspace != nullptr);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  switch (a.dtype) {
    case DType::kFloat32: return fold_dtype<float, float>(a, plan, workspace, stream);
    case DType::kBFloat16: return fold_dtype<BFloat16, float>(a, plan, workspace, stream);
    case DType::kFloat16: return fold_dtype<Float16, float>(a, plan, workspace, stream);
    case DType::kFloat64: return fold_dtype<double, double>(a, plan, workspace, stream);
  }
}

void cuda_stats(const StatsArgs& a, int device, void* stream_handle) {
  if (a.n_rows == 0) return;
  check(cudaSetDevice(device));
  const auto kernel = a.is_double ? stats_kernel<double> : stats_kernel<float>;
  const int64_t blocks = ceil_div(a.n_rows, kStatsLanes);
  launch(kernel, unsigned(blocks), kStatsLanes, static_cast<cudaStream_t>(stream_handle), a);
}

void cuda_grad(const TileArgs& a, int device, void* stream_handle) {
  if (is_empty(a)) return;
  check(cudaSetDevice(device));
  // A narrowed row may overlay its wide one, where only a block of its own knows what has been read.
  const LaunchPlan plan = plan_launch(a, device, element_bytes(a.out_dtype) == element_bytes(a.dtype));
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (a.dtype == DType::kFloat32 && a.out_dtype == DType::kBFloat16) {
    return grad_dtype<float, BFloat16, float>(a, plan, stream);
  }
  switch (a.dtype) {
    case DType::kFloat32: return grad_dtype<float, float, float>(a, plan, stream);
    case DType::kBFloat16: return grad_dtype<BFloat16, BFloat16, float>(a, plan, stream);
    case DType::kFloat16: return grad_dtype<Float16, Float16, float>(a, plan, stream);
    case DType::kFloat64: return grad_dtype<double, double, double>(a, plan, stream);
  }
}

}  // namespace entropy_po
