// What the CPU kernels compute: raw pointers, sizes and strides, no torch, no Python.
//
// Every function works on the half-open row range [begin, end) of its arguments, so that the caller
// decides how rows are spread over threads. Arguments are assumed valid: the callers check them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace grood_fast {

enum class DType : int { float32, float64, bfloat16, float16 };

// The scalars whose gradient with respect to the logits is taken; see grood_fast/objectives.py.
enum class Objective : int { energy, uniform, predicted, confounding, max_logit, logit_sum };
inline constexpr int kObjectives = 6;

enum class Norm : int { l1, l2, linf };
inline constexpr int kNorms = 3;

// "Real" below is double for float64 input and float for everything else: half-precision input is
// widened on the way in and results keep the precision they were accumulated in.
struct LogitGradientArguments {
  const void* logits;  // [rows, classes], the stride between classes is 1
  DType dtype;
  std::int64_t classes;     // >= 1
  std::int64_t row_stride;  // in elements
  Objective objective;
  double temperature;  // > 0
  const void* target;  // Real [classes], confounding label in [0, 1]; null: all ones
  void* scratch;       // logit_gradient_scratch_bytes(classes) bytes, 64-byte aligned, one a thread
  // Outputs; any may be null.
  void* energy;          // Real [rows]           -T logsumexp(f / T)
  void* log_sum_exp;     // Real [rows]           logsumexp(f / T)
  void* maximum;         // Real [rows]           max f
  std::int64_t* argmax;  // [rows]                first index of the maximum
  void* norm[kNorms];    // Real [rows] each      norms of delta
  void* delta;           // Real [rows, classes]  contiguous
};

struct RowNormArguments {
  const void* values;  // [rows, columns], the stride between columns is 1
  DType dtype;
  std::int64_t columns;     // >= 0
  std::int64_t row_stride;  // in elements
  Norm norm;
  bool append_one;     // as if a column of ones stood beside the values: the bias
  DType factor_dtype;  // float32 or float64: the Real of `factor`
  void* factor;        // [rows], multiplied in place by the row's norm
};

struct HadamardArguments {
  void* values;         // Real [count], multiplied in place by (factors + shift)
  const void* factors;  // Real [count]
  double shift;
  DType dtype;  // float32 or float64
};

struct ClusterExtremesArguments {
  const std::int64_t* assignments;  // [samples], each in [0, clusters)
  const void* energies;             // Real [samples]; a sample whose energy is NaN is passed over
  std::int64_t samples;
  std::int64_t clusters;
  DType dtype;  // float32 or float64
  // The first of equals; -1 for a cluster without samples.
  std::int64_t* lowest;   // [clusters]
  std::int64_t* highest;  // [clusters]
};

struct SubtractArguments {
  const void* rows;  // [rows, columns], the stride between columns is 1
  DType dtype;
  std::int64_t columns;
  std::int64_t row_stride;  // in elements
  const void* point;        // Real [columns]
  DType real;               // float32 or float64: the Real of point and results
  void* difference;         // Real [rows, columns], contiguous: row - point
  void* norm;               // Real [rows]: its L2 norm
};

// The gradient of cross-entropy over negative distances to C + 1 prototypes with respect to the
// last of them, the origin: weight * x / |x|, or weight * 2 x for squared distances.
struct PrototypeGradientArguments {
  void* x;              // Real [rows, columns], becomes the gradient in place
  const void* norm;     // Real [rows], of x
  const void* offsets;  // Real [classes, columns], the other prototypes
  // Two that are padded to a whole number of the widest vectors; what the padding holds is ignored.
  const void* offset_norm;      // Real [classes]
  void* products;               // Real [rows, classes], x . offset; used up
  std::int64_t product_stride;  // in elements
  DType dtype;                  // float32 or float64
  std::int64_t columns;
  std::int64_t classes;
  double temperature;  // > 0
  double scale;        // of the gradient
  bool squared;
  void* log_weight;  // Real [rows]
};

