"""The front door: every public name, imported when it is first used."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import grood_fast


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_no_torch() -> None:
    heavy = ("torch", "numpy", "sklearn", "safetensors", "tqdm")
    run(
        "import sys, grood_fast\n"
        f"loaded = [name for name in {heavy} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert 'score' in dir(grood_fast) and grood_fast.__version__\n"
        f"assert not any(name in sys.modules for name in {heavy})\n"
        "grood_fast.score\n"
        "assert 'torch' in sys.modules\n"
    )


def test_errors_are_there_without_torch() -> None:
    run(
        "import sys, grood_fast\n"
        "assert issubclass(grood_fast.GroodFastError, Exception)\n"
        "assert 'torch' not in sys.modules\n"
    )


def test_importing_prints_and_warns_nothing() -> None:
    code = "import warnings; warnings.simplefilter('error'); import grood_fast; grood_fast.score"
    assert run(code) == ""


@pytest.mark.parametrize("name", sorted(grood_fast.__all__))
def test_every_public_name_resolves_to_what_it_says(name: str) -> None:
    value = getattr(grood_fast, name)
    assert value is getattr(importlib.import_module(f"grood_fast.{grood_fast._HOME[name]}"), name)
    assert getattr(value, "__name__", name) == name
    assert value.__doc__
    assert name in dir(grood_fast)


def test_no_submodule_hides_a_public_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(grood_fast.__path__)}
    assert not modules & set(grood_fast.__all__)


def test_type_checkers_see_the_same_names() -> None:
    assert grood_fast.__file__
    tree = ast.parse(Path(grood_fast.__file__).read_text())
    seen = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grood_fast.")
        for alias in node.names
    }
    assert seen == {name: f"grood_fast.{module}" for name, module in grood_fast._HOME.items()}


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'scorer'"):
        _ = grood_fast.scorer
