"""What ``bench`` measures: a network, the ways to run it, and how right a mask must be."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeeplab.accelerate import accelerate
from fastdeeplab.backbone import LAYERS
from fastdeeplab.kernels import library
from fastdeeplab.kernels.choice import DTYPES
from fastdeeplab.kernels.measure import WrongResultError, cudnn_benchmark
from fastdeeplab.model import ATROUS_RATES, ResNetModel, upsample_logits

Predict = Callable[[Tensor], Tensor]  # normalised images (B, 3, H, W) to class indices (B, H, W)

SLACK = 2  # how much further from fp64 than PyTorch's own layers a rival may be
MOST_DIFFERING = 0.25  # the share of pixels at which rounding has spoilt a mask too much to compare with it
CALIBRATION_SIZE = 129


@dataclass(frozen=True)
class Network:
    """A DeepLabV3 on a ResNet, and what it is given.

    Raises:
        ValueError: a field is not what its comment says.
    """

    depth: int = 50  # 50, 101 or 152
    output_stride: int = 8  # 8 or 16
    num_classes: int = 21  # from 2 up
    size: tuple[int, int] = (512, 512)  # height and width, from 1 up
    batch: int = 1  # from 1 up
    dtype: torch.dtype = torch.bfloat16  # float32, float16 or bfloat16

    def __post_init__(self) -> None:
        _require(self.depth in LAYERS, "depth", "50, 101 or 152", self.depth)
        _require(self.output_stride in ATROUS_RATES, "output_stride", "8 or 16", self.output_stride)
        _require(self.num_classes >= 2, "num_classes", "at least 2", self.num_classes)
        _require(len(self.size) == 2 and min(self.size) >= 1, "size", "two positive numbers", self.size)
        _require(self.batch >= 1, "batch", "at least 1", self.batch)
        _require(self.dtype in DTYPES, "dtype", "float32, float16 or bfloat16", self.dtype)

    def __str__(self) -> str:
        height, width = self.size
        return f"R{self.depth} OS{self.output_stride} {height}x{width} B{self.batch} K={self.num_classes}"

    def build(self, device: torch.device) -> ResNetModel:
        """The model in fp32 and eval mode with random weights, the same each time; every class is somewhere best."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.structure().eval().requires_grad_(False)
            _randomise_batch_norms(model)
        model = model.to(device)
        _spread_logits(model, self.images(device)[:1, :, :CALIBRATION_SIZE, :CALIBRATION_SIZE])
        return model

    def structure(self) -> ResNetModel:
        return ResNetModel(self.depth, self.num_classes, output_stride=self.output_stride, aux_head=False)

    def images(self, device: torch.device) -> Tensor:
        """(B, 3, H, W) in fp32, random, with large and small patterns; the same each time."""
        generator = torch.Generator().manual_seed(1)
        coarse = [max(length // 32, 1) for length in self.size]
        patterns = F.interpolate(torch.randn(self.batch, 3, *coarse, generator=generator), self.size, mode="bilinear")
        return (patterns + 0.5 * torch.randn(patterns.shape, generator=generator)).to(device)


def _require(condition: bool, name: str, allowed: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value}")


def _randomise_batch_norms(model: nn.Module) -> None:
    """Statistics and maps that differ from the identity; residual branches add little, so that no depth overflows."""
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            if name.endswith("bn3"):
                module.weight.mul_(0.2)


@torch.no_grad()
def _spread_logits(model: ResNetModel, images: Tensor) -> None:
    """Give each class logits of mean 0 and deviation 1, or a random classifier prefers the same class everywhere."""
    logits = layer_by_layer(model, images)
    mean, deviation = logits.mean((0, 2, 3)), logits.std((0, 2, 3), correction=0).clamp(min=1e-3)
    classifier: Any = model.classifier[4]
    classifier.weight /= deviation[:, None, None, None]
    classifier.bias.copy_((classifier.bias - mean) / deviation)


@torch.enable_grad()
def layer_by_layer(model: ResNetModel, images: Tensor) -> Tensor:
    """(B, K, h, w) logits by PyTorch's layers, one by one, as a model whose parameters need no gradient runs them."""
    return model(images, upsample=False)["out"]


# The comparison


class Oracle:
    """The network's logits in fp64, and the worst that a mask may be in each dtype.

    A pixel's shortfall is how far its class is below the best one, in logits of fp64. PyTorch's own layers in the same
    dtype set the limits: if their logits are off by ``e`` at most, the shortfall may be ``SLACK * 2 * e`` and the
    rounding of the upsampled logits, and ``SLACK`` times as many pixels may differ from fp64 as theirs do, and 0.1 %.
    """

    def __init__(self, model: ResNetModel, images: Tensor) -> None:
        self.model, self.images = model, images
        self.size = (images.shape[2], images.shape[3])
        self.logits = self._logits(torch.float64)
        self.limits: dict[torch.dtype, tuple[float, float]] = {}

    def check(self, mask: Tensor, dtype: torch.dtype) -> float:
        """The worst shortfall of a mask, relative to the largest logit.

        Raises:
            WrongResultError: the mask is none, or worse than rounding explains.
            ValueError: PyTorch's own layers in this dtype are too far from fp64 to compare anything.
        """
        expected = (len(self.logits), *self.size)
        if tuple(mask.shape) != expected or mask.is_floating_point():
            found = f"{tuple(mask.shape)} of {mask.dtype}"
            raise WrongResultError(f"not timed: the mask is {found}, class indices {expected} are expected")
        most, most_differing = self._limits(dtype)
        shortfall, differing = self.compare(mask)
        if not shortfall <= most:
            raise WrongResultError(
                f"not timed: at a pixel its class is {shortfall:.3g} below the best, at most {most:.3g} is rounding"
            )
        if differing > most_differing:
            raise WrongResultError(
                f"not timed: {differing:.2%} of its pixels differ from fp64, at most {most_differing:.2%} is rounding"
            )
        return shortfall / float(self.logits.abs().max())

    def compare(self, mask: Tensor) -> tuple[float, float]:
        """The worst shortfall, infinite where there is no such class, and the share of pixels that differ from fp64."""
        worst = differing = 0.0
        for logits, indices in zip(self.logits, mask.long(), strict=True):  # image by image, for memory
            if int(indices.min()) < 0 or int(indices.max()) >= len(logits):
                return math.inf, 1.0
            full = upsample_logits(logits[None], self.size)[0]
            best = full.amax(0)
            below = best - full.gather(0, indices[None])[0]
            worst = max(worst, float(below.max()))
            differing += float((below > 0).sum())
        return worst, differing / mask.numel()

    def _limits(self, dtype: torch.dtype) -> tuple[float, float]:
        if dtype not in self.limits:
            rounded = self._logits(dtype)
            error = float((rounded - self.logits).abs().max())
            rounding = torch.finfo(dtype).eps * float(self.logits.abs().max())
            masks = [upsample_logits(logits[None], self.size).argmax(1) for logits in rounded]
            _, differing = self.compare(torch.cat(masks))
            if not (math.isfinite(error) and differing <= MOST_DIFFERING):
                raise ValueError(
                    f"{short_name(dtype)} rounds this network too much: {differing:.0%} of its pixels differ"
                )
            self.limits[dtype] = (SLACK * 2 * error + rounding, SLACK * differing + 0.001)
        return self.limits[dtype]

    def _logits(self, dtype: torch.dtype) -> Tensor:
        model = copy.deepcopy(self.model).to(dtype)
        return torch.cat([layer_by_layer(model, image[None].to(dtype)).double() for image in self.images])


# The rivals


@dataclass(frozen=True)
class Rival:
    name: str
    dtype: torch.dtype
    build: Callable[[ResNetModel, Tensor], Predict]  # of the model in fp32 and images as they will come
    memory_format: torch.memory_format = torch.channels_last  # of the images
    ours: bool = False
    graphs: bool = False  # replays a CUDA graph, whose memory is set aside before the call

    def images(self, images: Tensor) -> Tensor:
        return images.to(self.dtype, memory_format=self.memory_format)


def rivals_of(network: Network, device: torch.device, *, quick: bool = False) -> list[Rival]:
    """fastdeeplab and what it is compared with, the simplest first.

    The others are torchvision's DeepLabV3 or, where that can't be imported, PyTorch's layers as ``ResNetModel`` runs
    them one by one: in fp32 as it comes (TF32 on), in the network's dtype and channels_last memory, and compiled, with
    upsampling and argmax inside. On a GPU there are also the network of cuDNN's fused convolutions, compilation with
    ``max-autotune`` and, of one image, ``reduce-overhead``. ``quick`` leaves out these two, on a CPU any compilation.
    """
    peer = "torchvision" if torchvision_obstacle() is None else "layers"
    dtype, on_gpu = network.dtype, device.type == "cuda"
    rivals = [
        Rival(f"{peer}-fp32", torch.float32, _eager(torch.contiguous_format), torch.contiguous_format),
        Rival(f"{peer}-channels_last", dtype, _eager(torch.channels_last)),
    ]
    if on_gpu or not quick:
        rivals.append(Rival(f"{peer}-compile", dtype, _compiled("default")))
    if on_gpu and not quick:
        rivals.append(Rival(f"{peer}-max-autotune", dtype, _compiled("max-autotune", freezing=True), graphs=True))
        if network.batch == 1:
            rivals.append(Rival(f"{peer}-reduce-overhead", dtype, _compiled("reduce-overhead"), graphs=True))
    if on_gpu:
        rivals.append(Rival("cudnn-fused", dtype, _cudnn_fused))
    rivals.append(Rival("ResNetModel", dtype, _live, ours=True))
    if on_gpu:  # on a CPU it is fastdeeplab itself
        rivals.append(Rival("fastdeeplab-torch", dtype, _accelerated("torch")))
    rivals.append(Rival("fastdeeplab", dtype, _accelerated("auto"), ours=True))
    if on_gpu and network.batch == 1:
        rivals.append(Rival("fastdeeplab-graphs", dtype, _captured, ours=True, graphs=True))
    return rivals


@contextmanager
def measuring_on(device: torch.device) -> Iterator[None]:
    """On a GPU, for every rival: cuDNN's best algorithms, in TF32 where the numbers are fp32."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    convolutions = cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "tf32"
    try:
        with torch.cuda.device(device), cudnn_benchmark():
            yield
    finally:
        convolutions.fp32_precision = before


def torchvision_obstacle() -> str | None:
    """Why torchvision can't be imported; None if it can."""
    try:
        import torchvision  # type: ignore[import-untyped]  # noqa: F401
    except (ImportError, RuntimeError) as error:  # the latter where it was built for another torch
        return one_line(error)
    return None


def torchvision_network(model: ResNetModel) -> nn.Module:
    """torchvision's DeepLabV3 with the model's own weights, without an auxiliary head.

    Raises:
        ValueError: torchvision has no such structure.
    """
    from torchvision.models._utils import IntermediateLayerGetter  # type: ignore[import-untyped]
    from torchvision.models.resnet import Bottleneck, ResNet  # type: ignore[import-untyped]
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3  # type: ignore[import-untyped]

    config = model.config
    if (config["width"], config["multi_grid"], config["first_block_dilation"]) != (1.0, None, "previous"):
        raise ValueError("torchvision has neither another width nor a multi-grid nor another first dilation")
    stride = config["output_stride"]
    with torch.device("meta"):
        resnet = ResNet(
            Bottleneck,
            config["layers"] or list(LAYERS[config["depth"]]),
            replace_stride_with_dilation=[False, stride == 8, True],
        )
        backbone = IntermediateLayerGetter(resnet, {"layer4": "out"})
        rates = config["atrous_rates"] or ATROUS_RATES[stride]
        head = DeepLabHead(model.backbone.out_channels[3], config["num_classes"], rates)
        network = DeepLabV3(backbone, head)
    network.load_state_dict(model.state_dict(), assign=True)
    return network.eval().requires_grad_(False)


def _peer(model: ResNetModel) -> Callable[[Tensor], Tensor]:
    """Images to full-size logits."""
    if torchvision_obstacle() is not None:
        return lambda images: upsample_logits(layer_by_layer(model, images), images.shape[-2:])
    network = torchvision_network(model)
    return lambda images: network(images)["out"]


def _eager(memory_format: torch.memory_format) -> Callable[[ResNetModel, Tensor], Predict]:
    def build(model: ResNetModel, images: Tensor) -> Predict:
        to_logits = _peer(copy.deepcopy(model).to(images.dtype).to(memory_format=memory_format))  # type: ignore[call-overload]

        @torch.no_grad()
        def predict(images: Tensor) -> Tensor:
            return to_logits(images).argmax(1)

        return predict

    return build


def _compiled(mode: str, *, freezing: bool = False) -> Callable[[ResNetModel, Tensor], Predict]:
    """``freezing`` lets the compiler fold the weights and lay them out anew; it is asked for while it traces."""

    def build(model: ResNetModel, images: Tensor) -> Predict:
        from torch._inductor import config

        torch.compiler.reset()  # or it gives up after a few networks, silently
        to_logits = _peer(copy.deepcopy(model).to(images.dtype))

        def to_mask(images: Tensor) -> Tensor:
            return to_logits(images).argmax(1)

        predict = torch.no_grad()(torch.compile(to_mask, mode=mode, fullgraph=True, dynamic=False))
        with config.patch(freezing=freezing):
            predict(images)
        return predict

    return build


def _cudnn_fused(model: ResNetModel, images: Tensor) -> Predict:
    """Folded batch norms; each convolution one call of cuDNN with its shift, residual and ReLU; all else PyTorch's."""
    fast: Any = accelerate(model, dtype=images.dtype)
    classes = fast.config["num_classes"]

    def fused(conv: Any, norm: Any, x: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        stride, padding, dilation = conv.stride[0], conv.padding[0], conv.dilation[0]
        y: Tensor = library.cudnn_relu(x, conv.weight, *norm.affine(), residual, stride, padding, dilation, relu)
        return y

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        backbone, (aspp, head_conv, head_norm, _, classifier) = fast.backbone, fast.classifier
        x = backbone.maxpool(fused(backbone.conv1, backbone.bn1, images))
        for block in (*backbone.layer1, *backbone.layer2, *backbone.layer3, *backbone.layer4):
            residual, projection = x, block.downsample
            if projection is not None:
                residual = fused(projection[0], projection[1], x, relu=False)
            y = fused(block.conv1, block.bn1, x)
            y = fused(block.conv2, block.bn2, y)
            x = fused(block.conv3, block.bn3, y, residual)
        *atrous, (pool, pool_conv, pool_norm, _) = aspp.convs
        branches = [fused(conv, norm, x) for conv, norm, _ in atrous]
        pooled = fused(pool_conv, pool_norm, pool(x)).expand_as(branches[0])
        x = fused(aspp.project[0], aspp.project[1], torch.cat([*branches, pooled], dim=1))
        logits = classifier(fused(head_conv, head_norm, x))[:, :classes]
        return upsample_logits(logits, images.shape[-2:]).argmax(1)

    return predict


def _live(model: ResNetModel, images: Tensor) -> Predict:
    return copy.deepcopy(model).to(images.dtype).predict


def _accelerated(choice: str) -> Callable[[ResNetModel, Tensor], Predict]:
    def build(model: ResNetModel, images: Tensor) -> Predict:
        return accelerate(model, kernels=choice, dtype=images.dtype).predict

    return build


def _captured(model: ResNetModel, images: Tensor) -> Predict:
    fast = accelerate(model, dtype=images.dtype)
    fast.capture([images.shape])
    return fast.predict


def one_line(error: Exception) -> str:
    """What kind of error, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
