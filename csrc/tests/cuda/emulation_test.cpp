// The emulated device itself: what CUDA promises holds, and what it forbids is reported.
//
// Every forbidden thing is a small kernel with one mistake. Mistakes that are data races are seen
// by ThreadSanitizer alone; tools/check_planted_bugs.py plants those in the project's own kernels.
#include <gtest/gtest.h>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "kernels/cuda/ptx.h"

namespace grood_fast::cuda {
namespace {

constexpr unsigned kWarp = 0xffffffffu;
constexpr std::uint64_t kSeeds[] = {0, 1, 2, 3, 4};

template <typename Kernel>
void run(unsigned blocks, unsigned threads, Kernel kernel, std::size_t shared = 0) {
  emulation::run({{blocks, 1, 1}, {threads, 1, 1}, shared, kernel});
}

// What the emulator says of a kernel under every schedule; empty where it says nothing.
template <typename Kernel>
std::set<std::string> said_of(unsigned threads, Kernel kernel, std::size_t shared = 0) {
  std::set<std::string> said;
  for (const std::uint64_t seed : kSeeds) {
    emulation::set_seed(seed);
    try {
      run(1, threads, kernel, shared);
      said.insert("");
    } catch (const emulation::Violation& violation) {
      said.insert(violation.what());
    }
  }
  emulation::set_seed(0);
  return said;
}

template <typename Kernel>
void expect_said(unsigned threads, const char* words, Kernel kernel, std::size_t shared = 0) {
  for (const std::string& said : said_of(threads, kernel, shared))
    EXPECT_NE(said.find(words), std::string::npos) << "said: '" << said << "'";
}

class Device : public testing::TestWithParam<std::uint64_t> {
 protected:
  void SetUp() override { emulation::set_seed(GetParam()); }
  void TearDown() override { emulation::set_seed(0); }
};
INSTANTIATE_TEST_SUITE_P(EverySchedule, Device, testing::ValuesIn(kSeeds));

TEST_P(Device, EveryThreadOfEveryBlockRunsOnce) {
  std::vector<int> count(7 * 100);
  run(7, 100, [&] {
    EXPECT_EQ(gridDim.x, 7u);
    EXPECT_EQ(blockDim.x, 100u);
    ++count[blockIdx.x * blockDim.x + threadIdx.x];
  });
  EXPECT_EQ(count, std::vector<int>(700, 1));
}

TEST_P(Device, ABarrierIsForTheWholeBlock) {
  std::vector<int> sums(96);
  run(1, 96, [&] {
    GROOD_FAST_SHARED(int, values, 96);
    for (int round = 0; round < 3; ++round) {
      values[threadIdx.x] = static_cast<int>(threadIdx.x) + round;
      __syncthreads();
      sums[threadIdx.x] += values[95 - threadIdx.x];
      __syncthreads();
    }
  });
  for (int t = 0; t < 96; ++t) EXPECT_EQ(sums[t], 3 * (95 - t) + 3);
}

TEST_P(Device, ShufflesAndVotes) {
  std::vector<int> other(64), from(64), down(64);
  std::vector<std::uint32_t> ballots(64);
  run(1, 64, [&] {
    const int t = static_cast<int>(threadIdx.x);
    other[t] = __shfl_xor_sync(kWarp, t, 5);
    from[t] = __shfl_sync(kWarp, t, 3);
    down[t] = __shfl_down_sync(kWarp, t, 30);
    ballots[t] = __ballot_sync(kWarp, t % 3 == 0);
    EXPECT_TRUE(__any_sync(kWarp, t == 7 || t == 40));
    EXPECT_FALSE(__all_sync(kWarp, t != 7 && t != 40));
    // Half of a warp at a time, in branches of their own.
    const unsigned half = t % 32 < 16 ? 0xffffu : 0xffff0000u;
    if (t % 32 < 16)
      EXPECT_EQ(__shfl_xor_sync(half, t, 1), t ^ 1);
    else
      EXPECT_EQ(__shfl_xor_sync(half, t, 8), t ^ 8);
  });
  for (int t = 0; t < 64; ++t) {
    EXPECT_EQ(other[t], t ^ 5);
    EXPECT_EQ(from[t], t / 32 * 32 + 3);
    EXPECT_EQ(down[t], t % 32 < 2 ? t + 30 : t);
    std::uint32_t ballot = 0;
    for (int lane = 0; lane < 32; ++lane) ballot |= (t / 32 * 32 + lane) % 3 == 0 ? 1u << lane : 0;
    EXPECT_EQ(ballots[t], ballot);
  }
}

TEST_P(Device, AWarpBarrierOrdersWhatAWarpWrites) {
  std::vector<int> got(64);
  run(1, 64, [&] {
    GROOD_FAST_SHARED(int, values, 64);
    for (int round = 0; round < 4; ++round) {
      values[threadIdx.x] = static_cast<int>(threadIdx.x) * round;
      __syncwarp();
      got[threadIdx.x] = values[threadIdx.x ^ 31];
      __syncwarp();
    }
  });
  for (int t = 0; t < 64; ++t) EXPECT_EQ(got[t], 3 * (t ^ 31));
}

TEST_P(Device, AtomicsLoseNothing) {
  int sum = 0, largest = -1, smallest = 1 << 20;
  float real = 0;
  run(5, 64, [&] {
    const int n = static_cast<int>(blockIdx.x * 64 + threadIdx.x);
    atomicAdd(&sum, n);
    atomicAdd(&real, 0.5f);
    atomicMax(&largest, n);
    atomicMin(&smallest, n);
  });
  EXPECT_EQ(sum, 319 * 320 / 2);
  EXPECT_EQ(real, 160.0f);
  EXPECT_EQ(largest, 319);
  EXPECT_EQ(smallest, 0);
}

TEST_P(Device, AsynchronousCopiesArriveWhereWaitedFor) {
  std::vector<float> from(128), to(128);
  for (int i = 0; i < 128; ++i) from[i] = static_cast<float>(i);
  run(1, 32, [&] {
    GROOD_FAST_SHARED(uint4, values, 32);
    const int t = static_cast<int>(threadIdx.x);
    copy_async<16>(&values[t], &from[4 * t]);
    wait_for_copies();
    __syncthreads();
    std::memcpy(&to[4 * t], &values[t ^ 1], 16);
  });
  for (int i = 0; i < 128; ++i) EXPECT_EQ(to[i], from[i ^ 4]);
}

TEST_P(Device, SharedMemoryIsNewInEveryBlock) {
  std::vector<int> nan(6);
  run(
      3, 1,
      [&] {
        GROOD_FAST_SHARED(float, fixed, 3);
        auto* dynamic = static_cast<float*>(dynamic_shared());
        nan[2 * blockIdx.x] = fixed[2] != fixed[2];
        nan[2 * blockIdx.x + 1] = dynamic[3] != dynamic[3];
        fixed[2] = dynamic[3] = 1;
      },
      16);
  EXPECT_EQ(nan, std::vector<int>(6, 1));
}

// --- matrix products against plain loops
// ----------------------------------------------------------

template <int kRows, int kDepth>
struct Matrices {
  double a[kRows][kDepth], b[kDepth][8], c[kRows][8];

