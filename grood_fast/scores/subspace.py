"""Scores on how much of a gradient lies inside a subspace.

They read (B, 2): the squared lengths of the part inside and of the whole, as
``ProjectedHeadGradient(output="norms")`` gives them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grood_fast.errors import InputError
from grood_fast.scores.base import Score


def _inside_and_whole(z: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(z, Tensor) or z.ndim != 2 or z.shape[1] != 2:
        raise InputError(
            "this score reads the squared lengths of a gradient inside a subspace and as a whole, "
            "(B, 2): give it ProjectedHeadGradient(output='norms')."
        )
    return z[:, 0], z[:, 1]


class SubspaceShare(Score):
    """−‖U(g − ḡ)‖ / ‖g − ḡ‖, in [−1, 0]: samples along the subspace are in distribution.

    A gradient equal to the mean has no direction and counts as outside, 0.
    """

    name = "subspace_share"
    representation = "projected_head_gradient"

    def __call__(self, z: Tensor) -> Tensor:
        inside, whole = _inside_and_whole(z)
        share = (inside / whole.clamp(min=torch.finfo(whole.dtype).tiny)).clamp(max=1)
        return -share.sqrt()


class SubspaceResidual(Score):
    """√(‖g − ḡ‖² − ‖U(g − ḡ)‖²): the length of what the subspace does not explain."""

    name = "subspace_residual"
    representation = "projected_head_gradient"

    def __call__(self, z: Tensor) -> Tensor:
        inside, whole = _inside_and_whole(z)
        return (whole - inside).clamp(min=0).sqrt()
