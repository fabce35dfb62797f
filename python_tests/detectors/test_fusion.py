"""Fusion: scales from samples held out, p-values that order what lies beyond them, ensembles."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from scipy import stats
from torch import Tensor
from torch.testing import assert_close

import grood_fast as gf
from grood_fast.classifier import Classifier
from grood_fast.detectors import DetectorScores, Fitting, detector
from grood_fast.errors import FitWarning, InputError
from grood_fast.hashing import hash_indices
from grood_fast.scores.fusion import log_p_value, normal_quantile
from grood_fast.signals import stream

MEMBERS = ("knn", "energy", "gradnorm")
REFERENCE = toys.batches(400)
QUERIES = [toys.samples(30, seed=5), toys.samples(11, seed=6)]


def plain(scores: Tensor) -> Tensor:
    return scores.as_subclass(Tensor)


def held_out_rows(count: int, share: float) -> Tensor:
    """Which samples an ensemble keeps from its members."""
    return hash_indices(torch.arange(count), 2) < int((2 * share - 1) * (2**63 - 1))


def by_hand(combine: str, share: float = 0.2) -> Tensor:
    """Members fitted to the other samples, standardised on those held out."""
    x, y = (torch.cat(parts) for parts in zip(*REFERENCE, strict=True))
    out = held_out_rows(len(x), share)
    model = toys.Net()
    columns = []
    for name in ("knn", "energy", "gradnorm"):
        member = gf.fit(model, [(x[~out], y[~out])], detector(name, **OPTIONS.get(name, {})))
        inside = plain(member.score([x[out]])).double()
        outside = plain(member.score(QUERIES)).double()
        columns.append((outside - inside.mean()) / inside.std(correction=0))
    z = torch.stack(columns, dim=1)
    return z.mean(dim=1) if combine == "mean" else z.amax(dim=1)


OPTIONS = {"knn": {"k": 5}}


def members() -> list[gf.Detector]:
    return [detector(name, **OPTIONS.get(name, {})) for name in MEMBERS]


@pytest.mark.parametrize("combine", ["mean", "max"])
def test_an_ensemble_is_its_members_on_the_scale_of_samples_they_have_not_seen(
    combine: str,
) -> None:
    model = toys.Net()
    before = toys.Condition(model)
    fused = gf.ensemble(members(), combine=combine, held_out=0.2).fit(model, REFERENCE)
    before.assert_same(model)
    actual = plain(fused.score(QUERIES)).double()
    assert_close(actual, by_hand(combine), rtol=1e-4, atol=1e-4)
    out = int(held_out_rows(400, 0.2).sum())
    assert 40 < out < 120
    assert fused.card["representation"] == {"held_out_samples": out, "members": list(MEMBERS)}


@pytest.mark.parametrize(
    ("combine", "scale"),
    [("mean", "moments"), ("max", "ranks"), ("fisher", "ranks"), ("stouffer", "moments")],
)
def test_saved_and_loaded_and_calibrated_again(combine: str, scale: str, tmp_path: Path) -> None:
    model = toys.Net()
    fused = gf.ensemble(members(), combine=combine, scale=scale, held_out=0.2)
    fused.fit(model, REFERENCE).calibrate([toys.samples(200, seed=8)], id_recall=0.9)
    fused.save(tmp_path / "fused.safetensors")
    again = gf.load(tmp_path / "fused.safetensors", model)
    assert torch.equal(plain(again.score(QUERIES)), plain(fused.score(QUERIES)))
    assert again.threshold == fused.threshold
    inside = again.predict([toys.samples(300, seed=9)])
    assert 0.02 < inside.float().mean() < 0.25


def test_members_are_copies() -> None:
    model = toys.Net()
    knn = gf.KNN(3)
    mine = gf.fit(model, toys.batches(64), knn)
    expected = plain(mine.score(QUERIES))
    gf.ensemble([mine, "energy"], held_out=0.2).fit(model, REFERENCE)
    assert torch.equal(plain(mine.score(QUERIES)), expected)


def test_shards_merge_into_the_whole() -> None:
    model = toys.Net()
    classifier = Classifier(model)
    fused = gf.ensemble(members(), held_out=0.2)
    everything = list(stream(classifier, REFERENCE, fused.fit_needs))

    def fitted(*shards: list[object]) -> Tensor:
        first, *rest = (Fitting([fused], classifier) for _ in shards)
        for fitting, shard in zip((first, *rest), shards, strict=True):
            for signals in shard:
                fitting.absorb(signals)  # type: ignore[arg-type]
        for other in rest:
            first.merge(other)
        first.finish()
        first.install(classifier)
        return plain(fused.score(QUERIES))

    expected = fitted(everything)
    for order in itertools.permutations([everything[:3], everything[3:9], everything[9:]]):
        assert_close(fitted(*order), expected, rtol=1e-5, atol=1e-6)


def test_ensembles_of_everything_and_of_ensembles() -> None:
    model = toys.Net()
    some = ["grood", gf.GSC("backbone.2"), "ldg", gf.ensemble(["energy", "rmd"], name="inner")]
    fused = gf.ensemble(some, combine="stouffer", held_out=0.2).fit(model, REFERENCE)
    assert fused.score(QUERIES).isfinite().all()
    assert fused.card["representation"]["members"] == ["grood", "gsc", "ldg", "inner"]


@pytest.mark.parametrize("name", ["fused", "density"])
def test_named(name: str, tmp_path: Path) -> None:
    model = toys.Net()
    made = gf.fit(model, REFERENCE, name)
    scores = made.score(QUERIES)
    assert scores.isfinite().all()
    made.save(tmp_path / name)
    assert torch.equal(plain(gf.load(tmp_path / name, model).score(QUERIES)), plain(scores))
    without = gf.fit(model, REFERENCE, detector(name, gradients=None))
    assert not torch.equal(plain(without.score(QUERIES)), plain(scores))


def test_unlabelled_references_are_warned_of_once() -> None:
    with pytest.warns(FitWarning) as warned:
        gf.ensemble(["rmd", "energy"], held_out=0.2).fit(toys.Net(), [x for x, _ in REFERENCE])
    assert len([w for w in warned if "takes the classes the model predicts" in str(w.message)]) == 1


def test_the_joint_density_is_that_of_what_stands_side_by_side() -> None:
    model = toys.Net()
    parts = [gf.StageActivations(), gf.HeadGradientLogNorms()]
    z = torch.cat([part(toys_signals(model, QUERIES[0])).double() for part in parts], dim=1)
    assert_close(gf.Joint(parts)(toys_signals(model, QUERIES[0])), z)
    with pytest.raises(InputError, match="needs no reference; got prototype_gradient"):
        gf.Joint([gf.PrototypeGradient()])
    with pytest.raises(InputError, match="unknown representation 'magic'"):
        gf.Joint(["magic"])


def toys_signals(model: toys.Net, x: Tensor) -> object:
    (signals,) = stream(Classifier(model), [x], {"features", "stages"})
    return signals


def test_log_norms_are_those_of_autograds_gradients() -> None:
    model = toys.Net().double().eval()
    x = toys.samples(6, dtype=torch.float64)
    (signals,) = stream(Classifier(model), [x], {"features"})
    actual = gf.HeadGradientLogNorms(["confounding", "predicted"])(signals)
    for row, one in enumerate(x):
        expected = []
        for loss in (
            lambda f: torch.nn.functional.binary_cross_entropy_with_logits(
                f, torch.ones_like(f), reduction="sum"
            ),
            lambda f: torch.nn.functional.cross_entropy(f, f.argmax(dim=1)),
        ):
            model.zero_grad()
            loss(model(one[None])).backward()
            for parameter in (model.head.weight, model.head.bias):
                expected.append((parameter.grad.square().sum() + 1e-12).log())
        assert_close(actual[row], torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_standardising_a_gmm_makes_units_irrelevant() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    y = torch.arange(300) % 3
    units = torch.tensor([1e-3, 1.0, 1e3, 5.0, 0.1, 7.0], dtype=torch.float64)

    def scores(z: Tensor, **options: object) -> Tensor:
        score = gf.ClassGMM(0.1, standardize=True, **options)  # type: ignore[arg-type]
        score.begin(None)  # type: ignore[arg-type]
        score.absorb(z, y, torch.arange(300))
        score.finish()
        return score(z)

    for options in ({}, {"n_components": 4}):
        assert_close(scores(x, **options), scores(x * units, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_components", [None, 4])
def test_a_tied_gmm_is_scipys_mixture(n_components: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 3
    x = torch.randn(600, 6, generator=generator, dtype=torch.float64) + 2.0 * y.unsqueeze(1)
    score = gf.ClassGMM(0.05, n_components=n_components, tied=True)
    score.begin(None)  # type: ignore[arg-type]
    for rows in torch.arange(600).split(70):
        score.absorb(x[rows], y[rows], rows)
    score.finish()
    z = x
    if n_components is not None:
        centred = x - x.mean(dim=0)
        z = centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :n_components]
    means = torch.stack([z[y == c].mean(dim=0) for c in range(3)])
    within = z - means[y]
    covariance = within.T @ within / 600
    spherical = covariance.trace() / len(covariance) * torch.eye(len(covariance))
    covariance = 0.95 * covariance + 0.05 * spherical
    parts = [stats.multivariate_normal(m, covariance).pdf(z.numpy()) for m in means.numpy()]
    np.testing.assert_allclose(score(x), -np.log(np.mean(parts, axis=0)), rtol=1e-5)


def test_one_covariance_where_there_are_too_many_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grood_fast.scores.gaussian.UNTIED_BUDGET", 8 * 3 * 6**2 - 1)
    model = toys.Net()
    automatic = gf.fit(model, REFERENCE, gf.ClassGMM(tied=None)).score(QUERIES)
    tied = gf.fit(model, REFERENCE, gf.ClassGMM(tied=True)).score(QUERIES)
    own = gf.fit(model, REFERENCE, gf.ClassGMM()).score(QUERIES)
    assert torch.equal(plain(automatic), plain(tied))
    assert not torch.equal(plain(automatic), plain(own))


def test_everything_in_one_pass() -> None:
    loader = toys.Counting(QUERIES)
    far = toys.Counting([3 * toys.samples(40, seed=7)])
    report = gf.evaluate(
        toys.Net(), "all", id=loader, ood={"far": far}, reference=REFERENCE, resamples=5
    )
    assert loader.iterations == far.iterations == 1
    assert set(gf.DETECTORS) <= set(report.detectors)
    table = report.to_markdown()
    assert all(f"| {name} |" in table for name in gf.DETECTORS)


class TestPValues:
    HELD_OUT = torch.randn(500, generator=torch.Generator().manual_seed(0)).double().sort().values

    @pytest.mark.parametrize(
        "held_out",
        [
            HELD_OUT,
            (HELD_OUT * 3).round(),  # ties
            HELD_OUT.exp() ** 4,  # a heavy tail
            torch.zeros(50).double(),
            torch.tensor([0.0, 1.0]).double(),
            torch.tensor([0.0] * 99 + [1.0]).double(),
        ],
    )
    def test_strictly_decreasing_also_beyond_the_samples(self, held_out: Tensor) -> None:
        size = float(held_out[-1] - held_out[0]) or 1.0
        x = torch.linspace(-1, 2, 2001, dtype=torch.float64) * size + held_out[0]
        log_p = log_p_value(x, held_out)
        assert (log_p <= 0).all()
        beyond = x > held_out[-1]
        assert (log_p.diff()[beyond[:-1]] < 0).all()
        assert (log_p.diff() <= 0).all()
        far = log_p_value(held_out[-1] + size * torch.tensor([10.0, 1e3, 1e6]), held_out)
        assert (far.diff() < 0).all()
        assert far.isfinite().all()

    def test_inside_they_are_the_share_that_scores_higher(self) -> None:
        for x in (-1.2, -0.5, 0.0, 0.7, 1.3):
            p = float(log_p_value(torch.tensor([x]).double(), self.HELD_OUT).exp())
            assert p == pytest.approx(float((x < self.HELD_OUT).double().mean()), abs=0.003)

    def test_they_do_not_tie_where_conformal_ones_do(self) -> None:
        x = torch.tensor([6.0, 7.0, 8.0]).double()
        conformal = (1 + (self.HELD_OUT[None] >= x[:, None]).sum(dim=1)) / 501
        assert conformal.unique().numel() == 1
        assert log_p_value(x, self.HELD_OUT).unique().numel() == 3

    def test_nan_stays_nan(self) -> None:
        assert log_p_value(torch.tensor([math.nan]).double(), self.HELD_OUT).isnan().all()

    def test_normal_quantiles_far_into_the_tail(self) -> None:
        log_p = -torch.tensor([0.01, 0.5, 2.0, 50.0, 600.0, 649.9, 650.1, 700.0, 5e3, 1e6]).double()
        actual = normal_quantile(log_p)
        expected = [stats.norm.isf(math.exp(v)) for v in log_p[:8].tolist()]
        np.testing.assert_allclose(actual[:8], expected, rtol=1e-6)
        back = stats.norm.logsf(actual.numpy())
        np.testing.assert_allclose(back, log_p.numpy(), rtol=1e-5)
        assert (actual.diff() > 0).all()

    def test_fisher_and_stouffer_are_scipys(self) -> None:
        held_out = torch.stack([self.HELD_OUT, self.HELD_OUT.exp()], dim=1)
        z = torch.tensor([[0.3, 0.9], [1.5, 4.0], [-1.0, 0.2]]).double()
        p = torch.stack([log_p_value(z[:, i], held_out[:, i]).exp() for i in range(2)], dim=1)
        for combine, method in (("fisher", "fisher"), ("stouffer", "stouffer")):
            score = gf.Fusion(combine)
            score.begin(None)  # type: ignore[arg-type]
            score.absorb(held_out, None, torch.arange(500))
            score.finish()
            expected = [stats.combine_pvalues(row, method=method).statistic for row in p.numpy()]
            np.testing.assert_allclose(score(z), expected, rtol=1e-9)


@pytest.mark.parametrize("combine", ["mean", "stouffer"])
def test_weights(combine: str) -> None:
    model = toys.Net()

    def scores(names: list[str], weights: list[float] | None = None) -> Tensor:
        some = [one for one in members() if one.name in names]
        fused = gf.ensemble(some, combine=combine, weights=weights, held_out=0.2)
        return plain(fused.fit(model, REFERENCE).score(QUERIES))

    everything = list(MEMBERS)
    assert_close(scores(everything, [1, 0, 1]), scores(["knn", "gradnorm"]))
    assert_close(scores(everything, [2, 2, 2]), scores(everything))
    assert not torch.allclose(scores(everything, [1, 2, 3]), scores(everything))
    for options in ({"combine": "max", "weights": [1]}, {"weights": [0]}, {"weights": [-1]}):
        with pytest.raises(InputError):
            gf.ensemble(["energy"], **options)
    with pytest.raises(InputError, match="must have 2 columns, got 1"):
        gf.ensemble(["energy"], weights=[1, 1], held_out=0.2).fit(model, REFERENCE)


def test_refuses() -> None:
    for options in ({"combine": "vote"}, {"scale": "logs"}, {"held_out": 0.0}):
        with pytest.raises(InputError):
            gf.ensemble(["energy"], **options)
    with pytest.raises(InputError, match="at least one detector"):
        gf.ensemble([])
    with pytest.raises(InputError, match="less than two samples"):
        gf.ensemble(["energy"], held_out=0.01).fit(toys.Net(), toys.batches(20))
    assert DetectorScores([detector("energy")]).config()["members"][0]["name"] == "energy"
