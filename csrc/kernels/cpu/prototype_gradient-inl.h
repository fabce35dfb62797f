// The gradient with respect to the prototype at the origin, of cross-entropy over negative
// distances: from products to distances, a softmax, and the vector it scales.
#pragma once

#include "distance-inl.h"

namespace grood_fast::GROOD_FAST_LEVEL {

template <typename Input, typename Real>
void subtract_of(const SubtractArguments& a, std::int64_t begin, std::int64_t end) {
  using S = Simd<Real>;
  const Real* point = static_cast<const Real*>(a.point);
  const std::int64_t whole = a.columns / S::kLanes;
  for (std::int64_t row = begin; row < end; ++row) {
    const Input* from = static_cast<const Input*>(a.rows) + row * a.row_stride;
    Real* to = static_cast<Real*>(a.difference) + row * a.columns;
    const auto square = [&](std::int64_t i) {
      typename S::V value;
      if constexpr (sizeof(typename RealOf<Input>::type) == sizeof(Real)) {
        value = load_wide(from + i * S::kLanes);
      } else {  // float64 rows less a float32 point, or the reverse
        for (std::int64_t lane = 0; lane < S::kLanes; ++lane)
          value[lane] = static_cast<Real>(widen(from[i * S::kLanes + lane]));
      }
      value -= S::load(point + i * S::kLanes);
      S::store(to + i * S::kLanes, value);
      return value * value;
    };
    Real sum = lanes_sum<Real>(sum_of<Real>(whole, square));
    for (std::int64_t c = whole * S::kLanes; c < a.columns; ++c) {
      to[c] = static_cast<Real>(widen(from[c])) - point[c];
      sum += to[c] * to[c];
    }
    static_cast<Real*>(a.norm)[row] =
        exact_squares(sum) ? std::sqrt(sum) : static_cast<Real>(length_plain(to, a.columns));
  }
}

template <typename Real>
void subtract_from(const SubtractArguments& a, std::int64_t begin, std::int64_t end) {
  switch (a.dtype) {
    case DType::float32:
      return subtract_of<float, Real>(a, begin, end);
    case DType::float64:
      return subtract_of<double, Real>(a, begin, end);
    case DType::bfloat16:
      return subtract_of<Bfloat16, Real>(a, begin, end);
    case DType::float16:
      return subtract_of<Float16, Real>(a, begin, end);
  }
}

void subtract(const SubtractArguments& a, std::int64_t begin, std::int64_t end) {
  if (a.real == DType::float64) return subtract_from<double>(a, begin, end);
  return subtract_from<float>(a, begin, end);
}

// Below this share of |x|^2 + |o|^2, |x|^2 + |o|^2 - 2 x.o has lost digits.
inline constexpr double kCancelled = 1.0 / 16;

// One row in double precision and without products: for NaN, infinities, overflow and underflow.
template <typename Real>
void prototype_gradient_row(const PrototypeGradientArguments& a, std::int64_t row) {
  Real* x = static_cast<Real*>(a.x) + row * a.columns;
  const Real* offsets = static_cast<const Real*>(a.offsets);
  const double norm = length_plain(x, a.columns);
  const auto logit = [&](double d) { return -(a.squared ? d * d : d) / a.temperature; };
  const auto other = [&](std::int64_t c) {
    return logit(distance_plain(x, offsets + c * a.columns, a.columns));
  };
  const double own = logit(norm);
  double maximum = own;
  for (std::int64_t c = 0; c < a.classes; ++c) {
    const double value = other(c);
    if (value > maximum || value != value) maximum = value;
  }
  double total = std::exp(own - maximum);
  for (std::int64_t c = 0; c < a.classes; ++c) total += std::exp(other(c) - maximum);
  const double log_weight = own - maximum - std::log(total);
  const double length = std::exp(log_weight) * a.scale / a.temperature * (a.squared ? 2 : 1);
  for (std::int64_t i = 0; i < a.columns; ++i) {
    const double value = static_cast<double>(x[i]);
    const double direction = a.squared ? value : norm > 0 || norm != norm ? value / norm : 0.0;
    x[i] = static_cast<Real>(length * direction);
  }
  static_cast<Real*>(a.log_weight)[row] = static_cast<Real>(log_weight);
}

template <typename Real>
struct PrototypeGradient {
  using S = Simd<Real>;
  using V = typename S::V;
  static constexpr std::int64_t kTogether = 8;  // vectors of classes looked at together

  const PrototypeGradientArguments& a;
  std::int64_t vectors;   // of a row's classes
  typename S::I padding;  // the last vector's lanes that are no classes

