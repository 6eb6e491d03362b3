"""Bilinear upsampling and cross-entropy in one pass, forward and backward: the Triton kernels.

With ``v_c`` the logits of a pixel, interpolated as ``F.interpolate(mode="bilinear", align_corners=False)`` does, ``y`` its
target, ``w`` the class weights, ``e`` the label smoothing and ``lse = log sum_c exp(v_c)``, a pixel that counts adds
::

    loss          (1 - e) w_y (lse - v_y) + e/K sum_c w_c (lse - v_c)       (ATen/native/LossNLL.cpp's definition)
    weight        w_y
    d loss/d v_c  ((1 - e) w_y + e/K sum w) exp(v_c - lse) - (1 - e) w_y [c = y] - e/K w_c

Layout: low-resolution logits (N, K, h, w), one contiguous plane per class (others are copied first, 1/64 of the full-size
logits at output stride 8), so that neighbouring lanes read neighbouring cells; target and ``lse`` (N, H, W).

One lane owns the pixels of one *chunk*: at most TILE_Y x TILE_X pixels that lie between the same four low-resolution
logits (a cell; the border is a cell whose corners coincide). Per class it loads the four corners and interpolates in registers.
The forward takes two turns over the classes, the maximum first and then the sum of exponentials. An exponential occupies
its unit (16 lanes per clock and multiprocessor) for as long as 8 other instructions take to issue, and a pixel and class has 9.1 in
both turns together: the exact maximum costs next to nothing, and no value of the logits can overflow or underflow the sum. The
backward takes ``exp(v_c - lse)`` anew, once per pixel and class (9.3 instructions), adds up its chunk's share of the four corners in registers, and writes it to scratch; a second kernel adds, for
each low-resolution logit, the shares of the chunks round it in a fixed order. So it is deterministic and without atomics. A gather per
low-resolution pixel would need no scratch, but each pixel has four of them: four times the exponentials.
The scratch holds the shares of as many classes as fit in SCRATCH_BYTES, and the classes are worked off in such slabs.

Exponentials for 16 pictures of 512x512, forward and backward together: 2 x 88 M at K = 21, 2 x 629 M at K = 150; at 3.7 T/s
(H200) 48 us and 340 us, and the instructions 55 us and 390 us. Bytes, at most: the logits three times, ``lse`` and target twice, the shares twice.
"""

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # chunks of a program: one for each lane of 4 warps
MAX_TILE_Y, MAX_TILE_X = 4, 8  # 32 pixels of a lane: what fits in registers beside their maximum, sum and target
FORWARD_REGISTERS = 168  # three blocks on a multiprocessor; left to itself, ptxas aims at 128 and spills a few
BLOCK_P, BLOCK_K = 64, 16  # low-resolution pixels and classes of a program of the second backward kernel
SCRATCH_BYTES = 64 << 20

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # stands for -inf, of which differences are NaN
TOO_LOW = tl.constexpr(-1e20)  # below it an interpolated logit stands for -inf


