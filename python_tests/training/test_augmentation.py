"""Images shifted and mirrored."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

from grood_fast.training.augmentation import ShiftedAndMirrored


def test_every_shift_and_both_sides_occur_and_nothing_else() -> None:
    columns = torch.arange(1.0, 9.0).repeat(2, 8, 1)  # an image of its column numbers
    data = ShiftedAndMirrored(TensorDataset(columns[None], torch.tensor([3])))
    torch.manual_seed(0)
    seen = set()
    for _ in range(100):
        image, label = data[0]
        assert image.shape == (2, 8, 8)
        assert label == 3
        seen.add(tuple(image[0, 0].tolist()))
    straight = {(1, 1, *range(2, 8)), tuple(range(1, 9)), (*range(2, 9), 8)}
    assert seen == straight | {row[::-1] for row in straight}
    unmirrored = ShiftedAndMirrored(data.data, mirror=False)
    assert {tuple(unmirrored[0][0][0, 0].tolist()) for _ in range(50)} == straight
    assert len(data) == 1


def test_down_as_well() -> None:
    rows = torch.arange(8.0)[:, None].expand(8, 8)[None, None]
    data = ShiftedAndMirrored(TensorDataset(rows, torch.tensor([0])), mirror=False)
    torch.manual_seed(0)
    assert {int(data[0][0][0, 0, 0]) for _ in range(50)} == {0, 1}
