"""LowDimensionalGradient and GradPCA as whole systems, against autograd and plain PCA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from scipy.stats import spearmanr
from torch import Tensor, nn

from grood_fast import scoring
from grood_fast.classifier import Classifier
from grood_fast.detectors import (
    Detector,
    ExGrad,
    Fitting,
    GradNorm,
    GradPCA,
    LowDimensionalGradient,
    by_unique_name,
    with_twins,
)
from grood_fast.errors import FitWarning, InputError, NotFittedError
from grood_fast.representations import HeadGradient, ProjectedHeadGradient
from grood_fast.scores import KNN, GradientNorm, Mahalanobis, Norm, SubspaceResidual
from grood_fast.signals import stream

REFERENCE = toys.batches(90)
X = toys.samples(25, 7)


def head_gradients(model: toys.Net, x: Tensor, scalar: Any, bias: bool = False) -> Tensor:
    """(N, P) float64 gradients of a scalar of the logits by a loop of autograd, last layer only."""
    model = toys.Net().double() if model is None else model
    head = nn.Linear(model.head.in_features, model.head.out_features).double()
    head.load_state_dict({k: v.double() for k, v in model.head.state_dict().items()})
    with torch.no_grad():
        features = model.eval().backbone(x).double()
    rows = []
    for h in features:
        parameters = (head.weight, head.bias) if bias else (head.weight,)
        grads = torch.autograd.grad(scalar(head(h)), parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def reference_images() -> Tensor:
    return torch.cat([x for x, _ in REFERENCE])


@pytest.mark.parametrize("form", ["dual", "dense", "factored", "auto"])
@pytest.mark.parametrize("bias", [False, True])
def test_ldg_is_knn_on_pca_of_autograds_gradients(form: str, bias: bool) -> None:
    model = toys.Net().eval()
    detector = LowDimensionalGradient(
        n_components=5, form=form, bias=bias, score=KNN(k=3, metric="euclidean")
    ).fit(model, REFERENCE, progress=False)
    energy = lambda f: -torch.logsumexp(f, dim=0)  # noqa: E731
    gradients = head_gradients(model, reference_images(), energy, bias)
    mean = gradients.mean(dim=0)
    _, _, directions = torch.linalg.svd(gradients - mean)
    bank = (gradients - mean) @ directions[:5].T
    queries = (head_gradients(model, X, energy, bias) - mean) @ directions[:5].T
    expected = torch.cdist(queries, bank).sort(dim=1).values[:, 2]
    found = detector.score([X], progress=False).as_subclass(Tensor)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
    assert spearmanr(found, expected).statistic > 0.9999


def test_gradpca_is_the_share_inside_the_class_means() -> None:
    model = toys.Net().eval()
    detector = GradPCA().fit(model, REFERENCE, progress=False)
    gradients = head_gradients(model, reference_images(), torch.max)
    labels = torch.cat([y for _, y in REFERENCE])
    means = torch.stack([gradients[labels == c].mean(dim=0) for c in range(toys.CLASSES)])
    centre = means.mean(dim=0)
    _, values, directions = torch.linalg.svd(means - centre)
    share = values.square().cumsum(0) / values.square().sum()
    inside = directions[: int((share < 0.99).sum()) + 1]
    new = head_gradients(model, X, torch.max) - centre
    expected = -(new @ inside.T).norm(dim=1) / new.norm(dim=1)
    found = detector.score([X], progress=False).as_subclass(Tensor).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradpca_with_summed_logits_is_pca_on_class_mean_features() -> None:
    model = toys.Net().eval()
    labels = torch.cat([y for _, y in REFERENCE])
    with torch.no_grad():
        features = model.backbone(reference_images()).double()
        new = model.backbone(X).double()
    means = torch.stack([features[labels == c].mean(dim=0) for c in range(toys.CLASSES)])
    centre = means.mean(dim=0)
    _, values, directions = torch.linalg.svd(means - centre)
    share = values.square().cumsum(0) / values.square().sum()
    inside = directions[: int((share < 0.99).sum()) + 1]
    twin = -((new - centre) @ inside.T).norm(dim=1) / (new - centre).norm(dim=1)
    plain = {}
    for objective in ("logit_sum", "max_logit"):
        detector = GradPCA(objective).fit(model, REFERENCE, progress=False)
        plain[objective] = detector.score([X], progress=False).as_subclass(Tensor).double()
    torch.testing.assert_close(plain["logit_sum"], twin, rtol=1e-4, atol=1e-5)
    assert (plain["max_logit"] - twin).abs().max() > 0.01


@pytest.mark.parametrize(
    "make",
    [
        lambda: LowDimensionalGradient(5, form="dual"),
        lambda: LowDimensionalGradient(5, form="factored", unit=True),
        lambda: LowDimensionalGradient(5, whiten=True, score=Mahalanobis()),
        lambda: LowDimensionalGradient(kind="class_averages", score=KNN(k=2)),
        lambda: GradPCA(bias=True),
        lambda: Detector(SubspaceResidual(), ProjectedHeadGradient(output="norms", n_components=3)),
    ],
)
def test_saved_and_merged(make: Any, tmp_path: Path) -> None:
    model = toys.Net()
    detector = make().fit(model, REFERENCE, progress=False)
    expected = detector.score([X], progress=False).as_subclass(Tensor)
    detector.save(tmp_path / "file")
    again = scoring.load(tmp_path / "file", model)
    assert torch.equal(again.score([X], progress=False).as_subclass(Tensor), expected)
    assert again.card["representation"]["form"] in ("dual", "dense", "factored")

    classifier = Classifier(model)
    shards = []
    other = make()
    for part in (slice(3, None), slice(0, 3)):
        fitting = Fitting([other], classifier)
        for number, signals in enumerate(stream(classifier, REFERENCE, other.needs)):
            if number in range(*part.indices(len(REFERENCE))):
                fitting.absorb(signals)
        shards.append(fitting)
    shards[0].merge(shards[1])
    shards[0].finish()
    shards[0].install(classifier)
    merged = other.score([X], progress=False).as_subclass(Tensor)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_unlabelled_references_serve_pca_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    images = [x for x, _ in REFERENCE]
    LowDimensionalGradient(4).fit(toys.Net(), images, progress=False)
    assert not [w for w in recwarn if "labels" in str(w.message)]
    with pytest.warns(UserWarning, match="no labels"):
        GradPCA().fit(toys.Net(), images, progress=False)


def test_settings_that_do_not_go_together() -> None:
    for options, message in (
        ({"kind": "magic"}, "unknown kind"),
        ({"form": "magic"}, "unknown form"),
        ({"n_components": 0}, "n_components"),
        ({"n_components": None}, "needs n_components"),
        ({"kept_share": 0.0}, "kept_share"),
        ({"output": "magic"}, "output"),
        ({"whiten": True, "form": "dual"}, "whitening"),
        ({"whiten": True, "kind": "class_means"}, "whitening"),
    ):
        with pytest.raises(InputError, match=message):
            ProjectedHeadGradient(**options)  # type: ignore[arg-type]
    with pytest.raises(NotFittedError):
        LowDimensionalGradient().bind(toys.Net()).score([X])
    plain = Detector(SubspaceResidual(), ProjectedHeadGradient(n_components=3))
    plain.fit(toys.Net(), REFERENCE, progress=False)
    with pytest.raises(InputError, match="output='norms'"):
        plain.score([X], progress=False)


def test_the_papers_presets() -> None:
    cifar = LowDimensionalGradient(preset="cifar", max_samples=500)
    assert isinstance(cifar.representation, ProjectedHeadGradient)
    config = cifar.representation.config()
    assert (config["kind"], config["n_components"], config["whiten"]) == ("pca", 200, True)
    assert config["max_samples"] == 500
    assert cifar.score_function.config()["k"] == 5
    cifar.fit(toys.Net(), REFERENCE, progress=False)
    assert cifar.card["representation"]["form"] == "dense"
    imagenet = LowDimensionalGradient(preset="imagenet").fit(toys.Net(), REFERENCE, progress=False)
    assert imagenet.score_function.config()["k"] == 10
    assert imagenet.card["representation"]["kind"] == "class_averages"
    assert imagenet.card["representation"]["components"] == toys.CLASSES
    changed = LowDimensionalGradient(preset="imagenet", score=Mahalanobis(), objective="max_logit")
    assert isinstance(changed.score_function, Mahalanobis)
    with pytest.raises(InputError, match="unknown preset 'mnist'; known: cifar, imagenet"):
        LowDimensionalGradient(preset="mnist")  # type: ignore[arg-type]


def test_what_was_chosen_and_what_it_costs_is_in_repr_also_after_loading(tmp_path: Path) -> None:
    model = toys.Net()
    detector = LowDimensionalGradient(4)
    assert "multiplications" not in repr(detector)
    detector.fit(model, REFERENCE, progress=False)
    facts = detector.card["representation"]
    count = facts["multiplications"][facts["form"]]
    said = f"[{facts['form']} form of 4 components, {count:,} multiplications a sample]"
    assert said in repr(detector)
    detector.save(tmp_path / "file")
    assert said in repr(scoring.load(tmp_path / "file", model))


def test_ranks_smaller_than_asked_for_are_stated() -> None:
    repeated = [(x[:4].repeat(4, 1), y[:4].repeat(4)) for x, y in REFERENCE[:1]]
    detector = LowDimensionalGradient(10, score=KNN(k=2)).fit(toys.Net(), repeated, progress=False)
    assert detector.card["representation"]["components"] == 3  # of four different samples
    assert "3 components" in repr(detector)


@pytest.mark.parametrize("make", [GradPCA, lambda: LowDimensionalGradient(preset="imagenet")])
def test_labels_that_do_not_fit_the_model(make: Any) -> None:
    for wrong in (-1, toys.CLASSES):
        labels = REFERENCE[0][1].clone()
        labels[3] = wrong
        with pytest.raises(InputError, match=f"at least 0 and less than {toys.CLASSES}"):
            make().fit(toys.Net(), [(REFERENCE[0][0], labels)], progress=False)
    some = [(x[y != 1], y[y != 1]) for x, y in REFERENCE]
    with pytest.warns(FitWarning, match=r"1 of 3 classes have no reference samples \(1\)"):
        detector = make().fit(toys.Net(), some, progress=False)
    assert detector.score([X], progress=False).as_subclass(Tensor).isfinite().all()


def test_constant_features_span_nothing() -> None:
    model = toys.Net().eval()
    same = [(X[:1].repeat(20, 1), torch.arange(20) % toys.CLASSES)]
    for make in (LowDimensionalGradient, GradPCA):
        with pytest.raises(InputError, match=r"vary|differ"):
            make().fit(model, same, progress=False)


TWINS: dict[str, tuple[Any, Any]] = {
    "ldg": (lambda: LowDimensionalGradient(4, score=KNN(k=3)), lambda: Detector(KNN(k=3))),
    "gradpca": (lambda: GradPCA(bias=True), lambda: GradPCA("logit_sum", bias=True)),
    "gradnorm": (
        lambda: GradNorm("l2"),
        lambda: Detector(GradientNorm("l2"), HeadGradient("logit_sum")),
    ),
    "exgrad": (ExGrad, lambda: Detector(Norm("l1", negated=True))),
}


@pytest.mark.parametrize("name", TWINS)
def test_twins_see_the_activations_alone(name: str) -> None:
    make, expected = TWINS[name]
    model = toys.Net()
    twin = make().activation_twin()
    assert twin is not None
    assert twin.name == f"{name}-twin"
    table = scoring.score(model, [X], [twin, expected()], reference=REFERENCE, progress=False)
    first, second = (scores.as_subclass(Tensor) for scores in table.values())
    if name == "exgrad":  # ‖1hᵀ‖₁ = C ‖h‖₁
        second = second * toys.CLASSES
    torch.testing.assert_close(first, second)
    assert twin.activation_twin() is None
    # The logits do not matter to it.
    other = toys.Net()
    other.load_state_dict(model.state_dict())
    torch.nn.init.normal_(other.head.weight)
    again = make().activation_twin()
    assert again is not None
    scores = scoring.score(other, [X], again, reference=REFERENCE, progress=False)
    torch.testing.assert_close(scores.as_subclass(Tensor), first)


def test_twins_stand_beside_their_detectors() -> None:
    known = by_unique_name(["knn", "gradnorm", LowDimensionalGradient(4), "exgrad"])
    beside = with_twins(known)
    assert list(beside) == [
        "knn", "gradnorm", "gradnorm-twin", "ldg", "ldg-twin", "exgrad", "exgrad-twin",
    ]  # fmt: skip
    assert beside["ldg"] is known["ldg"]
    assert with_twins(beside) == beside


def block_subspace_iteration(
    energies: Any, parameters: Tensor, columns: int, block: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Wu et al.'s procedure for the leading subspace of per-sample gradients, matrix-free.

    The N x P matrix of gradients, centred and divided by each entry's standard deviation, is only
    multiplied: by forward-mode products on one side, by a weighted backward on the other. Blocks of
    directions are iterated and kept orthogonal to the blocks before, then rotated by a Rayleigh-
    Ritz step.

    Args:
        energies: parameters (P,) → energies (N,).
        parameters: (P,) float64, where the gradients are taken.
        columns, block, iterations: K, directions at once, and steps for each block.

    Returns:
        Directions (P, K), the mean gradient (P,) and 1/deviation (P,).
    """
    _, vjp = torch.func.vjp(energies, parameters)
    count = len(energies(parameters))
    rows = torch.stack([vjp(one)[0] for one in torch.eye(count, dtype=parameters.dtype)])
    mean, inverse = rows.mean(dim=0), rows.std(dim=0, correction=0).reciprocal()
    del rows  # the statistics are a loop over samples; from here on nothing is formed

    def times(matrix: Tensor) -> Tensor:  # (P, k) → (N, k)
        columns = [
            torch.func.jvp(energies, (parameters,), (inverse * v,))[1] - mean @ (inverse * v)
            for v in matrix.T
        ]
        return torch.stack(columns, dim=1)

    def transposed(matrix: Tensor) -> Tensor:  # (N, k) → (P, k)
        return torch.stack([inverse * (vjp(m)[0] - m.sum() * mean) for m in matrix.T], dim=1)

    generator = torch.Generator().manual_seed(0)
    kept = parameters.new_zeros(len(parameters), 0)
    while kept.shape[1] < columns:
        start = torch.randn(count, block, generator=generator, dtype=parameters.dtype)
        omega = transposed(torch.linalg.qr(start).Q)
        for _ in range(iterations):
            omega = transposed(times(omega))
            omega -= kept @ (kept.T @ omega)
            omega = torch.linalg.qr(omega).Q
        rotation = torch.linalg.svd(times(omega).T).U
        kept = torch.cat([kept, omega @ rotation], dim=1)
    return kept[:, :columns], mean, inverse


