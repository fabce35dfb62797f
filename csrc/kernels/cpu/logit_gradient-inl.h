// delta = d objective / d logits of each row, its norms, and the row's energy, in one read.
//
// Rows are worked on in groups held in `u`, an array of vectors. With few classes a group is as
// many rows as a vector has lanes, u[i] holding class i of each; with many it is one row, u[i]
// holding kLanes of its classes. Whatever the objective, in the end delta = scale * u + shift.
#pragma once

#include "simd-inl.h"

namespace grood_fast::GROOD_FAST_LEVEL {

// One row in plain double precision: for rows with NaN or infinities, and where float underflows.
template <typename Input>
void logit_gradient_row(const LogitGradientArguments& a, std::int64_t row) {
  using Real = typename RealOf<Input>::type;
  const Input* f = static_cast<const Input*>(a.logits) + row * a.row_stride;
  const Real* target = static_cast<const Real*>(a.target);
  const std::int64_t classes = a.classes;

  double maximum = widen(f[0]);  // the first NaN, if there is one
  std::int64_t argmax = 0;
  for (std::int64_t c = 1; c < classes && maximum == maximum; ++c) {
    const double value = widen(f[c]);
    if (value > maximum || value != value) {
      maximum = value;
      argmax = c;
    }
  }
  const auto exponential = [&](std::int64_t c) {
    return std::exp((widen(f[c]) - maximum) / a.temperature);
  };
  double tail = 0;  // the sum without the maximum's own 1, so that 1 - p_max keeps its digits
  for (std::int64_t c = 0; c < classes; ++c) {
    if (c != argmax) tail += exponential(c);
  }
  const double top = exponential(argmax);  // 1, or NaN where the maximum is infinite
  const double total = top + tail;
  const double log_sum_exp = __builtin_isinf(maximum)
                                 ? maximum / a.temperature
                                 : maximum / a.temperature + std::log1p(total - 1);

  const auto delta = [&](std::int64_t c) -> double {
    switch (a.objective) {
      case Objective::energy:
        return -exponential(c) / total;
      case Objective::uniform:
        return (static_cast<double>(classes) * exponential(c) / total - 1) / a.temperature;
      case Objective::predicted:
        return (c == argmax ? -tail / total + (top - top) : exponential(c) / total) / a.temperature;
      case Objective::confounding: {
        const double value = widen(f[c]);
        const double y = target != nullptr ? static_cast<double>(target[c]) : 1.0;
        const double e = std::exp(-std::fabs(value));
        const double inside = 1 / (1 + e), outside = e / (1 + e);
        return value < 0 ? (1 - y) * outside - y * inside : (1 - y) * inside - y * outside;
      }
      case Objective::max_logit:
        return c == argmax ? 1.0 : 0.0;
      case Objective::logit_sum:
        return 1.0;
    }
    return 0.0;
  };

  if (a.energy != nullptr)
    static_cast<Real*>(a.energy)[row] = static_cast<Real>(-a.temperature * log_sum_exp);
  if (a.log_sum_exp != nullptr)
    static_cast<Real*>(a.log_sum_exp)[row] = static_cast<Real>(log_sum_exp);
  if (a.maximum != nullptr) static_cast<Real*>(a.maximum)[row] = static_cast<Real>(maximum);
  if (a.argmax != nullptr) a.argmax[row] = argmax;
  double sum = 0, largest = 0;
  for (std::int64_t c = 0; c < classes; ++c) {
    const double value = std::fabs(delta(c));
    sum += value;
    if (value > largest || value != value) largest = value;
    if (a.delta != nullptr)
      static_cast<Real*>(a.delta)[row * classes + c] = static_cast<Real>(delta(c));
  }
  if (sum != sum) largest = sum;
  double squares = 0;  // of delta / largest: no overflow, no underflow
  for (std::int64_t c = 0; c < classes && largest > 0; ++c) {
    const double value = delta(c) / largest;
    squares += value * value;
  }
  const double norms[kNorms] = {sum, largest > 0 ? largest * std::sqrt(squares) : largest, largest};
  for (int n = 0; n < kNorms; ++n) {
    if (a.norm[n] != nullptr) static_cast<Real*>(a.norm[n])[row] = static_cast<Real>(norms[n]);
  }
}

template <typename Input, bool kRowsAcrossLanes>
struct LogitGradient {
  using Real = typename RealOf<Input>::type;
  using S = Simd<Real>;
  using V = typename S::V;
  using I = typename S::I;
  static constexpr std::int64_t kLanes = S::kLanes;

