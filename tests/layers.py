"""Layers and a GPU to decide about."""

import torch
from fastdeeplab.kernels.candidates import Gpu, Layer

H200 = Gpu("NVIDIA H200", (9, 0), 132)


def conv(N: int, C: int, size: tuple[int, int], C_out: int, kernel: int, **options: object) -> Layer:
    options = {"dtype": torch.bfloat16, **options}
    return Layer.of("conv_bn_relu", (N, C, *size), (C_out, C, kernel, kernel), **options)  # type: ignore[arg-type]


def aspp(N: int, size: tuple[int, int], rates: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Layer:
    return Layer.of("aspp_branches", (N, 2048, *size), (256, 2048, 3, 3), dtype, dilations=rates)


EXPAND = conv(8, 256, (65, 65), 1024, 1, residual=True)
DENSE = conv(8, 256, (65, 65), 256, 3, padding=2, dilations=(2,))
