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
from .choice import interpreting

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
    if _runs_triton(impl, logits):
        return _triton("argmax").upsample_argmax(logits, size, dtype)
    return library.upsample_argmax(logits, size, dtype=dtype)


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
