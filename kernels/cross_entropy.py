"""Bilinear upsampling and cross-entropy in one pass: the Triton kernel of the forward.

With ``v_c`` the logits of a pixel, interpolated as ``F.interpolate(mode="bilinear", align_corners=False)`` does, ``y``
its target, ``w`` the class weights, ``e`` the label smoothing, ``lse = log sum_c exp(v_c)``, a pixel that counts adds
::

    loss     (1 - e) w_y (lse - v_y) + e/K sum_c w_c (lse - v_c)       (the definition of ATen/native/LossNLL.cpp)
    weight   w_y

Layout: low-resolution logits (N, K, h, w), one contiguous plane per class (others are copied first, at output stride 8
1/64 of the full-size logits), so that neighbouring lanes read neighbouring cells; target (N, H, W). What is kept for
the backward is (N, 2, H, W): each pixel's maximum ``m = max_c v_c``, times log2(e), and ``1 / sum_c exp(v_c - m)``.
Together they are ``lse``, which alone would do, but is rounded at the magnitude of the logits, a small loss with it.
An exponential is ``exp2(v_c log2(e) - m log2(e))``: the same rounded ``m log2(e)`` for all classes, so that what it is
off by cancels, and one fused multiply-add.

A lane takes two turns over the classes for its chunk of pixels (see ``tiles``), the maximum first and then the sum of
exponentials. An exponential occupies its unit (16 lanes per clock and multiprocessor) for as long as 8 other
instructions take to issue, and both turns together issue 8.4 per pixel and class: the exact maximum costs next to
nothing, and no logits below 1e9 in magnitude overflow or underflow the sum. For 16 pictures of 512x512 that is 88 M
exponentials at K = 21 and 629 M at K = 150: at 3.7 T/s (H200) 24 and 170 us, and 26 and 185 us of instructions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import (
    LOG2_E,
    LOWEST,
    chunk_geometry,
    chunk_tiles,
    class_logits,
    interpolate,
    load_corner,
    load_pixels,
    load_target,
    store_pixels,
)

REGISTERS = 168  # three blocks on a multiprocessor; left to itself, ptxas aims at 128 and spills a few

LN_2 = tl.constexpr(0.6931471805599453)
TOO_LOW = tl.constexpr(-1e20)  # below it an interpolated logit stands for -inf


@triton.jit
def cross_entropy_kernel(
    logits_ptr, target_ptr, weight_ptr, softmax_ptr, sums_ptr,
    K, h, w, H, W, blocks,
    ignore_index, label_smoothing,
    SMOOTH: tl.constexpr,
    CHUNKS_Y: tl.constexpr, CHUNKS_X: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The maximum of BLOCK chunks' pixels and 1 / their sum of exponentials; the sums of their loss and weight."""
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64)
    exists, corners, offs, mask, fy, fx = chunk_geometry(
        pid % blocks, tl.arange(0, TILE_Y)[:, None, None], h, w, H, W, CHUNKS_Y, CHUNKS_X, TILE_Y, TILE_X, BLOCK
    )
    plane = tl.cast(h, tl.int64) * w
    logits_ptr += n * K * plane

    highest = tl.full((TILE_Y, TILE_X, BLOCK), LOWEST, tl.float32)
    for k in range(K):
        highest = tl.maximum(highest, class_logits(logits_ptr + k * plane, corners, exists, fy, fx))
    total = tl.zeros((TILE_Y, TILE_X, BLOCK), tl.float32)
    scaled = highest * LOG2_E
    for k in range(K):
        total += tl.exp2(class_logits(logits_ptr + k * plane, corners, exists, fy, fx) * LOG2_E - scaled)
    pixels = tl.cast(H, tl.int64) * W
    softmax_ptr += 2 * n * pixels
    store_pixels(softmax_ptr, offs, scaled, mask)
    store_pixels(softmax_ptr + pixels, offs, 1.0 / total, mask)
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
            pid % blocks, row, logits_ptr, target_ptr + n * pixels, weight_ptr, softmax_ptr, smooth_corners, weight_sum,
            K, h, w, H, W, ignore_index, label_smoothing, SMOOTH, CHUNKS_Y, CHUNKS_X, TILE_Y, TILE_X, BLOCK,
        )  # fmt: skip
        loss_sum += loss
        weight_total += weight
    tl.store(sums_ptr + pid, tl.sum(loss_sum))
    tl.store(sums_ptr + tl.num_programs(0) + pid, tl.sum(weight_total))