// One tile of a search for the nearest row: what is found is kept where it is nearer.
struct NearestArguments {
  const void* queries;     // Real [rows, columns], contiguous
  const void* query_norm;  // Real [rows]
  const void* bank;        // Real [width, columns], contiguous
  const void* bank_norm;   // Real [width]
  const void* products;    // Real [rows, width], query . bank row
  DType dtype;             // float32 or float64
  std::int64_t columns;
  std::int64_t width;
  std::int64_t first;     // the tile's first row's index in the bank
  double tolerance;       // of the products, relative to |query| |bank row|
  void* distance;         // Real [rows], the nearest so far
  std::int64_t* nearest;  // [rows], its index, or -1
};

struct ShortCircuitArguments {
  void* logits;                 // Real [rows, classes], contiguous; changed in place
  const void* features;         // Real [rows, columns], contiguous
  const void* weight;           // Real [columns, classes], contiguous
  const std::int64_t* removed;  // [rows, count], columns of the features
  DType dtype;                  // float32 or float64
  std::int64_t classes;
  std::int64_t columns;
  std::int64_t count;
};

// For every row of every sample: the sum over the shifts s of
// left[sample, row, :] . right[sample, row + s, s : s + columns].
struct ShiftedProductsArguments {
  const void* left;  // Real [samples, rows, columns], contiguous
  std::int64_t rows;
  std::int64_t columns;
  const void* right;  // Real, at least [samples, rows + s, columns + s] for the largest shift
  std::int64_t right_sample_stride;  // in elements
  std::int64_t right_row_stride;
  const std::int64_t* shifts;
  std::int64_t shift_count;  // >= 1
  double* sums;              // [samples, rows]
  DType dtype;               // float32 or float64
};

// y = scale x + shift, a scale and a shift a channel.
struct ChannelAffineArguments {
  const void* delta;  // gradient of y: [samples, positions, channels] or, with channels_inner
  const void* input;  // false, [samples, channels, positions], contiguous; the input likewise
  DType dtype;        // of both
  bool channels_inner;
  std::int64_t channels;
  std::int64_t positions;
  const void* scale;  // Real [channels]; read only for `onward`
  void* onward;       // Real, like delta: scale delta, the gradient of x; may be null
  void* products;     // Real [samples, channels]: sum over the positions of delta input
  void* sums;         // Real [samples, channels]: of delta
};

std::size_t logit_gradient_scratch_bytes(std::int64_t classes);
void logit_gradient(const LogitGradientArguments& arguments, std::int64_t begin, std::int64_t end);
void multiply_row_norm(const RowNormArguments& arguments, std::int64_t begin, std::int64_t end);

void subtract(const SubtractArguments& arguments, std::int64_t begin, std::int64_t end);
void prototype_gradient(
    const PrototypeGradientArguments& arguments, std::int64_t begin, std::int64_t end);
void nearest(const NearestArguments& arguments, std::int64_t begin, std::int64_t end);
void short_circuit(const ShortCircuitArguments& arguments, std::int64_t begin, std::int64_t end);

// Here [begin, end) counts elements.
void hadamard(const HadamardArguments& arguments, std::int64_t begin, std::int64_t end);

// The whole of its arguments.
void cluster_extremes(const ClusterExtremesArguments& arguments);

// Here [begin, end) counts rows of all samples together.
void shifted_products(
    const ShiftedProductsArguments& arguments, std::int64_t begin, std::int64_t end);

// Here samples, or with channels_inner false (sample, channel) pairs.
void channel_affine(const ChannelAffineArguments& arguments, std::int64_t begin, std::int64_t end);

// Rows a thread should at least get: under about 20 microseconds of work, waking one costs more.
std::int64_t rows_per_task(std::int64_t classes, std::int64_t columns);

// The instruction set the kernels run with: the best the processor has, unless the environment
// variable GROOD_FAST_SIMD or set_simd_level() lowers it.
const char* simd_level();
// False, and nothing changed, when the level was not compiled or the processor lacks it.
bool set_simd_level(const char* name);
bool simd_level_compiled(const char* name);
bool simd_level_supported(const char* name);
// Why GROOD_FAST_SIMD was not obeyed; empty if it was, or is not set.
const char* simd_level_complaint();

inline constexpr const char* kSimdLevels[] = {"baseline", "avx2", "avx512"};

}  // namespace grood_fast
