"""``aspp_branches`` and ``aspp_projection``: ``pytest benchmarks/bench_aspp.py [--dtype float16] [--all-tiles]``.

The rivals: PyTorch's modules in channels_last memory, eager and compiled, and the library's forms. The modules'
branches end in a concatenation, and their projection begins with another one, of the branches and the pooled branch
spread over the map; in a network there is one concatenation of all five.

On a GPU the heads of ResNetModel, on a CPU small ones, and the kernels under Triton's interpreter alone.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_conv import ConvBnRelu
from cases import ConvCase, Record, build_convolution, inputs_and_result, parametrize_convolutions
from fastdeeplab.kernels.candidates import Layer, Tile
from fastdeeplab.kernels.measure import largest_error
from fastdeeplab.kernels.tuning import tile_name, tolerance
from torch import Tensor, nn


class Branches(nn.Module):
    def __init__(self, rates: tuple[int, ...], shift: Tensor, *weights: Tensor) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            ConvBnRelu(weight, shift_of_branch, padding=rate, dilation=max(rate, 1))
            for weight, shift_of_branch, rate in zip(weights, shift.chunk(len(weights)), (0, *rates), strict=True)
        )

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Projection(nn.Module):
    def __init__(self, weight: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.project = ConvBnRelu(weight, shift)

    def forward(self, branches: Tensor, pooled: Tensor, *_: Tensor) -> Tensor:
        return self.project(torch.cat([branches, pooled.expand(-1, -1, *branches.shape[2:])], dim=1))


def eager(layer: Layer, inputs: list[Any]) -> Callable[[], nn.Module]:
    if layer.function == "aspp_branches":
        return lambda: Branches(layer.dilations, *inputs[1:])
    return lambda: Projection(*inputs[2:])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_convolutions(metafunc, ["aspp_branches", "aspp_projection"])


@torch.no_grad()
def test_aspp(case: ConvCase, implementation: str, tile: Tile | None, record: Record) -> None:
    inputs, expected = inputs_and_result(case.layer)
    record(
        case.layer.function,
        implementation,
        case,
        build_convolution(case, implementation, tile, eager(case.layer, inputs)),
        inputs,
        lambda *_: expected,
        tolerance(case.layer.dtype, expected.device),
        largest_error,
        case.work,
        flop=case.flop,
        tile="" if tile is None else tile_name(tile),
    )
