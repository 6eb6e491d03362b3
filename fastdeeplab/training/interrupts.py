"""Interrupts of a training run: met between two steps or two validated pictures, not within one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass
class StopRequest:
    """Whether a signal has asked for the end."""

    requested: bool = False


@contextmanager
def stop_on_signals(keep: bool) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request, which is met after the step, or after the picture that is validated.

    Unless ``keep``, a second signal acts as it would without this. Under torchrun a terminal's interrupt comes twice,
    once from the terminal and once passed on.
    """
    stop = StopRequest()
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        before.clear()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        if not keep:
            restore()

    if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()
