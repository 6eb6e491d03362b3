"""Random scale, crop, flip and colours for training, from random numbers that belong to the sample alone.

The numbers depend on the seed, the epoch and the index, so a sample is the same whatever the number of workers, and
after a resume; PyTorch's and numpy's global random states are neither used nor changed.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import Dataset

from fastdeeplab.data.dataset import IGNORED, SegmentationDataset
from fastdeeplab.segmenter import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Augmentation:
    """What is done to a picture and its target in training, in this order.

    Attributes:
        crop_size: (h, w) of the result in pixels, or one number for both.
        scale: range of the factor on both sides, drawn uniformly; the image is resized bilinearly with antialias, the
            target by nearest neighbour. Then a random window is cut out. Where the picture is smaller than the window,
            it is padded at the right and the bottom: the image with the mean colour, the target with 255.
        flip: probability of a horizontal flip.
        brightness, contrast, saturation: b, c, s draw a factor from [1 - b, 1 + b], from 0 to 1.
        hue: draws a shift from [-hue, hue] turns of the colour circle, from 0 to 0.5.
        mean, std: three values each, for RGB from 0 to 1; by default ImageNet's, as `Segmenter` has.

    Raises:
        ValueError: a value is not one of those above.
        ImportError: colours are to change, and the package kornia is missing.
    """

    crop_size: int | Sequence[int] = 512
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    brightness: float = 0.3
    contrast: float = 0.3
    saturation: float = 0.3
    hue: float = 0.05
    mean: Sequence[float] = field(default=IMAGENET_MEAN)
    std: Sequence[float] = field(default=IMAGENET_STD)

    def __post_init__(self) -> None:
        height, width = self.window
        _require(min(height, width) >= 1, "crop_size", "at least 1", self.crop_size)
        _require(
            len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 16, "scale", "a range up to 16", self.scale
        )
        for name, limit in (("flip", 1), ("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            value = getattr(self, name)
            _require(0 <= value <= limit, name, f"from 0 to {limit}", value)
        _require(len(self.mean) == 3, "mean", "three values", self.mean)
        _require(len(self.std) == 3 and min(self.std) > 0, "std", "three values above 0", self.std)
        if self.changes_colors and importlib.util.find_spec("kornia") is None:
            raise ImportError("Changing colours needs the package kornia: pip install 'fastdeeplab[training]'")

    @property
    def changes_colors(self) -> bool:
        return any((self.brightness, self.contrast, self.saturation, self.hue))

    @property
    def window(self) -> tuple[int, int]:
        """(h, w) of the result."""
        if isinstance(self.crop_size, int):
            return self.crop_size, self.crop_size
        height, width = self.crop_size
        return height, width

    def __call__(self, image: Tensor, target: Tensor, random: Generator) -> tuple[Tensor, Tensor]:
        """Augment a (3, H, W) uint8 image and its (H, W) uint8 target.

        Returns (3, h, w) float32, normalised, and (h, w) uint8.
        """
        image, target = self._scale_and_crop(image, target, random)
        if random.random() < self.flip:
            image, target = image.flip(-1), target.flip(-1)
        image = self._change_colors(image, random)
        return self.pad(self.normalise(image), target)

    def normalise(self, image: Tensor) -> Tensor:
        """(3, H, W) from 0 to 1 to the network's input."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (image - mean) / std

    def pad(self, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Fill up to the window: a normalised image with the mean, which is 0, a target with 255."""
        padding = (0, self.window[1] - target.shape[1], 0, self.window[0] - target.shape[0])
        return F.pad(image, padding).contiguous(), F.pad(target, padding, value=IGNORED).contiguous()

    def _scale_and_crop(self, image: Tensor, target: Tensor, random: Generator) -> tuple[Tensor, Tensor]:
        """What the window shows of the scaled picture, the image from 0 to 1; nothing outside of it is resized."""
        factor = random.uniform(*self.scale)
        parts, size = [], []
        for length, wanted in zip(target.shape, self.window, strict=True):
            taken = min(length, max(1, round(wanted / factor)))
            start = int(random.integers(length - taken, endpoint=True))
            parts.append(slice(start, start + taken))
            size.append(wanted if taken < length else min(wanted, max(1, round(length * factor))))
        image, target = image[:, *parts].float() / 255, target[*parts]
        if tuple(target.shape) != tuple(size):
            image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
            target = F.interpolate(target[None, None], size, mode="nearest-exact")[0, 0]
        return image, target

    def _change_colors(self, image: Tensor, random: Generator) -> Tensor:
        def factor(range_: float) -> float:
            return float(random.uniform(1 - range_, 1 + range_))

        brightness, contrast, saturation = map(factor, (self.brightness, self.contrast, self.saturation))
        turn = float(random.uniform(-self.hue, self.hue)) * 2 * torch.pi
        if not self.changes_colors:
            return image
        from kornia import enhance

        if self.brightness:
            image = enhance.adjust_brightness_accumulative(image, brightness)
        if self.contrast:
            image = enhance.adjust_contrast_with_mean_subtraction(image, contrast)
        if self.saturation:
            image = enhance.adjust_saturation(image, saturation)
        if self.hue:
            image = enhance.adjust_hue(image, turn)
        return image


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """A data set's samples as training sees them: ``augmented[epoch, index]`` is an image and its target.

    The image is (3, h, w) float32, normalised, the target (h, w) uint8. A picture that can't be read, because it was
    damaged or removed after the data set was opened, gives an image of the mean colour and a target of 255 only; a
    warning names it, once in all workers and epochs.

    Args:
        dataset: the pictures.
        augmentation: what is done to them.
        seed: an integer from 0 up.
    """

    def __init__(self, dataset: SegmentationDataset, augmentation: Augmentation, seed: int = 0) -> None:
        _require(seed >= 0, "seed", "an integer from 0 up", seed)
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed
        self._warned = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # by any worker

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        random = np.random.default_rng((self.seed, epoch, index))
        try:
            image, target = self.dataset[index]
        except (ValueError, OSError) as error:
            if not self._warned[index]:
                self._warned[index] = True
                warnings.warn(f"{self.dataset.name(index)} is left out: {error}", RuntimeWarning, stacklevel=2)
            return self.augmentation.pad(torch.zeros(3, 0, 0), torch.zeros(0, 0, dtype=torch.uint8))
        return self.augmentation(image, target, random)


def _require(condition: bool, name: str, allowed: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
