"""The training loop: from a classifier, ID data and outliers to one that tells OOD apart."""

from __future__ import annotations

import logging
import os
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from tqdm.auto import tqdm

from grood_fast.batches import Batch
from grood_fast.classifier import Classifier
from grood_fast.detectors import detector, score_together
from grood_fast.errors import InputError, PersistenceError, TrainingError, TrainingWarning
from grood_fast.evaluation.metrics import accuracy, auroc
from grood_fast.ops import reference
from grood_fast.progress import progress as shown
from grood_fast.results import ScoreTable
from grood_fast.signals import stream
from grood_fast.training import checkpoints
from grood_fast.training.feeds import Feed
from grood_fast.training.logs import CsvLog, TensorBoardLog
from grood_fast.training.objectives import Margins
from grood_fast.training.randomness import RandomStreams
from grood_fast.training.recipes import TrainingRecipe, recipe_for
from grood_fast.training.sampler import OutlierSampler

logger = logging.getLogger(__name__)

Loader = Iterable[Any]

AUTO_MARGIN_BATCHES = 8
"""Batches of either kind whose energies decide margins="auto"."""

_STREAMS = {"model": 0, "id": 1, "outliers": 2, "sampler": 3, "margins": 4}


@dataclass(frozen=True)
class TrainingResult:
    """What came of a training. The model itself now has the weights that are described here.

    Attributes:
        steps: optimiser steps made, all together.
        margins: that were used.
        validations: one mapping each: "step", "accuracy", "auroc" (the mean over the OOD validation
            sets) and "auroc/NAME"; step 0 is the model as it came. Empty without validation data.
        best: the validation whose weights the model has now; None without validation data.
        last: the last step's numbers; see the columns of ``log.csv``.
    """

    steps: int
    margins: Margins
    validations: list[dict[str, Any]]
    best: dict[str, Any] | None
    last: dict[str, float]


@dataclass
class _Progress:
    """Where a training is, apart from tensors and random states."""

    step: int = 0
    margins: Margins = field(default_factory=Margins)
    validations: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    unmet: dict[str, int] = field(default_factory=lambda: {"met_in": 0, "met_out": 0})
    last: dict[str, float] = field(default_factory=dict)


COLUMNS = [
    "step",
    "epoch",
    "learning_rate",
    "loss",
    "cross_entropy",
    "outliers",
    "gradient",
    "met_in",
    "met_out",
    "energy_in",
    "energy_out",
    "accuracy",
    "seconds",
]
"""Of ``log.csv``: means over the batches of a step, except the medians "energy_in" and
"energy_out"; "met_in" and "met_out" are the shares of samples that keep their margins, which the
gradient term is made of."""


