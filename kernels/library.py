"""The functions with PyTorch at its best; this is what ``"torch"`` means.

Full-size logits are worked through in chunks, some rows of some pictures at a time, that are small enough for a CPU's
caches. A chunk is interpolated along x, for the few low-resolution rows that it touches, and then along y: an eighth of
the interpolations along x that ``F.interpolate`` makes at output stride 8. Its classes lie side by side, which is the
order in which all that follows reads them.

Convolutions run in channels_last memory, their folded batch norm inside: the scale in the weight, the shift as bias.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FP16_SAFE = (2.0**-10, 2.0**14)  # the largest weight of a channel, far enough from fp16's limits
# Full-size logits in a chunk. On a GPU a chunk is as large as keeps it busy, on a CPU as fits into its caches.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def _full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep autocast from rounding the matrix products inside."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = next(arg.device.type for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return call


def upsample_argmax(logits: Tensor, size: Sequence[int], *, dtype: torch.dtype = torch.int64) -> Tensor:
    indices = logits.new_empty((len(logits), *size), dtype=dtype)
    for chunk in _chunks(logits, size):
        indices[chunk.images, chunk.rows] = chunk.upsample(logits).argmax(dim=-1)
    return indices


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    check_target: bool = False,
) -> Tensor:
    weight = None if weight is None else weight.float()
    if reduction == "none" or logits.shape[2:] == target.shape[1:]:
        return _cross_entropy_at_full_size(logits, target, weight, ignore_index, reduction, label_smoothing)
    # The operator saves no chunks for the backward; it computes them anew.
    loss, total_weight, _ = torch.ops.fastdeeplab.upsample_cross_entropy(
        logits, target, weight, ignore_index, label_smoothing, "torch"
    )
    return loss / total_weight if reduction == "mean" else loss


def _cross_entropy_at_full_size(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    """PyTorch's loss of full-size logits; NaN where the target is no class, and for their sum or mean."""
    logits = logits.float()
    if logits.shape[2:] != target.shape[1:]:
        logits = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    _, counts, stray = _read_target(target, logits.shape[1], ignore_index)
    loss = F.cross_entropy(
        logits,
        torch.where(counts, target.long(), ignore_index),
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss + torch.where(stray if reduction == "none" else stray.any(), torch.nan, 0.0)


@_full_precision
def cross_entropy_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over the pixels that count of the loss and of the weights, in fp32, and nothing for the backward.

    A target that is neither a class nor ``ignore_index`` makes the loss NaN and counts nowhere else.
    """
    K = logits.shape[1]
    precise = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple's GPUs have no fp64
    loss = logits.new_zeros((), dtype=precise)
    total_weight = torch.zeros_like(loss)
    for chunk in _chunks(logits, target.shape[1:]):
        log_probabilities = chunk.upsample(logits).log_softmax(dim=-1)
        own, counts, stray = _read_target(target[chunk.images, chunk.rows], K, ignore_index)
        own_weight = counts.float() if weight is None else weight[own] * counts
        part = (label_smoothing - 1) * own_weight * log_probabilities.gather(-1, own[..., None])[..., 0]
        if label_smoothing:
            weights = log_probabilities.new_ones(K) if weight is None else weight
            part = part - label_smoothing / K * (log_probabilities @ weights)
        loss += part.where(counts, torch.where(stray, torch.nan, 0.0)).sum(dtype=precise)
        total_weight += own_weight.sum(dtype=precise)
    return loss.float(), total_weight.float(), loss.new_empty(0, dtype=torch.float32)


@_full_precision
def cross_entropy_backward(
    grad: Tensor,
    saved: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The gradient of the summed loss, times ``grad``, in the logits' dtype; deterministic. ``saved`` is empty."""
    N, K, h, w = logits.shape
    H, W = target.shape[1:]
    total = torch.zeros((N, h, w, K), dtype=torch.float32, device=logits.device)
    along_x = _interpolation_matrix(w, W, slice(0, W), slice(0, w), logits.device)
    for chunk in _chunks(logits, (H, W)):
        values = chunk.upsample(logits).softmax(dim=-1)
        own, counts, _ = _read_target(target[chunk.images, chunk.rows], K, ignore_index)
        own_weight = (1 - label_smoothing) * (counts.float() if weight is None else weight[own] * counts)
        softmax_weight = own_weight
        if label_smoothing:
            weights = values.new_ones(K) if weight is None else weight
            softmax_weight = own_weight + label_smoothing / K * weights.sum() * counts
        values.mul_(softmax_weight[..., None])
        values.masked_fill_(~counts[..., None], 0.0)  # a pixel that does not count may have NaN logits
        values.scatter_add_(-1, own[..., None], -own_weight[..., None])
        if label_smoothing:
            values -= label_smoothing / K * weights * counts[..., None]
        along_y = _interpolation_matrix(h, H, chunk.rows, chunk.source_rows, logits.device)
        values = (along_y.T @ values.flatten(2)).unflatten(2, (W, K))
        total[chunk.images, chunk.source_rows] += along_x.T @ values
    # Exactly 0 stays 0 if grad is infinite: the mean over no pixels at all.
    return torch.empty_like(logits).copy_(torch.where(total == 0, 0.0, total * grad).permute(0, 3, 1, 2))


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    relu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    y = conv_pointwise(x, weight, scale, shift, residual, stride, padding, dilation, relu)
    return y if out is None else out.copy_(y)


def aspp_branches(
    x: Tensor, weights: Sequence[Tensor], scale: Tensor | None, shift: Tensor, *, rates: Sequence[int]
) -> Tensor:
    return concatenated_branches(conv_pointwise, x, weights, scale, shift, rates)


def aspp_projection(branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor) -> Tensor:
    return projection_of_branches(conv_pointwise, branches, pooled, weight, scale, shift)


@_full_precision
def conv_pointwise(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    relu: bool,
) -> Tensor:
    """The convolution, then a pass over its result for the residual, one for a shift per image, one for the ReLU.

    In fp16 with a scale, one more; and in fp32, where it takes less time than to fold the scale into the weight.
    """
    pixels = x.numel() // (x.shape[1] * stride**2)
    if x.dtype == torch.float32 and pixels < weight[0].numel():
        weight, rest = _channels_last(weight), scale
    else:
        weight, rest = _folded(weight, scale)
    bias = shift.to(x.dtype) if shift.ndim == 1 and rest is None else None
    y = F.conv2d(_channels_last(x), weight, bias, stride, padding, dilation)
    if bias is None:
        shift = shift[..., None, None]
        y = y.add_(shift) if rest is None else torch.addcmul(shift, y, rest[:, None, None]).to(x.dtype)
    y = y if residual is None else y.add_(residual)
    return _channels_last(y.relu_() if relu else y)


@_full_precision
def cudnn_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    relu: bool,
) -> Tensor:
    """All in one call of cuDNN, on CUDA tensors without gradients; as ``conv_pointwise`` where it can't be.

    That is without ReLU, and in fp16 with a scale.
    """
    own, rest = _folded(weight, scale)
    if not relu or rest is not None:
        return conv_pointwise(x, weight, scale, shift, residual, stride, padding, dilation, relu)
    x, weight, bias = _channels_last(x), own, shift.to(x.dtype)
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, 1)
    if residual is None:
        return _channels_last(torch.cudnn_convolution_relu(x, weight, bias, *geometry))
    residual = _channels_last(residual)
    if residual.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        residual = residual.clone()  # it may not alias the input: pytorch#62926
    return _channels_last(torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry))


