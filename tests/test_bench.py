"""Masks are compared before anything is timed, a failing rival leaves the rest alone, a stopped run keeps its rows."""

import csv
import gc
import math
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_rivals import CPU, GPU, NETWORK, Small, changed, failing, live, result
from torch import Tensor

import fastdeeplab as fdl
from fastdeeplab import bench as bench_module
from fastdeeplab.bench import bench, quick_network, run_bench
from fastdeeplab.speed import rivals as rivals_module
from fastdeeplab.speed.breakdown import time_operations
from fastdeeplab.speed.results import COLUMNS, Result
from fastdeeplab.speed.rivals import Network, Oracle, Rival, rivals_of


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_seconds_are_a_positive_number(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds must be a positive number"):
        next(bench(NETWORK, CPU, rivals=[live()], seconds=seconds))


def test_a_device_that_is_neither() -> None:
    with pytest.raises(ValueError, match="device must be a CPU or an NVIDIA GPU, got meta"):
        next(bench(NETWORK, torch.device("meta"), rivals=[live()]))


def test_every_rival_of_a_cpu_is_measured() -> None:
    """Where torchvision has no such network, and without the compiled one."""
    rivals = [rival for rival in rivals_of(NETWORK, CPU, quick=True) if not rival.name.startswith("torchvision")]
    found = list(bench(NETWORK, CPU, rivals=[live(), *rivals], seconds=0.01))
    assert [each.rival.name for each in found] == ["live", "ResNetModel", "fastdeeplab"]
    for each in found:
        assert each.measurement is not None, each.reason
        assert 0 < each.measurement.p20 <= each.measurement.p50 <= each.measurement.p80
        assert each.measurement.repeats >= 5
        assert each.measurement.error < 1e-4
        assert each.peak_memory is not None
        assert each.peak_memory > 2 * 33 * 33 * 8  # the mask
        assert each.images_per_second == pytest.approx(2000 / each.milliseconds)


def test_low_precision_is_given_its_rounding_and_no_more() -> None:
    """The same network in bf16 passes as bf16, and not as fp32."""

    def build(model: fdl.ResNetModel, _: Tensor) -> Callable[[Tensor], Tensor]:
        fast = fdl.accelerate(model, dtype=torch.bfloat16)
        return lambda images: fast.predict(images)

    network = Small(num_classes=21, size=(65, 65), dtype=torch.bfloat16)
    rivals = [Rival("as bf16", torch.bfloat16, build), Rival("as fp32", torch.float32, build)]
    found = {each.rival.name: each for each in bench(network, CPU, rivals=rivals, seconds=0.01)}
    assert found["as bf16"].measurement is not None, found["as bf16"].reason
    assert "not timed" in found["as fp32"].reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda mask: torch.where(torch.arange(33) == 16, (mask + 1) % 5, mask), "below the best, at most"),
        (lambda mask: mask + 5, "is inf below the best"),
        (lambda mask: mask - 5, "is inf below the best"),
        (lambda mask: mask[:1], re.escape("the mask is (1, 33, 33) of torch.int64")),
        (lambda mask: mask.float(), "of torch.float32, class indices"),
    ],
    ids=["one column", "too large", "negative", "one image", "no indices"],
)
def test_a_wrong_mask_is_not_timed(
    change: Callable[[Tensor], Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []
    monkeypatch.setattr(bench_module, "wall_clock", lambda call: timed.append("once") or 1.0)
    (found,) = bench(NETWORK, CPU, rivals=[changed("wrong", change)])
    assert found.measurement is None
    assert re.search(reason, found.reason), found.reason
    assert not timed


def test_a_rival_that_fails_leaves_the_others_alone() -> None:
    rivals = [failing("one", torch.OutOfMemoryError("CUDA out of memory.\nTried to")), live()]
    found = list(bench(NETWORK, CPU, rivals=rivals, seconds=0.01))
    assert [(each.rival.name, each.measurement is None) for each in found] == [("one", True), ("live", False)]
    assert found[0].reason == "OutOfMemoryError: CUDA out of memory."
    assert found[0].images_per_second == 0


def test_a_rival_that_fails_holds_no_memory() -> None:
    """Its error's traceback would hold its weights while the next ones need the room."""
    held: list[weakref.ref[Tensor]] = []

    def build(model: fdl.ResNetModel, images: Tensor) -> Callable[[Tensor], Tensor]:
        weights = torch.zeros(8)
        held.append(weakref.ref(weights))
        try:
            raise torch.OutOfMemoryError("the first attempt")
        except torch.OutOfMemoryError:
            raise torch.OutOfMemoryError("the second one") from None

    oracle = Oracle(NETWORK.build(CPU), NETWORK.images(CPU))
    gc.disable()
    try:
        found = bench_module._measure_alone(Rival("one", torch.float32, build), oracle, 0.01)
        assert found == "OutOfMemoryError: the second one"
        assert held[0]() is None
    finally:
        gc.enable()


def test_a_rival_that_fails_while_it_is_timed_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def third_time_unlucky(mask: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return mask

    found = list(bench(NETWORK, CPU, rivals=[changed("one", third_time_unlucky), live()], seconds=0.01))
    assert [each.rival.name for each in found] == ["one", "live"]
    assert found[0].reason == "RuntimeError: DefaultCPUAllocator: can't allocate memory"
    assert found[1].measurement is not None
    assert found[1].measurement.repeats >= 5


def test_without_memory_for_tuning_the_rivals_are_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(fdl.AcceleratedModel, "tune", tune)
    monkeypatch.setattr(bench_module, "measuring_on", lambda _: nullcontext())
    monkeypatch.setattr(bench_module, "_one_by_one", lambda rivals, *_: iter([(rivals[0], "no GPU here")]))
    monkeypatch.setattr(Small, "build", lambda self, _: Network.build(self, CPU))
    monkeypatch.setattr(Small, "images", lambda self, _: Network.images(self, CPU))
    with pytest.warns(RuntimeWarning, match=r"is not tuned: OutOfMemoryError: CUDA out of memory\."):
        found = list(bench(NETWORK, GPU, rivals=[live()], tune=True))
    assert [each.reason for each in found] == ["no GPU here"]


def test_rivals_of_a_cpu_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noting(name: str) -> Rival:
        return changed(name, lambda mask: order.append(name) or mask)

    monkeypatch.setattr(bench_module, "MAX_ROUNDS", 5)
    list(bench(NETWORK, CPU, rivals=[noting(name) for name in "abc"]))
    rounds = ["".join(order[-15:][i : i + 3]) for i in range(0, 15, 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca"]


@pytest.mark.parametrize("limit", [0.0, 2.5, math.inf])
def test_on_a_busy_machine_quick_stops_early(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves a second whenever it is looked at: before each round from the third on."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(bench_module.time, "monotonic", lambda: float(next(ticks)))
    (found,) = bench(NETWORK, CPU, rivals=[live()], seconds=1e-6, limit=limit)
    assert found.measurement is not None
    assert found.measurement.repeats == {0.0: 2, 2.5: 4}.get(limit, 5)


def test_only_quick_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def no_results(*_: object, limit: float, **__: object) -> Iterator[Result]:
        limits.append(limit)
        return iter(())

    monkeypatch.setattr(bench_module, "bench", no_results)
    for quick in (True, False):
        run_bench(Console(quiet=True), NETWORK, CPU, quick=quick, rivals=[live()])
    assert limits == [bench_module.QUICK_LIMIT, math.inf]


def test_as_many_rounds_as_fit() -> None:
    assert [bench_module._rounds(ms, 2.0) for ms in (0.0, 1.0, 100.0, 1e6)] == [0, 100, 20, 5]


def test_stopped_by_ctrl_c_what_was_timed_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def interrupted(call: Callable[[], Tensor]) -> float:
        nonlocal calls
        calls += 1
        if calls == 8:  # two estimates, two rounds, and one more call
            raise KeyboardInterrupt
        return float(calls)

    monkeypatch.setattr(bench_module, "wall_clock", interrupted)
    found: list[Result] = []
    with pytest.raises(KeyboardInterrupt):
        found.extend(bench(NETWORK, CPU, rivals=[live("one"), live("other")]))
    assert [(each.rival.name, each.measurement.repeats) for each in found if each.measurement] == [
        ("one", 3),
        ("other", 2),
    ]


def test_the_command_keeps_the_rows_of_a_stopped_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> object:
        yield result("one", 10.0)
        assert len((tmp_path / "rows.csv").read_text().splitlines()) == 2
        yield Result(NETWORK, live("other"), None, "RuntimeError: no")
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_module, "bench", stopped)
    console = Console(record=True, width=160, quiet=False, file=(tmp_path / "out").open("w"))
    with pytest.raises(KeyboardInterrupt):
        run_bench(console, NETWORK, CPU, csv=tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["rival"], row["p50_ms"], row["reason"]) for row in rows] == [
        ("one", "10.0", ""),
        ("other", "", "RuntimeError: no"),
    ]
    text = console.export_text()
    assert re.search(r"one +│ +200 │ +10\.00", text)
    assert "other: RuntimeError: no" in text


@pytest.mark.parametrize(("text", "message"), [("a,b\n1,2\n", "has other columns"), (None, "in the middle of a row")])
def test_a_file_of_another_kind_is_refused_before_anything_runs(
    tmp_path: Path, text: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text or ",".join(COLUMNS) + "\n0.1,half")
    before = path.read_bytes()
    monkeypatch.setattr(bench_module, "bench", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=message):
        run_bench(Console(quiet=True), NETWORK, CPU, csv=path)
    assert path.read_bytes() == before


def test_the_command_prints_a_table_and_a_breakdown(tmp_path: Path) -> None:
    console = Console(record=True, width=160, file=(tmp_path / "out").open("w"))
    ours = live("ours", ours=True)
    run_bench(console, NETWORK, CPU, rivals=[live("other"), ours], seconds=0.01, profile=True, csv=tmp_path / "a.csv")
    text = console.export_text()
    assert "R50 OS8 33x33 B2 K=5 in float32" in text
    assert re.search(r"other +│ +[\d.]+ │ +[\d.]+ \([\d.]+ to [\d.]+\) │ +\d+ │ +1\.00 │", text)
    assert re.search(r"the speed of ours is [\d.]+ times other", text)
    assert re.search(r"classifier.0 +│ aspp_branches +│ 2x256x5x5->32 rates \(12, 24, 36\) │ torch", text)
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 3
    assert re.search(r"upsample_argmax +│ upsample_argmax +│ 2x5x5x5->33x33 +│ torch", text)
    assert re.search(r"^done in \d+ s$", text, re.MULTILINE)
    assert "share of floor" not in text


@pytest.mark.parametrize(
    ("name", "message"), [("bench.xyz", r"ends in one of .*\.png"), ("bench", r"ends in"), ("no/a.png", "no folder")]
)
def test_a_chart_that_can_not_be_drawn_is_refused_before_anything_runs(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module, "bench", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=message):
        run_bench(Console(quiet=True), NETWORK, CPU, chart=tmp_path / name)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdeeplab\[plots\]'"):
        run_bench(Console(quiet=True), NETWORK, CPU, chart=tmp_path / "bench.png")


def test_quick_is_small_and_leaves_out_what_compiles_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(101, 16, 150, (1024, 2048), 4, torch.float16)
    small = quick_network(network, CPU)
    assert (small.size, small.batch) == ((256, 256), 1)
    assert (small.depth, small.output_stride, small.num_classes, small.dtype) == (101, 16, 150, torch.float16)
    for free, batch in ((80e9, 8), (9e9, 4), (1e9, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (int(free), int(free)))
        assert (quick_network(network, GPU).size, quick_network(network, GPU).batch) == ((512, 512), batch)

    def names(device: torch.device, quick: bool) -> list[str]:
        return [rival.name.partition("-")[2] or rival.name for rival in rivals_of(small, device, quick=quick)]

    assert names(CPU, True) == ["fp32", "channels_last", "ResNetModel", "fastdeeplab"]
    assert names(CPU, False) == ["fp32", "channels_last", "compile", "ResNetModel", "fastdeeplab"]
    slow = ["max-autotune", "reduce-overhead"]
    ours = ["ResNetModel", "torch", "fastdeeplab", "graphs"]
    on_gpu = ["fp32", "channels_last", "compile", *slow, "fused", *ours]
    assert names(GPU, False) == on_gpu
    assert names(GPU, True) == [name for name in on_gpu if name not in slow]
    small = replace(small, batch=8)
    assert names(GPU, False) == [name for name in on_gpu if name not in ("reduce-overhead", "graphs")]


def test_without_torchvision_pytorchs_layers_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for rivals in (rivals_module, bench_module):
        monkeypatch.setattr(rivals, "torchvision_obstacle", lambda: "ImportError: no")
    eager = rivals_of(NETWORK, CPU, quick=True)[:2]
    assert [rival.name for rival in eager] == ["layers-fp32", "layers-channels_last"]
    found = list(bench(NETWORK, CPU, rivals=eager, seconds=0.01))
    assert all(each.measurement for each in found), found


@pytest.mark.gpu
def test_every_rival_of_a_gpu_is_measured() -> None:
    network = Small(num_classes=21, size=(129, 129), batch=1, dtype=torch.bfloat16)
    peers = "torchvision", "layers"  # the former has no network as narrow; compiling takes minutes
    rivals = [live(), *(rival for rival in rivals_of(network, GPU) if not rival.name.startswith(peers))]
    names = [rival.name for rival in rivals]
    assert {"cudnn-fused", "ResNetModel", "fastdeeplab-torch", "fastdeeplab", "fastdeeplab-graphs"} < {*names}
    found = list(bench(network, GPU, rivals=rivals, seconds=0.05))
    assert [each.rival.name for each in found] == names
    assert not [each.reason for each in found if each.reason]
    parts = time_operations(fdl.accelerate(network.build(GPU), dtype=torch.bfloat16), network.images(GPU))
    assert sum(part.milliseconds for part in parts) > 0
