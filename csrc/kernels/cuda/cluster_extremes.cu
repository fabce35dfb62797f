#include "cluster_extremes.cuh"
#include "kernels.h"

namespace grood_fast::cuda {

const char* cluster_extremes(const ClusterExtremesArguments& a, StreamPointer stream_pointer) {
  const auto stream = static_cast<Stream>(stream_pointer);
  const auto blocks = [](std::int64_t count) {
    constexpr std::int64_t kEnough = 4096;
    const std::int64_t needed = (count + 255) / 256;
    return dim3{static_cast<unsigned>(needed < kEnough ? needed : kEnough), 1, 1};
  };
  if (a.clusters == 0) return nullptr;
  const bool wide = a.dtype == DType::float64;
  const char* error = launch(clear_extremes_kernel, blocks(a.clusters), 256, 0, stream, a);
  for (const auto kernel :
       {wide ? extreme_energies_kernel<double> : extreme_energies_kernel<float>,
        wide ? first_extremes_kernel<double> : first_extremes_kernel<float>}) {
    if (error == nullptr && a.samples > 0)
      error = launch(kernel, blocks(a.samples), 256, 0, stream, a);
  }
  if (error != nullptr) return error;
  return launch(mark_empty_clusters_kernel, blocks(a.clusters), 256, 0, stream, a);
}

}  // namespace grood_fast::cuda
