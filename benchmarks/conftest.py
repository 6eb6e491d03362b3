"""Options and the ``record`` fixture of the benchmarks: compare, measure, write the row, fill pytest-benchmark's table.

The CSV holds what ``fastdeeplab.kernels.measure`` finds: on a GPU device events, without the gaps between launches.
pytest-benchmark's own table holds the wall clock of a call and the wait for its end, launches included.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DEVICE, Record
from fastdeeplab.kernels.measure import measure
from harness import Results, default_path, make_row
from pytest_benchmark.fixture import BenchmarkFixture
from roofline import Work


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdeeplab")
    group.addoption("--csv", type=Path, help="append the rows to this file (default: benchmarks/results/<device>.csv)")
    group.addoption("--seconds", type=float, default=0.2, help="how long to repeat each call (default: 0.2)")
    dtypes = ("bfloat16", "float16", "float32")
    group.addoption("--dtype", choices=dtypes, default=dtypes[0], help="of the convolutions (default: bfloat16)")
    group.addoption("--all-tiles", action="store_true", help="measure each tile choice of the convolutions' kernels")


@pytest.fixture(scope="session", autouse=True)
def _cudnn_benchmark() -> None:
    """cuDNN's best algorithm for every rival."""
    torch.backends.cudnn.benchmark = True


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    try:
        return Results(request.config.getoption("--csv") or default_path(DEVICE))
    except ValueError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: BenchmarkFixture, results: Results) -> Record:
    def record(
        kernel: str,
        implementation: str,
        case: Any,
        candidate: Callable[..., Any],
        inputs: Sequence[Any],
        reference: Callable[..., Any],
        tolerance: float,
        error: Callable[[Any, Any], float],
        work: Work | None,
        shape: str | None = None,
        flop: int | None = None,
        tile: str = "",
    ) -> None:
        shape = shape or case.shape
        seconds = request.config.getoption("--seconds")
        measurement = measure(candidate, inputs, reference, tolerance, error=error, seconds=seconds)
        row = make_row(
            DEVICE,
            kernel=kernel,
            implementation=implementation,
            shape=shape,
            layout=case.layout,
            dtype=case.dtype_name,
            measurement=measurement,
            work=work,
            flop=flop,
            tile=tile,
        )
        results.append(row)

        def call_and_wait() -> None:
            candidate(*inputs)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{kernel} {shape} {case.dtype_name} {case.layout}"
        benchmark.extra_info.update(dataclasses.asdict(row))
        benchmark.pedantic(call_and_wait, rounds=5)

    return record
