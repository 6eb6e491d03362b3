"""Train a ResNetModel, in one process or in several that torchrun started.

SGD with a poly schedule, the upsampling and cross-entropy in one pass, mixed precision, gradient accumulation. A step
has the gradients of one large batch, however it is divided over accumulated batches and processes: the summed loss is
divided by the weight of the valid pixels of them all. (Batch norm still sees each batch alone, or with ``sync_bn`` the
batches of all processes.)

What a step does depends on its number and the state before it alone, so a run that was interrupted and resumed ends
with the weights of one left alone; on a CPU bit by bit.
"""

import math
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from fastdeeplab.checkpoint import PUBLISHED, load_weights
from fastdeeplab.convert import to_torchvision
from fastdeeplab.data import IGNORED, Augmentation, Augmented, SegmentationDataset, check_dataset, open_dataset
from fastdeeplab.data.shapes import SIZE
from fastdeeplab.evaluate import Evaluation, evaluate
from fastdeeplab.loss import SegmentationLoss
from fastdeeplab.model import ResNetModel
from fastdeeplab.training.display import TrainingDisplay
from fastdeeplab.training.options import TrainingOptions, as_dict
from fastdeeplab.training.processes import Processes, join
from fastdeeplab.training.run_folder import RunFolder
from fastdeeplab.training.schedule import PictureOrder, learning_rate_factor
from fastdeeplab.weights_file import read_state_dict

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_CROP_SIZE = 512
PUBLISHED_CLASSES = 21  # of torchvision's whole networks
LEAST_SCALE = 2.0**-20  # of fp16's loss; below it, gradients were not finite at any scale before
BACKBONE_SHARE = 0.1  # of the head's learning rate, for a backbone that is pretrained

Batch = tuple[Tensor, Tensor]  # images (B, 3, h, w) fp32, target (B, h, w) uint8


class TrainingError(RuntimeError):
    """A run had to end. The message says why, and which checkpoint it leaves."""


@dataclass(frozen=True)
class TrainingResult:
    """Where a run ended."""

    run: Path
    step: int
    steps: int  # of the whole run
    miou: float | None  # of the last validation, None before the first
    best_miou: float | None

    @property
    def finished(self) -> bool:
        """False after an interrupt, with a checkpoint to go on from."""
        return self.step == self.steps


def train(options: TrainingOptions, *, resume: bool = False, console: Any = None) -> TrainingResult:
    """Train a model and write its checkpoints into the run's folder, ``options.out``.

    There are ``last.safetensors`` and ``best.safetensors`` (by mIoU of the validation after each epoch), which
    ``ResNetModel.load`` takes, ``last.pt`` for a resume, ``config.toml`` and TensorBoard events. SIGINT and SIGTERM end
    the run after the current step, with a checkpoint. Started by torchrun, it is one of the run's processes.

    A step takes ``batch_size * accumulate`` pictures per process. The last one of an epoch takes those that are left,
    even a single picture: batch norm then has the statistics of that one, and ASPP's pooled branch, which has one value
    per channel, its running statistics. PyTorch's global random state is seeded.

    Args:
        options: see ``TrainingOptions``.
        resume: go on with the run in the folder, exactly where its checkpoint is. The options must be the same, but for
            those in ``training.options.FREE_ON_RESUME``.
        console: a ``rich.console.Console`` for the progress bar and a line per epoch.

    Raises:
        ValueError: options that contradict each other, the data set or the run that is resumed, or a device that can't
            be used; nothing has been written.
        FileExistsError: a new run, and the folder holds one.
        FileNotFoundError: no run to resume, or no such data.
        CheckpointError: the pretrained weights or the checkpoint can't be read or do not fit.
        ImportError: a package is missing.
        TrainingError: the loss became NaN, memory or the disk is full, or another process ended. The last
            checkpoint is whole.
    """
    run = RunFolder(options.out)
    with ExitStack() as stack:
        processes = stack.enter_context(join(options.device))
        stop = stack.enter_context(_stop_on_signals(keep=processes.count > 1))
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=True))
        state = None
        if resume:
            run.check_same(as_dict(options))
            state = run.load(processes.count)
        elif processes.is_first:
            run.check_new()

        pictures, validation_pictures = _open_data(options, check=processes.is_first and not resume)
        order = PictureOrder(
            len(pictures), options.batch_size, options.accumulate, options.seed, processes.rank, processes.count
        )
        trainer = Trainer(options, pictures.classes, processes, steps=options.epochs * order.steps_per_epoch)
        if state is not None:
            trainer.load_state(state)
        display = TrainingDisplay(
            run,
            steps=trainer.steps,
            start=trainer.step,
            shown=processes.is_first,
            tensorboard=options.tensorboard and trainer.step < trainer.steps,
            console=console,
        )
        if processes.is_first and not resume:
            run.create(options)
        if state is not None:
            display.print(f"going on after step {trainer.step} of {trainer.steps}")
        batches = _load(Augmented(pictures, _augmentation(options), options.seed), order, trainer, options)
        try:
            with display:
                _run(trainer, run, batches, order, validation_pictures, display, stop, options.checkpoint_every)
        except (RuntimeError, OSError, ValueError) as error:
            raise TrainingError(f"{_reason(error, trainer.step + 1)}. {run.what_is_kept()}") from error
        return TrainingResult(run.path, trainer.step, trainer.steps, trainer.miou, trainer.best_miou)


