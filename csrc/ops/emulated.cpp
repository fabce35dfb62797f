// grood_fast_emulated::set_seed: the order in which the emulated device runs its threads. In the
// library for tests only.
#if defined(GROOD_FAST_EMULATED)

#include "../emulation/execution.h"
#include "common.h"

namespace grood_fast::ops {
namespace {

void set_seed(int64_t seed) { emulation::set_seed(static_cast<uint64_t>(seed)); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast_emulated, m) { m.def("set_seed(int seed) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(grood_fast_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_seed", TORCH_BOX(&set_seed));
}

}  // namespace grood_fast::ops

#endif
