"""Partial sums of a convolution whose K loop is shared out among programs, and the epilogue they go through.

Layers with few pixels make fewer programs than a GPU has multiprocessors. So SPLITS programs each take a part of a
tile's steps and write fp32 sums, (pixels, SPLITS, channels). These are added here in their order, so that every run
gives the same bits, and go through what follows a convolution: folded batch norm, residual, ReLU, one rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import pixel_pitch

BLOCK_P, BLOCK_C = 16, 128  # pixels and channels of a program


@triton.jit
def scale_and_shift(acc, scale_ptr, shift_ptr, channel, mask_c):
    """acc [pixels, channels] after the folded batch norm; either part may be missing."""
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + channel, mask=mask_c, other=0.0)[None, :]
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + channel, mask=mask_c, other=0.0)[None, :]
    return acc


@triton.jit
def add_splits_kernel(
    sums_ptr, scale_ptr, shift_ptr, residual_ptr, out_ptr,
    pixels, channels, stride_shift, stride_residual, stride_out,
    RELU: tl.constexpr, SPLITS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds the parts of the sums of BLOCK_P of one image's pixels and BLOCK_C channels in their order, and finishes."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks_p = tl.cdiv(pixels, BLOCK_P)
    n = (tl.program_id(0) // (blocks_c * blocks_p)).to(tl.int64)
    offs_p = tl.program_id(0) // blocks_c % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(0) % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mask = (offs_p < pixels)[:, None] & mask_c[None, :]
    pixel = (n * pixels + offs_p)[:, None]  # [BLOCK_P, 1]
    sums_ptr += pixel * SPLITS * channels + offs_c[None, :]
    acc = tl.load(sums_ptr, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(sums_ptr + split * channels, mask=mask, other=0.0)
    acc = scale_and_shift(acc, scale_ptr, shift_ptr + n * stride_shift, offs_c, mask_c)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + pixel * stride_residual + offs_c[None, :], mask=mask, other=0.0)
        acc += residual.to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + pixel * stride_out + offs_c[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def adding_programs(out: Tensor) -> int:
    N, channels, H, W = out.shape
    return N * -(-H * W // BLOCK_P) * -(-channels // BLOCK_C)


def add_splits(
    sums: Tensor, scale: Tensor | None, shift: Tensor, residual: Tensor | None, out: Tensor, *, relu: bool
) -> None:
    """Write the finished sums to ``out``.

    Args:
        sums: (N * H * W, SPLITS, channels) fp32; with SPLITS = 1 of any dtype, also ``out`` itself.
        scale: (channels,) fp32, or None; shift: (channels,) fp32, or (N, channels).
        residual, out: (N, channels, H, W), dense channels_last or channel slices of such.
    """
    _, channels, H, W = out.shape
    with torch.cuda.device_of(out):
        add_splits_kernel[(adding_programs(out),)](
            sums, scale, shift, residual, out,
            H * W, channels, shift.stride(0) if shift.ndim == 2 else 0,
            pixel_pitch(out if residual is None else residual), pixel_pitch(out),
            RELU=relu, SPLITS=sums.shape[1], BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C,
        )  # fmt: skip
