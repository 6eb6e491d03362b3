"""The fused convolutions: each implementation, form of the library and tile choice."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdeeplab import kernels
from fastdeeplab.kernels import reference
from fastdeeplab.kernels.candidates import Layer, Tile
from fastdeeplab.kernels.choice import DTYPES, convolution_precision, kernels_are_off
from fastdeeplab.kernels.measure import largest_error
from fastdeeplab.kernels.tuning import (
    kernel_call,
    library_call,
    library_forms,
    random_inputs,
    tile_choices,
    tile_name,
    tolerance,
)
from fastdeeplab.verification.subjects import Subject, Trial, convolution_dtype, implementations, soil


def convolution_subjects(device: torch.device, quick: bool) -> Iterator[Subject]:
    for dtype in DTYPES:
        for layer, tiles in chosen_tiles(verified_layers(device, dtype), device, quick):
            trials = partial(_convolution_trials, layer, tiles, device)
            yield Subject(layer.function, str(layer), convolution_dtype(dtype, device), trials)


def chosen_tiles(layers: Sequence[Layer], device: torch.device, quick: bool) -> Iterator[tuple[Layer, list[Tile]]]:
    """The tile choices to verify on each layer, so that a function has all that any of its layers may have.

    Those without splits on every layer, those with splits on the first that may have them. If ``quick``, those without
    splits on the first that may have them.
    """
    seen: set[tuple[str, Tile]] = set()
    for layer in layers:
        tiles = [] if kernels_are_off() else tile_choices(layer, device, wasteful=True)
        fresh = {(layer.function, tile) for tile in tiles} - seen
        seen |= fresh
        if quick:
            yield layer, [tile for tile in tiles if tile.splits == 1 and (layer.function, tile) in fresh]
        else:
            yield layer, [tile for tile in tiles if tile.splits == 1 or (layer.function, tile) in fresh]


def verified_layers(device: torch.device, dtype: torch.dtype) -> list[Layer]:
    """Of each function and each kind of convolution in the network one, odd channel counts, rates near and far."""
    # With few pixels and many channels, so that the K loop can be split.
    cpu = device.type == "cpu"
    N, C, H, W, C_out, deep = (1, 40, 5, 6, 24, 136) if cpu else (2, 512, 17, 19, 192, 2048)
    far, near = ((2, 4, 9), (1, 2)) if cpu else ((4, 9, 36), (1, 2, 18))

    def layer(function: str, shape: tuple[int, ...], C_out: int, kernel: int = 1, **options: Any) -> Layer:
        aligned = all(channels * dtype.itemsize % 16 == 0 for channels in (shape[1], C_out))
        precision = convolution_precision(device) if dtype == torch.float32 else "tf32"
        weight_shape = (C_out, shape[1], kernel, kernel)
        return Layer.of(function, shape, weight_shape, dtype, aligned=aligned, precision=precision, **options)

    return [
        layer("conv_bn_relu", (N, C, H, W), C_out, 3, padding=4, dilations=(4,), residual=True),
        layer("conv_bn_relu", (N, deep, H, W), C_out, residual=True),
        layer("conv_bn_relu", (N, C, H, W), C_out, stride=2, relu=False),
        layer("conv_bn_relu", (N, C, H, W), C_out, 3, stride=2, padding=1),
        layer("conv_bn_relu", (N + 1, C + 8, H, W), C_out + 8, 3, padding=1),
        layer("conv_bn_relu", (N, deep + 3, H, W), 21, relu=False),
        layer("aspp_branches", (1, deep, H, W), C_out, 3, dilations=far),
        layer("aspp_branches", (N + 1, C, H, W), 8, 3, dilations=near),
        layer("aspp_projection", (2, deep, H, W), C_out),
    ]


def _convolution_trials(layer: Layer, tiles: Sequence[Tile], device: torch.device) -> list[Trial]:
    """The public function with a scale, then forms of the library and tile choices without, as after folding."""
    inputs, limit = random_inputs(layer, device), tolerance(layer.dtype, device)
    branches = 1 + len(layer.dilations) if layer.function == "aspp_branches" else 1
    generator = torch.Generator(device).manual_seed(1)
    scale = torch.rand(branches * layer.C_out, device=device, generator=generator) + 0.5
    scaled, plain = (_reference(layer, inputs, values) for values in (scale, None))
    can_run = implementations(device, layer.dtype)

    def trial(impl: str, choice: str, expected: Tensor, call: Callable[[], Tensor]) -> Trial:
        def error() -> float:
            soil(expected.shape, layer.dtype, device)
            return largest_error(call(), expected)

        return Trial(impl, choice, limit, error)

    arguments, options = _arguments(layer, inputs, scale)
    function = partial(getattr(kernels, layer.function), *arguments, **options)
    trials = [trial(impl, "", scaled, partial(function, impl=impl)) for impl in can_run]
    forms = library_forms(layer, device)
    for form in forms if "triton" in can_run else forms[:1]:  # the others may need Triton, too
        trials.append(trial("torch", form, plain, partial(library_call(layer, form), *inputs)))
    for tile in tiles:
        trials.append(trial("triton", tile_name(tile), plain, partial(kernel_call(layer, tile), *inputs)))
    return trials


def _arguments(layer: Layer, inputs: Sequence[Any], scale: Tensor | None) -> tuple[list[Any], dict[str, Any]]:
    """Of the layer's function, from its ``random_inputs``."""
    if layer.function == "aspp_branches":
        x, shift, *weights = inputs
        return [x, weights, scale, shift], {"rates": layer.dilations}
    if layer.function == "aspp_projection":
        branches, pooled, weight, shift = inputs
        return [branches, pooled, weight, scale, shift], {}
    x, weight, shift, residual = inputs
    (dilation,) = layer.dilations
    options = {"stride": layer.stride, "padding": layer.padding, "dilation": dilation, "relu": layer.relu}
    return [x, weight, scale, shift, residual], options


def _reference(layer: Layer, inputs: Sequence[Any], scale: Tensor | None) -> Tensor:
    in_fp64 = [None if value is None else value.double() for value in (*inputs, scale)]
    arguments, options = _arguments(layer, in_fp64[:-1], in_fp64[-1])
    return getattr(reference, layer.function)(*arguments, **options)
