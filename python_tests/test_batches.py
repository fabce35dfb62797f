"""Loader batches: every format, one pass, and warnings about order."""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from grood_fast.batches import Batch, order_warning, parse_batch, preview
from grood_fast.errors import InputError, LoaderWarning

X = torch.arange(12.0).reshape(3, 4)
Y = torch.tensor([2, 0, 1])


@pytest.mark.parametrize(
    ("batch", "labelled"),
    [
        (X, False),
        ((X,), False),
        ([X], False),
        ((X, Y), True),
        ([X, Y, "path"], True),
        ((X, Y.to(torch.uint8)), True),
        ({"data": X, "label": Y, "index": [0, 1, 2], "soft_label": X}, True),
        ({"data": X}, False),
        ((X, torch.eye(3, dtype=torch.long)), False),  # one-hot
        ((X, torch.rand(3)), False),
        ((X, torch.tensor([True, False, True])), False),
        ((X, Y[:2]), False),
        ((X, Y[:, None]), False),
        ((X, torch.tensor(1)), False),
        ((X, ["cat", "dog", "cat"]), False),
    ],
)
def test_positional_formats(batch: Any, labelled: bool) -> None:
    parsed = parse_batch(batch)
    assert parsed.args[0] is X
    assert parsed.kwargs == {}
    assert parsed.size == 3
    if labelled:
        assert parsed.labels is not None
        assert parsed.labels.dtype == torch.int64
        assert parsed.labels.tolist() == [2, 0, 1]
    else:
        assert parsed.labels is None


@pytest.mark.parametrize("mapping", [dict, UserDict])
@pytest.mark.parametrize("key", ["labels", "label"])
def test_mappings_become_keyword_arguments_without_labels(mapping: Any, key: str) -> None:
    mask = torch.ones(3, 4)
    batch = mapping({"input_ids": X.long(), "attention_mask": mask, key: Y})
    parsed = parse_batch(batch)
    assert parsed.args == ()
    assert list(parsed.kwargs) == ["input_ids", "attention_mask"]
    assert parsed.size == 3
    assert torch.equal(parsed.labels, Y)
    assert key in batch, "the loader's own batch must stay as it is"


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (3.0, "type float"),
        ("pixels", "type str"),
        ((), "tuple of 0"),
        ([[1, 2], Y], "not one tensor"),
        (torch.tensor(1.0), "no tensor has a batch dimension"),
        ({"input_ids": [1, 2]}, "input_ids"),
        ({"data": [1, 2], "label": Y}, "not one tensor"),
        ({0: X}, "keys"),
        ((X, 1), "one sample, not a batch"),
        (None, "NoneType"),
    ],
)
def test_other_batches_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_batch(batch)


def test_to_moves_inputs_and_labels() -> None:
    moved = parse_batch((X, Y)).to("meta")
    assert moved.args[0].device.type == moved.labels.device.type == "meta"
    moved = parse_batch({"pixel_values": X, "labels": Y, "interpolate": True}).to("meta")
    assert moved.kwargs["pixel_values"].device.type == "meta"
    assert moved.kwargs["interpolate"] is True


def test_first_takes_rows_only_if_every_input_has_them() -> None:
    head = parse_batch((X, Y)).first(2)
    assert torch.equal(head.args[0], X[:2])
    assert head.labels.tolist() == [2, 0]
    assert head.size == 2
    whole = parse_batch({"x": X, "position_ids": torch.arange(4)})
    assert whole.first(2) is whole
    assert parse_batch(X).first(5).size == 3


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(5.0)[:, None])


def generator() -> Iterator[torch.Tensor]:
    yield from torch.arange(5.0)[:, None].split(2)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(torch.arange(5.0)[:, None], torch.arange(5)), batch_size=2),
        DataLoader(TensorDataset(torch.arange(5.0)[:, None]), batch_size=2, shuffle=True),
        DataLoader(Stream(), batch_size=2),
        list(generator()),
        generator(),
        iter([torch.arange(5.0)[:, None]]),
    ],
    ids=["loader", "shuffled", "iterable", "list", "generator", "iterator"],
)
def test_preview_neither_loses_nor_repeats(loader: Any) -> None:
    first, batches = preview(loader)
    everything = list(batches)
    assert everything[0] is first
    assert all(isinstance(batch, Batch) for batch in everything)
    values = torch.cat([batch.args[0] for batch in everything]).flatten()
    assert sorted(values.tolist()) == [0, 1, 2, 3, 4]


def test_preview_reads_one_batch_ahead_only() -> None:
    read = []

    def slow() -> Iterator[torch.Tensor]:
        for i in range(3):
            read.append(i)
            yield X

    _, batches = preview(slow())
    assert read == [0]
    next(batches)
    assert read == [0]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "no batch"),
        (iter(()), "no batch"),
        (DataLoader(TensorDataset(X), batch_size=8, drop_last=True), "no batch"),
        (X, r"in a list: \[batch\]"),
        ({"data": X}, r"in a list: \[batch\]"),
        (TensorDataset(X, Y), "DataLoader"),
        (7, "type int"),
        (["path"], "type str"),
    ],
)
def test_preview_refuses(loader: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        preview(loader)


DATA = TensorDataset(torch.arange(10.0))


def distributed(shuffle: bool) -> DistributedSampler:
    return DistributedSampler(DATA, num_replicas=2, rank=0, shuffle=shuffle)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, batch_size=3, shuffle=True),
        DataLoader(DATA, batch_size=None, shuffle=True),
        DataLoader(DATA, batch_size=3, sampler=SubsetRandomSampler(range(10))),
        DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 3, False)),
        DataLoader(DATA, batch_size=3, sampler=distributed(shuffle=True)),
        DataLoader(DATA, batch_sampler=(batch for batch in [[1, 2], [0]])),
    ],
)
def test_shuffling_is_warned_about(loader: Any) -> None:
    with pytest.warns(LoaderWarning, match="another order") as caught:
        order_warning(loader)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, batch_size=3, drop_last=True),
        DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 3, True)),
    ],
)
def test_dropping_samples_is_warned_about(loader: Any) -> None:
    with pytest.warns(LoaderWarning, match="drops its last 1 samples"):
        order_warning(loader)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, batch_size=3),
        DataLoader(DATA, batch_size=5, drop_last=True),
        DataLoader(DATA, batch_size=None),
        DataLoader(DATA, batch_size=3, sampler=[4, 2, 0]),
        DataLoader(DATA, batch_size=3, sampler=range(10)),
        DataLoader(DATA, batch_size=3, sampler=distributed(shuffle=False)),
        DataLoader(Stream(), batch_size=2, drop_last=True),
        [X],
        iter([X]),
    ],
)
def test_loaders_in_order_are_not(loader: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        order_warning(loader)
