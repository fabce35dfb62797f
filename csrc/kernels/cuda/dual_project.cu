#include "dual_project.cuh"
#include "kernels.h"

namespace grood_fast::cuda {
namespace {

struct Plan {
  std::int64_t row_tiles, tiles_per_share, shares;
};

// As many blocks as the device runs at once, if there are as many tiles.
template <typename Operand>
Plan plan_for(const DualProjectArguments& a) {
  using Shape = DualProjectShape<Operand>;
  const std::int64_t row_tiles = (a.rows + Shape::kRows - 1) / Shape::kRows;
  const std::int64_t tiles = (a.anchors + Shape::kAnchors - 1) / Shape::kAnchors;
  const std::int64_t wanted = (2 * multiprocessors() + row_tiles - 1) / row_tiles;
  const std::int64_t per_share = (tiles + wanted - 1) / wanted;
  return {row_tiles, per_share, (tiles + per_share - 1) / per_share};
}

template <typename Element>
MatrixArgument matrix(
    const void* values, std::int64_t rows, std::int64_t columns, std::int64_t row_stride) {
  return {values, rows, columns, row_stride, rows_aligned<Element>(values, row_stride)};
}

template <typename Operand>
const char* run(const DualProjectArguments& a, Stream stream) {
  using Shape = DualProjectShape<Operand>;
  using Real = typename Shape::Real;
  const Plan plan = plan_for<Operand>(a);
  const DualProject arguments{
      matrix<Operand>(a.delta, a.rows, a.classes, a.delta_stride),
      matrix<Operand>(a.features, a.rows, a.columns, a.features_stride),
      matrix<Operand>(a.anchor_delta, a.anchors, a.classes, a.anchor_delta_stride),
      matrix<Operand>(a.anchor_features, a.anchors, a.columns, a.anchor_features_stride),
      matrix<Real>(a.coefficients, a.anchors, a.components, a.coefficients_stride),
      a.bias,
      plan.tiles_per_share,
      plan.shares > 1 ? a.parts : a.result};
  const dim3 blocks{static_cast<unsigned>(plan.row_tiles), static_cast<unsigned>(plan.shares), 1};
  const char* error =
      launch(dual_project_kernel<Operand>, blocks, Shape::kThreads, 0, stream, arguments);
  if (error != nullptr || plan.shares == 1) return error;
  const std::int64_t count = a.rows * a.components;
  return launch(
      add_shares_kernel<Real>, dim3{static_cast<unsigned>((count + 255) / 256), 1, 1}, 256, 0,
      stream, static_cast<const Real*>(a.parts), plan.shares, count, static_cast<Real*>(a.result));
}

}  // namespace

std::int64_t dual_project_parts(const DualProjectArguments& a) {
  std::int64_t shares = 1;
  with_input_type(a.dtype, [&](auto operand) -> const char* {
    shares = plan_for<decltype(operand)>(a).shares;
    return nullptr;
  });
  return shares > 1 ? shares : 0;
}

const char* dual_project(const DualProjectArguments& a, StreamPointer stream_pointer) {
  const auto stream = static_cast<Stream>(stream_pointer);
  return with_input_type(a.dtype, [&](auto operand) { return run<decltype(operand)>(a, stream); });
}

}  // namespace grood_fast::cuda
