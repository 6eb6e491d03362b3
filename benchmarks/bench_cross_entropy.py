"""``upsample_cross_entropy``, forward and backward, against ``cross_entropy(interpolate)``.

``pytest benchmarks/bench_cross_entropy.py [--csv FILE]``. One head, and a main and an auxiliary head as in training.
On a GPU the shapes of DeepLabV3, on a CPU small ones and no kernel, so that the benchmark itself is tested.

The rivals on bf16 logits: ``fp32`` converts the logits first; ``bf16`` interpolates in bf16 and computes the loss in
fp32, as autocast does.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, DEVICE, LOGITS, Case, Record, compiled
from fastdeeplab.kernels import reference
from fastdeeplab.kernels.measure import relative_error
from roofline import cross_entropy_work
from torch import Tensor

from fastdeeplab import kernels

IGNORED = 255
AUX_WEIGHT = 0.4

if DEVICE.type == "cuda":
    SHAPES = [(16, classes, (64, 64), (512, 512)) for classes in CLASSES]
    SHAPES += [(16, classes, (32, 32), (512, 512)) for classes in CLASSES]
    SHAPES += [(16, 21, (65, 65), (520, 520)), (2, 19, (128, 256), (1024, 2048))]
else:
    SHAPES = [(2, 21, (8, 8), (64, 64)), (1, 150, (9, 9), (66, 66))]

# Of the loss and of each gradient, ||difference|| / ||fp64||. Gradients of bf16 logits are rounded once at the end; by
# the rivals that interpolate in bf16 also in the upsampled logits and in every addition of the backward.
TOLERANCES = {"fp32": 1e-5, "rounded": 2 * torch.finfo(torch.bfloat16).eps, "bf16": 0.1}

Loss = Callable[[Tensor, Tensor], Tensor]


def implementations(dtype: torch.dtype) -> list[str]:
    rounded = ["eager-bf16", "compiled-bf16"] if dtype == torch.bfloat16 else []
    ours = ["torch", "triton"] if DEVICE.type == "cuda" else ["torch"]
    return ["eager-fp32", "compiled-fp32", *rounded, "deterministic-fp32", *ours]


def eager(logits: Tensor, target: Tensor, compute: torch.dtype) -> Tensor:
    full = F.interpolate(logits.to(compute), size=target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full.float(), target, ignore_index=IGNORED)


def deterministic(logits: Tensor, target: Tensor) -> Tensor:
    """The mean as a sum over pixels, because PyTorch's own mean has no deterministic CUDA implementation."""
    full = F.interpolate(logits.float(), size=target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(full, target, ignore_index=IGNORED, reduction="none").sum() / (target != IGNORED).sum()


def all_heads(loss: Loss, heads: tuple[Tensor, ...], target: Tensor) -> Tensor:
    main, *aux = (loss(logits, target) for logits in heads)
    return main + AUX_WEIGHT * aux[0] if aux else main


def build(implementation: str) -> Callable[..., tuple[Tensor, ...]]:
    """A function of (target, logits of each head) that returns the loss and the gradient of each head."""
    name, _, kind = implementation.partition("-")
    if name in ("torch", "triton"):
        loss: Loss = functools.partial(kernels.upsample_cross_entropy, ignore_index=IGNORED, impl=name)
    elif name == "deterministic":
        loss = deterministic
    else:
        loss = functools.partial(eager, compute=torch.bfloat16 if kind == "bf16" else torch.float32)
    forward: Callable[..., Tensor] = functools.partial(all_heads, loss)
    if name == "compiled":
        forward = compiled(forward)

    def forward_and_backward(target: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
        with deterministic_algorithms(name == "deterministic"):
            value = forward(heads, target)
            return value.detach(), *torch.autograd.grad(value, heads)

    return forward_and_backward


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """PyTorch's switch, without the filling of new tensors that it turns on: determinism does not need it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(enabled)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def in_fp64(target: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
    """The loss and the gradient of each head in fp64, picture by picture to save memory."""
    pixels = (target != IGNORED).sum()
    value = torch.zeros((), dtype=torch.float64, device=target.device)
    gradients = []
    for logits, factor in zip(heads, (1, AUX_WEIGHT), strict=False):
        pictures = []
        for picture, its_target in zip(logits.detach().double().split(1), target.split(1), strict=True):
            picture.requires_grad_()
            total = reference.upsample_cross_entropy(picture, its_target, ignore_index=IGNORED, reduction="sum")
            part = factor * total / pixels
            pictures += torch.autograd.grad(part, picture)
            value += part.detach()
        gradients.append(torch.cat(pictures))
    return value, *gradients


def tolerance(implementation: str, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return TOLERANCES["fp32"]
    return TOLERANCES["bf16" if implementation.endswith("bf16") else "rounded"]


CASES = [
    pytest.param(case, heads, implementation, id=f"{case}-{heads}head-{implementation}")
    for dtype, layout in LOGITS
    for case in (Case(*shape, dtype, layout) for shape in SHAPES)
    for heads in (1, 2)
    for implementation in implementations(dtype)
]


@pytest.mark.parametrize(("case", "heads", "implementation"), CASES)
def test_upsample_cross_entropy(case: Case, heads: int, implementation: str, record: Record) -> None:
    generator = torch.Generator(DEVICE).manual_seed(2)
    target = torch.randint(case.classes, (case.batch, *case.full), device=DEVICE, generator=generator)
    target[torch.rand(target.shape, device=DEVICE, generator=generator) < 0.05] = IGNORED
    record(
        "upsample_cross_entropy",
        implementation,
        case,
        build(implementation),
        [target, *(case.logits(seed).requires_grad_() for seed in range(heads))],
        in_fp64,
        tolerance(implementation, case.dtype),
        relative_error,
        cross_entropy_work(
            case.batch,
            case.classes,
            case.low,
            case.full,
            logit_bytes=case.dtype.itemsize,
            target_bytes=target.dtype.itemsize,
            heads=heads,
        ),
        shape=f"{case.shape} {heads} head{'s' if heads > 1 else ''}",
    )
