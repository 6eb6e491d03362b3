"""verify finds what is wrong, says what fails and what can't run, and finds nothing where nothing is wrong."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fastdeeplab.kernels import argmax, conv, library, tuning
from fastdeeplab.kernels.candidates import Gpu, splits_of, tiles_for
from networks import small_model
from rich.console import Console
from torch import Tensor

import fastdeeplab as fdl
from fastdeeplab import verify as verifying
from fastdeeplab.verification import convolutions, network, subjects, tail
from fastdeeplab.verification.convolutions import chosen_tiles, verified_layers
from fastdeeplab.verification.network import wrong_pixels
from fastdeeplab.verification.subjects import Check, Trial
from fastdeeplab.verification.tail import shortfall
from fastdeeplab.verify import run_verify, verify

CPU = torch.device("cpu")
NO_KERNELS = "the tensors are on a CPU"
ONE_TILE = argmax.TILES[1]

Function = Callable[..., Any]


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without the interpreter."""
    for module in (subjects, tuning):
        monkeypatch.setattr(module, "why_not", lambda *_: NO_KERNELS)


def checks_of(device: torch.device, function: str, dtype: str, part: str = "") -> list[Check]:
    """Of the quick subjects."""
    return [
        check
        for subject in verifying._subjects(device, True)
        if subject.function == function and subject.dtype.startswith(dtype) and part in subject.what
        for check in verifying._checks(subject, device)
    ]


def run_argmax(monkeypatch: pytest.MonkeyPatch, dtype: str = "") -> tuple[bool, str]:
    """What ``run_verify`` returns and prints, of the quick subjects of ``upsample_argmax``."""
    chosen = [each for each in verifying._subjects(CPU, True) if each.function == "upsample_argmax"]
    chosen = [each for each in chosen if each.dtype.startswith(dtype)]
    monkeypatch.setattr(verifying, "_subjects", lambda *_: chosen)
    text = io.StringIO()
    right = run_verify(Console(file=text, width=200), CPU, quick=True)
    return right, text.getvalue()


def spoil(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, spoiled: Callable[[Function], Function]) -> None:
    monkeypatch.setattr(module, name, spoiled(getattr(module, name)))


def one_class_off(function: Function) -> Function:
    def call(*args: Any, **options: Any) -> Tensor:
        indices = function(*args, **options)
        indices[0, 3, 2] = (indices[0, 3, 2] + 1) % 3
        return indices

    return call


def test_without_kernels_the_library_is_verified_and_the_rest_explained(no_kernels: None) -> None:
    text = io.StringIO()
    assert run_verify(Console(file=text, width=200), CPU, quick=True)
    lines = text.getvalue().splitlines()
    assert sum("not run: " + NO_KERNELS in line for line in lines) == len(fdl.kernels.FUNCTIONS)
    assert sum("ok" in line for line in lines) >= 3 * len(fdl.kernels.FUNCTIONS)
    assert not any("WRONG" in line or "failed:" in line or "triton" in line for line in lines)
    assert lines[-1].endswith(" right, 0 wrong or failed, 5 could not run")


@pytest.mark.parametrize("function", fdl.kernels.FUNCTIONS)
def test_kernels_and_tile_choices_are_verified(function: str, device: torch.device) -> None:
    checks = checks_of(device, function, "float16")
    assert {check.verdict for check in checks} == {"ok"}
    assert all(check.error <= check.limit for check in checks)
    assert {check.implementation for check in checks} == {"torch", "triton"}
    if function != "upsample_cross_entropy":
        assert len({check.choice for check in checks if check.implementation == "triton"}) >= 4


def test_the_network_is_verified(device: torch.device) -> None:
    checks = checks_of(device, "network", "float16", "logits")
    assert [check.implementation for check in checks] == ["torch", "triton", "auto"]
    assert {check.verdict for check in checks} == {"ok"}
    assert all(0 < check.error <= check.limit < 0.01 for check in checks)


@pytest.mark.gpu
def test_nothing_is_wrong_on_this_gpu(device: torch.device) -> None:
    checks = list(verify(device))
    assert [check for check in checks if check.bad] == []
    assert {check.implementation for check in checks} >= {"torch", "triton", "auto"}


def test_a_single_wrong_pixel_is_found(monkeypatch: pytest.MonkeyPatch, no_kernels: None) -> None:
    spoil(monkeypatch, library, "upsample_argmax", one_class_off)
    right, text = run_argmax(monkeypatch)
    assert not right
    assert text.count("WRONG") == 3
    assert "0 right, 3 wrong or failed, 1 could not run" in text


