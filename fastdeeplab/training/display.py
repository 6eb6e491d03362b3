"""What a training run shows while it goes on: a progress bar, a line per epoch, TensorBoard events."""

import time
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from fastdeeplab.training.run_folder import RunFolder


class TrainingDisplay:
    """A progress bar with loss, images per second and time left; nothing in processes other than the first.

    Args:
        run: TensorBoard events go into its folder.
        steps: of the whole run.
        start: the step that the run begins with, 0 or where it is resumed.
        resumed: whether the folder may hold events of steps that are done again.
        shown: whether this process shows anything.
        tensorboard: whether to write events.
        console: a ``rich.console.Console`` for the lines and, in a terminal, the bar; None shows neither.

    Raises:
        ImportError: a package is missing.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        steps: int,
        start: int,
        resumed: bool,
        shown: bool,
        tensorboard: bool,
        console: Any = None,
    ) -> None:
        self.console = console if shown else None
        self.events = _summary_writer(run, start + 1 if resumed else None) if shown and tensorboard else None
        self.progress = None
        if self.console is not None and self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps, loss {task.fields[loss]:.4f}, {task.fields[speed]:.1f} images/s,"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self.console,
                transient=True,
                speed_estimate_period=3600,  # seconds: a step may take minutes
            )
            self.task = self.progress.add_task("training", total=steps, completed=start, loss=float("nan"), speed=0.0)
        self._begin_epoch()

    def __enter__(self) -> "TrainingDisplay":
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()
        if self.events is not None:
            self.events.close()

    def step(self, step: int, epoch: int, loss: float, images: int, rates: dict[str, float]) -> None:
        """After a step: ``images`` are those of all processes, ``rates`` the learning rates by parameter group."""
        self.images += images
        self.losses.append(loss)
        speed = self.images / (time.perf_counter() - self.since)
        if self.progress is not None:
            self.progress.update(self.task, completed=step, description=f"epoch {epoch}", loss=loss, speed=speed)
        if self.events is not None:
            self.events.add_scalar("train/loss", loss, step)
            self.events.add_scalar("train/images_per_second", speed, step)
            for name, rate in rates.items():
                self.events.add_scalar(f"learning_rate/{name}", rate, step)

    def epoch(self, step: int, epoch: int, epochs: int, miou: float, ious: dict[str, float], best: bool) -> None:
        """After the validation of an epoch: mean IoU and that of each class, NaN for one that never occurs."""
        if self.console is not None:
            trained = ""
            if self.losses:  # none where a resume begins with the validation
                mean, speed = sum(self.losses) / len(self.losses), self.images / (self.until - self.since)
                trained = f"loss {mean:.4f}, {speed:.1f} images/s, "
            mark = ", the best so far" if best else ""
            self.console.print(f"epoch {epoch}/{epochs}: {trained}mIoU {miou:.4f}{mark}")
        if self.events is not None:
            self.events.add_scalar("val/miou", miou, step)
            for name, iou in ious.items():
                self.events.add_scalar(f"val_iou/{name}", iou, step)
            self.events.flush()
        self._begin_epoch()

    def validating(self) -> None:
        """The epoch's training is over; its speed is taken up to here."""
        self.until = time.perf_counter()
        if self.progress is not None:
            self.progress.update(self.task, description="validating")

    def print(self, message: str) -> None:
        if self.console is not None:
            self.console.print(message)

    def _begin_epoch(self) -> None:
        self.since = self.until = time.perf_counter()
        self.images = 0
        self.losses: list[float] = []


@contextmanager
def counting(console: Any, what: str, things: Sequence[Sized]) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how many of all things are done, and shows it in a terminal."""
    if console is None or not console.is_terminal:
        yield lambda count: None
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(what, total=sum(map(len, things)))
        yield lambda count: progress.update(task, completed=count)


def _summary_writer(run: RunFolder, purge_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard events need the package tensorboard: pip install 'fastdeeplab[training]', or tensorboard=False"
        ) from error
    return SummaryWriter(str(run.path), purge_step=purge_step)
