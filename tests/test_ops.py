"""The registered operators: opcheck, shapes without data, gradients, torch.compile, torch.export."""

import pytest
import torch
from fastdeeplab.kernels import reference
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
    leaf, compiled_leaf = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, index = step(leaf, target)
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
        dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
        with torch.autocast(device.type, dtype):
            logits = conv(images)
        # The interpreter gets bf16 wrong, so on a CPU PyTorch's path stands in.
        return kernels.upsample_cross_entropy(logits, target, ignore_index=255, impl="auto")

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


def test_fault_20_deterministic_mode(device: torch.device) -> None:
    """PyTorch's own bilinear backward raises or is replaced there; ours is deterministic as it is."""
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
