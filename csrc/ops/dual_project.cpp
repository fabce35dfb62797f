// grood_fast::dual_project: coordinates of rank-one gradients in a subspace that is spanned by
// others, z = ((D Da^T) o (H Ha^T + bias)) A, tile by tile: no B x N array is ever whole.
#include <algorithm>
#include <array>

#include "common.h"

namespace grood_fast::ops {
namespace {

// Anchors a tile: enough for the products to run at full speed.
constexpr int64_t kTileAnchors = 1024;
// Elements of one tile, of which two exist: together they stay in a processor's second cache.
constexpr int64_t kTileElements = 1 << 18;
// Elements a thread should at least get of a tile's element-wise product.
constexpr int64_t kGrain = 1 << 15;

// out = a b
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(b),
      torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference that was returned
}

Tensor as_real(const Tensor& matrix, ScalarType real) {
  return matrix.scalar_type() == real ? matrix : torch::stable::to(matrix, real);
}

Tensor rows(const Tensor& matrix, int64_t start, int64_t count) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 0, start, count);
}

template <typename Real>
void add(const Tensor& total, int64_t row, const Tensor& part) {
  Real* to = static_cast<Real*>(total.mutable_data_ptr()) + row * total.size(1);
  const Real* from = static_cast<const Real*>(part.const_data_ptr());
  for (int64_t i = 0; i < part.numel(); ++i) to[i] += from[i];
}

Tensor dual_project(
    const Tensor& delta,            // [B, C]
    const Tensor& features,         // [B, D]
    const Tensor& anchor_delta,     // [N, C]
    const Tensor& anchor_features,  // [N, D]
    const Tensor& coefficients,     // [N, K]
    double bias) {
  check_matrix(delta, "delta", "(B, C)");
  check_matrix(features, "features", "(B, D)");
  check_matrix(anchor_delta, "anchor_delta", "(N, C)");
  check_matrix(anchor_features, "anchor_features", "(N, D)");
  check_matrix(coefficients, "coefficients", "(N, K)");
  const int64_t batch = delta.size(0), anchors = anchor_delta.size(0);
  const int64_t components = coefficients.size(1);
  STD_TORCH_CHECK(
      features.size(0) == batch, "delta and features must have the same number of rows, got ",
      batch, " and ", features.size(0));
  STD_TORCH_CHECK(
      anchor_features.size(0) == anchors && coefficients.size(0) == anchors,
      "anchor_delta, anchor_features and coefficients must have the same number of rows, got ",
      anchors, ", ", anchor_features.size(0), " and ", coefficients.size(0));
  STD_TORCH_CHECK(
      delta.size(1) == anchor_delta.size(1) && features.size(1) == anchor_features.size(1),
      "anchors must have as many columns as delta and features: ", delta.size(1), " and ",
      features.size(1), ", got ", anchor_delta.size(1), " and ", anchor_features.size(1));
  const DType dtype = dtype_of(coefficients, "coefficients");
  const ScalarType real = coefficients.scalar_type();
  STD_TORCH_CHECK(
      real == ScalarType::Float || real == ScalarType::Double,
      "coefficients must be float32 or float64: the products are accumulated in their precision");
  for (const Tensor* operand : {&delta, &features, &anchor_delta, &anchor_features})
    dtype_of(*operand, "delta, features and their anchors");

  Tensor result = torch::stable::new_zeros(coefficients, {batch, components});  // [B, K]
  if (result.numel() == 0 || anchors == 0) return result;
  const int64_t tile_anchors = std::min(anchors, kTileAnchors);
  const int64_t tile_rows = std::min(batch, std::max<int64_t>(1, kTileElements / tile_anchors));
  const Tensor left = torch::stable::new_empty(coefficients, {tile_rows * tile_anchors});
  const Tensor right = torch::stable::new_empty(coefficients, {tile_rows * tile_anchors});
  const Tensor part = torch::stable::new_empty(coefficients, {tile_rows * components});
  for (int64_t row = 0; row < batch; row += tile_rows) {
    const int64_t height = std::min(tile_rows, batch - row);
    const Tensor d = as_real(rows(delta, row, height), real);
    const Tensor h = as_real(rows(features, row, height), real);
    const Tensor z = torch::stable::view(rows(part, 0, height * components), {height, components});
    for (int64_t anchor = 0; anchor < anchors; anchor += tile_anchors) {
      const int64_t width = std::min(tile_anchors, anchors - anchor);
      const Tensor da = as_real(rows(anchor_delta, anchor, width), real);
      const Tensor ha = as_real(rows(anchor_features, anchor, width), real);
      const Tensor s = torch::stable::view(rows(left, 0, height * width), {height, width});
      const Tensor r = torch::stable::view(rows(right, 0, height * width), {height, width});
      multiply(d, torch::stable::transpose(da, 0, 1), s);
      multiply(h, torch::stable::transpose(ha, 0, 1), r);
      const HadamardArguments meet{s.mutable_data_ptr(), r.const_data_ptr(), bias, dtype};
      torch::stable::parallel_for(0, height * width, kGrain, [&](int64_t begin, int64_t end) {
        hadamard(meet, begin, end);
      });
      multiply(s, rows(coefficients, anchor, width), z);
      if (dtype == DType::float64)
        add<double>(result, row, z);
      else
        add<float>(result, row, z);
    }
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast, m) {
  m.def(
      "dual_project(Tensor delta, Tensor features, Tensor anchor_delta, Tensor anchor_features,"
      " Tensor coefficients, float bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(grood_fast, CPU, m) { m.impl("dual_project", TORCH_BOX(&dual_project)); }

}  // namespace grood_fast::ops
