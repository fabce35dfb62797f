"""``short_circuit_logits`` against its float64 twin, and against a masked linear layer."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from ops.helpers import DTYPES, TWIN, assert_within, layouts, random_logits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.testing import assert_close

from grood_fast import ops
from grood_fast.ops import reference

REALS = (torch.float32, torch.float64)
DTYPE_PAIRS = tuple(product(DTYPES, REALS))
OP = torch.ops.grood_fast.short_circuit_logits


def operands(
    batch: int,
    classes: int,
    columns: int,
    count: int,
    dtype: torch.dtype = torch.float32,
    real: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, features, the transposed weight, and ``count`` columns a row, each once."""
    keys = random_logits(batch, columns, seed=3)
    return (
        random_logits(batch, classes, dtype),
        random_logits(batch, columns, dtype, spread=1.0, seed=1),
        random_logits(columns, classes, real, spread=1.0, seed=2),
        keys.topk(count, dim=1).indices,
    )


def check(logits: Tensor, features: Tensor, weight_t: Tensor, removed: Tensor) -> None:
    result = ops.short_circuit_logits(logits, features, weight_t, removed)
    real = weight_t.dtype
    assert result.dtype == real
    assert result.is_contiguous()
    wide = [one.to(TWIN) for one in (logits.to(real), features.to(real), weight_t)]
    magnitude = reference.short_circuit_logits(
        wide[0].abs(), -wide[1].abs(), wide[2].abs(), removed
    )
    eps = torch.finfo(real).eps
    tolerance = eps * (8 + removed.shape[1]) * magnitude
    assert_within(result, reference.short_circuit_logits(*wide, removed), tolerance, "logits")


@pytest.mark.parametrize(("dtype", "real"), DTYPE_PAIRS)
class TestAgainstTwin:
    def test_every_size(self, simd_level: str, dtype: torch.dtype, real: torch.dtype) -> None:
        sizes = product((0, 1, 9), (1, 3, 16, 31, 64, 129, 300), (1, 8, 40))
        for batch, classes, columns in sizes:
            for count in {0, 1, columns // 2, columns}:
                check(*operands(batch, classes, columns, count, dtype, real))

    def test_every_layout(self, simd_level: str, dtype: torch.dtype, real: torch.dtype) -> None:
        logits, features, weight_t, removed = operands(9, 70, 33, 5, dtype, real)
        strided = torch.stack([removed, removed], dim=2)[:, :, 0]
        for name in layouts(logits):
            views = (layouts(one)[name] for one in (logits, features, weight_t))
            check(*views, strided)

    def test_what_is_not_finite_stays_in_its_row(
        self, simd_level: str, dtype: torch.dtype, real: torch.dtype
    ) -> None:
        for value in (float("nan"), float("inf")):
            numbers = operands(9, 70, 33, 5, dtype, real)
            numbers[1][4, numbers[3][4, 0]] = value
            numbers[0][6, 3] = value
            check(*numbers)


def test_the_logits_of_a_masked_linear_layer() -> None:
    """The subtraction is exact where the layer is linear: no first-order approximation is left."""
    torch.manual_seed(0)
    head = torch.nn.Linear(33, 20, dtype=TWIN)
    features = torch.randn(9, 33, dtype=TWIN)
    logits, predicted = head(features), head(features).argmax(dim=1)
    removed = head.weight.abs()[predicted].topk(4, dim=1).indices
    masked = features.scatter(1, removed, 0.0)
    with torch.no_grad():
        actual = ops.short_circuit_logits(logits, features, head.weight.T, removed)
        assert_close(actual, functional.linear(masked, head.weight, head.bias))


def test_the_same_again_and_with_two_threads(torch_threads: None) -> None:
    numbers = operands(300, 130, 65, 9)
    before = [one.clone() for one in numbers]
    torch.set_num_threads(1)
    expected = ops.short_circuit_logits(*numbers)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_close(ops.short_circuit_logits(*numbers), expected, rtol=0, atol=0)
    assert_close(list(numbers), before, rtol=0, atol=0)


REFUSED = {
    "one dimension": ({"logits": torch.zeros(3)}, "logits must have the shape (B, C)"),
    "rows": ({"features": torch.zeros(2, 5)}, "must have the same number of rows, got 3, 2 and 3"),
    "another weight": (
        {"weight_t": torch.zeros(4, 5)},
        "weight_t must have the shape (5, 4), got (4, 5)",
    ),
    "half-precision weight": (
        {"weight_t": torch.zeros(5, 4, dtype=torch.bfloat16)},
        "weight_t must be float32 or float64",
    ),
    "real columns": ({"removed": torch.zeros(3, 2)}, "removed must be int64"),
    "a column too many": (
        {"removed": torch.full((3, 2), 5)},
        "removed must hold columns of the features, from 0 to 4",
    ),
    "a negative column": ({"removed": torch.full((3, 2), -1)}, "removed must hold columns"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(name: str) -> None:
    changes, message = REFUSED[name]
    right = {
        "logits": torch.zeros(3, 4),
        "features": torch.zeros(3, 5),
        "weight_t": torch.zeros(5, 4),
        "removed": torch.tensor([[0, 4]] * 3),
    }
    ops.short_circuit_logits(**right)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.short_circuit_logits(**{**right, **changes})
    if name != "a negative column":  # torch counts these from the end
        with pytest.raises((RuntimeError, IndexError)):
            ops._short_circuit_logits_elsewhere(**{**right, **changes})


class TestInPyTorch:
    @pytest.mark.parametrize(("dtype", "real"), DTYPE_PAIRS)
    def test_opcheck(self, dtype: torch.dtype, real: torch.dtype) -> None:
        for batch in (0, 3):
            torch.library.opcheck(OP.default, operands(batch, 4, 7, 2, dtype, real))

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiled_in_one_graph(self, dynamic: bool) -> None:
        torch._dynamo.reset()

        def function(*numbers: Tensor) -> Tensor:
            return 2 * ops.short_circuit_logits(*numbers)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for batch in (3, 8):
            numbers = operands(batch, 20, 7, 2)
            assert_close(compiled(*numbers), function(*numbers), rtol=0, atol=0)

    def test_shapes_without_numbers(self) -> None:
        numbers = operands(3, 4, 7, 2)
        assert ops.short_circuit_logits(*(one.to("meta") for one in numbers)).shape == (3, 4)
        with FakeTensorMode():
            fake = [torch.empty(one.shape, dtype=one.dtype, device="cuda") for one in numbers]
            assert ops.short_circuit_logits(*fake).device.type == "cuda"

    @pytest.mark.parametrize(("dtype", "real"), DTYPE_PAIRS)
    def test_the_twin_answers_for_devices_without_a_kernel(
        self, dtype: torch.dtype, real: torch.dtype
    ) -> None:
        for batch in (0, 9):
            numbers = operands(batch, 20, 33, 5, dtype, real)
            actual = ops._short_circuit_logits_elsewhere(*numbers)
            assert_close(actual, ops.short_circuit_logits(*numbers), rtol=1e-5, atol=1e-5)
