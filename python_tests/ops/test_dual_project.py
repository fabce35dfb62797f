"""``dual_project`` against its float64 twin, whole numbers, and gradients that are formed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.helpers import DTYPES, TWIN, assert_within, layouts, random_logits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.testing import assert_close

from grood_fast import ops
from grood_fast.ops import reference

REALS = (torch.float32, torch.float64)  # what coefficients, and with them results, may be
DTYPE_PAIRS = tuple(product(DTYPES, REALS))
NAMES = ("delta", "features", "anchor_delta", "anchor_features", "coefficients")
OP = torch.ops.grood_fast.dual_project


class Sizes(NamedTuple):
    """How many samples, classes, features, anchors and components there are."""

    batch: int
    classes: int
    features: int
    anchors: int
    components: int

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Of the operands, in the op's order."""
        b, c, d, n, k = self
        return (b, c), (b, d), (n, c), (n, d), (n, k)


FEW = Sizes(3, 5, 7, 4, 2)
# 4096 anchors are a tile and 2²⁰ elements too, or less where threads share the anchors: with so
# many anchors, one thread tiles the rows by 256.
TILED = Sizes(259, 5, 7, 4099, 3)


def _operands(
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    real: torch.dtype = torch.float32,
    requires_grad: bool = False,
) -> list[Tensor]:
    shapes = Sizes(*sizes).shapes
    return [
        random_logits(*shape, one, spread=1.0, seed=seed, requires_grad=requires_grad)
        for seed, (shape, one) in enumerate(zip(shapes, [dtype] * 4 + [real], strict=True))
    ]


def _check(operands: list[Tensor], bias: bool, roundings: int = 16) -> None:
    """Against the twin of the operands as they are, to a few roundings of what is added up."""
    result = ops.dual_project(*operands, bias=bias)
    real = operands[-1].dtype
    assert result.dtype == real
    assert result.is_contiguous()
    wide = [operand.to(TWIN) for operand in operands]
    magnitude = reference.dual_project(*(operand.abs() for operand in wide), bias)
    assert_within(
        result,
        reference.dual_project(*wide, bias),
        roundings * torch.finfo(real).eps * magnitude,
        f"(bias: {bias}) of {[tuple(one.shape) for one in operands]}, "
        f"{[one.dtype for one in operands]}",
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "real"), DTYPE_PAIRS)
class TestAgainstTwin:
    def test_every_number_of_samples_and_anchors(
        self, simd_level: str, dtype: torch.dtype, real: torch.dtype, bias: bool
    ) -> None:
        others = cycle(product((1, 10, 17), (1, 33), (1, 5)))
        numbers = product((0, 1, 3, 255, 257, 600), (0, 1, 7, 1023, 1024, 1025, 2500))
        for (batch, anchors), (classes, features, components) in zip(numbers, others, strict=False):
            sizes = batch, classes, features, anchors, components
            _check(_operands(sizes, dtype, real), bias)

    def test_every_number_of_columns(
        self, simd_level: str, dtype: torch.dtype, real: torch.dtype, bias: bool
    ) -> None:
        for classes, features, components in product((0, 1, 3, 16, 65), (0, 1, 9, 130), (0, 1, 31)):
            _check(_operands((5, classes, features, 9, components), dtype, real), bias)

    @pytest.mark.cpu_kernels
    def test_few_anchors_make_long_tiles(
        self, simd_level: str, dtype: torch.dtype, real: torch.dtype, bias: bool
    ) -> None:
        _check(_operands((2**17 + 3, 2, 1, 2, 2), dtype, real), bias)

    def test_every_layout(
        self, simd_level: str, dtype: torch.dtype, real: torch.dtype, bias: bool
    ) -> None:
        operands = _operands(TILED, dtype, real)
        views = [layouts(operand) for operand in operands]
        for name in views[0]:
            _check([view[name] for view in views], bias)
        kinds = list(views[0])  # each operand another
        _check([view[kinds[i % len(kinds)]] for i, view in enumerate(views)], bias)
        for expanded in (lambda one: one[:1].expand_as(one), lambda one: one[:, :1].expand_as(one)):
            _check([expanded(operand) for operand in operands], bias)

    @pytest.mark.cpu_kernels  # the CUDA form: python_tests/cuda
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_spreads_as_in_the_twin(
        self, simd_level: str, dtype: torch.dtype, real: torch.dtype, bias: bool, value: float
    ) -> None:
        for number in range(len(NAMES)):
            for row in (0, -1):
                operands = _operands(TILED, dtype, real)
                operands[number][row, 1] = value
                _check(operands, bias)
                touched = ~ops.dual_project(*operands, bias=bias).isfinite()
                assert touched.any()
                if number < 2:  # a sample's own numbers are no other sample's business
                    assert touched.any(dim=1).nonzero().tolist() == [[row % TILED.batch]]


