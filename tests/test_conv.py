"""The pointer kernel of the fused convolutions against fp64 PyTorch."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from cases import ConvCase, network_convolutions, small_convolutions
from fastdeeplab.kernels import conv, reference, tuning
from fastdeeplab.kernels.candidates import IEEE_TILES, ODD_TILES, TILES, Tile
from fastdeeplab.kernels.cuts import rectangles
from fastdeeplab.kernels.measure import largest_error, relative_error
from fastdeeplab.kernels.tuning import in_fp64, kernel_call, random_inputs, tile_choices, tile_name, tolerance
from guard_bands import assert_kept, banded, banded_allocations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdeeplab import kernels

FLOATS = (torch.float32, torch.float16)
SLACK = {torch.float32: 2**-22, torch.float16: 2**-14, torch.bfloat16: 2**-11}  # another order of additions
SMALL = Tile("pointer", 64, 64, 64, num_warps=4, num_stages=3)
CHOICES = [*(tile for _, tile in TILES if tile.kernel == "pointer"), ODD_TILES[0][1], IEEE_TILES[0][1]]
SKIP = SMALL._replace(skip=True)

SANITIZED = [
    ("test_conv.py", "test_no_stray_access"),
    ("test_conv.py", "test_no_stray_access_by_the_branches"),
    ("test_conv.py", "test_no_stray_access_by_the_projection"),
    ("test_conv_tma.py", "test_epilogues_and_splits"),
    ("test_conv_tma.py", "test_aspp_branches"),
    ("test_conv_tma.py", "test_aspp_projection"),
    ("test_argmax.py", "test_no_stray_access"),
    ("test_cross_entropy.py", "test_no_stray_access"),
]

channels_last = partial(torch.Tensor.contiguous, memory_format=torch.channels_last)


def as_shipped(tile: Tile, dtype: torch.dtype) -> Tile:
    """TILES are listed for elements of two bytes, the others for all."""
    if tile.block_k <= 16:
        return tile
    return tile._replace(block_k=2 * tile.block_k // dtype.itemsize)


class Convolution:
    """Random arguments of one fused convolution, and what surrounds them."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        shape: tuple[int, int, int, int] = (2, 24, 7, 9),
        C_out: int = 40,
        kernel: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        relu: bool = True,
        scaled: bool = True,
        residual: bool = False,
    ) -> None:
        C = shape[1]
        padding = dilation * (kernel // 2) if padding is None else padding
        self.options = {"stride": stride, "padding": padding, "dilation": dilation, "relu": relu}
        weight = torch.randn(C_out, C, kernel, kernel, device=device) / (C * kernel**2) ** 0.5
        self.x = channels_last(torch.randn(shape, device=device).to(dtype))
        self.weight = channels_last(weight.to(dtype))
        self.scale = torch.rand(C_out, device=device) + 0.5 if scaled else None
        self.shift = torch.randn(C_out, device=device)
        size = [(n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in shape[2:]]
        self.residual = None
        if residual:
            self.residual = channels_last(torch.randn(shape[0], C_out, *size, device=device).to(dtype))
        self.out = channels_last(torch.full((shape[0], C_out, *size), torch.nan, dtype=dtype, device=device))

    def launch(self, tile: Tile = SMALL, precision: str = "ieee") -> Tensor:
        tile = as_shipped(tile, self.x.dtype)
        arguments = (self.x, self.weight, self.scale, self.shift, self.residual, self.out)
        conv.conv_bn_relu(*arguments, **self.options, tile=tile, precision=precision)  # type: ignore[arg-type]
        return self.out

    def pytorch(self, dtype: torch.dtype) -> Tensor:
        tensors = (self.x, self.weight, self.scale, self.shift, self.residual)
        return reference.conv_bn_relu(*(None if t is None else t.to(dtype) for t in tensors), **self.options)  # type: ignore[arg-type]

    def assert_accurate(self, tile: Tile = SMALL, cancelled: float = 1.0) -> None:
        """No further from fp64 than PyTorch in the same dtype, but for the order of the additions.

        These are of fp32, and their roundings count ``cancelled`` times: as large as the terms are beside the result.
        """
        dtype = self.x.dtype
        exact = self.pytorch(torch.float64)
        slack = SLACK[dtype] + (cancelled - 1) * SLACK[torch.float32]
        assert relative_error(self.launch(tile), exact) <= relative_error(self.pytorch(dtype), exact) + slack

    def cancellation(self) -> float:
        """How many times as large as the result its terms are, added without their signs; at least 1."""
        tensors = (self.x, self.weight, self.scale, self.shift, self.residual)
        terms = reference.conv_bn_relu(*(None if t is None else t.double().abs() for t in tensors), **self.options)  # type: ignore[arg-type]
        return max(1.0, float(terms.norm() / self.pytorch(torch.float64).norm().clamp(min=1e-3)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tile", CHOICES, ids=lambda tile: f"{tile.block_m}x{tile.block_n}x{tile.block_k}")
@pytest.mark.parametrize(
    "layer",
    [
        pytest.param({"kernel": 1, "residual": True}, id="1x1 residual"),
        pytest.param({"kernel": 1, "stride": 2}, id="1x1 stride 2"),
        pytest.param({"dilation": 2}, id="3x3 dilated"),
        pytest.param({"stride": 2}, id="3x3 stride 2"),
    ],
)
def test_every_tile(layer: dict[str, Any], tile: Tile, dtype: torch.dtype, device: torch.device) -> None:
    Convolution(device, dtype, (1, 96, 13, 15), 136, **layer).assert_accurate(tile._replace(skip="dilation" in layer))


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "masked"])
@pytest.mark.parametrize("dilation", [1, 2, 4, 6, 12, 18, 24, 36, 100])
def test_any_dilation(dilation: int, skip: bool, device: torch.device) -> None:
    shape = (2, 8, 20, 37)
    Convolution(device, torch.float16, shape, 16, dilation=dilation).assert_accurate(SMALL._replace(skip=skip))


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "masked"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (8, 8), (9, 13)], ids=str)
def test_fault_13_any_map(size: tuple[int, int], skip: bool, device: torch.device) -> None:
    for dilation in (4, 5):
        shape = (1, 8, *size)
        Convolution(device, torch.float32, shape, 16, dilation=dilation).assert_accurate(SMALL._replace(skip=skip))


