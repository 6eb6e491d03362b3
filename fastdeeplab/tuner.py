"""Measure, on the user's own GPU, which kernel or library call is the fastest for each layer of a network.

The layers are its convolutions and the tail, upsampling and argmax.
"""

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from fastdeeplab import kernels
from fastdeeplab.kernels import decisions, tail_tuning, tuning
from fastdeeplab.kernels.candidates import Gpu, Layer, Tail
from fastdeeplab.kernels.choice import kernels_are_off, why_not
from fastdeeplab.kernels.decisions import Measured
from fastdeeplab.kernels.tuning import Timer
from fastdeeplab.model import ResNetModel

MOST_SECONDS = 0.05  # of repeating one candidate
Progress = Callable[[int, int, str], None]  # layers done, layers in all, the one that comes


@dataclass(frozen=True)
class Row:
    """A layer of the network and the fastest of either kind for it."""

    measurement: Measured
    new: bool  # measured now, not at an earlier time

    @property
    def winner(self) -> str:
        return "kernel" if self.measurement.tile_us < self.measurement.form_us else "library"

    def cells(self) -> tuple[str, ...]:
        found = self.measurement
        when = "now" if self.new else "earlier"
        times = ("fails" if time == math.inf else f"{time:.1f}" for time in (found.tile_us, found.form_us))
        tile = "-" if found.tile is None else tuning.tile_name(found.tile)
        return str(found.layer), *times, self.winner, tile, found.form, when


