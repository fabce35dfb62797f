// z = ((D Da^T) o (H Ha^T + bias)) A, with the element-wise product in the middle kept in
// registers, as attention keeps its weights: no B x N array exists anywhere.
//
// A block takes 64 rows and walks over a share of the anchors, a tile of them at a time. Its four
// warps have 16 rows each and all of the tile's anchors. What is needed next is copied to shared
// memory while the tensor cores work on what has arrived.
#pragma once

#include "fragments.cuh"
#include "tiles.cuh"

namespace grood_fast::cuda {

struct DualProject {
  MatrixArgument delta, features, anchor_delta, anchor_features, coefficients;
  double bias;
  std::int64_t tiles_per_share;  // of anchors
  void* result;                  // Real [shares, B, K]: each share's part of the sum
};

template <typename Operand>
struct DualProjectShape {
  using Real = typename RealOf<Operand>::type;
  static constexpr int kThreads = 128;
  static constexpr int kRows = kThreads / kWarpThreads * 16;
  static constexpr int kAnchors = sizeof(Real) == 8 ? 32 : 64;  // a tile
  static constexpr int kComponents = 512 / sizeof(Real);        // at once in registers
  static constexpr int kComponentPitch = kComponents + 16 / sizeof(Real);
  static constexpr int kCoefficientRows = 32;  // at once in shared memory
  static constexpr int kOperandBytes =
      (kRows + kAnchors) * Product<Operand>::kPitch * static_cast<int>(sizeof(Operand));
  static constexpr int kCoefficientBytes =
      kCoefficientRows * kComponentPitch * static_cast<int>(sizeof(Real));
  static constexpr int kBuffer =
      kOperandBytes > kCoefficientBytes ? kOperandBytes : kCoefficientBytes;
};

template <typename Operand>
struct DualProjectBlock {
  using Shape = DualProjectShape<Operand>;
  using Real = typename Shape::Real;
  using P = Product<Operand>;
  static constexpr int kAnchorTiles = Shape::kAnchors / 8;
  static constexpr int kComponentTiles = Shape::kComponents / 8;
  static constexpr int kParts = Shape::kAnchors / Shape::kCoefficientRows;

  const DualProject& a;
  unsigned char (&buffers)[2][Shape::kBuffer];
  int delta_steps, feature_steps, chunks;  // of a tile
  std::int64_t first_row, first_tile, last_tile;
  // What is fetched next, and where to.
  std::int64_t next_tile;
  int next_step = 0;
  int buffer = 0;

  __device__ __forceinline__
  DualProjectBlock(const DualProject& a, unsigned char (&buffers)[2][Shape::kBuffer])
      : a(a),
        buffers(buffers),
        delta_steps(static_cast<int>((a.delta.columns + P::kDepth - 1) / P::kDepth)),
        feature_steps(static_cast<int>((a.features.columns + P::kDepth - 1) / P::kDepth)),
        chunks(
            static_cast<int>(
                (a.coefficients.columns + Shape::kComponents - 1) / Shape::kComponents)),
        first_row(static_cast<std::int64_t>(blockIdx.x) * Shape::kRows),
        first_tile(blockIdx.y * a.tiles_per_share) {
    const std::int64_t tiles = (a.anchor_delta.rows + Shape::kAnchors - 1) / Shape::kAnchors;
    last_tile = first_tile + a.tiles_per_share < tiles ? first_tile + a.tiles_per_share : tiles;
    next_tile = first_tile;
  }

  // Starts copying what the next step needs.
  __device__ __forceinline__ void fetch() {
    if (next_tile == last_tile) return;
    unsigned char* to = buffers[buffer];
    const std::int64_t anchor = next_tile * Shape::kAnchors;
    const auto operands = [&](const MatrixArgument& rows, const MatrixArgument& anchors, int step) {
      const std::int64_t column = static_cast<std::int64_t>(step) * P::kDepth;
      copy_tile<Operand, Shape::kRows, P::kDepth, P::kPitch, Shape::kThreads>(
          to, rows, first_row, column);
      copy_tile<Operand, Shape::kAnchors, P::kDepth, P::kPitch, Shape::kThreads>(
          to + Shape::kRows * P::kPitch * sizeof(Operand), anchors, anchor, column);
    };
    if (next_step < delta_steps) {
      operands(a.delta, a.anchor_delta, next_step);
    } else if (next_step < delta_steps + feature_steps) {
      operands(a.features, a.anchor_features, next_step - delta_steps);
    } else {
      const int part = next_step - delta_steps - feature_steps;
      copy_tile<
          Real, Shape::kCoefficientRows, Shape::kComponents, Shape::kComponentPitch,
          Shape::kThreads>(
          to, a.coefficients, anchor + part % kParts * Shape::kCoefficientRows,
          static_cast<std::int64_t>(part / kParts) * Shape::kComponents);
    }
    if (++next_step == delta_steps + feature_steps + chunks * kParts) {
      next_step = 0;
      ++next_tile;
    }
  }

