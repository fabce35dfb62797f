// multiply_row_norm against norms summed in long double.
#include <algorithm>

#include "support.h"

namespace grood_fast::tests {
namespace {

long double norm_of(std::vector<double> values, Norm norm, bool append_one) {
  if (append_one) values.push_back(1);
  long double sum = 0, squares = 0, largest = 0;
  for (const long double value : values) {
    sum += std::fabs(value);
    squares += value * value;
    largest = std::max(largest, std::fabs(value));
  }
  if (std::isnan(sum)) return sum;
  return norm == Norm::l1 ? sum : norm == Norm::l2 ? std::sqrt(squares) : largest;
}

template <typename Format>
void expect_norms(const Matrix<Format>& matrix) {
  using Real = typename Format::Real;
  constexpr DType kFactor = sizeof(Real) == sizeof(double) ? DType::float64 : DType::float32;
  for (const Norm norm : {Norm::l1, Norm::l2, Norm::linf}) {
    for (const bool append_one : {false, true}) {
      SCOPED_TRACE(
          testing::Message() << "norm " << static_cast<int>(norm) << ", one appended " << append_one
                             << ", columns " << matrix.columns);
      std::vector<Real> factor(matrix.rows, Real(-0.5));
      multiply_row_norm(
          {matrix.elements.data(), Format::kDType, matrix.columns, matrix.stride, norm, append_one,
           kFactor, factor.data()},
          0, matrix.rows);
      for (std::int64_t row = 0; row < matrix.rows; ++row) {
        const long double want = -0.5L * norm_of(matrix.row(row), norm, append_one);
        const long double slack =
            std::fabs(want) * kTolerance<Real> + std::numeric_limits<Real>::denorm_min();
        expect_close(factor[row], want, slack, "norm");
      }
    }
  }
}

template <typename Format>
class RowNorm : public testing::Test {};
TYPED_TEST_SUITE(RowNorm, Formats, FormatNames);

TYPED_TEST(RowNorm, EverySizeAndStride) {
  at_every_level([] {
    for (std::int64_t columns = 0; columns <= 70; ++columns) {
      expect_norms(Matrix<TypeParam>::random(3, columns, columns % 5, 1, columns));
    }
    for (const std::int64_t columns : {511, 2048, 10007}) {
      expect_norms(Matrix<TypeParam>::random(2, columns, 1, 1, columns));
    }
  });
}

TYPED_TEST(RowNorm, NonFiniteAndExtremeValuesInEveryPlace) {
  constexpr double kValues[] = {kNaN, kInfinity, -kInfinity, 1e30, -1e4, 1e-30, 0.0};
  at_every_level([&] {
    for (const std::int64_t columns : {1, 5, 16, 37}) {
      for (const double value : kValues) {
        Matrix<TypeParam> matrix(columns, columns, 2);
        for (std::int64_t row = 0; row < columns; ++row) {
          for (std::int64_t column = 0; column < columns; ++column) {
            matrix.set(row, column, row == column ? value : column % 3 == 0 ? 1e-33 : 0);
          }
        }
        expect_norms(matrix);
      }
    }
  });
}

TYPED_TEST(RowNorm, SquaresThatOverflowOrVanish) {
  const bool wide = TypeParam::kDType == DType::float64;
  at_every_level([&] {
    for (const double value : {wide ? 1e200 : 1e25, wide ? 1e-200 : 1e-25}) {
      Matrix<TypeParam> matrix(2, 45, 3);
      for (std::int64_t column = 0; column < 45; ++column) {
        matrix.set(0, column, value);
        matrix.set(1, column, -value * column);
      }
      expect_norms(matrix);
    }
  });
}

TYPED_TEST(RowNorm, TouchesTheGivenRowsOnly) {
  using Real = typename TypeParam::Real;
  const auto matrix = Matrix<TypeParam>::random(9, 4, 0, 1, 1);
  constexpr DType kFactor = sizeof(Real) == sizeof(double) ? DType::float64 : DType::float32;
  at_every_level([&] {
    for (const std::int64_t begin : {0, 2, 5}) {
      for (const std::int64_t end : {5, 9}) {
        std::vector<Real> factor(9, Real(1));
        multiply_row_norm(
            {matrix.elements.data(), TypeParam::kDType, 4, 4, Norm::l1, true, kFactor,
             factor.data()},
            begin, end);
        for (std::int64_t row = 0; row < 9; ++row) {
          EXPECT_EQ(factor[row] != Real(1), row >= begin && row < end) << row;
        }
      }
    }
  });
}

}  // namespace
}  // namespace grood_fast::tests
