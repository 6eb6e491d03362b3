"""The machine code of every tile choice for every architecture: no spills, shared memory within limits, wide stores.

``make codegen`` compiles more combinations, with each supported triton.

In a process of its own: a kernel that was defined under Triton's interpreter can't be compiled.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import predict
import triton
from codegen import Case, Machine

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
EXPECTED = {  # a pattern of a row's kernel and choice, and for which architectures there must be one
    "upsample_argmax_kernel": ARCHITECTURES,
    "cross_entropy_kernel": ARCHITECTURES,
    "corner_shares_kernel": ARCHITECTURES,
    "conv_kernel .* pointer": ARCHITECTURES,
    "conv_kernel .* gemm_tma": (90, 100, 120),
    "conv_kernel .* boxes_tma": (90, 100, 120),
}


def test_machine_code() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("codegen.py")
    run = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    for kernel, architectures in EXPECTED.items():
        for architecture in architectures:
            assert re.search(rf"^{kernel}.* sm_{architecture} ", run.stdout, re.M), (kernel, architecture)
    if triton.__version__ == predict.TRITON:
        assert_predicted_by(run.stdout)


def assert_predicted_by(table: str) -> None:
    """The loops that times are predicted from are the table's: their instructions, and how many programs are held."""
    for kind, loops in predict.LOOPS.items():
        for (m, n), loop in zip(predict.BLOCKS, loops, strict=True):
            row = rf"^conv_kernel +{kind} pointer-{m}x{n}x64-\S+ +bfloat16 +sm_90"
            found = re.search(row + r"( +\d+){3} +(\d+) +shared +\d+ +(\d+)\.", table, re.M)
            assert found, (kind, m, n)
            assert predict.Loop(int(found[3]), int(found[2])) == loop, (kind, m, n)


def test_every_loop_over_a_product_is_looked_at() -> None:
    """Also a larger one after a small one that is as it should be; not what merely surrounds one."""
    texts = ["LDGSTS.E", "HGMMA.64x64x16.F32", "BRA `(.L_1)", "LDG.E", "IADD3", "HGMMA.64x64x16.F32", "BRA `(.L_2)"]
    instructions = [(16 * number, text) for number, text in enumerate([*texts, "BRA `(.L_1)"])]
    machine = Machine(168, 0, 0, 4, True, instructions, {".L_1": 0, ".L_2": 48})
    assert machine.product_loops() == [(0, 32), (48, 96)]
    faults = [*machine.product_faults(Case("", "", "", lambda: None, {}), 80)]
    assert faults == ["no asynchronous load in the loop", "1 synchronous loads in the loop"]
    assert machine.per_step(64 * 64 * 64) == 16
