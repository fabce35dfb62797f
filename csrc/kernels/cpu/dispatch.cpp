#include <atomic>
#include <cstdlib>
#include <cstring>

#include "table.h"

namespace grood_fast {
namespace {

struct Level {
  const char* name;
  const KernelTable* table;  // null: not compiled for this processor family
  bool supported;            // by the processor and the operating system
};

struct Choice {
  Level levels[3];
  std::atomic<int> active;
  char complaint[160] = "";

  Choice()
      : levels{
            {"baseline", &baseline::table, true},
            {"avx2", nullptr, false},
            {"avx512", nullptr, false}} {
#if defined(GROOD_FAST_X86_LEVELS)
    __builtin_cpu_init();
    levels[1].table = &avx2::table;
    levels[1].supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    levels[2].table = &avx512::table;
    levels[2].supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    int best = 2;
    while (!usable(best)) --best;
    active = best;
    const char* wanted = std::getenv("GROOD_FAST_SIMD");
    if (wanted != nullptr && *wanted != '\0' && !select(wanted)) {
      std::strncpy(complaint, wanted, sizeof(complaint) - 1);
    }
  }

  bool usable(int level) const { return levels[level].table != nullptr && levels[level].supported; }

  int find(const char* name) const {
    for (int level = 0; level < 3; ++level) {
      if (std::strcmp(levels[level].name, name) == 0) return level;
    }
    return -1;
  }

  bool select(const char* name) {
    const int level = find(name);
    if (level < 0 || !usable(level)) return false;
    active = level;
    return true;
  }
};

Choice& choice() {
  static Choice instance;
  return instance;
}

const KernelTable& kernels() {
  Choice& chosen = choice();
  return *chosen.levels[chosen.active.load(std::memory_order_relaxed)].table;
}

}  // namespace

std::size_t logit_gradient_scratch_bytes(std::int64_t classes) {
  // Twice (logits and target), either a padded row or a tile of one vector a class.
  const std::int64_t tile = kRowsAcrossLanesUpTo * kWidestVector;
  const std::int64_t row = classes * static_cast<std::int64_t>(sizeof(double)) + kWidestVector;
  const std::int64_t once =
      ((tile > row ? tile : row) + kWidestVector - 1) / kWidestVector * kWidestVector;
  return static_cast<std::size_t>(2 * once);
}

void logit_gradient(const LogitGradientArguments& arguments, std::int64_t begin, std::int64_t end) {
  kernels().logit_gradient(arguments, begin, end);
}

void multiply_row_norm(const RowNormArguments& arguments, std::int64_t begin, std::int64_t end) {
  kernels().multiply_row_norm(arguments, begin, end);
}

void hadamard(const HadamardArguments& arguments, std::int64_t begin, std::int64_t end) {
  kernels().hadamard(arguments, begin, end);
}

void subtract(const SubtractArguments& arguments, std::int64_t begin, std::int64_t end) {
  kernels().subtract(arguments, begin, end);
}

void prototype_gradient(
    const PrototypeGradientArguments& arguments, std::int64_t begin, std::int64_t end) {
  kernels().prototype_gradient(arguments, begin, end);
}

void nearest(const NearestArguments& arguments, std::int64_t begin, std::int64_t end) {
  kernels().nearest(arguments, begin, end);
}

void short_circuit(const ShortCircuitArguments& arguments, std::int64_t begin, std::int64_t end) {
  kernels().short_circuit(arguments, begin, end);
}

void shifted_products(
    const ShiftedProductsArguments& arguments, std::int64_t begin, std::int64_t end) {
  kernels().shifted_products(arguments, begin, end);
}

void channel_affine(const ChannelAffineArguments& arguments, std::int64_t begin, std::int64_t end) {
  kernels().channel_affine(arguments, begin, end);
}

std::int64_t rows_per_task(std::int64_t classes, std::int64_t columns) {
  // An exponential costs about as much as eight absolute values.
  const std::int64_t rows = 160000 / (8 * classes + columns + 1);
  return rows < 1 ? 1 : rows;
}

const char* simd_level() { return choice().levels[choice().active].name; }

bool set_simd_level(const char* name) { return choice().select(name); }

bool simd_level_compiled(const char* name) {
  const int level = choice().find(name);
  return level >= 0 && choice().levels[level].table != nullptr;
}

bool simd_level_supported(const char* name) {
  const int level = choice().find(name);
  return level >= 0 && choice().levels[level].supported;
}

const char* simd_level_complaint() { return choice().complaint; }

}  // namespace grood_fast
