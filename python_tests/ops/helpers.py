"""How far an op may be from its float64 twin, and the check that it is not farther."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.testing import assert_close

from grood_fast import ops
from grood_fast.ops import reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SOFTMAX_OBJECTIVES = ("energy", "uniform", "predicted")
TWIN = torch.float64
_ROUNDINGS = 8  # how many units in the last place a few operations may cost
_ADDITIONS = 32  # and what adding up may: sums are folded every few hundred terms


def real_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op accumulates and answers in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_logits(
    batch: int,
    classes: int,
    dtype: torch.dtype = torch.float32,
    *,
    spread: float = 4.0,
    seed: int = 0,
    requires_grad: bool = False,
) -> Tensor:
    """(batch, classes) normal numbers of standard deviation ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    return (spread * wide).to(dtype).requires_grad_(requires_grad)


def twin_logit_gradient(
    logits: Tensor, objective: str, temperature: float = 1.0, target: Tensor | None = None
) -> ops.LogitGradient:
    """Every output of ``logit_gradient`` in float64, by :mod:`grood_fast.ops.reference`."""
    wide = logits.to(TWIN)
    delta = reference.logit_gradient(
        wide, objective, temperature, None if target is None else target.to(TWIN)
    )
    return ops.LogitGradient(
        energy=reference.energy(wide, temperature),
        log_sum_exp=torch.logsumexp(wide / temperature, dim=1),
        maximum=wide.amax(dim=1),
        argmax=wide.argmax(dim=1),
        delta=delta,
        **{norm: reference.row_norm(delta, norm) for norm in ops.NORMS},
    )


def delta_tolerance(
    logits: Tensor, objective: str, temperature: float, target: Tensor | None = None
) -> Tensor:
    """(B, C) how far each entry of δ may be from the twin's, by the rounding of its terms.

    A probability exp(y)/Σ is known to ε(1 + |y|), since y itself is rounded; a difference of two
    terms to the ε of the larger.
    """
    real = torch.finfo(real_of(logits.dtype))
    wide = logits.to(TWIN).nan_to_num()
    y = (wide - wide.amax(dim=1, keepdim=True)) / temperature
    relative = real.eps * (_ROUNDINGS * (1 + y.abs()) + _ADDITIONS)
    if temperature != 1:  # the twin divides before it subtracts
        largest = wide.abs().amax(dim=1, keepdim=True) / temperature
        relative = relative + _ROUNDINGS * torch.finfo(TWIN).eps * largest
    p = (torch.softmax(y, dim=1) * relative).nan_to_num()
    classes, rounding = logits.shape[1], _ROUNDINGS * real.eps
    tolerance = {
        "energy": p,
        "uniform": (classes * p + rounding) / temperature,
        "predicted": (p + rounding) / temperature,
        "confounding": torch.zeros_like(p) + rounding * (1 if target is None else 1 + target),
        "max_logit": torch.zeros_like(p),
        "logit_sum": torch.zeros_like(p),
    }[objective]
    return tolerance + real.tiny * (1 + classes) * (1 + 1 / temperature)


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor, what: str) -> None:
    """|actual − expected| ≤ tolerance entry by entry; NaN equals NaN, and infinities themselves."""
    assert actual.shape == expected.shape, what
    rounded = expected.to(actual.dtype).to(TWIN)  # what overflows the result's dtype is infinite
    wide = actual.to(TWIN)
    same = (wide == rounded) | (wide.isnan() & rounded.isnan())
    close = (wide - rounded).abs() <= tolerance
    wrong = ~(same | close)
    if wrong.any():
        first = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} differ; at {first} "
            f"{float(wide[first])!r} instead of {float(rounded[first])!r}, "
            f"allowed {float(tolerance[first])!r}"
        )


def _adding_up(count: int, eps: float) -> float:
    """What a norm of ``count`` numbers may be off, relatively; the twin adds them one by one."""
    return _ADDITIONS * eps + count * torch.finfo(TWIN).eps


def assert_logit_gradient_equals_twin(
    result: ops.LogitGradient,
    logits: Tensor,
    objective: str,
    temperature: float = 1.0,
    target: Tensor | None = None,
) -> None:
    """Every output that ``result`` has against the float64 twin, with its dtype."""
    expected = twin_logit_gradient(logits, objective, temperature, target)
    eps = torch.finfo(real_of(logits.dtype)).eps
    tolerance = delta_tolerance(logits, objective, temperature, target)
    # log Σ exp = max/T + log(Σ exp((f − max)/T)): known to the ε of the larger of the two.
    terms = _ROUNDINGS * (expected.maximum.abs() / temperature + expected.log_sum_exp.abs())
    log_sum_exp = eps * (terms + _ADDITIONS)
    tolerances = {
        "energy": log_sum_exp * temperature,
        "log_sum_exp": log_sum_exp,
        "maximum": torch.zeros_like(expected.maximum),
        "delta": tolerance,
        **{  # by the triangle inequality
            norm: reference.row_norm(tolerance, norm)
            + _adding_up(logits.shape[1], eps) * getattr(expected, norm).nan_to_num()
            for norm in ops.NORMS
        },
    }
    for name, value in result._asdict().items():
        if value is None:
            continue
        what = f"{name} of {objective} at T={temperature} of {tuple(logits.shape)} {logits.dtype}"
        if name == "argmax":
            assert_close(value, expected.argmax, rtol=0, atol=0, msg=what)
            continue
        assert value.dtype == real_of(logits.dtype), what
        assert_within(value, getattr(expected, name), tolerances[name], what)


