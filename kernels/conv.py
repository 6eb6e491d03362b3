"""Convolution, batch norm, residual and ReLU in one pass, with the padding's work left out: the kernel for every GPU.

    out[n, y, x, o] = relu( scale[o] * sum_{r, c, k} in[n, y S + r D - P, x S + c D - P, k] weight[o, r, c, k]
                            + shift[o] + residual[n, y, x, o] )

Fused: the folded batch norm (scale and shift), the addition of the residual and the ReLU, in fp32 on the accumulator,
which is rounded once. A 1x1 convolution is a matrix product [N H W, C] x [C, C_out], a 3x3 one an implicit product of
nine times the depth.

Layout: everything NHWC. The pixels of ``x``, ``residual`` and ``out`` have a pitch, so that each may be a channel slice
of a larger tensor. Weights are [C_out, kH, kW, C]. A program computes BLOCK_M pixels of BLOCK_N channels.

The padding left out: with P = D and stride 1, row y reads rows y - D, y and y + D. Cut at min(D, H - D) and
max(D, H - D), the rows form three intervals in each of which the same of these lie inside the map; so do the columns.
The map falls into at most nine *rectangles* whose pixels share their live taps, which are a rectangle of the kernel. A
program works on BLOCK_M consecutive pixels of one rectangle, over all images: the other taps are never computed, no
load is masked, and a tap is one constant offset to the pixels' addresses. Chen et al., "Rethinking Atrous Convolution
for Semantic Image Segmentation" (2017), observed that at large rates most taps of most pixels read padding. A 1x1
convolution is, to all this, a 3x3 one dilated so far that only its centre lies inside the map.

``aspp_branches`` computes several branches in one launch into channel slices of one tensor. Rectangles with many live
taps come first, of whatever branch, so that the short programs come last and fill the gaps. A branch whose rectangles
are thin, mostly ragged ends of runs, is *whole*: one rectangle with all taps, its loads masked.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .candidates import Tile
from .checks import pixel_pitch
from .cuts import is_whole, masked_run, rectangle_runs
from .splits import add_splits, adding_programs, scale_and_shift


@triton.jit
def interval(number, dilation, size, whole):
    """One of the three intervals of an axis: its first position, its length, its first live tap and their number."""
    inner = tl.where(whole, 0, tl.maximum(tl.minimum(dilation, size - dilation), 0))
    outer = tl.where(whole, size, tl.minimum(tl.maximum(dilation, size - dilation), size))
    middle = tl.where(whole | (2 * dilation < size), 3, 1)  # all taps read inside there, or its own position alone
    start = tl.where(number == 0, 0, tl.where(number == 1, inner, outer))
    stop = tl.where(number == 0, inner, tl.where(number == 1, outer, size))
    first_tap = tl.where(number == 0, 1, tl.where(number == 1, (3 - middle) // 2, 0))
    return start, stop - start, first_tap, tl.where(number == 1, middle, 2)


@triton.jit
def pick(values, index):
    """``values[index]`` of a tuple."""
    result = values[0]
    for i in tl.static_range(1, len(values)):
        result = tl.where(index == i, values[i], result)
    return result


@triton.jit
def rectangle(slot, dilations, H, W, WHOLE: tl.constexpr):
    """A branch's rectangle, nine slots to a branch: branch, then the intervals of its rows and columns."""
    dilation, whole = pick(dilations, slot // 9), pick(WHOLE, slot // 9)
    y, rows, r, row_taps = interval(slot % 9 // 3, dilation, H, whole)
    x, columns, c, column_taps = interval(slot % 3, dilation, W, whole)
    return slot // 9, y, rows, r, row_taps, x, columns, c, column_taps


@triton.jit
def rectangle_and_run(
    tile, dilations, N, H, W, WHOLE: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """The rectangle of a tile and the tile's number in it, rectangles with many live taps first."""
    slot = tl.arange(0, SLOTS)
    branch, _, rows, _, row_taps, _, columns, _, column_taps = rectangle(slot, dilations, H, W, WHOLE)
    runs = tl.where(branch < len(dilations), (N * rows * columns + BLOCK_M - 1) // BLOCK_M, 0)
    rank = row_taps * column_taps * SLOTS - slot  # no two are equal
    before = tl.sum(tl.where(rank[None, :] > rank[:, None], runs[None, :], 0), axis=1)  # [SLOTS]
    mine = (before <= tile) & (tile < before + runs)
    return tl.sum(tl.where(mine, slot, 0)), tl.sum(tl.where(mine, tile - before, 0))


# Not specialised: a picture of another size must not compile anew. Nor may channels of one unit become a constant: the
# loop over the taps would be unrolled, and spill. How far they are aligned is said by the units alone.
@triton.jit(do_not_specialize=[
    "N", "C", "H", "W", "C_out", "H_out", "W_out", "padding", "dilations", "stride_xp", "stride_rp", "stride_op",
])  # fmt: skip
def conv_kernel(
    x_ptr, weight_ptrs, scale_ptr, shift_ptr, residual_ptr, out_ptr, sums_ptr,
    N, C, H, W, C_out, H_out, W_out, padding, dilations,
    stride_xp, stride_rp, stride_op,
    KERNELS: tl.constexpr, STRIDE: tl.constexpr, SKIP: tl.constexpr, WHOLE: tl.constexpr, MASKED: tl.constexpr,
    RELU: tl.constexpr, PER_IMAGE: tl.constexpr, SPLITS: tl.constexpr,
    SLOTS: tl.constexpr, UNIT: tl.constexpr, UNIT_OUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pixels of BLOCK_N of the C_out channels of one branch; or one of SPLITS parts of their sums.

    The strides are those of a pixel of x, residual and out. They and the channels are counted in units, which tells the
    compiler how far loads and stores are aligned.
    """
    C *= UNIT
    stride_xp *= UNIT
    C_out *= UNIT_OUT
    stride_rp *= UNIT_OUT
    stride_op *= UNIT_OUT
    blocks_n = tl.cdiv(C_out, BLOCK_N)
    block_n = tl.program_id(0) % blocks_n
    split = tl.program_id(0) // blocks_n % SPLITS
    tile = tl.program_id(0) // (blocks_n * SPLITS)

    if SKIP:
        slot, run = rectangle_and_run(tile, dilations, N, H_out, W_out, WHOLE, SLOTS, BLOCK_M)
        branch, y0, rows, r0, row_taps, x0, columns, c0, column_taps = rectangle(slot, dilations, H_out, W_out, WHOLE)
        dilation = pick(dilations, branch)
        padding = dilation
        weight_ptr = pick(weight_ptrs, branch)
        kernel = pick(KERNELS, branch)
    else:
        branch, run, y0, rows, r0, x0, columns, c0 = 0, tile, 0, H_out, 0, 0, W_out, 0
        dilation, weight_ptr, kernel = dilations[0], weight_ptrs[0], KERNELS[0]
        row_taps, column_taps = kernel, kernel

    # The pixels. Past the rectangle's end its last one is computed again, and not stored.
    pixels = N * rows * columns
    offs_m = run * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    mask_m = offs_m < pixels
    offs_m = tl.minimum(offs_m, pixels - 1)
    n = (offs_m // (rows * columns)).to(tl.int64)
    y = y0 + offs_m % (rows * columns) // columns
    x = x0 + offs_m % columns
    y_in = y * STRIDE - padding
    x_in = x * STRIDE - padding
    pixel_in = (n * H + y_in) * W + x_in
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (pixel_in * stride_xp)[:, None] + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    rows_w = tl.minimum(offs_n, C_out - 1).to(tl.int64) * (kernel * kernel * C)
    weight_ptrs = weight_ptr + rows_w[None, :] + offs_k[:, None]  # [BLOCK_K, BLOCK_N]

    # One loop over the live taps and, within each, the channels.
    blocks_k = tl.cdiv(C, BLOCK_K)
    steps = row_taps * column_taps * blocks_k
    first = steps * split // SPLITS
    k = first % blocks_k * BLOCK_K
    c = c0 + first // blocks_k % column_taps
    r = r0 + first // blocks_k // column_taps
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(first, steps * (split + 1) // SPLITS):
        tap_x = (r.to(tl.int64) * W + c) * dilation * stride_xp
        tap_w = tl.where(kernel == 1, 0, r * kernel + c) * C
        mask_k = offs_k < (BLOCK_K if EVEN_K else C - k)
        mask_x = mask_k[None, :]
        if MASKED:
            row, column = y_in + r * dilation, x_in + c * dilation
            mask_x = mask_x & ((row >= 0) & (row < H) & (column >= 0) & (column < W))[:, None]
        values = tl.load(x_ptrs + (tap_x + k), mask=mask_x, other=0.0)
        weights = tl.load(weight_ptrs + (tap_w + k), mask=mask_k[:, None], other=0.0)
        acc = tl.dot(values, weights, acc, input_precision=PRECISION)
        k += BLOCK_K
        next_tap = k >= C
        k = tl.where(next_tap, 0, k)
        c = tl.where(next_tap, c + 1, c)
        next_row = c == c0 + column_taps
        c = tl.where(next_row, c0, c)
        r = tl.where(next_row, r + 1, r)

    pixel = ((n * H_out + y) * W_out + x)[:, None]  # [BLOCK_M, 1]
    channel = branch * C_out + offs_n
    channels = len(dilations) * C_out
    mask_n = offs_n < C_out
    mask = mask_m[:, None] & mask_n[None, :]
    if SPLITS > 1:
        tl.store(sums_ptr + (pixel * SPLITS + split) * channels + channel[None, :], acc, mask=mask)
    else:
        if PER_IMAGE:
            acc = scale_and_shift(acc, scale_ptr, None, channel, mask_n)
            acc += tl.load(shift_ptr + n[:, None] * channels + channel[None, :], mask=mask, other=0.0)
        else:
            acc = scale_and_shift(acc, scale_ptr, shift_ptr, channel, mask_n)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + pixel * stride_rp + channel[None, :], mask=mask, other=0.0)
            acc += residual.to(tl.float32)
        if RELU:
            acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_ptr + pixel * stride_op + channel[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    out: Tensor,
    *,
    stride: int,
    padding: int,
    dilation: int,
    relu: bool,
    tile: Tile,
    precision: str,
) -> None:
    """Write a convolution to ``out``.

    Args:
        x, residual, out: (N, C, H, W), dense channels_last or channel slices of such.
        weight: (C_out, C, k, k) in channels_last memory.
        scale: (C_out,) fp32, or None.
        shift: (C_out,) fp32; or (N, C_out), one per image.
        tile: the tile choice; ``skip`` needs a 3x3 kernel with stride 1 and padding equal to dilation.
        precision: of fp32 products: ``"tf32"`` or ``"ieee"``.
    """
    _launch(
        x, [weight], [dilation], scale, shift, residual, out,
        stride=stride, padding=padding, relu=relu, tile=tile, precision=precision,
    )  # fmt: skip


def aspp_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    scale: Tensor | None,
    shift: Tensor,
    out: Tensor,
    *,
    rates: Sequence[int],
    tile: Tile,
    precision: str,
) -> None:
    """Write the branches of ASPP, one 1x1 and a 3x3 for each rate, side by side to ``out``.

    Args:
        x: (N, C, H, W); out: (N, (1 + len(rates)) * C_b, H, W), channels_last.
        weights: (C_b, C, 1, 1) and one (C_b, C, 3, 3) for each rate, in channels_last memory.
        scale, shift: ((1 + len(rates)) * C_b,) fp32; scale may be None.
    """
    far = max(x.shape[2:])  # where only the centre of a 3x3 kernel is inside the map
    _launch(
        x, weights, [far, *rates], scale, shift, None, out,
        stride=1, padding=0, relu=True, tile=tile, precision=precision,
    )  # fmt: skip


def aspp_projection(
    branches: Tensor,
    shift: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    out: Tensor,
    *,
    tile: Tile,
    precision: str,
) -> None:
    """Write the projection of ASPP's branches; the pooled branch is part of ``shift`` (N, C_out)."""
    conv_bn_relu(
        branches, weight, scale, shift, None, out,
        stride=1, padding=0, dilation=1, relu=True, tile=tile, precision=precision,
    )  # fmt: skip


def _launch(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    out: Tensor,
    *,
    stride: int,
    padding: int,
    relu: bool,
    tile: Tile,
    precision: str,
) -> None:
    N, C, H, W = x.shape
    channels, H_out, W_out = out.shape[1:]
    C_out, kernels = weights[0].shape[0], tuple(weight.shape[2] for weight in weights)
    pixels = N * H_out * W_out
    if out.numel() == 0:
        return
    skip = len(weights) > 1 or (tile.skip and kernels == (3,) and stride == 1 and padding == dilations[0])
    if skip:
        dilations = [min(dilation, max(H, W)) for dilation in dilations]  # none reaches farther than past the map
        whole = tuple(len(weights) > 1 and is_whole(N, H, W, dilation, tile.block_m) for dilation in dilations)
        runs = count_runs(N, H, W, tuple(dilations), whole, tile.block_m)
    else:
        whole = (False,)
        runs = -(-pixels // tile.block_m)
    programs = runs * -(-C_out // tile.block_n) * tile.splits
    adders = adding_programs(out) if tile.splits > 1 else 0
    pitch, pitch_r, pitch_out = _pitch(x), _pitch(out if residual is None else residual), _pitch(out)
    far = stride * max(H_out, W_out)
    if max(programs, adders, N * H * W, pixels + tile.block_m, pitch, pitch_r, pitch_out, far) >= 2**31:
        raise ValueError(
            f"x {tuple(x.shape)} has more pixels than can be indexed with 32 bits, or they lie too far apart"
        )
    sums = None
    if tile.splits > 1:
        sums = torch.empty((pixels, tile.splits, channels), dtype=torch.float32, device=x.device)
    unit, unit_out = math.gcd(C, pitch, 16), math.gcd(C_out, pitch_r, pitch_out, 16)
    with torch.cuda.device_of(x):
        conv_kernel[(programs,)](
            x, tuple(weights), scale, shift, residual, out, sums,
            N, C // unit, H, W, C_out // unit_out, H_out, W_out, padding, tuple(dilations),
            pitch // unit, pitch_r // unit_out, pitch_out // unit_out,
            KERNELS=kernels, STRIDE=stride,
            SKIP=skip, WHOLE=whole, MASKED=any(whole) if skip else padding > 0,
            RELU=relu, PER_IMAGE=shift.ndim == 2, SPLITS=tile.splits,
            SLOTS=triton.next_power_of_2(9 * len(weights)), UNIT=unit, UNIT_OUT=unit_out, PRECISION=precision,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, EVEN_K=C % tile.block_k == 0,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
            maxnreg=max_registers(tile, kernels),
        )  # fmt: skip
    if sums is not None:
        add_splits(sums, scale, shift, residual, out, relu=relu)


def max_registers(tile: Tile, kernels: tuple[int, ...]) -> int | None:
    """Of a thread, where ptxas must be told: left to itself, it aims at fewer and may spill a few."""
    if tile.block_m * tile.block_n == 64 * 64:
        return 168
    if tile.block_m * tile.block_n == 64 * 32 and kernels == (1,):
        return 224
    if (tile.block_m, tile.block_n, tile.block_k) == (128, 64, 32) and len(kernels) > 1:  # fp32
        return 192
    return None


@lru_cache(maxsize=4096)
def count_runs(N: int, H: int, W: int, dilations: tuple[int, ...], whole: tuple[bool, ...], block_m: int) -> int:
    """Of BLOCK_M pixels, in all rectangles of all branches."""
    branches = (
        masked_run(N, H, W, block_m) if is_one else rectangle_runs(N, H, W, dilation, block_m)
        for dilation, is_one in zip(dilations, whole, strict=True)
    )
    return sum(count for runs in branches for count, _ in runs)


def _pitch(x: Tensor) -> int:
    pitch = pixel_pitch(x)
    assert pitch is not None  # by the caller's contract
    return pitch
