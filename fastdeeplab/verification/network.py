"""A whole network with random weights: its logits and its mask."""

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdeeplab.accelerate import AcceleratedModel, accelerate
from fastdeeplab.kernels.choice import DTYPES, convolution_precision
from fastdeeplab.kernels.measure import relative_error
from fastdeeplab.model import ResNetModel, upsample_logits
from fastdeeplab.speed.rivals import layer_by_layer
from fastdeeplab.verification.subjects import (
    Subject,
    Trial,
    convolution_dtype,
    implementations,
    interpolation_rounding,
    shape_text,
    why_no_kernels,
)

# Of the logits: in full fp32, rounding errors of 53 convolutions in a row. In fp16 and bf16, PyTorch's own layers tell
# what they amount to; ours round less often, and the factor leaves room for chance. In TF32 tensor cores may cut values
# off, by which a product loses up to 2^-10 on average, and each convolution again.
NETWORK_LIMIT, NETWORK_FACTOR, TF32_LIMIT = 1e-4, 2.0, 53 * 2**-10


def network_subjects(device: torch.device, quick: bool) -> Iterator[Subject]:
    config: dict[str, Any] = {"depth": 50}
    shape: Sequence[int] = (1, 3, 513, 513)
    name = "ResNet-50"
    if device.type == "cpu":
        interpreted = why_no_kernels(device, torch.float32) is None
        config = {"width": 0.125, "layers": (1, 1, 1, 1)} if interpreted else {"width": 0.25, "layers": (2, 2, 2, 2)}
        shape = (1, 3, 33, 41) if interpreted else (2, 3, 97, 113)
        name = f"{sum(config['layers'])} blocks, width {config['width']}"
    for dtype in (torch.float16,) if quick else DTYPES:
        for part in ("logits", "mask"):
            trials = partial(_network_trials, part, config, shape, dtype, device)
            yield Subject("network", f"{part}, {name}, {shape_text(shape)}", convolution_dtype(dtype, device), trials)


def _network_trials(
    part: str, config: dict[str, Any], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[Trial]:
    model = _random_network(config).to(device)
    images = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(1))
    expected = _logits(model, images, torch.float64)
    if part == "mask":
        limit = 0.0  # pixels
    elif dtype == torch.float32:
        limit = TF32_LIMIT if convolution_precision(device) == "tf32" else NETWORK_LIMIT
    else:
        limit = NETWORK_FACTOR * relative_error(_logits(model, images, dtype), expected)

    def error(fast: AcceleratedModel) -> float:
        logits = fast(images, upsample=False)["out"]
        return relative_error(logits, expected) if part == "logits" else wrong_pixels(fast, images, logits, expected)

    return [
        Trial(impl, "", limit, partial(error, accelerate(model, kernels=impl, dtype=dtype)))
        for impl in (*implementations(device, dtype), "auto")
    ]


def wrong_pixels(fast: AcceleratedModel, images: Tensor, logits: Tensor, expected: Tensor) -> int:
    """How many pixels of the predicted mask differ from the mask of fp64, near-ties left out.

    A near-tie is a pixel whose two best logits lie so close that the logits' largest error, and the rounding of their
    interpolation, can swap them.

    Args:
        images: (B, C, H, W).
        logits: (B, K, h, w) of the model.
        expected: the same in fp64.
    """
    rounding = interpolation_rounding(expected.shape) * float(expected.abs().max())
    bound = 2 * (float((logits - expected).abs().max()) + rounding)
    full = upsample_logits(expected, images.shape[-2:])
    best = full.topk(2, dim=1).values
    differs = fast.predict(images) != full.argmax(1)
    return int((differs & ~(best[:, 0] - best[:, 1] < bound)).sum())


def _random_network(config: dict[str, Any]) -> ResNetModel:
    """With batch norms that differ from the identity, as those of a trained network do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNetModel(aux_head=False, **config)
        norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            for values in (norm.running_mean, norm.bias):
                nn.init.uniform_(values, -0.2, 0.2)
            for values in (norm.running_var, norm.weight):
                nn.init.uniform_(values, 0.5, 1.5)
    return model.eval()


def _logits(model: ResNetModel, images: Tensor, dtype: torch.dtype) -> Tensor:
    """By PyTorch's own layers."""
    return layer_by_layer(copy.deepcopy(model).to(dtype).requires_grad_(False), images.to(dtype))