@_full_precision
def addmm_relu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    relu: bool,
) -> Tensor:
    """A 1x1 convolution as a matrix product with bias and ReLU in its epilogue; what is none, as ``conv_pointwise``.

    Nor is one in fp32, where matrix products have a setting for TF32 of their own, and in fp16 with a scale.
    """
    product = weight.shape[2:] == (1, 1) and stride == 1 and not padding and x.dtype.itemsize == 2
    own, rest = _folded(weight, scale)
    if not (product and relu and residual is None and rest is None):
        return conv_pointwise(x, weight, scale, shift, residual, stride, padding, dilation, relu)
    N, _, H, W = x.shape
    pixels = _channels_last(x).permute(0, 2, 3, 1).flatten(0, 2)
    y = torch._addmm_activation(shift.to(x.dtype), pixels, own.flatten(1).T)
    return _channels_last(y.view(N, H, W, -1).permute(0, 3, 1, 2))


@_full_precision
def conv_fused_pointwise(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    relu: bool,
) -> Tensor:
    """The convolution, then one pass over its result, by a Triton kernel, for all that follows; without gradients."""
    from . import splits

    if x.dtype == torch.float16:  # the result has to fit before the scale, too
        weight, scale = _folded(weight, scale)
    y = F.conv2d(_channels_last(x), _channels_last(weight), None, stride, padding, dilation)
    y = y.contiguous(memory_format=torch.channels_last)
    if y.numel():
        sums = y.permute(0, 2, 3, 1).reshape(-1, 1, y.shape[1])
        residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
        splits.add_splits(sums, scale, shift, residual, y, relu=relu)
    return y


FORMS: dict[str, Callable[..., Tensor]] = {
    "conv_pointwise": conv_pointwise,
    "conv_fused_pointwise": conv_fused_pointwise,
    "cudnn_relu": cudnn_relu,
    "addmm_relu": addmm_relu,
}


