"""A step of GReg against a step of energy fine-tuning, and what GReg+'s sampling adds to it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

from grood_fast import ops
from grood_fast.batches import Batch, parse_batch
from grood_fast.classifier import Classifier, Precision
from grood_fast.evaluation.networks import resnet18, small_residual_network
from grood_fast.ops import reference
from grood_fast.training.feeds import Feed
from grood_fast.training.kmeans import kmeans
from grood_fast.training.objectives import GradientRegularizer, Margins, TrainingObjective
from grood_fast.training.randomness import RandomStreams
from grood_fast.training.sampler import OutlierSampler

STEP = "a training step with the gradient term, against energy fine-tuning on the same batch"
SAMPLING = "choosing a step's outliers, as a share of the whole GReg+ step"
KMEANS = "k-means, 64 clusters: inertia no worse than 1.02 times scikit-learn's"
EXTREMES = "cluster_extremes: each cluster's members of lowest and highest energy"

MARGINS = Margins(-2.5, -2.5)  # a fresh network's median: about half of the samples keep them
FORMS: dict[str, tuple[GradientRegularizer, float | None]] = {
    "input gradient": (GradientRegularizer(), 2.5),
    "finite difference": (GradientRegularizer(form="finite_difference"), 2.1),
    "input gradient, frozen statistics": (GradientRegularizer(batch_norm="frozen"), None),
    "features": (GradientRegularizer(form="features"), None),
}


def network(name: str, layout: torch.memory_format) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    if name == "small":
        return small_residual_network().to(memory_format=layout).train(), (1, 28, 28)
    return resnet18().to(memory_format=layout).train(), (3, 32, 32)


def stepping(
    model: nn.Module, objective: TrainingObjective, inliers: Batch, outliers: Callable[[], Batch]
) -> Callable[[], None]:
    """One step of training as the trainer makes it."""
    model = copy.deepcopy(model)
    classifier = Classifier(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 1e-4, momentum=0.9, nesterov=True)

    def step() -> None:
        optimizer.zero_grad()
        objective(classifier, inliers, outliers()).total.backward(inputs=parameters)
        optimizer.step()

    return step


def plain_double_backward(model: nn.Module, inliers: Batch, outliers: Batch) -> Callable[[], None]:
    """The GReg step with PyTorch's own second derivatives."""
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 1e-4, momentum=0.9, nesterov=True)
    count, labels = inliers.size, inliers.labels
    both = torch.cat([inliers.args[0], outliers.args[0]])

    def step() -> None:
        optimizer.zero_grad()
        x = both.detach().requires_grad_()
        logits = model(x)
        energies = reference.energy(logits)
        above = F.relu(energies[:count] - MARGINS.inside)
        below = F.relu(MARGINS.outside - energies[count:])
        scalar = F.relu(energies[count:] - MARGINS.outside).mean()
        scalar = scalar - F.relu(MARGINS.inside - energies[:count]).mean()
        (gradient,) = torch.autograd.grad(scalar, x, create_graph=True)
        norms = (gradient.flatten(1).square().sum(dim=1) + 1e-12).sqrt()
        loss = F.cross_entropy(logits[:count], labels) + norms.mean()
        loss = loss + 0.1 * (above.square().mean() + below.square().mean())
        loss.backward(inputs=parameters)
        optimizer.step()

    return step


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("name", "size"), [("small", 128), ("resnet18", 16)])
def test_step(
    benchmark: Any, comparisons: Any, name: str, size: int, layout: torch.memory_format
) -> None:
    model, shape = network(name, layout)
    x = torch.randn(2 * size, *shape).to(memory_format=layout)
    inliers, outliers = parse_batch((x[:size], torch.arange(size) % 10)), parse_batch(x[size:])
    energy = stepping(model, TrainingObjective(margins=MARGINS), inliers, lambda: outliers)
    calls = {
        form: stepping(
            model,
            TrainingObjective(margins=MARGINS, regularizer=regularizer),
            inliers,
            lambda: outliers,
        )
        for form, (regularizer, _) in FORMS.items()
    }
    calls["PyTorch's own second derivatives"] = plain_double_backward(model, inliers, outliers)
    what = f"{name}, {size} + {size} samples, {str(layout).removeprefix('torch.')}"
    for form, call in calls.items():
        comparisons.timed(
            benchmark if form == "input gradient" else _Unrecorded(),
            STEP,
            f"{what}: {form}",
            call,
            {"energy fine-tuning": energy},
            bar=FORMS[form][1] if form in FORMS else None,
            lower=True,
            seconds=3,
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sampling(benchmark: Any, comparisons: Any, precision: Precision) -> None:
    model, shape = network("small", torch.channels_last)
    inliers = parse_batch((torch.randn(64, *shape), torch.arange(64) % 10))
    candidates = Feed(list(torch.randn(4096, *shape).split(256)), RandomStreams.seeded(0))
    sampler, chooser = OutlierSampler(), Classifier(model, precision=precision)

    def sample() -> Batch:
        with torch.no_grad():  # a step has changed the weights
            next(model.parameters()).add_(1e-6)
        return sampler.sample(chooser, candidates, 128, 384, 64)

    step = stepping(
        model,
        TrainingObjective(margins=MARGINS, regularizer=GradientRegularizer()),
        inliers,
        sample,
    )
    comparisons.timed(
        benchmark,
        SAMPLING,
        f"64 ID samples, 128 outliers of 384 candidates, 64 clusters, {precision}",
        sample,
        {"the whole step": step},
        bar=0.15,
        lower=True,
        seconds=8,
    )


def features(count: int, dimensions: int) -> Tensor:
    """L2-normalised and non-negative, around ten directions, as after a ReLU."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(10, dimensions, generator=generator)
    chosen = means[torch.randint(0, 10, (count,), generator=generator)]
    return F.normalize(F.relu(chosen + torch.randn(count, dimensions, generator=generator)))


@pytest.mark.parametrize(("count", "dimensions"), [(384, 128), (2048, 512)])
def test_kmeans(
    benchmark: Any, comparisons: Any, threads: int, count: int, dimensions: int
) -> None:
    points = features(count, dimensions)
    array = points.numpy()
    seed = iter(range(1_000_000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [KMeans(64, n_init=3, random_state=s).fit(array).inertia_ for s in range(5)]
        ours = [
            kmeans(points, 64, torch.Generator().manual_seed(s)).inertia.item() for s in range(5)
        ]
        assert max(o / t for o, t in zip(ours, theirs, strict=True)) <= 1.02
        comparisons.timed(
            benchmark,
            KMEANS,
            f"{count} x {dimensions}, {threads} thread(s)",
            lambda: kmeans(points, 64, torch.Generator().manual_seed(next(seed))),
            {
                "scikit-learn, n_init=3": lambda: KMeans(64, n_init=3, random_state=next(seed)).fit(
                    array
                ),
                "scikit-learn, n_init=1": lambda: KMeans(64, n_init=1, random_state=next(seed)).fit(
                    array
                ),
            },
            bar=5.0,
            seconds=4,
        )


def python_loop(
    assignments: Tensor, energies: Tensor, clusters: int
) -> tuple[list[int], list[int]]:
    lowest, highest = [], []
    for cluster in range(clusters):
        members = (assignments == cluster).nonzero().squeeze(1)
        if len(members):
            own = energies[members]
            lowest.append(int(members[own.argmin()]))
            highest.append(int(members[own.argmax()]))
    return lowest, highest


@pytest.mark.parametrize(("count", "clusters"), [(384, 64), (65536, 1024)])
def test_cluster_extremes(benchmark: Any, comparisons: Any, count: int, clusters: int) -> None:
    generator = torch.Generator().manual_seed(0)
    assignments = torch.randint(0, clusters, (count,), generator=generator)
    energies = torch.randn(count, generator=generator)
    arguments = assignments, energies, clusters
    expected = ops.cluster_extremes(*arguments)
    found = reference.cluster_extremes(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    comparisons.timed(
        benchmark,
        EXTREMES,
        f"{count} samples, {clusters} clusters",
        lambda: ops.cluster_extremes(*arguments),
        {
            "scatter-reduce": lambda: reference.cluster_extremes(*arguments),
            "a Python loop": lambda: python_loop(*arguments),
        },
        bar=1.0,
    )


class _Unrecorded:
    """In the place of pytest-benchmark's fixture, which serves one comparison a test."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, *_: Any, **__: Any) -> None:
        """Nothing is recorded."""
