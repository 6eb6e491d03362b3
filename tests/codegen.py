"""Compiles every tile choice of every kernel for every architecture, without a GPU, and reads the machine code.

    python tests/codegen.py [--thorough] [--kernel NAME] [--arch 90 ...]

The real launchers run on CPU tensors: a stub driver names the architecture and each launch becomes a compilation, so
what is checked is specialised as a launch would be. Checked: no spills, no local memory, shared memory within the
chip's limit, the instructions that a case demands. Prints a table; exits with 1 if a check fails. Runs in a process of
its own, since kernels that were defined under TRITON_INTERPRET cannot be compiled. A new kernel adds a function that
yields its cases to CASES. Those that --thorough alone compiles combine what is compiled one by one without it: every
tile choice in splits, with channels that do not fill a block, with a scale, with and without skipping.

Of a matrix product it is also checked that its loops load asynchronously (cp.async or TMA; not where rows begin at any
multiple of two bytes, of which the hardware copies none so), and that on sm_90 both operands come from shared memory.

The column "per unit": instructions of a thread per pixel and class; of a product on sm_90, of a warp per step of its
loop over taps and channels.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from fastdeeplab.kernels import argmax, conv, conv_tma
from fastdeeplab.kernels.candidates import IEEE_TILES, ODD_TILES, SPLITS, TILES, Layer, Tile, ships, splits_of
from fastdeeplab.kernels.cross_entropy import cross_entropy_forward
from fastdeeplab.kernels.cross_entropy_backward import cross_entropy_backward
from fastdeeplab.kernels.tuning import tile_name
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory that a program may use
MAX_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # of a multiprocessor
MULTIPLY = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "FFMA")  # instructions of a matrix product, the first that occurs


@dataclass(frozen=True)
class Case:
    """One launch to compile."""

    kernel: str
    choice: str
    dtypes: str
    launch: Callable[[], object]  # calls the launcher; each Triton kernel that it launches makes one row
    # By Triton kernel, for each of its loops over the classes an opcode that is issued once per pixel and class: what
    # instructions are counted by.
    units: dict[str, tuple[str, ...]]
    demand: str = ""  # a regular expression that some instruction of the first kernel must match
    architectures: tuple[int, ...] = tuple(SHARED_LIMITS)
    thorough: bool = False  # left out unless asked for
    step: int = 0  # multiplications of one step of a product's loop
    asynchronous: bool = True  # whether a product's operands can be loaded so: cp.async takes no less than four bytes


def argmax_cases() -> Iterator[Case]:
    """Loads are one logit each: a thread needs single logits of its cell, and its neighbours read the next cells'."""
    indices = {torch.int64: r"STG\.E\.128", torch.uint8: r"STG\.E "}  # four columns of int64, of uint8

    def case(choice: str, tile: argmax.Tile, logits: Tensor, size: tuple[int, int], index: torch.dtype) -> Case:
        whole_strips = tile.columns == 4 and size[1] % (8 * logits.shape[3]) == size[1] % 16 == 0
        return Case(
            kernel="upsample_argmax",
            choice=f"{tile.rows}x{tile.columns} {choice}",
            dtypes=f"{logits.dtype} -> {index}".replace("torch.", ""),
            launch=partial(argmax.upsample_argmax, logits, size, index, tile=tile),
            units={"upsample_argmax_kernel": ("FMNMX.NAN",)},
            demand=indices[index] if whole_strips else "",
        )

    for tile, dtype in product(argmax.TILES, (torch.float32, torch.float16, torch.bfloat16)):
        yield case("8x", tile, torch.empty(1, 19, 16, 32, dtype=dtype), (128, 256), torch.int64)
    for tile in argmax.TILES:
        logits = torch.empty(1, 19, 65, 65, dtype=torch.bfloat16)
        yield case("8x", tile, torch.empty(1, 19, 16, 32, dtype=torch.bfloat16), (128, 256), torch.uint8)
        yield case("channels_last", tile, logits.to(memory_format=torch.channels_last), (520, 520), torch.int64)
        yield case("7.9x", tile, logits, (513, 513), torch.int64)
        wide = torch.empty(1, dtype=torch.bfloat16).expand(1, 19, 1, 40_000)
        yield case("positions in 64 bits", tile, wide, (1, 65_600), torch.int64)


