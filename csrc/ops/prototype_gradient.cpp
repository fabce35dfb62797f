// grood_fast::prototype_gradient: the gradient with respect to the OOD prototype of cross-entropy
// over negative distances to the class prototypes and to it, and the logarithm of its weight.
#include <algorithm>

#include "products.h"

namespace grood_fast::ops {
namespace {

// Products at once: they stay in a processor's second cache until they are distances.
constexpr int64_t kTileElements = 1 << 18;
// Classes are padded to vectors of the widest kind.
constexpr int64_t kLanes = 16;
// What a row costs beside its elements, in exponentials.
constexpr int64_t kRowCost = 64;

std::tuple<Tensor, Tensor> prototype_gradient(
    const Tensor& features_in,    // [B, D]
    const Tensor& ood_prototype,  // [D]
    const Tensor& offsets,        // [C, D]
    const Tensor& offset_norms,   // [C]
    double temperature, bool squared, double scale) {
  check_matrix(features_in, "features", "(B, D)");
  check_matrix(offsets, "offsets", "(C, D)");
  const int64_t batch = features_in.size(0), columns = features_in.size(1);
  const int64_t classes = offsets.size(0);
  STD_TORCH_CHECK(
      offsets.size(1) == columns && ood_prototype.dim() == 1 && ood_prototype.size(0) == columns,
      "features, offsets and ood_prototype must have the same number of columns, got ", columns,
      ", ", offsets.size(1), " and ", ood_prototype.numel());
  STD_TORCH_CHECK(
      offset_norms.dim() == 1 && offset_norms.size(0) == classes,
      "offset_norms must have the shape (C,)");
  STD_TORCH_CHECK(temperature > 0, "temperature must be positive, got ", temperature);
  const DType dtype = real_dtype_of(offsets, "offsets");
  const ScalarType real = offsets.scalar_type();
  STD_TORCH_CHECK(
      ood_prototype.scalar_type() == real && offset_norms.scalar_type() == real,
      "ood_prototype and offset_norms must have the dtype of the offsets");
  const Tensor features = unit_column_stride(features_in);
  const Tensor point = torch::stable::contiguous(ood_prototype);
  const Tensor others = torch::stable::contiguous(offsets);

  const Tensor gradient = torch::stable::new_empty(others, {batch, columns});  // [B, D]
  const Tensor log_weight = torch::stable::new_empty(others, {batch});         // [B]
  const Tensor norm = torch::stable::new_empty(others, {batch});               // [B]
  const int64_t padded = std::max<int64_t>(1, (classes + kLanes - 1) / kLanes) * kLanes;
  Tensor lengths = torch::stable::new_zeros(others, {padded});  // [C] and padding
  Tensor known = rows(lengths, 0, classes);
  torch::stable::copy_(known, offset_norms);
  const int64_t tile = std::min(batch, std::max<int64_t>(1, kTileElements / padded));
  const Tensor products = torch::stable::new_empty(others, {tile, padded});
  const SubtractArguments difference{
      features.const_data_ptr(),   dtype_of(features, "features"), columns,
      features.stride(0),          point.const_data_ptr(),         dtype,
      gradient.mutable_data_ptr(), norm.mutable_data_ptr()};
  torch::stable::parallel_for(
      0, batch, rows_per_task(kRowCost / 4, columns),
      [&](int64_t begin, int64_t end) { subtract(difference, begin, end); });

  const int64_t size = static_cast<int64_t>(gradient.element_size());
  for (int64_t row = 0; row < batch; row += tile) {
    const int64_t height = std::min(tile, batch - row);
    const Tensor x = rows(gradient, row, height);
    Tensor whole = rows(products, 0, height);
    const Tensor p = torch::stable::narrow(whole, 1, 0, classes);
    multiply(x, torch::stable::transpose(others, 0, 1), p);
    const PrototypeGradientArguments arguments{
        x.mutable_data_ptr(),
        static_cast<const char*>(norm.const_data_ptr()) + row * size,
        others.const_data_ptr(),
        lengths.const_data_ptr(),
        p.mutable_data_ptr(),
        padded,
        dtype,
        columns,
        classes,
        temperature,
        scale,
        squared,
        static_cast<char*>(log_weight.mutable_data_ptr()) + row * size};
    torch::stable::parallel_for(
        0, height, rows_per_task(classes + kRowCost, columns),
        [&](int64_t begin, int64_t end) { grood_fast::prototype_gradient(arguments, begin, end); });
  }
  return {gradient, log_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast, m) {
  m.def(
      "prototype_gradient(Tensor features, Tensor ood_prototype, Tensor offsets,"
      " Tensor offset_norms, float temperature, bool squared, float scale)"
      " -> (Tensor gradient, Tensor log_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(grood_fast, CPU, m) {
  m.impl("prototype_gradient", TORCH_BOX(&prototype_gradient));
}

}  // namespace grood_fast::ops
