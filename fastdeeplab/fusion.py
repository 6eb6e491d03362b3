"""Convolution and batch norm in one call of ``fastdeeplab.kernels``.

In eval mode a batch norm is a scale and a shift per channel. A model's live parameters give them anew in each forward,
those of all batch norms together by a few multi-tensor operations: nothing is kept, so nothing can be stale. In a
frozen model the scale is folded into the convolution's weight, and ``FoldedBatchNorm`` holds what is left; on a CPU
its convolutions run on weights that were packed once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fastdeeplab import kernels
from fastdeeplab.kernels import library
from fastdeeplab.packed import PackedWeights

CLASSES_MULTIPLE = 8  # of the channels that a frozen classifier computes
DROPOUTS = (_DropoutNd, nn.Identity)  # nothing in eval mode
FUSED = (nn.Conv2d, _BatchNorm, nn.ReLU, _DropoutNd)  # layers that are not called

Affine = Mapping[nn.Module, tuple[Tensor | None, Tensor]]  # of each batch norm: scale (None for 1) and shift, (C,) fp32


class PackedAffine(dict[nn.Module, tuple[Tensor | None, Tensor]]):
    """The scales and shifts of a frozen model whose convolutions run on packed weights."""

    def __init__(self, affine: Affine, weights: PackedWeights) -> None:
        super().__init__(affine)
        self.weights = weights


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


NORMS = (_BatchNorm, FoldedBatchNorm)


def affine_of_batch_norms(model: nn.Module) -> Affine | None:
    """Scale and shift of every batch norm, if the model can run fused: convolution and batch norm as one.

    None where PyTorch's layers must run one by one: in training mode, where gradients or autocast are enabled, where
    a batch norm has no running statistics, where a convolution, batch norm or ReLU is not PyTorch's own or not the
    kernels' (groups, padding other than zeros), and where one of them or a dropout is watched by a hook.
    """
    if model.training or torch.is_grad_enabled() or torch.is_autocast_enabled(_device(model).type):
        return None
    layers = [module for module in model.modules() if isinstance(module, FUSED)]
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


def is_chain(
    container: nn.Module | None,
    *layers: type[nn.Module] | tuple[type[nn.Module], ...],
    kind: type[nn.Module] = nn.Sequential,
) -> bool:
    """Whether a container, or None, is these layers and no hook waits for it: they may be run without calling it."""
    if container is None:
        return True
    children = list(container.children())
    unchanged = type(container) is kind and not _is_hooked(container)
    return unchanged and len(children) == len(layers) and all(map(isinstance, children, layers))


class PaddedClassifier(nn.Conv2d):
    """A frozen 1x1 convolution to K classes, with channels of zeros added: pixels start at multiples of 16 bytes.

    Nobody sees these: its result is cut to K channels, and its state dict holds K classes.

    Args:
        weight: (K, C, 1, 1).
        bias: (K,), cast to the weight's dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.classes, channels = weight.shape[:2]
        with torch.device("meta"):
            super().__init__(channels, self.classes + -self.classes % CLASSES_MULTIPLE, 1)
        padded = self._pad(weight).contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(padded, requires_grad=False)
        self.bias = nn.Parameter(self._pad(bias.to(weight.dtype)), requires_grad=False)

    def _pad(self, values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros(self.out_channels - self.classes, *values.shape[1:])])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("weight", "bias"):
            destination[prefix + name] = destination[prefix + name][: self.classes]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        keys = [key for key in (prefix + "weight", prefix + "bias") if key in state_dict]
        super()._load_from_state_dict(
            {**state_dict, **{key: self._pad(state_dict[key]) for key in keys}}, prefix, *arguments
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, : self.classes]

    def extra_repr(self) -> str:
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, of which {self.classes} are classes"


def classify(classifier: nn.Conv2d, x: Tensor, affine: Affine, *, kernel: str = "auto") -> Tensor:
    """The logits of a 1x1 convolution: one channel per class."""
    logits = conv_bn_relu(classifier, None, x, affine, relu=False, kernel=kernel)
    return logits[:, : classifier.classes] if isinstance(classifier, PaddedClassifier) else logits


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
    if (weights := _packed_weights(affine, "conv_bn_relu", kernel, x, scale)) is not None:
        y = weights.convolve(conv, x, conv.weight, shift, residual, relu=relu)
        if y is not None:
            return y
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


def aspp_branches(
    convs: Sequence[Any], norms: Sequence[nn.Module], x: Tensor, affine: Affine, *, kernel: str = "auto"
) -> Tensor:
    """``relu(norm(conv(x)))`` of a 1x1 and dilated 3x3 convolutions, concatenated; see ``kernels.aspp_branches``."""
    scales, shifts = zip(*(affine[norm] for norm in norms), strict=True)
    scale = None
    if any(scale is not None for scale in scales):
        ones = torch.ones_like(shifts[0])
        scale = torch.cat([ones if scale is None else scale for scale in scales])
    if (packed := _packed_weights(affine, "aspp_branches", kernel, x, scale)) is not None:
        branches = [packed.convolve(conv, x, conv.weight, shift) for conv, shift in zip(convs, shifts, strict=True)]
        found = [branch for branch in branches if branch is not None]
        if len(found) == len(branches):
            return torch.cat(found, dim=1)
    weights, rates = [conv.weight for conv in convs], [conv.dilation[0] for conv in convs[1:]]
    return kernels.aspp_branches(x, weights, scale, torch.cat(shifts), rates=rates, impl=kernel)


def aspp_projection(
    conv: Any, norm: nn.Module, branches: Tensor, pooled: Tensor, affine: Affine, *, kernel: str = "auto"
) -> Tensor:
    """``relu(norm(conv(cat(branches, pooled))))``, ``pooled`` spread over the map; see ``kernels.aspp_projection``."""
    scale, shift = affine[norm]
    if (weights := _packed_weights(affine, "aspp_projection", kernel, branches, scale)) is not None:
        own, shifts = library.split_projection(branches, pooled, conv.weight.data, None, shift)
        y = weights.convolve(conv, branches, own, shifts)
        if y is not None:
            return y
    return kernels.aspp_projection(branches, pooled, conv.weight, scale, shift, impl=kernel)


def _packed_weights(
    affine: Affine, function: str, kernel: str, x: Tensor, scale: Tensor | None
) -> PackedWeights | None:
    """A frozen model's packed weights, where PyTorch is what runs the function and nobody records which layers run."""
    if not isinstance(affine, PackedAffine) or scale is not None or kernels.is_recording():
        return None
    if kernels.choose(function, kernel, x.device, x.dtype).impl != "torch":
        return None
    return affine.weights


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def is_served(conv: nn.Conv2d) -> bool:
    """Whether the kernels have a convolution's geometry: no groups, zeros as padding, the same along both axes."""
    pairs = (conv.stride, conv.padding, conv.dilation)
    same_both_ways = all(not isinstance(pair, str) and pair[0] == pair[1] for pair in pairs)
    return conv.groups == 1 and conv.padding_mode == "zeros" and same_both_ways


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call of the kernels does the same."""
    if type(layer) not in (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU) and not isinstance(layer, _DropoutNd):
        return False
    if _is_hooked(layer):
        return False
    if isinstance(layer, nn.Conv2d):
        return is_served(layer)
    if isinstance(layer, _BatchNorm):
        return not layer.training and layer.running_mean is not None and layer.running_var is not None
    return True
