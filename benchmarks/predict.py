"""What the convolutions should take on an H200 in bf16, said before any of it is measured.

``python benchmarks/predict.py`` prints the tables of NOTES.md: R50 OS8 520x520 B8 layer by layer (another network with
``--network 4``), the sums of every network of ``roofline.NETWORKS`` and of two at batch 1, and the steps of the kernel.

The kernel, in its predicted tile choice: programs in waves over the multiprocessors, as many as these hold at once. A
step of their loop multiplies at a given rate, or issues its instructions if that takes longer. The library: its
convolution at an assumed share of the rate of matrix products, padding included; as ``conv_pointwise`` also its passes
over the result. Either as long as its bytes, if they take longer.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from cases import ConvCase, fused
from fastdeeplab.kernels.candidates import TILES, Gpu, Tile, predict_tile, tiles_for
from fastdeeplab.kernels.candidates import Layer as Candidate
from fastdeeplab.kernels.tuning import tile_name
from roofline import GPUS, NETWORKS, Layer, conv_layers, network_layers, print_row

GPU = GPUS["H200"]
KERNEL_FLOPS = 600e12  # of full tiles
LIBRARY_SHARE = 0.8
CLOCK = 1.75e9
SCHEDULERS = 4  # of a multiprocessor, each issues an instruction of a warp per cycle
PRODUCTS = 2048  # of a multiprocessor's tensor cores per cycle, at their best


class Loop(NamedTuple):
    """The loop over taps and channels of a pointer kernel in bf16 on sm_90, by tests/codegen.py under TRITON."""

    instructions: int  # of a warp per step
    resident: int  # programs on a multiprocessor


TRITON = "3.7.1"
BLOCKS = ((128, 128), (128, 64), (64, 128), (64, 64))
LOOPS = {  # by codegen's kind, that of a residual for any 1x1 convolution, and BLOCKS
    "1x1 residual": (Loop(96, 1), Loop(127, 3), Loop(103, 3), Loop(93, 3)),
    "3x3 stride 2": (Loop(156, 1), Loop(228, 2), Loop(173, 3), Loop(140, 3)),
    "3x3 dilated": (Loop(127, 1), Loop(174, 3), Loop(134, 3), Loop(125, 3)),
    "1x1 and 3x3 branches": (Loop(100, 1), Loop(132, 3), Loop(121, 3), Loop(97, 3)),
}


def loop_of(layer: Candidate, tile: Tile) -> Loop:
    kind = "3x3 dilated" if tile.skip else "3x3 stride 2"  # the taps of padding left out, or its loads masked
    if layer.function == "aspp_branches":
        kind = "1x1 and 3x3 branches"
    elif layer.kernel == (1, 1):
        kind = "1x1 residual"
    return LOOPS[kind][BLOCKS.index((tile.block_m, tile.block_n))]


def step_cycles(tile: Tile, loop: Loop) -> tuple[float, float, float]:
    """Of a step of one program that has a multiprocessor to itself: to issue, to multiply, and that at KERNEL_FLOPS."""
    products = tile.block_m * tile.block_n * tile.block_k
    assumed = 2 * products * GPU.multiprocessors * CLOCK / KERNEL_FLOPS
    return loop.instructions * tile.num_warps / SCHEDULERS, products / PRODUCTS, assumed


def kernel_microseconds(case: ConvCase, tile: Tile) -> float:
    """A wave lasts as long as its longest program; those with many steps come first. Partial sums are not counted."""
    loop = loop_of(case.layer, tile)
    slots = GPU.multiprocessors * loop.resident
    blocks_n = -(-case.layer.C_out // tile.block_n) * tile.splits
    runs = case.layer.runs(tile)
    taps = sorted((taps for count, taps in runs for _ in range(count * blocks_n)), reverse=True)
    steps = sum(taps[::slots]) * -(-case.layer.C // tile.block_k) / tile.splits
    issue, _, multiply = step_cycles(tile, loop)
    return 1e6 * max(max(issue, multiply) * loop.resident * steps / CLOCK, case.work.bytes / GPU.bandwidth)


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
    whole["R50 OS8 512x512 B1 K=21"] = conv_layers(50, 8, (512, 512), 1, 21)
    whole["R50 OS8 520x520 B1 K=21"] = conv_layers(50, 8, (520, 520), 1, 21)
    for name, layers in whole.items():
        print_row(name, *predict(layers, lambda *_: None))

    print("\nA step of the pointer kernel's loop in bf16 on sm_90\n")
    cycles = ("cycles to issue", "to multiply", "at the assumed rate")
    columns = ("loop", "its tile", "instructions of a warp", *cycles, "resident programs")
    print_row(*columns)
    print_row(*["---"] * len(columns))
    pointer = {(tile.block_m, tile.block_n): tile for _, tile in TILES if tile.kernel == "pointer"}
    for kind, loops in LOOPS.items():
        for blocks, loop in zip(BLOCKS, loops, strict=True):
            name = tile_name(pointer[blocks]).removeprefix("pointer-")
            found = (f"{count:.0f}" for count in step_cycles(pointer[blocks], loop))
            print_row(kind, name, loop.instructions, *found, loop.resident)


if __name__ == "__main__":
    main()
