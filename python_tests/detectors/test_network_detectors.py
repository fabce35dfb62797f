"""Detectors on the whole network's gradient, against independent implementations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from network.helpers import autograd_gradients
from representations.test_network_gradient import Net, loader
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

import grood_fast as gf
from grood_fast.errors import InputError
from grood_fast.evaluation.supervised import OutlierClassifier, leave_one_out, oracle
from grood_fast.objectives import Objective


def inputs(batches: Any) -> torch.Tensor:
    return torch.cat([x for x, _ in batches])


def log_norms(batches: Any, objective: Objective) -> torch.Tensor:
    gradients = autograd_gradients(Net(), inputs(batches), objective).values()
    return torch.stack([(g.flatten(1).square().sum(dim=1) + 1e-12).log() for g in gradients], dim=1)


@pytest.mark.parametrize("label", [None, (1.0, 0.0, 1.0)])
def test_confounding_label_is_a_neighbour_search_on_log_norms(label: Any) -> None:
    scores = gf.score(
        Net(),
        loader(20, 1),
        detector=gf.ConfoundingLabel(label),
        reference=loader(60),
        progress=False,
    )
    objective = Objective("confounding", target=label)
    bank, queries = log_norms(loader(60), objective), log_norms(loader(20, 1), objective)
    mean, deviation = bank.mean(dim=0), bank.std(dim=0, correction=0)
    search = NearestNeighbors(n_neighbors=10).fit(((bank - mean) / deviation).numpy())
    expected = search.kneighbors(((queries - mean) / deviation).numpy())[0][:, 9]
    torch.testing.assert_close(
        torch.tensor(scores.tolist()), torch.tensor(expected).float(), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("score", [gf.KNN(k=5), gf.Mahalanobis(), gf.ClassGMM()], ids=str)
def test_confounding_label_with_other_scores(score: Any, features: bool, tmp_path: Path) -> None:
    model = Net()
    detector = gf.ConfoundingLabel(score=score, features=features).fit(
        model, loader(90), progress=False
    )
    scores = detector.score(loader(20, 1), progress=False)
    assert bool(scores.isfinite().all())
    detector.save(tmp_path / "confounding.safetensors")
    loaded = gf.load(tmp_path / "confounding.safetensors", model)
    assert torch.equal(loaded.score(loader(20, 1), progress=False), scores)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("parameters", ["all", "last_block"])
def test_gradnorm_of_many_parameters(norm: str, parameters: str) -> None:
    detector = gf.GradNorm(norm, parameters=parameters)
    scores = gf.score(Net(), loader(20, 1), detector=detector, progress=False)
    gradients = autograd_gradients(Net(), inputs(loader(20, 1)), Objective("uniform"))
    chosen = [
        g for n, g in gradients.items() if parameters == "all" or not n.startswith("blocks.0.")
    ]
    rows = torch.cat([g.flatten(1) for g in chosen], dim=1)
    expected = -rows.norm(p=1 if norm == "l1" else 2, dim=1)
    torch.testing.assert_close(torch.tensor(scores.tolist()), expected, rtol=1e-3, atol=1e-5)


def test_gradnorm_of_many_parameters_has_two_norms() -> None:
    with pytest.raises(InputError, match="l1"):
        gf.GradNorm("linf", parameters="all")


def clouds() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def cloud(count: int, shift: float) -> torch.Tensor:
        rows = torch.randn(count, 6, generator=generator)
        rows[:, 0] += shift
        return rows

    outliers = {"near": cloud(200, 2), "far": cloud(100, 4), "opposite": cloud(100, -4)}
    return cloud(600, 0), cloud(300, 0), outliers


def auroc(inlier: torch.Tensor, outlier: torch.Tensor) -> float:
    labels = [0] * len(inlier) + [1] * len(outlier)
    return float(roc_auc_score(labels, torch.cat([inlier, outlier]).tolist()))


def test_supervised_protocols_see_what_their_names_say() -> None:
    train, test, outliers = clouds()
    state = torch.get_rng_state()
    known = {name: auroc(*scores) for name, scores in oracle(train, test, outliers).items()}
    assert torch.equal(state, torch.get_rng_state())
    assert known["near"] > 0.85
    assert min(known["far"], known["opposite"]) > 0.98
    # Without "opposite" the classifier has only seen outliers on the other side.
    only = {name: outliers[name] for name in ("far", "opposite")}
    left_out = {name: auroc(*s) for name, s in leave_one_out(train, test, only).items()}
    assert max(left_out.values()) < 0.5
    shown = leave_one_out(train, test, {k: outliers[k] for k in ("near", "far")})
    assert auroc(*shown["far"]) > 0.95
    assert len(shown["far"][0]) == len(test)
    assert len(oracle(train, test, outliers)["near"][1]) == 100


def test_supervised_classifier_is_reproducible_and_checks_its_input() -> None:
    train, test, outliers = clouds()
    first, second, other = (
        OutlierClassifier(train, outliers["far"], seed)(test) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    with pytest.raises(InputError, match="two"):
        leave_one_out(train, test, {"far": outliers["far"]})
    with pytest.raises(InputError, match="at least one sample"):
        OutlierClassifier(train, outliers["far"][:0])
    with pytest.raises(InputError, match="columns"):
        OutlierClassifier(train, outliers["far"][:, :3])
