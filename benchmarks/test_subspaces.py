"""Low-dimensional gradients: the projection alone, its forms, and whole passes with it.

Run as a program it prints the memory that one of the two needs: one process, one measurement.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import Comparison
from torch import Tensor, nn

import grood_fast as gf
from grood_fast import ops
from grood_fast.classifier import Classifier
from grood_fast.detectors import Fitting
from grood_fast.evaluation.networks import efficientnet_lite0, small_residual_network
from grood_fast.signals import stream
from grood_fast.subspaces import choose, costs, forms, project
from grood_fast.subspaces.builder import FACTORED_NUMBERS

TIME = "dual_project, against the three products in PyTorch"
MEMORY = "dual_project: peak memory above the operands, against the three products in PyTorch"

FORMS = "projection of one batch by its factored form"
AUTO = 'form="auto" against the fastest of the forms'
SCORE = "score() with ldg"
FIT = "fit() of ldg on 50,000 samples, without the decomposition at its end"

SHAPES = [(256, 1000, 2048, 8192, 128), (256, 10, 128, 8192, 64)]  # (B, C, D, N, K)


def three_products(
    delta: Tensor,
    features: Tensor,
    anchor_delta: Tensor,
    anchor_features: Tensor,
    coefficients: Tensor,
) -> Tensor:
    return ((delta @ anchor_delta.T) * (features @ anchor_features.T)) @ coefficients


def three_products_in_place(
    delta: Tensor,
    features: Tensor,
    anchor_delta: Tensor,
    anchor_features: Tensor,
    coefficients: Tensor,
) -> Tensor:
    return (delta @ anchor_delta.T).mul_(features @ anchor_features.T) @ coefficients


CALLS: dict[str, Callable[..., Tensor]] = {
    "ours": ops.dual_project,
    "three products": three_products,
    "three products, the second in place": three_products_in_place,
}


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    batch, classes, features, anchors, components = shape
    generator = torch.Generator().manual_seed(0)
    sizes = (
        (batch, classes),
        (batch, features),
        (anchors, classes),
        (anchors, features),
        (anchors, components),
    )
    return tuple(torch.randn(size, generator=generator) for size in sizes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dual_project(
    benchmark: Any, comparisons: Any, threads: int, shape: tuple[int, ...]
) -> None:
    operands = inputs(shape)
    expected = three_products(*operands)
    torch.testing.assert_close(
        ops.dual_project(*operands), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )
    ours, *baselines = CALLS
    comparisons.timed(
        benchmark,
        TIME,
        f"(B, C, D, N, K) = {shape}, {threads} thread(s)",
        lambda: CALLS[ours](*operands),
        {name: lambda call=CALLS[name]: call(*operands) for name in baselines},
        bar=1.0,
        seconds=6,
    )


def status(key: str) -> int:
    """Kilobytes of this process: VmRSS, what it has now; VmHWM, the most it had."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key)))


def measured_kilobytes(name: str, shape: tuple[int, ...]) -> int:
    """The peak of one call above what the process has with the operands in it."""
    torch.set_num_threads(1)
    operands = inputs(shape)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = status("VmRSS")
    CALLS[name](*operands)
    return status("VmHWM") - before


