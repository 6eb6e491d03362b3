"""The operators that PyTorch sees, one per fused block: schemas, implementations, shapes, gradients.

``torch.compile`` and ``torch.export`` treat each as opaque. Where it is asked to, an operator runs the Triton kernel,
its file imported when first called, on CUDA tensors and, under Triton's interpreter, on CPU tensors; else it runs
``library``. So this file needs no Triton, and an exported program loads where there is none.

Registered with ``torch.library.Library`` rather than ``custom_op``: a quarter of the time per call.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import library
from .candidates import DEFAULT_FORM, Layer, Tail, Tile
from .checks import output_shape, pixel_pitch
from .choice import convolution_precision, interpreting, kernels_are_off, why_not
from .decisions import Decision, TailDecision, decide, decide_tail, record

_library = torch.library.Library("fastdeeplab", "DEF")


def _define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(schema)
    name = schema.split("(")[0]
    for device in ("CUDA", "CPU", "MPS"):
        _library.impl(name, implementation, device)
    torch.library.register_fake(f"fastdeeplab::{name}", fake, lib=_library)


def _runs_triton(impl: str, tensor: Tensor) -> bool:
    return impl == "triton" and (tensor.is_cuda or interpreting())


def _triton(stem: str) -> ModuleType:
    return importlib.import_module(f".{stem}", __package__)


# upsample_argmax


def _upsample_argmax(logits: Tensor, size: Sequence[int], dtype: torch.dtype, impl: str) -> Tensor:
    if len(logits) == 0:
        return _upsample_argmax_fake(logits, size, dtype, impl)
    tail = Tail.of(logits, size)
    obstacle = why_not(logits.device, logits.dtype) or (None if logits.is_cuda else "the interpreter is for tests")
    if obstacle and not _runs_triton(impl, logits):
        decision = TailDecision("torch", None, obstacle)
    else:
        decision = decide_tail(tail, impl, logits.device)
    record(tail, decision)
    if decision.impl == "torch":
        return library.upsample_argmax(logits, size, dtype=dtype)
    return _triton("argmax").upsample_argmax(logits, size, dtype, tile=decision.strip)


def _upsample_argmax_fake(logits: Tensor, size: Sequence[int], dtype: torch.dtype, impl: str) -> Tensor:
    return logits.new_empty((logits.shape[0], *size), dtype=dtype)


_define(
    "upsample_argmax(Tensor logits, SymInt[2] size, ScalarType dtype, str impl) -> Tensor",
    _upsample_argmax,
    _upsample_argmax_fake,
)


# upsample_cross_entropy: the sums over the valid pixels of the loss and of the weights (their quotient is the mean),
# and what the backward of the same implementation needs: the kernel two numbers per pixel, library nothing


def _cross_entropy(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *options, impl = arguments
    forward = _triton("cross_entropy") if _runs_triton(impl, logits) else library
    return forward.cross_entropy_forward(logits, *options)


def _cross_entropy_fake(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    scalar = logits.new_empty((), dtype=torch.float32)
    saved = (len(target), 2, *target.shape[1:]) if _runs_triton(options[-1], logits) else 0
    return scalar, torch.empty_like(scalar), logits.new_empty(saved, dtype=torch.float32)


def _cross_entropy_backward(grad: Tensor, *arguments: Any) -> Tensor:
    *options, impl = arguments
    backward = _triton("cross_entropy_backward") if _runs_triton(impl, grad) else library
    return backward.cross_entropy_backward(grad, *options)


def _cross_entropy_backward_fake(grad: Tensor, saved: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


_ARGUMENTS = "Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, str impl"
_define(
    f"upsample_cross_entropy({_ARGUMENTS}) -> (Tensor loss, Tensor total_weight, Tensor saved)",
    _cross_entropy,
    _cross_entropy_fake,
)
_define(
    f"upsample_cross_entropy_backward(Tensor grad, Tensor saved, {_ARGUMENTS}) -> Tensor",
    _cross_entropy_backward,
    _cross_entropy_backward_fake,
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, *ctx.options = inputs
    _, total_weight, saved = output
    ctx.mark_non_differentiable(total_weight, saved)
    ctx.save_for_backward(saved, logits, target, weight)


def _cross_entropy_autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_logits = torch.ops.fastdeeplab.upsample_cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options)
    return grad_logits, None, None, None, None, None


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError("upsample_cross_entropy has no second derivative")


torch.library.register_autograd(
    "fastdeeplab::upsample_cross_entropy", _cross_entropy_autograd, setup_context=_save_for_backward, lib=_library
)
torch.library.register_autograd("fastdeeplab::upsample_cross_entropy_backward", _no_second_derivative, lib=_library)


# The fused convolutions. "auto" is decided when an operator runs, by the shapes it then gets; none has gradients.


def _decide(layer: Layer, impl: str, x: Tensor, scale: Tensor | None) -> Decision:
    off = "FASTDEEPLAB_KERNELS=torch" if kernels_are_off() else None
    obstacle = off or why_not(x.device, x.dtype) or (None if x.is_cuda else "the interpreter is for tests")
    if obstacle and not _runs_triton(impl, x):  # nor do a GPU's measurements of the library count here
        decision = Decision("torch", None, DEFAULT_FORM, obstacle)
    else:
        decision = decide(layer, impl if obstacle is None or impl == "triton" else "torch", x.device)
    if decision.impl == "nothing":
        raise RuntimeError(f"{layer.function} can't run as a Triton kernel here: {decision.why}")
    if decision.impl == "torch" and obstacle is None and scale is not None and x.dtype == torch.float16:
        # The other forms, measured without a scale, need another pass for one that fp16 weights may not take.
        why = f"{decision.why}; in fp16 the scale is applied after the convolution"
        decision = decision._replace(form="conv_fused_pointwise", why=why)
    record(layer, decision)
    return decision


def _launchers(tile: Tile) -> ModuleType:
    return _triton("conv" if tile.kernel == "pointer" else "conv_tma")


def _channels_last(x: Tensor, dense: bool = False) -> Tensor:
    """In the launchers' layout: NHWC, the pixels one pitch apart, every stride as the addresses ask for.

    A slice of a channels_last tensor's channels stays what it is, unless it is to be ``dense``.
    """
    _, C, H, W = x.shape
    pitch = pixel_pitch(x)
    if pitch is None or pitch >= 2**31 or (dense and pitch != C):
        x, pitch = x.contiguous(memory_format=torch.channels_last), C
    strides = (H * W * pitch, 1, W * pitch, pitch)
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def _weight(weight: Tensor) -> Tensor:
    """Of which views can be taken; they can't of a parameter that was made in inference mode and cast outside it."""
    return _channels_last(weight.data, dense=True)


