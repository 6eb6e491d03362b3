"""The kernels over tensor maps against fp64 PyTorch."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastdeeplab.kernels import conv, conv_tma
from fastdeeplab.kernels.candidates import TILES, Gpu, Layer, Tile, splits_of, tiles_for
from fastdeeplab.kernels.conv_tma import aspp_branches, aspp_projection, conv_bn_relu
from fastdeeplab.kernels.measure import relative_error
from guard_bands import assert_kept, banded_allocations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

GEMM = Tile("gemm_tma", 64, 32, 64, num_warps=4, num_stages=3)  # few programs: the interpreter's cost is per operation
BOXES = Tile("boxes_tma", 64, 32, 64, num_warps=4, num_stages=3, skip=True)
SHIPPED = [tile for _, tile in TILES if tile.kernel != "pointer"]
PATTERN = -77.0  # around outputs
BAND = 1024  # elements before and after a tensor
SLACK = {  # the kernel adds the products in another order than PyTorch; with 16 bits that drowns in the last rounding
    torch.float32: 2**-21,
    torch.float16: 2**-14,
    torch.bfloat16: 2**-11,
}
# Where tensor cores cut fp32 values off as they become TF32, to 10 bits after the leading one, and PyTorch rounds: each
# factor loses 0.36 * 2^-10 on average, always towards zero, so that sums of products shrink by 2^-10.5. (Emulated, the
# error is 2^-10.7 where rounding gives 2^-12.2.)
CUT_OFF = 2**-10.5


def placed(values: Tensor, around: float, beside: int = 8) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) values as a slice of wider pixels, inside a larger buffer of ``around``; and that buffer."""
    N, C, H, W = values.shape
    pitch = C + 2 * beside
    buffer = torch.full((2 * BAND + N * H * W * pitch,), around, dtype=values.dtype, device=values.device)
    inner = buffer.as_strided((N, C, H, W), (H * W * pitch, 1, W * pitch, pitch), BAND + beside)
    inner.copy_(values)
    return inner, buffer


def guarded(values: Tensor) -> Tensor:
    """Values among NaN: in channels_last memory if they are images or weights."""
    if values.ndim == 4:
        return placed(values, torch.nan, beside=0)[0]
    inner = torch.full((2 * BAND + values.numel(),), torch.nan, device=values.device)[BAND:-BAND].view(values.shape)
    return inner.copy_(values)