@triton.jit
def row_loss(
    block, row, logits_ptr, target_ptr, weight_ptr, softmax_ptr, smooth_corners, weight_sum,
    K, h, w, H, W,
    ignore_index, label_smoothing,
    SMOOTH: tl.constexpr,
    CHUNKS_Y: tl.constexpr, CHUNKS_X: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss and the weight of the pixels of one row of each chunk [1, TILE_X, BLOCK]."""
    _, corners, offs, mask, fy, fx = chunk_geometry(block, row, h, w, H, W, CHUNKS_Y, CHUNKS_X, TILE_Y, TILE_X, BLOCK)
    target, stray = load_target(target_ptr, offs, mask, ignore_index, K)
    counts = target >= 0
    scaled = load_pixels(softmax_ptr, offs, counts, 0.0)
    log_total = -tl.log2(load_pixels(softmax_ptr + tl.cast(H, tl.int64) * W, offs, counts, 1.0))
    own = tl.maximum(target, 0) * (tl.cast(h, tl.int64) * w)
    own_logit = interpolate(
        load_corner(logits_ptr, own + corners[0], counts),
        load_corner(logits_ptr, own + corners[1], counts),
        load_corner(logits_ptr, own + corners[2], counts),
        load_corner(logits_ptr, own + corners[3], counts),
        fy,
        fx,
    )
    loss = scaled - tl.where(own_logit < TOO_LOW, float("-inf"), own_logit) * LOG2_E + log_total
    weight = tl.where(counts, 1.0, 0.0)
    if weight_ptr is not None:
        weight = load_pixels(weight_ptr, target, counts, 0.0)
        loss *= weight
    if SMOOTH:
        weighted = interpolate(smooth_corners[0], smooth_corners[1], smooth_corners[2], smooth_corners[3], fy, fx)
        weighted = tl.where(weighted < TOO_LOW, float("-inf"), weighted)
        smooth = weight_sum * scaled - weighted * LOG2_E + weight_sum * log_total
        loss = (1 - label_smoothing) * loss + label_smoothing / K * smooth
    return tl.where(counts, loss * LN_2, tl.where(stray, float("nan"), 0.0)), weight


def cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the weights, summed over the pixels that count, and what the backward needs of each pixel.

    The loss is NaN if a target is neither a class nor ``ignore_index``; such a pixel counts nowhere else, not in the
    gradient either.

    Args:
        logits: (N, K, h, w) fp32, fp16 or bf16.
        target: (N, H, W) uint8, int16, int32 or int64.
        weight: (K,) fp32, or None.

    Returns:
        Two scalars and (N, 2, H, W), fp32: the maximum in units of log 2, and 1 / sum of exponentials.
    """
    logits, target = logits.contiguous(), target.contiguous()
    tiles = chunk_tiles(logits, target)
    softmax = torch.empty((len(logits), 2, *target.shape[1:]), dtype=torch.float32, device=logits.device)
    programs = len(logits) * tiles["blocks"]
    sums = torch.empty((2, programs), dtype=torch.float32, device=logits.device)
    if programs:
        with torch.cuda.device_of(logits):
            cross_entropy_kernel[(programs,)](
                logits, target, None if weight is None else weight.contiguous(), softmax, sums,
                *logits.shape[1:], *target.shape[1:],
                ignore_index=ignore_index, label_smoothing=label_smoothing, SMOOTH=label_smoothing > 0,
                **tiles, maxnreg=REGISTERS, enable_fp_fusion=True,  # exactness is counted with fused multiply-adds
            )  # fmt: skip
    loss, total_weight = (partial.sum(dtype=torch.float64).float() for partial in sums)
    return loss, total_weight, softmax