  const LogitGradientArguments& a;
  std::int64_t row;    // first row of the group
  std::int64_t count;  // rows in it
  std::int64_t vectors;
  V* u;
  V* target;  // confounding label, laid out as u is
  V in_row;   // 1 in the last vector's lanes that are classes, 0 in its padding

  explicit LogitGradient(const LogitGradientArguments& arguments) : a(arguments), row(0), count(1) {
    vectors = kRowsAcrossLanes ? a.classes : (a.classes + kLanes - 1) / kLanes;
    u = static_cast<V*>(a.scratch);
    target = u + vectors;
    in_row = S::all(1);
    if (!kRowsAcrossLanes) {
      for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        in_row[lane] = (vectors - 1) * kLanes + lane < a.classes ? Real(1) : Real(0);
      }
    }
    const Real* label = static_cast<const Real*>(a.target);
    for (std::int64_t i = 0; i < vectors && a.objective == Objective::confounding; ++i) {
      target[i] = S::all(1);
      for (std::int64_t lane = 0; lane < kLanes && label != nullptr; ++lane) {
        const std::int64_t c = kRowsAcrossLanes ? i : i * kLanes + lane;
        target[i][lane] = c < a.classes ? label[c] : Real(0);
      }
    }
  }

  void run(std::int64_t begin, std::int64_t end) {
    const std::int64_t step = kRowsAcrossLanes ? kLanes : 1;
    for (row = begin; row < end; row += step) {
      count = row + step <= end ? step : end - row;
      group();
    }
  }

  GROOD_FAST_INLINE const Input* logits(std::int64_t r) const {
    return static_cast<const Input*>(a.logits) + r * a.row_stride;
  }

