"""Argument validation of the public functions: a ValueError before anything is computed."""

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
IMPLEMENTATIONS = ("auto", "triton", "torch")
REDUCTIONS = ("mean", "sum", "none")


def check_impl(impl: str, name: str = "impl") -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f'{name} must be "auto", "triton" or "torch", got {impl!r}')


def check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def check_logits(logits: Tensor) -> None:
    check_tensor(logits, "logits")
    if logits.ndim != 4 or 0 in logits.shape[1:]:
        raise ValueError(f"logits must be (N, K, h, w) with K, h and w from 1 up, got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating-point numbers, got {logits.dtype}")


def check_size(size: Sequence[int]) -> None:
    pair = isinstance(size, Sequence) and len(size) == 2
    if not pair or any(isinstance(n, float) for n in size) or not all(n > 0 for n in size):
        raise ValueError(f"size must be (H, W), both from 1 up, got {size}")


def check_index_dtype(dtype: torch.dtype, num_classes: int) -> None:
    if dtype not in INDEX_DTYPES:
        raise ValueError(f"dtype must be torch.uint8, int16, int32 or int64, got {dtype}")
    if num_classes - 1 > torch.iinfo(dtype).max:
        raise ValueError(f"dtype {dtype} can't hold the indices of {num_classes} classes")


def check_target(target: Tensor, logits: Tensor) -> None:
    check_tensor(target, "target")
    if target.ndim != 3 or target.shape[0] != logits.shape[0] or 0 in target.shape[1:]:
        expected = f"({logits.shape[0]}, H, W) with H and W from 1 up"
        raise ValueError(f"target must be {expected}, got {tuple(target.shape)}")
    if target.dtype not in INDEX_DTYPES:
        raise ValueError(f"target must be uint8, int16, int32 or int64, got {target.dtype}")
    if target.device != logits.device:
        raise ValueError(f"target must be on {logits.device} with the logits, got {target.device}")


