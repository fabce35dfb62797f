"""The user's model as a backbone and a linear head."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from threading import RLock
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grood_fast.batches import Batch
from grood_fast.errors import HeadNotFoundError, InputError, ScoreWarning, warn
from grood_fast.layers import LayerOutput, Layers

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]

PROBE_SAMPLES = 2
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
"""How many samples of a batch find the head: one could lose its batch dimension to a squeeze."""

LISTED_CANDIDATES = 8
"""How many of the layers called last an error message lists."""


class Classifier:
    """A trained classifier: logits (B, C) = features (B, D) · weightᵀ + bias.

    The model is only ever lent: it comes back with its modes, gradients, hooks and parameters, and
    the global random states, as they were. Whatever a DDP, DataParallel or ``torch.compile`` wraps
    is called directly, and eagerly, because hooks do not reach into compiled code.

    Args:
        model: any module that returns logits (B, C) as a tensor, in a tuple or list (the first
            2-D tensor), in a mapping ("logits", else its only 2-D tensor) or as ``.logits``.
        head: name of the last linear layer, as in ``model.named_modules()``; found if None.
        precision: None or "fp32" runs the model as it is; "bf16" runs a cached copy of it, with
            the backbone in bfloat16 and the head in float32. The copy is renewed by the first
            batch of a session if a parameter or buffer has changed by then.

    Raises:
        InputError: ``model`` is not a module, or ``precision`` is unknown.
    """

    def __init__(
        self, model: nn.Module, head: str | None = None, precision: Precision | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"Expected a torch.nn.Module, got {type(model).__name__}.")
        if precision not in (None, "fp32", "bf16"):
            raise InputError(f'precision must be "fp32", "bf16" or None, got {precision!r}.')
        self.model = _unwrap(model)
        self.precision: Precision = precision or "fp32"
        self._requested_head = head
        self._found_head: _Head | None = None
        self._first_layer: str | None = None
        self._session: _Session | None = None
        self._fingerprints: dict[str, tuple[list[Any], str]] = {}
        with _LOCKS_LOCK:
            self._lock = _LOCKS.setdefault(self.model, RLock())

    @property
    def head_name(self) -> str:
        """The head's name in ``model.named_modules()``."""
        return self._head.name

    @property
    def num_classes(self) -> int:
        """C, the number of logits."""
        return self._head.num_classes

    @property
    def num_features(self) -> int:
        """D, the length of the penultimate features."""
        return self._head.num_features

    @property
    def weight(self) -> Tensor:
        """The head's weight as it is now, (C, D) float32, detached."""
        return self._parameters()[0].float()

    @property
    def bias(self) -> Tensor | None:
        """The head's bias as it is now, (C,) float32, detached; None if it has none."""
        bias = self._parameters()[1]
        return None if bias is None else bias.float()

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter (or else buffer) is."""
        first = next(_tensors(self.model), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def has_head(self) -> bool:
        """Whether :meth:`find_head` has found one."""
        return self._found_head is not None

    def fingerprint(self, layer: str | None = None) -> str:
        """SHA-256 (hexadecimal) of a layer's weight and bias: their shapes and float32 bytes.

        Args:
            layer: the head, unless told; by its name in ``model.named_modules()`` it needs no
                batch to be found. A module without a weight matrix, such as the model itself
                (``""``), counts with all its parameters and buffers.

        Raises:
            HeadNotFoundError: the head has not been found, or there is no such layer.
        """
        if layer is None:
            module = self._head.module
        else:
            try:
                module = self.model.get_submodule(layer)
            except AttributeError:
                raise HeadNotFoundError(
                    f"{type(self.model).__name__} has no layer {layer!r}."
                ) from None
        name = self.head_name if layer is None else layer
        with self._lock:
            # Asked for before every pass: hashed again only if the layer's tensors changed.
            contents = list(map(_content, _tensors(module)))
            known = self._fingerprints.get(name)
            if known is None or known[0] != contents:
                known = contents, _digest(module)
                self._fingerprints[name] = known
        return known[1]

    def find_head(self, batch: Batch) -> None:
        """Find the layer whose output is the logits, by one forward pass of two samples.

        Candidates are the layers with a weight matrix (C, D), 1x1 convolutions included. The head
        is the last one called whose output is the model's output and equals features · weightᵀ +
        bias. Does nothing if the head has been found before.

        Raises:
            HeadNotFoundError: no layer, or not the named one, is the head; says why for each.
            InputError: the model cannot be called with this batch, or returns no logits (B, C).
        """
        if self._found_head is not None:
            return
        if batch.size == 0:
            raise InputError("The head cannot be found with an empty batch; give one with samples.")
        batch = batch.first(PROBE_SAMPLES).to(self.device)
        calls: list[_Call] = []
        with ExitStack() as stack:
            stack.enter_context(self._lock)
            stack.enter_context(_undisturbed(self.model))
            candidates = self._candidates()
            for name, module in candidates.items():
                stack.enter_context(_recording(name, module, calls, batch.size))
            stack.enter_context(self._finding_the_first_layer())
            logits = _logits(_call(self.model, batch), batch.size)
            rejected: dict[str, str] = {}
            for call in reversed(calls):
                reason = _rejection(call, logits)
                if reason is None:
                    self._found_head = _Head.of(call, calls)
                    return
                rejected.setdefault(call.name, reason)
        for name in candidates:
            rejected.setdefault(name, "it is not called in the forward pass")
        raise HeadNotFoundError(self._no_head(candidates, rejected))

    @contextmanager
    def _finding_the_first_layer(self) -> Iterator[None]:
        """Note the first convolution or linear layer called, if it is given floating point."""
        called: list[tuple[str, bool]] = []

        def note(name: str, inputs: tuple[Any, ...]) -> None:
            floating = any(isinstance(x, Tensor) and x.is_floating_point() for x in inputs)
            called.append((name, floating))

        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if isinstance(module, _LAYERS):
                    hook = module.register_forward_pre_hook(
                        lambda _module, inputs, name=name: note(name, inputs)
                    )
                    stack.callback(hook.remove)
            yield
        if called and called[0][1]:
            self._first_layer = called[0][0]

    @contextmanager
    def session(self, features: bool, layers: frozenset[str] = frozenset()) -> Iterator[None]:
        """Borrow the model for any number of :meth:`forward` calls.

        Inside, the model is in eval mode, and autograd and autocast are off. Other threads that
        want the same model wait. On exit, also by an exception or
        KeyboardInterrupt, each submodule's mode, the hooks and the random states of torch (the CPU
        and the model's CUDA devices), NumPy and Python are as they were. This is ``no_grad``
        rather than ``inference_mode``: what a model or data set computes once and keeps (rotary
        tables, decoded samples) would otherwise be unusable in later training.

        Args:
            features: whether :meth:`forward` returns the penultimate features. They need a linear
                head; logits alone do not.
            layers: which layers' outputs are kept of the last forward pass, for :meth:`layer` and
                :meth:`stages`; see :class:`~grood_fast.layers.Layers`.
        """
        with ExitStack() as stack:
            stack.enter_context(self._lock)
            stack.callback(setattr, self, "_session", self._session)
            stack.enter_context(_undisturbed(self.model))
            self._session = _Session(features, layers, stack)
            yield

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Logits (B, C) and penultimate features (B, D) of one batch, inside a session.

        Args:
            batch: on any device; moved to the model's.

        Returns:
            Logits, and the head's input, or None if the session was opened without features. In
            the model's own dtype; float32 if ``precision`` is "bf16".

        Raises:
            HeadNotFoundError: features are wanted and the model has no linear head.
            InputError: called outside a session; the model cannot be called with this batch, or
                does not return one row of logits a sample.
        """
        network, session = self.network(batch), self._session
        assert session is not None
        session.batch = self._model_inputs(batch)
        if session.layers is not None:
            session.layers.begin()
        return self._run(network, session, session.batch)

    def layers(self) -> dict[str, LayerOutput]:
        """The layers' outputs in the last forward pass, by the needs the session was opened with.

        The network is resumed from them until the next forward pass.
        """
        session = self._session
        if session is None or session.layers is None:
            return {}
        layers, batch, network = session.layers, session.batch, session.network

        def resumed(need: str, activation: Tensor) -> tuple[Tensor, Tensor | None]:
            if self._session is not session or session.batch is not batch:
                raise InputError(
                    "the pass has moved on: a network is resumed from the layers of its last batch."
                )
            assert network is not None
            assert batch is not None
            with layers.replaced(need, activation):
                return self._run(network, session, batch)

        return {
            need: LayerOutput(*layers.output(need), partial(resumed, need)) for need in layers.needs
        }

    def stages(self) -> dict[str, Tensor]:
        """What the last forward pass left at the end of every stage: layer → (B, ...)."""
        session = self._session
        return {} if session is None or session.layers is None else session.layers.stages()

    def _model_inputs(self, batch: Batch) -> Batch:
        """The batch as the session's network takes it."""
        batch = batch.to(self.device)
        if self.precision == "bf16":
            dtype = torch.bfloat16 if self._first_in_bf16 else torch.float32
            batch = batch.map_inputs(lambda tensor: _cast(tensor, dtype))
        return batch

    def _run(
        self, network: nn.Module, session: _Session, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        session.calls.clear()
        try:
            output = _call(network, batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if self.precision == "bf16" and "BFloat16" in str(error):
                raise InputError(
                    f"{type(self.model).__name__} cannot run in bfloat16 ({error}): "
                    'it makes tensors of a fixed dtype inside. Use precision="fp32".'
                ) from error
            raise
        logits = _logits(output, batch.size)
        features = self._features(session.calls, batch.size) if session.features else None
        if self.precision == "bf16":
            return logits.float(), None if features is None else features.float()
        return logits, features

    def differentiable(self, batch: Batch, features: bool = False) -> tuple[Tensor, Tensor | None]:
        """Logits (B, C) and, if asked for, penultimate features (B, D), for training.

        The model runs as it stands: in its own mode, recorded by autograd, under the caller's
        autocast, outside of any session. The batch is taken to be on the model's device.

        Raises:
            HeadNotFoundError, InputError: as :meth:`forward`.
        """
        if not features:
            return _logits(_call(self.model, batch), batch.size), None
        self.find_head(batch)
        calls: list[_Call] = []
        with _recording(self.head_name, self._head.module, calls):
            logits = _logits(_call(self.model, batch), batch.size)
        return logits, self._features(calls, batch.size)

    @property
    def trainable_weight(self) -> Tensor:
        """The head's weight, (C, D), as autograd knows it."""
        return cast(Tensor, self._head.module.weight).flatten(1)

    def network(self, batch: Batch) -> nn.Module:
        """The module that :meth:`forward` runs, inside a session: the model, or a copy of it.

        Args:
            batch: the head is found with it, if it is needed and was not found before.

        Raises:
            HeadNotFoundError: features are wanted and the model has no linear head.
            InputError: called outside a session.
        """
        session = self._session
        if session is None:
            raise InputError(
                "forward() and network() work only inside `with classifier.session(...):`."
            )
        if session.network is None:
            session.network = self._prepare(session, batch)
            self._attach_layers(session, session.network, batch)
        return session.network

    def _attach_layers(self, session: _Session, network: nn.Module, batch: Batch) -> None:
        if not session.wanted_layers:
            return
        try:
            self.find_head(batch)
        except HeadNotFoundError:
            logger.info("%s has no linear head to end its stages", type(network).__name__)
        inputs = self._model_inputs(batch.first(PROBE_SAMPLES))
        head = self._found_head.name if self._found_head is not None else None
        layers = Layers(network, session.wanted_layers, lambda: _call(network, inputs), head)
        session.calls.clear()
        session.stack.enter_context(layers.attached())
        session.layers = layers

    @property
    def _head(self) -> _Head:
        if self._found_head is None:
            raise HeadNotFoundError(
                "The head has not been looked for yet: call find_head(batch) with a batch of data."
            )
        return self._found_head

    @property
    def _first_in_bf16(self) -> bool:
        """Whether the first layer runs in bfloat16 as well: the head, and what is given integers,
        are another matter."""
        head = None if self._found_head is None else self._found_head.name
        return self._first_layer in (None, head)

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        # In eval mode: reading a spectrally normalised weight in training mode would change it.
        head = self._head.module
        with self._lock, _undisturbed(head):
            return _weight_matrix(head), _bias_vector(head)

    def _candidates(self) -> dict[str, nn.Module]:
        if self._requested_head is None:
            return {n: m for n, m in self.model.named_modules() if _has_weight_matrix(m)}
        name = self._requested_head
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            module = None
        if module is None or not _has_weight_matrix(module):
            known = [n for n, m in self.model.named_modules() if _has_weight_matrix(m)]
            fault = "there is no such module" if module is None else "it has no weight matrix"
            raise HeadNotFoundError(
                f"head={name!r} cannot be the head of {type(self.model).__name__}: {fault}. "
                f"Layers with one, the last ones: {known[-LISTED_CANDIDATES:]}."
            )
        return {name: module}

    def _no_head(self, candidates: dict[str, nn.Module], rejected: dict[str, str]) -> str:
        lines = [
            f"No linear head found in {type(self.model).__name__}: a head is the layer whose "
            "output is the model's output and equals features · weightᵀ + bias."
        ]
        lines += [
            f"  {name or '(the model itself)'}: {type(candidates[name]).__name__}: {reason}"
            for name, reason in list(rejected.items())[:LISTED_CANDIDATES]
        ]
        if not rejected:
            lines.append(
                "  It has no layer with a weight matrix (inside TorchScript none can be seen)."
            )
        elif len(rejected) > LISTED_CANDIDATES:
            lines.append(f"  ... and {len(rejected) - LISTED_CANDIDATES} more")
        lines.append(
            'Pass head="name" to choose a layer, and make the model return that layer\'s output '
            "unchanged. Scores that need only logits (such as energy) work without a head."
        )
        return "\n".join(lines)

    def _prepare(self, session: _Session, batch: Batch) -> nn.Module:
        """The module that the session's batches go through, with its head recorded."""
        network = self.model
        if session.features:
            self.find_head(batch)
        if self.precision == "bf16":
            try:
                self.find_head(batch)
            except HeadNotFoundError:
                logger.info(
                    "%s has no linear head: all of it runs in bfloat16", type(network).__name__
                )
            network = _bf16_copy(
                network, self._found_head, None if self._first_in_bf16 else self._first_layer
            )
        if session.features:
            head = network.get_submodule(self.head_name)
            session.stack.enter_context(_recording(self.head_name, head, session.calls))
        return network

    def _features(self, calls: list[_Call], size: int) -> Tensor:
        expected = (size, self.num_features)
        if len(calls) < -self._head.call:
            raise InputError(
                f"The head {self.head_name!r} was not called for this batch, as it was for the "
                "first: the model must take the same path for every batch."
            )
        features = calls[self._head.call].features
        calls.clear()
        assert features is not None  # the head was chosen because it maps a tensor
        if features.numel() != size * self.num_features:
            raise InputError(
                f"The head {self.head_name!r} was given {tuple(features.shape)}, expected "
                f"{expected}, as for the first batch: inputs must keep their size."
            )
        return features.reshape(expected)


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a layer: what went in and what came out."""

    name: str
    module: nn.Module
    features: Tensor | None
    output: Any


@dataclass(frozen=True, eq=False)
class _Head:
    """The last linear layer. ``call`` counts its calls in one forward pass from the end: -1, ..."""

    name: str
    module: nn.Module
    call: int
    num_classes: int
    num_features: int

    @classmethod
    def of(cls, call: _Call, calls: list[_Call]) -> _Head:
        own = [other for other in calls if other.module is call.module]
        classes, features = _weight_matrix(call.module).shape
        return cls(call.name, call.module, own.index(call) - len(own), classes, features)


@dataclass(eq=False)
class _Session:
    features: bool
    wanted_layers: frozenset[str]
    stack: ExitStack
    network: nn.Module | None = None
    layers: Layers | None = None
    batch: Batch | None = None
    calls: list[_Call] = field(default_factory=list)


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile; its class lives in torch._dynamo,
            model = cast(nn.Module, model._modules["_orig_mod"])  # which is slow to import
        else:
            return model


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_LOCKS_LOCK = RLock()


def _digest(module: nn.Module) -> str:
    """SHA-256 of a layer's weight and bias, or of all tensors of a module without a weight."""
    with _undisturbed(module):
        tensors: Iterable[Tensor | None] = (
            (_weight_matrix(module), _bias_vector(module))
            if _has_weight_matrix(module)
            else [tensor.detach() for tensor in _tensors(module)]
        )
        digest = hashlib.sha256()
        for tensor in tensors:
            if tensor is not None:
                digest.update(str(tuple(tensor.shape)).encode())
                values = tensor.float().cpu().contiguous().numpy()
                digest.update(values.astype("<f4", copy=False).data)
    return digest.hexdigest()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no autograd, no compiled code; afterwards everything is as it was found.

    The modes are set flag by flag: ``eval()`` and ``train()`` may be overridden and do more.
    """
    modes = [(module, module.training) for module in model.modules()]
    cuda = {tensor.device.index for tensor in _tensors(model) if tensor.device.type == "cuda"}
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(cuda)))
        stack.callback(np.random.set_state, numpy_state)
        stack.callback(random.setstate, python_state)
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", *(tensor.device.type for tensor in _tensors(model))} & {"cpu", "cuda"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module, training in modes:
            stack.callback(setattr, module, "training", training)
            module.training = False
        yield


@contextmanager
def _recording(
    name: str, module: nn.Module, calls: list[_Call], size: int | None = None
) -> Iterator[None]:
    """Append every call of a layer to ``calls``.

    With ``size``, the number of samples, only the shapes of what has several positions a sample:
    it cannot be logits, and together it is as large as the whole forward pass.
    """

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        features = next(inputs, None)
        if size is not None and isinstance(out, Tensor) and out.numel() > size * out_features:
            out = out.to("meta")
            features = None if features is None else features.to("meta")
        calls.append(_Call(name, module, features, out))

    out_features = cast(Tensor, module.weight).shape[0]

    handle = module.register_forward_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _call(network: nn.Module, batch: Batch) -> Any:
    try:
        return network(*batch.args, **batch.kwargs)
    except TypeError as error:
        try:
            inspect.signature(network.forward).bind(*batch.args, **batch.kwargs)
        except TypeError as mismatch:
            raise InputError(
                f"{type(network).__name__} cannot be called with this batch: {mismatch}. Keys of "
                "a mapping must be the model's argument names; else let the loader yield (x, y)."
            ) from error
        raise


def _logits(output: Any, size: int) -> Tensor:
    """The logits (B, C) in whatever the model returned."""
    logits = _find_logits(output)
    shape = tuple(logits.shape)
    if logits.ndim == 3:
        raise InputError(
            f"The model returns {shape}, one prediction a token or position; expected logits of "
            f"shape ({size}, C). Pool them, or pick one token, in the model."
        )
    if logits.ndim != 2 or not logits.is_floating_point():
        raise InputError(
            f"The model returns a {logits.dtype} tensor of shape {shape}; expected floating-point "
            f"logits of shape ({size}, C). A squeeze() or a missing flatten in it may be the cause."
        )
    if logits.shape[0] != size:
        raise InputError(
            f"The model returns {shape}, {logits.shape[0]} rows for a batch of {size} samples; "
            "expected one row of logits a sample."
        )
    return logits


def _find_logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    if isinstance(output, Mapping):
        found = _matrices(output.values())
        if len(found) == 1:
            return found[0]
        raise InputError(
            f"The model returns a mapping with the keys {list(output)[:8]}; expected its logits "
            f'under "logits", or exactly one 2-D tensor, not {len(found)}.'
        )
    if isinstance(output, (tuple, list)):
        found = _matrices(output)
        if len({matrix.shape[1] for matrix in found}) > 1:
            warn(
                f"The model returns several matrices, {[tuple(m.shape) for m in found]}: the first "
                "is taken for the logits. Wrap the model if that is wrong.",
                ScoreWarning,
            )
        if found:
            return found[0]
    raise InputError(
        f"The model returns {type(output).__name__}, in which there are no logits (B, C); expected "
        "a tensor, a tuple or list with a 2-D tensor, a mapping, or an object with .logits."
    )


def _matrices(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.ndim == 2]


def _has_weight_matrix(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):  # its calls cannot be observed
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim >= 2


def _weight_matrix(module: nn.Module) -> Tensor:
    """(C, D). A convolution whose kernel covers its whole input is a linear layer as well."""
    return cast(Tensor, module.weight).detach().flatten(1)


def _bias_vector(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias.detach().flatten() if isinstance(bias, Tensor) else None


def _rejection(call: _Call, logits: Tensor) -> str | None:
    """Why a call is not the head's, or None if it is."""
    features, output = call.features, call.output
    if features is None or not isinstance(output, Tensor):
        return "it does not map a tensor to a tensor"
    size, classes = logits.shape
    weight, bias = _weight_matrix(call.module), _bias_vector(call.module)
    shapes = f"it returns {tuple(output.shape)}, the model {tuple(logits.shape)}"
    if output.numel() != logits.numel() or output.is_meta:
        if output.ndim > 2 and weight.shape[0] == classes:
            return (
                f"{shapes}: it gives one set of logits a position, and pooling them or picking one "
                "comes after, so that no one feature vector makes the logits"
            )
        return shapes
    if not torch.equal(_comparable(output.reshape(logits.shape)), _comparable(logits)):
        return "its output has the shape of the model's output but not its values"
    if weight.shape[0] != classes or features.numel() != size * weight.shape[1]:
        return f"its weight {tuple(weight.shape)} does not fit its input {tuple(features.shape)}"
    expected = F.linear(
        features.reshape(size, -1).cpu().double(),
        weight.cpu().double(),
        None if bias is None else bias.cpu().double(),
    )
    error = (expected - logits.cpu().double()).abs().max()
    # Half-precision formats round the logits; TF32 rounds a float32 product's factors.
    tolerance = 2e-2 if logits.element_size() == 2 or features.element_size() == 2 else 2e-3
    if error > tolerance * expected.abs().max():
        return (
            "its output is the model's output but not features · weightᵀ + bias, off by up to "
            f"{error:.2g}: an adapter that is not merged, a normalised or a quantised layer?"
        )
    return None


def _comparable(tensor: Tensor) -> Tensor:
    return tensor.double().cpu().nan_to_num()


@dataclass(frozen=True, eq=False)
class _Copy:
    """A bf16 copy of a model, and what the model held when it was made."""

    network: nn.Module
    contents: list[tuple[Any, ...]]


_COPIES: WeakKeyDictionary[nn.Module, _Copy] = WeakKeyDictionary()


def _bf16_copy(model: nn.Module, head: _Head | None, first: str | None) -> nn.Module:
    """The model with its backbone in bfloat16 and channels_last, its head in float32.

    ``first`` names the layer that is given the inputs. It stays in float32: rounding the inputs is
    no noise where many pixels have the same value, such as a background.
    """
    name = None if head is None else head.name
    contents = [(name, first), *map(_content, _tensors(model))]
    cached = _COPIES.get(model)
    if cached is not None and cached.contents == contents:
        return cached.network
    network = _make_bf16_copy(model, head, first)
    if cached is None:
        size = sum(tensor.nbytes for tensor in _tensors(network))
        logger.info("bf16 copy of %s: %.1f MiB", type(model).__name__, size / 2**20)
    _COPIES[model] = _Copy(network, contents)
    return network


def _make_bf16_copy(model: nn.Module, head: _Head | None, first: str | None) -> nn.Module:
    kept: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._NormBase,)
    if all(tensor.device.type == "cpu" for tensor in _tensors(model)):
        # Here too torch mixes bf16 inputs with float32 parameters, at no cost.
        kept += (nn.LayerNorm, nn.GroupNorm)
    # deepcopy takes what its memo holds for a copy, so nothing is copied in float32 first.
    memo: dict[int, Any] = {}
    for module in model.modules():
        dtype = torch.float32 if isinstance(module, kept) else torch.bfloat16
        for parameter in module.parameters(recurse=False):
            memo.setdefault(id(parameter), _parameter(parameter, dtype))
        for buffer in module.buffers(recurse=False):
            memo.setdefault(id(buffer), _cast(buffer, dtype, copy=True))
    try:
        network = copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f'precision="bf16" runs a copy of the model, and {type(model).__name__} cannot be '
            f'copied ({error}). Use precision="fp32".'
        ) from error
    in_float32 = [name for name in {None if head is None else head.name, first} if name is not None]
    for name in in_float32:
        _keep_in_float32(model.get_submodule(name), network.get_submodule(name))
    if first is not None:
        network.get_submodule(first).register_forward_hook(_downcast_output)
        done = {part for name in in_float32 for part in network.get_submodule(name).modules()}
        for module in network.modules():
            if isinstance(module, _LAYERS) and module not in done:
                module.register_forward_pre_hook(_downcast_inputs, with_kwargs=True)
    return network


