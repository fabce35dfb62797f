"""score(), fit() and load() from end to end: formats, passes, errors, and the model untouched."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import grood_fast.progress
from grood_fast.detectors import DETECTORS, Detector, GradNorm, detector
from grood_fast.errors import (
    FitWarning,
    HeadNotFoundError,
    InputError,
    LoaderWarning,
    NotFittedError,
    PersistenceError,
    ScoreWarning,
)
from grood_fast.results import Scores, ScoreTable
from grood_fast.scores import KNN, Energy, Mahalanobis
from grood_fast.scoring import fit, load, score

REFERENCE = toys.batches(60)
TEST = toys.batches(30, seed=2)
X, Y = torch.cat([x for x, _ in TEST]), torch.cat([y for _, y in TEST])
NEEDS_REFERENCE = [name for name in DETECTORS if detector(name).needs_fit]
LOGITS_ONLY = [name for name in DETECTORS if not detector(name).needs]
ALL = list(DETECTORS)
ALL_BUT_GROOD = [name for name in ALL if name != "grood"]
# These want more samples a class than stages have channels, and say so.
QUIET = [name for name in ALL if name not in ("density", "fused")]


def plain(scores: Tensor) -> Tensor:
    return scores.as_subclass(Tensor)


@pytest.fixture(scope="module")
def expected() -> ScoreTable:
    return score(toys.Net(), TEST, ALL, reference=REFERENCE)


def assert_as_expected(table: ScoreTable, expected: ScoreTable) -> None:
    assert list(table) == list(expected)
    for name, scores in table.items():
        torch.testing.assert_close(plain(scores), plain(expected[name]), rtol=1e-4, atol=1e-4)
    assert torch.equal(table.predictions, expected.predictions)


@pytest.mark.parametrize("name", ALL)
def test_one_detector_by_name(name: str, expected: ScoreTable) -> None:
    model = toys.Net()
    scores = score(model, TEST, name, reference=REFERENCE)
    assert type(scores) is Scores
    assert scores.detector == name
    assert scores.dtype == torch.float32
    assert torch.equal(plain(scores), plain(expected[name]))
    logits, features = toys.truth(model, X)
    assert torch.equal(scores.predictions, logits.argmax(1))
    assert torch.equal(scores.labels, Y)
    p = logits.double().softmax(1)
    by_hand = {
        "msp": 1 - p.amax(1),
        "maxlogit": -logits.amax(1),
        "energy": -logits.logsumexp(1),
        "gen": (p * (1 - p)).pow(0.1).sum(1),
        "gradnorm": -(3 * p - 1).abs().sum(1) * features.abs().sum(1),
        "exgrad": 2 * features.abs().sum(1) * (1 - p.square().sum(1)),
    }
    if name in by_hand:
        torch.testing.assert_close(plain(scores), by_hand[name].float(), rtol=1e-4, atol=1e-5)


def test_the_default_is_energy(expected: ScoreTable) -> None:
    scores = score(toys.Net(), TEST)
    assert scores.detector == "energy"
    assert torch.equal(plain(scores), plain(expected["energy"]))


class Keywords(toys.Net):
    """Takes its input as Hugging Face models do."""

    def forward(self, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Any:
        return super().forward(pixel_values)


FORMATS: dict[str, tuple[Callable[[Tensor, Tensor], Any], type[toys.Net], bool]] = {
    "x": (lambda x, y: x, toys.Net, False),
    "(x,)": (lambda x, y: (x,), toys.Net, False),
    "(x, y)": (lambda x, y: (x, y), toys.Net, True),
    "(x, y, path)": (lambda x, y: (x, y, ["a"] * len(x)), toys.Net, True),
    "dict": (lambda x, y: {"data": x, "label": y, "index": y}, toys.Net, True),
    "keywords": (
        lambda x, y: {"pixel_values": x, "attention_mask": torch.ones(len(x)), "labels": y},
        Keywords,
        True,
    ),
    "keywords without labels": (lambda x, y: {"pixel_values": x}, Keywords, False),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore::grood_fast.errors.FitWarning")
def test_every_loader_format(form: str) -> None:
    make, model_class, labelled = FORMATS[form]
    model = model_class()
    reference = [make(x, y) for x, y in REFERENCE]
    table = score(model, (make(x, y) for x, y in TEST), ALL, reference=iter(reference))
    if labelled:
        assert torch.equal(table.labels, Y)
        same = REFERENCE
    else:
        assert table.labels is None
        same = [(x, toys.truth(model, x)[0].argmax(1)) for x, _ in REFERENCE]
    assert_as_expected(table, score(toys.Net(), TEST, ALL, reference=same))


def test_labels_of_some_batches_only_are_not_kept() -> None:
    assert score(toys.Net(), [TEST[0], TEST[1][0]]).labels is None


@pytest.mark.parametrize(
    "output",
    [
        lambda f: (f, f.sum()),
        lambda f: [f.mean(), f],
        lambda f: {"logits": f, "hidden": f * 2},
        lambda f: {"loss": f.sum(), "out": f},
        lambda f: SimpleNamespace(logits=f),
    ],
    ids=["tuple", "list", "dict", "dict without logits", "object"],
)
def test_every_model_output(output: Callable[[Tensor], Any], expected: ScoreTable) -> None:
    table = score(toys.Net(output), TEST, ALL, reference=REFERENCE)
    assert_as_expected(table, expected)


@pytest.mark.parametrize("size", [1, 7, 30])
def test_the_size_of_batches_does_not_matter(size: int, expected: ScoreTable) -> None:
    loader = list(zip(X.split(size), Y.split(size), strict=True))
    assert_as_expected(score(toys.Net(), loader, ALL, reference=REFERENCE), expected)


def test_a_data_loader_with_workers_and_empty_batches(expected: ScoreTable) -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, num_workers=1)
    assert_as_expected(score(toys.Net(), loader, ALL, reference=REFERENCE), expected)
    gaps = [TEST[0], (X[:0], Y[:0]), TEST[1]]
    assert_as_expected(score(toys.Net(), gaps, ALL, reference=REFERENCE), expected)


# --- one pass -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [ALL, ALL_BUT_GROOD, LOGITS_ONLY, ["energy"], ["knn"], ["gradnorm"]], ids=str
)
def test_one_pass_over_each_loader_whatever_the_detectors(names: list[str]) -> None:
    model = toys.Net()
    loader, reference = toys.Counting(TEST), toys.Counting(REFERENCE)
    score(model, loader, names, reference=reference)
    assert loader.iterations == 1
    fits = any(name in NEEDS_REFERENCE for name in names)
    probes = any(detector(name).needs for name in names)
    assert reference.iterations == fits
    once = len(TEST) + len(REFERENCE) * fits + probes
    if any(need != "features" for name in names for need in detector(name).fit_needs):
        # Layers and parameters are found with two samples; grood runs on from one, mixed.
        assert once < model.forwards <= once + 20
    else:
        assert model.forwards == once


def test_the_reference_is_read_for_unfitted_detectors_only() -> None:
    model = toys.Net()
    fitted = fit(model, toys.batches(60, seed=9), "knn")
    before = {name: tensor.clone() for name, tensor in fitted.score_function.fitted.items()}
    reference = toys.Counting(REFERENCE)
    score(model, TEST, [fitted, "energy"], reference=reference)
    assert reference.iterations == 0
    unfitted = Detector(Mahalanobis())
    score(model, TEST, [fitted, unfitted], reference=reference)
    assert reference.iterations == 1
    assert unfitted.is_fitted
    score(model, TEST, [fitted, unfitted], reference=reference)
    assert reference.iterations == 1
    for name, tensor in fitted.score_function.fitted.items():
        assert torch.equal(tensor, before[name])


def test_generators_are_read_once_and_whole(expected: ScoreTable) -> None:
    def once(loader: Any) -> Iterator[Any]:
        yield from loader

    model = toys.Net()
    assert_as_expected(score(model, once(TEST), ALL, reference=once(REFERENCE)), expected)
    used = once(TEST)
    list(used)
    with pytest.raises(InputError, match="used up"):
        score(model, used)


# --- what is asked for --------------------------------------------------------------------------


def test_a_list_gives_a_table_by_unique_name(expected: ScoreTable) -> None:
    mine = GradNorm("l2")
    table = score(
        toys.Net(),
        TEST,
        ["energy", KNN(3), "knn", mine, "energy", "gradnorm"],
        reference=REFERENCE,
    )
    assert list(table) == ["energy", "knn", "knn-2", "gradnorm", "energy-2", "gradnorm-2"]
    assert [scores.detector for scores in table.values()] == list(table)
    assert torch.equal(plain(table["energy"]), plain(table["energy-2"]))
    assert torch.equal(plain(table["knn-2"]), plain(expected["knn"]))
    assert not torch.equal(plain(table["knn"]), plain(table["knn-2"]))
    assert torch.equal(plain(table["gradnorm-2"]), plain(expected["gradnorm"]))
    assert list(score(toys.Net(), TEST, ("msp",))) == ["msp"]
    same = score(toys.Net(), TEST, [mine, mine])
    assert torch.equal(plain(same["gradnorm"]), plain(same["gradnorm-2"]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("knm", "unknown detector 'knm'; known: msp"),
        (["energy", "knm"], "unknown detector 'knm'"),
        ([], "no detector was named"),
        ((), "no detector was named"),
        (7, "expected a detector's name, a score or a detector, got int"),
        (None, "got NoneType"),
        (KNN, "expected a detector's name"),
        ([["energy"]], "got list"),
    ],
)
def test_other_specs_are_refused_before_the_loader_is_read(spec: Any, message: str) -> None:
    model, loader = toys.Net(), toys.Counting(TEST)
    with pytest.raises(InputError, match=message):
        score(model, loader, spec, reference=loader)
    with pytest.raises(InputError, match=message):
        fit(model, loader, spec)
    assert loader.iterations == model.forwards == 0


def test_what_needs_a_reference_says_so_before_the_loader_is_read() -> None:
    model, loader = toys.Net(), toys.Counting(TEST)
    with pytest.raises(NotFittedError, match=r"^knn, vim has not seen reference data yet"):
        score(model, loader, ["energy", "knn", "vim"])
    assert loader.iterations == model.forwards == 0


@pytest.mark.parametrize("loader", [[], iter(()), DataLoader(TensorDataset(X[:0]))])
def test_empty_loaders(loader: Any) -> None:
    with pytest.raises(InputError, match="no batch"):
        score(toys.Net(), loader)
    with pytest.raises(InputError, match="no batch"):
        score(toys.Net(), TEST, "knn", reference=loader)
    with pytest.raises(InputError, match="no batch"):
        fit(toys.Net(), loader, "knn")


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match=r"Expected a torch\.nn\.Module, got function"):
        score(score, TEST)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="precision must be"):
        score(toys.Net(), TEST, precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"in a list: \[batch\]"):
        score(toys.Net(), X)
    with pytest.raises(InputError, match=r"which yields samples. Wrap it"):
        score(toys.Net(), TensorDataset(X, Y))


def test_models_without_a_linear_head() -> None:
    model = toys.headless()
    table = score(model, TEST, LOGITS_ONLY)
    logits = model(X).detach()
    torch.testing.assert_close(plain(table["maxlogit"]), -logits.amax(1))
    assert LOGITS_ONLY == ["msp", "maxlogit", "energy", "gen"]
    for name in set(ALL) - {*LOGITS_ONLY, "confounding"}:  # which asks for no head
        with pytest.raises(HeadNotFoundError, match="not its values"):
            score(model, TEST, [*LOGITS_ONLY, name], reference=REFERENCE)


def test_the_head_can_be_named(expected: ScoreTable) -> None:
    table = score(toys.Net(), TEST, ALL, reference=REFERENCE, head="head")
    assert_as_expected(table, expected)
    with pytest.raises(HeadNotFoundError, match="no such module"):
        score(toys.Net(), TEST, "gradnorm", head="fc")
    assert len(score(toys.Net(), TEST, "energy", head="fc")) == 30


# --- fit and load -------------------------------------------------------------------------------


def test_fit_binds_and_hands_back(expected: ScoreTable) -> None:
    model = toys.Net()
    one = fit(model, REFERENCE, "knn")
    assert torch.equal(plain(one.score(TEST)), plain(expected["knn"]))
    mine = Detector(Mahalanobis())
    several = fit(model, REFERENCE, [mine, "energy", KNN(3), "knn"])
    assert list(several) == ["mahalanobis", "energy", "knn", "knn-2"]
    assert several["mahalanobis"] is mine
    assert torch.equal(plain(mine.score(TEST)), plain(expected["mahalanobis"]))
    assert torch.equal(plain(several["energy"].score(TEST)), plain(expected["energy"]))
    for detectors in (list(several.values()), several.values(), iter(several.values())):
        table = score(model, TEST, detectors)
        assert list(table) == list(several)


def test_fit_in_place_a_second_time_and_for_another_model() -> None:
    mine = Detector(KNN(3))
    model, other = toys.Net(), toys.Net(seed=1)
    assert fit(model, REFERENCE, mine) is mine
    first = mine.score(TEST)
    fit(other, REFERENCE, mine)
    assert not torch.equal(plain(mine.score(TEST)), plain(first))
    with pytest.raises(InputError, match="another model"):
        score(model, TEST, mine)
    fit(model, REFERENCE, mine)
    assert torch.equal(plain(mine.score(TEST)), plain(first))


def test_load(tmp_path: Path, expected: ScoreTable) -> None:
    model = toys.Net()
    for name, fitted in fit(model, REFERENCE, ALL).items():
        fitted.save(tmp_path / name)
        loaded = load(tmp_path / name, model)
        assert torch.equal(plain(score(model, TEST, loaded)), plain(expected[name]))


# --- warnings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_nan_samples_have_nan_scores(name: str, expected: ScoreTable) -> None:
    bad = [(x.clone(), y) for x, y in TEST]
    bad[1][0][5] = math.nan
    with pytest.warns(ScoreWarning, match=r"1 of 30 scores are NaN \(positions 21\)") as caught:
        scores = score(toys.Net(), bad, name, reference=REFERENCE)
    assert caught[0].filename == __file__
    assert scores.isnan().nonzero().tolist() == [[21]]
    others = torch.arange(30) != 21
    torch.testing.assert_close(
        plain(scores)[others], plain(expected[name])[others], rtol=1e-5, atol=1e-5
    )


def test_many_nan_samples_are_not_all_listed() -> None:
    with pytest.warns(ScoreWarning, match=r"30 of 30 .*\(positions 0, 1, 2, 3, 4, …\)"):
        score(toys.Net(), [X * math.nan])


def test_loaders_that_shuffle_or_drop_are_warned_about() -> None:
    data, model = TensorDataset(X, Y), toys.Net()
    shuffled = DataLoader(data, batch_size=8, shuffle=True)
    with pytest.warns(LoaderWarning, match="another order") as caught:
        score(model, shuffled)
    assert caught[0].filename == __file__
    with pytest.warns(LoaderWarning, match="drops its last 6 samples"):
        assert len(score(model, DataLoader(data, batch_size=8, drop_last=True))) == 24
    with warnings.catch_warnings():  # a reference may come in any order
        warnings.simplefilter("error")
        fitted = fit(model, shuffled, KNN(3))
        score(model, TEST, KNN(3), reference=shuffled)
        fitted.calibrate(DataLoader(TensorDataset(toys.samples(40, 7)), shuffle=True))
    with pytest.warns(LoaderWarning, match="another order") as caught:
        fitted.score(shuffled)
    assert caught[0].filename == __file__


def test_unlabelled_references_are_warned_about_where_they_are_passed() -> None:
    with pytest.warns(FitWarning, match="the reference has no labels: mahalanobis takes") as caught:
        score(toys.Net(), TEST, ["mahalanobis", "knn"], reference=[x for x, _ in REFERENCE])
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("progress", [True, False])
def test_nothing_is_said_where_nothing_is_wrong(
    progress: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(toys.Net(), TEST, QUIET, reference=REFERENCE, progress=progress)
    assert capfd.readouterr() == ("", "")


def test_long_passes_show_a_bar_unless_told_not_to(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grood_fast.progress, "DELAY", 0)
    score(toys.Net(), TEST, "knn", reference=REFERENCE, progress=False)
    assert capfd.readouterr() == ("", "")
    score(toys.Net(), iter(TEST), "knn", reference=REFERENCE)
    output, errors = capfd.readouterr()
    assert output == ""
    assert "fitting" in errors
    assert "/4" in errors, "of a loader with a length"
    assert "scoring" in errors


# --- the model comes back as it was ---------------------------------------------------------------


def nan_in_the_middle() -> list[Any]:
    bad = [(x.clone(), y) for x, y in REFERENCE]
    bad[2][0][0] = math.nan
    return bad


ENDINGS: dict[str, tuple[Callable[[], dict[str, Any]], type[BaseException] | None]] = {
    "success": (lambda: {"loader": TEST, "reference": REFERENCE}, None),
    "error in the loader": (
        lambda: {"loader": toys.failing(TEST, ValueError("x"), 1), "reference": REFERENCE},
        ValueError,
    ),
    "interruption of the fit": (
        lambda: {"loader": TEST, "reference": toys.failing(REFERENCE, KeyboardInterrupt())},
        KeyboardInterrupt,
    ),
    "bad batch": (lambda: {"loader": [*TEST, 3], "reference": REFERENCE}, InputError),
    "bad reference": (lambda: {"loader": TEST, "reference": nan_in_the_middle()}, InputError),
    "error in the model": (
        lambda: {"loader": [*TEST, X[:, :2]], "reference": REFERENCE},
        RuntimeError,
    ),
    "empty": (lambda: {"loader": [], "reference": REFERENCE}, InputError),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("grad", [True, False])
def test_the_model_is_untouched_however_it_ends(ending: str, precision: Any, grad: bool) -> None:
    model = toys.used_model()
    arguments, failure = ENDINGS[ending]
    with torch.set_grad_enabled(grad):
        before = toys.Condition(model)
        if failure is None:
            score(model, detector=ALL, precision=precision, **arguments())
        else:
            with pytest.raises(failure) as error:  # whose traceback keeps all frames alive
                score(model, detector=ALL, precision=precision, **arguments())
        before.assert_same(model)
        assert failure is None or error.traceback
    model(toys.samples(4)).sum().backward()


def test_a_shuffling_loader_does_not_move_the_random_state() -> None:
    model = toys.used_model()
    before = toys.Condition(model)
    fit(model, DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True), KNN(3))
    before.assert_same(model)


def test_what_the_loader_yields_is_untouched() -> None:
    loader, reference = copy.deepcopy(TEST), copy.deepcopy(REFERENCE)
    score(toys.Net(), loader, ALL, reference=reference)
    for kept, original in ((loader, TEST), (reference, REFERENCE)):
        for (x, y), (a, b) in zip(kept, original, strict=True):
            assert torch.equal(x, a)
            assert torch.equal(y, b)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("mine")])
def test_after_a_failed_fit_the_earlier_one_is_still_there(failure: BaseException) -> None:
    model = toys.used_model()
    several = list(fit(model, REFERENCE, NEEDS_REFERENCE).values())
    first = score(model, TEST, several)
    before = toys.Condition(model)
    with pytest.raises(type(failure)):
        fit(model, toys.failing(toys.batches(60, seed=9), failure), several)
    before.assert_same(model)
    again = score(model, TEST, several)
    for name, scores in first.items():
        assert torch.equal(plain(again[name]), plain(scores))


def test_if_one_detector_cannot_be_fitted_none_is() -> None:
    model = toys.Net()
    mine, bad = Detector(Mahalanobis()), Detector(KNN(61))
    with pytest.raises(InputError, match="k=61 neighbours"):
        fit(model, REFERENCE, [mine, bad])
    assert not mine.is_fitted
    with pytest.raises(InputError, match="k=61 neighbours"):
        score(model, TEST, [mine, bad], reference=REFERENCE)
    assert not mine.is_fitted


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-4), (torch.float16, 0.02), (torch.bfloat16, 0.1)],
)
def test_models_in_other_precisions(
    dtype: torch.dtype, tolerance: float, expected: ScoreTable
) -> None:
    """Close to float32 in the scale of each score's own spread over the samples."""
    model = toys.Net().to(dtype)
    loader, reference = ([(x.to(dtype), y) for x, y in batches] for batches in (TEST, REFERENCE))
    names = [name for name in ALL if name != "confounding"]  # whose gradients are rounded too
    table = score(model, loader, names, reference=reference)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_close_in_spread(table, {name: expected[name] for name in names}, tolerance)


