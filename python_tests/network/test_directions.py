"""Directions, and what gradients become along them, against gradients that are formed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from network.helpers import autograd_gradients, read
from torch import Tensor, nn

from grood_fast.errors import InputError
from grood_fast.evaluation.networks import efficientnet_lite0, small_residual_network
from grood_fast.network.directions import (
    Coordinates,
    DirectionSketch,
    from_tensors,
    require_equal,
    to_tensors,
)
from grood_fast.network.gradients import (
    Convolution,
    Directions,
    Formed,
    Geometry,
    LayerGradient,
    Lookup,
    OuterProducts,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gradients() -> dict[str, LayerGradient]:
    strided = Geometry((3, 2), (2, 1), ((1, 1), (0, 1)), (1, 2))
    return {
        "matrix": OuterProducts(random(6, 5, 20), random(6, 5, 30, seed=1)),
        "convolution": Convolution(random(6, 20, 6, 6), random(6, 18, 3, 5, seed=1), strided),
        "lookup": Lookup(torch.arange(24).reshape(6, 4) % 7, random(6, 4, 30), 11),
        "small": Formed(random(6, 3, 7)),
    }


@pytest.mark.parametrize("kind", gradients())
class TestAgainstFormedGradients:
    def test_sketches_apply_the_mode_covariances(self, kind: str) -> None:
        gradient = gradients()[kind]
        rows, columns = gradient.matrix_shape
        matrices = gradient.formed().reshape(6, rows, columns)
        left, right = random(4, rows, seed=2), random(4, columns, seed=3)
        of_left, of_right = gradient.sketched(left, right)
        torch.testing.assert_close(of_left, (matrices @ matrices.mT).sum(dim=0) @ left.T)
        torch.testing.assert_close(of_right, (matrices.mT @ matrices).sum(dim=0) @ right.T)

    @pytest.mark.parametrize("absorbed", [True, False])
    def test_coordinates(self, kind: str, absorbed: bool) -> None:
        gradient = gradients()[kind]
        sketch = DirectionSketch("w", gradient, 48, 6, seed=0)
        if absorbed:
            sketch.absorb(gradient)
        directions = sketch.finish()
        wide = Directions(*(None if t is None else t.double() for t in directions))  # type: ignore
        rows, columns = gradient.matrix_shape
        matrices = gradient.formed().reshape(6, rows, columns)
        torch.testing.assert_close(gradient.sandwiched(wide), wide.left @ matrices @ wide.whole().T)
        for basis in (directions.left, directions.whole()):
            torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), rtol=0, atol=1e-5)
        assert directions.numbers == (48 if rows > 1 else 6)
        assert (directions.channels is not None) == (kind == "convolution")

    def test_few_directions_see_a_gradient_of_low_rank_whole(self, kind: str) -> None:
        if kind in ("small", "lookup"):
            pytest.skip("not a product of two factors of low rank")
        mix = random(2, 20, seed=5), random(2, 18 if kind == "convolution" else 30, seed=6)
        if kind == "convolution":
            a = torch.einsum("bchw,cd->bdhw", random(6, 2, 5, 5), mix[0])
            d = torch.einsum("bchw,cd->bdhw", random(6, 2, 5, 5, seed=1), mix[1])
            gradient: LayerGradient = Convolution(
                a, d, Geometry((1, 3), (1, 1), ((0, 0), (1, 1)), (1, 1))
            )
        else:
            gradient = OuterProducts(random(6, 5, 2) @ mix[0], random(6, 5, 2, seed=1) @ mix[1])
        sketch = DirectionSketch("w", gradient, 64, 6, seed=0)
        sketch.absorb(gradient)
        seen = gradient.sandwiched(sketch.finish()).square().sum(dim=(1, 2))
        torch.testing.assert_close(seen, gradient.squared_norm(), rtol=1e-4, atol=0)


def test_leading_directions_are_those_of_the_mode_covariances() -> None:
    decay = 0.5 ** torch.arange(30, dtype=torch.float64)
    left, right = random(400, 1, 20) * decay[:20], random(400, 1, 30, seed=1) * decay
    gradient = OuterProducts(left, right)
    sketch = DirectionSketch("w", gradient, 16, 6, seed=0)
    for part in range(4):  # in batches
        rows = slice(100 * part, 100 * part + 100)
        sketch.absorb(OuterProducts(left[rows], right[rows]))
    found = sketch.finish()
    formed = gradient.formed()
    vectors = torch.linalg.eigh((formed.mT @ formed).sum(dim=0)).eigenvectors.flip(1)[:, :5]
    captured = (found.right.double() @ vectors).square().sum(dim=0)
    assert float(captured.min()) > 1 - 1e-6


@pytest.mark.parametrize("network", ["residual", "depthwise"])
def test_coordinates_of_a_network(network: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = (
            small_residual_network() if network == "residual" else efficientnet_lite0()
        )
        size = (4, 1, 12, 12) if network == "residual" else (2, 3, 32, 32)
        x = torch.randn(size, dtype=torch.float64)
    model = model.double()
    sketches: dict[str, DirectionSketch] = {}

    def sketch(name: str, gradient: LayerGradient) -> int:
        sketches[name] = DirectionSketch(name, gradient, 192, 16, seed=0)
        sketches[name].absorb(gradient)
        return 0

    read(model, x, sketch)
    directions: Any = {
        name: Directions(*(None if t is None else t.double() for t in sketches[name].finish()))  # type: ignore
        for name in sketches
    }
    collected = Coordinates(directions)
    read(model, x, lambda name, gradient: collected(name, gradient) or 0)
    truth = autograd_gradients(model, x)
    expected = []
    for name, known in directions.items():
        rows, columns = known.left.shape[1], known.whole().shape[1]
        matrices = truth[name].reshape(len(x), rows, columns)
        expected.append((known.left @ matrices @ known.whole().T).flatten(1))
    torch.testing.assert_close(
        collected.finish(x), torch.cat(expected, dim=1), rtol=1e-9, atol=1e-12
    )


def test_saved_and_compared() -> None:
    gradient = gradients()["convolution"]
    made = {"w": DirectionSketch("w", gradient, 48, 6, seed=0).finish()}
    again = from_tensors(to_tensors(made))
    require_equal(made, again)
    other = {"w": DirectionSketch("w", gradient, 48, 6, seed=1).finish()}
    with pytest.raises(InputError, match="different directions"):
        require_equal(made, other)
