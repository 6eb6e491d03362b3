"""DeepLabV3 for PyTorch, made fast by handwritten Triton kernels."""

from fastdeeplab.checkpoint import CheckpointError, load_weights
from fastdeeplab.loss import SegmentationLoss
from fastdeeplab.model import ResNetModel

__all__ = ["CheckpointError", "ResNetModel", "SegmentationLoss", "load_weights"]
__version__ = "0.1.0"
