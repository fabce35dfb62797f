// grood_fast::cluster_extremes: for each cluster its member of lowest and of highest energy.
#include <tuple>

#include "common.h"

namespace grood_fast::ops {
namespace {

std::tuple<Tensor, Tensor> cluster_extremes(
    const Tensor& assignments_in,  // [N]
    const Tensor& energies_in,     // [N]
    int64_t clusters) {
  STD_TORCH_CHECK(
      assignments_in.dim() == 1 && energies_in.dim() == 1 &&
          assignments_in.size(0) == energies_in.size(0),
      "assignments and energies must both have the shape (N,)");
  STD_TORCH_CHECK(assignments_in.scalar_type() == ScalarType::Long, "assignments must be int64");
  STD_TORCH_CHECK(clusters >= 0, "clusters must not be negative, got ", clusters);
  const DType given = dtype_of(energies_in, "energies");
  const Tensor assignments = torch::stable::contiguous(assignments_in);
  const bool wide = energies_in.scalar_type() == real_of(given);
  const Tensor energies = torch::stable::contiguous(
      wide ? energies_in : torch::stable::to(energies_in, real_of(given)));
  const int64_t samples = assignments.size(0);
  const int64_t* numbers = static_cast<const int64_t*>(assignments.const_data_ptr());
  for (int64_t i = 0; i < samples; ++i)
    STD_TORCH_CHECK(
        numbers[i] >= 0 && numbers[i] < clusters, "assignments must lie in [0, ", clusters,
        "), got ", numbers[i]);

  Tensor lowest = torch::stable::new_empty(assignments, {clusters});   // [K]
  Tensor highest = torch::stable::new_empty(assignments, {clusters});  // [K]
  grood_fast::cluster_extremes(
      {numbers, energies.const_data_ptr(), samples, clusters,
       given == DType::float64 ? DType::float64 : DType::float32,
       static_cast<int64_t*>(lowest.mutable_data_ptr()),
       static_cast<int64_t*>(highest.mutable_data_ptr())});
  return {lowest, highest};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast, m) {
  m.def("cluster_extremes(Tensor assignments, Tensor energies, int clusters) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(grood_fast, CPU, m) {
  m.impl("cluster_extremes", TORCH_BOX(&cluster_extremes));
}

}  // namespace grood_fast::ops
