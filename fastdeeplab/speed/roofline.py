"""Floors: what the bytes and the arithmetic of an operation, or of a whole network, take at least on a known GPU.

The largest of bytes / bandwidth, tensor-core operations / their rate, instructions / (lanes x clock) and exponentials /
(special-function lanes x clock). A network's floor is the sum over its passes over memory, so it is that of a plan: of
what is fused with what.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fastdeeplab.model import ResNetModel


@dataclass(frozen=True)
class GPU:
    bandwidth: float  # bytes per second that a copy reaches
    tensor_flops: float  # operations per second that a bf16 matrix product of random numbers reaches
    multiprocessors: int
    clock: float  # Hz, under load

    @property
    def instructions(self) -> float:
        """Per second and lane: 128 lanes a multiprocessor."""
        return 128 * self.multiprocessors * self.clock

    @property
    def exponentials(self) -> float:
        """Per second: 16 lanes a multiprocessor."""
        return 16 * self.multiprocessors * self.clock


# By a part of the name that the driver gives. The rates were measured with PyTorch; the clock is one under load.
GPUS = {"H200": GPU(bandwidth=4.3e12, tensor_flops=790e12, multiprocessors=132, clock=1.75e9)}

# What the arithmetic needs at least per output pixel and class, in issue slots of full-rate instructions, where every
# class is interpolated at every pixel in fp32: v = a + fx * b, one FFMA, as a and b serve a cell's whole row of pixels.
# What is per cell, row or pixel alone counts as nothing. A method that skips classes is not bound by these counts.
#
# Argmax: the FFMA and, on another pipe, one FMNMX or FSETP, which at half rate takes two slots. That finds the maximum;
# its index need not be followed class by class: kept per group of classes, it can be looked for in the best group.
ARGMAX_INSTRUCTIONS = 2
# Cross-entropy, forward: the FFMA, the exponential, its addition to the pixel's sum. The shift against overflow can be
# the cell's, in a. Backward: the FFMA, the exponential again, an FFMA into each of the row's two sums, that of the
# probabilities and that of fx times them, with factors of the pixel's. The target's share is the pixel's.
CROSS_ENTROPY_INSTRUCTIONS = 3 + 4
# On the special-function unit, one forward and one backward. They bind: at an eighth of the rate they take 16 slots. A
# method that takes a row's exponentials for the geometric sequence that they are, or stores them, is not bound by them.
CROSS_ENTROPY_EXPONENTIALS = 2


@dataclass(frozen=True)
class Work:
    bytes: int
    flop: float = 0  # on tensor cores; one in FP8 counts as half of one in bf16
    instructions: int = 0
    exponentials: int = 0

    def milliseconds(self, gpu: GPU) -> dict[str, float]:
        return {
            "bytes": 1000 * self.bytes / gpu.bandwidth,
            "flop": 1000 * self.flop / gpu.tensor_flops,
            "instructions": 1000 * self.instructions / gpu.instructions,
            "exponentials": 1000 * self.exponentials / gpu.exponentials,
        }

    def floor(self, gpu: GPU) -> float:
        """In milliseconds."""
        return max(self.milliseconds(gpu).values())


def known_gpu(name: str) -> GPU | None:
    return next((gpu for part, gpu in GPUS.items() if part in name), None)


def argmax_work(
    batch: int, classes: int, size_in: tuple[int, int], size_out: tuple[int, int], logit_bytes: int, index_bytes: int
) -> Work:
    """Reads the low-resolution logits once, writes one index per pixel."""
    low, full = batch * size_in[0] * size_in[1], batch * size_out[0] * size_out[1]
    return Work(
        bytes=low * classes * logit_bytes + full * index_bytes,
        instructions=full * classes * ARGMAX_INSTRUCTIONS,
    )


def cross_entropy_work(
    batch: int,
    classes: int,
    size_in: tuple[int, int],
    size_out: tuple[int, int],
    logit_bytes: int,
    target_bytes: int,
    heads: int = 1,
) -> Work:
    """Forward and backward: reads logits and targets twice, writes the gradient, writes and reads the log-sum-exp."""
    low, full = batch * size_in[0] * size_in[1], batch * size_out[0] * size_out[1]
    return Work(
        bytes=heads * (3 * low * classes * logit_bytes + full * (2 * target_bytes + 2 * 4)),
        instructions=heads * full * classes * CROSS_ENTROPY_INSTRUCTIONS,
        exponentials=heads * full * classes * CROSS_ENTROPY_EXPONENTIALS,
    )


BRANCHES, POOL, TAIL = "ASPP branches", "pool, concat, project", "upsample, argmax"
STAGES = {  # of a layer, by how its name begins
    "backbone.conv1": "stem",
    **{f"backbone.layer{i}": f"layer{i}" for i in (1, 2, 3, 4)},
    "classifier.0.convs.4": POOL,
    "classifier.0.convs": BRANCHES,
    "classifier.0.project": POOL,
    "classifier": "head",
}


@dataclass(frozen=True)
class Layer:
    """A convolution, padded so that stride 1 keeps the map's size, and what follows it before the next one."""

    name: str  # its module's; the first one's if several of a stage are the same
    count: int  # how many are the same; all that follows is of one
    N: int
    C_in: int
    H: int  # of the input, as W is
    W: int
    C_out: int
    kernel: int
    stride: int
    dilation: int
    residual: bool
    relu: bool

    @property
    def stage(self) -> str:
        return next(stage for prefix, stage in STAGES.items() if self.name.startswith(prefix))

    @property
    def size_out(self) -> tuple[int, int]:
        return -(-self.H // self.stride), -(-self.W // self.stride)

    @property
    def input_values(self) -> int:
        """Those that are read: a 1x1 convolution with a stride passes over the others."""
        return self.N * self.C_in * math.prod(self.size_out if self.kernel == 1 else (self.H, self.W))

    @property
    def weights(self) -> int:
        return self.C_out * self.C_in * self.kernel**2

    @property
    def output_values(self) -> int:
        return self.N * self.C_out * math.prod(self.size_out)

    @property
    def macs(self) -> int:
        return self.output_values * self.C_in * self.kernel**2

    @property
    def live_macs(self) -> int:
        """Without those that multiply padding."""
        return self.N * self.C_out * self.C_in * self._live_taps(self.H) * self._live_taps(self.W)

    def _live_taps(self, size: int) -> int:
        """Along one axis, the pairs of an output position and a tap that reads inside."""
        offsets = [self.dilation * (tap - self.kernel // 2) for tap in range(self.kernel)]
        return sum(0 <= position + offset < size for position in range(0, size, self.stride) for offset in offsets)

    def bytes(self, dtype: torch.dtype) -> int:
        """Of input, weights, residual and output, each read or written once."""
        return dtype.itemsize * (self.input_values + self.weights + (1 + self.residual) * self.output_values)


def conv_layers(
    depth: int, output_stride: int, size: tuple[int, int], batch: int, num_classes: int = 21
) -> list[Layer]:
    """Each stage's distinct convolutions in a ``ResNetModel`` in eval mode, in the order in which they first run."""
    with torch.device("meta"):
        model = ResNetModel(depth, num_classes, output_stride=output_stride, aux_head=False).eval()
        images = torch.empty(batch, 3, *size)
    names = {module: name for name, module in model.named_modules()}
    found: list[Layer] = []

    def note_conv(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        N, C_in, H, W = inputs[0].shape
        layer = Layer(
            name=names[conv],
            count=1,
            N=N,
            C_in=C_in,
            H=H,
            W=W,
            C_out=conv.out_channels,
            kernel=conv.kernel_size[0],
            stride=conv.stride[0],
            dilation=conv.dilation[0],
            residual=names[conv].endswith(".conv3"),
            relu=False,
        )
        assert output.shape == (layer.N, layer.C_out, *layer.size_out)
        found.append(layer)

    def note_relu(*_: object) -> None:
        found[-1] = replace(found[-1], relu=True)

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note_conv)
        elif isinstance(module, nn.ReLU):
            module.register_forward_hook(note_relu)
    model(images, upsample=False)

    distinct: dict[Layer, list[Layer]] = {}
    for layer in found:
        distinct.setdefault(replace(layer, name=layer.stage), []).append(layer)
    return [replace(same[0], count=len(same)) for same in distinct.values()]


@dataclass(frozen=True)
class Plan:
    """Which operations of a network share a pass over memory."""

    name: str
    # Batch norm, addition and ReLU: a pass each, one pass for the three, or part of the convolution's.
    epilogue: Literal["apart", "together", "inside"] = "inside"
    # ASPP without concatenation, its pooled branch as a bias; upsampling and argmax in one pass that writes uint8.
    ours: bool = False
    # The fusions that no kernel is planned for yet: stem and max-pool in one pass, the average pool summed in layer4's
    # last epilogue, the head's 3x3 and 1x1 in one pass.
    whole: bool = False
    skip: bool = False  # ASPP computes nothing on padding, counted pixel by pixel
    fp8: bool = False  # all but the images, the stem, the classifier's weights and the logits


PLANS = (
    Plan("eager", "apart"),
    Plan("Inductor", "together"),
    Plan("TensorRT-like"),
    Plan("planned", ours=True),
    Plan("planned + tap skip", ours=True, skip=True),
    Plan("fused", ours=True, whole=True),
    Plan("fused + tap skip", ours=True, whole=True, skip=True),
    Plan("fused + tap skip + FP8", ours=True, whole=True, skip=True, fp8=True),
)


def passes(plan: Plan, layers: Sequence[Layer]) -> Iterator[tuple[str, Work]]:
    """Every pass over memory from images to mask, with its stage; those that only bytes bind may come as one."""
    dtype, speed = (torch.float8_e4m3fn, 2) if plan.fp8 else (torch.bfloat16, 1)
    size = dtype.itemsize
    named = {layer.name: layer for layer in layers}
    stem, block = named["backbone.conv1"], named["backbone.layer1.0.conv1"]
    branch, project, head, classifier = (named[f"classifier.{n}"] for n in ("0.convs.0.0", "0.project.0", "1", "4"))

    if plan.whole:
        yield "stem", Work(2 * (stem.input_values + stem.weights) + size * block.input_values, 2 * stem.macs)
        logit_bytes = 2 * (classifier.weights + classifier.output_values)
        head_bytes = size * (head.input_values + head.weights) + logit_bytes
        yield "head", Work(head_bytes, 2 * (head.macs + classifier.macs) / speed)
    else:
        yield "stem", Work(size * (stem.output_values + block.input_values))  # max-pool
        yield POOL, Work(size * branch.input_values)  # average pool

    for layer in layers:
        if plan.whole and layer in (stem, head, classifier):
            continue
        if plan.ours and layer is project:
            layer = replace(project, C_in=project.C_in - branch.C_out)
        macs = layer.live_macs if plan.skip and layer.stage == BRANCHES else layer.macs
        alone = layer if plan.epilogue == "inside" else replace(layer, residual=False)
        yield layer.stage, Work(layer.count * alone.bytes(dtype), layer.count * 2 * macs / speed)
        # What follows reads and writes so many maps. The classifier's bias is a pass of eager mode's, as batch norm is;
        # the batch norm of a downsampling convolution runs in the pass that adds it.
        apart, together = 2 + 3 * layer.residual + 2 * layer.relu, (2 + layer.residual) * layer.relu
        maps = {"apart": apart, "together": together, "inside": 0}[plan.epilogue]
        yield layer.stage, Work(layer.count * maps * size * layer.output_values)

    low, full = classifier.size_out, (stem.H, stem.W)
    if plan.ours:
        yield TAIL, argmax_work(stem.N, classifier.C_out, low, full, logit_bytes=2, index_bytes=1)
    else:
        # The pooled branch is spread over the map; eager mode then reads and writes all five.
        yield POOL, Work((11 if plan.epilogue == "apart" else 1) * size * branch.output_values)
        pixels = stem.N * math.prod(full)
        yield TAIL, Work(2 * (classifier.output_values + pixels * classifier.C_out))
        yield TAIL, Work(2 * pixels * classifier.C_out + 8 * pixels)


def network_floor(plan: Plan, layers: Sequence[Layer], gpu: GPU) -> dict[str, float]:
    """Milliseconds of each stage."""
    stages = dict.fromkeys(("stem", "layer1", "layer2", "layer3", "layer4", BRANCHES, POOL, "head", TAIL), 0.0)
    for stage, work in passes(plan, layers):
        stages[stage] += work.floor(gpu)
    return stages
