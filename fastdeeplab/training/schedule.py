"""What each step of a training run takes: its pictures and its learning rate, by the number of the step alone.

Nothing here has a state, so a run that is resumed at a step goes on as one that was never interrupted.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

Batch = list[tuple[int, int]]  # (epoch, index) of each picture


@dataclass(frozen=True)
class PictureOrder:
    """Which pictures one of several processes takes in each step.

    Each epoch has a permutation of its own. A step takes the next ``batch_size * accumulate * processes`` pictures of
    it, dealt out to the processes one by one, so that a step has the same pictures however it is divided. The last step
    of an epoch takes what is left, in smaller batches if need be, and no picture is left out. Where what is left can't
    be dealt out evenly, the first pictures of the permutation come again: at most ``processes - 1``.
    """

    pictures: int
    batch_size: int
    accumulate: int
    seed: int
    rank: int = 0
    processes: int = 1

    @property
    def pictures_per_step(self) -> int:
        """Of all processes together."""
        return self.batch_size * self.accumulate * self.processes

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.pictures / self.pictures_per_step)

    def batches(self, step: int) -> list[Batch]:
        """The batches of this process in a step, ``accumulate`` of them but in the last step of an epoch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.pictures_per_step
        group = _permutation(self.pictures, self.seed, epoch, self.processes)[start : start + self.pictures_per_step]
        own = [(epoch, index) for index in group[self.rank :: self.processes]]
        return [own[i : i + self.batch_size] for i in range(0, len(own), self.batch_size)]

    def pictures_of(self, step: int) -> int:
        """How many pictures all processes take in a step."""
        return self.processes * sum(map(len, self.batches(step)))

    def batches_of(self, steps: range) -> Iterator[Batch]:
        for step in steps:
            yield from self.batches(step)


@functools.lru_cache(maxsize=2)  # the data loader is ahead of the training, perhaps in the next epoch
def _permutation(pictures: int, seed: int, epoch: int, processes: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order: list[int] = torch.randperm(pictures, generator=generator).tolist()
    missing = -pictures % processes
    return order + (order * processes)[:missing]


def learning_rate_factor(step: int, steps: int, *, power: float = 0.9, warmup_steps: int = 0) -> float:
    """The poly schedule ``(1 - step / steps) ** power``, times a linear rise over the first ``warmup_steps``."""
    warmup = min((step + 1) / (warmup_steps + 1), 1.0)
    return float(warmup * (1 - step / steps) ** power)
