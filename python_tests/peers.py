"""Other projects' packages, imported for comparison in the tests."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

# A library's definitions disappear with it: this list keeps them for as long as the process runs.
_defined_operators: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """The installed ``torchvision``, also where its compiled operators do not load.

    A torchvision whose compiled library was built against another torch (a CUDA build from PyPI
    beside a CPU build of torch, for example) cannot be imported at all: it registers shape
    functions for ``nms`` and ``qnms``, whose schemas only that library defines. Everything else in
    it is Python and works. So where the import fails for this reason alone, and only there, the
    two schemas are defined here, without implementations, and the import is repeated.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _defined_operators.append(library)
    return importlib.import_module("torchvision")


def import_pytorch_ood() -> ModuleType:
    """The installed ``pytorch_ood``, which needs ``torchvision`` to be importable."""
    import_torchvision()
    return importlib.import_module("pytorch_ood")
