"""A model's weights: check, load, download and save them, and rebuild a model from its file.

Nothing is loaded in part: keys and shapes are compared before the first value is copied.
"""

import http.client
import importlib.resources
import inspect
import math
import os
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdeeplab.backbone import LAYERS, scale_channels
from fastdeeplab.convert import (
    IMAGENET,
    TORCHVISION,
    CheckpointError,
    listing,
    project_of,
    require_tensors,
    to_torchvision,
)
from fastdeeplab.model import ResNetModel
from fastdeeplab.weights_file import read_state_dict, unwrap, write_safetensors

__all__ = [
    "CheckpointError",
    "check_state_dict",
    "infer_config",
    "load",
    "load_weights",
    "packaged_checkpoint",
    "read_state_dict",
    "save",
]

# Published by torchvision: DeepLabV3_ResNet*_Weights.COCO_WITH_VOC_LABELS_V1, with 21 classes, and
# ResNet*_Weights.IMAGENET1K_V1. The end of a name is the beginning of the file's SHA-256.
PUBLISHED = {
    "torchvision": {
        50: "https://download.pytorch.org/models/deeplabv3_resnet50_coco-cd0a2569.pth",
        101: "https://download.pytorch.org/models/deeplabv3_resnet101_coco-586e9e4e.pth",
    },
    "imagenet": {
        50: "https://download.pytorch.org/models/resnet50-0676ba61.pth",
        101: "https://download.pytorch.org/models/resnet101-63fe2227.pth",
        152: "https://download.pytorch.org/models/resnet152-394f9c45.pth",
    },
}
COMPUTED = {torch.bfloat16, torch.float16, torch.float32, torch.float64}  # dtypes that convolutions run in


