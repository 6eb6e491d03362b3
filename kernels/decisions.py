"""Which one runs a layer, the kernel in a tile choice or the library in one of its forms, and why.

What was measured decides: on this very GPU, kept in the user's cache directory by ``store``; else the shipped table
``tuned.json``. Where nothing was measured a rule decides between kernel and library, and ``candidates`` predicts the
kernel's tile. Such a decision is called a prediction wherever it is shown.
"""

import hashlib
import importlib
import json
import math
import re
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .candidates import (
    DEFAULT_FORM,
    STRIPS,
    Gpu,
    Layer,
    Strip,
    Tail,
    Tile,
    architecture,
    forms_for,
    predict_tile,
    sparing,
    splits_of,
    tiles_for,
)

SIMILAR = 4  # times as many pixels, or as few, may a layer have that was measured in another's stead
FORMAT = 1  # of a kept measurement; a new number where the kernels become faster, too, lets all be measured anew


class Decision(NamedTuple):
    impl: str  # "triton", "torch", or "nothing" if what was asked for can't run
    tile: Tile | None  # of the kernel
    form: str  # of the library
    why: str


class TailDecision(NamedTuple):
    impl: str  # "triton" or "torch"
    strip: Strip | None  # of the kernel; None: the one that it predicts
    why: str


Recorded = list[tuple[Any, Any]]  # a Layer with its Decision, or a Tail with its TailDecision
_recorded: ContextVar[Recorded | None] = ContextVar("_recorded", default=None)


@contextmanager
def recording() -> Iterator[Recorded]:
    """The layers that run inside, in eager mode, with what was decided for each; the tail is one of them."""
    found: Recorded = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


def is_recording() -> bool:
    """Whether somebody wants to know which layers run."""
    return _recorded.get() is not None


def record(layer: Layer | Tail, decision: Decision | TailDecision) -> None:
    if (found := _recorded.get()) is not None:
        found.append((layer, decision))


class Measurement(NamedTuple):
    """The fastest tile choice and the fastest library form of a layer on a GPU, in microseconds.

    Where no tile choice serves the layer there is none, and its time is infinite.
    """

    gpu: str
    capability: tuple[int, int]
    torch: str  # versions
    triton: str
    layer: Layer
    tile: Tile | None
    tile_us: float
    form: str
    form_us: float
    commit: str = ""  # of this project, in the shipped table

    def to_json(self) -> dict[str, Any]:
        tile = None if self.tile is None else self.tile._asdict()
        return self._asdict() | {"layer": _layer_json(self.layer), "tile": tile}

    @staticmethod
    def from_json(row: dict[str, Any]) -> "Measurement":
        layer = row["layer"]
        tuples = {name: tuple(layer[name]) for name in ("kernel", "dilations")}
        parts = {
            "capability": tuple(row["capability"]),
            "layer": Layer(**layer | tuples | {"dtype": getattr(torch, layer["dtype"])}),
            "tile": None if row["tile"] is None else Tile(**row["tile"]),
        }
        return Measurement(**row | parts)


class TailMeasurement(NamedTuple):
    """The fastest strip of ``upsample_argmax`` for a tail on a GPU, and PyTorch, in microseconds."""

    gpu: str
    capability: tuple[int, int]
    torch: str  # versions
    triton: str
    layer: Tail
    tile: Strip
    tile_us: float
    form: str
    form_us: float

    def to_json(self) -> dict[str, Any]:
        return self._asdict() | {"layer": _layer_json(self.layer), "tile": self.tile._asdict()}

    @staticmethod
    def from_json(row: dict[str, Any]) -> "TailMeasurement":
        layer = row["layer"]
        parts = {
            "capability": tuple(row["capability"]),
            "layer": Tail(**layer | {"dtype": getattr(torch, layer["dtype"])}),
            "tile": Strip(**row["tile"]),
        }
        return TailMeasurement(**row | parts)


Measured = Measurement | TailMeasurement


def _layer_json(layer: Layer | Tail) -> dict[str, Any]:
    return vars(layer) | {"dtype": str(layer.dtype).removeprefix("torch.")}


@cache
def versions() -> tuple[str, str]:
    """Of torch and triton, which measurements hold for."""
    return str(torch.__version__), importlib.import_module("triton").__version__


