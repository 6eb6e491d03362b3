"""How long each operation of ``predict`` takes."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdeeplab import kernels
from fastdeeplab.accelerate import AcceleratedModel
from fastdeeplab.explanation import names_of_calls
from fastdeeplab.kernels.candidates import Layer, Tail
from fastdeeplab.speed.rivals import measuring_on

if TYPE_CHECKING:
    from rich.table import Table


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
    with measuring_on(images.device):
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