  GROOD_FAST_INLINE void read() {
    if (kRowsAcrossLanes) {
      Real* flat = reinterpret_cast<Real*>(u);
      for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        const Input* f = logits(row + (lane < count ? lane : count - 1));
        for (std::int64_t c = 0; c < a.classes; ++c) flat[c * kLanes + lane] = widen(f[c]);
      }
      return;
    }
    const Input* f = logits(row);
    const std::int64_t whole = a.classes / kLanes;
    for (std::int64_t i = 0; i < whole; ++i) u[i] = load_wide(f + i * kLanes);
    if (whole < vectors) {
      V last = S::all(Constants<Real>::kLowest);
      for (std::int64_t c = whole * kLanes; c < a.classes; ++c)
        last[c - whole * kLanes] = widen(f[c]);
      u[whole] = last;
    }
  }

  // Per-row results of a group: lanes are rows already, or lanes of one row have to be joined.
  GROOD_FAST_INLINE V join_sum(V value) const {
    return kRowsAcrossLanes ? value : S::all(lanes_sum<Real>(value));
  }
  GROOD_FAST_INLINE V join_max(V value) const {
    return kRowsAcrossLanes ? value : S::all(lanes_max<Real>(value));
  }

  template <int kPartials = 4, typename F>
  GROOD_FAST_INLINE V row_sum(F term) const {
    return join_sum(sum_of<Real, kPartials>(vectors - 1, term) + term(vectors - 1) * in_row);
  }

  GROOD_FAST_INLINE void write(void* to, V value) const {
    if (to == nullptr) return;
    for (std::int64_t lane = 0; lane < count; ++lane)
      static_cast<Real*>(to)[row + lane] = value[lane];
  }

  GROOD_FAST_INLINE void first_index_of(V maximum, std::int64_t* argmax) const {
    I lane_index;
    for (std::int64_t lane = 0; lane < kLanes; ++lane)
      lane_index[lane] = kRowsAcrossLanes ? 0 : lane;
    constexpr std::int64_t kStep = kRowsAcrossLanes ? 1 : kLanes;
    I best = lane_index - lane_index + static_cast<typename S::Index>(a.classes);
    for (std::int64_t i = vectors - 1; i >= 0; --i) {  // backwards: the first one stays
      best = u[i] == maximum ? lane_index + static_cast<typename S::Index>(i * kStep) : best;
    }
    for (std::int64_t lane = 0; lane < kLanes; ++lane) argmax[lane] = best[lane];
    if (!kRowsAcrossLanes) {
      for (std::int64_t lane = 1; lane < kLanes; ++lane) {
        if (argmax[lane] < argmax[0]) argmax[0] = argmax[lane];
      }
    }
  }

  // Class `c` of the group's row `lane`, as a place in u.
  GROOD_FAST_INLINE Real& at(std::int64_t lane, std::int64_t c) {
    return reinterpret_cast<Real*>(u)[kRowsAcrossLanes ? c * kLanes + lane : c];
  }

  void group() {
    read();
    V* const u = this->u;  // or every store through it would have the members read again
    V maximum = S::all(Constants<Real>::kLowest), other_maximum = maximum;
    V finite{}, other_finite{};  // NaN as soon as a logit is not
    std::int64_t first = 0;
    for (; first + 2 <= vectors; first += 2) {
      maximum = S::max(u[first], maximum);
      other_maximum = S::max(u[first + 1], other_maximum);
      finite += u[first] * Real(0);
      other_finite += u[first + 1] * Real(0);
    }
    if (first < vectors) {
      maximum = S::max(u[first], maximum);
      finite += u[first] * Real(0);
    }
    maximum = join_max(S::max(maximum, other_maximum));
    finite += other_finite;
    // Rows left to logit_gradient_row. The others of the group are not: a row's results would
    // depend on its neighbours, and with them on the number of threads.
    bool hard[kLanes] = {};
    if (lanes_sum<Real>(finite) != Real(0)) {
      if (!kRowsAcrossLanes) return logit_gradient_row<Input>(a, row);
      for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        if (finite[lane] == Real(0)) continue;
        hard[lane] = true;
        maximum[lane] = 0;
        for (std::int64_t c = 0; c < a.classes; ++c) at(lane, c) = 0;
      }
    }

    const Real inverse_temperature = static_cast<Real>(1 / a.temperature);
    const bool softmax = a.objective == Objective::energy || a.objective == Objective::uniform ||
                         a.objective == Objective::predicted;
    const bool one_hot = a.objective == Objective::predicted || a.objective == Objective::max_logit;
    std::int64_t argmax[kLanes];
    if (one_hot || a.argmax != nullptr) first_index_of(maximum, argmax);

    V total{};  // sum of exp((f - max) / T)
    const Real base_two = static_cast<Real>(kLog2E / a.temperature);
    const auto exponential = [&](std::int64_t i) {
      return exp2_nonpositive<Real>(u[i] - maximum, base_two);
    };
    if (softmax) {
      total = row_sum<1>([&](std::int64_t i) { return u[i] = exponential(i); });
    } else if (a.energy != nullptr || a.log_sum_exp != nullptr) {
      total = row_sum<1>(exponential);
    }

    V scale{}, shift{};
    V tail = total - Real(1);
    switch (a.objective) {
      case Objective::energy:
        scale = Real(-1) / total;
        break;
      case Objective::uniform:
        scale = static_cast<Real>(a.classes) * inverse_temperature / total;
        shift = S::all(-inverse_temperature);
        break;
      case Objective::predicted:
        // 1 - p_max as the sum of the others: subtracting from 1 would lose every digit of it.
        for (std::int64_t lane = 0; lane < count_of_lanes(); ++lane) at(lane, argmax[lane]) = 0;
        tail = row_sum([&](std::int64_t i) { return u[i]; });
        total = tail + Real(1);
        for (std::int64_t lane = 0; lane < count_of_lanes(); ++lane)
          at(lane, argmax[lane]) = -tail[lane];
        scale = inverse_temperature / total;
        break;
      case Objective::confounding:
        for (std::int64_t i = 0; i < vectors; ++i) {
          u[i] = (Real(1) - target[i]) * sigmoid<Real>(u[i]) - target[i] * sigmoid<Real>(-u[i]);
        }
        scale = S::all(1);
        break;
      case Objective::max_logit:
        for (std::int64_t i = 0; i < vectors; ++i) u[i] = V{};
        for (std::int64_t lane = 0; lane < count_of_lanes(); ++lane) at(lane, argmax[lane]) = 1;
        scale = S::all(1);
        break;
      case Objective::logit_sum:
        shift = S::all(1);
        break;
    }

    const auto delta = [&](std::int64_t i) { return u[i] * scale + shift; };
    V squares{};
    if (a.norm[static_cast<int>(Norm::l2)] != nullptr) {
      squares = row_sum([&](std::int64_t i) { return delta(i) * delta(i); });
      for (std::int64_t lane = 0; lane < count; ++lane) {
        if (!(squares[lane] > Constants<Real>::kSmallSquare)) hard[lane] = true;
      }
    }
    if (a.norm[static_cast<int>(Norm::l1)] != nullptr) {
      write(a.norm[static_cast<int>(Norm::l1)], row_sum([&](std::int64_t i) {
              return S::abs(delta(i));
            }));
    }
    if (a.norm[static_cast<int>(Norm::linf)] != nullptr) {
      const V most = max_of<Real>(
          vectors - 1, S::abs(delta(vectors - 1)) * in_row,
          [&](std::int64_t i) { return S::abs(delta(i)); });
      write(a.norm[static_cast<int>(Norm::linf)], join_max(most));
    }
    write(a.maximum, maximum);
    for (std::int64_t lane = 0; lane < count; ++lane) {
      const std::int64_t r = row + lane;
      if (a.norm[static_cast<int>(Norm::l2)] != nullptr) {
        static_cast<Real*>(a.norm[static_cast<int>(Norm::l2)])[r] = std::sqrt(squares[lane]);
      }
      if (a.argmax != nullptr) a.argmax[r] = argmax[lane];
      if (a.energy != nullptr || a.log_sum_exp != nullptr) {
        const Real log_sum_exp = maximum[lane] * inverse_temperature + std::log1p(tail[lane]);
        if (a.log_sum_exp != nullptr) static_cast<Real*>(a.log_sum_exp)[r] = log_sum_exp;
        if (a.energy != nullptr) {
          static_cast<Real*>(a.energy)[r] = -static_cast<Real>(a.temperature) * log_sum_exp;
        }
      }
    }
    if (a.delta != nullptr) write_delta(delta);
    for (std::int64_t lane = 0; lane < count; ++lane) {
      if (hard[lane]) logit_gradient_row<Input>(a, row + lane);
    }
  }

  static constexpr std::int64_t count_of_lanes() { return kRowsAcrossLanes ? kLanes : 1; }

  template <typename F>
  GROOD_FAST_INLINE void write_delta(F delta) const {
    Real* to = static_cast<Real*>(a.delta) + row * a.classes;
    if (kRowsAcrossLanes) {
      for (std::int64_t c = 0; c < a.classes; ++c) {
        const V value = delta(c);
        for (std::int64_t lane = 0; lane < count; ++lane) to[lane * a.classes + c] = value[lane];
      }
      return;
    }
    const std::int64_t whole = a.classes / kLanes;
    for (std::int64_t i = 0; i < whole; ++i) S::store(to + i * kLanes, delta(i));
    for (std::int64_t c = whole * kLanes; c < a.classes; ++c)
      to[c] = delta(whole)[c - whole * kLanes];
  }
};

template <typename Input>
void logit_gradient_of(const LogitGradientArguments& a, std::int64_t begin, std::int64_t end) {
  if (a.classes <= kRowsAcrossLanesUpTo) {
    LogitGradient<Input, true>(a).run(begin, end);
  } else {
    LogitGradient<Input, false>(a).run(begin, end);
  }
}

void logit_gradient(const LogitGradientArguments& a, std::int64_t begin, std::int64_t end) {
  switch (a.dtype) {
    case DType::float32:
      return logit_gradient_of<float>(a, begin, end);
    case DType::float64:
      return logit_gradient_of<double>(a, begin, end);
    case DType::bfloat16:
      return logit_gradient_of<Bfloat16>(a, begin, end);
    case DType::float16:
      return logit_gradient_of<Float16>(a, begin, end);
  }
}

}  // namespace grood_fast::GROOD_FAST_LEVEL
