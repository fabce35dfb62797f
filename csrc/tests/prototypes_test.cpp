// subtract, prototype_gradient, nearest and short_circuit against sums in long double.
#include <algorithm>

#include "support.h"

namespace grood_fast::tests {
namespace {

template <typename Format>
class Prototypes : public testing::Test {
 protected:
  using Real = typename Format::Real;

  static std::vector<Real> numbers(std::int64_t count, unsigned seed) {
    return Matrix<Format>::random(1, count, 0, 1, seed).elements;
  }

  static long double length(const Real* a, const Real* b, std::int64_t count) {
    long double sum = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const long double difference = static_cast<long double>(a[i]) - (b == nullptr ? 0 : b[i]);
      sum += difference * difference;
    }
    return std::sqrt(sum);
  }

  static std::vector<Real> products(
      const std::vector<Real>& a, const std::vector<Real>& b, std::int64_t columns,
      std::int64_t stride) {
    const std::int64_t rows = a.size() / columns, others = b.size() / columns;
    std::vector<Real> result(rows * stride, Real(kNaN));  // padding is not to be believed
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t o = 0; o < others; ++o) {
        Real sum = 0;
        for (std::int64_t c = 0; c < columns; ++c) sum += a[r * columns + c] * b[o * columns + c];
        result[r * stride + o] = sum;
      }
    }
    return result;
  }

  static std::vector<Real> lengths(const std::vector<Real>& rows, std::int64_t columns) {
    std::vector<Real> result;
    for (std::size_t row = 0; row < rows.size(); row += columns)
      result.push_back(static_cast<Real>(length(&rows[row], nullptr, columns)));
    return result;
  }
};
using Reals = testing::Types<Float32, Float64>;
TYPED_TEST_SUITE(Prototypes, Reals, FormatNames);

TYPED_TEST(Prototypes, DifferencesAndTheirNorms) {
  using Real = typename TestFixture::Real;
  at_every_level([] {
    for (const std::int64_t columns : {1, 3, 16, 17, 70}) {
      const auto rows = Matrix<TypeParam>::random(5, columns, 2, 1, 1);
      const auto point = TestFixture::numbers(columns, 2);
      std::vector<Real> difference(5 * columns, Real(kNaN)), norm(5, Real(kNaN));
      subtract(
          {rows.elements.data(), TypeParam::kDType, columns, rows.stride, point.data(),
           TypeParam::kDType, difference.data(), norm.data()},
          0, 5);
      for (std::int64_t row = 0; row < 5; ++row) {
        for (std::int64_t c = 0; c < columns; ++c)
          EXPECT_EQ(difference[row * columns + c], static_cast<Real>(rows.at(row, c)) - point[c]);
        const long double expected =
            TestFixture::length(&difference[row * columns], nullptr, columns);
        expect_close(norm[row], expected, expected * kTolerance<Real>, "norm");
      }
    }
  });
}

TYPED_TEST(Prototypes, GradientOfEveryNumberOfClasses) {
  using Real = typename TestFixture::Real;
  constexpr std::int64_t kRows = 3, kColumns = 19, kPadding = 16;
  at_every_level([] {
    for (std::int64_t classes = 1; classes <= 40; ++classes) {
      for (const bool squared : {false, true}) {
        const std::int64_t stride = (classes + kPadding - 1) / kPadding * kPadding;
        const auto offsets = TestFixture::numbers(classes * kColumns, 3);
        auto x = TestFixture::numbers(kRows * kColumns, 4);
        // One row at a class prototype, one at the origin: products know nothing of either.
        std::copy_n(offsets.begin(), kColumns, x.begin());
        std::fill_n(x.begin() + kColumns, kColumns, Real(0));
        const auto before = x;
        auto offset_norm = TestFixture::lengths(offsets, kColumns);
        offset_norm.resize(stride, Real(kNaN));
        const auto norm = TestFixture::lengths(x, kColumns);
        auto products = TestFixture::products(x, offsets, kColumns, stride);
        std::vector<Real> log_weight(kRows, Real(kNaN));
        prototype_gradient(
            {x.data(), norm.data(), offsets.data(), offset_norm.data(), products.data(), stride,
             TypeParam::kDType, kColumns, classes, 2.0, 3.0, squared, log_weight.data()},
            0, kRows);
        for (std::int64_t row = 0; row < kRows; ++row) {
          const Real* h = &before[row * kColumns];
          const auto logit = [&](long double d) { return -(squared ? d * d : d) / 2; };
          const long double own = TestFixture::length(h, nullptr, kColumns);
          long double total = std::exp(logit(own));
          for (std::int64_t c = 0; c < classes; ++c)
            total += std::exp(logit(TestFixture::length(h, &offsets[c * kColumns], kColumns)));
          const long double weight = std::exp(logit(own)) / total;
          const long double slack = 64 * kTolerance<Real>;
          expect_close(log_weight[row], std::log(weight), slack, "log weight");
          for (std::int64_t i = 0; i < kColumns; ++i) {
            const long double direction = squared ? 2 * h[i] : own > 0 ? h[i] / own : 0;
            expect_close(
                x[row * kColumns + i], 3 * weight * direction / 2, slack * weight, "gradient");
          }
        }
      }
    }
  });
}

