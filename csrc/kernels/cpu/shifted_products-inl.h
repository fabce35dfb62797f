// Inner products of the rows of one array with shifted rows of another, summed over the shifts:
// where two matrices of inner products meet, and, of one array with itself, its squared norm.
#pragma once

#include "simd-inl.h"

namespace grood_fast::GROOD_FAST_LEVEL {

template <typename Real>
void shifted_products_of(const ShiftedProductsArguments& a, std::int64_t begin, std::int64_t end) {
  using S = Simd<Real>;
  using V = typename S::V;
  const std::int64_t whole = a.columns / S::kLanes;
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t sample = row / a.rows, within = row % a.rows;
    const Real* left = static_cast<const Real*>(a.left) + row * a.columns;
    const Real* right = static_cast<const Real*>(a.right) + sample * a.right_sample_stride +
                        within * a.right_row_stride;
    const auto shifted = [&](std::int64_t k) {
      return right + a.shifts[k] * (a.right_row_stride + 1);
    };
    const V sum = sum_of<Real, 2>(whole, [&](std::int64_t i) {
      V together = S::load(shifted(0) + i * S::kLanes);
      for (std::int64_t k = 1; k < a.shift_count; ++k)
        together += S::load(shifted(k) + i * S::kLanes);
      return S::load(left + i * S::kLanes) * together;
    });
    Real rest = 0;
    for (std::int64_t c = whole * S::kLanes; c < a.columns; ++c)
      for (std::int64_t k = 0; k < a.shift_count; ++k) rest += left[c] * shifted(k)[c];
    a.sums[row] = static_cast<double>(lanes_sum<Real>(sum) + rest);
  }
}

void shifted_products(const ShiftedProductsArguments& a, std::int64_t begin, std::int64_t end) {
  if (a.dtype == DType::float64) return shifted_products_of<double>(a, begin, end);
  return shifted_products_of<float>(a, begin, end);
}

}  // namespace grood_fast::GROOD_FAST_LEVEL
