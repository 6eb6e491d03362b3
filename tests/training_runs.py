"""Small training runs, and what one of their steps computes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdeeplab.data import Shapes
from fastdeeplab.training.options import TrainingOptions
from fastdeeplab.training.processes import Processes
from fastdeeplab.training.trainer import Trainer

SMALL: dict[str, Any] = {
    "size": 32,
    "limit": 9,
    "val_limit": 3,
    "width": 0.125,
    "layers": (1, 1, 1, 1),
    "epochs": 2,
    "batch_size": 4,
    "workers": 0,
    "device": "cpu",
    "tensorboard": False,
}
CLASSES = Shapes.classes
ALONE = Processes(0, 1, torch.device("cpu"))


def options(out: Path, **changed: object) -> TrainingOptions:
    """Of 3 steps per epoch, the last of a single picture."""
    return TrainingOptions(out=str(out), **(SMALL | changed))  # type: ignore[arg-type]


def frozen_trainer(out: Path, processes: Processes = ALONE, **changed: object) -> Trainer:
    """Whose gradients depend on each picture by itself."""
    return Trainer(options(out, freeze_bn=True, dropout=0.0, **changed), CLASSES, processes, 10)


def batch_of(pictures: int, ignored: int = 0) -> tuple[Tensor, Tensor]:
    """Images and targets; the first ``ignored`` pictures have hardly a valid pixel."""
    dataset = Shapes(size=32, limit=pictures)
    images, targets = (torch.stack(parts) for parts in zip(*(dataset[i] for i in range(pictures)), strict=True))
    targets[:ignored, 1:] = 255
    return images.float() / 128 - 1, targets


def gradients(trainer: Trainer, batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step, and the gradient of each parameter."""
    trainer.optimizer.zero_grad()
    loss = trainer.compute_gradients(batches)
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """But for the order of the additions."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-9)
