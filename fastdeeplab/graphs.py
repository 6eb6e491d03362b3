"""CUDA graphs of an accelerated model: the launches of a whole run replayed as one, by the shape of the images.

``Graphs`` keeps the books: which shapes are captured, and how many more may be. ``Recorder`` does what CUDA is needed
for: it captures a function into buffers of its own, and replays it on the caller's stream.

Threads and streams: replays may come from any thread and any stream. One lock lets one thread at a time launch or
capture, and an event lets each replay wait on the GPU for the one before it, since they share their memory. Work of
other streams runs beside them. While something is captured PyTorch wants no other work on the GPU from any thread of
the process: capture before other threads start, and leave lazy capture to programs that run the GPU from one thread.

A hook of a model that is being captured may run another captured model, or the same one: what it runs is then part of
the capture, so it runs as if nothing were captured. It must run it in its own thread: it would wait for ever for
another thread, which would wait for the capture to end.
"""

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import Tensor

from fastdeeplab import kernels

Shape = tuple[int, ...]
Compute = Callable[[Tensor], Tensor]
WARM_UP_RUNS = 3  # in which Triton compiles and cuDNN chooses

# Of all models: a process can capture one thing at a time, and launch nothing meanwhile.
_one_at_a_time = threading.Lock()
_of_this_thread = threading.local()


@contextmanager
def _turn() -> Iterator[None]:
    """Wait until no other thread captures or replays.

    Raises:
        RuntimeError: this thread does, and would wait for itself.
    """
    if _has_turn():
        raise RuntimeError("a graph is being captured by this very thread: no hook can capture another one meanwhile")
    with _one_at_a_time:
        _of_this_thread.has_turn = True
        try:
            yield
        finally:
            _of_this_thread.has_turn = False


def _has_turn() -> bool:
    return getattr(_of_this_thread, "has_turn", False)


class Graphs:
    """Captured runs of a function of images, by the images' shape.

    Args:
        device: of the images that are served.
        record: captures a function for a shape. What it returns computes the same for images of that shape, of any
            floating-point dtype and strides, and gives each caller a tensor of its own.
    """

    def __init__(self, device: torch.device, record: Callable[[Compute, Shape], Compute]) -> None:
        self.device = device
        self._record = record
        self._replays: dict[Shape, Compute] = {}
        self._room = 0  # for shapes that are captured when they are first seen

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Those captured, in the order of their capture."""
        return tuple(self._replays)

    def capture(self, compute: Compute, shapes: Sequence[Shape], lazy: int) -> None:
        """Capture the shapes that are new, and let ``lazy`` more be captured when they are first seen.

        Raises:
            RuntimeError: a hook calls it during a capture.
        """
        with _turn():
            for shape in sorted(set(shapes), key=math.prod, reverse=True):  # small ones fit into what large ones leave
                if shape not in self._replays:
                    self._replays[shape] = self._record(compute, shape)
            self._room += lazy

    def replay(self, compute: Compute, images: Tensor) -> Tensor | None:
        """``compute(images)``, or None where the shape is not captured or whoever watches must see the run itself."""
        if images.device != self.device or _has_turn() or _is_watched(images):
            return None
        shape = tuple(images.shape)
        with _turn():
            if shape not in self._replays and self._room > 0 and images.numel() > 0:
                self._capture_lazily(compute, shape)
            replay = self._replays.get(shape)
            return None if replay is None else replay(images)

    def _capture_lazily(self, compute: Compute, shape: Shape) -> None:
        try:
            self._replays[shape] = self._record(compute, shape)
            self._room -= 1
        except torch.OutOfMemoryError:
            self._room = 0
            warnings.warn(f"no memory to capture images of shape {shape}: no more shapes are captured", stacklevel=2)


class Recorder:
    """Captures functions of images on one device.

    All captures share one memory pool, which is safe since no two of them ever run at once: what one holds between its
    launches, its input and its output, is written before it is read in every replay.

    Args:
        device: a CUDA device.
        dtype: of the images that the functions take.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._pool = torch.cuda.graph_pool_handle()
        # A stream's first matrix product takes a workspace for all later ones. The capture's must lie in the pool, so
        # it has a stream that nothing ran on before; and no other graph's may be on it, whose end would free it.
        self._warm_up_stream, self._capture_stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._last_use = torch.cuda.Event()  # of the pool's memory

    def __call__(self, compute: Compute, shape: Shape) -> Compute:
        """Capture ``compute`` for images of ``shape``; the result is called by one thread at a time."""
        device = self._device

        def empty_images() -> Tensor:
            return torch.empty(shape, dtype=self._dtype, device=device, memory_format=torch.channels_last)

        with (
            torch.cuda.device(device),
            torch.inference_mode(False),  # in which the buffers could not be written to outside it
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            torch.cuda.synchronize()  # the weights may be under way on any stream
            # torch.cuda.graph leaves its stream current where ending the capture fails; this one restores the caller's.
            with torch.cuda.stream(self._warm_up_stream):
                for _ in range(WARM_UP_RUNS):
                    compute(empty_images().zero_())
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._capture_stream, capture_error_mode="thread_local"
                ):
                    images = empty_images()
                    logits = compute(images)

        def replay(given: Tensor) -> Tensor:
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream()
                stream.wait_event(self._last_use)
                images.copy_(given)
                graph.replay()
                result = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=device)
                result.copy_(logits)
                self._last_use.record(stream)
            return result

        return replay


def check_shapes(shapes: Sequence[Sequence[int]], channels: int) -> list[Shape]:
    """The shapes as tuples of integers.

    Raises:
        ValueError: one is not (B, channels, H, W) with B, H and W from 1 up.
    """
    if not isinstance(shapes, Sequence) or isinstance(shapes, str):
        raise ValueError(f"shapes must be a sequence of shapes such as [images.shape], got {type(shapes).__name__}")
    for shape in shapes:
        fits = isinstance(shape, Sequence) and len(shape) == 4 and all(map(_is_size, shape)) and shape[1] == channels
        if not fits:
            shown = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else shape
            raise ValueError(f"shapes must hold (B, {channels}, H, W) with B, H and W from 1 up, got {shown!r}")
    return [tuple(map(int, shape)) for shape in shapes]


def check_device(device: torch.device) -> None:
    """Raise a RuntimeError if nothing can be captured on the device, or not at present."""
    if device.type != "cuda":
        raise RuntimeError(f"CUDA graphs need a model on a CUDA device, and this one is on {device}: use .to() first")
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the current stream is being captured: nothing else can be captured meanwhile")


def check_lazy(lazy: int) -> None:
    """Raise a ValueError if ``lazy`` is not an integer from 0 up."""
    if not isinstance(lazy, Integral) or isinstance(lazy, bool) or lazy < 0:
        raise ValueError(f"lazy must be an integer from 0 up, got {lazy!r}")


def _is_size(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_watched(images: Tensor) -> bool:
    """Whether the run is traced, recorded layer by layer or captured by the caller: a replay would not be seen."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if tracing or kernels.is_recording():
        return True
    if images.device.type != "cuda":
        return False
    with torch.cuda.device(images.device):
        return torch.cuda.is_current_stream_capturing()
