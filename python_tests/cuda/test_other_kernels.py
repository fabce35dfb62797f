"""The CUDA kernels of the prototype, network and training ops on the emulated device, against their
definitions in float64.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from devices import load_emulated_ops
from ops.helpers import DTYPES, TWIN, assert_within, layouts, random_logits
from torch import Tensor
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("schedule")

REALS = (torch.float32, torch.float64)
PAIRS = [(dtype, torch.float32) for dtype in DTYPES] + [(torch.float64, torch.float64)]


@pytest.fixture
def emulated() -> Any:
    return load_emulated_ops()


def _normal(*shape: int, dtype: torch.dtype = TWIN, seed: int = 0, spread: float = 1.0) -> Tensor:
    rows = random_logits(shape[0], max(1, torch.Size(shape[1:]).numel()), spread=spread, seed=seed)
    return rows[:, : torch.Size(shape[1:]).numel()].reshape(shape).to(dtype)


def _eps(real: torch.dtype) -> float:
    return torch.finfo(real).eps


def _distances(queries: Tensor, bank: Tensor) -> Tensor:
    return torch.cdist(queries.to(TWIN), bank.to(TWIN), compute_mode="donot_use_mm_for_euclid_dist")


@pytest.mark.parametrize(("dtype", "real"), PAIRS)
class TestNearestDistance:
    @staticmethod
    def _check(emulated: Any, queries: Tensor, bank: Tensor, real: torch.dtype) -> None:
        norms = torch.linalg.vector_norm(bank.to(TWIN), dim=1).to(real)
        distance, index = emulated.nearest_distance(queries, bank, norms, 0.0)
        assert distance.dtype == real
        expected = _distances(queries, bank)
        tolerance = 16 * _eps(real) * expected.amin(dim=1).nan_to_num()
        assert_within(distance, expected.amin(dim=1), tolerance, "distance")
        chosen = expected.gather(1, index.unsqueeze(1)).squeeze(1)
        assert_within(distance, chosen, tolerance, "distance of the chosen")

    def test_sizes(self, emulated: Any, dtype: torch.dtype, real: torch.dtype) -> None:
        for batch, anchors, columns in [
            (0, 3, 4), (1, 1, 1), (3, 64, 33), (65, 65, 5), (5, 700, 17), (64, 130, 129), (2, 5, 0),
        ]:  # fmt: skip
            queries = _normal(batch, columns, dtype=dtype)
            self._check(emulated, queries, _normal(anchors, columns, dtype=dtype, seed=1), real)

    def test_layouts(self, emulated: Any, dtype: torch.dtype, real: torch.dtype) -> None:
        queries, bank = _normal(5, 17, dtype=dtype), _normal(70, 17, dtype=dtype, seed=1)
        for one, other in zip(layouts(queries).values(), layouts(bank).values(), strict=True):
            self._check(emulated, one, other, real)

    def test_duplicates_ties_and_what_is_not_finite(
        self, emulated: Any, dtype: torch.dtype, real: torch.dtype
    ) -> None:
        bank = _normal(130, 9, dtype=dtype, seed=1)
        bank[100] = bank[7]
        queries = torch.cat([bank[7:8], bank[100:101], _normal(3, 9, dtype=dtype)])
        norms = torch.ones(130, dtype=real)
        distance, index = emulated.nearest_distance(queries, bank, norms, 0.0)
        assert distance[:2].tolist() == [0.0, 0.0]
        assert index[:2].tolist() == [7, 7]
        for value in (float("nan"), float("inf")):
            for place in (0, 129):
                spoiled = bank.clone()
                spoiled[place, 3] = value
                self._check(emulated, queries, spoiled, real)
            spoiled = queries.clone()
            spoiled[2, 0] = value
            self._check(emulated, spoiled, bank, real)

    def test_tiny_and_huge(self, emulated: Any, dtype: torch.dtype, real: torch.dtype) -> None:
        if dtype == torch.float16:
            return
        for spread in (1e-25, 1e25):
            queries = _normal(5, 9, dtype=dtype, spread=spread)
            bank = _normal(70, 9, dtype=dtype, seed=1, spread=spread)
            self._check(emulated, queries, bank, real)


@pytest.mark.parametrize(("dtype", "real"), PAIRS)
class TestPrototypeGradient:
    @staticmethod
    def _check(
        emulated: Any, features: Tensor, point: Tensor, offsets: Tensor, squared: bool
    ) -> None:
        real = offsets.dtype
        gradient, log_weight = emulated.prototype_gradient(
            features, point, offsets, torch.linalg.vector_norm(offsets, dim=1), 1.5, squared, 8.0
        )
        assert gradient.dtype == log_weight.dtype == real
        x = (features.to(real) - point).to(TWIN)
        norm = x.norm(dim=1, keepdim=True)
        distances = torch.cat([_distances(x, offsets), norm], dim=1)
        logits = -(distances.square() if squared else distances) / 1.5
        expected = torch.log_softmax(logits, dim=1)[:, -1]
        rounding = 32 * _eps(real) * (1 + logits.abs().amax(dim=1).nan_to_num())
        assert_within(log_weight, expected, rounding, "log weight")
        length = expected.exp().unsqueeze(1) * 8.0 / 1.5
        vector = length * (2 * x if squared else x / torch.where(norm > 0, norm, 1))
        tolerance = (rounding.unsqueeze(1) * vector.abs()).nan_to_num() + torch.finfo(real).tiny
        assert_within(gradient, vector, tolerance, "gradient")

    def test_sizes(self, emulated: Any, dtype: torch.dtype, real: torch.dtype) -> None:
        sizes = [
            (0, 3, 4),
            (1, 1, 1),
            (3, 10, 33),
            (65, 65, 5),
            (5, 130, 129),
            (3, 0, 7),
            (2, 4, 0),
        ]
        for (batch, classes, columns), squared in itertools.product(sizes, (False, True)):
            self._check(
                emulated,
                _normal(batch, columns, dtype=dtype, spread=0.5),
                _normal(1, columns, dtype=real, seed=1)[0],
                _normal(classes, columns, dtype=real, seed=2, spread=0.5),
                squared,
            )

    def test_layouts_and_what_is_not_finite(
        self, emulated: Any, dtype: torch.dtype, real: torch.dtype
    ) -> None:
        point, offsets = torch.zeros(9, dtype=real), _normal(10, 9, dtype=real, seed=2)
        features = _normal(6, 9, dtype=dtype)
        features[1] = 0
        for view in layouts(features).values():
            self._check(emulated, view, point, offsets, squared=False)
        features[4, 3] = float("nan")
        gradient, log_weight = emulated.prototype_gradient(
            features, point, offsets, torch.ones(10, dtype=real), 1.0, False, 1.0
        )
        assert gradient[4].isnan().all()
        assert log_weight.isnan().nonzero().flatten().tolist() == [4]
        assert gradient[1].tolist() == [0.0] * 9

    def test_tiny_and_huge(self, emulated: Any, dtype: torch.dtype, real: torch.dtype) -> None:
        if dtype == torch.float16:
            return
        for spread in (1e-25, 1e25):
            features = _normal(5, 9, dtype=dtype, spread=spread)
            offsets = _normal(4, 9, dtype=real, seed=2, spread=spread)
            self._check(emulated, features, torch.zeros(9, dtype=real), offsets, squared=False)


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_short_circuit_logits(emulated: Any, dtype: torch.dtype, real: torch.dtype) -> None:
    for batch, columns, classes, count in [
        (0, 3, 4, 1), (1, 1, 1, 1), (3, 33, 10, 0), (5, 40, 257, 40), (3, 300, 5, 299),
    ]:  # fmt: skip
        logits, features = (
            _normal(batch, classes, dtype=dtype),
            _normal(batch, columns, dtype=dtype),
        )
        weight = _normal(columns, classes, dtype=real, seed=1)
        generator = torch.Generator().manual_seed(0)
        order = [torch.randperm(columns, generator=generator)[:count] for _ in range(batch)]
        removed = torch.stack(order) if order else torch.empty(0, count, dtype=torch.int64)
        actual = emulated.short_circuit_logits(logits, features, weight, removed)
        kept = features.to(TWIN).scatter(1, removed, 0.0)
        without = (features.to(TWIN) - kept) @ weight.to(TWIN)
        size = (features.to(TWIN) - kept).abs() @ weight.to(TWIN).abs() + logits.to(TWIN).abs()
        assert actual.dtype == real
        assert_within(actual, logits.to(TWIN) - without, 16 * _eps(real) * size, "logits")
    outside = torch.tensor([[0, 7], [0, 1], [-1, 1]])
    spoiled = emulated.short_circuit_logits(
        _normal(3, 4, dtype=dtype), _normal(3, 7, dtype=dtype), _normal(7, 4, dtype=real), outside
    )
    assert spoiled.isnan().all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cluster_extremes(emulated: Any, dtype: torch.dtype) -> None:
    for samples, clusters in [(0, 3), (1, 1), (70, 5), (1000, 300), (5, 0)]:
        if clusters == 0:
            samples = 0
        energies = (4 * _normal(samples, 1)).flatten().round().to(dtype) / 4  # with ties
        energies[::7] = float("nan")
        energies[1::9] = -0.0
        energies[2::11] = float("inf")
        generator = torch.Generator().manual_seed(0)
        assignments = torch.randint(0, max(1, clusters), (samples,), generator=generator)
        lowest, highest = emulated.cluster_extremes(assignments, energies, clusters)
        for cluster in range(clusters):
            members = [
                i for i in range(samples) if assignments[i] == cluster and not energies[i].isnan()
            ]
            if not members:
                assert lowest[cluster] == highest[cluster] == -1
                continue
            assert lowest[cluster] == min(members, key=lambda i: (float(energies[i]), i))
            assert highest[cluster] == min(members, key=lambda i: (-float(energies[i]), i))


@pytest.mark.parametrize("dtype", DTYPES)
class TestLayerGradientSqnorm:
    @staticmethod
    def _check(emulated: Any, activation: Tensor, delta: Tensor, offsets: list[int]) -> None:
        real = torch.float64 if delta.dtype == torch.float64 else torch.float32
        actual = emulated.layer_gradient_sqnorm(activation, delta, offsets)
        assert actual.dtype == real
        count = delta.shape[1]
        expected = torch.zeros(len(delta), dtype=TWIN)
        size = torch.zeros(len(delta), dtype=TWIN)
        for offset in offsets:
            part = activation[:, offset : offset + count].to(TWIN)
            expected += (delta.to(TWIN).mT @ part).square().sum(dim=(1, 2))
            size += (delta.to(TWIN).abs().mT @ part.abs()).square().sum(dim=(1, 2))
        assert_within(actual, expected, 16 * _eps(real) * size, f"{tuple(activation.shape)}")

    def test_sizes(self, emulated: Any, dtype: torch.dtype) -> None:
        for batch, positions, outputs, inputs, offsets in [
            (0, 3, 4, 5, [0]), (3, 1, 10, 33, [0]), (2, 70, 5, 9, [0, 1, 2]), (1, 5, 0, 3, [0]),
            (2, 33, 65, 130, [0]), (2, 5, 65, 7, [0, 3, 7, 40]), (1, 130, 3, 2, list(range(70))),
            (1, 3, 40, 40, list(range(70))),
        ]:  # fmt: skip
            activation = _normal(batch, positions + max(offsets), inputs, dtype=dtype)
            delta = _normal(batch, positions, outputs, dtype=dtype, seed=1)
            self._check(emulated, activation, delta, offsets)

    def test_strides(self, emulated: Any, dtype: torch.dtype) -> None:
        activation = _normal(2, 12, 20, dtype=dtype)[:, 1:10, 2:18]
        delta = _normal(2, 9, 16, dtype=dtype, seed=1)[:, :7].mT.contiguous().mT
        self._check(emulated, activation, delta, [0, 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_affine_backward(emulated: Any, dtype: torch.dtype) -> None:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [(2, 3), (3, 5, 7), (2, 40, 4, 5), (1, 33, 1, 1), (0, 3, 2), (2, 4, 0), (2, 3, 129)]
    for shape, inner in itertools.product(shapes, (False, True)):
        delta, layer_input = _normal(*shape, dtype=dtype), _normal(*shape, dtype=dtype, seed=1)
        if inner and len(shape) == 4:
            delta = delta.contiguous(memory_format=torch.channels_last)
            layer_input = layer_input.contiguous(memory_format=torch.channels_last)
        scale = _normal(1, shape[1], dtype=dtype, seed=2)[0] if dtype in REALS else None
        onward, products, sums = emulated.channel_affine_backward(delta, layer_input, scale)
        wide = [tensor.to(TWIN).flatten(2) if len(shape) > 2 else tensor.to(TWIN).unsqueeze(2)
                for tensor in (delta, layer_input)]  # fmt: skip
        product = wide[0] * wide[1]
        assert products.dtype == sums.dtype == real
        tolerance = 16 * _eps(real)
        assert_within(products, product.sum(2), tolerance * product.abs().sum(2), "products")
        assert_within(sums, wide[0].sum(2), tolerance * wide[0].abs().sum(2), "sums")
        if scale is not None:
            expected = delta * scale.reshape(-1, *[1] * (len(shape) - 2))
            assert_close(onward, expected, rtol=0, atol=0)
            assert onward.stride() == delta.stride() or delta.numel() == 0
