"""Directions in the space of last-layer gradients, found from inner products alone.

Every direction is a combination of N reference gradients gᵢ = δᵢhᵢᵀ, the anchors, and is known by
its coefficients: vₖ = Σᵢ Aᵢₖ gᵢ. All that is needed to find them is the N x N matrix of inner
products K = (ΔΔᵀ) ∘ (HHᵀ); everything here is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grood_fast.errors import InputError

VARIANCE_TOLERANCE = 1e-12
"""Directions with less than this share of the largest variance are dropped: they are rounding."""

DENSE_EIGEN_LIMIT = 2048
"""Up to this order all eigenvectors are computed, above only the leading ones, by Lanczos."""


@dataclass(frozen=True)
class Components:
    """K directions as combinations of N anchors.

    Attributes:
        coefficients: (N, K) float64, A.
        weights: (N,) float64, of the anchors in the centre ḡ = Σ wᵢ gᵢ; zeros without a centre.
        variances: (K,) float64, of the anchors (or their class means) along each direction,
            descending.
        explained_variance_ratio: (K,) float64, the same over their total variance.
    """

    coefficients: Tensor
    weights: Tensor
    variances: Tensor
    explained_variance_ratio: Tensor


class Anchors(Protocol):
    """N gradients that directions are combinations of."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64 classes."""

    def __len__(self) -> int: ...

    def inner_products(self) -> Tensor:
        """(N, N) float64."""

    def combine(self, coefficients: Tensor) -> Tensor:
        """(K, C, D) float64 combinations by columns of (N, K)."""

    def reduced(self, left: Tensor, right: Tensor) -> Anchors:
        """The same in the span of columns (C, m) on one side and (D, n) on the other."""


@dataclass(frozen=True)
class RankOneAnchors:
    """Gradients δhᵀ of (N, C) and (N, D), not formed."""

    delta: Tensor
    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.delta)

    def inner_products(self) -> Tensor:
        return inner_products(self.delta, self.features)

    def combine(self, coefficients: Tensor) -> Tensor:
        d, h = self.delta.double(), self.features.double()
        return torch.stack([(d * weights.unsqueeze(1)).T @ h for weights in coefficients.T])

    def reduced(self, left: Tensor, right: Tensor) -> RankOneAnchors:
        return RankOneAnchors(
            self.delta.double() @ left, self.features.double() @ right, self.labels
        )

    @property
    def total_variance(self) -> float:
        """Mean squared distance from the mean gradient."""
        d, h = self.delta.double(), self.features.double()
        squares = d.square().sum(dim=1) * h.square().sum(dim=1)
        return float(squares.mean() - (d.T @ h / len(d)).square().sum())


@dataclass(frozen=True)
class FormedAnchors:
    """Gradients of any rank, (N, C, D): few, such as the classes' means."""

    gradients: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.gradients)

    def inner_products(self) -> Tensor:
        flat = self.gradients.flatten(1)
        return flat @ flat.T

    def combine(self, coefficients: Tensor) -> Tensor:
        return torch.einsum("nk,ncd->kcd", coefficients, self.gradients)

    def reduced(self, left: Tensor, right: Tensor) -> FormedAnchors:
        return FormedAnchors(left.T @ self.gradients @ right, self.labels)


def inner_products(delta: Tensor, features: Tensor) -> Tensor:
    """(N, N) float64 inner products of the gradients δhᵀ of (N, C) and (N, D)."""
    d, h = delta.double(), features.double()
    products = d @ d.T
    # Row blocks: a second matrix of this size is not needed at once.
    for start in range(0, len(h), 1024):
        products[start : start + 1024] *= h[start : start + 1024] @ h.T
    return products


def principal_components(products: Tensor, n_components: int, centred: bool = True) -> Components:
    """PCA: the directions of largest variance, of unit length.

    Args:
        products: (N, N) inner products of the anchors; overwritten where ``centred``.
        n_components: K; fewer come back where the anchors span fewer dimensions.
        centred: about the anchors' mean; without it the second moment about 0 is decomposed.
    """
    count, scale = len(products), float(products.diagonal().sum())
    weights = products.new_full((count,), 1 / count if centred else 0.0)
    if centred:
        products -= products.mean(dim=0, keepdim=True)
        products -= products.mean(dim=1, keepdim=True)
    total = float(products.diagonal().sum())
    squares, vectors = leading_eigenvectors(products, n_components, scale)
    coefficients = vectors / squares.sqrt()
    if centred:
        coefficients -= coefficients.mean(dim=0)
    return Components(coefficients, weights, squares / count, squares / total)


