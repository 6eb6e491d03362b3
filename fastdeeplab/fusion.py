"""Convolution and batch norm in one call of ``fastdeeplab.kernels``, on the modules' live parameters.

In eval mode a batch norm is a scale and a shift per channel. They are computed anew in each forward, those of all batch
norms together by a few multi-tensor operations: nothing is kept, so nothing can be stale.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdeeplab import kernels

Affine = Mapping[nn.Module, tuple[Tensor, Tensor]]  # of each batch norm: scale and shift, (C,) fp32


def affine_of_batch_norms(model: nn.Module) -> Affine | None:
    """Scale and shift of every batch norm, if the model can run fused: convolution and batch norm as one.

    None where PyTorch's layers must run one by one: in training mode, where gradients or autocast are enabled, where
    a batch norm has no running statistics, and where a convolution, batch norm or ReLU is not PyTorch's own, not the
    kernels' (groups, padding other than zeros) or watched by a hook.
    """
    if model.training or torch.is_grad_enabled() or torch.is_autocast_enabled(_device(model).type):
        return None
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | _BatchNorm | nn.ReLU)]
    if not all(map(_is_plain, layers)):
        return None
    norms: list[Any] = [layer for layer in layers if isinstance(layer, _BatchNorm)]
    if not norms:
        return {}
    means, variances = ([getattr(norm, name).float() for norm in norms] for name in ("running_mean", "running_var"))
    weights = [norm.running_var.new_ones(()) if norm.weight is None else norm.weight for norm in norms]
    biases = [norm.running_var.new_zeros(()) if norm.bias is None else norm.bias for norm in norms]
    deviations = torch._foreach_sqrt(torch._foreach_add(variances, [norm.eps for norm in norms]))
    scales: Any = torch._foreach_div([weight.float() for weight in weights], deviations)
    shifts: Any = torch._foreach_sub([bias.float() for bias in biases], torch._foreach_mul(means, scales))
    return dict(zip(norms, zip(scales, shifts, strict=True), strict=True))


def conv_bn_relu(
    conv: Any,
    norm: nn.Module,
    x: Tensor,
    affine: Affine,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    kernel: str = "auto",
) -> Tensor:
    """``relu(norm(conv(x)) + residual)`` of a plain ``nn.Conv2d``; see ``fastdeeplab.kernels.conv_bn_relu``."""
    scale, shift = affine[norm]
    if conv.bias is not None:
        shift = shift + scale * conv.bias
    return kernels.conv_bn_relu(
        x,
        conv.weight,
        scale,
        shift,
        residual,
        stride=conv.stride[0],
        padding=conv.padding[0],
        dilation=conv.dilation[0],
        relu=relu,
        impl=kernel,
    )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call of the kernels does the same."""
    if type(layer) not in (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU):
        return False
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if isinstance(layer, nn.Conv2d):
        pairs = (layer.stride, layer.padding, layer.dilation)
        same_both_ways = all(not isinstance(pair, str) and pair[0] == pair[1] for pair in pairs)
        return layer.groups == 1 and layer.padding_mode == "zeros" and same_both_ways
    if isinstance(layer, _BatchNorm):
        return not layer.training and layer.running_mean is not None and layer.running_var is not None
    return True
