"""The machine code of every tile choice for every architecture: no spills, shared memory within limits, wide stores.

``make codegen`` compiles more combinations, with each supported triton.

In a process of its own: a kernel that was defined under Triton's interpreter can't be compiled.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("kernel", ["upsample_argmax", "upsample_cross_entropy", "conv pointer", "conv .*_tma"])
def test_machine_code(kernel: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("codegen.py")
    run = subprocess.run(
        [sys.executable, program, "--kernel", kernel], env=environment, capture_output=True, text=True, check=False
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    architectures = (90, 100, 120) if "tma" in kernel else (80, 86, 89, 90, 100, 120)
    assert all(f"sm_{architecture} " in run.stdout for architecture in architectures)
