// The kernels on a CUDA device: as csrc/kernels/kernels.h has them for the CPU, with pointers to
// the device's memory, all rows at once, put on a stream and not waited for.
//
// Each returns null, or why the device refused.
#pragma once

#include "../kernels.h"

namespace grood_fast::cuda {

using StreamPointer = void*;  // a cudaStream_t

const char* logit_gradient(
    const LogitGradientArguments& arguments, std::int64_t rows, StreamPointer stream);
const char* multiply_row_norm(
    const RowNormArguments& arguments, std::int64_t rows, StreamPointer stream);

// z = ((delta anchor_delta^T) o (features anchor_features^T + bias)) coefficients. Columns of each
// matrix are side by side, rows a stride (in elements) apart; no size is zero but classes' and
// columns' may be.
struct DualProjectArguments {
  DType dtype;                  // of the first four; for float64 of all, else coefficients and
                                // results are float32
  const void* delta;            // [rows, classes]
  const void* features;         // [rows, columns]
  const void* anchor_delta;     // [anchors, classes]
  const void* anchor_features;  // [anchors, columns]
  const void* coefficients;     // [anchors, components]
  std::int64_t rows, classes, columns, anchors, components;
  std::int64_t delta_stride, features_stride, anchor_delta_stride, anchor_features_stride;
  std::int64_t coefficients_stride;
  double bias;
  void* parts;   // [dual_project_parts(), rows, components]; needed where that is not 0
  void* result;  // [rows, components], contiguous
};

// How many partial results the device's blocks would leave; 0: none.
std::int64_t dual_project_parts(const DualProjectArguments& arguments);
const char* dual_project(const DualProjectArguments& arguments, StreamPointer stream);

}  // namespace grood_fast::cuda
