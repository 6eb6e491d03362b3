"""What every command shares: the consoles, options that several have, errors as one line, models from files."""

from collections.abc import Iterable
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastdeeplab.checkpoint import CheckpointError, load, load_weights
from fastdeeplab.devices import usable_device
from fastdeeplab.model import ResNetModel

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Depth = Annotated[int, typer.Option(help="Of the ResNet: 50, 101 or 152.")]
OutputStride = Annotated[int, typer.Option(help="8 or 16.")]
Classes = Annotated[int, typer.Option(help="Number of classes.")]
Size = Annotated[str, typer.Option(metavar="HEIGHTxWIDTH", help="Of the images.")]
BatchSize = Annotated[int, typer.Option(help="Images that go through the network at once.")]
DType = Annotated[
    str | None,
    typer.Option(help="float32, float16 or bfloat16.", show_default="bfloat16 on a GPU, else float32"),
]
Device = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:0.", show_default="cuda if there is one, else cpu")
]

console = Console(soft_wrap=True, highlight=False, markup=False)
stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def require(condition: bool, allowed: str, value: object) -> None:
    if not condition:
        fail(f"{allowed}, got {value}")


def fail(message: str) -> NoReturn:
    """End with one line on stderr and exit status 2."""
    stderr.print(f"error: {plain(message)}", style="red")
    raise typer.Exit(2)


def plain(message: object) -> str:
    """Text that any terminal takes; a file name can hold bytes that are none."""
    return str(message).encode("utf-8", "backslashreplace").decode()


def listing(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def device_of(name: str | None) -> torch.device:
    try:
        return usable_device(name)
    except ValueError as error:
        fail(f"--{error}")


def load_model(weights: str, depth: int | None, output_stride: int | None, option: str = "--weights") -> ResNetModel:
    chosen = {"depth": depth, "output_stride": output_stride}
    overrides: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    try:
        if weights == "torchvision":
            model = ResNetModel(aux_head=False, **overrides)
            load_weights(model, weights)
        else:
            model = load(weights, aux_head=False, **overrides)
    except CheckpointError as error:
        fail(str(error))
    except (ValueError, OSError, ImportError) as error:
        fail(f"{option} {weights}: {error}")
    if model.config["in_channels"] != 3:
        fail(f"{option} {weights}: pictures have 3 channels, the model takes {model.config['in_channels']}")
    if model.config["num_classes"] > 65536:
        fail(f"{option} {weights}: a PNG holds 65536 classes at most, the model has {model.config['num_classes']}")
    return model.eval()


def parse_size(size: str) -> tuple[int, int]:
    height, _, width = size.lower().partition("x")
    require(height.isdecimal() and width.isdecimal(), "--size must be HEIGHTxWIDTH, such as 512x1024", size)
    return int(height), int(width)


def progress_bar() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("pictures"), TimeRemainingColumn())
    return Progress(*columns, console=stderr, transient=True)
