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

// The nearest row of the bank to each query, by differences; both of one dtype, their columns side
// by side. Results are float64 for float64, else float32.
struct NearestDistanceArguments {
  DType dtype;
  const void* queries;  // [rows, columns]
  const void* bank;     // [bank_rows, columns]
  std::int64_t rows, bank_rows, columns, queries_stride, bank_stride;
  void* squares;          // Real [nearest_distance_shares(), rows], scratch
  std::int64_t* indices;  // likewise
  void* distance;         // Real [rows]
  std::int64_t* nearest;  // [rows]
};
std::int64_t nearest_distance_shares(const NearestDistanceArguments& arguments);
const char* nearest_distance(const NearestDistanceArguments& arguments, StreamPointer stream);

struct PrototypeGradientArguments {
  DType dtype;           // of the features
  DType real;            // float32 or float64: of everything else
  const void* features;  // [rows, columns]
  const void* point;     // Real [columns], the OOD prototype
  const void* offsets;   // Real [classes, columns], the others less the OOD prototype
  std::int64_t rows, columns, classes, features_stride, offsets_stride;
  double temperature, scale;
  bool squared;
  void* squares;     // Real [rows, classes], scratch
  void* gradient;    // Real [rows, columns]
  void* log_weight;  // Real [rows]
};
const char* prototype_gradient(const PrototypeGradientArguments& arguments, StreamPointer stream);

// logits -= the removed features' part of them; everything contiguous. A feature out of range makes
// its row NaN.
struct ShortCircuitLogitsArguments {
  DType dtype;                  // float32 or float64
  void* logits;                 // [rows, classes], changed in place
  const void* features;         // [rows, columns]
  const void* weight;           // [columns, classes]
  const std::int64_t* removed;  // [rows, count]
  std::int64_t rows, classes, columns, count;
};
const char* short_circuit_logits(
    const ShortCircuitLogitsArguments& arguments, StreamPointer stream);

// Per cluster the first sample of lowest and of highest energy, or -1. Samples with a NaN energy or
// of a cluster out of range are passed over.
struct ClusterExtremesArguments {
  DType dtype;                      // float32 or float64
  const std::int64_t* assignments;  // [samples]
  const void* energies;             // [samples]
  std::int64_t samples, clusters;
  long long* lowest_energy;   // [clusters], scratch
  long long* highest_energy;  // [clusters], scratch
  long long* lowest;          // [clusters]
  long long* highest;         // [clusters]
};
const char* cluster_extremes(const ClusterExtremesArguments& arguments, StreamPointer stream);

// Per sample sum_j || sum_r delta_r activation_{r + offset_j}^T ||^2: the squared norm of a linear
// layer's or a convolution's gradient.
struct LayerGradientSqnormArguments {
  DType dtype;             // float32 or float64
  const void* activation;  // [samples, at least positions + the largest offset, inputs]
  const void* delta;       // [samples, positions, outputs]
  std::int64_t samples, positions, inputs, outputs;
  std::int64_t activation_sample_stride, activation_stride;  // in elements; columns side by side
  std::int64_t delta_sample_stride, delta_stride;
  const std::int64_t* offsets;  // on the host
  std::int64_t offset_count;    // >= 1
  double* parts;                // [samples, layer_gradient_sqnorm_parts()], scratch
  void* result;                 // Real [samples]
};
std::int64_t layer_gradient_sqnorm_parts(const LayerGradientSqnormArguments& arguments);
const char* layer_gradient_sqnorm(
    const LayerGradientSqnormArguments& arguments, StreamPointer stream);

// The backward pass of y = scale x + shift, a scale and a shift a channel.
struct ChannelAffineBackwardArguments {
  DType dtype;        // of delta and input
  const void* delta;  // gradient of y: [samples, positions, channels] if channels_inner, else
  const void* input;  // [samples, channels, positions]; contiguous, the input likewise
  bool channels_inner;
  std::int64_t samples, channels, positions;
  const void* scale;  // Real [channels]; read only for `onward`
  void* onward;       // Real, like delta: scale delta; may be null
  void* products;     // Real [samples, channels]: sum over the positions of delta input
  void* sums;         // Real [samples, channels]: of delta
};
const char* channel_affine_backward(
    const ChannelAffineBackwardArguments& arguments, StreamPointer stream);

}  // namespace grood_fast::cuda