  // What was fetched last, for all threads; and the next one is fetched into the other buffer, with
  // which they are done.
  __device__ __forceinline__ const unsigned char* arrived() {
    wait_for_copies();
    __syncthreads();
    const unsigned char* now = buffers[buffer];
    buffer ^= 1;
    fetch();
    return now;
  }

  __device__ __forceinline__ void add_products(Real (&to)[kAnchorTiles][4], int steps) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    for (int step = 0; step < steps; ++step) {
      const Operand* tile = reinterpret_cast<const Operand*>(arrived());
      P::add_product(to, tile + warp * 16 * P::kPitch, tile + Shape::kRows * P::kPitch);
    }
  }

  // Calls body(component, accumulators (row, row + 8), pointer to the first's place).
  template <typename Body>
  __device__ __forceinline__ void each_place(Body body) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
    const std::int64_t components = a.coefficients.columns;
    Real* share = static_cast<Real*>(a.result) + blockIdx.y * a.delta.rows * components;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::int64_t row = first_row + warp * 16 + lane / 4 + i / 2 * 8;
      if (row < a.delta.rows) body(i, lane % 4 * 2 + i % 2, share + row * components);
    }
  }

  __device__ __forceinline__ void run() {
    Real z[kComponentTiles][4] = {};
    fetch();
    for (std::int64_t tile = first_tile; tile < last_tile; ++tile) {
      Real p[kAnchorTiles][4] = {}, right[kAnchorTiles][4] = {};
      add_products(p, delta_steps);
      add_products(right, feature_steps);
      const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
#pragma unroll
      for (int j = 0; j < kAnchorTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const std::int64_t anchor = tile * Shape::kAnchors + j * 8 + lane % 4 * 2 + i % 2;
          // Past the last anchor stand zeros, but zero times infinity would be seen.
          p[j][i] = anchor < a.anchor_delta.rows
                        ? p[j][i] * (right[j][i] + static_cast<Real>(a.bias))
                        : Real(0);
        }
      }
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const std::int64_t first = static_cast<std::int64_t>(chunk) * Shape::kComponents;
        const std::int64_t components = a.coefficients.columns;
        if (chunks > 1) {  // more than fit into registers wait in the result
          each_place([&](int i, int column, Real* row) {
#pragma unroll
            for (int n = 0; n < kComponentTiles; ++n) {
              const std::int64_t component = first + n * 8 + column;
              z[n][i] = component < components && tile > first_tile ? row[component] : Real(0);
            }
          });
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          constexpr int kInner = Shape::kCoefficientRows / 8;
          RegisterProduct<Real>::template add_product<
              kInner, kComponentTiles, Shape::kComponentPitch>(
              z, p + part * kInner, reinterpret_cast<const Real*>(arrived()));
        }
        if (chunks > 1 || tile + 1 == last_tile) {
          each_place([&](int i, int column, Real* row) {
#pragma unroll
            for (int n = 0; n < kComponentTiles; ++n) {
              const std::int64_t component = first + n * 8 + column;
              if (component < components) row[component] = z[n][i];
            }
          });
        }
      }
    }
  }
};

template <typename Operand>
__global__ void __launch_bounds__(DualProjectShape<Operand>::kThreads, 2)
    dual_project_kernel(DualProject a) {
  // Both buffers in one array: rows start at multiples of 16 bytes.
  struct alignas(16) Buffers {
    unsigned char bytes[2][DualProjectShape<Operand>::kBuffer];
  };
  GROOD_FAST_SHARED(Buffers, buffers, 1);
  DualProjectBlock<Operand>(a, buffers[0].bytes).run();
}

// result[i] = sum over shares of parts[share][i], always in this order.
template <typename Real>
__global__ void __launch_bounds__(256)
    add_shares_kernel(const Real* parts, std::int64_t shares, std::int64_t count, Real* result) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  Real sum = 0;
  for (std::int64_t share = 0; share < shares; ++share) sum += parts[share * count + i];
  result[i] = sum;
}

}  // namespace grood_fast::cuda
