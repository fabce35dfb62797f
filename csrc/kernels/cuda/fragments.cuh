// A warp's small matrix products on tensor cores, 16 rows at a time, with operands in shared memory
// or registers.
//
// Accumulators are 16 x 8: lane l, with g = l / 4 and t = l % 4, holds (g, 2t), (g, 2t + 1),
// (g + 8, 2t), (g + 8, 2t + 1).
#pragma once

#include "rows.cuh"

namespace grood_fast::cuda {

// A float32 as the sum of two TensorFloat-32 numbers, good to 2^-22 of it.
struct Split {
  std::uint32_t high, low;

  static __device__ __forceinline__ Split of(float value) {
    const std::uint32_t high = to_tf32(value);
    return {high, to_tf32(value - __uint_as_float(high))};
  }
};

// d += a b with the precision of float32: what is left out is the product of the two small parts.
__device__ __forceinline__ void mma_float32(
    float (&d)[4], const std::uint32_t (&a_high)[4], const std::uint32_t (&a_low)[4], Split b0,
    Split b1) {
  mma_tf32(d, a_low, b0.high, b1.high);
  mma_tf32(d, a_high, b0.low, b1.low);
  mma_tf32(d, a_high, b0.high, b1.high);
}

// How matrices of `Operand` are multiplied. Each kTiles-wide product adds a [16, kDepth] and the
// transpose of b [kTiles * 8, kDepth], rows kPitch elements apart.
//
// Tensor cores truncate when they add, so that errors of a long sum grow with its length: only
// kDepth columns are added up there, and such sums by ordinary additions, which round.
template <typename Operand>
struct Product;

template <typename Real>
__device__ __forceinline__ void add(Real (&to)[4], const Real (&from)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] += from[i];
}

template <>
struct Product<float> {
  static constexpr int kDepth = 32, kPitch = kDepth + 4;

  template <int kTiles>
  static __device__ __forceinline__ void add_product(
      float (&to)[kTiles][4], const float* a, const float* b) {
    const int g = threadIdx.x % kWarpThreads / 4, t = threadIdx.x % 4;
    float sum[kTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
      std::uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Split part = Split::of(a[(g + i % 2 * 8) * kPitch + k + t + i / 2 * 4]);
        high[i] = part.high;
        low[i] = part.low;
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float* column = b + (tile * 8 + g) * kPitch + k + t;
        mma_float32(sum[tile], high, low, Split::of(column[0]), Split::of(column[4]));
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) add(to[tile], sum[tile]);
  }
};

template <typename Half, auto kMultiply>
struct HalfProduct {
  static constexpr int kDepth = 64, kPitch = kDepth + 8;

  template <int kTiles>
  static __device__ __forceinline__ void add_product(
      float (&to)[kTiles][4], const Half* a, const Half* b) {
    static_assert(kTiles % 2 == 0);
    const int lane = threadIdx.x % kWarpThreads, matrix = lane / 8, row = lane % 8;
    float sum[kTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      std::uint32_t left[4];
      load_matrices(left, a + (row + matrix % 2 * 8) * kPitch + k + matrix / 2 * 8);
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        std::uint32_t right[4];  // of two tiles
        load_matrices(right, b + ((tile + matrix / 2) * 8 + row) * kPitch + k + matrix % 2 * 8);
        kMultiply(sum[tile], left, right[0], right[1]);
        kMultiply(sum[tile + 1], left, right[2], right[3]);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) add(to[tile], sum[tile]);
  }
};

struct MultiplyBfloat16 {
  __device__ __forceinline__ void operator()(
      float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) const {
    mma_bfloat16(d, a, b0, b1);
  }
};
struct MultiplyFloat16 {
  __device__ __forceinline__ void operator()(
      float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) const {
    mma_float16(d, a, b0, b1);
  }
};
template <>
struct Product<Bfloat16> : HalfProduct<Bfloat16, MultiplyBfloat16{}> {};
template <>
struct Product<Float16> : HalfProduct<Float16, MultiplyFloat16{}> {};

template <>
struct Product<double> {
  static constexpr int kDepth = 16, kPitch = kDepth + 2;

