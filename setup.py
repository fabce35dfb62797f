"""Builds the two extensions with ninja: `_ops.so`, the torch ops, and `_kernels`, the NumPy side.

Where there is an nvcc, `_ops.so` holds the CUDA kernels too, whatever torch it is compiled against:
GROOD_FAST_CUDA=0 leaves them out, =1 insists on them, =auto, the default, takes what there is.

The torch ops use LibTorch's stable ABI only, so one binary serves every torch from the version
below on, and torch is needed for its headers and link libraries alone. They are taken from the
torch that is *installed* for this interpreter, also when pip builds in an isolated environment.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info
from setuptools.errors import CompileError, PlatformError

if int(setuptools.__version__.split(".")[0]) < 77:  # or it trips over pyproject.toml's license
    raise SystemExit(
        f"error: grood-fast needs setuptools>=77 to build, and {sys.executable} has "
        f"{setuptools.__version__}: pip install --upgrade setuptools, then try again."
    )

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import cuda_toolkit  # noqa: E402

TORCH_TARGET = (2, 13)  # the oldest torch the stable ABI is used of

KERNELS = sorted(ROOT.glob("csrc/kernels/cpu/*.cpp"))
EMULATION_FLAGS = ["-DGROOD_FAST_EMULATED", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
EMULATED = ROOT / "build" / "emulation" / "_ops.so"  # for tests: the CUDA kernels, for CPU tensors
SOURCES = {  # beside the kernels, which are in both
    "grood_fast._ops": sorted(ROOT.glob("csrc/ops/**/*.cpp")),
    "grood_fast._kernels": sorted(ROOT.glob("csrc/python/*.cpp")),
}  # Of the ops those that say which library they belong to.
EMULATED_OPS = [
    path for path in SOURCES["grood_fast._ops"] if "GROOD_FAST_" in path.read_text(encoding="utf-8")
]

FIND_TORCH = """
import json, os, torch
root = os.path.dirname(torch.__file__)
print(json.dumps({"version": torch.__version__, "root": root}))
"""


def installed_torch() -> dict[str, str]:
    """Version and folder of the torch this interpreter has outside pip's isolated environment."""
    isolation = ("PYTHONPATH", "PYTHONNOUSERSITE")  # how pip hides what is installed
    environment = {key: value for key, value in os.environ.items() if key not in isolation}
    found = subprocess.run(
        [sys.executable, "-c", FIND_TORCH],
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
        check=False,
    )
    wanted = ".".join(map(str, TORCH_TARGET))
    if found.returncode != 0:
        raise PlatformError(
            f"grood-fast compiles against an installed torch, and {sys.executable} has none: "
            f"install torch>={wanted} first (for example: pip install torch==2.13.0), then try "
            "again (with uv or build: with --no-build-isolation)."
        )
    torch: dict[str, str] = json.loads(found.stdout.strip().splitlines()[-1])
    if tuple(map(int, torch["version"].split("+")[0].split(".")[:2])) < TORCH_TARGET:
        raise PlatformError(
            f"grood-fast needs torch>={wanted} to compile; installed is {torch['version']}."
        )
    return torch


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else the first usual one."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise PlatformError(
        "grood-fast needs a C++20 compiler to build (GCC 11 or Clang 14, or later), and none was "
        "found: install one (Debian, Ubuntu: apt install g++) or name it in CXX."
    )


def toolkit() -> cuda_toolkit.Toolkit | str:
    """The nvcc to compile the CUDA kernels with, or why they are left out."""
    wanted = os.environ.get("GROOD_FAST_CUDA", "auto") or "auto"
    if wanted not in ("0", "1", "auto"):
        raise PlatformError(f"grood-fast: GROOD_FAST_CUDA must be 0, 1 or auto, got {wanted!r}.")
    if wanted == "0":
        return "GROOD_FAST_CUDA=0"
    try:
        return cuda_toolkit.find()
    except cuda_toolkit.NoToolkit as missing:
        if wanted == "1":
            raise PlatformError(
                f"grood-fast: GROOD_FAST_CUDA=1, but {missing}: install CUDA, or pip install "
                "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime "
                "nvidia-cuda-cccl (of one CUDA release)."
            ) from None
        return str(missing)


