// grood_fast::short_circuit_logits on CUDA tensors.
#if defined(GROOD_FAST_CUDA) || defined(GROOD_FAST_EMULATED)

#include "../products.h"

namespace grood_fast::ops {
namespace {

Tensor short_circuit_logits(
    const Tensor& logits,        // [B, C]
    const Tensor& features,      // [B, D]
    const Tensor& weight_t,      // [D, C]
    const Tensor& removed_in) {  // [B, k]: on the device, so that their range is not checked here
  check_matrix(logits, "logits", "(B, C)");
  check_matrix(features, "features", "(B, D)");
  check_matrix(weight_t, "weight_t", "(D, C)");
  check_matrix(removed_in, "removed", "(B, k)");
  const int64_t batch = logits.size(0), classes = logits.size(1), columns = features.size(1);
  STD_TORCH_CHECK(
      features.size(0) == batch && removed_in.size(0) == batch,
      "logits, features and removed must have the same number of rows, got ", batch, ", ",
      features.size(0), " and ", removed_in.size(0));
  STD_TORCH_CHECK(
      weight_t.size(0) == columns && weight_t.size(1) == classes, "weight_t must have the shape (",
      columns, ", ", classes, "), got (", weight_t.size(0), ", ", weight_t.size(1), ")");
  const ScalarType real = weight_t.scalar_type();
  STD_TORCH_CHECK(
      real == ScalarType::Float || real == ScalarType::Double,
      "weight_t must be float32 or float64: everything is computed in their precision");
  dtype_of(logits, "logits");
  dtype_of(features, "features");
  STD_TORCH_CHECK(removed_in.scalar_type() == ScalarType::Long, "removed must be int64");
  const CudaDevice device(weight_t, {&logits, &features, &removed_in});
  const Tensor removed = torch::stable::contiguous(removed_in);
  const Tensor h = torch::stable::contiguous(as_real(features, real));
  const Tensor w = torch::stable::contiguous(weight_t);
  Tensor result = torch::stable::new_empty(weight_t, {batch, classes});  // [B, C]
  torch::stable::copy_(result, logits);
  if (batch * classes == 0) return result;
  const cuda::ShortCircuitLogitsArguments arguments{
      dtype_of(w, "weight_t"),
      result.mutable_data_ptr(),
      h.const_data_ptr(),
      w.const_data_ptr(),
      static_cast<const int64_t*>(removed.const_data_ptr()),
      batch,
      classes,
      columns,
      removed.size(1)};
  device.check(cuda::short_circuit_logits(arguments, device.stream()), "short_circuit_logits");
  return result;
}

}  // namespace

#if defined(GROOD_FAST_EMULATED)
STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast_emulated, m) {
  m.def(
      "short_circuit_logits(Tensor logits, Tensor features, Tensor weight_t, Tensor removed)"
      " -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(GROOD_FAST_LIBRARY, GROOD_FAST_CUDA_KEY, m) {
  m.impl("short_circuit_logits", TORCH_BOX(&short_circuit_logits));
}

}  // namespace grood_fast::ops

#endif
