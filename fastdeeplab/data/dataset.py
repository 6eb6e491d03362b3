"""What a data set for semantic segmentation is to the rest of the package."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

IGNORED = 255  # the value of target pixels that count neither in the loss nor in the evaluation
MAX_CLASSES = 255  # targets are uint8, and IGNORED is no class

Pixels = NDArray[np.uint8]


class SegmentationDataset(Protocol):
    """Pictures and their targets, by index.

    ``dataset[index]`` is an image, (3, H, W) uint8 RGB, and its target, (H, W) uint8 class indices with 255 where the
    pixel is ignored. It raises ValueError or OSError, naming the file, if they can't be had. Indexing from several
    threads and processes at once is safe.

    Attributes:
        classes: the names of the K classes.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...
    def name(self, index: int) -> str:
        """What to call the picture in a message, such as its path."""
        ...
