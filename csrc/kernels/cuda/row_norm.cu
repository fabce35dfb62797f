#include "kernels.h"
#include "row_norm.cuh"

namespace grood_fast::cuda {
namespace {

template <typename Input, int kThreads>
const char* with_group(const RowNormArguments& a, std::int64_t rows, Stream stream) {
  return launch_rows<Group<kThreads>>(
      row_norm_kernel<Input, kThreads>, a, rows, rows_aligned<Input>(a.values, a.row_stride),
      stream);
}

}  // namespace

const char* multiply_row_norm(
    const RowNormArguments& a, std::int64_t rows, StreamPointer stream_pointer) {
  const auto stream = static_cast<Stream>(stream_pointer);
  return with_input_type(a.dtype, [&](auto input) {
    using Input = decltype(input);
    if (a.columns <= 128) return with_group<Input, 4>(a, rows, stream);
    if (a.columns <= 8192) return with_group<Input, 32>(a, rows, stream);
    return with_group<Input, 256>(a, rows, stream);
  });
}

}  // namespace grood_fast::cuda
