"""What a training from folders needs, from a TOML or YAML file and from the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from grood_fast.errors import InputError
from grood_fast.training.recipes import TrainingRecipe


@dataclass(frozen=True)
class TrainingConfiguration:
    """The names are the command line's options and those of :func:`grood_fast.train`.

    A file may hold any of them at its top level, beside fields of :class:`TrainingRecipe`:

    .. code-block:: toml

        model = "my_models:classifier"
        id = "data/train"
        outliers = "data/outliers"
        out = "out/training"
        method = "greg+"
        epochs = 5
        margins = "auto"
        [regularizer]
        form = "finite_difference"
    """

    model: str
    id: Path
    out: Path
    outliers: Path | None = None
    id_validation: Path | None = None
    ood_validation: Mapping[str, Path] = field(default_factory=dict)
    method: str = "greg"
    recipe: str | None = None
    batch_size: int = 64
    workers: int = 0
    augment: bool = True
    resize: int | None = None
    crop: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    grayscale: bool = False
    head: str | None = None
    device: str | None = None
    tensorboard: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def preparation(self) -> dict[str, Any]:
        """What :class:`ImageFolderDataset` is told."""
        names = ("resize", "crop", "mean", "std", "grayscale")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def read(
        cls, path: Path | None, given: Mapping[str, Any], changes: Sequence[str]
    ) -> TrainingConfiguration:
        """A file's settings, overridden by what was given, and by ``field=value`` of the recipe.

        Args:
            path: a .toml, .yaml or .yml file, or None. Folders in it are relative to the file.
            given: by name; None: not given.
            changes: as "epochs=3" or "regularizer.form=features"; values as in JSON.

        Raises:
            InputError: an unreadable file, an unknown name, or one that is missing.
        """
        settings = {} if path is None else _parsed(path)
        base = Path() if path is None else path.parent
        for name in ("id", "outliers", "id_validation", "out"):
            if name in settings:
                settings[name] = base / str(settings[name])
        if "ood_validation" in settings:
            named = settings["ood_validation"]
            if not isinstance(named, Mapping):
                raise InputError('ood_validation is a table: {name = "folder"}.')
            settings["ood_validation"] = {name: base / str(f) for name, f in named.items()}
        settings.update({name: value for name, value in given.items() if value is not None})
        own = {f.name for f in fields(cls)} - {"changes"}
        of_recipe = {f.name for f in fields(TrainingRecipe)} - own
        if unknown := sorted(set(settings) - own - of_recipe):
            raise InputError(
                f"unknown setting(s) {', '.join(unknown)}; known: "
                f"{', '.join(sorted(own | of_recipe))}."
            )
        if missing := [name for name in ("model", "id", "out") if name not in settings]:
            raise InputError(
                f"missing: {', '.join(missing)}. Give --{' and --'.join(missing)}, or name them in "
                "the --config file."
            )
        recipe = {name: settings.pop(name) for name in list(settings) if name not in own}
        for text in changes:
            name, separator, value = text.partition("=")
            if not separator:
                raise InputError(f"--set {text}: expected field=value.")
            _place(recipe, name, _value(value))
        return cls(**settings, changes=recipe)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}.") from error
    kind = path.suffix.lower()
    try:
        if kind == ".toml":
            loaded = _toml(text)
        elif kind in (".yaml", ".yml"):
            import yaml

            loaded = yaml.safe_load(text) or {}
        else:
            raise InputError(f"{path}: a configuration ends in .toml, .yaml or .yml.")
    except ImportError as error:
        raise InputError(
            f'reading {kind} needs {error.name}, which is not installed: pip install "grood-fast'
            '[cli]"'
        ) from error
    except InputError:
        raise
    except Exception as error:  # each parser has its own family
        raise InputError(f"{path} cannot be parsed: {error}") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds no names with values.")
    return loaded


def _toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    loaded: dict[str, Any] = tomllib.loads(text)
    return loaded


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _place(recipe: dict[str, Any], name: str, value: Any) -> None:
    first, _, rest = name.partition(".")
    if not rest:
        recipe[first] = value
        return
    inner = recipe.get(first)
    recipe[first] = dict(inner) if isinstance(inner, Mapping) else {}
    _place(recipe[first], rest, value)
