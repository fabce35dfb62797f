// A matrix row by row: a group of threads takes a row, reads it 128 bits at a time and reduces it.
//
// Groups are 4 threads, a warp or a block. All threads of a group take part in every reduction;
// groups past the last row go along with it and write nothing.
#pragma once

#include <cmath>

#include "../kernels.h"
#include "ptx.h"

namespace grood_fast::cuda {

constexpr int kWarpThreads = 32;

// 16-bit formats, as distinct types.
struct Bfloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// What a format is computed in.
template <typename Input>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(Bfloat16 value) {
  return __uint_as_float(std::uint32_t{value.bits} << 16);
}
__device__ __forceinline__ float widen(Float16 value) { return float16_to_float(value.bits); }

// Calls `body` with a value of the type that `dtype` names.
template <typename Body>
const char* with_input_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::float32:
      return body(float{});
    case DType::float64:
      return body(double{});
    case DType::bfloat16:
      return body(Bfloat16{});
    case DType::float16:
      return body(Float16{});
  }
  return "unknown dtype";
}

// --- reading and writing
// --------------------------------------------------------------------------

// As many elements as 128 bits hold.
template <typename Input>
struct alignas(16) Chunk {
  static constexpr int kWidth = 16 / sizeof(Input);
  Input elements[kWidth];
};

// Elements [first, first + kWidth) of a row, zero where they are past `columns`. `aligned`: the
// address of every chunk is a multiple of 16.
template <typename Input>
__device__ __forceinline__ Chunk<Input> load_chunk(
    const Input* row, std::int64_t first, std::int64_t columns, bool aligned) {
  Chunk<Input> chunk;
  if (aligned && first + Chunk<Input>::kWidth <= columns) {
    const uint4 bits = *reinterpret_cast<const uint4*>(row + first);
    std::memcpy(&chunk, &bits, sizeof(bits));
    return chunk;
  }
#pragma unroll
  for (int i = 0; i < Chunk<Input>::kWidth; ++i)
    chunk.elements[i] = first + i < columns ? row[first + i] : Input{};
  return chunk;
}

// Writes what of elements [first, first + kWidth) is within the row.
template <typename Real, int kWidth>
__device__ __forceinline__ void store_chunk(
    Real* row, std::int64_t first, std::int64_t columns, const Real (&values)[kWidth],
    bool aligned) {
  constexpr int kPart = 16 / sizeof(Real);
  if (aligned && first + kWidth <= columns) {
#pragma unroll
    for (int i = 0; i < kWidth; i += kPart) {
      uint4 bits;
      std::memcpy(&bits, values + i, sizeof(bits));
      *reinterpret_cast<uint4*>(row + first + i) = bits;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (first + i < columns) row[first + i] = values[i];
  }
}

__host__ __device__ inline bool aligned_to_chunk(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

// Whether every row can be read 128 bits at a time.
template <typename Element>
__host__ __device__ bool rows_aligned(const void* matrix, std::int64_t row_stride) {
  return aligned_to_chunk(matrix) && row_stride % (16 / static_cast<int>(sizeof(Element))) == 0;
}

// --- groups of threads
// ----------------------------------------------------------------------------

// The value of the lane `distance` away; overloaded where a value is more than one number.
template <typename Value>
__device__ __forceinline__ Value shuffle_xor(unsigned lanes, Value value, int distance) {
  return __shfl_xor_sync(lanes, value, distance);
}

// `kThreads` of them: a power of two up to 32 within a warp, or the whole block.
template <int kThreads>
struct Group {
  static constexpr int kBlock = kThreads > kWarpThreads ? kThreads : 128;  // threads of a block
  static constexpr int kRows = kBlock / kThreads;                          // rows of a block
  static_assert((kThreads & (kThreads - 1)) == 0 && kThreads <= 1024);

  static __device__ __forceinline__ int thread() { return threadIdx.x % kThreads; }
  static __device__ __forceinline__ std::int64_t row() {
    return static_cast<std::int64_t>(blockIdx.x) * kRows + threadIdx.x / kThreads;
  }

  // The lanes of this thread's warp that are of its group.
  static __device__ __forceinline__ unsigned lanes() {
    if constexpr (kThreads >= kWarpThreads) return 0xffffffffu;
    return ((1u << kThreads % kWarpThreads) - 1)
           << threadIdx.x % kWarpThreads / kThreads * kThreads;
  }

  // `join` of every thread's value, on every thread. It must be associative and commutative.
  template <typename Value, typename Join>
  static __device__ __forceinline__ Value reduce(Value value, Join join) {
#pragma unroll
    for (int distance = (kThreads < kWarpThreads ? kThreads : kWarpThreads) / 2; distance > 0;
         distance /= 2)
      value = join(value, shuffle_xor(lanes(), value, distance));
    if constexpr (kThreads > kWarpThreads) {
      constexpr int kWarps = kThreads / kWarpThreads;
      GROOD_FAST_SHARED(Value, of_warp, kWarps);
      if (threadIdx.x % kWarpThreads == 0) of_warp[threadIdx.x / kWarpThreads] = value;
      __syncthreads();
      value = of_warp[0];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) value = join(value, of_warp[warp]);
      __syncthreads();  // the array is used again
    }
    return value;
  }

  template <typename Value>
  static __device__ __forceinline__ Value sum(Value value) {
    return reduce(value, [](Value a, Value b) { return a + b; });
  }
  // NaN if there is one.
  template <typename Value>
  static __device__ __forceinline__ Value maximum(Value value) {
    return reduce(value, [](Value a, Value b) { return a > b || a != a ? a : b; });
  }
};

// Launches a kernel of (arguments, rows, aligned) with a group a row.
template <typename Threads, typename Arguments>
const char* launch_rows(
    void (*kernel)(Arguments, std::int64_t, bool), const Arguments& arguments, std::int64_t rows,
    bool aligned, Stream stream) {
  constexpr std::int64_t kMostBlocks = 2147483647;
  const std::int64_t blocks = (rows + Threads::kRows - 1) / Threads::kRows;
  if (blocks == 0) return nullptr;
  if (blocks > kMostBlocks) return "too many rows for one launch";
  return launch(
      kernel, dim3{static_cast<unsigned>(blocks), 1, 1}, Threads::kBlock, 0, stream, arguments,
      rows, aligned);
}

}  // namespace grood_fast::cuda
