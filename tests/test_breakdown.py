"""Each operation of a run, named and timed."""

from types import SimpleNamespace

import pytest
from small_rivals import CPU, NETWORK

import fastdeeplab as fdl
from fastdeeplab.speed import breakdown
from fastdeeplab.speed.breakdown import parts_and_shares, time_operations


def test_each_operation_of_a_run_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, images = fdl.accelerate(NETWORK.build(CPU)), NETWORK.images(CPU)
    clock = iter(range(10**6))
    monkeypatch.setattr(breakdown.time, "perf_counter", lambda: float(next(clock)))
    parts = time_operations(fast, images, repeats=2)
    assert {part.milliseconds for part in parts} == {1000.0}  # one tick between start and end of each
    with fdl.kernels.recording() as fused:
        fast.predict(images)
    assert [part.layer for part in parts if part.layer] == [layer for layer, _ in fused]
    by_operation = {part.operation: part for part in parts}
    assert by_operation["upsample_argmax"].module == "upsample_argmax"
    assert by_operation["aspp_branches"].module == "classifier.0"
    assert by_operation["max_pool2d_with_indices"].module == "backbone.maxpool"


def test_small_operations_come_as_one() -> None:
    def part(name: str, milliseconds: float, layer: object = None) -> SimpleNamespace:
        return SimpleNamespace(operation=name, layer=layer, milliseconds=milliseconds)

    parts = [part("a", 98.5), part("b", 0.5), part("conv", 0.25, layer=1), part("c", 0.75)]
    found = [(each.operation, share) for each, share in parts_and_shares(parts)]
    assert found == [("a", 0.985), ("conv", 0.0025), ("the rest", 0.0125)]
