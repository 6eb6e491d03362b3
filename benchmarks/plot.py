"""Tables and figures from a CSV of measurements, and from nothing else.

``python benchmarks/plot.py FILE`` prints tables in Markdown, ``--figures FOLDER`` draws a figure per kernel too (needs
matplotlib, the extra ``plots``). One GPU and one commit at a time, the newest one; a measurement made twice counts as
the last time. On a CPU only ratios are shown: absolute times of a shared machine mean nothing elsewhere.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

Row = dict[str, str]

# Of the upsampling kernels, of the convolutions, of the networks: one of them in each case.
BASELINES = ("eager-fp32", "eager", "torchvision-fp32", "layers-fp32")
RUN = ("commit", "driver", "torch", "triton")
CASE = ("kernel", "shape", "dtype", "layout")


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def newest_run(rows: list[Row], device: str | None = None) -> list[Row]:
    """The rows of the last run's commit and versions on one device.

    Raises:
        ValueError: there are no rows, or several devices and none is named, or the named one is not there.
    """
    devices = sorted({row["device"] for row in rows})
    if device is None and len(devices) > 1:
        raise ValueError(f"the file holds several devices, name one of them with --device: {', '.join(devices)}")
    rows = [row for row in rows if row["device"] == (device or row["device"])]
    if not rows:
        raise ValueError(f"no rows of {device or 'any device'}; the file holds {', '.join(devices) or 'none'}")
    run = [rows[-1][name] for name in RUN]
    rows = [row for row in rows if [row[name] for name in RUN] == run]
    latest = {tuple(row[name] for name in (*CASE, "implementation")): row for row in rows}
    return list(latest.values())


def cases(rows: list[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """Each case's baseline with all implementations that were measured; without a baseline there is no comparison."""

    def case(row: Row) -> list[str]:
        return [row[name] for name in CASE]

    measured = (row for row in rows if row["p50_ms"])
    for _, group in groupby(sorted(measured, key=case), key=case):
        found = list(group)
        for baseline in (row for row in found if row["implementation"] in BASELINES):
            yield baseline, found


def ratio(row: Row, baseline: Row, column: str) -> float:
    """NaN where it is not known."""
    return float(row[column] or "nan") / float(baseline[column] or "nan") if baseline[column] != "0" else float("nan")


def heading(row: Row) -> str:
    versions = f"torch {row['torch']}, triton {row['triton'] or 'none'}"
    driver = f", driver {row['driver']}" if row["driver"] else ""
    return f"{row['device']}{driver}, {versions}, commit {row['commit']}"


def tables(rows: list[Row]) -> str:
    on_gpu = bool(rows[0]["driver"])
    lines = [heading(rows[0])]
    kernel = None
    for baseline, group in cases(rows):
        if baseline["kernel"] != kernel:
            kernel, name = baseline["kernel"], baseline["implementation"]
            names = ["shape", "input", "implementation"]
            names += ["ms (p20 to p80)", "GB/s", "TFLOP/s", "share of floor"] if on_gpu else []
            names += [f"time / {name}", "peak MB", f"peak / {name}", "error against fp64"]
            lines += ["", f"### {kernel}", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
        for row in group:
            named = row["tile"] in row["implementation"]
            implementation = row["implementation"] if named else f"{row['implementation']} ({row['tile']})"
            cells = [row["shape"], f"{row['dtype']} {row['layout']}".strip(), implementation]
            if on_gpu:
                times = (f"{float(row[name]):.4f}" for name in ("p50_ms", "p20_ms", "p80_ms"))
                cells += ["{} ({} to {})".format(*times), number(row["gb_per_s"], ".0f")]
                cells += [number(row["tflop_per_s"], ".0f"), number(row["share_of_floor"], ".2f")]
            memory = row["peak_memory_bytes"]
            cells += [f"{ratio(row, baseline, 'p50_ms'):.3f}", f"{int(memory) / 1e6:.1f}" if memory else ""]
            cells += [f"{ratio(row, baseline, 'peak_memory_bytes'):.3f}" if memory else ""]
            cells += [number(row["error_fp64"], ".1e")]
            lines.append(f"| {' | '.join(cells)} |")
    failed = [row for row in rows if row["reason"]]
    lines += ["", "Not measured:", ""] if failed else []
    lines += ["- {kernel} {shape} {dtype}, {implementation}: {reason}".format(**row) for row in failed]
    return "\n".join(lines)


def number(text: str, how: str) -> str:
    """A cell, empty as in the file."""
    return f"{float(text):{how}}" if text else ""


def draw_figures(rows: list[Row], folder: Path) -> list[Path]:
    """One figure per kernel: the time of each implementation relative to the baseline, a group of bars per case."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("figures need matplotlib: pip install 'fastdeeplab[plots]'") from None

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kernel, found in groupby(cases(rows), key=lambda case: case[0]["kernel"]):
        groups = list(found)
        implementations = list(dict.fromkeys(row["implementation"] for _, group in groups for row in group))
        figure = Figure(figsize=(10, 1.5 + 0.16 * sum(len(group) + 1 for _, group in groups)), layout="constrained")
        axes = figure.add_subplot()
        height = 0.8 / len(implementations)
        for i, implementation in enumerate(implementations):
            bars = [
                (position + i * height, ratio(row, baseline, "p50_ms"))
                for position, (baseline, group) in enumerate(groups)
                for row in group
                if row["implementation"] == implementation
            ]
            axes.barh([y for y, _ in bars], [x for _, x in bars], height, label=implementation)
        labels = ["{shape} {dtype} {layout}".format(**baseline) for baseline, _ in groups]
        axes.set_yticks([position + 0.4 for position in range(len(groups))], labels)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel(f"median time / {groups[0][0]['implementation']}")
        axes.set_title(f"{kernel}\n{heading(groups[0][0])}", fontsize="medium")
        axes.legend(fontsize="small")
        paths.append(folder / f"{kernel.replace(' ', '-')}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", help="as in the file, where it holds several")
    parser.add_argument("--figures", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    try:
        rows = newest_run(read(arguments.file), arguments.device)
    except (OSError, ValueError) as error:
        sys.exit(f"{arguments.file}: {error}")
    print(tables(rows))
    if arguments.figures:
        for path in draw_figures(rows, arguments.figures):
            print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