class Output:
    """An output inside a pattern: ``written`` is what was written, once nothing around it has changed."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, beside: int = 8) -> None:
        self.tensor, self.buffer = placed(torch.full(shape, torch.nan, dtype=dtype, device=device), PATTERN, beside)

    @property
    def written(self) -> Tensor:
        written = self.tensor.clone()
        self.tensor.fill_(PATTERN)
        assert (self.buffer == PATTERN).all()
        return written


def normal(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def eager(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor, residual: Tensor | None, dilation: int, relu: bool
) -> Tensor:
    """In the precision of its arguments."""
    y = F.conv2d(x, weight, padding=weight.shape[2] // 2 * dilation, dilation=dilation)
    y = y if scale is None else y * scale[:, None, None]
    y = y + (shift[:, :, None, None] if shift.ndim == 2 else shift[:, None, None])
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def exact_and_allowed(*arguments: Any, dtype: torch.dtype) -> tuple[Tensor, float]:
    """In fp64, and how far from it a kernel may be: as far as PyTorch in the same dtype, but for SLACK."""
    exact = eager(*(a.double() if isinstance(a, Tensor) else a for a in arguments))
    torchs = eager(*(a.to(dtype) if isinstance(a, Tensor) else a for a in arguments))
    return exact, relative_error(torchs, exact) + SLACK[dtype]


def assert_accurate(actual: Tensor, *arguments: Any, dtype: torch.dtype) -> None:
    exact, allowed = exact_and_allowed(*arguments, dtype=dtype)
    assert relative_error(actual, exact) <= allowed


def check_conv(
    N: int, C: int, H: int, W: int, C_out: int, kernel: int, dilation: int, tile: Tile, dtype: torch.dtype,
    device: torch.device, scaled: bool = True, residual: bool = False, relu: bool = True, beside: int = 8,
) -> None:  # fmt: skip
    shape = (N, C, H, W)
    check_tiles(shape, C_out, kernel, dilation, [tile], dtype, device, scaled, residual, relu, beside)


def check_tiles(
    shape: tuple[int, int, int, int], C_out: int, kernel: int, dilation: int, tiles: Sequence[Tile],
    dtype: torch.dtype, device: torch.device, scaled: bool = True, residual: bool = False, relu: bool = True,
    beside: int = 8, precision: str = "ieee",
) -> None:  # fmt: skip
    """Each on the same inputs."""
    N, C, H, W = shape
    x = normal(N, C, H, W, dtype=dtype, device=device)
    weight = normal(C_out, C, kernel, kernel, dtype=dtype, device=device) / (kernel * C**0.5)
    scale = torch.rand(C_out, device=device) + 0.5 if scaled else None
    shift = normal(C_out, device=device)
    added = normal(N, C_out, H, W, dtype=dtype, device=device) if residual else None
    inputs = (
        placed(x, torch.nan, beside)[0], guarded(weight),
        None if scale is None else guarded(scale), guarded(shift),
        None if added is None else placed(added, torch.nan, beside)[0],
    )  # fmt: skip

    def run(tile: Tile) -> Output:
        out = Output((N, C_out, H, W), dtype, device, beside)
        (conv if tile.kernel == "pointer" else conv_tma).conv_bn_relu(
            *inputs, out.tensor,
            stride=1, padding=kernel // 2 * dilation, dilation=dilation, relu=relu, tile=tile, precision=precision,
        )  # fmt: skip
        return out

    if len(tiles) > 1 and device.type == "cuda":  # compiled in threads; what fails there does so again below
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for tile in tiles:
                pool.submit(run, tile)
    exact, allowed = exact_and_allowed(x, weight, scale, shift, added, dilation, relu, dtype=dtype)
    for tile in tiles:
        rounds = precision == "ieee" or dtype != torch.float32
        rounds = rounds or (tile.kernel != "pointer" and conv_tma.CAN_ROUND_TO_TF32)
        assert relative_error(run(tile).written, exact) <= allowed + (0.0 if rounds else CUT_OFF), tile


@pytest.mark.parametrize(
    ("shape", "C_out", "dilation", "dtype"),
    [
        pytest.param((1, 24, 7, 9), 24, 1, torch.float16, id="odd"),
        pytest.param((1, 24, 7, 9), 24, 1, torch.float32, id="odd, fp32"),
        pytest.param((2, 40, 9, 7), 40, 2, torch.float32, id="two images"),
        pytest.param((3, 64, 5, 11), 8, 4, torch.float16, id="three images"),
        pytest.param((1, 96, 13, 15), 32, 12, torch.float32, id="hardly a tap beside the centre"),
        pytest.param((2, 24, 6, 5), 16, 2**33, torch.float16, id="dilated farther than the map"),
        pytest.param((3, 40, 1, 1), 24, 2, torch.float32, id="one pixel"),
        pytest.param((1, 24, 17, 1), 8, 4, torch.float16, id="one column"),
    ],
)
def test_fault_13_3x3_on_any_map(
    shape: tuple[int, int, int, int], C_out: int, dilation: int, dtype: torch.dtype, device: torch.device
) -> None:
    check_conv(*shape, C_out, 3, dilation, BOXES, dtype, device)


@pytest.mark.parametrize(
    ("shape", "C_out", "tile", "dtype"),
    [
        pytest.param((1, 24, 7, 9), 40, GEMM, torch.float16, id="odd"),
        pytest.param((2, 96, 5, 5), 24, GEMM, torch.float32, id="two images"),
        pytest.param((3, 64, 1, 1), 32, GEMM, torch.float32, id="one pixel"),
        pytest.param((2, 40, 9, 5), 24, BOXES, torch.float16, id="boxes"),
    ],
)
def test_fault_13_1x1_on_any_map(
    shape: tuple[int, int, int, int], C_out: int, tile: Tile, dtype: torch.dtype, device: torch.device
) -> None:
    check_conv(*shape, C_out, 1, 1, tile, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", ""])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", ""])
@pytest.mark.parametrize("scaled", [True, False], ids=["scale", ""])
@pytest.mark.parametrize("tile", [GEMM, BOXES], ids=lambda tile: tile.kernel)
def test_epilogues_and_splits(
    tile: Tile, scaled: bool, residual: bool, relu: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Scratch lies between bands, and what no split wrote of it would be NaN."""
    kernel, dilation = (3, 2) if tile is BOXES else (1, 1)
    for splits in (1, 3):
        with banded_allocations() as buffers:
            check_conv(
                2, 72, 6, 7, 40, kernel, dilation, tile._replace(splits=splits), dtype, device,
                scaled, residual, relu,
            )  # fmt: skip
        if splits > 1:
            assert_kept(buffers)


