"""``cluster_extremes`` against a search of every cluster, and inside PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.helpers import DTYPES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from grood_fast import ops
from grood_fast.ops import reference

OP = torch.ops.grood_fast.cluster_extremes


def searched(assignments: Tensor, energies: Tensor, clusters: int) -> tuple[list[int], list[int]]:
    lowest, highest = [], []
    for cluster in range(clusters):
        members = [
            i for i in range(len(energies)) if assignments[i] == cluster and not energies[i].isnan()
        ]
        lowest.append(min(members, key=lambda i: (energies[i].item(), i), default=-1))
        highest.append(max(members, key=lambda i: (energies[i].item(), -i), default=-1))
    return lowest, highest


def inputs(samples: int, clusters: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Some clusters empty, many energies equal, some NaN."""
    generator = torch.Generator().manual_seed(samples)
    assignments = torch.randint(0, max(clusters // 2, 1), (samples,), generator=generator)
    energies = torch.randint(-8, 8, (samples,), generator=generator).to(dtype)
    energies[torch.rand(samples, generator=generator) < 0.1] = torch.nan
    return assignments, energies


FORMS: dict[str, Any] = {
    "compiled": ops.cluster_extremes,
    "elsewhere": ops._cluster_extremes_elsewhere,
    "reference": reference.cluster_extremes,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [0, 1, 7, 129, 400])
@pytest.mark.parametrize("clusters", [1, 64])
def test_every_form(form: Any, dtype: torch.dtype, samples: int, clusters: int) -> None:
    assignments, energies = inputs(samples, clusters, dtype)
    lowest, highest = form(assignments, energies, clusters)
    assert (lowest.tolist(), highest.tolist()) == searched(assignments, energies, clusters)
    assert lowest.dtype == highest.dtype == torch.int64


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(width=32)), max_size=12))
def test_any_numbers(pairs: list[tuple[int, float]]) -> None:
    assignments = torch.tensor([cluster for cluster, _ in pairs], dtype=torch.int64)
    energies = torch.tensor([energy for _, energy in pairs])
    expected = searched(assignments, energies, 4)
    for form in FORMS.values():
        lowest, highest = form(assignments, energies, 4)
        assert (lowest.tolist(), highest.tolist()) == expected


def test_strides() -> None:
    assignments, energies = inputs(40, 8, torch.float32)
    spread = torch.full((40, 3), 99), torch.full((40, 3), torch.nan)
    spread[0][:, 1], spread[1][:, 1] = assignments, energies
    lowest, highest = ops.cluster_extremes(spread[0][:, 1], spread[1][:, 1], 8)
    assert (lowest.tolist(), highest.tolist()) == searched(assignments, energies, 8)


def test_no_cluster() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert all(len(found) == 0 for found in ops.cluster_extremes(empty, torch.empty(0), 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    torch.library.opcheck(OP.default, (*inputs(9, 4, dtype), 4))


def test_compiled_and_fake() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.cluster_extremes, fullgraph=True, backend="aot_eager")
    arguments = (*inputs(9, 4, torch.float32), 4)
    for actual, expected in zip(
        compiled(*arguments), ops.cluster_extremes(*arguments), strict=True
    ):
        assert torch.equal(actual, expected)
    with FakeTensorMode():
        found = ops.cluster_extremes(
            torch.empty(9, dtype=torch.int64, device="cuda"), torch.empty(9, device="cuda"), 4
        )
        assert [(t.shape, t.dtype, t.device.type) for t in found] == [
            ((4,), torch.int64, "cuda")
        ] * 2


@pytest.mark.parametrize("form", [ops.cluster_extremes, ops._cluster_extremes_elsewhere])
@pytest.mark.parametrize(
    ("assignments", "energies", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.zeros(2), r"shape \(N,\)"),
        (torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1), r"shape \(N,\)"),
        (torch.zeros(3), torch.zeros(3), "int64"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), "energies must be"),
    ],
)
def test_refusals(form: Any, assignments: Tensor, energies: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        form(assignments, energies, 2)


@pytest.mark.parametrize("wrong", [-1, 2])
def test_assignments_out_of_range(wrong: int) -> None:
    with pytest.raises(RuntimeError, match=rf"in \[0, 2\), got {wrong}"):
        ops.cluster_extremes(torch.tensor([0, wrong]), torch.zeros(2), 2)
    with pytest.raises(RuntimeError, match="negative"):
        OP(torch.zeros(0, dtype=torch.int64), torch.zeros(0), -1)
