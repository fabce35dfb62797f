// What the instructions in csrc/kernels/cuda/ptx.h do, as the PTX manual defines them. The matrix
// products are exact sums, rounded towards zero once: no better than tensor cores, whose additions
// truncate.
#pragma once

#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda.h"

namespace grood_fast::emulation::ptx {

// --- asynchronous copies
// --------------------------------------------------------------------------

template <int kBytes>
void copy_async(void* to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if (reinterpret_cast<std::uintptr_t>(to) % kBytes != 0 ||
      reinterpret_cast<std::uintptr_t>(from) % kBytes != 0)
    violate("cp.async: an address is no multiple of the size");
  copy_later(
      {to, from, kBytes}, [](const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); });
}
inline void wait_for_copies() {
  close_copy_group();
  finish_copies(0);
}

// --- matrices across a warp
// -----------------------------------------------------------------------

namespace detail {

inline float truncated(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? std::nextafterf(nearest, 0.0f)
                                                                    : nearest;
}

// Rows x depth by depth x 8. `Call` says where each lane's numbers belong.
template <int kRows, int kDepth, typename Call>
void multiply_add(void* const (&all)[kWarp]) {
  double a[kRows][kDepth], b[kDepth][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto* call = static_cast<const Call*>(all[lane]);
    if (call == nullptr) return;  // an incomplete warp: undefined, nothing is computed
    call->place(lane / 4, lane % 4, a, b);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    auto* call = static_cast<Call*>(all[lane]);
    for (int i = 0; i < 2 * kRows / 8; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = call->result(i);
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      call->set_result(i, sum);
    }
  }
}

template <float (*kWiden)(std::uint16_t)>
struct HalfCall {
  float (&d)[4];
  const std::uint32_t (&a)[4];
  std::uint32_t b[2];

  void place(int g, int t, double (&left)[16][16], double (&right)[16][8]) const {
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        left[g + i % 2 * 8][t * 2 + half + i / 2 * 8] =
            kWiden(static_cast<std::uint16_t>(a[i] >> half * 16));
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 2; ++half) {
        right[t * 2 + half + i * 8][g] = kWiden(static_cast<std::uint16_t>(b[i] >> half * 16));
      }
    }
  }
  double result(int i) const { return d[i]; }
  void set_result(int i, double value) { d[i] = truncated(value); }
};

struct Tf32Call {
  float (&d)[4];
  const std::uint32_t (&a)[4];
  std::uint32_t b[2];

  static double value(std::uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }
  void place(int g, int t, double (&left)[16][8], double (&right)[8][8]) const {
    for (int i = 0; i < 4; ++i) left[g + i % 2 * 8][t + i / 2 * 4] = value(a[i]);
    for (int i = 0; i < 2; ++i) right[t + i * 4][g] = value(b[i]);
  }
  double result(int i) const { return d[i]; }
  void set_result(int i, double value) { d[i] = truncated(value); }
};

struct Float64Call {
  double (&d)[2];
  double a, b;

  void place(int g, int t, double (&left)[8][4], double (&right)[4][8]) const {
    left[g][t] = a;
    right[t][g] = b;
  }
  double result(int i) const { return d[i]; }
  void set_result(int i, double value) { d[i] = value; }
};

}  // namespace detail

inline float bfloat16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(std::uint32_t{bits} << 16);
}
inline float float16_to_float(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude = exponent == 31 ? (mantissa != 0 ? NAN : INFINITY)
                          : exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}
inline std::uint32_t to_tf32(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;  // to nearest, ties away from zero
}

// Each lane reads the row it names, then gives every other lane its two elements of it.
inline void load_matrices(std::uint32_t (&to)[4], const void* row, int line = __builtin_LINE()) {
  struct Call {
    std::uint32_t row[4];
    std::uint32_t (&to)[4];
  };
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0)
    violate("ldmatrix: a row's address is no multiple of 16");
  Call mine{{}, to};
  std::memcpy(mine.row, row, sizeof(mine.row));
  const Perform perform = [](void* const(&all)[kWarp]) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (all[lane] == nullptr) return;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto* from = static_cast<const Call*>(all[matrix * 8 + lane / 4]);
        static_cast<Call*>(all[lane])->to[matrix] = from->row[lane % 4];
      }
    }
  };
  warp_meeting("ldmatrix", line, 0xffffffffu, perform, &mine);
}

inline void mma_bfloat16(
    float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
    int line = __builtin_LINE()) {
  using Call = detail::HalfCall<bfloat16_to_float>;
  Call mine{d, a, {b0, b1}};
  warp_meeting("mma.bf16", line, 0xffffffffu, detail::multiply_add<16, 16, Call>, &mine);
}
inline void mma_float16(
    float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
    int line = __builtin_LINE()) {
  using Call = detail::HalfCall<float16_to_float>;
  Call mine{d, a, {b0, b1}};
  warp_meeting("mma.f16", line, 0xffffffffu, detail::multiply_add<16, 16, Call>, &mine);
}
inline void mma_tf32(
    float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
    int line = __builtin_LINE()) {
  detail::Tf32Call mine{d, a, {b0, b1}};
  warp_meeting("mma.tf32", line, 0xffffffffu, detail::multiply_add<16, 8, detail::Tf32Call>, &mine);
}
inline void mma_float64(double& d0, double& d1, double a, double b, int line = __builtin_LINE()) {
  double d[2] = {d0, d1};
  detail::Float64Call mine{d, a, b};
  warp_meeting(
      "mma.f64", line, 0xffffffffu, detail::multiply_add<8, 4, detail::Float64Call>, &mine);
  d0 = d[0];
  d1 = d[1];
}

}  // namespace grood_fast::emulation::ptx