class Metadata(dist_info):  # type: ignore[misc]
    """Misses what the build will need before pip downloads dependencies: gigabytes, with torch."""

    def run(self) -> None:
        for needed in (ninja, pybind11_include, compiler, installed_torch):
            needed()
        super().run()


class NinjaBuild(build_ext):  # type: ignore[misc]
    """Writes one ninja file for both extensions and runs it."""

    user_options = [  # noqa: RUF012
        *build_ext.user_options,
        (
            "emulation",
            None,
            "build the ops with the CUDA kernels on the emulated device, for tests",
        ),
    ]
    boolean_options = [*build_ext.boolean_options, "emulation"]  # noqa: RUF012

    def initialize_options(self) -> None:
        super().initialize_options()
        self.emulation = False

    def get_ext_filename(self, fullname: str) -> str:
        *package, name = fullname.split(".")
        if name == "_ops":  # no Python in it: no interpreter's tag
            return os.path.join(*package, "_ops.so")
        return str(super().get_ext_filename(fullname))

    def build_extensions(self) -> None:
        cxx, torch, cuda = compiler(), installed_torch(), toolkit()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        compiling = f"grood-fast: compiling with {cxx[0]} against torch {torch['version']}"
        if self.emulation:
            compiling += ", the CUDA kernels for the emulated device"
        elif isinstance(cuda, str):
            compiling += f", for the CPU only ({cuda})"
        else:
            compiling += f", the CUDA kernels with {cuda.nvcc}"
        self.announce(compiling, level=2)
        (build / "build.ninja").write_text(self.ninja_file(cxx, torch, cuda, build))
        targets = [str(EMULATED)] if self.emulation else []
        try:
            subprocess.run([ninja(), "-C", str(build), *jobs(), *targets], check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(
                "grood-fast: the compiler refused the sources; its messages stand above."
            ) from error
        if not self.emulation and isinstance(cuda, cuda_toolkit.Toolkit) and cuda.is_the_tables:
            logs = [
                (build / "cuda" / "cuda" / f"{source.stem}.o.log").read_text(encoding="utf-8")
                for source in cuda_toolkit.SOURCES
            ]
            if complaints := cuda_toolkit.over_budget(cuda_toolkit.resources(logs)):
                raise CompileError(
                    "grood-fast: kernels take more than "
                    "csrc/kernels/cuda/resources.csv allows:\n  " + "\n  ".join(complaints)
                )

    def ninja_file(
        self,
        cxx: list[str],
        torch: dict[str, str],
        cuda: cuda_toolkit.Toolkit | str,
        build: Path,
    ) -> str:
        version = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=False)
        facts = {
            "GROOD_FAST_VERSION": self.distribution.get_version(),
            "GROOD_FAST_COMPILER": (version.stdout.splitlines() or [cxx[0]])[0].strip(),
            "GROOD_FAST_TORCH_VERSION": torch["version"],
        }
        compiled_for = [] if isinstance(cuda, str) else cuda_toolkit.ARCHITECTURES
        facts["GROOD_FAST_CUDA_ARCHITECTURES"] = " ".join(compiled_for)
        defines = [f'-D{key}="{value}"' for key, value in facts.items()]
        target = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000ULL"
        common = ["-std=c++20", "-O3", "-fno-math-errno", "-g0", "-fPIC", "-fvisibility=hidden"]
        common += ["-Wall", "-Wextra", "-Wno-psabi"]
        stable = [
            *common,
            "-DTORCH_STABLE_ONLY",
            f"-DTORCH_TARGET_VERSION={target}",
            f"-isystem{torch['root']}/include",
            f"-isystem{torch['root']}/include/torch/csrc/api/include",
        ]
        flags = {
            "kernels": common,
            "grood_fast._ops": [*stable, *(["-DGROOD_FAST_CUDA"] if compiled_for else [])],
            "emulated_ops": [*stable, *EMULATION_FLAGS],
            "emulation": [*common, *EMULATION_FLAGS],
            "emulated_kernels": [*common, *EMULATION_FLAGS, "-xc++"],
            "grood_fast._kernels": [
                *common,
                *defines,
                f"-isystem{pybind11_include()}",
                f"-isystem{sysconfig.get_paths()['include']}",
            ],
        }
        undefined = ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else []
        links = {
            "grood_fast._ops": [f"-L{torch['root']}/lib", "-lc10", "-ltorch_cpu"],
            "grood_fast._kernels": undefined,
            "emulation": [f"-L{torch['root']}/lib", "-lc10", "-ltorch_cpu"],
        }
        run = " ".join(shlex.quote(word).replace("$", "$$") for word in cxx)
        lines = [
            "rule compile",
            f"  command = {run} -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule compile_cuda",
            # ptxas says what each kernel takes, for the table of budgets; aloud only if it failed.
            "  command = $nvcc -MD -MF $out.d $flags -c $in -o $out 2> $out.log"
            " || { cat $out.log >&2; exit 1; }",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            f"  command = {run} -shared -o $out $in $flags",
            "  description = link $out",
        ]

        def compiled(part: str, sources: list[Path], rule: str = "compile") -> list[str]:
            objects = [
                escape(build / part / source.parent.name / (source.stem + ".o"))
                for source in sources
            ]
            for source, target_object in zip(sources, objects, strict=True):
                lines.append(f"build {target_object}: {rule} {escape(source)}")
                lines.append(f"  flags = {quoted(flags[part])}")
            return objects

        def linked(name: str, output: Path, objects: list[str]) -> None:
            output.parent.mkdir(parents=True, exist_ok=True)
            lines.append(f"build {escape(output)}: link {' '.join(objects)}")
            lines.append(f"  flags = {quoted(links[name])}")

        kernels = compiled("kernels", KERNELS)
        cuda_kernels = []
        if isinstance(cuda, cuda_toolkit.Toolkit):
            lines.append(f"nvcc = {shlex.quote(str(cuda.nvcc))} -ccbin {shlex.quote(cxx[0])}")
            flags["cuda"] = cuda.compile_flags()
            links["grood_fast._ops"] += cuda.link_flags()
            cuda_kernels = compiled("cuda", cuda_toolkit.SOURCES, "compile_cuda")
        for extension in self.extensions:
            name = extension.name
            objects = kernels + compiled(name, SOURCES[name])
            output = Path(self.get_ext_fullpath(name)).resolve()
            linked(name, output, objects + (cuda_kernels if name == "grood_fast._ops" else []))
            lines.append(f"default {escape(output)}")
        emulated = compiled("emulation", sorted(ROOT.glob("csrc/emulation/*.cpp")))
        emulated += compiled("emulated_kernels", cuda_toolkit.SOURCES)
        emulated += compiled("emulated_ops", EMULATED_OPS)
        linked("emulation", EMULATED, emulated)
        return "\n".join(lines) + "\n"


def ninja() -> str:
    try:
        from ninja import BIN_DIR

        return os.path.join(BIN_DIR, "ninja")
    except ImportError:
        if found := shutil.which("ninja"):
            return found
        raise PlatformError(
            "grood-fast builds with ninja: pip install ninja, then try again."
        ) from None


def pybind11_include() -> str:
    try:
        from pybind11 import get_include
    except ImportError:
        raise PlatformError(
            "grood-fast builds with pybind11: pip install pybind11, then try again."
        ) from None
    return str(get_include())


def jobs() -> list[str]:
    return ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def quoted(words: list[str]) -> str:
    return " ".join(shlex.quote(word) for word in words).replace("$", "$$")


setup(
    ext_modules=[
        Extension(name, sources=[str(path.relative_to(ROOT)) for path in KERNELS + SOURCES[name]])
        for name in SOURCES
    ],
    cmdclass={"build_ext": NinjaBuild, "dist_info": Metadata},
)
