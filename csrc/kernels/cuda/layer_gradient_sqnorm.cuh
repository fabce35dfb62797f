// The squared norm of a gradient that is a sum of outer products over positions, per sample.
//
// Two ways, of which the launcher takes the cheaper. Forming: a block makes 64 x 64 entries of one
// gradient in registers and adds up their squares. Pairing: of 64 x 64 pairs of positions, the
// inner products of delta times those of the activations. Neither writes a matrix.
#pragma once

#include "fragments.cuh"
#include "kernels.h"
#include "tiles.cuh"

namespace grood_fast::cuda {

// Offsets travel with the launch; a convolution with more goes in several.
constexpr int kOffsetsAtOnce = 64;

struct LayerGradientSqnorm {
  LayerGradientSqnormArguments a;
  bool activation_aligned, delta_aligned;
  std::int64_t parts;       // a sample
  std::int64_t first_part;  // of this launch
  int offset_count;         // of this launch
  std::int64_t offsets[kOffsetsAtOnce];
};

template <typename Real>
struct SqnormShape {
  static constexpr int kThreads = 128, kTile = 64;
  static constexpr int kTiles = kTile / 8;                  // of accumulators, across
  static constexpr int kDepth = 128 / sizeof(Real);         // positions or columns at once
  static constexpr int kPitch = kTile + 32 / sizeof(Real);  // of tiles with 64 columns
};

// The matrix of one sample's rows, from `offset` on.
template <typename Real>
__device__ __forceinline__ MatrixArgument sample_rows(
    const void* values, std::int64_t sample, std::int64_t sample_stride, std::int64_t offset,
    std::int64_t rows, std::int64_t columns, std::int64_t stride, bool aligned) {
  return {
      static_cast<const Real*>(values) + sample * sample_stride + offset * stride, rows, columns,
      stride, aligned};
}

// The sum of every thread's value, on thread 0.
__device__ __forceinline__ double block_sum(double value) { return Group<128>::sum(value); }

template <typename Real>
__global__ void __launch_bounds__(128, 2) form_gradient_kernel(LayerGradientSqnorm s) {
  using Shape = SqnormShape<Real>;
  struct alignas(16) Buffers {
    Real delta[2][Shape::kDepth * Shape::kPitch], activation[2][Shape::kDepth * Shape::kPitch];
  };
  GROOD_FAST_SHARED(Buffers, shared, 1);
  Buffers& buffers = shared[0];
  const LayerGradientSqnormArguments& a = s.a;
  const std::int64_t across = (a.inputs + Shape::kTile - 1) / Shape::kTile;
  const std::int64_t down = (a.outputs + Shape::kTile - 1) / Shape::kTile;
  const std::int64_t part = blockIdx.x, sample = blockIdx.y;
  const std::int64_t output = part / across % down * Shape::kTile;
  const std::int64_t input = part % across * Shape::kTile;
  const MatrixArgument delta = sample_rows<Real>(
      a.delta, sample, a.delta_sample_stride, 0, a.positions, a.outputs, a.delta_stride,
      s.delta_aligned);
  const MatrixArgument activation = sample_rows<Real>(
      a.activation, sample, a.activation_sample_stride, s.offsets[part / across / down],
      a.positions, a.inputs, a.activation_stride, s.activation_aligned);
  const auto fetch = [&](int buffer, std::int64_t position) {
    copy_tile<Real, Shape::kDepth, Shape::kTile, Shape::kPitch, Shape::kThreads>(
        buffers.delta[buffer], delta, position, output);
    copy_tile<Real, Shape::kDepth, Shape::kTile, Shape::kPitch, Shape::kThreads>(
        buffers.activation[buffer], activation, position, input);
  };
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  Real gradient[Shape::kTiles][4] = {};
  fetch(0, 0);
  int buffer = 0;
  for (std::int64_t position = 0; position < a.positions; position += Shape::kDepth) {
    wait_for_copies();
    __syncthreads();
    if (position + Shape::kDepth < a.positions) fetch(buffer ^ 1, position + Shape::kDepth);
    OuterProduct<Real>::template add_product<Shape::kDepth, Shape::kPitch>(
        gradient, buffers.delta[buffer] + warp * 16, buffers.activation[buffer]);
    buffer ^= 1;
  }
  double sum = 0;
#pragma unroll
  for (int tile = 0; tile < Shape::kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sum += static_cast<double>(gradient[tile][i]) * static_cast<double>(gradient[tile][i]);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) a.parts[sample * s.parts + s.first_part + part] = sum;
}

template <typename Real>
__global__ void __launch_bounds__(128, 2) pair_positions_kernel(LayerGradientSqnorm s) {
  using Shape = SqnormShape<Real>;
  using P = Product<Real>;
  constexpr int kElements = Shape::kTile * P::kPitch;
  struct alignas(16) Buffers {
    Real tiles[2][2 * kElements];
  };
  GROOD_FAST_SHARED(Buffers, shared, 1);
  Buffers& buffers = shared[0];
  const LayerGradientSqnormArguments& a = s.a;
  const std::int64_t tiles = (a.positions + Shape::kTile - 1) / Shape::kTile;
  const std::int64_t part = blockIdx.x, sample = blockIdx.y;
  const std::int64_t row = part / tiles * Shape::kTile, other = part % tiles * Shape::kTile;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  // The inner products of the rows from `row` and from `other` on.
  const auto products = [&](Real(&to)[Shape::kTiles][4], const MatrixArgument& matrix) {
    const auto fetch = [&](int buffer, std::int64_t column) {
      copy_tile<Real, Shape::kTile, P::kDepth, P::kPitch, Shape::kThreads>(
          buffers.tiles[buffer], matrix, row, column);
      copy_tile<Real, Shape::kTile, P::kDepth, P::kPitch, Shape::kThreads>(
          buffers.tiles[buffer] + kElements, matrix, other, column);
    };
    int buffer = 0;
    __syncthreads();  // the products before are done with the buffers
    fetch(0, 0);
    for (std::int64_t column = 0; column < matrix.columns; column += P::kDepth) {
      wait_for_copies();
      __syncthreads();
      if (column + P::kDepth < matrix.columns) fetch(buffer ^ 1, column + P::kDepth);
      P::add_product(
          to, buffers.tiles[buffer] + warp * 16 * P::kPitch, buffers.tiles[buffer] + kElements);
      buffer ^= 1;
    }
  };
  double sum = 0;
  if (other >= row) {  // the pairs below the diagonal are those above it
    Real left[Shape::kTiles][4] = {}, right[Shape::kTiles][4] = {};
    products(
        left, sample_rows<Real>(
                  a.delta, sample, a.delta_sample_stride, 0, a.positions, a.outputs, a.delta_stride,
                  s.delta_aligned));
    for (int j = 0; j < s.offset_count; ++j)
      products(
          right, sample_rows<Real>(
                     a.activation, sample, a.activation_sample_stride, s.offsets[j], a.positions,
                     a.inputs, a.activation_stride, s.activation_aligned));
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sum += static_cast<double>(left[tile][i]) * static_cast<double>(right[tile][i]);
    }
    if (other > row) sum *= 2;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) a.parts[sample * s.parts + s.first_part + part] = sum;
}

// result[sample] = the sum of its parts, in an order that is always the same.
template <typename Real>
__global__ void __launch_bounds__(128)
    add_parts_kernel(const double* parts, std::int64_t count, Real* result) {
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += 128)
    sum += parts[static_cast<std::int64_t>(blockIdx.x) * count + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) result[blockIdx.x] = static_cast<Real>(sum);
}

}  // namespace grood_fast::cuda
