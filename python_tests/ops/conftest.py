"""Fixtures of the op tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from grood_fast import _kernels, ops


@pytest.fixture(params=_kernels.build_facts()["simd_levels_supported"])
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine has, in turn; the one before comes back."""
    before = ops.simd_level()
    ops.set_simd_level(request.param)
    yield request.param
    ops.set_simd_level(before)


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Whatever the test sets, the number of threads comes back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
