"""``upsample_argmax`` against ``interpolate`` + ``argmax``: ``pytest benchmarks/bench_argmax.py [--csv FILE]``.

On a GPU the shapes of DeepLabV3, on a CPU small ones and no kernel, so that the benchmark itself is tested.
"""

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, DEVICE, LOGITS, Case, Record, compiled
from roofline import SIZES, argmax_work
from torch import Tensor

from fastdeeplab import kernels

if DEVICE.type == "cuda":
    SHAPES = [(batch, classes, low, full) for batch, low, full in SIZES.values() for classes in CLASSES]
else:
    SHAPES = [(2, 19, (8, 8), (64, 64)), (2, 21, (8, 8), (64, 64)), (1, 150, (9, 9), (66, 66))]

# The largest amount by which the chosen class may fall short of the best, relative to the largest logit: a few times
# what the interpolation rounds.
TOLERANCES = {torch.float32: 8 * torch.finfo(torch.float32).eps, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps}


def implementations(dtype: torch.dtype) -> list[str]:
    rounded = ["eager-bf16", "compiled-bf16"] if dtype == torch.bfloat16 else []
    ours = ["torch", "triton", "triton-uint8"] if DEVICE.type == "cuda" else ["torch"]
    return ["eager-fp32", "compiled-fp32", *rounded, *ours]


def upsample_argmax(logits: Tensor, size: tuple[int, int], compute: torch.dtype) -> Tensor:
    return F.interpolate(logits.to(compute), size=size, mode="bilinear", align_corners=False).argmax(1)


def build(implementation: str, size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    name, _, kind = implementation.partition("-")
    if name in ("torch", "triton"):
        dtype = torch.uint8 if kind == "uint8" else torch.int64
        return functools.partial(kernels.upsample_argmax, size=size, dtype=dtype, impl=name)
    compute = torch.bfloat16 if kind == "bf16" else torch.float32
    rival = functools.partial(upsample_argmax, size=size, compute=compute)
    return compiled(rival) if name == "compiled" else rival


def full_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)


def shortfall(indices: Tensor, full: Tensor) -> float:
    """How far, in fp64, the chosen class's logit is below the best at the worst pixel, relative to the largest logit.

    0 if every index is the fp64 argmax; at a near-tie, the distance of the two.
    """
    expected_shape = (full.shape[0], *full.shape[2:])
    if indices.shape != expected_shape or indices.min() < 0 or indices.max() >= full.shape[1]:
        return math.inf
    chosen = full.gather(1, indices.long()[:, None])[:, 0]
    return float((full.amax(1) - chosen).max() / full.abs().max())


CASES = [
    pytest.param(case, implementation, id=f"{case}-{implementation}")
    for dtype, layout in LOGITS
    for case in (Case(*shape, dtype, layout) for shape in SHAPES)
    for implementation in implementations(dtype)
]


@pytest.mark.parametrize(("case", "implementation"), CASES)
def test_upsample_argmax(case: Case, implementation: str, record: Record) -> None:
    record(
        "upsample_argmax",
        implementation,
        case,
        build(implementation, case.full),
        [case.logits()],
        functools.partial(full_logits, size=case.full),
        TOLERANCES[torch.bfloat16 if implementation.endswith("bf16") else torch.float32],
        shortfall,
        argmax_work(
            case.batch,
            case.classes,
            case.low,
            case.full,
            logit_bytes=case.dtype.itemsize,
            index_bytes=1 if implementation.endswith("uint8") else 8,
        ),
    )
