"""Does GReg help? Fine-tuning with outliers on Fashion-MNIST, every method with the same budget.

Each cell is one short training from a cached classifier, its own process, one JSON file:

    python benchmarks/greg_study.py next     # compute the next missing cell; exit status 3: none
    python benchmarks/greg_study.py table    # the tables, from what is there
    make greg-study                          # all of it

Arms: cross-entropy alone; outlier exposure, energy fine-tuning and GReg with random outliers;
energy fine-tuning and GReg with GReg+'s clustered two-way sampling; and energy fine-tuning and GReg
with 200 outliers in all. Every step takes 32 ID samples and 64 outliers (cross-entropy: none), the
clustered arms choose these from 192 candidates in 32 clusters, as GReg+ does at that batch size.

Hyper-parameters: for each arm, the trial of highest mean AUROC on validation outliers (made from
training images, of kinds that are not trained on), among three trials on the classifier that lacks
the classes of the first pair. Trial 0 has the published weights; the others are drawn from the
arm's ranges with the same random numbers for every arm. The arms with few outliers take those of
the arms with all. Test sets are looked at by the final cells alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

import grood_fast as gf
from grood_fast.classifier import Classifier
from grood_fast.detectors import detector, score_together
from grood_fast.evaluation.datasets import (
    Splits,
    auxiliary_outliers,
    far_ood,
    fashion_mnist,
    validation_outliers,
)
from grood_fast.evaluation.metrics import auroc, fpr_at_95_id_recall, fpr_at_95_ood_recall
from grood_fast.evaluation.networks import Recipe, trained_network
from grood_fast.persistence import atomic_write
from grood_fast.progress import progress
from grood_fast.signals import stream
from grood_fast.training import Margins, train

OUT = Path("out/greg_study")

PAIRS = ((2, 4), (0, 6))
SEEDS = (0, 1, 2)
TRIALS = 3
STEPS = 300
BATCH = 32
FEW = 200
FAR_SAMPLES = 2_500
NOISE = 0.3  # standard deviations of the pixels
ATTACK = 0.1  # the same
PERTURBED = 1_000

ARMS: dict[str, dict[str, Any]] = {
    "ce": {"recipe": "ce"},
    "oe": {"recipe": "oe"},
    "energy": {"recipe": "energy"},
    "greg": {"recipe": "greg"},
    "energy, clustered": {"recipe": "energy", "sampling": "two_way"},
    "greg+": {"recipe": "greg", "sampling": "two_way"},
    "energy, few": {"recipe": "energy"},
    "greg, few": {"recipe": "greg"},
}
TUNED_AS = {"energy, few": "energy", "greg, few": "greg"}
WEIGHTS = {"oe": (0.1, 2.0), "energy": (0.02, 0.5), "greg": (0.02, 0.5)}
PUBLISHED = {"oe": 0.5, "energy": 0.1, "greg": 0.1}
LEARNING_RATES = (1e-3, 3e-2)
GRADIENT_WEIGHTS = (0.3, 100.0)
WIDENINGS = (0.0, 2.0, 5.0)


@dataclass(frozen=True)
class Cell:
    """One training: an arm at a trial's hyper-parameters; ``trial`` None: at the chosen ones."""

    arm: str
    pair: tuple[int, int]
    seed: int
    trial: int | None

    @property
    def path(self) -> Path:
        kind = "final" if self.trial is None else f"trial{self.trial}"
        arm = self.arm.replace(", ", "-")
        return OUT / f"{kind}_{arm}_{'-'.join(map(str, self.pair))}_seed{self.seed}.json"


def cells() -> Iterator[Cell]:
    """All of them, in the order in which they can be computed."""
    for trial in range(TRIALS):
        for arm in ARMS:
            if arm not in TUNED_AS:
                yield Cell(arm, PAIRS[0], SEEDS[0], trial)
    for pair in PAIRS:
        for seed in SEEDS:
            for arm in ARMS:
                yield Cell(arm, pair, seed, None)


def hyper_parameters(arm: str, trial: int) -> dict[str, Any]:
    """Of one trial; "widening" is how far the margins lie outside the medians of the start."""
    random = np.random.RandomState(trial)
    rate, weight, gradient = random.uniform(size=3)
    widening = WIDENINGS[random.randint(len(WIDENINGS))]
    kind = ARMS[arm]["recipe"]
    if trial == 0:
        chosen = {"learning_rate": 1e-2, "widening": 0.0, "outlier_weight": PUBLISHED.get(kind, 0)}
        gradient_weight = 1.0
    else:
        low, high = WEIGHTS.get(kind, (1.0, 1.0))
        chosen = {
            "learning_rate": _between(*LEARNING_RATES, rate),
            "widening": widening,
            "outlier_weight": _between(low, high, weight),
        }
        gradient_weight = _between(*GRADIENT_WEIGHTS, gradient)
    if kind == "greg":
        chosen["regularizer"] = {"weight": gradient_weight}
    if kind == "ce":
        del chosen["outlier_weight"]
    return chosen


