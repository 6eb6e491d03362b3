"""The operators that PyTorch sees, one per fused block: schemas, implementations, shapes, gradients.

``torch.compile`` and ``torch.export`` treat each as opaque. On CUDA an operator runs its Triton kernel, imported when
first called; on a CPU it runs ``library``, or the kernel itself under Triton's interpreter. So this file needs no
Triton, and an exported program loads where there is none.

Registered with ``torch.library.Library`` rather than ``custom_op``: a quarter of the time per call.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import library
from .choice import interpreting

_library = torch.library.Library("fastdeeplab", "DEF")


def _triton(stem: str) -> ModuleType:
    return importlib.import_module(f".{stem}", __package__)


# upsample_argmax

_library.define("upsample_argmax(Tensor logits, SymInt[2] size, ScalarType dtype) -> Tensor")


def _upsample_argmax_cuda(logits: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return _triton("argmax").upsample_argmax(logits, size, dtype)


def _upsample_argmax_cpu(logits: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    if interpreting():
        return _upsample_argmax_cuda(logits, size, dtype)
    return library.upsample_argmax(logits, size, dtype=dtype)


def _upsample_argmax_fake(logits: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return logits.new_empty((logits.shape[0], *size), dtype=dtype)


_library.impl("upsample_argmax", _upsample_argmax_cuda, "CUDA")
_library.impl("upsample_argmax", _upsample_argmax_cpu, "CPU")
torch.library.register_fake("fastdeeplab::upsample_argmax", _upsample_argmax_fake, lib=_library)


# upsample_cross_entropy: the sums over the valid pixels of the loss and of the weights (their quotient is the mean),
# and the log-sum-exp of each pixel for the backward

_ARGUMENTS = "Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing"
_library.define(f"upsample_cross_entropy({_ARGUMENTS}) -> (Tensor loss, Tensor total_weight, Tensor lse)")
_library.define(f"upsample_cross_entropy_backward(Tensor grad, Tensor lse, {_ARGUMENTS}) -> Tensor")


def _cross_entropy_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _triton("cross_entropy").cross_entropy_forward(*arguments)


def _cross_entropy_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _cross_entropy_cuda(*arguments) if interpreting() else library.cross_entropy_forward(*arguments)


def _cross_entropy_fake(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    scalar = logits.new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(scalar), logits.new_empty(target.shape, dtype=torch.float32)


def _cross_entropy_backward_cuda(*arguments: Any) -> Tensor:
    return _triton("cross_entropy_backward").cross_entropy_backward(*arguments)


def _cross_entropy_backward_cpu(*arguments: Any) -> Tensor:
    return _cross_entropy_backward_cuda(*arguments) if interpreting() else library.cross_entropy_backward(*arguments)


def _cross_entropy_backward_fake(grad: Tensor, lse: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, ctx.ignore_index, ctx.label_smoothing = inputs
    _, total_weight, lse = output
    ctx.mark_non_differentiable(total_weight, lse)
    ctx.save_for_backward(lse, logits, target, weight)


def _cross_entropy_autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    grad_logits = torch.ops.fastdeeplab.upsample_cross_entropy_backward(
        grad, *ctx.saved_tensors, ctx.ignore_index, ctx.label_smoothing
    )
    return grad_logits, None, None, None, None


_library.impl("upsample_cross_entropy", _cross_entropy_cuda, "CUDA")
_library.impl("upsample_cross_entropy", _cross_entropy_cpu, "CPU")
_library.impl("upsample_cross_entropy_backward", _cross_entropy_backward_cuda, "CUDA")
_library.impl("upsample_cross_entropy_backward", _cross_entropy_backward_cpu, "CPU")
torch.library.register_fake("fastdeeplab::upsample_cross_entropy", _cross_entropy_fake, lib=_library)
torch.library.register_fake("fastdeeplab::upsample_cross_entropy_backward", _cross_entropy_backward_fake, lib=_library)
torch.library.register_autograd(
    "fastdeeplab::upsample_cross_entropy", _cross_entropy_autograd, setup_context=_save_for_backward, lib=_library
)
