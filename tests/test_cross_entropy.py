"""The kernels of upsample_cross_entropy, forward and backward, against fp64 PyTorch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastdeeplab.kernels import cross_entropy_backward as backward
from fastdeeplab.kernels.cross_entropy import cross_entropy_forward
from fastdeeplab.kernels.cross_entropy_backward import cross_entropy_backward
from fastdeeplab.kernels.measure import relative_error
from fastdeeplab.kernels.tiles import BLOCK, chunk_tiles
from guard_bands import assert_kept, banded, banded_allocations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS
from torch import Tensor

SLACK = 2**-21  # a GPU's exp2 and log2 are off by up to two units in the last place; PyTorch's exp and log by one
GRAD = 0.75  # a gradient of the loss that is not 1


def sample(
    K: int, low: tuple[int, int], high: tuple[int, int], device: torch.device, N: int = 1, ignored: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Logits of the size that trained networks give, and targets of which a share is 255."""
    logits = 3 * torch.randn(N, K, *low, device=device)
    target = torch.randint(0, K, (N, *high), device=device)
    target[torch.rand(target.shape, device=device) < ignored] = 255
    return logits, target


def kernel(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = 255, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, the total weight and the gradient of the loss times GRAD."""
    options = (weight, ignore_index, label_smoothing)
    loss, total_weight, softmax = cross_entropy_forward(logits, target, *options)
    grad = torch.tensor(GRAD, device=logits.device)
    return loss, total_weight, cross_entropy_backward(grad, softmax, logits, target, *options)


def pytorch(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    dtype: torch.dtype = torch.float64,
    reduction: str = "sum",
) -> tuple[Tensor, Tensor]:
    """Loss and gradient, computed in ``dtype``; the gradient is rounded to the logits' dtype, unless it is fp64."""
    leaf = (logits.double() if dtype == torch.float64 else logits).detach().requires_grad_()
    full = F.interpolate(leaf.to(dtype), size=target.shape[1:], mode="bilinear", align_corners=False)
    weight = None if weight is None else weight.to(dtype)
    loss = F.cross_entropy(
        full, target.long(), weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    (grad,) = torch.autograd.grad(loss * GRAD, leaf)
    return loss, grad


def assert_accurate(logits: Tensor, target: Tensor, **options: Any) -> None:
    """No further from fp64 than PyTorch in fp32, but for SLACK, and with large logits the rounding of the exponent."""
    slack = SLACK * max(1.0, float(logits.abs().max()) / 16)
    loss, total_weight, grad = kernel(logits, target, **options)
    exact_loss, exact_grad = pytorch(logits, target, **options)
    torch_loss, torch_grad = pytorch(logits, target, **options, dtype=torch.float32)
    assert grad.dtype == logits.dtype
    assert relative_error(loss, exact_loss) <= relative_error(torch_loss, exact_loss) + slack
    assert relative_error(grad, exact_grad) <= relative_error(torch_grad, exact_grad) + slack

    exact_mean, _ = pytorch(logits, target, **options, reduction="mean")
    assert relative_error(loss / total_weight, exact_mean) <= relative_error(torch_loss, exact_loss) + 2 * slack


CLASSES = {
    2: torch.float32,
    3: torch.float16,
    19: torch.float32,
    21: torch.float16,
    150: torch.float32,
    171: torch.float16,
}


@pytest.mark.parametrize(("K", "dtype"), CLASSES.items(), ids=str)
def test_fault_12_any_number_of_classes(K: int, dtype: torch.dtype, device: torch.device) -> None:
    logits, target = sample(K, (3, 4), (24, 32), device)
    assert_accurate(logits.to(dtype), target)


def test_fault_12_one_class_has_no_loss_and_no_gradient(device: torch.device) -> None:
    logits, target = sample(1, (3, 4), (24, 32), device)
    loss, total_weight, grad = kernel(logits, target)
    assert float(loss) == 0
    assert float(total_weight) == float((target != 255).sum())
    assert float(grad.abs().max()) <= 1e-5


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "weights and smoothing"])
@pytest.mark.parametrize(
    ("low", "high"),
    [
        pytest.param((9, 17), (72, 136), id="8x"),
        pytest.param((2, 3), (32, 48), id="16x"),
        pytest.param((4, 5), (12, 15), id="odd ratio"),
        pytest.param((9, 5), (129, 70), id="513 at stride 16 in small"),
        pytest.param((1, 1), (33, 40), id="one sample"),
        pytest.param((1, 6), (5, 1), id="one row, one column"),
        pytest.param((7, 9), (7, 9), id="same size"),
        pytest.param((7, 9), (3, 4), id="down"),
        pytest.param((9, 3), (2, 30), id="down and up"),
        pytest.param((2, 3), (1, 1), id="to one pixel"),
    ],
)
def test_fault_13_any_size(low: tuple[int, int], high: tuple[int, int], plain: bool, device: torch.device) -> None:
    logits, target = sample(3, low, high, device, ignored=0.0)
    options = {} if plain else {"weight": torch.tensor([0.5, 2.0, 1.0], device=device), "label_smoothing": 0.1}
    assert_accurate(logits, target, **options)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 255, 1], ids=lambda index: f"ignore {index}")
