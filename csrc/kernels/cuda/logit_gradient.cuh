// delta = d objective / d logits of each row, its norms, and the row's energy.
//
// A row that fits into its group's registers is read once; a longer one again for each step.
// Whatever the objective, delta = scale * u + shift with u one number a class.
#pragma once

#include "rows.cuh"

namespace grood_fast::cuda {

// The place of the maximum: of the first NaN if there is one, else of the first largest.
template <typename Real>
struct Largest {
  Real value;
  std::int64_t index;

  static __device__ __forceinline__ Largest none() { return {-INFINITY, INT64_MAX}; }
  static __device__ __forceinline__ Largest of(Largest a, Largest b) {
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    if (a_nan != b_nan) return a_nan ? a : b;
    if (!a_nan && a.value != b.value) return a.value > b.value ? a : b;
    return a.index < b.index ? a : b;
  }
};
template <typename Real>
__device__ __forceinline__ Largest<Real> shuffle_xor(
    unsigned lanes, Largest<Real> largest, int distance) {
  return {
      __shfl_xor_sync(lanes, largest.value, distance),
      static_cast<std::int64_t>(
          __shfl_xor_sync(lanes, static_cast<long long>(largest.index), distance))};
}

// One row's numbers as one thread of its group has them: kChunks chunks in registers, or none and
// the row is read again at every walk.
template <typename Input, int kThreads, int kChunks>
struct Row {
  using Real = typename RealOf<Input>::type;
  static constexpr int kWidth = Chunk<Input>::kWidth;
  static constexpr bool kKept = kChunks > 0;

  const Input* from;
  std::int64_t columns;
  bool aligned;
  Real values[kKept ? kChunks : 1][kWidth];

  __device__ __forceinline__ Row(const Input* from, std::int64_t columns, bool aligned)
      : from(from), columns(columns), aligned(aligned) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) read(values[i], first_of(i));
  }

  static __device__ __forceinline__ std::int64_t first_of(int chunk) {
    return (static_cast<std::int64_t>(chunk) * kThreads + Group<kThreads>::thread()) * kWidth;
  }

  __device__ __forceinline__ void read(Real (&to)[kWidth], std::int64_t first) const {
    const Chunk<Input> chunk = load_chunk(from, first, columns, aligned);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to[i] = widen(chunk.elements[i]);
  }

  // body(first column, values) of each of this thread's chunks; what it does to kept values stays.
  template <typename Body>
  __device__ __forceinline__ void each_chunk(Body body) {
    if constexpr (kKept) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) body(first_of(i), values[i]);
    } else {
      for (std::int64_t first = first_of(0); first < columns; first += kThreads * kWidth) {
        read(values[0], first);
        body(first, values[0]);
      }
    }
  }

  // body(value, column) of each of this thread's elements.
  template <typename Body>
  __device__ __forceinline__ void each(Body body) {
    each_chunk([&](std::int64_t first, Real(&chunk)[kWidth]) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (first + i < columns) body(chunk[i], first + i);
      }
    });
  }
};

template <typename Real>
__device__ __forceinline__ Real inside_of_label(Real value, Real label) {
  // sigmoid(value) - label, with every digit of a small difference
  const Real e = exp(-fabs(value));
  const Real small = e / (1 + e), large = 1 / (1 + e);
  return value < 0 ? (1 - label) * small - label * large : (1 - label) * large - label * small;
}

