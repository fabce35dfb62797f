"""Loads the compiled libraries and says clearly when they cannot be used."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch

from grood_fast.errors import ExtensionError

_OLDEST_TORCH = (2, 13)
_REBUILD = "reinstall with the torch you use: pip install --no-build-isolation --force-reinstall ."


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def load() -> Any:
    """Load ``_ops.so`` into torch's dispatcher and return the NumPy-side module.

    Raises:
        ExtensionError: not compiled, or compiled for something else than what is installed.
    """
    path = Path(__file__).parent.parent / "_ops.so"
    try:
        from grood_fast import _kernels
    except ImportError as error:
        raise ExtensionError(
            f"grood-fast's compiled kernels are missing or do not fit this Python ({error}); "
            f"{_REBUILD}"
        ) from error
    if _version(torch.__version__) < _OLDEST_TORCH:
        raise ExtensionError(
            f"grood-fast was compiled against torch {_kernels.build_facts()['torch']} and serves "
            f"torch >= {'.'.join(map(str, _OLDEST_TORCH))}; installed is {torch.__version__}. "
            "Upgrade torch."
        )
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ExtensionError(
            f"grood-fast's torch ops ({path}), compiled against torch "
            f"{_kernels.build_facts()['torch']}, do not load under torch "
            f"{torch.__version__}: {error}; {_REBUILD}"
        ) from error
    if complaint := _kernels.build_facts()["simd_level_complaint"]:
        supported = ", ".join(_kernels.build_facts()["simd_levels_supported"])
        warnings.warn(
            f"GROOD_FAST_SIMD={complaint} is not one of this machine's levels ({supported}); "
            f"using {_kernels.simd_level()}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return _kernels
