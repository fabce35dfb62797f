"""From the statistics of one pass to a subspace in the form that is cheapest to evaluate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from grood_fast.errors import InputError
from grood_fast.hashing import hash_indices
from grood_fast.subspaces import forms
from grood_fast.subspaces.components import (
    Anchors,
    Components,
    FormedAnchors,
    RankOneAnchors,
    class_average_directions,
    class_mean_components,
    explicit_components,
    formed,
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
    pairs = RankOneAnchors(sample["delta"], sample["features"], sample["labels"])
    classes, dim = pairs.delta.shape[1], pairs.features.shape[1]
    left, right = _mode_directions(state, centred)
    rough_components = n_components or len(torch.unique(pairs.labels))
    ranks = forms.ranks_for(
        left[0], right[0], max(1, min(classes * dim, max(FACTORED_NUMBERS, 8 * rough_components)))
    )
    counted = forms.costs(len(pairs), classes, dim, rough_components, ranks)
    chosen: Form = "dense" if whiten else forms.choose(counted) if form == "auto" else form
    if chosen not in FORMS:
        raise InputError(f"unknown form {form!r}; known: auto, {', '.join(FORMS)}.")

    # Class means over all samples, where they are kept and need not be made of the anchors.
    exact = kind != "pca" and chosen != "dual" and bool(state.class_sums)
    whole: Anchors = _class_means(state) if exact else pairs
    facts: dict[str, Any] = {
        "kind": kind,
        "form": chosen,
        "anchors": len(whole),
        "share_of_reference": 1.0 if exact else len(pairs) / state.count,
        "multiplications": {name: round(cost) for name, cost in counted.items()},
        "ranks": None,
        "share_kept_by_ranks": 1.0,
    }
    seen: Anchors = whole
    scale: Tensor | None = None
    if chosen == "factored":
        u, v = left[1][:, : ranks[0]], right[1][:, : ranks[1]]
        seen = whole.reduced(u, v)
    if kind == "class_means":
        found = class_mean_components(seen.inner_products(), seen.labels, kept_share, n_components)
    elif kind == "class_averages":
        found = class_average_directions(seen.inner_products(), seen.labels)
    elif n_components is None:
        raise InputError("PCA needs n_components.")
    elif whiten:
        scale, floor = _inverse_deviations(state)
        facts |= {"whitening_quantile": WHITENING_QUANTILE, "whitening_floor": floor}
        found = explicit_components(_formed(pairs, scale), n_components, centred)
    elif isinstance(seen, RankOneAnchors) and seen.delta[0].numel() * seen.features[
        0
    ].numel() <= len(seen):
        found = explicit_components(_formed(seen), n_components, centred)
    else:
        found = principal_components(seen.inner_products(), n_components, centred)

    centre = whole.combine(found.weights.unsqueeze(1))[0]
    if chosen == "dual":
        along = ((pairs.delta.double() @ centre) * pairs.features.double()).sum(dim=1)
        tensors = forms.dual(
            pairs.delta, pairs.features, found.coefficients, found.coefficients.T @ along
        )
    else:
        basis = seen.combine(found.coefficients)
        if scale is not None:
            basis *= scale.square()
        mean = seen.combine(found.weights.unsqueeze(1))[0]
        offset = basis.flatten(1) @ mean.flatten()
        if chosen == "dense":
            tensors = forms.dense(basis, offset)
        else:
            tensors = forms.factored(u, v, basis, offset)
            kept = pairs.reduced(u, v).total_variance / pairs.total_variance
            facts |= {"ranks": list(ranks), "share_kept_by_ranks": min(kept, 1.0)}
    facts |= {
        "components": found.coefficients.shape[1],
        "explained_variance": float(found.explained_variance_ratio.sum()),
    }
    return Subspace(tensors, centre, found, chosen, facts)


def _class_means(state: GradientState) -> FormedAnchors:
    known = sorted(state.class_sums.items())
    return FormedAnchors(
        torch.stack([total / count for _, (count, total) in known]),
        torch.tensor([label for label, _ in known], device=known[0][1][1].device),
    )


def _formed(pairs: RankOneAnchors, scale: Tensor | None = None) -> Tensor:
    needed = 8 * pairs.delta.numel() * pairs.features.shape[1]
    if needed > FORMED_BUDGET:
        raise InputError(
            f"whitening forms {len(pairs)} gradients of {pairs.delta.shape[1]} x "
            f"{pairs.features.shape[1]}, {needed / 2**30:.1f} GiB: give a smaller max_anchors, or "
            "whiten=False."
        )
    return formed(pairs.delta, pairs.features, scale)


def _anchors(state: GradientState, most: int) -> dict[str, Tensor]:
    sample = state.sample()
    if len(sample["indices"]) <= most:
        return sample
    # By another seed than the reservoir's: a balanced sample must not become unbalanced.
    chosen = hash_indices(sample["indices"], seed=1).argsort()[:most].sort().values
    return {name: rows[chosen] for name, rows in sample.items()}


def _inverse_deviations(state: GradientState) -> tuple[Tensor, float]:
    """(C, D) 1/σ of every entry, in closed form over all samples, 0 where nothing varies; and the
    variance that smaller ones were raised to."""
    assert state.squares is not None, "the state was made without elementwise=True"
    assert state.gradient is not None
    variance = state.squares / state.count - (state.gradient / state.count).square()
    positive = variance[variance > 0]
    if not len(positive):
        raise InputError("the reference gradients do not vary: there is nothing to whiten.")
    rank = max(1, round(WHITENING_QUANTILE * len(positive)))
    floor = float(positive.kthvalue(rank).values)
    return torch.where(variance > 0, variance.clamp(min=floor).rsqrt(), 0.0), floor


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
