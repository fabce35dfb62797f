#include "layer_gradient_sqnorm.cuh"

namespace grood_fast::cuda {
namespace {

struct Plan {
  bool form;
  std::int64_t parts_of_launch(std::int64_t offsets) const { return form ? offsets * each : each; }
  std::int64_t each, launches, parts;
};

Plan plan_for(const LayerGradientSqnormArguments& a) {
  const auto tiles = [](std::int64_t size) { return (size + 63) / 64; };
  const double r = static_cast<double>(a.positions), m = static_cast<double>(a.outputs);
  const double n = static_cast<double>(a.inputs), j = static_cast<double>(a.offset_count);
  const bool form = j * m * n * r <= r * r * (m + j * n) / 2;  // of pairs, one half is enough
  const std::int64_t each =
      form ? tiles(a.outputs) * tiles(a.inputs) : tiles(a.positions) * tiles(a.positions);
  const std::int64_t launches = (a.offset_count + kOffsetsAtOnce - 1) / kOffsetsAtOnce;
  return {form, each, launches, each * (form ? a.offset_count : launches)};
}

template <typename Real>
const char* run(const LayerGradientSqnormArguments& a, Stream stream) {
  const Plan plan = plan_for(a);
  const auto aligned = [](const void* values, std::int64_t sample_stride, std::int64_t stride) {
    return rows_aligned<Real>(values, stride) && rows_aligned<Real>(values, sample_stride);
  };
  LayerGradientSqnorm s{
      a,
      aligned(a.activation, a.activation_sample_stride, a.activation_stride),
      aligned(a.delta, a.delta_sample_stride, a.delta_stride),
      plan.parts,
      0,
      0,
      {}};
  for (std::int64_t first = 0; first < a.offset_count; first += kOffsetsAtOnce) {
    const std::int64_t left = a.offset_count - first;
    s.offset_count = static_cast<int>(left < kOffsetsAtOnce ? left : kOffsetsAtOnce);
    for (int j = 0; j < s.offset_count; ++j) s.offsets[j] = a.offsets[first + j];
    const std::int64_t parts = plan.parts_of_launch(s.offset_count);
    constexpr std::int64_t kMostSamples = 65535;  // blocks in a grid's second direction
    if (a.samples > kMostSamples) return "more than 65535 samples at once";
    const char* error = launch(
        plan.form ? form_gradient_kernel<Real> : pair_positions_kernel<Real>,
        dim3{static_cast<unsigned>(parts), static_cast<unsigned>(a.samples), 1}, 128, 0, stream, s);
    if (error != nullptr) return error;
    s.first_part += parts;
  }
  return launch(
      add_parts_kernel<Real>, dim3{static_cast<unsigned>(a.samples), 1, 1}, 128, 0, stream,
      static_cast<const double*>(a.parts), plan.parts, static_cast<Real*>(a.result));
}

}  // namespace

std::int64_t layer_gradient_sqnorm_parts(const LayerGradientSqnormArguments& a) {
  return plan_for(a).parts;
}

const char* layer_gradient_sqnorm(
    const LayerGradientSqnormArguments& a, StreamPointer stream_pointer) {
  const auto stream = static_cast<Stream>(stream_pointer);
  return a.dtype == DType::float64 ? run<double>(a, stream) : run<float>(a, stream);
}

}  // namespace grood_fast::cuda
