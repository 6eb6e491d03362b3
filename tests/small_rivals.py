"""A small network to compare, rivals that are right, wrong or fail, and results of theirs."""

from collections.abc import Callable

import torch
from fastdeeplab.kernels.measure import Measurement
from networks import small_model
from torch import Tensor

import fastdeeplab as fdl
from fastdeeplab.speed.results import Result
from fastdeeplab.speed.rivals import Network, Rival

CPU = torch.device("cpu")
GPU = torch.device("cuda")


class Small(Network):
    def structure(self) -> fdl.ResNetModel:
        return small_model(num_classes=self.num_classes, output_stride=self.output_stride, aux_head=False)


NETWORK = Small(num_classes=5, size=(33, 33), batch=2, dtype=torch.float32)


def live(name: str = "live", **options: object) -> Rival:
    return Rival(name, torch.float32, lambda model, _: model.predict, **options)


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Rival:
    """A rival whose mask is not the model's."""

    def build(model: fdl.ResNetModel, _: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda images: change(model.predict(images))

    return Rival(name, torch.float32, build)


def failing(name: str, error: BaseException) -> Rival:
    def build(model: fdl.ResNetModel, images: Tensor) -> Callable[[Tensor], Tensor]:
        raise error

    return Rival(name, torch.float32, build)


def result(name: str, milliseconds: float, ours: bool = False, **options: object) -> Result:
    found = Measurement(milliseconds, milliseconds, milliseconds, 10, 2_000_000, 0.0)
    return Result(NETWORK, live(name, ours=ours, **options), found)
