"""Proves, in throw-away environments, what installing grood-fast does; prints a table.

Each check copies the source tree, makes a virtual environment, runs pip as a user would and looks
at what came of it. Needs only Python and pip's usual access to packages. Exit code 1 if a check
fails.

    python tools/check_install.py [--torch torch==2.13.0] [--newer torch==2.14.1 | --newer ""]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(
    ".*", "build", "dist", "out", "*.so", "*.egg-info", "__pycache__"
)
BUILD_TOOLS = ["setuptools>=77", "ninja>=1.11", "pybind11>=2.13"]  # pyproject.toml's [build-system]
NVCC = ["nvidia-cuda-nvcc==13.0.88", "nvidia-cuda-crt==13.0.88", "nvidia-nvvm==13.0.88",
        "nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cccl==13.0.85"]  # fmt: skip
DEPENDENCIES = ["numpy", "scikit-learn", "safetensors", "tqdm"]

# Runs in the environment under test, away from the source tree, and prints one JSON object.
PROBE = """
import json
import numpy, torch
import grood_fast
from grood_fast import _kernels, ops

random = numpy.random.default_rng(0)
logits = torch.from_numpy(random.normal(0, 3, (64, 1000)).astype("float32"))
results, errors = {}, []
for objective in ops.OBJECTIVES:
    got = ops.logit_gradient(logits, objective)
    want = ops.reference.logit_gradient(logits.double(), objective)
    errors.append(((got.delta - want).abs().max() / want.abs().max()).item())
    errors.append(((got.l1 - want.abs().sum(1)).abs() / want.abs().sum(1)).max().item())
    results[objective] = got.l1.tolist()
results["energy of the row"] = got.energy.tolist()

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)).eval()
inputs = torch.from_numpy(random.normal(0, 1, (32, 8)).astype("float32"))
scores = grood_fast.score(model, inputs.split(8), progress=False)
energy = -torch.logsumexp(model(inputs).detach().double(), 1)
errors.append((torch.as_tensor(scores).double() - energy).abs().max().item())

print(json.dumps({"torch": torch.__version__, "facts": _kernels.build_facts(),
                  "error": max(errors), "results": results}))
"""

# Every op that has a CPU kernel has a CUDA kernel.
REGISTERED = """
import torch
from grood_fast import ops
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("grood_fast::")]
has = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [n for n in names if has(n, "CPU") and "simd" not in n and not has(n, "CUDA")]
assert not missing, missing
print(sum(has(n, "CUDA") and "simd" not in n for n in names), "ops have CUDA kernels")
"""


class CheckFailed(Exception):
    """What a check set out to prove is not so."""


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise CheckFailed(otherwise)


def fetched_torch(output: str) -> list[str]:
    """What pip said of fetching a torch, from an index or from a folder."""
    return re.findall(r"^\s*(?:Collecting|Downloading|Processing) (?:\S*/)?torch\b.*", output, re.M)


class Environment:
    """A virtual environment and its own copy of the source tree, under a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "source"
        self.bin = folder / "venv" / "bin"
        # Beside the usual: no folder that holds nvcc, and no say of CUDA's or the compiler's.
        kept = [p for p in os.get_exec_path() if not (Path(p) / "nvcc").exists()]
        ignored = (
            "CUDA_HOME",
            "CUDA_PATH",
            "GROOD_FAST_CUDA",
            "CXX",
            "PYTHONPATH",
            "VIRTUAL_ENV",
            "GROOD_FAST_SIMD",
        )
        self.variables = {k: v for k, v in os.environ.items() if k not in ignored}
        self.variables["PATH"] = os.pathsep.join([str(self.bin), *kept])
        shutil.copytree(ROOT, self.source, ignore=NOT_SOURCE)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)

    def run(self, *command: str | Path, **variables: str) -> tuple[int, str]:
        """Exit code and everything printed."""
        done = subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=self.folder,
            env=self.variables | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def pip(self, *arguments: str | Path) -> str:
        """Run pip, which has to succeed: its output."""
        code, output = self.run("python", "-m", "pip", *arguments)
        require(code == 0, f"pip {' '.join(map(str, arguments))} failed:\n{output}")
        return output

    def refusal(self, *arguments: str | Path, **variables: str) -> str:
        """Run pip, which has to fail with one sentence of grood-fast's and no traceback: it."""
        code, output = self.run("python", "-m", "pip", *arguments, **variables)
        require(code != 0, f"pip succeeded, and should not have:\n{output}")
        require("Traceback" not in output, f"a traceback was printed:\n{output}")
        require(not fetched_torch(output), f"{fetched_torch(output)} all the same")
        said = re.findall(r"error: (grood-fast .*)", output)
        require(len(said) == 1, f"{len(said)} sentences instead of one:\n{output}")
        return str(said[0])

    def probe(self) -> dict[str, Any]:
        """Score with the package that was installed; the numbers agree with plain PyTorch's."""
        code, output = self.run("python", "-c", PROBE)
        require(code == 0, f"the installed package does not work:\n{output}")
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        require(found["error"] < 1e-5, f"wrong numbers, relative error {found['error']:.1e}")
        return found


def source_install(environment: Environment, torch: str) -> str:
    output = environment.pip("install", torch, *BUILD_TOOLS)
    require(bool(fetched_torch(output)), f"a torch that is fetched goes unnoticed:\n{output}")
    environment.pip("install", "--no-build-isolation", environment.source)
    found = environment.probe()
    return f"scores under torch {found['torch']}, within {found['error']:.0e} of plain PyTorch"