@dataclass(frozen=True)
class Tuned:
    """What ``tune`` measured; ``str()`` of it is a table."""

    rows: tuple[Row, ...] = ()
    left: tuple[Layer | Tail, ...] = ()  # not measured, or not to the end: they stay predicted
    note: str = ""  # why there are no rows

    def __str__(self) -> str:
        if not self.rows and not self.left:
            return f"nothing to tune: {self.note}"
        header = ("layer", "kernel us", "library us", "faster", "tile", "library call", "measured")
        table = [header, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        lines += [f"not measured, stays predicted: {layer}" for layer in self.left]
        return "\n".join(line.rstrip() for line in lines)


@torch.no_grad()
def tune_network(
    model: nn.Module,
    images: Tensor,
    *,
    seconds: float = 60.0,
    again: bool = False,
    progress: Progress | None = None,
    timer: Timer | None = None,
) -> Tuned:
    """Measure the kernels in every tile choice and the library in every form, for each layer of a run on ``images``.

    The layers are those of ``predict``, with the tail, for a ``ResNetModel``, and else those of a call.
    Each is compared with PyTorch in fp64 before it is timed; what is wrong or fails is warned of and never chosen. The
    fastest decide from then on, in this process and, kept in the user's cache directory for this GPU, these versions of
    torch and triton and these shapes, in later ones. The layers with the most multiplications come first.

    Args:
        model: in eval mode. Its weights do not matter: random tensors are measured.
        images: what it takes, on the GPU.
        seconds: of measuring, shared by the candidates. No candidate begins after them: a layer that is not done then
            is left as it was. Compiling, as many candidates at a time as there are cores, comes on top. An interrupt
            keeps the layers that are done.
        again: whether to measure what was measured earlier, too.
        progress: called before each layer and at the end.
        timer: see ``fastdeeplab.kernels.measure.measure``.

    Returns:
        What is known now, with the names of the layers that are left; empty, with a note why, where no kernel can run,
        as on a CPU.

    Raises:
        ValueError: ``seconds`` is not a positive number, or what the model raises for the images.
        RuntimeError: the model is in training mode, or a candidate has left the GPU unusable.
    """
    if not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a positive number, got {seconds!r}")
    if model.training:
        raise RuntimeError("tuning needs the model in eval mode: call model.eval() first")
    with kernels.recording() as found:
        model.predict(images) if isinstance(model, ResNetModel) else model(images)
    if kernels_are_off():
        return Tuned(note="FASTDEEPLAB_KERNELS=torch")
    counts = Counter(layer for layer, _ in found)
    candidates = {layer: _count_candidates(layer, images.device) for layer in counts}
    layers = [layer for layer in counts if candidates[layer]]
    layers.sort(key=lambda layer: counts[layer] * _work(layer), reverse=True)
    if not layers:
        obstacles = (why_not(images.device, layer.dtype) for layer in counts)
        return Tuned(note=next(filter(None, obstacles), "a run on these images has no layer that a kernel serves"))

    known = {} if again else {layer: row for layer in layers if (row := _measured_earlier(layer, images.device))}
    rows, left, writable = [Row(row, new=False) for row in known.values()], [], True
    layers = [layer for layer in layers if layer not in known]
    for number, layer in enumerate(layers):
        if seconds <= 0:
            left += layers[number:]
            break
        if progress:
            progress(number, len(layers), str(layer))
        share = seconds / sum(candidates[later] for later in layers[number:])
        found_now, spent = _measure(layer, images.device, min(MOST_SECONDS, share), seconds, timer)
        seconds -= spent
        if found_now:
            writable = _keep(found_now, writable)
            rows.append(Row(found_now, new=True))
        else:
            left.append(layer)
    if progress:
        progress(len(layers) - len(left), len(layers), "done")
    return Tuned(tuple(rows), tuple(left))


def _count_candidates(layer: Layer | Tail, device: torch.device) -> int:
    """0 where no kernel runs, or there is no choice."""
    if isinstance(layer, Tail):
        return tail_tuning.candidates(layer, device)
    if why_not(device, layer.dtype) is not None:
        return 0
    count = len(tuning.tile_choices(layer, device)) + len(tuning.library_forms(layer, device))
    return count if count > 1 else 0


def _work(layer: Layer | Tail) -> int:
    """Multiplications."""
    if isinstance(layer, Tail):
        return 2 * layer.N * layer.K * layer.H * layer.W
    return layer.pixels * layer.C * layer.C_out * math.prod(layer.kernel) * len(layer.dilations)


def _measured_earlier(layer: Layer | Tail, device: torch.device) -> Measured | None:
    """On this machine, with the versions at hand."""
    gpu = Gpu.of(device)
    row = decisions.measured_here(gpu.name, gpu.capability).get(layer)
    return row if row and decisions.usable(row, gpu.capability) else None


def _measure(
    layer: Layer | Tail, device: torch.device, share: float, seconds: float, timer: Timer | None
) -> tuple[Measured | None, float]:
    """The fastest candidates, and the seconds that it took, of which compiling is none.

    None if time or memory is too small, or all are wrong.

    Args:
        share: seconds of repeating each candidate.
        seconds: after which no candidate begins.
    """
    start = perf_counter()
    found: Measured | None = None
    with torch.autocast(device.type, enabled=False):
        try:
            if isinstance(layer, Tail):
                tail_tuning.compile_strips(layer, device)
                start = perf_counter()
                found = tail_tuning.tune_tail(layer, device, seconds=share, until=start + seconds, timer=timer)
            else:
                tuning.compile_choices(layer, device)
                start = perf_counter()
                times = tuning.tune(layer, device, seconds=share, until=start + seconds, timer=timer)
                if len(times.tiles) + len(times.forms) == _count_candidates(layer, device):
                    found = tuning.fastest(layer, device, times)
        except torch.OutOfMemoryError as error:
            warnings.warn(f"{layer} is not measured: {error}", RuntimeWarning, stacklevel=3)
    return found, perf_counter() - start


def _keep(measurement: Measured, writable: bool) -> bool:
    """Let it decide from now on, and write it if the user's table is still ``writable``; whether it is then."""
    decisions.remember(measurement)
    if not writable:
        return False
    try:
        decisions.store(measurement)
    except OSError as error:
        folder = decisions.table_folder(measurement.gpu, measurement.capability)
        text = f"measurements can't be kept in {folder} and hold in this process alone: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        return False
    return True


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """A progress bar on stderr by rich, plain lines where it is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar
    except ImportError:

        def line(done: int, total: int, text: str) -> None:
            print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)

        yield line
        return
    columns = TextColumn("tuning"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False)
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", visible=False)  # until there is something to tune
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text, visible=True)
