"""The user's model as backbone and head: found, read, and given back as it was."""

from __future__ import annotations

import gc
import hashlib
import logging
import random
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peers import import_torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from grood_fast import classifier as module_under_test
from grood_fast.batches import parse_batch, preview
from grood_fast.classifier import Classifier
from grood_fast.errors import HeadNotFoundError, InputError, ScoreWarning

B, C, D = 5, 4, 6
IMAGES = torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def backbone(width: int = D) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class Net(nn.Module):
    """A backbone and a head; ``after`` makes the model's output of the logits."""

    def __init__(
        self, head: nn.Module | None = None, after: Callable[[Tensor], Any] | None = None
    ) -> None:
        super().__init__()
        self.unused = nn.Linear(3, C)
        self.backbone = backbone()
        self.head = nn.Linear(D, C) if head is None else head
        self.after = after

    def forward(self, x: Tensor) -> Any:
        logits = self.head(self.backbone(x))
        return logits if self.after is None else self.after(logits)


def found(model: nn.Module, inputs: Any = IMAGES, **options: Any) -> Classifier:
    """The classifier, its head found and its forward checked against weight and bias."""
    classifier = Classifier(model, **options)
    batch = parse_batch(inputs)
    classifier.find_head(batch)
    with classifier.session(features=True):
        logits, features = classifier.forward(batch)
    assert logits.shape == (batch.size, classifier.num_classes)
    assert features is not None
    assert features.shape == (batch.size, classifier.num_features)
    assert classifier.weight.shape == (classifier.num_classes, classifier.num_features)
    assert classifier.weight.dtype == torch.float32
    assert not classifier.weight.requires_grad
    torch.testing.assert_close(
        logits, F.linear(features, classifier.weight, classifier.bias), rtol=1e-4, atol=1e-4
    )
    return classifier


class Functional(nn.Module):
    """A quantised or adapted layer as packages write them: a (C, D) weight, no nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("integers", torch.randint(-8, 8, (C, D), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(C, 1))

    @property
    def weight(self) -> Tensor:
        return self.integers * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Adapted(nn.Module):
    """A low-rank adapter around a linear layer; ``weight`` is the base's, as in PEFT."""

    def __init__(self, rank_one: float) -> None:
        super().__init__()
        self.base = nn.Linear(D, C)
        self.rank_one = rank_one

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.rank_one * x.sum(1, keepdim=True)


class Subclass(nn.Linear):
    pass


HEADS: dict[str, Callable[[], tuple[nn.Module, str]]] = {
    "linear": lambda: (Net(), "head"),
    "no bias": lambda: (Net(nn.Linear(D, C, bias=False)), "head"),
    "subclass": lambda: (Net(Subclass(D, C)), "head"),
    "one class": lambda: (Net(nn.Linear(D, 1)), "head"),
    "bias in front": lambda: (
        Net(nn.Sequential(nn.Linear(D, 9), nn.ReLU(), nn.Linear(9, C))),
        "head.2",
    ),
    "square layers": lambda: (Net(nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))), "head.1"),
    "dropout after": lambda: (
        Net(nn.Sequential(nn.Linear(D, C), nn.Dropout(), nn.Identity())),
        "head.0",
    ),
    "1x1 convolution": lambda: (
        Net(nn.Sequential(nn.Unflatten(1, (D, 1, 1)), nn.Conv2d(D, C, 1), nn.Flatten())),
        "head.1",
    ),
    "convolution over the whole map": lambda: (
        nn.Sequential(nn.Conv2d(3, C, 8), nn.Flatten()),
        "0",
    ),
    "squeezed": lambda: (
        Net(nn.Sequential(nn.Unflatten(1, (D, 1, 1)), nn.Conv2d(D, C, 1)), lambda f: f[..., 0, 0]),
        "head.1",
    ),
    "weight norm": lambda: (Net(parametrizations.weight_norm(nn.Linear(D, C))), "head"),
    "spectral norm": lambda: (Net(parametrizations.spectral_norm(nn.Linear(D, C))), "head"),
    "quantised": lambda: (Net(Functional()), "head"),
    "merged adapter": lambda: (Net(Adapted(0.0)), "head"),
    "zero weights": lambda: (Net(zeroed(nn.Linear(D, C))), "head"),
    "tuple": lambda: (Net(after=lambda f: (f.sum(), f, f * 2)), "head"),
    "list": lambda: (Net(after=lambda f: [f]), "head"),
    "mapping": lambda: (Net(after=lambda f: {"features": f * 2, "logits": f}), "head"),
    "mapping without logits": lambda: (Net(after=lambda f: {"loss": f.sum(), "out": f}), "head"),
    "object": lambda: (Net(after=lambda f: SimpleNamespace(logits=f)), "head"),
    "data parallel": lambda: (nn.DataParallel(Net()), "head"),
    "compiled": lambda: (torch.compile(Net(), backend="eager"), "head"),
    "the model itself": lambda: (nn.Linear(8, C), ""),
}


def zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@pytest.mark.parametrize("shape", HEADS)
def test_heads_of_every_shape(shape: str) -> None:
    model, name = HEADS[shape]()
    inputs = IMAGES[:, 0, 0] if name == "" else IMAGES
    assert found(model, inputs).head_name == name
    assert found(model, inputs, head=name).head_name == name


def test_compiled_parts_and_compiled_in_place() -> None:
    whole, part = Net(), Net()
    whole.compile(backend="eager")
    whole.eval()(IMAGES)  # compiled before any hook of ours exists
    assert found(whole).head_name == "head"
    part.head = torch.compile(part.head, backend="eager")
    assert found(part).head_name == "head"
    assert found(part, precision="bf16").head_name == "head"


def test_distributed_data_parallel(tmp_path: Any) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Net())
        classifier = found(torch.compile(model, backend="eager"))
        assert classifier.head_name == "head"
        assert classifier.model is model.module
    finally:
        torch.distributed.destroy_process_group()


def test_tied_weights_and_repeated_calls() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(C, D)
            self.head = nn.Linear(D, C, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            features = self.embedding(ids).mean(1)
            logits = self.head(features)
            self.head(features * 2)  # an auxiliary output, called after the logits
            return logits

    ids = torch.randint(C, (B, 3))
    classifier = found(Tied(), ids)
    assert classifier.head_name == "head"
    half = found(classifier.model, ids, precision="bf16")
    assert torch.equal(half.weight, classifier.model.embedding.weight)


def test_weight_and_bias_are_live() -> None:
    model = Net()
    classifier = found(model)
    before = classifier.fingerprint()
    assert before == found(model).fingerprint()
    assert len(bytes.fromhex(before)) == 32
    with torch.no_grad():
        model.head.bias[1] = 7
    assert classifier.bias[1] == 7
    changed = classifier.fingerprint()
    assert changed != before
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    assert classifier.weight[0, 0] == model.head.weight[0, 0]
    assert classifier.fingerprint() not in (before, changed)
    assert found(Net(nn.Linear(D, C, bias=False))).bias is None


def test_reading_the_weight_in_training_mode_changes_nothing() -> None:
    model = Net(parametrizations.spectral_norm(nn.Linear(D, C)))
    classifier = found(model)
    before = fingerprint_of(model)
    for _ in range(3):
        classifier.fingerprint()
    assert fingerprint_of(model) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, C), nn.Softmax(1)), "not its values"),
        (nn.Sequential(nn.Conv2d(3, C, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "pooling"),
        (Net(Adapted(1.0)), "adapter that is not merged"),
        (Net(after=lambda f: f / 2), "not its values"),
        (Net(after=lambda f: f.mul_(3)), "off by up to"),
        (Net(after=lambda f: torch.cat([f, f], 1)), r"returns \(2, 4\), the model \(2, 8\)"),
        (nn.Sequential(nn.Flatten()), "no layer with a weight matrix"),
    ],
    ids=["softmax", "pooled", "adapter", "temperature", "in place", "two heads", "none"],
)
def test_models_without_a_head_say_why(model: nn.Module, message: str) -> None:
    classifier = Classifier(model)
    batch = parse_batch(IMAGES)
    with pytest.raises(HeadNotFoundError, match=message) as error:
        classifier.find_head(batch)
    assert 'head="name"' in str(error.value)
    with pytest.raises(HeadNotFoundError), classifier.session(features=True):
        classifier.forward(batch)
    with classifier.session(features=False):
        logits, features = classifier.forward(batch)
    assert features is None
    model.eval()
    assert torch.equal(logits, model(IMAGES))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_gives_logits_but_no_head() -> None:
    model = Net().backbone.append(nn.Linear(D, C))
    classifier = Classifier(torch.jit.script(model))
    with pytest.raises(HeadNotFoundError, match="TorchScript"):
        classifier.find_head(parse_batch(IMAGES))
    with classifier.session(features=False):
        logits, _ = classifier.forward(parse_batch(IMAGES))
    torch.testing.assert_close(logits, model.eval()(IMAGES))


