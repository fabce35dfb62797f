"""Which detector? Every one of ours and of pytorch-ood's on Fashion-MNIST, near and far, paired.

Five pairs of classes held out of training, three seeds each; all detectors see the same network,
the same reference and the same sets. Each network is a cell, one JSON file:

    python benchmarks/detector_study.py next     # the next missing cell; exit status 3: none
    python benchmarks/detector_study.py table    # the tables, from what is there

Near OOD are the held-out classes, far OOD four other data sets. Settings are chosen on outliers
made from validation images of the training classes, never on these: where a detector has variants,
its row "chosen" takes in every cell the variant of highest mean AUROC on the validation outliers.
The others stand at their defaults. "fused(without x)" leaves a part of the fusion out.

What is between the detectors is a mean of paired differences over the cells, with a 95 % interval
by resampling pairs of classes, and seeds within them: classes, not test images, are what varies.

Attacked or corrupted test images enter through ``SHIFTED``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import grood_fast as gf
from grood_fast.classifier import Classifier
from grood_fast.detectors import Detector, fit_together, score_together
from grood_fast.evaluation.benchmark import orderable_scores
from grood_fast.evaluation.datasets import far_ood, fashion_mnist, validation_outliers
from grood_fast.evaluation.metrics import auroc, fpr_at_95_ood_recall
from grood_fast.evaluation.networks import HELD_OUT_PAIRS, SEEDS, Recipe, trained_network
from grood_fast.persistence import atomic_write
from grood_fast.signals import stream

sys.path.insert(0, str(Path(__file__).parents[1] / "python_tests"))
from peers import import_pytorch_ood

OUT = Path("out/detector_study")
BATCH = 250
FAR_SAMPLES = 2500
"""At most so many of each far set: enough for AUROC to a quarter of a point."""

Shift = Callable[[nn.Module, TensorDataset], Mapping[str, Dataset[Any]]]
SHIFTED: list[Shift] = []
"""What makes attacked or corrupted test images of a network: name → data set."""

MAIN = "fused"


def ours() -> dict[str, Detector]:
    """Registered detectors at their defaults, and variants to choose from."""
    made = {name: gf.detector(name) for name in gf.DETECTORS}
    made["knn(5, standardised)"] = Detector(gf.KNN(5, standardize=True))
    for layer in ("head", None):
        for score in ("energy", "energy_drop"):
            for by in ("gradient", "contribution"):
                for share in (0.05, 0.2):
                    place = layer or "last stage"
                    name = f"gsc({place}, {score}, {by}, {share})"
                    made[name] = gf.GSC(layer, score, by=by, share=share)  # type: ignore[arg-type]
    for options in (
        *({"source": source} for source in ("prototype_mean", "noise")),
        *({"score": score} for score in ("norm", "cosine")),
        *({"k": 10}, {"squared": True}, {"temperature": 0.3}, {"layer": "stem"}),
    ):
        described = ", ".join(f"{key}={value}" for key, value in options.items())
        made[f"grood({described})"] = gf.GROOD(**options)  # type: ignore[arg-type]
    made["density without gradients"] = gf.JointDensity(gradients=None)
    made |= {f"fused({name})": fused for name, fused in fusions().items()}
    for name, detector in made.items():
        detector.name = name
    return made


POOL: dict[str, Callable[[], Any]] = {
    "rmd": gf.RelativeMahalanobis,
    "energy": gf.Energy,
    "density": gf.JointDensity,
    "activations": lambda: gf.JointDensity(gradients=None),
    "knn": lambda: gf.KNN(5, standardize=True),
    "vim": gf.ViM,
    "ldg": lambda: gf.detector("ldg"),
    "grood": lambda: gf.GROOD(score="cosine"),
    "gsc": lambda: gf.GSC(score="energy_drop", by="contribution"),
}
"""What fusions are made of: they share their fitted parts, and differ in weights alone."""


def fusions() -> dict[str, Detector]:
    """The default without each of its parts and with others, combined in other ways."""
    default = ("rmd", "energy", "density")
    members = [make() for make in POOL.values()]

    def of(*parts: str, **options: Any) -> Detector:
        weights = [float(name in parts) for name in POOL]
        return gf.ensemble(members, weights=weights, **options)

    without = {f"without {n}": of(*(m for m in default if m != n)) for n in default}
    more = {f"with {n}": of(*default, n) for n in ("knn", "vim", "ldg", "grood", "gsc")}
    return {
        **without,
        "without gradients": of("rmd", "energy", "activations"),
        **more,
        "knn, density": of("knn", "density"),
        "grood, density": of("grood", "density"),
        "rmd, grood, density": of("rmd", "grood", "density"),
        "rmd, knn, energy, grood, gsc, density": of(*default, "knn", "grood", "gsc"),
        "all": of(*POOL),
        "stouffer": of(*default, combine="stouffer"),
        "stouffer with knn, grood": of(*default, "knn", "grood", combine="stouffer"),
        "max": gf.Fused(combine="max"),
        "fisher": gf.Fused(combine="fisher"),
    }


def theirs(head: nn.Linear, features: Tensor, labels: Tensor) -> dict[str, Any]:
    """pytorch-ood's detectors on logits and penultimate features, fitted: name → what scores."""
    import_pytorch_ood()
    from pytorch_ood import detector as peers

    weight, bias = head.weight.detach(), head.bias.detach()
    on_logits = {
        name: getattr(peers, name)(None)
        for name in ("MaxSoftmax", "MaxLogit", "EnergyBased", "GEN", "Entropy")
    }
    on_features = {
        "KNN": peers.KNN(None),
        "Mahalanobis": peers.Mahalanobis(None),
        "RMD": peers.RMD(None),
        "GMM": peers.GMM(None),
        "ViM": peers.ViM(None, d=features.shape[1] // 2, w=weight, b=bias),
        "DICE": peers.DICE(None, w=weight, b=bias, p=0.7),
        "NNGuide": peers.NNGuide(None, head),
        "SHE": peers.SHE(None, head),
        "fDBD": peers.fDBD(None, head),
        "NCI": peers.NCI(None, head),
    }
    for one in on_features.values():
        one.fit_features(features, labels)
    identity, on_maps = nn.Identity(), nn.Sequential(nn.Flatten(), head)
    clip = float(torch.quantile(features.flatten()[:1_000_000], 0.9))
    shaping = {
        "ReAct": peers.ReAct(identity, on_maps, threshold=clip),
        "ASH": peers.ASH(identity, on_maps),
        "SCALE": peers.SCALE(identity, on_maps),
    }
    return {
        **{name: lambda f, h, one=one: one.predict_logits(f) for name, one in on_logits.items()},
        **{n: lambda f, h, one=one: one.predict_features(h) for n, one in on_features.items()},
        **{
            name: lambda f, h, one=one: one.predict(h[:, :, None, None])
            for name, one in shaping.items()
        },
    }


def outputs(model: nn.Module, data: Dataset[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, penultimate features and labels of a data set."""
    parts = [
        (signals.logits, signals.features.clone(), signals.labels)
        for signals in stream(Classifier(model), DataLoader(data, BATCH), {"features"})
    ]
    logits, features, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return logits, features, labels


def compute(pair: tuple[int, int], seed: int) -> dict[str, Any]:
    """One cell: detector → set → AUROC and FPR95, and the accuracy."""
    network = trained_network(Recipe(pair, seed), progress=False)
    model, splits = network.model, fashion_mnist().held_out(pair)
    assert splits.near_ood is not None
    test: dict[str, Dataset[Any]] = {"near": splits.near_ood}
    for name, data in far_ood().items():
        step = max(1, len(data) // FAR_SAMPLES)
        test[f"far/{name}"] = Subset(data, range(0, len(data), step))
    for shift in SHIFTED:
        test |= {f"shifted/{name}": data for name, data in shift(model, splits.test).items()}
    images = splits.validation.tensors[0]
    choice = {f"choice/{k}": data for k, data in validation_outliers(images).items()}
    sets = {"id": splits.test, "choice/id": splits.validation, **test, **choice}

    mine = ours()
    classifier = Classifier(model)
    loader = DataLoader(splits.train, BATCH)
    fit_together(classifier, list(mine.values()), loader, progress=False)
    _, features, labels = outputs(model, splits.train)
    peers = theirs(model.head, features, labels)
    scores: dict[str, dict[str, Any]] = {}
    for name, data in sets.items():
        table = score_together(classifier, mine, DataLoader(data, BATCH), progress=False)
        found = {detector: orderable_scores(table[detector]) for detector in mine}
        logits, features, _ = outputs(model, data)
        with torch.no_grad():
            for peer, score in peers.items():
                values = score(logits, features).detach().float().numpy().copy()
                found[f"pytorch-ood {peer}"] = np.nan_to_num(values, nan=np.inf)
        scores[name] = found
    results: dict[str, dict[str, dict[str, float]]] = {}
    for detector in scores["id"]:
        results[detector] = {}
        for name in (*test, *choice):
            inside = scores["choice/id" if name in choice else "id"][detector]
            pair_of_scores = inside, scores[name][detector]
            results[detector][name] = {
                "auroc": auroc(*pair_of_scores),
                "fpr95": fpr_at_95_ood_recall(*pair_of_scores),
            }
    return {"accuracy": network.test_accuracy, "results": results}


def path(pair: tuple[int, int], seed: int) -> Path:
    return OUT / f"{pair[0]}-{pair[1]}-{seed}.json"


def next_cell() -> int:
    for seed in SEEDS:
        for pair in HELD_OUT_PAIRS:
            if not path(pair, seed).exists():
                cell = compute(pair, seed)
                with atomic_write(path(pair, seed)) as temporary:
                    temporary.write_text(json.dumps(cell))
                print(f"{path(pair, seed)}: accuracy {cell['accuracy']:.4f}")
                return 0
    return 3


# --- tables ---------------------------------------------------------------------------------------


def summary(result: Mapping[str, Mapping[str, float]], metric: str = "auroc") -> dict[str, float]:
    """near, far (the mean over its sets), their mean, and the mean on validation outliers."""
    groups: dict[str, list[float]] = {}
    for name, values in result.items():
        groups.setdefault(name.partition("/")[0], []).append(100 * values[metric])
    means = {group: statistics.fmean(values) for group, values in groups.items()}
    return {**means, "mean": (means["near"] + means["far"]) / 2}


def with_chosen(cell: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Summaries by detector; a detector with variants also as "chosen" on validation outliers."""
    found = {name: summary(result) for name, result in cell["results"].items()}
    for family in ("gsc", "grood", MAIN):
        variants = [n for n in found if n == family or n.startswith(f"{family}(")]
        best = max(variants, key=lambda name: found[name]["choice"])
        found[f"{family} chosen"] = found[best]
    return found


def interval(by_pair: Mapping[Any, list[float]], resamples: int = 4000) -> tuple[float, float]:
    """95 % by resampling pairs of classes, and seeds within them."""
    random = np.random.default_rng(0)
    pairs = [np.array(values) for values in by_pair.values()]
    means = []
    for _ in range(resamples):
        drawn = (pairs[i] for i in random.integers(0, len(pairs), len(pairs)))
        means.append(np.mean([random.choice(v, len(v)).mean() for v in drawn]))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def table() -> Iterator[str]:
    """Markdown, the best mean first."""
    cells = {
        (pair, seed): json.loads(path(pair, seed).read_text())
        for pair in HELD_OUT_PAIRS
        for seed in SEEDS
        if path(pair, seed).exists()
    }
    if not cells:
        yield "no cells yet: python benchmarks/detector_study.py next"
        return
    rows = {key: with_chosen(cell) for key, cell in cells.items()}
    names = list(next(iter(rows.values())))
    pairs = list(dict.fromkeys(pair for pair, _ in rows))

    def by_pair(name: str, key: str) -> dict[Any, list[float]]:
        return {p: [row[name][key] for (q, _), row in rows.items() if q == p] for p in pairs}

    def mean(name: str, key: str) -> float:
        return statistics.fmean(statistics.fmean(v) for v in by_pair(name, key).values())

    single = [n for n in names if not n.startswith(MAIN) and "chosen" not in n]
    best_of_pair = {p: max(statistics.fmean(by_pair(n, "mean")[p]) for n in single) for p in pairs}
    yield f"{len(rows)} networks, {len(pairs)} pairs of classes. AUROC in percent.\n"
    header = ["detector", "near", "far", "mean", f"{MAIN} less it", "worst pair", "validation"]
    yield "| " + " | ".join(header) + " |"
    yield "|---|" + "---:|" * (len(header) - 1)
    for name in sorted(names, key=lambda n: -mean(n, "mean")):
        mine, other = by_pair(MAIN, "mean"), by_pair(name, "mean")
        paired = {p: [a - b for a, b in zip(mine[p], other[p], strict=True)] for p in pairs}
        difference = statistics.fmean(statistics.fmean(v) for v in paired.values())
        low, high = interval(paired)
        worst = min(statistics.fmean(other[p]) - best_of_pair[p] for p in pairs)
        yield (
            "| "
            + " | ".join(
                [
                    name,
                    *(f"{mean(name, key):.1f}" for key in ("near", "far", "mean")),
                    f"{difference:+.1f} ({low:+.1f} to {high:+.1f})",
                    f"{worst:+.1f}",
                    f"{mean(name, 'choice'):.1f}",
                ]
            )
            + " |"
        )
    yield "\nworst pair: less the best single detector of that pair, where that is worst."


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["next", "table"])
    if parser.parse_args().what == "next":
        return next_cell()
    print("\n".join(table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
