"""Fixtures of the tests of the CUDA path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from devices import kernels_of, load_emulated_ops


@pytest.fixture(scope="module")
def emulated_kernels(kernels: str) -> Iterator[None]:
    """The ops run the CUDA kernels on the emulated device."""
    if kernels != "cpu":
        pytest.skip(f"the ops run {kernels} kernels already")
    with kernels_of("emulated"):
        yield


@pytest.fixture(params=[0, 1, 2], ids=["forwards", "backwards", "random"])
def schedule(emulated_kernels: None, request: pytest.FixtureRequest) -> Iterator[int]:
    """The emulated device's threads run in this order; with even ones, copies are late."""
    set_seed = load_emulated_ops().set_seed
    set_seed(request.param)
    yield request.param
    set_seed(0)
