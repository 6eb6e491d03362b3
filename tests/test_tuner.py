"""Tuning a network: the fastest of each layer decides, now and in later processes, within the time that was given."""

import importlib
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastdeeplab.kernels import decisions, tail_tuning, tuning
from fastdeeplab.kernels.candidates import STRIPS, Gpu, Layer, Strip, Tail, Tile, tiles_for
from fastdeeplab.kernels.choice import why_not
from fastdeeplab.kernels.decisions import TailMeasurement, decide, decide_tail
from fastdeeplab.kernels.tuning import Times
from layers import H200
from networks import small_model
from torch import Tensor, nn

import fastdeeplab as fdl
from fastdeeplab import kernels, tuner
from fastdeeplab.tuner import tune_network

DEVICE = torch.device("cuda", 0)
IMAGES = torch.randn(2, 3, 33, 33)


def forget() -> None:
    """As in a new process."""
    decisions._tables.clear()
    decisions._decide.cache_clear()
    decisions._decide_tail.cache_clear()


@pytest.fixture(autouse=True)
def _own_decisions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decisions, "_tables", {})
    forget()
    yield
    forget()


def kernel_wins(layer: Layer | Tail) -> bool:
    return isinstance(layer, Tail) or layer.residual


def impl_and_reason(layer: Layer | Tail) -> tuple[str, str]:
    decided = decide_tail(layer, "auto", DEVICE) if isinstance(layer, Tail) else decide(layer, "auto", DEVICE)
    return decided.impl, decided.why


