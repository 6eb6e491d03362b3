"""What the convolutions of R50 OS8 520x520 B8 in bf16 should take on an H200, said before any of it is measured.

``python benchmarks/predict.py`` prints the table of NOTES.md. The kernel, in its predicted tile choice: programs in
waves over the multiprocessors, multiplying at an assumed rate. The library: its convolution at an assumed share of the
rate of matrix products, padding included; as ``conv_pointwise`` also its passes over the result. Either as long as its
bytes, if they take longer.
"""

import math

import torch
from cases import ConvCase, fused
from fastdeeplab.kernels.candidates import Gpu, Tile, predict_tile, tiles_for
from fastdeeplab.kernels.tuning import tile_name
from roofline import GPUS, conv_layers, print_row

GPU = GPUS["H200"]
KERNEL_FLOPS = 600e12  # of full tiles
LIBRARY_SHARE = 0.8


def kernel_microseconds(case: ConvCase, tile: Tile) -> float:
    """A wave lasts as long as its longest program; those with many steps come first. Partial sums are not counted."""
    resident = 1 if tile.block_m * tile.block_n >= 128 * 128 else 3  # on a multiprocessor
    slots = GPU.multiprocessors * resident
    blocks_n = -(-case.layer.C_out // tile.block_n) * tile.splits
    runs = case.layer.runs(tile)
    taps = sorted((taps for count, taps in runs for _ in range(count * blocks_n)), reverse=True)
    steps = sum(taps[::slots]) * -(-case.layer.C // tile.block_k) / tile.splits
    flop = 2 * tile.block_m * tile.block_n * tile.block_k * slots * steps
    return 1e6 * max(flop / KERNEL_FLOPS, case.work.bytes / GPU.bandwidth)


def library_microseconds(case: ConvCase, form: str) -> float:
    """``conv_pointwise`` has a pass each for bias, residual and ReLU; ASPP's branches are concatenated."""
    layer = case.layer
    branches = 1 + len(layer.dilations) if layer.function == "aspp_branches" else 1
    one_map = layer.dtype.itemsize * layer.pixels * layer.C_out * branches
    bytes_inside, maps = case.work.bytes, 2 * (branches > 1)
    if form == "conv_pointwise":
        bytes_inside -= layer.residual * one_map
        maps += 2 + 3 * layer.residual + 2 * layer.relu
    convolution = max(case.flop / (LIBRARY_SHARE * GPU.tensor_flops), bytes_inside / GPU.bandwidth)
    return 1e6 * (convolution + maps * one_map / GPU.bandwidth)


def main() -> None:
    layers = conv_layers(50, 8, (520, 520), 8)
    counts = {layer.name: layer.count for layer in layers}
    gpu = Gpu("NVIDIA H200", (9, 0), GPU.multiprocessors)
    columns = (
        "floor",
        "kernel",
        "its tile",
        "conv_pointwise",
        "cudnn_relu",
        "conv_pointwise / kernel",
        "best / kernel",
    )
    print_row("module", "layers", "shape", *columns)
    print_row(*["---"] * (3 + len(columns)))
    sums = [0.0] * 4
    for name, layer in fused(layers, torch.bfloat16):
        case = ConvCase(name, layer)
        tiles = tuple(tile for tile in tiles_for(layer, gpu.capability) if tile.kernel == "pointer")
        if not tiles or layer.H == 1:  # the stem; the pooled branch
            continue
        tile, count = predict_tile(layer, gpu, tiles), counts.get(name, 1)
        kernel, separate = kernel_microseconds(case, tile), library_microseconds(case, "conv_pointwise")
        one_call = layer.relu and layer.function != "aspp_projection"
        together = library_microseconds(case, "cudnn_relu") if one_call else math.inf
        best = min(separate, together)
        floor = 1000 * case.work.floor(GPU)
        sums = [total + count * time for total, time in zip(sums, (floor, kernel, separate, best), strict=True)]
        print_row(
            name.removeprefix("backbone."), count, case.shape, f"{floor:.1f}", f"{kernel:.1f}",
            tile_name(tile).removeprefix("pointer-"), f"{separate:.1f}", f"{together:.1f}" if one_call else "",
            f"{separate / kernel:.2f}", f"{best / kernel:.2f}",
        )  # fmt: skip
    floor, kernel, separate, best = sums
    ratios = f"{separate / kernel:.2f}", f"{best / kernel:.2f}"
    print_row("all", "", "", f"{floor:.0f}", f"{kernel:.0f}", "", f"{separate:.0f}", f"{best:.0f}", *ratios)


if __name__ == "__main__":
    main()
