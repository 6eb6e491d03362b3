"""What is measured to be fastest is kept, what is wrong or fails is not, and the table on disk is whole at any time."""

import math
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import tune
from fastdeeplab.kernels import candidates, decisions, reference, tuning
from fastdeeplab.kernels.candidates import Gpu, Layer, Tile
from fastdeeplab.kernels.decisions import Measurement
from fastdeeplab.kernels.measure import largest_error
from fastdeeplab.kernels.tuning import Times, fastest, tile_choices, tile_name
from torch import Tensor

import fastdeeplab as fdl
from fastdeeplab import kernels

CPU = torch.device("cpu")
H200 = Gpu("NVIDIA H200", (9, 0), 132)
LAYER = Layer.of("conv_bn_relu", (1, 8, 5, 6), (16, 8, 1, 1), torch.float32, residual=True)
CASES = cases.small_convolutions(torch.float32)
SLOW, FAST, FASTEST = (Tile("pointer", 16, 16 * n, 16, num_warps=4, num_stages=2) for n in (1, 2, 4))
MILLISECONDS: dict[Tile | str, float] = {
    SLOW: 3.0,
    FAST: 2.0,
    FASTEST: 1.0,
    "conv_pointwise": 5.0,
    "cudnn_relu": 4.0,
}


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "why_not", lambda *_: None)
    monkeypatch.setattr(Gpu, "of", lambda device: H200)


