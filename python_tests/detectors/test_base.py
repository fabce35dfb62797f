"""A detector's life: bind, fit, score, calibrate, predict, save, load; and shards of a fit."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors import safe_open
from torch import Tensor

from grood_fast import persistence, scoring
from grood_fast.classifier import Classifier
from grood_fast.detectors import (
    DETECTORS,
    Calibration,
    Detector,
    Fitting,
    GradNorm,
    base,
    calibration,
    detector,
    fit_together,
)
from grood_fast.errors import (
    FitWarning,
    HeadNotFoundError,
    InputError,
    NotFittedError,
    PersistenceError,
    ScoreWarning,
)
from grood_fast.representations import Logits, ProjectedHeadGradient
from grood_fast.results import Scores
from grood_fast.scores import KNN, ClassGMM, Energy, Mahalanobis, ViM
from grood_fast.signals import stream

REFERENCE = toys.batches(60)
HELD_OUT = toys.batches(40, seed=1)
TEST = toys.batches(30, seed=2)
OPTIONS: dict[str, dict[str, Any]] = {"knn": {"k": 3}}
FITTED = [name for name in DETECTORS if detector(name).needs_fit]

every_name = pytest.mark.parametrize("name", DETECTORS)
every_fitted = pytest.mark.parametrize("name", FITTED)


def made(name: str) -> Detector:
    return detector(name, **OPTIONS.get(name, {}))


def plain(scores: Tensor) -> Tensor:
    return scores.as_subclass(Tensor)


# --- bind, fit, score ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "fused"])
def test_fit_and_score_equal_what_is_computed_by_hand(name: str) -> None:
    model = toys.Net()
    fitted = made(name).fit(model, REFERENCE)
    assert fitted.is_fitted
    scores = fitted.score(TEST)
    assert type(scores) is Scores
    assert scores.detector == name
    assert torch.equal(scores.labels, torch.arange(30) % 3)

    x = torch.cat([x for x, _ in TEST])
    logits, _ = toys.truth(model, x)
    assert torch.equal(scores.predictions, logits.argmax(1))
    score = made(name).score_function
    if score.needs_fit:
        classifier = Classifier(model)
        for number, signals in enumerate(stream(classifier, REFERENCE, fitted.needs)):
            if number == 0:
                score.begin(classifier)
            z = fitted.representation(signals)
            # GROOD learns from what the classifier gets right; the others from everything.
            rows = (signals.predictions == signals.labels) | (name != "grood")
            if rows.all():
                score.absorb(z, signals.labels, signals.indices)
            else:
                score.absorb(z[rows], signals.labels[rows], signals.indices[rows])
        score.finish()
    for signals in stream(Classifier(model), [x], fitted.needs):
        expected = score(fitted.representation(signals))
        torch.testing.assert_close(plain(scores), expected, rtol=1e-4, atol=1e-4)


def test_what_needs_no_fit_needs_a_model_only() -> None:
    energy = Detector(Energy())
    with pytest.raises(NotFittedError, match=r"energy knows no model yet: call fit.* or bind"):
        energy.score(TEST)
    assert energy.bind(toys.Net()) is energy
    assert len(energy.score(TEST)) == 30


@every_fitted
def test_what_is_not_fitted_says_so(name: str) -> None:
    unfitted = made(name).bind(toys.Net())
    message = r"has not seen reference data yet: call fit\(model, reference\) or pass reference="
    for use in (
        lambda: unfitted.score(TEST),
        lambda: unfitted.calibrate(HELD_OUT),
        lambda: unfitted.save("never"),
        lambda: unfitted(toys.signals_of(toys.Net(), toys.samples(2))),
    ):
        with pytest.raises(NotFittedError, match=message):
            use()
    assert not Path("never").exists()
    assert "not fitted" in repr(unfitted)


@every_fitted
def test_fitting_again_forgets_the_first_time(name: str) -> None:
    model, other = toys.Net(), toys.batches(60, seed=9)
    again = made(name).fit(model, other).calibrate(HELD_OUT, 0.5)
    again.fit(model, REFERENCE)
    once = made(name).fit(model, REFERENCE)
    assert torch.equal(plain(again.score(TEST)), plain(once.score(TEST)))
    assert again.calibration is None
    assert again.card == once.card


# What a fusion holds out is chosen by the place in the reference.
@pytest.mark.parametrize("name", [name for name in FITTED if name != "fused"])
def test_the_order_of_the_reference_does_not_matter_much(name: str) -> None:
    model = toys.Net()
    one = made(name).fit(model, REFERENCE).score(TEST)
    other = made(name).fit(model, REFERENCE[::-1]).score(TEST)
    torch.testing.assert_close(plain(one), plain(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mahalanobis", "rmd", "gmm"])
def test_a_reference_without_labels_takes_the_predicted_classes(name: str) -> None:
    model = toys.Net()
    x = torch.cat([x for x, _ in REFERENCE])
    predicted = toys.truth(model, x)[0].argmax(1)
    with pytest.warns(FitWarning, match=f"no labels: {name} takes the classes the model predicts"):
        unlabelled = made(name).fit(model, [x])
    labelled = made(name).fit(model, [(x, predicted)])
    torch.testing.assert_close(plain(unlabelled.score(TEST)), plain(labelled.score(TEST)))
    assert unlabelled.card["pseudo_labels"] is True
    assert labelled.card["pseudo_labels"] is False


def test_who_needs_no_labels_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made("knn").fit(toys.Net(), [x for x, _ in REFERENCE])


def test_the_card_says_how_it_was_made() -> None:
    model = toys.Net()
    card = made("knn").fit(model, REFERENCE).card
    assert card["model"] == "Net"
    assert card["head"] == "head"
    assert card["reference_samples"] == 60
    assert card["precision"] == "fp32"
    assert card["torch"] == torch.__version__
    assert card["fingerprint"] == Classifier(model).fingerprint("head")
    assert json.loads(json.dumps(card)) == card


@every_fitted
def test_nan_in_the_reference_is_refused_and_the_earlier_fit_stays(name: str) -> None:
    model = toys.Net()
    fitted = made(name).fit(model, REFERENCE).calibrate(HELD_OUT, 0.5)
    before, threshold = fitted.score(TEST), fitted.threshold
    bad = [(x.clone(), y) for x, y in REFERENCE]
    bad[1][0][3, 0] = math.nan
    with pytest.raises(InputError, match=r"hold NaN or Inf \(positions 19\)"):
        fitted.fit(model, bad)
    assert torch.equal(plain(fitted.score(TEST)), plain(before))
    assert fitted.threshold == threshold


@every_fitted
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("mine")])
def test_an_interrupted_fit_changes_nothing(name: str, failure: BaseException) -> None:
    model = toys.used_model()
    before = toys.Condition(model)
    fitted = made(name).fit(model, REFERENCE)
    before.assert_same(model)
    scores, card = fitted.score(TEST), fitted.card
    with pytest.raises(type(failure)):
        fitted.fit(model, toys.failing(toys.batches(60, seed=9), failure))
    before.assert_same(model)
    assert torch.equal(plain(fitted.score(TEST)), plain(scores))
    assert fitted.card == card
    before.assert_same(model)


def test_all_are_fitted_or_none() -> None:
    """The second one's finish() fails: fewer samples than neighbours."""
    model = toys.Net()
    good, bad = Detector(Mahalanobis()), Detector(KNN(55))
    fit_together(Classifier(model), [good, bad], REFERENCE)
    good.bind(model).calibrate(HELD_OUT, 0.5)
    before, threshold = good.score(TEST), good.threshold
    with pytest.raises(InputError, match="k=55 neighbours"):
        fit_together(Classifier(model), [good, bad], toys.batches(50, seed=9))
    assert torch.equal(plain(good.score(TEST)), plain(before))
    assert good.threshold == threshold
    assert bad.bind(model).is_fitted


