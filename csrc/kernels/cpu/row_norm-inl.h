// The norm of each row, multiplied into a factor: the other half of a rank-one gradient's norm.
#pragma once

#include "simd-inl.h"

namespace grood_fast::GROOD_FAST_LEVEL {

template <typename Input>
double row_norm_plain(const RowNormArguments& a, const Input* values) {
  double largest = a.append_one ? 1 : 0, sum = largest;
  for (std::int64_t c = 0; c < a.columns; ++c) {
    const double value = std::fabs(static_cast<double>(widen(values[c])));
    sum += value;
    if (value > largest || value != value) largest = value;
  }
  if (sum != sum) return sum;
  if (a.norm == Norm::l1) return sum;
  if (a.norm == Norm::linf || !(largest > 0) || __builtin_isinf(largest)) return largest;
  double squares = a.append_one ? 1 / (largest * largest) : 0;
  for (std::int64_t c = 0; c < a.columns; ++c) {
    const double value = static_cast<double>(widen(values[c])) / largest;
    squares += value * value;
  }
  return largest * std::sqrt(squares);
}

template <typename Input>
double row_norm(const RowNormArguments& a, std::int64_t row) {
  using Real = typename RealOf<Input>::type;
  using S = Simd<Real>;
  using V = typename S::V;
  const Input* values = static_cast<const Input*>(a.values) + row * a.row_stride;
  const std::int64_t whole = a.columns / S::kLanes;
  V last{};
  for (std::int64_t c = whole * S::kLanes; c < a.columns; ++c)
    last[c - whole * S::kLanes] = widen(values[c]);
  const auto value = [&](std::int64_t i) { return load_wide(values + i * S::kLanes); };
  const Real one = a.append_one ? Real(1) : Real(0);

  switch (a.norm) {
    case Norm::l1: {
      const auto magnitude = [&](std::int64_t i) { return S::abs(value(i)); };
      const Real sum = one + lanes_sum<Real>(sum_of<Real>(whole, magnitude) + S::abs(last));
      return sum <= -Constants<Real>::kLowest ? sum : row_norm_plain(a, values);
    }
    case Norm::l2: {
      const auto square = [&](std::int64_t i) { return value(i) * value(i); };
      const Real sum = one + lanes_sum<Real>(sum_of<Real>(whole, square) + last * last);
      const bool exact = sum > Constants<Real>::kSmallSquare && sum < -Constants<Real>::kLowest;
      return exact ? std::sqrt(sum) : row_norm_plain(a, values);
    }
    case Norm::linf: {
      // A maximum forgets NaN; a sum of products with zero does not.
      const V finite =
          sum_of<Real>(whole, [&](std::int64_t i) { return value(i) * Real(0); }) + last * Real(0);
      if (lanes_sum<Real>(finite) != Real(0)) return row_norm_plain(a, values);
      const V most =
          max_of<Real>(whole, S::abs(last), [&](std::int64_t i) { return S::abs(value(i)); });
      const Real largest = lanes_max<Real>(most);
      return largest > one ? largest : one;
    }
  }
  return 0;
}

template <typename Input>
void multiply_row_norm_of(const RowNormArguments& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const double norm = row_norm<Input>(a, row);
    if (a.factor_dtype == DType::float64) {
      static_cast<double*>(a.factor)[row] *= norm;
    } else {
      static_cast<float*>(a.factor)[row] =
          static_cast<float>(static_cast<float*>(a.factor)[row] * norm);
    }
  }
}

void multiply_row_norm(const RowNormArguments& a, std::int64_t begin, std::int64_t end) {
  switch (a.dtype) {
    case DType::float32:
      return multiply_row_norm_of<float>(a, begin, end);
    case DType::float64:
      return multiply_row_norm_of<double>(a, begin, end);
    case DType::bfloat16:
      return multiply_row_norm_of<Bfloat16>(a, begin, end);
    case DType::float16:
      return multiply_row_norm_of<Float16>(a, begin, end);
  }
}

}  // namespace grood_fast::GROOD_FAST_LEVEL
