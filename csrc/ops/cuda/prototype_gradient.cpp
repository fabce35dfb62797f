// grood_fast::prototype_gradient on CUDA tensors.
#if defined(GROOD_FAST_CUDA) || defined(GROOD_FAST_EMULATED)

#include "../products.h"

namespace grood_fast::ops {
namespace {

std::tuple<Tensor, Tensor> prototype_gradient(
    const Tensor& features_in,    // [B, D]
    const Tensor& ood_prototype,  // [D]
    const Tensor& offsets_in,     // [C, D]
    const Tensor& offset_norms,   // [C]: distances are computed from differences, without them
    double temperature, bool squared, double scale) {
  check_matrix(features_in, "features", "(B, D)");
  check_matrix(offsets_in, "offsets", "(C, D)");
  const int64_t batch = features_in.size(0), columns = features_in.size(1);
  const int64_t classes = offsets_in.size(0);
  STD_TORCH_CHECK(
      offsets_in.size(1) == columns && ood_prototype.dim() == 1 && ood_prototype.size(0) == columns,
      "features, offsets and ood_prototype must have the same number of columns, got ", columns,
      ", ", offsets_in.size(1), " and ", ood_prototype.numel());
  STD_TORCH_CHECK(
      offset_norms.dim() == 1 && offset_norms.size(0) == classes,
      "offset_norms must have the shape (C,)");
  STD_TORCH_CHECK(temperature > 0, "temperature must be positive, got ", temperature);
  const ScalarType real = offsets_in.scalar_type();
  STD_TORCH_CHECK(
      real == ScalarType::Float || real == ScalarType::Double,
      "offsets must be float32 or float64: everything is computed in their precision");
  STD_TORCH_CHECK(
      ood_prototype.scalar_type() == real && offset_norms.scalar_type() == real,
      "ood_prototype and offset_norms must have the dtype of the offsets");
  const CudaDevice device(offsets_in, {&features_in, &ood_prototype, &offset_norms});
  const Tensor features = unit_column_stride(features_in);
  const Tensor point = torch::stable::contiguous(ood_prototype);
  const Tensor offsets = unit_column_stride(offsets_in);
  const Tensor gradient = torch::stable::new_empty(offsets, {batch, columns});  // [B, D]
  const Tensor log_weight = torch::stable::new_empty(offsets, {batch});         // [B]
  const Tensor squares = torch::stable::new_empty(offsets, {batch, classes});
  if (batch == 0) return {gradient, log_weight};
  const cuda::PrototypeGradientArguments arguments{
      dtype_of(features, "features"),
      dtype_of(offsets, "offsets"),
      features.const_data_ptr(),
      point.const_data_ptr(),
      offsets.const_data_ptr(),
      batch,
      columns,
      classes,
      features.stride(0),
      offsets.stride(0),
      temperature,
      scale,
      squared,
      squares.mutable_data_ptr(),
      gradient.mutable_data_ptr(),
      log_weight.mutable_data_ptr()};
  device.check(cuda::prototype_gradient(arguments, device.stream()), "prototype_gradient");
  return {gradient, log_weight};
}

}  // namespace

#if defined(GROOD_FAST_EMULATED)
STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast_emulated, m) {
  m.def(
      "prototype_gradient(Tensor features, Tensor ood_prototype, Tensor offsets,"
      " Tensor offset_norms, float temperature, bool squared, float scale)"
      " -> (Tensor gradient, Tensor log_weight)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(GROOD_FAST_LIBRARY, GROOD_FAST_CUDA_KEY, m) {
  m.impl("prototype_gradient", TORCH_BOX(&prototype_gradient));
}

}  // namespace grood_fast::ops

#endif