  Matrices() {
    for (int i = 0; i < kRows; ++i) {
      for (int k = 0; k < kDepth; ++k) a[i][k] = (i * 7 + k * 3) % 11 - 5;
    }
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < 8; ++j) b[k][j] = (k * 5 + j * 2) % 13 - 6;
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < 8; ++j) {
        c[i][j] = i - j;
        for (int k = 0; k < kDepth; ++k) c[i][j] += a[i][k] * b[k][j];
      }
    }
  }
};

std::uint16_t bfloat16(double value) {
  return static_cast<std::uint16_t>(__float_as_uint(static_cast<float>(value)) >> 16);
}
std::uint16_t float16(double value) {  // of small whole numbers
  if (value == 0) return 0;
  int exponent = 0;
  const double mantissa = std::frexp(std::fabs(value), &exponent);
  const int bits = (exponent + 14) << 10 | (static_cast<int>(mantissa * 2048) & 1023);
  return static_cast<std::uint16_t>(bits | (value < 0 ? 0x8000 : 0));
}

// Fragments by the tables of the PTX manual, written out once more.
TEST_P(Device, Mma16816) {
  const Matrices<16, 16> m;
  for (const bool brain : {true, false}) {
    const auto pack = [&](double low, double high) {
      const auto encode = brain ? bfloat16 : float16;
      return encode(low) | static_cast<std::uint32_t>(encode(high)) << 16;
    };
    run(1, 32, [&] {
      const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
      const std::uint32_t a[4] = {
          pack(m.a[g][2 * t], m.a[g][2 * t + 1]), pack(m.a[g + 8][2 * t], m.a[g + 8][2 * t + 1]),
          pack(m.a[g][2 * t + 8], m.a[g][2 * t + 9]),
          pack(m.a[g + 8][2 * t + 8], m.a[g + 8][2 * t + 9])};
      const std::uint32_t b0 = pack(m.b[2 * t][g], m.b[2 * t + 1][g]);
      const std::uint32_t b1 = pack(m.b[2 * t + 8][g], m.b[2 * t + 9][g]);
      const auto start = [](int row, int column) { return static_cast<float>(row - column); };
      float d[4] = {
          start(g, 2 * t), start(g, 2 * t + 1), start(g + 8, 2 * t), start(g + 8, 2 * t + 1)};
      brain ? mma_bfloat16(d, a, b0, b1) : mma_float16(d, a, b0, b1);
      EXPECT_EQ(d[0], m.c[g][2 * t]);
      EXPECT_EQ(d[1], m.c[g][2 * t + 1]);
      EXPECT_EQ(d[2], m.c[g + 8][2 * t]);
      EXPECT_EQ(d[3], m.c[g + 8][2 * t + 1]);
    });
  }
}

