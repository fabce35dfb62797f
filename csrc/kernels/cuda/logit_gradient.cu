#include "kernels.h"
#include "logit_gradient.cuh"

namespace grood_fast::cuda {
namespace {

// Elements of a row that a thread keeps in registers.
constexpr int kKept = 32;

template <typename Input, int kThreads, int kElements>
const char* with_group(const LogitGradientArguments& a, std::int64_t rows, Stream stream) {
  return launch_rows<Group<kThreads>>(
      logit_gradient_kernel<Input, kThreads, kElements / Chunk<Input>::kWidth>, a, rows,
      rows_aligned<Input>(a.logits, a.row_stride), stream);
}

}  // namespace

const char* logit_gradient(
    const LogitGradientArguments& a, std::int64_t rows, StreamPointer stream_pointer) {
  const auto stream = static_cast<Stream>(stream_pointer);
  return with_input_type(a.dtype, [&](auto input) {
    using Input = decltype(input);
    if (a.classes <= 4 * kKept) return with_group<Input, 4, kKept>(a, rows, stream);
    if (a.classes <= 32 * kKept) return with_group<Input, 32, kKept>(a, rows, stream);
    if (a.classes <= 256 * kKept) return with_group<Input, 256, kKept>(a, rows, stream);
    return with_group<Input, 256, 0>(a, rows, stream);
  });
}

}  // namespace grood_fast::cuda