def _between(low: float, high: float, share: float) -> float:
    """Log-uniform, with three digits."""
    return float(f"{low * (high / low) ** share:.3g}")


def chosen_trial(arm: str) -> int:
    """Of highest AUROC on the validation outliers."""
    arm = TUNED_AS.get(arm, arm)
    results = [_read(Cell(arm, PAIRS[0], SEEDS[0], trial)) for trial in range(TRIALS)]
    return max(range(TRIALS), key=lambda trial: results[trial]["validation"]["auroc"])


def compute(cell: Cell) -> dict[str, Any]:
    trial = chosen_trial(cell.arm) if cell.trial is None else cell.trial
    settings = hyper_parameters(cell.arm, trial)
    splits = fashion_mnist().held_out(cell.pair)
    network = trained_network(Recipe(cell.pair, cell.seed), progress=False)
    images = splits.train.tensors[0]
    outliers: Dataset[Any] = ConcatDataset(auxiliary_outliers(images).values())
    if "few" in cell.arm:
        order = np.random.RandomState(cell.seed).permutation(len(outliers))[:FEW]  # type: ignore[arg-type]
        outliers = Subset(outliers, order.tolist())
    validation = validation_outliers(images)
    changes = {**ARMS[cell.arm], **settings}
    widening, recipe = changes.pop("widening"), changes.pop("recipe")
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            network.model,
            DataLoader(splits.train, BATCH, shuffle=True, drop_last=True),
            DataLoader(outliers, 256, shuffle=True),
            recipe=recipe,
            margins=_margins(network.model, images, outliers, widening),
            steps=STEPS,
            outlier_ratio=2.0,
            seed=cell.seed,
            id_validation=_loader(splits.validation),
            ood_validation={name: _loader(data) for name, data in validation.items()},
            validate_every=STEPS // 3,
            folder=folder,
            progress=False,
            **changes,
        )
        log = np.genfromtxt(Path(folder) / "log.csv", delimiter=",", names=True)
    values: dict[str, Any] = {
        "trial": trial,
        "settings": settings,
        "margins": [result.margins.inside, result.margins.outside],
        "before": result.validations[0],
        "validation": result.best,
        "met_in": float(np.mean(log["met_in"])),
        "met_out": float(np.mean(log["met_out"])),
        "step_seconds": float(np.median(log["seconds"])),
    }
    if cell.trial is None:
        values["test"] = tested(network.model, splits)
    return values


def _margins(model: nn.Module, images: Tensor, outliers: Dataset[Any], widening: float) -> Margins:
    """The median energies of 1,000 ID training images and of every 14th outlier, moved apart."""
    spread = torch.stack([outliers[i][0] for i in range(0, len(outliers), 14)])  # type: ignore[arg-type]
    medians = [
        gf.score(model, part.split(500), progress=False).median().item()
        for part in (images[:1_000], spread)
    ]
    inside, outside = sorted(medians)
    return Margins(inside - widening, outside + widening)


def tested(model: nn.Module, splits: Splits) -> dict[str, Any]:
    """Everything about the test sets."""
    classifier = Classifier(model)
    detectors = {name: detector(name) for name in ("energy", "msp")}

    def scored(data: Dataset[Any]) -> Any:
        with progress(False):
            return score_together(classifier, detectors, _loader(data))

    sets = {"near": splits.near_ood}
    sets |= {name: Subset(d, range(min(FAR_SAMPLES, len(d)))) for name, d in far_ood().items()}
    inside = scored(splits.test)
    right = (inside.predictions == inside.labels).double().mean().item()
    values: dict[str, Any] = {"accuracy": right}
    for name, data in sets.items():
        outside = scored(data)
        for score in detectors:
            pair = inside[score].numpy(), outside[score].numpy()
            values[f"{score}/{name}"] = {
                "auroc": auroc(*pair),
                "fpr_at_95_ood_recall": fpr_at_95_ood_recall(*pair),
                "fpr_at_95_id_recall": fpr_at_95_id_recall(*pair),
            }
    values["robustness"] = robustness(model, splits)
    return values


