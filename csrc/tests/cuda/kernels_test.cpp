// The CUDA kernels on the emulated device against the CPU kernels and sums in double, a few shapes
// under every schedule: small enough for the sanitizers. Python's tests hold many more shapes.
#include "kernels/cuda/kernels.h"

#include <functional>

#include "../support.h"
#include "emulation/execution.h"

namespace grood_fast::tests {
namespace {

class Schedule : public testing::TestWithParam<int> {
 protected:
  void SetUp() override { emulation::set_seed(static_cast<std::uint64_t>(GetParam())); }
  void TearDown() override { emulation::set_seed(0); }
};
INSTANTIATE_TEST_SUITE_P(Every, Schedule, testing::Values(0, 1, 2, 3));

template <typename Body>
void for_each_format(Body body) {
  body(Float32{});
  body(Float64{});
  body(Bfloat16{});
  body(Float16{});
}

void expect_done(const char* error) { EXPECT_EQ(error, nullptr) << error; }

// Both kernels' outputs, each written whole.
template <typename Format>
struct LogitGradientOutputs {
  using Real = typename Format::Real;
  std::vector<Real> rows[6], delta;
  std::vector<std::int64_t> argmax;

  LogitGradientOutputs(std::int64_t count, LogitGradientArguments& a)
      : delta(count * a.classes), argmax(count) {
    for (auto& row : rows) row.resize(count);
    a.energy = rows[0].data();
    a.log_sum_exp = rows[1].data();
    a.maximum = rows[2].data();
    for (int norm = 0; norm < kNorms; ++norm) a.norm[norm] = rows[3 + norm].data();
    a.argmax = argmax.data();
    a.delta = delta.data();
  }
};

TEST_P(Schedule, LogitGradient) {
  for_each_format([](auto format) {
    using Format = decltype(format);
    using Real = typename Format::Real;
    // In groups of 4, of a warp, of a block, and read again at each step.
    for (const std::int64_t classes : {1, 7, 128, 131, 1024, 1033, 8199}) {
      const std::int64_t rows = classes < 200 ? 37 : 3;
      auto logits = Matrix<Format>::random(rows, classes, classes % 3, 4, 1);
      if (rows > 4) {
        logits.set(1, classes / 2, kNaN);
        logits.set(2, classes - 1, kInfinity);
        logits.set(3, 0, -kInfinity);
      }
      std::vector<Real> target(classes, Real(0.25));
      for (int objective = 0; objective < kObjectives; ++objective) {
        SCOPED_TRACE(testing::Message() << "objective " << objective << ", classes " << classes);
        LogitGradientArguments a{};
        a.logits = logits.elements.data();
        a.dtype = Format::kDType;
        a.classes = classes;
        a.row_stride = logits.stride;
        a.objective = static_cast<Objective>(objective);
        a.temperature = 1.5;
        if (a.objective == Objective::confounding) a.target = target.data();
        std::vector<unsigned char> scratch(logit_gradient_scratch_bytes(classes) + 64);
        a.scratch = scratch.data() + (64 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 64);
        LogitGradientArguments b = a;
        const LogitGradientOutputs<Format> want(rows, a), got(rows, b);
        logit_gradient(a, 0, rows);
        expect_done(cuda::logit_gradient(b, rows, nullptr));
        EXPECT_EQ(got.argmax, want.argmax);
        for (int output = 0; output < 6; ++output) {
          for (std::int64_t row = 0; row < rows; ++row) {
            const double value = want.rows[output][row];
            const double slack = 4 * kTolerance<Real> * (std::fabs(value) + 20);
            expect_close(got.rows[output][row], value, slack, "statistic");
          }
        }
        for (std::size_t i = 0; i < want.delta.size(); ++i) {
          const double slack = 4 * kTolerance<Real> * (std::fabs(double(want.delta[i])) + 1);
          expect_close(got.delta[i], want.delta[i], slack, "delta");
        }
      }
    }
  });
}

TEST_P(Schedule, RowNorm) {
  for_each_format([](auto format) {
    using Format = decltype(format);
    using Real = typename Format::Real;
    constexpr DType kFactor = sizeof(Real) == sizeof(double) ? DType::float64 : DType::float32;
    for (const std::int64_t columns : {0, 1, 65, 515, 8203}) {
      const std::int64_t rows = columns < 200 ? 37 : 5;
      auto values = Matrix<Format>::random(rows, columns, columns % 4, 1, 2);
      if (columns > 1) {
        values.set(1, columns - 1, kNaN);
        values.set(2, 0, -kInfinity);
        for (std::int64_t c = 0; c < columns; ++c) values.set(3, c, 1e-30);
      }
      for (const Norm norm : {Norm::l1, Norm::l2, Norm::linf}) {
        for (const bool one : {false, true}) {
          SCOPED_TRACE(
              testing::Message() << "norm " << static_cast<int>(norm) << ", columns " << columns
                                 << ", one appended " << one);
          std::vector<Real> want(rows, Real(-0.5)), got = want;
          RowNormArguments a{values.elements.data(),
                             Format::kDType,
                             columns,
                             values.stride,
                             norm,
                             one,
                             kFactor,
                             want.data()};
          multiply_row_norm(a, 0, rows);
          a.factor = got.data();
          expect_done(cuda::multiply_row_norm(a, rows, nullptr));
          for (std::int64_t row = 0; row < rows; ++row) {
            const double slack = 2 * kTolerance<Real> * std::fabs(double(want[row])) +
                                 std::numeric_limits<Real>::denorm_min();
            expect_close(got[row], want[row], slack, "norm");
          }
        }
      }
    }
  });
}

TEST_P(Schedule, DualProject) {
  struct Sizes {
    std::int64_t rows, classes, columns, anchors, components, gap;
  };
  // Rows a multiple of 16 bytes apart and not; less than a tile and more, in each direction.
  constexpr Sizes kSizes[] = {
      {1, 1, 1, 1, 1, 0}, {3, 10, 70, 65, 5, 1}, {67, 16, 32, 130, 64, 0}, {5, 8, 16, 40, 150, 0}};
  for_each_format([&](auto format) {
    using Format = decltype(format);
    using Result = std::conditional_t<Format::kDType == DType::float64, Float64, Float32>;
    using Real = typename Format::Real;
    for (const Sizes& s : kSizes) {
      SCOPED_TRACE(testing::Message() << "rows " << s.rows << ", anchors " << s.anchors);
      const auto delta = Matrix<Format>::random(s.rows, s.classes, s.gap, 1, 1);
      const auto features = Matrix<Format>::random(s.rows, s.columns, s.gap, 1, 2);
      const auto anchor_delta = Matrix<Format>::random(s.anchors, s.classes, s.gap, 1, 3);
      const auto anchor_features = Matrix<Format>::random(s.anchors, s.columns, s.gap, 1, 4);
      const auto coefficients = Matrix<Result>::random(s.anchors, s.components, s.gap, 1, 5);
      std::vector<Real> got(s.rows * s.components, Real(kNaN));
      cuda::DualProjectArguments a{
          Format::kDType,
          delta.elements.data(),
          features.elements.data(),
          anchor_delta.elements.data(),
          anchor_features.elements.data(),
          coefficients.elements.data(),
          s.rows,
          s.classes,
          s.columns,
          s.anchors,
          s.components,
          delta.stride,
          features.stride,
          anchor_delta.stride,
          anchor_features.stride,
          coefficients.stride,
          1.0,
          nullptr,
          got.data()};
      std::vector<Real> parts(cuda::dual_project_parts(a) * got.size(), Real(kNaN));
      a.parts = parts.data();
      expect_done(cuda::dual_project(a, nullptr));
      for (std::int64_t row = 0; row < s.rows; ++row) {
        std::vector<double> want(s.components), size(s.components);
        for (std::int64_t anchor = 0; anchor < s.anchors; ++anchor) {
          double left = 0, right = 1, left_size = 0, right_size = 1;
          for (std::int64_t c = 0; c < s.classes; ++c) {
            left += delta.at(row, c) * anchor_delta.at(anchor, c);
            left_size += std::fabs(delta.at(row, c) * anchor_delta.at(anchor, c));
          }
          for (std::int64_t c = 0; c < s.columns; ++c) {
            right += features.at(row, c) * anchor_features.at(anchor, c);
            right_size += std::fabs(features.at(row, c) * anchor_features.at(anchor, c));
          }
          for (std::int64_t k = 0; k < s.components; ++k) {
            want[k] += left * right * coefficients.at(anchor, k);
            size[k] += left_size * right_size * std::fabs(coefficients.at(anchor, k));
          }
        }
        for (std::int64_t k = 0; k < s.components; ++k)
          expect_close(
              got[row * s.components + k], want[k], kTolerance<Real> * size[k], "coordinate");
      }
    }
  });
}

}  // namespace
}  // namespace grood_fast::tests