@pytest.mark.parametrize("dtype", [*FLOATS, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize(
    ("C", "C_out"), [(24, 40), (40, 96), (96, 24), (64, 256), (3, 5), (20, 21), (1, 1), (8, 255)], ids=str
)
def test_any_number_of_channels(C: int, C_out: int, dtype: torch.dtype, device: torch.device) -> None:
    tiles = (SKIP, ODD_TILES[0][1]) if C % 8 or C_out % 8 else (SKIP,)
    for tile in tiles:
        Convolution(device, dtype, (1, C, 3, 4), C_out).assert_accurate(tile)
        Convolution(device, dtype, (1, C, 3, 4), C_out, 1, residual=True).assert_accurate(tile._replace(skip=False))


def test_fault_12_a_thousand_classes(device: torch.device) -> None:
    Convolution(device, torch.float16, (1, 8, 3, 4), 1000, 1).assert_accurate(SMALL._replace(block_n=128))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 1, 0, 2), (3, 2, 1, 1), (3, 2, 3, 2), (3, 3, 0, 1), (1, 2, 0, 1), (1, 1, 1, 1), (3, 1, 5, 2)],
)
def test_strides_and_paddings(kernel: int, stride: int, padding: int, dilation: int, device: torch.device) -> None:
    layer = {"stride": stride, "padding": padding, "dilation": dilation}
    Convolution(device, torch.float32, (2, 16, 11, 8), 24, kernel, **layer).assert_accurate(SKIP)  # type: ignore[arg-type]