TYPED_TEST(Prototypes, NearestOfEveryWidth) {
  using Real = typename TestFixture::Real;
  constexpr std::int64_t kRows = 4, kColumns = 11;
  at_every_level([] {
    for (std::int64_t width = 1; width <= 300; width += width < 40 ? 1 : 37) {
      const auto bank = TestFixture::numbers(width * kColumns, 5);
      auto queries = TestFixture::numbers(kRows * kColumns, 6);
      // A row of the bank itself, and one with a difference that products cannot see.
      std::copy_n(bank.end() - kColumns, kColumns, queries.begin());
      std::copy_n(bank.begin(), kColumns, queries.begin() + kColumns);
      queries[kColumns] += std::numeric_limits<Real>::epsilon() * 64;
      const auto bank_norm = TestFixture::lengths(bank, kColumns);
      const auto norm = TestFixture::lengths(queries, kColumns);
      const auto products = TestFixture::products(queries, bank, kColumns, width);
      std::vector<Real> best(kRows, std::numeric_limits<Real>::infinity());
      best[3] = 0;  // what is as near already stays
      std::vector<std::int64_t> found(kRows, -1);
      found[3] = 77;
      nearest(
          {queries.data(), norm.data(), bank.data(), bank_norm.data(), products.data(),
           TypeParam::kDType, kColumns, width, 1000, kTolerance<Real>, best.data(), found.data()},
          0, kRows);
      for (std::int64_t row = 0; row < 3; ++row) {
        long double least = kInfinity;
        for (std::int64_t b = 0; b < width; ++b)
          least = std::min(
              least, TestFixture::length(&queries[row * kColumns], &bank[b * kColumns], kColumns));
        expect_close(best[row], least, least * kTolerance<Real>, "distance");
        const std::int64_t at = found[row] - 1000;
        ASSERT_TRUE(at >= 0 && at < width) << at;
        const long double there =
            TestFixture::length(&queries[row * kColumns], &bank[at * kColumns], kColumns);
        expect_close(best[row], there, there * kTolerance<Real>, "distance of the index");
      }
      EXPECT_EQ(best[3], Real(0));
      EXPECT_EQ(found[3], 77);
    }
  });
}

TYPED_TEST(Prototypes, ShortCircuitOfEveryNumberOfClasses) {
  constexpr std::int64_t kRows = 3, kColumns = 9, kRemoved = 4;
  at_every_level([] {
    for (std::int64_t classes = 1; classes <= 150; classes += classes < 40 ? 1 : 11) {
      const auto before = TestFixture::numbers(kRows * classes, 7);
      const auto features = TestFixture::numbers(kRows * kColumns, 8);
      const auto weight = TestFixture::numbers(kColumns * classes, 9);
      const std::vector<std::int64_t> removed = {0, 8, 3, 5, 1, 2, 7, 8, 4, 0, 6, 2};
      auto logits = before;
      short_circuit(
          {logits.data(), features.data(), weight.data(), removed.data(), TypeParam::kDType,
           classes, kColumns, kRemoved},
          0, kRows);
      for (std::int64_t row = 0; row < kRows; ++row) {
        for (std::int64_t c = 0; c < classes; ++c) {
          long double expected = before[row * classes + c], size = std::fabs(expected);
          for (std::int64_t i = 0; i < kRemoved; ++i) {
            const std::int64_t column = removed[row * kRemoved + i];
            const long double part = static_cast<long double>(features[row * kColumns + column]) *
                                     weight[column * classes + c];
            expected -= part;
            size += std::fabs(part);
          }
          expect_close(
              logits[row * classes + c], expected, size * kTolerance<typename TestFixture::Real>,
              "logit");
        }
      }
    }
  });
}

}  // namespace
}  // namespace grood_fast::tests
