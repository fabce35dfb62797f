"""A small GReg+ training with everything random that there is, which can die on the way.

As a program: ``interrupted.py FOLDER [--batch N | --write N]`` resumes or begins the training in
FOLDER and kills itself when the N-th ID batch is read, or in the middle of the N-th file.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from grood_fast import persistence
from grood_fast.training import Trainer, TrainingRecipe, TrainingResult

STEPS = 11


class Images(Dataset[tuple[Tensor, int]]):
    """Noise around one picture a class, shifted at random; outliers are only noise."""

    def __init__(
        self,
        count: int,
        outliers: bool,
        read: Callable[[], None] = lambda: None,
        augmented: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(int(outliers))
        self.images = torch.randn(count, 3, 8, 8, generator=generator)
        self.labels = [-1 if outliers else i % 3 for i in range(count)]
        if not outliers:
            for image, label in zip(self.images, self.labels, strict=True):
                image[label] += 2
        self.read, self.augmented = read, augmented

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read()
        if not self.augmented:
            return self.images[index], self.labels[index]
        shift = random.randint(-1, 1) + np.random.randint(2)  # noqa: NPY002
        image = self.images[index].roll(shift, dims=-1)
        return image + 0.1 * torch.rand(()), self.labels[index]


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(8, 3),
        )


def recipe(**changes: Any) -> TrainingRecipe:
    fields: dict[str, Any] = {
        "regularizer": True,
        "sampling": "two_way",
        "margins": {"inside": -1.0, "outside": -1.2 + 0.5},
        "outlier_ratio": 2.0,
        "steps": STEPS,
        "learning_rate": 0.05,
        "average": 0.8,
        "accumulate": 2,
    }
    return TrainingRecipe().changed({**fields, **changes})


def validation() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """ID samples and outliers."""
    inside = Images(30, outliers=False, augmented=False)
    inside.images += 0.5 * torch.randn(inside.images.shape, generator=torch.Generator())
    return DataLoader(inside, 30), DataLoader(Images(20, outliers=True, augmented=False), 20)


def trainer(
    folder: Path | None, read: Callable[[], None] = lambda: None, **changes: Any
) -> tuple[nn.Module, Trainer]:
    """A model and its trainer: 4 steps an epoch of the ID data, a checkpoint every 3."""
    model = network()
    inside, outside = validation()
    made = Trainer(
        model,
        DataLoader(Images(36, outliers=False, read=read), 4, shuffle=True),
        DataLoader(Images(50, outliers=True), 7, shuffle=True),
        recipe(**changes),
        id_validation=inside,
        ood_validation={"noise": outside},
        folder=folder,
        checkpoint_every=3,
        validate_every=4,
        progress=False,
    )
    return model, made


def run(folder: Path | None, **changes: Any) -> tuple[nn.Module, TrainingResult]:
    model, made = trainer(folder, **changes)
    return model, made.fit(resume=True)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(count: int) -> Callable[[], None]:
    """A function that kills the process when it is called so often."""
    left = count

    def call() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            die()

    return call


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, (what, count) = Path(sys.argv[1]), (sys.argv[2:] or ["", "0"])
    reads: Callable[[], None] = lambda: None  # noqa: E731
    if what == "--batch":
        reads = after(4 * int(count))
    elif what == "--write":
        tick, save = after(int(count)), persistence.save_file

        def half(tensors: Any, path: Path, metadata: Any) -> None:
            save(tensors, path, metadata=metadata)
            content = Path(path).read_bytes()
            Path(path).write_bytes(content[: len(content) // 2])
            tick()
            Path(path).write_bytes(content)

        persistence.save_file = half  # type: ignore[assignment]
    trainer(target, reads)[1].fit(resume=True)
