"""Bad arguments of the public functions: a clear error before anything is computed."""

import pytest
import torch
from fastdeeplab.kernels.checks import pixel_pitch

from fastdeeplab import kernels

LOGITS = torch.zeros(2, 5, 3, 4)
TARGET = torch.zeros(2, 6, 8, dtype=torch.int64)
X, WEIGHT, CHANNELS = torch.zeros(2, 4, 6, 5), torch.zeros(3, 4, 3, 3), torch.ones(3)
BRANCH_WEIGHTS = [torch.zeros(3, 4, 1, 1), torch.zeros(3, 4, 3, 3), torch.zeros(3, 4, 3, 3)]


def channels_last(*shape: int) -> torch.Tensor:
    return torch.zeros(shape).contiguous(memory_format=torch.channels_last)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.numpy()}, "x must be a tensor, got ndarray"),
        ({"x": X[0]}, r"x must be \(N, C, H, W\) with C, H and W from 1 up, got \(4, 6, 5\)"),
        ({"x": X[:, :, :0]}, r"x must be \(N, C, H, W\)"),
        ({"x": X.int()}, "x must be floating-point numbers, got torch.int32"),
        ({"weight": None}, "weight must be a tensor, got NoneType"),
        ({"weight": WEIGHT[:, :3]}, r"weight must be \(C_out, 4, kH, kW\), got \(3, 3, 3, 3\)"),
        ({"weight": WEIGHT[:0]}, r"weight must be \(C_out, 4, kH, kW\)"),
        ({"weight": WEIGHT[0]}, r"weight must be \(C_out, 4, kH, kW\)"),
        ({"weight": WEIGHT.half()}, "weight must be torch.float32 as x, got torch.float16"),
        ({"weight": WEIGHT.to("meta")}, "weight must be on cpu with x, got meta"),
        ({"scale": CHANNELS[:2]}, r"scale must be \(3,\) in fp32, got torch.float32 \(2,\)"),
        ({"scale": CHANNELS.double()}, r"scale must be \(3,\) in fp32, got torch.float64"),
        ({"scale": 1.0}, "scale must be a tensor, got float"),
        ({"scale": CHANNELS.to("meta")}, "scale must be on cpu"),
        ({"shift": None}, "shift must be a tensor, got NoneType"),
        ({"shift": torch.ones(1, 3)}, r"shift must be \(3,\) in fp32"),
        ({"shift": CHANNELS.half()}, r"shift must be \(3,\) in fp32, got torch.float16"),
        ({"stride": 0}, "stride must be an integer from 1 up, got 0"),
        ({"stride": (1, 1)}, r"stride must be an integer from 1 up, got \(1, 1\)"),
        ({"padding": -1}, "padding must be an integer from 0 up, got -1"),
        ({"padding": "same"}, "padding must be an integer from 0 up, got 'same'"),
        ({"dilation": 0}, "dilation must be an integer from 1 up, got 0"),
        ({"dilation": 1.0}, "dilation must be an integer from 1 up, got 1.0"),
        ({"dilation": True}, "dilation must be an integer from 1 up, got True"),
        ({"dilation": 3}, r"an output of at least one pixel, got one of \(0, -1\)"),
        (
            {"residual": torch.zeros(2, 3, 6, 5)},
            r"residual must be \(2, 3, 4, 3\), the result's shape, got \(2, 3, 6, 5\)",
        ),
        ({"residual": torch.zeros(2, 3, 4, 3).half()}, "residual must be torch.float32 as x"),
        ({"residual": torch.zeros(2, 3, 4, 3, device="meta")}, "residual must be on cpu"),
        ({"out": torch.zeros(2, 3, 4, 3)}, "out must be channels_last or a slice of such a tensor's channels"),
        ({"out": channels_last(2, 3, 6, 5)}, r"out must be \(2, 3, 4, 3\), the result's shape"),
        ({"out": channels_last(2, 3, 4, 3).half()}, "out must be torch.float32 as x"),
        ({"out": channels_last(2, 3, 4, 3).to("meta")}, "out must be on cpu"),
        ({"out": channels_last(2, 3, 4, 3).requires_grad_()}, "out must be None where a gradient is required"),
        (
            {"out": channels_last(2, 3, 4, 3), "shift": torch.ones(3, requires_grad=True)},
            "out must be None where a gradient is required",
        ),
    ],
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_conv_bn_relu(arguments: dict[str, object], message: str, impl: str) -> None:
    valid = {"x": X, "weight": WEIGHT, "scale": CHANNELS, "shift": CHANNELS, "impl": impl}
    with pytest.raises(ValueError, match=message):
        kernels.conv_bn_relu(**valid | arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_out_may_hold_no_input(impl: str) -> None:
    """Other channels of the same pixels it may hold: they are other memory."""
    weight = torch.zeros(4, 4, 1, 1)

    def run(x: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        kernels.conv_bn_relu(x, weight, None, torch.ones(4), residual, out=out, impl=impl)

    buffer, other = channels_last(2, 12, 2, 3), channels_last(2, 4, 2, 3)
    with pytest.raises(ValueError, match="out must be none of the inputs"):
        run(other, other)
    with pytest.raises(ValueError, match="out must be none of the inputs"):
        run(buffer[:, :4], other, residual=other)
    for start in (1, 4, 7):
        with pytest.raises(ValueError, match="out must not overlap the inputs in memory"):
            run(buffer[:, start : start + 4], buffer[:, 4:8])
    with pytest.raises(ValueError, match="out must not overlap"):
        run(other, buffer[:, 4:8], residual=buffer.as_strided((2, 4, 2, 3), (24, 6, 3, 1)))
    for start in (0, 8):
        run(buffer[:, start : start + 4], buffer[:, 4:8])
        assert (buffer[:, 4:8] == 1).all()
        assert not buffer[:, start : start + 4].any()
    run(buffer[:1, :4], buffer[1:, :4])
    assert (buffer[1:, :4] == 1).all()


@pytest.mark.parametrize(
    ("x", "pitch"),
    [
        (channels_last(2, 4, 3, 5), 4),
        (channels_last(2, 9, 3, 5)[:, 2:6], 9),
        (torch.zeros(2, 4, 3, 5), None),
        (channels_last(2, 4, 3, 5)[:, :, :2], None),
        (channels_last(2, 4, 3, 5)[:, :, :, :4], None),
        (channels_last(2, 4, 3, 5)[:, ::2], None),
        (channels_last(1, 4, 3, 5).expand(2, -1, -1, -1), None),
        (channels_last(4, 4, 3, 5)[::2], None),
        (torch.zeros(2, 1, 3, 5), 1),
        (torch.zeros(1, 1, 3, 5).expand(1, 4, 3, 5), None),
        (torch.zeros(2, 4, 1, 1), 4),
        (torch.zeros(100).as_strided((2, 4, 1, 1), (9, 1, 77, 88)), 9),
        (torch.zeros(100).as_strided((1, 4, 1, 1), (99, 1, 77, 88)), 4),
        (torch.zeros(100).as_strided((1, 4, 3, 1), (99, 1, 7, 88)), 7),
        (torch.zeros(100).as_strided((1, 4, 3, 1), (99, 1, 3, 88)), None),
        (torch.zeros(100).as_strided((1, 1, 3, 2), (99, 55, 14, 7)), 7),
    ],
)
def test_pixel_pitch_goes_by_the_addresses_that_are_read(x: torch.Tensor, pitch: int | None) -> None:
    assert pixel_pitch(x) == pitch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x must be \(N, C, H, W\)"),
        ({"rates": ()}, "rates must be a sequence of at least one integer"),
        ({"rates": 6}, "rates must be a sequence"),
        ({"rates": (6, 0)}, "rates must be an integer from 1 up, got 0"),
        ({"rates": (6, 12.0)}, "rates must be an integer from 1 up, got 12.0"),
        ({"rates": (6, 12, 18)}, "weights must be 4 tensors, one 1x1 and one 3x3 for each rate, got 3"),
        ({"weights": BRANCH_WEIGHTS[0]}, "weights must be 3 tensors, one 1x1 and one 3x3 for each rate, got Tensor"),
        ({"weights": BRANCH_WEIGHTS[::-1]}, r"weights\[0\] must be \(3, 4, 1, 1\), got \(3, 4, 3, 3\)"),
        ({"weights": [*BRANCH_WEIGHTS[:2], WEIGHT[:2]]}, r"weights\[2\] must be \(3, 4, 3, 3\), got \(2, 4, 3, 3\)"),
        ({"weights": [*BRANCH_WEIGHTS[:2], WEIGHT.half()]}, r"weights\[2\] must be torch.float32 as x"),
        ({"weights": [*BRANCH_WEIGHTS[:2], None]}, r"weights\[2\] must be a tensor, got NoneType"),
        ({"weights": [weight[:0] for weight in BRANCH_WEIGHTS]}, r"weights\[0\] must be \(C_b, 4, 1, 1\)"),
        ({"scale": torch.ones(3)}, r"scale must be \(9,\) in fp32"),
        ({"shift": torch.ones(10)}, r"shift must be \(9,\) in fp32"),
    ],
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_aspp_branches(arguments: dict[str, object], message: str, impl: str) -> None:
    valid = {"x": X, "weights": BRANCH_WEIGHTS, "scale": None, "shift": torch.ones(9), "rates": (6, 12), "impl": impl}
    with pytest.raises(ValueError, match=message):
        kernels.aspp_branches(**valid | arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"branches": X[0]}, r"branches must be \(N, C, H, W\)"),
        ({"pooled": torch.zeros(2, 5, 6, 5)}, r"pooled must be \(2, C_p, 1, 1\), got \(2, 5, 6, 5\)"),
        ({"pooled": torch.zeros(1, 5, 1, 1)}, r"pooled must be \(2, C_p, 1, 1\)"),
        ({"pooled": torch.zeros(2, 0, 1, 1)}, r"pooled must be \(2, C_p, 1, 1\)"),
        ({"pooled": torch.zeros(2, 5, 1, 1).double()}, "pooled must be torch.float32 as branches"),
        ({"weight": torch.zeros(3, 8, 1, 1)}, r"weight must be \(C_out, 9, 1, 1\), got \(3, 8, 1, 1\)"),
        ({"weight": torch.zeros(3, 9, 3, 3)}, r"weight must be \(C_out, 9, 1, 1\)"),
        ({"weight": torch.zeros(3, 9, 1, 1).half()}, "weight must be torch.float32 as branches"),
        ({"scale": torch.ones(9)}, r"scale must be \(3,\) in fp32"),
        ({"shift": torch.ones(9)}, r"shift must be \(3,\) in fp32"),
    ],
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_aspp_projection(arguments: dict[str, object], message: str, impl: str) -> None:
    pooled, weight = torch.zeros(2, 5, 1, 1), torch.zeros(3, 9, 1, 1)
    valid = {"branches": X, "pooled": pooled, "weight": weight, "scale": None, "shift": CHANNELS, "impl": impl}
    with pytest.raises(ValueError, match=message):
        kernels.aspp_projection(**valid | arguments)  # type: ignore[arg-type]
