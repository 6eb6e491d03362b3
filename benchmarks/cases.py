"""The shapes, layouts and dtypes in which the upsampling kernels are benchmarked, and the ways to run their rivals."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

Record = Callable[..., None]  # the fixture of conftest.py

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLASSES = (19, 21, 150)  # Cityscapes, Pascal VOC, ADE20K

# The head gives channels_last bf16; NCHW is what other callers may have, fp32 what they train in.
LOGITS = ((torch.bfloat16, "channels_last"), (torch.bfloat16, "NCHW"), (torch.float32, "channels_last"))


@dataclass(frozen=True)
class Case:
    batch: int
    classes: int
    low: tuple[int, int]
    full: tuple[int, int]
    dtype: torch.dtype
    layout: str

    @property
    def shape(self) -> str:
        return "{}x{}x{}x{}->{}x{}".format(self.batch, self.classes, *self.low, *self.full)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.shape}-{self.dtype_name}-{self.layout}"

    def logits(self, seed: int = 0) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        logits = torch.randn((self.batch, self.classes, *self.low), device=DEVICE, generator=generator)
        memory_format = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        return (3 * logits).to(self.dtype, memory_format=memory_format)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for these very shapes, in one graph; skips where the compiler is missing."""
    if DEVICE.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs g++ on a CPU")
    torch.compiler.reset()  # it gives up compiling, silently, after a few different shapes
    return torch.compile(function, fullgraph=True, dynamic=False)
