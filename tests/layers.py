"""Layers and a GPU to decide about."""

import torch
from fastdeeplab.kernels.candidates import Gpu, Layer, Tile

H200 = Gpu("NVIDIA H200", (9, 0), 132)


def conv(N: int, C: int, size: tuple[int, int], C_out: int, kernel: int, **options: object) -> Layer:
    options = {"dtype": torch.bfloat16, **options}
    return Layer.of("conv_bn_relu", (N, C, *size), (C_out, C, kernel, kernel), **options)  # type: ignore[arg-type]


def aspp(N: int, size: tuple[int, int], rates: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Layer:
    return Layer.of("aspp_branches", (N, 2048, *size), (256, 2048, 3, 3), dtype, dilations=rates)


def executed_share(tile: Tile, N: int, H: int, W: int, dilation: int) -> float:
    """What a 3x3 convolution that keeps the map's size executes of its 9 N H W pairs of a pixel and a tap."""
    layer = Layer.of("conv_bn_relu", (N, 1, H, W), (1, 1, 3, 3), torch.float16, padding=dilation, dilations=(dilation,))
    return layer.executed(tile) / (9 * N * H * W)


EXPAND = conv(8, 256, (65, 65), 1024, 1, residual=True)
DENSE = conv(8, 256, (65, 65), 256, 3, padding=2, dilations=(2,))
