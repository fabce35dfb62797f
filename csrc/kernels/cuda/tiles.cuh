// Tiles of matrices on their way to shared memory, while the threads go on computing.
#pragma once

#include "rows.cuh"

namespace grood_fast::cuda {

// A matrix in the device's memory, with elements of a row side by side.
struct MatrixArgument {
  const void* values;
  std::int64_t rows, columns;
  std::int64_t row_stride;  // in elements
  bool aligned;             // 128-bit copies of whole rows are possible
};

// Starts copying the kRows x kColumns elements from (row, column) on to shared memory, rows kPitch
// elements apart, with all kThreads threads of the block; zeros where the matrix has ended.
template <typename Element, int kRows, int kColumns, int kPitch, int kThreads>
__device__ __forceinline__ void copy_tile(
    void* to, const MatrixArgument& from, std::int64_t row, std::int64_t column) {
  constexpr int kWidth = Chunk<Element>::kWidth;
  constexpr int kChunks = kColumns / kWidth;
  static_assert(kColumns % kWidth == 0 && kPitch % kWidth == 0);
  static_assert(kRows * kChunks % kThreads == 0);
#pragma unroll 2
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int chunk = i * kThreads + static_cast<int>(threadIdx.x);
    const int r = chunk / kChunks, c = chunk % kChunks * kWidth;
    Element* place = static_cast<Element*>(to) + r * kPitch + c;
    const Element* source =
        static_cast<const Element*>(from.values) + (row + r) * from.row_stride + column + c;
    const std::int64_t left = row + r < from.rows ? from.columns - column - c : 0;
    if (from.aligned && left >= kWidth) {
      copy_async<16>(place, source);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if (j >= left)
          place[j] = Element{};
        else if constexpr (sizeof(Element) >= 4)
          copy_async<sizeof(Element)>(place + j, source + j);
        else
          place[j] = source[j];
      }
    }
  }
}

}  // namespace grood_fast::cuda
