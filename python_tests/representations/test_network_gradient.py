"""Representations of the whole network's gradient, against formed gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from network.helpers import autograd_gradients
from torch import Tensor, nn
from toys import Condition, Counting, failing

import grood_fast as gf
from grood_fast.classifier import Classifier
from grood_fast.detectors import Fitting
from grood_fast.errors import InputError
from grood_fast.network import NetworkNeed
from grood_fast.objectives import Objective
from grood_fast.representations import NetworkGradientNorms, ProjectedNetworkGradient
from grood_fast.signals import stream


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.Sequential(
                nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
                nn.Sequential(nn.Conv2d(6, 24, 3, stride=2), nn.GroupNorm(2, 24), nn.ReLU()),
            )
            self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(dim=(2, 3)))


def loader(count: int, seed: int = 0, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, 7, 7, generator=generator)
    return list(zip(x.split(size), (torch.arange(count) % 3).split(size), strict=True))


def truth(model: nn.Module, batches: list[tuple[Tensor, Tensor]], objective: str) -> Tensor:
    """(N, P) gradients of all parameters, formed."""
    gradients = autograd_gradients(
        model, torch.cat([x for x, _ in batches]), Objective.of(objective)
    )
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


def represent(representation: Any, model: nn.Module, batches: Any) -> list[Any]:
    return [representation(s) for s in stream(Classifier(model), batches, representation.needs)]


@pytest.mark.parametrize("objective", ["confounding", "uniform"])
def test_norms(objective: str) -> None:
    model, batches = Net(), loader(20)
    gradients = autograd_gradients(
        model, torch.cat([x for x, _ in batches]), Objective.of(objective)
    )
    squares = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients.values()], dim=1)
    sums = torch.stack([g.flatten(1).abs().sum(dim=1) for g in gradients.values()], dim=1)
    close: Any = {"rtol": 1e-3, "atol": 1e-6}
    l2 = represent(NetworkGradientNorms(objective), model, batches)
    torch.testing.assert_close(torch.cat([z.values for z in l2]), squares.sqrt(), **close)
    assert l2[0].objective == Objective.of(objective)
    l1 = represent(NetworkGradientNorms(objective, norm="l1"), model, batches)
    torch.testing.assert_close(torch.cat([z.values for z in l1]), sums, **close)
    log = torch.cat(represent(NetworkGradientNorms(objective, output="log"), model, batches))
    torch.testing.assert_close(log, (squares + 1e-12).log(), rtol=1e-3, atol=1e-3)
    both = represent(NetworkGradientNorms(objective, output="log_and_features"), model, batches)
    assert both[0].shape == (16, squares.shape[1] + 24)
    torch.testing.assert_close(torch.cat(both)[:, : log.shape[1]], log)


@pytest.mark.parametrize(
    ("parameters", "count"), [("head", 2), ("last_block", 6), (("blocks.1.0",), 2)]
)
def test_norms_of_some_parameters(parameters: Any, count: int) -> None:
    (z, *_) = represent(NetworkGradientNorms(parameters=parameters), Net(), loader(8))
    assert z.values.shape == (8, count)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_complete_directions_give_the_principal_components(whiten: bool, centred: bool) -> None:
    """With as many directions as dimensions nothing is lost: distances are those of exact PCA."""
    model, batches = Net(), loader(48)
    parameters = ["head", "blocks.0.1"]
    representation = ProjectedNetworkGradient(
        "energy", parameters, 5, numbers=10_000, small_numbers=10_000, centred=centred,
        whiten=whiten,
    )  # fmt: skip
    detector = gf.Detector(gf.KNN(k=1), representation)
    detector.fit(model, batches, progress=False)
    gradients = autograd_gradients(model, torch.cat([x for x, _ in batches]))
    chosen = [g for n, g in gradients.items() if n.startswith(tuple(parameters))]
    rows = torch.cat([g.flatten(1) for g in chosen], dim=1).double()
    z = torch.cat(represent(detector.representation, model, batches)).double()
    if whiten:  # what is divided by depends on the directions: only the order is comparable
        spread = z.var(dim=0) if centred else z.square().mean(dim=0)
        assert z.shape == (48, 5)
        assert bool((spread.diff() < 0).all())
        return
    centre = rows.mean(dim=0) if centred else 0
    _, _, vectors = torch.linalg.svd(rows - centre, full_matrices=False)
    expected = (rows - centre) @ vectors[:5].T
    torch.testing.assert_close(
        torch.cdist(z, z), torch.cdist(expected, expected), rtol=1e-3, atol=1e-4
    )
    facts = detector.card["representation"]
    assert facts["share_seen_by_directions"] == pytest.approx(1, abs=1e-4)
    assert facts["parameters"] == 4


def test_class_averages() -> None:
    model, batches = Net(), loader(48)
    representation = ProjectedNetworkGradient(
        "energy", ["head.weight"], kind="class_averages", numbers=10_000, n_components=None
    )
    detector = gf.Detector(gf.KNN(k=1), representation)
    detector.fit(model, batches, progress=False)
    rows = autograd_gradients(model, torch.cat([x for x, _ in batches]))["head.weight"].flatten(1)
    labels = torch.cat([y for _, y in batches])
    means = torch.stack([rows[labels == c].mean(dim=0) for c in range(3)]) - rows.mean(dim=0)
    expected = (rows - rows.mean(dim=0)) @ torch.nn.functional.normalize(means, dim=1).T
    z = torch.cat(represent(detector.representation, model, batches))
    torch.testing.assert_close(z, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("directions", ["eigenvectors", "random"])
@pytest.mark.parametrize("parameters", ["head", "last_block", "all", ["blocks.0"]])
def test_detector_from_a_loader_that_is_read_once(
    directions: Any, parameters: Any, tmp_path: Path
) -> None:
    model = Net()
    before = Condition(model)
    options = {} if parameters == "head" else {"directions": directions, "warm_up": 20}
    detector = gf.LowDimensionalGradient(4, parameters=parameters, **options)
    reference = Counting(iter(loader(60)))
    scores = gf.score(model, loader(20, 1), detector=detector, reference=reference, progress=False)
    assert reference.iterations == 1
    assert detector.card["reference_samples"] == 60
    before.assert_same(model)
    detector.save(tmp_path / "ldg.safetensors")
    loaded = gf.load(tmp_path / "ldg.safetensors", model)
    assert torch.equal(loaded.score(loader(20, 1), progress=False), scores)
    assert loaded.representation.config() == detector.representation.config()
    again = gf.LowDimensionalGradient(4, parameters=parameters, **options)
    again.fit(model, loader(60), progress=False)
    assert torch.equal(again.score(loader(20, 1), progress=False), scores)


def fitted(detector: gf.Detector, model: nn.Module, batches: Any, directions: Any) -> Fitting:
    classifier = Classifier(model)
    fitting: Fitting | None = None
    for signals in stream(classifier, batches, detector.needs):
        if fitting is None:
            fitting = Fitting([detector], classifier)
            fitting.representations[0].use_directions(directions)  # type: ignore[attr-defined]
        fitting.absorb(signals)
    assert fitting is not None
    return fitting


def test_merging_needs_equal_directions() -> None:
    model, batches = Net(), loader(64)
    detector = gf.LowDimensionalGradient(4, parameters="all")
    detector.fit(model, batches, progress=False)
    expected = detector.score(loader(20, 1), progress=False)
    directions = detector.representation.shared_directions  # type: ignore[attr-defined]
    # Indices go through all shards as if it were one pass.
    whole = fitted(detector, model, batches, directions)
    first, second = (
        fitted(detector, model, part, directions) for part in (batches[:2], batches[2:])
    )
    assert whole.count == first.count + second.count
    first.merge(second)
    first.finish()
    first.install(Classifier(model))
    merged = detector.score(loader(20, 1), progress=False)
    # The shards' indices overlap, so the reservoir holds the same rows in another order.
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-4)
    other = gf.LowDimensionalGradient(4, parameters="all", seed=1)
    other.fit(model, batches, progress=False)
    foreign = fitted(
        detector,
        model,
        batches,
        other.representation.shared_directions,  # type: ignore
    )
    with pytest.raises(InputError, match="different directions"):
        fitted(detector, model, batches, directions).merge(foreign)


def test_a_failing_reference_changes_nothing() -> None:
    model = Net()
    detector = gf.LowDimensionalGradient(4, parameters="all", warm_up=20)
    detector.fit(model, loader(60), progress=False)
    expected = detector.score(loader(20, 1), progress=False)
    before = Condition(model)
    for after in (1, 3):
        with pytest.raises(RuntimeError, match="broken"):
            detector.fit(
                model, failing(loader(60, 2), RuntimeError("broken"), after), progress=False
            )
        assert torch.equal(detector.score(loader(20, 1), progress=False), expected)
    before.assert_same(model)


def test_beside_other_detectors_in_one_pass() -> None:
    model = Net()
    together = gf.score(
        model,
        loader(20, 1),
        detector=["energy", "knn", gf.LowDimensionalGradient(4, parameters="all")],
        reference=loader(60),
        progress=False,
    )
    for name in ("energy", "knn"):
        alone = gf.score(model, loader(20, 1), detector=name, reference=loader(60), progress=False)
        torch.testing.assert_close(together[name], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"parameters": "some"},
        {"parameters": []},
        {"kind": "average"},
        {"directions": "eigen"},
        {"numbers": 0},
        {"n_components": 0},
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ProjectedNetworkGradient(**options)
    with pytest.raises(InputError):
        NetworkGradientNorms(norm="l3")  # type: ignore[arg-type]
    with pytest.raises(InputError):
        NetworkGradientNorms(output="all")  # type: ignore[arg-type]


def test_needs_differ_by_what_is_asked_for() -> None:
    assert NetworkGradientNorms().needs == {NetworkNeed()}
    assert "features" in NetworkGradientNorms(output="log_and_features").needs
