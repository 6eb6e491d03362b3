"""Compiles every tile choice of every kernel for every architecture, without a GPU, and reads the machine code.

    python tests/codegen.py [--kernel NAME] [--arch 90 ...]

The real launchers run on CPU tensors: a stub driver names the architecture and each launch becomes a compilation, so
what is checked is specialised as a launch would be. Checked: no spills, no local memory, shared memory within the
chip's limit, the instructions that a case demands. Prints a table; exits with 1 if a check fails. Runs in a process of
its own, since kernels that were defined under TRITON_INTERPRET cannot be compiled. A new kernel adds a function that
yields its cases to CASES.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from fastdeeplab.kernels import argmax
from fastdeeplab.kernels.cross_entropy import cross_entropy_forward
from fastdeeplab.kernels.cross_entropy_backward import cross_entropy_backward
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of shared memory that a program may use


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
    demands: tuple[str, ...] = ()  # regular expressions that some instruction must match
    architectures: tuple[int, ...] = tuple(SHARED_LIMITS)


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
            demands=(indices[index],) if whole_strips else (),
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


CASES = (argmax_cases, cross_entropy_cases)


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
    instructions: list[tuple[int, str]]  # address, text without the predicate

    @staticmethod
    def read(kernel: Any) -> "Machine":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage, sass = (
                subprocess.run([tool, option, cubin.name], check=True, capture_output=True, text=True).stdout
                for option in ("-res-usage", "-sass")
            )
        return Machine(
            registers=int(re.findall(r"REG:(\d+)", usage)[0]),
            stack=int(re.findall(r"STACK:(\d+)", usage)[0]),
            shared=kernel.metadata.shared,
            instructions=[
                (int(address, 16), text)
                for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?\s*([^;]+?) ?;", sass)
            ],
        )

    def count(self, opcode: str, start: int = 0, stop: int = sys.maxsize) -> int:
        return sum(start <= address <= stop and text.startswith(opcode) for address, text in self.instructions)

    def per_pixel_and_class(self, units: tuple[str, ...]) -> float:
        """For each unit the instructions per unit in the loop that has the fewest, summed."""
        return sum(map(self.per_unit, units))

    def per_unit(self, unit: str) -> float:
        backward = [
            (int(target[1], 16), address)
            for address, text in self.instructions
            if (target := re.match(r"BRA.*0x([0-9a-f]+)", text)) and int(target[1], 16) < address
        ]
        loops = [loop for loop in backward if self.count(unit, *loop)] or [(0, sys.maxsize)]
        return min(self.count("", *loop) / max(self.count(unit, *loop), 1) for loop in loops)

    def faults(self, case: Case, units: tuple[str, ...], architecture: int) -> Iterator[str]:
        if self.stack or self.count("STL") or self.count("LDL"):
            yield f"{self.stack} bytes of stack, {self.count('STL')} STL and {self.count('LDL')} LDL"
        if self.shared > SHARED_LIMITS[architecture] * 1024:
            yield f"{self.shared} bytes of shared memory, limit {SHARED_LIMITS[architecture]} KiB"
        for unit in units:
            if not self.count(unit):
                yield f"no {unit} to count by"
        for demand in case.demands:
            if not any(re.match(demand, text) for _, text in self.instructions):
                yield f"no instruction matches {demand}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--arch", type=int, nargs="*", default=list(SHARED_LIMITS), choices=list(SHARED_LIMITS))
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET must be unset: the interpreter's kernels cannot be compiled")

    print(f"triton {triton.__version__}, torch {torch.__version__}")
    layout = "{:22} {:24} {:18} {:7} {:>9} {:>6} {:>7} {:>12} {:>20}  {}".format
    columns = "kernel", "choice", "dtypes", "arch", "registers", "spills", "shared"
    print(layout(*columns, "instructions", "per pixel and class", "faults"))
    failed = False
    for case in (case for cases in CASES for case in cases() if options.kernel in case.kernel):
        for architecture in (a for a in options.arch if a in case.architectures):
            with compiling_launches(architecture) as compiled:
                case.launch()
            for kernel in compiled:
                machine = Machine.read(kernel)
                units = case.units.get(kernel.metadata.name, ())
                faults = "; ".join(machine.faults(case, units, architecture))
                failed |= bool(faults)
                print(
                    layout(
                        kernel.metadata.name,
                        case.choice,
                        case.dtypes,
                        f"sm_{architecture}",
                        machine.registers,
                        machine.stack,
                        machine.shared,
                        machine.count(""),
                        f"{machine.per_pixel_and_class(units):.2f}" if units else "-",
                        faults or "-",
                    ),
                    flush=True,
                )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
