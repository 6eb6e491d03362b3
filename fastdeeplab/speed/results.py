"""What was measured of a network and its rivals: ratios, the share of the floor, a table, a chart, CSV rows."""

import csv
import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import fastdeeplab
from fastdeeplab.atomic import replace_when_complete
from fastdeeplab.kernels.measure import Measurement
from fastdeeplab.speed import roofline
from fastdeeplab.speed.rivals import Network, Rival, short_name

if TYPE_CHECKING:
    from rich.table import Table


COLUMNS = (
    "fastdeeplab", "device", "torch", "triton", "network", "rival", "dtype",
    "p20_ms", "p50_ms", "p80_ms", "images_per_second", "share_of_floor", "peak_memory_bytes", "error_fp64",
    "reason",
)  # fmt: skip

PLAN = next(plan for plan in roofline.PLANS if plan.name == "planned + tap skip")  # what the kernels fuse and skip


@dataclass(frozen=True)
class Result:
    network: Network
    rival: Rival
    measurement: Measurement | None
    reason: str = ""  # why there is no measurement

    @property
    def milliseconds(self) -> float:
        """The median of a batch; infinite if it could not be measured."""
        return self.measurement.p50 if self.measurement else math.inf

    @property
    def images_per_second(self) -> float:
        return 1000 * self.network.batch / self.milliseconds

    @property
    def peak_memory(self) -> int | None:
        """Bytes of a call beyond weights and images; None where a graph sets its memory aside before."""
        return None if self.measurement is None or self.rival.graphs else self.measurement.peak_memory


def layers_of(network: Network) -> list[roofline.Layer]:
    return roofline.conv_layers(network.depth, network.output_stride, network.size, network.batch, network.num_classes)


def floor_milliseconds(network: Network, device: torch.device) -> float | None:
    """Of a batch, the same whichever rival is asked about; None in 32 bits and where the GPU is not known."""
    gpu = roofline.known_gpu(device_name(device))
    return None if gpu is None or network.dtype == torch.float32 else _floor_on(gpu, network)


@lru_cache
def _floor_on(gpu: roofline.GPU, network: Network) -> float:
    return sum(roofline.network_floor(PLAN, layers_of(network), gpu).values())


def results_table(results: Sequence[Result], device: torch.device) -> "Table":
    """A row per rival, with its share of the floor where the GPU is known.

    The last column is how many times as fast as the best rival it is.
    """
    from rich.table import Table

    best, floor = best_rival(results), floor_milliseconds(results[0].network, device)
    title = (
        "" if device.type == "cuda" else "Times of a CPU depend on what else it does: compare them in this table only."
    )
    table = Table(title=title, title_justify="left")
    table.add_column("rival")
    shares = ["share of floor"] if floor else []
    for name in ("images/s", "ms per batch (p20 to p80)", *shares, "peak MB", "against the best rival"):
        table.add_column(name, justify="right")
    for result in results:
        if (found := result.measurement) is None:
            table.add_row(result.rival.name, "", "not measured")
            continue
        memory = "" if result.peak_memory is None else f"{result.peak_memory / 1e6:.0f}"
        table.add_row(
            result.rival.name,
            f"{result.images_per_second:.4g}",
            f"{found.p50:.2f} ({found.p20:.2f} to {found.p80:.2f})",
            *([f"{floor / found.p50:.2f}"] if floor else []),
            memory,
            f"{best.milliseconds / result.milliseconds:.2f}" if best else "",
        )
    return table


def check_chart(path: Path) -> None:
    """Look whether a chart can be drawn into a file, before anything is measured.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no such folder, or no such kind of picture.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ImportError("a chart needs the package matplotlib: pip install 'fastdeeplab[plots]'") from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise ValueError(f"a chart's name ends in one of .{', .'.join(sorted(kinds))}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}")


def draw_chart(results: Sequence[Result], device: torch.device, path: Path) -> None:
    """A bar for each rival that was measured: its images per second, with a line from p80 to p20.

    The floor is marked where the GPU is known. On a CPU it is the speed by that of the best rival, since images per
    second mean nothing elsewhere.
    """
    from matplotlib.figure import Figure

    measured = [(result.rival, result.measurement) for result in results if result.measurement]
    if not measured:
        return
    network, best = results[0].network, best_rival(results)
    unit, label = 1000.0 * network.batch, "images per second"
    if device.type != "cuda" and best is not None:
        unit, label = best.milliseconds, f"speed / {best.rival.name}"
    speeds = [unit / found.p50 for _, found in measured]
    slower = [unit / found.p50 - unit / found.p80 for _, found in measured]
    faster = [unit / found.p20 - unit / found.p50 for _, found in measured]

    figure = Figure(figsize=(8, 1.3 + 0.4 * len(measured)), layout="constrained")
    axes = figure.add_subplot()
    colors = ["tab:green" if rival.ours else "tab:gray" for rival, _ in measured]
    bars = axes.barh([rival.name for rival, _ in measured], speeds, xerr=[slower, faster], color=colors)
    axes.bar_label(bars, fmt="%.4g", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    axes.set_title(f"{network} in {short_name(network.dtype)} on {device_name(device)}", fontsize="medium")
    if floor := floor_milliseconds(network, device):
        axes.axvline(unit / floor, color="black", linestyle="--", label="floor")
        axes.legend()
    with replace_when_complete(path) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=120)


def best_rival(results: Sequence[Result]) -> Result | None:
    """The fastest that is not ours."""
    others = (result for result in results if result.measurement and not result.rival.ours)
    return min(others, key=lambda result: result.milliseconds, default=None)


def summary(results: Sequence[Result]) -> str:
    """How many times as fast as each rival the fastest of ours is."""
    ours = [result for result in results if result.measurement and result.rival.ours]
    others = [result for result in results if result.measurement and not result.rival.ours]
    if not ours or not others:
        return "nothing to compare"
    fastest = min(ours, key=lambda result: result.milliseconds)
    ratios = (f"{other.milliseconds / fastest.milliseconds:.2f} times {other.rival.name}" for other in others)
    return f"the speed of {fastest.rival.name} is {', '.join(ratios)}"


class Rows:
    """A CSV file with a row per result.

    Raises:
        ValueError: the file exists and has other columns, or ends in half a row.
        OSError: it can't be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("a+", newline="") as file:
            file.seek(0)
            text = file.read()
        if text and text.splitlines()[0] != ",".join(COLUMNS):
            raise ValueError(f"{path} has other columns: name another file")
        if text and not text.endswith("\n"):
            raise ValueError(f"{path} ends in the middle of a row: remove it")

    def append(self, result: Result, device: torch.device) -> None:
        found = result.measurement
        times = ["", "", "", "", "", "", ""]
        if found:
            memory = "" if result.peak_memory is None else result.peak_memory
            floor = floor_milliseconds(result.network, device)
            share = floor / found.p50 if floor else ""
            values = (found.p20, found.p50, found.p80, result.images_per_second, share, memory, found.error)
            times = list(map(str, values))
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                writer.writerow(COLUMNS)
            writer.writerow([
                fastdeeplab.__version__, device_name(device), torch.__version__, _triton_version(),
                result.network, result.rival.name, short_name(result.rival.dtype), *times, result.reason,
            ])  # fmt: skip


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a CPU with {torch.get_num_threads()} threads"


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""
