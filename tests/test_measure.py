"""Nothing is timed before it has been compared; times and peaks are those of known calls."""

import contextlib
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from fastdeeplab.kernels import measure as measuring
from fastdeeplab.kernels.measure import MAX_REPEATS, MIN_REPEATS, WrongResultError, measure, peak_memory, relative_error
from torch import Tensor

MIB = 1 << 20

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
    ),
]


class FakeTimer:
    """Calls the function, and says that it took the next of the given milliseconds, the last one for ever."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)
        self.calls = 0

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        self.calls += 1
        return self.times.pop(0) if len(self.times) > 1 else self.times[0]


def double(x: Tensor) -> Tensor:
    return 2 * x


def set_clock(monkeypatch: pytest.MonkeyPatch, milliseconds: float) -> None:
    """The three calls that set the number of repeats take so long each, on the wall."""
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=iter([0.0, 3e-3 * milliseconds]).__next__))


def test_percentiles_are_those_of_the_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 50.0)
    warm_up = [50.0, 50.0, 50.0]  # sets the number of repeats: 0.5 s of 50 ms
    timer = FakeTimer(*warm_up, *(float(n) for n in range(10)))
    found = measure(double, [torch.ones(3)], double, 0.0, seconds=0.5, timer=timer)
    assert (found.repeats, timer.calls) == (10, 13)
    assert (found.p20, found.p50, found.p80) == pytest.approx((1.8, 4.5, 7.2))


@pytest.mark.parametrize(
    ("milliseconds", "on_the_wall", "repeats"),
    [(1e4, 1e4, MIN_REPEATS), (10.0, 1.0, 50), (0.1, 10.0, 50), (1e-4, 1e-4, MAX_REPEATS), (0.0, 0.0, MAX_REPEATS)],
)
def test_repeats_fill_the_time_within_limits(
    milliseconds: float, on_the_wall: float, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call's own, or that on the wall where it is longer."""
    set_clock(monkeypatch, on_the_wall)
    found = measure(double, [torch.ones(3)], double, 0.0, seconds=0.5, timer=FakeTimer(milliseconds))
    assert found.repeats == repeats


@pytest.mark.parametrize(
    "wrong", [lambda x: 2.1 * x, lambda x: x * math.nan, lambda x: 2 * x[:2], lambda x: 2 * x[None], lambda x: (2 * x,)]
)
def test_a_wrong_result_is_never_timed(wrong: Callable[[Tensor], Tensor]) -> None:
    timer = FakeTimer(1.0)
    with pytest.raises(WrongResultError, match="is not timed: its error is"):
        measure(wrong, [torch.ones(3)], double, 0.01, timer=timer)
    assert timer.calls == 0


def test_a_small_error_is_reported() -> None:
    found = measure(lambda x: 2.002 * x, [torch.ones(3)], double, 0.01, timer=FakeTimer(1.0))
    assert found.error == pytest.approx(0.001, rel=1e-3)


def test_no_tensor_to_tell_the_device_is_an_error() -> None:
    with pytest.raises(ValueError, match="inputs must hold a tensor, got"):
        measure(abs, [3], abs, 0.0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_longer_call_takes_longer(device: str) -> None:
    def product(x: Tensor) -> Tensor:
        return x @ x

    small, large = torch.randn(64, 64, device=device), torch.randn(1024, 1024, device=device)
    quick = measure(product, [small], product, 0.0, seconds=0.02)
    slow = measure(product, [large], product, 0.0, seconds=0.02)
    assert 0 < quick.p20 <= quick.p50 <= quick.p80
    assert slow.p20 > quick.p80


@pytest.mark.parametrize("device", DEVICES)
def test_peak_memory_counts_results_and_temporaries(device: str) -> None:
    x = torch.zeros(MIB // 4, device=device)  # 1 MiB

    def chain() -> Tensor:
        y = x.exp() + 1  # two are alive at a time here
        return torch.cat([y, y, y])  # and four here

    def inside_an_operator() -> Tensor:
        target = torch.zeros(1, 256, 256, dtype=torch.int64, device=device)
        return torch.nn.functional.cross_entropy(x.view(1, 4, 256, 256), target)

    if device == "cuda":
        torch.cuda.empty_cache()  # a cached block is not split for the sake of its last MiB, and counts as a whole
    assert peak_memory(lambda: None, x.device) == 0
    assert peak_memory(lambda: x.view(-1), x.device) == 0
    assert peak_memory(chain, x.device) == pytest.approx(4 * MIB, abs=4096)
    # 512 KiB of targets, and the log-probabilities that only the operator itself sees
    assert peak_memory(inside_an_operator, x.device) == pytest.approx(1.5 * MIB, abs=4096)
    assert measure(torch.exp, [x], torch.exp, 0.0, seconds=0.01).peak_memory == pytest.approx(MIB, abs=4096)


def test_peak_memory_sees_what_autograd_frees() -> None:
    x = torch.zeros(MIB // 4, requires_grad=True)

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(x.exp().exp().sum(), x)

    # Two saved exponentials and a gradient; the second exponential is gone when the second gradient is made.
    assert peak_memory(forward_and_backward, x.device) == pytest.approx(3 * MIB, abs=4096)


def test_device_timing_reads_the_l2_cold_and_hides_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for ``torch.cuda``: a clock that runs 1 ms per read of the buffer and 7 ms per call."""
    log, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")
            self.time = now[0]

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return end.time - self.time

    class Buffer:
        def __init__(self, elements: int, device: object) -> None:
            assert elements * 4 == 4 * (50 << 20)  # fp32, four times the L2

        def sum(self) -> None:
            log.append("read")
            now[0] += 1

    def call() -> None:
        log.append("call")
        now[0] += 7

    monkeypatch.setattr(torch, "zeros", Buffer)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 << 20))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(measuring, "wall_clock", lambda call: 1.4)  # the host takes 1.4 ms to launch the call
    timer = measuring._DeviceTimer(torch.device("cuda", 0), call)
    log.clear()
    assert timer(call) == 7
    # The host is at most 1.4 ms behind when the GPU has at least twice that to do.
    assert log == ["read"] * 4 + ["event", "call", "event", "wait"]


def test_relative_error_of_several_tensors_is_the_largest() -> None:
    one, two = torch.ones(4), 2 * torch.ones(4)
    assert relative_error([one, 1.1 * two], [one, two]) == pytest.approx(0.1, rel=1e-5)
    assert math.isnan(relative_error([one, one * math.nan], [one, one]))
    assert math.isnan(relative_error([one * math.nan, one], [one, one]))
    assert relative_error([one], [one, one]) == math.inf
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
