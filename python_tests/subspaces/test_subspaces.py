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
    FormedAnchors,
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
    delta, h, labels = factors(300, 20, 20)
    state = state_of(delta, h, labels, elementwise=True)
    subspace = build(state, kind="pca", n_components=5, whiten=True)
    gradients = explicit(delta, h)
    mean, variance = gradients.mean(dim=0), gradients.var(dim=0, unbiased=False)
    floor = float(variance.sort().values[3])  # the 1 % quantile of 400
    assert subspace.facts["whitening_quantile"] == 0.01
    assert subspace.facts["whitening_floor"] == pytest.approx(floor)
    deviation = variance.clamp(min=floor).sqrt()
    directions, _ = principal_directions((gradients - mean) / deviation, 5)
    new_delta, new_h, _ = factors(20, 20, 20, seed=1)
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


@pytest.mark.parametrize("kind", ["class_means", "class_averages"])
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_class_sums_make_class_means_exact(kind: Any, form: Any) -> None:
    """From a sample of 12 the directions are off; from all samples' sums they are not."""
    delta, h, labels = factors()
    gradients = explicit(delta, h)
    means = torch.stack([gradients[labels == label].mean(dim=0) for label in range(3)])
    centred = means - means.mean(dim=0)
    errors = {}
    for per_class in (False, True):
        state = state_of(delta, h, labels, max_samples=12, per_class=per_class)
        subspace = build(state, kind=kind, n_components=None, kept_share=1.0, form=form)
        z = project(subspace.tensors, delta, h).double()
        # Whichever directions: they span the centred means, and hold all their length.
        matrix = subspace.tensors["basis"].double()
        if form == "factored":
            left, right = (subspace.tensors[side].double() for side in ("left", "right"))
            matrix = left @ matrix @ right.T
        rows = torch.linalg.qr(matrix.flatten(1).T).Q.T
        errors[per_class] = float((centred - centred @ rows.T @ rows).norm() / centred.norm())
        centre = float((subspace.centre.flatten() - means.mean(dim=0)).norm() / means.norm())
        assert (centre < 1e-9) == per_class
        assert z.isfinite().all()
        assert subspace.facts["share_of_reference"] == (1 if per_class else pytest.approx(12 / N))
    assert errors[True] < 1e-6 < 1e-2 < errors[False]


def test_gradpcas_identity() -> None:
    """With the summed logits, PCA of class-mean gradients is PCA of class-mean features."""
    _, h, labels = factors()
    one = torch.ones(N, C, dtype=torch.float64)
    predicted = torch.nn.functional.one_hot(h[:, :C].argmax(dim=1), C).double()
    means = torch.stack([h[labels == label].mean(dim=0) for label in range(3)])
    _, _, directions = torch.linalg.svd(means - means.mean(dim=0))
    centred = h - means.mean(dim=0)
    twin = (centred @ directions[:2].T).norm(dim=1) / centred.norm(dim=1)
    shares = {}
    for name, delta in (("logit_sum", one), ("max_logit", predicted)):
        state = state_of(delta, h, labels, per_class=True)
        subspace = build(state, kind="class_means", n_components=2, kept_share=1.0, form="dense")
        whole = FormedAnchors(
            torch.stack([state.class_sums[c][1] / state.class_sums[c][0] for c in range(3)]),
            torch.arange(3),
        )
        basis = whole.combine(subspace.components.coefficients).flatten(1)  # float64
        new = explicit(delta, h) - subspace.centre.flatten()
        shares[name] = (new @ basis.T).norm(dim=1) / new.norm(dim=1)
    torch.testing.assert_close(shares["logit_sum"], twin, rtol=0, atol=1e-10)
    assert (shares["max_logit"] - twin).abs().max() > 0.05


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
    options = {"max_samples": 40, "elementwise": True, "per_class": True}
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
        assert merged.class_sums.keys() == whole.class_sums.keys() == {0, 1, 2}
        for label, (count, total) in merged.class_sums.items():
            assert count == whole.class_sums[label][0] == 30
            torch.testing.assert_close(total, whole.class_sums[label][1], rtol=1e-12, atol=1e-12)
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
