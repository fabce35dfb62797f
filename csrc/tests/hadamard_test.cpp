// hadamard against products in long double.
#include <algorithm>

#include "support.h"

namespace grood_fast::tests {
namespace {

// Room at both ends of what is multiplied, to see that it is left alone.
constexpr std::int64_t kMargin = 3;

template <typename Format>
class Hadamard : public testing::Test {
 protected:
  using Real = typename Format::Real;

  static std::vector<Real> numbers(std::int64_t count, unsigned seed) {
    return Matrix<Format>::random(1, count, 0, 2, seed).elements;
  }

  static void multiply(
      std::vector<Real>& values, const std::vector<Real>& factors, double shift, std::int64_t begin,
      std::int64_t end) {
    hadamard({values.data(), factors.data(), shift, Format::kDType}, begin, end);
  }

  // Multiplies [begin, end) and looks at every element.
  static void expect_products(
      const std::vector<Real>& before, const std::vector<Real>& factors, double shift,
      std::int64_t begin, std::int64_t end) {
    SCOPED_TRACE(
        testing::Message() << "[" << begin << ", " << end << ") of " << before.size() << ", shift "
                           << shift);
    std::vector<Real> values = before;
    multiply(values, factors, shift, begin, end);
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(values.size()); ++i) {
      const long double value = before[i], factor = factors[i], added = shift;
      if (i < begin || i >= end) {
        expect_close(values[i], value, 0, "outside the range");
        continue;
      }
      // The shift, the sum and the product are each rounded.
      const long double slack = 2 * std::fabs(value) * (std::fabs(factor) + std::fabs(added)) *
                                    std::numeric_limits<Real>::epsilon() +
                                std::numeric_limits<Real>::denorm_min();
      expect_close(values[i], value * (factor + added), slack, "product");
    }
  }
};
using Reals = testing::Types<Float32, Float64>;
TYPED_TEST_SUITE(Hadamard, Reals, FormatNames);

TYPED_TEST(Hadamard, EveryCountAndShift) {
  at_every_level([] {
    for (std::int64_t count = 0; count <= 70; ++count) {
      const std::int64_t all = count + 2 * kMargin;
      const auto values = TestFixture::numbers(all, 2 * count);
      const auto factors = TestFixture::numbers(all, 2 * count + 1);
      for (const double shift : {0.0, 1.0, -0.1, 1e10}) {
        TestFixture::expect_products(values, factors, shift, kMargin, kMargin + count);
      }
    }
  });
}

TYPED_TEST(Hadamard, TouchesTheGivenRangeOnly) {
  const auto values = TestFixture::numbers(41, 1), factors = TestFixture::numbers(41, 2);
  at_every_level([&] {
    for (std::int64_t begin = 0; begin <= 41; ++begin) {
      for (std::int64_t end = begin; end <= 41; ++end) {
        TestFixture::expect_products(values, factors, 1, begin, end);
      }
    }
  });
}

// Where a range is cut decides which elements are whole vectors, and must not decide the result.
TYPED_TEST(Hadamard, PiecesMakeTheWholeAtEveryLevelBitForBit) {
  const auto start = TestFixture::numbers(1003, 3), factors = TestFixture::numbers(1003, 4);
  auto whole = start;
  TestFixture::multiply(whole, factors, 0.3, 0, 1003);
  at_every_level([&] {
    for (const std::int64_t step : {1, 7, 16, 500, 1003}) {
      auto pieces = start;
      for (std::int64_t begin = 0; begin < 1003; begin += step) {
        TestFixture::multiply(
            pieces, factors, 0.3, begin, std::min<std::int64_t>(begin + step, 1003));
      }
      EXPECT_EQ(pieces, whole) << "in steps of " << step;
    }
  });
}

TYPED_TEST(Hadamard, NonFiniteAndExtremeValuesInEveryPlace) {
  using Real = typename TestFixture::Real;
  using Limits = std::numeric_limits<Real>;
  const Real values[] = {Real(kNaN),    Real(kInfinity),      -Real(kInfinity), Limits::max(),
                         Limits::min(), Limits::denorm_min(), Real(0)};
  at_every_level([&] {
    for (const Real value : values) {
      for (std::int64_t place = 0; place < 37; ++place) {
        for (const bool in_factors : {false, true}) {
          auto left = TestFixture::numbers(37, 5), right = TestFixture::numbers(37, 6);
          (in_factors ? right : left)[place] = value;
          auto got = left;
          TestFixture::multiply(got, right, 0, 0, 37);
          for (std::int64_t i = 0; i < 37; ++i) {
            const Real expected = left[i] * right[i];
            EXPECT_TRUE(std::isnan(expected) ? std::isnan(got[i]) : got[i] == expected)
                << got[i] << " is not " << expected << " at " << i;
          }
        }
      }
    }
  });
}

TYPED_TEST(Hadamard, ZeroTimesInfinityIsNotANumber) {
  using Real = typename TestFixture::Real;
  at_every_level([] {
    for (const std::int64_t count : {1, 37}) {
      std::vector<Real> values(count, Real(0)), factors(count, Real(kInfinity));
      TestFixture::multiply(values, factors, 1, 0, count);
      for (const Real value : values) EXPECT_TRUE(std::isnan(value)) << value;
    }
  });
}

}  // namespace
}  // namespace grood_fast::tests
