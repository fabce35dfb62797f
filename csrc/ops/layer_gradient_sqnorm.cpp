// grood_fast::layer_gradient_sqnorm: per sample, the squared norm of a gradient that is a sum of
// outer products over positions, sum_j || sum_r delta_r activation_{r + offset_j}^T ||^2.
// A linear layer has the one offset 0, a convolution one for every entry of its kernel, so that its
// patches are never gathered. Either the gradient is formed, an entry of the kernel at a time, or
// the positions' inner products are, whichever takes fewer multiplications.
#include <algorithm>
#include <array>
#include <vector>

#include "common.h"

namespace grood_fast::ops {
namespace {

// Elements of the products of one tile of samples: they stay in a processor's second cache.
constexpr int64_t kTileElements = 1 << 18;
constexpr int64_t kGrain = 1 << 15;

// out = a b, for each sample
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(a), torch::stable::detail::from(b),
      torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the reference that was returned
}

Tensor part(const Tensor& tensor, int64_t dimension, int64_t start, int64_t count) {
  Tensor whole = tensor;
  return torch::stable::narrow(whole, dimension, start, count);
}

Tensor samples_of(const Tensor& tensor, int64_t start, int64_t count, ScalarType real) {
  const Tensor some = part(tensor, 0, start, count);
  return some.scalar_type() == real ? some : torch::stable::to(some, real);
}

// Row by row in parallel, the sums over each sample's rows in order: the same bits every time.
template <typename Real>
void add_products(
    ShiftedProductsArguments products, int64_t samples, std::vector<double>& row_sums,
    Real* norms) {
  const int64_t rows = samples * products.rows;
  row_sums.resize(rows);
  products.sums = row_sums.data();
  const int64_t work = std::max<int64_t>(1, products.columns * products.shift_count);
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, kGrain / work),
      [&](int64_t begin, int64_t end) { shifted_products(products, begin, end); });
  for (int64_t sample = 0; sample < samples; ++sample) {
    double sum = 0;
    for (int64_t row = 0; row < products.rows; ++row) sum += row_sums[sample * products.rows + row];
    norms[sample] += static_cast<Real>(sum);
  }
}

template <typename Real>
void compute(
    const Tensor& activation, const Tensor& delta, const std::vector<int64_t>& offsets, DType dtype,
    const Tensor& result) {
  const int64_t batch = delta.size(0), count = delta.size(1), outputs = delta.size(2);
  const int64_t grid = activation.size(1), inputs = activation.size(2);
  const int64_t entries = static_cast<int64_t>(offsets.size());
  const ScalarType real = result.scalar_type();
  Real* norms = static_cast<Real*>(result.mutable_data_ptr());
  std::vector<double> row_sums;

  const double forming = double(entries) * outputs * inputs * (count + 1);
  const double pairing = double(grid) * grid * inputs + double(count) * count * (outputs + entries);
  const bool form = forming <= pairing;
  const int64_t elements = form ? outputs * inputs : grid * grid + count * count;
  const int64_t tile =
      std::clamp<int64_t>(kTileElements / std::max<int64_t>(1, elements), 1, batch);
  const int64_t height = form ? outputs : grid, width = form ? inputs : grid;
  const Tensor first = torch::stable::new_empty(result, {tile, height, width});
  const Tensor second = form ? first : torch::stable::new_empty(result, {tile, count, count});
  const int64_t unshifted = 0;

  for (int64_t start = 0; start < batch; start += tile) {
    const int64_t samples = std::min(tile, batch - start);
    const Tensor a = samples_of(activation, start, samples, real);
    const Tensor d = samples_of(delta, start, samples, real);
    const Tensor left = part(first, 0, 0, samples), right = part(second, 0, 0, samples);
    if (form) {
      const Tensor transposed = torch::stable::transpose(d, 1, 2);
      for (const int64_t offset : offsets) {
        multiply(transposed, part(a, 1, offset, count), left);
        const ShiftedProductsArguments squares{
            left.const_data_ptr(),
            outputs,
            inputs,
            left.const_data_ptr(),
            outputs * inputs,
            inputs,
            &unshifted,
            1,
            nullptr,
            dtype};
        add_products<Real>(squares, samples, row_sums, norms + start);
      }
    } else {
      multiply(a, torch::stable::transpose(a, 1, 2), left);
      multiply(d, torch::stable::transpose(d, 1, 2), right);
      const ShiftedProductsArguments meeting{
          right.const_data_ptr(),
          count,
          count,
          left.const_data_ptr(),
          grid * grid,
          grid,
          offsets.data(),
          entries,
          nullptr,
          dtype};
      add_products<Real>(meeting, samples, row_sums, norms + start);
    }
  }
}

Tensor layer_gradient_sqnorm(
    const Tensor& activation,  // [B, Q, N]
    const Tensor& delta,       // [B, R, M]
    std::vector<int64_t> offsets) {
  STD_TORCH_CHECK(
      activation.dim() == 3 && delta.dim() == 3,
      "activation and delta must have the shapes (B, Q, N) and (B, R, M), got ", activation.dim(),
      " and ", delta.dim(), " dimensions");
  STD_TORCH_CHECK(
      activation.size(0) == delta.size(0), "activation and delta must have as many samples, got ",
      activation.size(0), " and ", delta.size(0));
  STD_TORCH_CHECK(!offsets.empty(), "at least one offset is needed");
  for (const int64_t offset : offsets)
    STD_TORCH_CHECK(
        offset >= 0 && offset + delta.size(1) <= activation.size(1), "the offset ", offset,
        " takes ", delta.size(1), " positions beyond the activation's ", activation.size(1));
  const bool wide = dtype_of(activation, "activation") == DType::float64;
  STD_TORCH_CHECK(
      wide == (dtype_of(delta, "delta") == DType::float64),
      "activation and delta must both be float64 or neither");
  const DType dtype = wide ? DType::float64 : DType::float32;
  const Tensor result = torch::stable::new_zeros(delta, {delta.size(0)}, real_of(dtype));  // [B]
  if (delta.numel() == 0 || activation.numel() == 0) return result;
  if (wide)
    compute<double>(activation, delta, offsets, dtype, result);
  else
    compute<float>(activation, delta, offsets, dtype, result);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast, m) {
  m.def("layer_gradient_sqnorm(Tensor activation, Tensor delta, int[] offsets) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(grood_fast, CPU, m) {
  m.impl("layer_gradient_sqnorm", TORCH_BOX(&layer_gradient_sqnorm));
}

}  // namespace grood_fast::ops
