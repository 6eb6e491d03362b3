"""A trained model to a frozen copy of it that takes fewer passes: batch norms folded, weights cast, kernels on.

The copy consists of the same module classes. A batch norm after a convolution multiplies each channel by a scale and
adds a shift. The scale goes into the convolution's weight, in fp64 and rounded once; the shift stays, in fp32, and is
added to the kernels' fp32 accumulators.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdeeplab import packed
from fastdeeplab.backbone import LAYERS, Bottleneck, ResNet
from fastdeeplab.fusion import DROPOUTS, Affine, FoldedBatchNorm, PackedAffine, PaddedClassifier, is_served
from fastdeeplab.graphs import Graphs, Recorder, check_device, check_lazy, check_shapes
from fastdeeplab.head import ASPP, ASPPPooling
from fastdeeplab.kernels.choice import DTYPES
from fastdeeplab.kernels.library import FP16_SAFE
from fastdeeplab.model import Kernels, ResNetModel, upsample_logits
from fastdeeplab.tuner import Tuned, shown_progress, tune_network

# Parts that are known by what they are made of: their class, of whichever name, has one forward. The others are
# sequences or PyTorch's own layers.
WITH_OWN_FORWARD = (ResNetModel, ResNet, Bottleneck, ASPP, ASPPPooling)


def accelerate(
    model: nn.Module, *, kernels: str | Kernels = "auto", dtype: torch.dtype | None = None
) -> "AcceleratedModel":
    """Make a frozen copy of a DeepLabV3 that computes the same masks sooner.

    Args:
        model: a ``ResNetModel``, or torchvision's DeepLabV3 on a ResNet-50, -101 or -152, recognised by its structure;
            in any mode, on any device. It is left as it is.
        kernels: which implementation the modules run: ``"auto"``, ``"triton"`` or ``"torch"`` for all, or a
            ``Kernels``. See ``explain``.
        dtype: of weights and computation: float32, float16 or bfloat16; by default the model's.

    Returns:
        The copy, on the model's device, in eval mode; see ``AcceleratedModel``.

    Raises:
        ValueError: the model is no such DeepLabV3, with the name of what does not fit, be it a forward of its own or a
            forward hook; or another argument is invalid.
    """
    source = _Source(model)
    if dtype is None:
        dtype = source.conv("backbone.conv1").weight.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
    with torch.device("meta"):  # no weight is made that is then thrown away
        fast = AcceleratedModel(**source.config(), kernels=kernels)
    source.check_children(fast)
    fast.dropped_aux_head = getattr(model, "aux_classifier", None) is not None
    with torch.no_grad():
        for name, conv, norm_name in list(_convolutions(fast)):
            source.copy_geometry(name, conv)
            keeps_scale = norm_name is not None  # the classifier has nothing that could
            weight, affine = _fold(source.conv(name), *source.affine(name, norm_name), dtype, keeps_scale)
            if norm_name is None:
                fast.set_submodule(name, PaddedClassifier(weight, affine.shift))
                continue
            conv.weight = nn.Parameter(weight, requires_grad=False)
            conv.bias = None
            fast.set_submodule(norm_name, affine)
    return fast.eval()


class AcceleratedModel(ResNetModel):
    """What ``accelerate`` returns: a ``ResNetModel`` in eval mode for good, with folded batch norms.

    It has no auxiliary head, takes images of any floating-point dtype, casts them to its own, and returns logits in its
    own dtype, contiguous at full size. It never computes gradients, whether they are enabled or not, and is not
    affected by autocast. Hooks on convolutions, batch norms, ReLUs and dropout inside are not called; those on what
    holds them are.

    ``copy.deepcopy``, ``pickle`` and ``.to(device)`` work. ``state_dict`` holds the folded weights, for another
    accelerated copy of a network of this structure. ``.half()`` and ``.to(dtype)`` round the folded weights a second
    time, where ``accelerate(model, dtype=...)`` rounds once; shifts stay fp32. ``train()`` raises.

    On a CPU, in fp32, convolutions whose result has fewer than 4096 pixels keep their weights once more, in the layout
    that oneDNN computes with, from the second run on images of a shape: at most three times, where images differ much
    in size. They are made anew after the weights were loaded, moved, replaced or written to; call ``fast.cpu()`` after
    writing to them through ``.data`` or numpy, which PyTorch does not count.
    """

    dropped_aux_head = False  # whether the model it was made from has one
    _graphs: Graphs | None = None  # none in a copy either, nor after unpickling
    _packed: packed.PackedWeights | None = None  # the same

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.eval()

    def forward(self, images: Tensor, *, upsample: bool = True) -> dict[str, Tensor]:
        """As ``ResNetModel.forward``.

        Raises:
            RuntimeError: the images require a gradient.
        """
        self.check_images(images)
        if images.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("an accelerated model has no gradients: take the model it was made from")
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            # Compiled code takes no locks.
            graphs = None if torch.compiler.is_compiling() else self._graphs
            logits = None if graphs is None else graphs.replay(self._compute_logits, images)
            if logits is None:
                logits = self._compute_logits(images.to(self.backbone.conv1.weight.dtype))
            if upsample:  # contiguous before it, where they are small
                logits = upsample_logits(logits.contiguous(), images.shape[-2:])
        return {"out": logits}

    def _compute_logits(self, images: Tensor) -> Tensor:
        affine: Affine = {norm: norm.affine() for norm in self.modules() if isinstance(norm, FoldedBatchNorm)}
        if packed.can_run(images):
            if self._packed is None:
                self._packed = packed.PackedWeights()
            affine = PackedAffine(affine, self._packed)
        _, c5 = self.backbone(images, affine)
        logits: Tensor = self.classifier(c5, affine)
        return logits

    def capture(self, shapes: Sequence[Sequence[int]], *, lazy: int = 0) -> None:
        """Capture runs on images of these shapes as CUDA graphs, which replay all kernels by one launch.

        From then on ``forward`` and ``predict`` replay them, with the same results, for images of these shapes and any
        floating-point dtype; other shapes run as before. It pays where the GPU waits for launches: small images, small
        batches. Each graph holds its input and its low-resolution logits; they share the memory of what lies between,
        best where the largest shape comes first, as it does within a call. Calling it again adds shapes.

        Replays may come from any thread and any CUDA stream, and wait for one another. While it captures, no other
        thread should use the GPU.

        A graph keeps what was decided at its capture: kernels and tiles, PyTorch's settings (TF32, determinism, cuDNN),
        hooks, which must not wait for the GPU and which replays don't call. It reads the weights where they lie:
        writing into them, as ``load_state_dict`` does, is seen. ``.to()`` and its like, ``tune``, and
        ``load_state_dict(assign=True)`` drop all graphs and what is left of ``lazy``. Call ``drop_captures`` before
        replacing parts or parameters by hand. Copies and pickles have no graphs. Compiled, exported and traced code
        and runs that the caller captures pass them by.

        Args:
            shapes: (B, C, H, W) each, as ``images.shape``.
            lazy: how many more shapes are captured when they are first seen, on top of those left from earlier calls;
                shapes beyond them run as before. The first run on such a shape takes as long as several, and must not
                coincide with other threads' use of the GPU. Without memory for a capture there are no more, with a
                warning.

        Raises:
            ValueError: a shape does not fit the model or is empty, or ``lazy`` is no integer from 0 up.
            RuntimeError: the model is not on a CUDA device, or the caller is capturing a graph.
        """
        checked = check_shapes(shapes, self.config["in_channels"])
        check_lazy(lazy)
        weight = self.backbone.conv1.weight
        check_device(weight.device)
        if self._graphs is None:
            self._graphs = Graphs(weight.device, Recorder(weight.device, weight.dtype))
        self._graphs.capture(self._compute_logits, checked, lazy)

    def drop_captures(self) -> None:
        """Forget the CUDA graphs and free their memory; ``lazy`` ends, too."""
        self._graphs = None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``ResNetModel.load_state_dict``."""
        self._packed = None
        norms = {name: norm for name, norm in self.named_modules() if isinstance(norm, FoldedBatchNorm)}
        # Weights of other values may keep scales where these have none, or the other way round.
        added = [norm for name, norm in norms.items() if f"{name}.scale" in state_dict and norm.scale is None]
        absent = [name for name, norm in norms.items() if f"{name}.shift" in state_dict and norm.scale is not None]
        ones = {f"{name}.scale": torch.ones_like(norms[name].shift) for name in absent}
        if assign or added:
            self.drop_captures()
        for norm in added:
            norm.scale = nn.Parameter(torch.ones_like(norm.shift), requires_grad=False)
        try:
            return super().load_state_dict(ones | dict(state_dict), strict, assign)
        except Exception:
            for norm in added:
                norm.scale = None
            raise

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.drop_captures()
        self._packed = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_graphs", "_packed")}

    def train(self, mode: bool = True) -> "AcceleratedModel":
        """Stay in eval mode.

        Raises:
            RuntimeError: ``mode`` is True.
        """
        if mode:
            raise RuntimeError("an accelerated model is frozen: train the model it was made from, and accelerate that")
        super().train(False)
        return self

    def tune(self, images: Tensor, *, seconds: float = 60.0, again: bool = False, progress: bool = False) -> Tuned:
        """Measure, once per GPU and shape, what is the fastest for each layer of a run on ``images``, and keep it.

        From then on each convolution, and upsampling with argmax, runs the kernel or the form of PyTorch's that was the
        fastest; PyTorch's are timed with ``torch.backends.cudnn.benchmark`` on, which is off by default: turn it on,
        too. Captured graphs, which hold what was decided before, are dropped. ``progress`` shows a bar on stderr; the
        rest is said of ``fastdeeplab.tuner.tune_network``, errors too.
        """
        self.drop_captures()
        with shown_progress() if progress else nullcontext() as show:
            return tune_network(self, images, seconds=seconds, again=again, progress=show)

    def save(self, path: object) -> NoReturn:
        """Raise: a checkpoint holds a model that can be trained.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("save the model this one was made from, and accelerate it after loading; or use torch.save")

    def extra_repr(self) -> str:
        shifts = {str(norm.shift.dtype) for norm in self.modules() if isinstance(norm, FoldedBatchNorm)}
        dropped = ", auxiliary head dropped" if self.dropped_aux_head else ""
        weights = f"frozen, {self.backbone.conv1.weight.dtype} weights, {'/'.join(sorted(shifts))} shifts"
        return f"{weights}, {self.config['num_classes']} classes{dropped}\nkernels={self.kernels}"


class _Source:
    """A model to be accelerated, its parts found by name and checked for being what they are taken for."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a ResNetModel or torchvision's DeepLabV3, got {type(model).__name__}")
        if isinstance(model, AcceleratedModel):
            raise ValueError("model is accelerated already: accelerate the one that it was made from")

    def part(self, name: str) -> Any:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            self.fail(f"it has no {name}")

    def fail(self, why: str) -> NoReturn:
        expected = "a ResNetModel or torchvision's DeepLabV3 on a ResNet-50, -101 or -152"
        raise ValueError(f"model must be {expected}; of this {type(self.model).__name__} {why}") from None

    def config(self) -> dict[str, Any]:
        """What a ``ResNetModel`` of the same structure is built with; dilations and strides are copied afterwards."""
        stem, classifier = self.conv("backbone.conv1"), self.conv("classifier.4")
        layers = [len(list(self.part(f"backbone.layer{stage}").children())) for stage in (1, 2, 3, 4)]
        strides = [self.conv(f"backbone.layer{stage}.0.conv2").stride[0] for stage in (2, 3, 4)]
        output_stride = 4 * strides[0] * strides[1] * strides[2]
        if output_stride not in (8, 16):
            self.fail(f"the output stride is {output_stride}, where 8 and 16 are known")
        own = self.model.config if isinstance(self.model, ResNetModel) else {"width": stem.out_channels / 64}
        return own | {
            "depth": next((depth for depth, counts in LAYERS.items() if list(counts) == layers), 50),
            "num_classes": classifier.out_channels,
            "output_stride": output_stride,
            "aux_head": False,
            "atrous_rates": [self.conv(f"classifier.0.convs.{branch}.0").dilation[0] for branch in (1, 2, 3)],
            "in_channels": stem.in_channels,
            "layers": layers,
        }

    def check_children(self, fast: nn.Module) -> None:
        """No part of the model may be one that the copy does not have, and what has no weights must be the same."""
        for name, module in fast.named_modules():
            if name == "upsample_argmax":
                continue
            part = self.part(name)
            self.check_forward(name or "model", module, part)
            if name and not isinstance(module, nn.Conv2d | _BatchNorm):
                extra = [child for child, _ in part.named_children() if child not in dict(module.named_children())]
                if extra:
                    self.fail(f"{name} has a {extra[0]}, which is not known")
            if isinstance(module, nn.ReLU) and not isinstance(part, nn.ReLU):
                self.fail(f"{name} is a {type(part).__name__}, not a ReLU")
            if isinstance(module, nn.Dropout) and not isinstance(part, DROPOUTS):
                self.fail(f"{name} is a {type(part).__name__}, not a Dropout")
            if isinstance(module, nn.MaxPool2d | nn.AdaptiveAvgPool2d) and _settings(module) != _settings(part):
                self.fail(f"{name} is {part}, not {module}")

    def check_forward(self, name: str, module: nn.Module, part: Any) -> None:
        """A part must compute what its class is known to compute: neither a hook nor a subclass may change that."""
        if part._forward_hooks or part._forward_pre_hooks:
            self.fail(f"{name} has a forward hook, which the copy would not call: remove it, and hook the copy")
        own = [each for each in type(part).__mro__ if "forward" in vars(each) and not _is_of_torch(each)]
        known = type(part).forward is type(module).forward or type(part).__name__ == "FrozenBatchNorm2d"
        if "forward" in vars(part) or not (known or len(own) <= isinstance(module, WITH_OWN_FORWARD)):
            self.fail(f"{name} is a {type(part).__name__} whose forward is not known")

    def conv(self, name: str) -> nn.Conv2d:
        """A convolution that a call of the kernels can replace."""
        conv = self.part(name)
        if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward:
            self.fail(f"{name} is a {type(conv).__name__}, not a Conv2d")
        if not is_served(conv):
            self.fail(f"{name} is {conv}: groups, other padding than zeros, and sizes that differ are not known")
        return conv

    def copy_geometry(self, name: str, conv: nn.Conv2d) -> None:
        """Strides, padding and dilations as the model has them; channels and kernels must be the same."""
        source = self.conv(name)
        shapes = [(each.out_channels, each.in_channels, *each.kernel_size) for each in (source, conv)]
        if shapes[0] != shapes[1]:
            self.fail(f"{name} has a weight of shape {shapes[0]}, not {shapes[1]}")
        conv.stride, conv.padding, conv.dilation = source.stride, source.padding, source.dilation

    def affine(self, name: str, norm_name: str | None) -> tuple[Tensor, Tensor]:
        """Scale and shift in fp64, (C_out,), of what follows a convolution; its bias is in the shift."""
        conv = self.conv(name)
        ones = torch.ones(conv.out_channels, dtype=torch.float64, device=conv.weight.device)
        scale, shift = ones, torch.zeros_like(ones)
        if norm_name is not None:
            scale, shift = self._affine_of_batch_norm(norm_name, ones)
        return scale, shift if conv.bias is None else shift + scale * conv.bias.double()

    def _affine_of_batch_norm(self, name: str, ones: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.part(name)
        # torchvision's FrozenBatchNorm2d is a class of its own.
        if not isinstance(norm, _BatchNorm) and type(norm).__name__ != "FrozenBatchNorm2d":
            self.fail(f"{name} is a {type(norm).__name__}, not a batch norm")
        if norm.running_mean is None or norm.running_var is None:
            self.fail(f"{name} has no running statistics")
        scale = ones if norm.weight is None else norm.weight.double()
        scale = scale / torch.sqrt(norm.running_var.double() + norm.eps)
        shift = -norm.running_mean.double() * scale
        return scale, shift if norm.bias is None else shift + norm.bias.double()


def _convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d, str | None]]:
    """Each convolution's name, itself, and the name of the batch norm that follows; None for the classifier."""
    modules = list(model.named_modules())
    for (name, module), (next_name, following) in zip(modules, [*modules[1:], ("", model)], strict=True):
        if isinstance(module, nn.Conv2d):
            yield name, module, next_name if isinstance(following, _BatchNorm) else None


def _fold(
    conv: nn.Conv2d, scale: Tensor, shift: Tensor, dtype: torch.dtype, keeps_scale: bool = True
) -> tuple[Tensor, FoldedBatchNorm]:
    """The convolution's weight with the scale in it, in ``dtype``, and the rest.

    Weights outside fp16's range, of variances near 0 or tiny gammas, keep a power of two as their channel's scale.
    """
    weight = conv.weight.double() * scale[:, None, None, None]
    rest = None
    if dtype == torch.float16 and keeps_scale:
        largest = weight.abs().amax((1, 2, 3))
        if bool(((largest > 0) & ((largest < FP16_SAFE[0]) | (largest > FP16_SAFE[1]))).any()):
            rest = torch.exp2(torch.where(largest > 0, largest, 1).log2().floor())
            weight = weight / rest[:, None, None, None]
            rest = rest.float()
    weight = weight.to(dtype, memory_format=torch.channels_last)
    return weight, FoldedBatchNorm(shift.float(), rest)


def _is_of_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.")


def _settings(pool: Any) -> tuple[Any, ...]:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "output_size")
    return (type(pool), *(getattr(pool, name, None) for name in names))
