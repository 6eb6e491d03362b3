"""How a map is cut into tiles along its pixels, and which taps of a convolution each of them executes.

By rectangles of pixels that share their live taps, each in runs of BLOCK_M; or by boxes of a power of two of pixels.
"""

import math
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise, product

MAX_BOX = 256  # elements along one dimension of a box of "boxes_tma": the hardware's limit


def intervals(size: int, dilation: int) -> Iterator[tuple[int, int]]:
    """The stretches of an axis in which the same of three taps are inside the map: length, live taps."""
    inner, outer = sorted((dilation, size - dilation))
    cuts = (0, max(inner, 0), min(outer, size), size)
    for start, stop in pairwise(cuts):
        if start < stop:
            yield stop - start, sum(0 <= start + step < size for step in (-dilation, 0, dilation))


def rectangles(H: int, W: int, dilation: int) -> Iterator[tuple[int, int, int, int]]:
    """The at most nine rectangles of a map whose pixels share their live taps: rows, columns, row and column taps."""
    for (rows, row_taps), (columns, column_taps) in product(intervals(H, dilation), intervals(W, dilation)):
        yield rows, columns, row_taps, column_taps


def rectangle_runs(N: int, H: int, W: int, dilation: int, block_m: int) -> list[tuple[int, int]]:
    """For each rectangle how many runs of BLOCK_M pixels it has, over all images, and the live taps of each."""
    return [
        (-(-N * rows * columns // block_m), row_taps * column_taps)
        for rows, columns, row_taps, column_taps in rectangles(H, W, dilation)
    ]


def masked_run(N: int, H: int, W: int, block_m: int) -> list[tuple[int, int]]:
    """The same of the map as one rectangle with all taps, loads of padding masked."""
    return [(-(-N * H * W // block_m), 9)]


@lru_cache(maxsize=4096)
def is_whole(N: int, H: int, W: int, dilation: int, block_m: int) -> bool:
    """Whether a branch of ASPP executes fewer taps as one masked rectangle: where its rectangles are thin."""

    def executed(runs: list[tuple[int, int]]) -> int:
        return sum(count * taps for count, taps in runs)

    return executed(masked_run(N, H, W, block_m)) < executed(rectangle_runs(N, H, W, dilation, block_m))


@lru_cache(maxsize=4096)
def choose_box(
    block_m: int, N: int, H: int, W: int, convolutions: tuple[tuple[int, int], ...], skip: bool
) -> tuple[int, int, int]:
    """Images, rows and columns of the box of ``block_m`` pixels with the fewest taps executed; the most compact one.

    Args:
        convolutions: kernel and dilation of each that shares the launch.
    """
    sizes = [1 << i for i in range(MAX_BOX.bit_length())]
    boxes = [(n, h, w) for n in sizes for h in sizes for w in sizes if n * h * w == block_m]

    def cost(box: tuple[int, int, int]) -> tuple[int, int, int]:
        images, rows, columns = box
        taps = sum(
            sum(taps_along(H, rows, kernel, dilation, skip)) * sum(taps_along(W, columns, kernel, dilation, skip))
            for kernel, dilation in convolutions
        )
        return -(-N // images) * taps, images, rows + columns

    return min(boxes, key=cost)


def taps_along(size: int, length: int, kernel: int, dilation: int, skip: bool) -> list[int]:
    """Of each box along an axis, the taps that are executed: those that read inside the map from any of its pixels."""
    half = kernel // 2
    return [
        min(half, (min(start + length, size) - 1) // dilation) + 1 + min(half, (size - 1 - start) // dilation)
        if skip
        else kernel
        for start in range(0, size, length)
    ]


def box_runs(
    N: int, H: int, W: int, kernel: int, dilation: int, box: tuple[int, int, int], skip: bool
) -> list[tuple[int, int]]:
    """How many boxes execute how many taps, over all images."""
    images, rows, columns = box
    taps = Counter(map(math.prod, product(
        taps_along(H, rows, kernel, dilation, skip), taps_along(W, columns, kernel, dilation, skip)
    )))  # fmt: skip
    return [(-(-N // images) * count, number) for number, count in taps.items()]


def live_share(H: int, W: int, kernel: int, dilation: int) -> float:
    """Share of the pairs of a pixel and a tap that read inside the map, with a padding that keeps the map's size."""

    def along(size: int) -> float:
        taps = (abs(tap - kernel // 2) * dilation for tap in range(kernel))
        return sum(max(size - distance, 0) for distance in taps) / (kernel * size)

    return along(H) * along(W)
