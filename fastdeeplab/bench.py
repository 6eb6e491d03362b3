"""How many images per second a network segments: fastdeeplab and its rivals, in one process, from images to masks.

All have the same random weights and the same normalised images. A mask is compared with that of the network in fp64
before its rival is timed. On a GPU a rival is timed until its mask is there, gaps between launches included. On a CPU
the rivals take turns, so that a busy machine slows all of them: only ratios mean something.
"""

import csv
import gc
import importlib.metadata
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdeeplab
from fastdeeplab import kernels, roofline
from fastdeeplab.accelerate import AcceleratedModel, accelerate
from fastdeeplab.atomic import replace_when_complete
from fastdeeplab.explanation import names_of_calls
from fastdeeplab.kernels.candidates import Layer, Tail
from fastdeeplab.kernels.measure import (
    Call,
    Measurement,
    cudnn_benchmark,
    measure,
    peak_memory,
    percentiles,
    wall_clock,
)
from fastdeeplab.rivals import Network, Oracle, Predict, Rival, one_line, rivals_of, short_name, torchvision_obstacle

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Progress = Callable[[str, float], None]  # what is being done, and the share of all that is done before it

MIN_ROUNDS, MAX_ROUNDS = 5, 100
QUICK_SIZE = {"cpu": (256, 256), "cuda": (512, 512)}
QUICK_SECONDS = 2.0
QUICK_LIMIT = 90.0  # seconds after which no round begins, so that a busy machine takes less than two minutes, too
BYTES_PER_PIXEL = 8000  # of an image, more than PyTorch's layers hold in fp32 at output stride 8


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


def _no_progress(what: str, share: float) -> None:
    pass