def test_options(label_smoothing: float, weighted: bool, ignore_index: int, device: torch.device) -> None:
    logits, target = sample(5, (4, 5), (32, 40), device, N=2)
    target[target == 255] = ignore_index
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 3.5], device=device) if weighted else None
    assert_accurate(logits, target, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing)


@pytest.mark.parametrize("ignore_index", [3, 255, -100])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_target_dtypes(dtype: torch.dtype, ignore_index: int, device: torch.device) -> None:
    logits, target = sample(4, (3, 4), (24, 32), device, ignored=0.0)
    if dtype != torch.uint8 or ignore_index >= 0:
        target[:, ::3] = ignore_index
    expected = kernel(logits, target, ignore_index=ignore_index)
    for actual, same in zip(kernel(logits, target.to(dtype), ignore_index=ignore_index), expected, strict=True):
        assert torch.equal(actual, same)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"contiguous"}))
def test_fault_05_any_strides(layout: str, device: torch.device) -> None:
    contiguous, target = sample(5, (4, 6), (32, 48), device, N=2)
    logits = LAYOUTS[layout](contiguous)
    assert not logits.is_contiguous()
    strided_target = target.transpose(1, 2).contiguous().transpose(1, 2)
    actual, expected = kernel(logits, strided_target), kernel(contiguous, target)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert actual[2].stride() == torch.empty_like(logits).stride()


def test_fault_05_expanded_inputs(device: torch.device) -> None:
    logits, target = sample(5, (3, 3), (24, 24), device)
    expanded, expanded_target = logits.expand(3, -1, -1, -1), target.expand(3, -1, -1)
    weight = torch.ones(1, device=device).expand(5)
    actual = kernel(expanded, expanded_target, weight)
    expected = kernel(expanded.contiguous(), expanded_target.contiguous(), weight.contiguous())
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_fault_05_size_one_dimensions_with_odd_strides(device: torch.device) -> None:
    logits, target = sample(7, (1, 1), (8, 8), device)
    odd = logits.flatten().as_strided((1, 7, 1, 1), (12345, 1, 999, 31))
    expected = kernel(logits, target)
    assert all(torch.equal(*pair) for pair in zip(kernel(odd, target), expected, strict=True))


def test_fault_14_all_pixels_ignored(device: torch.device) -> None:
    logits, target = sample(4, (3, 4), (24, 32), device, ignored=1.1)
    loss, total_weight, softmax = cross_entropy_forward(logits, target, None, 255, 0.1)
    assert float(loss) == float(total_weight) == 0
    assert (loss / total_weight).isnan()
    grad = torch.tensor(float("inf"), device=device)  # what the quotient hands back
    assert not cross_entropy_backward(grad, softmax, logits, target, None, 255, 0.1).any()


def test_fault_12_empty_batch(device: torch.device) -> None:
    logits, target = sample(4, (3, 4), (24, 32), device, N=0)
    loss, total_weight, grad = kernel(logits, target)
    assert float(loss) == float(total_weight) == 0
    assert (loss / total_weight).isnan()
    assert grad.shape == logits.shape


