"""What runs here: versions, processor, and what was compiled. Printed beside every measurement."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numpy", "scikit-learn", "safetensors", "faiss-cpu", "pytorch-ood", "timm")


def environment() -> dict[str, Any]:
    """Versions, processor, threads and build facts; JSON-serialisable.

    ``cuda_device`` and ``cuda_architectures`` are None and empty where there is no GPU, or where
    the kernels were compiled for the CPU only.
    """
    import torch

    from grood_fast import __version__, ops
    from grood_fast._kernels import build_facts

    facts = build_facts()
    capabilities = torch.cpu.get_capabilities()
    return {
        "grood_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cpus": _usable_cpus(),
        "torch_threads": torch.get_num_threads(),
        "amx_bf16": bool(capabilities.get("amx_bf16", False)),
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "compiler": facts["compiler"],
        "compiled_against_torch": facts["torch"],
        "cuda_architectures": facts["cuda_architectures"],
        "simd_levels_compiled": facts["simd_levels_compiled"],
        "simd_levels_supported": facts["simd_levels_supported"],
        "simd_level": ops.simd_level(),
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _usable_cpus() -> int:
    # A container may be allowed fewer than the machine has; only Linux tells.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
