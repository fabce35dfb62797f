// grood_fast::head_gradient_norm: the norm of the last layer's gradient delta [h; 1]^T, which as a
// rank-one matrix has the norm of delta times the norm of [h; 1]; delta is never written.
#include "common.h"

namespace grood_fast::ops {
namespace {

[[maybe_unused]] void on_cpu(
    const LogitGradientArguments& logit_gradient, const RowNormArguments& row_norm,
    const Tensor& logits, const Tensor&, const Tensor*) {
  const int64_t grain = rows_per_task(logit_gradient.classes, row_norm.columns);
  torch::stable::parallel_for(0, logits.size(0), grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(logit_gradient_scratch_bytes(logit_gradient.classes));
    LogitGradientArguments mine = logit_gradient;
    mine.scratch = scratch.get();
    grood_fast::logit_gradient(mine, begin, end);
    multiply_row_norm(row_norm, begin, end);
  });
}

[[maybe_unused]] void on_cuda(
    const LogitGradientArguments& logit_gradient, const RowNormArguments& row_norm,
    const Tensor& logits, const Tensor& features, const Tensor* target) {
  const CudaDevice device(logits, {&features, target});
  const int64_t rows = logits.size(0);
  device.check(cuda::logit_gradient(logit_gradient, rows, device.stream()), "head_gradient_norm");
  device.check(cuda::multiply_row_norm(row_norm, rows, device.stream()), "head_gradient_norm");
}

template <auto kRun>
Tensor head_gradient_norm(
    const Tensor& logits_in,    // [B, C]
    const Tensor& features_in,  // [B, D]
    int64_t objective, double temperature,
    const std::optional<Tensor>& target,  // [C]
    int64_t norm, bool bias) {
  check_matrix(logits_in, "logits", "(B, C)");
  check_matrix(features_in, "features", "(B, D)");
  STD_TORCH_CHECK(
      logits_in.size(0) == features_in.size(0),
      "logits and features must have the same number of rows, got ", logits_in.size(0), " and ",
      features_in.size(0));
  const Tensor logits = unit_column_stride(logits_in);
  const Tensor features = unit_column_stride(features_in);
  LogitGradientArguments arguments = logit_arguments(logits, objective, temperature, target);
  const DType features_dtype = dtype_of(features, "features");

  const DType factor = arguments.dtype == DType::float64 ? DType::float64 : DType::float32;
  STD_TORCH_CHECK(
      (features_dtype == DType::float64) == (factor == DType::float64),
      "logits and features must both be float64, or neither");

  const Tensor result = torch::stable::new_empty(
      logits, {logits.size(0)}, std::optional<ScalarType>(real_of(factor)));  // [B]
  arguments.norm[static_cast<int>(norm_of(norm))] = result.mutable_data_ptr();
  const RowNormArguments row_norm{
      features.const_data_ptr(),
      features_dtype,
      features.size(1),
      features.stride(0),
      norm_of(norm),
      bias,
      factor,
      result.mutable_data_ptr()};

  kRun(arguments, row_norm, logits, features, target.has_value() ? &*target : nullptr);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(GROOD_FAST_LIBRARY, m) {
  m.def(
      "head_gradient_norm(Tensor logits, Tensor features, int objective, float temperature,"
      " Tensor? target, int norm, bool bias) -> Tensor");
}

GROOD_FAST_IMPLEMENT(
    "head_gradient_norm", &head_gradient_norm<on_cpu>, &head_gradient_norm<on_cuda>)

}  // namespace grood_fast::ops