def test_a_named_head_is_verified() -> None:
    batch = parse_batch(IMAGES)
    with pytest.raises(HeadNotFoundError, match=r"unused: Linear: it is not called"):
        Classifier(Net(), head="unused").find_head(batch)
    with pytest.raises(HeadNotFoundError, match=r"no such module.*'head'"):
        Classifier(Net(), head="fc").find_head(batch)
    with pytest.raises(HeadNotFoundError, match="no weight matrix"):
        Classifier(Net(), head="backbone").find_head(batch)
    with pytest.raises(HeadNotFoundError, match="call find_head"):
        _ = Classifier(Net()).weight


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda f: f[:, None].expand(-1, 7, -1), "one prediction a token"),
        (lambda f: f[:, 0], r"shape \(2,\)|shape \(5,\)"),
        (lambda f: f[:1], "1 rows for a batch of"),
        (lambda f: f.argmax(1, keepdim=True), "int64"),
        (lambda f: {"a": f, "b": f}, "not 2"),
        (lambda f: {"a": f.sum()}, "not 0"),
        (lambda f: (f.sum(),), "no logits"),
        (lambda f: None, "NoneType"),
    ],
)
def test_outputs_that_are_not_logits(after: Callable[[Tensor], Any], message: str) -> None:
    classifier = Classifier(Net(after=after))
    batch = parse_batch(IMAGES)
    with pytest.raises(InputError, match=message):
        classifier.find_head(batch)
    with pytest.raises(InputError, match=message), classifier.session(features=False):
        classifier.forward(batch)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="Module, got function"):
        Classifier(F.relu)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fp8"):
        Classifier(Net(), precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="inside `with"):
        Classifier(Net()).forward(parse_batch(IMAGES))
    with pytest.raises(InputError, match="empty batch"):
        Classifier(Net()).find_head(parse_batch(IMAGES[:0]))
    with pytest.raises(InputError, match="argument names"):
        Classifier(Net()).find_head(parse_batch({"pixels": IMAGES}))

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + "1"

    classifier = Classifier(Broken())
    with pytest.raises(TypeError), classifier.session(features=False):
        classifier.forward(parse_batch(IMAGES))


def test_batches_that_change_the_path_or_the_size() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, C, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3)) if x.shape[-1] >= 8 else x.flatten(1)[:, :C]

    classifier = found(Branching())
    with classifier.session(features=True):
        with pytest.raises(InputError, match="keep their size"):
            classifier.forward(parse_batch(torch.randn(2, 3, 9, 9)))
        with pytest.raises(InputError, match="same path"):
            classifier.forward(parse_batch(torch.randn(2, 3, 4, 4)))
        assert classifier.forward(parse_batch(IMAGES))[1].shape == (B, 192)


