"""Convolution, batch norm, residual and ReLU in one pass over tensor maps (TMA): the kernel for sm_90 and later.

    out[n, y, x, o] = relu(scale[o] * conv[n, y, x, o] + shift[o] + residual[n, y, x, o])
    conv[n, y, x, o] = sum_{r, c, k} in[n, y + (r - h) D, x + (c - h) D, k] weight[o, r, c, k]

with a kernel of odd size 2 h + 1, dilation D and padding h D. Fused: the folded batch norm, the addition of the
residual and the ReLU, all in fp32 on the accumulator, which is rounded once.

Layout: x, residual and out are [N, H, W, channels], dense or channel slices; weights [C_out, k, k, C]. A tile is a box
of IMAGES x TILE_H x TILE_W pixels by BLOCK_N output channels. What a tap reads is the same box of x, moved. Where it
leaves the map (on any side) or the channels the hardware reads zeros, and where a store would leave them it writes
nothing: no masks and no pointer arithmetic. The taps whose whole box misses the map read only padding and are left out;
the others form a rectangle of the kernel, and make one pipelined loop, taps outside and channels inside. A 1x1
convolution has one tap and takes all images' pixels for one row: a matrix product.

The product is acc[output channel, pixel] = weight @ box.T: on sm_90 a box of several rows can be the second operand
where it lies in shared memory, but as the first it would pass through registers.

With SPLITS > 1, that many programs share a tile's steps and write partial sums, which a second kernel adds in a fixed
order: every run gives the same bits.

Source: implicit GEMM as in Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning" (2014).
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .candidates import Tile
from .cuts import MAX_BOX, choose_box
from .splits import add_splits, adding_programs, scale_and_shift

WEIGHTS = 4  # of one launch: a tensor map must be an argument of its own, Triton launches none that is inside a tuple

# Triton 3.6 lacks the option: there the tensor cores cut fp32 numbers off where they become TF32.
CAN_ROUND_TO_TF32 = "round_f32_to_tf32" in TensorDescriptor.__dataclass_fields__


@triton.jit
def live_taps(start, size, kernel, dilation, TILE: tl.constexpr, SKIP: tl.constexpr):
    """Along one axis: the first tap of a tile that reads inside the map, and their number; see ``taps_along``."""
    if SKIP:
        half = kernel // 2
        last = tl.minimum(start + TILE, size) - 1
        before = tl.minimum(half, last // dilation)
        after = tl.minimum(half, (size - 1 - start) // dilation)
        first, taps = half - before, before + 1 + after
    else:
        first, taps = 0, kernel
    return first, taps


@triton.jit
def sum_taps(
    x_desc, weight_desc,
    n, y, x, o, split, H, W, C, kernel, dilation,
    SKIP: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The convolution's sums at a box of pixels, or one of SPLITS parts of them: [BLOCK_N, BLOCK_M]."""
    first_r, taps_r = live_taps(y, H, kernel, dilation, TILE_H, SKIP)
    first_c, taps_c = live_taps(x, W, kernel, dilation, TILE_W, SKIP)
    blocks_k = tl.cdiv(C, BLOCK_K)
    steps = taps_r * taps_c * blocks_k
    share = tl.cdiv(steps, SPLITS)
    step = tl.minimum(split * share, steps)
    k = step % blocks_k * BLOCK_K
    r = first_r + step // blocks_k // taps_c
    c = first_c + step // blocks_k % taps_c
    y -= kernel // 2 * dilation
    x -= kernel // 2 * dilation
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in tl.range(step, tl.minimum(step + share, steps)):
        box = x_desc.load([n, y + r * dilation, x + c * dilation, k]).reshape(BLOCK_M, BLOCK_K)
        weight = weight_desc.load([r * kernel + c, o, k]).reshape(BLOCK_N, BLOCK_K)
        acc = tl.dot(weight, box.T, acc, input_precision=PRECISION)
        k += BLOCK_K
        next_tap = k >= C
        k = tl.where(next_tap, 0, k)
        c += next_tap.to(tl.int32)
        next_row = c == first_c + taps_c
        c = tl.where(next_row, first_c, c)
        r += next_row.to(tl.int32)
    return acc


