"""Argument validation of the public functions: a ValueError before anything is computed."""

from collections.abc import Sequence

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
    if not (isinstance(ignore_index, int) and -(2**63) <= ignore_index < 2**63):
        raise ValueError(f"ignore_index must be an integer of 64 bits, got {ignore_index!r}")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def check_label_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
