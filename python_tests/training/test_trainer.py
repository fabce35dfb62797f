"""The loop: its bits after a kill, what it says when something goes wrong, what it leaves."""

from __future__ import annotations

import csv
import errno
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import CLASSES, Net, batches, samples
from training import interrupted

import grood_fast as gf
from grood_fast import persistence
from grood_fast.errors import InputError, PersistenceError, TrainingError, TrainingWarning
from grood_fast.evaluation.metrics import auroc
from grood_fast.training import RECIPES, Margins, TrainingRecipe, load_weights, train
from grood_fast.training.recipes import recipe_for


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(folder: Path, name: str = "last.safetensors") -> dict[str, Tensor]:
    return load_file(folder / name)


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


class TestResume:
    def test_killed_again_and_again_it_comes_to_the_same_bits(self, tmp_path: Path) -> None:
        model, result = interrupted.run(tmp_path / "unbroken")
        assert result.steps == interrupted.STEPS
        killed = tmp_path / "killed"
        # In the first epoch before any checkpoint, later, in the middle of a file, and at the end.
        for arguments in (["--batch", "3"], ["--batch", "9"], ["--write", "2"], ["--batch", "8"]):
            done = self.run(killed, *arguments)
            assert done.returncode == -signal.SIGKILL, done.stderr
        done = self.run(killed)
        assert done.returncode == 0, done.stderr
        assert_same_bits(weights(killed), weights(tmp_path / "unbroken"))
        assert_same_bits(
            weights(killed, "best.safetensors"), weights(tmp_path / "unbroken", "best.safetensors")
        )
        headers = [
            persistence.read(folder / "last.safetensors", kind="training", version=1)[0]
            for folder in (killed, tmp_path / "unbroken")
        ]
        for header in headers:  # everything but how long a step took
            del header["progress"]["last"]["seconds"]
        assert headers[0] == headers[1]
        logs = [self.log(folder) for folder in (killed, tmp_path / "unbroken")]
        assert logs[0] == logs[1]
        assert [int(row["step"]) for row in logs[0]] == list(range(1, interrupted.STEPS + 1))
        names = {path.name for path in killed.iterdir()}
        assert names == {"last.safetensors", "best.safetensors", "log.csv", "validation.csv"}
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, weights(killed, "best.safetensors")[name])

    def run(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, interrupted.__file__, str(folder), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(gf.__file__).parent.parent)},
        )

    def log(self, folder: Path) -> list[dict[str, str]]:
        with (folder / "log.csv").open(newline="") as file:
            return [
                {k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)
            ]

    @pytest.mark.parametrize("changes", [{"optimizer": "adam"}, {"sampling": "random"}])
    def test_stopped_at_every_checkpoint(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        model, _ = interrupted.run(None, **changes)

        class Stop(Exception):
            pass

        def stopping(after: int) -> Callable[[], None]:
            reads = iter(range(after))

            def read() -> None:
                if next(reads, None) is None:
                    raise Stop

            return read

        for reads in (20, 30, 60):  # samples: 8 a step, and those read again to find the place
            made = interrupted.trainer(tmp_path, stopping(reads), **changes)[1]
            with pytest.raises(Stop):
                made.fit(resume=True)
        assert made._progress.step > 6
        resumed, _ = interrupted.run(tmp_path, **changes)
        assert_same_bits(resumed.state_dict(), model.state_dict())

    def test_a_finished_training_is_only_read(self, tmp_path: Path) -> None:
        model, result = interrupted.run(tmp_path)
        before = (tmp_path / "last.safetensors").stat().st_mtime_ns
        again, same = interrupted.run(tmp_path)
        assert_same_bits(again.state_dict(), model.state_dict())
        assert (same.best, same.steps) == (result.best, result.steps)
        assert (tmp_path / "last.safetensors").stat().st_mtime_ns == before

    def test_another_recipe_is_refused(self, tmp_path: Path) -> None:
        interrupted.run(tmp_path)
        with pytest.raises(PersistenceError, match=r"learning_rate was 0.05, now 0.1"):
            interrupted.run(tmp_path, learning_rate=0.1)
        with pytest.raises(InputError, match="already holds a training"):
            interrupted.trainer(tmp_path)[1].fit()


class TestFailures:
    def test_a_full_disk_leaves_the_last_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = interrupted.trainer(tmp_path)[1]
        save, writes = persistence.save_file, 0

        def full(tensors: Any, path: Any, metadata: Any) -> None:
            nonlocal writes
            writes += 1
            if writes == 5:
                Path(path).write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            save(tensors, path, metadata=metadata)

        with monkeypatch.context() as patch:
            patch.setattr(persistence, "save_file", full)
            with pytest.raises(PersistenceError, match="No space left"):
                made.fit()
        self.assert_goes_on(tmp_path)

    def test_ctrl_c_leaves_the_last_checkpoint(self, tmp_path: Path) -> None:
        left = 4 * 15

        def read() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        model, made = interrupted.trainer(tmp_path, read)
        model.eval()
        with pytest.raises(KeyboardInterrupt):
            made.fit()
        assert not any(module.training for module in model.modules())
        self.assert_goes_on(tmp_path)

    def assert_goes_on(self, folder: Path) -> None:
        assert not list(folder.glob(".partial-*"))
        resumed, _ = interrupted.run(folder)
        unbroken, _ = interrupted.run(None)
        assert_same_bits(resumed.state_dict(), unbroken.state_dict())

    @pytest.mark.parametrize("term", ["cross_entropy", "outliers", "gradient"])
    def test_a_loss_that_is_not_finite_is_named(self, tmp_path: Path, term: str) -> None:
        inliers, outliers = batches(48), [samples(16, 1), samples(16, 2), samples(16, 3)]
        changes: dict[str, Any] = {}
        if term == "cross_entropy":
            inliers[1] = (inliers[1][0] * torch.nan, inliers[1][1])
        elif term == "outliers":
            outliers[1] = outliers[1] * torch.inf
            changes = {"recipe": "oe"}
        else:
            changes = {"margins": {"inside": 0.0, "outside": 0.0}, "steps": 2}
        model = Net()
        if term == "gradient":
            model = Steep()
        with pytest.raises(TrainingError) as caught:
            train(
                model, inliers, outliers, folder=tmp_path, progress=False, outlier_ratio=1.0,
                checkpoint_every=1, **changes,
            )  # fmt: skip
        message = str(caught.value)
        assert f"{term} = " in message
        step = 1 if term == "gradient" else 2
        assert f"at step {step} (epoch 1, batch {step} of the ID loader)" in message
        assert all(p.isfinite().all() for p in model.parameters())

    def test_margins_that_nobody_keeps(self) -> None:
        arguments = (Net(), batches(48), [samples(48, 1)])
        with pytest.warns(TrainingWarning) as caught:
            train(
                *arguments, steps=7, patience=5, progress=False,
                margins={"inside": -99.0, "outside": 99.0},
            )  # fmt: skip
        texts = [str(warning.message) for warning in caught]
        assert len(texts) == 2
        assert "5 steps" in texts[0]
        assert "any ID sample: none has an energy at most inside = -99" in texts[0]
        assert "any outlier: none has an energy at least outside = 99" in texts[1]
        assert 'margins="auto"' in texts[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(*arguments, steps=7, patience=5, progress=False, margins="auto")

    def test_what_cannot_be_trained(self, tmp_path: Path) -> None:
        model, inliers, outliers = Net(), batches(16), [samples(16, 1)]
        for message, arguments, options in (
            ("needs an outlier_loader", (model, inliers), {}),
            ("unknown recipe 'best'; known: ce, energy", (model, inliers, outliers, "best"), {}),
            ("has no lr; known: accumulate", (model, inliers, outliers), {"lr": 1}),
            ("no length", (model, iter(inliers), outliers), {}),
            ("needs a folder", (model, inliers, outliers), {"tensorboard": True}),
            ("needs id_validation", (model, inliers, outliers), {"ood_validation": {"a": []}}),
            (
                "with class labels",
                (model, inliers, outliers),
                {"id_validation": [samples(4)], "steps": 1},
            ),
            ("positive", (model, inliers, outliers), {"learning_rate": -1}),
            ("between 0 and 1", (model, inliers, outliers), {"average": 2}),
            ("shares of", (model, inliers, outliers), {"milestones": [2]}),
            ("makes no sense", (model, inliers, outliers), {"margins": {"out": 2}}),
            ('or "auto"', (model, inliers, outliers), {"margins": "wide"}),
            ("schedule must be one of", (model, inliers, outliers), {"schedule": "x"}),
        ):
            with pytest.raises(InputError, match=message):
                train(*arguments, progress=False, **options)
        frozen = Net().requires_grad_(False)
        with pytest.raises(InputError, match="no parameter"):
            train(frozen, inliers, outliers)


class Steep(Net):
    """The value is finite and its derivative is not."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x + 0 * (x - x.detach()).abs().sqrt())


class TestRecipes:
    def test_the_plain_loop_of_energy_fine_tuning(self) -> None:
        """SGD with Nesterov on a cosine, from the paper, in ten lines."""
        inliers, outliers = batches(32), samples(64, 1)
        plain, own = Net(seed=5).eval(), Net(seed=5)
        for model in (plain, own):
            model.backbone[3].p = 0.0
        own.eval()
        optimizer = torch.optim.SGD(
            plain.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        plain.train()
        for step in range(4):
            x, y = inliers[step % 2]
            aux = (
                outliers[32 * step : 32 * step + 32]
                if step < 2
                else outliers[32 * (step - 2) :][:32]
            )
            logits = plain(torch.cat([x, aux]))
            energy = -torch.logsumexp(logits, dim=1)
            loss = F.cross_entropy(logits[:16], y) + 0.1 * (
                F.relu(energy[:16] + 2).square().mean() + F.relu(-1 - energy[16:]).square().mean()
            )
            cosine = (1 + np.cos(np.pi * step / 4)) / 2
            optimizer.param_groups[0]["lr"] = 1e-6 + (0.01 - 1e-6) * cosine
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        train(
            own, inliers, [outliers], "energy", learning_rate=0.01, epochs=2, progress=False,
            margins=Margins(-2.0, -1.0),
        )  # fmt: skip
        for one, other in zip(own.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert not any(module.training for module in own.modules())
        assert all(p.grad is None for p in own.parameters())

    @pytest.mark.parametrize("name", RECIPES)
    def test_every_recipe_runs_and_survives_json(self, name: str) -> None:
        recipe = RECIPES[name]
        assert TrainingRecipe.of(recipe.config()) == recipe
        model = Net()
        result = train(model, batches(32), [samples(64, 1)], recipe=name, steps=2, progress=False)
        assert result.steps == 2
        assert np.isfinite(result.last["loss"])
        assert ("gradient" in result.last) == name.startswith("greg")

    @pytest.mark.parametrize("method", ["energy", "oe"])
    @pytest.mark.parametrize("form", ["input", "finite_difference", "features"])
    def test_the_regulariser_plugs_into_the_baselines(self, method: str, form: str) -> None:
        plain = recipe_for(method)
        assert plain.regularizer is None
        result = train(
            Net(), batches(32), [samples(64, 1)], method, steps=2, progress=False, margins="auto",
            regularizer={"form": form, "weight": 2.0},
        )  # fmt: skip
        assert result.last["gradient"] > 0

    def test_learning_rates(self) -> None:
        step = TrainingRecipe(schedule="step", milestones=(0.5, 0.8), learning_rate=1.0)
        assert [step.learning_rate_at(p) for p in (0, 0.49, 0.5, 0.9)] == pytest.approx(
            [1, 1, 0.1, 0.01]
        )
        cosine = TrainingRecipe(learning_rate=1.0, minimum_learning_rate=0.0)
        assert [cosine.learning_rate_at(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
        assert TrainingRecipe(schedule="constant").learning_rate_at(0.7) == 1e-3

    def test_bf16_and_clipping(self) -> None:
        result = train(
            Net(), batches(32), [samples(64, 1)], "greg+", steps=2, progress=False, clip=0.1,
            precision="bf16", sampling_precision="bf16", margins="auto",
        )  # fmt: skip
        assert np.isfinite(result.last["loss"])

    def test_auto_margins_are_the_medians_of_the_start(self) -> None:
        model = Net().eval()
        inliers, outliers = batches(128), samples(512, 1)
        with torch.no_grad():
            inside = -torch.logsumexp(model(torch.cat([x for x, _ in inliers])), dim=1)
            outside = -torch.logsumexp(model(outliers), dim=1)
        result = train(model, inliers, outliers.split(64), steps=1, progress=False, margins="auto")
        expected = sorted([inside.quantile(0.5).item(), outside.quantile(0.5).item()])
        if inside.quantile(0.5) > outside.quantile(0.5):
            expected = [sum(expected) / 2] * 2
        assert [result.margins.inside, result.margins.outside] == pytest.approx(expected, abs=1e-5)


class TestResults:
    def test_global_generators_and_same_seeds(self) -> None:
        state = torch.get_rng_state()
        first, _ = interrupted.run(None)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(7)
        second, _ = interrupted.run(None)
        assert_same_bits(first.state_dict(), second.state_dict())
        other, _ = interrupted.run(None, seed=1)
        assert not torch.equal(other[0].weight, first[0].weight)

    def test_the_best_weights_come_back(self, tmp_path: Path) -> None:
        for folder in (tmp_path, None):
            model, result = interrupted.run(folder)
            assert [values["step"] for values in result.validations] == [0, 4, 8, 11]
            least = result.validations[0]["accuracy"] - 0.01
            allowed = [v for v in result.validations if v["accuracy"] >= least]
            assert result.best == max(allowed, key=lambda v: v["auroc"])
            measured = self.measured(model)
            assert measured == pytest.approx((result.best["accuracy"], result.best["auroc"]))
        fresh = interrupted.network()
        header = load_weights(tmp_path, fresh)
        assert header["step"] == result.best["step"]
        assert_same_bits(fresh.state_dict(), model.state_dict())
        with pytest.raises(PersistenceError, match="another architecture"):
            load_weights(tmp_path, nn.Linear(2, 2))

    def measured(self, model: nn.Module) -> tuple[float, float]:
        inside, outside = interrupted.validation()
        scores = [gf.score(model, loader, progress=False) for loader in (inside, outside)]
        right = scores[0].predictions == scores[0].labels
        return right.double().mean().item(), auroc(*scores)

    def test_without_validation_the_last_weights_are_left(self, tmp_path: Path) -> None:
        model = Net()
        result = train(
            model, batches(32), [samples(64, 1)], steps=3, progress=False, folder=tmp_path,
            margins="auto",
        )  # fmt: skip
        assert (result.best, result.validations) == (None, [])
        fresh = Net(seed=8)
        assert load_weights(tmp_path, fresh) == {"step": 3}
        assert_same_bits(fresh.state_dict(), model.state_dict())

    def test_cross_entropy_needs_no_outliers_and_accuracy_decides(self) -> None:
        model = Net()
        result = train(
            model, batches(96), method="ce", epochs=3, learning_rate=0.1, progress=False,
            id_validation=batches(48),
        )  # fmt: skip
        assert result.best == max(result.validations, key=lambda v: v["accuracy"])
        assert CLASSES == 3

    def test_tensorboard(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written: list[tuple[str, float, int]] = []

        class Writer:
            def __init__(self, folder: str) -> None:
                assert folder == str(tmp_path)

            def add_scalar(self, name: str, value: float, step: int) -> None:
                written.append((name, value, step))

            def flush(self) -> None:
                pass

        monkeypatch.setitem(
            sys.modules, "torch.utils.tensorboard", type(sys)("torch.utils.tensorboard")
        )
        sys.modules["torch.utils.tensorboard"].SummaryWriter = Writer
        train(
            Net(), batches(32), [samples(64, 1)], steps=2, progress=False, folder=tmp_path,
            tensorboard=True,
        )  # fmt: skip
        assert ("train/loss", 2) in [(name, step) for name, _, step in written]
