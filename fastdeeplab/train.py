"""Train a ResNetModel, in one process or in several that torchrun started.

SGD with a poly schedule, the upsampling and cross-entropy in one pass, mixed precision, gradient accumulation. A step
has the gradients of one large batch, however it is divided over accumulated batches and processes: the summed loss is
divided by the weight of the valid pixels of them all. (Batch norm still sees each batch alone, or with ``sync_bn`` the
batches of all processes.)

What a step does depends on its number and the state before it alone, so a run that was interrupted and resumed ends
with the weights of one left alone; on a CPU bit by bit. An epoch is saved before it is validated, so that nothing that
happens then loses it: a resume begins with the validation that is due.
"""

import math
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from fastdeeplab.data import Augmented, SegmentationDataset
from fastdeeplab.kernels.measure import cudnn_benchmark
from fastdeeplab.training.display import TrainingDisplay, counting
from fastdeeplab.training.interrupts import StopRequest, stop_on_signals
from fastdeeplab.training.options import TrainingOptions, as_dict
from fastdeeplab.training.pictures import (
    Batch,
    augmentation_of,
    check_pictures,
    fingerprint,
    open_pictures,
    reading,
)
from fastdeeplab.training.processes import Processes, join
from fastdeeplab.training.run_folder import RunFolder
from fastdeeplab.training.schedule import PictureOrder
from fastdeeplab.training.trainer import Trainer, TrainingError

__all__ = ["TrainingError", "TrainingResult", "train"]


@dataclass(frozen=True)
class TrainingResult:
    """Where a run ended."""

    run: Path
    step: int
    steps: int  # of the whole run
    miou: float | None  # of the last validation; None before the first, or if no pixel counted
    best_miou: float | None
    finished: bool  # False after an interrupt, with a checkpoint to go on from


def train(options: TrainingOptions, *, resume: bool = False, console: Any = None) -> TrainingResult:
    """Train a model and write its checkpoints into the run's folder, ``options.out``.

    There are ``last.safetensors`` and ``best.safetensors`` (by mIoU of the validation after each epoch), which
    ``ResNetModel.load`` takes, ``last.pt`` for a resume, ``config.toml`` and TensorBoard events. SIGINT and SIGTERM end
    the run after the current step, or the current picture of a validation, with a checkpoint. Started by torchrun, it
    is one of the run's processes.

    A step takes ``batch_size * accumulate`` pictures per process. The last one of an epoch takes those that are left,
    even a single picture: batch norm then has the statistics of that one, and ASPP's pooled branch, which has one value
    per channel, its running statistics. PyTorch's global random state is seeded.

    Args:
        options: see ``TrainingOptions``.
        resume: go on with the run in the folder, exactly where its checkpoint is. The options must be the same, but for
            those in ``training.options.FREE_ON_RESUME``.
        console: a ``rich.console.Console`` for the progress bar and a line per epoch.

    Raises:
        ValueError: options that contradict each other, the data set or the run that is resumed, pictures or a device
            that can't be used; nothing has been written.
        FileExistsError: a new run, and the folder holds a checkpoint of one.
        FileNotFoundError: no run to resume, or no such data.
        CheckpointError: the pretrained weights or the checkpoint can't be read or do not fit.
        KeyboardInterrupt: an interrupt before the first step.
        ImportError: a package is missing.
        TrainingError: the loss became NaN, memory or the disk is full, or another process ended. The last
            checkpoint is whole.
    """
    run = RunFolder(options.out)
    with ExitStack() as stack:
        processes = stack.enter_context(join(options.device))
        stop = stack.enter_context(stop_on_signals(keep=processes.count > 1))
        stack.enter_context(cudnn_benchmark())
        try:
            return _train(options, run, processes, stop, resume, console)
        except TrainingError as error:  # whoever keeps it, as notebooks do, would keep the model and its gradients
            for kept in filter(None, (error, error.__cause__)):
                traceback.clear_frames(kept.__traceback__)
            raise


def _train(
    options: TrainingOptions, run: RunFolder, processes: Processes, stop: StopRequest, resume: bool, console: Any
) -> TrainingResult:
    state = None
    if resume:
        run.check_same(as_dict(options))
        state = run.load(processes.count)
    else:
        run.check_new()

    augmentation = augmentation_of(options)
    pictures, validation_pictures = datasets = open_pictures(options)
    if options.check_data and options.data != "shapes" and not resume:
        with counting(console if processes.is_first else None, "reading the pictures", datasets) as read:

            def progress(count: int) -> None:
                if stop.requested:
                    raise KeyboardInterrupt
                read(count * processes.count)

            check_pictures(datasets, processes, progress)
    names = fingerprint(pictures)
    if state is not None and state["pictures"] != names:
        raise ValueError(
            f"{run.path} can't be resumed: it was trained on other pictures than those that are here now. Start a "
            "new run, whose pretrained may be the last.safetensors of this one"
        )
    order = PictureOrder(
        len(pictures), options.batch_size, options.accumulate, options.seed, processes.rank, processes.count
    )
    trainer = Trainer(options, pictures.classes, processes, steps=options.epochs * order.steps_per_epoch)
    if state is not None:
        trainer.load_state(state)
    if stop.requested:
        raise KeyboardInterrupt
    display = TrainingDisplay(
        run,
        steps=trainer.steps,
        start=trainer.step,
        resumed=resume,
        shown=processes.is_first,
        tensorboard=options.tensorboard and not trainer.finished,
        console=console,
    )
    if processes.is_first:
        (run.write_options if resume else run.create)(options)
    if state is not None:
        display.print(f"going on after step {trainer.step} of {trainer.steps}")
    steps, on_gpu = range(trainer.step, trainer.steps), processes.device.type == "cuda"
    samples = Augmented(pictures, augmentation, options.seed)
    try:
        # The readers first: they are forks, which a thread of the display's could leave with its lock taken.
        with reading(samples, order, steps, workers=options.workers, pin_memory=on_gpu) as batches, display:
            _run(trainer, run, batches, order, names, validation_pictures, display, stop, options.checkpoint_every)
    except (RuntimeError, OSError, ValueError, MemoryError) as error:
        validating = trainer.validation_due and run.saved_step == trainer.step
        step = trainer.step if validating else min(trainer.step + 1, trainer.steps)
        reason = _reason(error, step, validating, alone=processes.count == 1)
        raise TrainingError(f"{reason}. {run.what_is_kept()}") from error
    return TrainingResult(run.path, trainer.step, trainer.steps, trainer.miou, trainer.best_miou, trainer.finished)


