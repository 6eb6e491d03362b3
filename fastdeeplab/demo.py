"""The demonstration: real photographs from scikit-image's own package, segmented and laid over, with times per stage.

Needs the extra ``fastdeeplab[demo]``.
"""

import importlib.util
import socket
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastdeeplab.checkpoint import CheckpointError, load_weights
from fastdeeplab.model import ResNetModel
from fastdeeplab.outputs import MASK, OVERLAY, plan
from fastdeeplab.palettes import choose_palette
from fastdeeplab.pictures import percent, shares, write_mask, write_overlay
from fastdeeplab.segmenter import Segmenter

# By NASA (public domain), Stefan van der Walt (CC0) and the makers of the Middlebury stereo benchmark of 2014.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "motorcycle_left.png")
CONNECT_SECONDS = 5


def run_demo(out: Path, console: Console, *, model: ResNetModel | None = None) -> None:
    """Segment the photographs into `out`; print the classes found and the seconds per stage.

    Args:
        model: in eval mode; by default DeepLabV3 on ResNet-50 with torchvision's published weights, or with random
            ones, and a line that says so, where those can't be had.

    Raises:
        FileNotFoundError: scikit-image or one of its photographs is not installed.
    """
    sources = find_photographs()
    start = time.perf_counter()
    model = model or load_model(console)
    seconds = {"load the model": time.perf_counter() - start}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    segmenter = Segmenter(model, device=device)
    palette = choose_palette("auto", model.config["num_classes"])

    out.mkdir(parents=True, exist_ok=True)
    settings = {"demo": True}
    outputs = plan(sources, out)
    pictures = Table("picture", "size", "classes found")
    writing = 0.0
    for output, result in zip(outputs, segmenter.stream(sources), strict=True):
        if result.error is not None:
            raise result.error
        assert result.image is not None
        assert result.mask is not None
        start = time.perf_counter()
        write_mask(output.mask, result.mask, palette, output.text(MASK, settings))
        write_overlay(output.overlay, result.image, result.mask, palette, text=output.text(OVERLAY, settings))
        writing += time.perf_counter() - start
        found = [f"{palette.classes[index]} {percent(share)}" for index, share in shares(result.mask).items()]
        size = f"{result.image.width} x {result.image.height}"
        pictures.add_row(output.source.name, size, ", ".join(found))
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


def load_model(console: Console) -> ResNetModel:
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
