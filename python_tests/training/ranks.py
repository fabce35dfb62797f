"""GReg fine-tuning in one process of several: ``ranks.py FOLDER RANK WORLD``; 0 of 1 is alone.

Every process takes its part of the same global batches.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed as dist
from training.helpers import convolutional, images, labels

from grood_fast.training import TrainingRecipe, train

INLIERS, OUTLIERS, BATCHES, STEPS = 8, 12, 3, 7


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
        )
    mine = slice(rank, None, world)
    inliers, outliers = images(INLIERS * BATCHES), images(OUTLIERS * BATCHES, seed=1) + 0.3
    recipe = TrainingRecipe().changed(
        {
            "regularizer": True,
            "margins": "auto",
            "outlier_ratio": OUTLIERS / INLIERS,
            "steps": STEPS,
            "learning_rate": 0.1,
            "clip": 5.0,
        }
    )
    model = convolutional("group", seed=rank)  # the first process's weights are everybody's
    arguments = (
        [(x[mine], y[mine]) for x, y in zip(inliers.split(INLIERS), labels(24).split(8))],  # noqa: B905
        [x[mine] for x in outliers.split(OUTLIERS)],
    )
    result = train(
        model,
        *arguments,
        recipe=recipe,
        id_validation=[(inliers, labels(24))],
        ood_validation={"noise": [outliers]},
        folder=folder,
        checkpoint_every=3,
        progress=False,
    )
    assert len(result.validations) == 4
    again = convolutional("group", seed=5)
    same = train(
        again, *arguments, recipe=recipe, id_validation=[(inliers, labels(24))], folder=folder,
        resume=True, checkpoint_every=3, progress=False,
    )  # fmt: skip
    assert same.best == result.best
    for one, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.save(weights, folder / f"rank{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