TEST_P(Device, Mma1688AndMma884) {
  const Matrices<16, 8> m;
  run(1, 32, [&] {
    const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
    const auto tf32 = [](double value) { return to_tf32(static_cast<float>(value)); };
    const std::uint32_t a[4] = {
        tf32(m.a[g][t]), tf32(m.a[g + 8][t]), tf32(m.a[g][t + 4]), tf32(m.a[g + 8][t + 4])};
    float d[4] = {
        static_cast<float>(g - 2 * t), static_cast<float>(g - 2 * t - 1),
        static_cast<float>(g + 8 - 2 * t), static_cast<float>(g + 8 - 2 * t - 1)};
    mma_tf32(d, a, tf32(m.b[t][g]), tf32(m.b[t + 4][g]));
    EXPECT_EQ(d[0], m.c[g][2 * t]);
    EXPECT_EQ(d[1], m.c[g][2 * t + 1]);
    EXPECT_EQ(d[2], m.c[g + 8][2 * t]);
    EXPECT_EQ(d[3], m.c[g + 8][2 * t + 1]);
  });
  const Matrices<8, 4> wide;
  run(1, 32, [&] {
    const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
    double d0 = g - 2 * t, d1 = g - 2 * t - 1;
    mma_float64(d0, d1, wide.a[g][t], wide.b[t][g]);
    EXPECT_EQ(d0, wide.c[g][2 * t]);
    EXPECT_EQ(d1, wide.c[g][2 * t + 1]);
  });
}

TEST_P(Device, LdmatrixGivesEachLaneItsTwoElements) {
  run(1, 32, [&] {
    struct alignas(16) Row {
      std::uint16_t elements[8];
    };
    GROOD_FAST_SHARED(Row, rows, 32);
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = 0; i < 8; ++i) rows[lane].elements[i] = static_cast<std::uint16_t>(lane * 8 + i);
    __syncthreads();
    std::uint32_t got[4];
    load_matrices(got, &rows[lane]);
    for (int matrix = 0; matrix < 4; ++matrix) {
      const unsigned first = static_cast<unsigned>((matrix * 8 + lane / 4) * 8 + lane % 4 * 2);
      EXPECT_EQ(got[matrix], first | (first + 1) << 16);
    }
  });
}

