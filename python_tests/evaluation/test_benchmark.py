"""evaluate(), its report and its picture, on a model small enough to know the answer."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import grood_fast as gf
from grood_fast.classifier import Classifier
from grood_fast.errors import FitWarning, InputError, LoaderWarning, NotFittedError, ScoreWarning
from grood_fast.evaluation.benchmark import evaluate, measure_costs
from grood_fast.evaluation.plots import plot_report

CLASSES, FEATURES = 5, 8


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, FEATURES), nn.ReLU(), nn.Linear(FEATURES, CLASSES))


def loader(count, shift=0.0, seed=0, labels=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator) + shift
    y = torch.randint(0, CLASSES, (count,), generator=generator)
    return DataLoader(TensorDataset(x, y) if labels else TensorDataset(x), 16)


def report_of(model, **options):
    return evaluate(
        model,
        ["energy", "mahalanobis", gf.KNN(k=3)],
        id=loader(50),
        ood={"near": {"a": loader(30, 0.5, 1)}, "far": {"b": loader(20, 3, 2), "c": loader(25, 4)}},
        reference=loader(80, seed=3),
        progress=False,
        **options,
    )


def test_the_numbers_are_those_of_the_scores(model):
    report = report_of(model)
    assert report.detectors == ["energy", "mahalanobis", "knn"]
    assert report.datasets == [("near", "a"), ("far", "b"), ("far", "c")]
    assert report.id_samples == 50
    data = loader(50).dataset.tensors
    assert report.accuracy == pytest.approx(
        float((model(data[0]).argmax(1) == data[1]).float().mean())
    )
    for name in report.detectors:
        inside, outside = report.id_scores[name].numpy(), report.ood_scores["b"][name].numpy()
        truth = np.repeat([0, 1], [len(inside), len(outside)])
        expected = roc_auc_score(truth, np.concatenate([inside, outside]))
        result = report.result(name, "b")
        assert result.metrics.auroc == pytest.approx(expected, abs=1e-12)
        assert result.samples == len(outside) == 20
    direct = gf.score(model, loader(20, 3, 2), progress=False)
    assert torch.equal(torch.as_tensor(report.ood_scores["b"]["energy"]), torch.as_tensor(direct))


def test_means_are_over_the_sets_of_a_group(model):
    report = report_of(model)
    values = {name: report.result("knn", name).metrics.auroc for name in "abc"}
    assert report.mean("knn", "auroc", "far") == pytest.approx((values["b"] + values["c"]) / 2)
    assert report.mean("knn") == pytest.approx(sum(values.values()) / 3)
    with pytest.raises(InputError, match="nearby"):
        report.mean("knn", group="nearby")
    with pytest.raises(InputError, match="'nothing' on 'a'"):
        report.result("nothing", "a")


def test_records_markdown_and_json_hold_every_result(model, tmp_path):
    report = report_of(model)
    records = report.records()
    assert len(records) == 9
    first = records[0]
    assert first["auroc_low"] <= first["auroc"] <= first["auroc_high"]
    assert first["cost_ratio"] > 1
    lines = report.to_markdown().splitlines()
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header == ["detector", "a", "b", "c", "far mean", "near FPR95", "far FPR95", "cost"]
    assert len(lines) == 2 + 3
    assert all(line.count("|") == len(header) + 1 for line in lines)
    assert f"{100 * report.mean('energy', 'auroc', 'far'):.1f}" in lines[2]
    report.save(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["results"] == json.loads(json.dumps(records))
    assert stored["environment"]["simd_level"] in stored["environment"]["simd_levels_supported"]


def test_flat_sets_need_no_group(model):
    report = evaluate(
        model, ["msp"], id=loader(20), ood={"b": loader(20, 3), "c": loader(9, 1)}, progress=False
    )
    assert report.datasets == [("", "b"), ("", "c")]
    assert report.table()[0] == ["detector", "b", "c", "mean", "FPR95", "cost"]


def test_one_shot_loaders_and_sets_without_labels(model):
    report = evaluate(
        model,
        ["energy"],
        id=iter(loader(20, labels=False)),
        ood={"b": iter(loader(20, 3))},
        progress=False,
    )
    assert report.accuracy is None
    assert (report.id_samples, report.results[0].samples) == (20, 20)


def test_a_sample_without_a_score_counts_as_ood(model):
    with_nan = torch.randn(10, 6)
    with_nan[:5] = math.nan
    with pytest.warns(ScoreWarning, match="5 of 10"):
        report = evaluate(
            model, ["energy"], id=loader(20), ood={"broken": [with_nan]}, progress=False
        )
    inside = report.id_scores["energy"].numpy()
    outside = report.ood_scores["broken"]["energy"].numpy().copy()
    assert np.isnan(outside[:5]).all()
    outside[:5] = inside.max() + 1
    truth = np.repeat([0, 1], [20, 10])
    expected = roc_auc_score(truth, np.concatenate([inside, outside]))
    assert report.results[0].metrics.auroc == pytest.approx(expected)


def test_what_cannot_be_evaluated(model):
    sets = {"b": loader(5)}
    with pytest.raises(NotFittedError, match="knn"):
        evaluate(model, ["knn"], id=loader(5), ood=sets, progress=False)
    with pytest.raises(InputError, match="at least one"):
        evaluate(model, [], id=loader(5), ood=sets)
    for nothing in ({}, loader(5), [loader(5)]):
        with pytest.raises(InputError, match="ood maps names to loaders"):
            evaluate(model, ["msp"], id=loader(5), ood=nothing)
    for no_loader in (loader(5).dataset, torch.zeros(3, 6)):
        with pytest.raises(InputError, match="Expected a loader"):
            evaluate(model, "msp", id=no_loader, ood=sets, progress=False)
    with pytest.raises(InputError, match="different names"):
        evaluate(model, ["msp"], id=loader(5), ood={"x": sets, "y": sets})
    shuffled = DataLoader(loader(20).dataset, 4, shuffle=True)
    with pytest.warns(LoaderWarning, match="shuffle"):
        evaluate(model, ["msp"], id=loader(5), ood={"b": shuffled}, progress=False)


def test_costs_are_measured_for_each_detector_and_leave_the_model_alone(model, monkeypatch):
    monkeypatch.setattr("grood_fast.evaluation.benchmark.MEASURED_SECONDS", 0.01)
    classifier = Classifier(model.train())
    named = {name: gf.detector(name) for name in ("energy", "gradnorm")}
    from grood_fast.batches import parse_batch

    costs = measure_costs(classifier, named, parse_batch(next(iter(loader(16)))))
    assert costs.batch_size == 16
    assert costs.forward_seconds > 0
    assert costs.detector_seconds.keys() == named.keys()
    expected = 1 + costs.detector_seconds["energy"] / costs.forward_seconds
    assert costs.ratio("energy") == pytest.approx(expected)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_picture_of_some_detectors(model, tmp_path):
    report = report_of(model)
    for suffix in ("png", "svg"):
        path = tmp_path / f"picture.{suffix}"
        plot_report(report, path, ["energy", "knn"])
        assert path.stat().st_size > 5000
    drawn = (tmp_path / "picture.svg").read_text()
    assert "<svg" in drawn
    with pytest.raises(InputError, match="no detectors"):
        plot_report(report, tmp_path / "x.png", ["vim"])
    assert not (tmp_path / "x.png").exists()


def test_twins_are_reported_beside_gradient_detectors(model):
    options = {"id": loader(50), "ood": {"a": loader(30, 0.5, 1)}, "progress": False}
    some = ["energy", "gradnorm", gf.LowDimensionalGradient(4, score=gf.KNN(k=3))]
    report = evaluate(model, some, reference=loader(80, seed=3), **options)
    assert report.detectors == ["energy", "gradnorm", "gradnorm-twin", "ldg", "ldg-twin"]
    same = evaluate(model, gf.Detector(gf.KNN(k=3)), reference=loader(80, seed=3), **options)
    assert report.result("ldg-twin", "a").metrics == same.result("knn", "a").metrics
    without = evaluate(model, some, reference=loader(80, seed=3), twins=False, **options)
    assert without.detectors == ["energy", "gradnorm", "ldg"]
    fitted = gf.fit(model, loader(80, seed=3), some[2])
    with pytest.warns(FitWarning, match="ldg-twin needs a fit and is left out"):
        assert evaluate(model, ["gradnorm", fitted], **options).detectors == [
            "gradnorm", "gradnorm-twin", "ldg",
        ]  # fmt: skip
