// The table of this instruction set's kernels. Included once by each level's translation unit.
namespace grood_fast::GROOD_FAST_LEVEL {

const KernelTable table = {&logit_gradient, &multiply_row_norm,  &hadamard,
                           &subtract,       &prototype_gradient, &nearest,
                           &short_circuit,  &channel_affine,     &shifted_products};

}  // namespace grood_fast::GROOD_FAST_LEVEL
