"""k-means on features that change with every training step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grood_fast.errors import InputError

ITERATIONS = 100
"""At most so many; the assignments settle long before, and then it stops."""


class Clustering(NamedTuple):
    """A partition of N points.

    Attributes:
        assignments: (N,) int64, each point's cluster, that of the nearest centre.
        centres: (K, D), each the mean of its points, at the last but one assignment.
        inertia: scalar, the sum of the points' squared distances to their centres.
    """

    assignments: Tensor
    centres: Tensor
    inertia: Tensor


def kmeans(
    points: Tensor, clusters: int, generator: torch.Generator, iterations: int = ITERATIONS
) -> Clustering:
    """Lloyd's algorithm from greedy k-means++ centres (Arthur and Vassilvitskii, 2007).

    Everything is a product of matrices on the points' device; only the stop waits for it.

    Args:
        points: (N, D) float32 or float64, finite.
        clusters: K <= N. Fewer different points than that leave clusters empty.
        generator: on the CPU, so that every device draws alike; alone decides what is drawn.
        iterations: at most so many.

    Raises:
        InputError: there are fewer points than clusters, or no cluster.
    """
    if points.ndim != 2 or not 1 <= clusters <= len(points):
        raise InputError(
            f"k-means needs at least as many points as clusters and one of each, got points of "
            f"shape {tuple(points.shape)} and {clusters} clusters."
        )
    # Distances do not change with the origin, and lose fewest digits around the mean.
    origin = points.mean(dim=0)
    points = points - origin
    squares = points.square().sum(dim=1)
    centres = points[_seeds(points, squares, clusters, generator)]
    assignments = _nearest(points, centres)
    for _ in range(iterations):
        members = torch.zeros(len(centres), len(points), dtype=points.dtype, device=points.device)
        members.scatter_(0, assignments.unsqueeze(0), 1)
        counts = members.sum(dim=1, keepdim=True)
        centres = torch.where(counts > 0, members @ points / counts, centres)
        before, assignments = assignments, _nearest(points, centres)
        if torch.equal(before, assignments):
            break
    inertia = (points - centres[assignments]).square().sum()
    return Clustering(assignments, centres + origin, inertia)


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    offsets = centres.square().sum(dim=1).mul_(0.5)
    return torch.addmm(offsets, points, centres.T, alpha=-1).argmin(dim=1)


def _seeds(points: Tensor, squares: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """(K,) indices: each drawn with its squared distance to the nearest before as probability, and
    the best of a few draws, the one that leaves the least inertia."""
    trials = 2 + int(math.log(clusters))
    draws = torch.rand(clusters, trials, generator=generator, dtype=torch.float64)
    draws = draws.to(points.device)
    chosen = torch.empty(clusters, dtype=torch.int64, device=points.device)
    last = len(points) - 1
    chosen[0] = (draws[0, 0] * len(points)).long().clamp_(max=last)
    transposed = points.T
    first = points[chosen[0]]
    remaining = torch.addmv(squares + first.square().sum(), points, first, alpha=-2).clamp_(min=0)
    for step in range(1, clusters):
        cumulative = remaining.double().cumsum(dim=0)
        candidates = torch.searchsorted(cumulative, draws[step] * cumulative[-1]).clamp_(max=last)
        left = torch.addmm(squares, points[candidates], transposed, alpha=-2)
        left += squares[candidates].unsqueeze(1)
        left = torch.minimum(left.clamp_(min=0), remaining)
        best = left.sum(dim=1).argmin()
        chosen[step] = candidates[best]
        remaining = left[best]
    return chosen
