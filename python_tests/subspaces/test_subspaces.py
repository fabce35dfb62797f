"""Subspaces of gradients that are never formed, against the SVD of gradients that are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from grood_fast.errors import InputError
from grood_fast.subspaces import GradientState, build, choose, costs, project
from grood_fast.subspaces.components import (
    inner_products,
    leading_eigenvectors,
    principal_components,
)
from grood_fast.subspaces.forms import ranks_for

C, D, N = 5, 7, 90


def factors(count: int = N, classes: int = C, dim: int = D, seed: int = 0) -> tuple[Tensor, ...]:
    """δ (N, C), h (N, D) and labels, with a spectrum that falls."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    logits = torch.randn(count, classes, generator=random, dtype=torch.float64)
    logits[torch.arange(count), labels] += 2
    scales = torch.linspace(2, 0.3, dim, dtype=torch.float64)
    h = (torch.randn(count, dim, generator=random, dtype=torch.float64) + 0.5) * scales
    return -logits.softmax(dim=1), h, labels


def state_of(delta: Tensor, h: Tensor, labels: Tensor, batch: int = 32, **options: Any) -> Any:
    state = GradientState(options.pop("max_samples", 10_000), **options)
    for rows in torch.arange(len(delta)).split(batch):
        state.absorb(delta[rows], h[rows], labels[rows], rows)
    return state


def explicit(delta: Tensor, h: Tensor) -> Tensor:
    return torch.einsum("bc,bd->bcd", delta.double(), h.double()).flatten(1)


def up_to_sign(z: Tensor, expected: Tensor) -> Tensor:
    """The largest difference of coordinates over ‖z‖, each direction's sign being free."""
    signs = (z * expected).sum(dim=0).sign()
    return (z * signs - expected).norm(dim=1).max() / expected.norm(dim=1).max()