def test_bf16_is_close_to_fp32(expected: ScoreTable) -> None:
    model = toys.Net()
    table = score(model, TEST, ALL, reference=REFERENCE, precision="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_close_in_spread(table, expected, 0.1)
    assert not torch.equal(plain(table["energy"]), plain(expected["energy"]))


def test_bf16_is_remembered_with_the_fit(tmp_path: Path) -> None:
    model = toys.Net()
    fitted = fit(model, REFERENCE, "knn", precision="bf16")
    scores = fitted.score(TEST)
    assert fitted.card["precision"] == "bf16"
    fitted.save(tmp_path / "knn")
    again = load(tmp_path / "knn", model).score(TEST)
    assert torch.equal(plain(again), plain(scores))
    assert torch.equal(plain(score(model, TEST, fitted)), plain(scores))
    with pytest.raises(PersistenceError, match="fitted or calibrated with precision='bf16'"):
        load(tmp_path / "knn", model, precision="fp32")
    with pytest.raises(InputError, match="not 'fp32'"):
        score(model, TEST, fitted, precision="fp32")
    exact = fit(model, REFERENCE, "knn")
    assert not torch.equal(plain(exact.score(TEST)), plain(scores))
    with pytest.raises(InputError, match="different precisions"):
        score(model, TEST, [exact, fitted])


def assert_close_in_spread(table: ScoreTable, expected: ScoreTable, tolerance: float) -> None:
    for name, scores in table.items():
        assert scores.dtype == torch.float32
        if name in ("gradpca", "grood") and tolerance > 0.05:
            continue  # these jump where rounding changes which logit is the largest
        error = (plain(scores) - plain(expected[name])).abs().max()
        assert error <= tolerance * plain(expected[name]).std(), name


def test_energy_in_float64_is_rounded_once() -> None:
    model = toys.Net().double()
    x = X.double()
    scores = score(model, [x], Energy())
    assert torch.equal(plain(scores), -toys.truth(model, x)[0].logsumexp(1).float())
