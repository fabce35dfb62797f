"""Which kernels the ops run in this session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels",
        choices=("cpu", "emulated", "cuda"),
        default="cpu",
        help="what computes the ops of CPU tensors; tests of the CPU kernels themselves are left "
        "out with the others",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "cpu_kernels: about the CPU kernels themselves, such as their threads or bits"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--kernels") == "cpu":
        return
    others = [item for item in items if item.get_closest_marker("cpu_kernels")]
    kept = [item for item in items if not item.get_closest_marker("cpu_kernels")]
    config.hook.pytest_deselected(items=others)
    items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels that ``--kernels`` names, for the whole session."""
    device: str = request.config.getoption("--kernels")
    if device == "cpu":
        yield device
        return
    from devices import kernels_of

    with kernels_of(device):
        yield device
