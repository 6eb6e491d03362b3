"""Which tile choices may serve a layer, and which of them a small model of the GPU predicts to be the fastest.

What runs, and why, is decided in ``decisions``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from .checks import output_size
from .cuts import box_runs, choose_box, is_whole, live_share, masked_run, rectangle_runs


class Tile(NamedTuple):
    """How a kernel cuts a convolution into programs."""

    kernel: str  # "pointer", "gemm_tma" or "boxes_tma"
    block_m: int  # pixels
    block_n: int  # output channels
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1  # of the K loop; the partial sums are added in fixed order
    skip: bool = False  # leave out the taps that only read padding


Row = tuple[tuple[int, ...], Tile]  # architectures, and what ships for them

ALL = (80, 86, 89, 90, 100, 120)
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # that a program may use
TILES: tuple[
    Row, ...
] = (  # by architecture, for elements of two bytes; with four, block_k is half as long. The first one wins a tie.
    (ALL, Tile("pointer", 128, 128, 64, num_warps=8, num_stages=3)),
    (ALL, Tile("pointer", 128, 64, 64, num_warps=4, num_stages=3)),
    (ALL, Tile("pointer", 64, 128, 64, num_warps=4, num_stages=3)),
    (ALL, Tile("pointer", 64, 64, 64, num_warps=4, num_stages=4)),
    ((90, 100, 120), Tile("gemm_tma", 128, 128, 64, num_warps=8, num_stages=3)),
    ((90, 100), Tile("gemm_tma", 128, 256, 64, num_warps=8, num_stages=3)),
    ((90, 100), Tile("gemm_tma", 256, 128, 64, num_warps=8, num_stages=3)),
    ((90, 100, 120), Tile("gemm_tma", 64, 128, 64, num_warps=4, num_stages=3)),
    ((90, 100, 120), Tile("boxes_tma", 128, 128, 64, num_warps=8, num_stages=3)),
    ((90, 100), Tile("boxes_tma", 128, 256, 64, num_warps=8, num_stages=3)),
    ((90, 100), Tile("boxes_tma", 256, 128, 64, num_warps=8, num_stages=3)),
    ((90, 100, 120), Tile("boxes_tma", 64, 128, 64, num_warps=4, num_stages=3)),
)
# Full fp32 products are not the tensor cores': operands pass through registers, of which larger tiles have none left.
IEEE_TILES: tuple[Row, ...] = ((ALL, Tile("pointer", 64, 64, 16, num_warps=4, num_stages=3)),)
# Rows that do not begin at multiples of 16 bytes are read or written value by value, which takes many registers, too.
ODD_TILES: tuple[Row, ...] = ((ALL, Tile("pointer", 64, 32, 16, num_warps=4, num_stages=3)),)
SPLITS = (1, 2, 4, 8)
MIN_STEPS = 4  # of the K loop, in each split
DEFAULT_FORM = "conv_pointwise"  # of the library, where nothing was measured; but for scales in fp16, see ops


@dataclass(frozen=True)
class Layer:
    """What decides how fast a fused convolution can be."""

    function: str
    N: int
    C: int  # that the convolution reads: without the pooled branch in aspp_projection
    H: int
    W: int
    C_out: int  # of one branch in aspp_branches
    kernel: tuple[int, int]  # of the branches with a rate in aspp_branches
    stride: int
    padding: int
    dilations: tuple[int, ...]  # the rates in aspp_branches
    residual: bool
    relu: bool
    dtype: torch.dtype
    aligned: bool = True  # every pixel and every tensor starts at a multiple of 16 bytes, which TMA needs
    precision: str = "tf32"  # of fp32 products: "tf32" or "ieee"

    @staticmethod
    @lru_cache(maxsize=4096)
    def of(
        function: str,
        shape: Sequence[int],
        weight_shape: Sequence[int],
        dtype: torch.dtype,
        *,
        stride: int = 1,
        padding: int = 0,
        dilations: tuple[int, ...] = (1,),
        residual: bool = False,
        relu: bool = True,
        aligned: bool = True,
        precision: str = "tf32",
    ) -> "Layer":
        """From x's and the weight's shape, of the last branch in ``aspp_branches``; ``torch.Size`` as it is."""
        N, C, H, W = shape
        C_out, _, *kernel = weight_shape
        return Layer(
            function, N, C, H, W, C_out, (kernel[0], kernel[1]), stride, padding, dilations, residual, relu, dtype,
            aligned, precision,
        )  # fmt: skip

    def __str__(self) -> str:
        """Such as ``8x256x65x65->1024 1x1 residual``."""
        kernel = f"rates {self.dilations}" if self.function == "aspp_branches" else "x".join(map(str, self.kernel))
        text = f"{self.N}x{self.C}x{self.H}x{self.W}->{self.C_out} {kernel}"
        text += f" stride {self.stride}" if self.stride > 1 else ""
        text += f" dilation {self.dilations[0]}" if len(self.dilations) == 1 and self.dilations[0] > 1 else ""
        return text + (" residual" if self.residual else "")

    @property
    def pixels(self) -> int:
        """Of the output, all images together."""
        if self.function == "aspp_branches":
            return self.N * self.H * self.W
        H, W = (
            output_size(size, kernel, self.stride, self.padding, self.dilations[0])
            for size, kernel in zip((self.H, self.W), self.kernel, strict=True)
        )
        return self.N * H * W

    @property
    def shrinkable(self) -> bool:
        """Whether taps that only read padding can be left out: 3x3, and the map keeps its size."""
        same_size = self.stride == 1 and self.dilations == (self.padding,)
        return self.function == "aspp_branches" or (self.kernel == (3, 3) and same_size)

    @property
    def live_share(self) -> float:
        """Of the multiplications, those that do not read padding."""
        if not self.shrinkable:
            return 1.0
        shares = [live_share(self.H, self.W, 3, dilation) for dilation in self.dilations]
        if self.function == "conv_bn_relu":
            return shares[0]
        return (1 + 9 * sum(shares)) / (1 + 9 * len(shares))

    def runs(self, tile: Tile) -> list[tuple[int, int]]:
        """The tiles along the pixels: how many, and with how many taps each."""
        size, block_m = (self.N, self.H, self.W), tile.block_m
        if tile.kernel == "boxes_tma":
            convolutions = tuple((3, dilation) for dilation in self.dilations)
            if self.function == "aspp_branches":
                convolutions = ((1, 1), *convolutions)
            box = choose_box(block_m, *size, convolutions, tile.skip)
            return [run for each in convolutions for run in box_runs(*size, *each, box, tile.skip)]
        if not tile.skip:
            return [(-(-self.pixels // block_m), math.prod(self.kernel))]
        if self.function == "conv_bn_relu":
            return rectangle_runs(*size, self.dilations[0], block_m)
        found = [(-(-self.pixels // block_m), 1)]
        for rate in self.dilations:
            found += (
                masked_run(*size, block_m) if is_whole(*size, rate, block_m) else rectangle_runs(*size, rate, block_m)
            )
        return found

    def executed(self, tile: Tile) -> int:
        """How many pairs of a pixel and a tap the tiles execute, the ends of runs included."""
        return tile.block_m * sum(count * taps for count, taps in self.runs(tile))


def architecture(capability: tuple[int, int]) -> int:
    """The one that tiles are listed for which a GPU's compute capability is, or follows: 8.7 is 86, 10.3 is 100."""
    number = 10 * capability[0] + capability[1]
    return max((known for known in ALL if known <= number), default=ALL[0])


