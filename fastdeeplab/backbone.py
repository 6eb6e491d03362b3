"""Dilated ResNet-50/101/152, the encoder of DeepLabV3.

He et al., "Deep Residual Learning for Image Recognition" (2016), in the variant of torchvision: the stride of a
downsampling block is on its 3x3 convolution. Stages that would take the map below the output stride trade their
stride for dilation (Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017).
Parameter names are torchvision's.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from fastdeeplab.fusion import NORMS, Affine, conv_bn_relu, is_chain
from fastdeeplab.kernels.choice import why_not_kernel_size

EXPANSION = 4  # output channels of a bottleneck over the channels of its 3x3 convolution
LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def scale_channels(channels: int, width: float) -> int:
    """``channels * width``, rounded to a multiple of 8, at least 8."""
    return max(8, round(channels * width / 8) * 8)


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3 (stride or dilation here), 1x1 expand, added to the identity or its projection.

    ``(N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))``. With ``affine``, the batch
    norms' scales and shifts, each convolution is one call of ``fastdeeplab.kernels.conv_bn_relu``.
    """

    kernel_function = "conv_bn_relu"

    def __init__(
        self, in_channels: int, channels: int, out_channels: int, stride: int, dilation: int, kernel: str = "auto"
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor, affine: Affine | None = None) -> Tensor:
        if affine is not None and is_chain(self.downsample, nn.Conv2d, NORMS):
            return self._fused(x, affine)
        residual = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + residual)

    def _fused(self, x: Tensor, affine: Affine) -> Tensor:
        residual = x
        if self.downsample is not None:
            conv, norm = self.downsample
            residual = conv_bn_relu(conv, norm, x, affine, relu=False, kernel=self.kernel)
        y = conv_bn_relu(self.conv1, self.bn1, x, affine, kernel=self.kernel)
        y = conv_bn_relu(self.conv2, self.bn2, y, affine, kernel=self.kernel)
        return conv_bn_relu(self.conv3, self.bn3, y, affine, residual, kernel=self.kernel)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}"


class Stage(nn.Sequential):
    """Bottlenecks one after the other."""

    def forward(self, x: Tensor, affine: Affine | None = None) -> Tensor:
        for block in self:
            x = block(x, affine)
        return x


class ResNet(nn.Module):
    """The encoder: ``(N, in_channels, H, W)`` images to the maps of layer3 (C4) and layer4 (C5).

    At output stride 16 layer4 keeps its map and dilates by 2; at 8 layer3 dilates by 2 and layer4 by 4. The first
    block of a dilated stage uses the stage before's dilation with ``first_block_dilation="previous"`` (torchvision)
    and its own with ``"full"`` (segmentation_models_pytorch, Detectron2). ``multi_grid`` multiplies the dilations of
    layer4's blocks.

    The stem, 7x7 convolution and max-pool, has no kernel: where ``kernel="triton"`` is asked for, the blocks have that
    flag, and the encoder itself, whose flag is the stem's, has ``"auto"``.
    """

    kernel_function = "conv_bn_relu"

    def __init__(
        self,
        layers: Sequence[int],
        *,
        output_stride: int,
        multi_grid: Sequence[int] | None = None,
        first_block_dilation: str = "previous",
        in_channels: int = 3,
        width: float = 1.0,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        self.kernel = "auto" if kernel == "triton" else kernel
        stem_channels = scale_channels(64, width)
        self.conv1 = nn.Conv2d(in_channels, stem_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        self.out_channels = [scale_channels(EXPANSION * 64 * 2**i, width) for i in range(4)]
        stride3, dilation3, dilation4 = (2, 1, 2) if output_stride == 16 else (1, 2, 4)

        def stage(index: int, stride: int, dilations: Sequence[int]) -> Stage:
            channels, out_channels = scale_channels(64 * 2**index, width), self.out_channels[index]
            in_channels = stem_channels if index == 0 else self.out_channels[index - 1]
            return Stage(
                *(
                    Bottleneck(
                        out_channels if block else in_channels,
                        channels,
                        out_channels,
                        1 if block else stride,
                        dilation,
                        kernel,
                    )
                    for block, dilation in enumerate(dilations)
                )
            )

        def dilations(index: int, previous: int, rate: int) -> list[int]:
            first = previous if first_block_dilation == "previous" else rate
            return [first] + [rate] * (layers[index] - 1)

        grid = multi_grid or [1] * layers[3]
        self.layer1 = stage(0, 1, dilations(0, 1, 1))
        self.layer2 = stage(1, 2, dilations(1, 1, 1))
        self.layer3 = stage(2, stride3, dilations(2, 1, dilation3))
        self.layer4 = stage(3, 1, [d * g for d, g in zip(dilations(3, dilation3, dilation4), grid, strict=True)])

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor, affine: Affine | None = None) -> tuple[Tensor, Tensor]:
        """Return ``(c4, c5)``: ``(N, 1024, h, w)`` and ``(N, 2048, h, w)`` at width 1."""
        if affine is None:
            x = self.relu(self.bn1(self.conv1(images)))
        else:
            x = conv_bn_relu(self.conv1, self.bn1, images, affine, kernel=self.kernel)
        c4 = self.layer3(self.layer2(self.layer1(self.maxpool(x), affine), affine), affine)
        return c4, self.layer4(c4, affine)

    @property
    def kernel_obstacle(self) -> str | None:
        """Why no kernel can run the stem, on any device; None if one can."""
        height, width = self.conv1.kernel_size
        if why_not_kernel_size((height, width)) is None:
            return None
        return f"the stem's {height}x{width} convolution is PyTorch's, the kernels are for 1x1 and 3x3"

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}"