# Not specialised: a picture of another size must not compile anew.
@triton.jit(do_not_specialize=["H", "W", "tiles_n", "tiles_h", "tiles_w", "convolutions"])
def conv_kernel(
    x_desc, weight_0, weight_1, weight_2, weight_3, scale_ptr, shift_ptr, residual_desc, out_desc,
    H, W, C, C_out, slots, stride_shift, tiles_n, tiles_h, tiles_w, convolutions,
    RELU: tl.constexpr, SKIP: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
    IMAGES: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A box of pixels of BLOCK_N of the C_out channels of one convolution; or one of SPLITS parts of their sums.

    Blocks of channels follow each other fastest, so that programs which run together read the same pixels.
    """
    BLOCK_M: tl.constexpr = IMAGES * TILE_H * TILE_W
    weights = (weight_0, weight_1, weight_2, weight_3)
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(C_out, BLOCK_N)
    o = pid % blocks_n * BLOCK_N
    split = pid // blocks_n % SPLITS
    tile = pid // (blocks_n * SPLITS)
    x = tile % tiles_w * TILE_W
    y = tile // tiles_w % tiles_h * TILE_H
    n = tile // (tiles_w * tiles_h) % tiles_n * IMAGES
    mine = tile // (tiles_w * tiles_h * tiles_n)
    offs_o = o + tl.arange(0, BLOCK_N)
    for i in tl.static_range(len(convolutions)):
        if mine == i:
            slot, kernel, dilation = convolutions[i]
            acc = sum_taps(
                x_desc, weights[i], n, y, x, o, split, H, W, C, kernel, dilation,
                SKIP, SPLITS, PRECISION, TILE_H, TILE_W, BLOCK_M, BLOCK_N, BLOCK_K,
            ).T  # [BLOCK_M, BLOCK_N]  # fmt: skip
            if SPLITS == 1:
                shift = shift_ptr + n.to(tl.int64) * stride_shift
                acc = scale_and_shift(acc, scale_ptr, shift, slot * C_out + offs_o, offs_o < C_out)
                if residual_desc is not None:
                    acc += residual_desc.load([n, y, x, o]).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
                if RELU:
                    acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
            acc = acc.to(out_desc.dtype).reshape(IMAGES, TILE_H, TILE_W, 1, BLOCK_N)
            out_desc.store([n, y, x, split * slots + slot, o], acc)


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
        x, residual, out: (N, C, H, W) fp32, fp16 or bf16, dense channels_last or channel slices of such.
        weight: (C_out, C, k, k) in channels_last memory, k odd.
        scale: (C_out,) fp32, or None.
        shift: (C_out,) fp32; for a 1x1 convolution as ``"gemm_tma"`` also (N, C_out), one per image.
        tile: the tile choice: ``"gemm_tma"`` for a 1x1 convolution, ``"boxes_tma"`` for any, at stride 1.
        precision: of fp32 products: ``"tf32"`` or ``"ieee"``.

    Raises:
        ValueError: no tensor map can describe an argument, or no tile of these kernels serves the convolution.
    """
    kernel = weight.shape[2]
    if weight.shape[3] != kernel or kernel % 2 == 0 or stride != 1 or padding != kernel // 2 * dilation:
        raise ValueError(
            "tensor maps serve square kernels of odd size k, stride 1 and padding = dilation * (k // 2), got "
            f"weight {tuple(weight.shape)}, stride={stride}, padding={padding}, dilation={dilation}"
        )
    if tile.kernel == "boxes_tma" and shift.ndim == 2:
        raise ValueError(f'"boxes_tma" takes one shift for all images, got {tuple(shift.shape)}')
    _launch(x, [weight], [dilation], scale, shift, residual, out, relu=relu, tile=tile, precision=precision)


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
    """Write the branches of ASPP, one 1x1 and a 3x3 for each rate, side by side to ``out``, by ``"boxes_tma"``.

    In one launch for each WEIGHTS of them, whole branches in the order of their work: the 3x3 ones by rate, then the
    1x1. Within a branch the boxes come as they lie on the map, however many taps they execute.

    Args:
        x: (N, C, H, W); out: (N, (1 + len(rates)) * C_b, H, W), dense channels_last or channel slices of such.
        weights: (C_b, C, 1, 1) and one (C_b, C, 3, 3) for each rate, in channels_last memory.
        scale, shift: ((1 + len(rates)) * C_b,) fp32; scale may be None.
    """
    _launch(x, weights, [1, *rates], scale, shift, None, out, relu=True, tile=tile, precision=precision)


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
    """Write the projection of ASPP's branches, by ``"gemm_tma"``; the pooled branch is part of ``shift`` (N, C_out)."""
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
    relu: bool,
    tile: Tile,
    precision: str,
) -> None:
    if out.numel() == 0:
        return
    if tile.kernel == "gemm_tma" and weights[-1].shape[2] > 1:
        raise ValueError(f'"gemm_tma" serves 1x1 convolutions, got weight {tuple(weights[-1].shape)}')
    adders = adding_programs(out) if tile.splits > 1 else 0
    x_map, out_map = _pixels(x, shift, tile), _pixels(out, shift, tile)
    N, H, W, C = x_map.shape
    slots, C_out, splits = len(weights), weights[0].shape[0], tile.splits
    if C_out * out.element_size() % 16:
        raise ValueError(f"a tensor map writes chunks of 16 bytes: {C_out} channels of {out.dtype} are no whole number")
    # Those with the most work first: the last programs are mostly short. No tap reaches farther than past the map.
    convolutions = sorted(
        ((i, weights[i].shape[2], min(dilations[i], max(H, W))) for i in range(slots)), key=lambda c: (-c[1], c[2])
    )
    box = (1, 1, tile.block_m)
    if tile.kernel == "boxes_tma":
        box = choose_box(tile.block_m, N, H, W, tuple(c[1:] for c in convolutions), tile.skip)
    *tiles, blocks_n = (-(-size // length) for size, length in zip((N, H, W, C_out), (*box, tile.block_n), strict=True))
    programs = math.prod(tiles) * blocks_n * splits  # of one convolution
    if max(programs * slots, adders, H * W) >= 2**31:
        raise ValueError(f"x of {N * H * W} pixels needs more programs than a launch can have")

    sums = None
    if splits > 1:
        sums = torch.empty((N, H, W, splits * slots * C_out), dtype=torch.float32, device=x.device)
    written = (out_map if sums is None else sums).unflatten(3, (splits * slots, C_out))
    tf32 = precision == "tf32" and x.dtype == torch.float32
    x_desc = _tensor_map(x_map, "x", (*box, tile.block_k), tf32)
    out_desc = _tensor_map(written, "out", (*box, 1, tile.block_n))
    residual_desc = None  # where partial sums are written, the second kernel adds it
    if residual is not None and sums is None:
        residual_desc = _tensor_map(_pixels(residual, shift, tile), "residual", (*box, tile.block_n))
    stride_shift = shift.stride(0) if shift.ndim == 2 else 0
    with torch.cuda.device_of(x):
        for group in (convolutions[first : first + WEIGHTS] for first in range(0, slots, WEIGHTS)):
            taps = [weights[i].permute(2, 3, 0, 1).flatten(0, 1) for i, _, _ in group]  # [k * k, C_out, C]
            weight_descs = [_tensor_map(weight, "weight", (1, tile.block_n, tile.block_k), tf32) for weight in taps]
            weight_descs += [None] * (WEIGHTS - len(group))
            conv_kernel[(programs * len(group),)](
                x_desc, *weight_descs, scale, shift, residual_desc, out_desc,
                H, W, C, C_out, slots, stride_shift, *tiles, tuple(group),
                RELU=relu, SKIP=tile.skip, SPLITS=splits, PRECISION=precision,
                IMAGES=box[0], TILE_H=box[1], TILE_W=box[2], BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
    if sums is not None:
        add_splits(sums.view(N * H * W, splits, slots * C_out), scale, shift, residual, out, relu=relu)


def _pixels(x: Tensor, shift: Tensor, tile: Tile) -> Tensor:
    """(N, C, H, W) as [N, H, W, C], for "gemm_tma" as a row for each shift: [1, 1, N H W, C] or [N, 1, H W, C]."""
    x = x.permute(0, 2, 3, 1)
    return x.view(len(shift) if shift.ndim == 2 else 1, 1, -1, x.shape[3]) if tile.kernel == "gemm_tma" else x


def _tensor_map(x: Tensor, name: str, box: tuple[int, ...], tf32: bool = False) -> TensorDescriptor:
    """The tensor map of x, its last dimension contiguous, in boxes; fp32 that becomes TF32 is rounded where it can be.

    Of a dimension of size 1 the stride is arbitrary in PyTorch, and never used: any valid one does.
    """
    chunk = 16 // x.element_size()
    strides = [stride if size > 1 else chunk for size, stride in zip(x.shape, x.stride(), strict=True)]
    if x.data_ptr() % 16 or any(stride % chunk for stride in strides[:-1]):
        raise ValueError(
            f"{name} must lie at multiples of 16 bytes, its start and each row: got {x.dtype} of strides {strides}, "
            f"starting {x.data_ptr() % 16} bytes past one"
        )
    if max(x.shape) >= 2**31:
        raise ValueError(f"{name} must have sizes below 2**31, got {tuple(x.shape)}")
    if max(box) > MAX_BOX:
        raise ValueError(f"boxes of {name} have at most {MAX_BOX} elements in each dimension, got {box}")
    options = {"round_f32_to_tf32": True} if tf32 and CAN_ROUND_TO_TF32 else {}
    return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], list(box), **options)
