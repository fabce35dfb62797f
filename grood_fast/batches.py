"""What a loader yields, as a model's arguments and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
)

from grood_fast.errors import InputError, LoaderWarning, warn
from grood_fast.hashing import hash_rows

FORMATS = (
    "a tensor x, a tuple or list (x,), (x, y) or (x, y, ...), a dict with 'data' and 'label', "
    "or a mapping from the model's argument names to tensors, as Hugging Face collators make"
)


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch: the model is called as ``model(*args, **kwargs)``.

    Attributes:
        args: positional arguments; the tensors among them hold one row a sample.
        kwargs: keyword arguments, without labels, so that the model computes no loss.
        labels: (B,) int64 class labels, or None where the loader gives none.
        size: the number of samples B.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    size: int = 0

    def map_inputs(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor argument replaced by ``function`` of it."""

        def apply(value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) else value

        return replace(
            self,
            args=tuple(apply(value) for value in self.args),
            kwargs={name: apply(value) for name, value in self.kwargs.items()},
        )

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; copies out of pinned memory do not block."""

        device = torch.device(device)

        def move(tensor: Tensor) -> Tensor:
            if tensor.device == device:
                return tensor
            return tensor.to(device, non_blocking=tensor.is_pinned())

        labels = None if self.labels is None else move(self.labels)
        return replace(self.map_inputs(move), labels=labels)

    def fingerprints(self) -> Tensor:
        """(B,) int64 on the CPU: a hash of each sample's input, equal for equal inputs."""
        inputs = (*self.args, *self.kwargs.values())
        hashes = [hash_rows(value) for value in inputs if _has_rows(value, self.size)]
        return hash_rows(torch.stack(hashes, dim=1))

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs."""
        inputs = (*self.args, *self.kwargs.values())
        return sum(value.nbytes for value in inputs if isinstance(value, Tensor))

    def first(self, count: int) -> Batch:
        """The first ``count`` samples; the whole batch if some argument has not B rows."""
        inputs = (*self.args, *self.kwargs.values())
        if count >= self.size or not all(_has_rows(value, self.size) for value in inputs):
            return self
        labels = None if self.labels is None else self.labels[:count]
        return replace(self.map_inputs(lambda tensor: tensor[:count]), labels=labels, size=count)

    def columns(self) -> dict[str, Tensor]:
        """The inputs by place, (B, ...) each, as a reservoir keeps them; see :meth:`with_columns`.

        Raises:
            InputError: some tensor that the model is given has not one row a sample.
        """
        places = {**{str(i): arg for i, arg in enumerate(self.args)}, **self.kwargs}
        columns = {place: value for place, value in places.items() if isinstance(value, Tensor)}
        if not all(_has_rows(value, self.size) for value in columns.values()):
            raise InputError(
                "samples cannot be taken out of this batch: every tensor that the model is given "
                "must have one row a sample."
            )
        return columns

    def with_columns(self, columns: Mapping[str, Tensor], labels: Tensor | None = None) -> Batch:
        """This batch with other inputs, (N, ...) each, by the places of :meth:`columns`."""
        args = tuple(columns.get(str(i), arg) for i, arg in enumerate(self.args))
        kwargs = {name: columns.get(name, value) for name, value in self.kwargs.items()}
        return Batch(args, kwargs, labels, len(next(iter(columns.values()))))

    def rows(self, rows: Tensor) -> Batch:
        """Some of its samples, by (N,) indices. Raises as :meth:`columns`."""
        columns = {name: value[rows.to(value.device)] for name, value in self.columns().items()}
        labels = None if self.labels is None else self.labels[rows.to(self.labels.device)]
        return self.with_columns(columns, labels)

    def resized(self, size: int) -> Batch:
        """A batch of ``size`` samples, the first ones, over again where there are too few.

        Raises:
            InputError: it has no sample, or some argument has not B rows.
        """
        inputs = (*self.args, *self.kwargs.values())
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        if self.size == 0 or not all(_has_rows(value, self.size) for value in tensors):
            raise InputError(
                "the batch cannot be taken apart into samples: every tensor given to the model "
                "must have one row a sample, and there must be one."
            )
        rows = torch.arange(size) % self.size
        return replace(
            self.map_inputs(lambda tensor: tensor[rows.to(tensor.device)]),
            labels=None if self.labels is None else self.labels[rows.to(self.labels.device)],
            size=size,
        )

    def split(self, size: int) -> Iterator[Batch]:
        """Batches of at most ``size`` samples; the whole if some argument has not B rows."""
        if self.first(size) is self:
            yield self
            return
        for start in range(0, self.size, size):
            stop = min(start + size, self.size)
            yield replace(
                self.map_inputs(lambda tensor, a=start, b=stop: tensor[a:b]),  # type: ignore[misc]
                labels=None if self.labels is None else self.labels[start:stop],
                size=stop - start,
            )


def join(first: Batch, second: Batch) -> Batch:
    """The samples of two batches as one, without labels.

    Raises:
        InputError: their inputs have different names, numbers or shapes.
    """

    def both(one: Any, other: Any) -> Any:
        if _has_rows(one, first.size) and _has_rows(other, second.size):
            return torch.cat([one, other])
        if type(one) is not type(other) or isinstance(one, Tensor) or one != other:
            raise TypeError
        return one

    try:
        if first.kwargs.keys() != second.kwargs.keys():
            raise TypeError
        args = tuple(both(*pair) for pair in zip(first.args, second.args, strict=True))
        kwargs = {name: both(first.kwargs[name], second.kwargs[name]) for name in first.kwargs}
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Two batches cannot be joined: one is {_describe_inputs(first)}, the other "
            f"{_describe_inputs(second)}. Prepare both kinds of samples alike."
        ) from error
    return Batch(args, kwargs, None, first.size + second.size)


def parse_batch(batch: Any) -> Batch:
    """Read what a loader yielded.

    Accepted are a tensor ``x``; a tuple or list ``(x,)``, ``(x, y)`` or ``(x, y, ...)``, of which
    anything after ``y`` is ignored; ``{"data": x, "label": y}`` (OpenOOD; other keys are ignored);
    any other mapping, whose items but ``labels`` and ``label`` become keyword arguments (Hugging
    Face); and what was read before. ``y`` counts as labels if it is an integer tensor of shape
    (B,); one-hot, soft and real-valued targets do not.

    Raises:
        InputError: the batch has none of these formats.
    """
    if isinstance(batch, Batch):
        return batch
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    target: Any = None
    if isinstance(batch, Tensor):
        args = (batch,)
    elif isinstance(batch, Mapping):
        if "data" in batch:
            args, target = (batch["data"],), batch.get("label")
        else:
            kwargs = {key: value for key, value in batch.items() if key not in ("labels", "label")}
            target = batch["labels"] if "labels" in batch else batch.get("label")
    elif isinstance(batch, (tuple, list)) and batch:
        args, target = (batch[0],), batch[1] if len(batch) > 1 else None
    else:
        raise InputError(f"The loader yielded {_describe(batch)}; expected {FORMATS}.")

    if args and not isinstance(args[0], Tensor):
        raise InputError(
            f"The loader yielded {_describe(batch)}, whose inputs are not one tensor; "
            f"expected {FORMATS}."
        )
    inputs = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 0]
    if not inputs or not all(isinstance(key, str) for key in kwargs):
        raise InputError(
            f"The loader yielded {_describe(batch)}, in which no tensor has a batch dimension; "
            f"expected {FORMATS}."
        )
    if isinstance(target, int):
        raise InputError(
            f"The loader yielded {_describe(batch)}: one sample, not a batch. "
            "Wrap the data set: torch.utils.data.DataLoader(dataset, batch_size=...)."
        )
    size = inputs[0].shape[0]
    return Batch(args, kwargs, _class_labels(target, size), size)


def is_batch(samples: Any) -> bool:
    """Whether this is one batch rather than a loader or a list of batches.

    A list or tuple is one where it starts with a tensor and is not followed by more of its kind:
    ``[x, y]``, as ``torch.utils.data.DataLoader`` yields it, but not ``[x1, x2]``.
    """
    if isinstance(samples, (Tensor, Mapping)):
        return True
    if not isinstance(samples, (tuple, list)) or not samples or not isinstance(samples[0], Tensor):
        return False
    first, second = samples[0], samples[1] if len(samples) > 1 else None
    alike = isinstance(second, Tensor) and (second.dtype, second.shape[1:]) == (
        first.dtype,
        first.shape[1:],
    )
    return not alike


def preview(loader: Iterable[Any]) -> tuple[Batch, Iterator[Batch]]:
    """The first batch, and an iterator over all of them, the first included.

    One iteration of the loader serves both, so no sample is lost or seen twice, generators
    survive, and a loader's workers start once. Batches are parsed as they are asked for.

    Raises:
        InputError: the loader is empty, not a loader at all, or yields an unknown format.
    """
    if isinstance(loader, (Tensor, Mapping, str)):
        raise InputError(
            f"Expected a loader that yields batches, got {_describe(loader)}. "
            "To score a single batch, pass it in a list: [batch]."
        )
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise InputError(
            f"Expected a loader that yields batches, got the data set {type(loader).__name__}, "
            "which yields samples. Wrap it: torch.utils.data.DataLoader(dataset, batch_size=...)."
        )
    try:
        iterator = iter(loader)
    except TypeError as error:
        raise InputError(
            f"Expected a loader that yields batches, got {_describe(loader)}."
        ) from error
    try:
        first = parse_batch(next(iterator))
    except StopIteration:
        raise InputError(
            "The loader yielded no batch. Is its data set empty, its last incomplete batch "
            "dropped, or the generator used up?"
        ) from None
    return first, chain([first], map(parse_batch, iterator))


def order_warning(loader: Iterable[Any]) -> None:
    """Warn where scores in loader order would not be the data set's samples in order.

    Warns (:class:`LoaderWarning`) about a ``torch.utils.data.DataLoader`` that shuffles, whose
    sampler is unknown, or that drops a last incomplete batch which exists. Other iterables are
    taken as they come.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    order = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(order) is BatchSampler:
        batches, order = order, order.sampler
        dropped = len(order) % batches.batch_size if isinstance(order, Sized) else 0
        if dropped and batches.drop_last:
            warn(
                f"The loader drops its last {dropped} samples (drop_last=True): they get no score. "
                "Make it with drop_last=False.",
                LoaderWarning,
            )
    if isinstance(order, DistributedSampler):
        in_order = not order.shuffle
    else:
        # A written-out sequence of indices is an order its author knows.
        in_order = isinstance(order, (SequentialSampler, Sequence))
    if not in_order:
        warn(
            f"The loader's {type(order).__name__} may visit the samples in another order than the "
            "data set, and in a new one each time: scores come in the loader's order and cannot be "
            "matched with the samples. Make the loader with shuffle=False.",
            LoaderWarning,
        )


def _class_labels(target: Any, size: int) -> Tensor | None:
    if not isinstance(target, Tensor) or target.shape != (size,):
        return None
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        return None
    return target.long()


def _has_rows(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size


def _describe_inputs(batch: Batch) -> str:
    parts = [*map(_describe, batch.args)]
    parts += [f"{name}: {_describe(value)}" for name, value in batch.kwargs.items()]
    return ", ".join(parts)


def _describe(value: Any) -> str:
    """A value's type and shape, in words."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {list(value)[:8]}"
    if isinstance(value, (tuple, list)):
        inside = ", ".join(_describe(item) for item in value[:3])
        rest = ", ..." if len(value) > 3 else ""
        return f"a {type(value).__name__} of {len(value)} ({inside}{rest})"
    return f"an object of type {type(value).__name__}"