class FakeGpu:
    """An H200 on which the library does every layer in 2 ms, and two tile choices as the test says; all are right."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel_ms: Callable[[Layer | Tail], float] = lambda layer: 1.0 if kernel_wins(layer) else 3.0
        self.measured: list[Layer | Tail] = []
        self.seconds: list[float] = []
        self.running = 0.0
        self.now = 0.0  # seconds, where the test looks at this clock
        self.tune, self.tune_tail = tuning.tune, tail_tuning.tune_tail
        monkeypatch.setattr(Gpu, "of", lambda device: H200)
        monkeypatch.setattr(tuning, "why_not", lambda *_: None)
        monkeypatch.setattr(tuning, "tile_choices", lambda layer, _: list(tiles_for(layer, H200.capability)[:2]))
        monkeypatch.setattr(tuning, "kernel_call", self.kernel_call)
        monkeypatch.setattr(tuning, "library_call", self.library_call)
        monkeypatch.setattr(tuning, "tune", self.recorded_tune)
        monkeypatch.setattr(tuning, "in_fp64", lambda layer, inputs: self.right(layer, inputs))
        monkeypatch.setattr(tail_tuning, "why_not", lambda *_: None)
        monkeypatch.setattr(tail_tuning, "kernel_call", self.tail_call)
        monkeypatch.setattr(tail_tuning, "library_call", lambda _: self.taking(2.0))
        monkeypatch.setattr(tail_tuning, "shortfall", lambda *_: 0.0)
        monkeypatch.setattr(tail_tuning, "tune_tail", self.recorded_tune_tail)

    def on_this_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (tuner, tuning):
            monkeypatch.setattr(module, "perf_counter", lambda: self.now)

    def right(self, layer: Layer, inputs: list[Any]) -> Tensor:
        return torch.ones(3)

    def kernel_call(self, layer: Layer, tile: Tile) -> Callable[..., Tensor]:
        second = tile == tuning.tile_choices(layer, DEVICE)[-1]
        return self.taking(self.kernel_ms(layer) * (1 if second else 2))

    def tail_call(self, tail: Tail, strip: Strip) -> Callable[..., Tensor]:
        return self.taking(self.kernel_ms(tail) * (1 if strip == STRIPS[2] else 2))

    def library_call(self, layer: Layer, form: str) -> Callable[..., Tensor]:
        return self.taking(2.0)

    def taking(self, milliseconds: float) -> Callable[..., Tensor]:
        def run(*_: Any) -> Tensor:
            if milliseconds == math.inf:
                raise RuntimeError("out of resource: shared memory")
            self.running = milliseconds
            self.now += milliseconds / 1000
            return torch.ones(3)

        return run

    def clock(self, call: Callable[[], object]) -> float:
        call()
        return self.running

    def recorded_tune(self, layer: Layer, device: torch.device, *, timer: Any, **options: float) -> Times:
        self.note(layer, options)
        return self.tune(layer, device, timer=timer or self.clock, **options)

    def recorded_tune_tail(
        self, tail: Tail, device: torch.device, *, timer: Any, **options: float
    ) -> TailMeasurement | None:
        self.note(tail, options)
        return self.tune_tail(tail, device, timer=timer or self.clock, **options)

    def note(self, layer: Layer | Tail, options: dict[str, float]) -> None:
        assert not torch.is_autocast_enabled("cpu")
        self.measured.append(layer)
        self.seconds.append(options["seconds"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    monkeypatch.setattr("fastdeeplab.kernels.measure.peak_memory", lambda *_: 0)  # the profiler takes its time
    return FakeGpu(monkeypatch)


@pytest.fixture
def model() -> fdl.AcceleratedModel:
    return fdl.accelerate(small_model())


def layers_of(model: fdl.ResNetModel, images: Tensor = IMAGES) -> set[Layer | Tail]:
    """Those that kernels serve."""
    with kernels.recording() as found:
        model.predict(images)
    return {layer for layer, _ in found if isinstance(layer, Tail) or tiles_for(layer, H200.capability)}


@pytest.mark.interpreter
def test_the_fastest_of_each_layer_decides(gpu: FakeGpu, model: fdl.AcceleratedModel) -> None:
    layers = layers_of(model)
    assert all(impl_and_reason(layer)[1].startswith("predicted") for layer in layers)
    tuned = model.tune(IMAGES)
    assert len(gpu.measured) == len(layers)
    assert set(gpu.measured) == layers == {row.measurement.layer for row in tuned.rows}
    assert {kernel_wins(layer) for layer in layers} == {False, True}
    (tail,) = [layer for layer in layers if isinstance(layer, Tail)]
    assert str(tail) == "2x21x5x5->33x33"
    for new_process in (False, True):
        if new_process:
            forget()
        for layer in layers:
            impl = "triton" if kernel_wins(layer) else "torch"
            assert impl_and_reason(layer) == (impl, "measured on NVIDIA H200")
            if layer != tail:
                assert decide(layer, "auto", DEVICE).tile == tuning.tile_choices(layer, DEVICE)[-1]
        assert decide_tail(tail, "auto", DEVICE).strip == STRIPS[2]
        assert decide_tail(tail, "torch", DEVICE).impl == "torch"


def test_a_tail_that_pytorch_does_faster(gpu: FakeGpu, model: fdl.AcceleratedModel) -> None:
    gpu.kernel_ms = lambda layer: 3.0
    (tail,) = [row.measurement for row in model.tune(IMAGES).rows if isinstance(row.measurement.layer, Tail)]
    assert (tail.tile_us, tail.form_us) == (3000.0, 2000.0)
    for new_process in (False, True):
        if new_process:
            forget()
        assert impl_and_reason(tail.layer) == ("torch", "measured on NVIDIA H200")
        assert decide_tail(tail.layer, "triton", DEVICE) == ("triton", STRIPS[2], "as asked for")
        other = replace(tail.layer, H=66)
        assert impl_and_reason(other) == ("triton", "predicted: it never writes the full-size logits")


@pytest.mark.interpreter
def test_heavy_layers_come_first_and_each_is_reported(gpu: FakeGpu, model: fdl.AcceleratedModel) -> None:
    reports: list[tuple[int, int, str]] = []
    tune_network(model, IMAGES, progress=lambda *report: reports.append(report))
    assert [text for _, _, text in reports] == [*map(str, gpu.measured), "done"]
    assert [done for done, _, _ in reports] == list(range(len(reports)))
    assert {total for _, total, _ in reports} == {len(gpu.measured)}
    assert gpu.measured[0].function == "aspp_branches"


@pytest.mark.interpreter
def test_the_summary(gpu: FakeGpu, model: fdl.AcceleratedModel) -> None:
    gpu.kernel_ms = lambda layer: math.inf if layer.function == "aspp_branches" else 1.0 if kernel_wins(layer) else 3.0
    with pytest.warns(RuntimeWarning, match="out of resource"):
        tuned = model.tune(IMAGES)
    lines = str(tuned).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert len(lines) == 1 + len(gpu.measured)
    for row, line in zip(tuned.rows, lines[1:], strict=True):
        assert row.new
        assert row.winner == ("kernel" if kernel_wins(row.measurement.layer) else "library")
        assert line.startswith(str(row.measurement.layer))
        assert f"  {row.winner}  " in line
        assert "  2000.0  " in line
        assert line.endswith("  now")
    assert "  fails  " in lines[1]
    assert "1000.0" in str(tuned)
    assert re.search(r"2x21x5x5->33x33 +1000\.0 +2000\.0 +kernel +strips-2x2 +chunks +now", str(tuned))


def test_what_is_known_is_not_measured_again(gpu: FakeGpu, model: fdl.AcceleratedModel) -> None:
    first = model.tune(IMAGES)
    gpu.measured.clear()
    assert [row.measurement for row in model.tune(IMAGES).rows] == [row.measurement for row in first.rows]
    forget()
    tuned = model.tune(IMAGES)
    assert not gpu.measured
    assert [row.measurement for row in tuned.rows] == [row.measurement for row in first.rows]
    assert not any(row.new for row in tuned.rows)
    assert str(tuned).splitlines()[1].endswith("earlier")

    gpu.kernel_ms = lambda layer: 0.5
    model.tune(IMAGES, again=True)
    assert len(gpu.measured) == len(first.rows)
    forget()
    assert {impl_and_reason(layer)[0] for layer in gpu.measured} == {"triton"}
    model.tune(torch.randn(1, 3, 65, 65))
    assert len(gpu.measured) == 2 * len(first.rows)  # another size is measured by itself


@pytest.mark.interpreter
def test_what_no_longer_serves_is_measured_again(gpu: FakeGpu, model: fdl.AcceleratedModel) -> None:
    row = model.tune(IMAGES).rows[0].measurement
    gpu.measured.clear()
    decisions.remember(row._replace(tile=row.tile._replace(block_m=512)))
    model.tune(IMAGES)
    assert gpu.measured == [row.layer]


@pytest.mark.interpreter
def test_the_time_that_is_given_is_shared_and_not_exceeded(
    gpu: FakeGpu, model: fdl.AcceleratedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No candidate begins after it, and the layer that is not done then is left and named, as those after it are."""
    gpu.on_this_clock(monkeypatch)
    gpu.kernel_ms = lambda layer: 30.0
    slowest = 17 * 0.06  # a candidate's calls: to compare, to warm up, to estimate, and the fewest repeats
    tuned = model.tune(IMAGES, seconds=4.0)
    assert 4.0 <= gpu.now <= 4.0 + slowest
    done = len(tuned.rows)
    assert done > 1
    assert gpu.measured == [*(row.measurement.layer for row in tuned.rows), tuned.left[0]]
    layers = layers_of(model)
    assert set(tuned.left) == layers - set(gpu.measured[:done])
    candidates = sum(
        1 + len(STRIPS if isinstance(layer, Tail) else tuning.tile_choices(layer, DEVICE)) for layer in layers
    )
    assert gpu.seconds[0] == pytest.approx(min(0.05, 4.0 / candidates))
    assert gpu.seconds[done] < gpu.seconds[0]
    lines = str(tuned).splitlines()
    assert lines[1 + done :] == [f"not measured, stays predicted: {layer}" for layer in tuned.left]
    reasons = [impl_and_reason(layer)[1] for layer in tuned.left]
    assert any(why.startswith("predicted") for why in reasons)
    assert all(why.startswith("predicted") or "another size" in why for why in reasons)

    gpu.seconds.clear()
    assert not model.tune(IMAGES, seconds=1000).left
    assert set(gpu.seconds) == {tuner.MOST_SECONDS}


