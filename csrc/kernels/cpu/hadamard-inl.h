// Two arrays multiplied element by element: where the two products of a factored inner product
// meet.
#pragma once

#include "simd-inl.h"

namespace grood_fast::GROOD_FAST_LEVEL {

template <typename Real>
void hadamard_of(const HadamardArguments& a, std::int64_t begin, std::int64_t end) {
  using S = Simd<Real>;
  Real* values = static_cast<Real*>(a.values);
  const Real* factors = static_cast<const Real*>(a.factors);
  const Real shift = static_cast<Real>(a.shift);
  std::int64_t i = begin;
  for (; i + S::kLanes <= end; i += S::kLanes)
    S::store(values + i, S::load(values + i) * (S::load(factors + i) + shift));
  for (; i < end; ++i) values[i] *= factors[i] + shift;
}

void hadamard(const HadamardArguments& a, std::int64_t begin, std::int64_t end) {
  if (a.dtype == DType::float64) return hadamard_of<double>(a, begin, end);
  return hadamard_of<float>(a, begin, end);
}

}  // namespace grood_fast::GROOD_FAST_LEVEL
