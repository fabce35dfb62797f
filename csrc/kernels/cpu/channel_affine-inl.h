// The backward pass of a scale and a shift a channel: what goes on to the input, and the gradients
// of both for every sample, from one read of delta and the input.
#pragma once

#include "simd-inl.h"

namespace grood_fast::GROOD_FAST_LEVEL {

// kVectors vectors of neighbouring channels, from channel `first` on, over all positions.
template <typename Input, int kVectors>
GROOD_FAST_INLINE void channels_of_sample(
    const ChannelAffineArguments& a, std::int64_t sample, std::int64_t first) {
  using Real = typename RealOf<Input>::type;
  using S = Simd<Real>;
  using V = typename S::V;
  const std::int64_t start = sample * a.positions * a.channels + first;
  const Input* delta = static_cast<const Input*>(a.delta) + start;
  const Input* input = static_cast<const Input*>(a.input) + start;
  Real* onward = a.onward == nullptr ? nullptr : static_cast<Real*>(a.onward) + start;
  V scale[kVectors] = {}, products[kVectors] = {}, sums[kVectors] = {};
  if (onward != nullptr) {
    for (int k = 0; k < kVectors; ++k)
      scale[k] = S::load(static_cast<const Real*>(a.scale) + first + k * S::kLanes);
  }
  // Folded every kBlock positions: the rounding error of a long sum is that of a short one.
  for (std::int64_t block = 0; block < a.positions; block += kBlock) {
    const std::int64_t stop = block + kBlock < a.positions ? block + kBlock : a.positions;
    V product[kVectors] = {}, sum[kVectors] = {};
    for (std::int64_t p = block; p < stop; ++p) {
      for (int k = 0; k < kVectors; ++k) {
        const std::int64_t at = p * a.channels + k * S::kLanes;
        const V d = load_wide(delta + at);
        product[k] += d * load_wide(input + at);
        sum[k] += d;
        if (onward != nullptr) S::store(onward + at, d * scale[k]);
      }
    }
    for (int k = 0; k < kVectors; ++k) {
      products[k] += product[k];
      sums[k] += sum[k];
    }
  }
  const std::int64_t to = sample * a.channels + first;
  for (int k = 0; k < kVectors; ++k) {
    S::store(static_cast<Real*>(a.products) + to + k * S::kLanes, products[k]);
    S::store(static_cast<Real*>(a.sums) + to + k * S::kLanes, sums[k]);
  }
}

template <typename Input>
void channel_of_sample(
    const ChannelAffineArguments& a, std::int64_t sample, std::int64_t channel,
    std::int64_t stride) {
  using Real = typename RealOf<Input>::type;
  const std::int64_t start = a.channels_inner ? sample * a.positions * a.channels + channel
                                              : (sample * a.channels + channel) * a.positions;
  const Input* delta = static_cast<const Input*>(a.delta) + start;
  const Input* input = static_cast<const Input*>(a.input) + start;
  Real* onward = a.onward == nullptr ? nullptr : static_cast<Real*>(a.onward) + start;
  const Real scale = onward == nullptr ? Real(0) : static_cast<const Real*>(a.scale)[channel];
  double product = 0, sum = 0;
  for (std::int64_t p = 0; p < a.positions; ++p) {
    const Real d = widen(delta[p * stride]);
    product += static_cast<double>(d * widen(input[p * stride]));
    sum += static_cast<double>(d);
    if (onward != nullptr) onward[p * stride] = d * scale;
  }
  static_cast<Real*>(a.products)[sample * a.channels + channel] = static_cast<Real>(product);
  static_cast<Real*>(a.sums)[sample * a.channels + channel] = static_cast<Real>(sum);
}

template <typename Input>
void positions_of_channel(const ChannelAffineArguments& a, std::int64_t row) {
  using Real = typename RealOf<Input>::type;
  using S = Simd<Real>;
  using V = typename S::V;
  const Input* delta = static_cast<const Input*>(a.delta) + row * a.positions;
  const Input* input = static_cast<const Input*>(a.input) + row * a.positions;
  const std::int64_t whole = a.positions / S::kLanes;
  const V products = sum_of<Real>(whole, [&](std::int64_t i) {
    return load_wide(delta + i * S::kLanes) * load_wide(input + i * S::kLanes);
  });
  const V sums =
      sum_of<Real>(whole, [&](std::int64_t i) { return load_wide(delta + i * S::kLanes); });
  Real product = lanes_sum<Real>(products), sum = lanes_sum<Real>(sums);
  for (std::int64_t p = whole * S::kLanes; p < a.positions; ++p) {
    product += widen(delta[p]) * widen(input[p]);
    sum += widen(delta[p]);
  }
  static_cast<Real*>(a.products)[row] = product;
  static_cast<Real*>(a.sums)[row] = sum;
  if (a.onward == nullptr) return;
  const Real scale = static_cast<const Real*>(a.scale)[row % a.channels];
  Real* onward = static_cast<Real*>(a.onward) + row * a.positions;
  for (std::int64_t i = 0; i < whole; ++i)
    S::store(onward + i * S::kLanes, load_wide(delta + i * S::kLanes) * scale);
  for (std::int64_t p = whole * S::kLanes; p < a.positions; ++p)
    onward[p] = widen(delta[p]) * scale;
}

template <typename Input>
void channel_affine_of(const ChannelAffineArguments& a, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kLanes = Simd<typename RealOf<Input>::type>::kLanes;
  if (!a.channels_inner) {
    for (std::int64_t row = begin; row < end; ++row) positions_of_channel<Input>(a, row);
    return;
  }
  for (std::int64_t sample = begin; sample < end; ++sample) {
    std::int64_t c = 0;
    for (; c + 4 * kLanes <= a.channels; c += 4 * kLanes)
      channels_of_sample<Input, 4>(a, sample, c);
    for (; c + kLanes <= a.channels; c += kLanes) channels_of_sample<Input, 1>(a, sample, c);
    for (; c < a.channels; ++c) channel_of_sample<Input>(a, sample, c, a.channels);
  }
}

void channel_affine(const ChannelAffineArguments& a, std::int64_t begin, std::int64_t end) {
  switch (a.dtype) {
    case DType::float32:
      return channel_affine_of<float>(a, begin, end);
    case DType::float64:
      return channel_affine_of<double>(a, begin, end);
    case DType::bfloat16:
      return channel_affine_of<Bfloat16>(a, begin, end);
    case DType::float16:
      return channel_affine_of<Float16>(a, begin, end);
  }
}

}  // namespace grood_fast::GROOD_FAST_LEVEL
