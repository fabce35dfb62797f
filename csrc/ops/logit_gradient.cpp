// grood_fast::logit_gradient: energy, maximum, norms and delta = d objective / d logits in one read
#include "common.h"

namespace grood_fast::ops {
namespace {

// Bits of `outputs`, in the order of the rows of `statistics`; see grood_fast/ops/__init__.py.
enum Output : int64_t {
  kEnergy = 1,
  kLogSumExp = 2,
  kMaximum = 4,
  kFirstNorm = 8,
  kArgmax = 64,
  kDelta = 128
};
constexpr int64_t kStatistics = 6;

[[maybe_unused]] void on_cpu(
    const LogitGradientArguments& arguments, const Tensor& logits, const Tensor*) {
  torch::stable::parallel_for(
      0, logits.size(0), rows_per_task(arguments.classes, 0), [&](int64_t begin, int64_t end) {
        const Scratch scratch(logit_gradient_scratch_bytes(arguments.classes));
        LogitGradientArguments mine = arguments;
        mine.scratch = scratch.get();
        grood_fast::logit_gradient(mine, begin, end);
      });
}

[[maybe_unused]] void on_cuda(
    const LogitGradientArguments& arguments, const Tensor& logits, const Tensor* target) {
  const CudaDevice device(logits, {target});
  device.check(cuda::logit_gradient(arguments, logits.size(0), device.stream()), "logit_gradient");
}

template <auto kRun>
std::tuple<Tensor, Tensor, Tensor> logit_gradient(
    const Tensor& logits_in,  // [B, C]
    int64_t objective, double temperature,
    const std::optional<Tensor>& target,  // [C]
    int64_t outputs) {
  check_matrix(logits_in, "logits", "(B, C)");
  const Tensor logits = unit_column_stride(logits_in);
  LogitGradientArguments arguments = logit_arguments(logits, objective, temperature, target);
  const int64_t batch = logits.size(0);
  const auto real = std::optional<ScalarType>(real_of(arguments.dtype));

  int64_t requested = 0;
  for (int64_t bit = 0; bit < kStatistics; ++bit) requested += outputs >> bit & 1;
  const Tensor statistics = torch::stable::new_empty(logits, {requested, batch}, real);  // [k, B]
  const Tensor argmax = torch::stable::new_empty(
      logits, {outputs & kArgmax ? batch : 0}, std::optional<ScalarType>(ScalarType::Long));  // [B]
  const Tensor delta = outputs & kDelta
                           ? torch::stable::new_empty(logits, {batch, arguments.classes}, real)
                           : torch::stable::new_empty(logits, {0, 0}, real);  // [B, C]

  char* next = static_cast<char*>(statistics.mutable_data_ptr());
  const auto row_if = [&](int64_t bit) -> void* {
    if (!(outputs & bit)) return nullptr;
    void* row = next;
    next += batch * static_cast<int64_t>(statistics.element_size());
    return row;
  };
  arguments.energy = row_if(kEnergy);
  arguments.log_sum_exp = row_if(kLogSumExp);
  arguments.maximum = row_if(kMaximum);
  for (int norm = 0; norm < kNorms; ++norm) arguments.norm[norm] = row_if(kFirstNorm << norm);
  if (outputs & kArgmax) arguments.argmax = static_cast<int64_t*>(argmax.mutable_data_ptr());
  if (outputs & kDelta) arguments.delta = delta.mutable_data_ptr();

  kRun(arguments, logits, target.has_value() ? &*target : nullptr);
  return {statistics, argmax, delta};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(GROOD_FAST_LIBRARY, m) {
  m.def(
      "logit_gradient(Tensor logits, int objective, float temperature, Tensor? target, int outputs)"
      " -> (Tensor statistics, Tensor argmax, Tensor delta)");
}

GROOD_FAST_IMPLEMENT("logit_gradient", &logit_gradient<on_cpu>, &logit_gradient<on_cuda>)

}  // namespace grood_fast::ops
