"""Measure what may upsample logits and take the argmax: the kernel with each of its strips, and PyTorch.

The indices are compared with logits that are upsampled in fp64 before anything is timed.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library
from .candidates import STRIPS, Gpu, Strip, Tail
from .choice import why_not
from .decisions import TailMeasurement, versions
from .tuning import Timer, time_each

FORM = "chunks"  # the library's only one
TOLERANCE = 1e-5  # of ``shortfall``: interpolation is in fp32


def candidates(tail: Tail, device: torch.device) -> int:
    """How many there are; none where the kernel can't run."""
    return 0 if why_not(device, tail.dtype) else len(STRIPS) + 1


def tune_tail(
    tail: Tail, device: torch.device, *, seconds: float = 0.05, until: float = math.inf, timer: Timer | None = None
) -> TailMeasurement | None:
    """Measure the kernel with each strip, and PyTorch, on random logits; the arguments are those of ``tuning.tune``.

    Returns:
        The fastest strip and PyTorch; None if time is too short for all of them, or all are wrong.
    """
    logits = random_logits(tail, device)

    def error(indices: Tensor, _: None) -> float:
        return shortfall(indices, logits, (tail.H, tail.W))

    def timed(calls: dict[Strip, Callable[..., Tensor]]) -> dict[Strip, float]:
        return time_each(tail, calls, [logits], error, TOLERANCE, seconds=seconds, until=until, timer=timer)

    strips = timed({strip: kernel_call(tail, strip) for strip in STRIPS})
    forms = time_each(
        tail, {FORM: library_call(tail)}, [logits], error, TOLERANCE, seconds=seconds, until=until, timer=timer
    )
    if not forms or min(*strips.values(), *forms.values()) == math.inf:
        return None
    gpu, (torch_version, triton_version) = Gpu.of(device), versions()
    strip = min(strips, key=lambda strip: strips[strip])
    return TailMeasurement(
        gpu=gpu.name,
        capability=gpu.capability,
        torch=torch_version,
        triton=triton_version,
        layer=tail,
        tile=strip,
        tile_us=strips[strip],
        form=FORM,
        form_us=forms[FORM],
    )


def compile_strips(tail: Tail, device: torch.device) -> None:
    """Run the kernel once with each strip, so that ``tune_tail`` finds it compiled and reports what fails."""
    if device.type != "cuda":  # the interpreter compiles nothing
        return
    logits = random_logits(tail, device)
    for strip in STRIPS:
        with suppress(Exception):
            kernel_call(tail, strip)(logits)
    torch.cuda.synchronize(device)


def random_logits(tail: Tail, device: torch.device) -> Tensor:
    """(N, K, h, w); in channels_last memory a pixel's logits are padded as an accelerated model's are."""
    generator = torch.Generator(device).manual_seed(0)
    padded = -(-tail.K // 8) * 8 if tail.channels_last else tail.K
    values = torch.randn(tail.N, padded, tail.h, tail.w, device=device, generator=generator).to(tail.dtype)
    if tail.channels_last:
        values = values.contiguous(memory_format=torch.channels_last)
    return values[:, : tail.K]


def kernel_call(tail: Tail, strip: Strip) -> Callable[..., Tensor]:
    """The kernel with one strip, as a function of logits."""

    def run(logits: Tensor) -> Tensor:
        launcher = importlib.import_module(".argmax", __package__).upsample_argmax
        indices: Tensor = launcher(logits, (tail.H, tail.W), torch.int64, tile=strip)
        return indices

    return run


def library_call(tail: Tail) -> Callable[..., Tensor]:
    """PyTorch, as a function of logits."""
    return lambda logits: library.upsample_argmax(logits, (tail.H, tail.W))


def shortfall(indices: Tensor, logits: Tensor, size: Sequence[int]) -> float:
    """How far, by the largest logit, a pixel's class is below the best one in fp64 at most; inf if it is no class."""
    N, K = logits.shape[:2]
    if tuple(indices.shape) != (N, *size) or int(indices.min()) < 0 or int(indices.max()) >= K:
        return math.inf
    worst = 0.0
    for image, index in zip(logits, indices, strict=True):  # for memory
        full = F.interpolate(image[None].double(), size=tuple(size), mode="bilinear", align_corners=False)[0]
        worst = max(worst, float((full.amax(0) - full.gather(0, index.long()[None])[0]).max()))
    return worst / float(logits.double().abs().max())
