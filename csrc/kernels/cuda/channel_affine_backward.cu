#include "channel_affine_backward.cuh"

namespace grood_fast::cuda {

const char* channel_affine_backward(
    const ChannelAffineBackwardArguments& a, StreamPointer stream_pointer) {
  const auto stream = static_cast<Stream>(stream_pointer);
  return with_input_type(a.dtype, [&](auto input) {
    using Input = decltype(input);
    using Real = typename RealOf<Input>::type;
    if (a.channels_inner) {
      const std::int64_t blocks = (a.channels + kWarpThreads - 1) / kWarpThreads;
      return launch(
          channels_of_sample_kernel<Input>,
          dim3{static_cast<unsigned>(a.samples), static_cast<unsigned>(blocks), 1}, 256, 0, stream,
          a);
    }
    const bool aligned = rows_aligned<Input>(a.delta, a.positions) &&
                         rows_aligned<Input>(a.input, a.positions) &&
                         (a.onward == nullptr || rows_aligned<Real>(a.onward, a.positions));
    return launch_rows<Group<kWarpThreads>>(
        positions_of_channel_kernel<Input>, a, a.samples * a.channels, aligned, stream);
  });
}

}  // namespace grood_fast::cuda
