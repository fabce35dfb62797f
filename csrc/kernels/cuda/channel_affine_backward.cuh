// The backward pass of a scale and a shift a channel: what goes on to the input, and the gradients
// of both for every sample, from one read of delta and the input.
#pragma once

#include "kernels.h"
#include "rows.cuh"

namespace grood_fast::cuda {

// Positions side by side: a warp takes a sample's channel.
template <typename Input>
__global__ void __launch_bounds__(Group<kWarpThreads>::kBlock)
    positions_of_channel_kernel(ChannelAffineBackwardArguments a, std::int64_t rows, bool aligned) {
  using Threads = Group<kWarpThreads>;
  using Real = typename RealOf<Input>::type;
  constexpr int kWidth = Chunk<Input>::kWidth;
  const std::int64_t row = Threads::row();
  if (row >= rows) return;  // the whole warp: there is no barrier below
  const Input* delta = static_cast<const Input*>(a.delta) + row * a.positions;
  const Input* input = static_cast<const Input*>(a.input) + row * a.positions;
  Real* onward = a.onward == nullptr ? nullptr : static_cast<Real*>(a.onward) + row * a.positions;
  const Real scale =
      onward == nullptr ? Real(0) : static_cast<const Real*>(a.scale)[row % a.channels];
  Real product = 0, sum = 0;
  for (std::int64_t first = Threads::thread() * kWidth; first < a.positions;
       first += kWarpThreads * kWidth) {
    const Chunk<Input> d = load_chunk(delta, first, a.positions, aligned);
    const Chunk<Input> x = load_chunk(input, first, a.positions, aligned);
    Real scaled[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Real value = widen(d.elements[i]);
      product += value * widen(x.elements[i]);
      sum += value;
      scaled[i] = value * scale;
    }
    if (onward != nullptr) store_chunk(onward, first, a.positions, scaled, aligned);
  }
  product = Threads::sum(product);
  sum = Threads::sum(sum);
  if (Threads::thread() != 0) return;
  static_cast<Real*>(a.products)[row] = product;
  static_cast<Real*>(a.sums)[row] = sum;
}

// Channels side by side: a block takes 32 of a sample's channels, a warp every eighth position.
template <typename Input>
__global__ void __launch_bounds__(256) channels_of_sample_kernel(ChannelAffineBackwardArguments a) {
  using Real = typename RealOf<Input>::type;
  constexpr int kWarps = 8;
  GROOD_FAST_SHARED(Real, products, kWarps * kWarpThreads);
  GROOD_FAST_SHARED(Real, sums, kWarps * kWarpThreads);
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  const std::int64_t sample = blockIdx.x;
  const std::int64_t channel = static_cast<std::int64_t>(blockIdx.y) * kWarpThreads + lane;
  const bool exists = channel < a.channels;
  const Real scale =
      exists && a.onward != nullptr ? static_cast<const Real*>(a.scale)[channel] : Real(0);
  Real product = 0, sum = 0;
  for (std::int64_t p = warp; p < a.positions && exists; p += kWarps) {
    const std::int64_t at = (sample * a.positions + p) * a.channels + channel;
    const Real value = widen(static_cast<const Input*>(a.delta)[at]);
    product += value * widen(static_cast<const Input*>(a.input)[at]);
    sum += value;
    if (a.onward != nullptr) static_cast<Real*>(a.onward)[at] = value * scale;
  }
  products[threadIdx.x] = product;
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || !exists) return;
  for (int other = 1; other < kWarps; ++other) {
    product += products[other * kWarpThreads + lane];
    sum += sums[other * kWarpThreads + lane];
  }
  static_cast<Real*>(a.products)[sample * a.channels + channel] = product;
  static_cast<Real*>(a.sums)[sample * a.channels + channel] = sum;
}

}  // namespace grood_fast::cuda
