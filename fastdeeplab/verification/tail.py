"""``upsample_argmax`` and ``upsample_cross_entropy``, each implementation and strip."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdeeplab import kernels
from fastdeeplab.kernels import reference
from fastdeeplab.kernels.choice import DTYPES
from fastdeeplab.kernels.measure import relative_error
from fastdeeplab.model import upsample_logits
from fastdeeplab.speed.rivals import short_name
from fastdeeplab.verification.subjects import (
    Subject,
    Trial,
    implementations,
    interpolation_rounding,
    random_logits,
    shape_text,
    soil,
)

IGNORED = 255
LOSS_LIMIT = 1e-5  # ||difference|| / ||fp64||: fp32 terms, whose rounding errors cancel in their sum


def argmax_subjects(device: torch.device, quick: bool) -> Iterator[Subject]:
    shapes: list[tuple[Sequence[int], tuple[int, int], torch.dtype]] = [
        ((2, 21, 65, 65), (513, 513), torch.int64),
        ((1, 150, 64, 64), (512, 512), torch.uint8),
        ((3, 19, 70, 41), (33, 64), torch.int32),
    ]
    if device.type == "cpu":
        shapes = [
            ((2, 5, 3, 4), (19, 27), torch.int64),
            ((1, 7, 3, 3), (24, 24), torch.uint8),
            ((3, 3, 9, 8), (4, 15), torch.int32),
        ]
    for dtype in DTYPES:
        for shape, size, index in shapes[:1] if quick else shapes:
            what = f"{shape_text(shape)}->{shape_text(size)} {short_name(index)}"
            trials = partial(_argmax_trials, shape, size, index, dtype, device)
            yield Subject("upsample_argmax", what, short_name(dtype), trials)


def _argmax_trials(
    shape: Sequence[int], size: tuple[int, int], index: torch.dtype, dtype: torch.dtype, device: torch.device
) -> list[Trial]:
    logits = random_logits(shape, dtype, device)
    full = upsample_logits(logits.double(), size)
    limit = 2 * interpolation_rounding(shape)  # of two classes' logits

    def trial(implementation: str, choice: str, call: Callable[[], Tensor]) -> Trial:
        def error() -> float:
            soil((shape[0], *size), index, device)
            return shortfall(call(), full)

        return Trial(implementation, choice, limit, error)

    can_run = implementations(device, dtype)
    trials = [
        trial(impl, "", partial(kernels.upsample_argmax, logits, size, dtype=index, impl=impl)) for impl in can_run
    ]
    if "triton" in can_run:
        from fastdeeplab.kernels import argmax

        for tile in argmax.TILES:
            call = partial(argmax.upsample_argmax, logits, size, index, tile=tile)
            trials.append(trial("triton", f"{tile.rows}x{tile.columns}", call))
    return trials


def shortfall(indices: Tensor, full: Tensor) -> float:
    """How far the chosen class's logit is below the best one at the worst pixel, over the largest logit.

    Args:
        indices: (N, H, W).
        full: (N, K, H, W) logits in fp64.

    Returns:
        Infinity where the shape is another or an index is no class.
    """
    if indices.shape != full[:, 0].shape or indices.min() < 0 or indices.max() >= full.shape[1]:
        return math.inf
    chosen = full.gather(1, indices.long()[:, None])[:, 0]
    return float((full.amax(1) - chosen).max() / full.abs().max())


def loss_subjects(device: torch.device, quick: bool) -> Iterator[Subject]:
    cases: list[tuple[Sequence[int], tuple[int, int], dict[str, Any]]] = [
        ((4, 21, 65, 65), (513, 513), {"reduction": "sum", "label_smoothing": 0.1}),
        ((1, 150, 64, 64), (512, 512), {"reduction": "mean"}),
    ]
    if device.type == "cpu":
        small = [((2, 5, 3, 4), (19, 27)), ((1, 7, 3, 3), (24, 24))]
        cases = [(shape, size, options) for (shape, size), (_, _, options) in zip(small, cases, strict=True)]
    for dtype in DTYPES:
        for shape, size, options in cases[:1] if quick else cases:
            for part in ("loss", "gradient"):
                what = f"{part}, {shape_text(shape)}->{shape_text(size)} {options['reduction']}"
                trials = partial(_loss_trials, part, shape, size, options, dtype, device)
                yield Subject("upsample_cross_entropy", what, short_name(dtype), trials)


def _loss_trials(
    part: str,
    shape: Sequence[int],
    size: tuple[int, int],
    options: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> list[Trial]:
    generator = torch.Generator(device).manual_seed(1)
    logits = random_logits(shape, dtype, device)
    target = torch.randint(shape[1], (shape[0], *size), device=device, generator=generator)
    target[torch.rand(target.shape, device=device, generator=generator) < 0.1] = IGNORED
    weight = None
    if options["reduction"] == "sum":
        weight = torch.rand(shape[1], device=device, generator=generator) + 0.5

    def compute(function: Callable[..., Tensor], dtype: torch.dtype, **impl: str) -> Tensor:
        values = logits.to(dtype).requires_grad_()
        class_weight = None if weight is None else weight.to(torch.promote_types(dtype, torch.float32))
        with torch.enable_grad():
            loss = function(values, target, weight=class_weight, ignore_index=IGNORED, **options, **impl)
            if part == "loss":
                return loss.detach()
            # Times some number, as a gradient scaler does it: the mean's gradients are too small for fp16.
            factor = torch.full_like(loss, 1.0 if options["reduction"] == "sum" else 1000.0)
            return torch.autograd.grad(loss, values, factor)[0]

    expected = compute(reference.upsample_cross_entropy, torch.float64)
    # Gradients of half precision are rounded once, at the end.
    limit = LOSS_LIMIT if part == "loss" or dtype == torch.float32 else 2 * torch.finfo(dtype).eps

    def error(impl: str) -> float:
        soil(expected.shape, dtype, device)
        return relative_error(compute(kernels.upsample_cross_entropy, dtype, impl=impl), expected)

    return [Trial(impl, "", limit, partial(error, impl)) for impl in implementations(device, dtype)]