@pytest.mark.interpreter
def test_a_wrong_tile_choice_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(function: Function) -> Function:
        wrong = one_class_off(function)
        return lambda *args, tile=None: (wrong if tile == ONE_TILE else function)(*args, tile=tile)

    spoil(monkeypatch, argmax, "upsample_argmax", spoiled)
    checks = checks_of(CPU, "upsample_argmax", "float16")
    assert [check.choice for check in checks if check.bad] == [f"{ONE_TILE.rows}x{ONE_TILE.columns}"]
    assert [check.verdict for check in checks if not check.bad] == ["ok"] * len(argmax.TILES) + ["ok"]


@pytest.mark.interpreter
def test_a_wrong_convolution_of_one_tile_choice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(function: Function) -> Function:
        def call(*args: Any, tile: Any, **options: Any) -> None:
            function(*args, tile=tile, **options)
            if tile.block_n == 64 and tile.block_m == 128 and tile.skip:
                args[5][0, 3, 2, 1] += 0.05

        return call

    spoil(monkeypatch, conv, "conv_bn_relu", spoiled)
    checks = checks_of(CPU, "conv_bn_relu", "float16", "3x3 dilation")
    assert [check.choice for check in checks if check.verdict == "WRONG"] == ["pointer-128x64x64-4w-3s-skip"]
    assert {check.verdict for check in checks} == {"ok", "WRONG"}


@pytest.mark.parametrize(("function", "factor"), [("conv_bn_relu", 1.1), ("aspp_branches", math.nan)])
def test_a_wrong_convolution_of_the_library_is_found(
    function: str, factor: float, monkeypatch: pytest.MonkeyPatch, no_kernels: None
) -> None:
    """Even though the library in fp64 is as wrong."""
    right = library.conv_pointwise
    monkeypatch.setitem(library.FORMS, "conv_pointwise", lambda *args: right(*args) * factor)
    checks = checks_of(CPU, function, "float32")
    assert {check.verdict for check in checks if check.choice == "conv_pointwise"} == {"WRONG"}


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch, no_kernels: None) -> None:
    spoil(monkeypatch, library, "cross_entropy_backward", lambda function: lambda *args: 1.0001 * function(*args))
    loss, gradient = checks_of(CPU, "upsample_cross_entropy", "float32", "->")
    assert (loss.verdict, gradient.verdict) == ("ok", "WRONG")
    assert gradient.error == pytest.approx(1e-4, rel=0.01)


def test_a_wrong_network_is_found(monkeypatch: pytest.MonkeyPatch, no_kernels: None) -> None:
    def spoiled(function: Function) -> Function:
        def call(*args: Any, **options: Any) -> fdl.AcceleratedModel:
            fast = function(*args, **options)
            fast.backbone.layer2[0].conv2.weight[3] *= 2
            return fast

        return call

    spoil(monkeypatch, network, "accelerate", spoiled)
    assert {check.verdict for check in checks_of(CPU, "network", "float16", "logits")} == {"WRONG"}


def test_a_wrong_mask_is_found(monkeypatch: pytest.MonkeyPatch, no_kernels: None) -> None:
    """Most pixels are no near-ties, so that the comparison says something."""
    spoil(monkeypatch, library, "upsample_argmax", lambda function: lambda *args, **k: (function(*args, **k) + 1) % 21)
    for check in checks_of(CPU, "network", "float16", "mask"):
        assert check.verdict == "WRONG"
        assert check.error > 0.8 * 2 * 97 * 113


@pytest.mark.interpreter
def test_a_tile_choice_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(function: Function) -> Function:
        def call(*args: Any, tile: Any = None) -> Tensor:
            if tile == ONE_TILE:
                raise RuntimeError("out of resource: shared memory\nRequired: 300 KiB")
            return function(*args, tile=tile)

        return call

    spoil(monkeypatch, argmax, "upsample_argmax", failing)
    right, text = run_argmax(monkeypatch, "float16")
    assert not right
    assert text.count("failed: out of resource: shared memory") == 1
    assert "Required" not in text
    assert "WRONG" not in text


def test_too_little_memory_is_no_fault(monkeypatch: pytest.MonkeyPatch, no_kernels: None) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(tail, "upsample_logits", full)
    right, text = run_argmax(monkeypatch)
    assert right
    assert text.count("not run: CUDA out of memory. Tried to allocate 2 GiB.") == 3


@pytest.mark.interpreter
def test_after_an_error_that_leaves_the_gpu_unusable_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    unusable = ""

    def failing(function: Function) -> Function:
        def call(*args: Any, tile: Any = None) -> Tensor:
            nonlocal unusable
            assert not unusable
            if tile == ONE_TILE:
                unusable = "the GPU is unusable after an error: illegal memory access"
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return function(*args, tile=tile)

        return call

    spoil(monkeypatch, argmax, "upsample_argmax", failing)
    monkeypatch.setattr(verifying, "_why_unusable", lambda _: unusable)
    checks = list(verify(CPU, quick=True))
    first = next(number for number, check in enumerate(checks) if check.bad)
    assert checks[first].verdict == "failed: CUDA error: an illegal memory access was encountered"
    assert {check.verdict for check in checks[:first]} == {"ok"}
    assert {check.verdict for check in checks[first + 1 :]} == {f"not run: {unusable}"}


