"""The heads of DeepLabV3: atrous spatial pyramid pooling with its classifier, and the auxiliary head.

Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation" (2017). The modules nest as
torchvision's do, so that its parameter names hold.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from fastdeeplab import fusion, kernels
from fastdeeplab.fusion import Affine


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1) -> list[nn.Module]:
    """Convolution that keeps the map's size, batch norm, ReLU."""
    padding = dilation * (kernel_size // 2)
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


def _values_per_channel(bn: nn.Module, x: Tensor) -> int:
    """How many values ``bn`` would take its statistics over; SyncBatchNorm counts those of every process."""
    values = x.numel() // x.shape[1]
    if isinstance(bn, nn.SyncBatchNorm) and distributed.is_available() and distributed.is_initialized():
        values *= distributed.get_world_size(bn.process_group)
    return values


class ASPPPooling(nn.Sequential):
    """Image pooling: global average, 1x1 convolution, BN, ReLU, spread over the map again.

    ``(N, in_channels, h, w) -> (N, out_channels, h, w)``. In training with one value per channel (batch 1), where
    torchvision raises, this BN uses its running statistics and leaves them as they are, so that the last, partial
    batch of an epoch does not end a run.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(x).expand(-1, -1, *x.shape[-2:])

    def pooled(self, x: Tensor) -> Tensor:
        """``(N, in_channels, h, w) -> (N, out_channels, 1, 1)``."""
        pool, conv, relu = self[0], self[1], self[3]
        bn: Any = self[2]
        y = conv(pool(x))
        if bn.training and _values_per_channel(bn, y) == 1:
            y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, training=False, eps=bn.eps)
        else:
            y = bn(y)
        return relu(y)


class ASPP(nn.Module):
    """1x1, three dilated 3x3 and image pooling side by side, concatenated in this order and projected by a 1x1.

    ``(N, in_channels, h, w) -> (N, channels, h, w)``. With ``affine``, the batch norms' scales and shifts, the branches
    are one call of ``fastdeeplab.kernels.aspp_branches``, and the projection takes the pooled branch as a bias.
    """

    kernel_function = "aspp_branches"

    def __init__(
        self, in_channels: int, channels: int, rates: Sequence[int], dropout: float, kernel: str = "auto"
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.convs = nn.ModuleList(
            [
                nn.Sequential(*conv_bn_relu(in_channels, channels)),
                *(nn.Sequential(*conv_bn_relu(in_channels, channels, 3, rate)) for rate in rates),
                ASPPPooling(in_channels, channels),
            ]
        )
        self.project = nn.Sequential(*conv_bn_relu(len(self.convs) * channels, channels), nn.Dropout(dropout))

    def forward(self, x: Tensor, affine: Affine | None = None) -> Tensor:
        parts: list[Any] = list(self.convs)
        *atrous, pooling = parts
        if affine is None or not self._can_be_fused(atrous, pooling):
            return self.project(torch.cat([conv(x) for conv in self.convs], dim=1))
        convs, norms = [conv for conv, _, _ in atrous], [norm for _, norm, _ in atrous]
        branches = fusion.aspp_branches(convs, norms, x, affine, kernel=self.kernel)
        pool, conv, norm, _ = pooling
        pooled = fusion.conv_bn_relu(conv, norm, pool(x), affine, kernel="torch")  # a pixel per image
        projection: Any = self.project
        return fusion.aspp_projection(projection[0], projection[1], branches, pooled, affine, kernel=self.kernel)

    def _can_be_fused(self, atrous: Sequence[nn.Module], pooling: nn.Module) -> bool:
        """Whether its containers are as they were built, and no hook waits for one of them to be called."""
        layers = nn.Conv2d, fusion.NORMS, nn.ReLU
        return (
            all(fusion.is_chain(branch, *layers) for branch in atrous)
            and fusion.is_chain(pooling, nn.AdaptiveAvgPool2d, *layers, kind=ASPPPooling)
            and fusion.is_chain(self.project, *layers, fusion.DROPOUTS)
        )

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}"


class DeepLabHead(nn.Sequential):
    """ASPP, 3x3 convolution, 1x1 classifier: ``(N, in_channels, h, w) -> (N, num_classes, h, w)`` logits."""

    kernel_function = "conv_bn_relu"

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        rates: Sequence[int],
        dropout: float,
        kernel: str = "auto",
        aspp_kernel: str = "auto",
    ) -> None:
        super().__init__(
            ASPP(in_channels, channels, rates, dropout, aspp_kernel),
            *conv_bn_relu(channels, channels, 3),
            nn.Conv2d(channels, num_classes, 1),
        )
        self.kernel = kernel

    def forward(self, x: Tensor, affine: Affine | None = None) -> Tensor:
        layers: list[Any] = list(self)
        aspp, conv, norm, relu, classifier = layers
        if affine is None:
            return classifier(relu(norm(conv(aspp(x)))))
        x = fusion.conv_bn_relu(conv, norm, aspp(x, affine), affine, kernel=self.kernel)
        return fusion.classify(classifier, x, affine, kernel=self.kernel)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}"


class AuxHead(nn.Sequential):
    """3x3 convolution and 1x1 classifier on layer3's map, for training: ``(N, in_channels, h, w)`` to logits."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(
            *conv_bn_relu(in_channels, channels, 3),
            nn.Dropout(dropout),
            nn.Conv2d(channels, num_classes, 1),
        )


class UpsampleArgmax(nn.Module):
    """Bilinear upsampling and argmax in one pass: (N, K, h, w) logits to (N, H, W) class indices.

    ``kernel`` is ``"auto"``, ``"triton"`` or ``"torch"``; see ``fastdeeplab.kernels.upsample_argmax``.
    """

    kernel_function = "upsample_argmax"
    auto_limit = "PyTorch where tuning has measured it to be faster"  # of the kernel with "auto"

    def __init__(self, kernel: str = "auto") -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, logits: Tensor, size: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return kernels.upsample_argmax(logits, size, dtype=dtype, impl=self.kernel)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}"
