// The nearest row of a bank to each query. Blocks take 64 queries and a share of the bank, and keep
// the least squared distance they have seen; then a warp a query finds the least of the shares and
// the distance itself, in double. There is no B x N array.
#pragma once

#include "differences.cuh"

namespace grood_fast::cuda {

struct NearestDistance {
  MatrixArgument queries, bank;
  std::int64_t tiles_per_share, shares;
  void* squares;          // Real [shares, B]
  std::int64_t* indices;  // [shares, B]
  void* distance;         // Real [B]
  std::int64_t* nearest;  // [B]
};

// NaN is nearest of all; of equals, the first.
template <typename Real>
struct Nearest {
  Real square;
  std::int64_t index;

  static __device__ __forceinline__ Nearest none() { return {INFINITY, INT64_MAX}; }
  static __device__ __forceinline__ Nearest of(Nearest a, Nearest b) {
    const bool a_nan = a.square != a.square, b_nan = b.square != b.square;
    if (a_nan != b_nan) return a_nan ? a : b;
    if (!a_nan && a.square != b.square) return a.square < b.square ? a : b;
    return a.index < b.index ? a : b;
  }
};
template <typename Real>
__device__ __forceinline__ Nearest<Real> shuffle_xor(
    unsigned lanes, Nearest<Real> nearest, int distance) {
  return {
      __shfl_xor_sync(lanes, nearest.square, distance),
      static_cast<std::int64_t>(
          __shfl_xor_sync(lanes, static_cast<long long>(nearest.index), distance))};
}

template <typename Operand>
__global__ void __launch_bounds__(Differences<Operand>::kThreads)
    nearest_in_share_kernel(NearestDistance a) {
  using D = Differences<Operand>;
  using Real = typename D::Real;
  GROOD_FAST_SHARED(typename D::Buffers, buffers, 1);
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * D::kTile;
  const std::int64_t start = blockIdx.y * a.tiles_per_share * D::kTile;
  const std::int64_t share_end = start + a.tiles_per_share * D::kTile;
  const std::int64_t end = share_end < a.bank.rows ? share_end : a.bank.rows;
  Nearest<Real> best[D::kRows];
#pragma unroll
  for (int i = 0; i < D::kRows; ++i) best[i] = Nearest<Real>::none();
  for (std::int64_t first = start; first < end; first += D::kTile) {
    Real squares[D::kRows][D::kOthers];
    D::squares(squares, buffers[0], a.queries, a.bank, first_row, first);
#pragma unroll
    for (int i = 0; i < D::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < D::kOthers; ++j) {
        const std::int64_t index = first + D::other(j);
        if (index < end) best[i] = Nearest<Real>::of(best[i], {squares[i][j], index});
      }
    }
  }
#pragma unroll
  for (int i = 0; i < D::kRows; ++i) {
    // Eight neighbouring lanes have the same rows.
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2)
      best[i] = Nearest<Real>::of(best[i], shuffle_xor(0xffffffffu, best[i], distance));
    const std::int64_t row = first_row + D::row(i);
    if (threadIdx.x % 8 != 0 || row >= a.queries.rows) continue;
    const std::int64_t to = blockIdx.y * a.queries.rows + row;
    static_cast<Real*>(a.squares)[to] = best[i].square;
    a.indices[to] = best[i].index;
  }
}

template <typename Operand>
__global__ void __launch_bounds__(Group<kWarpThreads>::kBlock)
    nearest_of_shares_kernel(NearestDistance a, std::int64_t rows, bool) {
  using Threads = Group<kWarpThreads>;
  using Real = typename RealOf<Operand>::type;
  const std::int64_t row = Threads::row();
  if (row >= rows) return;  // the whole warp: there is no barrier below
  Nearest<Real> best = Nearest<Real>::none();
  for (std::int64_t share = Threads::thread(); share < a.shares; share += kWarpThreads) {
    const std::int64_t from = share * rows + row;
    best = Nearest<Real>::of(best, {static_cast<const Real*>(a.squares)[from], a.indices[from]});
  }
  best = Threads::reduce(best, Nearest<Real>::of);

  const auto* query = static_cast<const Operand*>(a.queries.values) + row * a.queries.row_stride;
  const auto distance_to = [&](std::int64_t index) {
    const auto* other = static_cast<const Operand*>(a.bank.values) + index * a.bank.row_stride;
    const auto difference = [&](std::int64_t c) {
      return fabs(static_cast<double>(widen(query[c])) - static_cast<double>(widen(other[c])));
    };
    double sum = 0, most = 0;
    for (std::int64_t c = Threads::thread(); c < a.bank.columns; c += kWarpThreads) {
      const double d = difference(c);
      sum += d * d;
      most = d > most || d != d ? d : most;
    }
    sum = Threads::sum(sum);
    most = Threads::maximum(most);
    constexpr double kSmall = 1e-290, kLarge = 1e300;
    if (!(most > 0) || (sum > kSmall && sum < kLarge) || most > 1.7976931348623157e+308)
      return most > 0 && most <= 1.7976931348623157e+308 ? sqrt(sum) : most;
    double scaled = 0;
    for (std::int64_t c = Threads::thread(); c < a.bank.columns; c += kWarpThreads) {
      const double d = difference(c) / most;
      scaled += d * d;
    }
    return most * sqrt(Threads::sum(scaled));
  };

  // A square that left its format's range says nothing of who is nearest: then all are looked at.
  constexpr Real kSmall = sizeof(Real) == 8 ? Real(1e-290) : Real(1e-30);
  constexpr Real kLarge = sizeof(Real) == 8 ? Real(1e300) : Real(1e37);
  double distance = 0;
  if (best.square > kSmall && best.square < kLarge) {
    distance = distance_to(best.index);
  } else {
    Nearest<double> least = Nearest<double>::none();
    for (std::int64_t index = 0; index < a.bank.rows; ++index)
      least = Nearest<double>::of(least, {distance_to(index), index});
    distance = least.square;
    best.index = least.index;
  }
  if (Threads::thread() != 0) return;
  static_cast<Real*>(a.distance)[row] = static_cast<Real>(distance);
  a.nearest[row] = best.index;
}

}  // namespace grood_fast::cuda
