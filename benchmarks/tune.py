"""Measure every tile choice and library form of every layer, and keep the fastest of each in the shipped table.

``python -m benchmarks.tune [--layers SUBSTRING] [--out kernels/tuned.json] [--dtype float16] [--seconds 0.05]``, from
the repository's root. A line per layer is shown, and the table is written after each: a stopped run keeps what it has,
``--missing`` goes on with it. The rows of other GPUs and layers stay. Without kernels the library is measured alone,
and nothing is written.

The table is read by ``fastdeeplab.kernels.decisions``.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # for ``python -m``: the benchmarks import each other by name

from cases import DEVICE, ConvCase, convolutions
from fastdeeplab.kernels.candidates import Gpu
from fastdeeplab.kernels.choice import interpreting
from fastdeeplab.kernels.decisions import Measurement
from fastdeeplab.kernels.tuning import Times, fastest, tile_name, tune
from harness import ROOT, commit, triton_version

from fastdeeplab.atomic import replace_when_complete

Table = dict[str, Any]
SHIPPED = ROOT / "kernels" / "tuned.json"


def read_table(path: Path) -> Table:
    """An empty one if there is no file.

    Raises:
        ValueError: the file is no table.
    """
    if not path.exists():
        return {"measurements": []}
    try:
        table = json.loads(path.read_text())
        for row in table["measurements"]:
            Measurement.from_json(row)
        return {"measurements": table["measurements"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of measurements: {error!r}") from error


def write_table(path: Path, table: Table) -> None:
    """A line per row, so that a change shows what it changes."""
    rows = ",\n".join(json.dumps(row) for row in table["measurements"])
    with replace_when_complete(path) as partial:
        partial.write_text(f'{{"measurements": [\n{rows}\n]}}\n')


def add(table: Table, measurement: Measurement) -> None:
    """In place of an older row of the same layer on the same GPU."""
    row = json.loads(json.dumps(measurement._replace(commit=commit()).to_json()))
    others = [old for old in table["measurements"] if (old["gpu"], old["layer"]) != (row["gpu"], row["layer"])]
    table["measurements"] = [*others, row]


def missing(cases: Sequence[ConvCase], table: Table) -> list[ConvCase]:
    """Those without a row of this GPU and these versions of torch and triton."""
    here = (Gpu.of(DEVICE).name, str(torch.__version__), triton_version())
    rows = map(Measurement.from_json, table["measurements"])
    done = {row.layer for row in rows if (row.gpu, row.torch, row.triton) == here}
    return [case for case in cases if case.layer not in done]


def summary(times: Times) -> str:
    """The fastest of either kind, and how they compare."""
    form = min(times.forms, key=lambda form: times.forms[form])
    library = f"{form} {times.forms[form]:.1f} us"
    if not times.tiles:
        return f"{library}, no kernel"
    tile = min(times.tiles, key=lambda tile: times.tiles[tile])
    wrong = sum(time == math.inf for time in (*times.tiles.values(), *times.forms.values()))
    ratio = times.forms[form] / times.tiles[tile] if min(times.forms[form], times.tiles[tile]) < math.inf else math.nan
    left_out = f", {wrong} left out" if wrong else ""
    return f"{tile_name(tile)} {times.tiles[tile]:.1f} us, {library}, library / kernel {ratio:.2f}{left_out}"


def tune_all(cases: Sequence[ConvCase], path: Path, table: Table, measure_one: Callable[[ConvCase], Times]) -> None:
    for number, case in enumerate(cases, start=1):
        times = measure_one(case)
        print(f"[{number}/{len(cases)}] {case.name} {case.shape}: {summary(times)}", flush=True)
        if measurement := fastest(case.layer, DEVICE, times):
            add(table, measurement)
            write_table(path, table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="", metavar="SUBSTRING", help="of the layers' names and shapes")
    parser.add_argument("--missing", action="store_true", help="leave out layers that the table has of this GPU")
    parser.add_argument("--out", type=Path, default=SHIPPED, metavar="FILE", help="table (default: the shipped one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.05, help="how long to repeat each call (default: 0.05)")
    options = parser.parse_args(arguments)
    if interpreting() and options.out == SHIPPED:
        parser.error("the interpreter's times mean nothing: name another table with --out")
    try:
        table = read_table(options.out)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    cases = convolutions(getattr(torch, options.dtype))
    cases = [case for case in cases if options.layers in f"{case.name} {case.shape}"]
    cases = missing(cases, table) if options.missing else cases
    if not cases:
        sys.exit("no layer is left to measure")
    try:
        tune_all(cases, options.out, table, lambda case: tune(case.layer, DEVICE, seconds=options.seconds))
    except KeyboardInterrupt:
        sys.exit(f"stopped; {options.out} keeps the layers that are done")


if __name__ == "__main__":
    main()
