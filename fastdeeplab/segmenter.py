"""Pictures to masks: read, preprocess as torchvision does, run the network, upsample to each picture's own size.

Needs Pillow.
"""

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fastdeeplab.head import UpsampleArgmax
from fastdeeplab.pictures import PictureError, read_picture, to_rgb

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_ENLARGED = 32 * 520 * 520  # pixels that a thin picture may be enlarged to; 1 x 300 would become 520 x 156000

Picture = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]
Mask = NDArray[np.integer]


@dataclass
class Segmented:
    """What became of one picture: its mask, or the error that prevented it.

    `image` is the picture in RGB, (H, W) pixels; `mask` is (H, W) class indices.
    """

    source: Picture
    image: Image.Image | None = None
    mask: Mask | None = None
    error: PictureError | None = None


class Segmenter:
    """Segments pictures with a model: ``segmenter("street.jpg")`` is a mask, ``segmenter([...])`` a list of masks.

    A picture is a path, a PIL image or an (H, W, 3) uint8 RGB array. Its mask is an (H, W) array of class indices in
    the smallest of uint8, int16 and int32 that holds all classes, and has the picture's own size, after its EXIF
    orientation is applied (a PIL image's too).

    Preprocessing is torchvision's ``SemanticSegmentation`` transform: the shorter side becomes `resize` pixels
    (bilinear with antialias), then ImageNet's mean and standard deviation are taken out. The low-resolution logits are
    upsampled once, straight to the picture's own size.

    A batch that does not fit into memory is halved and tried again, and later batches stay that small.

    Args:
        model: has ``logits(images)``, which takes (B, 3, H, W) images and returns ``{"out": (B, K, h, w)}``. It must be
            in eval mode when pictures are segmented; it is not switched here.
        resize: length of the shorter side in pixels; None keeps every picture's size.
        batch_size: how many pictures of equal preprocessed size go through the network at once. Up to twice as many
            decoded pictures are held in memory.
        device: where the network runs; the model itself is moved there. None leaves it where it is.
        mean, std: three values each, for RGB from 0 to 1.

    Attributes:
        seconds: time spent so far in each stage: read, preprocess, network, upsample + argmax.

    Raises:
        ValueError: an argument is not one of those above.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        resize: int | None = 520,
        batch_size: int = 1,
        device: torch.device | str | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if resize is not None and not (isinstance(resize, int) and resize >= 1):
            raise ValueError(f"resize must be an integer from 1 up or None, got {resize!r}")
        if not (isinstance(batch_size, int) and batch_size >= 1):
            raise ValueError(f"batch_size must be an integer from 1 up, got {batch_size!r}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std must be three values each, std above 0, got {mean} and {std}")
        self.model: Any = model if device is None else model.to(device)
        self.upsample_argmax = getattr(model, "upsample_argmax", UpsampleArgmax())  # by the model's own kernel flag
        self.resize = resize
        self.batch_size = batch_size
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        self.seconds = dict.fromkeys(("read", "preprocess", "network", "upsample + argmax"), 0.0)
        self._fits = batch_size  # the largest batch that did not run out of memory

    @overload
    def __call__(self, pictures: Picture) -> Mask: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, pictures: Iterable[Picture]) -> list[Mask]: ...
    def __call__(self, pictures: Picture | Iterable[Picture]) -> Mask | list[Mask]:
        """Segment one picture into a mask, or several into a list of masks in their order.

        Raises:
            PictureError: a picture can't be read or does not fit into memory. `stream` goes on with the rest instead.
            RuntimeError: the model is in training mode.
        """
        if isinstance(pictures, str | os.PathLike | Image.Image | np.ndarray):
            return self([pictures])[0]
        masks = []
        for result in self.stream(pictures):
            if result.error is not None:
                raise result.error
            assert result.mask is not None
            masks.append(result.mask)
        return masks

    def stream(self, pictures: Iterable[Picture]) -> Iterator[Segmented]:
        """Segment pictures as they come and yield one result for each, in their order.

        A picture that can't be segmented costs the others nothing: its result says why. Pictures are read when their
        turn comes, so any number of them takes the memory of two batches.

        Raises:
            RuntimeError: the model is in training mode.
        """
        if self.model.training:
            raise RuntimeError("Segmenter needs the model in eval mode: call model.eval() first")
        waiting: deque[_Job] = deque()
        for number, picture in enumerate(pictures, start=1):
            waiting.append(self._prepare(picture, number))
            batch = _equally_sized(waiting, waiting[-1])
            if len(batch) == self.batch_size:
                self._segment(batch)
            elif len(waiting) == 2 * self.batch_size:  # the first has waited long enough for others of its size
                self._segment(_equally_sized(waiting, waiting[0]))
            yield from _take_finished(waiting)
        while waiting:
            self._segment(_equally_sized(waiting, waiting[0]))
            yield from _take_finished(waiting)

    def _prepare(self, picture: Picture, number: int) -> "_Job":
        name = os.fspath(picture) if isinstance(picture, str | os.PathLike) else f"picture {number}"
        job = _Job(Segmented(picture), name)
        try:
            with self._stage("read"):
                job.result.image = _rgb_image(picture)
            with self._stage("preprocess"):
                job.input = self.preprocess(job.result.image)
        except PictureError as error:
            job.result.error = error
        except MemoryError:
            job.result.error = PictureError(f"{name}: not enough memory to preprocess it")
        except Exception as error:  # Pillow reads the file of a PIL image only here, and decoders raise anything
            job.result.error = PictureError(f"{name}: {error}")
        return job

    def preprocess(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into the network's (3, H', W') fp32 input.

        Raises ValueError if the image has no pixels, or is so long and thin that resizing would enlarge it to more than
        `MAX_ENLARGED` pixels.
        """
        if 0 in image.size:
            raise ValueError(f"has no pixels: it is {image.width} x {image.height}")
        if self.resize is not None:
            short, long = sorted(image.size)
            resized_long = int(self.resize * long / short)
            if self.resize * resized_long > max(short * long, MAX_ENLARGED):
                raise ValueError(
                    f"is too thin: {image.width} x {image.height} pixels would be resized to "
                    f"{self.resize} x {resized_long}; choose a smaller resize"
                )
            landscape = image.width > image.height
            size = (resized_long, self.resize) if landscape else (self.resize, resized_long)
            image = image.resize(size, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return (pixels.float() / 255).sub_(self.mean).div_(self.std)

    def _segment(self, jobs: list["_Job"]) -> None:
        """Give each of some equally sized jobs its mask or, if it alone does not fit into memory, its error."""
        while jobs:
            batch, rest = jobs[: self._fits], jobs[self._fits :]
            if self._run(batch):
                jobs = rest
            elif len(batch) > 1:
                self._fits = len(batch) // 2
            else:
                batch[0].result.error = PictureError(f"{batch[0].name}: not enough memory to segment it")
                jobs = rest

    def _run(self, batch: list["_Job"]) -> bool:
        """Segment a batch; False if memory ran out. Returning frees what the failed attempt had allocated."""
        try:
            with torch.no_grad():
                with self._stage("network"):
                    images = torch.stack([job.input for job in batch if job.input is not None])
                    logits = self.model.logits(images.to(**self._placement()))["out"]
                with self._stage("upsample + argmax"):
                    dtype = smallest_dtype(logits.shape[1])
                    masks = []
                    for low, job in zip(logits.split(1), batch, strict=True):  # one by one: their own sizes may differ
                        assert job.result.image is not None
                        width, height = job.result.image.size
                        masks.append(self.upsample_argmax(low, (height, width), dtype)[0].cpu().numpy())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        for job, mask in zip(batch, masks, strict=True):
            job.result.mask = mask
            job.input = None
        return True

    def _placement(self) -> dict[str, Any]:
        """Device and floating-point type of the model's first parameter."""
        first = next(chain(self.model.parameters(), self.model.buffers()), torch.empty(0))
        return {"device": first.device, "dtype": first.dtype if first.is_floating_point() else torch.float32}

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            device = self._placement()["device"]
            if device.type == "cuda" and name in ("network", "upsample + argmax"):
                torch.cuda.synchronize(device)
            self.seconds[name] += time.perf_counter() - start


@dataclass
class _Job:
    result: Segmented
    name: str
    input: Tensor | None = None

    @property
    def done(self) -> bool:
        return self.result.mask is not None or self.result.error is not None


def _equally_sized(waiting: Iterable[_Job], job: _Job) -> list[_Job]:
    """The jobs still to do whose network input is as large as that of `job`; none if that is done."""
    if job.done or job.input is None:
        return []
    size = job.input.shape
    return [other for other in waiting if not other.done and other.input is not None and other.input.shape == size]


def _take_finished(waiting: deque[_Job]) -> Iterator[Segmented]:
    while waiting and waiting[0].done:
        yield waiting.popleft().result


def _rgb_image(picture: Picture) -> Image.Image:
    if isinstance(picture, str | os.PathLike):
        return read_picture(picture)
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    if not isinstance(picture, np.ndarray):
        raise ValueError(f"must be a path, a PIL image or an (H, W, 3) uint8 array, got {type(picture).__name__}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
        raise ValueError(f"must be an (H, W, 3) uint8 array, got {picture.shape} {picture.dtype}")
    return Image.fromarray(picture)


def smallest_dtype(num_classes: int) -> torch.dtype:
    """The smallest of uint8, int16 and int32 that holds the indices of `num_classes` classes."""
    fitting = (dtype for dtype in (torch.uint8, torch.int16) if num_classes - 1 <= torch.iinfo(dtype).max)
    return next(fitting, torch.int32)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the CPU has no memory left, in the words of PyTorch's allocators."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
