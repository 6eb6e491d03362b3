"""The oracle of upsampling and argmax in fp64, and how far a result may be from it."""

import torch.nn.functional as F
from torch import Tensor


def interpolate(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def rounding_bound(logits: Tensor) -> float:
    """How far two fp32-interpolated logits can move apart by rounding.

    A source coordinate is off by at most size * 2^-23 and moves a value by twice the largest logit per unit, on both
    axes; the sums and products add six roundings. Twice, for two values.
    """
    coordinate = sum(logits.shape[2:]) * 2**-23
    return 2 * float(logits.abs().max()) * (2 * coordinate + 6 * 2**-24)


def assert_argmax(index: Tensor, logits: Tensor, size: tuple[int, int], near_ties: float = 0.05) -> None:
    """The index is the fp64 argmax wherever the top two differ by more than the rounding of fp32 interpolation."""
    values = interpolate(logits.double().cpu(), size)
    index = index.cpu().long()
    assert index.shape == values[:, 0].shape
    assert 0 <= index.min() <= index.max() < logits.shape[1]
    bound = rounding_bound(logits.double())
    shortfall = values.amax(1) - values.gather(1, index[:, None])[:, 0]
    assert float(shortfall.max()) <= bound
    if logits.shape[1] > 1:
        top = values.topk(2, dim=1).values
        share = float((top[:, 0] - top[:, 1] <= bound).double().mean())
        print(f"near-ties {share:.2e}")
        assert share <= near_ties


def assert_same_masks(index: Tensor, exact: Tensor, error: float = 1e-4) -> None:
    """The index is the argmax of the exact full-size logits wherever the top two are further apart than the error.

    The error is relative to the largest logit.
    """
    shortfall = exact.amax(1) - exact.gather(1, index[:, None].long())[:, 0]
    assert float(shortfall.max()) <= 2 * error * float(exact.abs().max())