@pytest.mark.parametrize("stray", [-1, 4, 254, 2**31 - 1, 2**32, -(2**63)])
def test_fault_14_target_outside_the_classes(stray: int, device: torch.device) -> None:
    """A NaN loss; in everything else the pixel counts as ignored."""
    logits, target = sample(4, (3, 4), (24, 32), device)
    target[0, 5, 7] = 255
    _, expected_weight, expected_grad = kernel(logits, target)
    target[0, 5, 7] = stray
    weight = torch.ones(4, device=device)
    for loss, total_weight, grad in (kernel(logits, target), kernel(logits, target, weight)):
        assert loss.isnan()
        assert torch.equal(total_weight, expected_weight)
        assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1e-3, 300.0, 1e4])
def test_logits_of_any_magnitude(scale: float, label_smoothing: float, device: torch.device) -> None:
    logits, target = sample(6, (3, 4), (24, 32), device)
    assert_accurate(logits * scale, target, label_smoothing=label_smoothing)
    assert_accurate(logits + scale, target, label_smoothing=label_smoothing)


def test_a_small_loss_keeps_its_gradient(device: torch.device) -> None:
    logits, target = sample(6, (3, 4), (24, 32), device)
    logits[:, 2] += 25
    target[target != 255] = 2
    _, _, grad = kernel(logits, target)
    _, exact = pytorch(logits, target)
    assert float((grad - exact).abs().max()) <= 64 * 2**-21  # 64 pixels round each low-resolution logit


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_large_logits_that_are_right_keep_a_small_loss_exact(scale: float, device: torch.device) -> None:
    """The loss is small beside the logits: a log-sum-exp in fp32 would round it away."""
    logits, _ = sample(6, (3, 4), (24, 32), device)
    logits *= scale
    target = F.interpolate(logits.double(), size=(24, 32), mode="bilinear", align_corners=False).argmax(1)
    assert_accurate(logits, target)


def test_a_class_of_negative_infinity_has_no_probability(device: torch.device) -> None:
    logits, target = sample(5, (3, 4), (24, 32), device)
    target[target == 1] = 2
    logits[:, 1] = -torch.inf
    loss, _, grad = kernel(logits, target)
    rest, rest_target = logits[:, [0, 2, 3, 4]], torch.where((target > 1) & (target < 5), target - 1, target)
    expected_loss, expected_grad = pytorch(rest, rest_target)
    assert relative_error(loss, expected_loss) <= SLACK
    assert relative_error(grad[:, [0, 2, 3, 4]], expected_grad) <= SLACK
    assert not grad[:, 1].any()
    assert float(kernel(logits, target, label_smoothing=0.1)[0]) == torch.inf
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0], device=device)
    assert kernel(logits, target, weight, label_smoothing=0.1)[0].isfinite()
    target[0, 12, 16] = 1
    assert float(kernel(logits, target)[0]) == torch.inf


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fault_10_nan_and_infinity_reach_the_loss(value: float, device: torch.device) -> None:
    logits, target = sample(5, (3, 4), (24, 32), device)
    logits[0, 3, 1, 2] = value
    loss, _, grad = kernel(logits, target)
    assert loss.isnan()
    assert pytorch(logits, target)[0].isnan()
    assert grad[0, :, 1, 2].isnan().all()
    target[:] = 255
    assert float(kernel(logits, target)[0]) == 0


def test_the_same_bits_in_every_run(device: torch.device) -> None:
    logits, target = sample(5, (5, 7), (40, 56), device, N=2)
    first = kernel(logits, target, label_smoothing=0.1)
    for _ in range(2):
        again = kernel(logits, target, label_smoothing=0.1)
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_slabs_of_classes_give_the_same_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = sample(7, (3, 4), (24, 32), device)
    weight = torch.rand(7, device=device)
    expected = kernel(logits, target, weight)
    for scratch in (0, 3 * 16 * BLOCK):
        monkeypatch.setattr(backward, "SCRATCH_BYTES", scratch)
        assert torch.equal(kernel(logits, target, weight)[2], expected[2])


