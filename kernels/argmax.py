"""Bilinear upsampling fused with the argmax over classes.

    out[n, y, x] = argmax_k  gy * (gx * a_k + fx * b_k) + fy * (gx * c_k + fx * d_k)

a, b, c, d are the logits at the corners of the low-resolution cell that output pixel (y, x) falls into, fy and fx its
place inside that cell, g = 1 - f; the arithmetic is that of ``torch.nn.functional.interpolate(mode="bilinear",
align_corners=False)`` in fp32. Fused: interpolation, argmax and the cast of the index. Full-size logits never exist:
the kernel reads the low-resolution logits and writes one index per pixel.

Layout: logits (N, K, h, w) of any strides; out (N, H, W) contiguous. All pixels of one cell read the same four corners,
so the work is cut along the cells: h + 1 by w + 1 of them, since the margin above and left of the first sample is a
cell too (PyTorch clamps it to the first sample: the other has weight zero). A cell is cut into strips of
ROWS x COLUMNS pixels, and a thread owns a strip: per class it loads four corners, interpolates COLUMNS times along x,
then spends five instructions on each pixel: two for the interpolation along y, three for the running maximum. Those
three run on the half-rate pipe and bind the kernel.

The running maximum propagates NaN, and the index moves when the maximum's *bits* change. That is torch.argmax's rule at
no extra cost: the first of equal values wins (a zero is made positive first, so that -0 and +0 are equal), NaN beats
everything and the first NaN stays. An infinite corner with weight zero makes NaN, as in PyTorch.

Source: PyTorch's upsample_bilinear2d (index and weight arithmetic).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """Output pixels of one strip, and the instructions that a warp issues per class for 32 strips (sm_90)."""

    rows: int
    columns: int
    instructions: int


TILES = (Tile(8, 4, 196), Tile(4, 4, 116), Tile(2, 2, 45), Tile(1, 1, 26))
BLOCK = 128  # strips of one program: one per thread
NUM_WARPS = 4
SCHEDULERS = 528  # warp schedulers of an H100 or H200


def strips_per_cell(size_in: int, size_out: int, length: int) -> int:
    return -(-size_out // (size_in * length))  # no cell is longer than ceil(size_out / size_in)


@lru_cache(maxsize=1024)
def choose_tile(batch: int, h: int, w: int, H: int, W: int) -> Tile:
    """The tile that issues the fewest instructions, ragged strips and idle schedulers of small pictures included."""

    def cost(tile: Tile) -> int:
        strips = (h + 1) * strips_per_cell(h, H, tile.rows) * (w + 1) * strips_per_cell(w, W, tile.columns)
        return -(-batch * strips // (32 * SCHEDULERS)) * tile.instructions

    return min(TILES, key=cost)


@triton.jit
def first_position(cell, size_in, size_out, RATIO: tl.constexpr, WIDE: tl.constexpr):
    """The first output position of a cell: the smallest p with (p + 0.5) * size_in / size_out - 0.5 >= cell."""
    if RATIO > 0:
        inside = cell * RATIO + RATIO // 2
    elif WIDE:
        inside = ((2 * cell.to(tl.int64) + 1) * size_out + size_in - 1) // (2 * size_in)
    else:
        inside = ((2 * cell + 1) * size_out + size_in - 1) // (2 * size_in)
    return tl.where(cell < 0, 0, inside).to(tl.int32)


@triton.jit
def locate(
    strip, size_in, size_out, STRIPS: tl.constexpr, LENGTH: tl.constexpr, RATIO: tl.constexpr, WIDE: tl.constexpr
):
    """Along one axis: the cell of a strip and its first output position."""
    cell = strip // STRIPS - 1
    return cell, first_position(cell, size_in, size_out, RATIO, WIDE) + strip % STRIPS * LENGTH


@triton.jit
def fraction(position, cell, scale):
    """Where an output position lies between the samples `cell` and `cell + 1`."""
    source = tl.maximum((position.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    return tl.minimum(tl.maximum(source - cell.to(tl.float32), 0.0), 1.0)


@triton.jit
def upsample_argmax_kernel(
    logits_ptr,
    out_ptr,
    K,
    h,
    w,
    H,
    W,
    stride_n,
    stride_k,
    stride_h,
    stride_w,
    scale_y,
    scale_x,
    STRIPS_Y: tl.constexpr,
    STRIPS_X: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    RATIO_Y: tl.constexpr,
    RATIO_X: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program computes BLOCK strips of ROWS x COLUMNS output pixels of one image, one strip per thread.

    The strips' axis comes last, so that it is spread over the threads and a strip stays in one thread's registers.
    """
    strips_x = (w + 1) * STRIPS_X
    strips = (h + 1) * STRIPS_Y * strips_x
    programs = tl.cdiv(strips, BLOCK)
    n = (tl.program_id(0) // programs).to(tl.int64)
    first_strip = tl.program_id(0) % programs * BLOCK
    strip = tl.minimum(first_strip + tl.arange(0, BLOCK), strips - 1)  # [BLOCK]; past the last one, the last once more
    cell_y, y = locate(strip // strips_x, h, H, STRIPS_Y, ROWS, RATIO_Y, WIDE)
    cell_x, x = locate(strip % strips_x, w, W, STRIPS_X, COLUMNS, RATIO_X, WIDE)
    offs_y = y[None, None, :] + tl.arange(0, ROWS)[:, None, None]  # [ROWS, 1, BLOCK]
    offs_x = x[None, None, :] + tl.arange(0, COLUMNS)[None, :, None]  # [1, COLUMNS, BLOCK]

    # The cell's corners and the pixels' weights.
    top = tl.maximum(cell_y, 0)
    left = tl.maximum(cell_x, 0)
    bottom = tl.minimum(top + 1, h - 1)
    right = tl.minimum(left + 1, w - 1)
    fy = fraction(offs_y, top[None, None, :], scale_y)  # [ROWS, 1, BLOCK]
    fx = fraction(offs_x, left[None, None, :], scale_x)  # [1, COLUMNS, BLOCK]
    gy = 1.0 - fy
    gx = 1.0 - fx
    logits_ptr += n * stride_n
    top_row = logits_ptr + top.to(tl.int64) * stride_h
    bottom_row = logits_ptr + bottom.to(tl.int64) * stride_h
    left_column = left.to(tl.int64) * stride_w
    right_column = right.to(tl.int64) * stride_w
    a_ptr = top_row + left_column
    b_ptr = top_row + right_column
    c_ptr = bottom_row + left_column
    d_ptr = bottom_row + right_column

    # The running maximum. Each class is loaded while the one before is worked on, the last once more. The index is kept
    # in fp32, exact up to 2^24: an integer one may be narrowed to the output's type early, which costs two more
    # instructions per pixel and class.
    best = tl.full([ROWS, COLUMNS, BLOCK], float("-inf"), tl.float32)
    index = tl.zeros([ROWS, COLUMNS, BLOCK], tl.float32)
    next_a = tl.load(a_ptr)
    next_b = tl.load(b_ptr)
    next_c = tl.load(c_ptr)
    next_d = tl.load(d_ptr)
    for k in tl.range(0, K, loop_unroll_factor=2):  # two, so that old and new maximum swap registers instead of moving
        a = next_a.to(tl.float32)[None, None, :]
        b = next_b.to(tl.float32)[None, None, :]
        c = next_c.to(tl.float32)[None, None, :]
        d = next_d.to(tl.float32)[None, None, :]
        step = tl.where(k + 1 < K, stride_k, 0).to(tl.int64)
        a_ptr += step
        b_ptr += step
        c_ptr += step
        d_ptr += step
        next_a = tl.load(a_ptr)
        next_b = tl.load(b_ptr)
        next_c = tl.load(c_ptr)
        next_d = tl.load(d_ptr)

        upper = tl.fma(gx, a, tl.fma(fx, b, 0.0))  # [1, COLUMNS, BLOCK]; adding +0 turns -0 into +0
        lower = tl.fma(gx, c, tl.fma(fx, d, 0.0))
        value = tl.fma(gy, upper, fy * lower)  # [ROWS, COLUMNS, BLOCK]
        new_best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
        index = tl.where(new_best.to(tl.int32, bitcast=True) != best.to(tl.int32, bitcast=True), k * 1.0, index)
        best = new_best

    # The strips again, each column a thread of its own: the store is coalesced, and its layout leaves the loop's alone.
    # Strips past the last one lie below the picture. A cell's end may lie past the picture where it shrinks.
    column = tl.arange(0, BLOCK * COLUMNS)
    strip = first_strip + column // COLUMNS  # [BLOCK * COLUMNS]
    cell_y, y = locate(strip // strips_x, h, H, STRIPS_Y, ROWS, RATIO_Y, WIDE)
    cell_x, x = locate(strip % strips_x, w, W, STRIPS_X, COLUMNS, RATIO_X, WIDE)
    y_end = tl.minimum(first_position(cell_y + 1, h, H, RATIO_Y, WIDE), H)
    x_end = tl.minimum(first_position(cell_x + 1, w, W, RATIO_X, WIDE), W)
    offs_x = x + column % COLUMNS
    mask_x = offs_x < x_end
    if RATIO_X > 0 and RATIO_X % (2 * COLUMNS) == 0:  # only whole strips, at multiples of COLUMNS: vector stores
        offs_x = tl.multiple_of(x, COLUMNS) + column % COLUMNS
        mask_x = x < x_end
    offs_y = y[None, :] + tl.arange(0, ROWS)[:, None]  # [ROWS, BLOCK * COLUMNS]
    mask = mask_x[None, :] & (offs_y < y_end[None, :])
    index = tl.reshape(tl.permute(index, (0, 2, 1)), (ROWS, BLOCK * COLUMNS)).to(tl.int32)
    tl.store(out_ptr + (n * H + offs_y) * W + offs_x[None, :], index.to(out_ptr.dtype.element_ty), mask=mask)


def upsample_argmax(
    logits: torch.Tensor, size: tuple[int, int], dtype: torch.dtype, *, tile: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Launch the kernel: logits (N, K, h, w), size (H, W) -> class indices (N, H, W) of `dtype`.

    `tile` begins with the rows and columns of a strip; by default it is the one of `choose_tile`.
    The arguments are valid: h, w, K >= 1, a floating logits dtype, and an index dtype that holds K - 1.
    """
    N, K, h, w = logits.shape
    H, W = size
    out = torch.empty((N, H, W), dtype=dtype, device=logits.device)
    if out.numel() == 0:
        return out
    rows, columns = (tile or choose_tile(N, h, w, H, W))[:2]
    strips_y, strips_x = strips_per_cell(h, H, rows), strips_per_cell(w, W, columns)
    strips = (h + 1) * strips_y * (w + 1) * strips_x
    programs = N * triton.cdiv(strips, BLOCK)
    if K > 2**24:
        raise ValueError(f"logits must have at most 2**24 classes, got {K}")
    if max(programs, strips + BLOCK) >= 2**31:
        raise ValueError(f"logits {tuple(logits.shape)} upsampled to {size} need more programs than a launch can have")
    with torch.cuda.device_of(logits):
        upsample_argmax_kernel[(programs,)](
            logits,
            out,
            K=K,
            h=h,
            w=w,
            H=H,
            W=W,
            stride_n=logits.stride(0),
            stride_k=logits.stride(1),
            stride_h=logits.stride(2),
            stride_w=logits.stride(3),
            scale_y=h / H,
            scale_x=w / W,
            STRIPS_Y=strips_y,
            STRIPS_X=strips_x,
            ROWS=rows,
            COLUMNS=columns,
            BLOCK=BLOCK,
            RATIO_Y=H // h if H % h == 0 else 0,
            RATIO_X=W // w if W % w == 0 else 0,
            # The last program goes on for up to BLOCK strips past the last cell.
            WIDE=2 * max((h + BLOCK + 1) * (H + 1), (w + 1) * (W + 1)) >= 2**31,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return out