def test_all_are_fitted_or_none_also_where_warnings_are_errors() -> None:
    first, second = Detector(KNN(3)), Detector(Mahalanobis())
    with warnings.catch_warnings():
        warnings.simplefilter("error", FitWarning)
        with pytest.raises(FitWarning):
            fit_together(Classifier(toys.Net()), [first, second], [toys.samples(60)])
    assert not first.is_fitted
    assert not second.is_fitted


def test_a_detector_belongs_to_the_model_it_was_fitted_for() -> None:
    model, other = toys.Net(), toys.Net(seed=1)
    fitted = made("knn").fit(model, REFERENCE)
    with pytest.raises(InputError, match=r"fitted or calibrated for another model \(a Net\).*head"):
        fitted.bind(other)
    with pytest.raises(InputError, match="another model"):
        fitted.bind(toys.headless())
    with pytest.raises(InputError, match="another model"):
        scoring.score(other, TEST, fitted)
    assert len(fitted.score(TEST)) == 30, "it still knows its own"
    fitted.bind(torch.nn.DataParallel(model))
    fitted.fit(other, REFERENCE)
    with pytest.raises(InputError, match="another model"):
        fitted.bind(model)
    calibrated = Detector(Energy()).bind(model).calibrate(HELD_OUT)
    with pytest.raises(InputError, match="another model"):
        calibrated.bind(other)


