"""Wrong arguments are refused in words, by the wrappers and by the ops beneath them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from grood_fast import ops
from grood_fast.errors import InputError

LOGITS, FEATURES = torch.zeros(3, 5), torch.zeros(3, 7)

# What both ops check of the logits, the objective, the temperature and the target.
COMMON: dict[str, tuple[dict[str, Any], str]] = {
    "one dimension": (
        {"logits": torch.zeros(3)},
        "logits must have the shape (B, C), got 1 dimensions",
    ),
    "three dimensions": (
        {"logits": torch.zeros(3, 5, 1)},
        "logits must have the shape (B, C), got 3 dimensions",
    ),
    "integers": (
        {"logits": torch.zeros(3, 5, dtype=torch.int64)},
        "logits must be float32, float64, bfloat16 or float16",
    ),
    "booleans": (
        {"logits": torch.zeros(3, 5, dtype=torch.bool)},
        "logits must be float32, float64, bfloat16 or float16",
    ),
    "complex numbers": (
        {"logits": torch.zeros(3, 5, dtype=torch.complex64)},
        "logits must be float32, float64, bfloat16 or float16",
    ),
    "no class": ({"logits": torch.zeros(3, 0)}, "logits must have at least one class"),
    "zero temperature": ({"temperature": 0.0}, "temperature must be positive, got 0"),
    "negative temperature": ({"temperature": -2.0}, "temperature must be positive, got -2"),
    "NaN temperature": ({"temperature": float("nan")}, "temperature must be positive, got nan"),
    "a target without use": (
        {"target": torch.ones(5)},
        "only the confounding objective takes a target",
    ),
    "a short target": (
        {"objective": "confounding", "target": torch.ones(4)},
        "target must be contiguous, of shape (C,)",
    ),
    "a target for each sample": (
        {"objective": "confounding", "target": torch.ones(3, 5)},
        "target must be contiguous, of shape (C,)",
    ),
    "a target with gaps": (
        {"objective": "confounding", "target": torch.ones(10)[::2]},
        "target must be contiguous",
    ),
    "a target of another dtype": (
        {"objective": "confounding", "target": torch.ones(5, dtype=torch.float64)},
        "of the dtype of the results",
    ),
}


@pytest.mark.parametrize("name", COMMON)
def test_both_ops_refuse(name: str) -> None:
    changes, message = COMMON[name]
    arguments = {"logits": LOGITS, "objective": "energy", **changes}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.logit_gradient(**arguments)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.head_gradient_norm(features=FEATURES, **arguments)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(7), "features must have the shape (B, D), got 1 dimensions"),
        (torch.zeros(4, 7), "must have the same number of rows, got 3 and 4"),
        (torch.zeros(1, 7), "must have the same number of rows, got 3 and 1"),
        (torch.zeros(3, 7, dtype=torch.int32), "features must be float32, float64"),
        (torch.zeros(3, 7, dtype=torch.float64), "must both be float64, or neither"),
    ],
)
def test_head_gradient_norm_refuses(features: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ops.head_gradient_norm(LOGITS, features, "energy")


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown objective 'entropy'; known: energy, uniform"):
        ops.logit_gradient(LOGITS, "entropy")
    with pytest.raises(InputError, match="unknown objective 'entropy'; known: energy, uniform"):
        ops.head_gradient_norm(LOGITS, FEATURES, "entropy")
    with pytest.raises(InputError, match="unknown output 'l3'; known: energy, log_sum_exp"):
        ops.logit_gradient(LOGITS, "energy", outputs=("l3",))
    with pytest.raises(InputError, match="unknown norm 'l3'; known: l1, l2, linf"):
        ops.head_gradient_norm(LOGITS, FEATURES, "energy", norm="l3")


@pytest.mark.parametrize("number", [-1, 6])
def test_the_ops_refuse_numbers_out_of_range(number: int) -> None:
    library = torch.ops.grood_fast
    with pytest.raises(RuntimeError, match=f"unknown objective {number}"):
        library.logit_gradient(LOGITS, number, 1.0, None, 1)
    with pytest.raises(RuntimeError, match=f"unknown norm {number}"):
        library.head_gradient_norm(LOGITS, FEATURES, 0, 1.0, None, number, False)


def test_set_simd_level_names_what_there_is() -> None:
    before = ops.simd_level()
    with pytest.raises(InputError, match="'mmx' is not available; this machine has: baseline"):
        ops.set_simd_level("mmx")
    assert ops.simd_level() == before


@pytest.mark.parametrize(
    ("logits", "temperature", "target", "said"),
    [
        (torch.zeros(3), 1.0, None, "shape"),
        (torch.zeros(2, 3, dtype=torch.int64), 1.0, None, "floating point"),
        (torch.zeros(2, 0), 1.0, None, "shape"),
        (torch.zeros(2, 3), 0.0, None, "temperature"),
        (torch.zeros(2, 3), 1.0, torch.ones(2), "target"),
        (torch.zeros(2, 3), 1.0, torch.ones(3, dtype=torch.float64), "target"),
    ],
)
def test_devices_without_a_kernel_are_as_strict(logits, temperature, target, said):
    confounding = ops.OBJECTIVES.index("confounding")
    with pytest.raises(RuntimeError, match=said):
        ops._logit_gradient_elsewhere(logits, confounding, temperature, target, 1)
    with pytest.raises(RuntimeError, match=said):
        ops._head_gradient_norm_elsewhere(
            logits, torch.zeros(2, 4), confounding, temperature, target, 0, False
        )
    with pytest.raises(RuntimeError, match="features"):
        ops._head_gradient_norm_elsewhere(
            torch.zeros(2, 3), torch.zeros(1, 4), 0, 1.0, None, 0, False
        )
