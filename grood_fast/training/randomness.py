"""Random states of torch, NumPy and Python that can be put aside, written down and taken up."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RandomStreams:
    """One state of every global random generator that training can draw from.

    What runs inside :meth:`entered` draws from these streams and moves them on; outside, the
    process's own generators are as they were. So the data's randomness does not depend on the
    model's, nor either on the caller's.

    Args:
        device: of the model; a CUDA device's generator belongs to the streams.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self.capture()

    @classmethod
    def seeded(cls, *numbers: int, device: torch.device | None = None) -> RandomStreams:
        """Streams that depend on the numbers (none of them negative) alone."""
        streams = cls(device)
        seeds = np.random.SeedSequence(numbers).generate_state(4).tolist()
        streams.torch = torch.Generator().manual_seed(seeds[0]).get_state()
        streams.numpy = np.random.RandomState(seeds[1]).get_state()
        streams.python = random.Random(seeds[2]).getstate()
        if streams.cuda is not None:
            generator = torch.Generator(streams._device).manual_seed(seeds[3])
            streams.cuda = generator.get_state()
        return streams

    def capture(self) -> None:
        """Take over the process's states of now."""
        self.torch: Tensor = torch.get_rng_state()
        self.numpy: Any = np.random.get_state()  # noqa: NPY002
        self.python: Any = random.getstate()
        device = self._device
        self.cuda: Tensor | None = None if device is None else torch.cuda.get_rng_state(device)

    def install(self) -> None:
        """Make these the process's states."""
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)
        if self._device is not None and self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self._device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Draw from these streams, and leave the process's as they were."""
        outside = RandomStreams(self._device)
        self.install()
        try:
            yield
        finally:
            self.capture()
            outside.install()

    def state(self) -> dict[str, Any]:
        """The states, JSON-serialisable."""
        name, keys, *rest = self.numpy
        version, numbers, gauss = self.python
        return {
            "torch": encode(self.torch),
            "numpy": [name, encode(torch.from_numpy(keys.view(np.uint8))), *rest],
            "python": [version, list(numbers), gauss],
            "cuda": None if self.cuda is None else encode(self.cuda),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` wrote down."""
        name, keys, *rest = state["numpy"]
        version, numbers, gauss = state["python"]
        self.torch = decode(state["torch"])
        self.numpy = (name, decode(keys).numpy().view(np.uint32), *rest)
        self.python = (version, tuple(numbers), gauss)
        if self._device is not None and state["cuda"] is not None:
            self.cuda = decode(state["cuda"])


def encode(state: Tensor) -> str:
    """A tensor of bytes as text."""
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def decode(text: str) -> Tensor:
    """The bytes that :func:`encode` wrote."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
