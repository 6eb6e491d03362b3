"""How far a result is from its oracle."""

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in fp64."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
