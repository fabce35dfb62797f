"""From the statistics of one pass to a subspace in the form that is cheapest to evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from grood_fast.errors import InputError
from grood_fast.subspaces import forms
from grood_fast.subspaces.components import (
    Components,
    class_average_directions,
    class_mean_components,
    explicit_components,
    formed,
    inner_products,
    principal_components,
)
from grood_fast.subspaces.forms import FORMS, Form
from grood_fast.subspaces.state import GradientState

Kind = Literal["pca", "class_means", "class_averages"]
KINDS: tuple[Kind, ...] = ("pca", "class_means", "class_averages")

FORMED_BUDGET = 2 << 30
"""How many bytes gradients may take where whitening has to form them."""

WHITENING_QUANTILE = 0.01
"""Variances below this quantile of the positive ones are raised to it before dividing by them."""

FACTORED_NUMBERS = 1024
"""At least so many numbers m n a factored form keeps of a gradient, or 8 a component."""


@dataclass(frozen=True)
class Subspace:
    """K directions among last-layer gradients.

    Attributes:
        tensors: the chosen form; see :func:`grood_fast.subspaces.forms.project`.
        centre: (C, D) float64, the mean gradient that is subtracted; zeros without centring.
        components: the directions on the anchors.
        form: dual, dense or factored.
        facts: what was chosen and what it costs and keeps; JSON-serialisable.
    """

    tensors: dict[str, Tensor]
    centre: Tensor
    components: Components
    form: Form
    facts: dict[str, Any]


def build(
    state: GradientState,
    *,
    kind: Kind,
    n_components: int | None,
    form: Form | Literal["auto"] = "auto",
    centred: bool = True,
    whiten: bool = False,
    kept_share: float = 0.99,
    max_anchors: int = 8192,
) -> Subspace:
    """Finish a :class:`GradientState`.

    Args:
        state: what the pass has absorbed; left as it was.
        kind: ``"pca"``: principal components of the gradients; ``"class_means"``: of the class
            means; ``"class_averages"``: the unit-length class means themselves, centred.
        n_components: K; for class means at most so many, None for as many as ``kept_share`` takes;
            class averages are as many as classes.
        form: how to evaluate it, or ``"auto"``: the cheapest by counted multiplications and bytes.
        centred: whether PCA subtracts the mean gradient; class means always do, their own.
        whiten: divide every entry of the gradient by its standard deviation over the reference
            (dense form and PCA only).
        kept_share: of the class means' variance.
        max_anchors: how many of the kept samples the directions are made of.

    Raises:
        InputError: settings that do not go together, gradients that do not vary, fewer than two
            classes where class means are asked for.
    """
    if whiten and (kind != "pca" or form not in ("auto", "dense")):
        raise InputError("whitening goes with kind='pca' and form='dense' (or 'auto') only.")
    sample = _anchors(state, max_anchors)
    delta, features, labels = sample["delta"], sample["features"], sample["labels"]
    classes, dim = delta.shape[1], features.shape[1]
    scale = _inverse_deviations(state) if whiten else None

    def components_of(d: Tensor, h: Tensor) -> Components:
        if kind == "pca":
            if n_components is None:
                raise InputError("PCA needs n_components.")
            if d.shape[1] * h.shape[1] <= len(d) or scale is not None:
                needed = 8 * d.numel() * h.shape[1]
                if needed > FORMED_BUDGET:
                    raise InputError(
                        f"whitening forms {len(d)} gradients of {d.shape[1]} x {h.shape[1]}, "
                        f"{needed / 2**30:.1f} GiB: give a smaller max_anchors, or whiten=False."
                    )
                return explicit_components(formed(d, h, scale), n_components, centred)
            return principal_components(inner_products(d, h), n_components, centred)
        products = inner_products(d, h)
        if kind == "class_means":
            return class_mean_components(products, labels, kept_share, n_components)
        return class_average_directions(products, labels)

    left, right = _mode_directions(state, centred)
    rough_components = n_components or len(torch.unique(labels))
    ranks = forms.ranks_for(
        left[0], right[0], max(1, min(classes * dim, max(FACTORED_NUMBERS, 8 * rough_components)))
    )
    counted = forms.costs(len(delta), classes, dim, rough_components, ranks)
    chosen: Form = "dense" if whiten else forms.choose(counted) if form == "auto" else form
    if chosen not in FORMS:
        raise InputError(f"unknown form {form!r}; known: auto, {', '.join(FORMS)}.")

    total = _total_variance(delta, features)
    kept = 1.0
    if chosen == "factored":
        u, v = left[1][:, : ranks[0]].float(), right[1][:, : ranks[1]].float()
        reduced = delta @ u, features @ v
        found = components_of(*reduced)
        basis = forms.combine(*reduced, found.coefficients)
        kept = _total_variance(*reduced) / total
        mean = _mean(*reduced, found.weights)
        tensors = forms.factored(u, v, basis, _offset(basis, mean))
    else:
        found = components_of(delta, features)
        mean = _mean(delta, features, found.weights)
        if chosen == "dense":
            basis = forms.combine(delta, features, found.coefficients)
            if scale is not None:
                basis *= scale.square()
            tensors = forms.dense(basis, _offset(basis, mean))
        else:
            along = ((delta.double() @ mean) * features.double()).sum(dim=1)
            tensors = forms.dual(delta, features, found.coefficients, found.coefficients.T @ along)
    facts = {
        "kind": kind,
        "form": chosen,
        "components": found.coefficients.shape[1],
        "anchors": len(delta),
        "share_of_reference": len(delta) / state.count,
        "multiplications": {name: round(cost) for name, cost in counted.items()},
        "ranks": list(ranks) if chosen == "factored" else None,
        "share_kept_by_ranks": min(kept, 1.0),
        "explained_variance": float(found.explained_variance_ratio.sum()),
    }
    return Subspace(tensors, _mean(delta, features, found.weights), found, chosen, facts)


def _anchors(state: GradientState, most: int) -> dict[str, Tensor]:
    from grood_fast.hashing import hash_indices

    sample = state.sample()
    if len(sample["indices"]) <= most:
        return sample
    # By another seed than the reservoir's: a balanced sample must not become unbalanced.
    chosen = hash_indices(sample["indices"], seed=1).argsort()[:most].sort().values
    return {name: rows[chosen] for name, rows in sample.items()}


def _inverse_deviations(state: GradientState) -> Tensor:
    """(C, D) 1/σ of every entry, in closed form over all samples; 0 where nothing varies."""
    assert state.squares is not None, "the state was made without elementwise=True"
    assert state.gradient is not None
    variance = state.squares / state.count - (state.gradient / state.count).square()
    positive = variance > 0
    if not bool(positive.any()):
        raise InputError("the reference gradients do not vary: there is nothing to whiten.")
    floor = torch.quantile(variance[positive][:10_000_000], WHITENING_QUANTILE)
    return torch.where(positive, variance.clamp(min=floor).rsqrt(), 0.0)


def _mode_directions(
    state: GradientState, centred: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Eigenvalues, descending, and eigenvectors of the left and right mode covariances."""
    assert state.left is not None
    assert state.right is not None
    assert state.gradient is not None
    left, right = state.left, state.right
    if centred:
        mean = state.gradient / state.count
        left = left - state.count * mean @ mean.T
        right = right - state.count * mean.T @ mean
    result = []
    for covariance in (left, right):
        values, vectors = torch.linalg.eigh(covariance)
        result.append((values.flip(0), vectors.flip(1)))
    return result[0], result[1]


def _mean(delta: Tensor, features: Tensor, weights: Tensor) -> Tensor:
    """(C, D) float64 Σ wᵢ δᵢhᵢᵀ."""
    return (delta.double() * weights.unsqueeze(1)).T @ features.double()


def _offset(basis: Tensor, mean: Tensor) -> Tensor:
    return basis.flatten(1) @ mean.flatten()


def _total_variance(delta: Tensor, features: Tensor) -> float:
    d, h = delta.double(), features.double()
    squares = d.square().sum(dim=1) * h.square().sum(dim=1)
    mean = d.T @ h / len(d)
    return float(squares.mean() - mean.square().sum())
