"""Bilinear upsampling and cross-entropy in one pass: the Triton kernels of the backward.

With the notation of ``cross_entropy``, the gradient at the interpolated logits of a pixel that counts is
::

    d loss/d v_c   ((1 - e) w_y + e/K sum_k w_k) exp(v_c - m) / sum_k exp(v_k - m) - (1 - e) w_y [c = y] - e/K w_c

and a low-resolution logit adds up its pixels' gradients, times their interpolation weights.

A lane takes the exponential anew, once per pixel of its chunk (see ``tiles``) and class, adds up the chunk's share of
the four corners in registers and writes it to scratch; a second kernel adds, for each low-resolution logit, the shares
of the chunks round it in a fixed order. So the gradient is deterministic, without atomics. A gather per low-resolution
logit would need no scratch, but each pixel has four of them: four times the exponentials, which are what takes the time
(10.2 instructions per pixel and class, and the exponential's unit is busy for as long as 8 take). The scratch holds the
shares of as many classes as fit in SCRATCH_BYTES, of one class at least, and the classes are worked off in such slabs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import BLOCK, LOG2_E, check_programs, chunk_geometry, chunk_tiles, class_logits, load_pixels, load_target

REGISTERS = 224  # of a thread of the first kernel; left to itself, ptxas aims at 96 for some ratios and spills
BLOCK_P, BLOCK_K = 64, 16  # low-resolution pixels and classes of a program of the second kernel
SCRATCH_BYTES = 64 << 20


@triton.jit
def corner_shares_kernel(
    logits_ptr, target_ptr, weight_ptr, weight_sum_ptr, softmax_ptr, shares_ptr,
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
    exists, corners, offs, mask, fy, fx = chunk_geometry(
        pid % blocks, tl.arange(0, TILE_Y)[:, None, None], h, w, H, W, CHUNKS_Y, CHUNKS_X, TILE_Y, TILE_X, BLOCK
    )
    plane = tl.cast(h, tl.int64) * w
    logits_ptr += n * K * plane
    pixels = tl.cast(H, tl.int64) * W
    softmax_ptr += 2 * n * pixels
    target_ptr += n * pixels
    target, _ = load_target(target_ptr, offs, mask, ignore_index, K)
    counts = target >= 0
    # Infinity makes the probabilities of a pixel that does not count 0, unless its logits are NaN or infinite.
    scaled = load_pixels(softmax_ptr, offs, counts, float("inf"))
    factor = load_pixels(softmax_ptr + pixels, offs, counts, 0.0)  # of the exponential
    own = target.to(tl.float32)  # as a float it is compared in one instruction per class, as an integer in four

    if weight_ptr is not None:
        pixel_weight = (1 - label_smoothing) * load_pixels(weight_ptr, target, counts, 0.0)
        if SMOOTH:
            pixel_weight += label_smoothing / K * tl.load(weight_sum_ptr)
        factor *= pixel_weight
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
        grad = factor * tl.exp2(class_logits(logits_ptr + k * plane, corners, exists, fy, fx) * LOG2_E - scaled)
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


def cross_entropy_backward(
    grad: Tensor,
    softmax: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The gradient of the summed loss, times ``grad``, in the dtype and the layout of the logits.

    The same bit by bit in every run. 0 if no pixel counts, even if ``grad`` is infinite, and the logits are finite.

    Args:
        grad: scalar, on the logits' device.
        softmax: what ``cross_entropy_forward`` returned.
        logits, target, weight, ignore_index, label_smoothing: as given to ``cross_entropy_forward``.
    """
    grad_logits = torch.empty_like(logits)
    N, K, h, w = logits.shape
    if N == 0:
        return grad_logits
    logits, target = logits.contiguous(), target.contiguous()
    weight = None if weight is None else weight.contiguous()
    tiles = chunk_tiles(logits, target)
    check_programs(N * triton.cdiv(h * w, BLOCK_P) * triton.cdiv(K, BLOCK_K), logits)
    programs = N * tiles["blocks"]
    slab = min(K, max(1, SCRATCH_BYTES // (16 * programs * BLOCK)))
    shares = torch.empty((slab, 4, programs * BLOCK), dtype=torch.float32, device=logits.device)
    weight_sum = None if weight is None else weight.sum()
    with torch.cuda.device_of(logits):
        for k_start in range(0, K, slab):
            k_end = min(k_start + slab, K)
            corner_shares_kernel[(programs,)](
                logits, target, weight, weight_sum, softmax, shares,
                K, h, w, *target.shape[1:], k_start=k_start, k_end=k_end,
                ignore_index=ignore_index, label_smoothing=label_smoothing, SMOOTH=label_smoothing > 0,
                **tiles, maxnreg=REGISTERS, enable_fp_fusion=True,
            )  # fmt: skip
            grid = (N * triton.cdiv(h * w, BLOCK_P) * triton.cdiv(k_end - k_start, BLOCK_K),)
            add_shares_kernel[grid](
                shares, grad, grad_logits, *grad_logits.stride(),
                N, h, w, blocks=tiles["blocks"], k_start=k_start, k_end=k_end,
                CHUNKS_Y=tiles["CHUNKS_Y"], CHUNKS_X=tiles["CHUNKS_X"], BLOCK=BLOCK, BLOCK_P=BLOCK_P, BLOCK_K=BLOCK_K,
            )  # fmt: skip
    return grad_logits