class FakeCandidates:
    """Three tile choices and two library forms that compute the right thing unless told otherwise, and their clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.instead: dict[Tile | str, Callable[[Tensor], Tensor]] = {}
        self.timed: set[Tile | str] = set()
        self.running: Tile | str = ""
        self.right = tuning.library_call(LAYER, "conv_pointwise")
        monkeypatch.setattr(tuning, "tile_choices", lambda *_: [SLOW, FASTEST, FAST])
        monkeypatch.setattr(tuning, "library_forms", lambda *_: ["conv_pointwise", "cudnn_relu"])
        monkeypatch.setattr(tuning, "in_fp64", lambda layer, inputs: self.right(*inputs))
        monkeypatch.setattr(tuning, "kernel_call", self.call)
        monkeypatch.setattr(tuning, "library_call", self.call)

    def call(self, layer: Layer, choice: Tile | str) -> Callable[..., Tensor]:
        def run(*inputs: Any) -> Tensor:
            self.running = choice
            return self.instead.get(choice, torch.clone)(self.right(*inputs))

        return run

    def clock(self, call: Callable[[], Any]) -> float:
        call()
        self.timed.add(self.running)
        return MILLISECONDS[self.running]

    def tune(self) -> Times:
        return tuning.tune(LAYER, CPU, seconds=0.001, timer=self.clock)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCandidates:
    return FakeCandidates(monkeypatch)


def one_element_off(y: Tensor) -> Tensor:
    y = y.clone()
    y[0, 3, 2, 1] += 0.5
    return y


def fail(y: Tensor) -> Tensor:
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.interpreter
def test_the_fastest_of_each_kind_is_chosen(fake: FakeCandidates) -> None:
    times = fake.tune()
    assert times.tiles == {SLOW: 3000.0, FASTEST: 1000.0, FAST: 2000.0}
    assert times.forms == {"conv_pointwise": 5000.0, "cudnn_relu": 4000.0}
    found = fastest(LAYER, CPU, times)
    assert found is not None
    assert (found.layer, found.tile, found.tile_us, found.form, found.form_us) == (
        LAYER,
        FASTEST,
        1000.0,
        "cudnn_relu",
        4000.0,
    )
    assert found.torch == torch.__version__


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("instead", "message"),
    [
        (one_element_off, "its error is"),
        (lambda y: y * math.nan, "its error is nan"),
        (lambda y: y[:, :3], "its error is inf"),
        (fail, "out of resource"),
    ],
)
def test_what_is_wrong_or_fails_is_warned_of_and_never_timed(
    fake: FakeCandidates, instead: Callable[[Tensor], Tensor], message: str
) -> None:
    fake.instead = {FASTEST: instead, "cudnn_relu": instead}
    with pytest.warns(RuntimeWarning) as caught:
        found = fastest(LAYER, CPU, fake.tune())
    assert found is not None
    assert (found.tile, found.form) == (FAST, "conv_pointwise")
    texts = [str(warning.message) for warning in caught]
    for name in (tile_name(FASTEST), "cudnn_relu"):
        assert any(text.startswith(f"{name} is left out") and message in text for text in texts)
    assert fake.timed == {SLOW, FAST, "conv_pointwise"}


@pytest.mark.interpreter
def test_a_layer_without_a_right_kernel_is_the_librarys(fake: FakeCandidates, tmp_path: Path) -> None:
    """Said in a row, or else the prediction might choose a kernel that is known to be wrong."""
    fake.instead = dict.fromkeys((SLOW, FAST, FASTEST), fail)
    with pytest.warns(RuntimeWarning, match="is left out"):
        found = fastest(LAYER, CPU, fake.tune())
    assert found is not None
    assert (found.tile_us, found.form_us) == (math.inf, 4000.0)
    table = tune.read_table(tmp_path / "table.json")
    tune.add(table, found)
    tune.write_table(tmp_path / "table.json", table)
    (row,) = tune.read_table(tmp_path / "table.json")["measurements"]
    assert Measurement.from_json(row) == found._replace(commit=tune.commit())

    fake.instead |= dict.fromkeys(("conv_pointwise", "cudnn_relu"), fail)
    with pytest.warns(RuntimeWarning, match="is left out"):
        assert fastest(LAYER, CPU, fake.tune()) is None


def test_cudnn_searches_for_its_best_only_meanwhile(fake: FakeCandidates) -> None:
    seen = []
    fake.instead["cudnn_relu"] = lambda y: seen.append(torch.backends.cudnn.benchmark) or y
    assert not torch.backends.cudnn.benchmark
    fake.tune()
    assert set(seen) == {True}
    assert not torch.backends.cudnn.benchmark


def test_choices_are_compiled_in_parallel_and_failures_wait(
    fake: FakeCandidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is run once, two at a time or not at all; what fails is left to be reported by ``tune``."""
    both, ran = threading.Barrier(2, timeout=300), []

    def call(layer: Layer, tile: Tile) -> Callable[..., Tensor]:
        def run(*inputs: Any) -> Tensor:
            if tile == FAST:
                raise RuntimeError("out of resource: shared memory")
            both.wait()
            ran.append(tile)
            return fake.right(*inputs)

        return run

    waited = []
    monkeypatch.setattr(tuning, "kernel_call", call)
    monkeypatch.setattr(tuning, "random_inputs", lambda layer, _, make=tuning.random_inputs: make(layer, CPU))
    monkeypatch.setattr(tuning.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    tuning.compile_choices(LAYER, CPU)
    assert not ran
    tuning.compile_choices(LAYER, torch.device("cuda", 0))
    assert set(ran) == {SLOW, FASTEST}
    assert waited == [torch.device("cuda", 0)]


def test_an_error_shows_a_single_wrong_element() -> None:
    y = torch.linspace(-2, 1, 1000).view(2, 5, 10, 10)
    wrong = y.clone()
    wrong[1, 2, 3, 4] += 0.5
    assert largest_error(wrong, y.double()) == pytest.approx(0.25)
    assert largest_error(y, y.double()) == 0
    assert largest_error(y[:1], y.double()) == math.inf
    assert math.isnan(largest_error(y * math.nan, y.double()))
    assert largest_error(y, torch.zeros_like(y)) == 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_and_library_compute_the_reference(case: cases.ConvCase, device: torch.device) -> None:
    """Every call that is measured, on inputs of the kind that it is measured on."""
    layer = case.layer
    inputs = tuning.random_inputs(layer, device)
    doubles = [None if value is None else value.double() for value in inputs]
    if layer.function == "aspp_branches":
        x, shift, *weights = doubles
        expected = reference.aspp_branches(x, weights, None, shift, rates=layer.dilations)
    elif layer.function == "aspp_projection":
        *tensors, shift = doubles
        expected = reference.aspp_projection(*tensors, None, shift)
    else:
        x, weight, shift, residual = doubles
        expected = reference.conv_bn_relu(
            x, weight, None, shift, residual,
            stride=layer.stride, padding=layer.padding, dilation=layer.dilations[0], relu=layer.relu,
        )  # fmt: skip
    torch.testing.assert_close(tuning.in_fp64(layer, inputs), expected)
    limit = tuning.tolerance(layer.dtype, device)
    for form in tuning.library_forms(layer, device):
        assert largest_error(tuning.library_call(layer, form)(*inputs), expected) <= limit
    tile = next(tile for tile in tile_choices(layer, device) if tile.kernel == "pointer")
    assert largest_error(tuning.kernel_call(layer, tile)(*inputs), expected) <= limit
    assert 0.3 < float(expected.std()) < 3


@pytest.mark.usefixtures("h200")
def test_descriptor_kernels_are_launched_by_their_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = []

    def remember(name: str, package: str) -> None:
        imported.append(package + name)
        raise ImportError(name)

    monkeypatch.setattr(tuning.importlib, "import_module", remember)
    for kernel in ("pointer", "gemm_tma", "boxes_tma"):
        call = tuning.kernel_call(LAYER, SLOW._replace(kernel=kernel))
        with pytest.raises(ImportError):
            call(*tuning.random_inputs(LAYER, CPU))
    package = tuning.__package__
    assert imported == [f"{package}.conv", f"{package}.conv_tma", f"{package}.conv_tma"]


@pytest.mark.usefixtures("h200")
def test_the_k_loop_is_split_where_programs_are_few() -> None:
    device = torch.device("cuda", 0)
    few = Layer.of("conv_bn_relu", (1, 2048, 32, 32), (256, 2048, 1, 1), torch.bfloat16)
    many = Layer.of("conv_bn_relu", (8, 2048, 65, 65), (512, 2048, 1, 1), torch.bfloat16)
    short = Layer.of("conv_bn_relu", (1, 512, 32, 32), (256, 512, 1, 1), torch.bfloat16)
    assert {tile.splits for tile in tile_choices(few, device)} == {1, 2, 4, 8}
    assert {tile.splits for tile in tile_choices(many, device)} == {1}
    assert {tile.splits for tile in tile_choices(short, device)} == {1, 2}  # of 8 steps
    for layer in (few, many, short):
        choices = tile_choices(layer, device)
        assert len(set(choices)) == len(choices)
        assert {tile._replace(splits=1) for tile in choices} == set(candidates.tiles_for(layer, H200.capability))
        pointer = tuple(tile for tile in choices if tile.kernel == "pointer" and tile.splits == 1)
        assert candidates.predict_tile(layer, H200, pointer) in choices


def test_no_tile_choice_where_kernels_can_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "why_not", lambda *_: "the tensors are on a CPU")
    assert tile_choices(LAYER, CPU) == []
    times = tuning.tune(LAYER, CPU, seconds=0.001)
    assert times.tiles == {}
    assert set(times.forms) == {"conv_pointwise"}
    assert fastest(LAYER, CPU, times) is None
    assert "no kernel" in tune.summary(times)