def _run(
    trainer: "Trainer",
    run: RunFolder,
    batches: Iterator[Batch],
    order: PictureOrder,
    validation_pictures: SegmentationDataset,
    display: TrainingDisplay,
    stop: "StopRequest",
    checkpoint_every: int,
) -> None:
    processes, epochs = trainer.processes, trainer.steps // order.steps_per_epoch
    while trainer.step < trainer.steps:
        step, epoch = trainer.step, trainer.step // order.steps_per_epoch + 1
        rates = trainer.set_learning_rates()
        loss = trainer.train_step([next(batches) for _ in order.batches(step)])
        display.step(step + 1, epoch, loss, order.pictures_of(step), rates)

        end_of_epoch = (step + 1) % order.steps_per_epoch == 0
        if end_of_epoch:
            display.validating()
            evaluation = trainer.validate(validation_pictures)
            best = -math.inf if trainer.best_miou is None else trainer.best_miou
            is_best = evaluation.miou > best  # NaN, with nothing to validate on, is none
            trainer.miou = evaluation.miou
            if is_best:
                trainer.best_miou = evaluation.miou
                if processes.is_first:
                    run.save_model(run.best, trainer.model, trainer.facts(epoch))
            ious = dict(zip(trainer.classes, evaluation.iou.tolist(), strict=True))
            display.epoch(step + 1, epoch, epochs, evaluation.miou, ious, is_best)

        stopped = processes.any(stop.requested)
        if end_of_epoch or stopped or (checkpoint_every and (step + 1) % checkpoint_every == 0):
            state = trainer.state()
            if processes.is_first:
                run.save(state, trainer.model, trainer.facts(epoch))
        if stopped:
            break


