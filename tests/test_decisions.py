"""What runs a layer: what was measured, here or elsewhere, else the rule; and the table that is kept for the user."""

import errno
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastdeeplab.kernels import decisions
from fastdeeplab.kernels.candidates import IEEE_TILES, Gpu, Layer, Tile
from fastdeeplab.kernels.decisions import Decision, Measurement, decide
from layers import DENSE, EXPAND, H200, aspp, conv

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Measurement]]:
    """A shipped table to fill, on a machine with an H200 that has measured nothing itself."""
    rows: list[Measurement] = []
    monkeypatch.setattr(decisions, "shipped", lambda: tuple(rows))
    monkeypatch.setattr(decisions, "_tables", {})
    monkeypatch.setattr(Gpu, "of", lambda device: H200)
    decisions._decide.cache_clear()
    yield rows
    decisions._decide.cache_clear()


def measured(layer: Layer, gpu: str = H200.name, *, tile_us: float = 1.0, block_n: int = 64) -> Measurement:
    tile = Tile("pointer", 64, block_n, 64, num_warps=4, num_stages=4 if block_n == 64 else 3)
    return Measurement(gpu, (9, 0), "2.13.0", "3.7.1", layer, tile, tile_us, "cudnn_relu", 2.0)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("layer", "impl", "reason"),
    [
        (EXPAND, "triton", "the residual takes no pass of its own"),
        (DENSE, "torch", "neither a pass over the activations nor a quarter of the work"),
        (conv(8, 256, (65, 65), 64, 1), "torch", "neither a pass"),
        (
            conv(8, 512, (65, 65), 512, 3, padding=24, dilations=(24,)),
            "triton",
            "% of the multiplications read padding",
        ),
        (aspp(8, (65, 65), (12, 24, 36)), "triton", "41% of the multiplications read padding"),
        (aspp(1, (128, 256), (12, 24, 36)), "torch", "nor a quarter of the work"),
        (
            Layer.of("aspp_projection", (8, 1024, 65, 65), (256, 1024, 1, 1), torch.bfloat16),
            "triton",
            "no concatenation",
        ),
        (conv(8, 3, (512, 512), 64, 7, stride=2, padding=3), "torch", "no tile choice serves"),
    ],
)
def test_unmeasured_the_rule_decides(layer: Layer, impl: str, reason: str) -> None:
    decision = decide(layer, "auto", DEVICE)
    assert decision.impl == impl
    assert decision.form == "conv_pointwise"
    assert reason in decision.why
    assert decision.tile is None or decision.why.startswith("predicted: ")
    assert decision.tile is None or decision.tile.kernel == "pointer"


def test_what_was_asked_for_is_done_with_the_best_choice_known(table: list[Measurement]) -> None:
    table.append(measured(DENSE))
    for impl in ("triton", "torch"):
        assert decide(DENSE, impl, DEVICE) == Decision(impl, table[0].tile, "cudnn_relu", "as asked for")
    stem = conv(8, 3, (512, 512), 64, 7, stride=2, padding=3)
    assert decide(stem, "triton", DEVICE).impl == "nothing"
    assert decide(stem, "torch", DEVICE).impl == "torch"


@pytest.mark.parametrize(("tile_us", "impl"), [(1.0, "triton"), (3.0, "torch")])
def test_the_faster_one_runs(tile_us: float, impl: str, table: list[Measurement]) -> None:
    """Though the prediction would have been the other one, for one of the two."""
    table.append(measured(DENSE, tile_us=tile_us))
    assert decide(DENSE, "auto", DEVICE) == Decision(impl, table[0].tile, "cudnn_relu", "measured on NVIDIA H200")


def test_the_nearest_measurement_decides(table: list[Measurement]) -> None:
    """This layer on this GPU; else the most similar number of pixels; else another GPU of the architecture."""
    other_layer = Layer(**vars(DENSE) | {"relu": False})
    table.append(measured(DENSE)._replace(gpu="NVIDIA A100", capability=(8, 0)))
    table += [measured(other_layer), measured(DENSE, "NVIDIA H100", block_n=128)]
    assert decide(DENSE, "auto", DEVICE).why == "measured on NVIDIA H100"

    decisions._decide.cache_clear()
    far, near = (Layer(**vars(DENSE) | {"N": N}) for N in (64, 4))
    table += [measured(far, tile_us=3.0), measured(near)]
    decision = decide(DENSE, "auto", DEVICE)
    assert decision.impl == "triton"
    assert decision.tile is not None
    assert decision.tile._replace(splits=1) == table[-1].tile
    assert decision.why == "measured on NVIDIA H200 at another size"

    decisions._decide.cache_clear()
    table.append(measured(DENSE, tile_us=3.0))
    assert decide(DENSE, "auto", DEVICE).impl == "torch"

    decisions.remember(measured(DENSE, tile_us=0.5, block_n=128))
    decision = decide(DENSE, "auto", DEVICE)
    assert decision.impl == "triton"
    assert decision.tile is not None
    assert decision.tile.block_n == 128
    assert decision.why == "measured on NVIDIA H200"


