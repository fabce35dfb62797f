// grood_fast::cluster_extremes on CUDA tensors.
#if defined(GROOD_FAST_CUDA) || defined(GROOD_FAST_EMULATED)

#include "../products.h"

namespace grood_fast::ops {
namespace {

std::tuple<Tensor, Tensor> cluster_extremes(
    const Tensor& assignments_in,  // [N]: on the device, so that their range is not checked here
    const Tensor& energies_in,     // [N]
    int64_t clusters) {
  STD_TORCH_CHECK(
      assignments_in.dim() == 1 && energies_in.dim() == 1 &&
          assignments_in.size(0) == energies_in.size(0),
      "assignments and energies must both have the shape (N,)");
  STD_TORCH_CHECK(assignments_in.scalar_type() == ScalarType::Long, "assignments must be int64");
  STD_TORCH_CHECK(clusters >= 0, "clusters must not be negative, got ", clusters);
  const ScalarType real = real_of(dtype_of(energies_in, "energies"));
  const CudaDevice device(assignments_in, {&energies_in});
  const Tensor assignments = torch::stable::contiguous(assignments_in);
  const Tensor energies = torch::stable::contiguous(as_real(energies_in, real));
  const Tensor lowest = torch::stable::new_empty(assignments, {clusters});   // [K]
  const Tensor highest = torch::stable::new_empty(assignments, {clusters});  // [K]
  const Tensor extremes = torch::stable::new_empty(assignments, {2, clusters});
  auto* const energy = static_cast<long long*>(extremes.mutable_data_ptr());
  const cuda::ClusterExtremesArguments arguments{
      dtype_of(energies, "energies"),
      static_cast<const int64_t*>(assignments.const_data_ptr()),
      energies.const_data_ptr(),
      assignments.size(0),
      clusters,
      energy,
      energy + clusters,
      static_cast<long long*>(lowest.mutable_data_ptr()),
      static_cast<long long*>(highest.mutable_data_ptr())};
  device.check(cuda::cluster_extremes(arguments, device.stream()), "cluster_extremes");
  return {lowest, highest};
}

}  // namespace

#if defined(GROOD_FAST_EMULATED)
STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast_emulated, m) {
  m.def("cluster_extremes(Tensor assignments, Tensor energies, int clusters) -> (Tensor, Tensor)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(GROOD_FAST_LIBRARY, GROOD_FAST_CUDA_KEY, m) {
  m.impl("cluster_extremes", TORCH_BOX(&cluster_extremes));
}

}  // namespace grood_fast::ops

#endif
