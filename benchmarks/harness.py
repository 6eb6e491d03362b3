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
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    traffic_bytes: int | None  # what the operation must read and write, the same for every implementation
    gb_per_s: float | None  # that traffic by the median time
    flop: int | None  # of the whole convolution, multiplications of padding included
    tflop_per_s: float | None  # above what the GPU can do where padding is left out
    floor_ms: float | None  # roofline.py, where it knows the GPU; nothing is multiplied with padding
    share_of_floor: float | None  # floor by median time: 1 is the floor itself
    peak_memory_bytes: int | None
    error_fp64: float | None  # as the benchmark defines it
    tile: str  # the kernel's tile choice, where the benchmark sets one
    reason: str  # why nothing was measured


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
    measurement: Measurement | None,
    work: Work | None = None,
    flop: int | None = None,
    floor_ms: float | None = None,
    tile: str = "",
    reason: str = "",
) -> Row:
    """``floor_ms`` is for what is no single pass, and takes the place of the floor of ``work``."""
    found = measurement
    name = device_name(device)
    gpu = known_gpu(name)
    floor = work.floor(gpu) if work and gpu else floor_ms
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
        p20_ms=found.p20 if found else None,
        p50_ms=found.p50 if found else None,
        p80_ms=found.p80 if found else None,
        traffic_bytes=work.bytes if work else None,
        gb_per_s=work.bytes / found.p50 / 1e6 if work and found else None,
        flop=flop,
        tflop_per_s=flop / found.p50 / 1e9 if flop and found else None,
        floor_ms=floor,
        share_of_floor=floor / found.p50 if floor and found else None,
        peak_memory_bytes=found.peak_memory if found else None,
        error_fp64=found.error if found else None,
        tile=tile,
        reason=reason,
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