def _keep_in_float32(original: nn.Module, copied: nn.Module) -> None:
    # Not through the memo: a tied head shares its weight with a part of the backbone.
    for source, module in zip(original.modules(), copied.modules(), strict=True):
        for key, parameter in source.named_parameters(recurse=False):
            module._parameters[key] = _parameter(parameter, torch.float32)
        for key, buffer in source.named_buffers(recurse=False):
            module._buffers[key] = _cast(buffer, torch.float32, copy=True)
    copied.register_forward_pre_hook(_upcast_inputs, with_kwargs=True)


def _cast(tensor: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """In another dtype, images and convolution weights in channels_last; integers as they are."""
    if not tensor.is_floating_point():
        return tensor.clone() if copy else tensor
    layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
    return tensor.to(dtype, copy=copy, memory_format=layout)


def _parameter(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(_cast(tensor.detach(), dtype, copy=True), requires_grad=False)


def _content(tensor: Tensor) -> tuple[Any, ...]:
    """Changes with the tensor's values.

    The version counter misses writes through ``.data`` and by fused optimizers; the sum of the
    values' bits, exact in integers, would miss a permutation.
    """
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(tensor.itemsize, torch.int64)
    total = tensor.detach().view(bits).sum().item()
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tensor.shape, tensor.dtype, version, total


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _upcast_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return _cast_arguments(args, kwargs, torch.float32)


def _downcast_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    return _cast_arguments(args, kwargs, torch.bfloat16)


def _downcast_output(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
    return _cast(output, torch.bfloat16) if isinstance(output, Tensor) else output


def _cast_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Arguments:
    def cast_value(value: Any) -> Any:
        return _cast(value, dtype) if isinstance(value, Tensor) else value

    return tuple(map(cast_value, args)), {key: cast_value(v) for key, v in kwargs.items()}
