"""The compiled ops: typed wrappers, fake kernels and derivatives around ``torch.ops.grood_fast``.

Plain-PyTorch twins of the same names stand in :mod:`grood_fast.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grood_fast.errors import InputError
from grood_fast.ops import _library, reference

__all__ = [
    "NORMS",
    "OBJECTIVES",
    "OUTPUTS",
    "LogitGradient",
    "channel_affine_backward",
    "cluster_extremes",
    "dual_project",
    "head_gradient_norm",
    "layer_gradient_sqnorm",
    "logit_gradient",
    "nearest_distance",
    "prototype_gradient",
    "reference",
    "set_simd_level",
    "short_circuit_logits",
    "simd_level",
]

_kernels = _library.load()
_ops = torch.ops.grood_fast

OBJECTIVES: tuple[str, ...] = tuple(_kernels.build_facts()["objectives"])
NORMS: tuple[str, ...] = tuple(_kernels.build_facts()["norms"])
OUTPUTS = ("energy", "log_sum_exp", "maximum", *NORMS, "argmax", "delta")
_STATISTICS = OUTPUTS[:6]  # the rows of the op's first result, in this order
_BIT = {name: 1 << position for position, name in enumerate(OUTPUTS)}


class LogitGradient(NamedTuple):
    """What :func:`logit_gradient` computed; None where it was not asked for.

    Attributes:
        energy: (B,) −T·logsumexp(f/T).
        log_sum_exp: (B,) logsumexp(f/T).
        maximum: (B,) max_c f_c.
        l1, l2, linf: (B,) norms of δ.
        argmax: (B,) int64, the first index of the maximum (of the first NaN, if there is one).
        delta: (B, C) δ = d objective / d logits.
    """

    energy: Tensor | None = None
    log_sum_exp: Tensor | None = None
    maximum: Tensor | None = None
    l1: Tensor | None = None
    l2: Tensor | None = None
    linf: Tensor | None = None
    argmax: Tensor | None = None
    delta: Tensor | None = None


def _index(name: str, known: tuple[str, ...], what: str) -> int:
    try:
        return known.index(name)
    except ValueError:
        raise InputError(f"unknown {what} {name!r}; known: {', '.join(known)}") from None


def logit_gradient(
    logits: Tensor,
    objective: str,
    *,
    temperature: float = 1.0,
    target: Tensor | None = None,
    outputs: tuple[str, ...] = OUTPUTS,
) -> LogitGradient:
    """δ = d objective / d logits, its norms, the energy and the maximum, in one read of the logits.

    Args:
        logits: (B, C) float32, float64, bfloat16 or float16; rows may be any distance apart.
        objective: one of :data:`OBJECTIVES`; see :mod:`grood_fast.objectives`.
        temperature: T > 0, of the softmax.
        target: (C,) confounding label in [0, 1], of the results' dtype; only for
            ``"confounding"``; default all ones. No gradient flows to it.
        outputs: which fields to compute.

    Returns:
        The fields asked for, float64 for float64 logits and float32 otherwise: half-precision
        logits are widened, and accumulated in float32.

    Raises:
        InputError: an unknown objective or output.
        RuntimeError: wrong shapes or dtypes.
    """
    mask = 0
    for name in outputs:
        mask |= 1 << _index(name, OUTPUTS, "output")
    statistics, argmax, delta = _ops.logit_gradient(
        logits, _index(objective, OBJECTIVES, "objective"), temperature, target, mask
    )
    fields = dict(zip((name for name in _STATISTICS if mask & _BIT[name]), statistics, strict=True))
    if mask & _BIT["argmax"]:
        fields["argmax"] = argmax
    if mask & _BIT["delta"]:
        fields["delta"] = delta
    return LogitGradient(**fields)


def head_gradient_norm(
    logits: Tensor,
    features: Tensor,
    objective: str,
    *,
    temperature: float = 1.0,
    target: Tensor | None = None,
    norm: str = "l1",
    bias: bool = False,
) -> Tensor:
    """‖d objective / d(W, b)‖ of a linear head f = W h + b, per sample; the gradient is not formed.

    The gradient is the rank-one matrix δ [h; 1]ᵀ, so its norm is ‖δ‖ ‖[h; 1]‖.

    Args:
        logits: (B, C) floating point.
        features: (B, D) floating point, h; float64 exactly if the logits are.
        objective, temperature, target: as for :func:`logit_gradient`.
        norm: ``"l1"``, ``"l2"`` or ``"linf"``, over the entries of the gradient.
        bias: whether the bias' gradient δ counts too.

    Returns:
        (B,) float64 for float64 inputs, float32 otherwise.

    Raises:
        InputError: an unknown objective or norm.
        RuntimeError: wrong shapes or dtypes.
    """
    result: Tensor = _ops.head_gradient_norm(
        logits,
        features,
        _index(objective, OBJECTIVES, "objective"),
        temperature,
        target,
        _index(norm, NORMS, "norm"),
        bias,
    )
    return result


def dual_project(
    delta: Tensor,
    features: Tensor,
    anchor_delta: Tensor,
    anchor_features: Tensor,
    coefficients: Tensor,
    *,
    bias: bool = False,
) -> Tensor:
    """Coordinates of rank-one gradients δhᵀ in a subspace that other such gradients span.

    With the inner products k(x) = (Δδ) ∘ (Hh) of a sample with the N anchors, z = Aᵀ k(x). Computed
    tile by tile: memory does not grow with N. (A backward pass does form B x N arrays.)

    Args:
        delta: (B, C) floating point, δ.
        features: (B, D) floating point, h.
        anchor_delta: (N, C) floating point, Δ.
        anchor_features: (N, D) floating point, H.
        coefficients: (N, K) float32 or float64, A; everything is computed in this precision, so
            that half-precision operands cost no more than their own rounding.
        bias: whether the bias' gradient δ counts too: then every product of features gains 1.

    Returns:
        (B, K), of the coefficients' dtype.

    Raises:
        RuntimeError: wrong shapes or dtypes.
    """
    result: Tensor = _ops.dual_project(
        delta, features, anchor_delta, anchor_features, coefficients, float(bias)
    )
    return result


def cluster_extremes(assignments: Tensor, energies: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """For each cluster, its member of lowest and its member of highest energy.

    Args:
        assignments: (N,) int64, each sample's cluster in [0, ``clusters``).
        energies: (N,) floating point; samples whose energy is NaN are passed over.
        clusters: K.

    Returns:
        Two (K,) int64 tensors of sample indices, the first of equals; -1 where a cluster has no
        sample. Both indices are the same where it has one.

    Raises:
        RuntimeError: wrong shapes or dtypes, or (on the CPU, where looking costs nothing) an
            assignment out of range.
    """
    lowest, highest = _ops.cluster_extremes(assignments, energies, clusters)
    return lowest, highest


def prototype_gradient(
    features: Tensor,
    ood_prototype: Tensor,
    offsets: Tensor,
    *,
    offset_norms: Tensor | None = None,
    temperature: float = 1.0,
    squared: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Gradient of cross-entropy over distances to prototypes, with respect to the OOD prototype.

    With s_k = −‖h − p_k‖/T for the classes and s = −‖h − p‖/T for the OOD prototype p, the
    gradient of −log softmax(s)_y, for any class y, is g = π (h − p)/(T ‖h − p‖), π being p's
    softmax; 0 at h = p. With squared distances it is 2 π (h − p)/T. Distances that products would
    cancel are computed from differences.

    Args:
        features: (B, D) floating point, h.
        ood_prototype: (D,) float32 or float64, p; everything is computed in this precision.
        offsets: (C, D) of the same dtype, p_k − p.
        offset_norms: (C,) their L2 norms, where they are known already.
        temperature: T > 0.
        squared: whether the distances are squared.
        scale: of the gradient: π may be far below what float32 can square.

    Returns:
        (B, D) scale · g, and (B,) log π.

    Raises:
        RuntimeError: wrong shapes or dtypes.
    """
    if offset_norms is None:
        offset_norms = torch.linalg.vector_norm(offsets, dim=1)
    gradient, log_weight = _ops.prototype_gradient(
        features, ood_prototype, offsets, offset_norms, temperature, squared, scale
    )
    return gradient, log_weight


