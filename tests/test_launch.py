"""Launching the kernels: threads, forks, streams, graphs, devices, grids and sizes beyond 2^31."""

import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from _pytest.mark import ParameterSet
from accuracy import assert_argmax
from fastdeeplab.kernels import library, reference
from fastdeeplab.kernels.candidates import Layer, tiles_for
from fastdeeplab.kernels.measure import relative_error
from fastdeeplab.kernels.tuning import kernel_call
from torch import Tensor

from fastdeeplab import kernels


def sample(
    device: torch.device, N: int = 2, K: int = 5, low: tuple[int, int] = (2, 3), scale: int = 4
) -> tuple[Tensor, Tensor]:
    size = (low[0] * scale, low[1] * scale)
    return torch.randn(N, K, *low, device=device), torch.randint(K, (N, *size), device=device)


def large(*values: object) -> ParameterSet:
    """Parameters that are for a GPU; a test's others are so small that the interpreter runs its body, too."""
    return pytest.param(*values, marks=pytest.mark.gpu)


def argmax(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return (kernels.upsample_argmax(logits, target.shape[1:], impl="triton"),)


def loss_and_gradient(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    leaf = logits.detach().requires_grad_()
    loss = kernels.upsample_cross_entropy(leaf, target, impl="triton")
    return loss.detach(), *torch.autograd.grad(loss, leaf)


def convolutions(x: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    """One by split K, and ASPP's branches and projection."""
    C = x.shape[1]
    values = torch.linspace(-1, 1, 64 * C * 9, device=x.device)  # without a generator, which threads would share
    weight, shift = values.view(64, C, 3, 3), values[:64]
    branches = kernels.aspp_branches(
        x, [weight[:, :, :1, :1], weight, weight], None, torch.cat(3 * [shift]), rates=(1, 2), impl="triton"
    )
    project = values[: 64 * 4].view(64, 4, 1, 1).repeat(1, 64, 1, 1)
    return (
        kernels.conv_bn_relu(x, weight, shift, shift, padding=2, dilation=2, impl="triton"),
        kernels.aspp_projection(branches, branches[:, :64, :1, :1], project, shift, shift, impl="triton"),
    )


Function = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
FUNCTIONS = [argmax, loss_and_gradient, convolutions]


def equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.gpu  # the interpreter is for one thread
@pytest.mark.parametrize("function", FUNCTIONS)
def test_fault_08_two_threads(function: Function, device: torch.device) -> None:
    """Of a size that nothing has used before, so that both find the cache of compiled kernels cold."""
    logits, target = sample(device, K=3, scale=5)
    results: list[tuple[Tensor, ...]] = []
    barrier = threading.Barrier(2)

    def work() -> None:
        barrier.wait()
        results.append(function(logits, target))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert equal(results[0], results[1])
    assert equal(results[0], function(logits, target))


def equal_in_a_fork(function: Function) -> bool:
    torch.set_num_threads(1)  # as in a DataLoader's worker; a library's sums by several threads differ by rounding
    logits, target = sample(torch.device("cpu"))
    expected = function(logits, target)
    child = os.fork()
    if child == 0:  # ends here, whatever happens
        status = 1
        try:
            status = 0 if equal(function(logits, target), expected) else 2
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA can't be used in a forked process once it is initialised")
def test_fault_08_fork_after_import() -> None:
    """Of a process without the threads that run the tests, whose locks a fork would find as they happen to be."""
    program = "from test_launch import *; print(*[equal_in_a_fork(function) for function in FUNCTIONS])"
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert ended.stdout.split() == ["True"] * len(FUNCTIONS), ended.stdout + ended.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("function", FUNCTIONS)
def test_fault_08_side_stream(function: Function, device: torch.device) -> None:
    logits, target = sample(device, K=21, low=(64, 64), scale=8)
    expected = function(logits, target)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # cycles; a launch on another stream would not wait for this copy
        late = torch.empty_like(logits).copy_(logits)
        actual = function(late, target)
    torch.cuda.current_stream(device).wait_stream(stream)
    assert equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("function", FUNCTIONS)
def test_fault_08_first_call_inside_a_graph_capture(function: Function, device: torch.device) -> None:
    """Compiling while a graph is captured must neither break the capture nor end up in the graph."""
    logits, target = sample(device, K=7, low=(33, 33), scale=9)
    F.conv2d(logits, logits[..., :1, :1])  # PyTorch makes cuDNN's handle in no capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(logits, target)
    logits.copy_(torch.randn_like(logits))
    graph.replay()
    torch.cuda.synchronize(device)
    assert equal(captured, function(logits, target))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_fault_07_tensors_on_the_device_that_is_not_current(function: Function, device: torch.device) -> None:
    logits, target = sample(device, K=21, low=(16, 16), scale=8)
    assert torch.cuda.current_device() == 0
    actual = function(logits.to("cuda:1"), target.to("cuda:1"))
    assert all(tensor.device.index == 1 for tensor in actual)
    assert equal(tuple(tensor.to(device) for tensor in actual), function(logits, target))


@pytest.mark.parametrize("function", ["conv_bn_relu", "aspp_projection", *library.FORMS])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_fault_11_fp32_convolutions_follow_pytorchs_setting(function: str, impl: str, device: torch.device) -> None:
    """That of convolutions, whatever the one of matrix products is."""
    if function in library.FORMS and (impl == "triton" or (device.type == "cpu" and "cudnn" in function)):
        pytest.skip("a form of the library; cuDNN's is for GPUs")
    C = 512
    x, weight = torch.randn(1, C, 5, 6, device=device), torch.randn(64, 2 * C, 1, 1, device=device)
    pooled, shift = torch.randn(1, C, 1, 1, device=device), torch.zeros(64, device=device)
    weight = weight if function == "aspp_projection" else weight[:, :C].contiguous()
    exact = reference.conv_bn_relu(x.double(), weight[:, :C].double(), None, shift.double())
    if function == "aspp_projection":
        exact = reference.aspp_projection(x.double(), pooled.double(), weight.double(), None, shift.double())

    def run() -> Tensor:
        if function == "aspp_projection":
            return kernels.aspp_projection(x, pooled, weight, None, shift, impl=impl)
        if function == "conv_bn_relu":
            return kernels.conv_bn_relu(x, weight, None, shift, impl=impl)
        return library.FORMS[function](x, weight, None, shift, None, 1, 0, 1, True)

    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision  # type: ignore[attr-defined]
    errors = {}
    try:
        for precision, other in (("ieee", "tf32"), ("tf32", "ieee")):
            conv.fp32_precision, matmul.fp32_precision = precision, other  # type: ignore[attr-defined]
            errors[precision] = relative_error(run(), exact)
    finally:
        conv.fp32_precision, matmul.fp32_precision = before  # type: ignore[attr-defined]
    assert errors["ieee"] < 1e-6
    assert errors["tf32"] < 1e-3
    assert device.type == "cpu" or impl == "torch" or errors["tf32"] > 1e-5  # cuDNN may use it or not


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_fault_11_fp32_is_not_done_in_tf32(impl: str, device: torch.device) -> None:
    """PyTorch's default asks for full fp32: TF32 would be off by 3e-4."""
    logits, target = sample(device, K=4)
    leaf, exact_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    kernels.upsample_cross_entropy(leaf, target, impl=impl).backward()
    reference.upsample_cross_entropy(exact_leaf, target).backward()
    assert leaf.grad is not None
    assert exact_leaf.grad is not None
    assert relative_error(leaf.grad, exact_leaf.grad) < 2e-6


@pytest.mark.parametrize(("N", "K", "low"), [(2, 7, (2, 4)), large(8, 150, (128, 256))])
def test_fault_01_more_than_2_31_full_size_logits(N: int, K: int, low: tuple[int, int], device: torch.device) -> None:
    """Compared picture by picture, since PyTorch's own bilinear is wrong above 2^31 outputs (fault 2)."""
    logits, target = sample(device, N, K, low, scale=8)
    size = tuple(target.shape[1:])
    index = kernels.upsample_argmax(logits, size, dtype=torch.uint8, impl="triton")
    leaf = logits.clone().requires_grad_()
    loss = kernels.upsample_cross_entropy(leaf, target, reduction="sum", impl="triton")
    loss.backward()
    losses = 0.0
    for picture in range(N):
        one = slice(picture, picture + 1)
        assert_argmax(index[one], logits[one], size)
        exact_leaf = logits[one].double().requires_grad_()
        exact = reference.upsample_cross_entropy(exact_leaf, target[one], reduction="sum")
        exact.backward()
        losses += float(exact.detach())
        assert relative_error(leaf.grad[one], exact_leaf.grad) < 2e-6
    assert float(loss.detach()) == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("size", [(130, 110), large((50_000, 43_000))])
def test_fault_02_more_than_2_31_pixels(size: tuple[int, int], device: torch.device) -> None:
    """The first, middle and last rows of a mask of 2.15e9 pixels, against those rows interpolated alone."""
    H = size[0]
    logits = torch.randn(1, 3, 60, 50, device=device)
    index = kernels.upsample_argmax(logits, size, dtype=torch.uint8, impl="triton")
    for rows in (slice(0, 16), slice(H // 2 - 10, H // 2 + 10), slice(H - 16, H)):
        source_rows = slice(library._lower(60, H, rows.start), 60)
        values = library._Chunk(slice(0, 1), rows, source_rows, size).upsample(logits).double()
        shortfall = values.amax(-1) - values.gather(-1, index[:, rows, :, None].long())[..., 0]
        assert float(shortfall.max()) < 1e-4


@pytest.mark.parametrize("N", [70, large(70_000)])
def test_fault_03_more_programs_than_65535(N: int, device: torch.device) -> None:
    """A grid's y and z end there, its x does not."""
    logits = torch.randn(N, 2, 1, 1, device=device)
    expected = logits[:, :, 0, 0].argmax(1)[:, None, None].expand(-1, 2, 2)
    assert torch.equal(kernels.upsample_argmax(logits, (2, 2), impl="triton"), expected)
    target = torch.zeros(N, 2, 2, dtype=torch.int64, device=device)
    loss = kernels.upsample_cross_entropy(logits, target, impl="triton")
    exact = reference.upsample_cross_entropy(logits.double(), target)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("N", "K", "low", "dtype"), [(2, 3, (2, 3), torch.float16), large(16, 21, (64, 64), torch.bfloat16)]
)
def test_the_same_bit_by_bit_in_every_run(
    N: int, K: int, low: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    logits, target = sample(device, N, K, low, scale=8)
    logits = logits.to(dtype)
    first = loss_and_gradient(logits, target)
    for _ in range(10):
        assert equal(loss_and_gradient(logits, target), first)


@pytest.mark.parametrize(("N", "size", "width"), [(3, 4, 16), large(33, 512, 256)])
@pytest.mark.parametrize("what", ["input", "output", "partial sums"])
@pytest.mark.parametrize(
    ("tile", "kernel"), [("pointer", 1), ("pointer", 3), ("gemm_tma", 1), ("boxes_tma", 3)], ids=str
)
def test_fault_01_convolutions_of_more_than_2_31_values(
    tile: str, kernel: int, what: str, N: int, size: int, width: int, device: torch.device
) -> None:
    """fp16, since the interpreter gets bf16 wrong. The last image is compared, which lies past 2^31."""
    if device.type == "cuda" and tile != "pointer" and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    C, C_out = {"input": (width, 64), "output": (64, width), "partial sums": (64, 64)}[what]
    x = torch.randn(N, C, size, size, dtype=torch.float16, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    residual = torch.randn(N, C_out, 1, 1, dtype=torch.float16, device=device) if what == "output" else None
    if residual is not None:
        residual = residual.expand(-1, -1, size, size).contiguous(memory_format=torch.channels_last)
    layer = Layer.of(
        "conv_bn_relu", x.shape, (C_out, C, kernel, kernel), x.dtype,
        padding=kernel // 2 * 2, dilations=(kernel // 2 * 2 or 1,), residual=residual is not None,
    )  # fmt: skip
    choice = next(t for t in tiles_for(layer, (9, 0)) if t.kernel == tile and t.skip == (kernel == 3))
    choice = choice._replace(splits=4 if what == "partial sums" else 1)
    weight = torch.randn(C_out, C, kernel, kernel, dtype=torch.float16, device=device) / (kernel * C**0.5)
    weight = weight.contiguous(memory_format=torch.channels_last)
    y = kernel_call(layer, choice)(x, weight, torch.zeros(C_out, device=device), residual)
    exact = F.conv2d(x[-1:].double(), weight.double(), padding=layer.padding, dilation=layer.dilations[0])
    exact = exact if residual is None else exact + residual[-1:].double()
    assert relative_error(y[-1:], exact.relu()) < 1e-3


@pytest.mark.parametrize(("size", "C_b"), [(9, 24), large(512, 2064)])
@pytest.mark.parametrize("tile", ["pointer", "boxes_tma"])
def test_fault_01_branches_of_more_than_2_31_values(tile: str, size: int, C_b: int, device: torch.device) -> None:
    """The last channels of the last branch are compared."""
    if device.type == "cuda" and tile != "pointer" and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    rates = (2, 4, 6)
    x = torch.randn(1, 8, size, size, dtype=torch.float16, device=device).contiguous(memory_format=torch.channels_last)
    weights = [
        torch.randn(C_b, 8, k, k, dtype=torch.float16, device=device).contiguous(memory_format=torch.channels_last) / 8
        for k in (1, 3, 3, 3)
    ]
    layer = Layer.of("aspp_branches", x.shape, weights[-1].shape, x.dtype, dilations=rates)
    choice = next(t for t in tiles_for(layer, (9, 0)) if t.kernel == tile)
    y = kernel_call(layer, choice)(x, torch.zeros(4 * C_b, device=device), *weights)
    exact = F.conv2d(x.double(), weights[-1][-8:].double(), padding=6, dilation=6)
    assert relative_error(y[:, -8:], exact.relu()) < 1e-3


@pytest.mark.parametrize("tiles", [70, large(70_000)])
def test_fault_03_convolutions_of_more_programs_than_65535(tiles: int, device: torch.device) -> None:
    x = torch.randn(1, 8, 1, 64 * tiles, dtype=torch.float16, device=device)
    layer = Layer.of("conv_bn_relu", x.shape, (8, 8, 1, 1), x.dtype)
    choice = next(tile for tile in tiles_for(layer, (8, 0)) if tile.block_m == 64)
    weight = torch.randn(8, 8, 1, 1, dtype=torch.float16, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    y = kernel_call(layer, choice)(x, weight, torch.zeros(8, device=device), None)
    assert relative_error(y, F.conv2d(x.float(), weight.float()).relu()) < 1e-3


@pytest.mark.gpu
def test_fault_14_a_stray_target_on_a_gpu(device: torch.device) -> None:
    """A NaN loss without waiting for the GPU; with check_target a ValueError; the process goes on."""
    logits, target = sample(device, K=5, low=(16, 16), scale=8)
    target[0, 3, 4] = 99
    for impl in ("triton", "torch"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = kernels.upsample_cross_entropy(logits, target, impl=impl)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert loss.isnan()
        with pytest.raises(ValueError, match=r"target must be in \[0, 5\)"):
            kernels.upsample_cross_entropy(logits, target, check_target=True, impl=impl)
    torch.cuda.synchronize(device)
