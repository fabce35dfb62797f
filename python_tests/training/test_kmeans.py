"""k-means against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor
from torch.testing import assert_close

from grood_fast.errors import InputError
from grood_fast.training.kmeans import kmeans


def features(count: int, dimensions: int, seed: int) -> Tensor:
    """L2-normalised and non-negative, around ten directions, as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(10, dimensions, generator=generator)
    chosen = means[torch.randint(0, 10, (count,), generator=generator)]
    return F.normalize(F.relu(chosen + torch.randn(count, dimensions, generator=generator)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("count", "dimensions"), [(384, 128), (2048, 512)])
def test_inertia_is_no_worse_than_scikit_learns_best_of_three(count: int, dimensions: int) -> None:
    for seed in range(3):
        points = features(count, dimensions, seed)
        theirs = KMeans(64, n_init=3, random_state=seed).fit(points.numpy()).inertia_
        assert kmeans(points, 64, seeded(seed)).inertia <= 1.02 * theirs


def test_it_ends_where_scikit_learn_stays() -> None:
    points = features(300, 16, 0).double()
    found = kmeans(points, 12, seeded(0))
    theirs = KMeans(12, n_init=1, init=found.centres.numpy(), tol=0).fit(points.numpy())
    assert theirs.n_iter_ <= 2
    assert np.array_equal(theirs.labels_, found.assignments.numpy())
    assert_close(found.inertia.item(), theirs.inertia_)


def test_well_separated_clusters_are_found() -> None:
    means = 100 * torch.eye(8)
    labels = torch.arange(80) % 8
    points = means[labels] + torch.randn(80, 8, generator=seeded(1)) + 1e3
    assignments = kmeans(points, 8, seeded(2)).assignments
    pairs = set(zip(labels.tolist(), assignments.tolist(), strict=True))
    assert len(pairs) == 8


def test_the_seed_decides() -> None:
    points = features(200, 16, 0)
    first, again, other = (kmeans(points, 20, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first.assignments, again.assignments)
    assert not torch.equal(first.assignments, other.assignments)


def test_as_many_clusters_as_points_and_fewer_different_points() -> None:
    points = features(9, 4, 0)
    assert kmeans(points, 9, seeded(0)).inertia < 1e-9
    same = points[:1].expand(9, 4)
    found = kmeans(same, 3, seeded(0))
    assert found.inertia < 1e-9
    assert found.centres.isfinite().all()


@pytest.mark.parametrize("clusters", [0, 4])
def test_refusals(clusters: int) -> None:
    with pytest.raises(InputError, match=r"shape \(3, 2\) and \d clusters"):
        kmeans(torch.zeros(3, 2), clusters, seeded(0))