def principal_directions(gradients: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(P, K) directions and the variances along them, by the SVD of centred gradients."""
    _, values, directions = torch.linalg.svd(gradients - gradients.mean(dim=0))
    return directions[:count].T, values[:count].square() / len(gradients)


@pytest.mark.parametrize("form", ["dual", "dense", "factored"])
@pytest.mark.parametrize("samples", [20, N])  # fewer and more than C D
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_pca_is_that_of_the_formed_gradients(
    form: Any, samples: int, bias: bool, centred: bool
) -> None:
    delta, h, labels = factors(samples)
    if bias:
        h = torch.cat([h, torch.ones(samples, 1, dtype=h.dtype)], dim=1)
    subspace = build(
        state_of(delta, h, labels), kind="pca", n_components=4, form=form, centred=centred
    )
    gradients = explicit(delta.float(), h.float())
    mean = gradients.mean(dim=0) if centred else torch.zeros_like(gradients[0])
    _, values, directions = torch.linalg.svd(gradients - mean)
    new_delta, new_h, _ = factors(33, seed=1)
    if bias:
        new_h = torch.cat([new_h, torch.ones(33, 1, dtype=h.dtype)], dim=1)
    expected = (explicit(new_delta, new_h) - mean) @ directions[:4].T
    z = project(subspace.tensors, new_delta, new_h)
    assert z.dtype == torch.float32
    assert up_to_sign(z.double(), expected) < 1e-5
    found = subspace.components
    torch.testing.assert_close(found.variances, values[:4].square() / samples, rtol=1e-6, atol=0)
    ratio = values[:4].square() / values.square().sum()
    torch.testing.assert_close(found.explained_variance_ratio, ratio, rtol=1e-6, atol=0)
    assert subspace.facts["form"] == form
    assert subspace.facts["share_kept_by_ranks"] == pytest.approx(1)


def test_whitening_divides_every_entry_by_its_deviation() -> None:
    delta, h, labels = factors()
    state = state_of(delta, h, labels, elementwise=True)
    subspace = build(state, kind="pca", n_components=5, whiten=True)
    gradients = explicit(delta, h)
    mean, variance = gradients.mean(dim=0), gradients.var(dim=0, unbiased=False)
    deviation = variance.clamp(min=torch.quantile(variance, 0.01)).sqrt()
    directions, _ = principal_directions((gradients - mean) / deviation, 5)
    new_delta, new_h, _ = factors(20, seed=1)
    expected = ((explicit(new_delta, new_h) - mean) / deviation) @ directions
    z = project(subspace.tensors, new_delta, new_h)
    assert up_to_sign(z.double(), expected) < 1e-5


@pytest.mark.parametrize("form", ["dual", "dense", "factored"])
def test_class_means(form: Any) -> None:
    delta, h, labels = factors()
    subspace = build(state_of(delta, h, labels), kind="class_means", n_components=None, form=form)
    gradients = explicit(delta.float(), h.float())
    means = torch.stack([gradients[labels == label].mean(dim=0) for label in range(3)])
    centre = means.mean(dim=0)
    _, values, directions = torch.linalg.svd(means - centre)
    share = values.square().cumsum(dim=0) / values.square().sum()
    count = int((share < 0.99).sum()) + 1
    new_delta, new_h, _ = factors(20, seed=1)
    expected = (explicit(new_delta, new_h) - centre) @ directions[:count].T
    z = project(subspace.tensors, new_delta, new_h)
    assert z.shape == expected.shape
    assert up_to_sign(z.double(), expected) < 1e-5
    torch.testing.assert_close(subspace.centre.flatten(), centre, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["dual", "dense", "factored"])
def test_class_averages_are_unit_length_and_in_the_order_of_the_classes(form: Any) -> None:
    delta, h, labels = factors()
    subspace = build(
        state_of(delta, h, labels), kind="class_averages", n_components=None, form=form
    )
    gradients = explicit(delta.float(), h.float())
    means = torch.stack([gradients[labels == label].mean(dim=0) for label in range(3)])
    centred = means - means.mean(dim=0)
    directions = centred / centred.norm(dim=1, keepdim=True)
    new_delta, new_h, _ = factors(20, seed=1)
    expected = (explicit(new_delta, new_h) - means.mean(dim=0)) @ directions.T
    z = project(subspace.tensors, new_delta, new_h)
    torch.testing.assert_close(z.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_factored_form_of_fewer_ranks_says_what_it_keeps() -> None:
    random = torch.Generator().manual_seed(0)
    delta = torch.randn(300, 40, generator=random).softmax(dim=1)
    h = torch.randn(300, 60, generator=random) * torch.linspace(3, 0.01, 60)
    labels = torch.arange(300) % 3
    subspace = build(state_of(delta, h, labels), kind="pca", n_components=3, form="factored")
    m, n = subspace.facts["ranks"]
    assert m * n <= 1024 < 40 * 60
    gradients = explicit(delta, h)
    u, v = subspace.tensors["left"].double(), subspace.tensors["right"].double()
    torch.testing.assert_close(u.T @ u, torch.eye(m).double(), rtol=0, atol=1e-5)
    reduced = torch.einsum("bcd,cm,dn->bmn", gradients.reshape(300, 40, 60), u, v).flatten(1)
    kept = reduced.var(dim=0).sum() / gradients.var(dim=0).sum()
    assert subspace.facts["share_kept_by_ranks"] == pytest.approx(float(kept), rel=1e-4)
    directions, _ = principal_directions(reduced, 3)
    expected = (reduced - reduced.mean(dim=0)) @ directions
    assert up_to_sign(project(subspace.tensors, delta, h).double(), expected) < 1e-4


def test_shards_in_any_order_are_one_pass() -> None:
    delta, h, labels = factors()
    options = {"max_samples": 40, "elementwise": True}
    whole = state_of(delta, h, labels, **options)
    parts = torch.arange(N).tensor_split(3)
    for order in itertools.permutations(range(3)):
        merged = GradientState(**options)
        for shard in order:
            rows = parts[shard]
            state = GradientState(**options)
            state.absorb(delta[rows], h[rows], labels[rows], rows)
            merged.merge(state)
        assert merged.count == whole.count == N
        for name in ("gradient", "left", "right", "squares"):
            torch.testing.assert_close(
                getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-12
            )
        for name, rows in merged.sample().items():
            assert torch.equal(rows, whole.sample()[name]), name
    assert len(whole.sample()["labels"]) == 40
    assert sorted(whole.sample()["labels"].bincount().tolist()) == [13, 13, 14]


def test_exact_sums_are_over_all_samples() -> None:
    delta, h, labels = factors()
    state = state_of(delta, h, labels, max_samples=10, elementwise=True)
    gradients = explicit(delta, h)
    torch.testing.assert_close(state.gradient.flatten(), gradients.sum(dim=0))
    matrices = gradients.reshape(N, C, D)
    torch.testing.assert_close(state.left, torch.einsum("ncd,ned->ce", matrices, matrices))
    torch.testing.assert_close(state.right, torch.einsum("ncd,nce->de", matrices, matrices))
    torch.testing.assert_close(state.squares.flatten(), gradients.square().sum(dim=0))


def test_fewer_dimensions_than_asked_for() -> None:
    delta, h, labels = factors(6)
    subspace = build(state_of(delta, h, labels), kind="pca", n_components=20, form="dual")
    assert subspace.facts["components"] == 5  # six points span five dimensions
    repeated = [rows.repeat(4, *[1] * (rows.ndim - 1)) for rows in (delta, h, labels)]
    again = build(state_of(*repeated), kind="pca", n_components=20, form="dense")
    assert again.facts["components"] == 5


def test_what_spans_nothing() -> None:
    delta, h, labels = factors()
    same = state_of(delta[:1].repeat(9, 1), h[:1].repeat(9, 1), labels[:9])
    for kind in ("pca", "class_means", "class_averages"):
        with pytest.raises(InputError, match=r"vary|differ"):
            build(same, kind=kind, n_components=2, form="dense")  # type: ignore[arg-type]
    one_class = state_of(delta, h, torch.zeros_like(labels))
    for kind in ("class_means", "class_averages"):
        with pytest.raises(InputError, match="two classes"):
            build(one_class, kind=kind, n_components=2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no reference samples"):
        build(GradientState(10), kind="pca", n_components=2)
    broken = h.clone()
    broken[3, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        state_of(delta, broken, labels)


def test_lanczos_finds_what_the_full_decomposition_finds() -> None:
    random = torch.Generator().manual_seed(0)
    d = torch.randn(2200, 30, generator=random, dtype=torch.float64)
    h = torch.randn(2200, 90, generator=random, dtype=torch.float64) * torch.linspace(3, 0.1, 90)
    products = inner_products(d, h)
    expected_values, expected_vectors = torch.linalg.eigh(products)
    values, vectors = leading_eigenvectors(products, 6)
    torch.testing.assert_close(values, expected_values.flip(0)[:6], rtol=1e-9, atol=0)
    overlap = torch.linalg.svdvals(vectors.T @ expected_vectors.flip(1)[:, :6])
    assert overlap.min() > 1 - 1e-9
    again = leading_eigenvectors(products, 6)
    assert torch.equal(again[1], vectors)
    assert (vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_coefficients_give_orthonormal_directions() -> None:
    delta, h, _ = factors(25)
    products = inner_products(delta, h)
    found = principal_components(products.clone(), 6)
    directions = explicit(delta, h).T @ found.coefficients
    torch.testing.assert_close(
        directions.T @ directions, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_costs_choose_the_form() -> None:
    small = costs(8192, 10, 128, 64, (10, 102))
    assert choose(small) in ("dense", "factored")
    assert small["dual"] > 5 * small["dense"]
    large = costs(8192, 1000, 2048, 128, (32, 32))
    assert choose(large) == "factored"
    assert large["dense"] > large["dual"] > 10 * large["factored"]
    few_anchors = costs(16, 1000, 2048, 128, (1000, 2048))
    assert choose(few_anchors) == "dual"
    assert choose({"dense": 1.2, "dual": 5.0, "factored": 1.0}) == "dense"


def test_ranks_follow_the_spectra() -> None:
    steep, flat = torch.tensor([1.0, 0, 0, 0]), torch.ones(50)
    assert ranks_for(steep, flat, 50) == (1, 50)
    assert ranks_for(flat, steep, 100) == (50, 2)
    m, n = ranks_for(flat, flat, 100)
    assert m * n == 100
