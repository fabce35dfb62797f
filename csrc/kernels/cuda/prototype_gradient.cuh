// The gradient with respect to the OOD prototype of cross-entropy over negative distances: the
// features less the prototype, their squared distances to the other prototypes, and the softmax's
// weight times the vector.
#pragma once

#include "differences.cuh"
#include "row_norm.cuh"

namespace grood_fast::cuda {

struct PrototypeGradient {
  MatrixArgument features;  // Input [B, D]
  MatrixArgument x;         // Real [B, D], contiguous: becomes the gradient
  MatrixArgument offsets;   // Real [C, D]
  const void* point;        // Real [D]
  void* squares;            // Real [B, C]
  double temperature, scale;
  bool squared;
  void* log_weight;  // Real [B]
};

template <typename Input, typename Real>
__global__ void __launch_bounds__(256) subtract_point_kernel(PrototypeGradient a) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const std::int64_t columns = a.features.columns;
  if (i >= a.features.rows * columns) return;
  const std::int64_t row = i / columns, column = i % columns;
  const auto* features = static_cast<const Input*>(a.features.values);
  const_cast<Real*>(static_cast<const Real*>(a.x.values))[i] =
      static_cast<Real>(widen(features[row * a.features.row_stride + column])) -
      static_cast<const Real*>(a.point)[column];
}

template <typename Real>
__global__ void __launch_bounds__(Differences<Real>::kThreads)
    prototype_distance_kernel(PrototypeGradient a) {
  using D = Differences<Real>;
  GROOD_FAST_SHARED(typename D::Buffers, buffers, 1);
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * D::kTile;
  const std::int64_t first_other = static_cast<std::int64_t>(blockIdx.y) * D::kTile;
  Real squares[D::kRows][D::kOthers];
  D::squares(squares, buffers[0], a.x, a.offsets, first_row, first_other);
#pragma unroll
  for (int i = 0; i < D::kRows; ++i) {
    const std::int64_t row = first_row + D::row(i);
#pragma unroll
    for (int j = 0; j < D::kOthers; ++j) {
      const std::int64_t other = first_other + D::other(j);
      if (row < a.x.rows && other < a.offsets.rows)
        static_cast<Real*>(a.squares)[row * a.offsets.rows + other] = squares[i][j];
    }
  }
}

template <typename Real>
__global__ void __launch_bounds__(Group<kWarpThreads>::kBlock, 4)
    prototype_weight_kernel(PrototypeGradient a, std::int64_t rows, bool) {
  using Threads = Group<kWarpThreads>;
  const std::int64_t r = Threads::row();
  if (r >= rows) return;  // the whole warp: there is no barrier below
  const std::int64_t classes = a.offsets.rows, columns = a.x.columns;
  Real* x = const_cast<Real*>(static_cast<const Real*>(a.x.values)) + r * columns;
  const Real* squares = static_cast<const Real*>(a.squares) + r * classes;
  const auto each = [&](auto body) {
    for (std::int64_t c = Threads::thread(); c < columns; c += kWarpThreads) body(x[c]);
  };
  Magnitudes<Real> mine(Real(0));
  each([&](Real value) { mine.take(value); });
  const double norm = norm_of_group<Threads>(Norm::l2, mine, Real(0), each);

  // Squares within their format's range are good; of others, none is needed where all of a row's
  // are tiny, and all are computed again in double where some are too large.
  Real largest = 0;
  for (std::int64_t k = Threads::thread(); k < classes; k += kWarpThreads)
    largest = squares[k] > largest || squares[k] != squares[k] ? squares[k] : largest;
  largest = Threads::maximum(largest);
  const bool good = largest >= Range<Real>::kSmallSquare && largest <= Range<Real>::kLargest;
  const auto logit_of = [&](double distance) {
    return -(a.squared ? distance * distance : distance) / a.temperature;
  };
  const auto again = [&](std::int64_t k) {  // by the whole warp
    const Real* other = static_cast<const Real*>(a.offsets.values) + k * a.offsets.row_stride;
    double most = 0;
    for (std::int64_t c = Threads::thread(); c < columns; c += kWarpThreads) {
      const double d = fabs(static_cast<double>(x[c]) - static_cast<double>(other[c]));
      most = d > most || d != d ? d : most;
    }
    most = Threads::maximum(most);
    double sum = 0;
    for (std::int64_t c = Threads::thread(); c < columns && most > 0; c += kWarpThreads) {
      const double d = (static_cast<double>(x[c]) - static_cast<double>(other[c])) / most;
      sum += d * d;
    }
    sum = Threads::sum(sum);
    return most > 0 ? most * sqrt(sum) : most;
  };

  const double own = logit_of(norm);
  double maximum = own, total = 0;
  if (good) {
    for (std::int64_t k = Threads::thread(); k < classes; k += kWarpThreads) {
      const double value = logit_of(sqrt(static_cast<double>(squares[k])));
      maximum = value > maximum ? value : maximum;
    }
    maximum = Threads::maximum(maximum);
    for (std::int64_t k = Threads::thread(); k < classes; k += kWarpThreads)
      total += exp(logit_of(sqrt(static_cast<double>(squares[k]))) - maximum);
    total = Threads::sum(total);
  } else {
    for (std::int64_t k = 0; k < classes; ++k) {
      const double value = logit_of(again(k));
      maximum = value > maximum || value != value ? value : maximum;
    }
    for (std::int64_t k = 0; k < classes; ++k) total += exp(logit_of(again(k)) - maximum);
  }
  total += exp(own - maximum);
  const double log_weight = own - maximum - log(total);
  const double weight = exp(log_weight) * a.scale / a.temperature;
  const double factor = a.squared ? 2 * weight : norm > 0 || norm != norm ? weight / norm : 0;
  for (std::int64_t c = Threads::thread(); c < columns; c += kWarpThreads)
    x[c] = static_cast<Real>(static_cast<double>(x[c]) * factor);
  if (Threads::thread() == 0) static_cast<Real*>(a.log_weight)[r] = static_cast<Real>(log_weight);
}

}  // namespace grood_fast::cuda
