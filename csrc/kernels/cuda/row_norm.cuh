// The norm of each row, multiplied into a factor: the other half of a rank-one gradient's norm.
#pragma once

#include "rows.cuh"

namespace grood_fast::cuda {

// Sums in the format's Real serve unless squares or sums leave its range; then once more in double.
template <typename Real>
struct Range;
template <>
struct Range<float> {
  static constexpr float kSmallSquare = 1e-30f, kLargest = 3.402823466e+38f;
};
template <>
struct Range<double> {
  static constexpr double kSmallSquare = 1e-290, kLargest = 1.7976931348623157e+308;
};

// What a thread of a row's group has added up of the row's elements.
template <typename Real>
struct Magnitudes {
  Real sum, squares, most;

  explicit __device__ __forceinline__ Magnitudes(Real start)
      : sum(start), squares(start), most(start) {}
  __device__ __forceinline__ void take(Real value) {
    const Real magnitude = fabs(value);
    sum += magnitude;
    squares += value * value;
    most = magnitude > most ? magnitude : most;
  }
};

// The norm of what all threads of the group took, on each of them. `each(body)` walks over this
// thread's elements once more, where the first walk has lost digits; `one` is 1 on the one thread
// that counts a one beside them, and 0.
template <typename Threads, typename Real, typename Each>
__device__ __forceinline__ double norm_of_group(
    Norm norm, const Magnitudes<Real>& mine, Real one, Each each) {
  const Real sum = Threads::sum(mine.sum);
  const Real squares = Threads::sum(mine.squares);
  const Real most = Threads::maximum(mine.most);
  if (sum != sum) return sum;
  if (norm == Norm::linf) return most;
  if (norm == Norm::l1) {
    if (sum <= Range<Real>::kLargest) return sum;
    double wide = one;
    each([&](Real value) { wide += fabs(static_cast<double>(value)); });
    return Threads::sum(wide);
  }
  if (squares > Range<Real>::kSmallSquare && squares <= Range<Real>::kLargest) return sqrt(squares);
  if (!(most > 0) || most > Range<Real>::kLargest) return most;
  const double unit = most;
  double wide = one > 0 ? 1 / (unit * unit) : 0;  // whose square may be 0 without the one
  each([&](Real value) {
    const double scaled = static_cast<double>(value) / unit;
    wide += scaled * scaled;
  });
  return unit * sqrt(Threads::sum(wide));
}

template <typename Input, int kThreads>
__global__ void __launch_bounds__(Group<kThreads>::kBlock)
    row_norm_kernel(RowNormArguments a, std::int64_t rows, bool aligned) {
  using Threads = Group<kThreads>;
  using Real = typename RealOf<Input>::type;
  constexpr int kWidth = Chunk<Input>::kWidth;
  constexpr std::int64_t kStep = kThreads * kWidth;
  const std::int64_t wanted = Threads::row();
  const std::int64_t r = wanted < rows ? wanted : rows - 1;
  const Input* row = static_cast<const Input*>(a.values) + r * a.row_stride;
  const auto each = [&](auto body) {  // of this thread's elements; zeros past the end
#pragma unroll 4
    for (std::int64_t first = Threads::thread() * kWidth; first < a.columns; first += kStep) {
      const Chunk<Input> chunk = load_chunk(row, first, a.columns, aligned);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) body(widen(chunk.elements[i]));
    }
  };

  const bool first_thread = Threads::thread() == 0;
  const Real one = a.append_one && first_thread ? Real(1) : Real(0);
  Magnitudes<Real> mine(one);
  each([&](Real value) { mine.take(value); });
  const double norm = norm_of_group<Threads>(a.norm, mine, one, each);

  if (!first_thread || wanted >= rows) return;
  if (a.factor_dtype == DType::float64) {
    static_cast<double*>(a.factor)[r] *= norm;
  } else {
    float* factor = static_cast<float*>(a.factor) + r;
    *factor = static_cast<float>(*factor * norm);
  }
}

}  // namespace grood_fast::cuda
