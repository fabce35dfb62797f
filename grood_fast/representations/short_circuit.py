"""Logits after the features that speak loudest for the predicted class were taken away."""

from __future__ import annotations

from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from grood_fast import ops
from grood_fast.classifier import Classifier
from grood_fast.errors import InputError
from grood_fast.layers import LayerOutput, layer_need
from grood_fast.representations.base import Representation
from grood_fast.representations.forward import Logits
from grood_fast.signals import LogitStatistics, Signals

HEAD = "head"
SPARSE = 1 / 8
"""Up to this share of removed features, taking their contributions off is cheaper than a product
with what is left."""


class ShortCircuitedStatistics(LogitStatistics):
    """Short-circuited logits for any score on logits, with those they were before.

    Attributes:
        before: the network's own.
    """

    def __init__(self, logits: Tensor, before: LogitStatistics) -> None:
        super().__init__(logits)
        self.before = before


class ShortCircuitedLogits(Representation):
    """GSC's logits: features that decide the predicted logit are set to zero.

    With F the features at a layer and c the predicted class, the k coordinates with the largest
    |g_i|, g = df_c/dF, are removed, F′ = F without them, and the logits become f + J (F′ − F), J =
    df/dF.

    On the head itself the network from F on is linear: g is the row w_c of the weight, so **which
    coordinates are removed depends on the predicted class alone** (a pruning by weight magnitude
    for each class), and the logits are exact. A mask of each sample's own needs a layer with
    something non-linear behind it.

    Args:
        layer: ``"head"``: the penultimate features; else the layer whose output is F, by its name
            in ``model.named_modules()``, or None for the end of the last stage but one.
        share: of the coordinates to remove, at least one.
        by: ``"gradient"``: the largest |g_i|; ``"contribution"``: the largest g_i F_i, which leaves
            out what speaks against the class, and is a mask of each sample's own on the head too.
        logits: behind a layer, ``"first_order"``: f + J (F′ − F) by one forward-mode product;
            ``"predicted"``: the same for the predicted logit only, the others stay; ``"exact"``: a
            second forward pass from F′.

    Raises:
        InputError: for a setting out of range.
    """

    name = "short_circuited_logits"

    def __init__(
        self,
        layer: str | None = HEAD,
        share: float = 0.05,
        by: Literal["gradient", "contribution"] = "gradient",
        logits: Literal["first_order", "predicted", "exact"] = "first_order",
    ) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise InputError(f"share must lie in (0, 1], got {share}.")
        if by not in ("gradient", "contribution"):
            raise InputError(f"by must be 'gradient' or 'contribution', got {by!r}.")
        if logits not in ("first_order", "predicted", "exact"):
            raise InputError(
                f"logits must be 'first_order', 'predicted' or 'exact', got {logits!r}."
            )
        self.layer, self.share, self.by, self.logits = layer, share, by, logits
        self.needs = frozenset({"features" if layer == HEAD else layer_need(layer)})
        self._head: _HeadMasks | None = None

    def config(self) -> dict[str, Any]:
        return {"layer": self.layer, "share": self.share, "by": self.by, "logits": self.logits}

    def __call__(self, signals: Signals) -> ShortCircuitedStatistics:
        if self.layer == HEAD:
            logits = self._on_the_head(signals)
        else:
            logits = self._behind(signals.layer(self.layer), signals)
        return ShortCircuitedStatistics(logits, signals.statistics)

    def activations(self) -> Logits:
        """The logits as they were."""
        return Logits()

    def _removed(self, gradient: Tensor, features: Tensor) -> Tensor:
        """(B, k) coordinates to remove, of (B, n) gradients and features."""
        importance = gradient.abs() if self.by == "gradient" else gradient * features
        count = max(1, int(self.share * importance.shape[1]))
        return importance.topk(count, dim=1).indices

    # --- on the head, where everything behind is linear -----------------------------------------

    def _on_the_head(self, signals: Signals) -> Tensor:
        classifier = signals.known_classifier
        if self._head is None or not self._head.serves(classifier):
            self._head = _HeadMasks(self, classifier)
        weight, predicted = self._head.weight, signals.predictions
        features = signals.features.to(weight.dtype)
        if self.by == "gradient":
            removed = self._head.masks[predicted]
        else:
            removed = self._removed(weight[predicted], features)
        before = signals.logits.to(weight.dtype)
        if self.logits == "predicted":
            rows = weight[predicted].gather(1, removed)
            drop = (rows * features.gather(1, removed)).sum(dim=1, keepdim=True)
            return before.scatter_add(1, predicted.unsqueeze(1), -drop)
        if removed.shape[1] > SPARSE * features.shape[1]:
            kept = features.scatter(1, removed, 0.0)
            return functional.linear(kept, weight, self._head.bias)
        return ops.short_circuit_logits(before, features, self._head.weight_t, removed)

    # --- behind any layer -----------------------------------------------------------------------

    def _behind(self, layer: LayerOutput, signals: Signals) -> Tensor:
        features = layer.activation
        if not features.is_floating_point():
            raise InputError(f"the layer {layer.name!r} returns no floating-point numbers.")
        with torch.inference_mode(False), torch.enable_grad():
            leaf = features.clone().requires_grad_()
            predicted = signals.predictions.unsqueeze(1)
            chosen = layer.resume(leaf)[0].gather(1, predicted)
            if not chosen.requires_grad:
                raise InputError(
                    f"the predicted logit has no gradient at the layer {layer.name!r}: the model "
                    "turns autograd off behind it."
                )
            (gradient,) = torch.autograd.grad(chosen.sum(), leaf)
        flat = features.flatten(1)
        removed = self._removed(gradient.flatten(1), flat)
        if self.logits == "predicted":
            rows = gradient.flatten(1).gather(1, removed) * flat.gather(1, removed)
            drop = rows.to(signals.logits.dtype).sum(dim=1, keepdim=True)
            return signals.logits.scatter_add(1, predicted, -drop)
        kept = flat.scatter(1, removed, 0.0).reshape(features.shape)
        if self.logits == "exact":
            return layer.resume(kept)[0]
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            forward_ad.dual_level(),
            sdpa_kernel(SDPBackend.MATH),  # the only attention with a forward-mode derivative
        ):
            tangent = kept - features
            dual = forward_ad.make_dual(  # type: ignore[no-untyped-call]
                features.clone(), tangent
            )
            try:
                change = forward_ad.unpack_dual(  # type: ignore[no-untyped-call]
                    layer.resume(dual)[0]
                ).tangent
            except NotImplementedError as error:
                raise InputError(
                    f"a layer behind {layer.name!r} has no forward-mode derivative ({error}): use "
                    "logits='exact'."
                ) from error
            return signals.logits if change is None else signals.logits + change


class _HeadMasks:
    """The head's weight as it is now, and the coordinates to remove for every class."""

    def __init__(self, short_circuit: ShortCircuitedLogits, classifier: Classifier) -> None:
        self._classifier = ref(classifier)
        self.weight, self.bias = classifier.weight, classifier.bias
        self._version = self._content(self.weight)
        self.weight_t = self.weight.T.contiguous()
        self.masks = short_circuit._removed(self.weight, torch.ones_like(self.weight))

    def serves(self, classifier: Classifier) -> bool:
        if self._classifier() is not classifier:
            return False
        return self._version == self._content(classifier.weight)

    @staticmethod
    def _content(weight: Tensor) -> tuple[int, int]:
        return weight.data_ptr(), weight._version
