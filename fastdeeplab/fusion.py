"""Convolution and batch norm in one call of ``fastdeeplab.kernels``.

In eval mode a batch norm is a scale and a shift per channel. A model's live parameters give them anew in each forward,
those of all batch norms together by a few multi-tensor operations: nothing is kept, so nothing can be stale. In a
frozen model the scale is folded into the convolution's weight, and ``FoldedBatchNorm`` holds what is left.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdeeplab import kernels

Affine = Mapping[nn.Module, tuple[Tensor | None, Tensor]]  # of each batch norm: scale (None for 1) and shift, (C,) fp32


class FoldedBatchNorm(nn.Module):
    """What is left of a batch norm that was folded into the convolution before it: the shift of each channel.

    Args:
        shift: (C,) fp32.
        scale: (C,) fp32, or None for 1: powers of two that keep folded fp16 weights within fp16's range.
    """

    def __init__(self, shift: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift, requires_grad=False)
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)

    def affine(self) -> tuple[Tensor | None, Tensor]:
        return self.scale, self.shift

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move to other devices, and stay fp32."""
        before = {name: parameter.data for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, parameter in self.named_parameters():
            if parameter.dtype != torch.float32:
                parameter.data = before[name].to(parameter.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.affine()
        y = x.float() if scale is None else x.float() * scale[:, None, None]
        return (y + shift[:, None, None]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.shift)}" + ("" if self.scale is None else ", scaled")


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
    norm: nn.Module | None,
    x: Tensor,
    affine: Affine,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    kernel: str = "auto",
) -> Tensor:
    """``relu(norm(conv(x)) + residual)`` of a plain ``nn.Conv2d``; see ``fastdeeplab.kernels.conv_bn_relu``."""
    bias = None if conv.bias is None else conv.bias.float()
    if norm is None:
        scale, shift = None, conv.weight.new_zeros(len(conv.weight), dtype=torch.float32) if bias is None else bias
    else:
        scale, shift = affine[norm]
        if bias is not None:
            shift = shift + (bias if scale is None else scale * bias)
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


def is_served(conv: nn.Conv2d) -> bool:
    """Whether the kernels have a convolution's geometry: no groups, zeros as padding, the same along both axes."""
    pairs = (conv.stride, conv.padding, conv.dilation)
    same_both_ways = all(not isinstance(pair, str) and pair[0] == pair[1] for pair in pairs)
    return conv.groups == 1 and conv.padding_mode == "zeros" and same_both_ways


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call of the kernels does the same."""
    if type(layer) not in (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU):
        return False
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if isinstance(layer, nn.Conv2d):
        return is_served(layer)
    if isinstance(layer, _BatchNorm):
        return not layer.training and layer.running_mean is not None and layer.running_var is not None
    return True
