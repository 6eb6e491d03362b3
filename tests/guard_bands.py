"""Guard bands: tensors inside larger buffers, where a kernel's stray reads meet a wrong value and stray writes show."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

BAND = 8192  # elements before and after
PATTERN = 77


def banded(values: Tensor, fill: float, band: int = BAND) -> tuple[Tensor, Tensor]:
    """The values, in the strides of a clone, inside a larger buffer of ``fill``; and the buffer."""
    buffer = torch.full((values.numel() + 2 * band,), fill, dtype=values.dtype, device=values.device)
    return buffer.as_strided(values.shape, values.clone().stride(), band).copy_(values), buffer


@contextmanager
def banded_allocations(band: int = BAND) -> Iterator[list[Tensor]]:
    """Inside, ``torch.empty`` and ``torch.empty_like`` give tensors inside guard bands; yields the buffers."""
    buffers = []
    empty = torch.empty

    def banded_empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        values = empty(shape, dtype=dtype, device=device).fill_(torch.nan if dtype.is_floating_point else PATTERN)
        inner, buffer = banded(values, PATTERN, band)
        buffers.append(buffer)
        return inner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", banded_empty)
        patch.setattr(torch, "empty_like", lambda like: banded_empty(like.shape, like.dtype, like.device))
        yield buffers


def assert_kept(buffers: list[Tensor], band: int = BAND) -> None:
    """Nothing was written outside the tensors."""
    assert buffers
    for buffer in buffers:
        assert (buffer[:band] == PATTERN).all()
        assert (buffer[-band:] == PATTERN).all()
