"""Other projects' checkpoints: the same logits as their own networks, or a refusal with the reason."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdeeplab.kernels.measure import relative_error
from import_torchvision import torchvision
from networks import randomise_batch_norm, small_model
from torch import Tensor, nn

import fastdeeplab as fdl
from fastdeeplab.convert import CheckpointError, to_torchvision

IMAGE = torch.randn(1, 3, 65, 97, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("output_stride", [8, 16])
def test_segmentation_models_pytorch(output_stride: int, tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    theirs = smp.DeepLabV3("resnet50", encoder_weights=None, classes=5, encoder_output_stride=output_stride).eval()
    randomise_batch_norm(theirs)
    torch.save(theirs.state_dict(), tmp_path / "smp.pth")
    with torch.no_grad():  # their final upsampling is with align_corners=True, so compare what goes into it
        expected = theirs.segmentation_head[0](theirs.decoder(theirs.encoder(IMAGE)))

    loaded = fdl.ResNetModel.load(tmp_path / "smp.pth", output_stride=output_stride)
    assert loaded.config["first_block_dilation"] == "full"
    assert loaded.config["num_classes"] == 5
    assert relative_error(logits(loaded), expected) < 1e-5

    built = fdl.ResNetModel(
        50, 5, output_stride=output_stride, atrous_rates=(12, 24, 36), first_block_dilation="full", aux_head=False
    )
    fdl.load_weights(built, tmp_path / "smp.pth")
    assert relative_error(logits(built.eval()), expected) < 1e-5

    other_rule = fdl.ResNetModel.load(
        tmp_path / "smp.pth", output_stride=output_stride, first_block_dilation="previous"
    )
    assert relative_error(logits(other_rule), expected) > 1e-2


@pytest.mark.parametrize("output_stride", [8, 16])
def test_vainf(output_stride: int, tmp_path: Path) -> None:
    theirs = VainF(output_stride).eval()
    randomise_batch_norm(theirs)
    # A numpy score stands beside the weights in their files, as in the training script's.
    torch.save({"cur_itrs": 9, "model_state": theirs.state_dict(), "best_score": np.float64(0.7)}, tmp_path / "v.pth")
    with torch.no_grad():
        expected = theirs(IMAGE)

    overrides = {} if output_stride == 16 else {"output_stride": 8}
    loaded = fdl.ResNetModel.load(tmp_path / "v.pth", **overrides)
    assert loaded.config["output_stride"] == output_stride
    assert loaded.config["first_block_dilation"] == "previous"
    assert relative_error(logits(loaded), expected) < 1e-5


class VainF(nn.Module):
    """Their network, from torchvision's parts, as they made it from torchvision's: the head is one level deeper."""

    def __init__(self, output_stride: int) -> None:
        super().__init__()
        self.backbone = torchvision.models.resnet50(replace_stride_with_dilation=[False, output_stride == 8, True])
        del self.backbone.fc
        rates = (12, 24, 36) if output_stride == 8 else (6, 12, 18)
        self.classifier = nn.Module()
        self.classifier.classifier = torchvision.models.segmentation.deeplabv3.DeepLabHead(2048, 21, rates)

    def forward(self, x: Tensor) -> Tensor:
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return self.classifier.classifier(net.layer4(net.layer3(net.layer2(net.layer1(x)))))


def logits(model: fdl.ResNetModel) -> Tensor:
    with torch.no_grad():
        return model.logits(IMAGE)["out"]


def renamed(old_to_new: dict[str, str], **arguments: object) -> dict[str, Tensor]:
    """The state dict of a small model without an auxiliary head, under the keys of another project."""
    state_dict = small_model(aux_head=False, **arguments).state_dict()
    return {
        next(new + key.removeprefix(old) for old, new in old_to_new.items() if key.startswith(old)): value
        for key, value in state_dict.items()
    }


SMP = {
    "backbone.": "encoder.",
    "classifier.0.": "decoder.aspp.",
    "classifier.1.": "decoder.conv.",
    "classifier.2.": "decoder.bn.",
    "classifier.4.": "segmentation_head.0.",
}
OLD_SMP = SMP | {"classifier.0.": "decoder.0.", "classifier.1.": "decoder.1.", "classifier.2.": "decoder.2."}
VAINF = {"backbone.": "backbone.", "classifier.": "classifier.classifier."}


@pytest.mark.parametrize(
    ("keys", "project", "settings"),
    [
        (
            SMP,
            "segmentation_models_pytorch",
            {"output_stride": 8, "atrous_rates": [12, 24, 36], "first_block_dilation": "full"},
        ),
        (
            OLD_SMP,
            "segmentation_models_pytorch",
            {"output_stride": 8, "atrous_rates": [12, 24, 36], "first_block_dilation": "full"},
        ),
        (VAINF, "VainF DeepLabV3Plus-Pytorch", {"output_stride": 16, "first_block_dilation": "previous"}),
        ({"": ""}, "torchvision", {}),
    ],
)
def test_every_key_is_renamed(keys: dict[str, str], project: str, settings: dict[str, object]) -> None:
    converted = to_torchvision(renamed(keys))
    expected = small_model(aux_head=False).state_dict()
    assert converted.project == project
    assert converted.settings == settings
    assert {key: value.shape for key, value in converted.state_dict.items()} == {
        key: value.shape for key, value in expected.items()
    }


def test_imagenet_resnet_is_the_backbone() -> None:
    theirs = torchvision.models.resnet50().state_dict()
    converted = to_torchvision(theirs)
    assert converted.settings == {}
    assert converted.state_dict.keys() == fdl.ResNetModel(50).backbone.state_dict(prefix="backbone.").keys()
    for key, value in converted.state_dict.items():
        assert value is theirs[key.removeprefix("backbone.")]


CONV = torch.ones(8, 8, 3, 3)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (["backbone.conv1.weight", "decode_head.image_pool.1.conv.weight"], "mmsegmentation's head is another network"),
        (["backbone.stem.conv1.weight", "sem_seg_head.predictor.weight"], "Detectron2's DeepLab is another network"),
        (["backbone.conv1_1._conv.weight", "head.aspp.project._conv.weight"], "PaddleSeg's DeepLabV3 is another"),
        (["resnet_v1_50/conv1/weights"], "TensorFlow's DeepLab is another network"),
        (["encoder.conv1.weight", "decoder.aspp.0.convs.0.0.weight"], r"DeepLabV3\+ has a decoder"),
        (["backbone.conv1.weight", "classifier.project.0.weight"], r"DeepLabV3\+ has a decoder"),
        (["encoder.conv1.weight", "decoder.aspp.convs.1.0.0.weight"], "separable convolutions in ASPP"),
        (["backbone.conv1.weight", "classifier.classifier.0.convs.1.0.body.0.weight"], "separable convolutions"),
        (["backbone.conv1.weight", "classifier.0.weight", "classifier.4.weight"], "an FCN head, not ASPP"),
        (["encoder.conv1.weight", "classification_head.3.weight"], "a classification head"),
        (["encoder.model.conv1.weight", "decoder.aspp.convs.0.0.weight"], "an encoder of timm"),
        (["conv1.0.weight", "layer1.0.conv1.weight"], "deep stem"),
        (["encoder.features.0.weight", "decoder.aspp.convs.0.0.weight"], "has no counterpart|not a plain ResNet"),
        (["encoder.conv1.weight", "decoder.blocks.0.conv1.0.weight"], "decoder.blocks.0.conv1.0.weight has no counter"),
        (["encoder.layer0.conv1.weight", "encoder.layer1.0.conv1.weight"], "not a plain ResNet"),
        (["backbone.high_level_features.4.conv.0.0.weight", "classifier.classifier.1.weight"], "not a plain ResNet"),
        (["conv1.weight", "features.denseblock1.weight"], "features.denseblock1.weight has no counterpart"),
        (["encoder.conv1.weight", "encoder.layer1.0.conv1.weight", "encoder.layer1.0.conv2.weight"], "basic blocks"),
    ],
)
def test_fault_16_network_of_another_project(keys: list[str], reason: str) -> None:
    with pytest.raises(CheckpointError, match=f"can't be converted: .*{reason}"):
        to_torchvision(OrderedDict.fromkeys(keys, CONV))


@pytest.mark.parametrize(
    ("encoder", "arguments", "reason"),
    [
        ("resnet34", {}, "basic blocks"),
        ("resnext50_32x4d", {}, "grouped convolutions"),
        ("se_resnet50", {}, "not a plain ResNet"),
        ("mobilenet_v2", {}, "not a plain ResNet"),
        ("resnet50", {"decoder_aspp_separable": True}, "separable"),
        ("resnet50", {"aux_params": {"classes": 3}}, "classification head"),
        ("resnet50", {"decoder_channels": 128}, "another architecture"),
        ("resnet50", {"encoder_depth": 4}, "another architecture"),
    ],
)
def test_fault_16_other_networks_of_segmentation_models_pytorch(
    encoder: str, arguments: dict[str, object], reason: str, tmp_path: Path
) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    with torch.device("meta"):
        theirs = smp.DeepLabV3(encoder, encoder_weights=None, **arguments)
    # One number stands for all of a tensor, so that the file is small.
    state_dict = {
        key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in theirs.state_dict().items()
    }
    torch.save(state_dict, tmp_path / "smp.pth")
    with pytest.raises(CheckpointError, match=reason):
        fdl.ResNetModel.load(tmp_path / "smp.pth")
