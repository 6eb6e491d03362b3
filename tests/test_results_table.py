"""The README's table holds what a GPU has measured at a commit, and nothing else."""

import dataclasses
from pathlib import Path

import pytest
import results_table
import torch
from harness import ROOT, Results, Row
from test_harness import a_row

from fastdeeplab.speed.rivals import Network, rivals_of

BEGIN, END = results_table.markers(results_table.ON_GPUS)
CPUS = "\n\n".join(results_table.markers(results_table.ON_CPUS))
EMPTY = f"before\n{BEGIN}\n{END}\n{CPUS}\nafter\n"


def measured(implementation: str, milliseconds: float | None, **changes: object) -> Row:
    known = {"kernel": "predict R50 OS8", "shape": "8x3x520x520 K=21", "layout": "", "dtype": "bfloat16"}
    known |= {"device": "NVIDIA H200", "driver": "1.2", "commit": "abc", "share_of_floor": None}
    return dataclasses.replace(a_row(), implementation=implementation, p50_ms=milliseconds, **(known | changes))


ROWS = (
    measured("torchvision-fp32", 16.0),
    measured("torchvision-channels_last", 8.0),
    measured("torchvision-compile", 5.0),
    measured("torchvision-max-autotune", 4.0),
    measured("cudnn-fused", 3.2),
    measured("fastdeeplab-torch", None, reason="RuntimeError: no"),
    measured("fastdeeplab", 2.5, share_of_floor=0.75),
)


def text_of(folder: Path, *rows: Row) -> str:
    for row in rows:
        Results(folder / f"{row.device}.csv").append(row)
    return results_table.results_text(results_table.measured(sorted(folder.glob("*.csv")), on_gpus=True))


def test_images_per_second_ratios_and_share_of_the_floor(tmp_path: Path) -> None:
    lines = text_of(tmp_path, *ROWS).splitlines()
    assert lines[0].startswith("NVIDIA H200, driver 1.2, torch ")
    assert lines[0].endswith(", commit abc:")
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert lines[4:] == [
        "| R50 OS8 8x3x520x520 K=21 | bfloat16 | 500 | 1000 | 2000 | 2500 |  | 3200 "
        "| 6.40x | 3.20x | 1.60x | 1.28x |  | 0.75 |"
    ]


def test_no_rival_of_a_gpu_is_left_out() -> None:
    """The one to beat is the best of all: each has a column, those of torch.compile one together."""
    network = Network(50, 8, 21, (512, 512), 1, torch.bfloat16)
    names = [rival.name for rival in rivals_of(network, torch.device("cuda"))]
    assert any(name.endswith("reduce-overhead") for name in names)
    ends = [end for ends in results_table.COLUMNS.values() for end in ends]
    left = [name for name in names if not any(name == end or name.endswith(f"-{end}") for end in ends)]
    assert left == ["ResNetModel"], "ours, on live parameters"


def test_networks_come_as_they_were_measured(tmp_path: Path) -> None:
    shapes = ("8x3x512x512 K=21", "1x3x1024x2048 K=19", "8x3x512x512 K=150")
    text = text_of(tmp_path, *(measured("fastdeeplab", 1.0, shape=shape) for shape in shapes))
    assert [text.index(shape) for shape in shapes] == sorted(text.index(shape) for shape in shapes)


