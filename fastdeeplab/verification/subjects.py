"""Subjects, computed in several ways (trials) that are compared with one fp64 result (checks); what they share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdeeplab.kernels.choice import convolution_precision, kernels_are_off, why_not
from fastdeeplab.speed.rivals import short_name

OK, WRONG, FAILED, NOT_RUN = "ok", "WRONG", "failed: ", "not run: "


class Check(NamedTuple):
    """One result that was compared, or could not be."""

    function: str  # of fastdeeplab.kernels, or "network"
    what: str  # shape and options
    implementation: str  # "torch", "triton" or, of the network, "auto"
    choice: str  # tile choice or form of the library; "" for what the function itself chooses
    dtype: str
    error: float  # NaN if there is none
    limit: float
    verdict: str  # "ok", "WRONG", "failed: why" or "not run: why"

    @property
    def bad(self) -> bool:
        return self.verdict == WRONG or self.verdict.startswith(FAILED)


@dataclass(frozen=True)
class Trial:
    """One way to compute a subject."""

    implementation: str
    choice: str
    limit: float
    error: Callable[[], float]  # computes and compares


@dataclass(frozen=True)
class Subject:
    """What is computed in several ways that are compared with one fp64 result."""

    function: str
    what: str
    dtype: str
    trials: Callable[[], list[Trial]]  # computes the fp64 result

    def check(self, implementation: str, choice: str, verdict: str, error: float, limit: float) -> Check:
        return Check(self.function, self.what, implementation, choice, self.dtype, error, limit, verdict)


class CanNotRunError(Exception):
    """Why kernels can't run here."""


def why_no_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    return "FASTDEEPLAB_KERNELS=torch" if kernels_are_off() else why_not(device, dtype)


def implementations(device: torch.device, dtype: torch.dtype) -> list[str]:
    return ["torch"] if why_no_kernels(device, dtype) else ["torch", "triton"]


def random_logits(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """In channels_last memory, as the head gives them."""
    logits = 3 * torch.randn(tuple(shape), device=device, generator=torch.Generator(device).manual_seed(0))
    return logits.to(dtype, memory_format=torch.channels_last)


def soil(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Write nonsense where the allocator will most likely put the result: what is not written is then no old result."""
    nonsense = math.nan if dtype.is_floating_point else torch.iinfo(dtype).max
    torch.full(tuple(shape), nonsense, dtype=dtype, device=device)


def convolution_dtype(dtype: torch.dtype, device: torch.device) -> str:
    tf32 = dtype == torch.float32 and convolution_precision(device) == "tf32"
    return f"{short_name(dtype)} (TF32)" if tf32 else short_name(dtype)


def shape_text(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def interpolation_rounding(shape: Sequence[int]) -> float:
    """By how much interpolation in fp32 may be off, over the largest logit.

    A source coordinate is off by its own rounding, at most its size * 2^-23, and moves a value by twice the largest
    logit per unit on each axis; the products and sums add six roundings.
    """
    return 2 * sum(shape[2:]) * 2**-23 + 6 * 2**-24
