// grood_fast::dual_project: coordinates of rank-one gradients in a subspace that is spanned by
// others, z = ((D Da^T) o (H Ha^T + bias)) A, tile by tile: no B x N array is ever whole.
#include <algorithm>

#include "products.h"

namespace grood_fast::ops {
namespace {

// Anchors a tile: enough for the products to run at full speed, and no more than a thread's share.
constexpr int64_t kMostTileAnchors = 4096, kLeastTileAnchors = 512;
// Elements of one tile, of which every thread has two.
constexpr int64_t kTileElements = 1 << 20;
// Elements a thread should at least get of a tile's element-wise product.
constexpr int64_t kGrain = 1 << 15;

// A matrix by its memory alone, whose blocks of rows any thread may take: worker threads know
// nothing of the caller's autograd or inference mode, so they get plain tensors.
class Rows {
 public:
  explicit Rows(const Tensor& matrix)
      : data_(static_cast<char*>(const_cast<void*>(matrix.const_data_ptr()))),
        columns_(matrix.size(1)),
        strides_{matrix.stride(0), matrix.stride(1)},
        type_(matrix.scalar_type()),
        row_bytes_(matrix.stride(0) * static_cast<int64_t>(matrix.element_size())) {}
  Rows(void* data, int64_t columns, ScalarType type, int64_t element_size)
      : data_(static_cast<char*>(data)),
        columns_(columns),
        strides_{columns, 1},
        type_(type),
        row_bytes_(columns * element_size) {}

  Tensor operator()(int64_t start, int64_t count) const {
    return torch::stable::from_blob(
        data_ + start * row_bytes_, {count, columns_}, {strides_[0], strides_[1]},
        torch::stable::Device(torch::headeronly::DeviceType::CPU), type_);
  }

  // The same in the dtype of the result; a copy only where it is another.
  Tensor as(ScalarType real, int64_t start, int64_t count) const {
    const Tensor rows = (*this)(start, count);
    return type_ == real ? rows : torch::stable::to(rows, real);
  }

 private:
  char* data_;
  int64_t columns_;
  int64_t strides_[2];
  ScalarType type_;
  int64_t row_bytes_;
};

template <typename Real>
void add(void* total, const void* part, int64_t count) {
  Real* to = static_cast<Real*>(total);
  const Real* from = static_cast<const Real*>(part);
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

void check(
    const Tensor& delta,            // [B, C]
    const Tensor& features,         // [B, D]
    const Tensor& anchor_delta,     // [N, C]
    const Tensor& anchor_features,  // [N, D]
    const Tensor& coefficients) {   // [N, K]
  check_matrix(delta, "delta", "(B, C)");
  check_matrix(features, "features", "(B, D)");
  check_matrix(anchor_delta, "anchor_delta", "(N, C)");
  check_matrix(anchor_features, "anchor_features", "(N, D)");
  check_matrix(coefficients, "coefficients", "(N, K)");
  const int64_t batch = delta.size(0), anchors = anchor_delta.size(0);
  STD_TORCH_CHECK(
      features.size(0) == batch, "delta and features must have the same number of rows, got ",
      batch, " and ", features.size(0));
  STD_TORCH_CHECK(
      anchor_features.size(0) == anchors && coefficients.size(0) == anchors,
      "anchor_delta, anchor_features and coefficients must have the same number of rows, got ",
      anchors, ", ", anchor_features.size(0), " and ", coefficients.size(0));
  STD_TORCH_CHECK(
      delta.size(1) == anchor_delta.size(1) && features.size(1) == anchor_features.size(1),
      "anchors must have as many columns as delta and features: ", delta.size(1), " and ",
      features.size(1), ", got ", anchor_delta.size(1), " and ", anchor_features.size(1));
  real_dtype_of(coefficients, "coefficients");
  for (const Tensor* operand : {&delta, &features, &anchor_delta, &anchor_features})
    dtype_of(*operand, "delta, features and their anchors");
}

[[maybe_unused]] Tensor on_cpu(
    const Tensor& delta, const Tensor& features, const Tensor& anchor_delta,
    const Tensor& anchor_features, const Tensor& coefficients, double bias) {
  check(delta, features, anchor_delta, anchor_features, coefficients);
  const int64_t batch = delta.size(0), anchors = anchor_delta.size(0);
  const int64_t components = coefficients.size(1);
  const DType dtype = dtype_of(coefficients, "coefficients");
  const ScalarType real = coefficients.scalar_type();
  Tensor result = torch::stable::new_zeros(coefficients, {batch, components});  // [B, K]
  if (result.numel() == 0 || anchors == 0) return result;
  const Rows d{delta}, h{features}, da{anchor_delta}, ha{anchor_features}, a{coefficients};
  const int64_t bytes = dtype == DType::float64 ? 8 : 4;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t width = std::min(
      anchors, std::clamp((anchors + threads - 1) / threads, kLeastTileAnchors, kMostTileAnchors));
  const int64_t height = std::clamp<int64_t>(kTileElements / width, 1, batch);
  const int64_t tiles = (anchors + width - 1) / width;
  // Every thread takes its own tiles of anchors from start to end, so that nobody waits within
  // one; where there are too few for that, the threads share each product.
  const int64_t workers = tiles < threads ? 1 : threads;
  const Tensor sums = torch::stable::new_zeros(coefficients, {workers - 1, batch, components});
  const Tensor scratch =
      torch::stable::new_empty(coefficients, {workers, height * (2 * width + components)});
  const auto total_of = [&](int64_t worker) {
    return static_cast<char*>(worker == 0 ? result.mutable_data_ptr() : sums.mutable_data_ptr()) +
           std::max<int64_t>(worker - 1, 0) * batch * components * bytes;
  };
  const auto accumulate = dtype == DType::float64 ? add<double> : add<float>;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      char* left = static_cast<char*>(scratch.mutable_data_ptr()) +
                   worker * height * (2 * width + components) * bytes;
      char* right = left + height * width * bytes;
      char* part = right + height * width * bytes;
      const Rows z{part, components, real, bytes};
      for (int64_t tile = worker; tile < tiles; tile += workers) {
        const int64_t anchor = tile * width, across = std::min(width, anchors - anchor);
        const Tensor tile_delta = torch::stable::transpose(da.as(real, anchor, across), 0, 1);
        const Tensor tile_features = torch::stable::transpose(ha.as(real, anchor, across), 0, 1);
        const Rows s{left, across, real, bytes}, r{right, across, real, bytes};
        for (int64_t row = 0; row < batch; row += height) {
          const int64_t down = std::min(height, batch - row);
          multiply(d.as(real, row, down), tile_delta, s(0, down));
          multiply(h.as(real, row, down), tile_features, r(0, down));
          const HadamardArguments meet{left, right, bias, dtype};
          torch::stable::parallel_for(0, down * across, kGrain, [&](int64_t from, int64_t to) {
            hadamard(meet, from, to);
          });
          multiply(s(0, down), a(anchor, across), z(0, down));
          accumulate(total_of(worker) + row * components * bytes, part, down * components);
        }
      }
    }
  });
  for (int64_t worker = 1; worker < workers; ++worker)
    accumulate(result.mutable_data_ptr(), total_of(worker), batch * components);
  return result;
}

