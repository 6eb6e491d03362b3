"""Other projects' DeepLabV3 checkpoints in torchvision's keys, with the settings that no key shows.

Two networks can have the same tensors and compute different things: the dilation of a stage's first block, for example,
leaves no trace in a state dict. So a conversion gives the renamed weights and the constructor arguments that they need.
What this network can't represent is refused with the reason, never loaded in part.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

TORCHVISION = "torchvision"
SMP = "segmentation_models_pytorch"
VAINF = "VainF DeepLabV3Plus-Pytorch"
IMAGENET = "an ImageNet ResNet"

# What each project's keys begin with, and what takes its place. smp's decoder had numbers before it had names.
KEYS = {
    SMP: {
        "encoder.": "backbone.",
        "decoder.aspp.": "classifier.0.",
        "decoder.conv.": "classifier.1.",
        "decoder.bn.": "classifier.2.",
        "decoder.0.": "classifier.0.",
        "decoder.1.": "classifier.1.",
        "decoder.2.": "classifier.2.",
        "segmentation_head.0.": "classifier.4.",
    },
    VAINF: {"backbone.": "backbone.", "classifier.classifier.": "classifier."},
    IMAGENET: {"conv1.": "backbone.conv1.", "bn1.": "backbone.bn1.", "layer": "backbone.layer"},
}

# What each project's networks need beside the weights. smp keeps these rates at both output strides, and is built with
# 8 by default; VainF's checkpoints are of output stride 16 and of torchvision's first-block rule.
SETTINGS: dict[str, dict[str, Any]] = {
    SMP: {"output_stride": 8, "atrous_rates": [12, 24, 36], "first_block_dilation": "full"},
    VAINF: {"output_stride": 16, "first_block_dilation": "previous"},
}

_OTHER_NETWORK = (
    "is another network (deep stem, biased convolutions, no 3x3 convolution after ASPP, or pooling over crops)"
)
# A pattern that only keys of this kind match, and why their network can't be represented.
UNCONVERTIBLE = {
    r"decode_head\.": "mmsegmentation's head is another network (512 channels, a 3x3 bottleneck, pooling first)",
    r"sem_seg_head\.|backbone\.(stem|res\d)\.": f"Detectron2's DeepLab {_OTHER_NETWORK}",
    r".*\._(conv|batch_norm|mean|variance)\b": f"PaddleSeg's DeepLabV3 {_OTHER_NETWORK}",
    r".*/": f"TensorFlow's DeepLab {_OTHER_NETWORK}",
    r"decoder\.(aspp\.0|block1)\.|classifier\.(project|aspp)\.": "DeepLabV3+ has a decoder that DeepLabV3 has not",
    r".*\.convs\.\d\.0\.(0|body\.0)\.weight": "it has separable convolutions in ASPP",
    r"classifier\.0\.weight": "it has an FCN head, not ASPP",
    r"classification_head\.": "it has a classification head",
    r"encoder\.model\.": "it has an encoder of timm, which dilates by a rule of its own",
    r"((backbone|encoder)\.)?(conv1|stem)\.0\.weight": "it has a deep stem, three 3x3 convolutions for one 7x7",
}
# Files that are not PyTorch's, by their suffix.
FOREIGN_FILES = {
    ".pdparams": f"PaddleSeg's DeepLabV3 {_OTHER_NETWORK}",
    ".pkl": f"Detectron2's DeepLab {_OTHER_NETWORK}",
    ".h5": f"TensorFlow's DeepLab {_OTHER_NETWORK}",
    ".index": f"TensorFlow's DeepLab {_OTHER_NETWORK}",
    ".pb": f"TensorFlow's DeepLab {_OTHER_NETWORK}",
}


class CheckpointError(RuntimeError):
    """A checkpoint that can't be had, can't be read, or does not fit the model."""


class Converted(NamedTuple):
    """Weights in torchvision's keys, the project they come from, and the constructor arguments that it fixes."""

    project: str
    state_dict: dict[str, Tensor]
    settings: dict[str, Any]


def to_torchvision(state_dict: Mapping[str, Any]) -> Converted:
    """Rename the keys of a known project to torchvision's; torchvision's own stay as they are.

    An ImageNet ResNet gives ``backbone.*`` alone, without its fully connected layer.

    Raises:
        CheckpointError: a value is not a tensor, or the network is one that ``ResNetModel`` can't represent.
    """
    require_tensors(state_dict)
    for pattern, reason in UNCONVERTIBLE.items():
        if key := next((key for key in state_dict if re.match(pattern, key)), None):
            raise CheckpointError(f"This checkpoint can't be converted: {reason} (seen by the key {key})")

    project = project_of(state_dict)
    weights = dict(state_dict)
    if project == IMAGENET:
        weights = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    if project != TORCHVISION:
        weights = {_rename(key, project): value for key, value in weights.items()}
        if "backbone.conv1.weight" not in weights or "backbone.layer1.0.conv1.weight" not in weights:
            raise CheckpointError(f"This checkpoint of {project} can't be converted: its encoder is not a plain ResNet")
    _refuse_other_blocks(weights)
    return Converted(project, weights, SETTINGS.get(project, {}))


def require_tensors(state_dict: Mapping[Any, Any]) -> None:
    """Raise CheckpointError unless every key is a string and every value a tensor with values."""
    others = [
        f"{key} ({'a tensor without values' if isinstance(value, Tensor) and value.is_meta else type(value).__name__})"
        for key, value in state_dict.items()
        if not (isinstance(key, str) and isinstance(value, Tensor) and not value.is_meta)
    ]
    if others:
        raise CheckpointError(f"A state dict holds tensors by name, but this one has {listing(others)}")


def project_of(state_dict: Mapping[str, Any]) -> str:
    """Which project a state dict comes from, by its keys; torchvision if nothing speaks for another."""
    if any(key.startswith(("encoder.", "decoder.", "segmentation_head.")) for key in state_dict):
        return SMP
    if any(key.startswith("classifier.classifier.") for key in state_dict):
        return VAINF
    if "conv1.weight" in state_dict or "layer1.0.conv1.weight" in state_dict:
        return IMAGENET
    return TORCHVISION


def listing(names: list[str], limit: int = 3) -> str:
    """The first few names and how many there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more ({len(names)} in all)" if rest > 0 else "")


def _rename(key: str, project: str) -> str:
    for old, new in KEYS[project].items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    raise CheckpointError(
        f"This checkpoint of {project} can't be converted: its {key} has no counterpart in DeepLabV3 on a ResNet"
    )


def _refuse_other_blocks(weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where the residual blocks are not ResNet's bottlenecks."""
    block = "backbone.layer1.0"
    if f"{block}.conv1.weight" in weights and f"{block}.conv3.weight" not in weights:
        raise CheckpointError(
            "This checkpoint can't be converted: its backbone has basic blocks (ResNet-18 or -34), not bottlenecks"
        )
    conv2 = weights.get(f"{block}.conv2.weight")
    if conv2 is not None and conv2.ndim == 4 and conv2.shape[0] != conv2.shape[1]:
        raise CheckpointError("This checkpoint can't be converted: its backbone has grouped convolutions (ResNeXt)")
