"""Scores on low-dimensional last-layer gradients beside the same scores on the features.

``python benchmarks/gradient_subspace_table.py [held-out classes] [seed]`` prints a Markdown table:
all detectors are fitted in one pass over Fashion-MNIST's training split and scored in one pass a
set. Settings are the package's defaults with 128 components: of 32, 64 and 128 the best for each of
the scores on outliers made of validation images (``grood_fast.select``; classes 2 and 4, seed 0).
"""

from __future__ import annotations

import sys
from typing import Any

from torch.utils.data import DataLoader

import grood_fast as gf
from grood_fast.evaluation.datasets import far_ood, fashion_mnist
from grood_fast.evaluation.networks import Recipe, trained_network


def detectors() -> list[gf.Detector]:
    """Every score on the same coordinates, which are learned and computed once."""
    scores = {
        "ldg knn": gf.KNN(k=5),
        "ldg mahalanobis": gf.Mahalanobis(),
        "ldg gmm": gf.ClassGMM(),
        "ldg probe + energy": gf.LinearProbe("energy"),
    }
    made = []
    for name, score in scores.items():
        detector = gf.LowDimensionalGradient(128, score=score)
        detector.name = name
        made.append(detector)
    return [*made, gf.GradPCA()]


def main() -> None:
    arguments = sys.argv[1:]
    held_out = tuple(int(label) for label in (arguments or ["2,4"])[0].split(","))
    seed = int(arguments[1]) if len(arguments) > 1 else 0

    def loader(data: Any) -> DataLoader[Any]:
        return DataLoader(data, 500)

    splits = fashion_mnist().held_out(held_out)
    report = gf.evaluate(
        trained_network(Recipe(held_out, seed)).model,
        detectors(),
        id=loader(splits.test),
        ood={
            "near": {"held-out": loader(splits.near_ood)},
            "far": {name: loader(data) for name, data in far_ood().items()},
        },
        reference=loader(splits.train),
    )
    print(report.to_markdown())


if __name__ == "__main__":
    main()
