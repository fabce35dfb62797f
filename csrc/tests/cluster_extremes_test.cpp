// cluster_extremes against a search of every cluster.
#include <random>

#include "support.h"

namespace grood_fast::tests {
namespace {

template <typename Format>
class ClusterExtremes : public testing::Test {
 protected:
  using Real = typename Format::Real;

  static void expect_found(
      const std::vector<std::int64_t>& assignments, const std::vector<Real>& energies,
      std::int64_t clusters) {
    std::vector<std::int64_t> lowest(clusters, 7), highest(clusters, 7);
    const auto samples = static_cast<std::int64_t>(energies.size());
    cluster_extremes(
        {assignments.data(), energies.data(), samples, clusters, Format::kDType, lowest.data(),
         highest.data()});
    for (std::int64_t cluster = 0; cluster < clusters; ++cluster) {
      std::int64_t low = -1, high = -1;
      for (std::int64_t i = 0; i < samples; ++i) {
        if (assignments[i] != cluster || std::isnan(energies[i])) continue;
        if (low < 0 || energies[i] < energies[low]) low = i;
        if (high < 0 || energies[i] > energies[high]) high = i;
      }
      EXPECT_EQ(lowest[cluster], low) << "cluster " << cluster << " of " << clusters;
      EXPECT_EQ(highest[cluster], high) << "cluster " << cluster << " of " << clusters;
    }
  }
};
using Reals = testing::Types<Float32, Float64>;
TYPED_TEST_SUITE(ClusterExtremes, Reals, FormatNames);

TYPED_TEST(ClusterExtremes, RandomClustersWithTiesAndNaN) {
  using Real = typename TestFixture::Real;
  std::mt19937 random(0);
  for (const std::int64_t samples : {0, 1, 2, 17, 400}) {
    for (const std::int64_t clusters : {1, 3, 64}) {
      std::vector<std::int64_t> assignments(samples);
      std::vector<Real> energies(samples);
      for (std::int64_t i = 0; i < samples; ++i) {
        assignments[i] = random() % clusters;
        energies[i] = random() % 11 == 0 ? std::numeric_limits<Real>::quiet_NaN()
                                         : static_cast<Real>(random() % 20) - 10;
      }
      TestFixture::expect_found(assignments, energies, clusters);
    }
  }
}

TYPED_TEST(ClusterExtremes, Infinities) {
  using Real = typename TestFixture::Real;
  const Real inf = std::numeric_limits<Real>::infinity();
  TestFixture::expect_found({0, 0, 0, 1, 1}, {1, -inf, inf, inf, inf}, 2);
}

TYPED_TEST(ClusterExtremes, NoCluster) { TestFixture::expect_found({}, {}, 0); }

}  // namespace
}  // namespace grood_fast::tests