def test_fault_04_more_programs_than_a_launch_can_have() -> None:
    """Found before anything is allocated for them: meta tensors have no memory."""
    logits, target = (
        torch.empty(2**31, 1, 1, 1, device="meta"),
        torch.empty(2**31, 1, 1, dtype=torch.int64, device="meta"),
    )
    with pytest.raises(ValueError, match="more programs than a launch can have"):
        cross_entropy_forward(logits, target, None, 255, 0.0)
    grad, softmax = torch.empty((), device="meta"), torch.empty((2**31, 2, 1, 1), device="meta")
    with pytest.raises(ValueError, match="more programs than a launch can have"):
        cross_entropy_backward(grad, softmax, logits, target, None, 255, 0.0)


def test_fault_04_pictures_too_large_to_index(device: torch.device) -> None:
    logits = torch.zeros(1, device=device).expand(1, 1, 1, 40_000)
    target = torch.zeros(1, dtype=torch.uint8, device=device).expand(1, 1, 40_000)
    with pytest.raises(ValueError, match="too large to be indexed"):
        chunk_tiles(logits, target)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("low", "high"), [((3, 4), (24, 32)), ((3, 5), (23, 49)), ((7, 5), (3, 4))], ids=str)
def test_no_stray_access(
    low: tuple[int, int],
    high: tuple[int, int],
    label_smoothing: float,
    device: torch.device,
) -> None:
    """A read outside a tensor would meet NaN or a stray class; a write outside one would change its bands."""
    logits, target = sample(5, low, high, device, N=2)
    target[0, 0, :3] = torch.tensor([-(2**40), 10**6, 254], device=device)  # stray targets read nothing either
    weight = torch.rand(5, device=device)
    options = (255, label_smoothing)
    _, total_weight, softmax = cross_entropy_forward(logits, target, weight, *options)
    grad = torch.tensor(GRAD, device=device)
    expected = cross_entropy_backward(grad, softmax, logits, target, weight, *options)

    logits, target, weight = banded(logits, torch.nan)[0], banded(target, 254)[0], banded(weight, torch.nan)[0]
    with banded_allocations() as buffers:
        banded_loss, banded_weight, banded_softmax = cross_entropy_forward(logits, target, weight, *options)
        softmax, grad = banded(softmax, torch.nan)[0], banded(grad, torch.nan)[0]
        actual = cross_entropy_backward(grad, softmax, logits, target, weight, *options)
    assert banded_loss.isnan()
    assert torch.equal(banded_weight, total_weight)
    assert torch.equal(banded_softmax, softmax)
    assert torch.equal(actual, expected)
    assert len(buffers) == 4
    assert_kept(buffers)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(1, 2),
    K=st.integers(2, 6),
    low=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    high=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    weighted=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**31),
)
def test_anything(
    N: int,
    K: int,
    low: tuple[int, int],
    high: tuple[int, int],
    layout: str,
    dtype: torch.dtype,
    weighted: bool,
    label_smoothing: float,
    seed: int,
    device: torch.device,
) -> None:
    torch.manual_seed(seed)
    logits, target = sample(K, low, high, device, N, ignored=0.0)
    weight = torch.rand(K, device=device) + 0.1 if weighted else None
    assert_accurate(LAYOUTS[layout](logits.to(dtype)), target, weight=weight, label_smoothing=label_smoothing)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("K", [19, 21, 150, 1000])
@pytest.mark.parametrize("size", [(65, 520), (64, 512), (33, 520)], ids=str)
def test_networks_sizes(K: int, dtype: torch.dtype, size: tuple[int, int], device: torch.device) -> None:
    logits, target = sample(K, size[:1] * 2, size[1:] * 2, device)
    logits = logits.to(dtype).contiguous(memory_format=torch.channels_last)
    assert_accurate(logits, target.clamp(max=255), label_smoothing=0.1, weight=torch.rand(K, device=device))


@pytest.mark.gpu
def test_peak_memory(device: torch.device) -> None:
    """What is allocated: two numbers per pixel, scratch and gradient; full-size logits would be 2.5 GB."""
    logits, target = sample(150, (64, 64), (512, 512), device, N=16)
    torch.cuda.empty_cache()  # a cached block is not split for the sake of its last MiB, and counts as a whole
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kernel(logits, target)
    used = torch.cuda.max_memory_allocated(device) - before
    assert used <= 4 * (2 * target.numel() + logits.numel()) + backward.SCRATCH_BYTES + 2**20
