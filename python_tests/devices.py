"""The CUDA kernels behind the ops as CPU tensors reach them, on a GPU or on the emulated device.

With ``pytest --kernels emulated`` or ``--kernels cuda`` every test that calls an op on CPU tensors
checks the CUDA kernels, through the same wrappers, derivatives and graphs.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from grood_fast import _kernels, ops

ROOT = Path(__file__).resolve().parent.parent
EMULATED_OPS = ROOT / "build" / "emulation" / "_ops.so"
#: Every op that computes something.
OPS = tuple(
    sorted(
        name.removeprefix("grood_fast::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("grood_fast::")
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    )
)
#: What this build of the package was compiled for.
ARCHITECTURES = tuple(_kernels.build_facts()["cuda_architectures"])
assert ops  # whose import registered the ops


@cache
def load_emulated_ops() -> Any:
    """``torch.ops.grood_fast_emulated``, compiled from what the sources are now."""
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--emulation"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the emulated device does not compile:\n{done.stdout}")
    torch.ops.load_library(str(EMULATED_OPS))
    return torch.ops.grood_fast_emulated


def _on_gpu(name: str, *arguments: Any) -> Any:
    """The op of CPU tensors, computed on the current CUDA device."""

    def to_gpu(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        # With the same strides, gaps and all.
        flat = torch.empty(0, dtype=argument.dtype).set_(argument.untyped_storage())
        return flat.cuda().as_strided(argument.shape, argument.stride(), argument.storage_offset())

    results = getattr(torch.ops.grood_fast, name)(*pytree.tree_map(to_gpu, arguments))
    return pytree.tree_map(lambda one: one.cpu() if isinstance(one, Tensor) else one, results)


@contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """``grood_fast``'s ops run ``"emulated"`` or ``"cuda"`` kernels for CPU tensors."""
    if device == "cpu":
        yield
        return
    emulated = load_emulated_ops() if device == "emulated" else None
    library = torch.library.Library("grood_fast", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name in OPS:
            kernel: Callable[..., Any] = (
                partial(_on_gpu, name) if emulated is None else getattr(emulated, name)
            )
            library.impl(name, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
