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


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    relu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    y = F.conv2d(x, weight, stride=stride, padding=padding, dilation=dilation)
    y = (y if scale is None else y * _per_channel(scale)) + _per_channel(shift)
    y = y if residual is None else y + residual
    y = y.relu() if relu else y
    return y if out is None else out.copy_(y)


def aspp_branches(
    x: Tensor, weights: Sequence[Tensor], scale: Tensor | None, shift: Tensor, *, rates: Sequence[int]
) -> Tensor:
    branches = [F.conv2d(x, weights[0])]
    branches += [
        F.conv2d(x, weight, padding=rate, dilation=rate) for weight, rate in zip(weights[1:], rates, strict=True)
    ]
    y = torch.cat(branches, dim=1)
    return ((y if scale is None else y * _per_channel(scale)) + _per_channel(shift)).relu()


def aspp_projection(branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor) -> Tensor:
    x = torch.cat([branches, pooled.expand(-1, -1, *branches.shape[2:])], dim=1)
    return conv_bn_relu(x, weight, scale, shift)


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


def _upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
