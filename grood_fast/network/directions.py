"""Fixed directions for every parameter's gradient: U (m, M) and V (n, N), and what they see of it.

A gradient G (M, N) becomes U G Vᵀ, m·n numbers, without being formed. The best directions are the
leading eigenvectors of its mode covariances Σ G Gᵀ and Σ Gᵀ G; they are found from the products of
those with a few random vectors (the Nyström method), so that neither a gradient nor a covariance
is ever needed. Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, section 5.5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from grood_fast.errors import InputError
from grood_fast.network.gradients import LayerGradient

FILTERS = 16
OVERSAMPLING = 8
TOLERANCE = 1e-12

Directions = dict[str, tuple[Tensor, Tensor]]
"""Parameter's name → U (m, M) and V (n, N), orthonormal rows."""


def ranks(rows: int, columns: int, numbers: int) -> tuple[int, int]:
    """(m, n) with m·n about ``numbers``, of a gradient of M rows and N columns.

    The columns' directions are filters that the input is convolved with: up to a vector's width of
    them cost as much as one.
    """
    n = max(1, min(columns, FILTERS, numbers))
    m = max(1, min(rows, numbers // n))
    return m, max(1, min(columns, numbers // m))


class DirectionSketch:
    """What one parameter's gradients do to a few random vectors, summed over samples.

    Args:
        name: of the parameter; with the seed it decides the random vectors.
        shape: (M, N).
        numbers: about how many numbers m·n to keep.
        seed: another one gives other random vectors.
    """

    def __init__(self, name: str, shape: tuple[int, int], numbers: int, seed: int) -> None:
        self.name, self.shape, self.seed = name, shape, seed
        self.ranks = ranks(*shape, numbers)
        count = 2 * max(self.ranks) + OVERSAMPLING
        self._tests = tuple(self._random(min(count, size), size, "test") for size in shape)
        self._products: tuple[Tensor, Tensor] | None = None

    def absorb(self, gradient: LayerGradient) -> None:
        """Take in one batch."""
        products = gradient.sketched(*(test.to(gradient.device) for test in self._tests))
        if self._products is None:
            self._products = products[0].double(), products[1].double()
        else:
            self._products = (
                self._products[0] + products[0],
                self._products[1] + products[1],
            )

    def finish(self) -> tuple[Tensor, Tensor]:
        """U (m, M) and V (n, N), float32 with orthonormal rows, by descending eigenvalue."""
        products = self._products or (None, None)
        found = [
            self._leading(product, test.double(), rank)
            for product, test, rank in zip(products, self._tests, self.ranks, strict=True)
        ]
        return found[0], found[1]

    def _leading(self, product: Tensor | None, test: Tensor, rank: int) -> Tensor:
        size = test.shape[1]
        columns = [self._random(rank, size, "fill").double().T]
        if product is not None:
            product, test = product.cpu(), test.cpu()
            values, vectors = torch.linalg.eigh(test @ product)
            kept = values > TOLERANCE * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
            root = product @ (vectors[:, kept] / values[kept].sqrt())
            columns.insert(0, torch.linalg.svd(root, full_matrices=False).U)
        # Directions in which nothing was seen are filled up with random ones.
        directions: Tensor = torch.linalg.qr(torch.cat(columns, dim=1)).Q[:, :rank].T
        largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
        return (directions * largest.sign()).float().contiguous()

    def _random(self, count: int, size: int, what: str) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {self.name} {size} {what}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(count, size, generator=generator)


class Coordinates:
    """A reader that collects U G Vᵀ of every parameter for one batch.

    Args:
        directions: of the parameters that count; others are passed over.
    """

    def __init__(self, directions: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self._directions = directions
        self._parts: dict[str, Tensor] = {}

    def __call__(self, name: str, gradient: LayerGradient) -> None:
        directions = self._directions.get(name)
        if directions is not None:
            self._parts[name] = gradient.sandwiched(*directions).flatten(1)

    def finish(self, like: Tensor) -> Tensor:
        """(B, F), parameter after parameter; 0 where one has no part in the logits."""
        columns = [
            self._parts.get(name, like.new_zeros(len(like), len(left) * len(right)))
            for name, (left, right) in self._directions.items()
        ]
        return torch.cat(columns, dim=1)


def require_equal(mine: Directions, other: Directions) -> None:
    """Raise :class:`InputError` unless both hold the same directions, bit by bit."""
    same = mine.keys() == other.keys() and all(
        all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(mine[name], other[name], strict=True))
        for name in mine
    )
    if not same:
        raise InputError(
            "cannot merge coordinates along different directions: let one shard find them and hand "
            "them to the others (use_directions), or take directions='random' with one seed."
        )
