// Vectors of this level's width, in the compiler's own vector types: arithmetic, comparison and
// selection work on all lanes at once, and one source serves SSE2, NEON, AVX2 and AVX-512.
//
// Nothing here may instantiate a template of the standard library: see the note in avx2.cpp.
#pragma once

#define GROOD_FAST_INLINE inline __attribute__((always_inline))

namespace grood_fast::GROOD_FAST_LEVEL {

template <typename Real>
struct Constants;

template <>
struct Constants<float> {
  using Bits = std::uint32_t;
  using Index = std::int32_t;
  static constexpr float kLowest = -3.402823466e+38f;
  static constexpr float kSmallestNormal = 1.175494351e-38f;
  static constexpr float kSmallSquare = 1e-30f;  // sums of squares below have lost digits
  static constexpr float kUnderflow = -126.0f;   // 2^y is taken for 0 below
  static constexpr float kRound = 12582912.0f;   // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kMantissa = 23;
  // 2^r on |r| <= 1/2, highest power first: minimax in relative error (2e-9), then rounded (2e-8).
  static constexpr float kExp2[] = {
      1.535336199e-04f,
      1.339887445e-03f,
      9.618437358e-03f,
      5.550332471e-02f,
      2.402264791e-01f,
      6.931472029e-01f,
      1.0f};
};

template <>
struct Constants<double> {
  using Bits = std::uint64_t;
  using Index = std::int64_t;
  static constexpr double kLowest = -1.7976931348623157e+308;
  static constexpr double kSmallestNormal = 2.2250738585072014e-308;
  static constexpr double kSmallSquare = 1e-290;
  static constexpr double kUnderflow = -1022.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  // ln(2)^k / k!, k = 13 ... 0: the first neglected term is 4e-18.
  static constexpr double kExp2[] = {1.36914888539041241e-12, 2.56784359934881958e-11,
                                     4.44553827187081007e-10, 7.05491162080112088e-09,
                                     1.01780860092396960e-07, 1.32154867901443053e-06,
                                     1.52527338040598377e-05, 1.54035303933816061e-04,
                                     1.33335581464284411e-03, 9.61812910762847688e-03,
                                     5.55041086648215762e-02, 2.40226506959100694e-01,
                                     6.93147180559945286e-01, 1.0};
};

template <typename Real>
struct Simd {
  using Bits = typename Constants<Real>::Bits;
  using Index = typename Constants<Real>::Index;
  // may_alias: arrays of V are also read and written by element.
  typedef Real V __attribute__((vector_size(GROOD_FAST_VECTOR_BYTES), may_alias));
  typedef Bits U __attribute__((vector_size(GROOD_FAST_VECTOR_BYTES)));
  typedef Index I __attribute__((vector_size(GROOD_FAST_VECTOR_BYTES)));
  // The same vector at any address; GCC compiles memcpy into one of these badly.
  typedef Real Unaligned
      __attribute__((vector_size(GROOD_FAST_VECTOR_BYTES), aligned(sizeof(Real)), may_alias));
  static constexpr std::int64_t kLanes = GROOD_FAST_VECTOR_BYTES / sizeof(Real);

  static GROOD_FAST_INLINE V all(Real value) { return value - V{}; }
  static GROOD_FAST_INLINE V load(const Real* from) {
    return *reinterpret_cast<const Unaligned*>(from);
  }
  static GROOD_FAST_INLINE void store(Real* to, V value) {
    *reinterpret_cast<Unaligned*>(to) = value;
  }
  static GROOD_FAST_INLINE V max(V a, V b) { return a > b ? a : b; }
  static GROOD_FAST_INLINE V abs(V a) {
    return reinterpret_cast<V>(reinterpret_cast<U>(a) & (~Bits{0} >> 1));
  }
};

inline constexpr double kLog2E = 1.44269504088896340736;

// 2^(x * k) for x * k <= 0, -infinity included; relative error about 1e-7 (float), 1e-16 (double).
template <typename Real, typename V = typename Simd<Real>::V>
GROOD_FAST_INLINE V exp2_nonpositive(V x, Real k) {
  using S = Simd<Real>;
  using C = Constants<Real>;
  const V y = x * k;
  const V rounded = x * k + C::kRound;
  const V r = x * k - (rounded - C::kRound);
  V p = S::all(C::kExp2[0]);
  for (unsigned i = 1; i < sizeof(C::kExp2) / sizeof(Real); ++i) p = p * r + C::kExp2[i];
  // The low bits of `rounded` are the integer part: adding them to the exponent scales by 2 to it.
  const auto bits = reinterpret_cast<typename S::U>(p) +
                    (reinterpret_cast<typename S::U>(rounded) << C::kMantissa);
  return y < C::kUnderflow ? V{} : reinterpret_cast<V>(bits);
}

// 1 / (1 + exp(-x)), accurate in both tails.
template <typename Real, typename V = typename Simd<Real>::V>
GROOD_FAST_INLINE V sigmoid(V x) {
  const V e = exp2_nonpositive<Real>(-Simd<Real>::abs(x), Real(kLog2E));
  return (x < Real(0) ? e : Simd<Real>::all(1)) / (Real(1) + e);
}

// Input formats, widened to Real. The element types are distinct so that overloads tell them apart.
struct Bfloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <typename Input>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};