class TestWholeNumbers:
    """Of −1, 0 and 1 every product and sum is exact, whatever the precision and the order."""

    @settings(max_examples=80, deadline=None)
    @given(
        sizes=st.tuples(
            st.integers(0, 600),
            st.integers(0, 40),
            st.integers(0, 40),
            st.one_of(st.integers(0, 40), st.integers(4000, 4200)),
            st.integers(0, 20),
        ),
        dtypes=st.sampled_from(DTYPE_PAIRS),
        bias=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_any_shape(
        self,
        sizes: tuple[int, int, int, int, int],
        dtypes: tuple[torch.dtype, torch.dtype],
        bias: bool,
        seed: int,
    ) -> None:
        generator = np.random.default_rng(seed)
        numbers = [generator.integers(-1, 2, shape) for shape in Sizes(*sizes).shapes]
        dtype, real = dtypes
        operands = [
            torch.from_numpy(one).to(to)
            for one, to in zip(numbers, [dtype] * 4 + [real], strict=True)
        ]
        d, h, anchor_d, anchor_h, a = numbers
        expected = (d @ anchor_d.T * (h @ anchor_h.T + int(bias))) @ a
        actual = ops.dual_project(*operands, bias=bias)
        np.testing.assert_array_equal(actual.numpy(), expected)


class TestAgainstFormedGradients:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("real", REALS)
    def test_a_linear_layers_gradients_on_directions(self, real: torch.dtype, bias: bool) -> None:
        """Autograd's gradients of a layer, a backward each, against the directions they span."""
        torch.manual_seed(0)
        head = nn.Linear(9, 6, bias=bias, dtype=TWIN)
        samples, anchors = torch.randn(5, 9, dtype=TWIN), torch.randn(23, 9, dtype=TWIN)
        coefficients = torch.randn(23, 4, dtype=TWIN)

        def factors_and_gradients(features: Tensor) -> tuple[Tensor, Tensor]:
            deltas, gradients = [], []
            for h in features:
                logits = head(h)
                logits.retain_grad()
                head.zero_grad()
                functional.log_softmax(logits, dim=0).sum().backward()
                deltas.append(logits.grad)
                gradients.append(torch.cat([one.grad.flatten() for one in head.parameters()]))
            return torch.stack(deltas), torch.stack(gradients)

        delta, gradients = factors_and_gradients(samples)
        anchor_delta, anchor_gradients = factors_and_gradients(anchors)
        directions = sum(  # (P, 4)
            torch.outer(gradient, weights)
            for gradient, weights in zip(anchor_gradients, coefficients, strict=True)
        )
        operands = (delta, samples, anchor_delta, anchors, coefficients)
        actual = ops.dual_project(*(one.to(real) for one in operands), bias=bias)
        expected = gradients @ directions
        eps = torch.finfo(real).eps
        assert_close(actual.to(TWIN), expected, rtol=0, atol=64 * eps * expected.abs().max().item())

    def test_sums_of_outer_products(self) -> None:
        operands = _operands(TILED, TWIN, TWIN)
        delta, features, anchor_delta, anchor_features, coefficients = operands
        directions = torch.zeros(TILED.components, TILED.classes, TILED.features, dtype=TWIN)
        for d, h, weights in zip(anchor_delta, anchor_features, coefficients, strict=True):
            directions += weights[:, None, None] * torch.outer(d, h)
        expected = [
            [(torch.outer(d, h) * direction).sum() for direction in directions]
            for d, h in zip(delta, features, strict=True)
        ]
        actual = ops.dual_project(*operands)
        assert_close(actual, torch.tensor(expected, dtype=TWIN), rtol=1e-9, atol=1e-11)


class TestPrecision:
    @pytest.mark.cpu_kernels  # the CUDA form: python_tests/cuda
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_operands_cost_only_their_own_rounding(self, dtype: torch.dtype) -> None:
        """Bit for bit what their widened selves give, where a product in bfloat16 is 0.4 % off."""
        operands = _operands((64, 100, 256, 1500, 16), dtype)
        actual = ops.dual_project(*operands)
        widened = ops.dual_project(*(operand.float() for operand in operands))
        assert_close(actual, widened, rtol=0, atol=0)
        exact = reference.dual_project(*(operand.double() for operand in operands))
        assert (actual - exact).norm() / exact.norm() < 1e-6
        narrow = reference.dual_project(*(operand.to(dtype) for operand in operands))
        assert (narrow - exact).norm() / exact.norm() > 1e-4

    @pytest.mark.parametrize("real", REALS)
    def test_scaling_an_operand_scales_the_result(self, real: torch.dtype) -> None:
        operands = _operands(TILED, real, real)
        expected = ops.dual_project(*operands)
        for number in range(len(NAMES)):
            for scale in (2.0**60, 2.0**-60):
                scaled = list(operands)
                scaled[number] = operands[number] * scale
                assert_close(ops.dual_project(*scaled) / scale, expected, rtol=0, atol=0)

    def test_autocast_and_inference_mode_change_nothing(self) -> None:
        operands = _operands(TILED)
        expected = ops.dual_project(*operands, bias=True)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(ops.dual_project(*operands, bias=True), expected, rtol=0, atol=0)
        with torch.inference_mode():
            assert_close(ops.dual_project(*operands, bias=True), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "real"), DTYPE_PAIRS)
