"""The CUDA kernels on the emulated device against float64 and the CPU kernels.

Sizes stand on both sides of what the kernels divide rows by: 4 threads up to 128 numbers, a warp up
to 1,024, a block up to 8,192 in registers, and more; tiles of 64 rows and 64 anchors.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from ops.helpers import (
    DTYPES,
    TWIN,
    assert_head_gradient_norm_equals_twin,
    assert_logit_gradient_equals_twin,
    assert_within,
    hard_rows,
    layouts,
    random_logits,
    real_of,
)
from torch import Tensor
from torch.testing import assert_close

from grood_fast import _kernels, ops
from grood_fast.ops import reference

pytestmark = pytest.mark.usefixtures("schedule")

FEW_CLASSES = (1, 2, 3, 7, 10, 127, 128, 129, 131)
MANY_CLASSES = (1000, 1023, 1024, 1025, 8192, 8195, 20_001)


@pytest.mark.parametrize("dtype", DTYPES)
class TestLogitGradient:
    def test_every_number_of_classes(self, dtype: torch.dtype) -> None:
        for number, (classes, objective) in enumerate(
            itertools.product(FEW_CLASSES + MANY_CLASSES, ops.OBJECTIVES)
        ):
            batch = (0, 1, 3, 33, 65)[number % 5] if classes < 200 else (1, 3)[number % 2]
            logits = random_logits(batch, classes, dtype, seed=number)
            result = ops.logit_gradient(logits, objective, temperature=1.5)
            assert_logit_gradient_equals_twin(result, logits, objective, 1.5)

    @pytest.mark.parametrize("classes", [1, 3, 10, 129, 1025])
    def test_hard_values(self, dtype: torch.dtype, classes: int) -> None:
        logits = hard_rows(classes, dtype)
        for objective in ops.OBJECTIVES:
            result = ops.logit_gradient(logits, objective)
            assert_logit_gradient_equals_twin(result, logits, objective)

    @pytest.mark.parametrize("classes", [10, 131, 1100])
    def test_every_layout_and_output(self, dtype: torch.dtype, classes: int) -> None:
        matrix = random_logits(5, classes, dtype)
        expected = ops.logit_gradient(matrix, "uniform")
        for logits in layouts(matrix).values():
            for name in ops.OUTPUTS:
                alone = ops.logit_gradient(logits, "uniform", outputs=(name,))
                assert_close(getattr(alone, name), getattr(expected, name), rtol=0, atol=0)

    def test_targets_and_temperatures(self, dtype: torch.dtype) -> None:
        for classes in (10, 131, 9000):
            logits = random_logits(3, classes, dtype)
            target = torch.linspace(0, 1, classes, dtype=real_of(dtype))
            result = ops.logit_gradient(logits, "confounding", target=target)
            assert_logit_gradient_equals_twin(result, logits, "confounding", target=target)
            for temperature in (1e-3, 0.5, 1e3, 1e6):
                result = ops.logit_gradient(logits, "predicted", temperature=temperature)
                assert_logit_gradient_equals_twin(result, logits, "predicted", temperature)

    def test_as_the_cpu_kernel(self, dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.float64):
            return  # the NumPy door to the CPU kernels takes these two
        logits = torch.cat([random_logits(9, 131, dtype), hard_rows(131, dtype, extremes=False)])
        for objective in ops.OBJECTIVES:
            cpu = _kernels.logit_gradient(logits.numpy(), objective)
            result = ops.logit_gradient(logits, objective)
            for name in ops.OUTPUTS:
                expected = torch.from_numpy(cpu[name])
                exact = name in ("maximum", "argmax")
                tolerance = 0 if exact else 64 * torch.finfo(dtype).eps
                assert_close(
                    getattr(result, name), expected, rtol=tolerance, atol=tolerance, equal_nan=True
                )


@pytest.mark.parametrize("dtype", DTYPES)
class TestHeadGradientNorm:
    def test_every_number_of_columns(self, dtype: torch.dtype) -> None:
        columns = (0, 1, 5, 127, 128, 129, 515, 8192, 8203)
        cases = itertools.cycle(itertools.product(ops.OBJECTIVES, (False, True), (1, 33, 10)))
        for (count, norm), (objective, bias, batch) in zip(
            itertools.product(columns, ops.NORMS), cases, strict=False
        ):
            logits = random_logits(batch, 10, dtype)
            features = random_logits(batch, count, dtype, seed=1)
            arguments = (objective, 1.0, None, norm, bias)
            result = ops.head_gradient_norm(logits, features, objective, norm=norm, bias=bias)
            assert_head_gradient_norm_equals_twin(result, logits, features, *arguments)

    def test_hard_values(self, dtype: torch.dtype) -> None:
        features = hard_rows(37, dtype, extremes=False)
        if dtype in (torch.float32, torch.bfloat16):
            features = torch.cat([features, torch.full((1, 37), 1e25, dtype=dtype)])
        logits = random_logits(len(features), 10, dtype)
        for norm, bias in itertools.product(ops.NORMS, (False, True)):
            result = ops.head_gradient_norm(logits, features, "uniform", norm=norm, bias=bias)
            arguments = ("uniform", 1.0, None, norm, bias)
            assert_head_gradient_norm_equals_twin(result, logits, features, *arguments)

    def test_every_layout(self, dtype: torch.dtype) -> None:
        logits, features = random_logits(5, 10, dtype), random_logits(5, 131, dtype, seed=1)
        expected = ops.head_gradient_norm(logits, features, "energy")
        others = layouts(features)
        for name, rows in layouts(logits).items():
            result = ops.head_gradient_norm(rows, others[name], "energy")
            assert_close(result, expected, rtol=1e-6, atol=0)


def _operands(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, real: torch.dtype, spread: float = 1
) -> list[Tensor]:
    batch, classes, columns, anchors, components = sizes
    shapes = [
        (batch, classes),
        (batch, columns),
        (anchors, classes),
        (anchors, columns),
        (anchors, components),
    ]
    return [
        random_logits(*shape, one, spread=spread, seed=seed)
        for seed, (shape, one) in enumerate(zip(shapes, [dtype] * 4 + [real], strict=True))
    ]


def _check_dual_project(operands: list[Tensor], bias: bool) -> None:
    result = ops.dual_project(*operands, bias=bias)
    real = operands[-1].dtype
    assert result.dtype == real
    wide = [operand.to(TWIN) for operand in operands]
    magnitude = reference.dual_project(*(operand.abs() for operand in wide), bias)
    assert_within(
        result,
        reference.dual_project(*wide, bias),
        16 * torch.finfo(real).eps * magnitude,
        f"(bias: {bias}) of {[tuple(one.shape) for one in operands]}",
    )


@pytest.mark.parametrize(
    ("dtype", "real"),
    [*((dtype, torch.float32) for dtype in DTYPES), (torch.float64, torch.float64)],
)
class TestDualProject:
    def test_every_size(self, dtype: torch.dtype, real: torch.dtype) -> None:
        batches, classes = (1, 63, 64, 65, 0), (1, 10, 0, 33, 64, 3)
        columns, anchors = (1, 32, 100, 0, 67), (64, 1, 65, 130, 33, 0, 257)
        components = (1, 5, 64, 128, 130, 0, 17, 300)
        cycles = (itertools.cycle(sizes) for sizes in (batches, classes, columns, anchors))
        for number, sizes in enumerate(
            zip(*cycles, itertools.cycle(components), [None] * 32, strict=False)
        ):
            _check_dual_project(_operands(sizes[:5], dtype, real), bias=number % 2 == 0)

    def test_every_layout(self, dtype: torch.dtype, real: torch.dtype) -> None:
        operands = _operands((5, 10, 40, 70, 9), dtype, real)
        views = [layouts(operand) for operand in operands]
        for name in views[0]:
            _check_dual_project([view[name] for view in views], bias=True)

    def test_the_same_bits_whatever_the_schedule(
        self, dtype: torch.dtype, real: torch.dtype
    ) -> None:
        operands = _operands((67, 10, 40, 300, 9), dtype, real)
        first = ops.dual_project(*operands)
        for seed in (0, 1, 7):
            torch.ops.grood_fast_emulated.set_seed(seed)
            assert_close(ops.dual_project(*operands), first, rtol=0, atol=0)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_stays_with_its_sample(
        self, dtype: torch.dtype, real: torch.dtype, value: float
    ) -> None:
        """The split of float32 makes NaN of infinities; none is lost, and none spreads."""
        for number in range(5):
            operands = _operands((67, 10, 40, 70, 9), dtype, real)
            operands[number][-1, 1] = value
            wide = [operand.to(TWIN) for operand in operands]
            expected = reference.dual_project(*wide, True).isfinite()
            assert_close(ops.dual_project(*operands, bias=True).isfinite(), expected)


class TestPrecisionOfDualProject:
    def test_float32_is_within_a_hundred_thousandth(self) -> None:
        for spread in (1.0, 1e-6, 1e6):
            operands = _operands((64, 100, 300, 200, 16), torch.float32, torch.float32, spread)
            exact = reference.dual_project(*(operand.double() for operand in operands))
            actual = ops.dual_project(*operands)
            assert ((actual - exact).norm() / exact.norm()).item() < 1e-5 / 4

    def test_sums_of_one_sign_do_not_drift(self) -> None:
        """Truncated additions all err the same way: here they would show most."""
        operands = [
            operand.abs() for operand in _operands((3, 16, 2048, 64, 2), torch.float32, TWIN)
        ]
        operands[-1] = operands[-1].float()
        exact = reference.dual_project(*(operand.double() for operand in operands))
        assert_close(ops.dual_project(*operands).double(), exact, rtol=4e-6, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_costs_only_its_own_rounding(self, dtype: torch.dtype) -> None:
        operands = _operands((64, 100, 256, 200, 16), dtype, torch.float32)
        exact = reference.dual_project(*(operand.double() for operand in operands))
        actual = ops.dual_project(*operands)
        assert ((actual - exact).norm() / exact.norm()).item() < 1e-6
