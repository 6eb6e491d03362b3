"""The pictures of a training run: opened, checked, shared out, augmented and read ahead."""

import os
import signal
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastdeeplab.data import IGNORED, Augmentation, Augmented, Problem, SegmentationDataset, check_dataset, open_dataset
from fastdeeplab.data.shapes import SIZE
from fastdeeplab.training.options import TrainingOptions
from fastdeeplab.training.processes import Processes
from fastdeeplab.training.schedule import PictureOrder

DEFAULT_CROP_SIZE = 512

Batch = tuple[Tensor, Tensor]  # images (B, 3, h, w) fp32, target (B, h, w) uint8


def open_pictures(options: TrainingOptions) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Those to train and those to validate on."""
    where: dict[str, Any] = {name: getattr(options, name) for name in ("root", "images", "masks", "classes", "size")}
    limits = {"train": options.limit, "val": options.val_limit}
    opened = [
        open_dataset(options.data, split, seed=options.seed, limit=limit, **where) for split, limit in limits.items()
    ]
    return opened[0], opened[1]


def fingerprint(pictures: SegmentationDataset) -> int:
    """Of the pictures' names in their order: another one where a picture was added, removed or renamed.

    Not of their folder's, which may have moved.
    """
    names = (os.path.basename(pictures.name(index)) for index in range(len(pictures)))  # noqa: PTH119 (also no path)
    return zlib.crc32("\n".join(names).encode(errors="surrogateescape"))


def check_pictures(
    datasets: Sequence[SegmentationDataset], processes: Processes, progress: Callable[[int], None]
) -> None:
    """Read every picture and mask, each process its share, and warn of classes that no training mask has.

    Args:
        datasets: the pictures to train on, then others.
        progress: called after each picture with how many this process has read.

    Raises:
        ValueError: in every process, if some can't be used; each is named.
    """
    problems: list[Problem] = []
    done = 0
    shares = [Watched(dataset, range(processes.rank, len(dataset), processes.count)) for dataset in datasets]
    for own in shares:

        def count(read: int, before: int = done) -> None:
            progress(before + read)

        problems += check_dataset(own, progress=count)
        done += len(own)
    found = [str(problem) for part in processes.gather(problems) for problem in part]
    if found:
        raise ValueError(
            "\n".join([f"{len(found)} of {sum(map(len, datasets))} pictures can't be used:", *found])
            + "\nMend or remove them, or train without them, without check_data"
        )
    values: set[int] = set().union(*processes.gather(shares[0].values))
    absent = [name for index, name in enumerate(datasets[0].classes) if index not in values]
    if absent and processes.is_first:
        listed = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        hint = "; some masks have 255, which is no class but ignored" if IGNORED in values else ""
        warnings.warn(f"No mask to train on has these classes: {listed}{hint}", RuntimeWarning, stacklevel=2)


@dataclass(frozen=True)
class Share:
    """Some pictures of a data set."""

    dataset: SegmentationDataset
    indices: Sequence[int]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.dataset.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.dataset[self.indices[index]]

    def name(self, index: int) -> str:
        return self.dataset.name(self.indices[index])


@dataclass(frozen=True)
class Watched(Share):
    """It keeps the values of all targets that were read, by whatever thread."""

    values: set[int] = field(default_factory=set)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = super().__getitem__(index)
        self.values.update(torch.bincount(target.flatten()).nonzero().flatten().tolist())
        return image, target


@contextmanager
def reading(
    samples: Augmented, order: PictureOrder, steps: range, *, workers: int, pin_memory: bool
) -> Iterator[Iterator[Batch]]:
    """The batches of these steps, read ahead by the workers, which end with the context.

    By themselves they would end when nothing refers to the batches any more: not while an error is kept whose traceback
    does. Python would then wait for them at its own end, with a signal that they outlive.
    """
    loader: DataLoader[Batch] = DataLoader(
        samples,
        batch_sampler=_Batches(order, steps),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_outlive_interrupts,
        generator=torch.Generator(),  # leaves the global one as it is
    )
    batches = iter(loader)
    try:
        yield batches
    finally:
        if workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]


def augmentation_of(options: TrainingOptions) -> Augmentation:
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


@dataclass(frozen=True)
class _Batches:
    """As a DataLoader wants them."""

    order: PictureOrder
    steps: range

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.order.batches_of(self.steps)

    def __len__(self) -> int:
        return sum(len(self.order.batches(step)) for step in self.steps)


def _outlive_interrupts(worker: int) -> None:
    """The workers are needed until the step is done.

    An interrupt in a terminal, and the end of a service or a job, go to every process. A second SIGTERM ends a worker.
    """

    def once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, once)