def _precision(x: Tensor) -> str:
    return convolution_precision(x.device) if x.dtype == torch.float32 else "tf32"


def _aligned(*tensors: Tensor | None) -> bool:
    """Whether every pixel starts at a multiple of 16 bytes."""
    return all(
        tensor is None or (tensor.data_ptr() % 16 == 0 and tensor.stride(3) * tensor.itemsize % 16 == 0)
        for tensor in tensors
    )


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _convolve(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    relu: bool,
    *,
    out: Tensor | None,
    impl: str,
) -> Tensor:
    shape = output_shape(x, weight, stride, padding, dilation)
    if shape[0] == 0:
        return _empty(x, shape)
    x, weight = _channels_last(x), _weight(weight)
    residual = None if residual is None else _channels_last(residual)
    target = None if out is None else _channels_last(out)
    layer = Layer.of(
        "conv_bn_relu", x.shape, weight.shape, x.dtype, stride=stride, padding=padding, dilations=(dilation,),
        residual=residual is not None, relu=relu, aligned=_aligned(x, weight, residual, target),
        precision=_precision(x),
    )  # fmt: skip
    decision = _decide(layer, impl, x, scale)
    if decision.impl == "torch":
        y = library.FORMS[decision.form](x, weight, scale, shift, residual, stride, padding, dilation, relu)
        return _channels_last(y) if out is None else out.copy_(y)
    assert decision.tile is not None
    target = _empty(x, shape) if target is None else target
    _launchers(decision.tile).conv_bn_relu(
        x, weight, None if scale is None else scale.contiguous(), shift.contiguous(), residual, target,
        stride=stride, padding=padding, dilation=dilation, relu=relu,
        tile=decision.tile, precision=layer.precision,
    )  # fmt: skip
    return target


