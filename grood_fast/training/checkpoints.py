"""A training as two files: ``last.safetensors``, all it takes to go on, and ``best.safetensors``,
the best weights so far. Each is replaced at once when the new one is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grood_fast import persistence
from grood_fast.classifier import Classifier
from grood_fast.errors import PersistenceError

LAST, BEST = "last.safetensors", "best.safetensors"
_TRAINING, _WEIGHTS, _VERSION = "training", "trained weights", 1


def write_training(
    folder: Path, header: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write ``last.safetensors``: groups of tensors, and what JSON can hold."""
    tensors = {
        f"{group}/{name}": tensor
        for group, named in parts.items()
        for name, tensor in named.items()
    }
    persistence.write(
        folder / LAST, kind=_TRAINING, version=_VERSION, header=header, tensors=tensors
    )


def read_training(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What :func:`write_training` wrote.

    Raises:
        PersistenceError: there is none, or it is damaged.
    """
    header, tensors = persistence.read(folder / LAST, kind=_TRAINING, version=_VERSION)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        parts.setdefault(group, {})[name] = tensor
    return header, parts


def write_weights(folder: Path, header: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write ``best.safetensors``."""
    persistence.write(
        folder / BEST, kind=_WEIGHTS, version=_VERSION, header=header, tensors=weights
    )


def load_weights(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Any]:
    """Load the weights that a training left in ``best.safetensors``.

    Args:
        path: the file, or the training's folder.
        model: of the same architecture; changed in place.

    Returns:
        What was measured of them: "step", and where there was validation data "accuracy" and
        "auroc".

    Raises:
        PersistenceError: the file is missing, damaged, or belongs to another architecture.
    """
    path = Path(path)
    header, weights = persistence.read(
        path / BEST if path.is_dir() else path, kind=_WEIGHTS, version=_VERSION
    )
    fill(Classifier(model).model, weights, path)
    return header


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict, which has to fit exactly."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise PersistenceError(
            f"{path} holds the weights of another architecture than {type(model).__name__}: {error}"
        ) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state, by the number of the parameter and the name of the tensor."""
    found: dict[str, Tensor] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"{index}/{name}"] = value
    return found


def fill_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` found."""
    parameters = _parameters(optimizer)
    for key, tensor in tensors.items():
        index, _, name = key.partition("/")
        parameter = parameters[int(index)]
        # Counters of steps stay on the CPU; the rest goes where the parameter is, in its layout.
        value = tensor
        if tensor.shape == parameter.shape and tensor.ndim:
            value = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        optimizer.state[parameter][name] = value


def remove_partial_files(folder: Path) -> None:
    """What a killed process left of a file it was writing."""
    for partial in folder.glob(".partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
