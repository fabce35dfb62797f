"""The command line: through its runner, and once as the process a user starts."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

from grood_fast import cli
from grood_fast.detectors import DETECTORS, by_unique_name, with_twins
from grood_fast.evaluation import datasets

runner = CliRunner()

MODEL = """
import torch
from torch import nn

def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.ReLU(), nn.Linear(16, 2)).eval()

def nothing():
    return "text"

def sibling():
    import own_sibling
    return classifier()
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A module with a model, and folders of images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    (tmp_path / "own_model.py").write_text(MODEL)
    (tmp_path / "own_sibling.py").write_text("")
    (tmp_path / "mixed").mkdir()
    for side in (5, 6):
        Image.new("RGB", (side, side)).save(tmp_path / "mixed" / f"{side}.png")
    random = np.random.RandomState(0)
    for folder, count, top in (
        ("id/cat", 6, 100),
        ("id/dog", 6, 100),
        ("train/cat", 40, 100),
        ("train/dog", 40, 100),
        ("noise", 8, 256),
        ("flat", 5, 50),
    ):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(count):
            pixels = random.randint(0, top, (9, 12, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    return tmp_path


EVALUATE = ["own_model:classifier", "--id", "id", "--ood", "noise"]
PREPARED = ["--resize", "8", "--crop", "8", "--mean", "0.5", "--std", "0.25,0.25,0.25"]


def run(*arguments):
    return runner.invoke(cli.app, [*arguments])


def test_env_says_what_was_compiled():
    result = run("env", "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 0
    assert facts["cuda_architectures"] == []
    assert facts["packages"]["torch"] == torch.__version__
    assert "baseline" in facts["simd_levels_compiled"]
    table = run("env")
    assert table.exit_code == 0
    assert facts["simd_level"] in table.stdout


def test_evaluate_own_model_and_folders(workplace):
    result = run(
        "evaluate", "own_model:classifier", "--id", "id", "--ood", "noise", "--ood", "dark=flat",
        *PREPARED, "--json", "--save", "report.json", "--plot", "picture.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    names = [
        "msp", "maxlogit", "energy", "gen", "gradnorm", "gradnorm-twin", "exgrad", "exgrad-twin",
        "gsc", "gsc-twin",
    ]  # fmt: skip
    assert [(r["detector"], r["dataset"]) for r in report["results"]] == [
        (name, dataset) for dataset in ("noise", "dark") for name in names
    ]
    assert report["id_samples"] == 12
    assert 0 <= report["accuracy"] <= 1
    assert json.loads((workplace / "report.json").read_text()) == report
    assert (workplace / "picture.png").stat().st_size > 5000


def test_detectors_with_options_and_a_model_that_imports_its_neighbour(workplace):
    result = run(
        "evaluate", "own_model:sibling", "--id", "id", "--ood", "noise", *PREPARED, "--json",
        "--reference", "train", "--detector", "knn:k=3,metric=euclidean", "--detector", "energy",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {r["detector"] for r in json.loads(result.stdout)["results"]} == {"knn", "energy"}


def test_evaluate_fits_on_a_reference_with_and_without_classes(workplace):
    options = ["--id", "id", "--ood", "noise", *PREPARED, "--detector", "mahalanobis", "--json"]
    labelled = run("evaluate", "own_model:classifier", *options, "--reference", "train")
    assert labelled.exit_code == 0, labelled.output
    with pytest.warns(UserWarning, match="no labels"):
        unlabelled = run("evaluate", "own_model:classifier", *options, "--reference", "train/cat")
    assert unlabelled.exit_code == 0, unlabelled.output
    everything = run(
        "evaluate", "own_model:classifier", "--id", "id", "--ood", "noise", *PREPARED,
        "--reference", "train",
    )  # fmt: skip
    assert everything.exit_code == 0, everything.output
    assert all(name in everything.stdout for name in ("knn", "rmd", "gmm", "vim", "exgrad"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["own_model", "--id", "id", "--ood", "noise"], "module:function"),
        (["own_model:absent", "--id", "id", "--ood", "noise"], "cannot import own_model:absent"),
        (["no_such_module:f", "--id", "id", "--ood", "noise"], "cannot import no_such_module"),
        (["own_model:nothing", "--id", "id", "--ood", "noise"], "expected a torch.nn.Module"),
        (["own_model:classifier", "--id", "absent", "--ood", "noise"], "absent is not a folder"),
        (["own_model:classifier", "--id", "id", "--ood", "noise", "--mean", "x"], "--mean takes"),
        (["own_model:classifier", "--id", "id", "--ood", "noise", "--detector", "magic"], "magic"),
        ([*EVALUATE, "--detector", "knn:k"], "expected option=value"),
        ([*EVALUATE, "--ood", "other/noise"], "different names"),
        ([*EVALUATE, "--device", "no_such_device"], "--device no_such_device"),
        ([*EVALUATE, "--save", "absent/report.json"], "there is no folder absent"),
        ([*EVALUATE, "--plot", "picture.xyz"], "a picture ends in"),
        ([*EVALUATE, "--id", "mixed"], "--resize and --crop"),
        ([".own_model:classifier", "--id", "id", "--ood", "noise"], "cannot import"),
    ],
)
def test_errors_are_one_sentence_and_status_1(workplace, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(cli.messages, "_width", 200)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", *arguments])
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_wrong_usage_is_status_2(capsys):
    for arguments in (["evaluate"], ["no-such-command"], ["env", "--no-such-option"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2


def test_the_command_itself():
    result = subprocess.run(
        [sys.executable, "-m", "grood_fast", "env", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["grood_fast"]


@pytest.mark.data
def test_demo_from_the_cache(tmp_path, monkeypatch):
    from grood_fast.evaluation import networks

    tiny = networks.TrainedNetwork(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 8)).eval(),
        networks.Recipe((0, 1)), 0.1, 0.1, 0.0,
    )  # fmt: skip
    monkeypatch.setattr(networks, "trained_network", lambda recipe: tiny)
    monkeypatch.setattr("grood_fast.evaluation.datasets.NOISE_SIZE", 100)
    monkeypatch.chdir(tmp_path)
    result = run("demo", "--held-out", "0,1", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {r["group"] for r in report["results"]} == {"near", "far"}
    expected = with_twins(by_unique_name(DETECTORS))
    assert {r["detector"] for r in report["results"]} == set(expected) > set(DETECTORS)
    assert (tmp_path / "out/demo/scores.png").exists()
    assert json.loads((tmp_path / "out/demo/report.json").read_text()) == report


CONFIG = """
model = "own_model:classifier"
id = "train"
outliers = "noise"
id_validation = "id"
out = "out"
method = "greg+"
batch_size = 8
resize = 8
crop = 8
steps = 3
margins = "auto"
pool_ratio = 4.0
[ood_validation]
flat = "flat"
[regularizer]
form = "finite_difference"
"""


def log_of(folder):
    return (folder / "log.csv").read_text().splitlines()


def test_train_from_a_file_and_resumed(workplace):
    (workplace / "training.toml").write_text(CONFIG)
    result = run("train", "--config", "training.toml", "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    facts = json.loads(result.stdout)
    assert facts["steps"] == 3
    assert facts["best"].keys() == {"step", "accuracy", "auroc", "auroc/flat"}
    assert len(log_of(workplace / "out")) == 4
    assert (workplace / "out" / "best.safetensors").is_file()
    refused = run("train", "--config", "training.toml")
    assert "resume" in str(refused.exception)
    again = run("train", "--config", "training.toml", "--resume")
    assert again.exit_code == 0
    assert "3 steps" in again.stdout


def test_the_command_line_overrides_a_yaml_file(workplace):
    (workplace / "training.yaml").write_text(
        "model: own_model:classifier\nid: train\nresize: 8\ncrop: 8\nbatch_size: 8\n"
        "outliers: noise\nmethod: oe\nout: ignored\nsteps: 9\naugment: false\n"
    )
    result = run(
        "train", "--config", "training.yaml", "--out", "here", "--set", "steps=2",
        "--set", "regularizer.form=features", "--set", "margins=auto",
    )  # fmt: skip
    assert result.exit_code == 0, result.output + repr(result.exception)
    header, *lines = log_of(workplace / "here")
    assert len(lines) == 2
    columns = dict(zip(header.split(","), lines[-1].split(","), strict=True))
    assert columns["gradient"] != ""
    assert not (workplace / "ignored").exists()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("a.toml", "lr = 1", "unknown setting(s) lr; known: accumulate"),
        ("a.toml", "lr = ", "a.toml cannot be parsed"),
        ("a.toml", "id = 'train'", "missing: model, out. Give --model and --out"),
        ("a.yaml", "- 1", "holds no names"),
        ("a.json", "{}", "ends in .toml, .yaml or .yml"),
        ("a.toml", "ood_validation = 'flat'", "ood_validation is a table"),
    ],
)
def test_configurations_that_are_refused(workplace, file, content, said):
    (workplace / file).write_text(content)
    assert said in str(run("train", "--config", file).exception)


def test_train_says_what_is_missing(workplace):
    arguments = ["train", "--model", "own_model:classifier", "--id", "train", "--out", "out"]
    prepared = ["--resize", "8", "--crop", "8", "--batch-size", "8"]
    assert "needs an outlier_loader" in str(run(*arguments, *prepared).exception)
    assert "--set epochs: expected" in str(run(*arguments, "--set", "epochs").exception)
    few = run(*arguments, *prepared[:4], "--outliers", "flat")
    assert "fewer than a batch: 64" in str(few.exception)
    assert "cannot read" in str(run("train", "--config", "missing.toml").exception)


def test_train_without_outliers(workplace):
    result = run(
        "train", "--model", "own_model:classifier", "--id", "train", "--out", "out", "--resize",
        "8", "--crop", "8", "--batch-size", "8", "--method", "ce", "--set", "steps=2",
        "--no-augment",
    )  # fmt: skip
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "2 steps; weights and logs in out" in result.stdout


@pytest.mark.data
def test_demo_train(monkeypatch):
    def few(function):
        def cut(*arguments):
            named = function(*arguments)
            return {name: TensorDataset(*data[:100]) for name, data in named.items()}

        return cut

    for name in ("far_ood", "validation_outliers"):
        monkeypatch.setattr(datasets, name, few(getattr(datasets, name)))
    result = run("demo-train", "--steps", "2", "--json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    facts = json.loads(result.stdout)
    for part in ("before", "after"):
        assert {r["dataset"] for r in facts[part]["results"]} >= {"held-out", "mnist"}
    assert facts["best"]["step"] in (0, 1, 2)
