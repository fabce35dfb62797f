"""select() against choosing by hand, and what it must not look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import grood_fast as gf
from grood_fast.errors import InputError
from grood_fast.evaluation import selection
from grood_fast.evaluation.datasets import validation_outliers


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Smooth pictures of three kinds, so that shuffling blocks or pixels shows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    ramp = torch.linspace(-1, 1, 8)
    patterns = torch.stack([ramp.expand(8, 8), ramp.expand(8, 8).T, ramp.outer(ramp)])
    x = patterns[labels].unsqueeze(1) + 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    return x, labels


def loader(count: int, seed: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images(count, seed)), 32)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3))


def candidates() -> list[Any]:
    return ["msp", *gf.variants("ldg", n_components=[2, 6], score=[gf.KNN(k=3), gf.Mahalanobis()])]


def test_the_best_on_the_outliers_is_chosen_and_the_card_says_from_what(
    model: nn.Module, tmp_path: Path
) -> None:
    outside = {"a": loader(40, 5), "b": DataLoader(TensorDataset(torch.randn(30, 1, 8, 8)), 16)}
    winner = gf.select(
        model,
        candidates(),
        reference=loader(120, 0),
        validation=loader(60, 1),
        outliers=outside,
        progress=False,
    )
    card = winner.card["selection"]
    names = ["msp"] + [
        f"ldg(n_components={count}, score={score})"
        for count in (2, 6)
        for score in (repr(gf.KNN(k=3)), repr(gf.Mahalanobis()))
    ]
    assert list(card["candidates"]) == names
    assert card["outliers"] == ["a", "b"]
    assert card["validation_samples"] == 60
    means = {}
    for name, candidate in zip(names, candidates(), strict=True):
        values = []
        for data in outside.values():
            sides = [
                gf.score(model, some, candidate, reference=loader(120, 0), progress=False).numpy()
                for some in (loader(60, 1), data)
            ]
            truth = [0] * len(sides[0]) + [1] * len(sides[1])
            values.append(roc_auc_score(truth, [*sides[0], *sides[1]]))
        means[name] = sum(values) / 2
        assert card["candidates"][name]["mean"] == pytest.approx(means[name])
        assert card["candidates"][name]["a"] == pytest.approx(values[0])
    assert winner.name == card["chosen"] == max(means, key=lambda name: means[name])
    winner.save(tmp_path / "file")
    assert gf.load(tmp_path / "file", model).card["selection"] == card


def test_outliers_are_made_from_the_validation_images(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def spy(source: Tensor, count: int) -> Any:
        seen.append(source)
        return validation_outliers(source, 50)

    monkeypatch.setattr(selection, "validation_outliers", spy)
    winner = gf.select(
        model, candidates(), reference=loader(90, 0), validation=loader(60, 1), progress=False
    )
    assert torch.equal(seen[0], images(60, 1)[0])
    card = winner.card["selection"]
    assert card["outliers"] == ["shuffled_blocks", "averages", "permuted_pixels"]
    assert len(card["candidates"]) == 5
    scores = [candidate["permuted_pixels"] for candidate in card["candidates"].values()]
    assert max(scores) > 0.9, "else the outliers are no outliers"


def test_lower_is_better_for_false_positives(model: nn.Module) -> None:
    options: dict[str, Any] = {"reference": loader(90, 0), "validation": loader(60, 1)}
    card = gf.select(
        model, candidates(), metric="fpr_at_95_ood_recall", progress=False, **options
    ).card["selection"]
    means = {name: values["mean"] for name, values in card["candidates"].items()}
    assert means[card["chosen"]] == min(means.values()) < max(means.values())


def test_what_select_refuses(model: nn.Module) -> None:
    options: dict[str, Any] = {"reference": loader(90, 0), "validation": loader(60, 1)}
    with pytest.raises(InputError, match="no detector was named"):
        gf.select(model, [], **options)
    with pytest.raises(InputError, match="unknown metric 'accuracy'"):
        gf.select(model, ["msp"], metric="accuracy", **options)  # type: ignore[arg-type]
    vectors = [torch.randn(8, 64)]
    with pytest.raises(InputError, match=r"give outliers=\{name: loader\}"):
        gf.select(model, ["msp"], reference=vectors, validation=vectors)
    with pytest.raises(InputError, match="its options"):
        gf.variants("knn", neighbours=[3])
