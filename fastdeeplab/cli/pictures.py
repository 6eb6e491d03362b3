"""Pictures to masks: ``segment``, and ``demo``."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdeeplab.checkpoint import PUBLISHED
from fastdeeplab.cli.terminal import (
    console,
    device_of,
    fail,
    listing,
    load_model,
    plain,
    progress_bar,
    require,
    stderr,
)
from fastdeeplab.outputs import MASK, OVERLAY, Output, State, plan
from fastdeeplab.palettes import PALETTES, Palette, choose_palette
from fastdeeplab.pictures import PictureError, write_mask, write_overlay
from fastdeeplab.segmenter import Segmented, Segmenter
from fastdeeplab.weights_file import read_classes

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")


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
        str,
        typer.Option(
            metavar="|".join((*PALETTES, "auto")), help="Names and colours; auto: the checkpoint's, or by their number."
        ),
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
    require(0 <= opacity <= 1, "--opacity must be from 0 to 1", opacity)
    require(depth in (None, 50, 101, 152), "--depth must be 50, 101 or 152", depth)
    require(output_stride in (None, 8, 16), "--output-stride must be 8 or 16", output_stride)
    require(palette in (*PALETTES, "auto"), f"--palette must be {', '.join(PALETTES)} or auto", palette)
    require(batch_size >= 1, "--batch-size must be at least 1", batch_size)
    require(resize >= 0, "--resize must be at least 1, or 0 to keep the size", resize)
    if weights == "torchvision":
        depth, output_stride = depth or 50, output_stride or 8
        published = PUBLISHED["torchvision"]
        require(depth in published, f"torchvision has published weights of depth {listing(published)}", depth)
    elif not Path(weights).is_file():
        fail(f"--weights: there is no file {weights}")
    place = device_of(device)
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

    model = load_model(weights, depth, output_stride)
    try:
        names = None if weights == "torchvision" else read_classes(weights)
        colors = choose_palette(palette, model.config["num_classes"], names)
    except ValueError as error:
        fail(str(error))
    segmenter = Segmenter(model, resize=resize or None, batch_size=batch_size, device=place)

    failed = 0
    results = segmenter.stream(output.source for output in todo)
    try:
        with progress_bar() as progress:
            task = progress.add_task("segmenting", total=len(todo))
            for output, result in zip(todo, results, strict=True):
                try:
                    _write(output, result, colors, opacity, settings)
                    if output.stem != output.source.stem:
                        console.print(plain(f"{output.source} -> {output.mask}"))
                except (PictureError, OSError) as error:
                    failed += 1
                    reason = f"{output.source}: {error.strerror or error}" if isinstance(error, OSError) else error
                    stderr.print(f"failed: {plain(reason)}", style="red")
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
            fail(f"{source}: {error.strerror}")
        if not files:
            fail(nothing)
        for file in files:
            found.setdefault(os.path.abspath(file), file)  # noqa: PTH100 (two links to one file are two sources)
    return list(found.values())


def _check_folder(out: Path, pictures: Sequence[Path]) -> None:
    """Make the output folder; refuse one whose files are being read."""
    for picture in pictures:
        if os.path.realpath(picture.parent) == os.path.realpath(out):
            fail(f"--out {out} is the folder of the source {picture}: choose another, so that no picture is replaced")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {out}: {error.strerror}")
    if not os.access(out, os.W_OK | os.X_OK):
        fail(f"--out {out}: no permission to write there")


def _weights_version(weights: str) -> list[Any]:
    if weights == "torchvision":
        return [weights]
    stat = Path(weights).stat()
    return [Path(weights).name, stat.st_size, stat.st_mtime_ns]


def _summarise(out: Path, done: int, failed: int, states: Sequence[State]) -> None:
    kept = states.count(State.OTHER_SETTINGS)
    finished = states.count(State.FINISHED)
    parts = [f"{done} segmented"]
    parts += [f"{finished} finished before"] if finished else []
    parts += [f"{kept} kept from a run with other settings (--overwrite makes them anew)"] if kept else []
    parts += [f"{failed} failed"] if failed else []
    console.print(f"{out}: {', '.join(parts)}")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for masks and overlays.")] = Path("demo-output"),
    photographs: Annotated[
        bool, typer.Option("--photographs", help="Three photographs, by torchvision's published weights.")
    ] = False,
) -> None:
    """Segment pictures; show the classes found and the seconds per stage. Needs no network.

    The pictures are scenes of shapes, and the weights come with the package.
    """
    from fastdeeplab.demo import segment_photographs, segment_scenes

    try:
        segment_photographs(out, console) if photographs else segment_scenes(out, console)
    except OSError as error:
        fail(str(error))
