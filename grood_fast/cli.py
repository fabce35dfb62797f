"""The command line: ``grood-fast demo``, ``env``, ``evaluate``, ``train`` and ``demo-train``."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.logging import RichHandler
    from rich.markup import escape
    from rich.table import Table
except ImportError as missing:
    raise SystemExit(
        f"the command line needs {missing.name}, which is not installed: "
        'pip install "grood-fast[cli]"'
    ) from missing

from grood_fast.errors import GroodFastError, InputError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    from grood_fast.detectors import Detector
    from grood_fast.evaluation import Report

app = typer.Typer(
    help="Out-of-distribution scores for PyTorch classifiers, from their gradients.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
output = Console()
if not output.is_terminal:
    output.width = 120  # a file or a pipe has no width of its own
messages = Console(stderr=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]

DEMO_BATCH_SIZE = 500
PICTURED = ("energy", "gradnorm", "knn", "vim")


class PrecisionChoice(str, Enum):
    """What the backbone computes in."""

    fp32 = "fp32"
    bf16 = "bf16"


@app.command()
def env(as_json: JsonFlag = False) -> None:
    """Versions, processor, and what was compiled."""
    from grood_fast.environment import environment

    facts = environment()
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {found}" for name, found in value.items())
        elif isinstance(value, list):
            value = ", ".join(value) or "none"
        elif value is None:
            value = "none"
        table.add_row(key.replace("_", " "), str(value))
    output.print(table)


@app.command()
def demo(
    held_out: Annotated[
        str, typer.Option(help="The two Fashion-MNIST classes the network never sees.")
    ] = "2,4",
    seed: Annotated[int, typer.Option(help="Of the network's training.")] = 0,
    folder: Annotated[Path, typer.Option("--out", help="Where picture and report go.")] = Path(
        "out/demo"
    ),
    as_json: JsonFlag = False,
) -> None:
    """Train a Fashion-MNIST network without two classes, and see which detectors notice them.

    The two classes are the near OOD set; MNIST, silhouettes of animals, digits and noise are the
    far ones. Data and network are fetched and trained once, then cached.
    """
    from torch.utils.data import DataLoader, TensorDataset

    from grood_fast.detectors import DETECTORS, by_unique_name, with_twins
    from grood_fast.evaluation.benchmark import evaluate
    from grood_fast.evaluation.datasets import far_ood, fashion_mnist
    from grood_fast.evaluation.networks import Recipe, trained_network
    from grood_fast.evaluation.plots import plot_report
    from grood_fast.scoring import fit

    def loader(data: TensorDataset) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(data, DEMO_BATCH_SIZE)

    started = time.perf_counter()
    classes = tuple(_numbers(held_out, int, "--held-out"))
    with messages.status("loading the data sets"):
        splits = fashion_mnist().held_out(classes)
        far = far_ood()
    network = trained_network(Recipe(classes, seed))
    everything = with_twins(by_unique_name(DETECTORS))
    detectors = fit(network.model, loader(splits.train), list(everything.values()))
    report = evaluate(
        network.model,
        list(detectors.values()),
        id=loader(splits.test),
        ood={
            "near": {"held-out": loader(splits.near_ood)},
            "far": {name: loader(data) for name, data in far.items()},
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    report.save(folder / "report.json")
    plot_report(report, folder / "scores.png", PICTURED)
    if as_json:
        sys.stdout.write(report.to_json() + "\n")
        return
    _print_report(
        report, f"Fashion-MNIST without the classes {', '.join(map(str, classes))}, seed {seed}"
    )
    chosen = detectors["vim"].calibrate(loader(splits.calibration), id_recall=0.95)
    kept = 1 - chosen.predict(report.id_scores["vim"]).float().mean().item()
    found = {
        name: chosen.predict(table["vim"]).float().mean().item()
        for name, table in report.ood_scores.items()
    }
    output.print(
        f"\nvim calibrated on {len(splits.calibration):,} held-out samples for 95 % ID recall: "
        f"{kept:.1%} of the ID test samples pass; flagged as OOD: "
        + ", ".join(f"{name} {share:.1%}" for name, share in found.items())
    )
    output.print(
        f"[dim]{folder / 'scores.png'} and {folder / 'report.json'} written; "
        f"{time.perf_counter() - started:.0f} s in all[/dim]"
    )


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="module:function, which returns the trained torch.nn.Module.")
    ],
    id_folder: Annotated[
        Path, typer.Option("--id", help="In-distribution test images; sub-folders are classes.")
    ],
    ood_folders: Annotated[
        list[str], typer.Option("--ood", help="name=folder, or a folder; may be given again.")
    ],
    reference: Annotated[
        Path | None, typer.Option(help="In-distribution images for detectors that are fitted.")
    ] = None,
    detector: Annotated[
        list[str] | None,
        typer.Option(help="A detector, as knn or knn:k=10,metric=euclidean; may be given again."),
    ] = None,
    resize: Annotated[int | None, typer.Option(help="Length of the shorter side.")] = None,
    crop: Annotated[int | None, typer.Option(help="Side of the central square.")] = None,
    mean: Annotated[str | None, typer.Option(help="One number, or one a channel: a,b,c")] = None,
    std: Annotated[str | None, typer.Option(help="One number, or one a channel: a,b,c")] = None,
    grayscale: Annotated[bool, typer.Option(help="One channel instead of three.")] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images.")] = 0,
    head: Annotated[str | None, typer.Option(help="Name of the last linear layer.")] = None,
    precision: Annotated[PrecisionChoice, typer.Option()] = PrecisionChoice.fp32,
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write histograms and ROC curves here.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the report here, as JSON.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare detectors on your own model and your own folders of images.

    The detectors are msp, maxlogit, energy, gen, gradnorm and exgrad, and with --reference also
    those that are fitted, unless --detector says otherwise.
    """
    from grood_fast.detectors import DETECTORS
    from grood_fast.detectors import detector as make
    from grood_fast.evaluation import evaluate as compare
    from grood_fast.evaluation.plots import plot_report

    preparation = {
        "resize": resize,
        "crop": crop,
        "mean": None if mean is None else _numbers(mean, float, "--mean"),
        "std": None if std is None else _numbers(std, float, "--std"),
        "grayscale": grayscale,
    }

    def images(folder: Path) -> DataLoader[Any]:
        return _image_loader(folder, preparation, batch_size, workers)

    for path, suffixes in ((save, None), (plot, (".png", ".svg", ".pdf"))):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent}.")
        if path is not None and suffixes and path.suffix not in suffixes:
            raise InputError(f"{path}: a picture ends in {', '.join(suffixes)}.")
    folders = dict(map(_named_folder, ood_folders))
    if len(folders) < len(ood_folders):
        raise InputError(
            f"the OOD folders need different names, got {', '.join(ood_folders)}: give them as "
            "name=folder."
        )
    network = _on_device(_model(model), device)
    names = [_with_options(text) for text in detector or ()] or [
        make(name) for name in DETECTORS if reference is not None or not make(name).needs_fit
    ]
    report = compare(
        network,
        names,
        id=images(id_folder),
        ood={name: images(folder) for name, folder in folders.items()},
        reference=None if reference is None else images(reference),
        head=head,
        precision=precision.value,
    )
    if save is not None:
        report.save(save)
    if plot is not None:
        plot_report(report, plot)
    if as_json:
        sys.stdout.write(report.to_json() + "\n")
    else:
        _print_report(report, f"{type(network).__name__} on {id_folder}")


