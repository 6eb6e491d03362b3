"""Measure what may serve a convolution: each tile choice of the kernels and each form of the library.

Everything is compared with PyTorch's convolution in fp64 before it is timed. What is wrong, or fails, is warned of and
takes infinitely long: it is never the fastest.
"""

import importlib
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import library
from .candidates import DEFAULT_FORM, MIN_STEPS, Gpu, Layer, Strip, Tail, Tile, forms_for, sparing, splits_of, tiles_for
from .checks import output_size
from .choice import convolution_precision, why_not
from .decisions import Measurement, versions
from .measure import Call, cudnn_benchmark, largest_error, measure

Convolution = Callable[..., Tensor]  # of what random_inputs gives
Timer = Callable[[Call], float]  # the milliseconds of a call
Choice = TypeVar("Choice", Tile, Strip, str)


class Times(NamedTuple):
    """In microseconds, infinite for what is wrong or fails."""

    tiles: dict[Tile, float]
    forms: dict[str, float]


def tune(
    layer: Layer,
    device: torch.device,
    *,
    seconds: float = 0.05,
    until: float = math.inf,
    timer: Timer | None = None,
) -> Times:
    """Measure every tile choice and library form of a layer on random inputs, with ``cudnn.benchmark`` on.

    Args:
        layer: whose kernels' scale is None, as in a folded network.
        device: where to measure; no tile choice is measured where the kernels can't run.
        seconds: about how long to repeat each.
        until: when to stop, as ``time.perf_counter`` counts: what has not begun by then is not among the times.
        timer: see ``measure``.

    Raises:
        RuntimeError: a choice has left the GPU unusable, so that nothing can be measured after it.
    """
    inputs = random_inputs(layer, device)
    expected = in_fp64(layer, inputs)
    limit = tolerance(layer.dtype, device)

    def timed(calls: Mapping[Choice, Convolution]) -> dict[Choice, float]:
        def error(result: Tensor, _: None) -> float:
            return largest_error(result, expected)

        return time_each(layer, calls, inputs, error, limit, seconds=seconds, until=until, timer=timer)

    with cudnn_benchmark():
        return Times(
            timed({tile: kernel_call(layer, tile) for tile in tile_choices(layer, device)}),
            timed({form: library_call(layer, form) for form in library_forms(layer, device)}),
        )


def time_each(
    layer: Layer | Tail,
    calls: Mapping[Choice, Callable[..., Tensor]],
    inputs: Sequence[Any],
    error: Callable[[Tensor, None], float],
    limit: float,
    *,
    seconds: float,
    until: float,
    timer: Timer | None,
) -> dict[Choice, float]:
    """The microseconds of each call, infinite where it fails or its result's error is above the limit; see ``tune``."""
    times: dict[Choice, float] = {}
    for choice, call in calls.items():
        if perf_counter() >= until:
            break
        try:
            found = measure(call, inputs, lambda *_: None, limit, error=error, seconds=seconds, timer=timer)
            times[choice] = 1000 * found.p50
        except Exception as failed:  # a compiler's, a launch's, too little memory, a wrong result
            if inputs[0].is_cuda:
                torch.cuda.synchronize(inputs[0].device)
            name = choice if isinstance(choice, str) else tile_name(choice)
            warnings.warn(f"{name} is left out for {layer}: {failed}", RuntimeWarning, stacklevel=2)
            times[choice] = math.inf
    return times


def compile_choices(layer: Layer, device: torch.device) -> None:
    """Run every tile choice of a layer once, in as many threads as there are cores, so that ``tune`` finds it compiled.

    What fails is left for ``tune`` to report. The interpreter compiles nothing.
    """
    if device.type != "cuda":
        return
    inputs = random_inputs(layer, device)

    def run(tile: Tile) -> None:
        with suppress(Exception):
            kernel_call(layer, tile)(*inputs)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, tile_choices(layer, device)))  # interrupted, it cancels what has not begun
    torch.cuda.synchronize(device)