def test_kernels_that_are_turned_off_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDEEPLAB_KERNELS", "torch")
    for function in ("upsample_argmax", "aspp_projection"):
        checks = checks_of(CPU, function, "float")
        assert {check.implementation for check in checks} == {"torch", ""}
        assert [check.verdict for check in checks if not check.implementation] == ["not run: FASTDEEPLAB_KERNELS=torch"]


@pytest.mark.parametrize(
    "gpu", [Gpu("H200", (9, 0), 132), Gpu("A100", (8, 0), 108), Gpu("5090", (12, 0), 170)], ids=lambda gpu: gpu.name
)
def test_every_tile_choice_is_verified(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function with every tile that serves one of its layers, and every number of splits."""
    monkeypatch.setattr(Gpu, "of", lambda device: gpu)
    monkeypatch.setattr(tuning, "why_not", lambda *_: None)
    monkeypatch.setattr(convolutions, "convolution_precision", lambda device: "tf32")
    for dtype in (torch.bfloat16, torch.float32):
        layers = verified_layers(torch.device("cuda"), dtype)
        for quick in (False, True):
            chosen = list(chosen_tiles(layers, torch.device("cuda"), quick))
            found = [(layer.function, tile) for layer, those in chosen for tile in those]
            expected = {
                (layer.function, tile._replace(splits=count))
                for layer in layers
                for tile in tiles_for(layer, gpu.capability)
                for count in splits_of(layer, tile, gpu.capability)
                if count == 1 or not quick
            }
            assert set(found) == expected
            assert not quick or len(found) == len(expected)


@pytest.mark.interpreter
def test_the_descriptor_kernels_are_verified_where_a_gpu_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, as if on such a GPU."""
    monkeypatch.setattr(Gpu, "of", lambda device: Gpu("H200", (9, 0), 1))
    checks = checks_of(CPU, "conv_bn_relu", "float16", "1x1 residual")
    assert {check.verdict for check in checks} == {"ok"}
    assert {check.choice.split("-")[0] for check in checks if check.choice} == {"conv_pointwise", "gemm_tma"}


def test_a_kernel_without_tile_choices_is_listed(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        pytest.skip("this GPU has tile choices of all kernels")
    (gemm,) = checks_of(device, "conv_bn_relu", "", "the kernel gemm_tma")
    assert gemm.verdict.startswith("not run: it has no tile choice for ")


def test_what_fails_while_it_is_compiled_is_left_to_the_comparison() -> None:
    ran = []

    def trial(number: int) -> Trial:
        def error() -> float:
            ran.append(number)
            raise RuntimeError("out of resource")

        return Trial("triton", str(number), 0.0, error)

    verifying._compile([trial(number) for number in range(5)])
    assert sorted(ran) == [0, 1, 2, 3, 4]


def test_shortfall() -> None:
    full = torch.tensor([[1.0, 3.0], [2.0, -4.0], [1.9, 0.0]], dtype=torch.float64)[None, :, None]  # (1, 3, 1, 2)

    def of(indices: Sequence[int]) -> float:
        return shortfall(torch.tensor([[indices]]), full)

    assert of([1, 0]) == 0
    assert of([2, 0]) == pytest.approx(0.1 / 4)
    assert of([1, 1]) == pytest.approx(7 / 4)
    assert of([3, 0]) == of([-1, 0]) == of([1]) == math.inf


def test_wrong_pixels_are_those_that_the_logits_error_does_not_explain() -> None:
    fast = fdl.accelerate(small_model(num_classes=2))
    expected = torch.tensor([[1.0, 1.0, 1.0], [0.8, 1.1, 0.0]], dtype=torch.float64)[None, :, None]  # (1, 2, 1, 3)
    images = torch.zeros(1, 3, 1, 3)
    for mask, error, count in [([0, 1, 0], 0, 0), ([0, 0, 0], 0, 1), ([0, 0, 1], 0.06, 1), ([1, 0, 0], 0.11, 0)]:
        fast.predict = lambda images, mask=mask: torch.tensor([[mask]])  # type: ignore[method-assign]
        assert wrong_pixels(fast, images, expected + error, expected) == count
    assert wrong_pixels(fast, images, expected * math.nan, expected) == 2  # pixels of the last mask


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="device must be a CPU or a CUDA GPU, got mps"):
        next(verify(torch.device("mps")))


def test_it_leaves_the_random_numbers_alone(no_kernels: None) -> None:
    before = torch.get_rng_state()
    checks_of(CPU, "network", "float16", "logits")
    checks_of(CPU, "upsample_cross_entropy", "float16")
    assert torch.equal(torch.get_rng_state(), before)
