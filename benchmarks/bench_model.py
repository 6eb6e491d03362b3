"""Whole networks, from images to masks, beside their rivals: ``python -m benchmarks.bench_model [--size 520x520] ...``.

From the repository's root. It runs ``fastdeeplab.bench``, appends a CSV row per rival as soon as it is measured, and
prints a table with each rival's share of the floor, and the ratios that are aimed at. ``--all`` goes through the
networks of these aims, ``--profile`` adds how long each operation of the accelerated model takes, beside its floor.

The floor is that of ``fastdeeplab.speed.roofline`` in 16 bits with what the kernels fuse and skip, the same for every
rival. A rival that fails, for lack of memory too, is named with the reason, and the rest go on.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or PyTorch's profiler, which counts a CPU's memory, prints lines
sys.path.insert(0, str(Path(__file__).parent))  # for ``python -m``: the benchmarks import each other by name
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

import import_torchvision  # noqa: F401  # also where its compiled operators don't fit
import roofline
from cases import ConvCase, short_name
from fastdeeplab.kernels.candidates import Layer
from harness import Results, Row, default_path, device_name, make_row

import fastdeeplab as fdl
from fastdeeplab.bench import bench
from fastdeeplab.speed.breakdown import Part, parts_and_shares, time_operations
from fastdeeplab.speed.results import Result, best_rival, floor_milliseconds, layers_of, summary
from fastdeeplab.speed.rivals import Network, Rival, one_line, rivals_of

Names = tuple[str, ...]


def networks_of_the_aims(dtype: torch.dtype) -> Iterator[Network]:
    """In the order of the aims, and ResNet-152 at the end."""
    for size, batch, classes in (((512, 512), 8, 21), ((520, 520), 8, 21), ((1024, 2048), 1, 19)):
        for depth in (50, 101):
            for stride in (8, 16):
                yield Network(depth, stride, classes, size, batch, dtype)
    yield Network(50, 8, 150, (512, 512), 8, dtype)
    yield Network(50, 8, 21, (512, 512), 1, dtype)
    for stride in (8, 16):
        yield Network(152, stride, 21, (520, 520), 8, dtype)


class Aim(NamedTuple):
    """How many times as fast as the best of some rivals, where it applies."""

    what: str
    wanted: float
    rivals: Names
    where: Callable[[Network, bool], bool]  # of the network and whether it is on a GPU
    ours: Names = ("fastdeeplab", "fastdeeplab-graphs")


COMPILED, EAGER = ("compile", "max-autotune", "reduce-overhead"), ("channels_last",)
AIMS = (
    Aim("the best torch.compile", 1.35, COMPILED, lambda n, gpu: gpu and n.num_classes < 150 and not _small(n)),
    Aim("eager in channels_last", 2.0, EAGER, lambda n, gpu: gpu and not _small(n)),
    Aim("the best torch.compile, 150 classes", 1.6, COMPILED, lambda n, gpu: gpu and n.num_classes >= 150),
    Aim("the best torch.compile, as a CUDA graph", 1.5, COMPILED, lambda n, gpu: gpu and _small(n)),
    Aim("eager in fp32", 1.3, ("fp32",), lambda n, gpu: not gpu and n.dtype == torch.float32),
)
FLOOR_AIM = 0.70


def _small(network: Network) -> bool:
    """One image, at which launches take their share."""
    return network.batch * math.prod(network.size) <= 512 * 512


def aims_reached(results: Sequence[Result], device: torch.device) -> Iterator[tuple[str, float, float]]:
    """What is aimed at, the ratio wanted, and the one measured."""
    network, on_gpu = results[0].network, device.type == "cuda"
    ours = [result for result in results if result.rival.ours]
    for aim in AIMS:
        found = [result for result in ours if result.rival.name in aim.ours]
        rivals = [result for result in results if result.rival.name.partition("-")[2] in aim.rivals]
        times = [min((result.milliseconds for result in each), default=math.inf) for each in (found, rivals)]
        if aim.where(network, on_gpu) and max(times) < math.inf:
            yield aim.what, aim.wanted, times[1] / times[0]
    floor = floor_milliseconds(network, device)
    times = [result.milliseconds for result in ours]
    if floor and min(times, default=math.inf) < math.inf:
        yield "the floor", FLOOR_AIM, floor / min(times)


def row_of(result: Result, device: torch.device) -> Row:
    """``error_fp64``: in fp64 logits, how far the worst pixel's class is below the best one, by the largest logit.

    The dtype is the network's; the rivals with another one have it in their names.
    """
    network = result.network
    row = make_row(
        device,
        kernel=f"predict R{network.depth} OS{network.output_stride}",
        implementation=result.rival.name,
        shape="{}x3x{}x{} K={}".format(network.batch, *network.size, network.num_classes),
        layout="",  # each rival's own
        dtype=short_name(network.dtype),
        measurement=result.measurement,
        flop=sum(2 * layer.count * layer.macs for layer in layers_of(network)),
        floor_ms=floor_milliseconds(network, device),
        reason=result.reason,
    )
    return Row(**vars(row) | {"peak_memory_bytes": result.peak_memory})


def show_progress(what: str, share: float) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{share:4.0%} {what}", end="", file=sys.stderr, flush=True)


def end_progress() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def measure_network(
    network: Network,
    device: torch.device,
    file: Results,
    *,
    seconds: float,
    tune: bool = False,
    rivals: Sequence[Rival] | None = None,
) -> list[Result]:
    """Appends a row per rival, prints the tables."""
    results: list[Result] = []
    try:
        for result in bench(network, device, rivals=rivals, seconds=seconds, tune=tune, progress=show_progress):
            results.append(result)
            file.append(row_of(result, device))
    finally:
        end_progress()
        if results:
            print_results(results, device)
    return results


def print_results(results: Sequence[Result], device: torch.device) -> None:
    network, on_gpu = results[0].network, device.type == "cuda"
    best, floor = best_rival(results), floor_milliseconds(results[0].network, device)
    print(f"\n### {network} {short_name(network.dtype)} on {device_name(device)}\n")
    if not on_gpu:
        print("Times of a shared CPU mean nothing elsewhere, only their ratios do.\n")
    columns = ("images/s", "ms per batch (p20 to p80)", "share of floor", "peak MB", "against the best rival")
    roofline.print_row("rival", *columns)
    roofline.print_row(*["---"] * (1 + len(columns)))
    for result in results:
        if (found := result.measurement) is None:
            roofline.print_row(result.rival.name, f"not measured: {result.reason}", *[""] * (len(columns) - 1))
            continue
        roofline.print_row(
            result.rival.name,
            f"{result.images_per_second:.4g}",
            f"{found.p50:.2f} ({found.p20:.2f} to {found.p80:.2f})",
            f"{floor / found.p50:.2f}" if floor else "",
            "" if result.peak_memory is None else f"{result.peak_memory / 1e6:.0f}",
            f"{best.milliseconds / found.p50:.2f}" if best else "",
        )
    print(f"\n{summary(results)}")
    for what, wanted, reached in aims_reached(results, device):
        print(f"against {what}: {reached:.2f}, at least {wanted:.2f} is aimed at")


def print_profile(parts: Sequence[Part], device: torch.device) -> None:
    """Each fused operation, and the convolutions' floors where the GPU is known."""
    gpu = roofline.known_gpu(device_name(device))
    print()
    roofline.print_row("module", "operation", "layer", "runs", "us", "share", "floor us", "share of floor")
    roofline.print_row(*["---"] * 8)
    for part, share in parts_and_shares(parts):
        layer, floor = "" if part.layer is None else str(part.layer), None
        if isinstance(part.layer, Layer) and gpu and part.layer.dtype.itemsize == 2:
            floor = ConvCase(part.module, part.layer).work.floor(gpu)
        floors = (f"{1000 * floor:.1f}", f"{floor / part.milliseconds:.2f}") if floor else ("", "")
        cells = (part.module, part.operation, layer, part.runs, f"{1000 * part.milliseconds:.1f}", f"{share:.1%}")
        roofline.print_row(*cells, *floors)