def fastest(layer: Layer, device: torch.device, times: Times) -> Measurement | None:
    """The fastest library form, and tile choice if any serves the layer; None where no kernel runs or all are wrong."""
    if why_not(device, layer.dtype) is not None or min([*times.tiles.values(), *times.forms.values()]) == math.inf:
        return None
    gpu, (torch_version, triton_version) = Gpu.of(device), versions()
    tile = _first_smallest(times.tiles) if times.tiles else None
    form = _first_smallest(times.forms)
    return Measurement(
        gpu=gpu.name,
        capability=gpu.capability,
        torch=torch_version,
        triton=triton_version,
        layer=layer,
        tile=tile,
        tile_us=math.inf if tile is None else times.tiles[tile],
        form=form,
        form_us=times.forms[form],
    )


def tile_choices(layer: Layer, device: torch.device, *, wasteful: bool = False) -> list[Tile]:
    """The sparing ones that may serve a layer, also with their K loop split where a GPU has room for more programs.

    If ``wasteful`` all that may serve it, sparing or not.
    """
    if why_not(device, layer.dtype) is not None:
        return []
    gpu = Gpu.of(device)
    found = []
    tiles = tiles_for(layer, gpu.capability)
    for tile in tiles if wasteful else sparing(layer, tiles):
        runs = sum(count for count, _ in layer.runs(tile))
        programs = runs * -(-layer.C_out // tile.block_n)
        steps = layer.executed(tile) / (runs * tile.block_m) * -(-layer.C // tile.block_k)
        most = steps / MIN_STEPS if programs < 2 * gpu.multiprocessors else 1
        splits = splits_of(layer, tile, gpu.capability)
        found += [tile._replace(splits=number) for number in splits if number <= max(most, 1)]
    return found


def library_forms(layer: Layer, device: torch.device) -> tuple[str, ...]:
    """Those that differ for a layer; all but the first need CUDA."""
    return forms_for(layer) if device.type == "cuda" else (DEFAULT_FORM,)


def tile_name(tile: Tile | Strip) -> str:
    """Such as ``pointer-128x128x64-8w-3s-2split-skip``: warps, stages, splits; or ``strips-8x4``."""
    if isinstance(tile, Strip):
        return f"strips-{tile.rows}x{tile.columns}"
    name = f"{tile.kernel}-{tile.block_m}x{tile.block_n}x{tile.block_k}-{tile.num_warps}w-{tile.num_stages}s"
    return name + (f"-{tile.splits}split" if tile.splits > 1 else "") + ("-skip" if tile.skip else "")


def size_out(layer: Layer) -> tuple[int, int]:
    """(H', W') of the result."""
    if layer.function == "aspp_branches":
        return layer.H, layer.W
    H, W = (
        output_size(size, kernel, layer.stride, layer.padding, layer.dilations[0])
        for size, kernel in zip((layer.H, layer.W), layer.kernel, strict=True)
    )
    return H, W


def random_inputs(layer: Layer, device: torch.device, seed: int = 0) -> list[Any]:
    """Tensors for the layer's function, channels_last, whose result has values of the order of 1.

    conv_bn_relu: x (N, C, H, W), weight (C_out, C, kH, kW), shift (C_out,), residual (N, C_out, H', W') or None.
    aspp_branches: x (N, C, H, W), shift ((1 + rates) * C_b,), then the weights.
    aspp_projection: branches (N, C, H, W), pooled (N, C_out, 1, 1), weight (C_out, C + C_out, 1, 1), shift (C_out,).
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = layer.dtype, fan_in: int = 1) -> Tensor:
        values = torch.randn(shape, device=device, generator=generator) / math.sqrt(fan_in)
        return values.to(dtype, memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)

    def weight(C_in: int, kernel: tuple[int, int]) -> Tensor:
        return normal(layer.C_out, C_in, *kernel, fan_in=C_in * math.prod(kernel))

    x = normal(layer.N, layer.C, layer.H, layer.W)
    if layer.function == "aspp_branches":
        kernels = [(1, 1), *[layer.kernel] * len(layer.dilations)]
        shift = normal(len(kernels) * layer.C_out, dtype=torch.float32)
        return [x, shift, *(weight(layer.C, kernel) for kernel in kernels)]
    shift = normal(layer.C_out, dtype=torch.float32)
    if layer.function == "aspp_projection":
        return [x, normal(layer.N, layer.C_out, 1, 1), weight(layer.C + layer.C_out, (1, 1)), shift]
    residual = normal(layer.N, layer.C_out, *size_out(layer)) if layer.residual else None
    return [x, weight(layer.C, layer.kernel), shift, residual]


def library_call(layer: Layer, form: str) -> Convolution:
    """The layer by one of the library's forms, as a function of its ``random_inputs``."""
    convolve = library.FORMS[form]

    def conv_bn_relu(x: Tensor, weight: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
        (dilation,) = layer.dilations
        return convolve(x, weight, None, shift, residual, layer.stride, layer.padding, dilation, layer.relu)

    def aspp_branches(x: Tensor, shift: Tensor, *weights: Tensor) -> Tensor:
        return library.concatenated_branches(convolve, x, weights, None, shift, layer.dilations)

    def aspp_projection(branches: Tensor, pooled: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        return library.projection_of_branches(convolve, branches, pooled, weight, None, shift)

    functions: dict[str, Convolution] = {
        "conv_bn_relu": conv_bn_relu,
        "aspp_branches": aspp_branches,
        "aspp_projection": aspp_projection,
    }
    return functions[layer.function]


def kernel_call(layer: Layer, tile: Tile) -> Convolution:
    """The layer by a kernel in one tile choice, as a function of its ``random_inputs``."""

    def launchers() -> Any:
        return importlib.import_module(".conv" if tile.kernel == "pointer" else ".conv_tma", __package__)

    def empty(x: Tensor, channels: int) -> Tensor:
        shape = (layer.N, channels, *size_out(layer))
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def conv_bn_relu(x: Tensor, weight: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
        out = empty(x, layer.C_out)
        launchers().conv_bn_relu(
            x, weight, None, shift, residual, out,
            stride=layer.stride, padding=layer.padding, dilation=layer.dilations[0], relu=layer.relu,
            tile=tile, precision=layer.precision,
        )  # fmt: skip
        return out

    def aspp_branches(x: Tensor, shift: Tensor, *weights: Tensor) -> Tensor:
        out = empty(x, len(weights) * layer.C_out)
        launchers().aspp_branches(
            x, weights, None, shift, out,
            rates=layer.dilations, tile=tile, precision=layer.precision,
        )  # fmt: skip
        return out

    def aspp_projection(branches: Tensor, pooled: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        out = empty(branches, layer.C_out)
        own_weight, shift = library.split_projection(branches, pooled, weight, None, shift)
        launchers().aspp_projection(
            branches, shift, own_weight.contiguous(memory_format=torch.channels_last), None, out,
            tile=tile, precision=layer.precision,
        )  # fmt: skip
        return out

    functions: dict[str, Convolution] = {
        "conv_bn_relu": conv_bn_relu,
        "aspp_branches": aspp_branches,
        "aspp_projection": aspp_projection,
    }
    return functions[layer.function]


def in_fp64(layer: Layer, inputs: list[Any]) -> Tensor:
    """What the layer's function gives for these inputs, by PyTorch in fp64."""
    return library_call(layer, DEFAULT_FORM)(*(None if value is None else value.double() for value in inputs))


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """Of ``largest_error``: a few roundings of the result's dtype; with TF32, of the products that are summed."""
    if dtype != torch.float32:
        return 2 * torch.finfo(dtype).eps
    return 2**-8 if convolution_precision(device) == "tf32" else 1e-4


def _first_smallest(times: dict[Any, float]) -> Any:
    return min(times, key=lambda choice: times[choice])