TEST(Rounding, TensorFloat32KeepsTenBits) {
  EXPECT_EQ(__uint_as_float(to_tf32(1.0f)), 1.0f);
  EXPECT_EQ(__uint_as_float(to_tf32(1.0f + 0x1p-10f)), 1.0f + 0x1p-10f);
  EXPECT_EQ(__uint_as_float(to_tf32(1.0f + 0x1p-11f)), 1.0f + 0x1p-10f);  // a tie goes away from 0
  EXPECT_EQ(__uint_as_float(to_tf32(-1.0f - 0x1p-12f)), -1.0f);
  EXPECT_EQ(__uint_as_float(to_tf32(INFINITY)), INFINITY);
  EXPECT_EQ(float16_to_float(0x3c01), 1.0f + 0x1p-10f);
  EXPECT_EQ(float16_to_float(0x8001), -0x1p-24f);
  EXPECT_EQ(float16_to_float(0xfc00), -INFINITY);
  EXPECT_TRUE(std::isnan(float16_to_float(0x7e00)));
}

// --- what is forbidden
// ----------------------------------------------------------------------------

TEST(Forbidden, ABarrierThatSomeThreadsNeverReach) {
  expect_said(64, "deadlock", [] {
    if (threadIdx.x < 40) __syncthreads();
  });
}

TEST(Forbidden, TwoBarriersAtOnce) {
  expect_said(64, "deadlock", [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
}

TEST(Forbidden, AMaskThatNamesLanesThatDoNotCome) {
  expect_said(32, "deadlock", [] {
    if (threadIdx.x < 16) __shfl_xor_sync(kWarp, 1, 1);
  });
  expect_said(16, "deadlock", [] { __shfl_xor_sync(kWarp, 1, 1); });
}

TEST(Forbidden, AMaskWithoutTheCaller) {
  expect_said(32, "the mask does not name the lane", [] { __shfl_xor_sync(0xffffu, 1, 1); });
}

TEST(Forbidden, LanesThatMeetWithDifferentMasks) {
  expect_said(
      32, "deadlock", [] { __shfl_xor_sync(threadIdx.x < 16 ? kWarp : 0xffff0000u, 1, 1); });
}

TEST(Forbidden, MoreThanTheDeviceHas) {
  EXPECT_THROW(run(1, 1025, [] {}), emulation::Violation);
  EXPECT_THROW(run(0, 32, [] {}), emulation::Violation);
  EXPECT_THROW(run(1, 32, [] {}, emulation::kMaxShared + 1), emulation::Violation);
  expect_said(32, "227 KiB", [] {
    GROOD_FAST_SHARED(float, much, 60000);
    (void)much;
  });
}

TEST(Forbidden, AddressesThatAreNotMultiples) {
  alignas(16) static float from[8];
  expect_said(1, "cp.async", [] {
    GROOD_FAST_SHARED(uint4, to, 1);
    copy_async<16>(&to[0], &from[1]);
  });
  expect_said(32, "ldmatrix", [] {
    GROOD_FAST_SHARED(uint4, rows, 40);
    std::uint32_t got[4];
    load_matrices(got, reinterpret_cast<char*>(rows) + 16 * threadIdx.x + 4);
  });
}

TEST(Forbidden, ACopyThatNobodyWaitedForMayNotHaveHappened) {
  alignas(16) static float from[4] = {1, 2, 3, 4};
  std::set<bool> arrived;
  for (const std::uint64_t seed : kSeeds) {
    emulation::set_seed(seed);
    run(1, 1, [&] {
      GROOD_FAST_SHARED(float, to, 4);
      copy_async<16>(to, from);
      arrived.insert(to[3] == 4.0f);
    });
  }
  emulation::set_seed(0);
  EXPECT_EQ(arrived, (std::set<bool>{false, true}));
}

TEST(Forbidden, AndTheDeviceWorksAfterwards) {
  expect_said(64, "deadlock", [] {
    if (threadIdx.x == 0) __syncthreads();
  });
  int count = 0;
  run(2, 64, [&] {
    atomicAdd(&count, 1);
    __syncthreads();
  });
  EXPECT_EQ(count, 128);
}

}  // namespace
}  // namespace grood_fast::cuda
