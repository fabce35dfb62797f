#include "kernels.h"
#include "short_circuit_logits.cuh"

namespace grood_fast::cuda {

const char* short_circuit_logits(
    const ShortCircuitLogitsArguments& a, StreamPointer stream_pointer) {
  const auto stream = static_cast<Stream>(stream_pointer);
  const dim3 blocks{
      static_cast<unsigned>(a.rows), static_cast<unsigned>((a.classes + 255) / 256), 1};
  return a.dtype == DType::float64 ? launch(short_circuit_kernel<double>, blocks, 256, 0, stream, a)
                                   : launch(short_circuit_kernel<float>, blocks, 256, 0, stream, a);
}

}  // namespace grood_fast::cuda