def test_the_papers_own_procedure_gives_the_same_scores() -> None:
    """The last layer's part of it; 200 samples, 6 directions in 3 blocks."""
    model = toys.Net().eval()
    reference, queries = toys.samples(200), toys.samples(120, 7)
    with torch.no_grad():
        features, new = (model.backbone(x).double() for x in (reference, queries))
    bias = model.head.bias.detach().double()
    weight = model.head.weight.detach().double()

    def energies(flat: Tensor, h: Tensor = features) -> Tensor:
        return torch.logsumexp(h @ flat.view_as(weight).T + bias, dim=1)

    directions, mean, inverse = block_subspace_iteration(
        energies, weight.flatten(), columns=6, block=2, iterations=60
    )

    def coordinates(h: Tensor) -> Tensor:
        columns = [
            torch.func.jvp(lambda w: energies(w, h), (weight.flatten(),), (inverse * v,))[1]
            - mean @ (inverse * v)
            for v in directions.T
        ]
        return torch.nn.functional.normalize(torch.stack(columns, dim=1), dim=1)

    expected = torch.cdist(coordinates(new), coordinates(features)).sort(dim=1).values[:, 4]
    detector = LowDimensionalGradient(6, whiten=True)
    detector.fit(model, [(reference, torch.zeros(200, dtype=torch.int64))], progress=False)
    found = detector.score([queries], progress=False).as_subclass(Tensor).double()
    assert spearmanr(found, expected).statistic > 0.9999
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
