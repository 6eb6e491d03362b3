"""How maps are cut into rectangles and boxes: the same taps, counted pixel by pixel."""

import math
from collections import Counter
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from fastdeeplab.kernels.candidates import Tile
from fastdeeplab.kernels.cuts import choose_box, live_share, rectangles, taps_along
from layers import aspp, conv, executed_share

SIZES = [(1, 1, 1), (5, 7, 1), (9, 4, 2), (6, 6, 3), (7, 8, 4), (5, 11, 6), (4, 4, 9), (65, 65, 36), (33, 20, 18)]


def live_taps(H: int, W: int, dilation: int) -> torch.Tensor:
    """Which of a pixel's nine taps are inside the map, counted by a convolution: (H, W, 9)."""
    each_tap = torch.eye(9).view(9, 1, 3, 3)
    return F.conv2d(torch.ones(1, 1, H, W), each_tap, padding=dilation, dilation=dilation)[0].permute(1, 2, 0)


@pytest.mark.parametrize(("H", "W", "dilation"), SIZES)
def test_live_share_is_exact(H: int, W: int, dilation: int) -> None:
    live = live_taps(H, W, dilation)
    assert math.isclose(live_share(H, W, 3, dilation), float(live.mean()), rel_tol=1e-6)
    assert live_share(H, W, 1, dilation) == 1


def test_live_share_of_a_larger_kernel() -> None:
    counts = F.conv2d(torch.ones(1, 1, 9, 6), torch.ones(1, 1, 7, 7), padding=3)
    assert math.isclose(live_share(9, 6, 7, 1), float(counts.mean()) / 49, rel_tol=1e-6)


@pytest.mark.parametrize(("H", "W", "dilation"), SIZES)
def test_rectangles_are_the_pixels_with_the_same_live_taps(H: int, W: int, dilation: int) -> None:
    """And what tiles execute is each such set's pixels, over all images, in whole runs."""
    sets = Counter(tuple(taps.tolist()) for taps in live_taps(H, W, dilation).flatten(0, 1))
    found = list(rectangles(H, W, dilation))
    assert sum(rows * columns for rows, columns, _, _ in found) == H * W
    assert sorted((rows * columns, r * c) for rows, columns, r, c in found) == sorted(
        (pixels, int(sum(taps))) for taps, pixels in sets.items()
    )
    for N, block_m in product((1, 3), (32, 128)):
        tile = Tile("pointer", block_m, 64, 64, 4, 3, skip=True)
        executed = sum(math.ceil(N * pixels / block_m) * block_m * sum(taps) for taps, pixels in sets.items())
        assert math.isclose(executed_share(tile, N, H, W, dilation), executed / (9 * N * H * W))
        whole = math.ceil(N * H * W / block_m) * block_m / (N * H * W)
        assert math.isclose(executed_share(tile._replace(skip=False), N, H, W, dilation), whole)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_taps_along_an_axis_are_those_that_reach_the_map(kernel: int) -> None:
    for size, tile, dilation in product([1, 5, 12], [1, 4, 16], [1, 2, 5, 30]):
        reaching = sum(
            any(0 <= p + (tap - kernel // 2) * dilation < size for p in range(start, min(start + tile, size)))
            for start in range(0, size, tile)
            for tap in range(kernel)
        )
        assert sum(taps_along(size, tile, kernel, dilation, True)) == reaching
        assert sum(taps_along(size, tile, kernel, dilation, False)) == -(-size // tile) * kernel


def test_choose_box() -> None:
    assert choose_box(128, 1, 1, 1000, ((1, 1),), True) == (1, 1, 128)
    assert choose_box(128, 1, 64, 64, ((3, 1),), False) == (1, 8, 16)
    assert choose_box(64, 1, 5, 5, ((3, 1),), False) == (1, 8, 8)
    assert choose_box(1024, 1000, 1, 1, ((3, 1),), True) == (256, 2, 2)


@pytest.mark.parametrize(
    ("N", "H", "W", "rates", "excess"),
    [
        pytest.param(8, 64, 64, (12, 24, 36), 0.001, id="512 at stride 8"),
        pytest.param(8, 65, 65, (12, 24, 36), 0.075, id="520 at stride 8"),
        pytest.param(1, 65, 65, (12, 24, 36), 0.29, id="520 at stride 8, one image"),
        pytest.param(8, 33, 33, (6, 12, 18), 0.15, id="520 at stride 16"),
        pytest.param(1, 128, 256, (12, 24, 36), 0.031, id="1024x2048 at stride 8"),
    ],
)
def test_work_of_the_chosen_boxes(N: int, H: int, W: int, rates: tuple[int, ...], excess: float) -> None:
    """Of the work of all branches, as a share of what the padded convolutions do."""
    layer, tile = aspp(N, (H, W), rates), Tile("boxes_tma", 128, 128, 64, 8, 3, skip=True)
    convolutions = ((1, 1), *((3, rate) for rate in rates))
    box = choose_box(tile.block_m, N, H, W, convolutions, True)
    taps = sum(sum(taps_along(H, box[1], *one, True)) * sum(taps_along(W, box[2], *one, True)) for one in convolutions)
    assert layer.executed(tile) == math.ceil(N / box[0]) * tile.block_m * taps
    share = layer.executed(tile) / (N * H * W * (1 + 9 * len(rates)))
    print(f"{N}x{H}x{W}: {share:.3f} with boxes {box}, exactly {layer.live_share:.3f}")
    assert layer.live_share <= share <= layer.live_share + excess


def test_boxes_of_one_convolution() -> None:
    """40 x 40 pixels are 5 x 3 boxes of 8 x 16; at a dilation of 36 most of them have taps beside the centre's."""
    tile = Tile("boxes_tma", 128, 128, 64, 8, 3)
    layer = conv(3, 64, (40, 40), 64, 3, padding=36, dilations=(36,))
    assert layer.runs(tile) == [(3 * 15, 9)]
    assert layer.executed(tile._replace(skip=True)) < layer.executed(tile)
    assert layer.executed(tile._replace(skip=True)) >= layer.live_share * 9 * layer.pixels
