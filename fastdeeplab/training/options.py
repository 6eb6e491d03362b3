"""The options of a training run: one name each in Python, in a TOML file and on the command line."""

import dataclasses
import difflib
import math
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastdeeplab.atomic import replace_when_complete
from fastdeeplab.checkpoint import PUBLISHED
from fastdeeplab.data import DATASETS


@dataclass(frozen=True)
class Kind:
    """What an option may be: the type of a value on the command line, the rule, and the rule in words."""

    type: type
    accepts: Callable[[Any], bool]
    allowed: str
    parse: Callable[[str], Any] | None = None  # of what is more than one value of the type; it is text there


def _integer(least: int, allowed: str) -> Kind:
    return Kind(int, lambda value: type(value) is int and value >= least, allowed)


def _number(rule: Callable[[float], bool], allowed: str) -> Kind:
    return Kind(float, lambda value: _is_number(value) and rule(value), allowed)


def _one_of(values: Sequence[Any]) -> Kind:
    listing = ", ".join(map(str, values[:-1])) + f" or {values[-1]}"
    return Kind(type(values[0]), lambda value: type(value) is type(values[0]) and value in values, listing)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


TEXT = Kind(str, lambda value: isinstance(value, str) and bool(value), "a text")
FLAG = Kind(bool, lambda value: isinstance(value, bool), "true or false")
COUNT = _integer(1, "a positive integer")
NATURAL = _integer(0, "an integer from 0 up")
SEED = Kind(int, lambda value: type(value) is int and 0 <= value < 2**63, f"an integer from 0 to {2**63 - 1}")
POSITIVE = _number(lambda value: value > 0, "a positive number")
NOT_NEGATIVE = _number(lambda value: value >= 0, "a number from 0 up")
FRACTION = _number(lambda value: 0 <= value <= 1, "a number from 0 to 1")
BELOW_ONE = _number(lambda value: 0 <= value < 1, "a number from 0 up, below 1")


def _list(type_: type, each: Kind, allowed: str, length: int | None = None) -> Kind:
    """Values separated by commas on the command line, an array in TOML."""

    def accepts(values: Any) -> bool:
        if not isinstance(values, tuple) or not values or (length and len(values) != length):
            return False
        return all(each.accepts(value) for value in values)

    def parse(text: str) -> Any:
        try:
            return tuple(type_(part.strip()) for part in text.split(","))
        except ValueError:
            return text  # which is not accepted

    return Kind(str, accepts, allowed, parse)


NOT_NEGATIVES = _list(float, NOT_NEGATIVE, "numbers from 0 up, one per class, not all 0")
WEIGHTS = dataclasses.replace(NOT_NEGATIVES, accepts=lambda values: NOT_NEGATIVES.accepts(values) and any(values))
FOUR_COUNTS = _list(int, COUNT, "4 positive integers", length=4)
NAMES = _list(str, TEXT, "names")
CLASSES = Kind(
    str,
    lambda value: COUNT.accepts(value) or NAMES.accepts(value),
    "the classes' names, or how many they are",
    lambda text: int(text) if text.isdecimal() else NAMES.parse and NAMES.parse(text),
)


