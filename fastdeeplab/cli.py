"""The command line, ``fastdeeplab segment`` and others. Needs the extra ``fastdeeplab[pictures]``."""

import glob
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch

try:
    import PIL  # noqa: F401
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in ("PIL", "typer", "rich"):
        raise
    raise SystemExit(f"The command line needs the package {package}: pip install 'fastdeeplab[pictures]'") from None

import fastdeeplab
from fastdeeplab import kernels
from fastdeeplab.accelerate import accelerate
from fastdeeplab.checkpoint import PUBLISHED, CheckpointError, load, load_weights
from fastdeeplab.kernels.choice import kernels_are_off, why_not
from fastdeeplab.model import ResNetModel
from fastdeeplab.outputs import MASK, OVERLAY, Output, State, plan
from fastdeeplab.palettes import PALETTES, Palette, choose_palette
from fastdeeplab.pictures import PictureError, write_mask, write_overlay
from fastdeeplab.rivals import Network
from fastdeeplab.segmenter import Segmented, Segmenter

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")

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

app = typer.Typer(
    help="Semantic segmentation of pictures with DeepLabV3.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(soft_wrap=True, highlight=False, markup=False)
stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    """Run the command line."""
    app()


@app.callback()
def _check_environment() -> None:
    try:
        kernels_are_off()
    except ValueError as error:
        _fail(str(error))


@app.command()
def segment(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Pictures, folders (the pictures directly in them) and globs such as 'photos/**/*.jpg'.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the masks; made if it does not exist.", show_default=False)],
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write NAME.overlay.png, with a legend.")] = False,
    opacity: Annotated[float, typer.Option(help="Of the overlay's colours, from 0 to 1.")] = 0.5,
    weights: Annotated[
        str, typer.Option(metavar="FILE|torchvision", help="A checkpoint, or torchvision's published weights.")
    ] = "torchvision",
    depth: Annotated[
        int | None, typer.Option(help="Of the ResNet: 50, 101 or 152.", show_default="the checkpoint's, or 50")
    ] = None,
    output_stride: Annotated[int | None, typer.Option(help="8 or 16.", show_default="the checkpoint's, or 8")] = None,
    palette: Annotated[
        str, typer.Option(metavar="|".join((*PALETTES, "auto")), help="Names and colours; auto goes by their number.")
    ] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:0.", show_default="cuda if there is one, else cpu")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures that go through the network at once.")] = 1,
    resize: Annotated[int, typer.Option(help="Length of the shorter side in the network; 0 keeps the size.")] = 520,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Segment finished pictures again.")] = False,
) -> None:
    """Segment pictures: NAME.png is a palette PNG whose pixel values are the class indices.

    Where two sources have the same NAME, one of them gets NAME_2. A second run skips what is finished. A picture that
    can't be segmented is named with its reason; the rest is done, and the exit status is 1.
    """
    _require(0 <= opacity <= 1, "--opacity must be from 0 to 1", opacity)
    _require(depth in (None, 50, 101, 152), "--depth must be 50, 101 or 152", depth)
    _require(output_stride in (None, 8, 16), "--output-stride must be 8 or 16", output_stride)
    _require(palette in (*PALETTES, "auto"), f"--palette must be {', '.join(PALETTES)} or auto", palette)
    _require(batch_size >= 1, "--batch-size must be at least 1", batch_size)
    _require(resize >= 0, "--resize must be at least 1, or 0 to keep the size", resize)
    if weights == "torchvision":
        depth, output_stride = depth or 50, output_stride or 8
        published = PUBLISHED["torchvision"]
        _require(depth in published, f"torchvision has published weights of depth {_listing(published)}", depth)
    elif not Path(weights).is_file():
        _fail(f"--weights: there is no file {weights}")
    place = _usable_device(device)
    pictures = _find_pictures(sources)
    _check_folder(out, pictures)

    mask_settings: dict[str, Any] = {
        "weights": _weights_version(weights),
        "depth": depth,
        "output_stride": output_stride,
        "resize": resize,
        "palette": palette,
    }
    settings = {MASK: mask_settings}
    if overlay:
        settings[OVERLAY] = mask_settings | {"opacity": opacity}
    outputs = plan(pictures, out)
    states = [State.MISSING if overwrite else output.state(settings) for output in outputs]
    todo = [output for output, state in zip(outputs, states, strict=True) if state is State.MISSING]
    if not todo:
        _summarise(out, 0, 0, states)
        return

    model = _load_model(weights, depth, output_stride)
    try:
        colors = choose_palette(palette, model.config["num_classes"])
    except ValueError as error:
        _fail(str(error))
    segmenter = Segmenter(model, resize=resize or None, batch_size=batch_size, device=place)

    failed = 0
    results = segmenter.stream(output.source for output in todo)
    try:
        with _progress() as progress:
            task = progress.add_task("segmenting", total=len(todo))
            for output, result in zip(todo, results, strict=True):
                try:
                    _write(output, result, colors, opacity, settings)
                    if output.stem != output.source.stem:
                        console.print(_plain(f"{output.source} -> {output.mask}"))
                except (PictureError, OSError) as error:
                    failed += 1
                    reason = f"{output.source}: {error.strerror or error}" if isinstance(error, OSError) else error
                    stderr.print(f"failed: {_plain(reason)}", style="red")
                progress.advance(task)
    except KeyboardInterrupt:
        stderr.print("interrupted: what is finished is whole, and the same command goes on with the rest")
        raise typer.Exit(130) from None
    _summarise(out, len(todo) - failed, failed, states)
    if failed:
        raise typer.Exit(1)


