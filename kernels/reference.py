"""The specification: each function in the shortest plain PyTorch, computed in the precision of its arguments.

For tests, benchmarks and verification only; nothing that runs in production imports it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample_argmax(logits: Tensor, size: Sequence[int], *, dtype: torch.dtype = torch.int64) -> Tensor:
    return _upsample(logits, size).argmax(dim=1).to(dtype)


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    check_target: bool = False,
) -> Tensor:
    return F.cross_entropy(
        _upsample(logits, target.shape[-2:]),
        target.long(),
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
