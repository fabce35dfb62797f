"""Scores are tensors; what is computed from them is not; copies keep what belongs to them."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from grood_fast.results import Scores, ScoreTable

VALUES = torch.tensor([0.5, -1.0, torch.nan, 3.0])
PREDICTIONS, LABELS = torch.tensor([0, 2, 1, 0]), torch.tensor([0, 1, 1, 2])


def scores(labels: Tensor | None = LABELS) -> Scores:
    return Scores.of(VALUES.clone(), PREDICTIONS, labels, "energy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_is_a_float32_cpu_tensor(dtype: torch.dtype) -> None:
    made = Scores.of(VALUES.clone().to(dtype).requires_grad_(), PREDICTIONS, LABELS, "energy")
    assert isinstance(made, Tensor)
    assert made.dtype == torch.float32
    assert made.device.type == "cpu"
    assert made.shape == (4,)
    assert not made.requires_grad
    assert torch.equal(made.nan_to_num(), VALUES.nan_to_num())
    assert (made.detector, made.predictions, made.labels) == ("energy", PREDICTIONS, LABELS)


@pytest.mark.parametrize(
    "function",
    [
        lambda s: s + 1,
        lambda s: 1 - s,
        lambda s: s > 0,
        lambda s: s[1:3],
        lambda s: s[0],
        lambda s: s.double(),
        lambda s: s.clone(),
        lambda s: s.sort().values,
        lambda s: s.mean(),
        lambda s: torch.cat([s, s]),
        lambda s: torch.stack([s]),
        lambda s: s.detach(),
    ],
)
def test_what_is_computed_is_a_plain_tensor(function: Callable[[Tensor], Tensor]) -> None:
    result = function(scores())
    assert type(result) is Tensor
    expected = function(VALUES)
    torch.testing.assert_close(result, expected, equal_nan=True)


def test_numpy_and_python() -> None:
    made = scores()
    assert type(made.numpy()) is np.ndarray
    assert made.numpy().dtype == np.float32
    np.testing.assert_array_equal(np.asarray(made), VALUES.numpy())
    assert made.tolist()[3] == 3.0
    assert len(made) == 4
    assert float(made[1]) == -1
    assert "-1.0000" in repr(made)
    assert "0.5" in f"{made}"


def by_torch_save(made: Scores) -> Scores:
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    loaded: Scores = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("labels", [LABELS, None])
@pytest.mark.parametrize(
    "way",
    [
        copy.copy,
        copy.deepcopy,
        lambda s: pickle.loads(pickle.dumps(s)),
        lambda s: pickle.loads(pickle.dumps(s, protocol=2)),
        by_torch_save,
    ],
    ids=["copy", "deepcopy", "pickle", "old pickle", "torch.save"],
)
def test_copies_keep_what_belongs_to_them(
    way: Callable[[Scores], Scores], labels: Tensor | None
) -> None:
    made = way(scores(labels))
    assert type(made) is Scores
    torch.testing.assert_close(made.as_subclass(Tensor), VALUES, equal_nan=True)
    assert made.detector == "energy"
    assert torch.equal(made.predictions, PREDICTIONS)
    if labels is None:
        assert made.labels is None
    else:
        assert torch.equal(made.labels, labels)


def test_a_deep_copy_shares_nothing() -> None:
    made = scores()
    other = copy.deepcopy({"a": made, "b": made})
    assert other["a"].data_ptr() != made.data_ptr()
    assert other["a"].predictions.data_ptr() != PREDICTIONS.data_ptr()
    assert other["a"].labels.data_ptr() != LABELS.data_ptr()
    other["a"][0] = 7
    assert made[0] == 0.5


@pytest.mark.parametrize("labels", [LABELS, None])
def test_table(labels: Tensor | None) -> None:
    table = ScoreTable({"msp": VALUES, "energy": -VALUES}, PREDICTIONS, labels)
    assert list(table) == ["msp", "energy"]
    assert table.predictions is PREDICTIONS
    assert table.labels is labels
    for name, column in table.items():
        assert type(column) is Scores
        assert column.detector == name
        assert column.predictions is PREDICTIONS
        assert column.labels is labels
    again = pickle.loads(pickle.dumps(table))
    assert list(again) == ["msp", "energy"]
    assert torch.equal(again.predictions, PREDICTIONS)
    assert copy.deepcopy(table)["energy"].detector == "energy"
