"""Places in loaders, found again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from grood_fast.errors import InputError, TrainingWarning
from grood_fast.training.feeds import Feed
from grood_fast.training.randomness import RandomStreams


class Augmented(Dataset[Tensor]):
    """Every sample draws from all of the process's generators."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Tensor:
        noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        return torch.tensor([float(index), float(noise)])


def shuffled(**options: Any) -> DataLoader[Tensor]:
    return DataLoader(Augmented(), 4, shuffle=True, **options)


def with_generator() -> DataLoader[Tensor]:
    return shuffled(generator=torch.Generator().manual_seed(5))


def distributed() -> DataLoader[Tensor]:
    sampler = DistributedSampler(Augmented(), 2, 1, seed=3)
    return DataLoader(Augmented(), 4, sampler=sampler)


def listed() -> list[Tensor]:
    return [torch.full((3, 2), float(i)) for i in range(4)]


LOADERS: dict[str, Callable[[], Iterable[Any]]] = {
    "shuffled": shuffled,
    "workers": lambda: shuffled(num_workers=1),
    "own generator": with_generator,
    "distributed": distributed,
    "list": listed,
}


def feed(loader: Iterable[Any]) -> Feed:
    return Feed(loader, RandomStreams.seeded(1))


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
@pytest.mark.parametrize("before", [0, 1, 5, 9])
def test_a_place_is_found_again(make: Callable[[], Iterable[Any]], before: int) -> None:
    if isinstance(make(), DataLoader) and make().num_workers and before == 9:
        pytest.skip("starting workers takes its time")
    unbroken = feed(make())
    for _ in range(before):
        unbroken.take(3)
    state = json.loads(json.dumps(unbroken.state()))
    resumed = feed(make())
    resumed.restore(state)
    for _ in range(4):
        assert_close(resumed.take(3).args[0], unbroken.take(3).args[0], rtol=0, atol=0)
        assert_close(resumed.next().args[0], unbroken.next().args[0], rtol=0, atol=0)
    assert json.dumps(resumed.state()) == json.dumps(unbroken.state())


def test_every_sample_once_an_epoch_and_another_order_the_next() -> None:
    unbroken = feed(shuffled())
    epochs = [torch.cat([unbroken.next().args[0] for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == list(range(11))
    assert not torch.equal(epochs[0][:, 0], epochs[1][:, 0])


def test_take_cuts_batches_without_losing_samples() -> None:
    counting = feed(DataLoader(TensorDataset(torch.arange(10.0)), 4))
    taken = [counting.take(count).args[0].tolist() for count in (3, 1, 6, 0 + 5, 2)]
    assert taken == [[0, 1, 2], [3], [4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4], [5, 6]]


def test_the_processes_own_generators_are_left_alone() -> None:
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    expected = torch.rand(2), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    augmented = feed(shuffled())
    augmented.take(9)
    assert torch.equal(torch.rand(2), expected[0])
    assert (np.random.rand(), random.random()) == expected[1:]  # noqa: NPY002
    assert torch.equal(augmented.take(5).args[0], feed_after(9).take(5).args[0])


def feed_after(count: int) -> Feed:
    other = feed(shuffled())
    other.take(count)
    return other


def test_loaders_that_cannot_be_used() -> None:
    with pytest.raises(InputError, match="yields no batch"):
        feed([]).next()
    once = feed(iter(listed()))
    once.take(12)
    with pytest.raises(InputError, match="read only once"):
        once.next()
    moved = feed(listed())
    moved.take(12)
    shorter = feed(listed()[:2])
    with pytest.raises(InputError, match="fewer than the 4 batches"):
        shorter.restore(moved.state())
    with pytest.warns(TrainingWarning, match="persistent_workers=False"):
        feed(shuffled(num_workers=1, persistent_workers=True))
