// logit_gradient against the formulas of grood_fast/ops/reference.py, summed in long double.
#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <thread>

#include "support.h"

namespace grood_fast::tests {
namespace {

constexpr Objective kEveryObjective[] = {Objective::energy,    Objective::uniform,
                                         Objective::predicted, Objective::confounding,
                                         Objective::max_logit, Objective::logit_sum};

class Scratch {
 public:
  explicit Scratch(std::int64_t classes)
      : memory_(::operator new(logit_gradient_scratch_bytes(classes), kAlignment)) {}
  ~Scratch() { ::operator delete(memory_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return memory_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* memory_;
};

struct Norms {
  long double l1 = 0, l2 = 0, linf = 0;

  explicit Norms(const std::vector<long double>& values) {
    long double squares = 0;
    for (const long double value : values) {
      l1 += std::fabs(value);
      squares += value * value;
      linf = std::max(linf, std::fabs(value));
    }
    l2 = std::sqrt(squares);
    if (std::isnan(l1)) linf = l1;
  }
  long double operator[](int norm) const { return norm == 0 ? l1 : norm == 1 ? l2 : linf; }
};

// What one row must give. `magnitude` is what an element of delta may be wrong by, in roundings:
// the sizes of what was added up to give it, and an exponential's share for the size of its
// exponent.
struct Expected {
  long double maximum, log_sum_exp;
  std::int64_t argmax = 0;
  std::vector<long double> delta, magnitude;

  Expected(
      const std::vector<double>& f, Objective objective, long double temperature,
      const std::vector<double>& y) {
    const std::int64_t classes = static_cast<std::int64_t>(f.size());
    for (std::int64_t c = 1; c < classes && !std::isnan(f[argmax]); ++c) {
      if (std::isnan(f[c]) || f[c] > f[argmax]) argmax = c;
    }
    maximum = f[argmax];
    std::vector<long double> exponential, size;
    long double total = 0, others = 0, size_of_others = 0;
    for (std::int64_t c = 0; c < classes; ++c) {
      const long double exponent = (f[c] - maximum) / temperature;
      exponential.push_back(std::exp(exponent));
      size.push_back(exponential[c] * (1 + exponent_size(exponent)));
      total += exponential[c];
      if (c == argmax) continue;
      others += exponential[c];
      size_of_others += size[c];
    }
    log_sum_exp = std::isinf(maximum) ? maximum : maximum / temperature + std::log(total);
    for (std::int64_t c = 0; c < classes; ++c) {
      const long double p = exponential[c] / total, p_size = size[c] / total;
      switch (objective) {
        case Objective::energy:
          add(-p, p_size);
          break;
        case Objective::uniform:
          add((classes * p - 1) / temperature, (classes * p_size + 1) / temperature);
          break;
        case Objective::predicted:
          if (c == argmax &&
              !std::isnan(total)) {  // 1 - p is the others' sum, without cancellation
            add(-others / total / temperature, size_of_others / total / temperature);
          } else {
            add(p / temperature, p_size / temperature);
          }
          break;
        case Objective::confounding: {
          const long double x = f[c], s = 1 / (1 + std::exp(-x)), rest = 1 / (1 + std::exp(x));
          add((1 - y[c]) * s - y[c] * rest,
              (1 - y[c]) * s + y[c] * rest + s * rest * exponent_size(x));
          break;
        }
        case Objective::max_logit:
          add(c == argmax ? 1 : 0, 1);
          break;
        case Objective::logit_sum:
          add(1, 1);
          break;
      }
    }
  }

 private:
  static long double exponent_size(long double exponent) {
    return std::fmin(std::fabs(exponent), 1000.0L);
  }
  void add(long double value, long double size) {
    delta.push_back(value);
    magnitude.push_back(size);
  }
};

template <typename Format>
struct Call {
  using Real = typename Format::Real;
  static constexpr Real kUntouched = -12345;

  // `target`: of the confounding objective; empty for all ones.
  Call(
      const Matrix<Format>& logits, Objective objective, double temperature,
      const std::vector<Real>& target = {})
      : logits(logits),
        objective(objective),
        temperature(temperature),
        target(target),
        scratch(logits.columns) {
    arguments.logits = logits.elements.data();
    arguments.dtype = Format::kDType;
    arguments.classes = logits.columns;
    arguments.row_stride = logits.stride;
    arguments.objective = objective;
    arguments.temperature = temperature;
    arguments.target = target.empty() ? nullptr : this->target.data();
    arguments.scratch = scratch.get();
    for (std::vector<Real>* values :
         {&energy, &log_sum_exp, &maximum, &norm[0], &norm[1], &norm[2]}) {
      values->assign(logits.rows, kUntouched);
    }
    argmax.assign(logits.rows, -1);
    delta.assign(logits.rows * logits.columns, kUntouched);
    arguments.energy = energy.data();
    arguments.log_sum_exp = log_sum_exp.data();
    arguments.maximum = maximum.data();
    arguments.argmax = argmax.data();
    for (int n = 0; n < kNorms; ++n) arguments.norm[n] = norm[n].data();
    arguments.delta = delta.data();
  }

  Call& all() { return range(0, logits.rows); }
  Call& range(std::int64_t begin, std::int64_t end) {
    logit_gradient(arguments, begin, end);
    return *this;
  }

  void expect_rows(std::int64_t begin, std::int64_t end) const {
    SCOPED_TRACE(
        testing::Message() << "objective " << static_cast<int>(objective) << ", classes "
                           << logits.columns << ", temperature " << temperature);
    constexpr double kSlack = kTolerance<Real>;
    const long double tiny = std::numeric_limits<Real>::min() / temperature * logits.columns;
    const std::vector<double> label = target.empty()
                                          ? std::vector<double>(logits.columns, 1.0)
                                          : std::vector<double>(target.begin(), target.end());
    for (std::int64_t row = begin; row < end; ++row) {
      SCOPED_TRACE(testing::Message() << "row " << row);
      const Expected want(logits.row(row), objective, temperature, label);
      const Norms norms(want.delta), sizes(want.magnitude);
      expect_close(maximum[row], want.maximum, 0, "maximum");
      EXPECT_EQ(argmax[row], want.argmax);
      const long double size = std::fabs(want.maximum) / temperature + 1;
      expect_close(log_sum_exp[row], want.log_sum_exp, kSlack * size, "log_sum_exp");
      expect_close(
          energy[row], -temperature * want.log_sum_exp, kSlack * size * temperature, "energy");
      for (int n = 0; n < kNorms; ++n)
        expect_close(norm[n][row], norms[n], kSlack * sizes[n] + tiny, "norm");
      for (std::int64_t c = 0; c < logits.columns; ++c) {
        expect_close(
            delta[row * logits.columns + c], want.delta[c], kSlack * want.magnitude[c] + tiny,
            "delta");
      }
    }
  }

  const Matrix<Format>& logits;
  Objective objective;
  double temperature;
  std::vector<Real> target;
  Scratch scratch;
  LogitGradientArguments arguments{};
  std::vector<Real> energy, log_sum_exp, maximum, norm[kNorms], delta;
  std::vector<std::int64_t> argmax;
};

template <typename Format>
void expect_every_objective(const Matrix<Format>& logits, double temperature = 1) {
  for (const Objective objective : kEveryObjective) {
    Call<Format>(logits, objective, temperature).all().expect_rows(0, logits.rows);
  }
}

template <typename Format>
class LogitGradient : public testing::Test {};
TYPED_TEST_SUITE(LogitGradient, Formats, FormatNames);

// Sizes around every vector's width, the switch between the two layouts at 64, and a block's end.
TYPED_TEST(LogitGradient, EverySizeAndStride) {
  at_every_level([] {
    for (const std::int64_t classes :
         {1,  2,  3,  4,  5,  7,  8,  9,   10,  15,  16,  17,  31,   33,
          63, 64, 65, 66, 79, 80, 81, 127, 128, 129, 255, 256, 1027, 4999}) {
      const std::int64_t rows = classes < 200 ? 19 : 2;  // more than a group of the widest vectors
      expect_every_objective(Matrix<TypeParam>::random(rows, classes, classes % 4, 3, classes));
    }
  });
}

TYPED_TEST(LogitGradient, Temperatures) {
  at_every_level([] {
    for (const double temperature : {0.05, 0.5, 2.0, 1000.0}) {
      expect_every_objective(Matrix<TypeParam>::random(5, 10, 1, 4, 1), temperature);
      expect_every_objective(Matrix<TypeParam>::random(5, 100, 1, 4, 2), temperature);
    }
  });
}

// p of the smaller of two logits: where an error of the exponential is not drowned by others.
TYPED_TEST(LogitGradient, ExponentialsAreAccurate) {
  static constexpr double kEpsilon = std::numeric_limits<typename TypeParam::Real>::epsilon();
  static constexpr std::int64_t kRows = 4000;
  at_every_level([] {
    Matrix<TypeParam> logits(kRows, 2, 0);
    for (std::int64_t row = 0; row < kRows; ++row) {
      logits.set(row, 0, 0);
      logits.set(row, 1, -0.02 * row);
    }
    Call<TypeParam> call(logits, Objective::energy, 1);
    call.all();
    for (std::int64_t row = 0; row < kRows; ++row) {
      const long double distance = -static_cast<long double>(logits.at(row, 1));
      const long double want = -1 / (1 + std::exp(distance));
      const long double slack = 3 * kEpsilon * (1 + distance) * -want;
      expect_close(call.delta[2 * row + 1], want, slack, "delta");
    }
  });
}

TYPED_TEST(LogitGradient, ConfoundingTargets) {
  at_every_level([] {
    for (const std::int64_t classes : {1, 10, 64, 65, 100}) {
      std::vector<typename TypeParam::Real> target(classes);
      for (std::int64_t c = 0; c < classes; ++c) target[c] = c % 3 == 0 ? 1 : c % 3 == 1 ? 0 : 0.25;
      const auto logits = Matrix<TypeParam>::random(17, classes, 2, 5, classes);
      Call<TypeParam>(logits, Objective::confounding, 1, target).all().expect_rows(0, 17);
    }
  });
}

// One class of a row is special, each in turn: in every lane, in the tail, among ordinary rows.
TYPED_TEST(LogitGradient, NonFiniteAndHugeLogitsInEveryPlace) {
  at_every_level([] {
    for (const std::int64_t classes : {1, 2, 10, 67}) {
      for (const double value : {kNaN, kInfinity, -kInfinity, 1e4, -1e4, 60000.0, -60000.0}) {
        auto logits = Matrix<TypeParam>::random(classes, classes, 1, 2, 1);
        for (std::int64_t row = 0; row < classes; row += 2) logits.set(row, row, value);
        expect_every_objective(logits);
      }
    }
  });
}

TYPED_TEST(LogitGradient, RowsOfOneValue) {
  at_every_level([] {
    for (const std::int64_t classes : {1, 2, 10, 67}) {
      Matrix<TypeParam> logits(7, classes, 1);
      const double values[] = {0.0, kNaN, kInfinity, -kInfinity, 1e4, -1e4, 3.0};
      for (std::int64_t row = 0; row < 7; ++row) {
        for (std::int64_t c = 0; c < classes; ++c) logits.set(row, c, values[row]);
      }
      expect_every_objective(logits);
    }
  });
}

TYPED_TEST(LogitGradient, TwoSpecialValuesInOneRow) {
  const double values[] = {kNaN, kInfinity, -kInfinity, 1e4, 0.0};
  at_every_level([&] {
    for (const std::int64_t classes : {2, 10, 67}) {
      Matrix<TypeParam> logits = Matrix<TypeParam>::random(25, classes, 0, 1, 1);
      for (int row = 0; row < 25; ++row) {
        logits.set(row, 0, values[row / 5]);
        logits.set(row, classes - 1, values[row % 5]);
      }
      expect_every_objective(logits);
    }
  });
}

// A confident row: 1 - p_max is far below the precision of p_max.
TYPED_TEST(LogitGradient, ConfidentRowsKeepTheirDigits) {
  at_every_level([] {
    for (const std::int64_t classes : {2, 10, 67}) {
      Matrix<TypeParam> logits(8, classes, 0);
      for (std::int64_t row = 0; row < 8; ++row) {
        for (std::int64_t c = 0; c < classes; ++c)
          logits.set(row, c, c == row % classes ? 8.0 * row : 0.0);
      }
      expect_every_objective(logits);
    }
  });
}

TYPED_TEST(LogitGradient, TheFirstOfEqualMaximaWins) {
  at_every_level([] {
    for (const std::int64_t classes : {9, 130}) {
      for (std::int64_t first = 0; first < classes; ++first) {
        Matrix<TypeParam> logits(1, classes, 0);
        for (std::int64_t c = 0; c < classes; ++c)
          logits.set(0, c, c < first ? -1 : (c - first) % 3 == 0 ? 2 : 1);
        ASSERT_EQ(Call<TypeParam>(logits, Objective::predicted, 1).all().argmax[0], first);
      }
    }
  });
}

TYPED_TEST(LogitGradient, NoRows) {
  at_every_level([] {
    for (const std::int64_t classes : {1, 10, 67}) {
      Call<TypeParam>(Matrix<TypeParam>(0, classes, 0), Objective::energy, 1).all();
    }
  });
}

TYPED_TEST(LogitGradient, TouchesTheGivenRowsOnly) {
  using Real = typename TypeParam::Real;
  at_every_level([] {
    for (const std::int64_t classes : {10, 67}) {
      const auto logits = Matrix<TypeParam>::random(40, classes, 3, 2, 1);
      for (const auto& [begin, end] : {std::pair{0, 1}, {3, 3}, {7, 31}, {39, 40}}) {
        Call<TypeParam> call(logits, Objective::uniform, 1);
        call.range(begin, end).expect_rows(begin, end);
        for (std::int64_t row = 0; row < 40; ++row) {
          if (row >= begin && row < end) continue;
          for (const std::vector<Real>* values :
               {&call.energy, &call.log_sum_exp, &call.maximum, &call.norm[0], &call.norm[1],
                &call.norm[2]}) {
            EXPECT_EQ((*values)[row], call.kUntouched);
          }
          EXPECT_EQ(call.argmax[row], -1);
          for (std::int64_t c = 0; c < classes; ++c)
            EXPECT_EQ(call.delta[row * classes + c], call.kUntouched);
        }
      }
    }
  });
}

// Each output alone has the bits it has among all the others.
TYPED_TEST(LogitGradient, EachOutputAlone) {
  using Real = typename TypeParam::Real;
  at_every_level([] {
    for (const std::int64_t classes : {10, 67}) {
      auto logits = Matrix<TypeParam>::random(11, classes, 1, 2, 1);
      logits.set(4, 1, kNaN);
      for (const Objective objective : kEveryObjective) {
        SCOPED_TRACE(
            testing::Message() << "objective " << static_cast<int>(objective) << ", classes "
                               << classes);
        Call<TypeParam> together(logits, objective, 1);
        together.all();
        const auto expect_alone = [&](auto keep, auto output_of) {
          Call<TypeParam> alone(logits, objective, 1);
          const LogitGradientArguments everything = alone.arguments;
          LogitGradientArguments& only = alone.arguments;
          only.energy = only.log_sum_exp = only.maximum = only.delta = nullptr;
          only.argmax = nullptr;
          for (void*& norm : only.norm) norm = nullptr;
          keep(only, everything);
          alone.all();
          const auto& got = output_of(alone);
          const auto& want = output_of(together);
          for (std::size_t i = 0; i < want.size(); ++i) {
            expect_close(got[i], want[i], std::fabs(want[i]) * kTolerance<Real>, "alone");
          }
        };
        using Arguments = LogitGradientArguments;
        using This = Call<TypeParam>;
        expect_alone(
            [](Arguments& to, const Arguments& from) { to.energy = from.energy; },
            [](This& call) -> auto& { return call.energy; });
        expect_alone(
            [](Arguments& to, const Arguments& from) { to.log_sum_exp = from.log_sum_exp; },
            [](This& call) -> auto& { return call.log_sum_exp; });
        expect_alone(
            [](Arguments& to, const Arguments& from) { to.maximum = from.maximum; },
            [](This& call) -> auto& { return call.maximum; });
        expect_alone(
            [](Arguments& to, const Arguments& from) { to.argmax = from.argmax; },
            [](This& call) -> auto& { return call.argmax; });
        expect_alone(
            [](Arguments& to, const Arguments& from) { to.delta = from.delta; },
            [](This& call) -> auto& { return call.delta; });
        for (int n = 0; n < kNorms; ++n) {
          expect_alone(
              [n](Arguments& to, const Arguments& from) { to.norm[n] = from.norm[n]; },
              [n](This& call) -> auto& { return call.norm[n]; });
        }
      }
    }
  });
}

// All 65,536 values of the 16-bit formats (and as many floats) come through unchanged, in both
// layouts.
TYPED_TEST(LogitGradient, WidensEveryValueExactly) {
  at_every_level([] {
    for (const std::int64_t classes : {1, 67}) {
      Matrix<TypeParam> logits(65536, classes, 0);
      for (std::int64_t row = 0; row < logits.rows; ++row) {
        std::fill_n(
            &logits.elements[row * classes], classes,
            static_cast<typename TypeParam::Element>(row));
      }
      Call<TypeParam> call(logits, Objective::logit_sum, 1);
      call.all();
      for (std::int64_t row = 0; row < logits.rows; ++row) {
        const double want = logits.at(row, 0);
        ASSERT_TRUE(
            call.maximum[row] == want || (std::isnan(want) && std::isnan(call.maximum[row])))
            << row;
      }
    }
  });
}

// As the ops call it: threads take ranges of rows, while another one changes the level.
TEST(LogitGradientThreads, DisjointRangesAndAChangingLevel) {
  const auto logits = Matrix<Float32>::random(256, 100, 0, 2, 1);
  Call<Float32> call(logits, Objective::uniform, 1);
  const std::string before = simd_level();
  std::vector<std::thread> threads;
  for (int part = 0; part < 4; ++part) {
    threads.emplace_back([&, part] {
      const Scratch scratch(logits.columns);
      LogitGradientArguments mine = call.arguments;
      mine.scratch = scratch.get();
      for (int row = 64 * part; row < 64 * (part + 1); ++row) logit_gradient(mine, row, row + 1);
    });
  }
  for (int i = 0; i < 100; ++i) set_simd_level(kSimdLevels[i % 3]);
  for (std::thread& thread : threads) thread.join();
  set_simd_level(before.c_str());
  call.expect_rows(0, 256);
}

TEST(RowsPerTask, AtLeastOneAndFewerForLongerRows) {
  EXPECT_EQ(rows_per_task(100000, 100000), 1);
  EXPECT_GT(rows_per_task(10, 0), rows_per_task(1000, 0));
  EXPECT_GT(rows_per_task(10, 0), rows_per_task(10, 2048));
}

}  // namespace
}  // namespace grood_fast::tests
