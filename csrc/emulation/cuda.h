// The part of CUDA C++ that the kernels are written in, for an ordinary C++ compiler: what
// cuda_runtime.h and nvcc give them on a GPU.
#pragma once

#include <math.h>  // exp(float) and its like in the global namespace, as CUDA has them

#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>

#include "execution.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::grood_fast::emulation::position().thread)
#define blockIdx (::grood_fast::emulation::position().block)
#define blockDim (::grood_fast::emulation::position().block_size)
#define gridDim (::grood_fast::emulation::position().grid_size)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

#define __syncthreads() ::grood_fast::emulation::block_barrier(__LINE__)
#define __syncwarp(...) \
  ::grood_fast::emulation::warp_barrier(__LINE__, ::grood_fast::emulation::mask_of(__VA_ARGS__))

namespace grood_fast::emulation {

constexpr std::uint32_t mask_of(std::uint32_t mask = 0xffffffffu) { return mask; }

// A lane gives a value and takes the one that lane `source` gave.
template <typename T>
struct Exchange {
  T value;
  int source;
  T taken;
};

template <typename T>
T exchange(const char* what, int line, std::uint32_t mask, T value, int source) {
  Exchange<T> mine{value, source, value};
  const Perform perform = [](void* const(&all)[kWarp]) {
    for (void* one : all) {
      auto* call = static_cast<Exchange<T>*>(one);
      if (call == nullptr) continue;
      const auto* from = static_cast<const Exchange<T>*>(all[call->source]);
      // A lane that the mask does not name gives an undefined value.
      if (from != nullptr)
        call->taken = from->value;
      else
        std::memset(&call->taken, 0xff, sizeof(T));
    }
  };
  warp_meeting(what, line, mask, perform, &mine);
  return mine.taken;
}

struct Vote {
  bool yes;
  std::uint32_t ballot;
};

inline std::uint32_t ballot(const char* what, int line, std::uint32_t mask, bool yes) {
  Vote mine{yes, 0};
  const Perform perform = [](void* const(&all)[kWarp]) {
    std::uint32_t ballot = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (all[lane] != nullptr && static_cast<Vote*>(all[lane])->yes) ballot |= 1u << lane;
    }
    for (void* one : all) {
      if (one != nullptr) static_cast<Vote*>(one)->ballot = ballot;
    }
  };
  warp_meeting(what, line, mask, perform, &mine);
  return mine.ballot;
}

inline int lane() { return position().lane; }

}  // namespace grood_fast::emulation

template <typename T>
T __shfl_xor_sync(std::uint32_t mask, T value, int lanes, int line = __builtin_LINE()) {
  namespace e = grood_fast::emulation;
  return e::exchange("__shfl_xor_sync", line, mask, value, (e::lane() ^ lanes) % e::kWarp);
}
template <typename T>
T __shfl_sync(std::uint32_t mask, T value, int source, int line = __builtin_LINE()) {
  namespace e = grood_fast::emulation;
  return e::exchange("__shfl_sync", line, mask, value, source % e::kWarp);
}
template <typename T>
T __shfl_down_sync(std::uint32_t mask, T value, int delta, int line = __builtin_LINE()) {
  namespace e = grood_fast::emulation;
  const int source = e::lane() + delta;
  return e::exchange("__shfl_down_sync", line, mask, value, source < e::kWarp ? source : e::lane());
}
inline std::uint32_t __ballot_sync(std::uint32_t mask, bool yes, int line = __builtin_LINE()) {
  return grood_fast::emulation::ballot("__ballot_sync", line, mask, yes);
}
inline bool __any_sync(std::uint32_t mask, bool yes, int line = __builtin_LINE()) {
  return grood_fast::emulation::ballot("__any_sync", line, mask, yes) != 0;
}
inline bool __all_sync(std::uint32_t mask, bool yes, int line = __builtin_LINE()) {
  return grood_fast::emulation::ballot("__all_sync", line, mask, !yes) == 0;
}

template <typename T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
template <typename T>
T atomicCAS(T* address, T expected, T desired) {
  std::atomic_ref<T>(*address).compare_exchange_strong(
      expected, desired, std::memory_order_relaxed);
  return expected;
}
template <typename T>
T atomicMax(T* address, T value) {
  std::atomic_ref<T> there(*address);
  T old = there.load(std::memory_order_relaxed);
  while (old < value && !there.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
  return old;
}
template <typename T>
T atomicMin(T* address, T value) {
  std::atomic_ref<T> there(*address);
  T old = there.load(std::memory_order_relaxed);
  while (value < old && !there.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
  return old;
}

inline float __uint_as_float(std::uint32_t bits) { return std::bit_cast<float>(bits); }
inline std::uint32_t __float_as_uint(float value) { return std::bit_cast<std::uint32_t>(value); }
