// grood_fast::layer_gradient_sqnorm on CUDA tensors.
#if defined(GROOD_FAST_CUDA) || defined(GROOD_FAST_EMULATED)

#include "../products.h"

namespace grood_fast::ops {
namespace {

// Columns side by side, rows and samples any distance apart.
Tensor unit_last_stride(const Tensor& tensor) {
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Tensor layer_gradient_sqnorm(
    const Tensor& activation_in,  // [B, Q, N]
    const Tensor& delta_in,       // [B, R, M]
    std::vector<int64_t> offsets) {
  STD_TORCH_CHECK(
      activation_in.dim() == 3 && delta_in.dim() == 3,
      "activation and delta must have the shapes (B, Q, N) and (B, R, M), got ",
      activation_in.dim(), " and ", delta_in.dim(), " dimensions");
  STD_TORCH_CHECK(
      activation_in.size(0) == delta_in.size(0),
      "activation and delta must have as many samples, got ", activation_in.size(0), " and ",
      delta_in.size(0));
  STD_TORCH_CHECK(!offsets.empty(), "at least one offset is needed");
  for (const int64_t offset : offsets)
    STD_TORCH_CHECK(
        offset >= 0 && offset + delta_in.size(1) <= activation_in.size(1), "the offset ", offset,
        " takes ", delta_in.size(1), " positions beyond the activation's ", activation_in.size(1));
  const ScalarType real = real_of(dtype_of(activation_in, "activation"));
  STD_TORCH_CHECK(
      real == real_of(dtype_of(delta_in, "delta")),
      "activation and delta must both be float64 or neither");
  const CudaDevice device(delta_in, {&activation_in});
  const Tensor result = torch::stable::new_zeros(
      delta_in, {delta_in.size(0)}, std::optional<ScalarType>(real));  // [B]
  if (delta_in.numel() == 0 || activation_in.numel() == 0) return result;
  const Tensor activation = unit_last_stride(as_real(activation_in, real));
  const Tensor delta = unit_last_stride(as_real(delta_in, real));
  cuda::LayerGradientSqnormArguments arguments{
      dtype_of(delta, "delta"),
      activation.const_data_ptr(),
      delta.const_data_ptr(),
      delta.size(0),
      delta.size(1),
      activation.size(2),
      delta.size(2),
      activation.stride(0),
      activation.stride(1),
      delta.stride(0),
      delta.stride(1),
      offsets.data(),
      static_cast<int64_t>(offsets.size()),
      nullptr,
      result.mutable_data_ptr()};
  const Tensor parts = torch::stable::new_empty(
      delta, {delta.size(0), cuda::layer_gradient_sqnorm_parts(arguments)},
      std::optional<ScalarType>(ScalarType::Double));
  arguments.parts = static_cast<double*>(parts.mutable_data_ptr());
  device.check(cuda::layer_gradient_sqnorm(arguments, device.stream()), "layer_gradient_sqnorm");
  return result;
}

}  // namespace

#if defined(GROOD_FAST_EMULATED)
STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast_emulated, m) {
  m.def("layer_gradient_sqnorm(Tensor activation, Tensor delta, int[] offsets) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(GROOD_FAST_LIBRARY, GROOD_FAST_CUDA_KEY, m) {
  m.impl("layer_gradient_sqnorm", TORCH_BOX(&layer_gradient_sqnorm));
}

}  // namespace grood_fast::ops

#endif
