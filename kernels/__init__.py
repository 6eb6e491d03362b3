"""The fused operations of DeepLabV3, as functions in the manner of ``torch.nn.functional``.

Each has ``impl``: ``"triton"`` runs the handwritten kernel (on CUDA tensors, or on CPU tensors under Triton's
interpreter) and raises where it can't run, ``"torch"`` runs PyTorch, ``"auto"`` the kernel where it can run and gains
something, and PyTorch elsewhere. ``reference`` has the same functions in the shortest plain PyTorch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, library, ops
from .choice import Choice, choose

FUNCTIONS = ("upsample_argmax", "upsample_cross_entropy")  # those that have a Triton kernel

__all__ = ["FUNCTIONS", "Choice", "choose", "ops", "upsample_argmax", "upsample_cross_entropy"]


def upsample_argmax(
    logits: Tensor, size: Sequence[int], *, dtype: torch.dtype = torch.int64, impl: str = "auto"
) -> Tensor:
    """Bilinear upsampling and argmax over the classes in one pass; the full-size logits are never written.

    As ``F.interpolate(logits.float(), size, mode="bilinear", align_corners=False).argmax(1)``: interpolated in fp32,
    the first of equal classes wins, NaN counts as the maximum.

    Args:
        logits: (N, K, h, w) of any strides, fp32, fp16 or bf16.
        size: (H, W), larger or smaller than (h, w).
        dtype: of the result: int64, int32, int16 or uint8.
        impl: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        (N, H, W) class indices, contiguous; always in [0, K).

    Raises:
        ValueError: shapes or types do not fit, or ``dtype`` can't hold K classes.
        RuntimeError: ``impl`` is ``"triton"`` and the kernel can't run here.
    """
    checks.check_impl(impl)
    checks.check_logits(logits)
    checks.check_size(size)
    checks.check_index_dtype(dtype, logits.shape[1])
    impl = _chosen("upsample_argmax", impl, logits)
    return torch.ops.fastdeeplab.upsample_argmax(logits, size, dtype, impl)


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    check_target: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Bilinear upsampling and cross-entropy in one pass, forward and backward, without full-size logits.

    As ``F.cross_entropy(F.interpolate(logits.float(), target.shape[-2:], mode="bilinear", align_corners=False),
    target, weight, ...)`` with the same defaults, computed in fp32. The gradient has the logits' dtype, and is the same
    bit by bit in every run.

    A logit of minus infinity is a class without probability for the kernel: infinite is the loss of the pixels next to
    it whose target it is, and with label smoothing of all pixels next to it. PyTorch has NaN at its cells' borders.

    Args:
        logits: (N, K, h, w) of any strides, fp32, fp16 or bf16.
        target: (N, H, W) class indices, uint8, int16, int32 or int64.
        weight: (K,) weights of the classes, or None.
        ignore_index: target value of the pixels that do not count.
        reduction: ``"mean"`` over the valid pixels' weights, ``"sum"``, or ``"none"``, which is PyTorch's own with
            full-size logits, whatever ``impl`` says, and on a GPU has no deterministic gradient.
        label_smoothing: in [0, 1].
        check_target: whether to look for targets outside [0, K) on a GPU, too, which synchronises. Compiled code never
            looks, as it can't raise.
        impl: ``"auto"`` (PyTorch where the logits have full size as they are), ``"triton"`` or ``"torch"``.

    Returns:
        The loss in fp32: a scalar, or (N, H, W) with ``reduction="none"``. NaN if all pixels are ignored and the mean
        is asked for, as in PyTorch, or if a target that was not looked at is outside [0, K) and not ``ignore_index``
        (with ``"none"`` NaN for that pixel).

    Raises:
        ValueError: shapes or types do not fit, or a target is outside [0, K) and not ``ignore_index`` (on a GPU with
            ``check_target``).
        RuntimeError: ``impl`` is ``"triton"`` and the kernel can't run here; or a second derivative is asked for.
    """
    checks.check_impl(impl)
    checks.check_logits(logits)
    checks.check_target(target, logits)
    checks.check_class_weight(weight, logits)
    checks.check_ignore_index(ignore_index)
    checks.check_reduction(reduction)
    checks.check_label_smoothing(label_smoothing)
    if (check_target or target.device.type == "cpu") and not torch.compiler.is_compiling():
        checks.check_target_values(target, logits.shape[1], ignore_index)

    choice = _chosen("upsample_cross_entropy", impl, logits)
    full_size = logits.shape[2:] == target.shape[1:]  # with nothing to upsample, each pixel has a chunk of its own
    if reduction == "none" or choice == "torch" or (impl == "auto" and full_size):
        return library.upsample_cross_entropy(
            logits,
            target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    weight = None if weight is None else weight.float()
    loss, total_weight, _ = torch.ops.fastdeeplab.upsample_cross_entropy(
        logits, target, weight, ignore_index, label_smoothing, "triton"
    )
    return loss / total_weight if reduction == "mean" else loss


def _chosen(function: str, impl: str, logits: Tensor) -> str:
    choice = choose(function, impl, logits.device, logits.dtype)
    if choice.impl == "nothing":
        raise RuntimeError(choice.why)
    return choice.impl
