"""What is said of measurements: ratios of times, the share of the floor, charts, rows."""

import csv
import re
from pathlib import Path

import matplotlib
import pytest
import torch
from fastdeeplab.kernels.measure import Measurement
from PIL import Image
from rich.console import Console
from small_rivals import CPU, GPU, NETWORK, live, result

from fastdeeplab.speed import results as results_module
from fastdeeplab.speed.results import Result, Rows, best_rival, draw_chart, floor_milliseconds, results_table, summary
from fastdeeplab.speed.rivals import Network


def test_the_share_of_the_floor_where_the_gpu_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_module, "device_name", lambda _: "NVIDIA H200")
    network = Network(dtype=torch.bfloat16)
    floor = floor_milliseconds(network, GPU)
    found = Measurement(3 * floor, 4 * floor, 5 * floor, 10, 0, 0.0)
    results = [Result(network, live("one"), found), Result(network, live("other"), None, "no")]
    console = Console(record=True, width=160, file=(tmp_path / "out").open("w"))
    console.print(results_table(results, GPU))
    text = console.export_text()
    assert "share of floor" in text
    assert re.search(r"one +│ .* │ +0\.25 │", text)
    for each in results:
        Rows(tmp_path / "rows.csv").append(each, GPU)
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["share_of_floor"] for row in rows] == ["0.25", ""]
    assert rows[1]["reason"] == "no"


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_chart(device: torch.device, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_module, "device_name", lambda place: "NVIDIA H200" if place == GPU else "a CPU")
    network = Network(dtype=torch.bfloat16 if device == GPU else torch.float32)
    times = {"slow": 40.0, "quick": 20.0, "ours": 8.0}
    results = [
        Result(network, live(name, ours=name == "ours"), Measurement(0.9 * ms, ms, 1.2 * ms, 10, 0, 0.0))
        for name, ms in times.items()
    ]
    path = tmp_path / f"bench.{suffix}"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_chart([*results, Result(network, live("failed"), None, "no")], device, path)
    if suffix == "png":
        with Image.open(path) as picture:
            assert min(picture.size) > 200
        return
    text = path.read_text()
    for name in (*times, str(network)):
        assert name in text
    assert "failed" not in text
    for speed in ("25", "50", "125") if device == GPU else ("0.5", "1", "2.5"):
        assert f">{speed}</text>" in text
    assert ("images per second" in text) == ("floor" in text) == (device == GPU)
    assert ("speed / quick" in text) == (device == CPU)


def test_the_best_rival_is_not_ours_and_ratios_are_of_times() -> None:
    results = [result("slow", 40.0), result("quick", 20.0), result("a", 8.0, ours=True), result("b", 10.0, ours=True)]
    failed = Result(NETWORK, live("failed"), None, "no")
    assert best_rival([failed, *results]) == results[1]
    assert summary([failed, *results]) == "the speed of a is 5.00 times slow, 2.50 times quick"
    assert summary(results[2:]) == summary([failed]) == "nothing to compare"
    assert best_rival(results[2:]) is None


def test_the_memory_of_a_graph_is_not_known() -> None:
    assert result("plain", 1.0).peak_memory == 2_000_000
    assert result("graph", 1.0, graphs=True).peak_memory is None


def test_the_name_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    assert results_module.device_name(GPU) == "a GPU, cuda"
    assert results_module.device_name(CPU) == f"a CPU with {torch.get_num_threads()} threads"
