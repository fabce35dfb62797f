"""Every kind of layer against autograd, one sample at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from network.helpers import assert_exact, read
from torch import Tensor, nn
from torch.nn import functional as F

from grood_fast.errors import InputError, NetworkWarning

B = 5


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Around(nn.Module):
    """Layers, then a head on the mean over the positions."""

    def __init__(self, *layers: nn.Module, features: int, dim: int | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(features, 3)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        if self.dim is None:
            x = x.flatten(2).mean(dim=2) if x.ndim > 2 else x
        else:
            x = torch.tanh(x).mean(dim=self.dim)
        return self.head(x)


def maps(channels: int, *spatial: int) -> Tensor:
    return torch.randn(B, channels, *spatial, dtype=torch.float64)


def norm(layer: Any) -> Any:
    """Statistics and affine parameters that are not the initial ones."""
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
            if name in ("bias", "running_mean"):
                tensor.data -= 1.2
    return layer


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (11,)),
    "conv1d strided": (lambda: nn.Conv1d(4, 6, 4, stride=3, padding=2, dilation=2), (14,)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (6, 7)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1), (3, 5)),
    "conv2d 1x1 strided": (lambda: nn.Conv2d(4, 6, 1, stride=2), (5, 4)),
    "conv2d strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (7, 8)),
    "conv2d uneven": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 3), padding=(2, 0), dilation=(2, 1)), (9, 8)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (6, 7)),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 2, padding="valid"), (4, 4)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (5, 5)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (5, 5)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 5, stride=4, bias=False), (9, 9)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), (6, 5)),
    "conv2d grouped same": (lambda: nn.Conv2d(4, 6, (2, 4), groups=2, padding="same"), (6, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=2, dilation=2), (7, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3, stride=(1, 2, 1), padding=1), (3, 5, 4)),
    "conv3d grouped": (lambda: nn.Conv3d(4, 6, 2, groups=2), (3, 4, 4)),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_convolutions(case: str, layout: str) -> None:
    make, spatial = CONVOLUTIONS[case]
    layer, x = make(), maps(4, *spatial)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    with torch.no_grad():
        features = layer(x.float()).shape[1]
    assert_exact(Around(layer, nn.Tanh(), features=features).double(), x)


@pytest.mark.parametrize(
    ("layer", "x", "dim"),
    [
        (nn.Linear(4, 6), (4,), None),
        (nn.Linear(4, 6, bias=False), (7, 4), 1),
        (nn.Linear(4, 6), (2, 3, 4), (1, 2)),
        (norm(nn.BatchNorm1d(6)), (6,), None),
        (norm(nn.BatchNorm1d(6)), (6, 5), None),
        (norm(nn.BatchNorm2d(6)), (6, 4, 5), None),
        (norm(nn.BatchNorm3d(6)), (6, 2, 4, 3), None),
        (nn.BatchNorm2d(6, affine=False), (6, 4, 5), None),
        (norm(nn.LayerNorm(6)), (6,), None),
        (norm(nn.LayerNorm(6)), (7, 6), 1),
        (norm(nn.LayerNorm((3, 6))), (4, 3, 6), (1, 2)),
        (norm(nn.LayerNorm(6, bias=False)), (7, 6), 1),
        (norm(nn.RMSNorm(6)), (7, 6), 1),
        (norm(nn.GroupNorm(2, 6)), (6, 4, 3), None),
        (norm(nn.GroupNorm(3, 6)), (6,), None),
        (norm(nn.InstanceNorm2d(6, affine=True)), (6, 4, 3), None),
        (norm(nn.InstanceNorm1d(6, affine=True, track_running_stats=True)), (6, 4), None),
    ],
    ids=str,
)
def test_linear_and_normalisation(layer: nn.Module, x: tuple[int, ...], dim: Any) -> None:
    model = Around(layer, nn.Tanh(), features=6, dim=dim).double()
    assert_exact(model, torch.randn(B, *x, dtype=torch.float64))


@pytest.mark.parametrize("factor", ["conv", "norm", "linear", "depthwise"])
def test_several_positions_a_sample_in_the_batch_dimension(factor: str) -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = {
                "conv": nn.Conv2d(4, 6, 3, padding=1),
                "depthwise": nn.Conv2d(4, 8, 3, groups=4),
                "norm": norm(nn.GroupNorm(2, 4)),
                "linear": nn.Linear(4, 6),
            }[factor]
            self.head = nn.Linear({"norm": 4, "depthwise": 8}.get(factor, 6), 3)

        def forward(self, x: Tensor) -> Tensor:  # (B, frames, 4, 5, 5)
            frames = x.flatten(0, 1)
            if factor == "linear":
                y = self.layer(frames.flatten(2).mean(dim=2))
            else:
                y = torch.tanh(self.layer(frames)).flatten(2).mean(dim=2)
            return self.head(y.unflatten(0, (len(x), -1)).square().mean(dim=1))

    assert_exact(Frames().double(), torch.randn(B, 3, 4, 5, 5, dtype=torch.float64))


class Embedded(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, **options)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)).mean(dim=1))


@pytest.mark.parametrize("padding", [None, 0, -1])
def test_embedding(padding: int | None) -> None:
    tokens = torch.randint(0, 11, (B, 7))
    tokens[:, 3] = 0  # a token that comes again
    tokens[0, 5] = 10
    assert_exact(Embedded(padding_idx=padding).double(), tokens)


class Attention(nn.Module):
    def __init__(self, batch_first: bool, how: str, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.other = nn.Linear(8, options.get("kdim", 8))
        self.head = nn.Linear(8, 3)
        self.batch_first, self.how = batch_first, how

    def forward(self, x: Tensor) -> Tensor:
        if not self.batch_first:
            x = x.transpose(0, 1)
        other = x if self.how == "self" else torch.tanh(self.other(x))
        if self.how == "masked":
            mask = torch.zeros(x.shape[:2] if self.batch_first else x.shape[:2][::-1]).bool()
            mask[:, -1] = True
            y, _ = self.attention(x, other, other, key_padding_mask=mask)
        else:
            y, _ = self.attention(x, other, other, need_weights=self.how != "cross")
        return self.head(torch.tanh(y).mean(dim=1 if self.batch_first else 0))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("how", ["self", "cross", "masked"])
@pytest.mark.parametrize(
    "options", [{}, {"kdim": 5, "vdim": 5}, {"add_bias_kv": True}, {"bias": False}], ids=str
)
def test_multi_head_attention(batch_first: bool, how: str, options: dict[str, Any]) -> None:
    if how == "self" and "kdim" in options:
        pytest.skip("keys of another size are not the queries")
    model = Attention(batch_first, how, **options).double()
    for p in model.parameters():
        p.data.uniform_(-1, 1)
    assert_exact(model, torch.randn(B, 6, 8, dtype=torch.float64))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_transformer_with_class_token_and_positions(batch_first: bool, norm_first: bool) -> None:
    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(
                8, 2, 12, batch_first=batch_first, norm_first=norm_first
            )
            self.encoder = nn.TransformerEncoder(layer, 2)
            self.token = nn.Parameter(torch.randn(1, 1, 8))
            self.positions = nn.Parameter(torch.randn(1, 9, 8))
            self.scale = nn.Parameter(torch.rand(8))
            self.temperature = nn.Parameter(torch.tensor(1.3))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
            x = x + self.positions[:, : x.shape[1]]
            x = self.encoder(x if batch_first else x.transpose(0, 1)) * self.scale
            return self.head(x[:, 0] if batch_first else x[0]) / self.temperature

    assert_exact(Transformer().double(), torch.randn(B, 6, 8, dtype=torch.float64))


class Odd(nn.Module):
    """Uses of parameters that are no layer's."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Linear(4, 6)
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.vector = nn.Parameter(torch.rand(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        w, v = self.weight, self.vector
        match self.how:
            case "matmul":
                x = x @ w
            case "from the left":
                x = (w @ x.T).T
            case "addmm":
                x = torch.addmm(v, x, w)
            case "scaled addmm":
                x = torch.addmm(v, x, w, beta=0.5)
            case "computed weight":
                x = F.linear(x, torch.softmax(w, dim=1) * v, v * v)
            case "sliced":
                x = torch.cat([F.linear(x, w[:3]), F.linear(x, w[3:], v[3:])], dim=1)
            case "in place":
                x = x.clone()
                x += v
                x *= w[0]
            case "where":
                x = torch.where(x > 0, x, x * v)
            case "einsum":
                x = torch.einsum("bi,ij,j->bj", x, w, v)
            case "prelu":
                x = F.prelu(x, v)
            case "twice":
                x = F.linear(torch.tanh(F.linear(x, w, v)), w) + v
            case "transposed":
                x = F.linear(x, w) + F.linear(x, w.t())
            case "under no_grad":
                with torch.no_grad():
                    y = F.linear(x, w, v)
                x = x + y
            case "into a constant":
                y = torch.zeros(len(x), 6, dtype=x.dtype)
                y[:, ::2] = x[:, ::2]
                x = F.linear(y, w)
        return self.head(torch.tanh(x))


@pytest.mark.parametrize(
    "how",
    [
        "matmul", "addmm", "computed weight", "sliced", "in place", "where", "twice", "transposed",
        "under no_grad", "into a constant",
    ],
)  # fmt: skip
def test_uses_without_a_module(how: str) -> None:
    assert_exact(Odd(how).double(), torch.randn(B, 4, dtype=torch.float64))


@pytest.mark.parametrize("how", ["from the left", "scaled addmm", "einsum", "prelu"])
def test_unknown_functions_are_left_to_torch_func(how: str) -> None:
    with pytest.warns(NetworkWarning, match=r"torch\.func differentiates this call"):
        assert_exact(Odd(how).double(), torch.randn(B, 4, dtype=torch.float64))


def test_transposed_convolution() -> None:
    model = Around(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.Tanh(), features=6).double()
    with pytest.warns(NetworkWarning, match="conv_transpose2d"):
        assert_exact(model, maps(4, 4, 3))


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_weights(kind: str) -> None:
    parametrised = getattr(nn.utils.parametrizations, kind)(nn.Linear(4, 6).double())
    for p in parametrised.parameters():
        p.data.uniform_(-1, 1)
    assert_exact(
        Around(parametrised, nn.Tanh(), features=6).double(),
        torch.randn(B, 4, dtype=torch.float64),
    )


class Tied(nn.Module):
    """A weight in four places: an embedding, a layer called twice, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 7)
        self.between = nn.Linear(7, 7)
        self.between.weight = self.embedding.weight
        self.head = nn.Linear(7, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x)
        y = torch.tanh(self.between(torch.tanh(self.between(y))))
        return self.head(y.mean(dim=1))


def test_tied_weights_are_summed_before_the_norm() -> None:
    assert_exact(Tied().double(), torch.randint(0, 7, (B, 4)))


def test_unused_and_dead_parameters_have_no_gradient() -> None:
    class Dead(Around):
        def forward(self, x: Tensor) -> Tensor:
            self.layers[1](x)  # computed and thrown away
            return self.head(self.layers[0](x))

    model = Dead(nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(2, 2), features=6).double()
    assert_exact(model, torch.randn(B, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(4, track_running_stats=False), "normalises over the batch"),
        (nn.LSTM(4, 4, batch_first=True), "lstm"),
    ],
    ids=str,
)
def test_what_has_no_gradient_of_single_samples(layer: nn.Module, message: str) -> None:
    class Model(Around):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(layer, nn.LSTM):
                return self.head(layer(x.unsqueeze(1))[0][:, 0])
            return self.head(self.layers[0](x))

    with pytest.raises(InputError, match=message):
        read(Model(layer, features=4), torch.randn(B, 4), lambda *_: 0)
