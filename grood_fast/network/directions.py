"""Fixed directions for every parameter's gradient: U (m, M) and V (n, N), and what they see of it.

A gradient G (M, N) becomes U G Vᵀ, m·n numbers, without being formed. The best directions are the
leading eigenvectors of its mode covariances Σ G Gᵀ and Σ Gᵀ G; they are found from the products of
those with a few random vectors (the Nyström method), so that neither a gradient nor a covariance
is ever needed. Halko, Martinsson and Tropp, "Finding structure with randomness", 2011, section 5.5.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from grood_fast.errors import InputError
from grood_fast.network.gradients import Directions, LayerGradient

FILTERS = 16
"""How many right directions a weight gets at most, and how many channels a convolution's input is
projected to: up to a vector's width of filters costs as much as one."""

OVERSAMPLING = 8
TOLERANCE = 1e-12


def ranks(rows: int, columns: int, numbers: int) -> tuple[int, int]:
    """(m, n) with m·n about ``numbers``, of a gradient of M rows and N columns."""
    n = max(1, min(columns, FILTERS, numbers))
    m = max(1, min(rows, numbers // n))
    return m, max(1, min(columns, numbers // m))


class _Spectrum(NamedTuple):
    """Leading eigenvectors (size, q), and the roots of their eigenvalues, descending."""

    vectors: Tensor
    roots: Tensor


class DirectionSketch:
    """What one parameter's gradients do to a few random vectors, summed over samples.

    Args:
        name: of the parameter; with the seed it decides the random vectors.
        gradient: one of its gradients, for the shape.
        numbers: about how many numbers m·n to keep of a matrix.
        small_numbers: the same of a small gradient.
        seed: another one gives other random vectors.
    """

    def __init__(
        self, name: str, gradient: LayerGradient, numbers: int, small_numbers: int, seed: int
    ) -> None:
        self.name, self.seed = name, seed
        self.shape = gradient.matrix_shape
        self.channels = gradient.shape[1] if self.shape[0] > 1 else 1
        self.entries = self.shape[1] // self.channels
        self.ranks = ranks(*self.shape, numbers if self.shape[0] > 1 else small_numbers)
        count = 2 * max(self.ranks) + OVERSAMPLING
        self._tests = tuple(self._random(min(count, size), size, "test") for size in self.shape)
        self._products: tuple[Tensor, Tensor] | None = None

    def absorb(self, gradient: LayerGradient) -> None:
        """Take in one batch."""
        left, right = gradient.sketched(*self._tests)
        before = self._products
        self._products = (
            left.double() + (0 if before is None else before[0]),
            right.double() + (0 if before is None else before[1]),
        )

    def finish(self) -> Directions:
        """The directions, float32, by descending eigenvalue; random where nothing was absorbed."""
        left, right = self._spectrum(0), self._spectrum(1)
        m, n = self.ranks
        # With few channels, or a kernel of one entry, projecting first would save nothing.
        if self.entries == 1 or self.channels <= FILTERS or self.shape[0] == 1:
            return Directions(self._leading(left, 0, m), self._leading(right, 1, n))
        weighted = (right.vectors * right.roots).reshape(self.channels, -1)
        among_channels = torch.linalg.svd(weighted, full_matrices=False)
        channels = self._leading(_Spectrum(*among_channels[:2]), 2, FILTERS)
        inside = (channels.double() @ weighted).reshape(FILTERS * self.entries, -1)
        filters = torch.linalg.svd(inside, full_matrices=False)
        n = min(n, len(inside))
        return Directions(
            self._leading(left, 0, m), self._leading(_Spectrum(*filters[:2]), 3, n), channels
        )

    def _spectrum(self, side: int) -> _Spectrum:
        test = self._tests[side].double()
        if self._products is None:
            random = self._random(len(test), test.shape[1], f"random {side}").double()
            return _Spectrum(torch.linalg.qr(random.T).Q, test.new_ones(len(test)))
        product, test = self._products[side].cpu(), test.cpu()
        values, vectors = torch.linalg.eigh(test @ product)
        kept = values > TOLERANCE * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
        root = product @ (vectors[:, kept] / values[kept].sqrt())
        return _Spectrum(*torch.linalg.svd(root, full_matrices=False)[:2])

    def _leading(self, spectrum: _Spectrum, number: int, rank: int) -> Tensor:
        size = len(spectrum.vectors)
        vanishing = math.sqrt(TOLERANCE) * float(spectrum.roots[:1].sum())
        seen = spectrum.vectors[:, spectrum.roots > vanishing]
        # Directions in which nothing was seen are filled up with random ones.
        filled = torch.cat([seen, self._random(rank, size, f"fill {number}").double().T], dim=1)
        directions: Tensor = torch.linalg.qr(filled).Q[:, :rank].T
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

    def __init__(self, directions: Mapping[str, Directions]) -> None:
        self._directions = directions
        self._parts: dict[str, Tensor] = {}

    def __call__(self, name: str, gradient: LayerGradient) -> None:
        directions = self._directions.get(name)
        if directions is not None:
            self._parts[name] = gradient.sandwiched(directions).flatten(1)

    def finish(self, like: Tensor) -> Tensor:
        """(B, F), parameter after parameter; 0 where one has no part in the logits."""
        columns = [
            self._parts[name]
            if name in self._parts
            else like.new_zeros(len(like), directions.numbers)
            for name, directions in self._directions.items()
        ]
        return torch.cat(columns, dim=1)


def to_tensors(directions: Mapping[str, Directions]) -> dict[str, Tensor]:
    """Directions as one flat mapping, to be saved; see :func:`from_tensors`."""
    return {
        f"{part}.{name}": tensor
        for name, known in directions.items()
        for part, tensor in known._asdict().items()
        if tensor is not None
    }


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Directions]:
    """What :func:`to_tensors` was given, sorted by name; other tensors are passed over."""
    names = sorted(key.removeprefix("left.") for key in tensors if key.startswith("left."))
    return {
        name: Directions(
            tensors[f"left.{name}"], tensors[f"right.{name}"], tensors.get(f"channels.{name}")
        )
        for name in names
    }


def require_equal(mine: Mapping[str, Directions], other: Mapping[str, Directions]) -> None:
    """Raise :class:`InputError` unless both hold the same directions, bit by bit."""
    a, b = to_tensors(mine), to_tensors(other)
    if a.keys() != b.keys() or not all(torch.equal(a[key].cpu(), b[key].cpu()) for key in a):
        raise InputError(
            "cannot merge coordinates along different directions: let one shard find them and hand "
            "them to the others (use_directions), or take directions='random' with one seed."
        )