@pytest.mark.interpreter
@pytest.mark.usefixtures("gpu")
def test_an_interrupt_keeps_what_is_done(model: fdl.AcceleratedModel) -> None:
    def interrupt(done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_network(model, IMAGES, progress=interrupt)
    forget()
    assert len(decisions.measured_here(H200.name, H200.capability)) == 2
    tuned = model.tune(IMAGES)
    assert [row.new for row in tuned.rows].count(False) == 2


@pytest.mark.interpreter
@pytest.mark.usefixtures("gpu")
def test_where_nothing_can_be_written_it_holds_in_this_process(
    model: fdl.AcceleratedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(decisions, "store", read_only)
    with pytest.warns(RuntimeWarning, match=r"can't be kept in .*fastdeeplab.*Read-only file system") as caught:
        tuned = model.tune(IMAGES)
    assert len(caught) == 1
    assert len(tuned.rows) > 5
    assert {impl_and_reason(row.measurement.layer)[1] for row in tuned.rows} == {"measured on NVIDIA H200"}


@pytest.mark.interpreter
def test_a_layer_that_memory_is_too_small_for_stays_predicted(
    gpu: FakeGpu, model: fdl.AcceleratedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_choices(layer: Layer, device: torch.device) -> None:
        if layer.function == "aspp_branches":
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning, "compile_choices", compile_choices)
    with pytest.warns(RuntimeWarning, match="is not measured: CUDA out of memory"):
        tuned = model.tune(IMAGES)
    assert [layer.function for layer in tuned.left] == ["aspp_branches"]
    assert len(tuned.rows) == len(layers_of(model)) - 1


@pytest.mark.interpreter
def test_a_layer_without_a_right_candidate_stays_predicted(gpu: FakeGpu, model: fdl.AcceleratedModel) -> None:
    gpu.right = lambda layer, inputs: torch.zeros(3) if layer.function == "aspp_branches" else torch.ones(3)
    with pytest.warns(RuntimeWarning, match="is left out"):
        tuned = model.tune(IMAGES)
    assert [layer.function for layer in tuned.left] == ["aspp_branches"]


@pytest.mark.usefixtures("gpu")
def test_autocast_and_gradients_do_not_matter(model: fdl.AcceleratedModel) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        assert model.tune(IMAGES).rows


@pytest.mark.interpreter
def test_a_model_that_is_not_accelerated(gpu: FakeGpu) -> None:
    plain = small_model().eval()
    layers = layers_of(plain)
    assert {row.measurement.layer for row in tune_network(plain, IMAGES).rows} == layers


def test_on_a_cpu_there_is_nothing_to_tune(model: fdl.AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: pytest.fail("measured"))
    why_not.cache_clear()
    try:
        tuned = model.tune(IMAGES)
    finally:
        why_not.cache_clear()
    assert tuned.rows == tuned.left == ()
    assert str(tuned) == "nothing to tune: the tensors are on a CPU"


def test_kernels_that_are_turned_off_are_not_measured(
    gpu: FakeGpu, model: fdl.AcceleratedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDEEPLAB_KERNELS", "torch")
    assert str(model.tune(IMAGES)) == "nothing to tune: FASTDEEPLAB_KERNELS=torch"
    assert not gpu.measured


@pytest.mark.usefixtures("gpu")
def test_no_images_have_nothing_to_tune(model: fdl.AcceleratedModel) -> None:
    assert "no layer that a kernel serves" in str(model.tune(IMAGES[:0]))


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf, "60", None])
def test_seconds_are_a_positive_number(seconds: Any, model: fdl.AcceleratedModel) -> None:
    with pytest.raises(ValueError, match="seconds must be a positive number"):
        model.tune(IMAGES, seconds=seconds)


def test_images_and_mode_are_checked(model: fdl.AcceleratedModel) -> None:
    with pytest.raises(ValueError, match="images"):
        model.tune(IMAGES[0])
    with pytest.raises(RuntimeError, match="eval mode"):
        tune_network(small_model().train(), IMAGES)


@pytest.mark.usefixtures("gpu")
def test_captured_graphs_are_dropped(model: fdl.AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold what was decided before."""
    dropped = []
    monkeypatch.setattr(model, "drop_captures", lambda: dropped.append(True))
    model.tune(IMAGES)
    assert dropped


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("rich", [True, False])
def test_progress_is_shown_on_stderr(
    rich: bool, model: fdl.AcceleratedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.progress", None)  # as if it were not installed
    tuned = model.tune(IMAGES, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    total = len(tuned.rows)
    if rich:
        assert shown.err.startswith("tuning")
        assert f"{total}/{total}" in shown.err
    else:
        assert shown.err.splitlines()[-1] == f"[{total}/{total}] done"
        assert len(shown.err.splitlines()) == total + 1
    assert model.tune(IMAGES).rows
    assert capsys.readouterr().err == ""


class OneConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(16, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return kernels.conv_bn_relu(x, self.weight, None, x.new_zeros(16))


@pytest.mark.interpreter
def test_tuning_in_the_interpreter() -> None:
    """A real kernel, from the model to the row in the user's table."""
    model, x = OneConvolution().eval(), torch.randn(1, 8, 4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        (row,) = tune_network(model, x, seconds=60, timer=lambda call: 1.0).rows
    assert row.winner == "library"
    assert row.measurement.tile.kernel == "pointer"
    forget()
    assert decisions.measured_here("the interpreter", (8, 0)) == {row.measurement.layer: row.measurement}


@pytest.mark.interpreter
@pytest.mark.parametrize("channels_last", [False, True])
def test_tuning_a_tail_in_the_interpreter(channels_last: bool) -> None:
    """The real kernel with every strip and PyTorch are right, and the measurement comes back from the disk."""
    tail = Tail(2, 5, 3, 4, 17, 16, torch.float16, channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = tail_tuning.tune_tail(tail, torch.device("cpu"), seconds=0.001, timer=lambda call: 1.0)
    assert found is not None
    logits = tail_tuning.random_logits(tail, torch.device("cpu"))
    assert Tail.of(logits, (17, 16)) == tail
    assert (logits.stride(3) == 8) == channels_last
    decisions.store(found)
    assert decisions.measured_here("the interpreter", (8, 0)) == {tail: found}
    decisions.store(found._replace(tile=Strip(3, 3)))
    forget()
    assert not decisions.usable(decisions.measured_here("the interpreter", (8, 0))[tail], (8, 0))


def test_wrong_indices_of_a_tail_are_noticed() -> None:
    logits = torch.randn(2, 5, 3, 4)
    right = torch.nn.functional.interpolate(logits.double(), size=(17, 16), mode="bilinear").argmax(1)
    assert tail_tuning.shortfall(right, logits, (17, 16)) == 0.0
    wrong = right.clone()
    wrong[1, 5, 6] = (wrong[1, 5, 6] + 1) % 5
    assert tail_tuning.shortfall(wrong, logits, (17, 16)) > tail_tuning.TOLERANCE
    for none in (right + 5, right - 5, right[:1], right[:, :5]):
        assert tail_tuning.shortfall(none, logits, (17, 16)) == math.inf


def test_the_strips_are_the_kernels() -> None:
    argmax = importlib.import_module("fastdeeplab.kernels.argmax")
    assert {tuple(strip) for strip in STRIPS} == {tile[:2] for tile in argmax.TILES}


@pytest.mark.parametrize("faster", [pytest.param("triton", marks=pytest.mark.interpreter), "torch"])
def test_what_was_measured_runs_the_tail(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator as on a GPU: the strip reaches the launcher, or PyTorch runs."""
    ops, cpu = importlib.import_module("fastdeeplab.kernels.ops"), torch.device("cpu")
    logits = torch.randn(1, 5, 3, 4)
    times = (1.0, 2.0) if faster == "triton" else (2.0, 1.0)
    found = tail_tuning.tune_tail(Tail.of(logits, (9, 9)), cpu, timer=lambda call: 1.0)
    assert found is not None
    decisions.remember(found._replace(tile=Strip(2, 2), tile_us=times[0], form_us=times[1]))
    monkeypatch.setattr(ops, "_runs_triton", lambda impl, _: impl in ("auto", "triton"))
    launched = []
    launcher = importlib.import_module("fastdeeplab.kernels.argmax")
    upsample_argmax = launcher.upsample_argmax

    def launch(*arguments: Any, tile: Strip) -> Tensor:
        launched.append(tile)
        return upsample_argmax(*arguments, tile=tile)

    monkeypatch.setattr(launcher, "upsample_argmax", launch)
    with kernels.recording() as layers:
        indices = torch.ops.fastdeeplab.upsample_argmax(logits, (9, 9), torch.uint8, "auto")
    assert torch.equal(indices, kernels.upsample_argmax(logits, (9, 9), dtype=torch.uint8, impl="torch"))
    assert [decision.impl for _, decision in layers] == [faster]
    assert launched == ([Strip(2, 2)] if faster == "triton" else [])


@pytest.mark.interpreter
def test_where_kernels_run_auto_is_left_to_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "choose", lambda *_: kernels.Choice("triton", "here"))
    logits = torch.randn(1, 5, 3, 4)
    with kernels.recording() as found:
        for impl in ("auto", "triton"):
            kernels.upsample_argmax(logits, (9, 9), impl=impl)
        kernels.upsample_argmax(logits[:0], (9, 9))
    assert [decision for _, decision in found] == [
        ("torch", None, "the interpreter is for tests"),
        ("triton", None, "as asked for"),
    ]
    torch.library.opcheck(torch.ops.fastdeeplab.upsample_argmax.default, (logits, (9, 9), torch.uint8, "auto"))


@pytest.mark.gpu
def test_tuning_on_a_gpu(device: torch.device) -> None:
    """What was measured decides, and the logits are still those of the model it was made from."""
    source = small_model(width=0.25).eval().to(device)
    model = fdl.accelerate(source, dtype=torch.float16)
    images = torch.randn(2, 3, 129, 129, device=device)
    tuned = model.tune(images, seconds=300)  # some 220 candidates, each to be compiled
    assert tuned.rows
    assert not tuned.left
    forget()
    with kernels.recording() as found:
        actual = model(images)["out"]
        model.predict(images)
    decided = {layer: decision for layer, decision in found if decision.why != "as asked for"}  # the pooled branch
    served = {layer for layer in decided if tuner._count_candidates(layer, device)}
    assert any(isinstance(layer, Tail) for layer in served)
    assert all("measured on" in decided[layer].why for layer in served)  # the stem's form, which no tile choice serves
    assert {layer for layer, decision in decided.items() if decision.impl == "triton"} == {
        row.measurement.layer for row in tuned.rows if row.winner == "kernel"
    } & set(decided)
    with torch.no_grad():
        expected = source.double()(images.double())["out"]
    assert float((actual - expected).abs().max()) < 0.02 * float(expected.abs().max())
    assert not any(row.new for row in model.tune(images).rows)
