"""nvcc: where it is, what it is asked for, and what the kernels it compiled take.

Used by setup.py, and by the checks and reports that look at the compiled kernels.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(ROOT.glob("csrc/kernels/cuda/*.cu"))
BUDGETS = ROOT / "csrc/kernels/cuda/resources.csv"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # A100, H100 and H200, B200; later ones: PTX
OLDEST_RELEASE = (12, 8)  # the first that knows sm_100
# What the table of registers was made with. Another release allocates them otherwise, so that only
# with this one spills and overrun budgets are errors.
TABLE_RELEASE = (13, 0)
COMPILE = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
STRICT = ["-Werror=all-warnings", "-Xptxas=--warn-on-spills,--warning-as-error"]


@dataclass(frozen=True)
class Toolkit:
    """An nvcc that can compile the kernels."""

    nvcc: Path
    release: tuple[int, int]
    libraries: Path  # the folder of libcudart_static.a

    @property
    def is_the_tables(self) -> bool:
        """Whether the table of registers holds for what this nvcc compiles."""
        return self.release == TABLE_RELEASE

    def compile_flags(self, architectures: Iterable[str] = ARCHITECTURES) -> list[str]:
        """For machine code of ``architectures`` and, for what comes after them, PTX of the last."""
        numbers = [name.removeprefix("sm_") for name in architectures]
        generate = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers[:-1]]
        last = numbers[-1]
        generate += [f"-gencode=arch=compute_{last},code=[sm_{last},compute_{last}]"]
        return [*COMPILE, *generate, "-Xptxas=-v", *(STRICT if self.is_the_tables else [])]

    def link_flags(self) -> list[str]:
        """The CUDA runtime, as a part of the library and invisible outside it."""
        return [
            f"-L{self.libraries}",
            "-Wl,--exclude-libs,libcudart_static.a",
            "-lcudart_static",
            "-ldl",
            "-lrt",
            "-lpthread",
        ]


class NoToolkit(Exception):
    """Why there is no nvcc that can compile the kernels."""


def find() -> Toolkit:
    """The nvcc of CUDA_HOME or CUDA_PATH, of this interpreter's nvidia-cuda-nvcc, or of PATH.

    Raises:
        NoToolkit: there is none, it is too old, or its runtime library is missing.
    """
    nvcc = next((path for path in _candidates() if path.is_file()), None)
    if nvcc is None:
        raise NoToolkit("no nvcc in CUDA_HOME, this Python's nvidia-cuda-nvcc, or PATH")
    version = _output([str(nvcc), "--version"])
    found = re.search(r"release (\d+)\.(\d+)", version)
    if found is None:
        raise NoToolkit(f"{nvcc} does not say which release it is")
    release = (int(found[1]), int(found[2]))
    if release < OLDEST_RELEASE:
        raise NoToolkit(
            f"{nvcc} is of CUDA {found[1]}.{found[2]}, and "
            f"{'.'.join(map(str, OLDEST_RELEASE))} is the oldest that knows all of "
            f"{', '.join(ARCHITECTURES)}"
        )
    # An nvcc in PATH may be a script that calls another: nvcc itself knows where it is.
    top = re.search(r"^#\$ TOP=(.*)$", _output([str(nvcc), "--dryrun", "-c", "x.cu"]), re.M)
    root = Path(top[1].strip()).resolve() if top else nvcc.resolve().parent.parent
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (root / folder / "libcudart_static.a").is_file():
            return Toolkit(nvcc, release, root / folder)
    raise NoToolkit(f"{nvcc} has no libcudart_static.a under {root}: install nvidia-cuda-runtime")


def _candidates() -> list[Path]:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    site = Path(sysconfig.get_paths()["purelib"])
    packaged = sorted(site.glob("nvidia/cu*/bin/nvcc"), reverse=True)
    in_path = shutil.which("nvcc")
    return [
        *(Path(home) / "bin" / "nvcc" for home in homes),
        *packaged,
        *([Path(in_path)] if in_path else []),
    ]


def _output(command: list[str]) -> str:
    """Everything ``command`` prints, whatever it answers."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout


@dataclass(frozen=True)
class Resources:
    """What one block or thread of a compiled kernel takes."""

    registers: int  # a thread
    shared: int  # bytes a block, beside what a launch adds


def resources(logs: Iterable[str]) -> dict[tuple[str, str], Resources]:
    """By kernel and architecture, from what ``ptxas -v`` printed."""
    found: dict[tuple[str, str], Resources] = {}
    for log in logs:
        name = ""
        for line in log.splitlines():
            if entry := re.search(r"Compiling entry function '(\w+)' for '(sm_\d+)'", line):
                name, architecture = entry[1], entry[2]
            elif name and (used := re.search(r"Used (\d+) registers", line)):
                shared = re.search(r"(\d+) bytes smem", line)
                found[name, architecture] = Resources(int(used[1]), int(shared[1]) if shared else 0)
                name = ""
    readable = demangled(sorted({name for name, _ in found}))
    return {(readable[name], arch): used for (name, arch), used in sorted(found.items())}


def demangled(names: list[str]) -> dict[str, str]:
    """Kernels' names as the table has them, by the linker's."""
    if not names:
        return {}
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = [
        line.removeprefix("void ").replace("grood_fast::cuda::", "").split("(")[0]
        for line in done.stdout.splitlines()
    ]
    return dict(zip(names, short, strict=True))


def read_budgets() -> dict[tuple[str, str], Resources]:
    """The table: by kernel and architecture, the most it may take."""
    with BUDGETS.open(newline="", encoding="utf-8") as file:
        return {
            (row["kernel"], arch): Resources(int(row[arch]), int(row["shared"]))
            for row in csv.DictReader(file)
            for arch in ARCHITECTURES
        }


def write_budgets(found: dict[tuple[str, str], Resources]) -> None:
    """Make ``found`` the table."""
    kernels = sorted({kernel for kernel, _ in found})
    with BUDGETS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kernel", *ARCHITECTURES, "shared"])
        for kernel in kernels:
            used = [found[kernel, arch] for arch in ARCHITECTURES]
            writer.writerow([kernel, *(one.registers for one in used), max(u.shared for u in used)])


def over_budget(found: dict[tuple[str, str], Resources]) -> list[str]:
    """In words: what takes more than the table allows, what it does not know, what is gone."""
    budgets = read_budgets()
    complaints = []
    for (kernel, arch), used in found.items():
        budget = budgets.get((kernel, arch))
        if budget is None:
            complaints.append(f"{kernel} for {arch} is not in {BUDGETS.name}")
        elif used.registers > budget.registers or used.shared > budget.shared:
            complaints.append(
                f"{kernel} for {arch} takes {used.registers} registers and {used.shared} bytes of "
                f"shared memory; its budget is {budget.registers} and {budget.shared}"
            )
    complaints += [f"{k} for {a} is no more" for k, a in budgets if (k, a) not in found]
    return complaints


def main() -> int:
    """``python tools/cuda_toolkit.py LOG...``: the table of what these ptxas logs say."""
    found = resources(Path(name).read_text(encoding="utf-8") for name in sys.argv[1:])
    if not found:
        print("usage: python tools/cuda_toolkit.py build/*/cuda/*.log", file=sys.stderr)
        return 2
    write_budgets(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