# The tables: what ships, and what was measured on this machine, a small file per layer, each written at once, so that
# processes need no locks among them and none loses another's rows.

_tables: dict[tuple[str, tuple[int, int]], Mapping[Layer | Tail, Measured]] = {}  # replaced, never changed
_lock = threading.RLock()
_changes = 0


@lru_cache
def shipped() -> tuple[Measurement, ...]:
    rows = json.loads(Path(__file__).with_name("tuned.json").read_text())["measurements"]
    return tuple(map(Measurement.from_json, rows))


def table_folder(gpu: str, capability: tuple[int, int]) -> Path:
    """Where the measurements of a GPU with these versions are kept: in the cache directory that has torch.hub's."""
    name = "{}-{}.{}-torch{}-triton{}".format(gpu, *capability, *versions())
    return Path(torch.hub.get_dir()).parent / "fastdeeplab" / re.sub(r"[^\w.+-]+", "-", name)


def measured_here(gpu: str, capability: tuple[int, int]) -> Mapping[Layer | Tail, Measured]:
    """What was measured on this machine, read from the user's table when a process first asks.

    Warns of what can't be read, which counts as never measured.
    """
    with _lock:
        if (gpu, capability) not in _tables:
            folder = table_folder(gpu, capability)
            rows: list[Measured] = [row for row in map(_read, _files(folder)) if row]
            _tables[gpu, capability] = {
                row.layer: row for row in rows if (row.gpu, row.capability) == (gpu, capability)
            }
        return _tables[gpu, capability]


def remember(measurement: Measured) -> None:
    """Let a measurement made on this machine decide from now on, in this process."""
    global _changes
    key = measurement.gpu, measurement.capability
    with _lock:
        _tables[key] = {**measured_here(*key), measurement.layer: measurement}
        _changes += 1


def store(measurement: Measured) -> None:
    """Write a measurement to the user's table, in place of an older one of its layer.

    Raises:
        OSError: it can't be written; the table is as it was.
    """
    folder = table_folder(measurement.gpu, measurement.capability)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{uuid.uuid4().hex}.partial"
    try:
        partial.write_text(json.dumps({"format": FORMAT} | measurement.to_json()))
        partial.replace(folder / _file_name(measurement.layer))
    finally:
        partial.unlink(missing_ok=True)


def _file_name(layer: Layer | Tail) -> str:
    return hashlib.sha256(json.dumps(_layer_json(layer), sort_keys=True).encode()).hexdigest()[:20] + ".json"


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        return []
    except OSError as error:
        warnings.warn(f"the measurements in {folder} can't be read: {error}", RuntimeWarning, stacklevel=4)
        return []


def _read(path: Path) -> Measured | None:
    """None if the file is damaged, of another format, or of versions that are not these."""
    try:
        row = json.loads(path.read_text())
        if row.pop("format") != FORMAT:
            return None
        kind = TailMeasurement if row["layer"]["function"] == "upsample_argmax" else Measurement
        measurement: Measured = kind.from_json(row)
        if path.name != _file_name(measurement.layer):
            raise ValueError("its name is another layer's")
        times = measurement.tile_us, measurement.form_us
        if not all(time > 0 for time in times) or min(times) == math.inf:
            raise ValueError(f"its times are {times}")
        if not isinstance(measurement.form, str):
            raise ValueError(f"its form is {measurement.form}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is ignored, it is no measurement of a layer: {error!r}", RuntimeWarning, stacklevel=4)
        return None
    return measurement if (measurement.torch, measurement.triton) == versions() else None


def usable(row: Measured, capability: tuple[int, int]) -> bool:
    """Whether what was measured is still among what may serve the layer."""
    if isinstance(row, TailMeasurement):
        return row.tile in STRIPS
    tiles = tiles_for(row.layer, capability)
    if row.tile is None:
        return not tiles and row.form in forms_for(row.layer)
    listed = row.tile._replace(splits=1) in tiles and row.tile.splits in splits_of(row.layer, row.tile, capability)
    return listed and row.form in forms_for(row.layer)


