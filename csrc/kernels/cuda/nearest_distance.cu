#include "kernels.h"
#include "nearest_distance.cuh"

namespace grood_fast::cuda {
namespace {

template <typename Operand>
NearestDistance plan(const NearestDistanceArguments& a) {
  constexpr std::int64_t kTile = Differences<Operand>::kTile;
  const std::int64_t row_tiles = (a.rows + kTile - 1) / kTile;
  const std::int64_t tiles = (a.bank_rows + kTile - 1) / kTile;
  const std::int64_t wanted = (4 * multiprocessors() + row_tiles - 1) / row_tiles;
  const std::int64_t per_share = (tiles + wanted - 1) / wanted;
  const auto matrix = [&](const void* values, std::int64_t rows, std::int64_t stride) {
    return MatrixArgument{values, rows, a.columns, stride, rows_aligned<Operand>(values, stride)};
  };
  return {
      matrix(a.queries, a.rows, a.queries_stride),
      matrix(a.bank, a.bank_rows, a.bank_stride),
      per_share,
      (tiles + per_share - 1) / per_share,
      a.squares,
      a.indices,
      a.distance,
      a.nearest};
}

}  // namespace

std::int64_t nearest_distance_shares(const NearestDistanceArguments& a) {
  return plan<float>(a).shares;
}

const char* nearest_distance(const NearestDistanceArguments& a, StreamPointer stream_pointer) {
  const auto stream = static_cast<Stream>(stream_pointer);
  return with_input_type(a.dtype, [&](auto operand) {
    using Operand = decltype(operand);
    const NearestDistance arguments = plan<Operand>(a);
    constexpr std::int64_t kTile = Differences<Operand>::kTile;
    const dim3 blocks{
        static_cast<unsigned>((a.rows + kTile - 1) / kTile),
        static_cast<unsigned>(arguments.shares), 1};
    const char* error = launch(
        nearest_in_share_kernel<Operand>, blocks, Differences<Operand>::kThreads, 0, stream,
        arguments);
    if (error != nullptr) return error;
    return launch_rows<Group<kWarpThreads>>(
        nearest_of_shares_kernel<Operand>, arguments, a.rows, false, stream);
  });
}

}  // namespace grood_fast::cuda
