"""The network, its optimizer and one step of the training, in one process of several."""

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fastdeeplab.checkpoint import PUBLISHED, load_weights
from fastdeeplab.convert import to_torchvision
from fastdeeplab.data import SegmentationDataset
from fastdeeplab.evaluate import Evaluation, evaluate
from fastdeeplab.kernels.choice import choose
from fastdeeplab.loss import SegmentationLoss
from fastdeeplab.model import ResNetModel
from fastdeeplab.training.interrupts import StopRequest
from fastdeeplab.training.options import TrainingOptions
from fastdeeplab.training.pictures import Batch, Share
from fastdeeplab.training.processes import Processes
from fastdeeplab.training.schedule import learning_rate_factor
from fastdeeplab.weights_file import read_state_dict

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PUBLISHED_CLASSES = 21  # of torchvision's whole networks
LEAST_SCALE = 2.0**-20  # of fp16's loss; below it, gradients were not finite at any scale before
BACKBONE_SHARE = 0.1  # of the head's learning rate, for a backbone that is pretrained


class TrainingError(RuntimeError):
    """A run had to end. The message says why, and which checkpoint it leaves."""


class _Stopped(Exception):  # noqa: N818 (no error)
    """A validation was asked to stop."""


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
        dtype = AMP_DTYPES[options.amp] or torch.float32  # of the logits
        loss = choose(SegmentationLoss.kernel_function, options.loss_kernel, processes.device, dtype)
        if loss.impl == "nothing":
            raise ValueError(f"loss_kernel must be another: {loss.why}")
        self.options, self.classes, self.processes, self.steps = options, tuple(classes), processes, steps
        self.step = 0
        self.validation_due = False  # at the end of an epoch, until it is done
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

    @property
    def finished(self) -> bool:
        return self.step == self.steps and not self.validation_due

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

    def validate(self, pictures: SegmentationDataset, stop: StopRequest) -> Evaluation | None:
        """Evaluate the model, each process on its share of the pictures; None once any process is asked to stop.

        A picture that can't be used is named in a warning and left out.
        """
        own = Share(pictures, range(self.processes.rank, len(pictures), self.processes.count))
        self.processes.copy_from_first(self.model.buffers())

        def ask(*_: object) -> None:
            """After each picture, in all processes alike."""
            if self.processes.any(stop.requested):
                raise _Stopped

        def skip(error: Exception) -> None:
            warnings.warn(f"A picture to validate on is left out: {error}", RuntimeWarning, stacklevel=2)
            ask()

        try:
            part = evaluate(self.model, own, workers=max(1, self.options.workers), progress=ask, skip=skip)
            if len(own) * self.processes.count < len(pictures):  # other processes have one more
                ask()
        except _Stopped:
            return None
        confusion = self.processes.sum(part.confusion.to(self.processes.device)).cpu()
        return Evaluation(self.classes, confusion, sum(self.processes.gather(part.pictures)))

    def state(self) -> dict[str, Any]:
        """All that a resume needs; every process must ask for it. The buffers of all become those of the first."""
        self.processes.copy_from_first(self.model.buffers())
        random = {"cpu": torch.get_rng_state()}
        if self.processes.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.processes.device)
        return {
            "processes": self.processes.count,
            "step": self.step,
            "validation_due": self.validation_due,
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
        self.step, self.validation_due = state["step"], state["validation_due"]
        self.miou, self.best_miou = state["miou"], state["best_miou"]
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
