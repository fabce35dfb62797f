"""Loaders without end that know where they are, and find the place again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from grood_fast.batches import Batch, join, parse_batch
from grood_fast.errors import InputError, TrainingWarning
from grood_fast.training.randomness import RandomStreams, decode, encode


class Feed:
    """A loader read over and over, one epoch after another.

    What the loader draws at random in this process (orders, augmentations, its workers' seeds) it
    draws from streams of its own. A place is found again by starting its epoch with the streams it
    started with and reading up to it, so that the data may be any iterable.

    To have batches loaded beside the training step, give the loader workers
    (``DataLoader(..., num_workers=1)``): they read ahead.

    Args:
        loader: yields batches; see :func:`grood_fast.batches.parse_batch`.
        streams: what it draws from.

    Raises:
        InputError: something that cannot be read, or not a second time.
    """

    def __init__(self, loader: Iterable[Any], streams: RandomStreams) -> None:
        self.loader = loader
        self.epoch = 0
        self.position = 0
        self._streams = streams
        self._start: dict[str, Any] = {}
        self._iterator: Iterator[Any] | None = None
        self._last: Batch | None = None
        self._left = 0  # rows of the last batch that nobody has taken
        if isinstance(loader, DataLoader) and loader.num_workers and loader.persistent_workers:
            warnings.warn(
                "The loader's workers live on from epoch to epoch, and so do their random states: "
                "a resumed training would draw other augmentations. Make it with "
                "persistent_workers=False if it must be resumed exactly.",
                TrainingWarning,
                stacklevel=3,
            )

    def next(self) -> Batch:
        """The next batch as the loader yields it; what :meth:`take` left is dropped."""
        with self._streams.entered():
            self._last, self._left = self._read(), 0
        return self._last

    def take(self, count: int) -> Batch:
        """The next ``count`` samples, joined from as many batches as it takes, without labels."""
        parts: list[Batch] = []
        missing = count
        if self._left:
            assert self._last is not None
            rows = torch.arange(self._last.size - self._left, self._last.size)[:missing]
            parts.append(self._last.rows(rows))
            missing -= len(rows)
            self._left -= len(rows)
        while missing > 0:
            batch = self.next()
            self._left = max(batch.size - missing, 0)
            parts.append(batch.first(missing))
            missing -= parts[-1].size
        whole = parts[0]
        for part in parts[1:]:
            whole = join(whole, part)
        return whole

    def state(self) -> dict[str, Any]:
        """The place, JSON-serialisable."""
        start = self._start or self._now()
        return {
            "epoch": self.epoch,
            "position": self.position,
            "left": self._left,
            "start": start,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to the place that :meth:`state` wrote down, reading up to it.

        Raises:
            InputError: the loader ends before it.
        """
        self.epoch, self.position = state["epoch"], 0
        self._streams.restore(state["start"]["streams"])
        for generator, saved in zip(self._generators(), state["start"]["generators"], strict=True):
            generator.set_state(decode(saved))
        self._iterator = None
        with self._streams.entered():
            while self.position < state["position"]:
                last = self._read()
                if self.epoch > state["epoch"]:
                    raise InputError(
                        f"The loader has fewer than the {state['position']} batches that were read "
                        "before: give the loader that the training was started with."
                    )
                self._last = last
        self._left = state["left"]

    def _read(self) -> Batch:
        if self._iterator is None:
            self._begin()
        assert self._iterator is not None
        item = next(self._iterator, None)
        if item is None:
            if self.position == 0:
                raise InputError(
                    "The loader yields no batch (the second time around, if it is an iterator): "
                    "give a DataLoader, or a list of batches, that can be read again and again."
                )
            self.epoch, self.position = self.epoch + 1, 0
            self._begin()
            item = next(self._iterator, None)
            if item is None:
                raise InputError(
                    "The loader could be read only once: give a DataLoader, or a list of batches, "
                    "that can be read again and again."
                )
        self.position += 1
        return parse_batch(item)

    def _begin(self) -> None:
        self._streams.capture()
        self._start = self._now()
        for sampler in self._samplers():
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.epoch)
        self._iterator = iter(self.loader)

    def _now(self) -> dict[str, Any]:
        return {
            "streams": self._streams.state(),
            "generators": [encode(generator.get_state()) for generator in self._generators()],
        }

    def _samplers(self) -> list[Any]:
        batches = getattr(self.loader, "batch_sampler", None)
        found = (getattr(self.loader, "sampler", None), batches, getattr(batches, "sampler", None))
        return [sampler for sampler in dict.fromkeys(found) if sampler is not None]

    def _generators(self) -> list[torch.Generator]:
        """The loader's own, which its epochs move on."""
        owners = (self.loader, *self._samplers())
        found = (getattr(owner, "generator", None) for owner in owners)
        return [g for g in dict.fromkeys(found) if isinstance(g, torch.Generator)]
