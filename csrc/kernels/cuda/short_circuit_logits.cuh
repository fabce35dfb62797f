// The logits of a linear head without some of each row's features: a block takes a row and 256 of
// its classes, and reads the removed features' weights, which stand side by side.
#pragma once

#include "kernels.h"
#include "rows.cuh"

namespace grood_fast::cuda {

template <typename Real>
__global__ void __launch_bounds__(256) short_circuit_kernel(ShortCircuitLogitsArguments a) {
  const std::int64_t row = blockIdx.x;
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.y) * 256 + threadIdx.x;
  if (c >= a.classes) return;
  const Real* features = static_cast<const Real*>(a.features) + row * a.columns;
  const Real* weight = static_cast<const Real*>(a.weight) + c;
  const std::int64_t* removed = a.removed + row * a.count;
  Real sum = 0;
#pragma unroll 4
  for (std::int64_t i = 0; i < a.count; ++i) {
    const std::int64_t feature = removed[i];
    // What is out of range cannot be refused without waiting for the device; it is NaN.
    const bool exists = feature >= 0 && feature < a.columns;
    sum += exists ? features[feature] * weight[feature * a.classes] : static_cast<Real>(NAN);
  }
  static_cast<Real*>(a.logits)[row * a.classes + c] -= sum;
}

}  // namespace grood_fast::cuda
