"""The registered operators: opcheck, shapes without data, gradients, layouts, torch.compile, torch.export."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
import torch
import torch.nn.functional as F
from fastdeeplab.kernels import candidates, decisions, ops, reference
from fastdeeplab.kernels.measure import relative_error
from layouts import LAYOUTS
from torch import Tensor

from fastdeeplab import kernels


def sample(device: torch.device, layout: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, 5, 2, 3, device=device).contiguous(memory_format=layout)
    target = torch.randint(5, (2, 8, 12), device=device)
    target[:, :3] = 255
    return logits, target


OP_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck_upsample_argmax(impl: str, layout: torch.memory_format, device: torch.device) -> None:
    logits, _ = sample(device, layout)
    torch.library.opcheck(
        torch.ops.fastdeeplab.upsample_argmax, (logits, (8, 12), torch.uint8, impl), test_utils=OP_TESTS
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    ("weighted", "layout"), [(False, torch.contiguous_format), (True, torch.channels_last)], ids=str
)
def test_opcheck_upsample_cross_entropy(
    impl: str, weighted: bool, layout: torch.memory_format, device: torch.device
) -> None:
    logits, target = sample(device, layout)
    weight = torch.rand(5, device=device) if weighted else None
    arguments = (logits.requires_grad_(), target, weight, 255, 0.1, impl)
    torch.library.opcheck(torch.ops.fastdeeplab.upsample_cross_entropy, arguments, test_utils=OP_TESTS)

    with torch.no_grad():
        *_, softmax = torch.ops.fastdeeplab.upsample_cross_entropy(*arguments)
    arguments = (torch.tensor(0.5, device=device), softmax, logits.detach(), *arguments[1:])
    torch.library.opcheck(torch.ops.fastdeeplab.upsample_cross_entropy_backward, arguments, test_utils=OP_TESTS)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_public_functions_agree_with_pytorch(impl: str, reduction: str, device: torch.device) -> None:
    """Strided inputs, gradients through both implementations, also where the loss's gradient is not 1."""
    logits, target = sample(device, torch.channels_last)
    weight = torch.rand(5, dtype=torch.float64, device=device)
    options = {"weight": weight, "ignore_index": 255, "reduction": reduction, "label_smoothing": 0.1}
    leaf, exact_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = kernels.upsample_cross_entropy(leaf, target.to(torch.uint8), impl=impl, **options)
    exact = reference.upsample_cross_entropy(exact_leaf, target, **options)
    (loss * 3).backward()
    (exact * 3).backward()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad, exact_leaf.grad.float(), rtol=1e-5, atol=1e-6)
    index = kernels.upsample_argmax(logits, (8, 12), dtype=torch.uint8, impl=impl)
    assert torch.equal(index, reference.upsample_argmax(logits, (8, 12), dtype=torch.uint8))


def test_fault_06_compiled_code_hands_over_other_strides(device: torch.device) -> None:
    """The operators take what the compiler makes of an expression before them, whatever its strides."""

    def step(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = (x.transpose(1, 3) * 2).transpose(1, 3)
        loss = kernels.upsample_cross_entropy(logits, target, ignore_index=255, impl="triton")
        return loss, kernels.upsample_argmax(logits.detach(), (8, 12), impl="triton")

    logits, target = sample(device, torch.channels_last)
    leaf, compiled_leaf = logits.contiguous().requires_grad_(), logits.clone().requires_grad_()
    loss, index = step(leaf, target)
    assert torch.equal(index, kernels.upsample_argmax(logits * 2, (8, 12), impl="torch"))
    compiled_loss, compiled_index = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled_leaf, target)
    loss.backward()
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_leaf.grad, leaf.grad)
    assert torch.equal(compiled_index, index)


def test_fault_20_autocast_and_compile_together(device: torch.device) -> None:
    conv = torch.nn.Conv2d(3, 5, 3, padding=1).to(device)
    images, target = torch.randn(2, 3, 2, 3, device=device), sample(device)[1]

    def step() -> Tensor:
        with torch.autocast(device.type, torch.float16):
            logits = conv(images)
        return kernels.upsample_cross_entropy(logits, target, ignore_index=255, impl="triton")

    eager = step()
    eager.backward()
    gradient = conv.weight.grad.clone()
    conv.weight.grad = None
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")()
    compiled.backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(conv.weight.grad, gradient, rtol=2e-2, atol=1e-4)


