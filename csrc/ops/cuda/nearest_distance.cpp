// grood_fast::nearest_distance on CUDA tensors.
#if defined(GROOD_FAST_CUDA) || defined(GROOD_FAST_EMULATED)

#include "../products.h"

namespace grood_fast::ops {
namespace {

std::tuple<Tensor, Tensor> nearest_distance(
    const Tensor& queries_in,  // [B, D]
    const Tensor& bank_in,     // [N, D]
    const Tensor& bank_norms,  // [N]: here their dtype alone counts
    double) {
  check_matrix(queries_in, "queries", "(B, D)");
  check_matrix(bank_in, "bank", "(N, D)");
  const int64_t batch = queries_in.size(0), anchors = bank_in.size(0), columns = bank_in.size(1);
  STD_TORCH_CHECK(
      queries_in.size(1) == columns, "queries and bank must have the same number of columns, got ",
      queries_in.size(1), " and ", columns);
  STD_TORCH_CHECK(anchors > 0, "bank must have at least one row");
  STD_TORCH_CHECK(
      bank_norms.dim() == 1 && bank_norms.size(0) == anchors,
      "bank_norms must have the shape (N,)");
  const ScalarType real = bank_norms.scalar_type();
  STD_TORCH_CHECK(
      real == ScalarType::Float || real == ScalarType::Double,
      "bank_norms must be float32 or float64: everything is computed in their precision");
  dtype_of(queries_in, "queries");
  dtype_of(bank_in, "bank");
  const CudaDevice device(bank_norms, {&queries_in, &bank_in});
  // Half precision is read as it is, if both are of one kind.
  const ScalarType given = bank_in.scalar_type();
  const bool as_they_are =
      real == ScalarType::Float && given != ScalarType::Double && queries_in.scalar_type() == given;
  const ScalarType type = as_they_are ? given : real;
  const Tensor queries = unit_column_stride(as_real(queries_in, type));
  const Tensor bank = unit_column_stride(as_real(bank_in, type));
  const auto index_type = std::optional<ScalarType>(ScalarType::Long);
  const Tensor distance = torch::stable::new_empty(bank_norms, {batch});             // [B]
  const Tensor nearest = torch::stable::new_empty(bank_norms, {batch}, index_type);  // [B]
  if (batch == 0) return {distance, nearest};
  cuda::NearestDistanceArguments arguments{
      dtype_of(bank, "bank"),
      queries.const_data_ptr(),
      bank.const_data_ptr(),
      batch,
      anchors,
      columns,
      queries.stride(0),
      bank.stride(0),
      nullptr,
      nullptr,
      distance.mutable_data_ptr(),
      static_cast<int64_t*>(nearest.mutable_data_ptr())};
  const int64_t shares = cuda::nearest_distance_shares(arguments);
  const Tensor squares = torch::stable::new_empty(bank_norms, {shares, batch});
  const Tensor indices = torch::stable::new_empty(bank_norms, {shares, batch}, index_type);
  arguments.squares = squares.mutable_data_ptr();
  arguments.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  device.check(cuda::nearest_distance(arguments, device.stream()), "nearest_distance");
  return {distance, nearest};
}

}  // namespace

#if defined(GROOD_FAST_EMULATED)
STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast_emulated, m) {
  m.def(
      "nearest_distance(Tensor queries, Tensor bank, Tensor bank_norms, float rounding)"
      " -> (Tensor distance, Tensor index)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(GROOD_FAST_LIBRARY, GROOD_FAST_CUDA_KEY, m) {
  m.impl("nearest_distance", TORCH_BOX(&nearest_distance));
}

}  // namespace grood_fast::ops

#endif
