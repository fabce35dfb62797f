#include "kernels.h"
#include "prototype_gradient.cuh"

namespace grood_fast::cuda {
namespace {

template <typename Input, typename Real>
const char* run(const PrototypeGradientArguments& a, Stream stream) {
  const std::int64_t count = a.rows * a.columns;
  const PrototypeGradient arguments{
      {a.features, a.rows, a.columns, a.features_stride, false},
      {a.gradient, a.rows, a.columns, a.columns, rows_aligned<Real>(a.gradient, a.columns)},
      {a.offsets, a.classes, a.columns, a.offsets_stride,
       rows_aligned<Real>(a.offsets, a.offsets_stride)},
      a.point,
      a.squares,
      a.temperature,
      a.scale,
      a.squared,
      a.log_weight};
  const char* error = nullptr;
  if (count > 0)
    error = launch(
        subtract_point_kernel<Input, Real>, dim3{static_cast<unsigned>((count + 255) / 256), 1, 1},
        256, 0, stream, arguments);
  constexpr int kTile = Differences<Real>::kTile;
  if (error == nullptr && a.classes > 0)
    error = launch(
        prototype_distance_kernel<Real>,
        dim3{
            static_cast<unsigned>((a.rows + kTile - 1) / kTile),
            static_cast<unsigned>((a.classes + kTile - 1) / kTile), 1},
        Differences<Real>::kThreads, 0, stream, arguments);
  if (error != nullptr) return error;
  return launch_rows<Group<kWarpThreads>>(
      prototype_weight_kernel<Real>, arguments, a.rows, false, stream);
}

}  // namespace

const char* prototype_gradient(const PrototypeGradientArguments& a, StreamPointer stream_pointer) {
  const auto stream = static_cast<Stream>(stream_pointer);
  return with_input_type(a.dtype, [&](auto input) {
    using Input = decltype(input);
    return a.real == DType::float64 ? run<Input, double>(a, stream) : run<Input, float>(a, stream);
  });
}

}  // namespace grood_fast::cuda
