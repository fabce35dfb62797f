// grood_fast::channel_affine_backward on CUDA tensors.
#if defined(GROOD_FAST_CUDA) || defined(GROOD_FAST_EMULATED)

#include "../products.h"

namespace grood_fast::ops {
namespace {

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
  const CudaDevice device(delta, {&input, scale.has_value() ? &*scale : nullptr});
  const bool inner = delta.dim() > 2 && is_channels_inner(delta) && is_channels_inner(input);
  const Tensor d = inner ? delta : torch::stable::contiguous(delta);
  const Tensor x = inner ? input : torch::stable::contiguous(input);
  const auto real = std::optional<ScalarType>(real_of(dtype));
  const Tensor products = torch::stable::new_empty(delta, {batch, channels}, real);
  const Tensor sums = torch::stable::new_empty(delta, {batch, channels}, real);
  const Tensor onward =
      scale.has_value() ? torch::stable::empty_like(d) : torch::stable::new_empty(delta, {0});
  if (batch * channels == 0) return {onward, products, sums};
  const cuda::ChannelAffineBackwardArguments arguments{
      dtype,
      d.const_data_ptr(),
      x.const_data_ptr(),
      inner,
      batch,
      channels,
      delta.numel() / (batch * channels),
      scale.has_value() ? scale->const_data_ptr() : nullptr,
      scale.has_value() ? onward.mutable_data_ptr() : nullptr,
      products.mutable_data_ptr(),
      sums.mutable_data_ptr()};
  device.check(
      cuda::channel_affine_backward(arguments, device.stream()), "channel_affine_backward");
  return {onward, products, sums};
}

}  // namespace

#if defined(GROOD_FAST_EMULATED)
STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast_emulated, m) {
  m.def(
      "channel_affine_backward(Tensor delta, Tensor input, Tensor? scale)"
      " -> (Tensor, Tensor, Tensor)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(GROOD_FAST_LIBRARY, GROOD_FAST_CUDA_KEY, m) {
  m.impl("channel_affine_backward", TORCH_BOX(&channel_affine_backward));
}

}  // namespace grood_fast::ops

#endif