def test_splits_are_those_of_the_size_at_hand(table: list[Measurement]) -> None:
    small = conv(1, 2048, (33, 33), 256, 1)
    row = measured(small)
    table.append(row._replace(tile=row.tile._replace(splits=8)))
    decision = decide(conv(4, 2048, (33, 33), 256, 1), "auto", DEVICE)
    assert decision.tile == row.tile
    assert decide(small, "auto", DEVICE).tile == table[0].tile


@pytest.mark.parametrize(("N", "measured_at_all"), [(8, True), (32, True), (64, False), (1, False)])
def test_a_measurement_holds_for_similar_sizes_only(N: int, measured_at_all: bool, table: list[Measurement]) -> None:
    """Up to two powers of two of pixels apart."""
    table.append(measured(DENSE))
    decision = decide(replace(DENSE, N=N), "auto", DEVICE)
    assert decision.why.startswith("measured" if measured_at_all else "predicted")


def test_a_measured_tile_that_wastes_work_at_another_size_is_no_choice_there(table: list[Measurement]) -> None:
    """Boxes fit 64x64 exactly, and a map of one row and column more badly."""
    rates, boxes = (12, 24, 36), Tile("boxes_tma", 256, 128, 64, 8, 3, skip=True)
    table.append(measured(aspp(8, (64, 64), rates))._replace(tile=boxes))
    assert decide(aspp(8, (64, 64), rates), "auto", DEVICE).tile == boxes
    assert decide(aspp(16, (64, 64), rates), "auto", DEVICE).tile == boxes
    decision = decide(aspp(8, (65, 65), rates), "auto", DEVICE)
    assert decision.tile is not None
    assert decision.tile.kernel == "pointer"
    assert decision.why.startswith("predicted")


def test_a_measurement_holds_for_its_architecture(table: list[Measurement], monkeypatch: pytest.MonkeyPatch) -> None:
    """An RTX A6000's (8.6) for an Orin (8.7); not an A100's (8.0)."""
    orin = Gpu("Orin", (8, 7), 16)
    monkeypatch.setattr(Gpu, "of", lambda device: orin)
    table.append(measured(DENSE)._replace(gpu="NVIDIA A100", capability=(8, 0)))
    assert decide(DENSE, "auto", DEVICE).why.startswith("predicted")
    decisions._decide.cache_clear()
    table.append(measured(DENSE)._replace(gpu="NVIDIA RTX A6000", capability=(8, 6)))
    assert decide(DENSE, "auto", DEVICE).why == "measured on NVIDIA RTX A6000"


def test_a_layer_without_a_kernel_has_a_measured_form(table: list[Measurement]) -> None:
    """The 7x7 convolution of the stem; at sizes that a kernel can't index, a row of a smaller one names the form."""
    stem = conv(8, 3, (512, 512), 64, 7, stride=2, padding=3)
    assert decide(stem, "auto", DEVICE) == Decision("torch", None, "conv_pointwise", "no tile choice serves the layer")
    decisions._decide.cache_clear()
    row = measured(stem)._replace(tile=None, tile_us=math.inf)
    assert Measurement.from_json(json.loads(json.dumps(row.to_json()))) == row
    table.append(row)
    for impl in ("auto", "torch"):
        assert decide(stem, impl, DEVICE)[:3] == ("torch", None, "cudnn_relu")
    assert decide(stem, "auto", DEVICE).why.endswith("; the library's call is measured on NVIDIA H200")
    assert decide(stem, "triton", DEVICE) == Decision("nothing", None, "cudnn_relu", "no tile choice serves the layer")
    decisions.store(here(stem)._replace(tile=None, tile_us=math.inf))
    forget()
    table.clear()
    assert decide(stem, "auto", DEVICE).form == "cudnn_relu"


@pytest.mark.parametrize("form", ["addmm_relu", "nonsense"])
def test_a_form_that_the_layer_does_not_have_is_passed_over(form: str, table: list[Measurement]) -> None:
    table.append(measured(DENSE)._replace(form=form))
    assert decide(DENSE, "auto", DEVICE).why.startswith("predicted: ")


