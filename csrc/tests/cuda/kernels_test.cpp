// The CUDA kernels on the emulated device against the CPU kernels and sums in double, a few shapes
// under every schedule: small enough for the sanitizers. Python's tests hold many more shapes.
#include "kernels/cuda/kernels.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <type_traits>

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
      {1, 1, 1, 1, 1, 0}, {3, 10, 70, 65, 5, 1}, {67, 16, 32, 130, 64, 0}, {5, 8, 16, 330, 150, 0}};
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

template <typename Format>
constexpr DType kRealOf =
    sizeof(typename Format::Real) == sizeof(double) ? DType::float64 : DType::float32;

template <typename Format>
double square_between(
    const Matrix<Format>& a, std::int64_t i, const Matrix<Format>& b, std::int64_t j) {
  double sum = 0;
  for (std::int64_t c = 0; c < a.columns; ++c) {
    const double difference = a.at(i, c) - b.at(j, c);
    sum += difference * difference;
  }
  return sum;
}

TEST_P(Schedule, NearestDistance) {
  for_each_format([](auto format) {
    using Format = decltype(format);
    using Real = typename Format::Real;
    for (const std::int64_t gap : {0, 1}) {
      const auto queries = Matrix<Format>::random(67, 70, gap, 1, 1);
      auto bank = Matrix<Format>::random(600, 70, gap, 1, 2);
      for (std::int64_t c = 0; c < 70; ++c) bank.set(599, c, queries.at(3, c));  // the last one
      std::vector<Real> distance(67, Real(kNaN));
      std::vector<std::int64_t> nearest(67, -1);
      cuda::NearestDistanceArguments a{
          Format::kDType,
          queries.elements.data(),
          bank.elements.data(),
          67,
          600,
          70,
          queries.stride,
          bank.stride,
          nullptr,
          nullptr,
          distance.data(),
          nearest.data()};
      const std::int64_t shares = cuda::nearest_distance_shares(a);
      EXPECT_GT(shares, 1);
      std::vector<Real> squares(shares * 67, Real(kNaN));
      std::vector<std::int64_t> indices(shares * 67, -1);
      a.squares = squares.data();
      a.indices = indices.data();
      expect_done(cuda::nearest_distance(a, nullptr));
      for (std::int64_t i = 0; i < 67; ++i) {
        double least = kInfinity;
        for (std::int64_t j = 0; j < 600; ++j)
          least = std::min(least, square_between(queries, i, bank, j));
        const double want = std::sqrt(least);
        expect_close(distance[i], want, kTolerance<Real> * want, "distance");
        ASSERT_TRUE(nearest[i] >= 0 && nearest[i] < 600);
        const double chosen = std::sqrt(square_between(queries, i, bank, nearest[i]));
        expect_close(distance[i], chosen, kTolerance<Real> * want, "distance of the chosen");
      }
    }
  });
}

TEST_P(Schedule, PrototypeGradient) {
  for_each_format([](auto format) {
    using Format = decltype(format);
    using Result = std::conditional_t<Format::kDType == DType::float64, Float64, Float32>;
    using Real = typename Format::Real;
    const std::int64_t rows = 5, columns = 37, classes = 66;
    const auto features = Matrix<Format>::random(rows, columns, 1, 0.5, 1);
    const auto offsets = Matrix<Result>::random(classes, columns, 3, 0.5, 2);
    const std::vector<Real> point(columns, Real(0));
    std::vector<Real> squares(rows * classes), gradient(rows * columns, Real(kNaN)), weight(rows);
    expect_done(
        cuda::prototype_gradient(
            {Format::kDType, kRealOf<Format>, features.elements.data(), point.data(),
             offsets.elements.data(), rows, columns, classes, features.stride, offsets.stride, 2.0,
             4.0, false, squares.data(), gradient.data(), weight.data()},
            nullptr));
    for (std::int64_t i = 0; i < rows; ++i) {
      double norm = 0, total = 0;
      for (std::int64_t c = 0; c < columns; ++c) norm += features.at(i, c) * features.at(i, c);
      norm = std::sqrt(norm);
      for (std::int64_t k = 0; k < classes; ++k) {
        double square = 0;
        for (std::int64_t c = 0; c < columns; ++c)
          square += std::pow(features.at(i, c) - offsets.at(k, c), 2);
        total += std::exp((norm - std::sqrt(square)) / 2);
      }
      const double want = -std::log(1 + total);
      expect_close(weight[i], want, 4 * kTolerance<Real>, "log weight");
      const double length = std::exp(want) * 4 / 2 / norm;
      for (std::int64_t c = 0; c < columns; ++c)
        expect_close(
            gradient[i * columns + c], length * features.at(i, c), 8 * kTolerance<Real> * length,
            "gradient");
    }
  });
}

TEST_P(Schedule, ShortCircuitLogits) {
  const auto check = [](auto format) {
    using Format = decltype(format);
    using Real = typename Format::Real;
    const std::int64_t rows = 3, columns = 9, classes = 300;
    auto logits = Matrix<Format>::random(rows, classes, 0, 1, 1);
    const auto before = logits;
    const auto features = Matrix<Format>::random(rows, columns, 0, 1, 2);
    const auto weight = Matrix<Format>::random(columns, classes, 0, 1, 3);
    const std::vector<std::int64_t> removed{0, 8, 3, 5, 1, 0};
    expect_done(
        cuda::short_circuit_logits(
            {Format::kDType, logits.elements.data(), features.elements.data(),
             weight.elements.data(), removed.data(), rows, classes, columns, 2},
            nullptr));
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t c = 0; c < classes; ++c) {
        double want = before.at(i, c);
        for (int k = 0; k < 2; ++k)
          want -= features.at(i, removed[2 * i + k]) * weight.at(removed[2 * i + k], c);
        expect_close(logits.at(i, c), want, 8 * kTolerance<Real>, "logit");
      }
    }
  };
  check(Float32{});
  check(Float64{});
}