@pytest.mark.parametrize(("C", "C_out"), [(128, 512), (256, 1024), (512, 128), (1024, 256), (2048, 64)], ids=str)
def test_long_sums(C: int, C_out: int, device: torch.device) -> None:
    """The networks' channels."""
    tile = SKIP._replace(block_n=128)
    Convolution(device, torch.float16, (1, C, 2, 2), min(C_out, 256)).assert_accurate(tile)
    Convolution(device, torch.float32, (1, C, 2, 2), C_out, 1, residual=True).assert_accurate(tile)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scale"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_epilogues(
    dtype: torch.dtype, splits: int, relu: bool, scaled: bool, residual: bool, device: torch.device
) -> None:
    layer = Convolution(device, dtype, relu=relu, scaled=scaled, residual=residual)
    layer.assert_accurate(SKIP._replace(splits=splits))


@pytest.mark.parametrize("splits", [2, 5])
def test_splits_differ_by_rounding_only_and_repeat_bit_by_bit(splits: int, device: torch.device) -> None:
    """Also where a part has no step: the four taps at a corner of this map make four steps."""
    layer = Convolution(device, torch.float32, (1, 64, 5, 6), 64, dilation=4)
    layer.assert_accurate(SKIP._replace(splits=splits))
    first = layer.out.clone()
    assert torch.equal(layer.launch(SKIP._replace(splits=splits)), first)


@pytest.mark.parametrize("N", [0, 1, 3])
def test_fault_12_any_batch(N: int, device: torch.device) -> None:
    Convolution(device, torch.float32, (N, 8, 5, 6), 16, dilation=2).assert_accurate(SKIP)


@pytest.mark.parametrize("kernel", [1, 3])
def test_fault_05_channel_slices(kernel: int, device: torch.device) -> None:
    """Of x, the residual and the output; the output's other channels stay as they are."""
    layer = Convolution(device, torch.float16, C_out=24, kernel=kernel, residual=True, dilation=2)
    assert layer.residual is not None
    whole = channels_last(torch.full((2, 72, 7, 9), 5.0, dtype=torch.float16, device=device))
    layer.x = channels_last(F.pad(layer.x, (0, 0, 0, 0, 8, 16)))[:, 8:-16]
    layer.residual = channels_last(F.pad(layer.residual, (0, 0, 0, 0, 24, 0)))[:, 24:]
    layer.out = whole[:, 16:40]
    layer.assert_accurate(SKIP)
    assert (whole[:, :16] == 5).all()
    assert (whole[:, 40:] == 5).all()


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "masked"])
def test_fault_10_nan_spreads_as_far_as_pytorch_says(skip: bool, device: torch.device) -> None:
    layer = Convolution(device, torch.float32, (1, 8, 9, 11), 8, dilation=3)
    layer.x[0, 3, 4, 2] = torch.nan
    layer.x[0, 1, 8, 10] = torch.inf
    layer.x[0, 1, 0, 9] = -torch.inf
    expected = layer.pytorch(torch.float64).float()
    actual = layer.launch(SMALL._replace(skip=skip))
    assert expected.isnan().any()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_taps_that_only_read_padding_are_not_computed(device: torch.device) -> None:
    """0 times NaN would be NaN. At this rate the outer taps miss the map from everywhere, at the other from a half."""
    layer = Convolution(device, torch.float32, (2, 8, 6, 6), 8, dilation=6)
    layer.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = torch.nan
    assert layer.launch(SKIP).isfinite().all()
    assert layer.launch().isnan().all()
    layer = Convolution(device, torch.float32, (2, 8, 6, 6), 8, dilation=3)
    layer.weight[:, :, 0] = torch.nan
    out = layer.launch(SKIP)
    assert out[:, :, :3].isfinite().all()
    assert out[:, :, 3:].isnan().all()