def bench(
    network: Network,
    device: torch.device,
    *,
    rivals: Sequence[Rival] | None = None,
    seconds: float = 2.0,
    limit: float = math.inf,
    tune: bool = False,
    progress: Progress = _no_progress,
) -> Iterator[Result]:
    """Compare and time ``predict`` of a network and its rivals.

    A rival that fails, for lack of memory too, or makes another mask, gives a result with the reason; the rest go on,
    as they do where there is no memory for tuning, which is warned of. On a GPU each result
    comes when it is measured, on a CPU they come together at the end: stopped by Ctrl-C before that, those that have
    been timed at least twice come, and then the KeyboardInterrupt.

    Args:
        network: what to measure.
        device: where.
        rivals: by default ``rivals_of(network, device)``.
        seconds: about how long to repeat each; at least 5 times on a CPU, 10 times on a GPU.
        limit: on a CPU, seconds after which no round begins but the first two; infinite by default.
        tune: whether to measure what each layer of ours runs before, on a GPU; see ``AcceleratedModel.tune``.
        progress: called before each step.

    Raises:
        ValueError: ``seconds`` is not a positive number, or the device is neither a CPU nor a GPU.
        RuntimeError: the network itself does not run, such as for lack of memory.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a positive number, got {seconds}")
    if device.type not in QUICK_SIZE:
        raise ValueError(f"device must be a CPU or an NVIDIA GPU, got {device}")
    rivals = rivals_of(network, device) if rivals is None else rivals
    until = time.monotonic() + limit
    with _on(device), _fastest_convolutions(device):
        progress("the network in fp64", 0)
        model, images = network.build(device), network.images(device)
        oracle = Oracle(model, images)
        if tune and device.type == "cuda":
            progress("tuning", 0)
            try:
                accelerate(model, dtype=network.dtype).tune(images)
            except torch.OutOfMemoryError as error:
                warnings.warn(f"{network} is not tuned: {one_line(error)}", RuntimeWarning, stacklevel=2)
        if device.type == "cuda":
            measured = _one_by_one(rivals, oracle, seconds, progress)
        else:
            measured = _in_turns(rivals, oracle, seconds, progress, until)
        for rival, found in measured:
            if isinstance(found, str):
                yield Result(network, rival, None, found)
            else:
                yield Result(network, rival, found)


Found = Iterator[tuple[Rival, Measurement | str]]  # or why there is none: an exception would hold a rival's memory


def _one_by_one(rivals: Sequence[Rival], oracle: Oracle, seconds: float, progress: Progress) -> Found:
    for number, rival in enumerate(rivals, start=1):
        progress(rival.name, number / (len(rivals) + 1))
        yield rival, _measure_alone(rival, oracle, seconds)
        gc.collect()  # a rival's memory, before the next one's
        torch.cuda.empty_cache()


def _measure_alone(rival: Rival, oracle: Oracle, seconds: float) -> Measurement | str:
    try:
        images = rival.images(oracle.images)
        predict = rival.build(oracle.model, images)

        def error(mask: Tensor, _: None) -> float:
            return oracle.check(mask, rival.dtype)

        return measure(predict, [images], lambda _: None, math.inf, error=error, seconds=seconds, timer=_until_the_end)
    except Exception as failed:  # a compiler's, too little memory, a wrong mask
        return one_line(failed)


def _until_the_end(call: Call) -> float:
    """Milliseconds from an idle GPU to the end of a call. A network's weights and maps need no L2 to be emptied."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _in_turns(rivals: Sequence[Rival], oracle: Oracle, seconds: float, progress: Progress, until: float) -> Found:
    """Every rival once in each round, another one first in each."""
    steps = len(rivals) + 1 + MIN_ROUNDS
    calls: dict[Rival, Call] = {}
    errors, peaks, estimates = (dict.fromkeys(rivals, 0.0) for _ in range(3))
    for number, rival in enumerate(rivals, start=1):
        progress(f"{rival.name}: the mask", number / steps)
        try:
            images = rival.images(oracle.images)
            call = _bind(rival.build(oracle.model, images), images)
            errors[rival] = oracle.check(call(), rival.dtype)
            peaks[rival] = peak_memory(call, oracle.images.device)
            estimates[rival] = wall_clock(call)
            calls[rival] = call
        except Exception as failed:
            yield rival, one_line(failed)

    times: dict[Rival, list[float]] = {rival: [] for rival in calls}
    rounds = _rounds(sum(estimates.values()), seconds * len(calls))
    stopped: KeyboardInterrupt | None = None
    try:
        for number in range(rounds):
            if number >= 2 and time.monotonic() >= until:
                break
            progress(f"round {number + 1} of {rounds}", (len(rivals) + 1 + MIN_ROUNDS * number / rounds) / steps)
            order = [*calls][number % len(calls) :] + [*calls][: number % len(calls)] if calls else []
            for rival in order:
                try:
                    times[rival].append(wall_clock(calls[rival]))
                except Exception as failed:  # such as memory that another program has taken
                    del calls[rival], times[rival]
                    yield rival, one_line(failed)
    except KeyboardInterrupt as interrupt:
        stopped = interrupt
    for rival, found in times.items():
        if len(found) >= 2:
            p20, p50, p80 = percentiles(found)
            yield rival, Measurement(p20, p50, p80, len(found), int(peaks[rival]), errors[rival])
    if stopped:
        raise stopped


def _bind(predict: Predict, images: Tensor) -> Call:
    return lambda: predict(images)