def test_the_same_again_and_with_more_threads(
    torch_threads: None, dtype: torch.dtype, real: torch.dtype
) -> None:
    operands = _operands((300, 10, 33, 4500, 9), dtype, real)
    before = [operand.clone() for operand in operands]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        _check(operands, bias=True)
        first = ops.dual_project(*operands, bias=True)
        for _ in range(2):
            assert_close(ops.dual_project(*operands, bias=True), first, rtol=0, atol=0)
    assert_close(operands, before, rtol=0, atol=0)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_same_bits(dtype: torch.dtype) -> None:
    before, results = ops.simd_level(), []
    operands = _operands((33, 10, 19, 1029, 6), dtype)
    try:
        for level in ops._kernels.build_facts()["simd_levels_supported"]:
            ops.set_simd_level(level)
            results.append(ops.dual_project(*operands, bias=True))
    finally:
        ops.set_simd_level(before)
    for result in results[1:]:
        assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.cpu_kernels
class TestMemory:
    """The most that torch's allocator held at once, above what it held at the start."""

    @staticmethod
    def _peak(call: Callable[[], Tensor], folder: Path) -> int:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            call()
        profile.export_chrome_trace(str(folder / "trace.json"))
        trace = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
        changes = [
            (event["ts"], event["args"]["Bytes"]) for event in trace if event["name"] == "[memory]"
        ]
        held = peak = 0
        for _, change in sorted(changes, key=lambda pair: pair[0]):
            held += change
            peak = max(peak, held)
        return peak

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_temporaries_do_not_grow_with_the_anchors(
        self, torch_threads: None, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        torch.set_num_threads(1)
        peaks = {}
        for anchors in (2**13, 2**15):
            operands = _operands((300, 4, 8, anchors, 4), dtype)
            peaks[anchors] = self._peak(partial(ops.dual_project, *operands), tmp_path)
        assert peaks[2**15] == peaks[2**13]
        # The measure sees arrays that are whole.
        widened = [operand.float() for operand in operands]
        whole = self._peak(partial(reference.dual_project, *widened), tmp_path)
        assert whole >= 2 * 4 * 300 * 2**15 > 4 * peaks[2**15]

    def test_nor_with_the_samples_but_for_the_result(
        self, torch_threads: None, tmp_path: Path
    ) -> None:
        torch.set_num_threads(1)
        peaks = []
        for batch in (2**11, 2**14):
            operands = _operands((batch, 4, 8, 4100, 4))
            result_bytes = 4 * 4 * batch
            peak = self._peak(partial(ops.dual_project, *operands), tmp_path)
            peaks.append(peak - result_bytes)
        assert peaks[1] == peaks[0]


REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "one dimension": (
        {"delta": torch.zeros(3)},
        "delta must have the shape (B, C), got 1 dimensions",
    ),
    "three dimensions": (
        {"coefficients": torch.zeros(4, 2, 1)},
        "coefficients must have the shape (N, K), got 3 dimensions",
    ),
    "features of other samples": (
        {"features": torch.zeros(2, 7)},
        "delta and features must have the same number of rows, got 3 and 2",
    ),
    "one row of features": (
        {"features": torch.zeros(1, 7)},
        "delta and features must have the same number of rows, got 3 and 1",
    ),
    "features of other anchors": (
        {"anchor_features": torch.zeros(3, 7)},
        "must have the same number of rows, got 4, 3 and 4",
    ),
    "coefficients of other anchors": (
        {"coefficients": torch.zeros(5, 2)},
        "must have the same number of rows, got 4, 4 and 5",
    ),
    "anchors of another layer's classes": (
        {"anchor_delta": torch.zeros(4, 6)},
        "anchors must have as many columns as delta and features: 5 and 7, got 6 and 7",
    ),
    "anchors of another layer's features": (
        {"anchor_features": torch.zeros(4, 1)},
        "anchors must have as many columns as delta and features: 5 and 7, got 5 and 1",
    ),
    "integers": (
        {"anchor_delta": torch.zeros(4, 5, dtype=torch.int64)},
        "must be float32, float64, bfloat16 or float16",
    ),
    "complex numbers": (
        {"delta": torch.zeros(3, 5, dtype=torch.complex64)},
        "must be float32, float64, bfloat16 or float16",
    ),
    "coefficients in half precision": (
        {"coefficients": torch.zeros(4, 2, dtype=torch.bfloat16)},
        "coefficients must be float32 or float64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(name: str) -> None:
    changes, message = REFUSED[name]
    right = dict(zip(NAMES, _operands(FEW), strict=True))
    ops.dual_project(**right)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.dual_project(**{**right, **changes})
    with pytest.raises(RuntimeError):  # in other words: on devices that have no kernel
        ops._dual_project_elsewhere(**{**right, **changes}, bias=0.0)


class TestInPyTorch:
    @pytest.mark.parametrize("bias", [0.0, 1.0])
    @pytest.mark.parametrize(("dtype", "real"), DTYPE_PAIRS)
    def test_opcheck(self, dtype: torch.dtype, real: torch.dtype, bias: float) -> None:
        torch.library.opcheck(OP.default, (*_operands(FEW, dtype, real, requires_grad=True), bias))

    def test_opcheck_of_strides_and_nothing(self) -> None:
        transposed = [layouts(operand)["transposed"] for operand in _operands(FEW)]
        torch.library.opcheck(OP.default, (*transposed, 0.0))
        torch.library.opcheck(OP.default, (*_operands((0, 5, 7, 4, 2)), 1.0))
        torch.library.opcheck(OP.default, (*_operands((3, 5, 7, 0, 2)), 1.0))

    @pytest.mark.parametrize("bias", [False, True])
    def test_first_and_second_derivatives(self, bias: bool) -> None:
        operands = _operands(FEW, TWIN, TWIN, requires_grad=True)

        def function(*operands: Tensor) -> Tensor:
            return ops.dual_project(*operands, bias=bias)

        assert torch.autograd.gradcheck(function, operands)
        assert torch.autograd.gradgradcheck(function, operands)

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(("dtype", "real"), DTYPE_PAIRS)
    def test_gradients_have_the_operands_dtypes(
        self, dtype: torch.dtype, real: torch.dtype, bias: bool
    ) -> None:
        operands = _operands(TILED, dtype, real, requires_grad=True)
        weights = random_logits(TILED.batch, TILED.components, real, seed=9)
        (ops.dual_project(*operands, bias=bias) * weights).sum().backward()
        wide = [operand.detach().to(TWIN).requires_grad_() for operand in operands]
        (reference.dual_project(*wide, bias) * weights.to(TWIN)).sum().backward()
        for operand, expected in zip(operands, wide, strict=True):
            assert operand.grad is not None
            assert operand.grad.dtype == operand.dtype
            eps = max(torch.finfo(operand.dtype).eps, torch.finfo(real).eps)
            atol = 16 * eps * expected.grad.abs().max().item()
            assert_close(operand.grad.to(TWIN), expected.grad, rtol=0, atol=atol)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiled_in_one_graph(self, dynamic: bool) -> None:
        torch._dynamo.reset()

        def function(*operands: Tensor) -> Tensor:
            return 2 * ops.dual_project(*operands, bias=True)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for batch in (3, 8):
            operands = _operands(FEW._replace(batch=batch))
            assert_close(compiled(*operands), function(*operands), rtol=0, atol=0)
        grads = []
        for either in (function, compiled):
            operands = _operands(FEW, TWIN, TWIN, requires_grad=True)
            either(*operands).square().sum().backward()
            grads.append([operand.grad for operand in operands])
        assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("sizes", [FEW, FEW._replace(batch=0), FEW._replace(anchors=0)])
    @pytest.mark.parametrize(("dtype", "real"), DTYPE_PAIRS)
    def test_shapes_without_numbers(
        self, dtype: torch.dtype, real: torch.dtype, sizes: Sizes
    ) -> None:
        def like_the_real_one(device: str) -> None:
            dtypes = [dtype] * 4 + [real]
            operands = [
                torch.empty(shape, dtype=one, device=device)
                for shape, one in zip(sizes.shapes, dtypes, strict=True)
            ]
            result = ops.dual_project(*operands)
            assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
            assert result.stride() == expected.stride()
            assert result.device.type == device

        expected = ops.dual_project(*_operands(sizes, dtype, real))
        like_the_real_one("meta")
        with FakeTensorMode():
            like_the_real_one("cuda")

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(("dtype", "real"), DTYPE_PAIRS)
    @pytest.mark.parametrize("device", ["as on another device", "cuda"])
    def test_the_twin_answers_for_devices_without_a_kernel(
        self, device: str, dtype: torch.dtype, real: torch.dtype, bias: bool
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        for sizes in (FEW, FEW._replace(batch=0), FEW._replace(anchors=0), TILED):
            operands = _operands(sizes, dtype, real)
            expected = ops.dual_project(*operands, bias=bias)
            if device == "cuda":
                actual = ops.dual_project(*(one.cuda() for one in operands), bias=bias)
                assert actual.device.type == "cuda"
            else:
                actual = ops._dual_project_elsewhere(*operands, float(bias))
            largest = expected.abs().max().item() if expected.numel() else 0.0
            atol = 16 * torch.finfo(real).eps * largest
            assert_close(actual.cpu(), expected, rtol=0, atol=atol)
