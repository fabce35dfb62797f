// One table of kernels per instruction set; dispatch.cpp picks one at run time.
#pragma once

#include "../kernels.h"

namespace grood_fast {

struct KernelTable {
  void (*logit_gradient)(const LogitGradientArguments&, std::int64_t, std::int64_t);
  void (*multiply_row_norm)(const RowNormArguments&, std::int64_t, std::int64_t);
  void (*hadamard)(const HadamardArguments&, std::int64_t, std::int64_t);
  void (*subtract)(const SubtractArguments&, std::int64_t, std::int64_t);
  void (*prototype_gradient)(const PrototypeGradientArguments&, std::int64_t, std::int64_t);
  void (*nearest)(const NearestArguments&, std::int64_t, std::int64_t);
  void (*short_circuit)(const ShortCircuitArguments&, std::int64_t, std::int64_t);
  void (*channel_affine)(const ChannelAffineArguments&, std::int64_t, std::int64_t);
  void (*shifted_products)(const ShiftedProductsArguments&, std::int64_t, std::int64_t);
};

namespace baseline {
extern const KernelTable table;
}
#if defined(__x86_64__)
#define GROOD_FAST_X86_LEVELS 1
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
#endif

// Up to this many classes, vector lanes hold different rows; above, they hold one row's classes.
inline constexpr std::int64_t kRowsAcrossLanesUpTo = 64;
inline constexpr std::int64_t kWidestVector = 64;  // bytes

}  // namespace grood_fast
