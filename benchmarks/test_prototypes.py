"""The ops of the prototype detectors against the plain PyTorch that computes the same."""

from __future__ import annotations

import time
from typing import Any

import faiss
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from grood_fast import ops

GRADIENT = "prototype_gradient, against cdist + softmax"
NEAREST = "nearest_distance, exact, against torch.cdist + min and faiss IndexFlatL2"
CIRCUIT = "short_circuit_logits, against a masked linear layer"


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


def _seconds(call: Any) -> float:
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
