// The kernels compiled for AVX2 and FMA.
//
// Every other header comes before the target is set: an inline function compiled for this
// instruction set could otherwise be the copy that the linker keeps for everybody.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "table.h"

#if defined(GROOD_FAST_X86_LEVELS)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define GROOD_FAST_LEVEL avx2
#define GROOD_FAST_VECTOR_BYTES 32
#include "channel_affine-inl.h"
#include "hadamard-inl.h"
#include "logit_gradient-inl.h"
#include "nearest-inl.h"
#include "prototype_gradient-inl.h"
#include "row_norm-inl.h"
#include "shifted_products-inl.h"
#include "short_circuit-inl.h"
#include "table-inl.h"

// GCC's target stays set: templates are instantiated at the end of the file.
#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // GROOD_FAST_X86_LEVELS
