"""How many images per second a network segments: fastdeeplab and its rivals, in one process, from images to masks.

All have the same random weights and the same normalised images. A mask is compared with that of the network in fp64
before its rival is timed. On a GPU a rival is timed until its mask is there, gaps between launches included. On a CPU
the rivals take turns, so that a busy machine slows all of them: only ratios mean something.
"""

import gc
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdeeplab.accelerate import accelerate
from fastdeeplab.kernels.measure import Call, Measurement, measure, peak_memory, percentiles, wall_clock
from fastdeeplab.speed.breakdown import profile_table, time_operations
from fastdeeplab.speed.results import Result, Rows, check_chart, device_name, draw_chart, results_table, summary
from fastdeeplab.speed.rivals import (
    Network,
    Oracle,
    Predict,
    Rival,
    measuring_on,
    one_line,
    rivals_of,
    short_name,
    torchvision_obstacle,
)

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, float], None]  # what is being done, and the share of all that is done before it

MIN_ROUNDS, MAX_ROUNDS = 5, 100
QUICK_SIZE = {"cpu": (256, 256), "cuda": (512, 512)}
QUICK_SECONDS = 2.0
QUICK_LIMIT = 90.0  # seconds after which no round begins, so that a busy machine takes less than two minutes, too
BYTES_PER_PIXEL = 8000  # of an image, more than PyTorch's layers hold in fp32 at output stride 8


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
    with measuring_on(device):
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
    rows = None if csv is None else Rows(csv)
    if chart is not None:
        check_chart(chart)
    start = time.monotonic()
    console.print(f"{network} in {short_name(network.dtype)} on {device_name(device)}")
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
