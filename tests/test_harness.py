"""The benchmarks run on a CPU, write complete rows, and show one device and one commit at a time."""

import csv
import dataclasses
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench_argmax
import bench_conv
import bench_cross_entropy
import cases
import harness
import plot
import predict
import pytest
import roofline
import torch
from fastdeeplab.kernels import reference, tuning
from fastdeeplab.kernels.candidates import Gpu, Layer
from fastdeeplab.kernels.measure import Measurement
from harness import COLUMNS, Results, Row, make_row

ROOT = Path(harness.__file__).parents[1]
CPU = torch.device("cpu")


def a_row(**changes: object) -> Row:
    measurement = Measurement(p20=1.0, p50=2.0, p80=3.0, repeats=10, peak_memory=1000, error=1e-7)
    row = make_row(
        CPU,
        kernel="upsample_argmax",
        implementation="eager-fp32",
        shape="1x2x3x4->5x6",
        layout="NCHW",
        dtype="float32",
        measurement=measurement,
        work=roofline.Work(bytes=4_000_000),
        flop=6_000_000_000,
    )
    return dataclasses.replace(row, **changes)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_benchmark(name: str, select: str, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", f"benchmarks/{name}", "-k", select, "--csv", str(path), *options]
    command += ["--seconds", "0.01", "-p", "no:cacheprovider"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the cases are tiny, and other tests may run beside
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_rates_follow_from_work_and_median() -> None:
    row = a_row()
    assert (row.gb_per_s, row.tflop_per_s) == pytest.approx((2.0, 3.0))
    assert (row.floor_ms, row.share_of_floor, row.driver) == (None, None, "")
    assert row.device == harness.device_name(CPU) != ""


def test_share_of_floor_is_known_for_a_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "device_name", lambda _: "NVIDIA H200")
    row = a_row()
    assert row.floor_ms == pytest.approx(4e6 / 4.3e12 * 1000)
    assert row.share_of_floor == pytest.approx(row.floor_ms / 2.0)


def test_rows_are_in_the_file_at_once_and_across_runs(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    first = Results(path)
    first.append(a_row())
    assert len(read(path)) == 1
    first.append(a_row(shape='a "quoted", shape'))
    Results(path).append(a_row(kernel="another"))
    found = read(path)
    assert [row["kernel"] for row in found] == ["upsample_argmax", "upsample_argmax", "another"]
    assert found[1]["shape"] == 'a "quoted", shape'
    assert list(found[0]) == COLUMNS
    assert (found[0]["p50_ms"], found[0]["floor_ms"], found[0]["error_fp64"]) == ("2.0", "", "1e-07")


def test_what_could_not_be_measured_is_a_row_with_the_reason(tmp_path: Path) -> None:
    row = make_row(
        CPU, kernel="predict R50 OS8", implementation="torchvision-compile", shape="8x3x33x33 K=21", layout="",
        dtype="float32", measurement=None, flop=1000, floor_ms=1.5, reason="OutOfMemoryError: no",
    )  # fmt: skip
    Results(tmp_path / "rows.csv").append(row)
    (found,) = read(tmp_path / "rows.csv")
    assert [found[name] for name in ("p50_ms", "tflop_per_s", "share_of_floor", "peak_memory_bytes")] == [""] * 4
    assert (found["floor_ms"], found["reason"]) == ("1.5", "OutOfMemoryError: no")


@pytest.mark.parametrize(
    ("text", "message"), [("commit,gpu\nabc,H200\n", "has the columns commit,gpu; expected"), (None, "middle of a row")]
)
def test_a_file_of_another_kind_is_refused_and_kept(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text or ",".join(COLUMNS) + "\nabc,AMD")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        Results(path)
    assert path.read_bytes() == before


def test_the_commit_is_dirty_if_code_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        name = ["-c", "user.name=n", "-c", "user.email=e@x"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *name, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit() -> str:
        harness.commit.cache_clear()
        return harness.commit()

    monkeypatch.setattr(harness, "ROOT", tmp_path)
    assert commit() == "unknown"
    git("init")
    code, results = tmp_path / "code.py", tmp_path / "benchmarks" / "results"
    code.write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    assert commit() == git("rev-parse", "--short=12", "HEAD")
    results.mkdir(parents=True)
    (results / "gpu.csv").write_text("rows")
    assert not commit().endswith("-dirty")
    code.write_text("2")
    assert commit().endswith("-dirty")
    harness.commit.cache_clear()


def test_shortfall_is_zero_for_the_fp64_argmax_alone() -> None:
    logits, size = torch.randn(2, 5, 4, 4), (9, 7)
    full = bench_argmax.full_logits(logits, size)
    indices = reference.upsample_argmax(logits.double(), size)
    assert bench_argmax.shortfall(indices, full) == 0
    indices[1, 2, 3] = full[1, :, 2, 3].argmin()
    assert bench_argmax.shortfall(indices, full) > 0.01
    for wrong in (indices + 5, indices - 5, indices[:1]):
        assert bench_argmax.shortfall(wrong, full) == math.inf


def test_the_fp64_loss_is_that_of_the_whole_batch() -> None:
    heads = [torch.randn(2, 5, 4, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    target = torch.randint(5, (2, 9, 7))
    target[0, :5] = bench_cross_entropy.IGNORED
    main, aux = (reference.upsample_cross_entropy(x, target, ignore_index=bench_cross_entropy.IGNORED) for x in heads)
    loss = main + bench_cross_entropy.AUX_WEIGHT * aux
    torch.testing.assert_close(
        bench_cross_entropy.in_fp64(target, *heads), (loss.detach(), *torch.autograd.grad(loss, heads))
    )


@pytest.mark.parametrize(
    ("name", "select", "implementations"),
    [
        ("bench_argmax.py", "2x21x and bfloat16-channels and not compiled", {"eager-fp32", "eager-bf16", "torch"}),
        (
            "bench_cross_entropy.py",
            "2x21x and bfloat16-channels and 2head and not compiled",
            {"eager-fp32", "eager-bf16", "deterministic-fp32", "torch"},
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="selects the small cases that run on a CPU")
def test_a_benchmark_writes_a_row_per_implementation(
    tmp_path: Path, name: str, select: str, implementations: set[str]
) -> None:
    path = tmp_path / "rows.csv"
    run = run_benchmark(name, select, path)
    assert run.returncode == 0, run.stdout
    rows = read(path)
    assert {row["implementation"] for row in rows} == implementations
    assert len(rows) == len(implementations)
    for row in rows:
        assert row["kernel"] == "upsample_" + name.removeprefix("bench_").removesuffix(".py")
        assert row["shape"].startswith("2x21x8x8->64x64")
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert int(row["peak_memory_bytes"]) >= 2 * 21 * 8 * 8 * 2  # the result: an index per pixel, or a gradient
        assert 0 <= float(row["error_fp64"]) < 0.1
    by_name = {row["implementation"]: row for row in rows}
    full_size = 2 * 21 * 64 * 64 * 4
    assert int(by_name["eager-fp32"]["peak_memory_bytes"]) > full_size
    assert plot.tables(plot.newest_run(rows)).count("\n| 2x21x8x8->64x64") == len(implementations)


@pytest.mark.skipif(torch.cuda.is_available(), reason="selects the small cases that run on a CPU")
def test_a_benchmark_stops_before_it_measures_for_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("commit,gpu\n")
    run = run_benchmark("bench_argmax.py", "2x21x and not compiled", path)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "has the columns commit,gpu" in run.stdout + run.stderr
    assert path.read_text() == "commit,gpu\n"


@pytest.mark.parametrize(
    ("name", "select", "kernel", "error"),
    [
        ("bench_conv.py", "expand", "conv_bn_relu", 1e-4),
        ("bench_aspp.py", "projection", "aspp_projection", 1e-4),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="selects the small cases that run on a CPU")
def test_a_benchmark_of_convolutions_writes_a_row_per_implementation(
    tmp_path: Path, name: str, select: str, kernel: str, error: float
) -> None:
    """The kernel's among them, in the interpreter."""
    path = tmp_path / "rows.csv"
    run = run_benchmark(name, f"{select} and not compiled", path, "--dtype", "float32")
    assert run.returncode == 0, run.stdout
    rows = {row["implementation"]: row for row in read(path)}
    assert set(rows) == {"eager", "conv_pointwise", "triton-predicted"}
    for row in rows.values():
        assert (row["kernel"], row["dtype"], row["layout"]) == (kernel, "float32", "channels_last")
        assert float(row["tflop_per_s"]) == pytest.approx(int(row["flop"]) / float(row["p50_ms"]) / 1e9)
        assert 0 <= float(row["error_fp64"]) < error
    assert rows["triton-predicted"]["tile"].startswith("pointer-")
    assert rows["eager"]["tile"] == ""
    table = plot.tables(plot.newest_run(list(rows.values())))
    assert "time / eager |" in table
    assert f"| triton-predicted ({rows['triton-predicted']['tile']}) |" in table


@pytest.mark.interpreter
def test_all_tiles_are_measured_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "why_not", lambda *_: None)
    monkeypatch.setattr(Gpu, "of", lambda device: Gpu("NVIDIA H200", (9, 0), 132))
    layer = Layer.of("conv_bn_relu", (8, 256, 65, 65), (1024, 256, 1, 1), torch.bfloat16, residual=True)
    names = [name for name, _ in cases.implementations(layer, all_tiles=False)]
    assert names == ["eager", "compiled", "conv_pointwise", "triton-predicted"]
    every = cases.implementations(layer, all_tiles=True)
    assert len(every) == len(names) + len(tuning.tile_choices(layer, cases.DEVICE)) == len(dict(every))
    assert {tile.kernel for _, tile in every if tile} == {"pointer", "gemm_tma"}


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_every_convolution_of_a_network_has_its_case(depth: int, output_stride: int) -> None:
    """Those of R101 are those of R50; none is there twice; work and floor are those of the floor model."""
    found = cases.network_convolutions(torch.bfloat16)
    by_layer = {case.layer: case for case in found}
    assert len(by_layer) == len(found)
    layers = roofline.conv_layers(depth, output_stride, (520, 520), 8)
    padded = {cases.CLASSIFIER: 24}  # of 21 classes, as an accelerated model computes them
    layers = [replace(layer, C_out=padded.get(layer.name, layer.C_out)) for layer in layers]
    fused = list(cases.fused(layers, torch.bfloat16))
    assert len(fused) == len(layers) - 3
    flop = 0
    for name, layer in fused:
        case = by_layer[layer]
        same = [other for other in layers if other.name == name]
        flop += case.flop
        if layer.function == "conv_bn_relu":
            assert case.flop == 2 * same[0].macs
            assert case.work.bytes == same[0].bytes(torch.bfloat16)
            if layer.stride == 1 and layer.kernel[0] <= 3:
                assert case.work.flop == pytest.approx(2 * same[0].live_macs)
        if layer.function == "aspp_branches":
            branches = [other for other in layers if other.stage == roofline.BRANCHES]
            assert case.work.flop == pytest.approx(2 * sum(other.live_macs for other in branches))
            assert layer.dilations == tuple(other.dilation for other in branches[1:])
    pooled = 8 * math.prod(layers[-1].size_out) * 256 * 256  # of the projection, once per image in ours
    assert flop == 2 * (sum(layer.macs for layer in layers) - pooled)


def test_a_case_is_read_from_its_name() -> None:
    shapes = {case.shape for case in cases.network_convolutions(torch.bfloat16)}
    expected = {
        "8x256x65x65->1024 1x1 residual",
        "8x512x65x65->512 3x3 dilation 4",
        "8x2048x65x65->256 rates 12 24 36",
        "8x256x130x130->512 1x1 stride 2 no relu",
        "8x1024x65x65->256 1x1",
        "1x256x128x256->24 1x1 no relu",
    }
    assert expected <= shapes


def test_the_modules_compute_what_the_layer_does() -> None:
    for case in cases.small_convolutions(torch.float64):
        if case.layer.function == "conv_bn_relu":
            inputs = tuning.random_inputs(case.layer, CPU)
            module = bench_conv.OfInputs(case.layer, *inputs[1:3], batch_norm=True)
            torch.testing.assert_close(module(*inputs), tuning.in_fp64(case.layer, inputs))


def test_predictions_are_above_the_floor(capsys: pytest.CaptureFixture[str]) -> None:
    predict.main([])
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.split("\n\n")[0].splitlines()
    ]
    assert len({len(row) for row in rows}) == 1
    for row in rows[2:]:
        floor, kernel, separate = (float(row[column]) for column in (3, 4, 6))
        assert floor <= kernel
        assert floor < separate
    assert rows[-1][0] == "all"


def as_text(row: Row) -> dict[str, str]:
    return {name: "" if value is None else str(value) for name, value in dataclasses.asdict(row).items()}


def test_only_the_newest_commit_of_one_device_is_shown() -> None:
    rows = [
        as_text(a_row(commit="old", p50_ms=100.0)),
        as_text(a_row(commit="old", implementation="removed since", p50_ms=1.0)),
        as_text(a_row(commit="new", p50_ms=8.0)),
        as_text(a_row(commit="new", implementation="torch", p50_ms=4.0)),
        as_text(a_row(commit="new", p50_ms=16.0)),
    ]
    found = plot.newest_run(rows)
    assert {(row["commit"], row["p50_ms"]) for row in found} == {("new", "16.0"), ("new", "4.0")}
    text = plot.tables(found)
    assert "commit new" in text
    assert "| 0.250 |" in text

    mixed = [*rows, as_text(a_row(device="NVIDIA H200", driver="1.2", commit="gpu"))]
    with pytest.raises(ValueError, match="several devices"):
        plot.newest_run(mixed)
    (only,) = plot.newest_run(mixed, "NVIDIA H200")
    assert only["commit"] == "gpu"
    with pytest.raises(ValueError, match="no rows of A100"):
        plot.newest_run(mixed, "A100")
    with pytest.raises(ValueError, match="no rows of any device"):
        plot.newest_run([])


def test_times_of_a_cpu_are_shown_as_ratios_only() -> None:
    on_cpu = plot.tables([as_text(a_row(p50_ms=12.3456))])
    on_gpu = plot.tables([as_text(a_row(p50_ms=12.3456, driver="1.2"))])
    assert "12.3456" not in on_cpu
    assert "12.3456 (1.0000 to 3.0000)" in on_gpu


def test_what_was_not_measured_stands_below_the_table() -> None:
    networks = [
        as_text(a_row(kernel="predict R50 OS8", implementation=name, peak_memory_bytes=None, **options))
        for name, options in (
            ("torchvision-fp32", {"p50_ms": 8.0, "driver": "1.2", "gb_per_s": None, "tflop_per_s": 7.0}),
            ("fastdeeplab", {"p50_ms": 2.0, "driver": "1.2", "gb_per_s": None, "tflop_per_s": 28.0}),
            ("torchvision-compile", {"p50_ms": None, "driver": "1.2", "reason": "RuntimeError: no"}),
        )
    ]
    text = plot.tables(networks)
    assert "time / torchvision-fp32" in text
    assert "| fastdeeplab | 2.0000 (1.0000 to 3.0000) |  | 28 |  | 0.250 |  |  | 1.0e-07 |" in text
    assert text.endswith("\n- predict R50 OS8 1x2x3x4->5x6 float32, torchvision-compile: RuntimeError: no")


def test_a_figure_per_kernel(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [as_text(a_row(kernel=k, implementation=i)) for k in ("the one", "two") for i in ("eager-fp32", "torch")]
    assert [path.name for path in plot.draw_figures(rows, tmp_path)] == ["the-one.png", "two.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
