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
  Real sum = one, squares = one, most = one;
  each([&](Real value) {
    const Real magnitude = fabs(value);
    sum += magnitude;
    squares += value * value;
    most = magnitude > most ? magnitude : most;
  });
  sum = Threads::sum(sum);
  squares = Threads::sum(squares);
  most = Threads::maximum(most);

  double norm = 0;
  if (sum != sum || a.norm == Norm::linf) {
    norm = sum != sum ? sum : most;
  } else if (a.norm == Norm::l1) {
    norm = sum;
    if (!(sum <= Range<Real>::kLargest)) {
      double wide = one;
      each([&](Real value) { wide += fabs(static_cast<double>(value)); });
      norm = Threads::sum(wide);
    }
  } else if (squares > Range<Real>::kSmallSquare && squares <= Range<Real>::kLargest) {
    norm = sqrt(squares);
  } else if (!(most > 0) || most > Range<Real>::kLargest) {
    norm = most;
  } else {
    const double unit = most;
    double wide = one > 0 ? 1 / (unit * unit) : 0;  // whose square may be 0 without the one
    each([&](Real value) {
      const double scaled = static_cast<double>(value) / unit;
      wide += scaled * scaled;
    });
    norm = unit * sqrt(Threads::sum(wide));
  }

  if (!first_thread || wanted >= rows) return;
  if (a.factor_dtype == DType::float64) {
    static_cast<double*>(a.factor)[r] *= norm;
  } else {
    float* factor = static_cast<float*>(a.factor) + r;
    *factor = static_cast<float>(*factor * norm);
  }
}

}  // namespace grood_fast::cuda
