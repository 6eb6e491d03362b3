"""What is installed here, and what can run: ``info``."""

import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.table import Table

import fastdeeplab
from fastdeeplab import kernels
from fastdeeplab.checkpoint import PUBLISHED
from fastdeeplab.cli.terminal import console
from fastdeeplab.kernels.choice import kernels_are_off, why_not


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
    yield "torch", torch.__version__
    for package in ("triton", "numpy", "pillow", "safetensors", "scikit-image", "torchvision"):
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
    for name, package in (("safetensors weights", "safetensors"), ("photographs of the demo", "scikit-image")):
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