def cpu_only(environment: Environment) -> str:
    require(shutil.which("nvcc", path=environment.variables["PATH"]) is None, "nvcc is in PATH")
    facts = environment.probe()["facts"]
    architectures = facts["cuda_architectures"]
    require(architectures == [], f"build facts name CUDA architectures: {architectures}")
    return f"CPU only: {', '.join(facts['simd_levels_compiled'])}; CUDA architectures: none"


def without_nvcc(environment: Environment) -> str:
    return environment.refusal(
        "install", "--no-build-isolation", "--force-reinstall", "--no-deps", environment.source,
        GROOD_FAST_CUDA="1",
    )  # fmt: skip


def with_nvcc(environment: Environment) -> str:
    """The CUDA kernels in a build against a torch for the CPU, by an nvcc that pip installed."""
    environment.pip("install", *NVCC)
    environment.pip(
        "install", "--no-build-isolation", "--force-reinstall", "--no-deps", environment.source
    )
    architectures = environment.probe()["facts"]["cuda_architectures"]
    require(architectures == ["sm_80", "sm_90", "sm_100"], f"compiled for {architectures}")
    code, output = environment.run("python", "-c", REGISTERED)
    require(code == 0, f"not every op has a CUDA kernel:\n{output}")
    return f"compiled for {', '.join(architectures)}; {output.strip()}"


def isolated_install(environment: Environment, torch: str) -> str:
    environment.pip("install", torch)
    before = torch_version(environment)
    output = environment.pip("install", "--verbose", environment.source)
    require(not fetched_torch(output), f"a second torch: {fetched_torch(output)}")
    found = environment.probe()
    after, against = torch_version(environment), found["facts"]["torch"]
    require(before == after == against, f"torch {before} became {after}, compiled with {against}")
    return f"compiled against the installed torch {against}; no other was fetched"


def without_compiler(environment: Environment) -> str:
    return environment.refusal(
        "install", "--no-build-isolation", "--force-reinstall", "--no-deps", environment.source,
        PATH=str(environment.bin),
    )  # fmt: skip


def without_torch(environment: Environment) -> str:
    return environment.refusal("install", environment.source)


def without_build_tools(environment: Environment) -> str:
    """setuptools as old as a fresh environment of Python 3.10 or 3.11 has, and no ninja."""
    environment.pip("install", "setuptools==65.5.0")
    return environment.refusal("install", "--no-build-isolation", environment.source)


def newer_torch(environment: Environment, newer: str, builder: Environment) -> str:
    old = builder.probe()
    builder.pip("wheel", "--no-build-isolation", "--no-deps", "-w", builder.folder, builder.source)
    (wheel,) = builder.folder.glob("grood_fast-*.whl")
    environment.pip("install", newer)
    environment.pip("install", *DEPENDENCIES)
    environment.pip("install", "--no-deps", wheel)
    new = environment.probe()
    require(new["torch"] != old["torch"], f"both torch are {new['torch']}")
    require(new["facts"] == old["facts"], "not the same build")
    require(new["results"] == old["results"], "the numbers differ")
    return f"built with {old['torch']}, runs under {new['torch']}: bit for bit the same numbers"


def torch_version(environment: Environment) -> str:
    command = "from importlib.metadata import version; print(version('torch'))"
    return environment.run("python", "-c", command)[1].strip()


def main() -> int:
    arguments = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    arguments.add_argument("--torch", default="torch==2.13.0", help="torch to build with")
    arguments.add_argument("--newer", default="torch==2.14.1", help="torch to run under; '' skips")
    options = arguments.parse_args()

    table: list[tuple[str, bool, str]] = []
    with tempfile.TemporaryDirectory(prefix="grood-fast-") as temporary:
        made: dict[str, Environment] = {}

        def environment(name: str) -> Environment:
            if name not in made:
                made[name] = Environment(Path(temporary) / name)
            return made[name]

        def check(name: str, proof: Callable[[], str]) -> None:
            print(f"{name} ...", flush=True)
            start = time.monotonic()
            try:
                passed, found = True, proof()
            except CheckFailed as failure:
                passed, found = False, str(failure)
            table.append((name, passed, found))
            print(f"  {time.monotonic() - start:.0f} s\n" if passed else f"  {found}\n", flush=True)

        check(
            "pip install --no-build-isolation .",
            lambda: source_install(environment("plain"), options.torch),
        )
        check("without nvcc", lambda: cpu_only(environment("plain")))
        check("without a compiler", lambda: without_compiler(environment("plain")))
        check("GROOD_FAST_CUDA=1 without nvcc", lambda: without_nvcc(environment("plain")))
        check("with nvcc", lambda: with_nvcc(environment("plain")))
        check(
            "pip install . (isolated)",
            lambda: isolated_install(environment("isolated"), options.torch),
        )
        check("without torch", lambda: without_torch(environment("bare")))
        check("without the build tools", lambda: without_build_tools(environment("bare")))
        if options.newer:
            check(
                f"under {options.newer}",
                lambda: newer_torch(environment("newer"), options.newer, environment("plain")),
            )

    width = max(len(name) for name, _, _ in table)
    for name, passed, found in table:
        print(f"{'ok    ' if passed else 'FAILED'}  {name:{width}}  {found.splitlines()[0]}")
    return 0 if all(passed for _, passed, _ in table) else 1


if __name__ == "__main__":
    sys.exit(main())