def test_a_measured_tile_that_is_not_listed_any_more_is_passed_over(table: list[Measurement]) -> None:
    table.append(measured(DENSE)._replace(tile=Tile("pointer", 512, 512, 64, 8, 3)))
    assert decide(DENSE, "auto", DEVICE).why.startswith("predicted: ")


def test_measurements_are_written_and_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [measured(EXPAND), measured(aspp(1, (33, 33), (6, 12, 18), torch.float32), "NVIDIA H100", block_n=128)]
    text = json.dumps({"measurements": [row.to_json() for row in rows]})
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    decisions.shipped.cache_clear()
    try:
        assert list(decisions.shipped()) == rows
    finally:
        decisions.shipped.cache_clear()


def test_the_shipped_table_can_be_read() -> None:
    decisions.shipped.cache_clear()
    path = Path(decisions.__file__).with_name("tuned.json")
    assert {"measurements": [row.to_json() for row in decisions.shipped()]} == json.loads(path.read_text())


def test_full_fp32_is_the_librarys_unmeasured() -> None:
    layer = Layer.of("aspp_projection", (8, 1024, 65, 65), (256, 1024, 1, 1), torch.float32, precision="ieee")
    assert decide(layer, "auto", torch.device("cpu")).impl == "torch"
    assert decide(layer, "triton", torch.device("cpu")).tile == IEEE_TILES[0][1]
    assert decide(replace(layer, precision="tf32"), "auto", torch.device("cpu")).impl == "triton"


# The user's table


def here(layer: Layer, *, tile_us: float = 1.0, block_n: int = 64) -> Measurement:
    """Measured on this machine, which has an H200, with the versions at hand."""
    torch_version, triton_version = decisions.versions()
    return measured(layer, tile_us=tile_us, block_n=block_n)._replace(torch=torch_version, triton=triton_version)


def forget() -> None:
    """As in a new process."""
    decisions._tables.clear()
    decisions._decide.cache_clear()


def user_folder() -> Path:
    return decisions.table_folder(H200.name, H200.capability)


def test_where_the_users_table_is(cache_folder: Path) -> None:
    name = f"NVIDIA-H200-9.0-torch{torch.__version__}-triton{decisions.versions()[1]}"
    assert user_folder() == cache_folder / "fastdeeplab" / name
    assert decisions.table_folder("A/B: ..\n GPU", (8, 6)).parent == cache_folder / "fastdeeplab"


def test_what_was_measured_here_comes_before_what_ships(table: list[Measurement]) -> None:
    table.append(measured(DENSE, tile_us=3.0))
    assert decide(DENSE, "auto", DEVICE).impl == "torch"
    decisions.store(here(DENSE, block_n=128))
    assert decide(DENSE, "auto", DEVICE).impl == "torch"  # as it was read before
    forget()
    decision = decide(DENSE, "auto", DEVICE)
    assert decision == Decision("triton", here(DENSE, block_n=128).tile, "cudnn_relu", "measured on NVIDIA H200")

    decisions.store(here(DENSE, tile_us=3.0))  # measured again
    forget()
    assert decide(DENSE, "auto", DEVICE).impl == "torch"
    assert len(list(user_folder().iterdir())) == 1


@pytest.mark.usefixtures("table")
def test_a_layer_of_another_size_that_was_measured_here_decides() -> None:
    decisions.store(here(replace(DENSE, N=4)))
    assert decide(DENSE, "auto", DEVICE).why == "measured on NVIDIA H200 at another size"
    assert decide(EXPAND, "auto", DEVICE).why.startswith("predicted")


@pytest.mark.usefixtures("table")
def test_the_users_table_is_read_once_and_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    files = decisions._files
    monkeypatch.setattr(decisions, "_files", lambda folder: asked.append(folder) or files(folder))
    assert not asked
    for layer in (EXPAND, DENSE):
        decide(layer, "auto", DEVICE)
    decisions.remember(here(DENSE))
    decide(EXPAND, "auto", DEVICE)
    assert asked == [user_folder()]