def _measured(layer: Layer, gpu: Gpu) -> Measurement | None:
    """Of this very layer on this GPU; else of a similar number of pixels; else of another GPU of its kind."""

    def times(row: Measurement) -> float:
        few, many = sorted((row.layer.pixels, layer.pixels))
        return many / few

    def apart(row: Measurement) -> tuple[bool, bool, float]:
        return row.gpu != gpu.name, row.layer != layer, times(row)

    similar = [
        row
        for row in (*measured_here(gpu.name, gpu.capability).values(), *shipped())  # of equals the first is taken
        if isinstance(row, Measurement)
        and architecture(row.capability) == architecture(gpu.capability)
        and replace(row.layer, N=layer.N, H=layer.H, W=layer.W) == layer
        and times(row) <= SIMILAR
        and usable(row, gpu.capability)
    ]
    return min(similar, key=apart, default=None)


def decide(layer: Layer, impl: str, device: torch.device) -> Decision:
    """Decide what runs a layer that is not empty when ``impl`` is asked for, on a device where kernels run."""
    return _decide(layer, impl, device, _changes)


@lru_cache(maxsize=4096)
def _decide(layer: Layer, impl: str, device: torch.device, changes: int) -> Decision:
    """``changes`` of the tables so far: what was decided by an older one, in whichever thread, is not found again."""
    gpu = Gpu.of(device)
    tiles = tiles_for(layer, gpu.capability)
    row = _measured(layer, gpu)
    form, why = DEFAULT_FORM, ""
    if row is not None:
        form, why = row.form, f"measured on {row.gpu}" + ("" if row.layer == layer else " at another size")
    if not tiles:
        unserved = "no tile choice serves the layer"
        if impl == "triton":
            return Decision("nothing", None, form, unserved)
        return Decision("torch", None, form, f"{unserved}; the library's call is {why}" if why else unserved)
    if row is None or row.tile is None or not _fits(row.tile, layer, tiles, exact=row.layer == layer):
        # The descriptor kernels are chosen by measurement only.
        tile = predict_tile(layer, gpu, tuple(tile for tile in tiles if tile.kernel == "pointer"))
        auto, why = _predict(layer)
    else:
        tile = row.tile if row.layer == layer else predict_tile(layer, gpu, (row.tile._replace(splits=1),))
        auto = "triton" if row.tile_us < row.form_us else "torch"
    return Decision(auto, tile, form, why) if impl == "auto" else Decision(impl, tile, form, "as asked for")


def _fits(tile: Tile, layer: Layer, tiles: Sequence[Tile], exact: bool) -> bool:
    """Whether a measured tile choice is one for a layer; of another size it may execute far more than others here."""
    return exact or tile._replace(splits=1) in sparing(layer, tiles)


def decide_tail(tail: Tail, impl: str, device: torch.device) -> TailDecision:
    """Decide what runs a tail that is not empty when ``impl`` is asked for, on a device where kernels run."""
    return _decide_tail(tail, impl, device, _changes)


@lru_cache(maxsize=4096)
def _decide_tail(tail: Tail, impl: str, device: torch.device, changes: int) -> TailDecision:
    """``changes`` as in ``_decide``."""
    gpu = Gpu.of(device)
    row = measured_here(gpu.name, gpu.capability).get(tail)
    strip, auto, why = None, "triton", "predicted: it never writes the full-size logits"
    if isinstance(row, TailMeasurement) and usable(row, gpu.capability):
        strip, auto, why = row.tile, "triton" if row.tile_us < row.form_us else "torch", f"measured on {row.gpu}"
    return TailDecision(auto, strip, why) if impl == "auto" else TailDecision(impl, strip, "as asked for")


def _predict(layer: Layer) -> tuple[str, str]:
    """The kernel where it saves a whole pass over the activations or a quarter of the multiplications."""
    if layer.dtype == torch.float32 and layer.precision == "ieee":
        return "torch", "predicted: without tensor cores the multiplications take all the time"
    if not layer.aligned:
        return "torch", "predicted: rows that begin between multiples of 16 bytes are read value by value"
    if layer.function == "aspp_projection":
        return "triton", "predicted: no concatenation and no upsampled pooling map are written"
    if layer.residual:
        return "triton", "predicted: the residual takes no pass of its own over the activations"
    if layer.live_share < 0.75:
        return "triton", f"predicted: {1 - layer.live_share:.0%} of the multiplications read padding and are left out"
    return "torch", "predicted: the kernel would save neither a pass over the activations nor a quarter of the work"