def assert_head_gradient_norm_equals_twin(
    result: Tensor,
    logits: Tensor,
    features: Tensor,
    objective: str,
    temperature: float = 1.0,
    target: Tensor | None = None,
    norm: str = "l1",
    bias: bool = False,
) -> None:
    """``result`` against the float64 twin, with its dtype."""
    wide = features.to(TWIN)
    wide_target = None if target is None else target.to(TWIN)
    arguments = (objective, temperature, wide_target, norm, bias)
    expected = reference.head_gradient_norm(logits.to(TWIN), wide, *arguments)
    if bias:
        wide = torch.cat([wide, wide.new_ones(len(wide), 1)], dim=1)
    eps = torch.finfo(real_of(logits.dtype)).eps
    tolerance = delta_tolerance(logits, objective, temperature, target)
    adding_up = _adding_up(logits.shape[1], eps) + _adding_up(wide.shape[1], eps)
    assert result.dtype == real_of(logits.dtype)
    assert_within(
        result,
        expected,
        reference.row_norm(tolerance, norm) * reference.row_norm(wide, norm) + adding_up * expected,
        f"{norm} (bias: {bias}) of {objective} at T={temperature} of "
        f"{tuple(logits.shape)} {logits.dtype} and {tuple(features.shape)} {features.dtype}",
    )


def assert_identical(actual: ops.LogitGradient, expected: ops.LogitGradient) -> None:
    """Bit for bit, and the same fields left out."""
    for name, one, other in zip(expected._fields, actual, expected, strict=True):
        if other is None:
            assert one is None, name
        else:
            assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)


def layouts(matrix: Tensor) -> dict[str, Tensor]:
    """The same numbers as ``matrix`` (B, C) at other strides, the gaps filled with NaN."""
    batch, classes = matrix.shape
    nan = float("nan")
    rows = matrix.new_full((batch, classes + 3), nan)[:, 1 : classes + 1]
    every_other_row = matrix.new_full((2 * batch, classes), nan)[::2]
    columns = matrix.new_full((batch, 2 * classes), nan)[:, ::2]
    transposed = matrix.new_full((classes, batch), nan).t()
    views = {
        "row-strided": rows,
        "every other row": every_other_row,
        "column-strided": columns,
        "transposed": transposed,
    }
    for view in views.values():
        view.copy_(matrix)
    return views


def hard_rows(classes: int, dtype: torch.dtype, extremes: bool = True) -> Tensor:
    """(N, classes) rows of everything that goes wrong: NaN, infinities, ties, zeros, and with
    ``extremes`` the largest and the smallest numbers of ``dtype``.
    """
    inf, nan = float("inf"), float("nan")
    plain = random_logits(1, classes, torch.float64)[0]
    constants = [0.0, -0.0, 3.0, 1e4, -1e4, inf, -inf, nan]
    starts = [[1e4], [-1e4], [1e4, 1e4]]
    starts += [[one] for one in (inf, -inf, nan)]
    starts += [[one, other] for one, other in product((inf, -inf, nan), repeat=2)]
    starts += [[7e3, 7e3], [0.0, 7e3, 7e3]]  # ties of the largest: the first counts
    if extremes:
        finite = torch.finfo(dtype)
        denormal = finite.smallest_normal / 8
        constants += [denormal, finite.max, -finite.max]
        starts += [[finite.max], [-finite.max], [finite.max, -finite.max], [denormal, -denormal]]
    rows = [plain, torch.linspace(-1e4, 1e4, classes, dtype=torch.float64)]
    rows += [torch.full_like(plain, value) for value in constants]
    zeros = torch.zeros_like(plain)
    for base, values in [
        *((plain, start) for start in starts),
        *((zeros, start) for start in starts),
        *((-plain.abs() - 1, zero) for zero in ([0.0, -0.0], [-0.0, 0.0])),
    ]:
        for first in sorted({0, classes // 2, max(0, classes - len(values))}):
            row = base.clone()
            kept = values[: classes - first]
            row[first : first + len(kept)] = torch.tensor(kept, dtype=row.dtype)
            rows.append(row)
    return torch.stack(rows).to(dtype)
