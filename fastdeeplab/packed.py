"""Convolutions of a frozen fp32 model on a CPU, by oneDNN, on weights that lie as it wants them.

``F.conv2d`` gives oneDNN a weight as PyTorch has it, and at each call oneDNN first reorders it into blocks of channels.
On a map of few pixels that takes most of the time. Weights that don't change are reordered once, by the operators that
PyTorch's compiler uses when it freezes a model. These are not public: where one is missing or refuses, nothing is
packed, and the layers run as they do elsewhere.

Bias and convolution are one call; residual and ReLU follow as PyTorch's, because oneDNN's ReLU makes NaN 0.
"""

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Pixels of a result, from which on a weight is reordered at each call: it takes a hundredth of the convolution there,
# and large pictures of many sizes neither take memory for it nor wait for it.
MOST_PIXELS = 4096
MOST_LAYOUTS = 3  # that a weight is kept in
MOST_SHAPES = 64  # of a convolution's inputs, of which is known what layout they take
PADDING = slice(108, 112)  # in oneDNN's description of a layout, before its 64-bit sizes: nothing sets these bytes

Key = tuple[Any, ...]


def can_run(images: Tensor) -> bool:
    """Whether a model's convolutions on these images may run on packed weights, as far as can be said beforehand.

    Code that is compiled, exported or traced, and code that a dispatch mode watches, is to see the model's own
    operators.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    return bool(
        type(images) is Tensor
        and images.device.type == "cpu"
        and images.dtype == torch.float32
        and torch.backends.mkldnn.enabled
        and operators_work()
        and torch._C._len_torch_dispatch_stack() == 0
    )


@functools.cache
def operators_work() -> bool:
    """Whether this PyTorch has the operators, with the arguments and the results that are expected."""
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        kind: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        conv, x = nn.Conv2d(3, 5, 3, stride=2, padding=2, dilation=2, **kind), torch.randn(1, 3, 9, 9, **kind)
        try:
            torch._C._len_torch_dispatch_stack()
            weights = PackedWeights()
            for _ in range(2):  # packed at the second
                y = weights._convolve(conv, x, conv.weight, conv.bias)
        except Exception:  # whatever a private interface may raise
            return False
        return torch.allclose(y, conv(x), atol=1e-4)


class PackedWeights:
    """The packed weights of a model's convolutions, made when they are first needed.

    One per layout that oneDNN chooses for a convolution's inputs, mostly the same for all sizes: as much memory as the
    weights take, once more, in the worst case ``MOST_LAYOUTS`` times. To ask oneDNN for the layout is to pack, so a
    shape is packed for when it comes a second time: pictures that all differ in size wait for nothing. A weight that
    was replaced, or written to by an operation that PyTorch counts, is packed anew; writes through ``.data`` and numpy
    are not counted.
    """

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[nn.Module, _Layouts] = WeakKeyDictionary()

    def convolve(
        self,
        conv: nn.Conv2d,
        x: Tensor,
        weight: Tensor,
        shift: Tensor,
        residual: Tensor | None = None,
        *,
        relu: bool = True,
    ) -> Tensor | None:
        """``relu(conv(x) + shift + residual)``; None where it can't run on packed weights.

        Args:
            conv: says the geometry.
            x: (N, C, H, W) fp32.
            weight: (C_out, C, kH, kW), ``conv.weight`` or its first C input channels.
            shift: (C_out,) fp32, or (N, C_out), one for each image.
            residual: of the result's shape, or None.
            relu: whether to end with the ReLU.

        Returns:
            (N, C_out, H', W') in channels_last memory, or None.
        """
        fits = type(conv.weight) is nn.Parameter and not conv.weight.is_inference()  # which counts no writes
        fits = fits and x.dtype == weight.dtype == shift.dtype == torch.float32 and x.shape[1] == weight.shape[1]
        if not fits or x.numel() == 0 or weight.device.type != "cpu":
            return None
        per_image = shift if shift.ndim == 2 and len(shift) > 1 else None
        try:
            y = self._convolve(conv, x, weight, None if per_image is not None else shift.flatten())
        except RuntimeError:
            return None
        if per_image is not None:
            y.add_(per_image[:, :, None, None])
        if residual is not None:
            y.add_(residual)
        return y.relu_() if relu else y

    def _convolve(self, conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding, dilation = (_pair(each) for each in (conv.stride, conv.padding, conv.dilation))
        N, _, H, W = x.shape
        pixels = N * H * W // (stride[0] * stride[1])
        if pixels <= 1 and weight.shape[2:] == (1, 1):  # a product of matrix and vector, which reorders nothing
            return F.conv2d(x, weight, bias, stride, padding)
        x = x.contiguous(memory_format=torch.channels_last)
        if pixels < MOST_PIXELS:
            weight = self._packed(conv, x, weight, (padding, stride, dilation, 1))
        y = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, 1, "none", [], "")
        return y.contiguous(memory_format=torch.channels_last)

    def _packed(self, conv: nn.Conv2d, x: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        layouts = self._of.get(conv)
        if layouts is None or not layouts.are_of(conv.weight):
            layouts = self._of[conv] = _Layouts(conv.weight)
        # oneDNN plans for a number of threads. A weight in the layout of another plan is right, but may be very slow.
        key = (x.shape, torch.get_num_threads(), conv.padding, conv.stride, conv.dilation)
        packed = layouts.by_key.get(key, weight)  # other threads may forget it meanwhile
        if packed is weight:
            layouts.expect(key)
        return layouts.pack(key, x, weight, geometry) if packed is None else packed


class _Layouts:
    """A convolution's weight in the layouts that were needed so far."""

    def __init__(self, weight: Tensor) -> None:
        self.source = weight.detach()  # keeps the memory from being given to another weight
        self.version = weight._version
        self.by_key: dict[Key, Tensor | None] = {}  # None for what has come once
        self.by_layout: dict[bytes, Tensor] = {}

    def are_of(self, weight: Tensor) -> bool:
        own, same = self.source, self.version == weight._version
        return same and (own.data_ptr(), own.shape, own.stride()) == (weight.data_ptr(), weight.shape, weight.stride())

    def expect(self, key: Key) -> None:
        if len(self.by_key) >= MOST_SHAPES:
            self.by_key.clear()
        self.by_key[key] = None

    def pack(self, key: Key, x: Tensor, weight: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        # Strides that say channels_last, also of 1x1 kernels, ask for the layout that goes with such an input.
        weight = torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight)
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
        descriptor = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy()
        descriptor[PADDING] = 0
        layout = descriptor.tobytes()
        if layout not in self.by_layout and len(self.by_layout) >= MOST_LAYOUTS:
            self.by_layout.clear()
            self.by_key.clear()
        self.by_key[key] = packed = self.by_layout.setdefault(layout, packed)
        return packed


def _pair(values: Any) -> list[int]:
    return [int(value) for value in values]