def test_fault_20_autocast_leaves_the_gradient_in_full_precision(device: torch.device) -> None:
    """With the backward inside of autocast, too."""
    logits, target = sample(device)
    leaf, exact_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        loss = kernels.upsample_cross_entropy(leaf, target, ignore_index=255, label_smoothing=0.1, impl="torch")
        loss.backward()
    exact = reference.upsample_cross_entropy(exact_leaf, target, ignore_index=255, label_smoothing=0.1)
    exact.backward()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad, exact_leaf.grad.float(), rtol=1e-5, atol=1e-6)


def test_fault_14_compiled_code_gives_nan_for_a_stray_target(device: torch.device) -> None:
    logits, target = sample(device)
    target[0, 5, 6] = 9
    for reduction in ("mean", "none"):
        compiled = torch.compile(kernels.upsample_cross_entropy, fullgraph=True, backend="eager")
        loss = compiled(logits, target, ignore_index=255, reduction=reduction, impl="torch")
        assert loss.isnan().sum() == 1


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_there_is_no_second_derivative(impl: str, device: torch.device) -> None:
    logits, target = sample(device)
    logits.requires_grad_()
    loss = kernels.upsample_cross_entropy(logits, target, ignore_index=255, impl=impl)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


def test_what_can_not_run_says_so_in_compiled_code_too(device: torch.device) -> None:
    function = torch.compile(kernels.upsample_argmax, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="float64 is not one of"):
        function(sample(device)[0].double(), (8, 12), impl="triton")


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_compilation_serves_many_sizes(impl: str, device: torch.device) -> None:
    """The operators are opaque: no size and no chunk is burnt into the graph."""
    torch.compiler.reset()
    compiled = torch.compile(kernels.upsample_argmax, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for height in (7, 9, 10):  # none of them another of its sizes, which would count as the same size
            logits = torch.randn(2, 5, height, 3, device=device)
            size = (4 * height, 12)
            assert torch.equal(compiled(logits, size, impl=impl), reference.upsample_argmax(logits, size))


def test_full_size_logits_are_pytorchs_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anything to upsample the kernel saves nothing."""
    monkeypatch.setattr(kernels, "choose", lambda *_: kernels.Choice("triton", "for this test"))
    target = torch.zeros(1, 4, 5, dtype=torch.int64)
    called = []
    monkeypatch.setattr(kernels.library, "upsample_cross_entropy", lambda *_, **__: called.append("library"))
    kernels.upsample_cross_entropy(torch.randn(1, 3, 4, 5), target)
    assert called == ["library"]


def test_fault_20_deterministic_mode(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own bilinear backward raises or is replaced there; ours is deterministic as it is."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch's matrix products raise there
    logits, target = sample(device)
    torch.use_deterministic_algorithms(True)
    try:
        gradients = []
        for impl in ("torch", "triton", "torch", "triton"):
            leaf = logits.clone().requires_grad_()
            kernels.upsample_cross_entropy(leaf, target, ignore_index=255, impl=impl).backward()
            gradients.append(leaf.grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[1], gradients[3])


def test_export(device: torch.device) -> None:
    class Tail(torch.nn.Module):
        def forward(self, logits: Tensor) -> Tensor:
            return kernels.upsample_argmax(logits, (8, 12), impl="triton")

    logits, _ = sample(device)
    program = torch.export.export(Tail(), (logits,))
    assert "fastdeeplab.upsample_argmax" in str(program.graph)
    assert torch.equal(program.module()(logits), Tail()(logits))


def test_fake_tensors_have_the_shapes_of_real_ones(device: torch.device) -> None:
    logits, target = sample(device)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(logits)
        assert torch.ops.fastdeeplab.upsample_argmax(fake, (7, 9), torch.int16, "triton").shape == (2, 7, 9)
        *scalars, softmax = torch.ops.fastdeeplab.upsample_cross_entropy(
            fake, mode.from_tensor(target), None, 255, 0.0, "triton"
        )
        assert [tuple(scalar.shape) for scalar in scalars] == [(), ()]
        assert softmax.shape == (len(target), 2, *target.shape[1:])


def test_fault_05_stride_zero_gradients(device: torch.device) -> None:
    logits, target = sample(device)
    leaf, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses = kernels.upsample_cross_entropy(leaf, target, ignore_index=255, impl="triton").expand(3)
    losses.sum().backward()
    (3 * kernels.upsample_cross_entropy(expected, target, ignore_index=255, impl="triton")).backward()
    assert torch.equal(leaf.grad, expected.grad)


def conv(device: torch.device, dtype: torch.dtype = torch.float32, kernel: int = 3) -> tuple[Any, ...]:
    """Arguments of the operator, without the last one."""
    padding = kernel // 2 * 2
    x, weight = torch.randn(2, 16, 5, 6, device=device), torch.randn(8, 16, kernel, kernel, device=device) / kernel
    scale, shift = torch.rand(8, device=device), torch.randn(8, device=device)
    residual = torch.randn(2, 8, 5, 6, device=device)
    return x.to(dtype), weight.to(dtype), scale, shift, residual.to(dtype), 1, padding, max(padding, 1), True


def branches(device: torch.device) -> tuple[Any, ...]:
    weights = [torch.randn(8, 16, size, size, device=device) / size for size in (1, 3, 3)]
    x = torch.randn(2, 16, 5, 6, device=device)
    return x, weights, torch.rand(24, device=device), torch.randn(24, device=device), (2, 4)


def projection(device: torch.device) -> tuple[Any, ...]:
    x, pooled = torch.randn(2, 16, 5, 6, device=device), torch.randn(2, 8, 1, 1, device=device)
    weight = torch.randn(8, 24, 1, 1, device=device) / 4
    return x, pooled, weight, torch.rand(8, device=device), torch.randn(8, device=device)


Arguments = Callable[[torch.device], tuple[Any, ...]]
FUSED: dict[str, Arguments] = {"conv_bn_relu": conv, "aspp_branches": branches, "aspp_projection": projection}


def call(name: str, arguments: tuple[Any, ...], impl: str) -> Tensor:
    """The public function."""
    if name == "conv_bn_relu":
        *tensors, stride, padding, dilation, relu = arguments
        options = {"stride": stride, "padding": padding, "dilation": dilation, "relu": relu}
        return kernels.conv_bn_relu(*tensors, **options, impl=impl)
    if name == "aspp_branches":
        *tensors, rates = arguments
        return kernels.aspp_branches(*tensors, rates=rates, impl=impl)
    return kernels.aspp_projection(*arguments, impl=impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", FUSED)
def test_opcheck_of_the_convolutions(name: str, impl: str, device: torch.device) -> None:
    operator = getattr(torch.ops.fastdeeplab, name)
    torch.library.opcheck(operator, (*FUSED[name](device), impl), test_utils=OP_TESTS)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_opcheck_of_the_convolution_into_a_slice(impl: str, device: torch.device) -> None:
    out = torch.zeros(2, 32, 5, 6, device=device).contiguous(memory_format=torch.channels_last)[:, 8:16]
    arguments = (*conv(device), out, impl)
    torch.library.opcheck(torch.ops.fastdeeplab.conv_bn_relu_out, arguments, test_utils=OP_TESTS)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", FUSED)
def test_fake_convolutions_have_shapes_and_strides_of_real_ones(name: str, impl: str, device: torch.device) -> None:
    arguments = FUSED[name](device)
    real = getattr(torch.ops.fastdeeplab, name)(*arguments, impl)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
        promised = getattr(torch.ops.fastdeeplab, name)(*fake, impl)
    assert (promised.shape, promised.stride(), promised.dtype) == (real.shape, real.stride(), real.dtype)
    assert real.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_convolutions(name: str, impl: str, dynamic: bool, device: torch.device) -> None:
    torch.compiler.reset()
    arguments = FUSED[name](device)
    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)(name, arguments, impl)
        assert torch.equal(compiled, call(name, arguments, impl))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiled_convolutions_write_into_slices_of_one_buffer(impl: str, device: torch.device) -> None:
    """And read what the one before has written there."""
    x, weight, scale, shift, *_ = conv(device)

    def step(x: Tensor) -> Tensor:
        buffer = torch.zeros(2, 24, 5, 6, device=device).contiguous(memory_format=torch.channels_last)
        kernels.conv_bn_relu(x, weight, scale, shift, padding=1, out=buffer[:, :8], impl=impl)
        kernels.conv_bn_relu(buffer[:, :16], weight, None, shift, padding=1, out=buffer[:, 16:], impl=impl)
        return buffer

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, step(x))
    assert compiled[:, 16:].any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", FUSED)
def test_export_of_the_convolutions(name: str, impl: str, device: torch.device) -> None:
    arguments = FUSED[name](device)

    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(name, (x, *arguments[1:]), impl)

    program = torch.export.export(Block(), (arguments[0],))
    assert f"fastdeeplab.{name}" in str(program.graph)
    assert torch.equal(program.module()(arguments[0]), Block()(arguments[0]))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_convolutions_under_autocast_keep_their_dtype(impl: str, device: torch.device) -> None:
    for name, arguments in FUSED.items():
        tensors = arguments(device)
        with torch.autocast(device.type, torch.bfloat16):
            actual = call(name, tensors, impl)
        assert actual.dtype == torch.float32
        assert torch.equal(actual, call(name, tensors, impl))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("name", FUSED)
def test_fault_05_convolutions_of_any_strides(
    name: str, layout: str, impl: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Of every argument; no further from fp64 than PyTorch in the same dtype, but for the order of the additions."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(weight) for weight in value]
        if not isinstance(value, Tensor):
            return value
        if layout == "expanded":  # strides of 0
            value = value[:1].expand_as(value)
            return value.to(dtype)[:1].expand_as(value) if value.ndim == 4 else value
        return LAYOUTS[layout](value.to(dtype)) if value.ndim == 4 else value.repeat_interleave(2)[::2]

    def by_pytorch(dtype: torch.dtype) -> Tensor:
        def cast(value: Any) -> Any:
            return [tensor.to(dtype) for tensor in value] if isinstance(value, list) else value.to(dtype)

        y: Tensor = getattr(reference, name)(*map(cast, tensors), **options)
        return y

    arguments = tuple(map(moved, FUSED[name](device)))
    options = {"conv_bn_relu": {"padding": 2, "dilation": 2}, "aspp_branches": {"rates": (2, 4)}}.get(name, {})
    tensors = [value for value in arguments if isinstance(value, Tensor | list)]
    exact = by_pytorch(torch.float64)
    actual = getattr(torch.ops.fastdeeplab, name)(*arguments, impl)
    assert actual.dtype == dtype
    slack = 2**-14 if dtype == torch.float16 else 2**-21 if device.type == "cpu" else 2e-3  # TF32 on a GPU
    assert relative_error(actual, exact) <= relative_error(by_pytorch(dtype), exact) + slack


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of the launches of ``conv_bn_relu``, which launch nothing."""
    calls: list[tuple[Any, ...]] = []
    launcher = SimpleNamespace(conv_bn_relu=lambda *arguments, **options: calls.append(arguments))
    monkeypatch.setattr(ops, "_triton", lambda stem: launcher)
    return calls


SIZE_ONE = {  # odd strides where they lead nowhere, with the pitch that the addresses have
    "one column": ((2, 16, 5, 1), (5 * 16, 1, 16, 999), 16),
    "one row": ((2, 16, 1, 5), (5 * 24, 1, 999, 24), 24),
    "one pixel": ((2, 16, 1, 1), (24, 1, 999, 777), 24),
    "one image of one pixel": ((1, 16, 1, 1), (999, 1, 777, 555), 16),
    "one channel": ((2, 1, 5, 3), (5 * 3 * 4, 999, 3 * 4, 4), 4),
}


@pytest.mark.parametrize("case", SIZE_ONE)
def test_fault_05_launchers_get_the_strides_that_addresses_have(
    case: str, launched: list[tuple[Any, ...]], device: torch.device
) -> None:
    """Nothing is copied, and the strides of dimensions of size 1 are as a launcher expects them."""
    (N, C, H, W), strides, pitch = SIZE_ONE[case]
    buffer = torch.randn(2000, device=device)
    x = buffer.as_strided((N, C, H, W), strides, 7)
    weight = torch.randn(16, C, 1, 1, device=device)
    torch.ops.fastdeeplab.conv_bn_relu(x, weight, None, torch.zeros(16, device=device), None, 1, 0, 1, True, "triton")
    ((read, read_weight, *_, out),) = launched
    assert read.data_ptr() == x.data_ptr()
    assert read.stride() == (H * W * pitch, 1, W * pitch, pitch)
    assert torch.equal(read, x)
    assert read_weight.data_ptr() == weight.data_ptr()
    assert read_weight.stride() == (C, 1, C, C)
    assert out.stride() == (H * W * 16, 1, W * 16, 16)


def test_slices_of_channels_are_read_and_written_where_they_are(
    launched: list[tuple[Any, ...]], device: torch.device
) -> None:
    buffer = torch.randn(2, 40, 5, 6, device=device).contiguous(memory_format=torch.channels_last)
    x, out = buffer[:, :16], buffer[:, 24:32]
    _, weight, scale, shift, residual, *geometry = conv(device)
    torch.ops.fastdeeplab.conv_bn_relu_out(x, weight, scale, shift, residual, *geometry, out, "triton")
    ((read, read_weight, _, _, added, written),) = launched
    assert (read.data_ptr(), read.stride()) == (x.data_ptr(), x.stride())
    assert (written.data_ptr(), written.stride()) == (out.data_ptr(), out.stride())
    assert read_weight.stride() == (9 * 16, 1, 3 * 16, 16)
    assert torch.equal(read_weight, weight)
    assert added.stride() == (5 * 6 * 8, 1, 6 * 8, 8)
    assert torch.equal(added, residual)


def test_fault_12_nothing_is_launched_for_an_empty_batch(device: torch.device) -> None:
    for name, arguments in FUSED.items():
        tensors = [
            value[:0] if isinstance(value, Tensor) and value.shape[:1] == (2,) else value for value in arguments(device)
        ]
        assert call(name, tuple(tensors), "triton").shape[0] == 0


def test_an_empty_batch_reaches_no_launcher(launched: list[tuple[Any, ...]], device: torch.device) -> None:
    x, weight, scale, shift, residual, *geometry = conv(device)
    torch.ops.fastdeeplab.conv_bn_relu(x[:0], weight, scale, shift, residual[:0], *geometry, "triton")
    out = torch.empty(0, 8, 5, 6, device=device)
    torch.ops.fastdeeplab.conv_bn_relu_out(x[:0], weight, scale, shift, residual[:0], *geometry, out, "triton")
    assert launched == []


def test_a_kernel_of_another_size_is_pytorchs(device: torch.device) -> None:
    x, _, scale, shift, *_ = conv(device)
    weight = torch.randn(8, 16, 5, 5, device=device)
    with pytest.raises(RuntimeError, match="conv_bn_relu can't run as a Triton kernel here: the weight is neither 1x1"):
        kernels.conv_bn_relu(x, weight, scale, shift, padding=2, impl="triton")
    with pytest.raises(RuntimeError, match="conv_bn_relu can't run as a Triton kernel here: no tile choice serves"):
        torch.ops.fastdeeplab.conv_bn_relu(x, weight, scale, shift, None, 1, 2, 1, True, "triton")
    automatic = kernels.conv_bn_relu(x, weight, scale, shift, padding=2)
    assert torch.equal(automatic, kernels.conv_bn_relu(x, weight, scale, shift, padding=2, impl="torch"))


def test_auto_is_decided_when_the_operator_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the shapes it gets, on a GPU that the kernels run on; on any other device PyTorch runs."""
    monkeypatch.setattr(candidates.Gpu, "of", lambda device: candidates.Gpu("Some GPU", (9, 0), 132))
    obstacles: list[str | None] = [None]
    monkeypatch.setattr(ops, "why_not", lambda device, dtype: obstacles[-1])
    gpu = torch.device("cuda", 7)  # in no other test's decisions
    tensor: Any = SimpleNamespace(is_cuda=True, device=gpu, dtype=torch.float16)
    layers = [
        candidates.Layer.of("conv_bn_relu", (8, 256, 65, 65), (1024, 256, 1, 1), torch.float16, residual=residual)
        for residual in (True, False)
    ]
    assert [ops._decide(layer, "auto", tensor, None).impl for layer in layers] == ["triton", "torch"]
    obstacles.append("an old GPU")
    assert [ops._decide(layer, "auto", tensor, None).impl for layer in layers] == ["torch", "torch"]
    on_cpu = ops._decide(layers[0], "auto", torch.empty(1), None)
    assert on_cpu.impl == "torch"


def test_a_scale_in_fp16_is_left_to_the_pass_after_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that pass, a Triton kernel, can run."""
    monkeypatch.setattr(candidates.Gpu, "of", lambda device: candidates.Gpu("Some GPU", (9, 0), 132))
    obstacles: list[str | None] = [None]
    monkeypatch.setattr(ops, "why_not", lambda device, dtype: obstacles[-1])

    why = []

    def form(dtype: torch.dtype, scale: Tensor | None) -> str:
        tensor: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 7), dtype=dtype)
        layer = candidates.Layer.of("conv_bn_relu", (8, 256, 65, 65), (64, 256, 1, 1), dtype)
        decision = ops._decide(layer, "auto", tensor, scale)
        assert decision.impl == "torch"
        why.append(decision.why)
        return decision.form

    scale = torch.ones(64)
    assert form(torch.float16, scale) == "conv_fused_pointwise"
    assert form(torch.float16, None) == candidates.DEFAULT_FORM
    assert why[0] == f"{why[1]}; in fp16 the scale is applied after the convolution"
    for other in ((torch.bfloat16, scale), (torch.float32, scale)):
        assert form(*other) == candidates.DEFAULT_FORM
    obstacles.append("no C compiler")
    assert form(torch.float16, scale) == candidates.DEFAULT_FORM
    obstacles.append(None)
    monkeypatch.setenv("FASTDEEPLAB_KERNELS", "torch")
    assert form(torch.float16, scale) == candidates.DEFAULT_FORM


