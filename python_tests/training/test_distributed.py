"""Two processes with half a batch each do what one does with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.testing import assert_close
from training import ranks

import grood_fast
from grood_fast.training import checkpoints


def run(folder: Path, world: int) -> list[Tensor]:
    """The weights that every process ends with."""
    folder.mkdir()
    tests = Path(ranks.__file__).parent.parent
    paths = os.pathsep.join([str(Path(grood_fast.__file__).parent.parent), str(tests)])
    processes = [
        subprocess.Popen(
            [sys.executable, ranks.__file__, str(folder), str(rank), str(world)],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    (alone,) = run(tmp_path / "one", 1)
    first, second = run(tmp_path / "two", 2)
    assert torch.equal(first, second)
    assert_close(first, alone, rtol=1e-5, atol=1e-7)
    header, parts = checkpoints.read_training(tmp_path / "two")
    assert len(header["ranks"]) == 2
    assert header["ranks"][0]["streams"] != header["ranks"][1]["streams"]
    trained = (
        parts["model"]["0.weight"]
        - checkpoints.read_training(tmp_path / "one")[1]["model"]["0.weight"]
    )
    assert trained.abs().max() < 1e-5
