"""Helpers of the kernels that work on the pixels between low-resolution logits.

One lane owns the pixels of one *chunk*: at most TILE_Y x TILE_X pixels that lie between the same four low-resolution
logits (a cell; the border is a cell whose corners coincide). It loads the four corners once per class and interpolates
in registers, as ``F.interpolate(mode="bilinear", align_corners=False)`` does. Tensors are [TILE_Y, TILE_X, BLOCK], or 1
where they do not vary; neighbouring lanes own neighbouring chunks, so that their loads of one plane of logits coalesce.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # chunks of a program: one for each lane of 4 warps
MAX_TILE_Y, MAX_TILE_X = 4, 8  # 32 pixels of a lane: what fits in registers beside their maximum, sum and target

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # stands for -inf, of which differences are NaN


@triton.jit
def first_position(cell, n_in, n_out):
    """The first of n_out positions at or after low-resolution position ``cell``, for half-pixel centres."""
    return tl.maximum((n_out * (2 * cell + 1) + n_in - 1) // (2 * n_in), 0)


@triton.jit
def axis_chunk(chunk, offs, n_in, n_out, CHUNKS: tl.constexpr, TILE: tl.constexpr):
    """One axis of a chunk: its two corners, its positions, which it owns, and their weight of the second corner."""
    cell = chunk // CHUNKS - 1
    start = first_position(cell, n_in, n_out) + chunk % CHUNKS * TILE
    end = tl.minimum(first_position(cell + 1, n_in, n_out), n_out)
    position = start + offs
    # An exact integer below 2 * n_out where the position is owned, so that 32 bits suffice even if the products wrap.
    fraction = ((2 * position + 1) * n_in - (2 * cell + 1) * n_out).to(tl.float32) / (2 * n_out)
    # Beyond the border both corners are the same: it counts as the one that the neighbouring cell shares.
    fraction = tl.where(cell < 0, 1.0, tl.where(cell == n_in - 1, 0.0, fraction))
    return tl.maximum(cell, 0), tl.minimum(cell + 1, n_in - 1), position, position < end, fraction


@triton.jit
def chunk_geometry(
    block, rows, h, w, H, W,
    CHUNKS_Y: tl.constexpr, CHUNKS_X: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The chunks of a block.

    Returns which of them exist [1, 1, BLOCK], the offsets of their four corners in a plane of logits, the offsets of
    their pixels in a plane of the target and whether they are theirs [TILE_Y, TILE_X, BLOCK], and the pixels' weights
    of the lower [TILE_Y, 1, BLOCK] and the right corners [1, TILE_X, BLOCK].
    """
    chunk = block * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    per_row = (w + 1) * CHUNKS_X
    exists = chunk < (h + 1) * CHUNKS_Y * per_row
    columns = tl.arange(0, TILE_X)[None, :, None]
    top, bottom, y, mask_y, fy = axis_chunk(chunk // per_row, rows, h, H, CHUNKS_Y, TILE_Y)
    left, right, x, mask_x, fx = axis_chunk(chunk % per_row, columns, w, W, CHUNKS_X, TILE_X)
    corners = (top * w + left, top * w + right, bottom * w + left, bottom * w + right)
    return exists, corners, y * W + x, exists & mask_y & mask_x, fy, fx


@triton.jit
def load_pixels(ptr, offs, mask, other):
    """Loads in one dimension, which keeps each pixel with the lane that owns its chunk.

    In three, the compiler deals the pixels out to the lanes by their addresses, then exchanges values for every class.
    """
    flat: tl.constexpr = offs.numel
    values = tl.load(ptr + tl.reshape(offs, flat), mask=tl.reshape(mask, flat), other=other)
    return tl.reshape(values, offs.shape)


@triton.jit
def store_pixels(ptr, offs, values, mask):
    """Stores in one dimension, for the same reason."""
    flat: tl.constexpr = offs.numel
    tl.store(ptr + tl.reshape(offs, flat), tl.reshape(values, flat), mask=tl.reshape(mask, flat))


@triton.jit
def load_corner(plane_ptr, offs, exists):
    """Logits of one class, -inf as a number so low that its exponential is 0."""
    z = load_pixels(plane_ptr, offs, exists, 0.0).to(tl.float32)
    return tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def interpolate(top_left, top_right, bottom_left, bottom_right, fy, fx):
    left = top_left + fy * (bottom_left - top_left)  # [TILE_Y, 1, BLOCK]
    right = top_right + fy * (bottom_right - top_right)
    return left + fx * (right - left)  # [TILE_Y, TILE_X, BLOCK]


@triton.jit
def class_logits(plane_ptr, corners, exists, fy, fx):
    """The interpolated logits of one class."""
    return interpolate(
        load_corner(plane_ptr, corners[0], exists),
        load_corner(plane_ptr, corners[1], exists),
        load_corner(plane_ptr, corners[2], exists),
        load_corner(plane_ptr, corners[3], exists),
        fy,
        fx,
    )


@triton.jit
def load_target(target_ptr, offs, mask, ignore_index, K):
    """Targets, -1 where the pixel does not count, and whether one is neither a class nor ``ignore_index``."""
    target = load_pixels(target_ptr, offs, mask, 0).to(tl.int64)
    counts = mask & (target != ignore_index)
    is_class = (target >= 0) & (target < K)
    return tl.where(counts & is_class, target, -1).to(tl.int32), counts & (is_class == 0)


def chunk_tiles(logits: Tensor, target: Tensor) -> dict[str, int]:
    """How the pixels are cut into chunks, and the blocks of chunks of one picture."""
    (h, w), (H, W) = logits.shape[2:], target.shape[1:]
    TILE_Y, CHUNKS_Y = _axis_tiles(h, H, MAX_TILE_Y)
    TILE_X, CHUNKS_X = _axis_tiles(w, W, MAX_TILE_X)
    blocks = triton.cdiv((h + 1) * CHUNKS_Y * (w + 1) * CHUNKS_X, BLOCK)
    check_programs(len(logits) * blocks, logits)
    if max((2 * H + 1) * (h + 1), (2 * W + 1) * (w + 1), h * w, H * W, blocks * BLOCK) >= 2**31:
        raise ValueError(f"pictures too large to be indexed with 32 bits: logits {(h, w)}, target {(H, W)}")
    return {
        "blocks": blocks,
        "CHUNKS_Y": CHUNKS_Y,
        "CHUNKS_X": CHUNKS_X,
        "TILE_Y": TILE_Y,
        "TILE_X": TILE_X,
        "BLOCK": BLOCK,
    }


def check_programs(programs: int, logits: Tensor) -> None:
    if programs >= 2**31:
        raise ValueError(f"logits {tuple(logits.shape)} need more programs than a launch can have")


def _axis_tiles(n_in: int, n_out: int, max_tile: int) -> tuple[int, int]:
    """Positions of a chunk, and chunks of a cell, which has at most ceil(n_out / n_in) positions."""
    in_cell = triton.cdiv(n_out, n_in)
    tile = min(max_tile, triton.next_power_of_2(in_cell))
    return tile, triton.cdiv(in_cell, tile)