def test_a_layers_fingerprint_needs_no_batch() -> None:
    model = toys.used_model()
    before = toys.Condition(model)
    classifier = Classifier(model)
    assert not classifier.has_head
    early = classifier.fingerprint("head")
    with pytest.raises(HeadNotFoundError, match="has not been looked for yet"):
        classifier.fingerprint()
    with pytest.raises(HeadNotFoundError, match="Restless has no layer 'fc'"):
        classifier.fingerprint("fc")
    list(stream(classifier, TEST, {"features"}))
    assert classifier.has_head
    assert classifier.fingerprint() == early
    backbone, whole = classifier.fingerprint("backbone"), classifier.fingerprint("")
    before.assert_same(model)
    assert len({early, backbone, whole, classifier.fingerprint("backbone.2")}) == 4
    with torch.no_grad():
        model.backbone[1].running_mean[0] += 1
    assert classifier.fingerprint() == early
    assert classifier.fingerprint("backbone") != backbone
    assert classifier.fingerprint("") != whole
    assert Classifier(model.double()).fingerprint("head") == early


def test_a_score_that_cannot_read_the_representation_says_so() -> None:
    odd = Detector(KNN(3), Logits())
    with pytest.raises(InputError, match="features must be a floating-point tensor"):
        odd.fit(toys.Net(), REFERENCE)
    with pytest.raises(HeadNotFoundError, match="No linear head"):
        made("knn").fit(toys.headless(), REFERENCE)


# --- calibrate and predict ----------------------------------------------------------------------


@every_name
def test_calibrate_predict_and_p_values(name: str) -> None:
    model = toys.Net()
    fitted = made(name).fit(model, REFERENCE).bind(model)
    with pytest.raises(NotFittedError, match="has no threshold yet: call calibrate"):
        _ = fitted.threshold
    known, scores = fitted.score(HELD_OUT), fitted.score(TEST)
    assert fitted.calibrate(HELD_OUT, id_recall=0.9) is fitted
    assert fitted.threshold == sorted(known.tolist())[math.ceil(0.9 * 41) - 1]
    for samples in (scores, iter(TEST), torch.cat([x for x, _ in TEST])):
        ood = fitted.predict(samples)
        assert ood.dtype == torch.bool
        assert ood.tolist() == [s > fitted.threshold for s in scores.tolist()]
    p_values = fitted.p_values(scores)
    for s, p in zip(scores.tolist(), p_values.tolist(), strict=True):
        assert p == (1 + sum(k >= s for k in known.tolist())) / 41