def class_mean_components(
    products: Tensor, labels: Tensor, kept_share: float, n_components: int | None = None
) -> Components:
    """PCA of the class means: the leading directions that hold a share of their variance.

    Args:
        products: (N, N) inner products of the anchors.
        labels: (N,) int64.
        kept_share: share of the class means' total variance to keep, in (0, 1].
        n_components: at most so many.

    Raises:
        InputError: fewer than two classes.
    """
    averages = class_averages(labels, products.dtype)
    classes = averages.shape[1]
    if classes < 2:
        raise InputError("class means need at least two classes in the reference.")
    weights = averages.mean(dim=1)
    centred = averages - weights.unsqueeze(1)
    gram = centred.T @ products @ centred
    scale = float(products.diagonal().mean())
    squares, vectors = leading_eigenvectors(gram, classes, scale)
    ratio = squares / gram.diagonal().sum()
    enough = int((ratio.cumsum(dim=0) < kept_share - 1e-12).sum()) + 1
    keep = slice(min(enough, n_components or enough))
    coefficients = centred @ (vectors[:, keep] / squares[keep].sqrt())
    return Components(coefficients, weights, squares[keep] / classes, ratio[keep])


def class_average_directions(products: Tensor, labels: Tensor) -> Components:
    """The class means about their common centre, each of unit length, not made orthogonal.

    ``explained_variance_ratio`` is each mean's share of the sum of their squared lengths.
    """
    averages = class_averages(labels, products.dtype)
    weights = averages.mean(dim=1)
    centred = averages - weights.unsqueeze(1)
    squares = ((products @ centred) * centred).sum(dim=0)
    if not bool((squares > VARIANCE_TOLERANCE * products.diagonal().mean()).all()):
        raise InputError("class means need at least two classes that differ in the reference.")
    coefficients = centred / squares.sqrt()
    return Components(coefficients, weights, squares / averages.shape[1], squares / squares.sum())


def class_averages(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C') of 1/n_c where a sample is of class c, else 0; C' classes that occur, ascending."""
    classes, inverse, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    members = torch.nn.functional.one_hot(inverse, len(classes)).to(dtype)
    averages: Tensor = members / counts
    return averages


def leading_eigenvectors(matrix: Tensor, count: int, scale: float = 0.0) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues (K,), descending, and eigenvectors (n, K) of a symmetric matrix (n, n)
    without negative eigenvalues.

    K is at most ``count``, less where eigenvalues fall under ``VARIANCE_TOLERANCE`` of the largest.
    Signs are fixed: the entry of largest magnitude is positive.

    Args:
        matrix: see above.
        count: at least 1.
        scale: how large the numbers were from which the matrix was made by subtraction.

    Raises:
        InputError: when nothing varies, or no more than rounding makes of ``scale``.
    """
    size = len(matrix)
    if size <= DENSE_EIGEN_LIMIT or count > size // 4:
        values, vectors = torch.linalg.eigh(matrix)
    else:
        values, vectors = _lanczos(matrix, count)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    if not len(values) or not float(values[0]) > VARIANCE_TOLERANCE * scale:
        raise InputError(
            "the reference gradients do not vary, so they span no subspace: give more than one "
            "sample, and check that the model's outputs differ."
        )
    kept = values > VARIANCE_TOLERANCE * values[0]
    values, vectors = values[kept], vectors[:, kept]
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return values, vectors * largest.sign()


def _lanczos(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    from scipy.sparse.linalg import LinearOperator, eigsh

    on_cpu = matrix.cpu().numpy()
    operator = LinearOperator(on_cpu.shape, matvec=on_cpu.dot, dtype=on_cpu.dtype)
    # A fixed start makes the result the same every time.
    start = torch.rand(len(matrix), generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    values, vectors = eigsh(operator, k=count, which="LA", v0=start.numpy(), tol=1e-10)
    order = values.argsort()
    return (
        torch.from_numpy(values[order].copy()).to(matrix.device),
        torch.from_numpy(vectors[:, order].copy()).to(matrix.device),
    )


def explicit_components(gradients: Tensor, n_components: int, centred: bool = True) -> Components:
    """:func:`principal_components` of gradients that are few numbers each, formed: (N, P) float64.

    The right way where P < N: the covariance is smaller than the matrix of inner products.
    """
    count, scale = len(gradients), float(gradients.square().sum())
    weights = gradients.new_full((count,), 1 / count if centred else 0.0)
    if centred:
        gradients = gradients - gradients.mean(dim=0)
    scatter = gradients.T @ gradients
    total = scatter.diagonal().sum()
    squares, directions = leading_eigenvectors(scatter, n_components, scale)
    # As for the other: the largest coordinate is positive, whichever way the directions were found.
    vectors = gradients @ directions / squares.sqrt()
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    coefficients = vectors * largest.sign() / squares.sqrt()
    if centred:
        coefficients -= coefficients.mean(dim=0)
    return Components(coefficients, weights, squares / count, squares / total)


def formed(delta: Tensor, features: Tensor, scale: Tensor | None = None) -> Tensor:
    """(N, C·D) float64 gradients δhᵀ, times ``scale`` (C, D) element by element."""
    gradients = delta.double().unsqueeze(2) * features.double().unsqueeze(1)
    return (gradients if scale is None else gradients * scale).flatten(1)
