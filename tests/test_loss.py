"""SegmentationLoss against its formula in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdeeplab as fdl


def formula(
    outputs: dict[str, Tensor],
    target: Tensor,
    aux_weight: float = 0.4,
    weight: Tensor | None = None,
    smooth: float = 0.0,
) -> Tensor:
    def term(logits: Tensor) -> Tensor:
        full = F.interpolate(logits.double(), size=target.shape[-2:], mode="bilinear", align_corners=False)
        log_p = full.log_softmax(1)
        w = torch.ones(full.shape[1], dtype=torch.float64) if weight is None else weight.double()
        valid = target != 255
        index = torch.where(valid, target, 0).long()
        nll = -(w * log_p.movedim(1, -1)).gather(-1, index[..., None])[..., 0]
        smoothed = -(w * log_p.movedim(1, -1)).mean(-1)
        return (((1 - smooth) * nll + smooth * smoothed) * valid).sum() / (w[index] * valid).sum()

    return term(outputs["out"]) + (aux_weight * term(outputs["aux"]) if "aux" in outputs else 0)


def example(num_classes: int = 5) -> tuple[dict[str, Tensor], Tensor]:
    outputs = {name: torch.randn(2, num_classes, 4, 6, requires_grad=True) for name in ("out", "aux")}
    target = torch.randint(num_classes, (2, 29, 41))
    target[torch.rand(target.shape) < 0.2] = 255
    return outputs, target


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0])])
@pytest.mark.parametrize("smooth", [0.0, 0.1])
def test_value_and_gradient(weight: Tensor | None, smooth: float) -> None:
    outputs, target = example()
    loss = fdl.SegmentationLoss(weight=weight, label_smoothing=smooth)(outputs, target)
    expected = formula(outputs, target, weight=weight, smooth=smooth)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for name, logits in outputs.items():
        actual = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        wanted = torch.autograd.grad(expected, logits, retain_graph=True)[0]
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-7, msg=name)


def test_full_size_and_low_resolution_logits_give_the_same_value() -> None:
    outputs, target = example()
    full = {
        name: F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False)
        for name, logits in outputs.items()
    }
    criterion = fdl.SegmentationLoss()
    torch.testing.assert_close(criterion(full, target), criterion(outputs, target))


def test_aux_is_optional_and_weighted() -> None:
    outputs, target = example()
    main = fdl.SegmentationLoss()({"out": outputs["out"]}, target)
    assert torch.equal(fdl.SegmentationLoss()(outputs["out"], target), main)
    assert torch.equal(fdl.SegmentationLoss(aux_weight=0)(outputs, target), main)
    torch.testing.assert_close(
        fdl.SegmentationLoss(aux_weight=2.0)(outputs, target).double(), formula(outputs, target, 2.0)
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_target_dtypes(dtype: torch.dtype) -> None:
    outputs, target = example()
    criterion = fdl.SegmentationLoss()
    assert torch.equal(criterion(outputs, target.to(dtype)), criterion(outputs, target))


def test_half_precision_logits_are_computed_in_fp32() -> None:
    outputs, target = example()
    half = {name: logits.detach().bfloat16() for name, logits in outputs.items()}
    loss = fdl.SegmentationLoss()(half, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), formula(half, target), rtol=1e-5, atol=1e-6)


def test_ignore_index_may_be_a_class() -> None:
    outputs, target = example()
    target[target == 255] = 3
    expected = F.cross_entropy(
        F.interpolate(outputs["out"], size=target.shape[-2:], mode="bilinear"), target, ignore_index=3
    )
    torch.testing.assert_close(fdl.SegmentationLoss(ignore_index=3)(outputs["out"], target), expected)


def test_fault_14_all_pixels_ignored() -> None:
    outputs, target = example()
    assert fdl.SegmentationLoss()(outputs, torch.full_like(target, 255)).isnan()


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0])])
@pytest.mark.parametrize("smooth", [0.0, 0.1])
def test_parts_divided_by_the_weight_of_the_whole_add_up_to_it(weight: Tensor | None, smooth: float) -> None:
    """Also where one part has far more ignored pixels than the other."""
    outputs, target = example()
    target[0, :20] = 255
    criterion = fdl.SegmentationLoss(weight=weight, label_smoothing=smooth)
    expected = formula(outputs, target, weight=weight, smooth=smooth)
    total = criterion.valid_weight(target)
    parts = [
        criterion({name: logits[i : i + 1] for name, logits in outputs.items()}, target[i : i + 1], total)
        for i in range(2)
    ]
    loss = parts[0] + parts[1]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for name, logits in outputs.items():
        actual = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        wanted = torch.autograd.grad(expected, logits, retain_graph=True)[0]
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_valid_weight(dtype: torch.dtype) -> None:
    target = torch.tensor([[[0, 1, 1], [255 if dtype == torch.uint8 else -1, 2, 2]]]).to(dtype)
    ignored = 255 if dtype == torch.uint8 else -1
    assert fdl.SegmentationLoss(ignore_index=ignored).valid_weight(target) == 5
    weighted = fdl.SegmentationLoss(ignore_index=ignored, weight=torch.tensor([1.0, 10.0, 100.0]))
    assert weighted.valid_weight(target) == 221


@pytest.mark.parametrize("ignore_index", [-1, 256])
def test_valid_weight_with_an_ignore_index_that_uint8_can_not_hold(ignore_index: int) -> None:
    target = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    assert fdl.SegmentationLoss(ignore_index=ignore_index).valid_weight(target) == 2


def test_fault_14_all_pixels_ignored_with_a_normalizer() -> None:
    """A loss of 0 and gradients of 0: a batch of unreadable pictures does not end a training."""
    outputs, target = example()
    criterion = fdl.SegmentationLoss(label_smoothing=0.1)
    target = torch.full_like(target, 255)
    loss = criterion(outputs, target, criterion.valid_weight(target))
    loss.backward()
    assert loss == 0
    assert all(logits.grad is not None and not logits.grad.any() for logits in outputs.values())


@pytest.mark.parametrize("normalizer", [3.0, torch.ones(1)])
def test_a_normalizer_that_is_no_scalar_tensor(normalizer: object) -> None:
    with pytest.raises(ValueError, match="normalizer must be a scalar tensor"):
        fdl.SegmentationLoss()(*example(), normalizer)


@pytest.mark.parametrize("value", [5, 254, -1, 256, -100])
def test_fault_14_target_outside_the_classes(value: int) -> None:
    outputs, target = example()
    target[1, 7, 9] = value
    with pytest.raises(ValueError, match=r"target must be in \[0, 5\) or 255 \(ignored\)"):
        fdl.SegmentationLoss()(outputs, target)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(2, 29, 41), "uint8, int16, int32 or int64"),
        (torch.zeros(2, 1, 29, 41, dtype=torch.long), r"target must be \(2, H, W\)"),
        (torch.zeros(3, 29, 41, dtype=torch.long), r"target must be \(2, H, W\)"),
    ],
)
def test_fault_14_target_of_the_wrong_type_or_shape(target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fdl.SegmentationLoss()(example()[0], target)


@pytest.mark.parametrize(
    "arguments",
    [
        {"aux_weight": -0.1},
        {"aux_weight": float("nan")},
        {"aux_weight": float("inf")},
        {"weight": [1.0, 2.0]},
        {"label_smoothing": 1.1},
        {"weight": torch.ones(2, 2)},
        {"ignore_index": 2**70},
    ],
)
def test_wrong_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        fdl.SegmentationLoss(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ignore_index", "stray"), [(-1, 255), (-100, 156), (300, 44)])
def test_fault_14_ignore_index_that_uint8_can_not_hold(ignore_index: int, stray: int) -> None:
    outputs, target = example()
    target = torch.zeros_like(target, dtype=torch.uint8)
    criterion = fdl.SegmentationLoss(ignore_index=ignore_index)
    assert criterion(outputs, target).isfinite()
    target[0, 3, 4] = stray
    with pytest.raises(ValueError, match="target must be in"):
        criterion(outputs, target)


@pytest.mark.parametrize("size", [(3, 41), (29, 5)])
def test_a_target_smaller_than_the_logits(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="logits must be no larger than the target's"):
        fdl.SegmentationLoss()(example()[0], torch.zeros(2, *size, dtype=torch.int64))


def test_logits_without_a_batch() -> None:
    outputs, target = example()
    with pytest.raises(ValueError, match=r"logits must be \(N, K, h, w\)"):
        fdl.SegmentationLoss()(outputs["out"][0], target)


def test_weight_of_another_number_of_classes() -> None:
    with pytest.raises(ValueError, match=r"weight must be \(5,\)"):
        fdl.SegmentationLoss(weight=torch.ones(4))(*example())


def test_outputs_without_main_logits() -> None:
    outputs, target = example()
    with pytest.raises(ValueError, match='"out"'):
        fdl.SegmentationLoss()({"aux": outputs["aux"]}, target)


def test_the_weight_moves_with_the_loss_and_is_no_part_of_a_checkpoint() -> None:
    criterion = fdl.SegmentationLoss(weight=torch.ones(5)).to("meta")
    assert criterion.weight is not None
    assert criterion.weight.device.type == "meta"
    assert not criterion.state_dict()
