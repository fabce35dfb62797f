// grood_fast::simd_level, set_simd_level: which instruction set the ops of this library run with.
#if !defined(GROOD_FAST_EMULATED)

#include "common.h"

namespace grood_fast::ops {
namespace {

std::string current_simd_level() { return simd_level(); }

bool change_simd_level(const std::string& level) { return set_simd_level(level.c_str()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast, m) {
  m.def("simd_level() -> str");
  m.def("set_simd_level(str level) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(grood_fast, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&current_simd_level));
  m.impl("set_simd_level", TORCH_BOX(&change_simd_level));
}

}  // namespace grood_fast::ops

#endif
