// What the kernels' tests share: number formats decoded by their definition, strided matrices whose
// gaps are poisoned, and a loop over the instruction sets this machine has.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace grood_fast::tests {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The value of a 16-bit float: a sign, an exponent, a mantissa.
template <int kExponentBits, int kMantissaBits>
double decode(std::uint16_t bits) {
  constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  constexpr int kLargest = (1 << kExponentBits) - 1;
  const int exponent = bits >> kMantissaBits & kLargest;
  const int mantissa = bits & ((1 << kMantissaBits) - 1);
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == kLargest) return mantissa ? kNaN : sign * kInfinity;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - kBias - kMantissaBits);
  return sign * std::ldexp(mantissa + (1 << kMantissaBits), exponent - kBias - kMantissaBits);
}

// An element type of the kernels' input: how a double becomes one and what its value then is.
template <DType kType, typename Storage, typename RealType>
struct Wide {
  using Element = Storage;
  using Real = RealType;
  static constexpr DType kDType = kType;
  static Element encode(double value) { return static_cast<Element>(value); }
  static double value(Element element) { return element; }
};

template <DType kType, int kExponentBits, int kMantissaBits>
struct Half {
  using Element = std::uint16_t;
  using Real = float;
  static constexpr DType kDType = kType;
  static double value(Element element) { return decode<kExponentBits, kMantissaBits>(element); }
  static Element encode(double value) {
    constexpr int kInfinityBits = ((1 << kExponentBits) - 1) << kMantissaBits;
    if (std::isnan(value)) return kInfinityBits | 1 << (kMantissaBits - 1);
    int below = 0, above = kInfinityBits + 1;  // bit patterns are ordered as their magnitudes
    while (above - below > 1) {
      const int middle = (below + above) / 2;
      (Half::value(static_cast<Element>(middle)) <= std::fabs(value) ? below : above) = middle;
    }
    return static_cast<Element>(below | (std::signbit(value) ? 0x8000 : 0));
  }
};

using Float32 = Wide<DType::float32, float, float>;
using Float64 = Wide<DType::float64, double, double>;
using Bfloat16 = Half<DType::bfloat16, 8, 7>;
using Float16 = Half<DType::float16, 5, 10>;
using Formats = testing::Types<Float32, Float64, Bfloat16, Float16>;

struct FormatNames {
  template <typename Format>
  static std::string GetName(int) {
    constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};
    return kNames[static_cast<int>(Format::kDType)];
  }
};

// Error allowed, relative to the size of what was added up: a few roundings.
template <typename Real>
inline constexpr double kTolerance = 16.0 * std::numeric_limits<Real>::epsilon();

// A rows x columns matrix, `gap` elements between its rows. The gaps hold NaN, so that reading one
// shows in the result; after the last row the memory ends, for the address sanitizer to see.
template <typename Format>
struct Matrix {
  using Element = typename Format::Element;

  Matrix(std::int64_t rows, std::int64_t columns, std::int64_t gap)
      : rows(rows),
        columns(columns),
        stride(columns + gap),
        elements(rows > 0 ? (rows - 1) * stride + columns : 0, Format::encode(kNaN)) {}

  void set(std::int64_t row, std::int64_t column, double value) {
    elements[row * stride + column] = Format::encode(value);
  }
  double at(std::int64_t row, std::int64_t column) const {
    return Format::value(elements[row * stride + column]);
  }
  std::vector<double> row(std::int64_t row) const {
    std::vector<double> values;
    for (std::int64_t column = 0; column < columns; ++column) values.push_back(at(row, column));
    return values;
  }

  static Matrix random(
      std::int64_t rows, std::int64_t columns, std::int64_t gap, double spread, unsigned seed) {
    Matrix matrix(rows, columns, gap);
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal(0, spread);
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t column = 0; column < columns; ++column) {
        matrix.set(row, column, normal(generator));
      }
    }
    return matrix;
  }

  std::int64_t rows, columns, stride;
  std::vector<Element> elements;
};

// Equal, both NaN, or within `slack`.
inline void expect_close(double got, long double want, long double slack, const char* what) {
  if (std::isnan(want) || std::isinf(want)) {
    EXPECT_TRUE(std::isnan(want) ? std::isnan(got) : got == want)
        << what << ": " << got << " is not " << want;
  } else {
    EXPECT_LE(std::fabs(got - want), slack) << what << ": " << got << " is not " << want;
  }
}

// Calls `body` once for each instruction set that was compiled and that this processor has.
template <typename Body>
void at_every_level(Body body) {
  const std::string before = simd_level();
  for (const char* level : kSimdLevels) {
    if (!simd_level_compiled(level) || !simd_level_supported(level)) continue;
    SCOPED_TRACE(level);
    ASSERT_TRUE(set_simd_level(level));
    body();
  }
  set_simd_level(before.c_str());
}

}  // namespace grood_fast::tests