def _write(
    output: Output, result: Segmented, palette: Palette, opacity: float, settings: dict[str, dict[str, Any]]
) -> None:
    if result.error is not None:
        raise result.error
    assert result.image is not None
    assert result.mask is not None
    write_mask(output.mask, result.mask, palette, output.text(MASK, settings[MASK]))
    if OVERLAY in settings:
        text = output.text(OVERLAY, settings[OVERLAY])
        write_overlay(output.overlay, result.image, result.mask, palette, opacity=opacity, text=text)


def _find_pictures(sources: Iterable[str]) -> list[Path]:
    """The picture files that sources name, each once, in their order."""
    found: dict[str, Path] = {}
    for source in sources:
        path = Path(source)
        nothing = f"no files match {source}" if glob.has_magic(source) else f"there is no file or folder {source}"
        try:
            if path.is_dir():
                inside = (file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
                files = sorted(file for file in inside if not file.is_dir())
                nothing = f"no pictures in the folder {source} ({', '.join(SUFFIXES)})"
            elif os.path.lexists(path):
                files = [path]
            else:
                files = sorted(file for file in map(Path, glob.glob(source, recursive=True)) if not file.is_dir())  # noqa: PTH207
        except OSError as error:  # no permission, or a name that no file can have
            _fail(f"{source}: {error.strerror}")
        if not files:
            _fail(nothing)
        for file in files:
            found.setdefault(os.path.abspath(file), file)  # noqa: PTH100 (two links to one file are two sources)
    return list(found.values())


def _check_folder(out: Path, pictures: Sequence[Path]) -> None:
    """Make the output folder; refuse one whose files are being read."""
    for picture in pictures:
        if os.path.realpath(picture.parent) == os.path.realpath(out):
            _fail(f"--out {out} is the folder of the source {picture}: choose another, so that no picture is replaced")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"--out {out}: {error.strerror}")
    if not os.access(out, os.W_OK | os.X_OK):
        _fail(f"--out {out}: no permission to write there")


def _usable_device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.ones(1, device=place).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        _fail(f"--device {device} can't be used: {str(error).splitlines()[0]}")
    return place


def _weights_version(weights: str) -> list[Any]:
    if weights == "torchvision":
        return [weights]
    stat = Path(weights).stat()
    return [Path(weights).name, stat.st_size, stat.st_mtime_ns]


def _load_model(weights: str, depth: int | None, output_stride: int | None) -> ResNetModel:
    chosen = {"depth": depth, "output_stride": output_stride}
    overrides: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    try:
        if weights == "torchvision":
            model = ResNetModel(aux_head=False, **overrides)
            load_weights(model, weights)
        else:
            model = load(weights, aux_head=False, **overrides)
    except CheckpointError as error:
        _fail(str(error))
    except (ValueError, OSError, ImportError) as error:
        _fail(f"--weights {weights}: {error}")
    if model.config["in_channels"] != 3:
        _fail(f"--weights {weights}: pictures have 3 channels, the model takes {model.config['in_channels']}")
    if model.config["num_classes"] > 65536:
        _fail(f"--weights {weights}: a PNG holds 65536 classes at most, the model has {model.config['num_classes']}")
    return model.eval()


def _progress() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("pictures"), TimeRemainingColumn())
    return Progress(*columns, console=stderr, transient=True)


def _summarise(out: Path, done: int, failed: int, states: Sequence[State]) -> None:
    kept = states.count(State.OTHER_SETTINGS)
    finished = states.count(State.FINISHED)
    parts = [f"{done} segmented"]
    parts += [f"{finished} finished before"] if finished else []
    parts += [f"{kept} kept from a run with other settings (--overwrite makes them anew)"] if kept else []
    parts += [f"{failed} failed"] if failed else []
    console.print(f"{out}: {', '.join(parts)}")


def _require(condition: bool, allowed: str, value: object) -> None:
    if not condition:
        _fail(f"{allowed}, got {value}")


