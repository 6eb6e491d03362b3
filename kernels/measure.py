"""How long a call takes, how much memory, how far off its result: compared first, then timed.

``measure`` is the only way in. It times nothing whose result it has not just compared with a reference.

On a GPU a call is timed with device events. Before each one a buffer of four times the L2's size is read, so the call
finds the L2 cold; read, because writing would leave lines to be written back during the call. These reads also keep the
GPU busy for longer than the host needs to launch the call, so that the gaps between launches are not counted. On a CPU
the wall clock times the call.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]

MIN_REPEATS, MAX_REPEATS = 10, 1000
WARM_UP_CALLS = 3


class WrongResultError(RuntimeError):
    """A candidate's result is too far from the reference, so that its time would mean nothing."""


@dataclass(frozen=True)
class Measurement:
    p20: float  # milliseconds
    p50: float
    p80: float
    repeats: int
    peak_memory: int  # bytes at the worst moment of a call, beyond those before it; the result is among them
    error: float  # what `error` said of the result


def relative_error(actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """``||actual - expected|| / ||expected||`` in fp64, the largest of several tensors; inf where shapes differ."""
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        if actual.shape != expected.shape:
            return math.inf
        difference = float((actual.double() - expected.double()).norm())
        scale = float(expected.double().norm())
        return difference / scale if scale else difference
    if isinstance(actual, Tensor) or isinstance(expected, Tensor) or len(actual) != len(expected):
        return math.inf
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of two elements, in fp64, over the largest magnitude expected; inf where shapes differ.

    Unlike ``relative_error`` it shows a single wrong element among millions.
    """
    if actual.shape != expected.shape:
        return math.inf
    difference = float((actual.double() - expected.double()).abs().max())
    scale = float(expected.double().abs().max())
    return difference / scale if scale else difference


def measure(
    candidate: Callable[..., Any],
    inputs: Sequence[Any],
    reference: Callable[..., Any],
    tolerance: float,
    *,
    error: Callable[[Any, Any], float] = relative_error,
    seconds: float = 0.2,
    timer: Callable[[Call], float] | None = None,
) -> Measurement:
    """Compare ``candidate(*inputs)`` with ``reference(*inputs)``, then time it and take its peak memory.

    Args:
        candidate: the function to measure. It does not change its inputs, and waits for the GPU nowhere.
        inputs: its arguments; the device of the first tensor among them is the device that is timed.
        reference: called with the same inputs.
        tolerance: the largest error at which the candidate is timed.
        error: of (candidate's result, reference's result).
        seconds: about how long to repeat the call; between 10 and 1000 repeats.
        timer: gives the milliseconds of one call; by default device events on a GPU, the wall clock on a CPU.

    Raises:
        ValueError: there is no tensor among the inputs, and no timer.
        WrongResultError: the error is above the tolerance, or NaN. Nothing has been timed.
    """
    device = _device(inputs)
    actual = candidate(*inputs)
    expected = reference(*inputs)
    found = error(actual, expected)
    if not found <= tolerance:  # NaN fails, too
        name = getattr(candidate, "__name__", repr(candidate))
        raise WrongResultError(f"{name} is not timed: its error is {found:.3g}, at most {tolerance:.3g} is allowed")
    del actual, expected

    def call() -> Any:
        return candidate(*inputs)

    for _ in range(WARM_UP_CALLS):
        call()
    peak = peak_memory(call, device)
    if timer is None:
        timer = _DeviceTimer(device, call) if device.type == "cuda" else wall_clock
    start = time.perf_counter()
    estimate = statistics.median(timer(call) for _ in range(3))
    estimate = max(estimate, 1000 * (time.perf_counter() - start) / 3)  # a GPU's cold caches take longer than a call
    repeats = min(max(int(1000 * seconds / max(estimate, 1e-6)), MIN_REPEATS), MAX_REPEATS)
    p20, p50, p80 = percentiles([timer(call) for _ in range(repeats)])
    return Measurement(p20, p50, p80, repeats, peak, found)


def peak_memory(call: Call, device: torch.device) -> int:
    """The most bytes that a call holds at any moment beyond those held before it, its result included.

    On a GPU as PyTorch's caching allocator counts them, in blocks of 512 bytes. On a CPU from the allocations and frees
    that PyTorch's profiler records, which include those inside operators and compiled code.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _device(inputs: Sequence[Any]) -> torch.device:
    for value in inputs:
        if isinstance(value, Tensor):
            return value.device
    raise ValueError(f"inputs must hold a tensor, got {[type(value).__name__ for value in inputs]}")


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN measure which of its algorithms is the fastest; whatever else is set for it stays."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return p20, statistics.median(times), p80


def wall_clock(call: Call) -> float:
    """Milliseconds of a call on a CPU."""
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


class _DeviceTimer:
    """Milliseconds between two events round a call, on the current stream, with a cold L2."""

    def __init__(self, device: torch.device, call: Call) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.zeros(4 * cache // 4, device=device)  # fp32
        torch.cuda.synchronize(device)
        launching = wall_clock(call)
        torch.cuda.synchronize(device)
        self.reads = 1
        reading = statistics.median(self(lambda: self.buffer.sum()) for _ in range(5))
        self.reads += math.ceil(2 * launching / reading)

    def __call__(self, call: Call) -> float:
        with torch.cuda.device(self.device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(self.reads):
                self.buffer.sum()
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)
