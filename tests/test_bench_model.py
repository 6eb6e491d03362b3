"""The benchmark of whole networks: rows as they are measured, floors where the GPU is known, aims where they apply."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import bench_model
import harness
import pytest
import roofline
import torch
from cases import ConvCase
from fastdeeplab.kernels.candidates import Layer, Tail
from fastdeeplab.kernels.measure import Measurement
from harness import Results
from small_rivals import CPU, GPU, NETWORK, live, result

from fastdeeplab.speed import results as results_module
from fastdeeplab.speed.breakdown import Part
from fastdeeplab.speed.results import Result
from fastdeeplab.speed.rivals import Network

R50 = Network(50, 8, 21, (520, 520), 8, torch.bfloat16)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((harness, "device_name"), (bench_model, "device_name"), (results_module, "device_name")):
        monkeypatch.setattr(module, name, lambda _: "NVIDIA H200")
    monkeypatch.setattr(harness, "driver", lambda _: "1.2")


def timed(network: Network, milliseconds: dict[str, float]) -> list[Result]:
    return [
        Result(network, live(name, ours=name.startswith("fast")), Measurement(ms, ms, ms, 10, 0, 0.0))
        for name, ms in milliseconds.items()
    ]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_network_is_measured_into_rows_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Results(tmp_path / "rows.csv")
    rivals = [live("torchvision-fp32"), live("fastdeeplab", ours=True)]
    bench_model.measure_network(NETWORK, CPU, file, seconds=0.01, rivals=rivals)
    rows = read(file.path)
    assert [row["implementation"] for row in rows] == ["torchvision-fp32", "fastdeeplab"]
    for row in rows:
        assert (row["kernel"], row["shape"], row["dtype"]) == ("predict R50 OS8", "2x3x33x33 K=5", "float32")
        assert float(row["tflop_per_s"]) == pytest.approx(int(row["flop"]) / float(row["p50_ms"]) / 1e9)
        assert row["floor_ms"] == row["share_of_floor"] == row["reason"] == ""
    text = capsys.readouterr().out
    assert "only their ratios do" in text
    assert re.search(r"\| torchvision-fp32 \| [\d.]+ \| [\d.]+ \([\d.]+ to [\d.]+\) \|  \| \d+ \| 1.00 \|", text)
    assert re.search(r"against eager in fp32: [\d.]+, at least 1.30 is aimed at", text)


def test_rows_are_there_before_a_run_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Results(tmp_path / "rows.csv")

    def stopped(*_: object, **__: object) -> Iterator[Result]:
        yield Result(NETWORK, live("torchvision-fp32"), None, "RuntimeError: no")
        assert read(file.path)[-1]["reason"] == "RuntimeError: no"
        yield result("fastdeeplab", 10.0, ours=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_model, "bench", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench_model.measure_network(NETWORK, CPU, file, seconds=1)
    assert [row["p50_ms"] for row in read(file.path)] == ["", "10.0"]
    assert "| torchvision-fp32 | not measured: RuntimeError: no |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=re.escape(f"stopped; {file.path} keeps what was measured")):
        bench_model.main(["--csv", str(file.path), "--size", "33x33", "--rivals", "fastdeeplab"])
    assert len(read(file.path)) == 4


def test_the_floor_is_that_of_the_roofline(h200: None) -> None:
    floor = bench_model.floor_milliseconds(R50, GPU)
    assert 8000 / floor == pytest.approx(
        roofline.images_per_second(
            results_module.PLAN, roofline.network_layers(50, 8, "520x520", 21), roofline.GPUS["H200"]
        )
    )
    row = bench_model.row_of(timed(R50, {"fastdeeplab": 2 * floor})[0], GPU)
    assert row.share_of_floor == pytest.approx(0.5)
    aux = 1024 * 256 * 9 * 65**2 + 256 * 21 * 65**2  # a head that torchvision's published count has
    assert row.flop == pytest.approx(8 * 2 * (178.722e9 - aux), rel=1e-3)
    assert bench_model.floor_milliseconds(Network(dtype=torch.float32), GPU) is None


def test_an_unknown_gpu_has_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_module, "device_name", lambda _: "NVIDIA GeForce GT 710")
    assert bench_model.floor_milliseconds(R50, GPU) is None


def test_aims_apply_to_their_networks(h200: None) -> None:
    rivals = {"fp32": 20.0, "channels_last": 12.0, "compile": 8.0, "max-autotune": 6.0}
    times = {f"torchvision-{name}": ms for name, ms in rivals.items()}

    def aims(network: Network, device: torch.device = GPU, **ours: float) -> dict[str, float]:
        results = timed(network, times | {name.replace("_", "-"): ms for name, ms in ours.items()})
        return {f"{wanted} {what}": ratio for what, wanted, ratio in bench_model.aims_reached(results, device)}

    floor = bench_model.floor_milliseconds(R50, GPU)
    assert aims(R50, fastdeeplab=4.0) == pytest.approx(
        {"1.35 the best torch.compile": 1.5, "2.0 eager in channels_last": 3.0, "0.7 the floor": floor / 4}
    )
    assert "1.6 the best torch.compile, 150 classes" in aims(Network(num_classes=150, batch=8), fastdeeplab=4.0)
    one = aims(Network(size=(512, 512)), fastdeeplab=4.0, fastdeeplab_graphs=3.0)
    assert one["1.5 the best torch.compile, as a CUDA graph"] == 2.0
    assert "2.0 eager in channels_last" not in one
    assert aims(Network(dtype=torch.float32), CPU, fastdeeplab=10.0) == {"1.3 eager in fp32": 2.0}
    assert aims(R50) == {}  # none of ours was measured


def test_the_networks_of_the_aims() -> None:
    found = list(bench_model.networks_of_the_aims(torch.bfloat16))
    assert len(set(found)) == len(found) == 16
    assert str(found[0]) == "R50 OS8 512x512 B8 K=21"
    assert {network.depth for network in found} == {50, 101, 152}
    assert {str(network) for network in found} >= {
        f"R{depth} OS{stride} {size} B{batch} K={21 if batch == 8 else 19}"
        for depth in (50, 101)
        for stride in (8, 16)
        for size, batch in (("512x512", 8), ("520x520", 8), ("1024x2048", 1))
    } | {"R50 OS8 512x512 B8 K=150", "R50 OS8 512x512 B1 K=21"}


def test_the_breakdown_has_floors(h200: None, capsys: pytest.CaptureFixture[str]) -> None:
    layer = Layer.of("conv_bn_relu", (8, 256, 65, 65), (1024, 256, 1, 1), torch.bfloat16, residual=True)
    floor = ConvCase("", layer).work.floor(roofline.GPUS["H200"])
    tail = Tail(8, 21, 65, 65, 520, 520, torch.bfloat16, channels_last=True)
    parts = [
        Part("layer3.1", "conv_bn_relu", layer, "triton", 2 * floor),
        Part("upsample_argmax", "upsample_argmax", tail, "triton", 0.5),
        Part("", "add", None, "torch", 1.0),
    ]
    bench_model.print_profile(parts, GPU)
    text = capsys.readouterr().out
    assert f"| layer3.1 | conv_bn_relu | {layer} | triton | {2000 * floor:.1f} |" in text
    assert f"| {1000 * floor:.1f} | 0.50 |" in text
    assert "| upsample_argmax | upsample_argmax | 8x21x65x65->520x520 | triton | 500.0 |" in text
    assert re.search(r"\|  \| add \|  \| torch \| 1000.0 \| \d+.\d% \|  \|  \|", text)


@pytest.mark.parametrize("profile", [False, True])
def test_a_network_without_memory_leaves_the_others_alone(
    profile: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before its masks, or for its profile alone; a rival's own is a row of its."""
    found: list[str] = []

    def bench(network: Network, *_: object, **__: object) -> Iterator[Result]:
        found.append(str(network))
        if not profile and len(found) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to")
        yield Result(network, live("torchvision-fp32"), None, "OutOfMemoryError: CUDA out of memory.")
        yield from timed(network, {"fastdeeplab": 4.0})

    def time_operations(*_: object) -> list[Part]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to")

    networks = [Network(size=size, dtype=torch.float32) for size in ((33, 33), (41, 41))]
    monkeypatch.setattr(bench_model, "networks_of_the_aims", lambda _: iter(networks))
    monkeypatch.setattr(bench_model, "bench", bench)
    monkeypatch.setattr(bench_model, "chosen_rivals", lambda *_: [])
    monkeypatch.setattr(bench_model, "time_operations", time_operations)
    monkeypatch.setattr(bench_model.fdl, "accelerate", lambda *_, **__: None)
    monkeypatch.setattr(Network, "build", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module, name in ((harness, "device_name"), (bench_model, "device_name"), (results_module, "device_name")):
        monkeypatch.setattr(module, name, lambda _: "a GPU")
    monkeypatch.setattr(harness, "driver", lambda _: "1.2")
    monkeypatch.setattr(Network, "images", lambda *_: torch.zeros(1))
    bench_model.main(["--all", "--dtype", "float32", "--csv", str(tmp_path / "rows.csv"), *["--profile"] * profile])
    text = capsys.readouterr().out
    assert found == [str(network) for network in networks]
    rows = read(tmp_path / "rows.csv")
    if profile:
        for network in networks:
            assert f"{network} has no profile: OutOfMemoryError: CUDA out of memory.\n" in text
        assert len(rows) == 4
    else:
        assert f"{networks[0]} is left out: OutOfMemoryError: CUDA out of memory.\n" in text
        assert [row["reason"] for row in rows] == ["OutOfMemoryError: CUDA out of memory.", ""]
    assert "| torchvision-fp32 | not measured: OutOfMemoryError: CUDA out of memory. |" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "520"], "a size is HEIGHTxWIDTH, such as 520x520, got 520"),
        (["--size", "520x520,"], "a size is HEIGHTxWIDTH, such as 520x520, got "),
        (["--size", "0x5"], "size must be two positive numbers"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--classes", "1"], "num_classes must be at least 2"),
    ],
)
def test_a_wrong_option_is_said_before_anything_runs(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_model, "bench", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        bench_model.main([*options, "--csv", str(tmp_path / "rows.csv")])
    assert message in capsys.readouterr().err


def test_a_rival_that_there_is_none_of(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no rival tensorrt, but torchvision-fp32"):
        bench_model.main(["--rivals", "fastdeeplab,tensorrt", "--csv", str(tmp_path / "rows.csv")])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_all_networks_are_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_model.main(["--all"])
    assert "--all needs a GPU" in capsys.readouterr().err
