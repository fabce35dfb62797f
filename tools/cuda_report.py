"""What the CUDA kernels take, and how fast they could at most be: static facts and a prediction.

    python tools/cuda_report.py

Registers and shared memory are the compiler's, from csrc/kernels/cuda/resources.csv; occupancy
follows from them. Bytes and operations are counted from each algorithm, not measured. The times
are a PREDICTION and a bound: what the GPU's published peaks allow. Nothing here ran on a GPU.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

import cuda_cases
import cuda_toolkit


@dataclass(frozen=True)
class Gpu:
    """Published figures: dense peaks in TFLOP/s, bandwidth in TB/s."""

    name: str
    architecture: str
    multiprocessors: int
    bandwidth: float
    peaks: dict[str, float]
    threads: int = 2048  # of a multiprocessor
    blocks: int = 32
    registers: int = 65536
    shared: int = 0  # bytes of a multiprocessor


GPUS = (
    Gpu("A100 80GB SXM", "sm_80", 108, 2.04,
        {"float32": 19.5, "tf32": 156, "bfloat16": 312, "float64": 19.5}, shared=164 << 10),
    Gpu("H100 SXM", "sm_90", 132, 3.35,
        {"float32": 67, "tf32": 494, "bfloat16": 989, "float64": 67}, shared=228 << 10),
    Gpu("B200", "sm_100", 148, 8.0,
        {"float32": 75, "tf32": 1100, "bfloat16": 2250, "float64": 37}, shared=228 << 10),
)  # fmt: skip


def threads_of(kernel: str) -> int:
    """Threads a block, as the launchers have them."""
    if grouped := re.fullmatch(r"(?:logit_gradient|row_norm)_kernel<\w+, (\d+).*>", kernel):
        return 256 if grouped[1] == "256" else 128
    of_256 = ("add_shares", "subtract_point", "short_circuit", "extreme", "clear", "mark",
              "channels_of_sample")  # fmt: skip
    return 256 if any(name in kernel for name in of_256) else 128


def occupancy(gpu: Gpu, used: cuda_toolkit.Resources, threads: int) -> float:
    """Share of a multiprocessor's threads that can live at once, by CUDA's allocation rules."""
    warps = threads // 32
    by_registers = gpu.registers // (-(-used.registers * 32 // 256) * 256) // warps
    reserved = -(-(used.shared + 1024) // 128) * 128  # a kibibyte of each block is the system's
    blocks = min(gpu.blocks, gpu.threads // threads, by_registers, gpu.shared // reserved)
    return blocks * threads / gpu.threads


def microseconds(case: cuda_cases.Case, gpu: Gpu) -> tuple[float, str]:
    """The prediction, and what sets it."""
    moving = case.megabytes / gpu.bandwidth
    computing = sum(work / gpu.peaks[unit] / 1e6 for unit, work in case.work.items())
    return max(moving, computing), "memory" if moving > computing else "arithmetic"


def report() -> str:
    """Both tables, in Markdown."""
    budgets = cuda_toolkit.read_budgets()
    lines = ["## What the kernels take", ""]
    lines += ["| kernel | " + " | ".join(f"{gpu.architecture}" for gpu in GPUS) + " |"]
    lines += ["|---|" + "---|" * len(GPUS)]
    for kernel in sorted({kernel for kernel, _ in budgets}):
        cells = []
        for gpu in GPUS:
            used = budgets[kernel, gpu.architecture]
            share = occupancy(gpu, used, threads_of(kernel))
            cells.append(f"{used.registers} reg, {used.shared} B, {share:.0%}")
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    lines += ["", "## Roofline: a prediction, nothing was run", ""]
    lines += ["| op | MB | GFLOP | " + " | ".join(f"{gpu.name}, us" for gpu in GPUS) + " |"]
    lines += ["|---|---|---|" + "---|" * len(GPUS)]
    for case in cuda_cases.cases():
        cells = []
        for gpu in GPUS:
            time, bound = microseconds(case, gpu)
            cells.append(f"{time:.1f} ({bound})")
        work = sum(case.work.values()) / 1e9
        lines.append(
            f"| {case.title} | {case.megabytes:.1f} | {work:.1f} | " + " | ".join(cells) + " |"
        )
    lines += [
        "",
        "Times are lower bounds from published dense peaks. The kernels use mma.sync, which on "
        "Hopper and Blackwell does not reach the tensor cores' whole rate.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
