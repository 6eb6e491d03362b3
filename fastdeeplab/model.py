"""DeepLabV3 on a dilated ResNet: backbone, ASPP head, auxiliary head for training, bilinear upsampling.

Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation" (2017), with the layout, parameter names
and semantics of ``torchvision.models.segmentation``, so that its published weights load and give the same masks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeeplab.backbone import LAYERS, ResNet, scale_channels
from fastdeeplab.fusion import affine_of_batch_norms
from fastdeeplab.head import AuxHead, DeepLabHead, UpsampleArgmax
from fastdeeplab.kernels.checks import check_impl, check_index_dtype

ATROUS_RATES = {8: (12, 24, 36), 16: (6, 12, 18)}
FIRST_BLOCK_DILATIONS = ("previous", "full")
PUBLISHED_WEIGHTS = ("torchvision", "imagenet")
MAX_WIDTH, MAX_COUNT = 64, 2**20  # far above any use, and below where sizes overflow


@dataclass(frozen=True)
class Kernels:
    """Which implementation each kind of module runs: ``"auto"``, ``"triton"`` or ``"torch"``.

    ``"auto"`` is the Triton kernel where it can run and is measured or predicted to be faster, PyTorch elsewhere;
    ``fastdeeplab.explain`` says which and why. ``"triton"`` raises where the kernel can't run, but for the 7x7
    convolution of the stem and the pooled branch of ASPP, which are always PyTorch's: the stem's flag is ``"auto"``
    then. ``upsample_cross_entropy`` is for the loss, which is no part of the model:
    ``SegmentationLoss(kernel=model.kernels.upsample_cross_entropy)``.

    Raises:
        ValueError: a value is not one of those.
    """

    conv_bn_relu: str = "auto"
    aspp: str = "auto"
    upsample_argmax: str = "auto"
    upsample_cross_entropy: str = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            check_impl(getattr(self, field.name), field.name)


class ResNetModel(nn.Module):
    """DeepLabV3 with a ResNet-50, -101 or -152 encoder.

    In training mode the model returns ``{"out": ..., "aux": ...}``, in eval mode ``{"out": ...}``: the auxiliary head
    runs in training only. Parameter names are those of ``torchvision.models.segmentation.deeplabv3_resnet50``.

    Args:
        depth: 50, 101 or 152.
        num_classes: K, the number of classes.
        output_stride: input size over the size of the encoder's last map, 8 or 16.
        aux_head: whether to have the auxiliary head on layer3.
        atrous_rates: dilations of ASPP's three 3x3 branches; by default (12, 24, 36) at output stride 8 and
            (6, 12, 18) at 16.
        multi_grid: factors on the dilations of layer4's blocks, one per block, such as (1, 2, 4).
        first_block_dilation: dilation of the first block of a dilated stage: ``"previous"``, that of the stage before
            (torchvision), or ``"full"``, that of its own stage (segmentation_models_pytorch, Detectron2). The
            parameters have the same names, the masks differ: take what the weights were trained with.
        in_channels: channels of the images.
        dropout: probability of the dropout in both heads. torchvision has 0.5 in ASPP and 0.1 in the auxiliary head.
        width: factor on every channel count, each rounded to a multiple of 8, at least 8.
        layers: numbers of blocks of the four stages; by default those of ``depth``.
        weights: ``"torchvision"`` downloads the weights published by torchvision (COCO images, VOC labels),
            ``"imagenet"`` the backbone's; a path names a checkpoint. ``None``: random.
        kernels: which implementation the modules run, in eval mode without gradients: ``"auto"``, ``"triton"`` or
            ``"torch"`` for all, or a ``Kernels``. With gradients, and in training, they are PyTorch's own layers.

    Raises:
        ValueError: an argument is not one of those above.
        CheckpointError: the weights can't be had or do not fit.
    """

    def __init__(
        self,
        depth: int = 50,
        num_classes: int = 21,
        *,
        output_stride: int = 8,
        aux_head: bool = True,
        atrous_rates: Sequence[int] | None = None,
        multi_grid: Sequence[int] | None = None,
        first_block_dilation: str = "previous",
        in_channels: int = 3,
        dropout: float = 0.1,
        width: float = 1.0,
        layers: Sequence[int] | None = None,
        weights: str | Path | None = None,
        kernels: str | Kernels = "auto",
    ) -> None:
        super().__init__()
        _require(_is_count(depth) and depth in LAYERS, "depth", "50, 101 or 152", depth)
        _require(_is_count(num_classes), "num_classes", "a positive integer", num_classes)
        _require(_is_count(output_stride) and output_stride in ATROUS_RATES, "output_stride", "8 or 16", output_stride)
        _require(isinstance(aux_head, bool), "aux_head", "True or False", aux_head)
        _require(
            atrous_rates is None or _are_counts(atrous_rates, 3), "atrous_rates", "3 positive integers", atrous_rates
        )
        _require(layers is None or _are_counts(layers, 4), "layers", "4 positive integers", layers)
        layers = None if layers is None else [int(count) for count in layers]
        blocks = tuple(layers or LAYERS[depth])
        _require(
            multi_grid is None or _are_counts(multi_grid, blocks[3]),
            "multi_grid",
            f"{blocks[3]} positive integers, one per block of layer4",
            multi_grid,
        )
        _require(
            first_block_dilation in FIRST_BLOCK_DILATIONS,
            "first_block_dilation",
            '"previous" or "full"',
            first_block_dilation,
        )
        _require(_is_count(in_channels), "in_channels", "a positive integer", in_channels)
        _require(_is_number(dropout) and 0 <= dropout < 1, "dropout", "a number in [0, 1)", dropout)
        _require(_is_number(width) and 0 < width <= MAX_WIDTH, "width", f"a positive number up to {MAX_WIDTH}", width)
        known = weights is None or weights in PUBLISHED_WEIGHTS
        known = known or (isinstance(weights, str | Path) and Path(weights).is_file())
        _require(known, "weights", '"torchvision", "imagenet", the path of a file or None', weights)
        if isinstance(kernels, str):
            check_impl(kernels, "kernels")
            kernels = Kernels(*[kernels] * 4)
        _require(isinstance(kernels, Kernels), "kernels", '"auto", "triton", "torch" or a Kernels', kernels)

        # What rebuilds the model, in values that JSON can hold.
        self.config: dict[str, Any] = {
            "depth": int(depth),
            "num_classes": int(num_classes),
            "output_stride": int(output_stride),
            "aux_head": aux_head,
            "atrous_rates": None if atrous_rates is None else [int(rate) for rate in atrous_rates],
            "multi_grid": None if multi_grid is None else [int(factor) for factor in multi_grid],
            "first_block_dilation": first_block_dilation,
            "in_channels": int(in_channels),
            "dropout": float(dropout),
            "width": float(width),
            "layers": layers,
        }
        config = self.config
        self.backbone = ResNet(
            blocks,
            output_stride=config["output_stride"],
            multi_grid=config["multi_grid"],
            first_block_dilation=first_block_dilation,
            in_channels=config["in_channels"],
            width=width,
            kernel=kernels.conv_bn_relu,
        )
        c4_channels, c5_channels = self.backbone.out_channels[2:]
        channels, classes = scale_channels(256, width), config["num_classes"]
        rates = config["atrous_rates"] or ATROUS_RATES[output_stride]
        self.classifier = DeepLabHead(
            c5_channels, channels, classes, rates, dropout, kernels.conv_bn_relu, kernels.aspp
        )
        self.aux_classifier = AuxHead(c4_channels, channels, classes, dropout) if aux_head else None
        self.kernels = kernels
        self.upsample_argmax = UpsampleArgmax(kernels.upsample_argmax)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as the kernels read the weights

        if weights is not None:
            from fastdeeplab import checkpoint

            checkpoint.load_weights(self, weights)

    def forward(self, images: Tensor, *, upsample: bool = True) -> dict[str, Tensor]:
        """Compute the logits of every class.

        Args:
            images: (B, in_channels, H, W), normalised as the weights ask for; any H and W from 1 up.
            upsample: whether to upsample the logits to (H, W), bilinear with ``align_corners=False``.

        Returns:
            ``"out"`` and, in training with an auxiliary head, ``"aux"``: (B, K, H, W), or (B, K, h, w) before the
            upsampling, where h = ceil(H / output_stride).

        Raises:
            ValueError: ``images`` has another shape, or is not of a floating-point type.
        """
        self.check_images(images)
        affine = affine_of_batch_norms(self)
        c4, c5 = self.backbone(images, affine)
        outputs = {"out": self.classifier(c5, affine)}
        if self.training and self.aux_classifier is not None:
            outputs["aux"] = self.aux_classifier(c4)
        if upsample:
            outputs = {name: upsample_logits(logits, images.shape[-2:]) for name, logits in outputs.items()}
        return outputs

    def check_images(self, images: Tensor) -> None:
        """Raise a ValueError if the model can't take ``images``."""
        if images.ndim != 4 or images.shape[1] != self.config["in_channels"] or 0 in images.shape[2:]:
            expected = f"(B, {self.config['in_channels']}, H, W) with H and W from 1 up"
            raise ValueError(f"images must be {expected}, got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"images must be normalised floating-point numbers, got {images.dtype}")

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """``forward(images, upsample=False)``: the logits at the encoder's resolution, (B, K, h, w)."""
        return self(images, upsample=False)

    @torch.no_grad()
    def predict(self, images: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Segment images.

        Args:
            images: (B, in_channels, H, W), normalised as the weights ask for.
            dtype: of the result: int64 (the default, as of ``torch.argmax``), int32, int16 or uint8.

        Returns:
            (B, H, W) class indices. The first of equal classes wins.

        Raises:
            RuntimeError: the model is in training mode, where dropout and batch statistics would spoil the mask.
            ValueError: as ``forward``, or ``dtype`` can't hold K classes.
        """
        if self.training:
            raise RuntimeError("predict() needs the model in eval mode: call model.eval() first")
        dtype = torch.int64 if dtype is None else dtype
        check_index_dtype(dtype, self.config["num_classes"])
        return self.upsample_argmax(self.logits(images)["out"], images.shape[-2:], dtype)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``torch.nn.Module.load_state_dict``, but a state dict that does not fit changes nothing.

        Raises:
            CheckpointError: shapes or, if ``strict``, keys differ.
        """
        from fastdeeplab import checkpoint

        checkpoint.check_state_dict(self, state_dict, strict)
        state_dict = dict(state_dict)  # without torch's version, which would ask for num_batches_tracked
        return super().load_state_dict(state_dict, strict, assign)

    def save(self, path: str | Path) -> None:
        """Write weights and configuration to one safetensors file; see ``fastdeeplab.checkpoint.save``."""
        from fastdeeplab import checkpoint

        checkpoint.save(self, path)

    @staticmethod
    def load(path: str | Path, **overrides: Any) -> "ResNetModel":
        """Build the model that a checkpoint holds, in eval mode; see ``fastdeeplab.checkpoint.load``."""
        from fastdeeplab import checkpoint

        return checkpoint.load(path, **overrides)


def upsample_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """(N, K, h, w) to (N, K, *size), bilinear with ``align_corners=False``."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def _require(condition: bool, name: str, allowed: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 < int(value) <= MAX_COUNT


def _are_counts(values: object, length: int) -> bool:
    return isinstance(values, Sequence) and len(values) == length and all(_is_count(value) for value in values)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
