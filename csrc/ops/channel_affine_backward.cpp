// grood_fast::channel_affine_backward: of y = scale x + shift, a scale and a shift a channel, the
// gradient of x and, for every sample, those of the scale and the shift, from one read of delta.
#include <algorithm>
#include <vector>

#include "common.h"

namespace grood_fast::ops {
namespace {

// Elements a thread should at least get.
constexpr int64_t kGrain = 1 << 15;

// Whether the memory holds [samples, positions, channels] without gaps.
bool is_channels_inner(const Tensor& maps) {
  int64_t expected = maps.size(1);
  if (maps.size(1) > 1 && maps.stride(1) != 1) return false;
  for (int64_t d = maps.dim() - 1; d >= 2; --d) {
    if (maps.size(d) > 1 && maps.stride(d) != expected) return false;
    expected *= maps.size(d);
  }
  return maps.size(0) <= 1 || maps.stride(0) == expected;
}

std::tuple<Tensor, Tensor, Tensor> channel_affine_backward(
    const Tensor& delta,                   // [B, C, ...]
    const Tensor& input,                   // [B, C, ...]
    const std::optional<Tensor>& scale) {  // [C]
  STD_TORCH_CHECK(delta.dim() >= 2, "delta must have the shape (B, C, ...)");
  bool same = input.dim() == delta.dim();
  for (int64_t d = 0; same && d < delta.dim(); ++d) same = input.size(d) == delta.size(d);
  STD_TORCH_CHECK(same, "delta and input must have the same shape");
  const DType dtype = dtype_of(delta, "delta");
  STD_TORCH_CHECK(dtype_of(input, "input") == dtype, "delta and input must have the same dtype");
  const bool whole = dtype == DType::float32 || dtype == DType::float64;
  const int64_t batch = delta.size(0), channels = delta.size(1);
  if (scale.has_value()) {
    STD_TORCH_CHECK(whole, "with a scale, delta must be float32 or float64");
    STD_TORCH_CHECK(
        scale->dim() == 1 && scale->size(0) == channels && scale->is_contiguous() &&
            scale->scalar_type() == delta.scalar_type(),
        "scale must be contiguous, of shape (C,) and of delta's dtype");
  }
  const bool inner = delta.dim() > 2 && is_channels_inner(delta) && is_channels_inner(input);
  const Tensor d = inner ? delta : torch::stable::contiguous(delta);
  const Tensor x = inner ? input : torch::stable::contiguous(input);
  const Tensor products = torch::stable::new_empty(delta, {batch, channels}, real_of(dtype));
  const Tensor sums = torch::stable::new_empty(delta, {batch, channels}, real_of(dtype));
  const Tensor onward =
      scale.has_value() ? torch::stable::empty_like(d) : torch::stable::new_empty(delta, {0});
  if (batch * channels == 0) return {onward, products, sums};

  ChannelAffineArguments arguments{};
  arguments.delta = d.const_data_ptr();
  arguments.input = x.const_data_ptr();
  arguments.dtype = dtype;
  arguments.channels_inner = inner;
  arguments.channels = channels;
  arguments.positions = delta.numel() / (batch * channels);
  arguments.scale = scale.has_value() ? scale->const_data_ptr() : nullptr;
  arguments.onward = scale.has_value() ? onward.mutable_data_ptr() : nullptr;
  arguments.products = products.mutable_data_ptr();
  arguments.sums = sums.mutable_data_ptr();
  const int64_t rows = inner ? batch : batch * channels;
  const int64_t grain = std::max<int64_t>(1, kGrain * rows / std::max<int64_t>(1, delta.numel()));
  torch::stable::parallel_for(
      0, rows, grain, [&](int64_t begin, int64_t end) { channel_affine(arguments, begin, end); });
  return {onward, products, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast, m) {
  m.def(
      "channel_affine_backward(Tensor delta, Tensor input, Tensor? scale)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grood_fast, CPU, m) {
  m.impl("channel_affine_backward", TORCH_BOX(&channel_affine_backward));
}

}  // namespace grood_fast::ops