[[maybe_unused]] Tensor on_cuda(
    const Tensor& delta, const Tensor& features, const Tensor& anchor_delta,
    const Tensor& anchor_features, const Tensor& coefficients, double bias) {
  check(delta, features, anchor_delta, anchor_features, coefficients);
  const int64_t batch = delta.size(0), anchors = anchor_delta.size(0);
  const int64_t components = coefficients.size(1);
  const CudaDevice device(coefficients, {&delta, &features, &anchor_delta, &anchor_features});
  const Tensor result = torch::stable::new_zeros(coefficients, {batch, components});  // [B, K]
  if (result.numel() == 0 || anchors == 0) return result;
  // Half-precision operands are multiplied as they are, if all of them are of one kind.
  const ScalarType real = coefficients.scalar_type();
  const Tensor* const operands[] = {&delta, &features, &anchor_delta, &anchor_features};
  const bool as_they_are =
      real == ScalarType::Float && delta.scalar_type() != ScalarType::Double &&
      std::all_of(std::begin(operands), std::end(operands), [&](const Tensor* operand) {
        return operand->scalar_type() == delta.scalar_type();
      });
  const auto as_operand = [&](const Tensor& matrix) {
    return unit_column_stride(
        as_they_are || matrix.scalar_type() == real ? matrix : torch::stable::to(matrix, real));
  };
  const Tensor d = as_operand(delta), h = as_operand(features);
  const Tensor da = as_operand(anchor_delta), ha = as_operand(anchor_features);
  const Tensor a = unit_column_stride(coefficients);
  cuda::DualProjectArguments arguments{
      dtype_of(d, "delta"),
      d.const_data_ptr(),
      h.const_data_ptr(),
      da.const_data_ptr(),
      ha.const_data_ptr(),
      a.const_data_ptr(),
      batch,
      d.size(1),
      h.size(1),
      anchors,
      components,
      d.stride(0),
      h.stride(0),
      da.stride(0),
      ha.stride(0),
      a.stride(0),
      bias,
      nullptr,
      result.mutable_data_ptr()};
  const Tensor parts = torch::stable::new_empty(
      coefficients, {cuda::dual_project_parts(arguments), batch, components});
  arguments.parts = parts.mutable_data_ptr();
  device.check(cuda::dual_project(arguments, device.stream()), "dual_project");
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(GROOD_FAST_LIBRARY, m) {
  m.def(
      "dual_project(Tensor delta, Tensor features, Tensor anchor_delta, Tensor anchor_features,"
      " Tensor coefficients, float bias) -> Tensor");
}

GROOD_FAST_IMPLEMENT("dual_project", &on_cpu, &on_cuda)

}  // namespace grood_fast::ops