def test_overflow_becomes_infinity_and_rounding_happens_once(device: torch.device) -> None:
    layer = Convolution(device, torch.float16, (1, 64, 1, 1), 8, kernel=1, residual=True)
    assert layer.residual is not None
    layer.x.fill_(64.0)
    layer.weight.fill_(32.0)  # a sum of 131,072, above fp16's largest number
    layer.shift.fill_(-131_072.0)
    layer.scale = None
    layer.residual.fill_(1.0)
    assert (layer.launch() == 1).all()
    layer.shift.zero_()
    assert (layer.launch() == torch.inf).all()


def test_fault_04_more_pixels_than_can_be_indexed(device: torch.device) -> None:
    x = torch.empty(1, 8, 50_000, 50_000, device="meta").to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="more pixels than can be indexed"):
        conv.conv_bn_relu(
            x, torch.empty(8, 8, 1, 1, device="meta"), None, torch.empty(8, device="meta"), None, x,
            stride=1, padding=0, dilation=1, relu=True, tile=SMALL, precision="ieee",
        )  # fmt: skip


@pytest.mark.parametrize("dilation", [2**30, 2**31 - 1, 2**35])
def test_fault_01_dilations_above_int32(dilation: int, device: torch.device) -> None:
    """Twice the dilation wraps in 32 bits. PyTorch's own result for one so large is that of the centre alone."""
    layer = Convolution(device, torch.float32, (1, 8, 5, 6), 8, dilation=9)
    expected = layer.launch(SKIP).clone()
    layer.options |= {"dilation": dilation, "padding": dilation}
    assert torch.equal(layer.launch(SKIP), expected)


def test_fault_01_strides_and_paddings_above_int32(device: torch.device) -> None:
    """The last pixel's position, nine strides on, wraps in 32 bits; a larger stride is refused for all there is."""
    layer = Convolution(device, torch.float32, (1, 8, 5, 6), 8, kernel=1)
    layer.options |= {"stride": 2**30, "padding": 2**32}
    layer.out = channels_last(torch.empty(1, 8, 9, 9, device=device))
    with pytest.raises(ValueError, match="with 32 bits, or they lie too far apart"):
        layer.launch()
    with pytest.raises(ValueError, match="stride must be at most 2147483647, got 8589934592"):
        kernels.conv_bn_relu(layer.x, layer.weight, None, layer.shift, stride=2**33, padding=1)