@pytest.mark.parametrize(
    "batch",
    [
        lambda x, y: x,
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: {"data": x, "label": y},
        lambda x, y: {"x": x, "labels": y},
    ],
)
def test_predict_takes_one_batch_as_a_loader_yields_it(batch: Any) -> None:
    energy = Detector(Energy()).bind(toys.Net()).calibrate(HELD_OUT)
    expected = energy.predict(energy.score(TEST[:1]))
    assert expected.shape == (16,)
    assert torch.equal(energy.predict(batch(*TEST[0])), expected)


@every_name
def test_calibrating_from_scores_is_the_same(name: str) -> None:
    model = toys.Net()
    one, other = (made(name).fit(model, REFERENCE).bind(model) for _ in range(2))
    one.calibrate(HELD_OUT, 0.8)
    other.calibrate(other.score(HELD_OUT), 0.8)
    assert one.threshold == other.threshold
    assert torch.equal(one.calibration.scores, other.calibration.scores)


def test_scores_of_another_detector_are_refused() -> None:
    table = scoring.score(toys.Net(), HELD_OUT, ["energy", "msp"])
    energy = Detector(Energy()).bind(toys.Net()).calibrate(table["energy"])
    for use in (energy.calibrate, energy.predict, energy.p_values):
        with pytest.raises(InputError, match="these are scores of msp, not of energy"):
            use(table["msp"])
    with pytest.raises(NotFittedError, match="has no threshold yet"):
        Detector(Energy()).predict(table["energy"])


def test_numbered_detectors_know_their_own_scores() -> None:
    model = toys.Net()
    detectors = scoring.fit(model, REFERENCE, [KNN(3), KNN(5)])
    table = scoring.score(model, HELD_OUT, list(detectors.values()))
    for name, fitted in detectors.items():
        assert fitted.calibrate(table[name]).threshold in table[name].tolist()