@pytest.mark.usefixtures("table")
def test_what_is_remembered_while_a_decision_is_made_holds_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision made from the table as it was before must not be found again."""
    look_up = decisions._measured

    def slowly(layer: Layer, gpu: Gpu) -> Measurement | None:
        found = look_up(layer, gpu)
        if found is None:
            decisions.remember(here(layer))  # as another thread would
        return found

    monkeypatch.setattr(decisions, "_measured", slowly)
    assert decide(DENSE, "auto", DEVICE).why.startswith("predicted")
    assert decide(DENSE, "auto", DEVICE).why == "measured on NVIDIA H200"


WHOLE = here(DENSE).to_json() | {"format": decisions.FORMAT}


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'{"format": 1}',
        json.dumps(WHOLE)[:-20].encode(),
        json.dumps(WHOLE | {"tile_us": "fast"}).encode(),
        json.dumps(WHOLE | {"form_us": -1.0}).encode(),
        json.dumps(WHOLE | {"form_us": float("nan")}).encode(),
        json.dumps(WHOLE | {"tile_us": float("inf"), "form_us": float("inf")}).encode(),
        json.dumps(WHOLE | {"form": ["cudnn_relu"]}).encode(),
        json.dumps(WHOLE | {"layer": {**WHOLE["layer"], "N": "8"}}).encode(),
        json.dumps(WHOLE | {"layer": {**WHOLE["layer"], "dtype": "float12"}}).encode(),
        json.dumps(WHOLE | {"layer": here(EXPAND).to_json()["layer"]}).encode(),
        json.dumps(WHOLE | {"tile": {"kernel": "pointer"}}).encode(),
    ],
)
def test_a_damaged_file_is_named_and_ignored_and_the_others_count(text: bytes) -> None:
    for layer in (DENSE, EXPAND):
        decisions.store(here(layer))
    damaged = user_folder() / decisions._file_name(DENSE)
    damaged.write_bytes(text)
    with pytest.warns(RuntimeWarning, match="no measurement of a layer") as caught:
        decision = decide(DENSE, "auto", DEVICE)
    assert decision.why.startswith("predicted")
    assert decide(EXPAND, "auto", DEVICE).why == "measured on NVIDIA H200"
    assert [str(damaged) in str(warning.message) for warning in caught] == [True]

    decisions.store(here(DENSE))
    forget()
    assert decide(DENSE, "auto", DEVICE).why == "measured on NVIDIA H200"


@pytest.mark.usefixtures("table")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "change",
    [
        {"format": decisions.FORMAT + 1, "tile": "of a newer kind"},
        {"torch": "2.9.0"},
        {"triton": "3.5.0"},
        {"gpu": "NVIDIA H100"},
        {"form": "cudnn_of_the_future"},
        {"tile": Tile("pointer", 512, 512, 64, 8, 3)._asdict()},
        {"tile": WHOLE["tile"] | {"splits": 0}},
    ],
    ids=str,
)
def test_rows_of_other_times_and_places_are_passed_over_silently(change: dict[str, object]) -> None:
    decisions.store(here(DENSE))
    (user_folder() / decisions._file_name(DENSE)).write_text(json.dumps(WHOLE | change))
    assert decide(DENSE, "auto", DEVICE).why.startswith("predicted")


@pytest.mark.usefixtures("table")
def test_a_folder_that_can_not_be_used_is_warned_of_once(cache_folder: Path) -> None:
    cache_folder.mkdir()
    (cache_folder / "fastdeeplab").touch()  # a file in the folder's place
    with pytest.warns(RuntimeWarning, match="can't be read") as caught:
        found = [decide(layer, "auto", DEVICE).why for layer in (DENSE, EXPAND)]
    assert all(why.startswith("predicted") for why in found)
    assert len(caught) == 1
    with pytest.raises(OSError, match="fastdeeplab"):
        decisions.store(here(DENSE))


@pytest.mark.usefixtures("table")
def test_a_full_disk_leaves_the_table_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    decisions.store(here(DENSE))

    def half(path: Path, text: str) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="No space left"):
            decisions.store(here(DENSE, tile_us=3.0))
    assert [path.name for path in user_folder().iterdir()] == [decisions._file_name(DENSE)]
    assert decide(DENSE, "auto", DEVICE).impl == "triton"


WRITER = """
import json, sys
from fastdeeplab.kernels import decisions
row = decisions.Measurement.from_json(json.loads(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for N in (*range(int(sys.argv[2]), int(sys.argv[3])), *20 * [1000]):
    decisions.store(row._replace(layer=decisions.replace(row.layer, N=N)))
"""


@pytest.mark.usefixtures("table")
@pytest.mark.filterwarnings("error")
def test_two_processes_write_at_once_and_no_row_is_lost() -> None:
    """Rows of their own and, many times, the same one, while this process reads."""
    row = json.dumps(here(DENSE).to_json())
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, row, str(first), str(first + 30)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for first in (1, 21)
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    while None in [writer.poll() for writer in writers]:
        forget()
        decisions.measured_here(H200.name, H200.capability)
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    forget()
    found = decisions.measured_here(H200.name, H200.capability)
    assert set(found) == {replace(DENSE, N=N) for N in (*range(1, 51), 1000)}
    assert {path.suffix for path in user_folder().iterdir()} == {".json"}
