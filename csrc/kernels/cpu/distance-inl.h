// Lengths of vectors and of differences of two, of any size that the format holds.
#pragma once

#include "simd-inl.h"

namespace grood_fast::GROOD_FAST_LEVEL {

// In double and relative to the largest element, so that no square is lost or overflows.
template <typename F>
double length_plain(std::int64_t count, F element) {
  double largest = 0, sum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double value = std::fabs(element(i));
    sum += value;
    if (value > largest) largest = value;
  }
  if (sum != sum) return sum;
  if (!(largest > 0) || __builtin_isinf(largest)) return largest;
  double squares = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double value = element(i) / largest;
    squares += value * value;
  }
  return largest * std::sqrt(squares);
}

template <typename Real>
double length_plain(const Real* a, std::int64_t count) {
  return length_plain(count, [&](std::int64_t i) { return static_cast<double>(a[i]); });
}

template <typename Real>
double distance_plain(const Real* a, const Real* b, std::int64_t count) {
  return length_plain(
      count, [&](std::int64_t i) { return static_cast<double>(a[i]) - static_cast<double>(b[i]); });
}

// Whether a sum of squares kept its digits.
template <typename Real>
GROOD_FAST_INLINE bool exact_squares(Real sum) {
  return sum > Constants<Real>::kSmallSquare && sum < -Constants<Real>::kLowest;
}

template <typename Real>
Real distance(const Real* a, const Real* b, std::int64_t count) {
  using S = Simd<Real>;
  const std::int64_t whole = count / S::kLanes;
  typename S::V last{};
  for (std::int64_t i = whole * S::kLanes; i < count; ++i)
    last[i - whole * S::kLanes] = a[i] - b[i];
  const auto square = [&](std::int64_t i) {
    const auto difference = S::load(a + i * S::kLanes) - S::load(b + i * S::kLanes);
    return difference * difference;
  };
  const Real sum = lanes_sum<Real>(sum_of<Real>(whole, square) + last * last);
  return exact_squares(sum) ? std::sqrt(sum) : static_cast<Real>(distance_plain(a, b, count));
}

}  // namespace grood_fast::GROOD_FAST_LEVEL