class Trainer:
    """Trains a classifier with auxiliary outliers, and takes the training up where it was left.

    The model is trained in place, in training mode, and comes back in the modes it had, without
    gradients. Everything random follows the recipe's seed and draws from streams of its own: the
    process's generators are left alone. With one process or several
    (``torch.distributed`` initialised, a process a loader shard), gradients are averaged over the
    processes here; a model in ``DistributedDataParallel`` is unwrapped.

    Args:
        model: any classifier that :func:`grood_fast.score` takes.
        id_loader: yields (x, y), in an order that shuffles; read over and over.
        outlier_loader: yields outliers prepared like the ID samples; labels are ignored. Its batch
            size is of no matter: as many are drawn as a step takes. None for cross-entropy alone.
        recipe: see :class:`TrainingRecipe`.
        id_validation: labelled ID samples that are in neither loader, to choose weights with.
        ood_validation: name → loader, of outliers unlike the training's and unlike those that it
            will be tested on.
        folder: where checkpoints and logs go; None keeps everything in memory.
        validate_every: steps between validations; None: an epoch.
        checkpoint_every: steps between checkpoints; None: an epoch.
        head: name of the last linear layer; found if None.
        tensorboard: also write TensorBoard's event files into ``folder``.
        progress: show a bar.

    Raises:
        InputError: something is missing or does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        id_loader: Loader,
        outlier_loader: Loader | None,
        recipe: TrainingRecipe,
        *,
        id_validation: Loader | None = None,
        ood_validation: Mapping[str, Loader] | None = None,
        folder: str | os.PathLike[str] | None = None,
        validate_every: int | None = None,
        checkpoint_every: int | None = None,
        head: str | None = None,
        tensorboard: bool = False,
        progress: bool = True,
    ) -> None:
        self.classifier = Classifier(model, head)
        self._chooser = Classifier(model, head, recipe.sampling_precision)
        self.recipe = recipe
        self.steps_per_epoch = _steps_per_epoch(id_loader, recipe)
        self.steps = recipe.steps or recipe.epochs * self.steps_per_epoch
        if recipe.outliers is not None and outlier_loader is None:
            raise InputError(
                f"the outliers' term {recipe.outliers!r} needs an outlier_loader; without one only "
                'method="ce" can be trained.'
            )
        if ood_validation and id_validation is None:
            raise InputError("OOD validation data needs id_validation data to be told apart from.")
        if tensorboard and folder is None:
            raise InputError("tensorboard=True needs a folder to write into.")
        self._id_validation, self._ood_validation = id_validation, dict(ood_validation or {})
        self._folder = None if folder is None else Path(folder)
        self._validate_every = validate_every or self.steps_per_epoch
        self._checkpoint_every = checkpoint_every or self.steps_per_epoch
        self._tensorboard, self._show = tensorboard, progress
        grouped = dist.is_available() and dist.is_initialized()
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        self._parameters = [p for p in self.classifier.model.parameters() if p.requires_grad]
        if not self._parameters:
            raise InputError("the model has no parameter that requires a gradient.")
        self._optimizer = _optimizer(recipe, self._parameters)
        self._streams = self._seeded("model", self.classifier.device)
        self._inliers = Feed(id_loader, self._seeded("id"))
        self._outliers = (
            None
            if outlier_loader is None or recipe.outliers is None
            else Feed(outlier_loader, self._seeded("outliers"))
        )
        sampler_seed = torch.Generator()
        sampler_seed.set_state(self._seeded("sampler").torch)
        self._sampler = OutlierSampler(
            recipe.sampling, int(torch.randint(2**62, (), generator=sampler_seed))
        )
        self._average: dict[str, Tensor] = {}
        self._progress = _Progress()

    def fit(self, resume: bool = False) -> TrainingResult:
        """Train to the end.

        A checkpoint is complete or not there: after a kill, an interruption or a full disk the last
        one is good, and ``resume`` continues from it to the same bits as without the break.

        Args:
            resume: continue from the folder's checkpoint, if there is one.

        Raises:
            InputError: the folder holds a training and ``resume`` is False; or the data does not
                fit the model.
            TrainingError: the loss is not finite; says at which step, in which batch and term.
            PersistenceError: a checkpoint cannot be read or written, or belongs to another recipe.
        """
        found = self._folder is not None and (self._folder / checkpoints.LAST).is_file()
        if found and not resume:
            raise InputError(
                f"{self._folder} already holds a training: continue it with resume=True, or give "
                "another folder."
            )
        model = self.classifier.model
        with ExitStack() as stack:
            stack.enter_context(_modes_kept(model))
            stack.enter_context(self._streams.entered())
            stack.enter_context(torch.enable_grad())
            stack.callback(self._optimizer.zero_grad, set_to_none=True)
            if found:
                self._read_checkpoint()
            else:
                self._begin()
            log, validation_log, tensorboard = self._logs()
            bar = tqdm(
                total=self.steps,
                initial=self._progress.step,
                desc="training",
                unit="step",
                disable=not self._show or self._rank > 0,
            )
            with bar:
                while self._progress.step < self.steps:
                    started = time.perf_counter()
                    numbers = self._step()
                    step = self._progress.step
                    numbers["seconds"] = time.perf_counter() - started
                    self._progress.last = numbers
                    _write("train", {"step": step, **numbers}, log, tensorboard)
                    bar.update()
                    if step % 10 == 0:
                        bar.set_postfix(loss=f"{numbers['loss']:.3f}", **self._headline())
                    last = step == self.steps
                    if last or step % self._validate_every == 0:
                        self._validate(validation_log, tensorboard)
                    if last or step % self._checkpoint_every == 0:
                        self._write_checkpoint()
            self._finish()
        done = self._progress
        return TrainingResult(done.step, done.margins, done.validations, done.best, done.last)

    # ------------------------------------------------------------------ one step

    def _step(self) -> dict[str, float]:
        """One optimiser step; its numbers, averaged over its batches and the processes."""
        recipe = self.recipe
        objective = recipe.objective(self._progress.margins)
        batches = recipe.accumulate * self._world
        self.classifier.model.train()
        self._optimizer.zero_grad(set_to_none=True)
        pending: list[tuple[int, dict[str, Tensor]]] = []
        for _ in range(recipe.accumulate):
            inliers = self._inliers.next().to(self.classifier.device)
            terms = objective(
                self.classifier,
                inliers,
                self._chosen_outliers(inliers),
                precision=recipe.precision,
                batches=batches,
            )
            loss = terms.total / recipe.accumulate
            loss.backward(inputs=self._parameters)  # type: ignore[no-untyped-call]
            pending.append((self._inliers.position, terms.numbers()))
        # Looked at only now: a GPU has had all of its work by then.
        sums: dict[str, float] = {}
        for batch, numbers in pending:
            for name, value in self._checked(numbers, batch).items():
                sums[name] = sums.get(name, 0.0) + value / recipe.accumulate
        self._average_gradients()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, recipe.clip)
        rate = recipe.learning_rate_at(self._progress.step / self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._progress.step += 1
        self._update_average()
        self._watch(sums)
        epoch = self._progress.step / self.steps_per_epoch
        return {"epoch": epoch, "learning_rate": rate, **sums}

    def _chosen_outliers(self, inliers: Batch) -> Batch | None:
        if self._outliers is None:
            return None
        recipe = self.recipe
        return self._sampler.sample(
            self._chooser,
            self._outliers,
            count=max(1, round(recipe.outlier_ratio * inliers.size)),
            pool=round(recipe.pool_ratio * inliers.size),
            clusters=recipe.clusters or inliers.size,
        )

    def _checked(self, numbers: dict[str, Tensor], batch: int) -> dict[str, float]:
        """As Python numbers, averaged over the processes, all finite."""
        together = torch.stack(list(numbers.values()))
        if self._world > 1:
            dist.all_reduce(together)
            together /= self._world
        values = dict(zip(numbers, together.tolist(), strict=True))
        parts = ("cross_entropy", "outliers", "gradient")
        wrong = [n for n in parts if n in values and not torch.isfinite(torch.tensor(values[n]))]
        if wrong:
            where = f"epoch {self._inliers.epoch + 1}, batch {batch}"
            kept = (
                "" if self._folder is None else f" The last checkpoint in {self._folder} is good."
            )
            raise TrainingError(
                f"the loss is not finite at step {self._progress.step + 1} ({where} of the ID "
                f"loader): {', '.join(f'{name} = {values[name]}' for name in wrong)}.{kept} Look "
                "for infinities in this batch; else train with a lower learning_rate, or clip=1.0."
            )
        return values

    def _average_gradients(self) -> None:
        if self._world == 1:
            return
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for together in _by_dtype([p.grad for p in self._parameters if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in together])
            dist.all_reduce(flat)
            flat /= self._world
            parts = torch.split(flat, [gradient.numel() for gradient in together])
            for gradient, part in zip(together, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def _update_average(self) -> None:
        decay = self.recipe.average
        if decay is None:
            return
        with torch.no_grad():
            for name, tensor in self.classifier.model.state_dict().items():
                if name not in self._average or not tensor.is_floating_point():
                    self._average[name] = tensor.clone()
                else:
                    self._average[name].lerp_(tensor, 1 - decay)

    def _watch(self, numbers: dict[str, float]) -> None:
        """Warn when the regulariser has seen no sample of one kind for long."""
        if self.recipe.regularizer is None:
            return
        margins = self._progress.margins
        for name, kind, sense, margin, median in (
            ("met_in", "ID sample", "at most inside", margins.inside, numbers["energy_in"]),
            ("met_out", "outlier", "at least outside", margins.outside, numbers["energy_out"]),
        ):
            count = 0 if numbers[name] > 0 else self._progress.unmet[name] + 1
            self._progress.unmet[name] = count
            if count == self.recipe.patience:
                warnings.warn(
                    f"for {count} steps the gradient term has been without any {kind}: none has an "
                    f"energy {sense} = {margin:g}; their median is {median:.3g}. Move the margins "
                    f'towards it, or let margins="auto" choose them.',
                    TrainingWarning,
                    stacklevel=4,
                )

    # ------------------------------------------------------------------ begin, validate, finish

    def _begin(self) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        if self._world > 1:
            with torch.no_grad():
                for tensor in self.classifier.model.state_dict().values():
                    dist.broadcast(tensor, 0)
        margins = self.recipe.margins
        self._progress.margins = margins if isinstance(margins, Margins) else self._auto_margins()
        self._validate(None, None)

    def _auto_margins(self) -> Margins:
        """Median energies of the ID samples and of the outliers, in evaluation mode; where the
        outliers' is the lower one, the middle of the two for both."""
        if self._outliers is None:
            return Margins()
        medians = []
        for feed in (self._inliers, self._outliers):
            # A reading of its own, so that the training starts with the loader's first epoch.
            reading = Feed(feed.loader, self._seeded("margins"))
            batches = [reading.next() for _ in range(AUTO_MARGIN_BATCHES)]
            energies = [
                reference.energy(signals.logits.float())
                for signals in stream(self.classifier, batches, frozenset())
            ]
            everywhere = [torch.cat(energies).tolist()] * self._world
            if self._world > 1:
                dist.all_gather_object(everywhere, everywhere[0])
            medians.append(statistics.median(value for part in everywhere for value in part))
        inside, outside = medians
        if inside > outside:
            inside = outside = (inside + outside) / 2
        logger.info("margins: inside=%.4g, outside=%.4g", inside, outside)
        return Margins(inside, outside)

    def _validate(self, log: CsvLog | None, tensorboard: TensorBoardLog | None) -> None:
        """Measure, and keep the weights if they are the best so far."""
        self._share_buffers()
        if self._id_validation is None:
            return
        if self._rank == 0:
            with self._averaged_weights():
                values = self._measured()
                self._progress.validations.append(values)
                if self._is_best(values):
                    self._progress.best = values
                    self._keep_best()
            _write("validation", values, log, tensorboard)
        if self._world > 1:
            shared = [self._progress.validations, self._progress.best]
            dist.broadcast_object_list(shared, 0)
            self._progress.validations, self._progress.best = shared  # type: ignore[assignment]

    def _measured(self) -> dict[str, Any]:
        watched = {"score": detector(self.recipe.score)}

        def scored(loader: Loader) -> ScoreTable:
            with shown(False):
                return score_together(self.classifier, watched, loader)

        assert self._id_validation is not None
        inside = scored(self._id_validation)
        if inside.labels is None:
            raise InputError("id_validation must yield (x, y) with class labels.")
        values: dict[str, Any] = {
            "step": self._progress.step,
            "accuracy": accuracy(inside.predictions.numpy(), inside.labels.numpy()),
        }
        areas = {
            name: auroc(
                inside["score"].nan_to_num(torch.inf).numpy(),
                scored(loader)["score"].nan_to_num(torch.inf).numpy(),
            )
            for name, loader in self._ood_validation.items()
        }
        if areas:
            values["auroc"] = sum(areas.values()) / len(areas)
            values.update({f"auroc/{name}": area for name, area in areas.items()})
        return values

    def _is_best(self, values: Mapping[str, Any]) -> bool:
        best = self._progress.best
        if best is None:
            return True
        if "auroc" not in values:
            return bool(values["accuracy"] > best["accuracy"])
        least = self._progress.validations[0]["accuracy"] - self.recipe.accuracy_slack
        return bool(values["accuracy"] >= least and values["auroc"] > best["auroc"])

    def _keep_best(self) -> None:
        weights = self.classifier.model.state_dict()
        if self._folder is not None:
            checkpoints.write_weights(self._folder, self._progress.best or {}, weights)
        else:
            self._best_weights = {name: tensor.clone() for name, tensor in weights.items()}

    def _finish(self) -> None:
        """Give the model the best weights, or without validation the last (averaged) ones."""
        model = self.classifier.model
        if self._progress.best is None:
            model.load_state_dict(self._average or model.state_dict())
            if self._folder is not None and self._rank == 0:
                weights = model.state_dict()
                checkpoints.write_weights(self._folder, {"step": self._progress.step}, weights)
        elif self._folder is not None:
            if self._world > 1:
                dist.barrier()
            checkpoints.load_weights(self._folder, model)
        elif self._rank == 0:
            model.load_state_dict(self._best_weights)
        if self._world > 1 and self._folder is None:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if not self._average:
            yield
            return
        model = self.classifier.model
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self._average)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def _share_buffers(self) -> None:
        """The first process's running statistics for all: what checkpoints hold."""
        if self._world > 1:
            for buffer in self.classifier.model.buffers():
                dist.broadcast(buffer, 0)

    # ------------------------------------------------------------------ checkpoints and logs

    def _write_checkpoint(self) -> None:
        if self._folder is None:
            return
        self._share_buffers()
        self._streams.capture()  # we are inside them
        own = {
            "streams": self._streams.state(),
            "inliers": self._inliers.state(),
            "outliers": None if self._outliers is None else self._outliers.state(),
            "sampler": self._sampler.state(),
        }
        ranks: list[Any] = [own] * self._world
        if self._world > 1:
            dist.all_gather_object(ranks, own)
        if self._rank == 0:
            checkpoints.write_training(
                self._folder,
                {
                    "recipe": self.recipe.config(),
                    "steps": self.steps,
                    "progress": asdict(self._progress),
                    "ranks": ranks,
                },
                {
                    "model": self.classifier.model.state_dict(),
                    "average": self._average,
                    "optimizer": checkpoints.optimizer_tensors(self._optimizer),
                },
            )
        if self._world > 1:
            dist.barrier()

    def _read_checkpoint(self) -> None:
        assert self._folder is not None
        if self._rank == 0:
            checkpoints.remove_partial_files(self._folder)
        header, parts = checkpoints.read_training(self._folder)
        own = {**self.recipe.config(), "steps": self.steps}
        there = {**header["recipe"], "steps": header["steps"]}
        different = [name for name in own if own[name] != there.get(name)]
        if different or len(header["ranks"]) != self._world:
            raise PersistenceError(
                f"{self._folder} holds another training: "
                + "; ".join(f"{n} was {there.get(n)}, now {own[n]}" for n in different)
                + f" ({len(header['ranks'])} process(es) then, {self._world} now). Continue it as "
                "it was started, or give another folder."
            )
        progress = header["progress"]
        self._progress = _Progress(**{**progress, "margins": Margins(**progress["margins"])})
        model = self.classifier.model
        checkpoints.fill(model, parts.get("model", {}), self._folder)
        self._average = {
            name: tensor.to(self.classifier.device)
            for name, tensor in parts.get("average", {}).items()
        }
        checkpoints.fill_optimizer(self._optimizer, parts.get("optimizer", {}))
        mine = header["ranks"][self._rank]
        self._inliers.restore(mine["inliers"])
        if self._outliers is not None:
            self._outliers.restore(mine["outliers"])
        self._sampler.restore(mine["sampler"])
        self._streams.restore(mine["streams"])
        self._streams.install()

    def _logs(self) -> tuple[CsvLog | None, CsvLog | None, TensorBoardLog | None]:
        if self._folder is None or self._rank > 0:
            return None, None, None
        step = self._progress.step
        columns = ["step", "accuracy", "auroc", *(f"auroc/{name}" for name in self._ood_validation)]
        validations = CsvLog(self._folder / "validation.csv", columns, 0)
        for values in self._progress.validations:
            validations.write(values)
        tensorboard = TensorBoardLog(self._folder) if self._tensorboard else None
        return CsvLog(self._folder / "log.csv", COLUMNS, step), validations, tensorboard

    def _headline(self) -> dict[str, str]:
        if not self._progress.validations:
            return {}
        newest = self._progress.validations[-1]
        return {name: f"{newest[name]:.4f}" for name in ("accuracy", "auroc") if name in newest}

    def _seeded(self, name: str, device: torch.device | None = None) -> RandomStreams:
        return RandomStreams.seeded(
            self.recipe.seed, _STREAMS[name], self._rank_of(name), device=device
        )

    def _rank_of(self, name: str) -> int:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return 0 if name == "margins" else rank


