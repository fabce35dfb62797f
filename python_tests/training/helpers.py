"""Small networks and plain implementations for the training tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLASSES = 4


def convolutional(norm: str = "batch", dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """A float64 network of strided, dilated and grouped convolutions on (N, 3, 8, 8) images."""

    def normed(channels: int) -> nn.Module:
        return {
            "batch": lambda: nn.BatchNorm2d(channels),
            "group": lambda: nn.GroupNorm(2, channels),
            "none": nn.Identity,
        }[norm]()

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            normed(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2),
            normed(8),
            nn.Tanh(),
            nn.Conv2d(8, 8, 3, dilation=2, padding=2, groups=8),
            nn.Softplus(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(8, CLASSES),
        ).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


def images(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(count, 3, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=dtype)


def labels(count: int) -> Tensor:
    """(count,), the classes in turn."""
    return torch.arange(count) % CLASSES


def parameter_gradients(
    model: nn.Module, loss: Callable[[], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """A loss, and its gradient on every parameter."""
    model.zero_grad()
    value = loss()
    value.backward()
    gradients = [
        p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()
    ]
    model.zero_grad()
    return value.detach(), gradients
