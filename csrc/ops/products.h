// What the ops with a large product share: torch's matmul into memory that is there already, and
// the tiles it works on.
#pragma once

#include <array>

#include "common.h"

namespace grood_fast::ops {

// out = a b
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(b),
      torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference that was returned
}

inline Tensor as_real(const Tensor& matrix, ScalarType real) {
  return matrix.scalar_type() == real ? matrix : torch::stable::to(matrix, real);
}

inline Tensor rows(const Tensor& matrix, int64_t start, int64_t count) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 0, start, count);
}

// The dtype everything is computed in, which the op's fitted operand decides.
inline DType real_dtype_of(const Tensor& tensor, const char* what) {
  const DType dtype = dtype_of(tensor, what);
  STD_TORCH_CHECK(
      dtype == DType::float32 || dtype == DType::float64, what,
      " must be float32 or float64: everything is computed in their precision");
  return dtype;
}

}  // namespace grood_fast::ops