def test_no_form_with_a_kernel_runs_while_kernels_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast it was measured to be."""
    monkeypatch.setattr(ops, "why_not", lambda device, dtype: None)
    monkeypatch.setenv("FASTDEEPLAB_KERNELS", "torch")
    monkeypatch.setattr(ops, "decide", lambda *_: pytest.fail("asked for a measurement"))
    tensor: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 7), dtype=torch.float16)
    layer = candidates.Layer.of("conv_bn_relu", (8, 256, 65, 65), (64, 256, 1, 1), torch.float16)
    for impl in ("auto", "torch"):
        assert ops._decide(layer, impl, tensor, None) == ("torch", None, candidates.DEFAULT_FORM, ANY)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUSED)
def test_on_a_gpu_a_scale_in_fp16_takes_one_pass(name: str, device: torch.device) -> None:
    """The kernel's result, but for the rounding of the convolution's own."""

    def half(value: Tensor) -> Tensor:
        return value.half() if value.ndim == 4 else value

    arguments = torch.utils._pytree.tree_map_only(Tensor, half, FUSED[name](device))
    with decisions.recording() as recorded:
        actual = call(name, arguments, "torch")
    assert [decision.form for _, decision in recorded] == ["conv_fused_pointwise"]
    torch.testing.assert_close(actual, call(name, arguments, "triton"), rtol=5e-3, atol=5e-3)


def test_launchers_by_kernel() -> None:
    files = {
        kernel: ops._launchers(candidates.Tile(kernel, 64, 64, 64, 4, 3))
        for kernel in ("pointer", "gemm_tma", "boxes_tma")
    }
    stems = {kernel: module.__name__.rpartition(".")[2] for kernel, module in files.items()}
    assert stems == {"pointer": "conv", "gemm_tma": "conv_tma", "boxes_tma": "conv_tma"}


def test_tma_needs_every_pixel_at_a_multiple_of_16_bytes() -> None:
    buffer = torch.zeros(2, 24, 5, 6, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    odd = torch.zeros(2, 20, 5, 6, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    assert ops._aligned(buffer, None, buffer[:, 8:16])
    assert not ops._aligned(buffer, buffer[:, 4:12])  # starts at 8 bytes
    assert not ops._aligned(odd[:, :16])  # 40 bytes a pixel


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_write_into_out_is_seen_by_autograd(impl: str, device: torch.device) -> None:
    x, weight = torch.randn(1, 8, 4, 5, device=device), torch.randn(8, 8, 1, 1, device=device)
    factor, out = torch.ones((), device=device, requires_grad=True), torch.ones_like(x)
    out = out.contiguous(memory_format=torch.channels_last)
    loss = (out * factor).sum()
    with torch.no_grad():
        kernels.conv_bn_relu(x, weight, None, torch.zeros(8, device=device), out=out, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_operator_writes_into_out_of_any_strides(impl: str, device: torch.device) -> None:
    x, weight = torch.randn(1, 8, 4, 5, device=device), torch.randn(8, 8, 1, 1, device=device)
    shift, out = torch.zeros(8, device=device), torch.full_like(x, torch.nan)
    torch.ops.fastdeeplab.conv_bn_relu_out(x, weight, None, shift, None, 1, 0, 1, True, out, impl)
    torch.testing.assert_close(out, F.conv2d(x, weight).relu(), rtol=1e-5, atol=1e-5)


def test_measurements_of_gpus_do_not_count_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's forms can't run there, however fast they were on a GPU."""
    monkeypatch.setattr(ops, "decide", lambda *_: pytest.fail("asked for a measurement"))
    x, weight = torch.randn(1, 8, 4, 5), torch.randn(8, 8, 1, 1)
    for impl in ("torch", "auto"):
        kernels.conv_bn_relu(x, weight, None, torch.zeros(8), impl=impl)