def _conv_bn_relu(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    *options, impl = arguments
    return _convolve(x, weight, *options, out=None, impl=impl)


def _conv_bn_relu_out(x: Tensor, weight: Tensor, *arguments: Any) -> None:
    *options, out, impl = arguments
    written = _convolve(x, weight, *options, out=out, impl=impl)
    if written.data_ptr() != out.data_ptr():  # a tensor of other strides, handed over past the public function
        out.copy_(written)
    torch.autograd.graph.increment_version(out)  # a kernel's writes are not seen by themselves


def _conv_bn_relu_fake(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    *_, stride, padding, dilation, _, _ = arguments
    return _empty(x, output_shape(x, weight, stride, padding, dilation))


def _conv_bn_relu_out_fake(*_: Any) -> None:
    pass


_CONVOLUTION = (
    "Tensor x, Tensor weight, Tensor? scale, Tensor shift, Tensor? residual, "
    "SymInt stride, SymInt padding, SymInt dilation, bool relu"
)
_define(f"conv_bn_relu({_CONVOLUTION}, str impl) -> Tensor", _conv_bn_relu, _conv_bn_relu_fake)
_define(f"conv_bn_relu_out({_CONVOLUTION}, Tensor(a!) out, str impl) -> ()", _conv_bn_relu_out, _conv_bn_relu_out_fake)


def _aspp_branches(
    x: Tensor, weights: Sequence[Tensor], scale: Tensor | None, shift: Tensor, rates: Sequence[int], impl: str
) -> Tensor:
    if len(x) == 0:
        return _aspp_branches_fake(x, weights)
    x, weights = _channels_last(x), [_weight(weight) for weight in weights]
    layer = Layer.of(
        "aspp_branches", x.shape, weights[-1].shape, x.dtype, dilations=tuple(rates), aligned=_aligned(x, *weights),
        precision=_precision(x),
    )  # fmt: skip
    decision = _decide(layer, impl, x, scale)
    if decision.impl == "torch":
        convolve = library.FORMS[decision.form]
        return _channels_last(library.concatenated_branches(convolve, x, weights, scale, shift, rates))
    assert decision.tile is not None
    out = _aspp_branches_fake(x, weights)
    _launchers(decision.tile).aspp_branches(
        x, weights, None if scale is None else scale.contiguous(), shift.contiguous(), out,
        rates=rates, tile=decision.tile, precision=layer.precision,
    )  # fmt: skip
    return out


def _aspp_branches_fake(x: Tensor, weights: Sequence[Tensor], *_: Any) -> Tensor:
    return _empty(x, (x.shape[0], sum(weight.shape[0] for weight in weights), *x.shape[2:]))


_define(
    "aspp_branches(Tensor x, Tensor[] weights, Tensor? scale, Tensor shift, SymInt[] rates, str impl) -> Tensor",
    _aspp_branches,
    _aspp_branches_fake,
)


def _aspp_projection(
    branches: Tensor, pooled: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor, impl: str
) -> Tensor:
    if len(branches) == 0:
        return _aspp_projection_fake(branches, pooled, weight)
    branches, weight = _channels_last(branches), _weight(weight)
    own_shape = (weight.shape[0], branches.shape[1], 1, 1)
    layer = Layer.of(
        "aspp_projection", branches.shape, own_shape, branches.dtype, aligned=_aligned(branches),
        precision=_precision(branches),
    )  # fmt: skip
    decision = _decide(layer, impl, branches, scale)
    if decision.impl == "torch":
        convolve = library.FORMS[decision.form]
        return _channels_last(library.projection_of_branches(convolve, branches, pooled, weight, scale, shift))
    own_weight, shift = library.split_projection(branches, pooled, weight, scale, shift)
    assert decision.tile is not None
    out = _aspp_projection_fake(branches, pooled, weight)
    _launchers(decision.tile).aspp_projection(
        branches, shift, _weight(own_weight), None if scale is None else scale.contiguous(), out,
        tile=decision.tile, precision=layer.precision,
    )  # fmt: skip
    return out


def _aspp_projection_fake(branches: Tensor, pooled: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return _empty(branches, (branches.shape[0], weight.shape[0], *branches.shape[2:]))


_define(
    "aspp_projection(Tensor branches, Tensor pooled, Tensor weight, Tensor? scale, Tensor shift, str impl) -> Tensor",
    _aspp_projection,
    _aspp_projection_fake,
)
