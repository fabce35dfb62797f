// The nearest row of a tile: products rule out almost all of them, and what they cannot rule out is
// decided by the difference itself, which does not cancel.
#pragma once

#include "distance-inl.h"

namespace grood_fast::GROOD_FAST_LEVEL {

template <typename Real>
struct Nearest {
  using S = Simd<Real>;
  using V = typename S::V;
  static constexpr std::int64_t kLanes = S::kLanes;
  static constexpr std::int64_t kStep = 8 * kLanes;  // bank rows looked at together

  const NearestArguments& a;

  void row(std::int64_t row) const {
    const Real* query = static_cast<const Real*>(a.queries) + row * a.columns;
    const Real norm = static_cast<const Real*>(a.query_norm)[row];
    const Real* bank_norm = static_cast<const Real*>(a.bank_norm);
    const Real* products = static_cast<const Real*>(a.products) + row * a.width;
    const Real* bank = static_cast<const Real*>(a.bank);
    Real best = static_cast<Real*>(a.distance)[row];
    std::int64_t found = a.nearest[row];
    // The smallest that |q|^2 + |b|^2 - 2 q.b can be, given what rounds and what underflows in it.
    const Real kept = static_cast<Real>(1 - a.tolerance);
    const Real square = norm * norm;
    const Real lost = static_cast<Real>(a.columns + 8) * 8 * Constants<Real>::kSmallestNormal;
    const auto at_least = [&](auto length, auto product) {
      return (square + length * length) * kept - Real(2) * product - lost;
    };

    const auto look = [&](std::int64_t from, std::int64_t to) {
      for (std::int64_t i = from; i < to && best == best; ++i) {
        const Real least = at_least(bank_norm[i], products[i]);
        if (least > best * best && least <= -Constants<Real>::kLowest) continue;
        const Real d = distance(query, bank + i * a.columns, a.columns);
        if (d < best || d != d || found < 0) {
          best = d;
          found = a.first + i;
        }
      }
    };
    std::int64_t start = 0;
    for (; start + kStep <= a.width; start += kStep) {
      V finite{}, least = S::all(-Constants<Real>::kLowest);
      for (std::int64_t i = start; i < start + kStep; i += kLanes) {
        const V value = at_least(S::load(bank_norm + i), S::load(products + i));
        finite += value * Real(0);
        least = value < least ? value : least;
      }
      Real smallest = least[0], sum = 0;
      for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        if (least[lane] < smallest) smallest = least[lane];
        sum += finite[lane];
      }
      if (!(smallest > best * best) || sum != Real(0)) look(start, start + kStep);
    }
    look(start, a.width);
    static_cast<Real*>(a.distance)[row] = best;
    a.nearest[row] = found;
  }
};

void nearest(const NearestArguments& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    if (a.dtype == DType::float64) {
      Nearest<double>{a}.row(row);
    } else {
      Nearest<float>{a}.row(row);
    }
  }
}

}  // namespace grood_fast::GROOD_FAST_LEVEL
