"""The network that is measured, how right a mask must be, and that the rivals are what their names say."""

from typing import Any

import pytest
import torch
from fastdeeplab.kernels import library
from fastdeeplab.kernels.measure import WrongResultError
from networks import small_model
from small_rivals import CPU, NETWORK
from torch import Tensor

import fastdeeplab as fdl
from fastdeeplab.speed import rivals as rivals_module
from fastdeeplab.speed.rivals import Network, Oracle, torchvision_network


def test_the_same_random_network_each_time_with_every_class_in_its_mask() -> None:
    one, other = (NETWORK.build(CPU).state_dict() for _ in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert torch.equal(NETWORK.images(CPU), NETWORK.images(CPU))
    mask = NETWORK.build(CPU).predict(NETWORK.images(CPU))
    assert mask.flatten().bincount(minlength=5).min() > 0.02 * mask.numel()
    assert torch.initial_seed() == 0  # the caller's random numbers go on as they were


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("depth", 34, "depth must be 50, 101 or 152, got 34"),
        ("output_stride", 32, "output_stride must be 8 or 16"),
        ("num_classes", 1, "num_classes must be at least 2"),
        ("size", (0, 5), "size must be two positive numbers"),
        ("batch", 0, "batch must be at least 1"),
        ("dtype", torch.float64, "dtype must be float32, float16 or bfloat16"),
    ],
)
def test_a_network_that_is_none(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Network(**{field: value})


def test_many_near_ties_that_differ_are_not_timed() -> None:
    """Within the rounding at each pixel, but at far more of them than rounding would change."""
    model, images = NETWORK.build(CPU), NETWORK.images(CPU)
    oracle = Oracle(model, images)
    oracle.logits.fill_(-1e-6)[:, 0] = 0
    oracle.limits[torch.float32] = (1e-5, 0.5)
    near = torch.full((2, 33, 33), 4)
    assert oracle.compare(near) == pytest.approx((1e-6, 1))
    with pytest.raises(WrongResultError, match=r"100.00% of its pixels differ from fp64, at most 50.00% is rounding"):
        oracle.check(near, torch.float32)


def test_a_dtype_that_spoils_the_network_is_no_measure_of_right() -> None:
    """In fp16 it overflows: every mask would be right."""
    model, images = NETWORK.build(CPU), NETWORK.images(CPU)
    model.backbone.conv1.weight.mul_(1e6)
    (logits,) = (rivals_module.layer_by_layer(model.half(), images[:1].half()),)
    assert not logits.isfinite().all()
    oracle = Oracle(model.float(), images)
    with pytest.raises(ValueError, match="float16 rounds this network too much"):
        oracle.check(torch.zeros(2, 33, 33, dtype=torch.int64), torch.float16)


def test_the_network_of_cudnns_fused_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution but the classifier through cuDNN's call, for which PyTorch's on a CPU stands here."""
    asked: list[tuple[bool, bool]] = []

    def cudnn_relu(
        x: Tensor, weight: Tensor, scale: None, shift: Tensor, residual: Tensor | None, *rest: Any
    ) -> Tensor:
        asked.append((residual is not None, rest[-1]))
        return library.conv_pointwise(x, weight, scale, shift, residual, *rest)

    monkeypatch.setattr(library, "cudnn_relu", cudnn_relu)
    model, images = NETWORK.build(CPU), NETWORK.images(CPU)
    mask = rivals_module._cudnn_fused(model, images)(images)
    assert Oracle(model, images).check(mask, torch.float32) < 1e-4
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    assert len(asked) == convolutions - 1
    assert asked.count((True, True)) == 4  # residuals
    assert asked.count((False, False)) == 4  # their projections


@pytest.mark.parametrize("output_stride", [8, 16])
def test_torchvisions_network_is_the_same(output_stride: int) -> None:
    model = fdl.ResNetModel(layers=(1, 1, 2, 1), num_classes=3, output_stride=output_stride, aux_head=False).eval()
    images = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        torch.testing.assert_close(torchvision_network(model)(images)["out"], model(images)["out"])
    with pytest.raises(ValueError, match="torchvision has neither another width"):
        torchvision_network(small_model())


def test_the_layers_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the fused calls, and no gradient."""
    model = NETWORK.build(CPU)
    with fdl.kernels.recording() as fused:
        logits = rivals_module.layer_by_layer(model, NETWORK.images(CPU))
    assert not fused
    assert logits.grad_fn is None