def test_a_cpus_times_memory_and_ratio(tmp_path: Path) -> None:
    on_cpu = {"device": "a CPU", "driver": "", "dtype": "float32"}
    memory = {"torchvision-fp32": 2**20, "torchvision-compile": 2**20, "fastdeeplab": 3 * 2**20}
    for implementation, milliseconds, shape in (
        ("torchvision-fp32", 30.0, "1x3x33x33 K=21"),
        ("torchvision-compile", 20.0, "1x3x33x33 K=21"),
        ("fastdeeplab", 12.0, "1x3x33x33 K=21"),
        ("torchvision-fp32", 100.0, "1x3x65x65 K=21"),  # whose rival is missing
    ):
        row = measured(implementation, milliseconds, shape=shape, peak_memory_bytes=memory[implementation], **on_cpu)
        text_of(tmp_path, row)
    text_of(tmp_path, measured("fastdeeplab", 1.0, **(on_cpu | {"dtype": "bfloat16"})), *ROWS)
    text = results_table.cpus_text(results_table.measured(sorted(tmp_path.glob("*.csv")), on_gpus=False))
    lines = text.splitlines()
    assert lines[0].startswith("R50 OS8, a CPU, torch ")
    assert lines[0].endswith("commit abc:")
    assert lines[2:] == [
        "|  | 1x3x33x33 K=21 |",
        "| --- | --- |",
        "| torchvision, ms | 30 |",
        "| torch.compile, ms | 20 |",
        "| ResNetModel, ms |  |",
        "| accelerated, ms | 12 |",
        "| accelerated / torchvision | 2.50x |",
        "| peak memory of torchvision, MiB | 1 |",
        "| of the accelerated copy, MiB | 3 |",
    ]


@pytest.mark.parametrize(
    "row",
    [
        measured("fastdeeplab", 1.0, device="a CPU", driver=""),
        measured("fastdeeplab", 1.0, commit="abc-dirty"),
        measured("fastdeeplab", 1.0, commit="unknown"),
        measured("fastdeeplab", None, reason="RuntimeError: no"),
        measured("triton", 1.0, kernel="upsample_argmax"),
    ],
    ids=["CPU", "dirty", "no commit", "failed", "no network"],
)
def test_nothing_else_is_a_result(tmp_path: Path, row: Row) -> None:
    assert text_of(tmp_path, row) == results_table.NOTHING
    assert text_of(tmp_path, *ROWS) == text_of(tmp_path / "alone", *ROWS)


def test_gpus_and_commits_are_not_mixed(tmp_path: Path) -> None:
    old = measured("torchvision-compile", 1.0, commit="old")
    other = [dataclasses.replace(row, device="NVIDIA H100", p50_ms=10.0) for row in ROWS[:1]]
    text = text_of(tmp_path, old, *ROWS[:2], *other)
    h100, h200 = text.split("\n\nNVIDIA H200")
    assert h100.startswith("NVIDIA H100")
    assert "| 800 |  |  |  |  |" in h100
    assert "| 500 | 1000 |  |  |  |" in h200  # neither the old commit's nor the other GPU's
    assert "commit old" not in text


def test_the_readme_is_rewritten_between_its_markers(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    options = ["--readme", str(readme), "--results", str(results)]
    readme.write_text(EMPTY)
    with pytest.raises(SystemExit, match="not up to date"):
        results_table.main([*options, "--check"])
    assert readme.read_text() == EMPTY
    results_table.main(options)
    results_table.main([*options, "--check"])
    filled = f"{BEGIN}\n\n{results_table.NOTHING}\n\n{END}"
    expected = EMPTY.replace(f"{BEGIN}\n{END}", filled).replace("-->\n\n<", "-->\n\n\n\n<")
    assert readme.read_text() == expected
    text_of(results, *ROWS)
    with pytest.raises(SystemExit, match="not up to date"):
        results_table.main([*options, "--check"])
    results_table.main(options)
    results_table.main([*options, "--check"])
    written = readme.read_text()
    assert "| 6.40x | 3.20x | 1.60x |" in written
    assert results_table.NOTHING not in written
    assert (written[:7], written[-6:]) == ("before\n", "after\n")


@pytest.mark.parametrize(
    "text",
    [CPUS, BEGIN + CPUS, f"{END}{BEGIN}{CPUS}", EMPTY * 2, f"{BEGIN}{END}"],
    ids=["none", "one", "swapped", "twice", "no CPUs"],
)
def test_markers_that_do_not_fit_are_said(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(SystemExit, match="once each"):
        results_table.main(["--readme", str(readme)])
    assert readme.read_text() == text


@pytest.mark.skipif(BEGIN not in (ROOT / "README.md").read_text(), reason="the README has no markers")
def test_the_readme_is_up_to_date() -> None:
    results_table.main(["--check"])