def read_sizes(text: str) -> list[tuple[int, int]]:
    sizes = []
    for size in text.split(","):
        height, _, width = size.partition("x")
        if not (height.isdecimal() and width.isdecimal()):
            raise argparse.ArgumentTypeError(f"a size is HEIGHTxWIDTH, such as 520x520, got {size}")
        sizes.append((int(height), int(width)))
    return sizes


def main(arguments: Sequence[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, choices=(50, 101, 152), default=50)
    parser.add_argument("--output-stride", type=int, choices=(8, 16), default=8)
    parser.add_argument(
        "--size", type=read_sizes, default=[(520, 520)], metavar="HxW[,HxW...]", help="default: 520x520"
    )
    parser.add_argument("--batch", type=int, default=8 if on_gpu else 1, help="default: 8, on a CPU 1")
    parser.add_argument("--classes", type=int, default=21, help="default: 21")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument(
        "--dtype", choices=dtypes, default=dtypes[0 if on_gpu else 2], help="default on a GPU: bfloat16"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to repeat each (default: 2)")
    parser.add_argument("--rivals", default="", metavar="NAME,...", help="measure these alone")
    parser.add_argument("--tune", action="store_true", help="first measure what each layer of ours runs best, on a GPU")
    parser.add_argument("--profile", action="store_true", help="show how long each operation takes")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="default: benchmarks/results/<device>.csv")
    parser.add_argument("--all", action="store_true", help="every network that something is aimed at, on a GPU")
    options = parser.parse_args(arguments)
    if options.all and not on_gpu:
        parser.error("--all needs a GPU: on a CPU it would take hours")
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), getattr(torch, options.dtype)
    try:
        chosen = [
            Network(options.depth, options.output_stride, options.classes, size, options.batch, dtype)
            for size in options.size
        ]
        file = Results(options.csv or default_path(device))
    except ValueError as error:
        parser.error(str(error))
    try:
        for network in networks_of_the_aims(dtype) if options.all else chosen:
            rivals = chosen_rivals(network, device, options.rivals)
            try:
                measure_network(network, device, file, seconds=options.seconds, tune=options.tune, rivals=rivals)
            except torch.OutOfMemoryError as error:  # there is not even a mask to compare with
                print(f"{network} is left out: {one_line(error)}", flush=True)
                continue
            if options.profile:
                try:
                    fast = fdl.accelerate(network.build(device), dtype=dtype)
                    print_profile(time_operations(fast, network.images(device)), device)
                except torch.OutOfMemoryError as error:
                    print(f"{network} has no profile: {one_line(error)}", flush=True)
    except ValueError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(f"stopped; {file.path} keeps what was measured")


def chosen_rivals(network: Network, device: torch.device, names: str) -> list[Rival]:
    """All, or those that are named.

    Raises:
        ValueError: there is no rival of a name.
    """
    rivals = {rival.name: rival for rival in rivals_of(network, device)}
    unknown = [name for name in names.split(",") if name and name not in rivals]
    if unknown:
        raise ValueError(f"there is no rival {', '.join(unknown)}, but {', '.join(rivals)}")
    return [rivals[name] for name in names.split(",")] if names else [*rivals.values()]


if __name__ == "__main__":
    main()
