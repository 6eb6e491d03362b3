"""Import torchvision, also where its compiled operators can't be registered.

Its wheel on PyPI is built for CUDA: beside a CPU build of torch the import fails, because the operators that it
describes to torch.compile do not exist. Their schemas alone make the rest of it usable. Beside a CUDA build nothing is
defined.
"""

import sys

import torch

try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    SCHEMAS = torch.library.Library("torchvision", "DEF")  # they live as long as this object does
    SCHEMAS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    SCHEMAS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
