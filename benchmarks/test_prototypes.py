"""The ops of the prototype detectors against the plain PyTorch that computes the same."""

from __future__ import annotations

import time
from typing import Any

import faiss
import pytest
import torch
from test_score import bare, loader
from torch import Tensor, nn
from torch.nn import functional

import grood_fast as gf
from grood_fast import ops
from grood_fast.evaluation.networks import efficientnet_lite0, resnet18

GRADIENT = "prototype_gradient, against cdist + softmax"
NEAREST = "nearest_distance, exact, against torch.cdist + min and faiss IndexFlatL2"
CIRCUIT = "short_circuit_logits, against a masked linear layer"
WHOLE = "score() of a whole detector, against the bare forward loop"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cdist_softmax(features: Tensor, prototypes: Tensor) -> Tensor:
    """The closed form, with all prototypes in one matrix, that of the OOD class last."""
    weight = torch.softmax(-torch.cdist(features, prototypes), dim=1)[:, -1:]
    return weight * functional.normalize(features - prototypes[-1], dim=1)


@pytest.mark.parametrize("shape", [(256, 1000, 1280), (256, 10, 128)], ids=str)
def test_prototype_gradient(
    benchmark: Any, comparisons: Any, threads: int, shape: tuple[int, int, int]
) -> None:
    batch, classes, columns = shape
    features = normal(batch, columns).relu()
    prototypes = normal(classes + 1, columns, seed=1).relu()
    point = prototypes[-1].contiguous()
    offsets = prototypes[:-1] - point
    norms = offsets.norm(dim=1)

    def ours() -> Tensor:
        return ops.prototype_gradient(features, point, offsets, offset_norms=norms)[0]

    torch.testing.assert_close(ours(), cdist_softmax(features, prototypes), rtol=1e-3, atol=1e-6)
    comparisons.timed(
        benchmark,
        GRADIENT,
        f"(B, C, D) = {shape}, {threads} thread(s)",
        ours,
        {
            "cdist + softmax": lambda: cdist_softmax(features, prototypes),
            "the product of features and offsets alone": lambda: features @ offsets.T,
        },
        bar=2.0,
    )


def spread(rows: Tensor, decades: float, seed: int) -> Tensor:
    """Lengths over some orders of magnitude, as gradients with respect to a prototype have."""
    generator = torch.Generator().manual_seed(seed)
    exponents = decades * torch.rand(len(rows), 1, generator=generator)
    return functional.normalize(rows, dim=1) * 10**-exponents


@pytest.mark.parametrize("decades", [None, 8.0], ids=["features", "gradients"])
@pytest.mark.parametrize(
    "shape", [(32, 50_000, 1280), (256, 50_000, 1280), (256, 50_000, 128)], ids=str
)
def test_nearest_distance(
    benchmark: Any,
    comparisons: Any,
    threads: int,
    shape: tuple[int, int, int],
    decades: float | None,
) -> None:
    batch, rows, columns = shape
    queries, bank = normal(batch, columns).relu(), normal(rows, columns, seed=1).relu()
    if decades is not None:
        queries, bank = spread(queries, decades, 2), spread(bank, decades, 3)
    norms, order = bank.norm(dim=1).sort()
    bank = bank[order].contiguous()
    index = faiss.IndexFlatL2(columns)
    index.add(bank.numpy())
    faiss.omp_set_num_threads(threads)
    distances = ops.nearest_distance(queries, bank, bank_norms=norms)[0]
    exact = torch.cdist(queries[:16].double(), bank.double()).amin(dim=1)
    torch.testing.assert_close(distances[:16].double(), exact, rtol=1e-5, atol=0)
    kind = "features" if decades is None else f"lengths over {decades:g} decades"
    calls = {
        "torch.cdist + min": lambda: torch.cdist(queries, bank).amin(dim=1),
        "faiss, exact": lambda: index.search(queries.numpy(), 1),
    }
    comparisons.timed(
        benchmark,
        NEAREST,
        f"(B, N, D) = {shape}, {kind}, {threads} thread(s)",
        lambda: ops.nearest_distance(queries, bank, bank_norms=norms),
        # The bar is for the first: the best of the two.
        dict(sorted(calls.items(), key=lambda pair: _seconds(pair[1]))),
        bar=1.0,
        seconds=4,
    )


