"""Plants bugs in the CUDA kernels, one at a time, and asks that the checks report every one.

    python tools/check_planted_bugs.py

A bug is a small change of one source file. The kernels with it are compiled for the emulated
device, with the sanitizer that is to see it, and their C++ tests run. Exit code 1 if a bug goes
unreported.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "csrc/kernels/cuda/"


@dataclass(frozen=True)
class Bug:
    """``old`` in ``file`` becomes ``new``; ``test`` must then fail, as ``preset`` was built."""

    what: str
    file: str
    old: str
    new: str
    unit: str  # the .cu file that is compiled again
    test: str
    preset: str = "tsan"


BUGS = (
    Bug(
        "no barrier before a block's partial results are read",
        "rows.cuh",
        "of_warp[threadIdx.x / kWarpThreads] = value;\n      __syncthreads();",
        "of_warp[threadIdx.x / kWarpThreads] = value;",
        "logit_gradient.cu",
        "*LogitGradient*",
    ),
    Bug(
        "no barrier before they are overwritten",
        "rows.cuh",
        "      __syncthreads();  // the array is used again\n",
        "",
        "logit_gradient.cu",
        "*LogitGradient*",
    ),
    Bug(
        "a warp's mask for a group of four",
        "rows.cuh",
        "if constexpr (kThreads >= kWarpThreads) return 0xffffffffu;",
        "return 0xffffffffu;",
        "row_norm.cu",
        "*RowNorm*",
    ),
    Bug(
        "a mask that names the neighbours",
        "rows.cuh",
        "<< threadIdx.x % kWarpThreads / kThreads * kThreads",
        "<< (threadIdx.x % kWarpThreads / kThreads * kThreads ^ kThreads)",
        "row_norm.cu",
        "*RowNorm*",
    ),
    Bug(
        "half of a group left out of its sums",
        "rows.cuh",
        "distance > 0;",
        "distance > 1;",
        "row_norm.cu",
        "*RowNorm*",
        "release",
    ),
    Bug(
        "a row that reads the one after it",
        "rows.cuh",
        "first + i < columns ? row[first + i] : Input{}",
        "first + i <= columns ? row[first + i] : Input{}",
        "row_norm.cu",
        "*RowNorm*",
        "asan-ubsan",
    ),
    Bug(
        "128-bit loads of rows that are not aligned",
        "rows.cuh",
        "if (aligned && first + Chunk<Input>::kWidth <= columns) {",
        "if (first + Chunk<Input>::kWidth <= columns) {",
        "row_norm.cu",
        "*RowNorm*",
        "asan-ubsan",
    ),
    Bug(
        "no barrier after copies have arrived",
        "dual_project.cuh",
        "    wait_for_copies();\n    __syncthreads();\n",
        "    wait_for_copies();\n",
        "dual_project.cu",
        "*DualProject*",
    ),
    Bug(
        "copies that nobody waits for",
        "dual_project.cuh",
        "    wait_for_copies();\n",
        "",
        "dual_project.cu",
        "*DualProject*",
        "release",
    ),
    Bug(
        "one buffer for two",
        "dual_project.cuh",
        "    buffer ^= 1;\n",
        "",
        "dual_project.cu",
        "*DualProject*",
    ),
    Bug(
        "one tile of anchors too few",
        "dual_project.cuh",
        "(a.anchor_delta.rows + Shape::kAnchors - 1) / Shape::kAnchors;",
        "(a.anchor_delta.rows - 1) / Shape::kAnchors;",
        "dual_project.cu",
        "*DualProject*",
        "release",
    ),
    Bug(
        "a tile that starts one row late",
        "dual_project.cuh",
        "to, rows, first_row, column);",
        "to, rows, first_row + 1, column);",
        "dual_project.cu",
        "*DualProject*",
        "release",
    ),
    Bug(
        "fragments of the wrong columns",
        "fragments.cuh",
        "Split::of(column[0]), Split::of(column[4])",
        "Split::of(column[0]), Split::of(column[3])",
        "dual_project.cu",
        "*DualProject*",
        "release",
    ),
    Bug(
        "the small parts of float32 forgotten",
        "fragments.cuh",
        "  mma_tf32(d, a_low, b0.high, b1.high);\n",
        "",
        "dual_project.cu",
        "*DualProject*",
        "release",
    ),
    Bug(
        "no barrier before the buffers of a tile are used again",
        "differences.cuh",
        "    __syncthreads();  // the buffers of the tile before are used again\n",
        "",
        "nearest_distance.cu",
        "*NearestDistance*",
    ),
    Bug(
        "the last row of the bank left out",
        "nearest_distance.cuh",
        "if (index < end) best[i]",
        "if (index + 1 < end) best[i]",
        "nearest_distance.cu",
        "*NearestDistance*",
        "release",
    ),
    Bug(
        "no barrier between the products of pairs",
        "layer_gradient_sqnorm.cuh",
        "    __syncthreads();  // the products before are done with the buffers\n",
        "",
        "layer_gradient_sqnorm.cu",
        "*LayerGradientSqnorm*",
    ),
    Bug(
        "pairs below the diagonal counted once",
        "layer_gradient_sqnorm.cuh",
        "if (other > row) sum *= 2;",
        "",
        "layer_gradient_sqnorm.cu",
        "*LayerGradientSqnorm*",
        "release",
    ),
    Bug(
        "an extreme that is not compared atomically",
        "cluster_extremes.cuh",
        "atomicMin(&a.lowest_energy[cluster], energy);",
        "if (energy < a.lowest_energy[cluster]) a.lowest_energy[cluster] = energy;",
        "cluster_extremes.cu",
        "*ClusterExtremes*",
    ),
    Bug(
        "two shares of the anchors in one place",
        "dual_project.cuh",
        "static_cast<Real*>(a.result) + blockIdx.y * a.delta.rows * components",
        "static_cast<Real*>(a.result)",
        "dual_project.cu",
        "*DualProject*",
    ),
)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Everything printed goes to ``stdout``; the first race ends a program."""
    return subprocess.run(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
    )