def test_a_one_shot_iterator_survives() -> None:
    classifier = Classifier(Net())
    first, batches = preview((x, torch.zeros(len(x)).long()) for x in IMAGES.split(2))
    classifier.find_head(first)
    with classifier.session(features=True):
        logits = torch.cat([classifier.forward(batch)[0] for batch in batches])
    torch.testing.assert_close(logits, classifier.model.eval()(IMAGES))


@pytest.mark.parametrize("after", [None, Tensor.float])
def test_half_precision_models_run_in_their_own_dtype(after: Any) -> None:
    classifier = Classifier(Net(after=after).bfloat16())
    with classifier.session(features=True):
        logits, features = classifier.forward(parse_batch(IMAGES.bfloat16()))
    assert classifier.head_name == "head"
    assert features.dtype == torch.bfloat16
    assert logits.dtype == (torch.bfloat16 if after is None else torch.float32)
    assert classifier.weight.dtype == torch.float32


def test_device_and_own_dtype() -> None:
    assert Classifier(nn.Flatten()).device == torch.device("cpu")
    assert Classifier(Net().to("meta")).device.type == "meta"
    model = Net().double()
    classifier = Classifier(model)
    with classifier.session(features=True):
        logits, features = classifier.forward(parse_batch(IMAGES.double()))
    assert logits.dtype == features.dtype == torch.float64
    assert classifier.weight.dtype == torch.float32


# --- the model comes back as it was ---------------------------------------------------------