template <typename Input, int kThreads, int kChunks>
__global__ void __launch_bounds__(
    Group<kThreads>::kBlock, sizeof(Input) == 8 ? 1 : 512 / Group<kThreads>::kBlock)
    logit_gradient_kernel(LogitGradientArguments a, std::int64_t rows, bool aligned) {
  using Threads = Group<kThreads>;
  using OneRow = Row<Input, kThreads, kChunks>;
  using Real = typename OneRow::Real;
  const std::int64_t wanted = Threads::row();
  const std::int64_t r = wanted < rows ? wanted : rows - 1;
  OneRow row(static_cast<const Input*>(a.logits) + r * a.row_stride, a.classes, aligned);

  Largest<Real> largest = Largest<Real>::none();
  row.each([&](Real& value, std::int64_t c) { largest = Largest<Real>::of(largest, {value, c}); });
  largest = Threads::reduce(largest, Largest<Real>::of);
  const Real maximum = largest.value;
  const std::int64_t argmax = largest.index;

  const bool softmax = a.objective == Objective::energy || a.objective == Objective::uniform ||
                       a.objective == Objective::predicted;
  const Real inverse_temperature = static_cast<Real>(1 / a.temperature);
  const auto exponential = [&](Real value) { return exp((value - maximum) * inverse_temperature); };
  Real tail = 0;  // the sum without the maximum's own 1, so that 1 - p_max keeps its digits
  if (softmax || a.energy != nullptr || a.log_sum_exp != nullptr) {
    row.each([&](Real& value, std::int64_t c) {
      const Real e = exponential(value);
      if (c != argmax) tail += e;
      if (softmax) value = e;
    });
    tail = Threads::sum(tail);
  }
  const Real top = exponential(maximum);  // 1, or NaN where the maximum is infinite
  const Real total = top + tail;

  Real scale = 0, shift = 0;
  switch (a.objective) {
    case Objective::energy:
      scale = -1 / total;
      break;
    case Objective::uniform:
      scale = static_cast<Real>(a.classes) * inverse_temperature / total;
      shift = -inverse_temperature;
      break;
    case Objective::predicted:
      scale = inverse_temperature / total;
      break;
    case Objective::confounding:
    case Objective::max_logit:
      scale = 1;
      break;
    case Objective::logit_sum:
      shift = 1;
      break;
  }
  const Real* label = static_cast<const Real*>(a.target);
  // What `value` was made by now into the u of its class.
  const auto to_u = [&](Real value, std::int64_t c) -> Real {
    switch (a.objective) {
      case Objective::energy:
      case Objective::uniform:
        return OneRow::kKept ? value : exponential(value);
      case Objective::predicted:
        if (c == argmax) return -tail;
        return OneRow::kKept ? value : exponential(value);
      case Objective::confounding:
        return inside_of_label(value, label != nullptr ? label[c] : Real(1));
      case Objective::max_logit:
        return c == argmax ? Real(1) : Real(0);
      case Objective::logit_sum:
        return 0;
    }
    return 0;
  };
  if constexpr (OneRow::kKept)
    row.each([&](Real& value, std::int64_t c) { value = to_u(value, c) * scale + shift; });
  const auto delta = [&](Real value, std::int64_t c) {
    return OneRow::kKept ? value : to_u(value, c) * scale + shift;
  };

  if (a.delta != nullptr && wanted < rows) {
    Real* to = static_cast<Real*>(a.delta) + r * a.classes;
    const bool to_aligned = rows_aligned<Real>(a.delta, a.classes);
    row.each_chunk([&](std::int64_t first, Real(&chunk)[OneRow::kWidth]) {
      if constexpr (!OneRow::kKept) {
#pragma unroll
        for (int i = 0; i < OneRow::kWidth; ++i) {
          if (first + i < a.classes) chunk[i] = delta(chunk[i], first + i);
        }
      }
      store_chunk(to, first, a.classes, chunk, to_aligned);
    });
  }
  void* const l1 = a.norm[static_cast<int>(Norm::l1)];
  void* const l2 = a.norm[static_cast<int>(Norm::l2)];
  void* const linf = a.norm[static_cast<int>(Norm::linf)];
  Real sum = 0, most = 0;
  if (l1 != nullptr || l2 != nullptr || linf != nullptr) {
    row.each([&](Real& value, std::int64_t c) {
      const Real magnitude = fabs(delta(value, c));
      sum += magnitude;
      most = magnitude > most ? magnitude : most;
    });
    sum = Threads::sum(sum);
    most = Threads::maximum(most);
    if (sum != sum) most = sum;
  }
  Real length = most;
  if (l2 != nullptr && most > 0) {  // the same on the whole group, as barriers need
    Real squares = 0;               // of delta / most: no overflow, no underflow
    row.each([&](Real& value, std::int64_t c) {
      const Real d = delta(value, c) / most;
      squares += d * d;
    });
    length = most * sqrt(Threads::sum(squares));
  }

  if (Threads::thread() != 0 || wanted >= rows) return;
  if (l1 != nullptr) static_cast<Real*>(l1)[r] = sum;
  if (l2 != nullptr) static_cast<Real*>(l2)[r] = length;
  if (linf != nullptr) static_cast<Real*>(linf)[r] = most;
  if (a.maximum != nullptr) static_cast<Real*>(a.maximum)[r] = maximum;
  if (a.argmax != nullptr) a.argmax[r] = argmax;
  const double highest = static_cast<double>(maximum) / a.temperature;
  const bool infinite = maximum == maximum && maximum - maximum != 0;
  const double log_sum_exp = infinite ? highest : highest + log1p(static_cast<double>(tail));
  if (a.log_sum_exp != nullptr)
    static_cast<Real*>(a.log_sum_exp)[r] = static_cast<Real>(log_sum_exp);
  if (a.energy != nullptr)
    static_cast<Real*>(a.energy)[r] = static_cast<Real>(-a.temperature * log_sum_exp);
}

}  // namespace grood_fast::cuda