class Trainer:
    """The network, its optimizer, and where the training stands.

    Args:
        options: of the run.
        classes: names of the K classes.
        processes: those that train together.
        steps: of the whole run.

    Raises:
        ValueError: options that do not fit the classes or the processes.
        CheckpointError: the pretrained weights can't be had or do not fit.
    """

    def __init__(self, options: TrainingOptions, classes: Sequence[str], processes: Processes, steps: int) -> None:
        weights = options.class_weights
        if weights is not None and len(weights) != len(classes):
            raise ValueError(f"class_weights must be {len(classes)} numbers, one per class, got {len(weights)}")
        if options.sync_bn and processes.device.type != "cuda":
            raise ValueError("sync_bn needs a GPU for each process; on a CPU there is freeze_bn")
        self.options, self.classes, self.processes, self.steps = options, tuple(classes), processes, steps
        self.step = 0
        self.miou: float | None = None
        self.best_miou: float | None = None

        torch.manual_seed(options.seed)
        self.model = _build_model(options, len(classes))
        if options.sync_bn:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model.to(processes.device, memory_format=self.layout)  # type: ignore[call-overload]
        if options.compile:
            self.model.compile()
        self.network: nn.Module = self.model
        if processes.count > 1:
            devices = [processes.device] if processes.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, device_ids=devices, gradient_as_bucket_view=True)
        self.criterion = SegmentationLoss(
            options.aux_weight,
            weight=None if weights is None else torch.tensor(weights),
            label_smoothing=options.label_smoothing,
            kernel=options.loss_kernel,
        ).to(processes.device)
        self.rates = _learning_rates(options)
        parts: dict[str, Any] = {
            "backbone": self.model.backbone,
            "head": self.model.classifier,
            "aux": self.model.aux_classifier,
        }
        self.optimizer = torch.optim.SGD(
            [
                {"params": list(part.parameters()), "lr": self.rates[name], "name": name}
                for name, part in parts.items()
                if part is not None
            ],
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=options.amp == "fp16")
        torch.manual_seed(options.seed + 1 + processes.rank)  # of the dropout, another in each process

    def set_learning_rates(self) -> dict[str, float]:
        """Those of the coming step, by parameter group."""
        options = self.options
        factor = learning_rate_factor(self.step, self.steps, power=options.power, warmup_steps=options.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.rates[group["name"]]
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}

    def train_step(self, batches: Sequence[Batch]) -> float:
        """Do a step and return the loss before it; on an error the weights are as they were.

        Raises:
            TrainingError: the loss or, but with fp16, a gradient is not finite.
        """
        self.optimizer.zero_grad()
        loss = self.compute_gradients(batches)
        if self.scaler.is_enabled():  # which leaves a step out where gradients overflow
            norm = torch.zeros_like(loss)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        value, norm_value = torch.stack([loss, norm]).tolist()
        scale = self.scaler.get_scale()
        if not math.isfinite(value):
            raise TrainingError(f"The loss is {value}")
        if not math.isfinite(norm_value) or scale < LEAST_SCALE:
            raise TrainingError("The gradients are not finite")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return float(value)

    def compute_gradients(self, batches: Sequence[Batch]) -> Tensor:
        """Add the gradients of these batches, of all processes, to the parameters'; return the loss of them all."""
        device = self.processes.device
        self._train_mode()
        targets = [target.to(device, non_blocking=True) for _, target in batches]
        weight = torch.stack([self.criterion.valid_weight(target) for target in targets]).sum()
        # DistributedDataParallel takes the mean of the processes' gradients, which is to be their sum.
        normalizer = self.processes.sum(weight) / self.processes.count
        loss = torch.zeros((), device=device)
        for i, ((images, _), target) in enumerate(zip(batches, targets, strict=True)):
            images = images.to(device, memory_format=self.layout, non_blocking=True)
            with self._communicating(i == len(batches) - 1):
                with torch.autocast(device.type, AMP_DTYPES[self.options.amp], enabled=self.options.amp != "none"):
                    outputs = self.network(images, upsample=False)
                part = self.criterion(outputs, target, normalizer)
                self.scaler.scale(part).backward()
            loss += part.detach()
        return self.processes.sum(loss) / self.processes.count

    def validate(self, pictures: SegmentationDataset) -> Evaluation:
        """Evaluate the model, each process on its share of the pictures."""
        own = _Share(pictures, range(self.processes.rank, len(pictures), self.processes.count))
        self.processes.copy_from_first(self.model.buffers())
        part = evaluate(self.model, own, workers=max(1, self.options.workers))
        confusion = self.processes.sum(part.confusion.to(self.processes.device)).cpu()
        return Evaluation(self.classes, confusion, len(pictures))

    def state(self) -> dict[str, Any]:
        """All that a resume needs; every process must ask for it. The buffers of all become those of the first."""
        self.processes.copy_from_first(self.model.buffers())
        random = {"cpu": torch.get_rng_state()}
        if self.processes.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.processes.device)
        return {
            "processes": self.processes.count,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self.processes.gather(random),
            "miou": self.miou,
            "best_miou": self.best_miou,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.miou, self.best_miou = state["step"], state["miou"], state["best_miou"]
        random = state["random"][self.processes.rank]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and self.processes.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.processes.device)

    def facts(self, epoch: int) -> dict[str, Any]:
        """What a file of weights says of itself."""
        return {"classes": list(self.classes), "epoch": epoch, "step": self.step, "miou": self.miou}

    def _train_mode(self) -> None:
        self.model.train()
        if self.options.freeze_bn:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _communicating(self, last: bool) -> Any:
        """Gradients go to the other processes once per step, with its last batch."""
        alone = last or not isinstance(self.network, DistributedDataParallel)
        return nullcontext() if alone else self.network.no_sync()  # type: ignore[operator]


@dataclass(frozen=True)
class _Share:
    """Some pictures of a data set; one that can't be read has a target that is ignored, and is named in a warning."""

    dataset: SegmentationDataset
    indices: Sequence[int]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        try:
            return self.dataset[self.indices[index]]
        except (ValueError, OSError) as error:
            warnings.warn(f"{self.name(index)} is left out: {error}", RuntimeWarning, stacklevel=2)
            return torch.zeros(3, 1, 1, dtype=torch.uint8), torch.full((1, 1), IGNORED, dtype=torch.uint8)

    def name(self, index: int) -> str:
        return self.dataset.name(self.indices[index])


@dataclass
class StopRequest:
    """Whether a signal has asked for the end."""

    requested: bool = False


