"""How fast and how right the kernels are on this machine: ``tune``, ``verify``, ``bench``."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from fastdeeplab.accelerate import accelerate
from fastdeeplab.checkpoint import CheckpointError, load
from fastdeeplab.cli.terminal import (
    DTYPES,
    BatchSize,
    Classes,
    Depth,
    Device,
    DType,
    OutputStride,
    Size,
    console,
    device_of,
    fail,
    listing,
    parse_size,
    require,
    stderr,
)
from fastdeeplab.speed.rivals import Network


def tune(
    depth: Depth = 50,
    output_stride: OutputStride = 8,
    classes: Classes = 21,
    size: Size = "512x512",
    batch_size: BatchSize = 1,
    dtype: DType = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A checkpoint, whose network is tuned in place of the above.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of measuring at most; compiling comes on top.")] = 60.0,
    again: Annotated[bool, typer.Option("--again", help="Measure what was measured earlier, too.")] = False,
    device: Device = None,
) -> None:
    """Measure, once per GPU and shape, which kernel or library call is the fastest for each layer of a network.

    The measurements are kept in the user's cache directory, and decide from then on wherever such a layer runs.
    """
    place = device_of(device)
    network = _network(depth, output_stride, classes, size, batch_size, dtype, place)
    try:
        model = load(weights, aux_head=False) if weights else network.structure()
        fast = accelerate(model.to(place), dtype=network.dtype)
        images = torch.randn(network.batch, fast.config["in_channels"], *network.size, device=place)
        console.print(str(fast.tune(images, seconds=seconds, again=again, progress=True)))
    except KeyboardInterrupt:
        stderr.print("interrupted: the layers that were measured are kept")
        raise typer.Exit(130) from None
    except (CheckpointError, ValueError, OSError, RuntimeError) as error:
        fail(str(error))


def verify(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer dtypes and tile choices.")] = False,
    device: Device = None,
) -> None:
    """Compare every kernel and tile choice that can run here with fp64, then the whole network.

    The exit status is 1 if something is wrong or fails. What can't run here is listed with the reason.
    """
    from fastdeeplab.verify import run_verify

    if not run_verify(console, device_of(device), quick=quick):
        raise typer.Exit(1)


def bench(
    depth: Depth = 50,
    output_stride: OutputStride = 8,
    classes: Classes = 21,
    size: Size = "512x512",
    batch_size: BatchSize = 1,
    dtype: DType = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A size, a batch and repeats that are made to take under two minutes.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also show what each layer takes.")] = False,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a row for each rival.", show_default=False)
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the rivals' speeds, such as into bench.png.", show_default=False),
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long to repeat each rival.")] = 2.0,
    device: Device = None,
) -> None:
    """Measure images to masks against torchvision's DeepLabV3, eager and compiled, on this machine.

    The masks are compared before anything is timed. A rival that fails or is wrong is named with the reason.
    """
    from fastdeeplab.bench import run_bench

    require(seconds > 0, "--seconds must be positive", seconds)
    place = device_of(device)
    network = _network(depth, output_stride, classes, size, batch_size, dtype, place)
    try:
        run_bench(console, network, place, quick=quick, csv=csv, chart=chart, profile=profile, seconds=seconds)
    except KeyboardInterrupt:
        stderr.print("interrupted")
        raise typer.Exit(130) from None
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        fail(str(error))


def _network(
    depth: int, output_stride: int, classes: int, size: str, batch_size: int, dtype: str | None, device: torch.device
) -> Network:
    name = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    require(name in DTYPES, f"--dtype must be {listing(DTYPES)}", name)
    try:
        return Network(depth, output_stride, classes, parse_size(size), batch_size, DTYPES[name])
    except ValueError as error:
        fail(f"--{error}")