@lru_cache(maxsize=4096)
def tiles_for(layer: Layer, capability: tuple[int, int]) -> tuple[Tile, ...]:
    """The tile choices that may serve a layer on a GPU, without splits; none if no kernel can."""
    arch, itemsize = architecture(capability), layer.dtype.itemsize
    if max(layer.N * layer.H * layer.W, layer.pixels) + 256 >= 2**31:  # pixels are counted with 32 bits
        return ()
    found = []
    table = TILES
    if not is_even(layer):
        table = ODD_TILES
    elif layer.precision == "ieee" and layer.dtype == torch.float32:
        table = IEEE_TILES
    for row in table:
        tile = row[1]._replace(block_k=2 * row[1].block_k // itemsize) if table is TILES else row[1]
        shared = (tile.block_m + tile.block_n) * tile.block_k * itemsize * tile.num_stages
        if ships(row, arch, layer.dtype) and shared <= SHARED_KIB[arch] * 1024 and _serves(tile.kernel, layer):
            skips = (True,) if layer.function == "aspp_branches" else (False, True) if layer.shrinkable else (False,)
            found += [tile._replace(skip=skip) for skip in skips]
    return tuple(found)


def ships(row: Row, arch: int, dtype: torch.dtype) -> bool:
    """Whether a row of the tables holds for an architecture and a dtype."""
    architectures, tile = row
    large = tile.block_m * tile.block_n > 64 * 64  # on sm_100 those spill a few registers in fp32
    return arch in architectures and not (arch == 100 and dtype.itemsize == 4 and tile.kernel == "pointer" and large)


def _serves(kernel: str, layer: Layer) -> bool:
    if layer.kernel not in ((1, 1), (3, 3)):
        return False
    if kernel == "pointer":
        return True
    gemm = layer.kernel == (1, 1) and (layer.stride, layer.padding) == (1, 0)
    return is_even(layer) and (gemm if kernel == "gemm_tma" else layer.shrinkable)


def forms_for(layer: Layer) -> tuple[str, ...]:
    """The library's forms that differ for a layer on CUDA; cuDNN takes no shift per image, as the projection's is."""
    forms = [DEFAULT_FORM, "conv_fused_pointwise"]
    if layer.relu and layer.function != "aspp_projection":
        forms.append("cudnn_relu")
        product = layer.kernel == (1, 1) and layer.stride == 1 and not layer.padding and not layer.residual
        if product and layer.dtype.itemsize == 2:
            forms.append("addmm_relu")
    return tuple(forms)


class Strip(NamedTuple):
    """The output pixels of one thread of ``upsample_argmax``."""

    rows: int
    columns: int


STRIPS = (Strip(8, 4), Strip(4, 4), Strip(2, 2), Strip(1, 1))


@dataclass(frozen=True)
class Tail:
    """What decides how fast upsampling and argmax can be."""

    N: int
    K: int
    h: int
    w: int
    H: int
    W: int
    dtype: torch.dtype  # of the logits
    channels_last: bool  # a pixel's logits lie side by side
    function: str = "upsample_argmax"

    @staticmethod
    def of(logits: torch.Tensor, size: Sequence[int]) -> "Tail":
        (N, K, h, w), (H, W) = logits.shape, size
        return Tail(N, K, h, w, H, W, logits.dtype, channels_last=logits.stride(1) == 1)

    def __str__(self) -> str:
        """Such as ``8x21x65x65->520x520``."""
        return f"{self.N}x{self.K}x{self.h}x{self.w}->{self.H}x{self.W}"


def sparing(layer: Layer, tiles: Sequence[Tile]) -> list[Tile]:
    """Those that execute few pairs of a pixel and a tap more than the one that executes the fewest.

    A sixteenth more in ASPP's branches, where the executed share is what the kernels are for; an eighth elsewhere.
    """
    most = 1 + (1 / 16 if layer.function == "aspp_branches" else 1 / 8)
    fewest = min(map(layer.executed, tiles), default=0)
    return [tile for tile in tiles if layer.executed(tile) <= most * fewest]


def splits_of(layer: Layer, tile: Tile, capability: tuple[int, int]) -> tuple[int, ...]:
    """The numbers of splits that a tile choice may have; storing partial sums, these two spill registers on sm_120."""
    full = architecture(capability) == 120 and (
        not is_even(layer) or (tile.kernel, tile.block_m, tile.block_n) == ("pointer", 64, 128)
    )
    return SPLITS[:1] if full else SPLITS


def is_even(layer: Layer) -> bool:
    """Whether every row of values begins at a multiple of 16 bytes."""
    whole_chunks = all(channels * layer.dtype.itemsize % 16 == 0 for channels in (layer.C, layer.C_out))
    return layer.aligned and whole_chunks


class Gpu(NamedTuple):
    """What decisions need to know of a device."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int

    @staticmethod
    @lru_cache
    def of(device: torch.device) -> "Gpu":
        if device.type != "cuda":  # Triton's interpreter, one program at a time
            return Gpu("the interpreter", (8, 0), 1)
        properties = torch.cuda.get_device_properties(device)
        return Gpu(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


@lru_cache(maxsize=4096)
def predict_tile(layer: Layer, gpu: Gpu, tiles: tuple[Tile, ...]) -> Tile:
    """The one of some tile choices, with splits, that has the smallest predicted cost.

    The cost is that of the waves of programs over the multiprocessors times a program's steps of the K loop. A step
    multiplies block_m x block_n and loads block_m + block_n rows, a row for as long as 32 multiplications take. The
    rest of a program lasts as long as two steps, partial sums, written and read again, as long as eight more. Programs
    are split where they make fewer than two waves. Tiles that are not sparing are left out, however the waves fall.
    """

    def cost(tile: Tile) -> float:
        runs = layer.runs(tile)
        count = sum(count for count, _ in runs)
        programs = count * -(-layer.C_out // tile.block_n)
        steps = layer.executed(tile) / (count * tile.block_m) * -(-layer.C // tile.block_k)
        if tile.splits > 1 and (programs >= 2 * gpu.multiprocessors or steps < MIN_STEPS * tile.splits):
            return math.inf
        waves = -(-programs * tile.splits // gpu.multiprocessors)
        step = tile.block_k * (tile.block_m * tile.block_n + 32 * (tile.block_m + tile.block_n))
        return waves * step * (steps / tile.splits + (2 if tile.splits == 1 else 10))

    choices = (
        tile._replace(splits=number)
        for tile in sparing(layer, tiles)
        for number in splits_of(layer, tile, gpu.capability)
    )
    return min(choices, key=cost)