def robustness(model: nn.Module, splits: Splits) -> dict[str, float]:
    """Of the energy: its slope, and the near AUROC when inputs are disturbed a little."""
    inside = splits.test.tensors[0][:PERTURBED]
    outside = splits.near_ood.tensors[0][:PERTURBED]
    generator = torch.Generator().manual_seed(0)

    def energies(x: Tensor) -> Tensor:
        with closing(stream(Classifier(model), x.split(500), frozenset())) as passed:
            return torch.cat([-torch.logsumexp(signals.logits, dim=1) for signals in passed])

    def slopes(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(-torch.logsumexp(model(x), dim=1).sum(), x)
        return gradient

    gradients = [torch.cat([slopes(p) for p in x.split(500)]) for x in (inside, outside)]
    noisy = [x + NOISE * torch.randn(x.shape, generator=generator) for x in (inside, outside)]
    # The worst for the detector: ID samples made to look OOD, and outliers to look ID.
    attacked = [inside + ATTACK * gradients[0].sign(), outside - ATTACK * gradients[1].sign()]

    def area(pair: list[Tensor]) -> float:
        return auroc(*(energies(x).numpy() for x in pair))

    return {
        "slope_in": gradients[0].flatten(1).norm(dim=1).mean().item(),
        "slope_near": gradients[1].flatten(1).norm(dim=1).mean().item(),
        "energy_spread": energies(inside).std().item(),
        "auroc": area([inside, outside]),
        "auroc_noise": area(noisy),
        "auroc_attack": area(attacked),
    }


def _loader(data: Dataset[Any]) -> DataLoader[Any]:
    return DataLoader(data, 500)


@cache
def _read(cell: Cell) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(cell.path.read_text())
    return values


def compute_next() -> bool:
    """Compute the first missing cell and write it; False if none is missing."""
    for cell in cells():
        if not cell.path.is_file():
            values = compute(cell)
            with atomic_write(cell.path) as temporary:
                temporary.write_text(json.dumps(values, indent=1))
            return True
    return False


def tables() -> str:
    """What is there, as Markdown."""
    lines = ["### Validation AUROC of the trials (mean over three kinds, in %)", ""]
    lines += ["| arm | " + " | ".join(f"trial {t}" for t in range(TRIALS)) + " | chosen |"]
    lines += ["|---|" + "---:|" * TRIALS + "---|"]
    for arm in ARMS:
        paths = [Cell(arm, PAIRS[0], SEEDS[0], trial) for trial in range(TRIALS)]
        if arm in TUNED_AS or not all(cell.path.is_file() for cell in paths):
            continue
        areas = [100 * _read(cell)["validation"]["auroc"] for cell in paths]
        settings = hyper_parameters(arm, chosen_trial(arm))
        lines.append(
            f"| {arm} | " + " | ".join(f"{a:.2f}" for a in areas) + f" | {json.dumps(settings)} |"
        )
    for pair in PAIRS:
        lines += ["", *_final_table(pair)]
    return "\n".join(lines)


def _final_table(pair: tuple[int, int]) -> list[str]:
    header = (
        "arm", "seeds", "accuracy", "near AUROC", "near FPR95 (OOD recall)",
        "near FPR95 (ID recall)", "far AUROC", "far FPR95 (OOD recall)", "far FPR95 (ID recall)",
        "slope, ID", "near AUROC", "with noise", "under attack",
    )  # fmt: skip
    lines = [f"### Without the classes {pair[0]} and {pair[1]}", "", "| " + " | ".join(header)]
    lines[-1] += " |"
    lines.append("|---|" + "---:|" * (len(header) - 1))
    for arm, settings in ARMS.items():
        found = [Cell(arm, pair, seed, None) for seed in SEEDS]
        tests = [_read(cell)["test"] for cell in found if cell.path.is_file()]
        if not tests:
            continue
        score = "msp" if settings["recipe"] == "oe" else "energy"

        def far(test: dict[str, Any], metric: str, score: str = score) -> float:
            names = [key for key in test if key.startswith(f"{score}/") and "near" not in key]
            return statistics.mean(test[name][metric] for name in names)

        def near(test: dict[str, Any], metric: str, score: str = score) -> float:
            value: float = test[f"{score}/near"][metric]
            return value

        metrics = ("auroc", "fpr_at_95_ood_recall", "fpr_at_95_id_recall")
        columns = [[100 * test["accuracy"] for test in tests]]
        columns += [[100 * near(test, metric) for test in tests] for metric in metrics]
        columns += [[100 * far(test, metric) for test in tests] for metric in metrics]
        texts = [_with_interval(column) for column in columns]
        robust = [test["robustness"] for test in tests]
        texts.append(f"{statistics.mean(r['slope_in'] for r in robust):.3f}")
        texts += [
            _with_interval([100 * r[name] for r in robust])
            for name in ("auroc", "auroc_noise", "auroc_attack")
        ]
        lines.append(f"| {arm} | {len(tests)} | " + " | ".join(texts) + " |")
    return lines


def _with_interval(values: list[float]) -> str:
    """The mean, and with three seeds half its 95 % interval by Student's t."""
    mean = statistics.mean(values)
    if len(values) < 3:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {4.303 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["next", "table", "left"])
    what = parser.parse_args().what
    if what == "table":
        print(tables())
    elif what == "left":
        print(sum(not cell.path.is_file() for cell in cells()), "cells left")
    elif not compute_next():
        sys.exit(3)


if __name__ == "__main__":
    main()