def check_target_values(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Look at the values, which synchronises on a GPU."""
    target = target.long()  # in uint8 an ignore_index of -1 would be 255
    counted = target[target != ignore_index]
    if counted.numel() and not (counted.min() >= 0 and counted.max() < num_classes):
        raise ValueError(
            f"target must be in [0, {num_classes}) or {ignore_index} (ignored), "
            f"got values from {counted.min()} to {counted.max()}"
        )


def check_class_weight(weight: Tensor | None, logits: Tensor) -> None:
    if weight is None:
        return
    check_tensor(weight, "weight")
    num_classes = logits.shape[1]
    if weight.shape != (num_classes,) or not weight.is_floating_point():
        expected = f"({num_classes},) floating-point numbers for {num_classes} classes"
        raise ValueError(f"weight must be {expected}, got {weight.dtype} {tuple(weight.shape)}")
    if weight.requires_grad:
        raise ValueError("weight must not require a gradient: there is none for it")
    if weight.device != logits.device:
        raise ValueError(f"weight must be on {logits.device} with the logits, got {weight.device}")


def check_ignore_index(ignore_index: int) -> None:
    if not (isinstance(ignore_index, Integral) and -(2**63) <= ignore_index < 2**63):
        raise ValueError(f"ignore_index must be an integer of 64 bits, got {ignore_index!r}")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def check_label_smoothing(label_smoothing: float) -> None:
    if not (isinstance(label_smoothing, Real) and 0 <= label_smoothing <= 1):
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")


def check_map(x: Tensor, name: str) -> None:
    check_tensor(x, name)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must be (N, C, H, W) with C, H and W from 1 up, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating-point numbers, got {x.dtype}")


def check_partner(tensor: Tensor, name: str, x: Tensor, x_name: str) -> None:
    """Of the dtype and on the device of ``x``."""
    check_tensor(tensor, name)
    if tensor.dtype != x.dtype:
        raise ValueError(f"{name} must be {x.dtype} as {x_name}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} with {x_name}, got {tensor.device}")


def check_weight(weight: Tensor, x: Tensor) -> None:
    check_partner(weight, "weight", x, "x")
    if weight.ndim != 4 or weight.shape[1] != x.shape[1] or 0 in weight.shape:
        raise ValueError(f"weight must be (C_out, {x.shape[1]}, kH, kW), got {tuple(weight.shape)}")


def check_scale_and_shift(scale: Tensor | None, shift: Tensor, channels: int, device: torch.device) -> None:
    if scale is not None:
        check_per_channel(scale, "scale", channels, device)
    check_per_channel(shift, "shift", channels, device)


def check_per_channel(values: Tensor, name: str, channels: int, device: torch.device) -> None:
    check_tensor(values, name)
    if values.shape != (channels,) or values.dtype != torch.float32:
        raise ValueError(f"{name} must be ({channels},) in fp32, got {values.dtype} {tuple(values.shape)}")
    if values.device != device:
        raise ValueError(f"{name} must be on {device} with the rest, got {values.device}")


def check_count(value: int, name: str, smallest: int, largest: int | None = None) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool) or value < smallest:
        raise ValueError(f"{name} must be an integer from {smallest} up, got {value!r}")
    if largest is not None and value > largest:
        raise ValueError(f"{name} must be at most {largest}, got {value!r}")


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Of a convolution along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def output_shape(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> tuple[int, int, int, int]:
    """Of a convolution: (N, C_out, H', W')."""
    H, W = (
        output_size(size, kernel, stride, padding, dilation)
        for size, kernel in zip(x.shape[2:], weight.shape[2:], strict=True)
    )
    return x.shape[0], weight.shape[0], H, W


def check_output_shape(shape: Sequence[int]) -> None:
    if min(shape[2:]) < 1:
        raise ValueError(f"x must be large enough for an output of at least one pixel, got one of {tuple(shape[2:])}")


def check_residual(residual: Tensor | None, x: Tensor, shape: Sequence[int]) -> None:
    if residual is None:
        return
    check_partner(residual, "residual", x, "x")
    if residual.shape != shape:
        raise ValueError(f"residual must be {tuple(shape)}, the result's shape, got {tuple(residual.shape)}")


def pixel_pitch(x: Tensor) -> int | None:
    """How far apart in memory the pixels of (N, C, H, W) lie, in elements, if one distance holds for all of them.

    So it is for a dense channels_last tensor and for a slice of its channels. None where pixels lie otherwise, or a
    pixel's channels not side by side. The strides of dimensions of size 1 lead nowhere and do not count.
    """
    N, C, H, W = x.shape
    stride_n, stride_c, stride_h, stride_w = x.stride()
    pitch = stride_w if W > 1 else stride_h if H > 1 else stride_n if N > 1 else C
    fits = pitch >= C and (C == 1 or stride_c == 1)
    fits = fits and (H == 1 or stride_h == W * pitch) and (N == 1 or stride_n == H * W * pitch)
    return pitch if fits or x.numel() == 0 else None


def check_out(out: Tensor, inputs: Sequence[Tensor | None], x: Tensor, shape: Sequence[int]) -> None:
    """``out`` can be written to, and nothing that is read lies in it."""
    check_partner(out, "out", x, "x")
    if out.shape != shape:
        raise ValueError(f"out must be {tuple(shape)}, the result's shape, got {tuple(out.shape)}")
    if pixel_pitch(out) is None:
        raise ValueError(
            f"out must be channels_last or a slice of such a tensor's channels, got strides {out.stride()}"
        )
    present = [tensor for tensor in inputs if tensor is not None]
    if out.requires_grad or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present)):
        raise ValueError("out must be None where a gradient is required: writing to it has none")
    if any(tensor is out for tensor in present):
        raise ValueError("out must be none of the inputs")
    # Compiled code has no addresses to compare; it writes as if nothing overlapped, then copies.
    if not torch.compiler.is_compiling() and any(_may_overlap(out, tensor) for tensor in present):
        raise ValueError("out must not overlap the inputs in memory")


def _may_overlap(out: Tensor, tensor: Tensor) -> bool:
    if out.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() or not out.numel() or not tensor.numel():
        return False
    starts = [t.storage_offset() * t.itemsize for t in (out, tensor)]
    lengths = [
        (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.itemsize for t in (out, tensor)
    ]
    if starts[0] + lengths[0] <= starts[1] or starts[1] + lengths[1] <= starts[0]:
        return False
    # Different channels of the same pixels.
    pitch = pixel_pitch(out)
    if tensor.ndim != 4 or pitch is None or pitch != pixel_pitch(tensor) or tensor.dtype != out.dtype:
        return True
    distance = (tensor.storage_offset() - out.storage_offset()) % pitch
    return distance < out.shape[1] or pitch - distance < tensor.shape[1]


def check_branch_weights(weights: Sequence[Tensor], rates: Sequence[int], x: Tensor) -> None:
    if isinstance(rates, Tensor) or not isinstance(rates, Sequence) or not rates:
        raise ValueError(f"rates must be a sequence of at least one integer, got {rates!r}")
    for rate in rates:
        check_count(rate, "rates", 1)
    if isinstance(weights, Tensor) or not isinstance(weights, Sequence) or len(weights) != 1 + len(rates):
        got = len(weights) if isinstance(weights, Sequence) else type(weights).__name__
        raise ValueError(f"weights must be {1 + len(rates)} tensors, one 1x1 and one 3x3 for each rate, got {got}")
    for branch, weight in enumerate(weights):
        name, size = f"weights[{branch}]", 3 if branch else 1
        check_partner(weight, name, x, "x")
        if weight.ndim != 4 or weight.shape[1:] != (x.shape[1], size, size) or weight.shape[0] != weights[0].shape[0]:
            expected = f"({weights[0].shape[0]}, {x.shape[1]}, {size}, {size})"
            raise ValueError(f"{name} must be {expected}, got {tuple(weight.shape)}")
    if not weights[0].shape[0]:
        raise ValueError(f"weights[0] must be (C_b, {x.shape[1]}, 1, 1), got {tuple(weights[0].shape)}")


def check_pooled(pooled: Tensor, branches: Tensor) -> None:
    check_partner(pooled, "pooled", branches, "branches")
    if pooled.ndim != 4 or pooled.shape[0] != branches.shape[0] or 0 in pooled.shape[1:2] or pooled.shape[2:] != (1, 1):
        raise ValueError(f"pooled must be ({branches.shape[0]}, C_p, 1, 1), got {tuple(pooled.shape)}")


def check_projection_weight(weight: Tensor, branches: Tensor, pooled: Tensor) -> None:
    check_partner(weight, "weight", branches, "branches")
    channels = branches.shape[1] + pooled.shape[1]
    if weight.ndim != 4 or weight.shape[1:] != (channels, 1, 1) or not weight.shape[0]:
        raise ValueError(f"weight must be (C_out, {channels}, 1, 1), got {tuple(weight.shape)}")
