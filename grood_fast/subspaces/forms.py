"""Three ways to evaluate coordinates z = V (g − ḡ) of a gradient g = δhᵀ that is not formed.

============ ============================= ======================== ========
form         what it keeps                 multiplications a sample exact
============ ============================= ======================== ========
dual         N anchors and A (N, K)        N (C + D + K)            yes
dense        V (K, C, D)                   K C D                    yes
factored     m + n directions, (m, n, K)   C m + D n + m n K        no
============ ============================= ======================== ========

Each form is a mapping of tensors, which is what is saved, and a function of δ and h.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from grood_fast import ops

Form = Literal["dual", "dense", "factored"]
FORMS: tuple[Form, ...] = ("dense", "dual", "factored")

BYTES_PER_MULTIPLICATION = 0.1
"""How many bytes a processor reads from memory in the time of a multiplication in a product."""

COUNTED_BATCH = 64
"""The batch size that memory traffic is shared by where costs are counted."""

EXACTNESS_BONUS = 1.25
"""How much more an exact form may cost before the factored one is taken."""


def project(form: Mapping[str, Tensor], delta: Tensor, features: Tensor) -> Tensor:
    """Coordinates (B, K) float32 of gradients δhᵀ.

    Args:
        form: tensors made by :func:`dual`, :func:`dense` or :func:`factored`.
        delta: (B, C) floating point.
        features: (B, D) floating point, with a column of ones where the bias counts.
    """
    delta, features = delta.float(), features.float()
    if "anchor_delta" in form:
        z = ops.dual_project(
            delta, features, form["anchor_delta"], form["anchor_features"], form["coefficients"]
        )
    else:
        if "left" in form:
            delta, features = delta @ form["left"], features @ form["right"]
        components, classes, _ = form["basis"].shape
        # The longer factor first: what is left of it is small.
        partial = features @ form["basis"].flatten(0, 1).T
        partial = partial.reshape(len(delta), components, classes)
        z = torch.bmm(partial, delta.unsqueeze(2)).squeeze(2)
    return z - form["offset"]


def dual(
    delta: Tensor, features: Tensor, coefficients: Tensor, offset: Tensor
) -> dict[str, Tensor]:
    """Anchors (N, C) and (N, D) and their coefficients (N, K); offset (K,) is V ḡ."""
    return {
        "anchor_delta": delta.float().contiguous(),
        "anchor_features": features.float().contiguous(),
        "coefficients": coefficients.float().contiguous(),
        "offset": offset.float(),
    }


def dense(basis: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """The directions themselves, (K, C, D)."""
    return {"basis": basis.float().contiguous(), "offset": offset.float()}


def factored(left: Tensor, right: Tensor, basis: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """Orthonormal columns (C, m) and (D, n), and directions in their product space (K, m, n)."""
    return {"left": left.float(), "right": right.float(), **dense(basis, offset)}


def costs(
    anchors: int, classes: int, features: int, components: int, ranks: tuple[int, int]
) -> dict[Form, float]:
    """Cost a sample of each form, in multiplications; memory traffic is counted in.

    Args:
        anchors: N.
        classes: C.
        features: D.
        components: K.
        ranks: m and n.
    """
    left, right = ranks
    multiplications: dict[Form, int] = {
        "dual": anchors * (classes + features + components),
        "dense": components * classes * (features + 1),
        "factored": classes * left + features * right + components * left * (right + 1),
    }
    numbers: dict[Form, int] = {
        "dual": multiplications["dual"],
        "dense": components * classes * features,
        "factored": classes * left + features * right + components * left * right,
    }
    traffic = 4 / BYTES_PER_MULTIPLICATION / COUNTED_BATCH
    return {form: multiplications[form] + traffic * numbers[form] for form in FORMS}


def choose(counted: Mapping[Form, float]) -> Form:
    """The cheapest form; an exact one where the factored form saves little."""
    cheapest = min(FORMS, key=lambda form: counted[form])
    if cheapest != "factored":
        return cheapest
    exact = min(FORMS[:2], key=lambda form: counted[form])
    return exact if counted[exact] <= EXACTNESS_BONUS * counted["factored"] else "factored"


def ranks_for(left: Tensor, right: Tensor, size: int) -> tuple[int, int]:
    """How many leading directions of each side to keep, m n at most ``size``.

    The pair that keeps the largest product of shares of the two spectra.

    Args:
        left: (C,) eigenvalues of the left mode covariance, descending.
        right: (D,) the same of the right one.
        size: at least 1.
    """
    shares = [
        spectrum.clamp(min=0).cumsum(dim=0) / spectrum.clamp(min=0).sum()
        for spectrum in (left.double(), right.double())
    ]
    best, best_share = (1, 1), 0.0
    for m in range(1, min(len(left), size) + 1):
        n = min(len(right), size // m)
        share = float(shares[0][m - 1] * shares[1][n - 1])
        # As good with fewer numbers is better.
        if share > best_share * (1 + 1e-9):
            best, best_share = (m, n), share
    return best
