"""Coordinates in a subspace that samples' gradients span, against the torch products they are.

Run as a program it prints the memory that one of the two needs: one process, one measurement.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import Comparison
from torch import Tensor

from grood_fast import ops

TIME = "dual_project, against the three products in PyTorch"
MEMORY = "dual_project: peak memory above the operands, against the three products in PyTorch"

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


if __name__ == "__main__":
    print(measured_kilobytes(sys.argv[1], tuple(int(size) for size in sys.argv[2:])))
