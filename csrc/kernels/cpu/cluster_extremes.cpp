// For each cluster the member with the lowest and the one with the highest energy, in one pass.
//
// One comparison and two conditional stores an element leave nothing to vectorise, so there is one
// body for all instruction sets.
#include "../kernels.h"

namespace grood_fast {
namespace {

template <typename Real>
void cluster_extremes_of(const ClusterExtremesArguments& a) {
  const Real* energies = static_cast<const Real*>(a.energies);
  for (std::int64_t i = 0; i < a.samples; ++i) {
    const Real energy = energies[i];
    if (energy != energy) continue;
    const std::int64_t cluster = a.assignments[i];
    std::int64_t& lowest = a.lowest[cluster];
    std::int64_t& highest = a.highest[cluster];
    if (lowest < 0) {
      lowest = highest = i;
    } else if (energy < energies[lowest]) {
      lowest = i;
    } else if (energy > energies[highest]) {
      highest = i;
    }
  }
}

}  // namespace

void cluster_extremes(const ClusterExtremesArguments& a) {
  for (std::int64_t cluster = 0; cluster < a.clusters; ++cluster)
    a.lowest[cluster] = a.highest[cluster] = -1;
  if (a.dtype == DType::float64) return cluster_extremes_of<double>(a);
  return cluster_extremes_of<float>(a);
}

}  // namespace grood_fast
