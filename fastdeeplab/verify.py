"""Check this installation on this machine: every implementation of every function, every tile choice, the network.

Everything is compared with fp64: a function with ``fastdeeplab.kernels.reference``, the network with PyTorch's own
layers, one by one. What can't run here is listed with the reason. On a GPU the choices of a kernel are compiled side by
side, then compared one after another.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch

from fastdeeplab import kernels
from fastdeeplab.kernels.candidates import TILES, Gpu
from fastdeeplab.kernels.choice import CONVOLUTIONS, DTYPES
from fastdeeplab.kernels.tuning import tile_choices
from fastdeeplab.speed.rivals import short_name
from fastdeeplab.verification.convolutions import convolution_subjects, verified_layers
from fastdeeplab.verification.network import network_subjects
from fastdeeplab.verification.subjects import (
    FAILED,
    NOT_RUN,
    OK,
    WRONG,
    CanNotRunError,
    Check,
    Subject,
    Trial,
    why_no_kernels,
)
from fastdeeplab.verification.tail import argmax_subjects, loss_subjects

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def verify(device: torch.device, *, quick: bool = False) -> Iterator[Check]:
    """Compare all that can run on a device with fp64.

    Args:
        device: a CUDA GPU; or a CPU, where kernels run only in Triton's interpreter (``TRITON_INTERPRET=1``).
        quick: fewer shapes, each tile choice on one of them and without splits, and the network in fp16 only.

    Yields:
        A check after the other, as they are done. What raises is "failed"; after an error that leaves the GPU unusable
        the rest is "not run".

    Raises:
        ValueError: the device is of another type.
    """
    for subject in _subjects(device, quick):
        yield from _checks(subject, device)


def run_verify(console: "Console", device: torch.device, *, quick: bool = False) -> bool:
    """Verify with a progress bar on stderr, print a table, and return whether nothing was wrong or failed.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA GPU.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    subjects = _subjects(device, quick)
    checks: list[Check] = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(subjects))
        for subject in subjects:
            progress.update(task, description=subject.function)
            checks += _checks(subject, device)
            progress.advance(task)
    console.print(_table(checks, device))
    bad, not_run = sum(check.bad for check in checks), sum(check.verdict.startswith(NOT_RUN) for check in checks)
    console.print(f"{len(checks) - bad - not_run} right, {bad} wrong or failed, {not_run} could not run")
    return bad == 0


def _subjects(device: torch.device, quick: bool) -> list[Subject]:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA GPU, got {device}")
    return [
        *argmax_subjects(device, quick),
        *loss_subjects(device, quick),
        *convolution_subjects(device, quick),
        *network_subjects(device, quick),
        *_obstacles(device),
    ]


def _checks(subject: Subject, device: torch.device) -> Iterator[Check]:
    unusable = _why_unusable(device)
    if unusable:
        yield subject.check("", "", NOT_RUN + unusable, math.nan, math.nan)
        return
    try:
        trials = subject.trials()
    except Exception as error:
        yield subject.check("", "", _verdict(error), math.nan, math.nan)
        return
    ours = [trial for trial in trials if trial.implementation == "triton"]
    if device.type == "cuda" and ours:
        _compile(ours)
        if unusable := _why_unusable(device):
            yield subject.check("triton", f"one of {len(ours)}", FAILED + unusable, math.nan, math.nan)
            return
    for trial in trials:
        found, verdict = math.nan, NOT_RUN + unusable
        if not unusable:
            try:
                found = trial.error()
                verdict = OK if found <= trial.limit else WRONG  # NaN is wrong, too
            except Exception as error:  # a compiler's, a launch's
                verdict, unusable = _verdict(error), _why_unusable(device)
        yield subject.check(trial.implementation, trial.choice, verdict, found, trial.limit)


def _compile(trials: Sequence[Trial]) -> None:
    """Run all once, side by side, for what they compile. What fails will fail again when it is compared."""

    def run(trial: Trial) -> None:
        with suppress(Exception):
            trial.error()

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, trials))


def _why_unusable(device: torch.device) -> str:
    """Empty unless a kernel has left the GPU in a state in which no call succeeds."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        return f"the GPU is unusable after an error: {_first_line(error)}"
    return ""


def _verdict(error: Exception) -> str:
    """Too little memory says nothing about the result."""
    can_not_run = isinstance(error, CanNotRunError | torch.OutOfMemoryError)
    return (NOT_RUN if can_not_run else FAILED) + _first_line(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _obstacles(device: torch.device) -> Iterator[Subject]:
    """A line for each function whose kernel can't run, and for each kernel that has no tile choice for this GPU."""

    def can_not_run(why: str) -> list[Trial]:
        raise CanNotRunError(why)

    dtypes: dict[str, list[torch.dtype]] = {}
    for dtype in DTYPES:
        if why := why_no_kernels(device, dtype):
            dtypes.setdefault(why, []).append(dtype)
    for why, those in dtypes.items():
        for function in kernels.FUNCTIONS:
            yield Subject(function, "the Triton kernel", ", ".join(map(short_name, those)), partial(can_not_run, why))

    able = [dtype for dtype in DTYPES if not why_no_kernels(device, dtype)]
    if able:
        gpu = Gpu.of(device)
        listed = {
            tile.kernel
            for dtype in able
            for layer in verified_layers(device, dtype)
            for tile in tile_choices(layer, device, wasteful=True)
        }
        for kernel in sorted({row[1].kernel for row in TILES} - listed):
            why = "it has no tile choice for {}, compute capability {}.{}".format(gpu.name, *gpu.capability)
            yield Subject(CONVOLUTIONS[0], f"the kernel {kernel}", "", partial(can_not_run, why))


def _table(checks: Sequence[Check], device: torch.device) -> "Table":
    """A line for each check that is bad, and one for all choices of an implementation that have the same verdict."""
    from rich.table import Table
    from rich.text import Text

    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    table = Table(title=f"compared with fp64 on {place}, torch {torch.__version__}", title_justify="left")
    for name in ("compared", "dtype", "runs", "choice", "error", "limit", "verdict"):
        table.add_column(name, justify="right" if name in ("error", "limit") else "left", overflow="fold")
    for function in (*kernels.FUNCTIONS, "network"):
        lines: dict[Check, list[Check]] = {}
        for check in checks:
            if check.function == function:
                lines.setdefault(check if check.bad else check._replace(choice="", error=0.0), []).append(check)
        table.add_section()
        table.add_row(function, style="bold")
        for line, those in lines.items():
            choice = those[0].choice if len(those) == 1 else f"{len(those)} choices"
            error = max(check.error for check in those)
            numbers = ["" if math.isnan(number) else f"{number:.2g}" for number in (error, line.limit)]
            cells = [line.what, line.dtype, line.implementation, choice, *numbers, line.verdict]
            table.add_row(*map(Text, cells), style="red" if line.bad else None)
    return table
