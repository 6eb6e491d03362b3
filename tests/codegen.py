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
    indices = {torch.int64: r"STG\.E\.128", torch.uint8: r"STG\.E "}  # four columns of int64, of uint8
    for tile, dtype, index in product(argmax.TILES, (torch.float32, torch.float16, torch.bfloat16), indices):
        if index == torch.uint8 and dtype != torch.bfloat16:
            continue
        logits = torch.empty(1, 19, 16, 32, dtype=dtype)
        yield Case(
            kernel="upsample_argmax",
            choice=f"{tile.rows}x{tile.columns}",
            dtypes=f"{dtype} -> {index}".replace("torch.", ""),
            launch=partial(argmax.upsample_argmax, logits, (128, 256), index, tile=tile),
            units={"upsample_argmax_kernel": ("FMNMX.NAN",)},
            demands=(indices[index],) if tile.columns == 4 else (),
        )


def cross_entropy_cases() -> Iterator[Case]:
    """Forward and backward at ratios that give every size of chunk, and at one that is no whole number."""
    sizes = {"8x": (16, 128), "16x": (16, 256), "7.9x": (65, 513), "2x": (16, 32), "1x": (16, 16)}
    options = {"plain": (False, 0.0), "weighted, smoothed": (True, 0.1)}
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for (ratio, (low, full)), dtype, (name, (weighted, smoothing)) in product(sizes.items(), dtypes, options.items()):
        if ratio != "8x" and (weighted or dtype != torch.bfloat16):
            continue
        logits = torch.empty(1, 19, low, low, dtype=dtype)
        target = torch.empty(1, full, full, dtype=torch.int64)
        arguments = (logits, target, torch.empty(19) if weighted else None, 255, smoothing)
        grad, lse = torch.empty(()), torch.empty(1, full, full)

        def launch(arguments: tuple[Any, ...] = arguments, grad: Tensor = grad, lse: Tensor = lse) -> None:
            cross_entropy_forward(*arguments)
            cross_entropy_backward(grad, lse, *arguments)

        yield Case(
            kernel="upsample_cross_entropy",
            choice=f"{ratio} {name}",
            dtypes=str(dtype).removeprefix("torch."),
            launch=launch,
            units={"cross_entropy_kernel": ("FMNMX", "MUFU.EX2"), "corner_shares_kernel": ("MUFU.EX2",)},
        )


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
        """For each unit the instructions per unit in the loop that has the most of it, summed."""
        return sum(map(self.per_unit, units))

    def per_unit(self, unit: str) -> float:
        backward = [
            (int(target[1], 16), address)
            for address, text in self.instructions
            if (target := re.match(r"BRA.*0x([0-9a-f]+)", text)) and int(target[1], 16) < address
        ]
        start, stop = max(backward, key=lambda loop: self.count(unit, *loop), default=(0, sys.maxsize))
        return self.count("", start, stop) / max(self.count(unit, start, stop), 1)

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
    columns = "kernel", "choice", "dtypes", "arch", "registers", "stack", "shared"
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
