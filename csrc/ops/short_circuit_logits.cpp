// grood_fast::short_circuit_logits: the logits of a linear head without some of each row's
// features.
#include <algorithm>

#include "products.h"

namespace grood_fast::ops {
namespace {

Tensor short_circuit_logits(
    const Tensor& logits,        // [B, C]
    const Tensor& features,      // [B, D]
    const Tensor& weight_t,      // [D, C]
    const Tensor& removed_in) {  // [B, k]
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
  const DType dtype = real_dtype_of(weight_t, "weight_t");
  const ScalarType real = weight_t.scalar_type();
  dtype_of(logits, "logits");
  dtype_of(features, "features");
  STD_TORCH_CHECK(removed_in.scalar_type() == ScalarType::Long, "removed must be int64");
  const Tensor removed = torch::stable::contiguous(removed_in);
  const int64_t* index = static_cast<const int64_t*>(removed.const_data_ptr());
  STD_TORCH_CHECK(
      std::all_of(index, index + removed.numel(), [&](int64_t i) { return i >= 0 && i < columns; }),
      "removed must hold columns of the features, from 0 to ", columns - 1);

  const Tensor result = torch::stable::new_empty(weight_t, {batch, classes});  // [B, C]
  Tensor to = result;
  torch::stable::copy_(to, logits);
  const Tensor h = torch::stable::contiguous(as_real(features, real));
  const Tensor w = torch::stable::contiguous(weight_t);
  const ShortCircuitArguments arguments{
      result.mutable_data_ptr(),
      h.const_data_ptr(),
      w.const_data_ptr(),
      index,
      dtype,
      classes,
      columns,
      removed.size(1)};
  torch::stable::parallel_for(
      0, batch, rows_per_task(0, classes * removed.size(1)),
      [&](int64_t begin, int64_t end) { short_circuit(arguments, begin, end); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast, m) {
  m.def(
      "short_circuit_logits(Tensor logits, Tensor features, Tensor weight_t, Tensor removed)"
      " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(grood_fast, CPU, m) {
  m.impl("short_circuit_logits", TORCH_BOX(&short_circuit_logits));
}

}  // namespace grood_fast::ops