@triton.jit
def taps_of_tiles_kernel(
    taps_ptr, runs_ptr, dilations, N, H, W, WHOLE: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Each program's live taps and the number of its run."""
    slot, run = conv.rectangle_and_run(tl.program_id(0), dilations, N, H, W, WHOLE, SLOTS, BLOCK_M)
    _, _, _, _, row_taps, _, _, _, column_taps = conv.rectangle(slot, dilations, H, W, WHOLE)
    tl.store(taps_ptr + tl.program_id(0), row_taps * column_taps)
    tl.store(runs_ptr + tl.program_id(0), run)


@pytest.mark.parametrize("whole", [(), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize(("H", "W", "rates"), [(17, 17, (3, 6, 9)), (5, 20, (2, 7)), (9, 9, (9,))], ids=str)
def test_rectangles_with_many_live_taps_come_first(
    H: int, W: int, rates: tuple[int, ...], whole: tuple[int, ...], device: torch.device
) -> None:
    N, BLOCK_M = 2, 32
    dilations = (max(H, W), *rates)
    cut = []
    for branch, rate in enumerate(dilations):
        parts = [(H, W, 3, 3)] if branch in whole else rectangles(H, W, rate)
        cut += [(rows * columns, r * c) for rows, columns, r, c in parts]
    expected = sorted((taps for pixels, taps in cut for _ in range(-(-N * pixels // BLOCK_M))), reverse=True)
    taps, runs = torch.full((2, len(expected)), -1, dtype=torch.int32, device=device)
    flags = tuple(branch in whole for branch in range(len(dilations)))
    taps_of_tiles_kernel[(len(expected),)](taps, runs, dilations, N, H, W, WHOLE=flags, SLOTS=64, BLOCK_M=BLOCK_M)
    assert taps.tolist() == expected
    assert sum(run == 0 for run in runs.tolist()) == len(cut)


def test_runs_are_counted_over_all_rectangles() -> None:
    rates, (H, W) = (12, 24, 36), (65, 65)
    found = [(rows * columns, r * c) for rate in (65, *rates) for rows, columns, r, c in rectangles(H, W, rate)]
    assert sum(pixels for pixels, _ in found) == 4 * H * W
    runs = sum(-(-8 * pixels // 128) for pixels, _ in found)
    assert conv.count_runs(8, H, W, (65, *rates), (False,) * 4, 128) == runs
    of_first_rate = sum(-(-8 * rows * columns // 128) for rows, columns, _, _ in rectangles(H, W, 12))
    masked = conv.count_runs(8, H, W, (65, *rates), (False, True, False, False), 128)
    assert masked == runs - of_first_rate + -(-8 * H * W // 128)


def test_fault_01_strides_above_int32(device: torch.device) -> None:
    """Pixels 2^30 elements apart; only the pages that hold values are touched."""
    layer = Convolution(device, torch.float16, (1, 8, 2, 2), 8, dilation=1)
    buffer = torch.empty(2**32, dtype=torch.float16, device=device)
    x = buffer.as_strided((1, 8, 2, 2), (2**32, 1, 2**31, 2**30))
    layer.x = x.copy_(layer.x)
    layer.assert_accurate(SKIP)


class Branches:
    """Random arguments of ASPP's branches."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int], C_b: int, rates: Sequence[int]
    ) -> None:
        C, branches = shape[1], 1 + len(rates)
        self.x, self.rates = channels_last(torch.randn(shape, device=device).to(dtype)), tuple(rates)
        self.weights = [
            channels_last((torch.randn(C_b, C, k, k, device=device) / (C * k * k) ** 0.5).to(dtype))
            for k in (1, *(3 for _ in rates))
        ]
        self.scale: Tensor | None = torch.rand(branches * C_b, device=device) + 0.5
        self.shift = torch.randn(branches * C_b, device=device)
        self.out = channels_last(
            torch.full((shape[0], branches * C_b, *shape[2:]), torch.nan, dtype=dtype, device=device)
        )

    def launch(self, tile: Tile) -> Tensor:
        tile = as_shipped(tile, self.x.dtype)
        conv.aspp_branches(
            self.x, self.weights, self.scale, self.shift, self.out, rates=self.rates, tile=tile, precision="ieee"
        )
        return self.out

    def pytorch(self, dtype: torch.dtype) -> Tensor:
        scale = None if self.scale is None else self.scale.to(dtype)
        weights = [weight.to(dtype) for weight in self.weights]
        return reference.aspp_branches(self.x.to(dtype), weights, scale, self.shift.to(dtype), rates=self.rates)

    def assert_accurate(self, tile: Tile = SKIP) -> None:
        dtype, exact = self.x.dtype, self.pytorch(torch.float64)
        assert relative_error(self.launch(tile), exact) <= relative_error(self.pytorch(dtype), exact) + SLACK[dtype]


@pytest.mark.parametrize("whole", ["where rectangles are thin", False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "C_b", "rates"),
    [
        pytest.param((1, 40, 9, 14), 24, (2, 5, 12), id="all kinds of rectangles"),
        pytest.param((2, 64, 9, 9), 32, (6, 12, 18), id="output stride 16 in small"),
        pytest.param((3, 8, 1, 1), 8, (12, 24, 36), id="one pixel"),
        pytest.param((1, 8, 5, 30), 8, (1,), id="one rate"),
        pytest.param((1, 8, 7, 6), 16, (1, 2, 3, 4, 5), id="five rates"),
        pytest.param((0, 8, 7, 6), 16, (1, 2), id="empty batch"),
    ],
)
def test_aspp_branches(
    shape: tuple[int, int, int, int], C_b: int, rates: tuple[int, ...], dtype: torch.dtype, whole: bool | str,
    device: torch.device, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each branch cut into rectangles, or one masked rectangle, which the 1x1 branch never is."""
    if isinstance(whole, bool):
        monkeypatch.setattr(conv, "is_whole", lambda N, H, W, dilation, block_m: whole and dilation < max(H, W))
    Branches(device, dtype, shape, C_b, rates).assert_accurate()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tile", [*CHOICES, SMALL._replace(splits=2)], ids=str)
def test_aspp_branches_by_every_tile(tile: Tile, dtype: torch.dtype, device: torch.device) -> None:
    branches = Branches(device, dtype, (1, 72, 6, 7), 72, (3, 6))
    branches.scale = None
    branches.assert_accurate(tile._replace(skip=True))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_aspp_projection(dtype: torch.dtype, splits: int, device: torch.device) -> None:
    """A tile of 64 pixels spans several images of 15 pixels, each with its own shift."""
    layer = Convolution(device, dtype, (5, 72, 3, 5), 24, kernel=1)
    assert layer.scale is not None
    shift = torch.randn(5, 24, device=device)
    tile = SMALL._replace(splits=splits, block_k=128 // dtype.itemsize)
    conv.aspp_projection(layer.x, shift, layer.weight, layer.scale, layer.out, tile=tile, precision="ieee")
    exact = F.conv2d(layer.x.double(), layer.weight.double()) * layer.scale[:, None, None] + shift[:, :, None, None]
    # In fp32 an addition is off by 2.4e-8 of the sum so far (uniformly in half a unit, for any mantissa), and that sum
    # grows with the root of the terms: sqrt(K / 2) * 2.4e-8 for K terms one after another, 1.2 eps for these 72.
    assert relative_error(layer.out, exact.relu()) <= (2 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(
    "layer",
    [
        pytest.param({"kernel": 1, "residual": True}, id="1x1 residual"),
        pytest.param({"dilation": 4}, id="3x3 dilated"),
        pytest.param({"stride": 2}, id="3x3 stride 2"),
    ],
)
def test_no_stray_access(layer: dict[str, Any], splits: int, device: torch.device) -> None:
    """A read outside a tensor would meet NaN; a write outside one would change its bands."""
    convolution = Convolution(device, torch.float16, (2, 24, 7, 9), 40, **layer)
    tile = SMALL._replace(splits=splits, skip="dilation" in layer)
    expected = convolution.launch(tile).clone()
    assert expected.isfinite().all()
    for name in ("x", "weight", "scale", "shift", "residual"):
        if (tensor := getattr(convolution, name)) is not None:
            setattr(convolution, name, banded(tensor, torch.nan)[0])
    convolution.out, buffer = banded(torch.full_like(convolution.out, torch.nan), 77)
    with banded_allocations() as buffers:
        actual = convolution.launch(tile)
    assert torch.equal(actual, expected)
    assert_kept([*buffers, buffer])


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("whole", [False, True], ids=["cut", "whole"])
def test_no_stray_access_by_the_branches(
    whole: bool, splits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = SKIP._replace(splits=splits)
    monkeypatch.setattr(conv, "is_whole", lambda N, H, W, dilation, block_m: whole and dilation < max(H, W))
    branches = Branches(device, torch.float16, (2, 24, 7, 9), 40, (2, 5))
    expected = branches.launch(tile).clone()
    branches.x = banded(branches.x, torch.nan)[0]
    branches.weights = [banded(weight, torch.nan)[0] for weight in branches.weights]
    assert branches.scale is not None
    branches.scale, branches.shift = banded(branches.scale, torch.nan)[0], banded(branches.shift, torch.nan)[0]
    branches.out, buffer = banded(torch.full_like(branches.out, torch.nan), 77)
    with banded_allocations() as buffers:
        actual = branches.launch(tile)
    assert torch.equal(actual, expected)
    assert_kept([*buffers, buffer])


@pytest.mark.parametrize("splits", [1, 2])
def test_no_stray_access_by_the_projection(splits: int, device: torch.device) -> None:
    layer = Convolution(device, torch.float16, (5, 72, 3, 5), 24, kernel=1)
    shift = torch.randn(5, 24, device=device)

    def launch() -> Tensor:
        arguments = (layer.x, shift, layer.weight, layer.scale, layer.out)
        conv.aspp_projection(*arguments, tile=SMALL._replace(splits=splits), precision="ieee")
        return layer.out

    expected = launch().clone()
    shift = banded(shift, torch.nan)[0]
    for name in ("x", "weight", "scale"):
        setattr(layer, name, banded(getattr(layer, name), torch.nan)[0])
    layer.out, buffer = banded(torch.full_like(layer.out, torch.nan), 77)
    with banded_allocations() as buffers:
        actual = launch()
    assert torch.equal(actual, expected)
    assert_kept([*buffers, buffer])


def output_stride_8(dtype: torch.dtype) -> list[ConvCase]:
    return [case for case in network_convolutions(dtype) if "OS8" in case.name]


@pytest.mark.parametrize(
    ("cases", "dtype"),
    [
        pytest.param(small_convolutions, torch.float16, id="small"),
        pytest.param(network_convolutions, torch.bfloat16, id="networks bf16", marks=pytest.mark.gpu),
        pytest.param(output_stride_8, torch.float16, id="networks fp16, output stride 8", marks=pytest.mark.gpu),
    ],
)
def test_fault_09_every_tile_choice_of_every_layer(
    cases: Callable[[torch.dtype], list[ConvCase]],
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that may be chosen, not the winner alone: some compilers get some tile choices wrong."""
    monkeypatch.setattr(tuning, "tile_choices", partial(tile_choices, wasteful=True))
    wrong = []
    for case in cases(dtype):
        tuning.compile_choices(case.layer, device)  # some 360 in all, a second each: in threads
        inputs = random_inputs(case.layer, device)
        exact = in_fp64(case.layer, inputs)
        for tile in tile_choices(case.layer, device, wasteful=True):
            error = largest_error(kernel_call(case.layer, tile)(*inputs), exact)
            if not error <= tolerance(dtype, device):
                wrong.append((str(case), tile_name(tile), error))
    assert not wrong


@pytest.mark.gpu
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer")
def test_compute_sanitizer_finds_nothing() -> None:
    tests = [f"{Path(__file__).with_name(name)}::{test}" for name, test in SANITIZED]
    # Without errors of calls, which PyTorch and Triton make on purpose to find out what there is, and handle.
    options = ["--error-exitcode=9", "--report-api-errors", "no"]
    command = ["compute-sanitizer", *options, sys.executable, "-m", "pytest", "-q", *tests]
    # PyTorch's own allocator takes segments of many tensors, of which accesses beside a tensor would still be part.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def test_a_result_of_which_the_relu_and_cancellation_leave_little(device: torch.device) -> None:
    """One pixel, small beside its terms: it is as near as these allow."""
    torch.manual_seed(3)
    layer = Convolution(device, torch.float32, (1, 6, 7, 1), 2)
    assert layer.cancellation() > 10
    layer.assert_accurate(SMALL, layer.cancellation())


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    C_out=st.integers(1, 40),
    kernel=st.sampled_from([1, 3]),
    dilation=st.integers(1, 10),
    stride=st.integers(1, 2),
    residual=st.booleans(),
    splits=st.integers(1, 3),
    skip=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_anything(
    shape: tuple[int, int, int, int],
    C_out: int,
    kernel: int,
    dilation: int,
    stride: int,
    residual: bool,
    splits: int,
    skip: bool,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
) -> None:
    torch.manual_seed(seed)
    layer = Convolution(device, dtype, shape, C_out, kernel, stride=stride, dilation=dilation, residual=residual)
    layer.assert_accurate(SMALL._replace(splits=splits, skip=skip), layer.cancellation())
