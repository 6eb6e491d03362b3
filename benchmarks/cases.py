"""The shapes, layouts and dtypes in which the kernels are benchmarked, and the ways to run their rivals."""

import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import roofline
import torch
from fastdeeplab.kernels.candidates import Gpu, Layer, Tile, predict_tile
from fastdeeplab.kernels.choice import convolution_precision
from fastdeeplab.kernels.tuning import (
    in_fp64,
    kernel_call,
    library_call,
    library_forms,
    random_inputs,
    tile_choices,
    tile_name,
)
from torch import Tensor

from fastdeeplab.fusion import CLASSES_MULTIPLE
from fastdeeplab.speed.rivals import short_name

Record = Callable[..., None]  # the fixture of conftest.py

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLASSES = (19, 21, 150)  # Cityscapes, Pascal VOC, ADE20K

# The head gives channels_last bf16; NCHW is what other callers may have, fp32 what they train in.
LOGITS = ((torch.bfloat16, "channels_last"), (torch.bfloat16, "NCHW"), (torch.float32, "channels_last"))


@dataclass(frozen=True)
class Case:
    batch: int
    classes: int
    low: tuple[int, int]
    full: tuple[int, int]
    dtype: torch.dtype
    layout: str

    @property
    def shape(self) -> str:
        return "{}x{}x{}x{}->{}x{}".format(self.batch, self.classes, *self.low, *self.full)

    @property
    def dtype_name(self) -> str:
        return short_name(self.dtype)

    def __str__(self) -> str:
        return f"{self.shape}-{self.dtype_name}-{self.layout}"

    def logits(self, seed: int = 0) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        logits = torch.randn((self.batch, self.classes, *self.low), device=DEVICE, generator=generator)
        memory_format = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        return (3 * logits).to(self.dtype, memory_format=memory_format)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for these very shapes, in one graph; skips where the compiler is missing."""
    if DEVICE.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs g++ on a CPU")
    torch.compiler.reset()  # it gives up compiling, silently, after a few different shapes
    return torch.compile(function, fullgraph=True, dynamic=False)


INPUTS = (  # size, batch, classes
    ((520, 520), 8, 21),
    ((512, 512), 8, 21),
    ((512, 512), 8, 150),
    ((520, 520), 1, 21),
    ((512, 512), 1, 21),
    ((1024, 2048), 1, 19),
)
CLASSIFIER = "classifier.4"  # has a bias in place of a batch norm


@dataclass(frozen=True)
class ConvCase:
    """A convolution, or the ones of ASPP, with what is fused to it."""

    name: str  # a network that has it, and its module there
    layer: Layer
    layout = "channels_last"

    @property
    def dtype_name(self) -> str:
        return short_name(self.layer.dtype)

    @property
    def shape(self) -> str:
        layer = self.layer
        text = f"{layer.N}x{layer.C}x{layer.H}x{layer.W}->{layer.C_out}"
        if layer.function == "aspp_branches":
            return f"{text} rates {' '.join(map(str, layer.dilations))}"
        text += " {}x{}".format(*layer.kernel)
        text += f" stride {layer.stride}" if layer.stride > 1 else ""
        text += f" dilation {layer.dilations[0]}" if layer.dilations != (1,) else ""
        return text + (" residual" if layer.residual else "") + ("" if layer.relu else " no relu")

    @property
    def work(self) -> roofline.Work:
        """Reads and writes everything once, multiplies nothing with padding where the map keeps its size.

        The share of ASPP's pooled branch in the projection, once per image, is not counted.
        """
        layer = self.layer
        outputs = layer.pixels * layer.C_out * (1 + len(layer.dilations) * (layer.function == "aspp_branches"))
        inputs = layer.C * (layer.pixels if layer.kernel == (1, 1) else layer.N * layer.H * layer.W)
        values = inputs + layer.C_out * layer.C * self._taps + (1 + layer.residual) * outputs
        return roofline.Work(layer.dtype.itemsize * values, self.flop * layer.live_share)

    @property
    def flop(self) -> int:
        """Those on padding included."""
        return 2 * self.layer.pixels * self.layer.C_out * self.layer.C * self._taps

    @property
    def _taps(self) -> int:
        """Of all branches together."""
        layer = self.layer
        taps = math.prod(layer.kernel)
        return 1 + len(layer.dilations) * taps if layer.function == "aspp_branches" else taps

    def __str__(self) -> str:
        return f"{self.name} {self.shape}".replace(" ", "-")


def network_convolutions(dtype: torch.dtype) -> list[ConvCase]:
    """The distinct ones at output strides 8 and 16: of R50, as R101 and R152 have no others."""
    named: dict[Layer, str] = {}
    for (height, width), batch, classes in INPUTS:
        for output_stride in (8, 16):
            network = f"R50 OS{output_stride} {height}x{width} B{batch}"
            found = roofline.conv_layers(50, output_stride, (height, width), batch, classes)
            for name, layer in fused(found, dtype):
                named.setdefault(layer, f"{network} {name}")
    return [ConvCase(name, layer) for layer, name in named.items()]


def fused(layers: Sequence[roofline.Layer], dtype: torch.dtype) -> Iterator[tuple[str, Layer]]:
    """A network's convolutions as the kernels see them, ASPP's branches as one, with their modules' names."""
    branches = [layer for layer in layers if layer.stage == roofline.BRANCHES]
    for found in layers:
        C_out = found.C_out
        if found.name == CLASSIFIER:  # as an accelerated model pads it
            C_out += -C_out % CLASSES_MULTIPLE
        shape, weight = (found.N, found.C_in, found.H, found.W), (C_out, found.C_in, found.kernel, found.kernel)
        if found.name == "classifier.0.project.0":
            pooled = found.C_in // (len(branches) + 1)
            shape = (found.N, found.C_in - pooled, found.H, found.W)
            yield found.name, Layer.of("aspp_projection", shape, (found.C_out, shape[1], 1, 1), dtype)
        elif found.stage != roofline.BRANCHES:
            yield found.name, Layer.of(
                "conv_bn_relu", shape, weight, dtype, stride=found.stride,
                padding=found.dilation * (found.kernel // 2), dilations=(found.dilation,),
                residual=found.residual, relu=found.relu,
            )  # fmt: skip
        elif found is branches[-1]:
            rates = tuple(layer.dilation for layer in branches if layer.kernel == 3)
            yield "classifier.0.convs", Layer.of("aspp_branches", shape, weight, dtype, dilations=rates)


def small_convolutions(dtype: torch.dtype) -> list[ConvCase]:
    """For a CPU: one of each kind."""
    options: dict[str, dict[str, Any]] = {
        "reduce": {},
        "expand": {"residual": True},
        "downsample": {"stride": 2, "relu": False},
        "dilated": {"padding": 4, "dilations": (4,)},
    }
    found = [
        ConvCase(name, Layer.of("conv_bn_relu", (2, 32, 9, 9), (16, 32, size, size), dtype, **more))
        for (name, more), size in zip(options.items(), (1, 1, 1, 3), strict=True)
    ]
    found.append(
        ConvCase("branches", Layer.of("aspp_branches", (2, 32, 9, 9), (8, 32, 3, 3), dtype, dilations=(3, 6, 9)))
    )
    found.append(ConvCase("projection", Layer.of("aspp_projection", (2, 32, 9, 9), (8, 32, 1, 1), dtype)))
    return found


def convolutions(dtype: torch.dtype) -> list[ConvCase]:
    found = network_convolutions(dtype) if DEVICE.type == "cuda" else small_convolutions(dtype)
    precision = convolution_precision(DEVICE) if dtype == torch.float32 else "tf32"
    return [replace(case, layer=replace(case.layer, precision=precision)) for case in found]


def parametrize_convolutions(metafunc: pytest.Metafunc, functions: Sequence[str]) -> None:
    """Each case of these functions with its rivals, the library's forms and, where they can run, the kernels."""
    config = metafunc.config
    cases = convolutions(getattr(torch, config.getoption("--dtype")))
    metafunc.parametrize(
        ("case", "implementation", "tile"),
        [
            pytest.param(case, name, tile, id=f"{case}-{name}")
            for case in cases
            if case.layer.function in functions
            for name, tile in implementations(case.layer, config.getoption("--all-tiles"))
        ],
    )


def implementations(layer: Layer, all_tiles: bool) -> list[tuple[str, Tile | None]]:
    """Their names, those of kernels with the tile choice: the predicted one, as long as nothing is measured; or all."""
    tiles = tile_choices(layer, DEVICE)
    pointer = tuple(tile for tile in tiles if tile.kernel == "pointer" and tile.splits == 1)
    ours = [("triton-predicted", predict_tile(layer, Gpu.of(DEVICE), pointer))] if pointer else []
    ours += [(f"triton-{tile_name(tile)}", tile) for tile in tiles if all_tiles]
    return [*((name, None) for name in ("eager", "compiled", *library_forms(layer, DEVICE))), *ours]


@functools.lru_cache(maxsize=1)
def inputs_and_result(layer: Layer) -> tuple[list[Any], Tensor]:
    """Random tensors for a layer, and what it makes of them in fp64."""
    inputs = random_inputs(layer, DEVICE)
    return inputs, in_fp64(layer, inputs)


def build_convolution(
    case: ConvCase, implementation: str, tile: Tile | None, eager: Callable[[], Callable[..., Tensor]]
) -> Callable[..., Tensor]:
    """A function of the layer's random inputs; ``eager`` makes that of PyTorch's modules."""
    if tile is not None:
        return kernel_call(case.layer, tile)
    if implementation == "eager":
        return eager()
    return compiled(eager()) if implementation == "compiled" else library_call(case.layer, implementation)
