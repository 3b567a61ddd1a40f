// Enough of CUDA to run csrc/cuda/*.cu on one CPU thread, compiled by g++ with this folder before nvcc's headers.
//
// Every lane of a block is a coroutine that runs until it waits for others, and those that can run do so in an order
// drawn anew each round: a missing barrier shows as a wrong number. Barriers and shuffles that not all lanes reach end
// the process, as do misaligned vectors (-fsanitize=alignment). What it cannot show: speed, and the hardware's own
// rounding; ex2.approx and rcp.approx are given the worst errors that their documentation allows.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }

inline dim3 threadIdx, blockIdx, blockDim;

namespace device {

constexpr size_t kStackBytes = 64 * 1024;

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  inline void wait();
};

struct Lane {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;
};

inline std::vector<std::unique_ptr<Lane>> lanes;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;
inline Barrier block, warps[32];
inline unsigned steps;  // lanes that ended and barriers that opened: what a round must raise
inline double slots[1024];

inline void yield() {
  const unsigned me = current;
  swapcontext(&lanes[me]->context, &scheduler);
}

inline void Barrier::wait() {
  const unsigned mine = generation;
  if (++arrived == expected) {
    arrived = 0;
    ++generation;
    ++steps;
  }
  while (generation == mine) yield();
}

inline void run_lane() {
  body();
  lanes[current]->done = true;
  ++steps;
  swapcontext(&lanes[current]->context, &scheduler);
}

inline void run_block(unsigned n, std::mt19937& random) {
  while (lanes.size() < n) lanes.push_back(std::make_unique<Lane>());
  block = Barrier{int(n)};
  for (auto& warp : warps) warp = Barrier{32};
  std::vector<unsigned> order(n);
  for (unsigned i = 0; i < n; ++i) {
    order[i] = i;
    lanes[i]->done = false;
    getcontext(&lanes[i]->context);
    lanes[i]->context.uc_stack = {lanes[i]->stack.get(), 0, kStackBytes};
    lanes[i]->context.uc_link = nullptr;
    makecontext(&lanes[i]->context, run_lane, 0);
  }
  while (!order.empty()) {
    const unsigned before = steps;
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
    for (const unsigned lane : order) {
      current = lane;
      threadIdx.x = lane;
      swapcontext(&scheduler, &lanes[lane]->context);
    }
    std::vector<unsigned> rest;
    for (const unsigned lane : order) {
      if (!lanes[lane]->done) rest.push_back(lane);
    }
    order = rest;
    if (steps == before) {
      std::fprintf(stderr, "cuda_on_host: a barrier or shuffle that not all of its lanes reach\n");
      std::abort();
    }
  }
}

}  // namespace device

inline void __syncthreads() { device::block.wait(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int step) {
  const unsigned lane = threadIdx.x;
  device::slots[lane] = value;
  device::warps[lane / 32].wait();
  const T other = T(device::slots[lane ^ unsigned(step)]);
  device::warps[lane / 32].wait();
  return other;
}

template <class T>
T __ldcs(const T* p) {
  return *p;
}

// y, moved by that many units in the last place, up or down as the bits of x have it.
inline float off_by(int units, float y, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const bool up = (bits * 2654435761u) >> 31;
  for (int i = 0; i < units && y == y; ++i) y = nextafterf(y, up ? INFINITY : 0.0f);
  return y;
}
inline float ex2_approx(float x) {
  if (x == 0.0f) return 1.0f;
  if (x < -126.0f) return 0.0f;
  return off_by(2, float(exp2(double(x))), x);
}
inline float rcp_approx(float x) { return off_by(1, float(1.0 / double(x)), x); }
inline float max_or_nan(float a, float b) { return a != a ? a : b != b ? b : a < b ? b : a; }
template <class T>
T product(T a, T b) {
  volatile T rounded = a * b;
  return rounded;
}

enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct CUstream_st*;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 132, cudaSuccess; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static std::mt19937 random{std::random_device{}()};
  device::body = [&] { kernel(arguments...); };
  blockDim = config->blockDim;
  for (unsigned b = 0; b < config->gridDim.x; ++b) {
    blockIdx.x = b;
    device::run_block(blockDim.x, random);
  }
  return cudaSuccess;
}
