"""Train a network, and evaluate one on a data set."""

import dataclasses
import importlib.util
import inspect
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdeeplab.checkpoint import packaged_checkpoint
from fastdeeplab.cli.terminal import (
    DTYPES,
    BatchSize,
    Device,
    console,
    device_of,
    fail,
    listing,
    load_model,
    parse_size,
    plain,
    progress_bar,
    require,
    stderr,
)
from fastdeeplab.training.options import FREE_ON_RESUME, OPTIONS, TrainingOptions, read_toml
from fastdeeplab.weights_file import read_classes


def _with_training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each of ``TrainingOptions``; those that are left out are None."""
    signature = inspect.signature(command)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for name, field in OPTIONS.items():
        type_: Any = field.metadata["kind"].type | None
        default = False if field.default is None else str(field.default).lower()
        annotation = Annotated[type_, typer.Option(help=field.metadata["help"], show_default=default)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


@_with_training_options
def train(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A TOML file of options; those given here go before it.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, with its own options.")
    ] = False,
    **options: Any,
) -> None:
    """Train a network; with torchrun on several GPUs: torchrun --nproc-per-node 8 -m fastdeeplab.cli train ...

    The folder --out gets the last and the best weights, everything that --resume needs, the options as config.toml,
    and TensorBoard events. An interrupt ends the run after the current step, or the current picture of a
    validation, with a checkpoint.
    """
    from fastdeeplab.train import train
    from fastdeeplab.training.run_folder import RunFolder

    try:
        given = read_toml(config) if config else {}
        for name, value in options.items():
            if value is not None:
                parse = OPTIONS[name].metadata["kind"].parse
                given[name] = parse(value) if parse else value
        if resume:
            run = RunFolder(given.get("out", TrainingOptions.out))
            run.check_same(given)
            free = {name: given[name] for name in FREE_ON_RESUME if name in given}
            chosen = dataclasses.replace(run.options(), **{**free, "out": str(run.path)})
        else:
            chosen = TrainingOptions(**given)
        result = train(chosen, resume=resume, console=console)
    except (ValueError, OSError, RuntimeError, ImportError) as error:  # CheckpointError and TrainingError among them
        fail(str(error))
    except KeyboardInterrupt:
        stderr.print("interrupted")
        raise typer.Exit(130) from None
    if os.environ.get("RANK", "0") == "0":
        state = "finished" if result.finished else f"interrupted after step {result.step} of {result.steps}"
        known = result.miou is not None and result.best_miou is not None
        miou = f", mIoU {result.miou:.4f}, the best {result.best_miou:.4f}" if known else ""
        console.print(f"{result.run}: {state}{miou}")
        if not result.finished:
            console.print(_how_to_go_on(result.run))
    if not result.finished:
        raise typer.Exit(130)


def _how_to_go_on(run: Path) -> str:
    """The command that resumes a run with as many processes as there are here."""
    command = f"train --resume --out {shlex.quote(str(run))}"
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return f"go on with: fastdeeplab {command}"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if count == here:
        return f"go on with: torchrun --nproc-per-node {here} -m fastdeeplab.cli {command}"
    return (
        f"go on with, on each machine and with the same rendezvous: torchrun --nnodes {count // here} "
        f"--nproc-per-node {here} ... -m fastdeeplab.cli {command}"
    )


def evaluate(
    weights: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE|torchvision",
            help="A checkpoint, or torchvision's published weights, which are the default for voc; shapes has its own.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str, typer.Option(metavar="shapes|folder|voc|cityscapes|ade20k", help="The data set; shapes needs no files.")
    ] = "shapes",
    root: Annotated[Path | None, typer.Option(help="Folder of voc, cityscapes or ade20k.", show_default=False)] = None,
    images: Annotated[Path | None, typer.Option(help="With --data folder: the pictures.", show_default=False)] = None,
    masks: Annotated[
        Path | None, typer.Option(help="With --data folder: their masks, of the same names.", show_default=False)
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME...", help="With --data folder: their names, or number.", show_default="the checkpoint's"
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or all.", show_default="val; all of a folder without train and val")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of shapes' scenes, and of what a folder holds out.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Pictures at most.", show_default=False)] = None,
    size: Annotated[str | None, typer.Option(metavar="HEIGHTxWIDTH", help="Of shapes.", show_default="128x128")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures.", show_default=False)] = None,
    chart: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the IoU of every class, as PNG.", show_default=False)
    ] = None,
    batch_size: BatchSize = 1,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="the checkpoint's")
    ] = None,
    device: Device = None,
) -> None:
    """Compare a model's masks with those of a data set: IoU of every class, their mean, pixel accuracy.

    Pictures keep their own size. A class that neither the targets nor the masks have is left out of the mean. A picture
    that can't be used is named with its reason; the rest is evaluated, and the exit status is 1.
    """
    from fastdeeplab.data import DATASETS, open_dataset
    from fastdeeplab.data.pairs import has_splits
    from fastdeeplab.evaluate import evaluate as run_evaluation
    from fastdeeplab.evaluate import write_chart, write_json

    require(data in DATASETS, f"--data must be {listing(DATASETS)}", data)
    require(dtype is None or dtype in DTYPES, f"--dtype must be {listing(DTYPES)}", dtype)
    require(batch_size >= 1, "--batch-size must be at least 1", batch_size)
    for option, path in (("--json", json), ("--chart", chart)):
        if path is None:
            continue
        if not path.parent.is_dir():
            fail(f"{option} {path}: there is no folder {path.parent}")
        if path.is_dir():
            fail(f"{option} {path}: is a folder, not a file")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            fail(f"{option} {path}: no permission to write there")
    if chart is not None and importlib.util.find_spec("matplotlib") is None:
        fail("--chart needs the package matplotlib: pip install 'fastdeeplab[plots]'")
    if weights is None and data not in ("shapes", "voc"):
        fail(f"--data {data} needs the weights of a model for its classes")
    elif weights not in (None, "torchvision") and not Path(weights).is_file():
        fail(f"there is no file {weights}")
    place = device_of(device)
    scene_size = None if size is None else parse_size(size)
    try:
        chosen = weights or ("torchvision" if data == "voc" else str(packaged_checkpoint("shapes")))
    except OSError as error:
        fail(str(error))
    depth, output_stride = (50, 8) if chosen == "torchvision" else (None, None)
    model = load_model(chosen, depth, output_stride, option="WEIGHTS")
    if split is None:
        divided = images is not None and masks is not None and has_splits(images, masks)
        split = "all" if data == "folder" and not divided else "val"
    try:
        names: Any = OPTIONS["classes"].metadata["kind"].parse(classes) if classes else None
        known = None if chosen == "torchvision" else read_classes(chosen)
        if data == "folder" and names is None:
            names = known or model.config["num_classes"]
        dataset = open_dataset(
            data,
            split,
            root=root,
            images=images,
            masks=masks,
            classes=names,
            seed=seed,
            limit=limit,
            size=scene_size,
        )
        if known and dataset.classes != known and sorted(dataset.classes) == sorted(known):
            raise ValueError(f"the classes must be in the checkpoint's order, {','.join(known)}")
        failed = 0
        with progress_bar() as progress:

            def skip(error: Exception) -> None:
                nonlocal failed
                failed += 1
                stderr.print(f"failed: {plain(error)}", style="red")

            task = progress.add_task("evaluating", total=len(dataset))
            evaluation = run_evaluation(
                model,
                dataset,
                batch_size=batch_size,
                device=place,
                dtype=None if dtype is None else DTYPES[dtype],
                progress=lambda done: progress.update(task, completed=done + failed),
                skip=skip,
            )
        console.print(evaluation.table())
        if json is not None:
            write_json(json, evaluation)
        if chart is not None:
            write_chart(chart, evaluation)
    except KeyboardInterrupt:
        stderr.print("interrupted")
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        fail(str(error))
    if failed:
        console.print(f"{failed} of {len(dataset)} pictures failed, and are left out")
        raise typer.Exit(1)
