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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .candidates import DEFAULT_FORM, SPLITS, Gpu, Layer, Tile, predict_tile, tiles_for
from .library import FORMS

FORMAT = 1  # of a kept measurement; a new number where the kernels become faster, too, lets all be measured anew


class Decision(NamedTuple):
    impl: str  # "triton", "torch", or "nothing" if what was asked for can't run
    tile: Tile | None  # of the kernel
    form: str  # of the library
    why: str


_recorded: ContextVar[list[tuple[Layer, Decision]] | None] = ContextVar("_recorded", default=None)


@contextmanager
def recording() -> Iterator[list[tuple[Layer, Decision]]]:
    """The layers that run inside, in eager mode, with what was decided for each."""
    found: list[tuple[Layer, Decision]] = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


def is_recording() -> bool:
    """Whether somebody wants to know which layers run."""
    return _recorded.get() is not None


def record(layer: Layer, decision: Decision) -> None:
    if (found := _recorded.get()) is not None:
        found.append((layer, decision))


class Measurement(NamedTuple):
    """The fastest tile choice and the fastest library form of a layer on a GPU, in microseconds."""

    gpu: str
    capability: tuple[int, int]
    torch: str  # versions
    triton: str
    layer: Layer
    tile: Tile
    tile_us: float
    form: str
    form_us: float
    commit: str = ""  # of this project, in the shipped table

    def to_json(self) -> dict[str, Any]:
        return self._asdict() | {"layer": _layer_json(self.layer), "tile": self.tile._asdict()}

    @staticmethod
    def from_json(row: dict[str, Any]) -> "Measurement":
        layer = row["layer"]
        tuples = {name: tuple(layer[name]) for name in ("kernel", "dilations")}
        parts = {
            "capability": tuple(row["capability"]),
            "layer": Layer(**layer | tuples | {"dtype": getattr(torch, layer["dtype"])}),
            "tile": Tile(**row["tile"]),
        }
        return Measurement(**row | parts)


def _layer_json(layer: Layer) -> dict[str, Any]:
    return vars(layer) | {"dtype": str(layer.dtype).removeprefix("torch.")}


@cache
def versions() -> tuple[str, str]:
    """Of torch and triton, which measurements hold for."""
    return str(torch.__version__), importlib.import_module("triton").__version__


# The tables: what ships, and what was measured on this machine, a small file per layer, each written at once, so that
# processes need no locks among them and none loses another's rows.

_tables: dict[tuple[str, tuple[int, int]], Mapping[Layer, Measurement]] = {}  # replaced, never changed
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


def measured_here(gpu: str, capability: tuple[int, int]) -> Mapping[Layer, Measurement]:
    """What was measured on this machine, read from the user's table when a process first asks.

    Warns of what can't be read, which counts as never measured.
    """
    with _lock:
        if (gpu, capability) not in _tables:
            folder = table_folder(gpu, capability)
            rows = filter(None, map(_read, _files(folder)))
            _tables[gpu, capability] = {
                row.layer: row for row in rows if (row.gpu, row.capability) == (gpu, capability)
            }
        return _tables[gpu, capability]


def remember(measurement: Measurement) -> None:
    """Let a measurement made on this machine decide from now on, in this process."""
    global _changes
    key = measurement.gpu, measurement.capability
    with _lock:
        _tables[key] = {**measured_here(*key), measurement.layer: measurement}
        _changes += 1


def store(measurement: Measurement) -> None:
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


def _file_name(layer: Layer) -> str:
    return hashlib.sha256(json.dumps(_layer_json(layer), sort_keys=True).encode()).hexdigest()[:20] + ".json"


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        return []
    except OSError as error:
        warnings.warn(f"the measurements in {folder} can't be read: {error}", RuntimeWarning, stacklevel=4)
        return []


def _read(path: Path) -> Measurement | None:
    """None if the file is damaged, of another format, or of versions that are not these."""
    try:
        row = json.loads(path.read_text())
        if row.pop("format") != FORMAT:
            return None
        measurement = Measurement.from_json(row)
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


def usable(row: Measurement, capability: tuple[int, int]) -> bool:
    """Whether what was measured is still among what may serve the layer."""
    listed = row.tile._replace(splits=1) in tiles_for(row.layer, capability)
    return listed and row.tile.splits in SPLITS and row.form in FORMS


def _measured(layer: Layer, gpu: Gpu) -> Measurement | None:
    """Of this very layer on this GPU; else of the most similar number of pixels; else of another GPU of its kind."""

    def apart(row: Measurement) -> tuple[bool, bool, int]:
        powers_of_two = abs(row.layer.pixels.bit_length() - layer.pixels.bit_length())
        return row.gpu != gpu.name, row.layer != layer, powers_of_two

    similar = [
        row
        for row in (*measured_here(gpu.name, gpu.capability).values(), *shipped())  # of equals the first is taken
        if row.capability == gpu.capability
        and replace(row.layer, N=layer.N, H=layer.H, W=layer.W) == layer
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
    if not tiles:
        why = "no tile choice serves the layer"
        return Decision("nothing" if impl == "triton" else "torch", None, DEFAULT_FORM, why)
    row = _measured(layer, gpu)
    if row is None:
        # The descriptor kernels are chosen by measurement only.
        tile = predict_tile(layer, gpu, tuple(tile for tile in tiles if tile.kernel == "pointer"))
        form, (auto, why) = DEFAULT_FORM, _predict(layer)
    else:
        exact = row.layer == layer
        tile = row.tile if exact else predict_tile(layer, gpu, (row.tile._replace(splits=1),))
        form, auto = row.form, "triton" if row.tile_us < row.form_us else "torch"
        why = f"measured on {row.gpu}" if exact else f"measured on {row.gpu} at another size"
    return Decision(auto, tile, form, why) if impl == "auto" else Decision(impl, tile, form, "as asked for")


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