@pytest.mark.parametrize("share", [0.05, 0.1])
@pytest.mark.parametrize("shape", [(256, 1000, 1280), (256, 10, 128)], ids=str)
def test_short_circuit_logits(
    benchmark: Any, comparisons: Any, threads: int, shape: tuple[int, int, int], share: float
) -> None:
    batch, classes, columns = shape
    features, weight = normal(batch, columns).relu(), normal(classes, columns, seed=1)
    bias, weight_t = normal(classes, seed=2), weight.T.contiguous()
    logits = functional.linear(features, weight, bias)
    masks = weight.abs().topk(int(share * columns), dim=1).indices
    keep = torch.ones_like(weight).scatter_(1, masks, 0.0)
    predicted = logits.argmax(dim=1)

    def ours() -> Tensor:
        return ops.short_circuit_logits(logits, features, weight_t, masks[predicted])

    def masked() -> Tensor:
        return functional.linear(features * keep[predicted], weight, bias)

    torch.testing.assert_close(ours(), masked(), rtol=1e-3, atol=1e-3)
    comparisons.timed(
        benchmark,
        CIRCUIT,
        f"(B, C, D) = {shape}, {share:.0%} removed, {threads} thread(s)",
        ours,
        {"masked linear layer": masked},
        bar=1.0,
    )


def grood_with_a_bank(model: nn.Module, images: Tensor, rows: int) -> gf.Detector:
    """GROOD fitted to a few images, with as many gradients in its bank as a large reference gives:
    those of features drawn about the images' own."""
    with torch.no_grad():
        batches = [(some, model(some).argmax(dim=1)) for some in images.split(32)]
    detector = gf.GROOD("prototype_mean").fit(model, batches, progress=False)
    seen: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    features = seen[0][torch.arange(rows) % len(images)]
    features = (features * (1 + 0.3 * normal(rows, features.shape[1], seed=5))).relu()
    score = detector.score_function
    score.begin(None)  # type: ignore[arg-type]
    for indices in torch.arange(rows).split(4096):
        z = detector.representation._gradient(features[indices])
        score.absorb(z, None, indices)
    score.finish()
    return detector


def test_grood_from_end_to_end(benchmark: Any, comparisons: Any) -> None:
    model = efficientnet_lite0().eval()
    data = loader((3, 224, 224), 32, 4)
    detector = grood_with_a_bank(model, torch.cat([images for (images,) in data]), 50_000)
    comparisons.timed(
        benchmark,
        WHOLE,
        "grood, EfficientNet-lite0, batch 32, bank 50,000 x 1280",
        lambda: gf.score(model, data, detector, progress=False),
        {"bare forward loop": lambda: bare(model, data)},
        bar=1.05,
        lower=True,
        seconds=25,
    )


CIRCUITS: dict[str, tuple[Any, tuple[int, ...], int, str | None, float | None]] = {
    "gsc on the head, EfficientNet-lite0": (efficientnet_lite0, (3, 224, 224), 32, "head", 1.03),
    "gsc behind the last stage but one, ResNet-18": (resnet18, (3, 32, 32), 64, None, None),
}


@pytest.mark.parametrize("case", CIRCUITS)
def test_gsc_from_end_to_end(benchmark: Any, comparisons: Any, case: str) -> None:
    make, shape, batch, layer, bar = CIRCUITS[case]
    model = make().eval()
    data = loader(shape, batch, 4)
    detector = gf.GSC(layer)
    comparisons.timed(
        benchmark,
        WHOLE,
        f"{case}, batch {batch}",
        lambda: gf.score(model, data, detector, progress=False),
        {"bare forward loop": lambda: bare(model, data)},
        bar=bar,
        lower=True,
        seconds=20,
    )


def _seconds(call: Any) -> float:
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