def test_dense_tensors_of_other_kernel_sizes_without_skipping(device: torch.device) -> None:
    check_conv(1, 24, 6, 9, 24, 5, 2, BOXES._replace(skip=False), torch.float16, device, residual=True, beside=0)


def test_taps_that_only_read_padding_are_left_out(device: torch.device) -> None:
    """Their weights are NaN, and times the padding's zero would be NaN too. The box is larger than the map."""
    x = normal(1, 8, 5, 5, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.full((8, 8, 3, 3), torch.nan, device=device).contiguous(memory_format=torch.channels_last)
    weight[:, :, 1, 1] = 1
    out = Output((1, 8, 5, 5), torch.float32, device)
    arguments = (x, weight, None, torch.zeros(8, device=device), None, out.tensor)
    options: dict[str, Any] = {"stride": 1, "padding": 5, "dilation": 5, "relu": False, "precision": "ieee"}
    conv_bn_relu(*arguments, tile=BOXES, **options)
    assert relative_error(out.written, x.sum(1, keepdim=True).expand(-1, 8, -1, -1)) <= 2**-20
    conv_bn_relu(*arguments, tile=BOXES._replace(skip=False), **options)
    assert out.written.isnan().all()


@pytest.mark.parametrize("box", [(1, 2, 16), (1, 32, 1), (2, 4, 4), (32, 1, 1)], ids=str)
def test_every_box(box: tuple[int, int, int], device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_tma, "choose_box", lambda *_: box)
    check_conv(3, 24, 7, 9, 24, 3, 2, BOXES, torch.float16, device, residual=True)


@pytest.mark.parametrize("dilation", [1, 2, 4, 6, 12, 18, 24, 36, 100])
@pytest.mark.parametrize("tile", [BOXES, BOXES._replace(skip=False)], ids=["skip", "masked"])
def test_any_dilation(dilation: int, tile: Tile, device: torch.device) -> None:
    check_conv(2, 8, 20, 37, 16, 3, dilation, tile, torch.float16, device)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rates", [(1, 2, 12), (7, 3), (4, 3, 2, 1, 5)], ids=str)
def test_aspp_branches(rates: tuple[int, ...], splits: int, device: torch.device) -> None:
    check_branches(rates, BOXES._replace(splits=splits), device)


def test_branches_with_much_work_come_first(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 3x3 ones by rate, the 1x1 one last, four in a launch: (slot, kernel, dilation) of each."""
    launched = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *arguments, **_: launched.append((grid[0], arguments[-1]))

    monkeypatch.setattr(conv_tma, "conv_kernel", Kernel())
    rates = (5, 2, 4, 3)
    x, out = normal(1, 8, 6, 6, device=device), normal(1, 40, 6, 6, device=device)
    weights = [guarded(normal(8, 8, k, k, device=device)) for k in (1, 3, 3, 3, 3)]
    aspp_branches(
        guarded(x), weights, None, normal(40, device=device), guarded(out), rates=rates, tile=BOXES, precision="ieee"
    )
    (programs, first), (rest, last) = launched
    assert (first, last) == (((2, 3, 2), (4, 3, 3), (3, 3, 4), (1, 3, 5)), ((0, 1, 1),))
    assert programs == 4 * rest


def check_branches(
    rates: tuple[int, ...], tile: Tile, device: torch.device, dtype: torch.dtype = torch.float16
) -> None:
    N, C, H, W, C_b = 2, 72, 5, 7, 24
    x = normal(N, C, H, W, dtype=dtype, device=device)
    weights = [normal(C_b, C, k, k, dtype=dtype, device=device) / C**0.5 for k in (1, *(3 for _ in rates))]
    channels = len(weights) * C_b
    scale, shift = torch.rand(channels, device=device) + 0.5, normal(channels, device=device)
    out = Output((N, channels, H, W), dtype, device)
    with banded_allocations() as buffers:
        aspp_branches(
            placed(x, torch.nan)[0], [guarded(weight) for weight in weights], guarded(scale), guarded(shift),
            out.tensor, rates=rates, tile=tile, precision="ieee",
        )  # fmt: skip
    if tile.splits > 1:
        assert_kept(buffers)
    for i, written in enumerate(out.written.split(C_b, dim=1)):
        own = slice(i * C_b, (i + 1) * C_b)
        rate = (1, *rates)[i]
        assert_accurate(written, x, weights[i], scale[own], shift[own], None, rate, True, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_aspp_projection(dtype: torch.dtype, device: torch.device) -> None:
    """The last tile of an image is cut off by its end."""
    for splits in (1, 3):
        check_projection(GEMM._replace(splits=splits, block_m=16), dtype, device)


def check_projection(tile: Tile, dtype: torch.dtype, device: torch.device) -> None:
    """By a slice of the weight, whose rest is the pooled branch's."""
    x = normal(3, 136, 5, 7, dtype=dtype, device=device)
    weight = guarded(normal(40, 160, 1, 1, dtype=dtype, device=device) / 12)[:, :136]
    scale, shift = torch.rand(40, device=device) + 0.5, normal(3, 40, device=device)
    out = Output((3, 40, 5, 7), dtype, device)
    with banded_allocations() as buffers:
        aspp_projection(
            placed(x, torch.nan)[0], guarded(shift), weight, guarded(scale), out.tensor, tile=tile, precision="ieee"
        )
    if tile.splits > 1:
        assert_kept(buffers)
    assert_accurate(out.written, x, weight, scale, shift, None, 1, True, dtype=dtype)


def test_fault_12_empty_batch_launches_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_tma, "conv_kernel", None)
    check_conv(0, 24, 5, 5, 24, 3, 1, BOXES, torch.float16, device)
    check_conv(0, 24, 5, 5, 24, 1, 1, GEMM, torch.float16, device)


def test_fault_05_size_one_dimensions_with_odd_strides(device: torch.device) -> None:
    """One pixel per image: the strides along H and W say nothing."""
    x, weight = normal(3, 24, 1, 1, device=device), normal(8, 24, 1, 1, device=device) / 5
    shift = normal(8, device=device)
    for tile in (GEMM, BOXES):
        out = torch.empty(3, 8, device=device).as_strided((3, 8, 1, 1), (8, 1, 3, 5))
        odd = x.as_strided((3, 24, 1, 1), (24, 1, 7, 11))
        conv_bn_relu(
            odd, weight.as_strided((8, 24, 1, 1), (24, 1, 5, 3)), None, shift, None, out,
            stride=1, padding=0, dilation=1, relu=True, tile=tile, precision="ieee",
        )  # fmt: skip
        assert_accurate(out, x, weight, None, shift, None, 1, True, dtype=torch.float32)


@pytest.mark.parametrize("splits", [1, 2])
def test_fault_10_nan_passes_the_relu(splits: int, device: torch.device) -> None:
    x = torch.ones(1, 8, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    x[0, 2, 1, 1] = torch.nan
    weight, shift = torch.ones(8, 8, 1, 1, device=device), torch.zeros(8, device=device)
    out = torch.empty_like(x)
    tile = GEMM._replace(splits=splits)
    conv_bn_relu(
        x, weight, None, shift, None, out,
        stride=1, padding=0, dilation=1, relu=True, tile=tile, precision="ieee",
    )  # fmt: skip
    assert out[0, :, 1, 1].isnan().all()
    assert out.isnan().sum() == 8


def refused(match: str, x: Tensor, weight: Tensor, out: Tensor, tile: Tile = BOXES, **options: Any) -> None:
    shift = options.pop("shift", torch.zeros(len(weight), device=x.device))
    options = {"stride": 1, "padding": weight.shape[2] // 2, "dilation": 1, **options}
    with pytest.raises(ValueError, match=match):
        conv_bn_relu(x, weight, None, shift, None, out, relu=True, tile=tile, precision="ieee", **options)


def test_what_tensor_maps_cannot_serve(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_tma, "conv_kernel", None)

    def images(channels: int, dtype: torch.dtype = torch.float32, beside: int = 0) -> Tensor:
        return placed(torch.zeros(2, channels, 4, 4, dtype=dtype, device=device), 0.0, beside)[0]

    def weights(C_out: int, C: int, kernel: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
        return guarded(torch.zeros(C_out, C, kernel, kernel, dtype=dtype, device=device))

    refused("stride 1 and padding", images(8), weights(8, 8), images(8), stride=2)
    refused("stride 1 and padding", images(8), weights(8, 8), images(8), padding=2)
    refused("square kernels of odd size", images(8), weights(8, 8, 2), images(8))
    refused("square kernels of odd size", images(8), weights(8, 8, 3)[:, :, :, :1], images(8))
    refused("serves 1x1 convolutions", images(8), weights(8, 8), images(8), GEMM)
    shift = torch.zeros(2, 8, device=device)
    refused("one shift for all images", images(8), weights(8, 8, 1), images(8), padding=0, shift=shift)
    refused("chunks of 16 bytes: 6 channels", images(8), weights(6, 8), images(6))
    with pytest.raises(ValueError, match="serves 1x1 convolutions"):
        aspp_branches(
            images(8), [weights(4, 8, 1), weights(4, 8)], None, torch.zeros(8, device=device), images(8),
            rates=(1,), tile=GEMM, precision="ieee",
        )  # fmt: skip
    half = torch.float16
    refused("x must lie at multiples of 16 bytes", images(8, half, 2), weights(8, 8, 3, half), images(8, half))
    refused("weight must lie at multiples of 16 bytes", images(8)[:, :6], weights(8, 6), images(8))
    refused("out must lie at multiples of 16 bytes", images(8), weights(8, 8), images(8, beside=1))
    refused("at most 256 elements", images(8), weights(8, 8), images(8), BOXES._replace(block_n=512))


def test_fault_01_more_pixels_than_coordinates_can_count() -> None:
    """Found before anything is allocated: meta tensors have no memory."""
    x = torch.empty(2**19, 64, 64, 8, device="meta").permute(0, 3, 1, 2)
    weight = torch.empty(8, 8, 1, 1, device="meta")
    tile = GEMM._replace(block_m=256)
    refused("more programs than a launch can have", x, weight, torch.empty_like(x), tile)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tile", SHIPPED, ids=str)
def test_every_tile(tile: Tile, dtype: torch.dtype, device: torch.device) -> None:
    """With a residual, and in splits. Boxes also without skipping, and in ASPP's branches, GEMMs in its projection."""
    tile = tile._replace(block_k=2 * tile.block_k // dtype.itemsize)
    kernel, dilation = (3, 2) if tile.kernel == "boxes_tma" else (1, 1)
    choices = [tile._replace(skip=kernel == 3), tile._replace(splits=2)]
    for choice in choices:
        check_conv(1, 72, 9, 11, 136, kernel, dilation, choice, dtype, device, residual=True)
    if kernel == 1:
        check_projection(tile, dtype, device)
    else:
        check_branches((2, 12), tile._replace(skip=True), device, dtype)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(1, 3),
    map_size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.tuples(st.sampled_from([8, 24, 72]), st.sampled_from([8, 40])),
    dilation=st.integers(1, 10),
    box=st.sampled_from([(1, 4, 4), (1, 2, 16), (2, 4, 8), (4, 1, 8)]),
    splits=st.sampled_from([1, 2]),
    skip=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_anything(
    N: int, map_size: tuple[int, int], channels: tuple[int, int], dilation: int, box: tuple[int, int, int],
    splits: int, skip: bool, residual: bool, seed: int, device: torch.device,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    tile = BOXES._replace(splits=splits, skip=skip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_tma, "choose_box", lambda *_: box)
        check_conv(N, channels[0], *map_size, channels[1], 3, dilation, tile, torch.float32, device, residual=residual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shape", "C_out", "kernel", "dilation"),
    [
        ((2, 1024, 65, 65), 256, 1, 1),
        ((2, 64, 65, 65), 256, 1, 1),
        ((8, 512, 33, 33), 512, 3, 4),
        ((1, 512, 65, 65), 512, 3, 2),
        ((1, 2048, 64, 64), 256, 3, 36),
        ((2, 24, 31, 47), 40, 3, 12),
    ],
    ids=str,
)
def test_networks_sizes(
    shape: tuple[int, int, int, int], C_out: int, kernel: int, dilation: int, dtype: torch.dtype, device: torch.device
) -> None:
    """All tiles of all kernels. PyTorch's error is that of the same precision: TF32 for fp32."""
    layer = Layer.of(
        "conv_bn_relu", shape, (C_out, shape[1], kernel, kernel), dtype,
        padding=dilation * (kernel // 2), dilations=(dilation,), residual=True,
    )  # fmt: skip
    capability = Gpu.of(device).capability
    tiles = [
        tile._replace(splits=splits)
        for splits, tile in product((1, 4), tiles_for(layer, capability))
        if splits in splits_of(layer, tile, capability)
    ]
    check_tiles(shape, C_out, kernel, dilation, tiles, dtype, device, residual=True, precision="tf32")