@pytest.mark.parametrize(
    ("device", "options", "forms"),
    [
        ("cuda", {}, ["conv_pointwise", "conv_fused_pointwise", "cudnn_relu", "addmm_relu"]),
        ("cuda", {"relu": False}, ["conv_pointwise", "conv_fused_pointwise"]),
        ("cpu", {}, ["conv_pointwise"]),
    ],
)
def test_library_forms(device: str, options: dict[str, bool], forms: list[str]) -> None:
    layer = Layer.of("conv_bn_relu", (1, 8, 5, 6), (16, 8, 1, 1), torch.float16, **options)
    assert list(tuning.library_forms(layer, torch.device(device))) == forms
    projection = Layer.of("aspp_projection", (1, 8, 5, 6), (16, 8, 1, 1), torch.float32)
    assert list(tuning.library_forms(projection, torch.device(device))) == [
        form for form in ("conv_pointwise", "conv_fused_pointwise") if form in forms
    ]


def test_tile_names() -> None:
    assert tile_name(SLOW) == "pointer-16x16x16-4w-2s"
    assert tile_name(SLOW._replace(splits=2, skip=True)) == "pointer-16x16x16-4w-2s-2split-skip"


def times(tile_us: float, form_us: float = 2.0) -> Times:
    return Times({SLOW: tile_us, FAST: 2 * tile_us}, {"conv_pointwise": form_us})


