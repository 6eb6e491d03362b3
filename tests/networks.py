"""Networks to test with: small ones of ours, torchvision's as the peer."""

import torch
from import_torchvision import torchvision
from torch import nn

import fastdeeplab as fdl


def small_model(**arguments: object) -> fdl.ResNetModel:
    """A ResNetModel with one narrow block per stage, for speed."""
    return fdl.ResNetModel(**({"width": 0.125, "layers": (1, 1, 1, 1)} | arguments))  # type: ignore[arg-type]


def torchvision_model(depth: int, aux: bool = True) -> nn.Module:
    """torchvision's DeepLabV3 (for ResNet-152 by the builder it keeps to itself), random weights and statistics."""
    resnet, deeplabv3 = torchvision.models.resnet, torchvision.models.segmentation.deeplabv3
    build = {50: resnet.resnet50, 101: resnet.resnet101, 152: resnet.resnet152}[depth]
    backbone = build(replace_stride_with_dilation=[False, True, True])
    model = deeplabv3._deeplabv3_resnet(backbone, 21, aux)
    randomise_batch_norm(model)
    return model.to(memory_format=torch.channels_last)  # as ours is, so that both add up in the same order


def randomise_batch_norm(model: nn.Module) -> None:
    """Give every BN statistics and an affine map that differ from the identity, as a trained network has."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