def test_calibration_samples_from_the_reference_are_noticed() -> None:
    knn = made("knn").fit(toys.Net(), REFERENCE)
    with pytest.warns(FitWarning, match="16 of 56 calibration samples .* were in the reference"):
        knn.calibrate([*HELD_OUT, REFERENCE[1]], 0.5)
    with pytest.warns(FitWarning, match="60 of 60 calibration samples"):
        knn.calibrate([torch.cat([x for x, _ in REFERENCE])], 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        knn.calibrate(HELD_OUT, 0.5)
        Detector(Energy()).bind(toys.Net()).calibrate(REFERENCE, 0.5)


def test_overlap_is_noticed_also_where_not_all_fingerprints_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(calibration, "SKETCH_SIZE", 20)
    model = toys.Net()
    knn = made("knn").fit(model, REFERENCE)
    knn.save(tmp_path / "knn")
    for fitted in (knn, Detector.load(tmp_path / "knn", model)):
        with pytest.warns(FitWarning, match="20 of 20 calibration samples looked up"):
            fitted.calibrate(REFERENCE, 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fitted.calibrate(HELD_OUT, 0.5)


def test_too_few_calibration_samples() -> None:
    energy = Detector(Energy()).bind(toys.Net())
    with pytest.warns(FitWarning, match="40 calibration samples cannot give id_recall=0.99"):
        energy.calibrate(HELD_OUT, 0.99)
    assert energy.threshold == math.inf
    assert not energy.predict(TEST[0]).any()


def test_a_failed_calibration_changes_nothing() -> None:
    model = toys.used_model()
    energy = Detector(Energy()).bind(model).calibrate(HELD_OUT)
    before, threshold, card = toys.Condition(model), energy.threshold, energy.card
    for loader, kind, message in (
        ([], InputError, "no batch"),
        ([torch.full((2, 5), math.nan)], InputError, "2 of 2 calibration scores are NaN"),
        (toys.failing(HELD_OUT, KeyboardInterrupt()), KeyboardInterrupt, None),
    ):
        with pytest.raises(kind, match=message):
            energy.calibrate(loader, 0.5)
        assert energy.threshold == threshold
        assert energy.card == card
    for recall in (0, 1, math.nan):
        with pytest.raises(InputError, match="between 0 and 1"):
            energy.calibrate(HELD_OUT, recall)
    before.assert_same(model)


@every_name
def test_nan_samples_are_ood(name: str) -> None:
    model = toys.Net()
    fitted = made(name).fit(model, REFERENCE).bind(model).calibrate(HELD_OUT)
    x = toys.samples(9, seed=5)
    x[2, 1], x[7] = math.nan, math.nan
    with pytest.warns(ScoreWarning, match=rf"{name}: 2 of 9 scores are NaN \(positions 2, 7\)"):
        scores = fitted.score([x[:4], x[4:]])
    assert scores.isnan().nonzero().flatten().tolist() == [2, 7]
    assert fitted.predict(scores)[[2, 7]].all()
    assert fitted.p_values(scores)[[2, 7]].tolist() == [1 / 41, 1 / 41]


# --- shards -------------------------------------------------------------------------------------


# A network's gradients are there only while their batch is.
@pytest.mark.parametrize("name", [name for name in FITTED if name != "confounding"])
@pytest.mark.parametrize("labelled", [True, False])
def test_merging_shards_equals_one_pass(name: str, labelled: bool) -> None:
    model = toys.Net()
    classifier, detector = Classifier(model), made(name)
    reference = REFERENCE if labelled else [x for x, _ in REFERENCE]
    everything = list(stream(classifier, reference, detector.fit_needs))
    classifier.find_head(everything[0].batch)

    def fitting(some: Any) -> Fitting:
        part = Fitting([detector], classifier)
        for signals in some:
            part.absorb(signals)
        return part

    def installed(part: Fitting) -> Detector:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FitWarning)
            part.finish()
            part.install(classifier)
        return detector.bind(model)

    whole = installed(fitting(everything))
    expected, card = whole.score(TEST), whole.card
    fingerprints = whole._sketch.fingerprints
    for order in itertools.permutations([everything[:1], everything[1:3], everything[3:]]):
        first, *rest = (fitting(shard) for shard in order)
        for part in rest:
            first.merge(part)
        merged = installed(first)
        torch.testing.assert_close(plain(merged.score(TEST)), plain(expected))
        assert merged.card == card
        assert torch.equal(merged._sketch.fingerprints, fingerprints)


@pytest.mark.parametrize("first", [0, 1])
def test_one_shard_without_labels_is_enough_to_say_so(first: int) -> None:
    classifier = Classifier(toys.Net())
    labelled, mahalanobis = REFERENCE[0], Detector(Mahalanobis())
    parts = []
    for batch in (labelled, labelled[0]):
        (signals,) = stream(classifier, [batch], {"features"})
        parts.append(Fitting([mahalanobis], classifier))
        parts[-1].absorb(signals)
    merged = parts[first]
    merged.merge(parts[1 - first])
    with pytest.warns(FitWarning, match="the reference has no labels"):
        merged.finish()
    merged.install(classifier)
    assert mahalanobis.card["pseudo_labels"] is True


def test_a_fitting_leaves_its_detector_alone_until_it_is_installed() -> None:
    model = toys.Net()
    knn = made("knn").fit(model, REFERENCE)
    before = knn.score(TEST)
    classifier = Classifier(model)
    (signals,) = stream(classifier, [toys.samples(40, seed=9)], {"features"})
    part = Fitting([knn], classifier)
    part.absorb(signals)
    part.finish()
    assert torch.equal(plain(knn.score(TEST)), plain(before))
    part.install(classifier)
    assert not torch.equal(plain(knn.score(TEST)), plain(before))


def test_detectors_with_the_same_representation_learn_and_compute_it_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    for method in ("finish", "__call__"):
        original = getattr(ProjectedHeadGradient, method)
        monkeypatch.setattr(
            ProjectedHeadGradient,
            method,
            lambda self, *rest, method=method, original=original: (
                calls.append(method),
                original(self, *rest),
            )[1],
        )
    scores = {"nearest": KNN(3), "distance": Mahalanobis()}
    together = [
        Detector(one, ProjectedHeadGradient(n_components=4), n) for n, one in scores.items()
    ]
    other = Detector(KNN(3), ProjectedHeadGradient(n_components=5), "other")
    model = toys.Net()
    table = scoring.score(model, TEST, [*together, other], reference=REFERENCE)
    assert together[0].representation is together[1].representation
    assert other.representation is not together[0].representation
    assert calls.count("finish") == 2
    assert calls.count("__call__") == 2 * len(TEST)
    for name, one in scores.items():
        alone = Detector(one.fresh(), ProjectedHeadGradient(n_components=4), name)
        assert torch.equal(plain(alone.fit(model, REFERENCE).score(TEST)), plain(table[name]))


# --- save and load ------------------------------------------------------------------------------


@every_name
@pytest.mark.parametrize("calibrated", [True, False])
def test_what_is_loaded_scores_bit_for_bit_the_same(
    name: str, calibrated: bool, tmp_path: Path
) -> None:
    model = toys.Net()
    saved = made(name).fit(model, REFERENCE).bind(model)
    if calibrated:
        saved.calibrate(HELD_OUT, 0.8)
    saved.save(tmp_path / "file")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    loaded = Detector.load(tmp_path / "file", model)
    scores = saved.score(TEST)
    again = loaded.score(TEST)
    assert torch.equal(plain(again), plain(scores))
    assert again.detector == name
    assert loaded.name == saved.name
    assert loaded.card == saved.card
    assert loaded.score_function.config() == saved.score_function.config()
    assert loaded.representation.config() == saved.representation.config()
    if calibrated:
        assert loaded.threshold == saved.threshold
        assert torch.equal(loaded.p_values(scores), saved.p_values(scores))
        assert torch.equal(loaded.predict(scores), saved.predict(scores))
    else:
        assert loaded.calibration is None
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize(
    "unusual",
    [
        Detector(KNN(2, "euclidean", True, 40), name="mine"),
        Detector(Mahalanobis("oas")),
        Detector(ClassGMM(0.1, 2)),
        Detector(ViM(2, 50)),
        GradNorm("linf", 2.0, True),
    ],
    ids=repr,
)
def test_settings_are_loaded_too(unusual: Detector, tmp_path: Path) -> None:
    model = toys.Net(bias=False)
    unusual.fit(model, REFERENCE).bind(model)
    unusual.save(tmp_path / "file")
    loaded = scoring.load(tmp_path / "file", model)
    assert torch.equal(plain(loaded.score(TEST)), plain(unusual.score(TEST)))
    assert loaded.name == unusual.name
    assert loaded.score_function.config() == unusual.score_function.config()


def saved_knn(folder: Path, model: toys.Net) -> Path:
    path = folder / "knn.safetensors"
    made("knn").fit(model, REFERENCE).calibrate(HELD_OUT).save(path)
    return path


def test_loading_without_a_model_and_binding_later(tmp_path: Path) -> None:
    model = toys.Net()
    path = saved_knn(tmp_path, model)
    loaded = Detector.load(path)
    with pytest.raises(NotFittedError, match="knows no model"):
        loaded.score(TEST)
    with pytest.raises(InputError, match="another model"):
        loaded.bind(toys.Net(seed=1))
    assert len(loaded.bind(model).score(TEST)) == 30


def test_the_file_belongs_to_the_model(tmp_path: Path) -> None:
    model = toys.Net()
    path = saved_knn(tmp_path, model)
    unlike = toys.Net(seed=1)
    for other in (unlike, toys.headless(), toys.Net(classes=4)):
        with pytest.raises(PersistenceError, match=r"does not fit the model.*another model"):
            Detector.load(path, other)
    with torch.no_grad():
        model.head.weight[0, 0] += 1e-6
    with pytest.raises(PersistenceError, match="weights of the head 'head' differ"):
        Detector.load(path, model)


@pytest.mark.parametrize("tampered", ["weight", "bias"])
def test_a_model_without_a_head_is_known_by_all_its_weights(tampered: str, tmp_path: Path) -> None:
    model = toys.headless()
    energy = Detector(Energy()).bind(model).calibrate(HELD_OUT)
    energy.save(tmp_path / "energy")
    loaded = Detector.load(tmp_path / "energy", model)
    assert torch.equal(plain(loaded.score(TEST)), plain(energy.score(TEST)))
    with torch.no_grad():
        getattr(model[0], tampered).view(-1)[0] += 1e-6
    with pytest.raises(PersistenceError, match="the weights differ"):
        Detector.load(tmp_path / "energy", model)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    model = toys.Net()
    path = saved_knn(tmp_path, model)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    offsets = [0, 3, 8, 20, start // 2, start - 9, start, start + 1, len(whole) - 1]
    for offset in [*offsets, *range(0, len(whole), 97)]:
        damaged = bytearray(whole)
        damaged[offset] ^= 0x04
        path.write_bytes(bytes(damaged))
        with pytest.raises(PersistenceError):
            Detector.load(path, model)
    for length in (0, 8, start, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(PersistenceError, match="damaged"):
            Detector.load(path, model)
    path.write_bytes(whole)
    Detector.load(path, model)
    with pytest.raises(PersistenceError, match="there is no file"):
        Detector.load(tmp_path / "nowhere", model)


def rewrite(path: Path, **changes: Any) -> None:
    """A file as another version of this package could have written it: with valid checksums."""
    header, tensors = persistence.read(path, kind="detector", version=base.FILE_VERSION)
    kind = changes.pop("kind", base.FILE_KIND)
    version = changes.pop("version", base.FILE_VERSION)
    for key in changes.pop("without", ()):
        del header[key]
    header.update(changes)
    persistence.write(path, kind=kind, version=version, header=header, tensors=tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": base.FILE_VERSION + 1}, "has format version 2, this grood-fast reads 1"),
        ({"kind": "subspace"}, "holds a subspace, expected a detector"),
        ({"score": {"name": "knn9", "config": {}}}, "does not describe a detector.*'knn9'"),
        ({"representation": {"name": "pixels", "config": {}}}, "does not describe.*'pixels'"),
        ({"score": {"name": "knn", "config": {"k": 0}}}, "does not describe.*k must be at least"),
        ({"score": {"name": "knn", "config": {"q": 1}}}, "does not describe.*'q'"),
        ({"score": "knn"}, "does not describe"),
        ({"card": 3}, "does not describe"),
        ({"id_recall": 2.0}, "does not describe"),
        ({"without": ["name"]}, "does not describe.*'name'"),
        ({"without": ["id_recall"]}, "does not describe.*'id_recall'"),
    ],
    ids=str,
)
def test_files_that_do_not_describe_a_detector_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = toys.Net()
    path = saved_knn(tmp_path, model)
    rewrite(path, **changes)
    with pytest.raises(PersistenceError, match=message):
        Detector.load(path, model)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["BOMB"],)


def test_loading_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (tmp_path / "file").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(PersistenceError, match="not a safetensors file"):
        Detector.load(tmp_path / "file", toys.Net())
    path = saved_knn(tmp_path, toys.Net())
    rewrite(path, score={"name": "__import__('os').mkdir", "config": {}}, name={"__reduce__": 1})
    with pytest.raises(PersistenceError):
        Detector.load(path)
    assert not (tmp_path / "exploded").exists()
    with safe_open(path, framework="pt") as file:
        assert set(file.metadata()) == {"grood_fast"}


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.Net()
    path = saved_knn(tmp_path, model)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    other = made("knn").fit(model, HELD_OUT)
    for function in ("replace", "fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(os, function, full)
            with pytest.raises(PersistenceError, match=r"No space left on device.*unchanged"):
                other.save(path)
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    other.save(path)
    assert path.read_bytes() != before


def test_to_moves_what_was_fitted() -> None:
    knn = made("knn").fit(toys.Net(), REFERENCE)
    assert knn.to("meta") is knn
    assert {t.device.type for t in knn.score_function.fitted.values()} == {"meta"}


def test_a_calibration_can_be_set_by_hand() -> None:
    energy = Detector(Energy()).bind(toys.Net())
    energy.calibration = Calibration.of(energy.score(HELD_OUT), 0.9)
    assert energy.predict(TEST[0]).shape == (16,)


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    class Mine(Energy):
        name = "mine"

    detector = Detector(Mine()).bind(toys.Net())
    with pytest.raises(PersistenceError, match="enter it as 'mine'"):
        detector.save(tmp_path / "mine.safetensors")
    assert not list(tmp_path.iterdir())


def test_scoring_with_a_reference_binds_what_it_fitted() -> None:
    detector, model = Detector(KNN(k=3)), toys.Net()
    table = scoring.score(
        model, toys.batches(20), [detector], reference=toys.batches(40, 1), progress=False
    )
    assert torch.equal(
        detector.score(toys.batches(20), progress=False).as_subclass(Tensor),
        table["knn"].as_subclass(Tensor),
    )


def test_a_list_of_batches_is_not_taken_for_one_batch() -> None:
    detector = Detector(Energy()).bind(toys.Net()).calibrate(HELD_OUT)
    x = toys.samples(30, 5)
    expected = detector.predict(x)
    labels = torch.zeros(30, dtype=torch.int64)
    for same in ([x], (x,), [x, labels], (x, labels), {"data": x, "label": labels}):
        assert torch.equal(detector.predict(same), expected)
    for batches in (
        [x[:10], x[10:]],
        (x[:15], x[15:]),
        [(x[:10], labels[:10]), (x[10:], labels[10:])],
        iter([x[:10], x[10:]]),
    ):
        assert torch.equal(detector.predict(batches), expected)


def test_another_model_voids_the_threshold() -> None:
    detector = Detector(Energy()).bind(toys.Net()).calibrate(HELD_OUT)
    other = toys.Net(seed=1)
    detector.fit(other, TEST)
    with pytest.raises(NotFittedError, match="threshold"):
        detector.predict(TEST)
    detector.calibrate(HELD_OUT)
    assert detector.card["fingerprint"] == detector.bind(other)._bound().fingerprint("head")


def test_weights_that_change_after_binding_are_noticed() -> None:
    model = toys.Net()
    detector = Detector(KNN(k=3)).fit(model, TEST)
    detector.score(TEST)
    with torch.no_grad():
        model.head.weight.add_(1)
    for use in (detector.score, detector.calibrate):
        with pytest.raises(InputError, match="weights of the head 'head' differ"):
            use(TEST)


def test_a_wrapped_model_is_loaded_by_the_heads_new_name(tmp_path: Path) -> None:
    model = toys.Net()
    detector = Detector(KNN(k=3)).fit(model, TEST)
    detector.save(tmp_path / "knn")
    wrapped = torch.nn.Sequential(model)
    with pytest.raises(PersistenceError, match="head"):
        Detector.load(tmp_path / "knn", wrapped)
    again = Detector.load(tmp_path / "knn", wrapped, head="0.head")
    assert torch.equal(
        again.score(TEST).as_subclass(Tensor), detector.score(TEST).as_subclass(Tensor)
    )


def test_calling_a_detector_with_inputs_says_what_to_call() -> None:
    with pytest.raises(InputError, match="predict"):
        Detector(Energy())(toys.samples(3))  # type: ignore[arg-type]