def _run(
    trainer: Trainer,
    run: RunFolder,
    batches: Iterator[Batch],
    order: PictureOrder,
    names: int,
    validation_pictures: SegmentationDataset,
    display: TrainingDisplay,
    stop: StopRequest,
    checkpoint_every: int,
) -> None:
    processes, epochs, stopped = trainer.processes, trainer.steps // order.steps_per_epoch, False
    while not (trainer.finished or stopped):
        if trainer.validation_due:
            epoch = trainer.step // order.steps_per_epoch
            if not _validate(trainer, run, validation_pictures, display, stop, epoch, epochs):
                break
            save = True
        else:
            epoch = trainer.step // order.steps_per_epoch + 1
            rates, images = trainer.set_learning_rates(), order.pictures_of(trainer.step)
            loss = trainer.train_step([next(batches) for _ in order.batches(trainer.step)])
            display.step(trainer.step, epoch, loss, images, rates)
            trainer.validation_due = trainer.step % order.steps_per_epoch == 0
            save = trainer.validation_due or (checkpoint_every > 0 and trainer.step % checkpoint_every == 0)

        stopped = processes.any(stop.requested)
        if save or stopped:
            state = trainer.state() | {"pictures": names}
            if processes.is_first:
                run.save(state, trainer.model, trainer.facts(epoch))
            processes.wait()
            run.saved_step = trainer.step  # in every process, once it is


def _validate(
    trainer: Trainer,
    run: RunFolder,
    pictures: SegmentationDataset,
    display: TrainingDisplay,
    stop: StopRequest,
    epoch: int,
    epochs: int,
) -> bool:
    """Validate, and keep the weights if they are the best; False if the run is to stop instead."""
    display.validating()
    evaluation = trainer.validate(pictures, stop)
    if evaluation is None:
        return False
    trainer.miou = None if math.isnan(evaluation.miou) else evaluation.miou
    if trainer.miou is None and trainer.processes.is_first:
        warnings.warn(
            f"No pixel counted in the validation of epoch {epoch}: there is no mIoU to choose the best weights by",
            RuntimeWarning,
            stacklevel=2,
        )
    is_best = trainer.best_miou is None or evaluation.miou > trainer.best_miou  # without any mIoU, the last weights
    if is_best:
        trainer.best_miou = trainer.miou
        if trainer.processes.is_first:
            run.save_model(run.best, trainer.model, trainer.facts(epoch))
    trainer.validation_due = False
    ious = dict(zip(trainer.classes, evaluation.iou.tolist(), strict=True))
    display.epoch(trainer.step, epoch, epochs, evaluation.miou, ious, is_best and trainer.miou is not None)
    return True


def _reason(error: Exception, step: int, validating: bool, alone: bool) -> str:
    """Why a run had to end at a step, or in the validation after it, in a sentence without its full stop."""
    place = f"in the validation after step {step}" if validating else f"at step {step}"
    first_line = str(error).partition("\n")[0].rstrip(". ") or type(error).__name__
    of_reader = first_line.find("DataLoader worker (pid")  # raised wherever its end is noticed, amid writing a file too
    if of_reader >= 0:
        return (
            f"A process that reads pictures ended {place}: {first_line[of_reader:]}. It may have been short of memory"
        )
    if isinstance(error, torch.OutOfMemoryError):
        advice = (
            "it takes pictures one by one at their own size, and the largest need more than is free"
            if validating
            else "a smaller batch_size with accumulate trains the same"
        )
        return f"Out of memory {place}: {advice} ({first_line})"
    if isinstance(error, MemoryError):
        return f"The computer is out of memory {place}: fewer workers take less ({first_line})"
    if isinstance(error, OSError):
        return f"A file could not be written or read {place}: {first_line}"
    if isinstance(error, TrainingError):
        return f"{first_line} {place}: try a smaller lr, warmup_steps, or another amp; check_data finds bad masks"
    lost = isinstance(error, distributed.DistError) if distributed.is_available() else False
    if not alone and (lost or "gloo" in first_line or "NCCL" in first_line):
        return f"Another process of the run ended {place}, and may have said why"
    return f"The run failed {place}: {first_line}"