def peak_kilobytes(name: str, shape: tuple[int, ...]) -> int:
    """:func:`measured_kilobytes` in a process of its own."""
    result = subprocess.run(
        [sys.executable, __file__, name, *map(str, shape)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_peak_memory(benchmark: Any, comparisons: Any, shape: tuple[int, ...]) -> None:
    peaks = {
        name: statistics.median(peak_kilobytes(name, shape) for _ in range(3)) for name in CALLS
    }
    benchmark.pedantic(lambda: None, rounds=1)
    ours = peaks.pop("ours")
    for name, theirs in peaks.items():
        comparisons.add(
            benchmark,
            Comparison(
                MEMORY,
                f"(B, C, D, N, K) = {shape}: {ours / 1024:.1f} MiB",
                f"{name}: {theirs / 1024:.1f} MiB",
                ours / theirs,
                (ours / theirs, ours / theirs),
                1.0,
                lower=True,
            ),
        )


def made_forms(
    anchors: int, classes: int, features: int, components: int, ranks: tuple[int, int]
) -> dict[str, dict[str, Tensor]]:
    """Every form of these sizes that takes at most 2 GiB, of random numbers."""
    m, n = ranks
    offset = torch.zeros(components)
    made = {
        "dual": forms.dual(
            torch.randn(anchors, classes),
            torch.randn(anchors, features),
            torch.randn(anchors, components),
            offset,
        ),
        "factored": forms.factored(
            torch.randn(classes, m), torch.randn(features, n), torch.randn(components, m, n), offset
        ),
    }
    if 4 * components * classes * features <= 2 << 30:
        made["dense"] = forms.dense(torch.randn(components, classes, features), offset)
    return made


def test_forms(benchmark: Any, comparisons: Any) -> None:
    batch, classes, features, anchors, components = SHAPES[0]
    made = made_forms(anchors, classes, features, components, (32, 32))
    delta, h = torch.randn(batch, classes), torch.randn(batch, features)

    def with_formed_gradients() -> Tensor:
        """Sixteen at a time: all of them would be 2 GB."""
        basis = made["dense"]["basis"].flatten(1).T
        pieces = zip(torch.split(delta, 16), torch.split(h, 16), strict=True)
        return torch.cat([torch.einsum("bc,bd->bcd", d, x).flatten(1) @ basis for d, x in pieces])

    comparisons.timed(
        benchmark,
        FORMS,
        f"(B, C, D, N, K) = {SHAPES[0]}, ranks 32 x 32",
        lambda: project(made["factored"], delta, h),
        {
            "dual": lambda: project(made["dual"], delta, h),
            "dense": lambda: project(made["dense"], delta, h),
            "formed gradients": with_formed_gradients,
        },
        bar=10,
        seconds=20,
    )


GRID = [
    (classes, features, anchors, components)
    for classes, features in ((10, 128), (10, 512), (10, 2048), (100, 512), (1000, 1280))
    for anchors, components in ((1024, 16), (1024, 128), (8192, 64), (8192, 256))
]


def test_auto(benchmark: Any, comparisons: Any) -> None:
    """One line: the worst of the grid. Of the forms that fit in 2 GiB, at their usual ranks."""
    worst, where = 0.0, ""
    for classes, features, anchors, components in GRID:
        m = min(classes, 32)
        ranks = m, min(features, max(FACTORED_NUMBERS, 8 * components) // m)
        made = made_forms(anchors, classes, features, components, ranks)
        factors = torch.randn(256, classes), torch.randn(256, features)
        chosen = choose(costs(anchors, classes, features, components, ranks))
        calls: dict[str, Callable[[], Tensor]] = {
            name: partial(project, form, *factors) for name, form in made.items()
        }
        times = median_seconds(calls)
        ratio = times[chosen] / min(times.values())
        if ratio > worst:
            worst = ratio
            where = f"(C, D, N, K) = {(classes, features, anchors, components)}: {chosen}"
    benchmark.pedantic(lambda: None, rounds=1)
    comparisons.add(
        benchmark,
        Comparison(
            AUTO, f"worst of {len(GRID)} shapes, {where}", "the fastest", worst, (worst, worst),
            1.3, lower=True,
        ),
    )  # fmt: skip


def median_seconds(calls: dict[str, Callable[[], Any]], seconds: float = 0.6) -> dict[str, float]:
    """Of calls that take turns, each at least 5 ms long by repetition."""
    inner = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        inner[name] = max(1, int(0.005 / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(inner[name]):
                call()
            times[name].append((time.perf_counter() - start) / inner[name])
    return {name: statistics.median(some) for name, some in times.items()}


PASSES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "EfficientNet-lite0, 224 px, batch 32, K = 128": (
        efficientnet_lite0, (3, 224, 224), 32, 128,
    ),
    "small Fashion-MNIST net, batch 256, K = 64": (small_residual_network, (1, 28, 28), 256, 64),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "form", "score", "bar"),
    [
        ("EfficientNet-lite0, 224 px, batch 32, K = 128", "dual", gf.KNN(k=5), 1.05),
        ("EfficientNet-lite0, 224 px, batch 32, K = 128", "factored", gf.KNN(k=5), 1.02),
        ("small Fashion-MNIST net, batch 256, K = 64", "auto", gf.KNN(k=5), 1.10),
        ("small Fashion-MNIST net, batch 256, K = 64", "auto", gf.Mahalanobis(), 1.10),
    ],
    ids=str,
)
def test_score_with_ldg(
    benchmark: Any, comparisons: Any, case: str, form: str, score: gf.Score, bar: float
) -> None:
    """What the 8,192 reference samples are does not matter to the time: they are random features
    and the logits that the head makes of them."""
    make, shape, batch, components = PASSES[case]
    model = make().eval()
    images = torch.randn(batch * 4, *shape, generator=torch.Generator().manual_seed(0))
    batches = list(torch.split(images, batch)) * (2 if batch == 32 else 10)
    detector = gf.LowDimensionalGradient(
        components, form=form, score=score.fresh(), max_samples=8192
    )
    classifier = Classifier(model)
    with closing(stream(classifier, batches, {"features"})) as passing:
        signals = next(passing)
        classifier.find_head(signals.batch)
    fitting = Fitting([detector], classifier)
    random = torch.Generator().manual_seed(0)
    for indices in torch.split(torch.arange(8192), batch):
        features = torch.rand(batch, classifier.num_features, generator=random)
        logits = torch.nn.functional.linear(features, classifier.weight, classifier.bias)
        labels = indices % classifier.num_classes
        fitting.absorb(
            replace(signals, logits=logits, penultimate=features, indices=indices, labels=labels)
        )
    fitting.finish()
    fitting.install(classifier)

    def bare() -> None:
        with torch.no_grad():
            for some in batches:
                model(some)

    comparisons.timed(
        benchmark,
        SCORE,
        f"{case}: {detector.card['representation']['form']} form, N = 8,192, {score.name}",
        lambda: gf.score(model, batches, detector, progress=False),
        {"bare forward loop": bare},
        bar=bar,
        lower=True,
        seconds=30,
    )


def test_fit(benchmark: Any, comparisons: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_residual_network().eval()
    random = torch.Generator().manual_seed(0)
    images = torch.randn(50_000, 1, 28, 28, generator=random)
    labels = torch.randint(0, 10, (50_000,), generator=random)
    batches = list(zip(torch.split(images, 256), torch.split(labels, 256), strict=True))
    decompositions: list[float] = []
    finish = Fitting.finish

    def timed_finish(fitting: Fitting) -> None:
        start = time.perf_counter()
        finish(fitting)
        decompositions.append(time.perf_counter() - start)

    monkeypatch.setattr(Fitting, "finish", timed_finish)
    ratios, passes = [], []
    for _ in range(5):
        start = time.perf_counter()
        with torch.no_grad():
            for some, _labels in batches:
                model(some)
        bare = time.perf_counter() - start
        start = time.perf_counter()
        gf.LowDimensionalGradient().fit(model, batches, progress=False)
        passes.append(time.perf_counter() - start - decompositions[-1])
        ratios.append(passes[-1] / bare)
    benchmark.pedantic(lambda: None, rounds=1)
    comparisons.add(
        benchmark,
        Comparison(
            FIT,
            f"small Fashion-MNIST net, batch 256, K = 64; then "
            f"{statistics.median(decompositions):.2f} s of decomposition, once",
            "bare forward loop",
            statistics.median(ratios),
            (min(ratios), max(ratios)),
            1.10,
            lower=True,
            ours=statistics.median(passes),
        ),
    )


if __name__ == "__main__":
    print(measured_kilobytes(sys.argv[1], tuple(int(size) for size in sys.argv[2:])))
