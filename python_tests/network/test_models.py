"""Whole networks as people use them, against autograd, one sample at a time, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from network.helpers import assert_exact
from torch import nn

from grood_fast.evaluation.networks import resnet18, small_residual_network
from grood_fast.network import NetworkNeed


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def lived_in(model: nn.Module) -> nn.Module:
    """Normalisations with statistics and affine parameters that are not the initial ones."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.7, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.3, 0.3)
    return model.double()


def images(count: int, channels: int, size: int) -> torch.Tensor:
    return torch.randn(count, channels, size, size, dtype=torch.float64)


def test_small_residual_network() -> None:
    assert_exact(lived_in(small_residual_network()), images(4, 1, 12))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("budget", [1 << 40, 1 << 19])
def test_resnet18_in_pieces_and_checkpointed(checkpoint: bool, budget: int) -> None:
    model = lived_in(resnet18(4))
    need = NetworkNeed(memory_budget=budget, checkpoint=checkpoint)
    assert_exact(model, images(3, 3, 9), need)


def timm_model(name: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.create_model(name, num_classes=4, **options)
    return model


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("efficientnet_lite0", 32, {}),
        ("mobilenetv3_small_050", 32, {}),  # squeeze and excitation
        ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2, "init_values": 0.1}),
        ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, "depth": 2}),
        ("mixer_s32_224", 32, {"img_size": 32}),
        ("convnext_atto", 32, {"depths": (1, 1, 1, 1)}),
        ("resnetv2_50x1_bit", 32, {}),  # standardised weights
        ("regnetx_002", 32, {}),  # grouped convolutions
    ],
)
def test_image_models(name: str, size: int, options: dict[str, Any]) -> None:
    from peers import import_torchvision

    import_torchvision()
    assert_exact(lived_in(timm_model(name, **options)), images(2, 3, size))


@pytest.mark.parametrize("name", ["Bert", "DistilBert", "GPT2", "Llama"])
def test_text_models(name: str) -> None:
    from peers import import_torchvision

    import_torchvision()
    transformers = pytest.importorskip("transformers")
    common: dict[str, Any] = {"vocab_size": 31, "num_labels": 3, "pad_token_id": 0}
    hidden = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {
        "Bert": {**hidden, "intermediate_size": 24, "max_position_embeddings": 12},
        "DistilBert": {
            "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24,
            "max_position_embeddings": 12,
        },
        "GPT2": {
            "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, "bos_token_id": 1,
            "eos_token_id": 1,
        },
        "Llama": {**hidden, "intermediate_size": 24, "num_key_value_heads": 1},
    }[name]  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**common, **options)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).double()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    tokens = torch.randint(1, 31, (3, 7))
    mask = torch.ones_like(tokens)
    tokens[1, 5:], mask[1, 5:] = 0, 0  # a shorter text
    assert_exact(model, {"input_ids": tokens, "attention_mask": mask})
