"""The demonstration: pictures segmented and laid over, with the classes found and the seconds per stage.

Scenes of shapes by the weights that come with the package, or photographs by torchvision's published weights, which
need the extra ``fastdeeplab[demo]``.
"""

import importlib.util
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from fastdeeplab.checkpoint import CheckpointError, load, load_weights, packaged_checkpoint
from fastdeeplab.data.shapes import Shapes
from fastdeeplab.model import ResNetModel
from fastdeeplab.outputs import MASK, OVERLAY, plan
from fastdeeplab.palettes import Palette, choose_palette
from fastdeeplab.pictures import percent, shares, write_mask, write_overlay
from fastdeeplab.segmenter import Segmenter

SCENES, SCENE_SIZE = 3, 128
SCENE_SEED = 1  # the packaged weights were trained and validated on the scenes of seed 0
# By NASA (public domain), Stefan van der Walt (CC0) and the makers of the Middlebury stereo benchmark of 2014.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "motorcycle_left.png")
CONNECT_SECONDS = 5

Column = tuple[str, Callable[[int, NDArray[np.integer]], str]]  # its title, and the cell of a picture by its mask


def segment_scenes(out: Path, console: Console) -> None:
    """Segment scenes that the packaged weights were not trained on into `out`, and say how much of them is right.

    The scenes themselves go into the folder ``scenes`` there. Raises OSError if a file can't be written.
    """
    scenes = Shapes("val", seed=SCENE_SEED, limit=SCENES, size=SCENE_SIZE)
    folder = out / "scenes"
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for index in range(SCENES):
        image, _ = scenes[index]
        sources.append(folder / f"scene-{index + 1}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(sources[-1])

    def right(index: int, mask: NDArray[np.integer]) -> str:
        return percent(float((mask == scenes[index][1].numpy()).mean()))

    palette = choose_palette("auto", len(scenes.classes), scenes.classes)
    _segment(
        sources,
        out,
        console,
        lambda: load(packaged_checkpoint("shapes"), aux_head=False),
        palette,
        resize=None,
        more=[("right pixels", right)],
    )


def segment_photographs(
    out: Path, console: Console, *, load_model: Callable[[Console], ResNetModel] | None = None
) -> None:
    """Segment scikit-image's photographs into `out`.

    Args:
        load_model: gives a model in eval mode; by default ``load_published``.

    Raises:
        FileNotFoundError: scikit-image or one of its photographs is not installed.
        OSError: a file can't be written.
    """
    load_model = load_model or load_published
    _segment(find_photographs(), out, console, lambda: load_model(console), choose_palette("voc", 21))


def _segment(
    sources: Sequence[Path],
    out: Path,
    console: Console,
    load_model: Callable[[], ResNetModel],
    palette: Palette,
    resize: int | None = 520,
    more: Sequence[Column] = (),
) -> None:
    start = time.perf_counter()
    model = load_model()
    seconds = {"load the model": time.perf_counter() - start}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    segmenter = Segmenter(model, resize=resize, device=device)

    out.mkdir(parents=True, exist_ok=True)
    settings = {"demo": True}
    outputs = plan(sources, out)
    pictures = Table("picture", "size", "classes found", *(title for title, _ in more))
    writing = 0.0
    for index, (output, result) in enumerate(zip(outputs, segmenter.stream(sources), strict=True)):
        if result.error is not None:
            raise result.error
        assert result.image is not None
        assert result.mask is not None
        start = time.perf_counter()
        write_mask(output.mask, result.mask, palette, output.text(MASK, settings))
        write_overlay(output.overlay, result.image, result.mask, palette, text=output.text(OVERLAY, settings))
        writing += time.perf_counter() - start
        found = [f"{palette.classes[number]} {percent(share)}" for number, share in shares(result.mask).items()]
        size = f"{result.image.width} x {result.image.height}"
        cells = (cell(index, result.mask) for _, cell in more)
        pictures.add_row(output.source.name, size, ", ".join(found), *cells)
    console.print(pictures)

    seconds |= segmenter.seconds | {"write": writing}
    times = Table("stage", "seconds", title=f"{len(sources)} pictures on {_device_name(device)}", title_justify="left")
    times.columns[1].justify = "right"
    for stage, spent in seconds.items():
        times.add_row(stage, f"{spent:.2f}")
    console.print(times)
    console.print(f"masks: {out}/NAME.png, overlays with a legend: {out}/NAME.overlay.png", soft_wrap=True)


def find_photographs() -> list[Path]:
    """Where scikit-image's package keeps the photographs; nothing is downloaded."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise FileNotFoundError("scikit-image is missing: pip install 'fastdeeplab[demo]'")
    paths = [Path(package.origin).parent / "data" / name for name in PHOTOGRAPHS]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"scikit-image is installed without its photographs {', '.join(missing)}")
    return paths


def load_published(console: Console) -> ResNetModel:
    """DeepLabV3 on ResNet-50 with the published weights or, where they can't be had, with random ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNetModel(depth=50, num_classes=21, aux_head=False)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        load_weights(model, "torchvision")
    except CheckpointError:
        console.print(
            "torchvision's published weights could not be had: the weights are random and the masks mean nothing.",
            soft_wrap=True,
        )
    finally:
        socket.setdefaulttimeout(timeout)
    return model.eval()


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"the CPU, {torch.get_num_threads()} threads"