  template <int kTiles>
  static __device__ __forceinline__ void add_product(
      double (&to)[kTiles][4], const double* a, const double* b) {
    const int g = threadIdx.x % kWarpThreads / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < kDepth; k += 4) {
      const double upper = a[g * kPitch + k + t], lower = a[(g + 8) * kPitch + k + t];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const double column = b[(tile * 8 + g) * kPitch + k + t];
        mma_float64(to[tile][0], to[tile][1], upper, column);
        mma_float64(to[tile][2], to[tile][3], lower, column);
      }
    }
  }
};

// The same of matrices whose columns are multiplied: adds the transpose of a [kDepth, 16] times
// b [kDepth, kTiles * 8], rows kPitch elements apart.
template <typename Real>
struct OuterProduct;

template <>
struct OuterProduct<float> {
  template <int kDepth, int kPitch, int kTiles>
  static __device__ __forceinline__ void add_product(
      float (&to)[kTiles][4], const float* a, const float* b) {
    const int g = threadIdx.x % kWarpThreads / 4, t = threadIdx.x % 4;
    float sum[kTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
      std::uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Split part = Split::of(a[(k + t + i / 2 * 4) * kPitch + g + i % 2 * 8]);
        high[i] = part.high;
        low[i] = part.low;
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float* row = b + (k + t) * kPitch + tile * 8 + g;
        mma_float32(sum[tile], high, low, Split::of(row[0]), Split::of(row[4 * kPitch]));
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) add(to[tile], sum[tile]);
  }
};

template <>
struct OuterProduct<double> {
  template <int kDepth, int kPitch, int kTiles>
  static __device__ __forceinline__ void add_product(
      double (&to)[kTiles][4], const double* a, const double* b) {
    const int g = threadIdx.x % kWarpThreads / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < kDepth; k += 4) {
      const double upper = a[(k + t) * kPitch + g], lower = a[(k + t) * kPitch + g + 8];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const double row = b[(k + t) * kPitch + tile * 8 + g];
        mma_float64(to[tile][0], to[tile][1], upper, row);
        mma_float64(to[tile][2], to[tile][3], lower, row);
      }
    }
  }
};

// How accumulators p [16, kInner * 8] are multiplied by b [kInner * 8, kTiles * 8] and added to
// others. A product does not care in which order it takes its inner index: p is used where it lies,
// with b's rows taken in p's order.
template <typename Real>
struct RegisterProduct;

template <>
struct RegisterProduct<float> {
  template <int kInner, int kTiles, int kPitch>
  static __device__ __forceinline__ void add_product(
      float (&to)[kTiles][4], const float (*p)[4], const float* b) {
    const int g = threadIdx.x % kWarpThreads / 4, t = threadIdx.x % 4;
    std::uint32_t high[kInner][4], low[kInner][4];
#pragma unroll
    for (int k = 0; k < kInner; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Split part = Split::of(p[k][i % 2 * 2 + i / 2]);
        high[k][i] = part.high;
        low[k][i] = part.low;
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float sum[4] = {};
#pragma unroll
      for (int k = 0; k < kInner; ++k) {
        const float* row = b + (k * 8 + 2 * t) * kPitch + tile * 8 + g;
        mma_float32(sum, high[k], low[k], Split::of(row[0]), Split::of(row[kPitch]));
      }
      add(to[tile], sum);
    }
  }
};

template <>
struct RegisterProduct<double> {
  template <int kInner, int kTiles, int kPitch>
  static __device__ __forceinline__ void add_product(
      double (&to)[kTiles][4], const double (*p)[4], const double* b) {
    const int g = threadIdx.x % kWarpThreads / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int k = 0; k < 2 * kInner; ++k) {
        const double row = b[(k / 2 * 8 + 2 * t + k % 2) * kPitch + tile * 8 + g];
        mma_float64(to[tile][0], to[tile][1], p[k / 2][k % 2], row);
        mma_float64(to[tile][2], to[tile][3], p[k / 2][2 + k % 2], row);
      }
    }
  }
};

}  // namespace grood_fast::cuda