@app.command("train")
def train_on_folders(
    config: Annotated[
        Path | None,
        typer.Option(help="A TOML or YAML file with any of these options, and recipe fields."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="module:function, which returns the torch.nn.Module.")
    ] = None,
    id_folder: Annotated[
        Path | None, typer.Option("--id", help="ID training images; sub-folders are classes.")
    ] = None,
    outliers: Annotated[
        Path | None, typer.Option(help="Outliers to train with, unlike those to be tested on.")
    ] = None,
    id_validation: Annotated[Path | None, typer.Option(help="Held-out ID images.")] = None,
    ood_validation: Annotated[
        list[str] | None, typer.Option(help="name=folder, or a folder; may be given again.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where checkpoints and logs go.")] = None,
    method: Annotated[str | None, typer.Option(help="greg, greg+, energy, oe or ce.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe by name, for the method's.")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="field=value of the recipe, as epochs=3; may be given again."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="ID images a step.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes a loader.")] = None,
    augment: Annotated[
        bool | None, typer.Option(help="Shift and mirror training images at random.")
    ] = None,
    resize: Annotated[int | None, typer.Option(help="Length of the shorter side.")] = None,
    crop: Annotated[int | None, typer.Option(help="Side of the central square.")] = None,
    mean: Annotated[str | None, typer.Option(help="One number, or one a channel: a,b,c")] = None,
    std: Annotated[str | None, typer.Option(help="One number, or one a channel: a,b,c")] = None,
    grayscale: Annotated[bool | None, typer.Option(help="One channel instead of three.")] = None,
    head: Annotated[str | None, typer.Option(help="Name of the last linear layer.")] = None,
    device: Annotated[str | None, typer.Option(help="Where the model runs, such as cuda.")] = None,
    tensorboard: Annotated[bool | None, typer.Option(help="Write its event files too.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue the training in --out.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train your own classifier with outliers, from folders of images.

    The best weights go to best.safetensors in --out; grood_fast.training.load_weights loads them.
    """
    from grood_fast.training import train
    from grood_fast.training.configuration import TrainingConfiguration

    given = {
        "model": model,
        "id": id_folder,
        "outliers": outliers,
        "id_validation": id_validation,
        "ood_validation": None if not ood_validation else dict(map(_named_folder, ood_validation)),
        "out": out,
        "method": method,
        "recipe": recipe,
        "batch_size": batch_size,
        "workers": workers,
        "augment": augment,
        "resize": resize,
        "crop": crop,
        "mean": None if mean is None else _numbers(mean, float, "--mean"),
        "std": None if std is None else _numbers(std, float, "--std"),
        "grayscale": grayscale,
        "head": head,
        "device": device,
        "tensorboard": tensorboard,
    }
    settings = TrainingConfiguration.read(config, given, change or [])

    def images(folder: Path, training: bool = False) -> DataLoader[Any]:
        return _image_loader(
            folder,
            settings.preparation,
            settings.batch_size,
            settings.workers,
            training,
            training and settings.augment,
        )

    network = _on_device(_model(settings.model), settings.device)
    result = train(
        network,
        images(settings.id, training=True),
        None if settings.outliers is None else images(settings.outliers, training=True),
        settings.method,
        recipe=settings.recipe,
        id_validation=None if settings.id_validation is None else images(settings.id_validation),
        ood_validation={name: images(folder) for name, folder in settings.ood_validation.items()},
        folder=settings.out,
        resume=resume,
        head=settings.head,
        tensorboard=settings.tensorboard,
        **settings.changes,
    )
    if as_json:
        facts = {"steps": result.steps, "best": result.best, "validations": result.validations}
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return
    if result.validations:
        _print_validations(result.validations, result.best)
    output.print(f"{result.steps} steps; weights and logs in {settings.out}", highlight=False)


@app.command()
def demo_train(
    held_out: Annotated[
        str, typer.Option(help="The two Fashion-MNIST classes the network never sees.")
    ] = "2,4",
    seed: Annotated[int, typer.Option(help="Of the network, and of its fine-tuning.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Of fine-tuning.")] = 400,
    as_json: JsonFlag = False,
) -> None:
    """Fine-tune the demo's network with GReg+, and compare the energy before and after.

    The outliers to train with are emoji and training images turned or pasted together; the weights
    are chosen on outliers of other kinds, and tested on those of the demo.
    """
    from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

    from grood_fast.evaluation.benchmark import evaluate
    from grood_fast.evaluation.datasets import (
        auxiliary_outliers,
        far_ood,
        fashion_mnist,
        validation_outliers,
    )
    from grood_fast.evaluation.networks import Recipe, trained_network
    from grood_fast.training import train

    def loader(data: TensorDataset) -> DataLoader[Any]:
        return DataLoader(data, DEMO_BATCH_SIZE)

    started = time.perf_counter()
    classes = tuple(_numbers(held_out, int, "--held-out"))
    with messages.status("loading the data sets"):
        splits = fashion_mnist().held_out(classes)
        images = splits.train.tensors[0]
        outliers: ConcatDataset[Any] = ConcatDataset(auxiliary_outliers(images).values())
        sets = {
            "near": {"held-out": loader(splits.near_ood)},
            "far": {name: loader(data) for name, data in far_ood().items()},
        }
    model = trained_network(Recipe(classes, seed)).model

    def measured() -> Report:
        return evaluate(model, "energy", id=loader(splits.test), ood=sets)

    before = measured()
    result = train(
        model,
        DataLoader(splits.train, 32, shuffle=True, drop_last=True),
        DataLoader(outliers, 256, shuffle=True),
        recipe="greg+finetune",
        steps=steps,
        learning_rate=1e-2,
        margins="auto",
        seed=seed,
        id_validation=loader(splits.validation),
        ood_validation={name: loader(d) for name, d in validation_outliers(images).items()},
        validate_every=max(1, steps // 4),
    )
    after = measured()
    if as_json:
        facts = {"before": before.to_json(), "after": after.to_json()}
        facts = {name: json.loads(text) for name, text in facts.items()}
        sys.stdout.write(json.dumps({**facts, "best": result.best}, indent=2) + "\n")
        return
    _print_validations(result.validations, result.best)
    _print_report(before, "The energy before")
    _print_report(after, f"The energy after {steps} steps of GReg+")
    output.print(f"[dim]{time.perf_counter() - started:.0f} s in all[/dim]")


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exit status: 0 done, 1 an error said in one sentence, 2 wrong usage, and what
    typer gives an interruption."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=messages)]
    )
    warnings.showwarning = _show_warning
    try:
        app(arguments)
    except GroodFastError as error:
        messages.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        sys.exit(1)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    messages.print(f"[yellow]warning:[/yellow] {escape(str(message))}", highlight=False)


def _print_report(report: Report, title: str) -> None:
    header, rows = report.table()
    table = Table(title=title)
    for column in header:
        first_or_last = column in (header[0], header[-1])
        table.add_column(
            column, justify="left" if column == header[0] else "right", no_wrap=first_or_last
        )
    for row in rows:
        table.add_row(*row)
    output.print(table)
    known = "" if report.accuracy is None else f"; accuracy {report.accuracy:.2%}"
    costs = report.costs
    output.print(
        f"[dim]AUROC in % ± half its 95 % bootstrap interval; FPR95 in % at 95 % OOD recall; cost: "
        f"(forward + detector) / forward, batches of {costs.batch_size}, forward "
        f"{1e3 * costs.forward_seconds / costs.batch_size:.3f} ms a sample on "
        f"{report.environment['processor']}\n{report.id_samples:,} ID samples{known}[/dim]",
        highlight=False,
    )


def _print_validations(
    validations: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None
) -> None:
    table = Table(title="Validation, in %")
    columns = [name for name in validations[0] if name != "step"]
    for column in ("step", *columns, ""):
        table.add_column(column, justify="right")
    for values in validations:
        numbers = [f"{100 * values[name]:.2f}" for name in columns]
        table.add_row(str(values["step"]), *numbers, "best" if values == best else "")
    output.print(table)


def _numbers(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} takes numbers separated by commas, got {text!r}.") from error


def _named_folder(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    return (name, Path(folder)) if separator else (Path(text).name, Path(text))


def _with_options(text: str) -> Detector:
    """A detector from ``name`` or ``name:option=value,option=value``; values as in JSON."""
    from grood_fast.detectors import detector as make

    name, _, settings = text.partition(":")
    options = {}
    for setting in filter(None, settings.split(",")):
        key, separator, value = setting.partition("=")
        if not separator:
            raise InputError(f"--detector {text}: expected option=value, got {setting!r}.")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return make(name, **options)


def _image_loader(
    folder: Path,
    preparation: Mapping[str, Any],
    batch_size: int,
    workers: int,
    training: bool = False,
    augmented: bool = False,
) -> DataLoader[Any]:
    """The images of a folder, in order; for training shuffled, whole batches, without end."""
    from torch.utils.data import DataLoader, Dataset

    from grood_fast.evaluation.datasets import ImageFolderDataset
    from grood_fast.training.augmentation import ShiftedAndMirrored

    images = ImageFolderDataset(folder, **preparation)
    data: Dataset[Any] = ShiftedAndMirrored(images) if augmented else images
    if training and len(images) < batch_size:
        raise InputError(f"{folder} holds {len(images)} images, fewer than a batch: {batch_size}.")
    return DataLoader(
        data,
        batch_size,
        shuffle=training,
        drop_last=training,
        num_workers=workers,
        collate_fn=partial(_collate, bool(images.classes)),
    )


def _on_device(network: nn.Module, device: str | None) -> nn.Module:
    if device is None:
        return network
    try:
        return network.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {error}") from error


def _collate(labelled: bool, items: Sequence[tuple[Tensor, int]]) -> Any:
    import torch

    sizes = {tuple(image.shape[1:]) for image, _ in items}
    if len(sizes) > 1:
        raise InputError(
            f"the images have different sizes ({', '.join(map(str, sorted(sizes)[:3]))}): give "
            "--resize and --crop."
        )
    images = torch.stack([image for image, _ in items])
    return (images, torch.tensor([label for _, label in items])) if labelled else images


def _model(text: str) -> nn.Module:
    """Import ``module:function`` from the working directory or the environment, and call it."""
    from torch import nn

    module_name, _, function_name = text.partition(":")
    if not module_name or not function_name:
        raise InputError(f"the model is given as module:function, got {text!r}.")
    if "" not in sys.path:  # and stays: the function may import more from there
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
        made = getattr(module, function_name)
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(f"cannot import {text}: {error}.") from error
    model = made if isinstance(made, nn.Module) else made()
    if not isinstance(model, nn.Module):
        raise InputError(f"{text} returned {type(model).__name__}, expected a torch.nn.Module.")
    return model
