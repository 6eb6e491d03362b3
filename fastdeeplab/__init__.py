"""DeepLabV3 for PyTorch, with handwritten Triton kernels."""

from fastdeeplab.accelerate import AcceleratedModel, accelerate
from fastdeeplab.checkpoint import CheckpointError, load_weights
from fastdeeplab.explanation import explain
from fastdeeplab.loss import SegmentationLoss
from fastdeeplab.model import Kernels, ResNetModel

__all__ = [
    "AcceleratedModel",
    "CheckpointError",
    "Kernels",
    "ResNetModel",
    "SegmentationLoss",
    "accelerate",
    "explain",
    "load_weights",
]
__version__ = "0.1.0"
