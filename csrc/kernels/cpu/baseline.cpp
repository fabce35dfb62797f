// The kernels for the instruction set every processor of the family has (SSE2, NEON).
#include <cmath>
#include <cstdint>
#include <cstring>

#include "table.h"

#define GROOD_FAST_LEVEL baseline
#define GROOD_FAST_VECTOR_BYTES 16
#include "channel_affine-inl.h"
#include "hadamard-inl.h"
#include "logit_gradient-inl.h"
#include "nearest-inl.h"
#include "prototype_gradient-inl.h"
#include "row_norm-inl.h"
#include "shifted_products-inl.h"
#include "short_circuit-inl.h"
#include "table-inl.h"
