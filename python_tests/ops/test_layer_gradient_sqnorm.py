"""``layer_gradient_sqnorm`` against formed gradients and its float64 twin."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from ops.helpers import DTYPES, TWIN, random_logits, real_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from grood_fast import ops
from grood_fast.ops import reference

OP = torch.ops.grood_fast.layer_gradient_sqnorm
# (B, Q, R, N, M, offsets): where forming the gradient is cheaper, and where pairing positions is.
SIZES = [
    (3, 9, 9, 2, 3, [0]),
    (4, 3, 3, 17, 33, [0]),
    (2, 40, 25, 3, 5, [0, 1, 7, 8, 15]),
    (2, 12, 5, 19, 21, [0, 1, 2, 4, 5, 7]),
    (1, 65, 64, 65, 64, [0, 1]),
    (300, 2, 1, 40, 50, [1]),
]


def operands(size: tuple[int, int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, grid, count, inputs, outputs = size
    a = random_logits(batch * grid, inputs, dtype, spread=1).reshape(batch, grid, inputs)
    d = random_logits(batch * count, outputs, dtype, spread=1, seed=1)
    return a, d.reshape(batch, count, outputs)


@pytest.mark.parametrize(("size", "dtype"), list(product(SIZES, DTYPES)), ids=str)
def test_equals_its_twin(simd_level: str, size: tuple[object, ...], dtype: torch.dtype) -> None:
    *shape, offsets = size
    a, d = operands(tuple(shape), dtype)  # type: ignore[arg-type]
    expected = reference.layer_gradient_sqnorm(a.to(TWIN), d.to(TWIN), offsets)  # type: ignore
    found = ops.layer_gradient_sqnorm(a, d, offsets)  # type: ignore[arg-type]
    assert found.dtype == real_of(dtype)
    eps = torch.finfo(found.dtype).eps
    assert_close(found.to(TWIN), expected, rtol=100 * eps, atol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_gradient_that_is_formed(size: tuple[object, ...]) -> None:
    *shape, offsets = size
    a, d = operands(tuple(shape), TWIN)  # type: ignore[arg-type]
    gradients = torch.stack(
        [torch.einsum("brm,brn->bmn", d, a[:, o : o + d.shape[1]]) for o in offsets]  # type: ignore
    )
    expected = gradients.square().sum(dim=(0, 2, 3))
    assert_close(ops.layer_gradient_sqnorm(a, d, offsets), expected, rtol=1e-12, atol=0)  # type: ignore


@pytest.mark.parametrize("size", [(3, 9, 7, 4, 5), (3, 9, 7, 40, 50)])
def test_strides_make_no_difference(size: tuple[int, int, int, int, int]) -> None:
    a, d = operands(size, torch.float32)
    expected = ops.layer_gradient_sqnorm(a, d, [0, 2])
    wide = torch.zeros(3, 9, 2 * a.shape[2])
    wide[:, :, ::2] = a
    columns = a.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (wide[:, :, ::2], columns):
        moved = d.transpose(1, 2).contiguous().transpose(1, 2)
        assert_close(ops.layer_gradient_sqnorm(other, moved, [0, 2]), expected, rtol=1e-5, atol=0)


def test_edges() -> None:
    assert ops.layer_gradient_sqnorm(torch.zeros(0, 3, 2), torch.zeros(0, 3, 4), [0]).shape == (0,)
    nothing = ops.layer_gradient_sqnorm(torch.ones(2, 3, 0), torch.ones(2, 3, 4), [0])
    assert nothing.tolist() == [0, 0]
    a, d = operands((3, 5, 5, 4, 6), torch.float32)
    a[1, 2, 3] = torch.nan
    found = ops.layer_gradient_sqnorm(a, d, [0])
    assert found.isnan().tolist() == [False, True, False]
    same = [ops.layer_gradient_sqnorm(a[::2], d[::2], [0]) for _ in range(2)]
    assert torch.equal(*same)


@pytest.mark.parametrize(
    ("a", "d", "offsets", "message"),
    [
        ((2, 3), (2, 3, 4), [0], "shapes"),
        ((2, 3, 4), (3, 3, 4), [0], "samples|shapes"),
        ((2, 3, 4), (2, 3, 4), [], "offset"),
        ((2, 3, 4), (2, 3, 4), [1], "offset"),
        ((2, 3, 4), (2, 3, 4), [-1], "offset"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_arguments_that_do_not_fit(
    a: tuple[int, ...], d: tuple[int, ...], offsets: list[int], message: str, device: str
) -> None:
    if device == "meta":
        pytest.skip("fake tensors are not checked")
    with pytest.raises(RuntimeError, match=message):
        ops.layer_gradient_sqnorm(torch.zeros(a), torch.zeros(d), offsets)
    with pytest.raises(RuntimeError, match="float64"):
        ops.layer_gradient_sqnorm(torch.zeros(2, 3, 4).double(), torch.zeros(2, 3, 4), [0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    a, d = operands((2, 6, 4, 3, 5), dtype)
    if dtype != torch.bfloat16:
        a.requires_grad_(), d.requires_grad_()
    torch.library.opcheck(OP.default, (a, d, [0, 2]))


@pytest.mark.parametrize("size", [(2, 6, 4, 3, 5), (2, 5, 3, 30, 20)])
def test_derivatives(size: tuple[int, int, int, int, int]) -> None:
    inputs = tuple(t.requires_grad_() for t in operands(size, TWIN))

    def function(a: Tensor, d: Tensor) -> Tensor:
        return ops.layer_gradient_sqnorm(a, d, [0, 1])

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_other_devices_and_fake_tensors() -> None:
    a, d = operands((2, 6, 4, 3, 5), torch.float16)
    elsewhere = ops._layer_gradient_sqnorm_elsewhere(a, d, [0, 2])
    assert_close(elsewhere, ops.layer_gradient_sqnorm(a, d, [0, 2]), rtol=1e-5, atol=0)
    with FakeTensorMode() as mode:
        fake = OP(mode.from_tensor(a), mode.from_tensor(d), [0, 2])
    assert (fake.shape, fake.dtype) == ((2,), torch.float32)
