"""Bad arguments of the public functions: a clear error before anything is computed."""

import pytest
import torch

from fastdeeplab import kernels

LOGITS = torch.zeros(2, 5, 3, 4)
TARGET = torch.zeros(2, 6, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "size", "arguments", "message"),
    [
        (LOGITS.tolist(), (6, 8), {}, "logits must be a tensor, got list"),
        (LOGITS.numpy(), (6, 8), {}, "logits must be a tensor, got ndarray"),
        (torch.zeros(5, 3, 4), (6, 8), {}, r"logits must be \(N, K, h, w\)"),
        (torch.zeros(2, 0, 3, 4), (6, 8), {}, r"logits must be \(N, K, h, w\)"),
        (torch.zeros(2, 5, 0, 4), (6, 8), {}, r"logits must be \(N, K, h, w\)"),
        (torch.zeros(2, 5, 3, 4, dtype=torch.int32), (6, 8), {}, "floating-point"),
        (LOGITS, 5, {}, r"size must be \(H, W\), both from 1 up, got 5"),
        (LOGITS, (6,), {}, r"size must be \(H, W\)"),
        (LOGITS, (6, 0), {}, r"size must be \(H, W\)"),
        (LOGITS, (6.0, 8.0), {}, r"size must be \(H, W\)"),
        (LOGITS, (6, -8), {}, r"size must be \(H, W\)"),
        (LOGITS, (6, 8), {"dtype": torch.float32}, "dtype must be"),
        (LOGITS, (6, 8), {"dtype": torch.int8}, "dtype must be"),
        (torch.zeros(1, 257, 1, 1), (2, 2), {"dtype": torch.uint8}, "can't hold the indices of 257 classes"),
        (torch.zeros(1, 32769, 1, 1), (2, 2), {"dtype": torch.int16}, "can't hold the indices of 32769 classes"),
    ],
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_upsample_argmax(
    logits: torch.Tensor, size: tuple[int, ...], arguments: dict[str, object], message: str, impl: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.upsample_argmax(logits, size, impl=impl, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": LOGITS.numpy()}, "logits must be a tensor, got ndarray"),
        ({"target": TARGET.tolist()}, "target must be a tensor, got list"),
        ({"target": TARGET.numpy()}, "target must be a tensor, got ndarray"),
        ({"target": TARGET[0]}, r"target must be \(2, H, W\)"),
        ({"target": TARGET[:1]}, r"target must be \(2, H, W\)"),
        ({"target": TARGET[:, :0]}, "from 1 up"),
        ({"target": TARGET.float()}, "uint8, int16, int32 or int64"),
        ({"target": TARGET.bool()}, "uint8, int16, int32 or int64"),
        ({"target": TARGET.to("meta")}, "target must be on cpu"),
        ({"weight": [1.0, 2.0]}, "weight must be a tensor, got list"),
        ({"weight": torch.ones(4)}, r"weight must be \(5,\)"),
        ({"weight": torch.ones(5, dtype=torch.int64)}, "floating-point"),
        ({"weight": torch.ones(5, device="meta")}, "weight must be on cpu"),
        ({"weight": torch.ones(5, requires_grad=True)}, "weight must not require a gradient"),
        ({"ignore_index": 255.0}, "ignore_index must be an integer"),
        ({"ignore_index": 2**70}, "ignore_index must be an integer of 64 bits"),
        ({"ignore_index": -(2**63) - 1}, "ignore_index must be an integer of 64 bits"),
        ({"reduction": "average"}, 'reduction must be "mean", "sum" or "none"'),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\]"),
        ({"label_smoothing": float("nan")}, r"label_smoothing must be in \[0, 1\]"),
    ],
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_upsample_cross_entropy(arguments: dict[str, object], message: str, impl: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.upsample_cross_entropy(**{"logits": LOGITS, "target": TARGET, "impl": impl, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [5, 100, -1, -99])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_fault_14_target_outside_the_classes_on_a_cpu(value: int, impl: str) -> None:
    target = TARGET.clone()
    target[1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"target must be in \[0, 5\) or -100 \(ignored\), got values from .*{value}"):
        kernels.upsample_cross_entropy(LOGITS, target, impl=impl)
    assert kernels.upsample_cross_entropy(LOGITS, target, ignore_index=value, impl="torch").isfinite()
