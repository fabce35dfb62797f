// For each cluster the first member of lowest and of highest energy. Energies become whole numbers
// of the same order, which atomic operations compare; then the first sample that has a cluster's
// extreme is found likewise. The result does not depend on who comes first.
#pragma once

#include "kernels.h"
#include "rows.cuh"

namespace grood_fast::cuda {

constexpr long long kNoSample = INT64_MAX;

// Of the same order as the energies; -0 and 0 are equal.
__device__ __forceinline__ long long ordered(double energy) {
  const double same = energy + 0.0;
  long long bits;
  std::memcpy(&bits, &same, sizeof(bits));
  return bits >= 0 ? bits : bits ^ INT64_MAX;
}

template <typename Body>
__device__ __forceinline__ void each_index(std::int64_t count, Body body) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * 256;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x; i < count;
       i += step)
    body(i);
}

__global__ void __launch_bounds__(256) clear_extremes_kernel(ClusterExtremesArguments a) {
  each_index(a.clusters, [&](std::int64_t k) {
    a.lowest_energy[k] = INT64_MAX;
    a.highest_energy[k] = INT64_MIN;
    a.lowest[k] = a.highest[k] = kNoSample;
  });
}

// body(sample, its cluster, its energy) of the samples that count.
template <typename Real, typename Body>
__device__ __forceinline__ void each_sample(const ClusterExtremesArguments& a, Body body) {
  each_index(a.samples, [&](std::int64_t i) {
    const double energy = static_cast<const Real*>(a.energies)[i];
    const std::int64_t cluster = a.assignments[i];
    if (energy == energy && cluster >= 0 && cluster < a.clusters) body(i, cluster, ordered(energy));
  });
}

template <typename Real>
__global__ void __launch_bounds__(256) extreme_energies_kernel(ClusterExtremesArguments a) {
  each_sample<Real>(a, [&](std::int64_t, std::int64_t cluster, long long energy) {
    atomicMin(&a.lowest_energy[cluster], energy);
    atomicMax(&a.highest_energy[cluster], energy);
  });
}

template <typename Real>
__global__ void __launch_bounds__(256) first_extremes_kernel(ClusterExtremesArguments a) {
  each_sample<Real>(a, [&](std::int64_t i, std::int64_t cluster, long long energy) {
    const auto sample = static_cast<long long>(i);
    if (energy == a.lowest_energy[cluster]) atomicMin(&a.lowest[cluster], sample);
    if (energy == a.highest_energy[cluster]) atomicMin(&a.highest[cluster], sample);
  });
}

__global__ void __launch_bounds__(256) mark_empty_clusters_kernel(ClusterExtremesArguments a) {
  each_index(a.clusters, [&](std::int64_t k) {
    if (a.lowest[k] == kNoSample) a.lowest[k] = a.highest[k] = -1;
  });
}

}  // namespace grood_fast::cuda