TEST_P(Schedule, ClusterExtremes) {
  const auto check = [](auto format) {
    using Format = decltype(format);
    using Real = typename Format::Real;
    const std::int64_t samples = 700, clusters = 9;
    std::vector<std::int64_t> assignments(samples);
    std::vector<Real> energies(samples);
    std::mt19937 generator(1);
    for (std::int64_t i = 0; i < samples; ++i) {
      assignments[i] = static_cast<std::int64_t>(generator() % (clusters - 1));
      energies[i] = i % 5 == 0 ? Real(kNaN) : Real(static_cast<int>(generator() % 21) - 10);
    }
    std::vector<long long> keys(2 * clusters), lowest(clusters), highest(clusters);
    expect_done(
        cuda::cluster_extremes(
            {Format::kDType, assignments.data(), energies.data(), samples, clusters, keys.data(),
             keys.data() + clusters, lowest.data(), highest.data()},
            nullptr));
    for (std::int64_t k = 0; k < clusters; ++k) {
      long long low = -1, high = -1;
      for (std::int64_t i = 0; i < samples; ++i) {
        if (assignments[i] != k || energies[i] != energies[i]) continue;
        if (low < 0 || energies[i] < energies[low]) low = i;
        if (high < 0 || energies[i] > energies[high]) high = i;
      }
      EXPECT_EQ(lowest[k], low);
      EXPECT_EQ(highest[k], high);
    }
  };
  check(Float32{});
  check(Float64{});
}

TEST_P(Schedule, LayerGradientSqnorm) {
  struct Sizes {
    std::int64_t positions, outputs, inputs;
    std::vector<std::int64_t> offsets;
  };
  // Formed in several tiles; paired in several tiles, at one offset and at two.
  const Sizes kSizes[] = {{40, 65, 70, {0, 3}}, {70, 100, 90, {1}}, {66, 3, 130, {0, 2}}};
  const auto check = [&](auto format) {
    using Format = decltype(format);
    using Real = typename Format::Real;
    for (const Sizes& s : kSizes) {
      const std::int64_t samples = 2, grid = s.positions + 3;
      const auto activation = Matrix<Format>::random(samples * grid, s.inputs, 1, 1, 1);
      const auto delta = Matrix<Format>::random(samples * s.positions, s.outputs, 0, 1, 2);
      std::vector<Real> got(samples, Real(kNaN));
      cuda::LayerGradientSqnormArguments a{
          Format::kDType,
          activation.elements.data(),
          delta.elements.data(),
          samples,
          s.positions,
          s.inputs,
          s.outputs,
          grid * activation.stride,
          activation.stride,
          s.positions * delta.stride,
          delta.stride,
          s.offsets.data(),
          static_cast<std::int64_t>(s.offsets.size()),
          nullptr,
          got.data()};
      std::vector<double> parts(samples * cuda::layer_gradient_sqnorm_parts(a), kNaN);
      a.parts = parts.data();
      expect_done(cuda::layer_gradient_sqnorm(a, nullptr));
      for (std::int64_t sample = 0; sample < samples; ++sample) {
        double want = 0;
        for (const std::int64_t offset : s.offsets) {
          for (std::int64_t m = 0; m < s.outputs; ++m) {
            for (std::int64_t n = 0; n < s.inputs; ++n) {
              double entry = 0;
              for (std::int64_t r = 0; r < s.positions; ++r)
                entry += delta.at(sample * s.positions + r, m) *
                         activation.at(sample * grid + r + offset, n);
              want += entry * entry;
            }
          }
        }
        expect_close(got[sample], want, 8 * kTolerance<Real> * want, "squared norm");
      }
    }
  };
  check(Float32{});
  check(Float64{});
}

TEST_P(Schedule, ChannelAffineBackward) {
  for_each_format([](auto format) {
    using Format = decltype(format);
    using Real = typename Format::Real;
    const std::int64_t samples = 3, channels = 35, positions = 21;
    for (const bool inner : {false, true}) {
      const auto delta = Matrix<Format>::random(1, samples * channels * positions, 0, 1, 1);
      const auto input = Matrix<Format>::random(1, samples * channels * positions, 0, 1, 2);
      const std::vector<Real> scale(channels, Real(1.5));
      std::vector<Real> onward(delta.columns, Real(kNaN));
      std::vector<Real> products(samples * channels, Real(kNaN)), sums = products;
      expect_done(
          cuda::channel_affine_backward(
              {Format::kDType, delta.elements.data(), input.elements.data(), inner, samples,
               channels, positions, scale.data(), onward.data(), products.data(), sums.data()},
              nullptr));
      for (std::int64_t i = 0; i < samples * channels; ++i) {
        double product = 0, sum = 0;
        for (std::int64_t p = 0; p < positions; ++p) {
          const std::int64_t at =
              inner ? (i / channels * positions + p) * channels + i % channels : i * positions + p;
          product += delta.at(0, at) * input.at(0, at);
          sum += delta.at(0, at);
          expect_close(onward[at], 1.5 * delta.at(0, at), 8 * kTolerance<Real>, "onward");
        }
        expect_close(products[i], product, 8 * kTolerance<Real>, "product");
        expect_close(sums[i], sum, 8 * kTolerance<Real>, "sum");
      }
    }
  });
}

}  // namespace
}  // namespace grood_fast::tests
