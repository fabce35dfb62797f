"""Gaussians fitted to the classes: Mahalanobis distances and the class-conditional density.

Fitted and scored in float64: a covariance's condition number is the square of the features', which
leaves float32 too few digits. The scores come back as float32.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from grood_fast.errors import FitWarning, InputError, warn
from grood_fast.scores.base import Score
from grood_fast.statistics import ClassMoments, keeps_state, require_rows, require_same_config

if TYPE_CHECKING:
    from grood_fast.classifier import Classifier

logger = logging.getLogger(__name__)

Shrinkage = float | Literal["oas"]

UNTIED_BUDGET = 1 << 30
"""How many bytes one covariance a class may take where the number of classes decides."""

NO_PRODUCTS = "donot_use_mm_for_euclid_dist"

EIGENVALUE_TOLERANCE = 1e-12
"""Directions whose variance is below this share of the largest are left out of a distance: a
millionth of the largest standard deviation is at the rounding of float32 features."""


def oas_shrinkage(covariance: Tensor, count: int) -> float:
    """The oracle approximating shrinkage of Chen et al. (2010, eq. 23), in [0, 1].

    In the form scikit-learn uses, without the terms of order 1/D. It needs the covariance and the
    number of samples alone, so it works on merged statistics (Ledoit-Wolf's does not).

    Args:
        covariance: (D, D), maximum likelihood.
        count: number of samples behind it.
    """
    dim = len(covariance)
    mean_square = float(covariance.square().mean())
    squared_mean_variance = float(covariance.trace() / dim) ** 2
    spread = (count + 1) * (mean_square - squared_mean_variance / dim)
    return 1.0 if spread <= 0 else min((mean_square + squared_mean_variance) / spread, 1.0)


def shrink(covariance: Tensor, shrinkage: Shrinkage, count: int) -> Tensor:
    """(1 - s) Σ + s (trace(Σ) / D) I, with s given or ``"oas"``."""
    weight = oas_shrinkage(covariance, count) if shrinkage == "oas" else float(shrinkage)
    shrunk = covariance * (1 - weight)
    shrunk.diagonal().add_(weight * covariance.trace() / len(covariance))
    return shrunk


def whitening(covariance: Tensor) -> Tensor:
    """(rank, D): ‖A x‖² = xᵀ Σ⁺ x, with Σ⁺ the pseudo-inverse at ``EIGENVALUE_TOLERANCE``.

    Raises:
        InputError: when nothing varies.
    """
    variances: Tensor
    directions: Tensor
    variances, directions = torch.linalg.eigh(covariance)
    kept = variances > EIGENVALUE_TOLERANCE * variances[-1]
    if float(variances[-1]) <= 0:
        raise InputError(
            "the reference features do not vary within the classes, so they have no covariance: "
            "give more than one sample a class, and check that the features are not constant."
        )
    if not bool(kept.all()):
        logger.info("the covariance has rank %d of %d features", int(kept.sum()), len(covariance))
    return (directions[:, kept] / variances[kept].sqrt()).T.contiguous()


def _checked_shrinkage(shrinkage: Shrinkage) -> Shrinkage:
    if shrinkage == "oas":
        return shrinkage
    if isinstance(shrinkage, (int, float)) and 0 <= shrinkage <= 1:
        return float(shrinkage)
    raise InputError(f"shrinkage must be a number in [0, 1] or 'oas', got {shrinkage!r}.")


class _GaussianScore(Score):
    """What the Gaussian scores share: they read features and labels into :class:`ClassMoments`."""

    representation: ClassVar[str] = "features"
    needs_fit: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    covariance: ClassVar[Literal["tied", "class"]]

    def __init__(self, shrinkage: Shrinkage) -> None:
        super().__init__()
        self.shrinkage = _checked_shrinkage(shrinkage)
        self._moments = ClassMoments(covariance=self.covariance)

    def config(self) -> dict[str, Any]:
        return {"shrinkage": self.shrinkage}

    def begin(self, classifier: Classifier) -> None:
        self.fitted = {}
        self._moments = ClassMoments(covariance=self.covariance)

    def absorb(self, z: Tensor, labels: Tensor | None, indices: Tensor) -> None:
        """Take in one reference batch: ``z`` (B, D) floating point, ``labels`` (B,) integers."""
        self._moments.absorb(z, labels, indices)

    def merge(self, other: _GaussianScore) -> None:
        require_same_config(self, other)
        self._moments.merge(other._moments)

    @keeps_state
    def finish(self) -> None:
        self.fitted = self._fit(self._moments)
        self._moments = ClassMoments(covariance=self.covariance)

    @abstractmethod
    def _fit(self, moments: ClassMoments) -> dict[str, Tensor]:
        """What :meth:`finish` leaves in ``fitted``; ``"center"`` (D,) among it."""

    def _centred(self, z: Tensor) -> Tensor:
        """(B, D) float64, about the mean of the reference: products cancel least there."""
        self.require_fitted()
        center = self.fitted["center"]
        require_rows(z, len(center))
        return z.to(torch.float64) - center


class Mahalanobis(_GaussianScore):
    """Squared Mahalanobis distance to the nearest class mean; higher = more OOD.

    Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
    Adversarial Attacks", NeurIPS 2018, on one representation: min over classes c of
    (z - μ_c)ᵀ Σ⁺ (z - μ_c), with one Σ for all classes, the scatter within classes over N.

    A singular Σ (constant features, fewer samples than features) is handled by a pseudo-inverse
    that leaves out the directions whose variance is below 1e-12 of the largest; ``rank`` says how
    many remain. Distances are computed in float64 and returned as float32. NaN among the features
    gives a NaN score.

    Args:
        shrinkage: weight s in [0, 1] of (trace(Σ) / D) I mixed into Σ, or ``"oas"``, which chooses
            it from the data (see :func:`oas_shrinkage`).

    Raises:
        InputError: for a shrinkage out of range, or reference features or labels that do not fit.
    """

    name: ClassVar[str] = "mahalanobis"
    covariance: ClassVar[Literal["tied", "class"]] = "tied"

    def __init__(self, shrinkage: Shrinkage = 0.0) -> None:
        super().__init__(shrinkage)

    @property
    def rank(self) -> int:
        """Number of directions the distance is measured in."""
        self.require_fitted()
        return len(self.fitted["whitening"])

    def _fit(self, moments: ClassMoments) -> dict[str, Tensor]:
        seen = moments.seen_classes()
        scatter = moments.within_scatter()
        dim, freedom = len(scatter), moments.count - len(seen)
        if freedom < dim and self.shrinkage == 0:
            warn(
                f"{moments.count} reference samples of {len(seen)} classes cannot determine the "
                f"covariance of {dim} features: differences outside their span are ignored. Give "
                "more samples, or shrinkage='oas'.",
                FitWarning,
            )
        whiten = whitening(shrink(scatter / moments.count, self.shrinkage, moments.count))
        center = moments.total().mean
        assert center is not None
        means = (moments.means[seen] - center) @ whiten.T
        return {"center": center, "whitening": whiten, "means": means}

    def _squared_distance(self, centred: Tensor) -> Tensor:
        """(B,) float64 squared distances to the nearest class of (B, D) centred features."""
        white, means = centred @ self.fitted["whitening"].T, self.fitted["means"]
        # The nearest class by products, its distance by the difference: the former cancels.
        nearest = torch.addmm(means.square().sum(dim=1), white, means.T, alpha=-2).argmin(dim=1)
        return (white - means[nearest]).square().sum(dim=1)

    def __call__(self, z: Tensor) -> Tensor:
        """Squared distances of (B, D) features: (B,) float32, at least 0; higher = more OOD."""
        return self._squared_distance(self._centred(z)).float()


class RelativeMahalanobis(Mahalanobis):
    """Mahalanobis distance less that to a Gaussian of all classes; higher = more OOD.

    Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", 2021:
    min over classes of (z - μ_c)ᵀ Σ⁺ (z - μ_c) - (z - μ)ᵀ Σ₀⁺ (z - μ), with μ and Σ₀ the mean and
    covariance of the whole reference. Differences that do not tell the classes apart cancel, so
    scores may be negative. Shrinkage is applied to both covariances. See :class:`Mahalanobis`.
    """

    name: ClassVar[str] = "rmd"

    def _fit(self, moments: ClassMoments) -> dict[str, Tensor]:
        background = shrink(moments.total().covariance(), self.shrinkage, moments.count)
        return {**super()._fit(moments), "background": whitening(background)}

    def __call__(self, z: Tensor) -> Tensor:
        """Relative squared distances of (B, D) features: (B,) float32; higher = more OOD."""
        centred = self._centred(z)
        background = (centred @ self.fitted["background"].T).square().sum(dim=1)
        return (self._squared_distance(centred) - background).float()


class ClassGMM(_GaussianScore):
    """Negative log-density under one Gaussian a class; higher = more OOD.

    -log Σ_c π_c N(z; μ_c, Σ_c), with π_c the share of the class in the reference and Σ_c its full
    covariance: Gaussian discriminant analysis read as a density.

    A class of n ≤ D samples cannot determine its covariance, so it is topped up to D + 1 samples
    with the covariance S pooled within classes: Σ_c = (n S_c + (D + 1 - n) S) / (D + 1), with a
    ``FitWarning``. Then every Σ_c is shrunk. Computed in float64 and returned as float32. NaN among
    the features gives a NaN score.

    Fitting gathers 8 C D² bytes and refuses above 4 GiB; what is fitted takes as much again, at the
    reduced dimension.

    Args:
        shrinkage: weight s in [0, 1] of (trace(Σ_c) / D) I mixed into every Σ_c, or ``"oas"``,
            which chooses it for each class (see :func:`oas_shrinkage`).
        tied: one covariance for all classes, B·C·D to score instead of B·C·D². None: where one for
            each of the head's classes would take more than 1 GiB to fit.
        standardize: divide every feature by its standard deviation over the reference first, so
            that shrinkage and components do not depend on the features' units.
        n_components: reduce the features to this many principal components of the reference
            first, which lowers D in all of the above but the memory of the fit; None keeps all.

    Raises:
        InputError: for a setting out of range, reference features or labels that do not fit, too
            many classes and features for the memory allowed, or a covariance that stays singular.
    """

    name: ClassVar[str] = "gmm"
    covariance: ClassVar[Literal["tied", "class"]] = "class"

    def __init__(
        self,
        shrinkage: Shrinkage = 1e-3,
        n_components: int | None = None,
        standardize: bool = False,
        tied: bool | None = False,
    ) -> None:
        super().__init__(shrinkage)
        self.standardize, self.tied = standardize, tied
        self._classes: int | None = None
        if n_components is not None and n_components < 1:
            raise InputError(f"n_components must be at least 1, got {n_components}.")
        self.n_components = n_components

    def config(self) -> dict[str, Any]:
        return {
            "shrinkage": self.shrinkage,
            "n_components": self.n_components,
            "standardize": self.standardize,
            "tied": self.tied,
        }

    def begin(self, classifier: Classifier) -> None:
        super().begin(classifier)
        known = classifier is not None and classifier.has_head
        self._classes = classifier.num_classes if known else None

    def absorb(self, z: Tensor, labels: Tensor | None, indices: Tensor) -> None:
        if self._moments.dim is None:
            size = 8 * (self._classes or 0) * z.shape[-1] ** 2
            if self.tied or (self.tied is None and size > UNTIED_BUDGET):
                self._moments = ClassMoments(covariance="tied")
        super().absorb(z, labels, indices)

    def _fit(self, moments: ClassMoments) -> dict[str, Tensor]:
        seen = moments.seen_classes()
        total = moments.total()
        assert total.mean is not None
        counts = moments.counts[seen]
        means = moments.means[seen] - total.mean
        fitted = {"center": total.mean}
        basis, covariance = None, total.covariance()
        scale = torch.ones_like(total.mean)
        if self.standardize:
            variance = covariance.diagonal()
            scale = variance.rsqrt().where(variance > 0, scale)
        if self.n_components is not None:
            basis = self._principal_components(scale.unsqueeze(1) * covariance * scale) * scale
        elif self.standardize:
            basis = torch.diag(scale)
        if basis is not None:
            means = means @ basis.T
            fitted["basis"] = basis

        def reduced(scatter: Tensor) -> Tensor:
            return scatter if basis is None else basis @ scatter @ basis.T

        if self._moments.covariance == "tied":
            return {**fitted, **self._tied(moments, seen, means, reduced)}
        dim = means.shape[1]
        tied = reduced(moments.within_scatter()) / moments.count
        missing = (dim + 1 - counts).clamp(min=0)
        short = int((missing > 0).sum())
        if short:
            warn(
                f"{short} of {len(seen)} classes have no more samples than the {dim} features: "
                "their covariance is filled up with the one pooled over classes. Lower "
                "n_components, or use Mahalanobis.",
                FitWarning,
            )
        factors = means.new_empty(len(seen), dim, dim)
        for factor, label, count, extra in zip(
            factors, seen.tolist(), counts.tolist(), missing.tolist(), strict=True
        ):
            scatter = reduced(moments.class_scatter(label)) + extra * tied
            factor.copy_(self._whitening_factor(scatter / (count + extra), count + extra, label))
        log_volumes = factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        log_priors = (counts.double() / moments.count).log()
        log_weights = log_priors + log_volumes - 0.5 * dim * math.log(2 * math.pi)
        return {**fitted, "means": means, "factors": factors, "log_weights": log_weights}

    def _tied(
        self,
        moments: ClassMoments,
        seen: Tensor,
        means: Tensor,
        reduced: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        covariance = reduced(moments.within_scatter()) / moments.count
        whiten = whitening(shrink(covariance, self.shrinkage, moments.count))
        # The volume: rows of the whitening are orthogonal, as long as the deviations are short.
        volume = whiten.norm(dim=1).log().sum() - 0.5 * len(whiten) * math.log(2 * math.pi)
        priors = (moments.counts[seen].double() / moments.count).log()
        return {"means": means @ whiten.T, "whitening": whiten, "log_weights": priors + volume}

    def _principal_components(self, covariance: Tensor) -> Tensor:
        assert self.n_components is not None
        if self.n_components > len(covariance):
            raise InputError(
                f"n_components={self.n_components} is more than the {len(covariance)} features."
            )
        directions: Tensor = torch.linalg.eigh(covariance).eigenvectors
        return directions[:, -self.n_components :].flip(1).T.contiguous()

    def _whitening_factor(self, covariance: Tensor, count: int, label: int) -> Tensor:
        """The inverse of the Cholesky factor of the shrunk covariance, lower triangular."""
        lower, failed = torch.linalg.cholesky_ex(shrink(covariance, self.shrinkage, count))
        if int(failed):
            raise InputError(
                f"the covariance of class {label} is singular at shrinkage={self.shrinkage}: "
                "raise the shrinkage, lower n_components, or use Mahalanobis."
            )
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        factor: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return factor

    def __call__(self, z: Tensor) -> Tensor:
        """Negative log-densities of (B, D) features: (B,) float32; higher = more OOD."""
        centred = self._centred(z)
        if "basis" in self.fitted:
            centred = centred @ self.fitted["basis"].T
        if "whitening" in self.fitted:
            means, white = self.fitted["means"], centred @ self.fitted["whitening"].T
            # Differences: products would cancel where clusters are tight.
            squared = torch.cdist(white, means, compute_mode=NO_PRODUCTS).square()
            return -(self.fitted["log_weights"] - 0.5 * squared).logsumexp(dim=1).float()
        parts = zip(
            self.fitted["means"],
            self.fitted["factors"],
            self.fitted["log_weights"],
            strict=True,
        )
        log_joint = [
            log_weight - 0.5 * ((centred - mean) @ factor.T).square().sum(dim=1)
            for mean, factor, log_weight in parts
        ]
        return -torch.stack(log_joint, dim=1).logsumexp(dim=1).float()
