"""``prototype_gradient`` against its float64 twin, and the twin against autograd."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.helpers import DTYPES, TWIN, assert_within, layouts, random_logits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.testing import assert_close

from grood_fast import ops
from grood_fast.ops import reference

REALS = (torch.float32, torch.float64)
DTYPE_PAIRS = tuple(product(DTYPES, REALS))
OP = torch.ops.grood_fast.prototype_gradient


def operands(
    batch: int,
    classes: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    real: torch.dtype = torch.float32,
    spread: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, OOD prototype and offsets."""
    features = random_logits(batch, columns, dtype, spread=spread, seed=seed)
    offsets = random_logits(classes, columns, real, spread=spread, seed=seed + 1)
    return features, random_logits(1, columns, real, spread=spread, seed=seed + 2)[0], offsets


def check(
    features: Tensor, ood_prototype: Tensor, offsets: Tensor, temperature: float = 1.0,
    squared: bool = False, scale: float = 1.0,
) -> None:  # fmt: skip
    """Against the twin of the operands as they are, to what rounding the distances costs."""
    gradient, log_weight = ops.prototype_gradient(
        features, ood_prototype, offsets, temperature=temperature, squared=squared, scale=scale
    )
    real = offsets.dtype
    assert gradient.dtype == log_weight.dtype == real
    assert gradient.is_contiguous()
    eps = torch.finfo(real).eps
    # The difference itself is rounded: the twin starts from the op's own.
    wide = features.to(real) - ood_prototype.to(real)
    expected, expected_weight = reference.prototype_gradient(
        wide.to(TWIN), torch.zeros_like(ood_prototype, dtype=TWIN), offsets.to(TWIN), temperature,
        squared, scale,
    )  # fmt: skip
    length = wide.to(TWIN).norm(dim=1)
    longest = length + (offsets.to(TWIN).norm(dim=1).amax() if len(offsets) else 0.0)
    distance = longest.square() if squared else longest
    # A distance is off by eps of the largest square over itself, or computed from the difference.
    rounding = 64 * eps * (1 + distance / temperature)
    assert_within(log_weight, expected_weight, rounding + eps * expected_weight.abs(), "log weight")
    tolerance = (rounding * expected.norm(dim=1)).unsqueeze(1) + torch.finfo(real).tiny * scale
    assert_within(gradient, expected, tolerance, "gradient")


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("dtype", "real"), DTYPE_PAIRS)
class TestAgainstTwin:
    def test_every_size(
        self, simd_level: str, dtype: torch.dtype, real: torch.dtype, squared: bool
    ) -> None:
        for batch, classes, columns in product((0, 1, 33), (1, 2, 15, 16, 17, 130), (1, 7, 16, 65)):
            sizes = operands(batch, classes, columns, dtype, real)
            check(*sizes, squared=squared, temperature=1.0 + columns)

    def test_rows_in_tiles(
        self, simd_level: str, dtype: torch.dtype, real: torch.dtype, squared: bool
    ) -> None:
        check(*operands(2**18 // 1008 + 5, 1000, 3, dtype, real), squared=squared)

    def test_every_layout(
        self, simd_level: str, dtype: torch.dtype, real: torch.dtype, squared: bool
    ) -> None:
        features, ood_prototype, offsets = operands(9, 20, 33, dtype, real)
        for name, view in layouts(features).items():
            check(view, ood_prototype, layouts(offsets)[name], squared=squared)
        strided = torch.stack([ood_prototype, ood_prototype], dim=1)[:, 0]
        check(features, strided, offsets, squared=squared)

    def test_temperature_and_scale(
        self, simd_level: str, dtype: torch.dtype, real: torch.dtype, squared: bool
    ) -> None:
        for temperature, scale in product((0.3, 1.0, 40.0), (1.0, 2.0**48)):
            check(*operands(17, 10, 12, dtype, real), temperature, squared, scale)

    def test_nothing_finite_spreads_to_other_rows(
        self, simd_level: str, dtype: torch.dtype, real: torch.dtype, squared: bool
    ) -> None:
        for value in (float("nan"), float("inf"), -float("inf")):
            features, ood_prototype, offsets = operands(9, 20, 33, dtype, real)
            features[4, 5] = value
            gradient, weight = ops.prototype_gradient(
                features, ood_prototype, offsets, squared=squared
            )
            assert gradient[4].isnan().all()
            assert weight[4].isnan()
            others = torch.arange(9) != 4
            assert gradient[others].isfinite().all()
            check(features[others], ood_prototype, offsets, squared=squared)


@pytest.mark.parametrize("squared", [False, True])
def test_the_twin_is_autograds_gradient(squared: bool) -> None:
    """Whatever class the label is."""
    features, ood_prototype, offsets = operands(6, 5, 9, TWIN, TWIN)
    prototypes = offsets + ood_prototype
    temperature = 1.7
    for label in range(5):
        for row, h in enumerate(features):
            p = ood_prototype.clone().requires_grad_()
            distances = torch.linalg.vector_norm(h - torch.cat([prototypes, p[None]]), dim=1)
            logits = -(distances.square() if squared else distances) / temperature
            functional.cross_entropy(logits[None], torch.tensor([label])).backward()
            for function in (reference.prototype_gradient, ops.prototype_gradient):
                actual, weight = function(
                    h[None], ood_prototype, offsets, temperature=temperature, squared=squared
                )
                assert_close(actual[0], p.grad, rtol=1e-9, atol=1e-12, msg=f"row {row}")
                assert_close(weight[0], functional.log_softmax(logits, 0)[-1].detach())


class TestNumbers:
    """Where a straightforward formula loses its digits."""

    def test_zero_at_the_ood_prototype(self, simd_level: str) -> None:
        for real in REALS:
            _, ood_prototype, offsets = operands(1, 4, 7, real, real)
            for squared in (False, True):
                gradient, weight = ops.prototype_gradient(
                    ood_prototype[None], ood_prototype, offsets, squared=squared
                )
                assert not gradient.any()
                assert weight.isfinite().all()
                assert weight > -2 if squared else True

    def test_at_a_class_prototype(self, simd_level: str) -> None:
        """Products say that the distance is √(rounding), differences that it is zero."""
        for real in REALS:
            ood_prototype, offsets = (
                torch.zeros(300, dtype=real),
                operands(1, 7, 300, real, real)[2],
            )
            features = offsets + 1e-6 * operands(7, 7, 300, real, real, seed=5)[0]
            check(features, ood_prototype, offsets, temperature=1e-3)
            check(offsets.clone(), ood_prototype, offsets, temperature=1e-3)

    @pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
    def test_tiny_and_huge_features(self, simd_level: str, size: float) -> None:
        """Squares of these do not fit in float32, the distances themselves do."""
        for squared in (False, True):
            numbers = operands(5, 40, 33, TWIN, TWIN)
            features, ood_prototype, offsets = ((size * one).float() for one in numbers)
            temperature = size**2 if squared and 1e-30 < size < 1e30 else size
            scale = 1.0 if squared else 1.0 / size
            if squared and not 1e-30 < size < 1e30:
                continue
            actual, weight = ops.prototype_gradient(
                features, ood_prototype, offsets, temperature=temperature, squared=squared,
                scale=scale,
            )  # fmt: skip
            expected, expected_weight = reference.prototype_gradient(
                features.double(), ood_prototype.double(), offsets.double(), temperature, squared,
                scale,
            )  # fmt: skip
            assert_close(weight.double(), expected_weight, rtol=1e-4, atol=1e-4)
            largest = expected.abs().max().item()
            atol = 1e-4 * largest
            assert_close(actual.double(), expected.float().double(), rtol=1e-3, atol=atol)

    def test_a_weight_below_float32_reappears_at_another_scale(self, simd_level: str) -> None:
        ood_prototype = torch.zeros(4)
        offsets = torch.tensor([[60.0, 0, 0, 0]])
        features = torch.tensor([[60.0, 0, 0, 1e-3], [130.0, 0, 0, 0], [60.0, 3, 0, 0]])
        plain, weight = ops.prototype_gradient(features, ood_prototype, offsets)
        scaled, _ = ops.prototype_gradient(features, ood_prototype, offsets, scale=2.0**48)
        expected, _ = reference.prototype_gradient(
            features.double(), ood_prototype.double(), offsets.double(), scale=2.0**48
        )
        assert_close(scaled.double(), expected, rtol=1e-4, atol=0)
        assert (weight < -50).all()
        assert (plain.norm(dim=1) < 1e-24).all()

    def test_half_precision_features_cost_only_their_own_rounding(self) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            features, ood_prototype, offsets = operands(33, 20, 129, dtype)
            actual = ops.prototype_gradient(features, ood_prototype, offsets)
            widened = ops.prototype_gradient(features.float(), ood_prototype, offsets)
            assert_close(actual, widened, rtol=0, atol=0)

    def test_given_norms_change_nothing(self) -> None:
        features, ood_prototype, offsets = operands(9, 20, 33)
        norms = offsets.norm(dim=1)
        with_norms = ops.prototype_gradient(features, ood_prototype, offsets, offset_norms=norms)
        assert_close(with_norms, ops.prototype_gradient(features, ood_prototype, offsets))

    @settings(max_examples=60, deadline=None)
    @given(
        batch=st.integers(0, 40),
        classes=st.integers(1, 70),
        columns=st.integers(1, 70),
        squared=st.booleans(),
        spread=st.sampled_from([0.1, 1.0, 5.0]),
        seed=st.integers(0, 2**16),
    )
    def test_any_shape(
        self, batch: int, classes: int, columns: int, squared: bool, spread: float, seed: int
    ) -> None:
        numbers = operands(batch, classes, columns, spread=spread, seed=seed)
        check(*numbers, temperature=1.0 + spread * columns, squared=squared)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_again_and_with_two_threads(torch_threads: None, dtype: torch.dtype) -> None:
    numbers = operands(700, 30, 65, dtype)
    before = [one.clone() for one in numbers]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        first = ops.prototype_gradient(*numbers)
        assert_close(ops.prototype_gradient(*numbers), first, rtol=0, atol=0)
        check(*numbers)
    assert_close(list(numbers), before, rtol=0, atol=0)


REFUSED = {
    "one dimension": ({"features": torch.zeros(5)}, "features must have the shape (B, D)"),
    "columns": ({"features": torch.zeros(3, 4)}, "must have the same number of columns, got 4"),
    "another point": ({"ood_prototype": torch.zeros(4)}, "must have the same number of columns"),
    "a matrix for the point": (
        {"ood_prototype": torch.zeros(1, 5)},
        "must have the same number of columns",
    ),
    "norms of others": ({"offset_norms": torch.zeros(3)}, "offset_norms must have the shape (C,)"),
    "integers": ({"features": torch.zeros(3, 5, dtype=torch.int64)}, "features must be"),
    "half-precision offsets": (
        {"offsets": torch.zeros(2, 5, dtype=torch.bfloat16)},
        "offsets must be float32 or float64",
    ),
    "another dtype": (
        {"ood_prototype": torch.zeros(5, dtype=torch.float64)},
        "must have the dtype of the offsets",
    ),
    "zero temperature": ({"temperature": 0.0}, "temperature must be positive"),
    "NaN temperature": ({"temperature": float("nan")}, "temperature must be positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(name: str) -> None:
    changes, message = REFUSED[name]
    right = {
        "features": torch.zeros(3, 5),
        "ood_prototype": torch.zeros(5),
        "offsets": torch.ones(2, 5),
        "offset_norms": torch.ones(2),
    }
    ops.prototype_gradient(**right)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.prototype_gradient(**{**right, **changes})
    defaults = {"temperature": 1.0, "squared": False, "scale": 1.0}
    with pytest.raises(RuntimeError):  # in other words: on devices that have no kernel
        ops._prototype_gradient_elsewhere(**{**defaults, **right, **changes})


class TestInPyTorch:
    @pytest.mark.parametrize("squared", [False, True])
    @pytest.mark.parametrize(("dtype", "real"), DTYPE_PAIRS)
    def test_opcheck(self, dtype: torch.dtype, real: torch.dtype, squared: bool) -> None:
        for batch in (0, 3):
            features, point, offsets = operands(batch, 4, 7, dtype, real)
            norms = offsets.norm(dim=1)
            arguments = (features, point, offsets, norms, 2.0, squared, 1.0)
            torch.library.opcheck(OP.default, arguments)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiled_in_one_graph(self, dynamic: bool) -> None:
        torch._dynamo.reset()

        def function(*numbers: Tensor) -> Tensor:
            return 2 * ops.prototype_gradient(*numbers)[0]

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for batch in (3, 8):
            numbers = operands(batch, 4, 7)
            assert_close(compiled(*numbers), function(*numbers), rtol=0, atol=0)

    def test_shapes_without_numbers(self) -> None:
        real = ops.prototype_gradient(*operands(3, 4, 7))
        meta = ops.prototype_gradient(*(one.to("meta") for one in operands(3, 4, 7)))
        with FakeTensorMode():
            fake = ops.prototype_gradient(
                torch.empty(3, 7, device="cuda"),
                torch.empty(7, device="cuda"),
                torch.empty(4, 7, device="cuda"),
            )
        for results, device in ((meta, "meta"), (fake, "cuda")):
            for one, expected in zip(results, real, strict=True):
                assert (one.shape, one.dtype) == (expected.shape, expected.dtype)
                assert one.device.type == device

    @pytest.mark.parametrize(("dtype", "real"), DTYPE_PAIRS)
    @pytest.mark.parametrize("squared", [False, True])
    def test_the_twin_answers_for_devices_without_a_kernel(
        self, dtype: torch.dtype, real: torch.dtype, squared: bool
    ) -> None:
        for batch in (0, 9):
            numbers = operands(batch, 20, 33, dtype, real, spread=0.3)
            norms = numbers[2].norm(dim=1)
            actual = ops._prototype_gradient_elsewhere(*numbers, norms, 2.0, squared, 3.0)
            expected = ops.prototype_gradient(*numbers, temperature=2.0, squared=squared, scale=3.0)
            for one, other in zip(actual, expected, strict=True):
                assert_close(one, other, rtol=1e-4, atol=1e-6)
