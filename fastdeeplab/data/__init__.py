"""Data sets for semantic segmentation: open them by name, check them, augment them. Needs Pillow.

``open_dataset`` gives whole pictures, for evaluation; ``Augmented`` gives their random crops, for training.
"""

from fastdeeplab.data.augmentation import Augmentation, Augmented
from fastdeeplab.data.dataset import IGNORED, SegmentationDataset
from fastdeeplab.data.opening import DATASETS, Problem, check_dataset, open_dataset
from fastdeeplab.data.pairs import PairedFiles
from fastdeeplab.data.shapes import Shapes

__all__ = [
    "DATASETS",
    "IGNORED",
    "Augmentation",
    "Augmented",
    "PairedFiles",
    "Problem",
    "SegmentationDataset",
    "Shapes",
    "check_dataset",
    "open_dataset",
]