def check_state_dict(model: ResNetModel, state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """Compare keys and shapes with the model's; torch's older state dicts may lack ``num_batches_tracked``.

    Without ``strict`` only the shapes of what both have.

    Raises:
        CheckpointError: they differ. It names the keys and says what to do.
    """
    own = model.state_dict()
    if not strict:
        shared = own.keys() & state_dict.keys()
        own = {key: value for key, value in own.items() if key in shared}
        state_dict = {key: value for key, value in state_dict.items() if key in shared}
    _compare(own, state_dict)


def _compare(own: Mapping[str, Tensor], state_dict: Mapping[str, Any]) -> None:
    require_tensors(state_dict)
    missing = [key for key in own if key not in state_dict and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in state_dict if key not in own]
    shared = [key for key in own if key in state_dict]
    misshapen = [key for key in shared if state_dict[key].shape != own[key].shape]
    mistyped = [key for key in shared if state_dict[key].is_floating_point() != own[key].is_floating_point()]
    problems = []

    classifiers = [key for key in misshapen if key.startswith(("classifier.4.", "aux_classifier.4."))]
    classifiers = [key for key in classifiers if state_dict[key].shape[1:] == own[key].shape[1:]]
    if classifiers:
        theirs, ours = len(state_dict[classifiers[0]]), len(own[classifiers[0]])
        problems.append(
            f"the checkpoint has {theirs} classes and the model {ours} ({listing(classifiers, 4)}): build the model "
            f"with num_classes={theirs}, or keep its own classifiers with load_weights(..., skip_classifiers=True)"
        )

    aux_theirs, aux_ours = ([key for key in keys if key.startswith("aux_classifier.")] for keys in (state_dict, own))
    if aux_theirs and not aux_ours:
        unexpected = [key for key in unexpected if key not in aux_theirs]
        problems.append(
            f"only the checkpoint has an auxiliary head ({listing(aux_theirs)}): build the model with aux_head=True, "
            "or leave it out with load_weights(..., drop_aux=True)"
        )
    elif aux_ours and not aux_theirs:
        missing = [key for key in missing if key not in aux_ours]
        problems.append(
            f"only the model has an auxiliary head ({listing(aux_ours)}): build it with aux_head=False, "
            "or keep that head's own values with load_weights(..., drop_aux=True)"
        )

    differences = []
    if missing:
        differences.append(f"missing {listing(missing)}")
    if unexpected:
        differences.append(f"unexpected {listing(unexpected)}")
    if misshapen := [key for key in misshapen if key not in classifiers]:
        shapes = [f"{key} {tuple(state_dict[key].shape)}, not {tuple(own[key].shape)}" for key in misshapen]
        differences.append(f"of another shape {listing(shapes)}")
    if mistyped:
        types = [f"{key} {state_dict[key].dtype}, not {own[key].dtype}" for key in mistyped]
        differences.append(f"of another type {listing(types)}")
    if differences:
        project = project_of(state_dict)
        advice = (
            "build the model with the depth, layers, width and in_channels of the checkpoint, or ResNetModel.load(path)"
            if project == TORCHVISION
            else f"these are the keys of {project}, which load_weights(...) converts"
        )
        problems.append(f"the checkpoint is of another architecture ({'; '.join(differences)}): {advice}")

    if problems:
        raise CheckpointError("The checkpoint does not fit the model: " + ". Also, ".join(problems))


def load_weights(
    model: ResNetModel,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    skip_classifiers: bool = False,
    drop_aux: bool = False,
) -> None:
    """Load a checkpoint into a model, which keeps its dtype, device and mode.

    Args:
        model: what to load into. On an error it is as it was.
        source: ``"torchvision"``, the weights published for this depth (COCO images, VOC's 21 classes);
            ``"imagenet"``, the published backbone; the path of a checkpoint; or a state dict. Checkpoints of
            segmentation_models_pytorch and VainF's DeepLabV3 are converted. Of an ImageNet ResNet the backbone is
            loaded, and the heads keep the model's own values.
        skip_classifiers: keep the model's own values in the last layer of both heads, to train another set of classes.
        drop_aux: leave the checkpoint's auxiliary head out; the model's own, if it has one, keeps its values.

    Raises:
        CheckpointError: the checkpoint can't be had or read, does not fit, or is of a network with another
            ``first_block_dilation`` or ``multi_grid``.
        FileNotFoundError: there is no such file.
        ValueError: nothing is published for such a model.
    """
    if isinstance(source, str) and source in PUBLISHED:
        path = _download(_published_url(model, source, skip_classifiers))
        drop_aux = drop_aux or model.aux_classifier is None
        state_dict, config = read_state_dict(path)
    elif isinstance(source, Mapping):
        state_dict, config = unwrap(source), None
    else:
        state_dict, config = read_state_dict(source)

    project, weights, settings = to_torchvision(state_dict)
    for name in ("first_block_dilation", "multi_grid"):
        fixed = config or settings
        if name in fixed and fixed[name] != model.config[name]:
            raise CheckpointError(
                f"The checkpoint is of a network with {name}={fixed[name]!r}, the model has {model.config[name]!r}: "
                "the keys are the same, the masks would be wrong. Build the model with "
                f"ResNetModel(..., {name}={fixed[name]!r}), or use ResNetModel.load(path)"
            )

    kept: tuple[str, ...] = ()
    if project == IMAGENET:
        kept += ("classifier.", "aux_classifier.")
    if skip_classifiers:
        kept += ("classifier.4.", "aux_classifier.4.")
    if drop_aux:
        kept += ("aux_classifier.",)
    own = model.state_dict()
    weights = {key: value for key, value in weights.items() if not key.startswith(kept)}
    _compare({key: value for key, value in own.items() if not key.startswith(kept)}, weights)
    model.load_state_dict({**own, **weights})


def _published_url(model: ResNetModel, source: str, skip_classifiers: bool) -> str:
    config, urls = model.config, PUBLISHED[source]
    depth = config["depth"]
    if depth not in urls:
        raise ValueError(f'weights="{source}" exists for the depths {", ".join(map(str, urls))}, got depth={depth}')
    needed: dict[str, Any] = {"layers": config["layers"] and list(LAYERS[depth]), "in_channels": 3, "width": 1.0}
    if source == "torchvision":
        needed |= {"first_block_dilation": "previous", "multi_grid": None}
        if not skip_classifiers:
            needed["num_classes"] = 21
    for name, value in needed.items():
        if config[name] != value:
            advice = (
                "; for other classes build the model without weights and call "
                f'load_weights(model, "{source}", skip_classifiers=True)'
                if name == "num_classes"
                else ""
            )
            raise ValueError(f'weights="{source}" needs {name}={value!r}, got {config[name]!r}{advice}')
    return urls[depth]


def _download(url: str) -> Path:
    """The file in torch.hub's cache, downloaded and its hash checked if it is not there yet."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1])
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # no network or disk, another hash, cut off
        raise CheckpointError(
            f"{path.name} could not be downloaded from {url} ({error}). Fetch it by other means and put it at {path}, "
            "or name the file where it is: weights=FILE in Python, --weights FILE on the command line"
        ) from error
    return path


def infer_config(state_dict: Mapping[str, Tensor], *, width: float | None = None) -> dict[str, Any]:
    """The arguments of ``ResNetModel`` that tensors in torchvision's keys show.

    ``depth`` (with ``layers`` where the numbers of blocks are not those of a depth), ``num_classes``, ``aux_head``,
    ``in_channels`` and ``width``, which is 1.0 or has to be given: several widths can round to the same channels.

    Raises:
        CheckpointError: the tensors are not those of DeepLabV3 on a ResNet, or not of this width.
    """
    needed = ("backbone.conv1.weight", "classifier.0.convs.0.0.weight", "classifier.4.weight")
    if absent := [key for key in needed if key not in state_dict or state_dict[key].ndim != 4]:
        raise CheckpointError(f"This is not a DeepLabV3 on a ResNet: {listing(absent)} missing or not 4-dimensional")
    channels, in_channels = state_dict["backbone.conv1.weight"].shape[:2]
    if width is None and channels != 64:
        raise CheckpointError(
            f"backbone.conv1 has {channels} channels, 64 at width 1, and several widths give that: "
            "say which with ResNetModel.load(path, width=...)"
        )
    width = 1.0 if width is None else width
    if not (isinstance(width, int | float) and 0 < width < math.inf and scale_channels(64, width) == channels):
        raise CheckpointError(f"backbone.conv1 has {channels} channels, which is not what width={width!r} gives")

    blocks: dict[str, set[str]] = {stage: set() for stage in "1234"}
    for key in state_dict:
        if found := re.match(r"backbone\.layer([1-4])\.(\d+)\.", key):
            blocks[found[1]].add(found[2])
    layers = tuple(len(stage) for stage in blocks.values())
    depth = next((depth for depth in LAYERS if LAYERS[depth] == layers), None)
    return {
        "depth": depth or 50,
        "layers": None if depth else list(layers),
        "num_classes": len(state_dict["classifier.4.weight"]),
        "aux_head": any(key.startswith("aux_classifier.") for key in state_dict),
        "in_channels": in_channels,
        "width": width,
    }


def save(model: ResNetModel, path: str | os.PathLike[str]) -> None:
    """Write weights and configuration to one ``.safetensors`` file, from which ``load`` rebuilds the model.

    The file appears under its name when it is complete; interrupted writing leaves an older one as it was.

    Raises:
        ValueError: the name does not end in ``.safetensors``.
        OSError: the file can't be written.
        ImportError: the package safetensors is missing.
    """
    write_safetensors(path, model.state_dict(), model.config)


def load(path: str | os.PathLike[str], **overrides: Any) -> ResNetModel:
    """Build the model that a checkpoint holds, on the CPU, in eval mode and in the dtype of its weights.

    A file of ``save`` says what it holds. Of others the structure is read from the tensors (``infer_config``) and the
    rest is what their project uses (``convert.SETTINGS``) or the default. bf16, fp16 and fp64 weights give a model of
    that dtype, a mixture the dtype that holds them all, and any other type fp32.

    Args:
        path: a checkpoint; see ``load_weights`` for the kinds.
        overrides: arguments of ``ResNetModel`` that go before the file's, such as ``output_stride=16``.
            ``aux_head=False`` leaves an auxiliary head in the file out.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it can't be read, does not hold a whole model, or contradicts itself or the overrides.
        ValueError: an override, or a value in the file's configuration, is none that ``ResNetModel`` takes.
    """
    if "weights" in overrides:
        raise ValueError(f"load() takes the weights from path, got weights={overrides['weights']!r} beside it")
    state_dict, config = read_state_dict(path)
    if config is None:
        project, state_dict, settings = to_torchvision(state_dict)
        if project == IMAGENET:
            raise CheckpointError(
                f"{os.fspath(path)} holds a backbone without a segmentation head, so it is no whole model: build a "
                "ResNetModel and load the backbone into it with load_weights(model, path)"
            )
        config = infer_config(state_dict, width=overrides.get("width")) | settings
    else:
        _check_config(config, state_dict)
    model = ResNetModel(**(config | overrides))
    dtypes = {value.dtype for value in state_dict.values()} & COMPUTED
    model.to(reduce(torch.promote_types, dtypes or {torch.float32}))
    load_weights(model, state_dict, drop_aux=model.aux_classifier is None)
    return model.eval()


def packaged_checkpoint(name: str) -> Path:
    """The checkpoint that comes with the package under this name, such as ``"shapes"``, to be loaded by ``load``.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(str(importlib.resources.files("fastdeeplab") / f"{name}.safetensors"))
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint named {name} comes with the package")
    return path


def _check_config(config: dict[str, Any], state_dict: Mapping[str, Tensor]) -> None:
    """Hold a file's configuration against its tensors, so that a wrong number can't ask for all the memory there is."""
    known = inspect.signature(ResNetModel).parameters.keys() - {"weights", "kernels"}
    if unknown := sorted(config.keys() - known):
        raise CheckpointError(f"The checkpoint's configuration has settings unknown here: {listing(unknown)}")
    found = infer_config(state_dict, width=config.get("width"))
    claimed = found | config
    if claimed["layers"] is None:
        claimed["layers"] = next((list(layers) for depth, layers in LAYERS.items() if depth == claimed["depth"]), None)
    found["layers"] = found["layers"] or list(LAYERS[found["depth"]])
    for name in ("layers", "num_classes", "aux_head", "in_channels"):
        if claimed[name] != found[name]:
            raise CheckpointError(
                f"The checkpoint's configuration says {name}={claimed[name]!r}, its tensors are of {found[name]!r}"
            )