def _rounds(round_milliseconds: float, seconds: float) -> int:
    """How many fit into a time, within bounds; none if there is nothing to time."""
    if not round_milliseconds:
        return 0
    return min(max(int(1000 * seconds / round_milliseconds), MIN_ROUNDS), MAX_ROUNDS)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _fastest_convolutions(device: torch.device) -> Iterator[None]:
    """cuDNN's best algorithms, in TF32 where the numbers are fp32, for every rival."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    convolutions = cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "tf32"
    try:
        with cudnn_benchmark():
            yield
    finally:
        convolutions.fp32_precision = before


# The breakdown


@dataclass(frozen=True)
class Part:
    """An operation of ``predict``."""

    module: str
    operation: str
    layer: Layer | Tail | None  # of a fused convolution, or of upsampling and argmax
    runs: str  # its implementation
    milliseconds: float  # the median


class _Stopwatch(TorchDispatchMode):
    """Times each operation that a call makes, not those inside; on a GPU by events."""

    def __init__(self, device: torch.device, decisions: Sequence[tuple[Any, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_gpu, self.decisions = device.type == "cuda", decisions
        self.operations: list[tuple[str, Layer | Tail | None, str]] = []
        self.moments: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.decisions)
        start = self._now()
        result = func(*args, **(kwargs or {}))
        self.moments.append((start, self._now()))
        layer, runs = None, "torch"
        if len(self.decisions) > before:
            layer, decision = self.decisions[-1]
            runs = decision.impl
        elif func.namespace == "fastdeeplab":
            runs = next((arg for arg in reversed(args) if isinstance(arg, str)), runs)
        self.operations.append((func.overloadpacket.__name__, layer, runs))
        return result

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> list[float]:
        if self.on_gpu:
            torch.cuda.synchronize()
            return [start.elapsed_time(end) for start, end in self.moments]
        return [1000 * (end - start) for start, end in self.moments]


def time_operations(fast: AcceleratedModel, images: Tensor, *, repeats: int = 10) -> list[Part]:
    """Time every operation of ``fast.predict(images)``, the median of some repeats, in the order in which they run.

    On a CPU convolutions run on weights that are not packed, as always while somebody watches.
    On a GPU it is kept busy until the host has launched all of them, so that no gap between launches is counted.
    """
    fast.predict(images)
    launching = 0.0
    runs = []
    with _on(images.device), _fastest_convolutions(images.device):
        for _ in range(repeats + 1):  # the first one warms up, and says how long launching takes
            if images.is_cuda:
                torch.cuda.synchronize()
                torch.cuda._sleep(int(2 * launching * 2e6))  # about two million cycles a millisecond
            start = time.perf_counter()
            with kernels.recording() as decisions, _Stopwatch(images.device, decisions) as stopwatch:
                with names_of_calls(fast, stopwatch.operations) as names:
                    fast.predict(images)
                launching = 1000 * (time.perf_counter() - start)
            runs.append(stopwatch.milliseconds())
    names += [""] * (len(stopwatch.operations) - len(names))  # of the model itself, at the end
    named = zip(names, stopwatch.operations, strict=True)
    medians = (statistics.median(times) for times in zip(*runs[1:], strict=True))
    return [
        Part(name, operation, layer, runs_as, median)
        for (name, (operation, layer, runs_as)), median in zip(named, medians, strict=True)
    ]


# The floor

PLAN = next(plan for plan in roofline.PLANS if plan.name == "planned + tap skip")  # what the kernels fuse and skip


def layers_of(network: Network) -> list[roofline.Layer]:
    return roofline.conv_layers(network.depth, network.output_stride, network.size, network.batch, network.num_classes)


def floor_milliseconds(network: Network, device: torch.device) -> float | None:
    """Of a batch, the same whichever rival is asked about; None in 32 bits and where the GPU is not known."""
    gpu = roofline.known_gpu(_device_name(device))
    return None if gpu is None or network.dtype == torch.float32 else _floor_on(gpu, network)


@lru_cache
def _floor_on(gpu: roofline.GPU, network: Network) -> float:
    return sum(roofline.network_floor(PLAN, layers_of(network), gpu).values())


# The command


COLUMNS = (
    "fastdeeplab", "device", "torch", "triton", "network", "rival", "dtype",
    "p20_ms", "p50_ms", "p80_ms", "images_per_second", "share_of_floor", "peak_memory_bytes", "error_fp64",
    "reason",
)  # fmt: skip


def quick_network(network: Network, device: torch.device) -> Network:
    """The same at a size and batch that take under two minutes: on a CPU one small image, on a GPU up to 8."""
    size = QUICK_SIZE[device.type]
    batch = 1
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        batch = max(min(8, free // (BYTES_PER_PIXEL * size[0] * size[1])), 1)
    return replace(network, size=size, batch=batch)


def run_bench(
    console: "Console",
    network: Network,
    device: torch.device,
    *,
    quick: bool = False,
    csv: Path | None = None,
    chart: Path | None = None,
    profile: bool = False,
    seconds: float = QUICK_SECONDS,
    rivals: Sequence[Rival] | None = None,
) -> list[Result]:
    """Measure a network and its rivals with a progress bar, and print a table and how long it took.

    Args:
        console: where to print.
        network: what to measure; ``quick`` changes its size and batch.
        device: where.
        quick: see ``quick_network`` and ``rivals_of``.
        csv: file that a row is appended to for each rival as soon as it is measured.
        chart: file for a bar of each rival's speed, such as ``bench.png``; needs matplotlib.
        profile: whether to print how long each operation of the accelerated model takes, too.
        seconds: about how long to repeat each.
        rivals: in place of ``rivals_of``.

    Raises:
        ValueError: an argument can't be used, or the file holds something else.
        OSError: the file can't be written.
        ImportError: a chart is asked for, and matplotlib is not installed.
        KeyboardInterrupt: after printing what was measured before it.
    """
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    network = quick_network(network, device) if quick else network
    rivals = rivals_of(network, device, quick=quick) if rivals is None else rivals
    rows = None if csv is None else _Rows(csv)
    if chart is not None:
        check_chart(chart)
    start = time.monotonic()
    console.print(f"{network} in {short_name(network.dtype)} on {_device_name(device)}")
    if (obstacle := torchvision_obstacle()) is not None:
        console.print(f"PyTorch's layers one by one stand for torchvision, which can't be imported: {obstacle}")

    results: list[Result] = []
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or PyTorch's profiler, which counts a CPU's memory, prints lines
    try:
        with Bar(BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
            task = bar.add_task("", total=1)

            def progress(what: str, share: float) -> None:
                bar.update(task, description=what, completed=share)

            limit = QUICK_LIMIT if quick else math.inf
            for result in bench(network, device, rivals=rivals, seconds=seconds, limit=limit, progress=progress):
                results.append(result)
                if rows:
                    rows.append(result, device)
            bar.update(task, description="done", completed=1)
    finally:
        if results:
            console.print(results_table(results, device))
            for result in results:
                if result.reason:
                    console.print(f"{result.rival.name}: {result.reason}")
            console.print(summary(results))
            if chart is not None:
                draw_chart(results, device, chart)
    if profile:
        fast = accelerate(network.build(device), dtype=network.dtype)
        console.print(profile_table(time_operations(fast, network.images(device))))
    console.print(f"done in {time.monotonic() - start:.0f} s")
    return results


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
    axes.set_title(f"{network} in {short_name(network.dtype)} on {_device_name(device)}", fontsize="medium")
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


def profile_table(parts: Sequence[Part]) -> "Table":
    """A row per fused convolution and per other operation that takes 1 % of the time or more."""
    from rich.table import Table

    title = (
        "each operation of fastdeeplab's predict(); on a CPU by weights that are not packed, as it runs when watched"
    )
    table = Table(title=title, title_justify="left")
    for name in ("module", "operation", "layer", "runs"):
        table.add_column(name)
    for name in ("us", "share"):
        table.add_column(name, justify="right")
    for part, share in parts_and_shares(parts):
        layer = "" if part.layer is None else str(part.layer)
        table.add_row(part.module, part.operation, layer, part.runs, f"{1000 * part.milliseconds:.1f}", f"{share:.1%}")
    return table


def parts_and_shares(parts: Sequence[Part]) -> Iterator[tuple[Part, float]]:
    """Each part and its share of all; those below 1 % that are no fused convolution come last, as one."""
    total = sum(part.milliseconds for part in parts)
    rest = 0.0
    for part in parts:
        share = part.milliseconds / total
        if part.layer is None and share < 0.01:
            rest += part.milliseconds
        else:
            yield part, share
    yield Part("", "the rest", None, "", rest), rest / total


class _Rows:
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
                fastdeeplab.__version__, _device_name(device), torch.__version__, _triton_version(),
                result.network, result.rival.name, short_name(result.rival.dtype), *times, result.reason,
            ])  # fmt: skip


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"a CPU with {torch.get_num_threads()} threads"


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""