def cache_of(preset: str) -> dict[str, str]:
    """CMake's cache of a build that was configured."""
    lines = (ROOT / "build" / preset / "CMakeCache.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return {key.split(":")[0]: value for key, value in pairs}


def planted(bug: Bug | None, unit: str, preset: str, folder: Path) -> Path:
    """The kernels' tests with ``bug`` in them."""
    source = folder / "csrc"
    shutil.copytree(ROOT / "csrc", source, ignore=shutil.ignore_patterns("ops", "python"))
    if bug is not None:
        path = folder / KERNELS / bug.file
        text = path.read_text(encoding="utf-8")
        if text.count(bug.old) < 1:
            raise RuntimeError(f"{bug.file} no longer holds what '{bug.what}' changes")
        path.write_text(text.replace(bug.old, bug.new), encoding="utf-8")
    build, cache = ROOT / "build" / preset, cache_of(preset)
    sanitize = cache.get("GROOD_FAST_SANITIZE", "")
    flags = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else []
    compiler = cache.get("CMAKE_CXX_COMPILER", "c++")
    compiled, program = folder / "kernels.o", folder / "tests"
    tests = (build / "CMakeFiles/grood_fast_cuda_tests.dir/csrc/tests/cuda").glob("*.o")
    steps: list[list[str | Path]] = [
        [compiler, "-std=c++20", "-O1", "-g1", "-fno-strict-aliasing", "-w", *flags,
         f"-I{source}", f"-I{source / 'kernels'}", "-xc++", "-c",
         folder / KERNELS / unit, "-o", compiled],
        # Its own object first: the library's for the same file is then not taken.
        [compiler, *flags, compiled, *sorted(tests), build / "libgrood_fast_emulated.a",
         build / "libgrood_fast_kernels.a", "-lgtest", "-lgtest_main", "-lpthread", "-o", program],
    ]  # fmt: skip
    for step in steps:
        if (done := run(*step)).returncode != 0:
            raise RuntimeError(f"does not compile:\n{done.stdout}")
    return program


def reported(bug: Bug) -> str:
    """In a few words, how ``bug`` was reported; empty if it was not."""
    with tempfile.TemporaryDirectory(prefix="grood-fast-") as temporary:
        program = planted(bug, bug.unit, bug.preset, Path(temporary))
        done = run(program, f"--gtest_filter={bug.test}", "--gtest_brief=1")
    if done.returncode == 0:
        return ""
    for sign in ("ThreadSanitizer", "AddressSanitizer", "runtime error", "deadlock", "the mask"):
        if sign in done.stdout:
            return sign
    return "wrong values"


def main() -> int:
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--jobs", type=int, default=2, help="bugs at a time")
    jobs = options.parse_args().jobs
    for preset in sorted({bug.preset for bug in BUGS}):
        for command in (
            ["cmake", "--preset", preset],
            ["cmake", "--build", "--preset", preset, "--target", "grood_fast_cuda_tests"],
        ):
            if (done := run(*command)).returncode != 0:
                print(done.stdout)
                return 1
    unreported = 0
    with ThreadPoolExecutor(jobs) as pool:
        for bug, how in zip(BUGS, pool.map(reported, BUGS), strict=True):
            unreported += not how
            print(
                f"{how or 'NOT REPORTED':16}  {bug.preset:10}  {bug.file}: {bug.what}", flush=True
            )
    print(f"{len(BUGS) - unreported} of {len(BUGS)} planted bugs were reported")
    return 1 if unreported else 0


if __name__ == "__main__":
    sys.exit(main())