def _fail(message: str) -> NoReturn:
    """End with one line on stderr and exit status 2."""
    stderr.print(f"error: {_plain(message)}", style="red")
    raise typer.Exit(2)


def _plain(message: object) -> str:
    """Text that any terminal takes; a file name can hold bytes that are none."""
    return str(message).encode("utf-8", "backslashreplace").decode()


def _listing(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for masks and overlays.")] = Path("demo-output"),
) -> None:
    """Segment three photographs; show the classes found and the seconds per stage."""
    from fastdeeplab.demo import run_demo

    try:
        run_demo(out, console)
    except OSError as error:
        _fail(str(error))


@app.command()
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
    place = _usable_device(device)
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
        _fail(str(error))


@app.command()
def verify(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer dtypes and tile choices.")] = False,
    device: Device = None,
) -> None:
    """Compare every kernel and tile choice that can run here with fp64, then the whole network.

    The exit status is 1 if something is wrong or fails. What can't run here is listed with the reason.
    """
    from fastdeeplab.verify import run_verify

    if not run_verify(console, _usable_device(device), quick=quick):
        raise typer.Exit(1)


@app.command()
def bench(
    depth: Depth = 50,
    output_stride: OutputStride = 8,
    classes: Classes = 21,
    size: Size = "512x512",
    batch_size: BatchSize = 1,
    dtype: DType = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Under two minutes: a size and batch for that, few repeats.")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also show what each layer takes.")] = False,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a row for each rival.", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long to repeat each rival.")] = 2.0,
    device: Device = None,
) -> None:
    """Measure images to masks against torchvision's DeepLabV3, eager and compiled, on this machine.

    The masks are compared before anything is timed. A rival that fails or is wrong is named with the reason.
    """
    from fastdeeplab.bench import run_bench

    _require(seconds > 0, "--seconds must be positive", seconds)
    place = _usable_device(device)
    network = _network(depth, output_stride, classes, size, batch_size, dtype, place)
    try:
        run_bench(console, network, place, quick=quick, csv=csv, profile=profile, seconds=seconds)
    except KeyboardInterrupt:
        stderr.print("interrupted")
        raise typer.Exit(130) from None
    except (ValueError, OSError, RuntimeError) as error:
        _fail(str(error))


def _network(
    depth: int, output_stride: int, classes: int, size: str, batch_size: int, dtype: str | None, device: torch.device
) -> Network:
    height, _, width = size.lower().partition("x")
    _require(height.isdecimal() and width.isdecimal(), "--size must be HEIGHTxWIDTH, such as 512x1024", size)
    name = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    _require(name in DTYPES, f"--dtype must be {_listing(DTYPES)}", name)
    try:
        return Network(depth, output_stride, classes, (int(height), int(width)), batch_size, DTYPES[name])
    except ValueError as error:
        _fail(f"--{error}")


@app.command()
def info() -> None:
    """Show versions, GPUs, and what can run here and why not."""
    for title, rows in (("versions", _versions()), ("devices", _devices()), ("what can run here", _abilities())):
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in rows:
            table.add_row(name, value)
        console.print(table)


def _versions() -> Iterator[tuple[str, str]]:
    yield "fastdeeplab", fastdeeplab.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in ("torch", "triton", "numpy", "pillow", "safetensors", "scikit-image", "torchvision"):
        yield package, _version(package) or "not installed"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[tuple[str, str]]:
    yield "CPU", f"{torch.get_num_threads()} threads"
    yield "PyTorch's CUDA", torch.version.cuda or "none: this is a build without CUDA"
    if not torch.cuda.is_available():
        yield "GPU", "none"
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{index}", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory}"


def _abilities() -> Iterator[tuple[str, str]]:
    yield "segment on the CPU", "yes"
    reason = _why_no_cuda()
    yield "segment on a GPU", f"no: {reason}" if reason else "yes"
    reason = _why_no_kernels()
    for function in kernels.FUNCTIONS:
        yield f"kernel {function}", f"no, PyTorch instead: {reason}" if reason else "yes"
    for depth, url in PUBLISHED["torchvision"].items():
        file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        where = f"in {file}" if file.is_file() else "to be downloaded on first use"
        yield f"published weights, ResNet-{depth}", where
    for name, package in (("safetensors weights", "safetensors"), ("demo", "scikit-image")):
        extra = "weights" if package == "safetensors" else "demo"
        yield name, "yes" if _version(package) else f"no: pip install 'fastdeeplab[{extra}]'"


def _why_no_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    return None if torch.cuda.is_available() else "PyTorch finds no NVIDIA GPU and driver"


def _why_no_kernels() -> str | None:
    if kernels_are_off():
        return "FASTDEEPLAB_KERNELS=torch"
    return _why_no_cuda() or why_not(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)


if __name__ == "__main__":
    main()
