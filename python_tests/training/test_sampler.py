"""GReg+'s sampling against a plain implementation with scikit-learn."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn
from toys import Condition, Net, samples, truth

from grood_fast.batches import Batch
from grood_fast.classifier import Classifier
from grood_fast.errors import InputError
from grood_fast.training import sampler as module
from grood_fast.training.feeds import Feed
from grood_fast.training.kmeans import Clustering
from grood_fast.training.randomness import RandomStreams
from grood_fast.training.sampler import OutlierSampler

POOL, COUNT, CLUSTERS = 48, 16, 8


def plain(features: np.ndarray, energies: np.ndarray, two_way: bool) -> tuple[set[int], np.ndarray]:
    """What must be chosen, by scikit-learn and loops, and the assignment."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assignments = KMeans(CLUSTERS, n_init=3, random_state=0).fit(unit).labels_
    chosen = set()
    for cluster in range(CLUSTERS):
        members = np.flatnonzero(assignments == cluster)
        chosen.add(int(members[energies[members].argmin()]))
        if two_way:
            chosen.add(int(members[energies[members].argmax()]))
    return chosen, assignments


def candidates(x: Tensor) -> Feed:
    return Feed(list(x.split(7)), RandomStreams.seeded(0))


@pytest.mark.parametrize("strategy", ["clustered", "two_way"])
def test_against_scikit_learn(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net().train()
    x = samples(POOL)
    logits, features = truth(model, x)
    energies = -torch.logsumexp(logits, dim=1)
    required, assignments = plain(features.numpy(), energies.numpy(), strategy == "two_way")

    def same_assignment(points: Tensor, clusters: int, generator: torch.Generator) -> Clustering:
        assert torch.allclose(points, F.normalize(features), atol=1e-6)
        found = torch.from_numpy(assignments).long()
        return Clustering(found, points[:clusters], points.sum())

    monkeypatch.setattr(module, "kmeans", same_assignment)
    condition = Condition(model)
    batch = OutlierSampler(strategy).sample(Classifier(model), candidates(x), COUNT, POOL, CLUSTERS)
    condition.assert_same(model)
    (chosen,) = batch.args
    rows = {int((x == row).all(dim=1).nonzero()) for row in chosen}
    assert batch.size == len(rows) == COUNT
    assert required <= rows


@pytest.mark.parametrize("strategy", ["clustered", "two_way"])
def test_fewer_than_the_extremes_begins_with_the_lowest(strategy: str) -> None:
    energies, features = torch.randn(POOL), samples(POOL)
    few = OutlierSampler(strategy).choose(energies, features, CLUSTERS, CLUSTERS)
    lowest = OutlierSampler("clustered").choose(energies, features, COUNT, CLUSTERS)[:CLUSTERS]
    assert set(few.tolist()) == set(lowest.tolist())


def test_boundary_takes_the_lowest_energies() -> None:
    energies = torch.randn(POOL)
    energies[3] = torch.nan
    chosen = OutlierSampler("boundary").choose(energies, None, 5, CLUSTERS)
    assert set(chosen.tolist()) == set(energies.nan_to_num(9).argsort()[:5].tolist())


def test_random_takes_the_next_without_looking() -> None:
    x = samples(POOL)
    model = nn.Sequential(nn.Flatten())  # has no head, and is not called
    batch = OutlierSampler("random").sample(Classifier(model), candidates(x), COUNT, POOL, CLUSTERS)
    assert torch.equal(batch.args[0], x[:COUNT])


@pytest.mark.parametrize("strategy", ["clustered", "two_way"])
def test_singletons_empty_clusters_and_nan(strategy: str) -> None:
    features = torch.ones(6, 3)  # one point only: all clusters but one are empty
    features[5] = torch.nan
    energies = torch.tensor([0.0, -1.0, 2.0, 3.0, torch.nan, 1.0])
    chosen = OutlierSampler(strategy).choose(energies, features, 4, 3)
    assert len(set(chosen.tolist())) == 4
    assert 1 in chosen


def test_the_seed_decides_and_the_state_goes_on() -> None:
    energies, features = torch.randn(POOL), samples(POOL)

    def chosen(sampler: OutlierSampler) -> list[int]:
        return sampler.choose(energies, features, COUNT, CLUSTERS).tolist()

    one, same, other = OutlierSampler(seed=1), OutlierSampler(seed=1), OutlierSampler(seed=2)
    assert chosen(one) == chosen(same) != chosen(other)
    resumed = OutlierSampler(seed=9)
    resumed.restore(json.loads(json.dumps(one.state())))
    assert chosen(resumed) == chosen(one)


def test_mappings_are_sampled_as_well() -> None:
    x = samples(POOL)
    feed = Feed([{"x": part, "labels": torch.zeros(8)} for part in x.split(8)], RandomStreams())
    batch = OutlierSampler().sample(Classifier(Net()), feed, COUNT, POOL, CLUSTERS)
    assert isinstance(batch, Batch)
    assert batch.kwargs["x"].shape == (COUNT, 5)


def test_refusals() -> None:
    with pytest.raises(InputError, match="unknown sampling 'best'; known: 'random'"):
        OutlierSampler("best")
    with pytest.raises(InputError, match="16 outliers from a pool of 8"):
        OutlierSampler().sample(Classifier(Net()), candidates(samples(9)), 16, 8, 4)