template <typename U>
GROOD_FAST_INLINE U float16_magnitude_bits(U bits) {
  return (bits & 0x7fffu) << 13;  // exponent and mantissa at their float32 places, bias still 15
}
inline constexpr float kFloat16Rebias = 5.192296858534828e33f;  // 2^112
inline constexpr std::uint32_t kFloat16NonFinite = 0x7c00u << 13;

GROOD_FAST_INLINE float float_of_bits(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
GROOD_FAST_INLINE std::uint32_t bits_of_float(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

GROOD_FAST_INLINE float widen(float value) { return value; }
GROOD_FAST_INLINE double widen(double value) { return value; }
GROOD_FAST_INLINE float widen(Bfloat16 value) {
  return float_of_bits(std::uint32_t{value.bits} << 16);
}
GROOD_FAST_INLINE float widen(Float16 value) {
  const std::uint32_t magnitude = float16_magnitude_bits(std::uint32_t{value.bits});
  std::uint32_t bits = bits_of_float(float_of_bits(magnitude) * kFloat16Rebias);
  if (magnitude >= kFloat16NonFinite) bits |= 0x7f800000u;
  return float_of_bits(bits | std::uint32_t{value.bits & 0x8000u} << 16);
}

GROOD_FAST_INLINE Simd<float>::V load_wide(const float* from) { return Simd<float>::load(from); }
GROOD_FAST_INLINE Simd<double>::V load_wide(const double* from) { return Simd<double>::load(from); }

GROOD_FAST_INLINE Simd<float>::U load_half_bits(const void* from) {
  typedef std::uint16_t Half
      __attribute__((vector_size(GROOD_FAST_VECTOR_BYTES / 2), aligned(2), may_alias));
  return __builtin_convertvector(*static_cast<const Half*>(from), Simd<float>::U);
}
GROOD_FAST_INLINE Simd<float>::V load_wide(const Bfloat16* from) {
  return reinterpret_cast<Simd<float>::V>(load_half_bits(from) << 16);
}
GROOD_FAST_INLINE Simd<float>::V load_wide(const Float16* from) {
  using S = Simd<float>;
  const S::U half = load_half_bits(from);
  const S::U magnitude = float16_magnitude_bits(half);
  S::U bits = reinterpret_cast<S::U>(reinterpret_cast<S::V>(magnitude) * kFloat16Rebias);
  bits |= reinterpret_cast<S::U>(magnitude >= kFloat16NonFinite) & 0x7f800000u;
  return reinterpret_cast<S::V>(bits | (half & 0x8000u) << 16);
}

// Independent partial results hide the latency of an addition or a maximum (one is enough where the
// term is long); folding them every kBlock steps keeps the rounding error of a long sum that of a
// short one.
inline constexpr std::int64_t kBlock = 256;

template <typename Real, int kPartials = 4, typename F, typename V = typename Simd<Real>::V>
GROOD_FAST_INLINE V sum_of(std::int64_t count, F term) {
  V total{};
  for (std::int64_t start = 0; start < count; start += kBlock) {
    const std::int64_t stop = start + kBlock < count ? start + kBlock : count;
    V partial[kPartials] = {};
    std::int64_t i = start;
    for (; i + kPartials <= stop; i += kPartials) {
      for (int k = 0; k < kPartials; ++k) partial[k] += term(i + k);
    }
    for (; i < stop; ++i) partial[0] += term(i);
    for (int k = 0; k < kPartials; ++k) total += partial[k];
  }
  return total;
}

template <typename Real, typename F, typename V = typename Simd<Real>::V>
GROOD_FAST_INLINE V max_of(std::int64_t count, V start, F term) {
  using S = Simd<Real>;
  V a = start, b = start, c = start, d = start;
  std::int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    a = S::max(term(i), a);
    b = S::max(term(i + 1), b);
    c = S::max(term(i + 2), c);
    d = S::max(term(i + 3), d);
  }
  for (; i < count; ++i) a = S::max(term(i), a);
  return S::max(S::max(a, b), S::max(c, d));
}

template <typename Real, typename V = typename Simd<Real>::V>
GROOD_FAST_INLINE Real lanes_sum(V value) {
  Real total = 0;
  for (std::int64_t lane = 0; lane < Simd<Real>::kLanes; ++lane) total += value[lane];
  return total;
}

// NaN in a lane is kept.
template <typename Real, typename V = typename Simd<Real>::V>
GROOD_FAST_INLINE Real lanes_max(V value) {
  Real best = value[0];
  for (std::int64_t lane = 1; lane < Simd<Real>::kLanes; ++lane) {
    if (value[lane] > best || value[lane] != value[lane]) best = value[lane];
  }
  return best;
}

}  // namespace grood_fast::GROOD_FAST_LEVEL
