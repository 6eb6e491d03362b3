"""A training step with the fused upsampling and cross-entropy, against one with full-size logits.

``pytest benchmarks/bench_train.py [--csv FILE]``. Forward, loss with the auxiliary head, backward; what comes after is
the same for all. On a GPU the ResNet-50 at output stride 8 in bf16 by autocast, 16 pictures of 512x512; on a CPU a
narrow one in fp32, two pictures.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, Record
from fastdeeplab.kernels.measure import relative_error
from torch import Tensor

import fastdeeplab as fdl

IGNORED = 255
AUX_WEIGHT = 0.4
CLASSES = (21, 150)
SIZE = (512, 512)
BATCH, WIDTH, LAYERS = (16, 1.0, None) if DEVICE.type == "cuda" else (2, 0.125, (1, 1, 1, 1))
TOLERANCE = 0.05 if DEVICE.type == "cuda" else 1e-4  # bf16 against fp32, and fp32 added up in another order

Loss = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class StepCase:
    classes: int
    layout = "channels_last"
    dtype_name = "bf16" if DEVICE.type == "cuda" else "fp32"

    @property
    def shape(self) -> str:
        return "{}x3x{}x{} K={} width {}".format(BATCH, *SIZE, self.classes, WIDTH)

    def __str__(self) -> str:
        return f"K{self.classes}"


def plain_loss(outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
    def cross_entropy(logits: Tensor) -> Tensor:
        full = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(full.float(), target, ignore_index=IGNORED)

    return cross_entropy(outputs["out"]) + AUX_WEIGHT * cross_entropy(outputs["aux"])


def loss_of(implementation: str) -> Loss:
    if implementation == "plain":
        return plain_loss
    return fdl.SegmentationLoss(AUX_WEIGHT, ignore_index=IGNORED, kernel=implementation)


@functools.lru_cache(maxsize=1)
def network(classes: int) -> fdl.ResNetModel:
    torch.manual_seed(0)
    model = fdl.ResNetModel(50, classes, width=WIDTH, layers=LAYERS, dropout=0.0)
    return model.to(DEVICE, memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def step(model: fdl.ResNetModel, loss: Loss, autocast: bool, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The loss, and the gradients of both classifiers."""
    model.zero_grad()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        outputs = model(images, upsample=False)
        value = loss(outputs, target)
    value.backward()
    assert model.aux_classifier is not None
    classifiers = (model.classifier[4], model.aux_classifier[4])
    return value.detach(), *(classifier.weight.grad for classifier in classifiers)


@pytest.mark.parametrize("implementation", ["plain", "torch", "triton"])
@pytest.mark.parametrize("case", [StepCase(classes) for classes in CLASSES], ids=str)
def test_training_step(case: StepCase, implementation: str, record: Record) -> None:
    if implementation == "triton" and DEVICE.type != "cuda":
        pytest.skip("needs an NVIDIA GPU")
    generator = torch.Generator(DEVICE).manual_seed(3)
    images = torch.randn((BATCH, 3, *SIZE), device=DEVICE, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    target = torch.randint(case.classes, (BATCH, *SIZE), device=DEVICE, generator=generator)
    target[torch.rand(target.shape, device=DEVICE, generator=generator) < 0.05] = IGNORED
    model = network(case.classes)
    record(
        "training step",
        implementation,
        case,
        functools.partial(step, model, loss_of(implementation), DEVICE.type == "cuda"),
        [images, target],
        functools.partial(step, model, loss_of("torch" if implementation == "plain" else "plain"), False),
        TOLERANCE,
        relative_error,
        None,
    )
