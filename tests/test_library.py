"""PyTorch's path of the kernels' functions: in chunks, against the whole."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_argmax
from fastdeeplab.kernels import library, reference
from fastdeeplab.kernels.measure import peak_memory, relative_error
from torch import Tensor

from fastdeeplab import kernels

SIZES = [
    ((8, 9), (64, 72)),
    ((5, 7), (33, 65)),
    ((1, 1), (7, 5)),
    ((1, 6), (9, 1)),
    ((6, 6), (6, 6)),
    ((9, 8), (4, 3)),
    ((3, 9), (40, 5)),
]


@pytest.fixture(params=[1, 700, 1 << 20], ids=["one row", "some rows", "whole"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.CHUNK_ELEMENTS, "cpu", request.param)


def sample(low: tuple[int, int], high: tuple[int, int], K: int = 5, N: int = 3) -> tuple[Tensor, Tensor]:
    target = torch.randint(K, (N, *high))
    target[torch.rand(target.shape) < 0.2] = 255
    return 3 * torch.randn(N, K, *low), target


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(("low", "high"), SIZES, ids=str)
def test_chunks_are_the_rows_of_the_interpolation(low: tuple[int, int], high: tuple[int, int]) -> None:
    logits, _ = sample(low, high)
    expected = F.interpolate(logits.double(), size=high, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    seen = torch.zeros(3, high[0])
    for chunk in library._chunks(logits, high):
        actual = chunk.upsample(logits)
        assert relative_error(actual, expected[chunk.images, chunk.rows]) < 1e-6
        seen[chunk.images, chunk.rows] += 1
    assert (seen == 1).all()


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(("low", "high"), SIZES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_upsample_argmax(low: tuple[int, int], high: tuple[int, int], layout: torch.memory_format) -> None:
    logits = sample(low, high)[0].contiguous(memory_format=layout)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        index = kernels.upsample_argmax(logits, high, dtype=dtype, impl="torch")
        assert index.dtype == dtype
        assert index.is_contiguous()
        assert_argmax(index, logits, high)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_fault_10_nan_and_infinity_in_logits(value: float) -> None:
    logits = torch.randint(-3, 4, (2, 6, 5, 4)).float()
    logits[torch.rand(logits.shape) < 0.05] = value
    expected = reference.upsample_argmax(logits, (40, 32))
    assert torch.equal(kernels.upsample_argmax(logits, (40, 32), impl="torch"), expected)
    assert 0 <= expected.min() <= expected.max() < 6


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize(("low", "high"), SIZES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": torch.tensor([0.5, 0.0, 2.0, 1.0, 3.5])},
        {"label_smoothing": 0.1},
        {"weight": torch.tensor([0.5, 0.0, 2.0, 1.0, 3.5]), "label_smoothing": 0.3, "reduction": "sum"},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_upsample_cross_entropy(low: tuple[int, int], high: tuple[int, int], options: dict[str, object]) -> None:
    logits, target = sample(low, high)
    leaf, exact_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    exact_options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    loss = kernels.upsample_cross_entropy(leaf, target, ignore_index=255, impl="torch", **options)  # type: ignore[arg-type]
    exact = reference.upsample_cross_entropy(exact_leaf, target, ignore_index=255, **exact_options)  # type: ignore[arg-type]
    (0.5 * loss).backward()
    (0.5 * exact).backward()
    assert loss.dtype == torch.float32
    assert relative_error(loss.detach(), exact.detach()) < 1e-6
    assert leaf.grad is not None
    assert exact_leaf.grad is not None
    assert relative_error(leaf.grad, exact_leaf.grad) < 2e-6


def test_gradcheck_of_the_reference() -> None:
    logits = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (2, 7, 8))
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: reference.upsample_cross_entropy(x, target, weight=weight, label_smoothing=0.1, ignore_index=2),
        logits,
    )


def test_no_reduction() -> None:
    logits, target = sample((4, 5), (32, 40))
    actual = kernels.upsample_cross_entropy(logits, target, ignore_index=255, reduction="none", impl="torch")
    expected = reference.upsample_cross_entropy(logits, target, ignore_index=255, reduction="none")
    assert actual.shape == target.shape
    torch.testing.assert_close(actual, expected)


def test_half_precision_logits_get_gradients_of_their_own_type() -> None:
    logits, target = sample((4, 5), (32, 40))
    for dtype in (torch.float16, torch.bfloat16):
        leaf = logits.to(dtype).requires_grad_()
        loss = kernels.upsample_cross_entropy(leaf, target, ignore_index=255, impl="torch")
        loss.backward()
        exact_leaf = logits.to(dtype).double().requires_grad_()
        exact = reference.upsample_cross_entropy(exact_leaf, target, ignore_index=255)
        exact.backward()
        assert loss.dtype == torch.float32
        assert relative_error(loss.detach(), exact.detach()) < 1e-6
        assert leaf.grad is not None
        assert exact_leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert (
            relative_error(leaf.grad, exact_leaf.grad)
            <= relative_error(exact_leaf.grad.to(dtype), exact_leaf.grad) * 1.1
        )


def test_fault_14_all_pixels_ignored() -> None:
    logits, target = sample((4, 5), (32, 40))
    logits.requires_grad_()
    loss = kernels.upsample_cross_entropy(logits, torch.full_like(target, 255), ignore_index=255, impl="torch")
    loss.backward()
    assert loss.isnan()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_fault_14_a_stray_target_that_nobody_looked_for_gives_nan() -> None:
    """As on a GPU without ``check_target``: no error, no stray read, a NaN loss."""
    logits, target = sample((4, 5), (32, 40))
    for stray in (-1, 5, 2**40):
        target[0, 3, 4] = stray
        loss, total_weight, _ = library.cross_entropy_forward(logits, target, None, 255, 0.0)
        assert loss.isnan()
        assert total_weight == (target != 255).sum() - 1


@pytest.mark.parametrize("scale", [300.0, 1e4])
def test_large_logits_that_are_right_keep_a_small_loss_exact(scale: float) -> None:
    """The loss is small beside the logits: it must not be a difference of two large numbers."""
    logits, _ = sample((3, 4), (24, 32))
    logits *= scale
    values = F.interpolate(logits.double(), size=(24, 32), mode="bilinear", align_corners=False)
    target = values.argmax(dim=1)

    def loss_and_gradient(function: Callable[..., Tensor], leaf: Tensor, **options: str) -> tuple[Tensor, Tensor]:
        loss = function(leaf.requires_grad_(), target, **options)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    exact = loss_and_gradient(reference.upsample_cross_entropy, logits.double())
    theirs = loss_and_gradient(reference.upsample_cross_entropy, logits.clone())
    ours = loss_and_gradient(kernels.upsample_cross_entropy, logits.clone(), impl="torch")
    for actual, expected, peer in zip(ours, exact, theirs, strict=True):
        assert relative_error(actual, expected) <= 2 * relative_error(peer, expected) + 1e-6


def test_fault_12_empty_batch() -> None:
    logits, target = torch.empty(0, 4, 3, 3, requires_grad=True), torch.empty(0, 6, 6, dtype=torch.int64)
    assert kernels.upsample_argmax(logits, (6, 6), impl="torch").shape == (0, 6, 6)
    assert kernels.upsample_cross_entropy(logits, target, impl="torch").isnan()
    assert kernels.upsample_cross_entropy(logits, target, reduction="sum", impl="torch") == 0


def test_peak_memory_of_predict_and_loss() -> None:
    """K = 150 at 512x512: full-size fp32 logits alone are 157 MB, and the naive loss holds several of them."""
    logits, target = torch.randn(1, 150, 64, 64), torch.randint(150, (1, 512, 512))

    def step(function: Callable[..., Tensor], **options: str) -> int:
        leaf = logits.clone().requires_grad_()
        return peak_memory(lambda: function(leaf, target, **options).backward(), logits.device)

    naive, ours = step(reference.upsample_cross_entropy), step(kernels.upsample_cross_entropy, impl="torch")
    mask = peak_memory(lambda: kernels.upsample_argmax(logits, (512, 512), impl="torch"), logits.device)
    full = 4 * 150 * 512 * 512
    print(f"loss step: {ours / 2**20:.0f} MiB against {naive / 2**20:.0f} MiB; argmax: {mask / 2**20:.0f} MiB")
    assert naive >= 2 * full
    assert ours <= 0.25 * full
    assert mask <= 0.25 * full
