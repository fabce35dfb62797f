// What device code stands on: CUDA when nvcc compiles it, the emulated device otherwise. Kernels
// take everything that the two spell differently from here and from ptx.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)

#include <cuda_runtime.h>

// An array in the block's shared memory.
#define GROOD_FAST_SHARED(type, name, count) __shared__ type name[count]

namespace grood_fast::cuda {

using Stream = cudaStream_t;

// The block's dynamic shared memory, aligned for 128-bit accesses.
__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  return shared_memory;
}

inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Puts a grid on the stream; null, or why it was refused. Never waits.
template <typename... Parameters, typename... Arguments>
const char* launch(
    void (*kernel)(Parameters...), dim3 blocks, int threads, std::size_t shared_bytes,
    Stream stream, Arguments... arguments) {
  constexpr std::size_t kAlwaysAllowed = 48 << 10;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kAlwaysAllowed)
    error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    kernel<<<blocks, threads, shared_bytes, stream>>>(arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace grood_fast::cuda

#else

#include "../../emulation/cuda.h"

#define GROOD_FAST_SHARED(type, name, count)         \
  static const char name##_tag = 0;                  \
  type(&name)[count] = *static_cast<type(*)[count]>( \
      ::grood_fast::emulation::shared_array(&name##_tag, sizeof(type) * std::size_t(count)))

namespace grood_fast::cuda {

using Stream = void*;

using emulation::dynamic_shared;

inline int multiprocessors() { return emulation::kMultiprocessors; }

template <typename... Parameters, typename... Arguments>
const char* launch(
    void (*kernel)(Parameters...), dim3 blocks, int threads, std::size_t shared_bytes, Stream,
    Arguments... arguments) {
  emulation::run(
      {{blocks.x, blocks.y, blocks.z}, {static_cast<unsigned>(threads), 1, 1}, shared_bytes, [=] {
         kernel(arguments...);
       }});
  return nullptr;
}

}  // namespace grood_fast::cuda

#endif
