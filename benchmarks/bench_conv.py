"""``conv_bn_relu`` on the network's layers: ``pytest benchmarks/bench_conv.py [--dtype float16] [--all-tiles]``.

The rivals: PyTorch's modules in channels_last memory (convolution, batch norm, addition, ReLU), eager and compiled, and
the library's forms, which have the batch norm folded. The kernel in its predicted tile choice, or in each.

On a GPU the distinct layers of ResNetModel, on a CPU small ones, and the kernel under Triton's interpreter alone.
"""

import pytest
import torch
from cases import CLASSIFIER, ConvCase, Record, build_convolution, inputs_and_result, parametrize_convolutions
from fastdeeplab.kernels.candidates import Layer, Tile
from fastdeeplab.kernels.measure import largest_error
from fastdeeplab.kernels.tuning import tile_name, tolerance
from torch import Tensor, nn


class ConvBnRelu(nn.Module):
    """The modules of ``backbone.py`` and ``head.py`` in eval mode; the weight of the batch norm is 1."""

    def __init__(self, weight: Tensor, shift: Tensor, *, batch_norm: bool = True, relu: bool = True, **geometry: int):
        super().__init__()
        C_out, C, *kernel = weight.shape
        self.conv = nn.Conv2d(C, C_out, (kernel[0], kernel[1]), bias=not batch_norm, **geometry)
        self.conv.weight.data = weight
        if self.conv.bias is not None:
            self.conv.bias.data = shift
        self.bn = nn.BatchNorm2d(C_out) if batch_norm else nn.Identity()
        if isinstance(self.bn, nn.BatchNorm2d):
            self.bn.bias.data = shift
            self.bn.running_var.fill_(1 - self.bn.eps)
        self.relu = nn.ReLU(inplace=True) if relu else nn.Identity()
        self.to(weight.device, weight.dtype).eval().requires_grad_(False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(self.conv(x))
        return self.relu(y if residual is None else y + residual)


class OfInputs(nn.Module):
    """Takes the layer's random inputs, of which the modules hold weight and shift."""

    def __init__(self, layer: Layer, weight: Tensor, shift: Tensor, batch_norm: bool) -> None:
        super().__init__()
        self.block = ConvBnRelu(
            weight, shift, batch_norm=batch_norm, relu=layer.relu,
            stride=layer.stride, padding=layer.padding, dilation=layer.dilations[0],
        )  # fmt: skip

    def forward(self, x: Tensor, weight: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
        return self.block(x, residual)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_convolutions(metafunc, ["conv_bn_relu"])


@torch.no_grad()
def test_conv_bn_relu(case: ConvCase, implementation: str, tile: Tile | None, record: Record) -> None:
    inputs, expected = inputs_and_result(case.layer)
    _, weight, shift, _ = inputs

    def eager() -> nn.Module:
        return OfInputs(case.layer, weight, shift, batch_norm=not case.name.endswith(CLASSIFIER))

    record(
        "conv_bn_relu",
        implementation,
        case,
        build_convolution(case, implementation, tile, eager),
        inputs,
        lambda *_: expected,
        tolerance(case.layer.dtype, expected.device),
        largest_error,
        case.work,
        flop=case.flop,
        tile="" if tile is None else tile_name(tile),
    )
