"""The augmentation of the published recipes: images shifted and mirrored at random."""

from __future__ import annotations

from collections.abc import Sized
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset


class ShiftedAndMirrored(Dataset[tuple[Tensor, int]]):
    """A data set of images, each moved by up to an eighth of its sides and mirrored half the time.

    Four pixels of 32, as for CIFAR: what moves in from outside is the border's value repeated.
    Draws from torch's global generator.

    Args:
        data: yields (image (C, H, W), label).
        mirror: whether images may be mirrored.
    """

    def __init__(self, data: Dataset[tuple[Tensor, int]], mirror: bool = True) -> None:
        self.data, self.mirror = data, mirror

    def __len__(self) -> int:
        return len(cast(Sized, self.data))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data[index]
        height, width = image.shape[1:]
        down, right = height // 8, width // 8
        padded = F.pad(image[None], (right, right, down, down), mode="replicate")[0]
        top = int(torch.randint(2 * down + 1, ()))
        left = int(torch.randint(2 * right + 1, ()))
        image = padded[:, top : top + height, left : left + width]
        if self.mirror and torch.rand(()) < 0.5:
            image = image.flip(2)
        return image, label
