"""What a parameter's gradient is made of, one sample at a time: norms and projections from there.

A layer's gradient is a sum over positions of outer products, G = Σ_t δ_t a_tᵀ. It is hardly ever
formed: its norm comes from inner products of the δ and of the a, its coordinates along fixed
directions u vᵀ from the few numbers u·δ_t and v·a_t.

Shapes: B samples, M rows and N columns of the parameter seen as a matrix (the first dimension
against all others), K directions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grood_fast import ops


class Directions(NamedTuple):
    """Fixed directions that a gradient (M, N) is seen along, orthonormal rows all.

    Attributes:
        left: (m, M).
        right: (n, N); of a convolution with ``channels`` (n, c·entries of the kernel).
        channels: (c, N') directions among a convolution's input channels, which ``right`` then
            lies in: a projection to few channels comes before the filters. None without.
    """

    left: Tensor
    right: Tensor
    channels: Tensor | None = None

    @property
    def numbers(self) -> int:
        """m·n, what a sample's gradient becomes."""
        return len(self.left) * len(self.right)

    def whole(self) -> Tensor:
        """The right directions without their factorisation, (n, N)."""
        if self.channels is None:
            return self.right
        by_channel = self.right.reshape(len(self.right), len(self.channels), -1)
        return torch.einsum("nce,cd->nde", by_channel, self.channels).flatten(1)

    def to(self, device: torch.device) -> Directions:
        """The same on a device."""
        channels = None if self.channels is None else self.channels.to(device)
        return Directions(self.left.to(device), self.right.to(device), channels)


class LayerGradient(ABC):
    """The gradient of one parameter for each of B samples.

    Attributes:
        shape: the parameter's.
        delta: what it is made of: its dtype and device are the gradient's.
    """

    shape: tuple[int, ...]
    delta: Tensor

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(M, N): of the matrix that directions are chosen for; a small gradient is one row."""
        return 1, math.prod(self.shape)

    def fitting(self, tensor: Tensor) -> Tensor:
        """A tensor on the gradient's device, in the dtype that is computed in."""
        return tensor.to(self.delta.device, widened(self.delta[:0]).dtype)

    @abstractmethod
    def formed(self) -> Tensor:
        """The gradients themselves, (B, *shape)."""

    def squared_norm(self) -> Tensor:
        """‖G‖², (B,), float32 or float64."""
        return self._rows().square().sum(dim=1)

    def absolute_sum(self) -> Tensor:
        """The sum of the entries' magnitudes, (B,). Forms the gradient."""
        return self._rows().abs().sum(dim=1)

    def projected(self, basis: Tensor) -> Tensor:
        """Inner products with K directions (K, *shape): (B, K)."""
        return self._rows() @ basis.reshape(len(basis), -1).T

    def sandwiched(self, directions: Directions) -> Tensor:
        """U G Vᵀ of the left directions U (m, M) and the right ones V (n, N): (B, m, n)."""
        left, right = self.fitting(directions.left), self.fitting(directions.whole()).T
        if self.matrix_shape[0] == 1:
            return (self._rows() @ right).unsqueeze(1) * left
        return left @ self._matrices() @ right

    def sketched(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Σ G Gᵀ Uᵀ (M, q) and Σ Gᵀ G Vᵀ (N, q) over the samples, of U (q, M) and V (q, N).

        Both mode covariances, applied to test vectors: enough to find their leading eigenvectors.
        """
        matrices, left, right = self._matrices(), self.fitting(left), self.fitting(right)
        of_left = matrices @ (matrices.mT @ left.T)
        of_right = matrices.mT @ (matrices @ right.T)
        return of_left.sum(dim=0), of_right.sum(dim=0)

    def _rows(self) -> Tensor:
        formed = widened(self.formed())
        return formed.reshape(len(formed), math.prod(self.shape))

    def _matrices(self) -> Tensor:
        formed = widened(self.formed())
        return formed.reshape(len(formed), *self.matrix_shape)


class Formed(LayerGradient):
    """A gradient that is small, or that no rule knows better."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient  # (B, *shape)
        self.shape = tuple(gradient.shape[1:])
        self.delta = gradient

    def formed(self) -> Tensor:
        return self.gradient


class Products(NamedTuple):
    """A part of a gradient: the sum over positions of the outer products of two matrices' rows.

    Attributes:
        left: (B, R, M).
        right: (B, R, N').
        entry: which of the N / N' entries of a convolution's kernel it is.
    """

    left: Tensor
    right: Tensor
    entry: int


class MatrixGradient(LayerGradient):
    """A gradient that consists of sums of outer products."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.shape[0], math.prod(self.shape[1:])

    @abstractmethod
    def products(self) -> Iterator[Products]:
        """Its parts."""

    def projected(self, basis: Tensor) -> Tensor:
        entries = arranged(basis).flatten(3).permute(3, 1, 2, 0) if basis.ndim > 3 else None
        parts = []
        for part in self.products():
            gradient = widened(part.left.mT @ part.right).flatten(1)
            directions = (
                basis.flatten(1).T if entries is None else entries[part.entry].flatten(0, 1)
            )
            parts.append(gradient @ directions)
        return torch.stack(parts).sum(dim=0)

    def sketched(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.fitting(left), self.fitting(right)
        by_entry = right.reshape(len(right), self.shape[1], -1)
        through_right = torch.zeros((), device=left.device)
        of_entry: dict[int, Tensor] = {}
        for part in self.products():
            rows = widened(part.right) @ by_entry[:, :, part.entry].T
            through_right = through_right + widened(part.left).mT @ rows  # G Vᵀ, (B, M, q)
            of_entry[part.entry] = widened(part.right).mT @ (widened(part.left) @ left.T)
        of_left = left.new_zeros(len(left.T), len(left))
        of_right = right.new_zeros(self.shape[1], by_entry.shape[2], len(right))
        for part in self.products():
            l, r = widened(part.left), widened(part.right)
            of_left += (l.mT @ (r @ of_entry[part.entry])).sum(dim=0)
            of_right[:, part.entry] = r.flatten(0, 1).T @ (l @ through_right).flatten(0, 1)
        return of_left, of_right.flatten(0, 1)


class OuterProducts(MatrixGradient):
    """Σ_t left_t right_tᵀ: a matrix multiplied to the activations of T positions.

    Args:
        left: (B, T, M).
        right: (B, T, N).
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        self.shape = (left.shape[2], right.shape[2])
        self.delta = left

    def products(self) -> Iterator[Products]:
        yield Products(self.left, self.right, 0)

    def formed(self) -> Tensor:
        return self.left.mT @ self.right

    def squared_norm(self) -> Tensor:
        return ops.layer_gradient_sqnorm(self.right, self.left, [0])

    def sandwiched(self, directions: Directions) -> Tensor:
        through_left = widened(self.left @ directions.left.to(self.left.dtype).T)
        through_right = widened(self.right @ directions.right.to(self.right.dtype).T)
        return through_left.mT @ through_right


class Geometry(NamedTuple):
    """How a convolution walks, one number a spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # before and after
    dilation: tuple[int, ...]


class Taps(NamedTuple):
    """The part of a convolution whose gradient is a sum of shifted products.

    For the kernel's entry j: G_j = Σ_r delta_r activation_{r + offsets[j]}ᵀ.

    Attributes:
        activation: (B, Q, N/taps) the padded input, positions in rows.
        delta: (B, R, M) on the same grid, zero where the grid is only padding.
        offsets: one an entry of the kernel.
        entries: which entries these are, as indices into the flattened kernel.
    """

    activation: Tensor
    delta: Tensor
    offsets: list[int]
    entries: list[int]


class Convolution(MatrixGradient):
    """The weight of a convolution without groups.

    Args:
        activation: (B, N', *spatial) its input.
        delta: (B, M, *spatial) the gradient of its output.
        geometry: see above.
    """

    def __init__(self, activation: Tensor, delta: Tensor, geometry: Geometry) -> None:
        self.activation, self.delta, self.geometry = activation, delta, geometry
        self.shape = (delta.shape[1], activation.shape[1], *geometry.kernel)

    def products(self) -> Iterator[Products]:
        for taps in self._taps():
            count = taps.delta.shape[1]
            for entry, offset in zip(taps.entries, taps.offsets, strict=True):
                yield Products(taps.delta, taps.activation[:, offset : offset + count], entry)

    def formed(self) -> Tensor:
        batch, (rows, channels) = len(self.delta), self.shape[:2]
        entries = math.prod(self.geometry.kernel)
        result = self.delta.new_empty(batch, entries, rows, channels)
        for part in self.products():
            result[:, part.entry] = part.left.mT @ part.right
        return result.permute(0, 2, 3, 1).reshape(batch, *self.shape)

    def squared_norm(self) -> Tensor:
        parts = [
            ops.layer_gradient_sqnorm(taps.activation, taps.delta, taps.offsets)
            for taps in self._taps()
        ]
        return torch.stack(parts).sum(dim=0)

    def sandwiched(self, directions: Directions) -> Tensor:
        geometry, activation, dtype = self.geometry, self.activation, self.activation.dtype
        if directions.channels is not None:
            channels = directions.channels.to(dtype)
            activation = (activation.movedim(1, -1) @ channels.T).movedim(-1, 1)
        filters = directions.right.to(dtype).reshape(
            len(directions.right), activation.shape[1], *geometry.kernel
        )
        if filters.ndim == 4:
            filters = filters.contiguous(memory_format=torch.channels_last)
        padding = [before for before, _ in geometry.padding]
        if any(before != after for before, after in geometry.padding):
            activation, padding = _padded(activation, geometry.padding), [0] * len(padding)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(geometry.kernel) - 1]
        through_right = convolve(
            activation, filters, None, list(geometry.stride), padding, list(geometry.dilation)
        )
        through_left = channels_last_rows(self.delta) @ directions.left.to(self.delta.dtype).T
        return widened(through_left).mT @ widened(channels_last_rows(through_right))

    def _taps(self) -> Iterator[Taps]:
        """The kernel's entries by the phase of the stride they fall on."""
        geometry = self.geometry
        dimensions = len(geometry.kernel)
        outputs = self.delta.shape[2:]
        padded = _padded(self.activation, geometry.padding).movedim(1, -1)
        gradient = self.delta.movedim(1, -1)
        steps = [  # of every entry along every dimension: its phase and how far into it
            [divmod(entry * dilation, stride)[::-1] for entry in range(kernel)]
            for kernel, stride, dilation in zip(
                geometry.kernel, geometry.stride, geometry.dilation, strict=True
            )
        ]
        phases: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
        for number, entry in enumerate(product(*steps)):
            phase, shift = zip(*entry, strict=True)
            phases.setdefault(phase, []).append((number, shift))
        for phase, entries in phases.items():
            extents = [
                outputs[d] + max(shift[d] for _, shift in entries) for d in range(dimensions)
            ]
            grid = padded
            for d in range(dimensions):
                start, step = phase[d], geometry.stride[d]
                index = [slice(None)] * grid.ndim
                index[d + 1] = slice(start, start + step * (extents[d] - 1) + 1, step)
                grid = grid[tuple(index)]
            strides = [math.prod(extents[d + 1 :]) for d in range(dimensions)]
            last = sum((outputs[d] - 1) * strides[d] for d in range(dimensions))
            fill = [n for d in reversed(range(1, dimensions)) for n in (0, extents[d] - outputs[d])]
            on_grid = F.pad(gradient, [0, 0, *fill]) if any(fill) else gradient
            offsets = [
                sum(shift[d] * strides[d] for d in range(dimensions)) for _, shift in entries
            ]
            yield Taps(
                grid.flatten(1, dimensions),
                on_grid.flatten(1, dimensions)[:, : last + 1],
                offsets,
                [number for number, _ in entries],
            )


class Lookup(MatrixGradient):
    """An embedding's rows: G = Σ_t e_{index_t} δ_tᵀ.

    Args:
        indices: (B, T) int64.
        delta: (B, T, N).
        rows: M, how many rows the embedding has.
    """

    def __init__(self, indices: Tensor, delta: Tensor, rows: int) -> None:
        self.indices, self.delta = indices, delta
        self.shape = (rows, delta.shape[2])

    def products(self) -> Iterator[Products]:
        one_hot = F.one_hot(self.indices, self.shape[0]).to(self.delta.dtype)
        yield Products(one_hot, self.delta, 0)

    def formed(self) -> Tensor:
        result = self.delta.new_zeros(len(self.delta), *self.shape)
        return result.scatter_add_(1, self.indices.unsqueeze(2).expand_as(self.delta), self.delta)

    def squared_norm(self) -> Tensor:
        delta = widened(self.delta)
        same = (self.indices.unsqueeze(2) == self.indices.unsqueeze(1)).to(delta.dtype)
        return ((delta @ delta.mT) * same).sum(dim=(1, 2))

    def sandwiched(self, directions: Directions) -> Tensor:
        through_right = widened(self.delta @ directions.right.to(self.delta.dtype).T)
        return directions.left.to(through_right.dtype).T[self.indices].mT @ through_right

    def projected(self, basis: Tensor) -> Tensor:
        through = (basis[:, self.indices] * widened(self.delta)).sum(dim=(2, 3))
        return through.T

    def sketched(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        delta, left, right = widened(self.delta), self.fitting(left), self.fitting(right)
        same = (self.indices.unsqueeze(2) == self.indices.unsqueeze(1)).to(delta.dtype)
        of_right = (delta.mT @ (same @ (delta @ right.T))).sum(dim=0)
        rows = delta @ (delta.mT @ left.T[self.indices])  # (B, T, q)
        of_left = left.new_zeros(len(left.T), len(left))
        of_left.index_add_(0, self.indices.flatten(), rows.flatten(0, 1))
        return of_left, of_right


def total(gradients: Sequence[LayerGradient]) -> LayerGradient:
    """The gradient of a parameter that was used several times."""
    if len(gradients) == 1:
        return gradients[0]
    products = [g for g in gradients if isinstance(g, OuterProducts)]
    if len(products) == len(gradients):
        return OuterProducts(
            torch.cat([g.left for g in products], dim=1),
            torch.cat([g.right for g in products], dim=1),
        )
    formed = gradients[0].formed()
    for gradient in gradients[1:]:
        formed = formed + gradient.formed()
    return Formed(formed)


def arranged(basis: Tensor) -> Tensor:
    """A basis (K, *shape), laid out in memory the way projections read it; the same values."""
    if basis.ndim <= 3:
        return basis
    order = (*range(3, basis.ndim), 1, 2, 0)
    back = [order.index(dim) for dim in range(basis.ndim)]
    return basis.permute(order).contiguous().permute(back)


def widened(tensor: Tensor) -> Tensor:
    """Half precision as float32."""
    return tensor.float() if tensor.element_size() < 4 else tensor


def channels_last_rows(maps: Tensor) -> Tensor:
    """(B, C, *spatial) as (B, positions, C), a view where the memory allows."""
    return maps.movedim(1, -1).flatten(1, -2)


def _padded(maps: Tensor, padding: tuple[tuple[int, int], ...]) -> Tensor:
    if not any(before or after for before, after in padding):
        return maps
    return F.pad(maps, [n for pair in reversed(padding) for n in pair])
