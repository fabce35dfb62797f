"""Which parameters: the head's, the last block's and what follows, all, or by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from grood_fast.errors import HeadNotFoundError, InputError

DEPTHS = ("head", "last_block", "all")

Parameters = str | tuple[str, ...]
"""One of ``DEPTHS``, or names of parameters or of modules that hold some."""


def checked(parameters: str | Sequence[str]) -> Parameters:
    """A selection as it is kept.

    Raises:
        InputError: neither a depth nor a sequence of names.
    """
    if isinstance(parameters, str):
        if parameters not in DEPTHS:
            raise InputError(
                f"parameters must be one of {', '.join(DEPTHS)} or a list of names, got "
                f"{parameters!r}."
            )
        return parameters
    names = tuple(parameters)
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError("parameters must name at least one parameter or module.")
    return names


def blocks(network: nn.Module) -> list[str]:
    """Names of the repeated parts: elements of a Sequential or ModuleList that hold at least two
    layers with parameters, the innermost of them."""
    found: list[str] = []
    for name, module in network.named_modules():
        parent = network.get_submodule(name.rpartition(".")[0]) if name else None
        if not isinstance(parent, (nn.Sequential, nn.ModuleList)):
            continue
        layers = [m for m in module.modules() if m._parameters and any(
            p is not None for p in m._parameters.values())]  # fmt: skip
        if len(layers) >= 2:
            found.append(name)
    return [a for a in found if not any(b.startswith(f"{a}.") for b in found)]


def resolve(
    parameters: Parameters, network: nn.Module, used: Sequence[str], head: str | None
) -> tuple[str, ...]:
    """Names of the selected parameters, in the order of ``network.named_parameters()``.

    Args:
        parameters: the selection.
        network: the model.
        used: its parameters in the order of their first use.
        head: name of the last linear layer, None if it has none.

    Raises:
        HeadNotFoundError: the head is asked for and there is none.
        InputError: an unknown name, or no block to be found.
    """
    everything = [name for name, p in network.named_parameters() if p.is_floating_point()]
    if parameters == "all":
        return tuple(everything)
    if isinstance(parameters, tuple):
        for name in parameters:
            if not any(_within(parameter, name) for parameter in everything):
                raise InputError(
                    f"the model has no parameter {name!r} and no module of that name with any; "
                    f"the last ones: {', '.join(everything[-8:])}."
                )
        return tuple(p for p in everything if any(_within(p, name) for name in parameters))
    if parameters == "head":
        if head is None:
            raise HeadNotFoundError(
                "the model has no linear head whose parameters could be taken: name some."
            )
        # A head may be tied: its weight then goes by the name it has elsewhere.
        own = {id(p) for p in network.get_submodule(head).parameters()}
        return tuple(name for name, p in network.named_parameters() if id(p) in own)
    candidates = blocks(network)
    for position in reversed(range(len(used))):
        block = next((b for b in candidates if _within(used[position], b)), None)
        if block is not None:
            first = next(i for i, name in enumerate(used) if _within(name, block))
            return tuple(name for name in everything if name in set(used[first:]))
    raise InputError(
        "the model has no blocks (elements of a Sequential or ModuleList with at least two "
        "layers): name the parameters or modules to take."
    )


def _within(parameter: str, name: str) -> bool:
    return parameter == name or parameter.startswith(f"{name}.")
