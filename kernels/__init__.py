"""The fused operations of DeepLabV3, as functions in the manner of ``torch.nn.functional``.

Each has ``impl``: ``"triton"`` runs the handwritten kernel (on CUDA tensors, or on CPU tensors under Triton's
interpreter) and raises where it can't run, ``"torch"`` runs PyTorch (a convolution's scale, residual and ReLU may be a
pass of Triton's after it), ``"auto"`` the kernel where it can run and gains something, and PyTorch elsewhere.
``reference`` has the same functions in the shortest plain PyTorch.

The convolutions' kernels have no gradients: where one is required, ``"auto"`` and ``"torch"`` run PyTorch, which has.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, library, ops
from .choice import Choice, choose, why_not_kernel_size
from .decisions import is_recording, recording

FUNCTIONS = (  # those that have a Triton kernel
    "conv_bn_relu",
    "aspp_branches",
    "aspp_projection",
    "upsample_argmax",
    "upsample_cross_entropy",
)

__all__ = [
    "FUNCTIONS",
    "Choice",
    "aspp_branches",
    "aspp_projection",
    "choose",
    "conv_bn_relu",
    "is_recording",
    "ops",
    "recording",
    "upsample_argmax",
    "upsample_cross_entropy",
]


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
    impl: str = "auto",
) -> Tensor:
    """Convolution, folded batch norm, residual and ReLU in one pass over the result.

    ``relu(F.conv2d(x, weight, stride=..., padding=..., dilation=...) * scale + shift + residual)``. The kernel
    accumulates in fp32, follows PyTorch's setting of TF32 for convolutions and rounds once. Of a 3x3 convolution with
    stride 1 and padding equal to the dilation it can leave out the taps that only read padding: the tile choice says.

    Args:
        x: (N, C, H, W) of any strides; channels_last, or a slice of such a tensor's channels, is read as it is.
        weight: (C_out, C, kH, kW) of x's dtype.
        scale: (C_out,) fp32, or None for 1.
        shift: (C_out,) fp32.
        residual: (N, C_out, H', W') of x's dtype, or None.
        stride, padding, dilation: integers, the same for both axes; the stride below 2^31.
        relu: whether to end with the ReLU.
        out: where to write the result, or None: (N, C_out, H', W') of x's dtype, channels_last or a slice of such a
            tensor's channels.
        impl: ``"auto"``, ``"triton"`` (for kernels of 1x1 and 3x3) or ``"torch"``.

    Returns:
        (N, C_out, H', W') in channels_last memory; ``out`` if it was given.

    Raises:
        ValueError: shapes, types or devices do not fit, or ``out`` overlaps an input.
        RuntimeError: ``impl`` is ``"triton"`` and the kernel can't run here, or a gradient is required.
    """
    checks.check_impl(impl)
    checks.check_map(x, "x")
    checks.check_weight(weight, x)
    checks.check_scale_and_shift(scale, shift, weight.shape[0], x.device)
    checks.check_count(stride, "stride", 1, 2**31 - 1)
    checks.check_count(padding, "padding", 0)
    checks.check_count(dilation, "dilation", 1)
    shape = checks.output_shape(x, weight, stride, padding, dilation)
    checks.check_output_shape(shape)
    checks.check_residual(residual, x, shape)
    inputs = (x, weight, scale, shift, residual)
    if out is not None:
        checks.check_out(out, inputs, x, shape)

    impl = _chosen("conv_bn_relu", impl, x, why_not_kernel_size(weight.shape[2:]))
    if _needs_gradient("conv_bn_relu", impl, *inputs):
        return library.conv_bn_relu(*inputs, stride=stride, padding=padding, dilation=dilation, relu=relu)
    if out is None:
        return torch.ops.fastdeeplab.conv_bn_relu(*inputs, stride, padding, dilation, relu, impl)
    torch.ops.fastdeeplab.conv_bn_relu_out(*inputs, stride, padding, dilation, relu, out, impl)
    return out


def aspp_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    scale: Tensor | None,
    shift: Tensor,
    *,
    rates: Sequence[int],
    impl: str = "auto",
) -> Tensor:
    """The convolutions of atrous spatial pyramid pooling side by side: one 1x1 and a 3x3 for each rate.

    As the concatenation of ``conv_bn_relu(x, weight, ..., padding=rate, dilation=rate)`` over the weights. The kernel
    computes all branches in one launch (over tensor maps four in each) and leaves out the taps that only read padding,
    at large rates most of them (Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017).

    Args:
        x: (N, C, h, w) of any strides; channels_last, or a slice of such a tensor's channels, is read as it is.
        weights: (C_b, C, 1, 1), and (C_b, C, 3, 3) for each rate, of x's dtype.
        scale: ((1 + len(rates)) * C_b,) fp32 in the branches' order, or None for 1.
        shift: ((1 + len(rates)) * C_b,) fp32.
        rates: the dilations of the 3x3 convolutions.
        impl: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        (N, (1 + len(rates)) * C_b, h, w) in channels_last memory, after the ReLU.

    Raises:
        ValueError: shapes, types or devices do not fit.
        RuntimeError: ``impl`` is ``"triton"`` and the kernel can't run here, or a gradient is required.
    """
    checks.check_impl(impl)
    checks.check_map(x, "x")
    checks.check_branch_weights(weights, rates, x)
    checks.check_scale_and_shift(scale, shift, len(weights) * weights[0].shape[0], x.device)
    impl = _chosen("aspp_branches", impl, x)
    if _needs_gradient("aspp_branches", impl, x, *weights, scale, shift):
        return library.aspp_branches(x, weights, scale, shift, rates=rates)
    return torch.ops.fastdeeplab.aspp_branches(x, weights, scale, shift, rates, impl)


def aspp_projection(
    branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor, *, impl: str = "auto"
) -> Tensor:
    """The 1x1 convolution, batch norm and ReLU that join the branches of atrous spatial pyramid pooling.

    As ``conv_bn_relu`` of the concatenation of ``branches`` and ``pooled``, spread over the map. The pooled branch is
    the same for all pixels of an image: its share is computed once per image, in fp32, and added.

    Args:
        branches: (N, C_in - C_p, h, w) of any strides, as ``aspp_branches`` gives it.
        pooled: (N, C_p, 1, 1), the image pooling branch, of branches' dtype.
        weight: (C_out, C_in, 1, 1) of branches' dtype; the last C_p input channels are the pooled branch's.
        scale: (C_out,) fp32, or None for 1.
        shift: (C_out,) fp32.
        impl: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        (N, C_out, h, w) in channels_last memory, after the ReLU.

    Raises:
        ValueError: shapes, types or devices do not fit.
        RuntimeError: ``impl`` is ``"triton"`` and the kernel can't run here, or a gradient is required.
    """
    checks.check_impl(impl)
    checks.check_map(branches, "branches")
    checks.check_pooled(pooled, branches)
    checks.check_projection_weight(weight, branches, pooled)
    checks.check_scale_and_shift(scale, shift, weight.shape[0], branches.device)
    impl = _chosen("aspp_projection", impl, branches)
    if _needs_gradient("aspp_projection", impl, branches, pooled, weight, scale, shift):
        return library.aspp_projection(branches, pooled, weight, scale, shift)
    return torch.ops.fastdeeplab.aspp_projection(branches, pooled, weight, scale, shift, impl)


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
    chosen = _chosen("upsample_argmax", impl, logits)
    if (impl, chosen) == ("auto", "triton"):
        chosen = "auto"  # decided when the operator runs, by what was measured of this shape
    return torch.ops.fastdeeplab.upsample_argmax(logits, size, dtype, chosen)


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
    bit by bit in every run. (On a GPU under ``torch.use_deterministic_algorithms`` PyTorch's implementation needs
    ``CUBLAS_WORKSPACE_CONFIG``, as its matrix products do.)

    A logit of minus infinity is a class without probability for the kernel: infinite is the loss of the pixels next to
    it whose target it is, and with label smoothing of all pixels next to it. PyTorch has NaN at its cells' borders. The
    kernel takes logits below -1e20 for minus infinity, and gives NaN where the largest is above 1e9 in magnitude.

    Args:
        logits: (N, K, h, w) of any strides, fp32, fp16 or bf16.
        target: (N, H, W) class indices, uint8, int16, int32 or int64.
        weight: (K,) weights of the classes, or None.
        ignore_index: target value of the pixels that do not count.
        reduction: ``"mean"`` over the valid pixels' weights, ``"sum"``, or ``"none"``, which has no kernel: it is
            PyTorch's own with full-size logits, and on a GPU its gradient is not deterministic.
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

    obstacle = 'reduction="none" has no kernel' if reduction == "none" else None
    choice = _chosen("upsample_cross_entropy", impl, logits, obstacle)
    full_size = logits.shape[2:] == target.shape[1:]  # with nothing to upsample, each pixel has a chunk of its own
    if choice == "torch" or (impl == "auto" and full_size):
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


def _chosen(function: str, impl: str, tensor: Tensor, *obstacle: str | None) -> str:
    choice = choose(function, impl, tensor.device, tensor.dtype, *obstacle)
    if choice.impl == "nothing":
        raise RuntimeError(choice.why)
    return choice.impl


def _needs_gradient(function: str, impl: str, *inputs: Tensor | None) -> bool:
    if not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return False
    if impl == "triton":
        raise RuntimeError(f"{function} has no gradient as a Triton kernel: use torch.no_grad() or another impl")
    return True