@triton.jit
def first_position(cell, n_in, n_out):
    """The first of n_out positions at or after low-resolution position ``cell``, for half-pixel centres."""
    return tl.maximum((n_out * (2 * cell + 1) + n_in - 1) // (2 * n_in), 0)


@triton.jit
def axis_chunk(chunk, offs, n_in, n_out, CHUNKS: tl.constexpr, TILE: tl.constexpr):
    """One axis of a chunk: its two corners, its positions, which of them it owns, and their weight of the second corner."""
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
    """The chunks of a block: their numbers and whether they exist [1, 1, BLOCK], the offsets of their four corners in a
    plane of logits, the offsets of their pixels in a plane of the output and whether they are theirs [TILE_Y, TILE_X, BLOCK],
    and the weights of the lower [TILE_Y, 1, BLOCK] and the right corners [1, TILE_X, BLOCK]."""
    chunk = block * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    per_row = (w + 1) * CHUNKS_X
    exists = chunk < (h + 1) * CHUNKS_Y * per_row
    columns = tl.arange(0, TILE_X)[None, :, None]
    top, bottom, y, mask_y, fy = axis_chunk(chunk // per_row, rows, h, H, CHUNKS_Y, TILE_Y)
    left, right, x, mask_x, fx = axis_chunk(chunk % per_row, columns, w, W, CHUNKS_X, TILE_X)
    corners = (top * w + left, top * w + right, bottom * w + left, bottom * w + right)
    return chunk, exists, corners, y * W + x, exists & mask_y & mask_x, fy, fx


@triton.jit
def load_pixels(ptr, offs, mask, other):
    """Loads in one dimension, which is all that keeps each pixel with the lane that owns its chunk: in three, the compiler
    would deal the pixels out to the lanes by their addresses, and then exchange values between lanes for every class."""
    flat: tl.constexpr = offs.numel
    values = tl.load(ptr + tl.reshape(offs, flat), mask=tl.reshape(mask, flat), other=other)
    return tl.reshape(values, offs.shape)


@triton.jit
def load_corner(plane_ptr, offs, exists):
    """Logits of one class in units of log 2, -inf as a number so low that its exponential is 0."""
    z = load_pixels(plane_ptr, offs, exists, 0.0).to(tl.float32) * LOG2_E
    return tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def interpolate(top_left, top_right, bottom_left, bottom_right, fy, fx):
    left = top_left + fy * (bottom_left - top_left)  # [TILE_Y, 1, BLOCK]
    right = top_right + fy * (bottom_right - top_right)
    return left + fx * (right - left)  # [TILE_Y, TILE_X, BLOCK]


@triton.jit
def class_logits(plane_ptr, corners, exists, fy, fx):
    """The interpolated logits of one class, in units of log 2."""
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


@triton.jit
def cross_entropy_kernel(
    logits_ptr, target_ptr, weight_ptr, lse_ptr, sums_ptr,
    K, h, w, H, W, blocks,
    ignore_index, label_smoothing,
    SMOOTH: tl.constexpr,
    CHUNKS_Y: tl.constexpr, CHUNKS_X: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of BLOCK chunks' pixels, in units of log 2, and the sums of their loss and weight."""
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64)
    _, exists, corners, offs, mask, fy, fx = chunk_geometry(
        pid % blocks, tl.arange(0, TILE_Y)[:, None, None], h, w, H, W, CHUNKS_Y, CHUNKS_X, TILE_Y, TILE_X, BLOCK
    )
    plane = tl.cast(h, tl.int64) * w
    logits_ptr += n * K * plane

    highest = tl.full((TILE_Y, TILE_X, BLOCK), LOWEST, tl.float32)
    for k in range(K):
        highest = tl.maximum(highest, class_logits(logits_ptr + k * plane, corners, exists, fy, fx))
    total = tl.zeros((TILE_Y, TILE_X, BLOCK), tl.float32)
    for k in range(K):
        total += tl.exp2(class_logits(logits_ptr + k * plane, corners, exists, fy, fx) - highest)
    lse_ptr += n * H * W
    flat: tl.constexpr = offs.numel
    lse = highest + tl.log2(total)
    tl.store(lse_ptr + tl.reshape(offs, flat), tl.reshape(lse, flat), mask=tl.reshape(mask, flat))
    tl.debug_barrier()

    smooth_corners = (0.0, 0.0, 0.0, 0.0)
    weight_sum = 0.0
    if SMOOTH:
        # The weighted sum of a pixel's logits is the interpolation of the corners' weighted sums.
        top_left = tl.zeros((1, 1, BLOCK), tl.float32)
        top_right = tl.zeros((1, 1, BLOCK), tl.float32)
        bottom_left = tl.zeros((1, 1, BLOCK), tl.float32)
        bottom_right = tl.zeros((1, 1, BLOCK), tl.float32)
        for k in range(K):
            weight_k = 1.0 if weight_ptr is None else tl.load(weight_ptr + k)
            top_left += weight_k * load_corner(logits_ptr + k * plane, corners[0], exists)
            top_right += weight_k * load_corner(logits_ptr + k * plane, corners[1], exists)
            bottom_left += weight_k * load_corner(logits_ptr + k * plane, corners[2], exists)
            bottom_right += weight_k * load_corner(logits_ptr + k * plane, corners[3], exists)
            weight_sum += weight_k
        smooth_corners = (top_left, top_right, bottom_left, bottom_right)

    loss_sum = tl.zeros((1, TILE_X, BLOCK), tl.float32)
    weight_total = tl.zeros((1, TILE_X, BLOCK), tl.float32)
    for row in range(TILE_Y):  # row by row: the four loads of each pixel take many registers
        loss, weight = row_loss(
            pid % blocks, row, logits_ptr, target_ptr + n * H * W, weight_ptr, lse_ptr, smooth_corners, weight_sum,
            K, h, w, H, W, ignore_index, label_smoothing, SMOOTH, CHUNKS_Y, CHUNKS_X, TILE_Y, TILE_X, BLOCK,
        )  # fmt: skip
        loss_sum += loss
        weight_total += weight
    tl.store(sums_ptr + pid, tl.sum(loss_sum))
    tl.store(sums_ptr + tl.num_programs(0) + pid, tl.sum(weight_total))


@triton.jit
def row_loss(
    block, row, logits_ptr, target_ptr, weight_ptr, lse_ptr, smooth_corners, weight_sum,
    K, h, w, H, W,
    ignore_index, label_smoothing,
    SMOOTH: tl.constexpr,
    CHUNKS_Y: tl.constexpr, CHUNKS_X: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss and the weight of the pixels of one row of each chunk [1, TILE_X, BLOCK]."""
    _, _, corners, offs, mask, fy, fx = chunk_geometry(
        block, row, h, w, H, W, CHUNKS_Y, CHUNKS_X, TILE_Y, TILE_X, BLOCK
    )
    target, stray = load_target(target_ptr, offs, mask, ignore_index, K)
    counts = target >= 0
    lse = load_pixels(lse_ptr, offs, counts, 0.0)
    own = tl.maximum(target, 0) * (tl.cast(h, tl.int64) * w)
    own_logit = interpolate(
        load_corner(logits_ptr, own + corners[0], counts),
        load_corner(logits_ptr, own + corners[1], counts),
        load_corner(logits_ptr, own + corners[2], counts),
        load_corner(logits_ptr, own + corners[3], counts),
        fy,
        fx,
    )
    loss = lse - tl.where(own_logit < TOO_LOW, float("-inf"), own_logit)
    weight = tl.where(counts, 1.0, 0.0)
    if weight_ptr is not None:
        weight = load_pixels(weight_ptr, target, counts, 0.0)
        loss *= weight
    if SMOOTH:
        smooth = weight_sum * lse - interpolate(
            smooth_corners[0], smooth_corners[1], smooth_corners[2], smooth_corners[3], fy, fx
        )
        loss = (1 - label_smoothing) * loss + label_smoothing / K * smooth
    return tl.where(counts, loss * LN_2, tl.where(stray, float("nan"), 0.0)), weight


@triton.jit
def corner_shares_kernel(
    logits_ptr, target_ptr, weight_ptr, weight_sum_ptr, lse_ptr, shares_ptr,
    K, h, w, H, W, blocks, k_start, k_end,
    ignore_index, label_smoothing,
    SMOOTH: tl.constexpr,
    CHUNKS_Y: tl.constexpr, CHUNKS_X: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The shares of BLOCK chunks in the gradient of their four corners, for the classes from k_start to k_end.

    shares is (k_end - k_start, 4, N, blocks * BLOCK).
    """
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64)
    chunk, exists, corners, offs, mask, fy, fx = chunk_geometry(
        pid % blocks, tl.arange(0, TILE_Y)[:, None, None], h, w, H, W, CHUNKS_Y, CHUNKS_X, TILE_Y, TILE_X, BLOCK
    )
    plane = tl.cast(h, tl.int64) * w
    logits_ptr += n * K * plane
    lse_ptr += n * H * W
    target_ptr += n * H * W
    target, _ = load_target(target_ptr, offs, mask, ignore_index, K)
    counts = target >= 0
    # Infinity makes the probabilities of a pixel that does not count 0.
    lse = load_pixels(lse_ptr, offs, counts, float("inf"))
    own = target.to(tl.float32)  # as a float it is compared in one instruction per class, as an integer in four

    if weight_ptr is not None:
        factor = (1 - label_smoothing) * load_pixels(weight_ptr, target, counts, 0.0)
        if SMOOTH:
            factor += label_smoothing / K * tl.load(weight_sum_ptr)
    if SMOOTH:
        number = tl.where(counts, 1.0, 0.0)
        top_left_number, top_right_number, bottom_left_number, bottom_right_number = corner_sums(number, fy, fx)

    stride_corner = tl.num_programs(0).to(tl.int64) * BLOCK
    shares_ptr += pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    for k in range(k_start, k_end):
        own_factor = 1 - label_smoothing
        smooth_factor = label_smoothing / K
        if weight_ptr is not None:
            weight_k = tl.load(weight_ptr + k)
            own_factor *= weight_k
            smooth_factor *= weight_k
        grad = tl.exp2(class_logits(logits_ptr + k * plane, corners, exists, fy, fx) - lse)
        if weight_ptr is not None:
            grad *= factor
        grad = tl.where(own == tl.cast(k, tl.float32), grad - own_factor, grad)
        top_left, top_right, bottom_left, bottom_right = corner_sums(grad, fy, fx)
        if SMOOTH:
            top_left -= smooth_factor * top_left_number
            top_right -= smooth_factor * top_right_number
            bottom_left -= smooth_factor * bottom_left_number
            bottom_right -= smooth_factor * bottom_right_number
        tl.store(shares_ptr, top_left)
        tl.store(shares_ptr + stride_corner, top_right)
        tl.store(shares_ptr + 2 * stride_corner, bottom_left)
        tl.store(shares_ptr + 3 * stride_corner, bottom_right)
        shares_ptr += 4 * stride_corner


@triton.jit
def corner_sums(value, fy, fx):
    """Each pixel's value times its weight of a corner, summed over the chunk; the transpose of ``interpolate``."""
    both = tl.sum(value, axis=1, keep_dims=True)  # [TILE_Y, 1, BLOCK]
    right = tl.sum(value * fx, axis=1, keep_dims=True)
    left = both - right
    all_left = tl.sum(left, axis=0, keep_dims=True)  # [1, 1, BLOCK]
    all_right = tl.sum(right, axis=0, keep_dims=True)
    bottom_left = tl.sum(left * fy, axis=0, keep_dims=True)
    bottom_right = tl.sum(right * fy, axis=0, keep_dims=True)
    return all_left - bottom_left, all_right - bottom_right, bottom_left, bottom_right


@triton.jit
def add_shares_kernel(
    shares_ptr, grad_ptr, grad_logits_ptr,
    stride_gn, stride_gk, stride_gh, stride_gw,
    N, h, w, blocks, k_start, k_end,
    CHUNKS_Y: tl.constexpr, CHUNKS_X: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_P low-resolution logits of BLOCK_K classes: the shares of the four cells round them."""
    pid = tl.program_id(0)
    blocks_k = tl.cdiv(k_end - k_start, BLOCK_K)
    blocks_p = tl.cdiv(h * w, BLOCK_P)
    n = (pid // (blocks_k * blocks_p)).to(tl.int64)
    k = (pid % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    pixel = (pid // blocks_k % blocks_p) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    y, x = pixel // w, pixel % w
    mask = (pixel < h * w) & (k < k_end - k_start)

    per_row = (w + 1) * CHUNKS_X
    stride_corner = tl.cast(N, tl.int64) * blocks * BLOCK
    shares_ptr += n * blocks * BLOCK + k * 4 * stride_corner
    total = tl.zeros((BLOCK_P, BLOCK_K), tl.float32)
    for i in range(2 * CHUNKS_Y):
        for j in range(2 * CHUNKS_X):
            # The cells above come first, whose lower corners these are; and those to the left, whose right corners.
            corner = (2 if i < CHUNKS_Y else 0) + (1 if j < CHUNKS_X else 0)
            chunk = (y * CHUNKS_Y + i) * per_row + x * CHUNKS_X + j
            total += tl.load(shares_ptr + corner * stride_corner + chunk, mask=mask, other=0.0)
    # Exactly 0 stays 0 if grad is infinite: the mean over no pixels at all.
    grad = tl.where(total == 0.0, 0.0, total * tl.load(grad_ptr))
    grad_logits_ptr += n * stride_gn + (k + k_start).to(tl.int64) * stride_gk
    offs = y.to(tl.int64) * stride_gh + x.to(tl.int64) * stride_gw
    tl.store(grad_logits_ptr + offs, grad.to(grad_logits_ptr.dtype.element_ty), mask=mask)


def cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the weights, summed over the pixels that count, and the log-sum-exp of each pixel in units of log 2.

    The loss is NaN if a target is neither a class nor ``ignore_index``; such a pixel counts nowhere else, nor in the gradient.

    Args:
        logits: (N, K, h, w) fp32, fp16 or bf16.
        target: (N, H, W) uint8, int16, int32 or int64.
        weight: (K,) fp32, or None.

    Returns:
        Two scalars and (N, H, W), fp32.
    """
    logits, target = logits.contiguous(), target.contiguous()
    lse = torch.empty(target.shape, dtype=torch.float32, device=logits.device)
    tiles = _tiles(logits, target)
    programs = len(logits) * tiles["blocks"]
    sums = torch.empty((2, programs), dtype=torch.float32, device=logits.device)
    if programs:
        with _device_of(logits):
            cross_entropy_kernel[(programs,)](
                logits, target, _contiguous(weight), lse, sums,
                *logits.shape[1:], *target.shape[1:],
                ignore_index=ignore_index, label_smoothing=label_smoothing, SMOOTH=label_smoothing > 0,
                **tiles, maxnreg=FORWARD_REGISTERS,
            )  # fmt: skip
    loss, total_weight = (partial.sum(dtype=torch.float64).float() for partial in sums)
    return loss, total_weight, lse


def cross_entropy_backward(
    grad: Tensor,
    lse: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The gradient of the summed loss, times ``grad``, in the dtype and the layout of the logits.

    The same bit by bit in every run. 0 if no pixel counts, even if ``grad`` is infinite.

    Args:
        grad: scalar, on the logits' device.
        lse: what ``cross_entropy_forward`` returned.
        logits, target, weight, ignore_index, label_smoothing: as given to ``cross_entropy_forward``.
    """
    grad_logits = torch.empty_like(logits)
    N, K, h, w = logits.shape
    if N == 0:
        return grad_logits
    logits, target, weight = logits.contiguous(), target.contiguous(), _contiguous(weight)
    tiles = _tiles(logits, target)
    programs = N * tiles["blocks"]
    slab = min(K, max(1, SCRATCH_BYTES // (16 * programs * BLOCK)))
    shares = torch.empty((slab, 4, programs * BLOCK), dtype=torch.float32, device=logits.device)
    weight_sum = None if weight is None else weight.sum()
    with _device_of(logits):
        for k_start in range(0, K, slab):
            k_end = min(k_start + slab, K)
            corner_shares_kernel[(programs,)](
                logits, target, weight, weight_sum, lse, shares,
                K, h, w, *target.shape[1:], k_start=k_start, k_end=k_end,
                ignore_index=ignore_index, label_smoothing=label_smoothing, SMOOTH=label_smoothing > 0,
                **tiles,
            )  # fmt: skip
            grid = (N * triton.cdiv(h * w, BLOCK_P) * triton.cdiv(k_end - k_start, BLOCK_K),)
            add_shares_kernel[grid](
                shares, grad, grad_logits, *grad_logits.stride(),
                N, h, w, blocks=tiles["blocks"], k_start=k_start, k_end=k_end,
                CHUNKS_Y=tiles["CHUNKS_Y"], CHUNKS_X=tiles["CHUNKS_X"], BLOCK=BLOCK, BLOCK_P=BLOCK_P, BLOCK_K=BLOCK_K,
            )  # fmt: skip
    return grad_logits


def _tiles(logits: Tensor, target: Tensor) -> dict[str, int]:
    """How the pixels are cut into chunks, and the blocks of chunks of one picture."""
    (h, w), (H, W) = logits.shape[2:], target.shape[1:]
    TILE_Y, CHUNKS_Y = _axis_tiles(h, H, MAX_TILE_Y)
    TILE_X, CHUNKS_X = _axis_tiles(w, W, MAX_TILE_X)
    blocks = triton.cdiv((h + 1) * CHUNKS_Y * (w + 1) * CHUNKS_X, BLOCK)
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


def _axis_tiles(n_in: int, n_out: int, max_tile: int) -> tuple[int, int]:
    """Positions of a chunk, and chunks of a cell, which has at most ceil(n_out / n_in) positions."""
    in_cell = triton.cdiv(n_out, n_in)
    tile = min(max_tile, triton.next_power_of_2(in_cell))
    return tile, triton.cdiv(in_cell, tile)


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, not on the tensor's."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()