@pytest.mark.usefixtures("h200")
def test_the_table_is_what_the_package_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of another GPU stay beside the new ones, and a layer that is measured again has its new row alone."""
    path = tmp_path / "tuned.json"
    first = fastest(CASES[0].layer, CPU, times(1.0))
    assert first is not None
    other = first._replace(gpu="NVIDIA A100", capability=(8, 0))
    table = tune.read_table(path)
    tune.add(table, other)
    tune.write_table(path, table)

    for tile_us in (3.0, 1.0):
        tune.tune_all(CASES, path, tune.read_table(path), lambda case, us=tile_us: times(us))
    found = [other, *(fastest(case.layer, CPU, times(1.0)) for case in CASES)]
    expected = [row._replace(commit=tune.commit()) for row in found if row]
    monkeypatch.setattr(decisions, "__file__", str(tmp_path / "decisions.py"))
    decisions.shipped.cache_clear()
    try:
        assert list(decisions.shipped()) == expected
    finally:
        decisions.shipped.cache_clear()
    assert len(path.read_text().splitlines()) == len(expected) + 2


@pytest.mark.usefixtures("h200")
def test_a_stopped_run_keeps_its_rows_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, measured = tmp_path / "tuned.json", []

    def measure_some(layer: Layer, device: torch.device, seconds: float) -> Times:
        assert seconds == 0.25
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(layer)
        return times(1.0)

    options = ["--out", str(path), "--dtype", "float32", "--seconds", "0.25"]
    monkeypatch.setattr(tune, "tune", measure_some)
    monkeypatch.setattr(tune, "convolutions", cases.small_convolutions)
    monkeypatch.setattr(tune, "interpreting", lambda: False)
    with pytest.raises(SystemExit, match="stopped"):
        tune.main(options)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["[1/6]", "reduce"], ["[2/6]", "expand"]]
    assert "pointer-16x16x16-4w-2s 1.0 us, conv_pointwise 2.0 us, library / kernel 2.00" in lines[0]
    assert {row["layer"]["residual"] for row in tune.read_table(path)["measurements"]} == {False, True}

    measured.clear()
    with pytest.raises(SystemExit, match="stopped"):
        tune.main([*options, "--missing"])
    assert measured == [CASES[2].layer, CASES[3].layer]
    measured.clear()
    tune.main([*options, "--missing", "--layers", "projection"])
    assert measured == [CASES[5].layer]
    assert len(tune.read_table(path)["measurements"]) == 5
    with pytest.raises(SystemExit, match="no layer is left"):
        tune.main([*options, "--layers", "projection", "--missing"])


@pytest.mark.parametrize("text", ["", "[]", '{"measurements": [{"gpu": "NVIDIA H200"}]}', '{"rows": []}'])
def test_a_file_of_another_kind_is_refused_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text)
    monkeypatch.setattr(tune, "tune_all", lambda *_: pytest.fail("measured before the table was read"))
    with pytest.raises(SystemExit, match="is not a table of measurements"):
        tune.main(["--out", str(path)])
    assert path.read_text() == text


def test_the_interpreters_times_stay_out_of_the_shipped_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "interpreting", lambda: True)
    monkeypatch.setattr(tune, "tune_all", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        tune.main([])
    assert "name another table with --out" in capsys.readouterr().err


@pytest.mark.interpreter
def test_tuning_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command to the row, with real kernels and one made wrong."""
    path = tmp_path / "tuned.json"
    listed = [tile for _, tile in candidates.TILES if tile.kernel == "pointer"][:2]
    monkeypatch.setattr(candidates, "TILES", [(candidates.ALL, tile) for tile in listed])
    candidates.tiles_for.cache_clear()
    kernel_call = tuning.kernel_call
    wrong = listed[0].block_n

    def sometimes_wrong(layer: Layer, tile: Tile) -> Callable[..., Tensor]:
        call = kernel_call(layer, tile)
        return call if tile.block_n != wrong else lambda *inputs: call(*inputs) + 0.1

    monkeypatch.setattr(tuning, "kernel_call", sometimes_wrong)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tune.main(["--out", str(path), "--dtype", "float16", "--layers", "expand", "--seconds", "0.001"])
    finally:
        candidates.tiles_for.cache_clear()
    assert [
        str(warning.message).split(" is left out")[0] for warning in caught if "left out" in str(warning.message)
    ] == [tile_name(listed[0])]
    (row,) = map(Measurement.from_json, tune.read_table(path)["measurements"])
    assert row.layer == replace(CASES[1].layer, dtype=torch.float16)
    assert row.tile == listed[1]
    assert 0 < row.form_us < row.tile_us < math.inf


def test_the_layers_that_are_tuned_are_those_that_run() -> None:
    """Else no row of the shipped table would ever be found."""
    fast = fdl.accelerate(fdl.ResNetModel(50, aux_head=False))
    with kernels.recording() as found:
        fast.logits(torch.randn(1, 3, 520, 520))
    served = {replace(layer, precision="tf32") for layer, _ in found if layer.kernel in ((1, 1), (3, 3))}
    tuned = {case.layer for case in cases.network_convolutions(torch.float32)}
    assert {layer for layer in served if layer.H * layer.W > 1} <= tuned  # the pooled branch is one pixel
