// Squared distances between the rows of two matrices, 64 by 64, from their differences: nothing
// cancels, so that near-duplicates keep their digits, and no norm is needed.
#pragma once

#include "tiles.cuh"

namespace grood_fast::cuda {

template <typename Operand>
struct Differences {
  using Real = typename RealOf<Operand>::type;
  static constexpr int kThreads = 128;
  static constexpr int kTile = 64;              // rows of either matrix
  static constexpr int kRows = 4, kOthers = 8;  // a thread's
  static constexpr int kDepth = 128 / sizeof(Operand), kPitch = kDepth + Chunk<Operand>::kWidth;

  struct alignas(16) Buffers {
    unsigned char bytes[2][2 * kTile * kPitch * sizeof(Operand)];
  };

  // Row i and other j of this thread, within the tile.
  static __device__ __forceinline__ int row(int i) {
    return static_cast<int>(threadIdx.x) / 8 + i * 16;
  }
  static __device__ __forceinline__ int other(int j) {
    return static_cast<int>(threadIdx.x) % 8 + j * 8;
  }

  static __device__ __forceinline__ void fetch(
      Buffers& buffers, int buffer, const MatrixArgument& rows, const MatrixArgument& others,
      std::int64_t first_row, std::int64_t first_other, std::int64_t column) {
    copy_tile<Operand, kTile, kDepth, kPitch, kThreads>(
        buffers.bytes[buffer], rows, first_row, column);
    copy_tile<Operand, kTile, kDepth, kPitch, kThreads>(
        buffers.bytes[buffer] + kTile * kPitch * sizeof(Operand), others, first_other, column);
  }

  // to[i][j] = |row i - other j|^2, of the tile of `rows` and `others` that starts there.
  static __device__ __forceinline__ void squares(
      Real (&to)[kRows][kOthers], Buffers& buffers, const MatrixArgument& rows,
      const MatrixArgument& others, std::int64_t first_row, std::int64_t first_other) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kOthers; ++j) to[i][j] = 0;
    }
    int buffer = 0;
    __syncthreads();  // the buffers of the tile before are used again
    fetch(buffers, 0, rows, others, first_row, first_other, 0);
    for (std::int64_t column = 0; column < rows.columns; column += kDepth) {
      wait_for_copies();
      __syncthreads();
      if (column + kDepth < rows.columns)
        fetch(buffers, buffer ^ 1, rows, others, first_row, first_other, column + kDepth);
      const auto* a = reinterpret_cast<const Operand*>(buffers.bytes[buffer]);
      const Operand* b = a + kTile * kPitch;
      // Added up here first: the rounding error of a long sum is that of a short one.
      Real sum[kRows][kOthers] = {};
#pragma unroll 2
      for (int k = 0; k < kDepth; k += Chunk<Operand>::kWidth) {
        Chunk<Operand> left[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) left[i] = load_shared(a + row(i) * kPitch + k);
#pragma unroll
        for (int j = 0; j < kOthers; ++j) {
          const Chunk<Operand> right = load_shared(b + other(j) * kPitch + k);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int e = 0; e < Chunk<Operand>::kWidth; ++e) {
              const Real difference = widen(left[i].elements[e]) - widen(right.elements[e]);
              sum[i][j] += difference * difference;
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kOthers; ++j) to[i][j] += sum[i][j];
      }
      buffer ^= 1;
    }
  }

 private:
  static __device__ __forceinline__ Chunk<Operand> load_shared(const Operand* from) {
    Chunk<Operand> chunk;
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    std::memcpy(&chunk, &bits, sizeof(bits));
    return chunk;
  }
};

}  // namespace grood_fast::cuda
