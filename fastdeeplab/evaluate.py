"""How good masks are: the intersection over union of every class, from one confusion matrix. Needs torchmetrics."""

import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from fastdeeplab.accelerate import AcceleratedModel, accelerate
from fastdeeplab.atomic import replace_when_complete
from fastdeeplab.data.dataset import IGNORED, SegmentationDataset
from fastdeeplab.pictures import percent
from fastdeeplab.segmenter import IMAGENET_MEAN, IMAGENET_STD, smallest_dtype

COUNTED = 2**25  # pixels, or comparisons of pixels, that are counted at once


@dataclass(frozen=True)
class Evaluation:
    """A confusion matrix over all pixels that are not ignored, and what follows from it.

    Attributes:
        classes: names of the K classes.
        confusion: (K, K) int64 on the CPU: pixels by the target's class (row) and the predicted one (column).
        pictures: how many were segmented.
    """

    classes: tuple[str, ...]
    confusion: Tensor
    pictures: int

    @property
    def iou(self) -> Tensor:
        """(K,) fp64: intersection over union; NaN for a class that neither the targets nor the predictions have."""
        confusion = self.confusion.double()
        both = confusion.diagonal()
        return both / (confusion.sum(0) + confusion.sum(1) - both)

    @property
    def miou(self) -> float:
        """The mean of `iou` without its NaN: a class counts that is in a target or was predicted anywhere."""
        return self.iou.nanmean().item()

    @property
    def pixel_accuracy(self) -> float:
        """The part of the pixels whose class was predicted; NaN if all are ignored."""
        confusion = self.confusion.double()
        return (confusion.diagonal().sum() / confusion.sum()).item()

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold; None where a value is NaN."""
        pixels = self.confusion.sum(1)
        return {
            "miou": _or_none(self.miou),
            "pixel_accuracy": _or_none(self.pixel_accuracy),
            "pictures": self.pictures,
            "classes": [
                {"name": name, "iou": _or_none(iou), "pixels": count}
                for name, iou, count in zip(self.classes, self.iou.tolist(), pixels.tolist(), strict=True)
            ],
            "confusion": self.confusion.tolist(),
        }

    def table(self) -> Table:
        """Every class with its IoU and its share of the targets' pixels, then the mean."""
        pixels = self.confusion.sum(1)
        table = Table("class", "IoU", "of the pixels", title=f"{self.pictures} pictures", title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, iou, count in zip(self.classes, self.iou.tolist(), pixels.tolist(), strict=True):
            table.add_row(name, _shown(iou), percent(count / max(1, int(pixels.sum()))))
        table.add_section()
        table.add_row("mIoU", _shown(self.miou), "")
        table.add_row("pixel accuracy", _shown(self.pixel_accuracy), "")
        return table


def evaluate(
    model: nn.Module,
    dataset: SegmentationDataset,
    *,
    batch_size: int = 1,
    workers: int = 2,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
    skip: Callable[[Exception], None] | None = None,
) -> Evaluation:
    """Segment every picture of a data set at its own size, and compare the masks with the targets.

    An accelerated copy of the model runs. Its logits are upsampled to the picture's size and turned into classes in
    one pass, so full-size logits are never held. In a distributed run each process evaluates what it is given.

    Args:
        model: a ``ResNetModel`` or torchvision's DeepLabV3, which is left as it is, or an accelerated model.
        dataset: pictures of any sizes, with as many classes as the model.
        batch_size: how many pictures that follow each other and have one size go through the network at once.
        workers: threads that read pictures ahead.
        device: where the network runs; by default where the model is. An accelerated model is moved there.
        dtype: what ``accelerate`` casts the weights to; by default they keep theirs.
        progress: called with the number of pictures done so far, after each batch.
        skip: called with the error of each picture or mask that can't be used, which is left out; by default the
            first such error is raised.

    Raises:
        ValueError: the model or an argument does not fit, or a picture or mask can't be used; the message names it.
        ImportError: the package torchmetrics is missing.
    """
    if batch_size < 1 or workers < 1:
        raise ValueError(f"batch_size and workers must be at least 1, got {batch_size} and {workers}")
    fast: Any = model if isinstance(model, AcceleratedModel) and dtype is None else accelerate(model, dtype=dtype)
    num_classes = len(dataset.classes)
    if fast.config["num_classes"] != num_classes:
        raise ValueError(f"the model has {fast.config['num_classes']} classes, the data set {num_classes}")
    if fast.config["in_channels"] != 3:
        raise ValueError(f"pictures have 3 channels, the model takes {fast.config['in_channels']}")
    fast = fast if device is None else fast.to(device)
    weight = fast.backbone.conv1.weight
    mean, std = (torch.tensor(values).view(3, 1, 1).to(weight.device) for values in (IMAGENET_MEAN, IMAGENET_STD))

    metric = _confusion_metric()(num_classes, ignore_index=IGNORED, validate_args=False, sync_on_compute=False)
    metric = metric.to(weight.device)
    done = 0
    for images, targets in _batches(dataset, batch_size, workers, skip):
        normalised = images.to(weight.device).float().div_(255).sub_(mean).div_(std)
        masks = fast.predict(normalised, dtype=smallest_dtype(num_classes))
        pixels = _pixels_at_once(num_classes)
        for part in zip(masks.flatten().split(pixels), targets.to(weight.device).flatten().split(pixels), strict=True):
            metric.update(*part)
        done += len(images)
        if progress is not None:
            progress(done)
    confusion: Tensor = metric.confmat.cpu()
    return Evaluation(tuple(dataset.classes), confusion.long(), done)


def _pixels_at_once(num_classes: int) -> int:
    """How many pixels to count at once: where PyTorch is deterministic, torchmetrics holds K * K values of each."""
    return max(1, COUNTED // num_classes**2) if torch.are_deterministic_algorithms_enabled() else COUNTED


def _batches(
    dataset: SegmentationDataset, batch_size: int, workers: int, skip: Callable[[Exception], None] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Neighbours of one size, stacked: (B, 3, H, W) and (B, H, W), both uint8; read by threads, a few ahead."""
    images: list[Tensor] = []
    targets: list[Tensor] = []
    for sample in _read_ahead(dataset, workers):
        try:
            image, target = sample.result()
        except (ValueError, OSError) as error:
            if skip is None:
                raise
            skip(error)
            continue
        if images and (len(images) == batch_size or image.shape != images[0].shape):
            yield torch.stack(images), torch.stack(targets)
            images, targets = [], []
        images.append(image)
        targets.append(target)
    if images:
        yield torch.stack(images), torch.stack(targets)


def _read_ahead(dataset: SegmentationDataset, workers: int) -> Iterator[Future[tuple[Tensor, Tensor]]]:
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[tuple[Tensor, Tensor]]] = deque()
        for index in range(len(dataset)):
            waiting.append(pool.submit(_read, dataset, index))
            if len(waiting) > 2 * workers:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


def _read(dataset: SegmentationDataset, index: int) -> tuple[Tensor, Tensor]:
    image, target = dataset[index]
    classes = len(dataset.classes)
    if image.shape[1:] != target.shape:
        raise ValueError(f"{dataset.name(index)}: image {tuple(image.shape)} and target {tuple(target.shape)} differ")
    if strays := target[(target >= classes) & (target != IGNORED)].unique().tolist():
        raise ValueError(f"{dataset.name(index)}: the target has the class {strays[0]}, where there are {classes}")
    return image, target


def _confusion_metric() -> Any:
    """torchmetrics' class, also where a torchvision is installed that does not fit PyTorch.

    torchmetrics imports torchvision for other metrics wherever it is installed, and that import may raise.
    """
    try:
        from torchmetrics.classification import MulticlassConfusionMatrix
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("torchmetrics"):
            raise
        raise ImportError("evaluation needs the package torchmetrics: pip install 'fastdeeplab[training]'") from error
    except RuntimeError:
        found = sys.modules.get("torchmetrics.utilities.imports")
        if found is None or "torchvision" in sys.modules:
            raise
        found._TORCHVISION_AVAILABLE.available = False  # as it is: it can't be imported
        from torchmetrics.classification import MulticlassConfusionMatrix
    return MulticlassConfusionMatrix


def write_json(path: str | os.PathLike[str], evaluation: Evaluation) -> None:
    """Write `Evaluation.to_json`; the file appears when it is complete. Raises OSError if it can't be written."""
    with replace_when_complete(path) as partial:
        partial.write_text(json.dumps(evaluation.to_json(), indent=2, allow_nan=False) + "\n")


def write_chart(path: str | os.PathLike[str], evaluation: Evaluation) -> None:
    """Draw the IoU of every class that occurs as bars into a PNG, the mean as a line. Needs matplotlib.

    Raises OSError if it can't be written, ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError("a chart needs the package matplotlib: pip install 'fastdeeplab[plots]'") from error

    rows = list(zip(evaluation.classes, evaluation.iou.tolist(), strict=True))
    rows = [(name, iou) for name, iou in rows if not math.isnan(iou)]
    figure = Figure(figsize=(7, 1.4 + 0.25 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(rows)), [iou for _, iou in rows], color="tab:blue")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("intersection over union")
    axes.set_title(f"mIoU {_shown(evaluation.miou)}, {evaluation.pictures} pictures")
    if rows:
        axes.axvline(evaluation.miou, color="black", linestyle="--", linewidth=1)
    with replace_when_complete(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