  explicit PrototypeGradient(const PrototypeGradientArguments& arguments)
      : a(arguments), vectors((a.classes + S::kLanes - 1) / S::kLanes) {
    for (std::int64_t lane = 0; lane < S::kLanes; ++lane)
      padding[lane] = (vectors - 1) * S::kLanes + lane < a.classes ? 0 : -1;
  }

  GROOD_FAST_INLINE void row(std::int64_t row) const {
    Real* const x = static_cast<Real*>(a.x) + row * a.columns;
    const Real norm = static_cast<const Real*>(a.norm)[row];
    const Real square = norm * norm;
    Real* const logits = static_cast<Real*>(a.products) + row * a.product_stride;
    if (!exact_squares(square) || !squared_distances(x, square, logits))
      return prototype_gradient_row<Real>(a, row);

    const Real inverse = static_cast<Real>(-1 / a.temperature);
    const std::int64_t padded = vectors * S::kLanes;
    if (a.squared) {
      for (std::int64_t c = 0; c < padded; ++c) logits[c] *= inverse;
    } else {
      for (std::int64_t c = 0; c < padded; ++c) logits[c] = std::sqrt(logits[c]) * inverse;
    }
    const Real own = (a.squared ? square : norm) * inverse;
    const auto logit = [&](std::int64_t i) { return S::load(logits + i * S::kLanes); };
    const Real maximum = lanes_max<Real>(max_of<Real>(vectors, S::all(own), logit));
    const V sum = sum_of<Real, 1>(vectors, [&](std::int64_t i) {
      return exp2_nonpositive<Real>(logit(i) - maximum, Real(kLog2E));
    });
    const double relative = static_cast<double>(own) - static_cast<double>(maximum);
    const double total = static_cast<double>(lanes_sum<Real>(sum));
    const double log_weight = relative - std::log(total + std::exp(relative));

    // Two factors, because their product may not be a Real where what they scale is.
    const Real direction = a.squared ? Real(2) : 1 / norm;
    const Real length = static_cast<Real>(std::exp(log_weight) * a.scale / a.temperature);
    for (std::int64_t i = 0; i < a.columns; ++i) x[i] = x[i] * direction * length;
    static_cast<Real*>(a.log_weight)[row] = static_cast<Real>(log_weight);
  }

  // Products become squared distances; false where something is not finite.
  GROOD_FAST_INLINE bool squared_distances(const Real* x, Real square, Real* const products) const {
    const Real* offset_norm = static_cast<const Real*>(a.offset_norm);
    const Real* offsets = static_cast<const Real*>(a.offsets);
    V finite{};  // NaN as soon as a distance is not
    for (std::int64_t start = 0; start < vectors; start += kTogether) {
      const std::int64_t end = start + kTogether < vectors ? start + kTogether : vectors;
      V room = S::all(1);  // negative where digits were lost
      for (std::int64_t i = start; i < end; ++i) {
        Real* const product = products + i * S::kLanes;
        const V length = S::load(offset_norm + i * S::kLanes);
        const V together = square + length * length;
        V value = together - Real(2) * S::load(product);
        if (i == vectors - 1) value = padding ? S::all(-Constants<Real>::kLowest) : value;
        finite += value * Real(0);
        const V left = value - together * Real(kCancelled);
        room = left < room ? left : room;
        S::store(product, value);
      }
      bool cancelled = false;
      for (std::int64_t lane = 0; lane < S::kLanes; ++lane) cancelled |= room[lane] < Real(0);
      if (!cancelled) continue;
      for (std::int64_t c = start * S::kLanes; c < end * S::kLanes && c < a.classes; ++c) {
        const Real together = square + offset_norm[c] * offset_norm[c];
        if (!(products[c] < together * Real(kCancelled))) continue;
        const Real length = distance(x, offsets + c * a.columns, a.columns);
        products[c] = length * length;
      }
    }
    return lanes_sum<Real>(finite) == Real(0);
  }
};

template <typename Real>
void prototype_gradient_of(
    const PrototypeGradientArguments& a, std::int64_t begin, std::int64_t end) {
  const PrototypeGradient<Real> gradient(a);
  for (std::int64_t row = begin; row < end; ++row) gradient.row(row);
}

void prototype_gradient(const PrototypeGradientArguments& a, std::int64_t begin, std::int64_t end) {
  if (a.dtype == DType::float64) return prototype_gradient_of<double>(a, begin, end);
  return prototype_gradient_of<float>(a, begin, end);
}

}  // namespace grood_fast::GROOD_FAST_LEVEL
