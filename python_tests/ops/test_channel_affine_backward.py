"""``channel_affine_backward`` against autograd and its float64 twin."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from ops.helpers import DTYPES, TWIN, random_logits, real_of
from torch import Tensor
from torch.testing import assert_close

from grood_fast import ops
from grood_fast.ops import reference

OP = torch.ops.grood_fast.channel_affine_backward
SHAPES = [(3, 5), (2, 1, 7), (2, 16, 9), (3, 67, 2, 5), (1, 130, 300), (2, 33, 2, 3, 4)]


def operands(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> list[Tensor]:
    made = []
    for seed in range(2):
        maps = random_logits(shape[0], len(torch.zeros(shape[1:]).flatten()), dtype, seed=seed)
        maps = maps.reshape(shape)
        if layout == "channels last":
            maps = maps.movedim(1, -1).contiguous().movedim(-1, 1)
        elif layout == "strided":
            wide = torch.zeros(*shape, 2, dtype=dtype)
            wide[..., 0] = maps
            maps = wide[..., 0]
        made.append(maps)
    return made


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "strided"])
@pytest.mark.parametrize(("shape", "dtype"), list(product(SHAPES, DTYPES)), ids=str)
def test_equals_its_twin(
    simd_level: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    delta, values = operands(shape, dtype, layout)
    whole = dtype in (torch.float32, TWIN)
    scale = random_logits(1, shape[1], dtype, seed=2)[0] if whole else None
    expected = reference.channel_affine_backward(
        delta.to(TWIN), values.to(TWIN), None if scale is None else scale.to(TWIN)
    )
    found = ops.channel_affine_backward(delta, values, scale)
    eps = torch.finfo(real_of(dtype)).eps
    magnitude = reference.channel_affine_backward(delta.to(TWIN).abs(), values.to(TWIN).abs())
    for position in (1, 2):
        assert found[position].dtype == real_of(dtype)
        error = (found[position].to(TWIN) - expected[position]).abs()
        assert bool((error <= 40 * eps * magnitude[position]).all())
    if whole:
        assert_close(found[0].to(TWIN), expected[0], rtol=eps, atol=0)
    else:
        assert found[0].numel() == 0


def test_is_the_backward_pass_of_batch_normalisation() -> None:
    layer = torch.nn.BatchNorm2d(6, dtype=TWIN).eval()
    for tensor in (layer.weight, layer.running_var):
        tensor.data.uniform_(0.5, 2)
    x, delta = (t.requires_grad_() for t in operands((3, 6, 4, 5), TWIN, "contiguous"))
    (expected,) = torch.autograd.grad(layer(x), x, delta)
    inverse = (layer.running_var + layer.eps).rsqrt()
    onward, products, sums = ops.channel_affine_backward(delta, x, layer.weight * inverse)
    assert_close(onward, expected)
    per_sample = [torch.autograd.grad(layer(x)[i], layer.weight, delta[i])[0] for i in range(3)]
    assert_close((products - layer.running_mean * sums) * inverse, torch.stack(per_sample))


def test_edges() -> None:
    empty = ops.channel_affine_backward(torch.zeros(0, 3, 4), torch.zeros(0, 3, 4), torch.ones(3))
    assert [tuple(t.shape) for t in empty] == [(0, 3, 4), (0, 3), (0, 3)]
    delta, values = operands((2, 20, 5), torch.float32, "contiguous")
    delta[1, 7, 3] = torch.inf
    _, products, sums = ops.channel_affine_backward(delta, values)
    assert int((~sums.isfinite()).sum()) == 1
    assert int((~products.isfinite()).sum()) == 1


@pytest.mark.parametrize(
    ("delta", "values", "scale", "message"),
    [
        (torch.zeros(3), torch.zeros(3), None, "shape"),
        (torch.zeros(2, 3), torch.zeros(2, 4), None, "same shape"),
        (torch.zeros(2, 3), torch.zeros(2, 3).double(), None, "dtype"),
        (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), "scale"),
        (torch.zeros(2, 3).half(), torch.zeros(2, 3).half(), torch.zeros(3).half(), "scale"),
    ],
)
def test_arguments_that_do_not_fit(
    delta: Tensor, values: Tensor, scale: Tensor | None, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.channel_affine_backward(delta, values, scale)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_opcheck_and_derivatives(layout: str) -> None:
    delta, values = operands((2, 3, 4), TWIN, layout)
    scale = torch.rand(3, dtype=TWIN)
    torch.library.opcheck(OP.default, (delta, values, None))
    inputs = tuple(t.requires_grad_() for t in (delta, values, scale))
    torch.library.opcheck(OP.default, inputs)
    assert torch.autograd.gradcheck(ops.channel_affine_backward, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(ops.channel_affine_backward, inputs, fast_mode=True)


def test_other_devices() -> None:
    delta, values = operands((2, 5, 4), torch.bfloat16, "contiguous")
    for a, b in zip(
        ops._channel_affine_backward_elsewhere(delta, values, None),
        ops.channel_affine_backward(delta, values, None),
        strict=True,
    ):
        assert a.dtype == b.dtype or a.numel() == 0
        assert_close(a.float(), b.float())
