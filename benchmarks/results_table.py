"""The README's tables of results, made from ``benchmarks/results/*.csv`` and nothing else.

``python -m benchmarks.results_table`` writes them in README.md, those of GPUs between ``<!-- results -->`` and
``<!-- /results -->``, those of CPUs, in fp32, between ``<!-- results on CPUs -->`` and ``<!-- /results on CPUs -->``;
``--check`` only says whether they are up to date. Only what was measured at a commit is shown, for each device the
newest commit, driver, torch and triton in its file. Devices and commits are never mixed.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for ``python -m``: the benchmarks import each other by name

from harness import RESULTS, ROOT
from plot import Row, heading, newest_run, read

ON_GPUS, ON_CPUS = "results", "results on CPUs"
NOTHING = "No result of a GPU has been recorded yet."
PEERS = ("torchvision", "layers")  # the latter where torchvision could not be imported
COLUMNS = {  # implementations by the end of their name, the best of several
    "eager fp32": ("fp32",),
    "eager": ("channels_last",),
    "torch.compile": ("compile", "max-autotune", "reduce-overhead"),
    "cuDNN fused": ("cudnn-fused",),
    "PyTorch, folded": ("fastdeeplab-torch",),
    "fastdeeplab": ("fastdeeplab", "fastdeeplab-graphs"),
}


def measured(files: Sequence[Path], *, on_gpus: bool) -> list[Row]:
    """The rows of whole networks that have a commit and a time, of GPUs or of CPUs."""
    rows = [row for file in files for row in read(file) if bool(row["driver"]) == on_gpus]
    return [
        row for row in rows if row["kernel"].startswith("predict ") and row["p50_ms"] and is_committed(row["commit"])
    ]


def is_committed(commit: str) -> bool:
    return commit != "unknown" and not commit.endswith("-dirty")


def results_text(rows: Sequence[Row]) -> str:
    """A table per GPU."""
    if not rows:
        return NOTHING
    return "\n\n".join(gpu_text(list(rows), device) for device in sorted({row["device"] for row in rows}))


def cpus_text(rows: Sequence[Row]) -> str:
    """A table per CPU and network, a column per size."""
    found = [newest_run(list(rows), device) for device in sorted({row["device"] for row in rows})]
    return "\n\n".join(text for run in found for text in cpu_texts(run))


def cpu_texts(run: Sequence[Row]) -> Iterator[str]:
    for kernel in dict.fromkeys(row["kernel"] for row in run):
        times: dict[str, dict[str, Row]] = {}
        for row in run:
            if row["kernel"] == kernel and row["dtype"] == "float32":
                times.setdefault(row["shape"], {})[row["implementation"]] = row
        sizes = {
            shape: (peer, best(found, COLUMNS["torch.compile"]), found.get("ResNetModel"), found["fastdeeplab"])
            for shape, found in times.items()
            if "fastdeeplab" in found and (peer := best(found, COLUMNS["eager fp32"]))
        }
        eager, compiled, live, fast = zip(*sizes.values(), strict=True) if sizes else ([], [], [], [])
        lines = {
            "torchvision, ms": map(milliseconds, eager),
            "torch.compile, ms": map(milliseconds, compiled),
            "ResNetModel, ms": map(milliseconds, live),
            "accelerated, ms": map(milliseconds, fast),
            "accelerated / torchvision": (
                f"{float(peer['p50_ms']) / float(own['p50_ms']):.2f}x" for peer, own in zip(eager, fast, strict=True)
            ),
            "peak memory of torchvision, MiB": map(mebibytes, eager),
            "of the accelerated copy, MiB": map(mebibytes, fast),
        }
        if sizes:
            table = [["", *sizes], ["---"] * (len(sizes) + 1), *([name, *cells] for name, cells in lines.items())]
            network = f"{kernel.removeprefix('predict ')}, {heading(run[0])}:"
            yield "\n".join([network, "", *(f"| {' | '.join(cells)} |" for cells in table)])


def milliseconds(row: Row | None) -> str:
    return f"{float(row['p50_ms']):.0f}" if row else ""


def mebibytes(row: Row) -> str:
    return f"{float(row['peak_memory_bytes']) / 2**20:.0f}"


def gpu_text(rows: list[Row], device: str) -> str:
    found = newest_run(rows, device)
    ratios = [f"/ {name}" for name in list(COLUMNS)[:-1]]
    columns = ("images per second", "dtype", *COLUMNS, *ratios, "share of floor")
    lines = [f"{heading(found[0])}:", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *network_lines(found)])


def network_lines(rows: Sequence[Row]) -> Iterator[str]:
    def network(row: Row) -> tuple[str, str, str]:
        return row["kernel"], row["shape"], row["dtype"]

    order = {key: number for number, key in enumerate(dict.fromkeys(map(network, rows)))}
    for (kernel, shape, dtype), group in groupby(sorted(rows, key=lambda row: order[network(row)]), key=network):
        found = {row["implementation"]: row for row in group}
        bests = [best(found, ends) for ends in COLUMNS.values()]
        *others, ours = (int(shape.split("x")[0]) * 1000 / float(row["p50_ms"]) if row else None for row in bests)
        rates = [f"{rate:.0f}" if rate else "" for rate in (*others, ours)]
        ratios = [f"{ours / rate:.2f}x" if ours and rate else "" for rate in others]
        share = bests[-1]["share_of_floor"] if bests[-1] else ""
        cells = [f"{kernel.removeprefix('predict ')} {shape}", dtype, *rates, *ratios]
        yield f"| {' | '.join([*cells, f'{float(share):.2f}' if share else ''])} |"


def best(rows: dict[str, Row], ends: Sequence[str]) -> Row | None:
    names = [*ends, *(f"{peer}-{end}" for peer in PEERS for end in ends)]
    return min((rows[name] for name in names if name in rows), key=lambda row: float(row["p50_ms"]), default=None)


def with_results(readme: str, name: str, text: str) -> str:
    """The README with the text between the markers of this name.

    Raises:
        ValueError: they are not there, once each and in this order.
    """
    first, last = markers(name)
    before, begin, rest = readme.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end) or readme.count(first) + readme.count(last) != 2:
        raise ValueError(f"needs {first} and, after it, {last}, once each")
    return f"{before}{first}\n\n{text}\n\n{last}{after}"


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if it is not up to date")
    options = parser.parse_args(arguments)
    try:
        before = options.readme.read_text()
        files = sorted(options.results.glob("*.csv"))
        after = with_results(before, ON_GPUS, results_text(measured(files, on_gpus=True)))
        after = with_results(after, ON_CPUS, cpus_text(measured(files, on_gpus=False)))
    except (OSError, ValueError) as error:
        sys.exit(f"{options.readme}: {error}")
    if options.check:
        if after != before:
            sys.exit(f"{options.readme}: the results are not up to date: python -m benchmarks.results_table")
    elif after != before:
        options.readme.write_text(after)


if __name__ == "__main__":
    main()