def option(default: Any, kind: Kind, help: str) -> Any:
    """A field that is an option. None as the default means that it may be left out."""
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help})


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Everything that a training run is told.

    Raises:
        ValueError: a value is not what its option takes; the message names the option.
    """

    out: str = option("runs/train", TEXT, "Folder of the run: its options, checkpoints and TensorBoard events.")
    data: str = option("shapes", _one_of(DATASETS), f"The data set: {', '.join(DATASETS)}.")
    root: str | None = option(None, TEXT, "Folder that voc, cityscapes or ade20k was unpacked into.")
    images: str | None = option(None, TEXT, "Folder of the pictures, with --data folder.")
    masks: str | None = option(None, TEXT, "Folder of their masks.")
    classes: int | tuple[str, ...] | None = option(None, CLASSES, "Of --data folder: their names, or their number.")
    size: int | None = option(None, COUNT, "Height and width of the scenes of --data shapes.")
    limit: int | None = option(None, COUNT, "Train on this many pictures at most.")
    val_limit: int | None = option(None, COUNT, "Validate on this many pictures at most.")
    check_data: bool = option(True, FLAG, "Read every picture and mask before a new run starts.")

    depth: int = option(50, _one_of((50, 101, 152)), "Of the ResNet: 50, 101 or 152.")
    output_stride: int = option(8, _one_of((8, 16)), "8 or 16.")
    width: float = option(1.0, POSITIVE, "Factor on every channel count.")
    layers: tuple[int, ...] | None = option(
        None, FOUR_COUNTS, "Blocks of the four stages, by default those of --depth."
    )
    dropout: float = option(0.1, BELOW_ONE, "In both heads.")
    pretrained: str | None = option(
        None, TEXT, "imagenet, torchvision or a file of weights; heads for other classes start anew."
    )

    crop_size: int | None = option(
        None, COUNT, "Height and width of the training crops, by default 512, or the scenes' size with --data shapes."
    )
    scale_min: float = option(0.5, POSITIVE, "Smallest random scale.")
    scale_max: float = option(2.0, POSITIVE, "Largest random scale.")
    flip: float = option(0.5, FRACTION, "Probability of a horizontal flip.")
    jitter: float = option(
        0.3, FRACTION, "Range of the random brightness, contrast and saturation; a sixth of it for the hue."
    )

    epochs: int = option(50, COUNT, "Passes over the training pictures.")
    batch_size: int = option(8, COUNT, "Pictures that a process takes through the network at once.")
    accumulate: int = option(1, COUNT, "Batches whose gradients are added up for a step.")
    lr: float = option(0.01, POSITIVE, "Learning rate of the head.")
    backbone_lr: float | None = option(None, NOT_NEGATIVE, "By default --lr, with --pretrained a tenth of it.")
    aux_lr: float | None = option(None, NOT_NEGATIVE, "Of the auxiliary head, by default --lr.")
    momentum: float = option(0.9, BELOW_ONE, "Of SGD.")
    weight_decay: float = option(1e-4, NOT_NEGATIVE, "Of SGD.")
    power: float = option(0.9, NOT_NEGATIVE, "Of the poly schedule: lr (1 - step / steps) ** power.")
    warmup_steps: int = option(0, NATURAL, "Steps in which the learning rates rise linearly.")
    aux_weight: float = option(0.4, NOT_NEGATIVE, "Weight of the auxiliary loss; 0 trains without that head.")
    class_weights: tuple[float, ...] | None = option(None, WEIGHTS, "Weight of each class in the loss.")
    label_smoothing: float = option(0.0, FRACTION, "Of the loss.")
    loss_kernel: str = option(
        "auto", _one_of(("auto", "triton", "torch")), "Implementation of the upsampling and cross-entropy in one."
    )
    freeze_bn: bool = option(False, FLAG, "Keep the batch norms' running statistics and normalise by them.")
    sync_bn: bool = option(False, FLAG, "Batch statistics over all processes (GPUs only).")
    amp: str = option("none", _one_of(("none", "bf16", "fp16")), "Mixed precision: none, bf16 or fp16.")
    channels_last: bool = option(True, FLAG, "Memory layout of weights and images.")
    compile: bool = option(False, FLAG, "torch.compile the network.")

    seed: int = option(0, SEED, "Of the weights, the pictures' order and the augmentation.")
    workers: int = option(2, NATURAL, "Processes that read pictures, for each process that trains.")
    device: str | None = option(None, TEXT, "Such as cpu or cuda:0, by default a GPU if there is one.")
    checkpoint_every: int = option(0, NATURAL, "Steps between checkpoints; 0 writes one at the end of each epoch only.")
    tensorboard: bool = option(True, FLAG, "Write TensorBoard events.")

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), field.metadata["kind"]
            if isinstance(value, list):
                object.__setattr__(self, field.name, value := tuple(value))
            if value is None and field.default is None:
                continue
            if not kind.accepts(value):
                raise ValueError(f"{field.name} must be {kind.allowed}, got {value!r}")
        if self.scale_min > self.scale_max:
            raise ValueError(f"scale_min must not be above scale_max, got {self.scale_min} and {self.scale_max}")


OPTIONS = {field.name: field for field in fields(TrainingOptions)}
PATHS = ("out", "root", "images", "masks", "pretrained")
# What the weights do not depend on: how the run goes on, and where; the pictures must be the same, by their names.
FREE_ON_RESUME = (
    "out", "root", "images", "masks", "device", "workers", "checkpoint_every", "tensorboard", "check_data"
)  # fmt: skip
OTHER_NAMES = {"learning_rate": "lr"}  # of which no spelling is near


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options in a TOML file: top-level keys with the options' names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no TOML, or has a key that is no option.
    """
    try:
        with Path(path).open("rb") as file:
            values = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)} is no TOML file: {error}") from error
    for name in values:
        if name not in OPTIONS:
            nearest = OTHER_NAMES.get(name) or difflib.get_close_matches(name, OPTIONS, 1, cutoff=0)[0]
            raise ValueError(f"{os.fspath(path)}: there is no option {name!r}; the nearest is {nearest!r}")
    return values


def write_toml(path: str | os.PathLike[str], options: TrainingOptions) -> None:
    """Write all options but those left out to a TOML file, which appears when it is complete.

    Raises:
        ImportError: the package tomli-w is missing.
        OSError: the file can't be written.
    """
    try:
        import tomli_w
    except ImportError as error:
        raise ImportError("Training needs the package tomli-w: pip install 'fastdeeplab[training]'") from error
    with replace_when_complete(path) as partial, partial.open("wb") as file:
        tomli_w.dump({name: value for name, value in as_dict(options).items() if value is not None}, file)


def with_absolute_paths(options: TrainingOptions) -> TrainingOptions:
    """The same, from whatever folder they are read."""
    return dataclasses.replace(options, **{name: _absolute(name, getattr(options, name)) for name in PATHS})


def _absolute(name: str, value: Any) -> Any:
    is_path = name in PATHS and isinstance(value, str) and value not in PUBLISHED
    return os.path.abspath(value) if is_path else value  # noqa: PTH100 (a link stays one)


def as_dict(options: TrainingOptions) -> dict[str, Any]:
    """The values by name, tuples as lists."""
    values = {name: getattr(options, name) for name in OPTIONS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def differences(options: Mapping[str, Any], saved: TrainingOptions) -> list[str]:
    """Which of ``options``, values by name, are not those of a saved run, in words; those that are free don't count."""
    values = as_dict(saved)
    return [
        f"{name} ({values[name]!r} in the run, {value!r} now)"
        for name, value in options.items()
        if name not in FREE_ON_RESUME
        and _absolute(name, list(value) if isinstance(value, tuple) else value) != _absolute(name, values[name])
    ]
