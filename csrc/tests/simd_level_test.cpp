// Which instruction set runs, and how the environment and the caller change it.
#include <cstdlib>
#include <cstring>

#include "support.h"

namespace grood_fast::tests {
namespace {

bool usable(const char* level) { return simd_level_compiled(level) && simd_level_supported(level); }

std::string best_level() {
  std::string best;
  for (const char* level : kSimdLevels) {
    if (usable(level)) best = level;
  }
  return best;
}

TEST(SimdLevel, BaselineIsAlwaysThere) {
  EXPECT_TRUE(simd_level_compiled("baseline"));
  EXPECT_TRUE(simd_level_supported("baseline"));
}

TEST(SimdLevel, X86LevelsAreCompiledOnX86Only) {
#if defined(__x86_64__)
  constexpr bool kX86 = true;
#else
  constexpr bool kX86 = false;
#endif
  EXPECT_EQ(simd_level_compiled("avx2"), kX86);
  EXPECT_EQ(simd_level_compiled("avx512"), kX86);
}

TEST(SimdLevel, IsWhatWasSet) {
  at_every_level([] {
    for (const char* level : kSimdLevels) {
      if (!usable(level)) continue;
      EXPECT_TRUE(set_simd_level(level));
      EXPECT_STREQ(simd_level(), level);
    }
  });
}

TEST(SimdLevel, RefusesWhatCannotRunAndKeepsTheOld) {
  at_every_level([] {
    const std::string before = simd_level();
    for (const char* name : {"", "AVX2", "avx", "avx5122", "neon"}) {
      EXPECT_FALSE(simd_level_compiled(name));
      EXPECT_FALSE(simd_level_supported(name));
      EXPECT_FALSE(set_simd_level(name));
      EXPECT_EQ(simd_level(), before);
    }
    for (const char* level : kSimdLevels) {
      if (usable(level)) continue;
      EXPECT_FALSE(set_simd_level(level));
      EXPECT_EQ(simd_level(), before);
    }
  });
}

// Run by ctest with GROOD_FAST_SIMD unset, naming a level, and naming nonsense.
TEST(SimdLevel, EnvironmentDecides) {
  const char* wanted = std::getenv("GROOD_FAST_SIMD");
  if (wanted == nullptr || *wanted == '\0') {
    EXPECT_EQ(simd_level(), best_level());
    EXPECT_STREQ(simd_level_complaint(), "");
  } else if (usable(wanted)) {
    EXPECT_STREQ(simd_level(), wanted);
    EXPECT_STREQ(simd_level_complaint(), "");
  } else {
    EXPECT_EQ(simd_level(), best_level());
    EXPECT_STREQ(simd_level_complaint(), wanted);
  }
}

}  // namespace
}  // namespace grood_fast::tests
