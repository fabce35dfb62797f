// Logits less what some of the features contribute: a few rows of the transposed weight are taken
// off each row of logits, which stays in registers.
#pragma once

#include "simd-inl.h"

namespace grood_fast::GROOD_FAST_LEVEL {

template <typename Real>
void short_circuit_of(const ShortCircuitArguments& a, std::int64_t begin, std::int64_t end) {
  using S = Simd<Real>;
  using V = typename S::V;
  constexpr std::int64_t kHeld = 8;  // vectors of logits at once
  const Real* weight = static_cast<const Real*>(a.weight);
  for (std::int64_t row = begin; row < end; ++row) {
    Real* logits = static_cast<Real*>(a.logits) + row * a.classes;
    const Real* features = static_cast<const Real*>(a.features) + row * a.columns;
    const std::int64_t* removed = a.removed + row * a.count;
    std::int64_t c = 0;
    for (; c + kHeld * S::kLanes <= a.classes; c += kHeld * S::kLanes) {
      V held[kHeld];
      for (std::int64_t v = 0; v < kHeld; ++v) held[v] = S::load(logits + c + v * S::kLanes);
      for (std::int64_t i = 0; i < a.count; ++i) {
        const Real feature = features[removed[i]];
        const Real* column = weight + removed[i] * a.classes + c;
        for (std::int64_t v = 0; v < kHeld; ++v)
          held[v] -= feature * S::load(column + v * S::kLanes);
      }
      for (std::int64_t v = 0; v < kHeld; ++v) S::store(logits + c + v * S::kLanes, held[v]);
    }
    for (; c + S::kLanes <= a.classes; c += S::kLanes) {
      V held = S::load(logits + c);
      for (std::int64_t i = 0; i < a.count; ++i)
        held -= features[removed[i]] * S::load(weight + removed[i] * a.classes + c);
      S::store(logits + c, held);
    }
    if (c == a.classes) continue;
    for (std::int64_t i = 0; i < a.count; ++i) {
      const Real feature = features[removed[i]];
      const Real* column = weight + removed[i] * a.classes;
      for (std::int64_t rest = c; rest < a.classes; ++rest) logits[rest] -= feature * column[rest];
    }
  }
}

void short_circuit(const ShortCircuitArguments& a, std::int64_t begin, std::int64_t end) {
  if (a.dtype == DType::float64) return short_circuit_of<double>(a, begin, end);
  return short_circuit_of<float>(a, begin, end);
}

}  // namespace grood_fast::GROOD_FAST_LEVEL