def concatenated_branches(
    convolve: Callable[..., Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    scale: Tensor | None,
    shift: Tensor,
    rates: Sequence[int],
) -> Tensor:
    """ASPP's branches by one of the FORMS."""
    scales = [None] * len(weights) if scale is None else scale.chunk(len(weights))
    branches = [
        convolve(x, weight, scale_of_branch, shift_of_branch, None, 1, rate, max(rate, 1), True)
        for weight, scale_of_branch, shift_of_branch, rate in zip(
            weights, scales, shift.chunk(len(weights)), (0, *rates), strict=True
        )
    ]
    return torch.cat(branches, dim=1)


def projection_of_branches(
    convolve: Callable[..., Tensor],
    branches: Tensor,
    pooled: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
) -> Tensor:
    """ASPP's projection by one of the FORMS that take a shift for each image: those named for what is pointwise."""
    weight, shift = split_projection(branches, pooled, weight, scale, shift)
    return convolve(branches, weight, scale, shift, None, 1, 0, 1, True)


@_full_precision
def split_projection(
    branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """The branches' part of the weight, and the shift (N, C_out) with the pooled branch, constant per image, in it."""
    own, of_pooled = weight.tensor_split([branches.shape[1]], dim=1)
    pooled, of_pooled = (values.to(torch.promote_types(values.dtype, torch.float32)) for values in (pooled, of_pooled))
    share = F.conv2d(pooled, of_pooled).flatten(1)  # a convolution, whose setting for TF32 is not matrix products'
    return own, shift + (share if scale is None else share * scale)


def _folded(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The weight with the scale of its output channels, rounded once, in channels_last memory; and what is left of it.

    In fp16 that is a power of two for each channel, (C_out,) fp32: 1 where the product fits, else what brings it there.
    """
    rest = None
    if scale is not None:
        weight, dtype = weight * scale[:, None, None, None], weight.dtype
        if dtype == torch.float16:
            largest = weight.abs().amax((1, 2, 3), keepdim=True)
            outside = ((largest < FP16_SAFE[0]) & (largest > 0)) | (largest > FP16_SAFE[1])
            power = torch.where(outside, torch.exp2(torch.log2(largest).floor()), 1.0)
            weight, rest = weight / power, power.flatten()
        weight = weight.to(dtype)
    return _channels_last(weight), rest


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class _Chunk(NamedTuple):
    """Some output rows of some pictures, and the low-resolution rows that they are interpolated from."""

    images: slice
    rows: slice
    source_rows: slice
    size: tuple[int, int]  # (H, W) of the whole output

    def upsample(self, logits: Tensor) -> Tensor:
        """The rows of ``F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)``.

        (N, K, h, w) -> (images, rows, W, K).
        """
        H, W = self.size
        source = logits[self.images, :, self.source_rows].permute(0, 2, 3, 1).float().contiguous()
        source = _interpolate(source, 2, logits.shape[3], W, slice(0, W), slice(0, logits.shape[3]))
        return _interpolate(source, 1, logits.shape[2], H, self.rows, self.source_rows)


def _chunks(logits: Tensor, size: Sequence[int]) -> Iterator[_Chunk]:
    N, K, h, _ = logits.shape
    H, W = size
    rows = max(1, CHUNK_ELEMENTS.get(logits.device.type, 1 << 26) // (K * W))
    images = max(1, rows // H)
    rows = min(rows, H)
    for n in range(0, N, images):
        for y in range(0, H, rows):
            end = min(y + rows, H)
            source_rows = slice(_lower(h, H, y), min(_lower(h, H, end - 1) + 2, h))
            yield _Chunk(slice(n, min(n + images, N)), slice(y, end), source_rows, (H, W))


def _lower(n_in: int, n_out: int, position: int) -> int:
    """The sample at or before an output position, for half-pixel centres."""
    return max(0, ((2 * position + 1) * n_in - n_out) // (2 * n_out))


def _interpolate(values: Tensor, dim: int, n_in: int, n_out: int, outputs: slice, inputs: slice) -> Tensor:
    """Linear interpolation along ``dim`` from n_in samples, of which ``values`` holds some, to some of n_out positions.

    By weights rather than differences, as PyTorch does it: infinity minus infinity would be NaN.
    """
    lower, upper, fraction = _positions(n_in, n_out, outputs, values.device)
    fraction = fraction.view([-1 if axis == dim else 1 for axis in range(4)])
    result = values.index_select(dim, lower - inputs.start).mul_(1 - fraction)
    return result.addcmul_(values.index_select(dim, upper - inputs.start), fraction)


def _positions(n_in: int, n_out: int, positions: slice, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The samples before and after some output positions, and the weight of the latter."""
    doubled = (2 * torch.arange(positions.start, positions.stop, device=device) + 1) * n_in - n_out
    doubled = doubled.clamp(min=0)  # the distance from the first sample in units of 1 / (2 * n_out)
    lower = doubled // (2 * n_out)
    fraction = (doubled - lower * 2 * n_out).float() / (2 * n_out)  # of two exact numbers
    return lower, (lower + 1).clamp(max=n_in - 1), fraction


def _interpolation_matrix(n_in: int, n_out: int, outputs: slice, inputs: slice, device: torch.device) -> Tensor:
    """(outputs, inputs) weights; its transpose takes gradients back."""
    lower, upper, fraction = _positions(n_in, n_out, outputs, device)
    samples = torch.arange(inputs.start, inputs.stop, device=device)
    return (samples == lower[:, None]) * (1 - fraction[:, None]) + (samples == upper[:, None]) * fraction[:, None]


def _read_target(target: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Class indices (0 where there is none), which pixels count, and which have a target that is no class."""
    target = target.long()
    is_class = (target >= 0) & (target < num_classes)
    valid = target != ignore_index
    counts = valid & is_class
    return torch.where(counts, target, 0), counts, valid & ~is_class