@contextmanager
def _stop_on_signals(keep: bool) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request, which is met after the step.

    Unless ``keep``, a second signal acts as it would without this. Under torchrun a terminal's interrupt comes twice,
    once from the terminal and once passed on.
    """
    stop = StopRequest()
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        if not keep:
            restore()

    if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()


def _open_data(options: TrainingOptions, *, check: bool) -> tuple[SegmentationDataset, SegmentationDataset]:
    """The pictures to train and to validate on; with ``check``, every one of them has been read."""
    where: dict[str, Any] = {name: getattr(options, name) for name in ("root", "images", "masks", "classes", "size")}
    limits = {"train": options.limit, "val": options.val_limit}
    opened = [
        open_dataset(options.data, split, seed=options.seed, limit=limit, **where) for split, limit in limits.items()
    ]
    if check and options.check_data and options.data != "shapes":
        problems = [problem for dataset in opened for problem in check_dataset(dataset)]
        if problems:
            shown = "; ".join(map(str, problems[:5])) + ("; ..." if len(problems) > 5 else "")
            raise ValueError(
                f"{len(problems)} of {sum(map(len, opened))} pictures can't be used: {shown}. Mend or remove them, or "
                "train without them, without check_data"
            )
    return opened[0], opened[1]


def _augmentation(options: TrainingOptions) -> Augmentation:
    scene = options.size or SIZE if options.data == "shapes" else DEFAULT_CROP_SIZE
    return Augmentation(
        crop_size=options.crop_size or scene,
        scale=(options.scale_min, options.scale_max),
        flip=options.flip,
        brightness=options.jitter,
        contrast=options.jitter,
        saturation=options.jitter,
        hue=options.jitter / 6,
    )


def _load(pictures: Augmented, order: PictureOrder, trainer: Trainer, options: TrainingOptions) -> Iterator[Batch]:
    """The batches of the steps that are left, read ahead by the workers."""
    loader: DataLoader[Batch] = DataLoader(
        pictures,
        batch_sampler=_Batches(order, range(trainer.step, trainer.steps)),
        num_workers=options.workers,
        pin_memory=trainer.processes.device.type == "cuda",
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # leaves the global one as it is
    )
    return iter(loader)


@dataclass(frozen=True)
class _Batches:
    """As a DataLoader wants them."""

    order: PictureOrder
    steps: range

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.order.batches_of(self.steps)

    def __len__(self) -> int:
        return sum(len(self.order.batches(step)) for step in self.steps)


def _ignore_interrupts(worker: int) -> None:
    """An interrupt in a terminal goes to every process; the workers are needed until the step is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _build_model(options: TrainingOptions, num_classes: int) -> ResNetModel:
    model = ResNetModel(
        options.depth,
        num_classes,
        output_stride=options.output_stride,
        aux_head=options.aux_weight > 0,
        dropout=options.dropout,
        width=options.width,
        layers=options.layers,
    )
    source = options.pretrained
    if source in PUBLISHED:
        load_weights(model, source, skip_classifiers=source == "torchvision" and num_classes != PUBLISHED_CLASSES)
    elif source is not None:
        _, weights, _ = to_torchvision(read_state_dict(source)[0])
        classifier, has_aux = weights.get("classifier.4.weight"), any(key.startswith("aux_") for key in weights)
        load_weights(
            model,
            source,
            skip_classifiers=classifier is not None and len(classifier) != num_classes,
            drop_aux=model.aux_classifier is None or not has_aux,
        )
    return model


def _learning_rates(options: TrainingOptions) -> dict[str, float]:
    """At the schedule's top, by parameter group."""
    backbone = options.lr * (1.0 if options.pretrained is None else BACKBONE_SHARE)
    return {
        "backbone": backbone if options.backbone_lr is None else options.backbone_lr,
        "head": options.lr,
        "aux": options.lr if options.aux_lr is None else options.aux_lr,
    }


def _reason(error: Exception, step: int) -> str:
    """Why a run had to end at a step, in a sentence without its full stop."""
    first_line = str(error).partition("\n")[0].rstrip(". ")
    if isinstance(error, torch.OutOfMemoryError):
        return f"Out of memory at step {step}: a smaller batch_size with accumulate trains the same ({first_line})"
    if isinstance(error, OSError):
        return f"A file could not be written or read at step {step}: {first_line}"
    if isinstance(error, TrainingError):
        return (
            f"{first_line} at step {step}: try a smaller lr, warmup_steps, or another amp; check_data finds bad masks"
        )
    if "DataLoader worker" in first_line:
        return f"A process that reads pictures ended at step {step}: {first_line}. It may have been short of memory"
    return f"The run failed at step {step}: {first_line}"