def train(
    model: nn.Module,
    id_loader: Loader,
    outlier_loader: Loader | None = None,
    method: str = "greg",
    *,
    recipe: TrainingRecipe | str | None = None,
    id_validation: Loader | None = None,
    ood_validation: Mapping[str, Loader] | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    validate_every: int | None = None,
    checkpoint_every: int | None = None,
    head: str | None = None,
    tensorboard: bool = False,
    progress: bool = True,
    **changes: Any,
) -> TrainingResult:
    """Train a classifier to tell OOD samples apart, in place.

    Args:
        model, id_loader, outlier_loader: see :class:`Trainer`.
        method: "greg", "greg+", "energy", "oe" or "ce", each with its published recipe; see
            :data:`grood_fast.training.RECIPES`.
        recipe: another recipe, or the name of one, instead of the method's.
        id_validation, ood_validation, folder, validate_every, checkpoint_every, head, tensorboard,
            progress: see :class:`Trainer`.
        resume: continue the training in ``folder``, if there is one, to the same bits.
        **changes: fields of :class:`TrainingRecipe` to change, for example ``epochs=3,
            learning_rate=0.01, margins="auto"``, ``regularizer=True`` to add the gradient term to
            "energy" or "oe", or ``regularizer={"form": "finite_difference"}``.

    Raises:
        InputError, TrainingError, PersistenceError: see :meth:`Trainer.fit`.
    """
    trainer = Trainer(
        model,
        id_loader,
        outlier_loader,
        recipe_for(method, recipe, changes),
        id_validation=id_validation,
        ood_validation=ood_validation,
        folder=folder,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every,
        head=head,
        tensorboard=tensorboard,
        progress=progress,
    )
    return trainer.fit(resume)


def _steps_per_epoch(loader: Loader, recipe: TrainingRecipe) -> int:
    if isinstance(loader, Sized):
        try:
            return max(1, len(loader) // recipe.accumulate)
        except TypeError:  # a DataLoader of an iterable data set
            pass
    if recipe.steps is None:
        raise InputError(
            "the ID loader has no length, so that epochs cannot be counted: give steps=."
        )
    return recipe.steps


def _optimizer(recipe: TrainingRecipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(
            parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
    return torch.optim.SGD(
        parameters,
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov and recipe.momentum > 0,
    )


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _write(
    group: str, values: Mapping[str, Any], log: CsvLog | None, tensorboard: TensorBoardLog | None
) -> None:
    if log is not None:
        log.write(values)
    if tensorboard is not None:
        tensorboard.write(group, values)


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        yield
