"""What the convolutions should take on an H200 in bf16, said before any of it is measured.

``python benchmarks/predict.py`` prints the tables of NOTES.md: R50 OS8 520x520 B8 layer by layer (another network with
``--network 4``), and the sums of every network of ``roofline.NETWORKS``, and of one at batch 1.

The kernel, in its predicted tile choice: programs in waves over the multiprocessors, multiplying at a given rate. The
library: its convolution at an assumed share of the rate of matrix products, padding included; as ``conv_pointwise``
also its passes over the result. Either as long as its bytes, if they take longer.
"""

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from cases import ConvCase, fused
from fastdeeplab.kernels.candidates import Gpu, Tile, predict_tile, tiles_for
from fastdeeplab.kernels.tuning import tile_name
from roofline import GPUS, NETWORKS, Layer, conv_layers, network_layers, print_row

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


def predict(layers: Sequence[Layer], show: Callable[..., None]) -> tuple[str, ...]:
    """Shows a row per layer; returns the last one, of their sums over the network."""
    counts = {layer.name: layer.count for layer in layers}
    gpu = Gpu("NVIDIA H200", (9, 0), GPU.multiprocessors)
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
        show(
            name.removeprefix("backbone."), count, case.shape, f"{floor:.1f}", f"{kernel:.1f}",
            tile_name(tile).removeprefix("pointer-"), f"{separate:.1f}", f"{together:.1f}" if one_call else "",
            f"{separate / kernel:.2f}", f"{best / kernel:.2f}",
        )  # fmt: skip
    floor, kernel, separate, best = sums
    ratios = f"{separate / kernel:.2f}", f"{best / kernel:.2f}"
    return f"{floor:.0f}", f"{kernel:.0f}", f"{separate:.0f}", f"{best:.0f}", *ratios


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=int, default=2, choices=range(len(NETWORKS)), help="of roofline.NETWORKS")
    network = NETWORKS[parser.parse_args(arguments).network]
    ratios = ("conv_pointwise / kernel", "best / kernel")
    columns = ("module", "layers", "shape", "floor", "kernel", "its tile", "conv_pointwise", "cudnn_relu", *ratios)
    print_row(*columns)
    print_row(*["---"] * len(columns))
    floor, kernel, separate, best, *last = predict(network_layers(*network), print_row)
    print_row("all", "", "", floor, kernel, "", separate, best, *last)

    print("\nSums over the convolutions of a network\n")
    columns = ("network", "floor", "kernel", "conv_pointwise", "best library form of each layer", *ratios)
    print_row(*columns)
    print_row(*["---"] * len(columns))
    whole = {f"R{d} OS{s} {size} B{network_layers(d, s, size, k)[0].N} K={k}": network_layers(d, s, size, k)
             for d, s, size, k in NETWORKS}  # fmt: skip
    whole["R50 OS8 520x520 B1 K=21"] = conv_layers(50, 8, (520, 520), 1, 21)
    for name, layers in whole.items():
        print_row(name, *predict(layers, lambda *_: None))


if __name__ == "__main__":
    main()
