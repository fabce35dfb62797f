"""The main job against the bare forward pass: time, memory, and bfloat16."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparisons import Comparison
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import grood_fast as gf
from grood_fast.environment import environment
from grood_fast.evaluation.datasets import far_ood, fashion_mnist
from grood_fast.evaluation.metrics import auroc
from grood_fast.evaluation.networks import (
    Recipe,
    efficientnet_lite0,
    resnet18,
    small_residual_network,
    trained_network,
)

SIX = ["msp", "maxlogit", "energy", "gen", "gradnorm", "exgrad"]
SCORE = "score() with six detectors (msp, maxlogit, energy, gen, gradnorm, exgrad)"
MEMORY = "peak memory of a process that scores with six detectors"
BF16 = 'score(precision="bf16"), energy'
BF16_AUROC = 'AUROC with precision="bf16" less that with fp32, Fashion-MNIST without two classes'

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, float]] = {
    "EfficientNet-lite0, 224 px, batch 32": (efficientnet_lite0, (3, 224, 224), 32, 1.03),
    "small Fashion-MNIST net, batch 256": (small_residual_network, (1, 28, 28), 256, 1.10),
}

BF16_CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, float | None]] = {
    "ResNet-18, 32 px, batch 128": (resnet18, (3, 32, 32), 128, 0.35),
    "EfficientNet-lite0, 224 px, batch 32": (efficientnet_lite0, (3, 224, 224), 32, None),
}

BF16_AUROC_RECIPES = {
    "small net": Recipe((2, 4)),
    "ResNet-18": Recipe((2, 4), epochs=2, architecture="resnet18"),
}


def loader(shape: tuple[int, ...], batch: int, batches: int) -> DataLoader[Any]:
    images = torch.randn(batch * batches, *shape, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images), batch)


def bare(model: nn.Module, data: DataLoader[Any]) -> None:
    with torch.no_grad():
        for (images,) in data:
            model(images)


@pytest.mark.parametrize("case", CASES)
def test_score(benchmark: Any, comparisons: Any, case: str) -> None:
    make, shape, batch, bar = CASES[case]
    model = make().eval()
    # Long enough that what is done once a call, finding the head with two samples, is small.
    data = loader(shape, batch, 8 if batch == 32 else 40)
    comparisons.timed(
        benchmark,
        SCORE,
        case,
        lambda: gf.score(model, data, SIX, progress=False),
        {"bare forward loop": lambda: bare(model, data)},
        bar=bar,
        lower=True,
        seconds=30,
    )


MEASURE = """
import sys
import torch
from test_score import CASES, SIX, bare, loader
import grood_fast as gf, grood_fast.evaluation.benchmark
case, what, batches = sys.argv[1], sys.argv[2], int(sys.argv[3])
make, shape, batch, _ = CASES[case]
torch.manual_seed(0)
model = make().eval()
class Fresh:
    def __iter__(self):
        for _ in range(batches):
            yield (torch.randn(batch, *shape),)
bare(model, Fresh()) if what == "bare" else gf.score(model, Fresh(), SIX, progress=False)
# Not getrusage: it remembers the process that started this one.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_kilobytes(case: str, what: str, batches: int) -> int:
    folders = [os.path.dirname(__file__), *sys.path]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, case, what, str(batches)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout.split()[-1])


@pytest.mark.parametrize("case", CASES)
def test_peak_memory(benchmark: Any, comparisons: Any, case: str) -> None:
    few, many = (3, 12) if "Efficient" in case else (20, 200)
    runs = {
        (what, count): statistics.median(peak_kilobytes(case, what, count) for _ in range(3))
        for what, count in (("bare", many), ("score", few), ("score", many))
    }
    benchmark.pedantic(lambda: None, rounds=1)
    for what, ratio, bar in (
        (f"against the bare loop, {many} batches", runs["score", many] / runs["bare", many], 1.05),
        (f"{many} batches against {few}", runs["score", many] / runs["score", few], 1.05),
    ):
        comparisons.add(
            benchmark,
            Comparison(MEMORY, case, what, ratio, (ratio, ratio), bar, lower=True),
        )


@pytest.mark.parametrize("case", BF16_CASES)
def test_bf16(benchmark: Any, comparisons: Any, case: str) -> None:
    make, shape, batch, bar = BF16_CASES[case]
    model = make().eval()
    data = loader(shape, batch, 2)
    comparisons.timed(
        benchmark,
        BF16,
        case,
        lambda: gf.score(model, data, precision="bf16", progress=False),
        {"eager fp32 forward": lambda: bare(model, data)},
        bar=bar if environment()["amx_bf16"] else None,
        lower=True,
        seconds=20,
    )


@pytest.mark.skipif(not environment()["amx_bf16"], reason="trains a ResNet-18 in bfloat16")
@pytest.mark.parametrize("network", BF16_AUROC_RECIPES)
def test_bf16_auroc(benchmark: Any, comparisons: Any, network: str) -> None:
    recipe = BF16_AUROC_RECIPES[network]
    model = trained_network(recipe).model
    splits = fashion_mnist().held_out(recipe.held_out)
    sets = {"near": splits.near_ood, **far_ood()}
    detectors = ["energy", "gradnorm"]

    def scores(data: TensorDataset, precision: Any) -> Any:
        batches = DataLoader(data, 500)
        return gf.score(model, batches, detectors, precision=precision, progress=False)

    inside = {precision: scores(splits.test, precision) for precision in ("fp32", "bf16")}
    benchmark.pedantic(lambda: None, rounds=1)
    for name, data in sets.items():
        outside = {precision: scores(data, precision) for precision in ("fp32", "bf16")}
        for detector in detectors:
            full, half = (
                auroc(inside[precision][detector].numpy(), outside[precision][detector].numpy())
                for precision in ("fp32", "bf16")
            )
            comparisons.add(
                benchmark,
                Comparison(
                    BF16_AUROC,
                    f"{network}: {detector}, {name}",
                    f"fp32: {full:.4f}",
                    abs(half - full),
                    (half - full, half - full),
                    0.002,
                    lower=True,
                ),
            )
