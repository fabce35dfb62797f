"""The benchmark's networks. Only tests marked ``data`` need a network connection or a cache."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import TensorDataset

from grood_fast import persistence
from grood_fast.errors import DataUnavailableError, InputError
from grood_fast.evaluation import datasets, networks
from grood_fast.evaluation.networks import Recipe, trained_network

# ---------------------------------------------------------------------------- architectures


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_small_residual_network():
    model = networks.small_residual_network(8)
    assert parameters(model) == pytest.approx(0.30e6, rel=0.02)
    assert isinstance(model.head, nn.Linear)
    assert (model.head.in_features, model.head.out_features) == (128, 8)
    for side in (28, 27, 8):
        assert model(torch.zeros(2, 1, side, side)).shape == (2, 8)


def test_resnet18():
    model = networks.resnet18(10)
    assert parameters(model) == pytest.approx(11.2e6, rel=0.005)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 1 + 16 + 3
    with torch.inference_mode():
        assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_residual_block_without_change_of_shape_adds_its_input():
    block = networks.ResidualBlock(4, 4, 1).eval()
    for parameter in block.residual.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("shape", [(8, 8), (7, 8), (9, 5)])
def test_strided_convolution_pads_like_tensorflow(kernel, shape):
    """Output i reads input from 2 i - floor(pad / 2), with the least total padding that fits."""
    layer = networks._StridedConv2d(1, 1, kernel, 2, bias=False)
    nn.init.ones_(layer.weight)
    x = torch.randn(1, 1, *shape)
    result = layer(x)[0, 0]
    assert result.shape == tuple(math.ceil(side / 2) for side in shape)
    before = [max((math.ceil(side / 2) - 1) * 2 + kernel - side, 0) // 2 for side in shape]
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            top, left = 2 * i - before[0], 2 * j - before[1]
            window = x[0, 0, max(top, 0) : top + kernel, max(left, 0) : left + kernel]
            assert result[i, j].item() == pytest.approx(window.sum().item(), abs=1e-5)


def test_efficientnet_lite0_has_the_published_size():
    model = networks.EfficientNetLite0().eval()
    assert parameters(model) == 4_652_008
    assert (model.head.in_features, model.head.out_features) == (1280, 1000)
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


# ---------------------------------------------------------------------------- recipes


def test_every_class_is_held_out_once():
    assert sorted(label for pair in networks.HELD_OUT_PAIRS for label in pair) == list(range(10))


def test_a_recipes_hash_depends_on_every_field():
    base = Recipe(precision="fp32")
    other = {
        "held_out": (1, 2), "seed": 1, "epochs": 1, "batch_size": 2, "learning_rate": 1.0,
        "warmup": 0.1, "momentum": 0.0, "weight_decay": 0.0, "precision": "bf16",
        "architecture": "another", "version": 2,
    }  # fmt: skip
    assert other.keys() == {field.name for field in dataclasses.fields(Recipe)}
    changed = [dataclasses.replace(base, **{name: value}) for name, value in other.items()]
    assert len({recipe.sha256 for recipe in [base, *changed]}) == len(changed) + 1
    assert Recipe(held_out=(4, 2)) == Recipe(held_out=(2, 4))
    assert Recipe(held_out=[4, 2]).sha256 == Recipe(held_out=(2, 4)).sha256  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"epochs": 0}, {"batch_size": 1}, {"precision": "fp16"}])
def test_senseless_recipes_are_refused(options):
    with pytest.raises(InputError):
        Recipe(**options)


@pytest.mark.parametrize("amx", [True, False])
def test_bf16_is_for_processors_with_amx(monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    assert Recipe().precision == ("bf16" if amx else "fp32")


# ---------------------------------------------------------------------------- training


def toy_split(count: int, seed: int) -> TensorDataset:
    """Ten classes that differ in where a bright bar lies; mirroring does not mix them up."""
    labels = torch.arange(count) % 10
    random = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 1, 28, 28, generator=random, dtype=torch.float32)
    for label in range(10):
        images[labels == label, :, 2 * label + 4 : 2 * label + 6] += 2
    return TensorDataset(images, labels)


@pytest.fixture
def toy_data(monkeypatch, tmp_path) -> list[int]:
    """A cache of its own and a small Fashion-MNIST; the list grows with every use of the data."""
    monkeypatch.setenv("GROOD_FAST_CACHE", str(tmp_path))
    uses: list[int] = []

    def splits() -> datasets.Splits:
        uses.append(1)
        return datasets.Splits(
            train=toy_split(300, 0),
            validation=toy_split(50, 1),
            calibration=toy_split(50, 2),
            test=toy_split(100, 3),
            near_ood=TensorDataset(torch.empty(0, 1, 28, 28), torch.empty(0)),
            classes=tuple(range(10)),
        )

    monkeypatch.setattr(networks, "fashion_mnist", splits)
    return uses


RECIPE = Recipe(held_out=(2, 4), epochs=4, batch_size=32, precision="fp32")


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def test_training_learns_and_is_cached(toy_data, tmp_path):
    network = trained_network(RECIPE, progress=False)
    assert network.test_accuracy > 0.9
    assert network.cpu_seconds > 0
    assert network.model.head.out_features == 8
    assert not network.model.training
    assert network.test_accuracy == networks.accuracy(
        network.model, networks.fashion_mnist().held_out((2, 4)).test
    )
    uses = len(toy_data)
    again = trained_network(RECIPE)
    assert len(toy_data) == uses
    assert same(again.model, network.model)
    assert not again.model.training
    assert dataclasses.replace(again, model=network.model) == network
    assert [path.name for path in (tmp_path / "networks").iterdir()] == [RECIPE.checkpoint.name]
    x = torch.randn(5, 1, 28, 28)
    assert torch.equal(again.model(x), network.model(x))
    again.model(x).sum().backward()


def test_training_is_decided_by_the_seed_and_touches_no_global_state(toy_data):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with torch.no_grad():
        first = trained_network(recipe, progress=False)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    recipe.checkpoint.unlink()
    torch.manual_seed(2)
    assert same(trained_network(recipe, progress=False).model, first.model)
    other = trained_network(dataclasses.replace(recipe, seed=1), progress=False)
    assert not same(other.model, first.model)


def test_training_under_another_default_type(toy_data):
    torch.set_default_dtype(torch.float64)
    try:
        network = trained_network(dataclasses.replace(RECIPE, epochs=1), progress=False)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in network.model.parameters()} == {torch.float32}


def test_bf16_training_keeps_fp32_weights(toy_data):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    network = trained_network(dataclasses.replace(recipe, precision="bf16"), progress=False)
    assert {parameter.dtype for parameter in network.model.parameters()} == {torch.float32}
    exact = trained_network(recipe, progress=False)
    x = toy_split(20, 4).tensors[0]
    ours, theirs = network.model(x), exact.model(x)
    assert not torch.equal(ours, theirs)
    assert (ours - theirs).norm() < 0.5 * theirs.norm()


def test_an_interrupted_training_leaves_nothing(toy_data, tmp_path, monkeypatch):
    calls = []

    def interrupted(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return F.cross_entropy(*arguments)

    monkeypatch.setattr(networks.F, "cross_entropy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained_network(RECIPE, progress=False)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_interrupted_write_leaves_nothing(toy_data, tmp_path, monkeypatch):
    def interrupted(weights: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(persistence, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained_network(dataclasses.replace(RECIPE, epochs=1), progress=False)
    assert not list((tmp_path / "networks").iterdir())


def test_a_damaged_checkpoint_is_trained_again(toy_data, caplog):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    network = trained_network(recipe, progress=False)
    intact = recipe.checkpoint.read_bytes()
    weights = load_file(recipe.checkpoint)
    for damage in ("cut", "flipped", "foreign", "text"):
        if damage == "foreign":
            save_file(weights, recipe.checkpoint)
        else:
            recipe.checkpoint.write_bytes(
                {
                    "cut": intact[:-100],
                    "flipped": intact[:-1] + bytes([intact[-1] ^ 1]),
                    "text": b"text",
                }[damage]
            )
        caplog.clear()
        again = trained_network(recipe, progress=False)
        assert "training the network again" in caplog.text
        assert same(again.model, network.model)


def test_progress_is_shown_unless_told_otherwise(toy_data, capsys):
    trained_network(dataclasses.replace(RECIPE, epochs=1), progress=False)
    assert capsys.readouterr().err == ""
    trained_network(dataclasses.replace(RECIPE, epochs=1, seed=1))
    shown = capsys.readouterr().err
    assert "without classes (2, 4)" in shown
    assert "loss=" in shown


def test_unknown_classes_are_refused(toy_data):
    with pytest.raises(InputError, match="distinct classes"):
        trained_network(Recipe(held_out=(2, 11)), progress=False)


def test_unavailable_data_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("GROOD_FAST_CACHE", str(tmp_path))

    def unavailable() -> datasets.Splits:
        raise DataUnavailableError("offline")

    monkeypatch.setattr(networks, "fashion_mnist", unavailable)
    with pytest.raises(DataUnavailableError, match="offline"):
        trained_network(RECIPE)


# ---------------------------------------------------------------------------- the real thing


@pytest.mark.data
def test_efficientnet_lite0_recognises_imagenet():
    pytest.importorskip("PIL")
    sets = datasets.natural_images()
    assert {name: len(data) for name, data in sets.items()} == {
        "imagenet": 20, "photographs": 11, "textures": 3, "text": 2, "mnist": 100
    }  # fmt: skip
    for data in sets.values():
        assert data.tensors[0].shape[1:] == (3, 224, 224)
        assert data.tensors[0].abs().max() <= 1
    model = networks.efficientnet_lite0()
    assert not model.training
    assert networks.accuracy(model, sets["imagenet"]) >= 18 / 20