def cross_entropy_cases() -> Iterator[Case]:
    """Every size of chunk, ratios that are no whole numbers or differ by axis, every option.

    Loads are one logit each, of neighbouring cells by neighbouring threads.
    """
    sizes = {
        "8x": ((16, 16), (128, 128)),
        "16x": ((16, 16), (256, 256)),
        "7.9x": ((65, 65), (513, 513)),
        "4x": ((16, 16), (64, 64)),
        "2x": ((16, 16), (32, 32)),
        "1x": ((16, 16), (16, 16)),
        "2x 8x": ((16, 16), (32, 128)),
        "8x 1x": ((16, 16), (128, 16)),
    }
    plain = (torch.int64, False, 0.0)
    options = {
        "plain": plain,
        "weighted": (torch.int64, True, 0.0),
        "smoothed": (torch.int64, False, 0.1),
        "weighted, smoothed": (torch.int64, True, 0.1),
        "target uint8": (torch.uint8, False, 0.0),
        "target int16": (torch.int16, False, 0.0),
        "target int32": (torch.int32, False, 0.0),
    }

    def case(choice: str, ratio: str, dtype: torch.dtype, option: tuple[torch.dtype, bool, float]) -> Case:
        (low, full), (target_dtype, weighted, smoothing) = sizes[ratio], option
        logits = torch.empty(1, 19, *low, dtype=dtype)
        target = torch.empty(1, *full, dtype=target_dtype)
        arguments = (logits, target, torch.empty(19) if weighted else None, 255, smoothing)

        def launch() -> None:
            cross_entropy_forward(*arguments)
            cross_entropy_backward(torch.empty(()), torch.empty(1, 2, *full), *arguments)

        return Case(
            kernel="upsample_cross_entropy",
            choice=f"{ratio} {choice}",
            dtypes=str(dtype).removeprefix("torch."),
            launch=launch,
            units={"cross_entropy_kernel": ("FMNMX", "MUFU.EX2"), "corner_shares_kernel": ("MUFU.EX2",)},
        )

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield case("weighted, smoothed", "8x", dtype, options["weighted, smoothed"])
        yield case("plain", "8x", dtype, plain)
    for choice in sorted(options.keys() - {"plain", "weighted, smoothed"}):
        yield case(choice, "8x", torch.bfloat16, options[choice])
    for ratio in sorted(sizes.keys() - {"8x"}):
        yield case("plain", ratio, torch.bfloat16, plain)


