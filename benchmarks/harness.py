"""One CSV row per measurement, appended as soon as it is made, so that a stopped run keeps its rows.

``benchmarks/results/`` is where the files go, one per GPU.
"""

import csv
import dataclasses
import functools
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from fastdeeplab.kernels.measure import Measurement
from roofline import Work, known_gpu

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """The columns. What does not apply or is not known is empty."""

    commit: str  # -dirty if the code differs from it
    device: str
    driver: str  # empty on a CPU
    torch: str
    triton: str
    kernel: str  # or the model
    implementation: str
    shape: str
    layout: str
    dtype: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    traffic_bytes: int | None  # what the operation must read and write, the same for every implementation
    gb_per_s: float | None  # that traffic by the median time
    flop: int | None  # of the whole convolution, multiplications of padding included
    tflop_per_s: float | None  # above what the GPU can do where padding is left out
    floor_ms: float | None  # roofline.py, where it knows the GPU; nothing is multiplied with padding
    share_of_floor: float | None  # floor by median time: 1 is the floor itself
    peak_memory_bytes: int
    error_fp64: float  # as the benchmark defines it
    tile: str  # the kernel's tile choice, where the benchmark sets one


COLUMNS = [field.name for field in dataclasses.fields(Row)]


class Results:
    """A CSV file that rows are appended to.

    Raises:
        ValueError: the file exists and has other columns, or ends in half a row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            with path.open(newline="") as file:
                found = next(csv.reader(file))
                if found != COLUMNS:
                    raise ValueError(f"{path} has the columns {','.join(found)}; expected {','.join(COLUMNS)}")
            if not path.read_bytes().endswith(b"\n"):
                raise ValueError(f"{path} ends in the middle of a row: remove it")

    def append(self, row: Row) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(dataclasses.asdict(row))


def make_row(
    device: torch.device,
    *,
    kernel: str,
    implementation: str,
    shape: str,
    layout: str,
    dtype: str,
    measurement: Measurement,
    work: Work | None = None,
    flop: int | None = None,
    tile: str = "",
) -> Row:
    seconds = measurement.p50 / 1000
    name = device_name(device)
    gpu = known_gpu(name)
    floor = work.floor(gpu) if work and gpu else None
    return Row(
        commit=commit(),
        device=name,
        driver=driver(device),
        torch=torch.__version__,
        triton=triton_version(),
        kernel=kernel,
        implementation=implementation,
        shape=shape,
        layout=layout,
        dtype=dtype,
        p20_ms=measurement.p20,
        p50_ms=measurement.p50,
        p80_ms=measurement.p80,
        traffic_bytes=work.bytes if work else None,
        gb_per_s=work.bytes / seconds / 1e9 if work else None,
        flop=flop,
        tflop_per_s=flop / seconds / 1e12 if flop else None,
        floor_ms=floor,
        share_of_floor=floor / measurement.p50 if floor else None,
        peak_memory_bytes=measurement.peak_memory,
        error_fp64=measurement.error,
        tile=tile,
    )


def default_path(device: torch.device) -> Path:
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") + ".csv")


@functools.cache
def commit() -> str:
    """The short hash, with ``-dirty`` if anything but the results differs from it; ``unknown`` outside a checkout."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return f"{head}-dirty" if changed else head


@functools.cache
def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    if information.exists() and (found := re.search(r"model name\s*: (.+)", information.read_text())):
        return found[1]
    return platform.processor() or platform.machine()


@functools.cache
def driver(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else "unknown"


@functools.cache
def triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """What a command prints; nothing if it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
