"""The processes of a training run: those that torchrun started, or one alone."""

import gc
import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from fastdeeplab.devices import usable_device


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. Alone, it does nothing where others would be asked."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all are told the same."""
        return flag if self.count == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        values = [value]
        if self.count > 1:
            values *= self.count
            distributed.all_gather_object(values, value)
        return values

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def wait(self) -> None:
        """For all the others to come here."""
        self.any(False)


@contextmanager
def join(device: str | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun started, on a GPU each if there are any, or be the only one.

    Processes that are joined already stay so at the end. What holds the process group (DistributedDataParallel does)
    must be out of reach by then.

    Raises:
        ValueError: the device can't be used.
    """
    started_by_torchrun = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    joined = distributed.is_available() and distributed.is_initialized()
    if not joined and not started_by_torchrun:
        yield Processes(0, 1, usable_device(device))
        return
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    place = usable_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not joined:
        # DistributedDataParallel imports it, and its functions keep the group there is at that time for ever.
        importlib.import_module("torch.distributed.nn.functional")
        distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    yield Processes(distributed.get_rank(), distributed.get_world_size(), place)
    if not joined:  # not after an error, whose message comes first: it would wait for processes that may be gone
        # gloo's threads end with the last that holds the group. One that frees a tensor while Python ends, aborts.
        gc.collect()
        distributed.destroy_process_group()