def conv_cases() -> Iterator[Case]:
    """Every tile choice with every epilogue and way of reading, for the architectures that it ships for.

    Without a scale but where the kind says so, as an accelerated model has folded it into the weights.
    """

    def map_of(channels: int, dtype: torch.dtype, size: int = 33, pitch: int | None = None) -> Tensor:
        return torch.empty(2, size, size, pitch or channels, dtype=dtype)[..., :channels].permute(0, 3, 1, 2)

    def convolution(
        kind: str,
        tile: Tile,
        dtype: torch.dtype,
        channels: int = 256,
        C_out: int | None = None,
        precision: str = "tf32",
        pitch: int | None = None,
    ) -> None:
        C_out = C_out or channels
        kernel, stride = int(kind[0]), 2 if "stride 2" in kind else 1
        dilation = 6 if "dilated" in kind else 1
        launcher = conv if tile.kernel == "pointer" else conv_tma
        shared = {"tile": tile, "precision": precision}
        x, out = map_of(channels, dtype, pitch=pitch), map_of(C_out, dtype, -(-33 // stride), pitch)
        weights = [map_of(channels, dtype, kernel)[:1].repeat(C_out, 1, 1, 1) for kernel in (1, 3)]
        weights = [weight.contiguous(memory_format=torch.channels_last) for weight in weights]
        branches = 4 if "branches" in kind else 1
        shift = torch.empty(branches * C_out)
        scale = torch.empty_like(shift) if "scaled" in kind else None
        if "branches" in kind:
            out, rates = map_of(4 * channels, dtype), (1, 2, 18) if "thin" in kind else (6, 12, 18)
            launcher.aspp_branches(x, [weights[0], *3 * [weights[1]]], scale, shift, out, rates=rates, **shared)
        elif "projection" in kind:
            launcher.aspp_projection(x, torch.empty(2, channels), weights[0], scale, out, **shared)
        else:
            residual = map_of(C_out, dtype, out.shape[2], pitch) if "residual" in kind else None
            relu = "classifier" not in kind and "downsampling" not in kind
            options = {"stride": stride, "padding": dilation * (kernel // 2), "dilation": dilation, "relu": relu}
            launcher.conv_bn_relu(x, weights[kernel // 2], scale, shift, residual, out, **options, **shared)

    def case(
        kind: str,
        architectures: tuple[int, ...],
        tile: Tile,
        dtype: torch.dtype,
        *,
        thorough: bool = False,
        **options: Any,
    ) -> Case:
        return Case(
            kernel=f"conv {tile.kernel}",
            choice=f"{kind} {tile_name(tile)}",
            thorough=thorough,
            dtypes=" ".join([str(dtype).removeprefix("torch."), *map(str, options.values())]),
            launch=partial(convolution, kind, tile, dtype, **options),
            units={},
            demand="" if tile.kernel == "pointer" else "UTMASTG",
            architectures=architectures,
            step=tile.block_m * tile.block_n * tile.block_k,
            asynchronous=dtype.itemsize == 4 or "pitch" not in options,
        )

    floats = (torch.bfloat16, torch.float16, torch.float32)
    kinds = {
        "pointer": {
            "1x1 residual": floats,
            "3x3 dilated": floats,
            "3x3 stride 2": (torch.bfloat16, torch.float32),
            "1x1 and 3x3 branches": (torch.bfloat16, torch.float32),
            "1x1 projection": (torch.bfloat16, torch.float32),
        },
        "gemm_tma": {"1x1 residual": floats, "1x1 projection": (torch.bfloat16, torch.float32)},
        "boxes_tma": {
            "3x3 dilated": floats,
            "3x3 dilated residual": (torch.bfloat16,),
            "1x1 and 3x3 branches": (torch.bfloat16, torch.float32),
        },
    }
    for row in TILES:
        for kind, dtypes in kinds[row[1].kernel].items():
            for dtype in dtypes:
                architectures = tuple(architecture for architecture in SHARED_LIMITS if ships(row, architecture, dtype))
                tile = row[1]._replace(block_k=2 * row[1].block_k // dtype.itemsize)
                tile = tile._replace(skip="dilated" in kind or "branches" in kind)
                yield case(kind, architectures, tile, dtype)
                if torch.float16 not in dtypes and dtype == torch.bfloat16:  # differs by the type of the product alone
                    yield case(kind, tuple({90} & {*architectures}), tile, torch.float16)
    for (architectures, tile), kind in product(IEEE_TILES, kinds["pointer"]):
        yield case(kind, architectures, tile._replace(skip="dilated" in kind), torch.float32, precision="ieee")
    two = (torch.bfloat16, torch.float32)
    for (architectures, tile), dtype, classes in product(ODD_TILES, two, (19, 150)):
        yield case("1x1 classifier", architectures, tile, dtype, C_out=classes)
    odd = {"channels": 21, "pitch": 257}  # values are loaded one by one
    for (architectures, tile), kind, dtype in product(ODD_TILES, (*kinds["pointer"], "3x3 stride 2 residual"), two):
        odd_tile = tile._replace(skip="dilated" in kind or "branches" in kind)
        yield case(kind, architectures, odd_tile, dtype, **odd)
        if dtype == torch.float32:
            yield case(kind, architectures, odd_tile, dtype, precision="ieee", **odd)
    for kernel, kind in {"pointer": "3x3 dilated", "gemm_tma": "1x1 residual", "boxes_tma": "3x3 dilated"}.items():
        architectures, tile = min(row for row in TILES if row[1].kernel == kernel)
        tile = tile._replace(skip=kernel != "gemm_tma")
        yield case(kind, architectures, tile._replace(splits=4), torch.bfloat16)
        yield case(f"{kind} scaled", architectures, tile, torch.bfloat16)
        if kernel == "pointer":  # one unit of channels must be no constant: it would unroll the loop
            yield case("3x3 stride 2", architectures, tile._replace(skip=False), torch.bfloat16, channels=16)
        else:
            yield case(kind, architectures, tile, torch.bfloat16, channels=40)
    for architectures, tile in TILES:
        if tile.kernel == "pointer":
            yield case("1x1 and 3x3 branches", architectures, tile._replace(splits=4, skip=True), torch.bfloat16)
            yield case("1x1 and 3x3 branches, thin", architectures, tile._replace(skip=True), torch.bfloat16)
    yield case("3x3 dilated", *next(row for row in TILES if row[1].kernel == "boxes_tma"), torch.bfloat16)
    yield case("1x1 stride 2 downsampling", tuple(SHARED_LIMITS), TILES[0][1], torch.bfloat16)

    main = {"pointer": ("1x1 residual", "3x3 dilated"), "gemm_tma": ("1x1 residual",), "boxes_tma": ("3x3 dilated",)}
    layer = Layer.of("conv_bn_relu", (2, 256, 33, 33), (256, 256, 1, 1), torch.bfloat16)
    for (architectures, tile), dtype in product(TILES, (torch.bfloat16, torch.float32)):
        tile = tile._replace(block_k=2 * tile.block_k // dtype.itemsize)
        architectures = tuple(each for each in architectures if ships((architectures, tile), each, dtype))
        for kind, splits in product(main[tile.kernel], SPLITS[1:]):
            split = tuple(each for each in architectures if splits in splits_of(layer, tile, (each // 10, each % 10)))
            yield case(kind, split, tile._replace(splits=splits, skip="3x3" in kind), dtype, thorough=True)
        for kind in main[tile.kernel]:
            yield case(kind, architectures, tile._replace(skip="3x3" in kind), dtype, channels=40, thorough=True)
            yield case(f"{kind} scaled", architectures, tile._replace(skip="3x3" in kind), dtype, thorough=True)
        if tile.kernel == "pointer":
            for kind in ("1x1 residual", "3x3 stride 2", "3x3 residual"):
                yield case(kind, architectures, tile, dtype, channels=16, thorough=True)
        if tile.kernel == "boxes_tma":
            yield case("3x3 dilated", architectures, tile, dtype, thorough=True)
            yield case("3x3 dilated residual", architectures, tile._replace(skip=True), dtype, thorough=True)
    for (architectures, tile), kind in product(IEEE_TILES, main["pointer"]):
        split = tile._replace(splits=4, skip="3x3" in kind)
        yield case(kind, architectures, split, torch.float32, precision="ieee", thorough=True)
        scaled = f"{kind} scaled", architectures, tile._replace(skip="3x3" in kind)
        yield case(*scaled, torch.float32, precision="ieee", thorough=True)
    unaligned = replace(layer, aligned=False)
    for (architectures, tile), kind, dtype in product(ODD_TILES, (*main["pointer"], "1x1 and 3x3 branches, thin"), two):
        split = tile._replace(splits=4, skip="3x3" in kind)
        some = tuple(each for each in architectures if 4 in splits_of(unaligned, tile, (each // 10, each % 10)))
        yield case(kind, some, split, dtype, thorough=True, channels=22, pitch=258)
        yield case(f"{kind} scaled", architectures, split._replace(splits=1), dtype, thorough=True, **odd)


CASES = (argmax_cases, cross_entropy_cases, conv_cases)


class StubDriver:
    """A driver for a GPU that is not there. Its device number is the architecture, so none shares compiled kernels."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextmanager
def compiling_launches(architecture: int) -> Iterator[list[Any]]:
    """Inside, `kernel[grid](...)` compiles for the architecture, launches nothing and appends to the list.

    The stub stays the active driver afterwards: where there is no GPU there is none to go back to.
    """
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    driver.set_active(StubDriver(architecture))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


@dataclass(frozen=True)
class Machine:
    """What the machine code of one compiled kernel says."""

    registers: int
    stack: int
    shared: int
    warps: int
    product: bool  # of matrices
    instructions: list[tuple[int, str]]  # address, text without the predicate
    labels: dict[str, int]  # where branches go

    @staticmethod
    def read(kernel: Any) -> "Machine":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            tools = Path(triton.__file__).parent / "backends/nvidia/bin"
            commands = ("cuobjdump", "-res-usage"), ("nvdisasm", "--no-dataflow", "--print-code")
            usage, sass = (
                subprocess.run([tools / tool, *options, cubin.name], check=True, capture_output=True, text=True).stdout
                for tool, *options in commands
            )
        return Machine(
            registers=int(re.findall(r"REG:(\d+)", usage)[0]),
            stack=int(re.findall(r"STACK:(\d+)", usage)[0]),
            shared=kernel.metadata.shared,
            warps=kernel.metadata.num_warps,
            product="tt.dot" in kernel.asm["ttir"],
            instructions=[
                (int(address, 16), text)
                for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?\s*([^;]+?) ?;", sass)
            ],
            labels={
                label: int(address, 16) for label, address in re.findall(r"^(\.L\w+):\s+/\*([0-9a-f]{4,5})", sass, re.M)
            },
        )

    def count(self, opcode: str, start: int = 0, stop: int = sys.maxsize) -> int:
        return sum(start <= address <= stop and text.startswith(opcode) for address, text in self.instructions)

    def per_pixel_and_class(self, units: tuple[str, ...]) -> float:
        """For each unit the instructions per unit in the loop that has the fewest, summed."""
        return sum(map(self.per_unit, units))

    def per_unit(self, unit: str) -> float:
        loops = [loop for loop in self.loops() if self.count(unit, *loop)] or [(0, sys.maxsize)]
        return min(self.count("", *loop) / max(self.count(unit, *loop), 1) for loop in loops)

    def per_step(self, multiplications: int) -> float | None:
        """The most instructions of a warp per step of a product's loop; on sm_90, whose products say their size."""
        size = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.")
        most = None
        for start, stop in self.product_loops():
            texts = [text for address, text in self.instructions if start <= address <= stop]
            found = [math.prod(map(int, match.groups())) for match in map(size.match, texts) if match]
            if found:  # of a warp group, four warps
                most = max(most or 0, len(texts) * multiplications / (sum(found) * self.warps / 4))
        return most

    def product_loops(self) -> list[tuple[int, int]]:
        """The loops over a matrix product, of those that overlap the smallest.

        Code that is rarely needed stands at the end, and its way back looks like a larger loop.
        """
        opcode = next(opcode for opcode in MULTIPLY if self.count(opcode))
        found: list[tuple[int, int]] = []
        for start, stop in sorted(self.loops(), key=lambda loop: loop[1] - loop[0]):
            apart = all(stop < first or last < start for first, last in found)
            if apart and self.count(opcode, start, stop):
                found.append((start, stop))
        return found

    def loops(self) -> list[tuple[int, int]]:
        """First and last address of each."""
        return [
            (self.labels[target[1]], address)
            for address, text in self.instructions
            if (target := re.match(r"BRA.*`\((\.L\w+)\)", text)) and self.labels[target[1]] < address
        ]

    def resident(self, architecture: int) -> int:
        """Programs on a multiprocessor at once: registers are allotted to warps by 256, shared memory by KiB."""
        registers = 65536 // (-(-self.registers * 32 // 256) * 256 * self.warps)
        shared = (SHARED_LIMITS[architecture] + 1) * 1024 // (-(-self.shared // 1024) * 1024 + 1024)
        return min(registers, shared, MAX_WARPS[architecture] // self.warps)

    def operands(self) -> str:
        """Where a Hopper matrix product has its first operand; the second is always in shared memory."""
        texts = [text for _, text in self.instructions if text.startswith("HGMMA")]
        if not texts:
            return "-"
        return "registers" if any(re.match(r"HGMMA\S* R\d+, R\d+", text) for text in texts) else "shared"

    def product_faults(self, case: Case, architecture: int) -> Iterator[str]:
        if architecture == 90 and "ieee" not in case.dtypes and self.operands() != "shared":
            yield "not both operands in shared memory"
        if not case.asynchronous:
            return
        loops = self.product_loops()
        if not loops:
            yield "no loop over the product"
        for loop in loops:
            if not self.count("LDGSTS", *loop) + self.count("UTMALDG", *loop):
                yield "no asynchronous load in the loop"
            if self.count("LDG.", *loop):
                yield f"{self.count('LDG.', *loop)} synchronous loads in the loop"

    def faults(self, case: Case, units: tuple[str, ...], demand: str, architecture: int) -> Iterator[str]:
        if self.count("LDL"):  # what is stored and never loaded is no spill: triton 3.6 sets up calls that trap so
            yield f"{self.stack} bytes of stack, {self.count('STL')} STL and {self.count('LDL')} LDL"
        if self.shared > SHARED_LIMITS[architecture] * 1024:
            yield f"{self.shared} bytes of shared memory, limit {SHARED_LIMITS[architecture]} KiB"
        for unit in units:
            if not self.count(unit):
                yield f"no {unit} to count by"
        if not any(re.match(demand, text) for _, text in self.instructions):
            yield f"no instruction matches {demand}"
        if self.product:
            yield from self.product_faults(case, architecture)


LAYOUT = "{:22} {:74} {:18} {:7} {:>9} {:>6} {:>7} {:>8} {:>9} {:>12} {:>8}  {}".format


def compile_case(case: Case, architecture: int) -> list[tuple[str, bool]]:
    """The rows of the table of one case, and whether something is wrong with each."""
    with compiling_launches(architecture) as compiled:
        case.launch()
    rows = []
    for kernel in compiled:
        machine = Machine.read(kernel)
        demand = case.demand if kernel is compiled[0] else ""
        units = case.units.get(kernel.metadata.name, ())
        faults = "; ".join(machine.faults(case, units, demand, architecture))
        per_unit = machine.per_pixel_and_class(units) if units else None
        if machine.product:
            per_unit = machine.per_step(case.step)
        row = LAYOUT(
            kernel.metadata.name,
            case.choice,
            case.dtypes,
            f"sm_{architecture}",
            machine.registers,
            machine.stack,
            machine.shared,
            machine.resident(architecture),
            machine.operands(),
            machine.count(""),
            "-" if per_unit is None else f"{per_unit:.2f}",
            faults or "-",
        )
        rows.append((row, bool(faults)))
    return rows


def compile_job(job: tuple[str, bool, int, int]) -> list[tuple[str, bool]]:
    name, thorough, number, architecture = job
    return compile_case(cases(name, thorough)[number], architecture)


def cases(name: str, thorough: bool) -> list[Case]:
    found = [case for family in CASES for case in family() if re.search(name, case.kernel)]
    return [case for case in found if thorough or not case.thorough]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="a regular expression: only kernels whose name it matches")
    parser.add_argument("--thorough", action="store_true", help="more combinations")
    parser.add_argument("--arch", type=int, nargs="*", default=list(SHARED_LIMITS), choices=list(SHARED_LIMITS))
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET must be unset: the interpreter's kernels cannot be compiled")

    print(f"triton {triton.__version__}, torch {torch.__version__}")
    columns = "kernel", "choice", "dtypes", "arch", "registers", "stack", "shared", "resident", "operands"
    print(LAYOUT(*columns, "instructions", "per unit", "faults"), flush=True)
    jobs = [
        (options.kernel, options.thorough, number, architecture)
        for number, case in enumerate(cases(options.kernel, options.thorough))
        for architecture in options.arch
        if architecture in case.architectures
    ]
    failed = False
    with multiprocessing.get_context("spawn").Pool() as pool:  # forked, PyTorch's threads would be missing
        for row, faulty in itertools.chain.from_iterable(pool.imap(compile_job, jobs)):
            print(row, flush=True)
            failed |= faulty
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