def fingerprint_of(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tensor.device}{tensor.data_ptr()}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def condition(model: nn.Module) -> dict[str, Any]:
    hooks = [name for name in vars(nn.Module()) if "hooks" in name]
    numpy_state = str(np.random.get_state())  # noqa: NPY002
    return {
        "state": fingerprint_of(model),
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            (name, kind): list(getattr(module, kind).items())
            for name, module in model.named_modules()
            for kind in hooks
        },
        "attributes": {name: list(vars(module)) for name, module in model.named_modules()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [
            None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()
        ],
        "random": (random.getstate(), numpy_state, torch.get_rng_state().tolist()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


class Restless(Net):
    """Does in its forward pass all that could leave a trace, then fails if told to."""

    failure: BaseException | None

    def forward(self, x: Tensor) -> Any:
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002
        random.random()
        torch.set_grad_enabled(True)
        logits = super().forward(F.dropout(x, 0.0, training=True))
        if self.failure is not None:
            raise self.failure
        return logits


def mixed_model() -> Restless:
    model = Restless()
    model.failure = None
    model.train()
    model.backbone[1].eval()
    model.backbone[0].bias.requires_grad_(False)
    model.backbone(IMAGES).sum().backward()
    model.head.register_forward_hook(lambda *_: None)
    model.register_forward_pre_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("failure", [None, ValueError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("grad", [True, False])
def test_the_model_is_untouched(failure: Any, precision: Any, grad: bool) -> None:
    model = mixed_model()
    before = condition(model)
    classifier = Classifier(model, precision=precision)
    batch = parse_batch(IMAGES)
    with torch.set_grad_enabled(grad):
        before["modes"] = (grad, False)
        classifier.find_head(batch)
        compare(condition(model), before)
        model.failure = failure
        if failure is None:
            with classifier.session(features=True):
                classifier.forward(batch)
                assert not any(module.training for module in model.modules())
        else:
            with pytest.raises(type(failure)), classifier.session(features=True):
                classifier.forward(batch)
        compare(condition(model), before)
    with pytest.raises(InputError, match="inside `with"):
        classifier.forward(batch)


def compare(now: dict[str, Any], before: dict[str, Any]) -> None:
    grads, old = now.pop("grads"), before["grads"]
    for a, b in zip(grads, old, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a[0] == b[0] and torch.equal(a[1], b[1]))
    for key, value in now.items():
        assert value == before[key], key


def test_failing_probe_leaves_no_trace() -> None:
    model = mixed_model()
    model.failure = KeyboardInterrupt()
    before = condition(model)
    with pytest.raises(KeyboardInterrupt):
        Classifier(model).find_head(parse_batch(IMAGES))
    compare(condition(model), before)


def test_sessions_nest() -> None:
    classifier = found(Net())
    batch = parse_batch(IMAGES)
    with classifier.session(features=True):
        with classifier.session(features=False):
            assert classifier.forward(batch)[1] is None
        assert classifier.forward(batch)[1] is not None


def test_what_a_model_keeps_from_its_forward_pass_can_be_trained_with() -> None:
    class Lazy(Net):
        table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.linspace(0.5, 1, x.shape[-1]) * 1.0
            return super().forward(x * self.table)

    model = Lazy()
    found(model)
    model.train()(IMAGES.clone().requires_grad_()).sum().backward()
    assert model.head.weight.grad is not None


def test_overridden_modes_are_not_called() -> None:
    class Merging(Net):
        def train(self, mode: bool = True) -> Any:
            raise AssertionError("train() may merge adapters or freeze layers")

    found(Merging())


# --- bf16 ------------------------------------------------------------------------------------


def test_bf16_runs_a_copy_with_the_head_in_fp32(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "grood_fast")
    model = Net().eval()
    before = condition(model)
    exact = model(IMAGES)
    for _ in range(2):
        classifier = Classifier(model, precision="bf16")
        with classifier.session(features=True):
            logits, features = classifier.forward(parse_batch(IMAGES))
    compare(condition(model), before)
    assert logits.dtype == features.dtype == torch.float32
    assert torch.equal(features, features.bfloat16().float()), "the backbone ran in bf16"
    torch.testing.assert_close(logits, F.linear(features, model.head.weight, model.head.bias))
    torch.testing.assert_close(logits, exact, rtol=0.05, atol=0.02)
    assert not torch.equal(logits, exact)
    copied = module_under_test._COPIES[model].network
    assert copied.backbone[0].weight.dtype == torch.float32, "it is given the inputs"
    assert copied.backbone[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert copied.backbone[1].running_var.dtype == torch.float32
    assert copied.head.weight.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "MiB" in messages[0]


@pytest.mark.parametrize("way", ["in place", "data", "fused", "replaced", "buffer", "head"])
def test_the_bf16_copy_follows_the_model(way: str) -> None:
    model = Net().eval()
    classifier = Classifier(model, precision="bf16")

    def run() -> Tensor:
        with classifier.session(features=True):
            return classifier.forward(parse_batch(IMAGES))[0]

    first = run()
    network = module_under_test._COPIES[model].network
    assert torch.equal(run(), first)
    assert module_under_test._COPIES[model].network is network, "no needless renewal"
    weight = model.backbone[0].weight
    if way == "in place":
        with torch.no_grad():
            weight[0, 0, 0, 0] += 1
    elif way == "data":
        weight.data.mul_(2)
    elif way == "fused":
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.5, fused=True).step()
    elif way == "replaced":
        model.backbone[0].weight = nn.Parameter(weight.detach() * 2)
    elif way == "buffer":
        model.backbone[1].running_mean += 1
    else:
        model.head.weight.data.mul_(2)
    second = run()
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, model(IMAGES), rtol=0.05, atol=0.05)


def test_the_bf16_copy_dies_with_the_model() -> None:
    model = Net()
    found(model, precision="bf16")
    alive = weakref.ref(module_under_test._COPIES[model].network)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("shape", HEADS)
def test_bf16_on_every_shape(shape: str) -> None:
    model, name = HEADS[shape]()
    found(model, IMAGES[:, 0, 0] if name == "" else IMAGES, precision="bf16")


def test_bf16_without_a_head_and_with_token_ids() -> None:
    model = nn.Sequential(nn.Embedding(9, D), nn.Flatten(), nn.Linear(3 * D, C), nn.LogSoftmax(1))
    ids = torch.randint(9, (B, 3))
    classifier = Classifier(model, precision="bf16")
    with classifier.session(features=False):
        logits, features = classifier.forward(parse_batch(ids))
    assert features is None
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(ids), rtol=0.05, atol=0.05)


def test_threads_take_turns_with_a_model() -> None:
    model = Net(nn.Sequential(nn.Dropout(0.5), nn.Linear(D, C))).train()
    classifiers = [Classifier(model), Classifier(model)]
    with classifiers[0].session(features=False):
        expected, _ = classifiers[0].forward(parse_batch(IMAGES))
    wrong: list[str] = []

    def work(classifier: Classifier) -> None:
        for _ in range(30):
            with classifier.session(features=True):
                for _ in range(2):
                    logits, _ = classifier.forward(parse_batch(IMAGES))
                    if not torch.equal(logits, expected):
                        wrong.append("scores")
            classifier.fingerprint()

    threads = [threading.Thread(target=work, args=(c,)) for c in (*classifiers, classifiers[0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_ambient_autocast_changes_nothing() -> None:
    classifier = Classifier(Net().eval())
    with classifier.session(features=True):
        expected = classifier.forward(parse_batch(IMAGES))
    with torch.autocast("cpu", torch.bfloat16), classifier.session(features=True):
        logits, features = classifier.forward(parse_batch(IMAGES))
        assert torch.equal(logits, expected[0])
        assert features is not None
        assert torch.equal(features, expected[1])
        assert (features @ features.T).dtype == torch.float32


def test_a_fingerprint_is_of_the_weights_as_they_are() -> None:
    model = Net()
    classifier = found(model)
    before = classifier.fingerprint()
    assert classifier.fingerprint() == before
    model.head.weight.data[0, 0] += 1
    changed = classifier.fingerprint()
    assert changed != before
    model.head.weight.data[0, 0] -= 1
    model.head.weight.data.copy_(model.head.weight.data.flip(0))
    assert classifier.fingerprint() not in (before, changed)


def test_several_matrices_are_warned_about() -> None:
    model = Net(after=lambda logits: (logits, torch.zeros(len(logits), 9)))
    classifier = Classifier(model)
    with (
        classifier.session(features=False),
        pytest.warns(ScoreWarning, match="the first is taken"),
    ):
        logits, _ = classifier.forward(parse_batch(IMAGES))
    assert logits.shape == (B, C)


def test_bf16_keeps_what_is_given_the_inputs_in_fp32() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 1)
            self.second = nn.Conv2d(3, 3, 1)
            self.head = nn.Linear(3, C)

        def forward(self, x: Tensor) -> Tensor:
            # The sum with the raw inputs is float32 again.
            hidden = self.second(self.first(x) + x)
            return self.head(hidden.mean(dim=(2, 3)))

    model = Skipping()
    classifier = found(model, precision="bf16")
    copied = module_under_test._COPIES[model].network
    dtypes = [copied.first.weight.dtype, copied.second.weight.dtype, copied.head.weight.dtype]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
    # A background between two bfloat16 numbers: rounded inputs would all be off in one direction.
    with torch.no_grad():
        model.second.weight.copy_(torch.eye(3).reshape(3, 3, 1, 1))
        model.first.weight.copy_(64 * torch.eye(3).reshape(3, 3, 1, 1))
        for layer in (model.first, model.second):
            layer.bias.zero_()
        model.first.bias.fill_(-64.25)
    images = torch.full((B, 3, 8, 8), 1.00390625 - 2**-12)
    with classifier.session(features=True):
        _, features = classifier.forward(parse_batch(images))
    assert features is not None
    exact = 65 * (1.00390625 - 2**-12) - 64.25
    torch.testing.assert_close(features, torch.full_like(features, exact), rtol=2**-7, atol=0)


def test_models_that_cannot_run_in_bf16_say_so() -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            features = self.backbone(x)
            return self.head(F.linear(features, torch.eye(D, dtype=torch.float32)))

    class Uncopied(Net):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("a process group")

    for model, message in ((Fixed(), "bfloat16"), (Uncopied(), "a process group")):
        classifier = Classifier(model, precision="bf16")
        with pytest.raises(InputError, match=message), classifier.session(features=True):
            classifier.forward(parse_batch(IMAGES))


def test_a_parametrised_copy_keeps_its_own_parameters() -> None:
    model = Net(parametrizations.weight_norm(nn.Linear(D, C)))
    found(model, precision="bf16")
    assert parametrize.is_parametrized(model.head)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# --- real models -----------------------------------------------------------------------------

TORCHVISION = {
    "resnet18": "fc",
    "mobilenet_v3_small": "classifier.3",
    "densenet121": "classifier",
    "vgg11": "classifier.6",
    "vit_b_16": "heads.head",
    "efficientnet_b0": "classifier.1",
    "convnext_tiny": "classifier.2",
    "googlenet": "fc",
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    models = import_torchvision().models
    size = 224 if name.startswith("vit") else 64
    options: dict[str, Any] = {"num_classes": 7}
    if name == "googlenet":
        options |= {"init_weights": False}
    if name == "vit_b_16":
        model = models.VisionTransformer(
            image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
            **options,
        )  # fmt: skip
        size = 64
    else:
        model = getattr(models, name)(weights=None, **options)
    assert found(model, torch.randn(3, 3, size, size)).head_name == TORCHVISION[name]


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_torchvision_in_bf16(name: str) -> None:
    model = getattr(import_torchvision().models, name)(weights=None, num_classes=7)
    images = torch.randn(3, 3, 64, 64)
    classifier = found(model, images, precision="bf16")
    with classifier.session(features=True):
        logits, _ = classifier.forward(parse_batch(images))
    exact = model.eval()(images)
    assert (logits - exact).abs().max() < 0.03 * exact.abs().max()


def test_squeezenet_pools_after_its_head() -> None:
    model = import_torchvision().models.squeezenet1_1(weights=None, num_classes=7)
    with pytest.raises(HeadNotFoundError, match=r"classifier\.1: Conv2d.*position, and pooling"):
        Classifier(model).find_head(parse_batch(torch.randn(3, 3, 64, 64)))


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet10t", "fc"),
        ("efficientnet_lite0", "classifier"),
        ("mobilenetv3_small_050", "classifier"),
        ("test_vit", "head"),
        ("test_convnext", "head.fc"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_timm(name: str, head: str, precision: Any) -> None:
    import_torchvision()
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=7)
    images = torch.randn(3, 3, 160 if name == "test_vit" else 64, 160 if name == "test_vit" else 64)
    assert found(model, images, precision=precision).head_name == head


def test_hugging_face_sequences() -> None:
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "num_labels": 3,
    }  # fmt: skip
    config = transformers.BertConfig(**small)
    ids = torch.randint(50, (4, 6))
    encoding = transformers.BatchEncoding(
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.tensor([0, 1, 2, 0]),
        }
    )
    model = transformers.BertForSequenceClassification(config)
    for precision in ("fp32", "bf16"):
        assert found(model, encoding, precision=precision).head_name == "classifier"
    assert parse_batch(encoding).labels.tolist() == [0, 1, 2, 0]
    with pytest.raises(InputError, match="one prediction a token"):
        Classifier(transformers.BertForTokenClassification(config)).find_head(parse_batch(encoding))


def test_hugging_face_images() -> None:
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.zeros(4).long()}
    assert found(model, batch).head_name == "classifier"


def test_gpt_style_classifiers_pick_a_token_after_the_head() -> None:
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=0
    )
    model = transformers.GPT2ForSequenceClassification(config)
    with pytest.raises(HeadNotFoundError, match="picking one"):
        Classifier(model).find_head(parse_batch({"input_ids": torch.randint(1, 50, (2, 6))}))
