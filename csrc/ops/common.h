// What every op shares: the stable ABI's headers, registration, argument checks, dtypes,
// allocation, threads, and the CUDA device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../kernels/cuda/kernels.h"
#include "../kernels/kernels.h"

// Registers an op's function for CPU tensors and, where the CUDA kernels were compiled, the one for
// CUDA tensors. The library for tests that has the kernels on the emulated device registers the
// latter as its own ops, for CPU tensors.
#if defined(GROOD_FAST_EMULATED)
#define GROOD_FAST_LIBRARY grood_fast_emulated
#define GROOD_FAST_CUDA_KEY CPU
#define GROOD_FAST_IMPLEMENT(op, cpu, cuda) \
  STABLE_TORCH_LIBRARY_IMPL(grood_fast_emulated, CPU, m) { m.impl(op, TORCH_BOX(cuda)); }
#elif defined(GROOD_FAST_CUDA)
#define GROOD_FAST_LIBRARY grood_fast
#define GROOD_FAST_CUDA_KEY CUDA
#define GROOD_FAST_IMPLEMENT(op, cpu, cuda)                                     \
  STABLE_TORCH_LIBRARY_IMPL(grood_fast, CPU, m) { m.impl(op, TORCH_BOX(cpu)); } \
  STABLE_TORCH_LIBRARY_IMPL(grood_fast, CUDA, m) { m.impl(op, TORCH_BOX(cuda)); }
#else
#define GROOD_FAST_LIBRARY grood_fast
#define GROOD_FAST_CUDA_KEY CUDA
#define GROOD_FAST_IMPLEMENT(op, cpu, cuda) \
  STABLE_TORCH_LIBRARY_IMPL(grood_fast, CPU, m) { m.impl(op, TORCH_BOX(cpu)); }
#endif

namespace grood_fast::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernel's name for a floating point tensor's dtype; `what` names the argument in the error.
inline DType dtype_of(const Tensor& tensor, const char* what) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, what, " must be float32, float64, bfloat16 or float16");
  }
}

// The dtype results have: what was accumulated in.
inline ScalarType real_of(DType dtype) {
  return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
}

inline void check_matrix(const Tensor& tensor, const char* what, const char* shape) {
  STD_TORCH_CHECK(
      tensor.dim() == 2, what, " must have the shape ", shape, ", got ", tensor.dim(),
      " dimensions");
}

inline Objective objective_of(int64_t objective) {
  STD_TORCH_CHECK(objective >= 0 && objective < kObjectives, "unknown objective ", objective);
  return static_cast<Objective>(objective);
}

inline Norm norm_of(int64_t norm) {
  STD_TORCH_CHECK(norm >= 0 && norm < kNorms, "unknown norm ", norm);
  return static_cast<Norm>(norm);
}

// Rows any distance apart, the elements of one side by side: a copy only where they are not.
inline Tensor unit_column_stride(const Tensor& matrix) {
  return matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
}

// Memory aligned for the widest vectors.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : memory_(::operator new(bytes, kAlignment)) {}
  ~Scratch() { ::operator delete(memory_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return memory_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* memory_;
};

// The device of an op's tensors, the current one for as long as this lives, and its current stream.
class CudaDevice {
 public:
#if defined(GROOD_FAST_EMULATED)
  CudaDevice(const Tensor&, std::initializer_list<const Tensor*>) {}
  void* stream() const { return nullptr; }
#else
  CudaDevice(const Tensor& tensor, std::initializer_list<const Tensor*> others)
      : guard_(tensor.get_device_index()), index_(tensor.get_device_index()) {
    for (const Tensor* other : others)
      STD_TORCH_CHECK(
          other == nullptr || (other->is_cuda() && other->get_device_index() == index_),
          "all tensors must be on the same CUDA device, number ", index_);
  }
  void* stream() const {
    return torch::stable::accelerator::getCurrentStream(index_).nativeHandle();
  }
#endif

  // `error`: what a launcher returned.
  static void check(const char* error, const char* op) {
    STD_TORCH_CHECK(error == nullptr, "grood_fast::", op, ": the CUDA device refused: ", error);
  }

#if !defined(GROOD_FAST_EMULATED)
 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t index_;
#endif
};

// Checks of the arguments both logit ops have; fills what describes the input.
inline LogitGradientArguments logit_arguments(
    const Tensor& logits, int64_t objective, double temperature,
    const std::optional<Tensor>& target) {
  LogitGradientArguments arguments{};
  arguments.dtype = dtype_of(logits, "logits");
  arguments.objective = objective_of(objective);
  STD_TORCH_CHECK(temperature > 0, "temperature must be positive, got ", temperature);
  arguments.temperature = temperature;
  arguments.logits = logits.const_data_ptr();
  arguments.classes = logits.size(1);
  arguments.row_stride = logits.stride(0);
  STD_TORCH_CHECK(arguments.classes >= 1, "logits must have at least one class");
  if (target.has_value()) {
    STD_TORCH_CHECK(
        arguments.objective == Objective::confounding,
        "only the confounding objective takes a target");
    STD_TORCH_CHECK(
        target->dim() == 1 && target->size(0) == arguments.classes && target->is_contiguous() &&
            target->scalar_type() == real_of(arguments.dtype),
        "target must be contiguous, of shape (C,) and of the dtype of the results");
    arguments.target = target->const_data_ptr();
  }
  return arguments;
}

}  // namespace grood_fast::ops