def nearest_distance(
    queries: Tensor, bank: Tensor, *, bank_norms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Euclidean distance of every query to its nearest row of a bank, exactly.

    Products with tiles of the bank rule out almost all rows; the distances of the others are
    computed from differences, so near-duplicates and tiny vectors keep their digits. There is no
    B x N array. A bank sorted by its rows' norms is searched fastest: tiles that are too far from a
    query by their norms alone are not looked at.

    Args:
        queries: (B, D) floating point.
        bank: (N, D) floating point, N ≥ 1.
        bank_norms: (N,) float32 or float64 L2 norms of the bank's rows, where they are known
            already; everything is computed in their precision. Default: float64 for a float64
            bank, float32 otherwise.

    Returns:
        (B,) distances of the norms' dtype, and (B,) int64 rows of the bank. A NaN among the
        queries or anywhere in the bank gives NaN, as for ``torch.cdist(queries, bank).min(1)``.

    Raises:
        RuntimeError: wrong shapes or dtypes.
    """
    if bank_norms is None:
        # In float64: a norm that underflowed would rule out what is nearest.
        bank_norms = torch.linalg.vector_norm(bank, dim=1, dtype=torch.float64).to(_real(bank))
    rounding = _rounding_of_factors()
    distances, indices = _ops.nearest_distance(queries, bank, bank_norms, rounding)
    return distances, indices


def short_circuit_logits(
    logits: Tensor, features: Tensor, weight_t: Tensor, removed: Tensor
) -> Tensor:
    """A linear head's logits without some of each sample's features: f_j − Σ_i W_ji h_i.

    Args:
        logits: (B, C) floating point, f = W h + b.
        features: (B, D) floating point, h.
        weight_t: (D, C) float32 or float64, the transposed weight; everything is computed in this
            precision.
        removed: (B, k) int64, which features of each sample are removed, each named once.

    Returns:
        (B, C), of the weight's dtype.

    Raises:
        RuntimeError: wrong shapes or dtypes, or a feature that is not there.
    """
    result: Tensor = _ops.short_circuit_logits(logits, features, weight_t, removed)
    return result


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _rounding_of_factors() -> float:
    """By how much torch rounds what it multiplies in float32, where the user lets it; relative."""
    mkldnn: Any = torch.backends.mkldnn
    backends = (mkldnn.matmul, mkldnn, torch.backends)
    precisions = {getattr(backend, "fp32_precision", "none") for backend in backends}
    return 2.0**-7 if precisions & {"bf16", "tf32"} else 0.0


def channel_affine_backward(
    delta: Tensor, input: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of y = scale·x + shift, a scale and a shift a channel, for every sample.

    Args:
        delta: (B, C, ...) the gradient of y, in any memory layout.
        input: the same shape and dtype.
        scale: (C,) of delta's dtype, float32 or float64; None leaves the first result empty.

    Returns:
        scale·δ like delta; and (B, C) Σ δ·input and Σ δ over the positions, float64 for float64
        operands, float32 otherwise: half precision is widened.

    Raises:
        RuntimeError: wrong shapes or dtypes.
    """
    results: tuple[Tensor, Tensor, Tensor] = _ops.channel_affine_backward(delta, input, scale)
    return results


def layer_gradient_sqnorm(activation: Tensor, delta: Tensor, offsets: Sequence[int]) -> Tensor:
    """‖G‖² per sample of a gradient G that is a sum of outer products over positions.

    G consists of one (M, N) block an offset, G_j = Σ_r delta_r activation_{r + offset_j}ᵀ: a linear
    layer on sequences has the one offset 0, a convolution one for every entry of its kernel, so
    that no patches are gathered. The blocks are formed one at a time, or not at all where the
    positions' inner products take fewer multiplications.

    Args:
        activation: (B, Q, N) floating point.
        delta: (B, R, M) floating point; float64 exactly if the activations are.
        offsets: at least one, each from 0 to Q − R.

    Returns:
        (B,) float64 for float64 operands, float32 otherwise: half precision is widened.

    Raises:
        RuntimeError: wrong shapes, dtypes or offsets.
    """
    result: Tensor = _ops.layer_gradient_sqnorm(activation, delta, list(offsets))
    return result


def simd_level() -> str:
    """The instruction set the kernels run with: ``"baseline"``, ``"avx2"`` or ``"avx512"``."""
    level: str = _ops.simd_level()
    return level


def set_simd_level(level: str) -> None:
    """Run the kernels with another instruction set (``GROOD_FAST_SIMD`` does it at the start).

    Raises:
        InputError: the level was not compiled, or the processor lacks it.
    """
    if not (_ops.set_simd_level(level) and _kernels.set_simd_level(level)):
        supported = ", ".join(_kernels.build_facts()["simd_levels_supported"])
        raise InputError(
            f"instruction set {level!r} is not available; this machine has: {supported}"
        )


# --- fake kernels: shapes and dtypes for torch.compile and fake tensors ---------------------------


def _real(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.library.register_fake("grood_fast::logit_gradient")  # type: ignore[untyped-decorator]
def _(
    logits: Tensor, objective: int, temperature: float, target: Tensor | None, outputs: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = logits.shape
    real = _real(logits)
    requested = sum(bool(outputs & _BIT[name]) for name in _STATISTICS)
    has_delta = bool(outputs & _BIT["delta"])
    return (
        logits.new_empty((requested, batch), dtype=real),
        logits.new_empty((batch if outputs & _BIT["argmax"] else 0,), dtype=torch.int64),
        logits.new_empty((batch, classes) if has_delta else (0, 0), dtype=real),
    )


@torch.library.register_fake("grood_fast::head_gradient_norm")  # type: ignore[untyped-decorator]
def _(
    logits: Tensor,
    features: Tensor,
    objective: int,
    temperature: float,
    target: Tensor | None,
    norm: int,
    bias: bool,
) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=_real(logits))


@torch.library.register_fake("grood_fast::dual_project")  # type: ignore[untyped-decorator]
def _(
    delta: Tensor,
    features: Tensor,
    anchor_delta: Tensor,
    anchor_features: Tensor,
    coefficients: Tensor,
    bias: float,
) -> Tensor:
    return coefficients.new_empty((delta.shape[0], coefficients.shape[1]))


@torch.library.register_fake("grood_fast::cluster_extremes")  # type: ignore[untyped-decorator]
def _(assignments: Tensor, energies: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    return assignments.new_empty(clusters), assignments.new_empty(clusters)


@torch.library.register_fake("grood_fast::prototype_gradient")  # type: ignore[untyped-decorator]
def _(
    features: Tensor,
    ood_prototype: Tensor,
    offsets: Tensor,
    offset_norms: Tensor,
    temperature: float,
    squared: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return offsets.new_empty(features.shape), offsets.new_empty((features.shape[0],))


@torch.library.register_fake("grood_fast::nearest_distance")  # type: ignore[untyped-decorator]
def _(queries: Tensor, bank: Tensor, bank_norms: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    size = (queries.shape[0],)
    return bank_norms.new_empty(size), bank_norms.new_empty(size, dtype=torch.int64)


@torch.library.register_fake("grood_fast::short_circuit_logits")  # type: ignore[untyped-decorator]
def _(logits: Tensor, features: Tensor, weight_t: Tensor, removed: Tensor) -> Tensor:
    return weight_t.new_empty(logits.shape)


@torch.library.register_fake("grood_fast::channel_affine_backward")  # type: ignore[untyped-decorator]
def _(delta: Tensor, input: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    sums = delta.new_empty(delta.shape[:2], dtype=_real(delta))
    inner = delta.ndim > 2 and all(_channels_inner(maps) for maps in (delta, input))
    onward = torch.empty_like(delta if inner else delta.contiguous())
    return delta.new_empty(0) if scale is None else onward, sums, torch.empty_like(sums)


def _channels_inner(maps: Tensor) -> bool:
    """Whether the memory holds (B, positions, C) without gaps."""
    rows = maps.movedim(1, -1)
    return rows.is_contiguous()


@torch.library.register_fake("grood_fast::layer_gradient_sqnorm")  # type: ignore[untyped-decorator]
def _(activation: Tensor, delta: Tensor, offsets: list[int]) -> Tensor:
    return delta.new_empty((delta.shape[0],), dtype=_real(delta))


# --- any device without a compiled kernel of its own: the plain-PyTorch twin ----------------------


def _check(logits: Tensor, objective: int, temperature: float, target: Tensor | None) -> None:
    """What the compiled ops check as well."""
    if logits.ndim != 2 or logits.shape[1] < 1 or not logits.is_floating_point():
        raise RuntimeError(
            f"logits must be floating point of shape (B, C), got {logits.dtype} of shape "
            f"{tuple(logits.shape)}"
        )
    if not temperature > 0:
        raise RuntimeError(f"temperature must be positive, got {temperature}")
    if target is not None:
        if OBJECTIVES[objective] != "confounding":
            raise RuntimeError("only the confounding objective takes a target")
        if target.shape != logits.shape[1:] or target.dtype != _real(logits):
            raise RuntimeError("target must be of shape (C,) and of the dtype of the results")


def _logit_gradient_elsewhere(
    logits: Tensor, objective: int, temperature: float, target: Tensor | None, outputs: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check(logits, objective, temperature, target)
    wide = logits.to(_real(logits))
    delta = reference.logit_gradient(wide, OBJECTIVES[objective], temperature, target)
    log_sum_exp = torch.logsumexp(wide / temperature, dim=1)
    maximum, argmax = wide.max(dim=1)
    statistics = {
        "energy": -temperature * log_sum_exp,
        "log_sum_exp": log_sum_exp,
        "maximum": maximum,
        **{norm: reference.row_norm(delta, norm) for norm in NORMS},
    }
    kept = [statistics[name] for name in _STATISTICS if outputs & _BIT[name]]
    return (
        torch.stack(kept) if kept else wide.new_empty((0, logits.shape[0])),
        argmax if outputs & _BIT["argmax"] else argmax.new_empty(0),
        delta if outputs & _BIT["delta"] else delta.new_empty(0, 0),
    )


def _head_gradient_norm_elsewhere(
    logits: Tensor,
    features: Tensor,
    objective: int,
    temperature: float,
    target: Tensor | None,
    norm: int,
    bias: bool,
) -> Tensor:
    _check(logits, objective, temperature, target)
    real = _real(logits)
    if features.ndim != 2 or len(features) != len(logits) or _real(features) != real:
        raise RuntimeError(
            f"features must be of shape ({len(logits)}, D), and float64 exactly if the logits are; "
            f"got {features.dtype} of shape {tuple(features.shape)}"
        )
    return reference.head_gradient_norm(
        logits.to(real),
        features.to(real),
        OBJECTIVES[objective],
        temperature,
        target,
        NORMS[norm],
        bias,
    )


def _dual_project_elsewhere(
    delta: Tensor,
    features: Tensor,
    anchor_delta: Tensor,
    anchor_features: Tensor,
    coefficients: Tensor,
    bias: float,
) -> Tensor:
    operands = (delta, features, anchor_delta, anchor_features, coefficients)
    if any(operand.ndim != 2 or not operand.is_floating_point() for operand in operands):
        raise RuntimeError("dual_project takes floating point matrices")
    if coefficients.dtype not in (torch.float32, torch.float64):
        raise RuntimeError("coefficients must be float32 or float64")
    sizes = {len(anchor_delta), len(anchor_features), len(coefficients)}
    if len(delta) != len(features) or len(sizes) != 1:
        raise RuntimeError("delta and features, and the anchors' parts, must have as many rows")
    d, h, anchors_d, anchors_h, a = (operand.to(coefficients.dtype) for operand in operands)
    return reference.dual_project(d, h, anchors_d, anchors_h, a, bias)


def _cluster_extremes_elsewhere(
    assignments: Tensor, energies: Tensor, clusters: int
) -> tuple[Tensor, Tensor]:
    if assignments.ndim != 1 or assignments.shape != energies.shape:
        raise RuntimeError("assignments and energies must both have the shape (N,)")
    if assignments.dtype != torch.int64:
        raise RuntimeError("assignments must be int64")
    if not energies.is_floating_point():
        raise RuntimeError("energies must be float32, float64, bfloat16 or float16")
    return reference.cluster_extremes(assignments, energies, clusters)


def _prototype_gradient_elsewhere(
    features: Tensor,
    ood_prototype: Tensor,
    offsets: Tensor,
    offset_norms: Tensor,
    temperature: float,
    squared: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check_real("offsets", offsets)
    _check_matrices(features=features, offsets=offsets)
    if not temperature > 0:
        raise RuntimeError(f"temperature must be positive, got {temperature}")
    columns = offsets.shape[1:]
    if features.shape[1:] != columns or ood_prototype.shape != columns:
        raise RuntimeError("features, offsets and ood_prototype must have as many columns")
    if offset_norms.shape != offsets.shape[:1]:
        raise RuntimeError("offset_norms must have the shape (C,)")
    if {ood_prototype.dtype, offset_norms.dtype} != {offsets.dtype}:
        raise RuntimeError("ood_prototype and offset_norms must have the dtype of the offsets")
    wide = features.to(offsets.dtype)
    return reference.prototype_gradient(wide, ood_prototype, offsets, temperature, squared, scale)


def _nearest_distance_elsewhere(
    queries: Tensor, bank: Tensor, bank_norms: Tensor, rounding: float
) -> tuple[Tensor, Tensor]:
    _check_real("bank_norms", bank_norms)
    _check_matrices(queries=queries, bank=bank)
    if queries.shape[1] != bank.shape[1] or len(bank) == 0 or bank_norms.shape != bank.shape[:1]:
        raise RuntimeError("queries, bank and bank_norms must be (B, D), (N, D) and (N,), N >= 1")
    return reference.nearest_distance(queries.to(bank_norms.dtype), bank.to(bank_norms.dtype))


def _short_circuit_logits_elsewhere(
    logits: Tensor, features: Tensor, weight_t: Tensor, removed: Tensor
) -> Tensor:
    _check_real("weight_t", weight_t)
    _check_matrices(logits=logits, features=features, weight_t=weight_t)
    if removed.ndim != 2 or removed.dtype != torch.int64:
        raise RuntimeError("removed must be int64 of the shape (B, k)")
    if not len(logits) == len(features) == len(removed):
        raise RuntimeError("logits, features and removed must have as many rows")
    if weight_t.shape != (features.shape[1], logits.shape[1]):
        raise RuntimeError("weight_t must have the shape (D, C)")
    wide = (logits.to(weight_t.dtype), features.to(weight_t.dtype))
    return reference.short_circuit_logits(*wide, weight_t, removed)


def _check_real(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"{name} must be float32 or float64")


def _check_matrices(**matrices: Tensor) -> None:
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise RuntimeError(
                f"{name} must be a floating point matrix, got {matrix.dtype} of shape "
                f"{tuple(matrix.shape)}"
            )


def _layer_gradient_sqnorm_elsewhere(
    activation: Tensor, delta: Tensor, offsets: list[int]
) -> Tensor:
    if activation.ndim != 3 or delta.ndim != 3 or len(activation) != len(delta):
        raise RuntimeError("activation and delta must have the shapes (B, Q, N) and (B, R, M)")
    operands = (activation, delta)
    if not all(t.is_floating_point() for t in operands) or _real(activation) != _real(delta):
        raise RuntimeError("activation and delta must be floating point, both float64 or neither")
    if not offsets or min(offsets) < 0 or max(offsets) + delta.shape[1] > activation.shape[1]:
        raise RuntimeError("each offset must lie between 0 and Q - R, and there must be one")
    real = _real(delta)
    return reference.layer_gradient_sqnorm(activation.to(real), delta.to(real), offsets)


def _channel_affine_backward_elsewhere(
    delta: Tensor, input: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if delta.ndim < 2 or delta.shape != input.shape or delta.dtype != input.dtype:
        raise RuntimeError("delta and input must have the same shape (B, C, ...) and dtype")
    if scale is not None and (scale.shape != delta.shape[1:2] or scale.dtype != delta.dtype):
        raise RuntimeError("scale must be of shape (C,) and of delta's dtype")
    real = _real(delta)
    return reference.channel_affine_backward(delta.to(real), input.to(real), scale)


for _name, _twin in (
    ("channel_affine_backward", _channel_affine_backward_elsewhere),
    ("layer_gradient_sqnorm", _layer_gradient_sqnorm_elsewhere),
    ("cluster_extremes", _cluster_extremes_elsewhere),
    ("nearest_distance", _nearest_distance_elsewhere),
    ("prototype_gradient", _prototype_gradient_elsewhere),
    ("short_circuit_logits", _short_circuit_logits_elsewhere),
    ("dual_project", _dual_project_elsewhere),
    ("logit_gradient", _logit_gradient_elsewhere),
    ("head_gradient_norm", _head_gradient_norm_elsewhere),
):
    torch.library.impl(f"grood_fast::{_name}", "CompositeExplicitAutograd", _twin)


# --- derivatives, in closed form and themselves differentiable ------------------------------------


def _save_logit_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, objective, temperature, target, outputs = inputs
    ctx.save_for_backward(logits, target)
    ctx.objective, ctx.temperature, ctx.outputs = OBJECTIVES[objective], temperature, outputs
    ctx.mark_non_differentiable(output[1])


def _logit_gradient_backward(
    ctx: Any, grad_statistics: Tensor | None, _argmax: Tensor | None, grad_delta: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved, target = ctx.saved_tensors
    logits = saved.to(_real(saved))
    names = [name for name in _STATISTICS if ctx.outputs & _BIT[name]]
    grads = {} if grad_statistics is None else dict(zip(names, grad_statistics, strict=True))
    through_delta = grad_delta if ctx.outputs & _BIT["delta"] else None
    result = torch.zeros_like(logits)
    if norms := [name for name in NORMS if name in grads]:
        delta = reference.logit_gradient(logits, ctx.objective, ctx.temperature, target)
        for name in norms:
            part = reference.row_norm_vjp(delta, grads[name], name)
            through_delta = part if through_delta is None else through_delta + part
    if through_delta is not None:
        result = result + reference.logit_gradient_vjp(
            logits, through_delta, ctx.objective, ctx.temperature
        )
    if "energy" in grads or "log_sum_exp" in grads:
        p = torch.softmax(logits / ctx.temperature, dim=1)
        if "energy" in grads:
            result = result - grads["energy"].unsqueeze(1) * p
        if "log_sum_exp" in grads:
            result = result + grads["log_sum_exp"].unsqueeze(1) * p / ctx.temperature
    if "maximum" in grads:
        first = torch.nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1])
        result = result + grads["maximum"].unsqueeze(1) * first
    return result.to(saved.dtype), None, None, None, None


torch.library.register_autograd(
    "grood_fast::logit_gradient", _logit_gradient_backward, setup_context=_save_logit_gradient
)


def _save_head_gradient_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, features, objective, temperature, target, norm, bias = inputs
    ctx.save_for_backward(logits, features, target)
    ctx.objective, ctx.temperature = OBJECTIVES[objective], temperature
    ctx.norm, ctx.bias = NORMS[norm], bias


def _head_gradient_norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved_logits, saved_features, target = ctx.saved_tensors
    logits, features = saved_logits.to(grad.dtype), saved_features.to(grad.dtype)
    columns = features.shape[1]
    if ctx.bias:
        features = torch.cat([features, features.new_ones(features.shape[0], 1)], dim=1)
    delta = reference.logit_gradient(logits, ctx.objective, ctx.temperature, target)
    delta_norm = reference.row_norm(delta, ctx.norm)
    features_norm = reference.row_norm(features, ctx.norm)
    grad_logits = reference.logit_gradient_vjp(
        logits,
        reference.row_norm_vjp(delta, grad * features_norm, ctx.norm),
        ctx.objective,
        ctx.temperature,
    )
    grad_features = reference.row_norm_vjp(features, grad * delta_norm, ctx.norm)[:, :columns]
    return (
        grad_logits.to(saved_logits.dtype),
        grad_features.to(saved_features.dtype),
        None,
        None,
        None,
        None,
        None,
    )


torch.library.register_autograd(
    "grood_fast::head_gradient_norm",
    _head_gradient_norm_backward,
    setup_context=_save_head_gradient_norm,
)


def _save_dual_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.bias = inputs[5]


def _dual_project_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    delta, features, anchor_delta, anchor_features, coefficients = (
        tensor.to(grad.dtype) for tensor in saved
    )
    left = delta @ anchor_delta.T
    right = features @ anchor_features.T + ctx.bias
    through = grad @ coefficients.T
    grads = (
        (through * right) @ anchor_delta,
        (through * left) @ anchor_features,
        (through * right).T @ delta,
        (through * left).T @ features,
        (left * right).T @ grad,
    )
    kept = (g.to(s.dtype) for g, s in zip(grads, saved, strict=True))
    return (*kept, None)


torch.library.register_autograd(
    "grood_fast::dual_project", _dual_project_backward, setup_context=_save_dual_project
)


def _save_layer_gradient_sqnorm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.offsets = inputs[2]


def _layer_gradient_sqnorm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    activation, delta = (tensor.to(grad.dtype) for tensor in saved)
    count, scale = delta.shape[1], 2 * grad.reshape(-1, 1, 1)
    through_activation, through_delta = torch.zeros_like(activation), torch.zeros_like(delta)
    for offset in ctx.offsets:
        part = activation[:, offset : offset + count]
        gradient = scale * (delta.mT @ part)
        through_delta = through_delta + part @ gradient.mT
        shift = (0, 0, offset, activation.shape[1] - offset - count)
        through_activation = through_activation + torch.nn.functional.pad(delta @ gradient, shift)
    return through_activation.to(saved[0].dtype), through_delta.to(saved[1].dtype), None


torch.library.register_autograd(
    "grood_fast::layer_gradient_sqnorm",
    _layer_gradient_sqnorm_backward,
    setup_context=_save_layer_gradient_sqnorm,
)


def _save_channel_affine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _channel_affine_vjp(
    ctx: Any, grad_onward: Tensor, grad_products: Tensor, grad_sums: Tensor
) -> tuple[Tensor | None, ...]:
    saved_delta, saved_input, scale = ctx.saved_tensors
    real = _real(saved_delta)
    delta, values = saved_delta.to(real), saved_input.to(real)
    per_position = (*delta.shape[:2], *[1] * (delta.ndim - 2))
    products, sums = grad_products.reshape(per_position), grad_sums.reshape(per_position)
    through_delta, through_scale = values * products + sums, None
    if scale is not None:
        through_delta = through_delta + grad_onward * scale.reshape(1, *per_position[1:])
        through_scale = (grad_onward * delta).transpose(0, 1).flatten(1).sum(dim=1)
    return (
        through_delta.to(saved_delta.dtype),
        (delta * products).to(saved_input.dtype),
        through_scale,
    )


torch.library.register_autograd(
    "grood_fast::channel_affine_backward", _channel_affine_vjp, setup_context=_save_channel_affine
)
