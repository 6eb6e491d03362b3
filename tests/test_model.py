"""ResNetModel against torchvision's DeepLabV3, in one process, and its own contract."""

import itertools

import pytest
import torch
from fastdeeplab.kernels.measure import relative_error
from networks import randomise_batch_norm, small_model, torchvision_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastdeeplab as fdl
from fastdeeplab.model import upsample_logits

SIZES = ((33, 47), (65, 97), (224, 160))


@pytest.fixture(scope="module", params=[50, 101, 152])
def twins(request: pytest.FixtureRequest) -> tuple[fdl.ResNetModel, nn.Module]:
    """Ours and torchvision's with the same weights."""
    torch.manual_seed(0)
    theirs = torchvision_model(request.param)
    ours = fdl.ResNetModel(request.param)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("size", SIZES)
def test_eval_equals_torchvision(twins: tuple[fdl.ResNetModel, nn.Module], size: tuple[int, int]) -> None:
    ours, theirs = (model.eval() for model in twins)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        actual, expected = ours(images), theirs(images)
    assert list(actual) == ["out"]
    assert actual["out"].shape == (2, 21, *size)
    assert relative_error(actual["out"], expected["out"]) < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_training_equals_torchvision(twins: tuple[fdl.ResNetModel, nn.Module], size: tuple[int, int]) -> None:
    ours, theirs = (model.train() for model in twins)
    for module in itertools.chain(ours.modules(), theirs.modules()):
        if isinstance(module, nn.Dropout):
            module.eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        actual, expected = ours(images), theirs(images)
    assert list(actual) == ["out", "aux"]
    for name in actual:
        assert relative_error(actual[name], expected[name]) < 1e-5
    # Both have moved their running statistics alike, so the next comparison starts from the same weights.
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_torchvision_loads_our_state_dict(depth: int) -> None:
    ours = fdl.ResNetModel(depth)
    randomise_batch_norm(ours)
    theirs = torchvision_model(depth)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 33, 47)
    with torch.no_grad():
        assert relative_error(ours.eval()(images)["out"], theirs.eval()(images)["out"]) < 1e-5
        expected = theirs(images)["aux"]
        aux = ours.aux_classifier(ours.backbone(images)[0])
        assert relative_error(upsample_logits(aux, (33, 47)), expected) < 1e-5


@pytest.mark.parametrize(
    ("depth", "aux", "parameters", "entries"),
    [
        (50, True, 42_004_074, 370),
        (50, False, 39_638_869, 362),
        (101, True, 60_996_202, 676),
        (101, False, 58_630_997, 668),
        (152, True, 76_639_850, None),
    ],
)
def test_parameters_and_entries(depth: int, aux: bool, parameters: int, entries: int | None) -> None:
    with torch.device("meta"):
        model = fdl.ResNetModel(depth, aux_head=aux)
        theirs = torchvision_model(depth, aux)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert entries is None or len(model.state_dict()) == entries
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


@pytest.mark.parametrize(("depth", "macs"), [(50, 178.722e9), (101, 258.743e9)])
def test_macs(depth: int, macs: float) -> None:
    """torchvision's published multiply-accumulates count the aux head, which our eval mode leaves out."""
    with torch.device("meta"):
        model, images = fdl.ResNetModel(depth).eval(), torch.empty(1, 3, 520, 520)
    assert model.aux_classifier is not None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        c4, c5 = model.backbone(images)
        model.classifier(c5)
        model.aux_classifier(c4)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, abs=0.0005e9)


@pytest.mark.parametrize("depth", [50, 101, 152])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_every_stage_has_the_shape_of_the_diagram(depth: int, output_stride: int) -> None:
    with torch.device("meta"):
        model, images = fdl.ResNetModel(depth, output_stride=output_stride), torch.empty(2, 3, 256, 384)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: (
                shapes.update({name: tuple(output.shape)}) if isinstance(output, torch.Tensor) else None
            )
        )
    outputs = model(images)
    h, w = 256 // output_stride, 384 // output_stride
    assert shapes["backbone.maxpool"] == (2, 64, 64, 96)
    assert shapes["backbone.layer1"] == (2, 256, 64, 96)
    assert shapes["backbone.layer2"] == (2, 512, 32, 48)
    assert shapes["backbone.layer3"] == (2, 1024, h, w)
    assert shapes["backbone.layer4"] == (2, 2048, h, w)
    assert [shapes[f"classifier.0.convs.{branch}"] for branch in range(5)] == [(2, 256, h, w)] * 5
    assert shapes["classifier.0"] == (2, 256, h, w)
    assert shapes["classifier"] == shapes["aux_classifier"] == (2, 21, h, w)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "out": (2, 21, 256, 384),
        "aux": (2, 21, 256, 384),
    }


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 65), (513, 513)])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_fault_13_odd_sizes(size: tuple[int, int], output_stride: int) -> None:
    model = small_model(output_stride=output_stride).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert model(images)["out"].shape == (2, 21, *size)
        low = model.logits(images)["out"]
        assert low.shape == (2, 21, -(-size[0] // output_stride), -(-size[1] // output_stride))
        assert model.predict(images).shape == (2, *size)


@pytest.mark.parametrize("num_classes", [1, 255, 256, 1000])
def test_fault_12_numbers_of_classes(num_classes: int) -> None:
    model = small_model(num_classes=num_classes).eval()
    mask = model.predict(torch.randn(1, 3, 17, 9))
    assert mask.shape == (1, 17, 9)
    assert 0 <= mask.min() <= mask.max() < num_classes


def test_fault_12_empty_batch() -> None:
    model = small_model().eval()
    images = torch.empty(0, 3, 33, 33)
    assert model(images)["out"].shape == (0, 21, 33, 33)
    assert model.predict(images).shape == (0, 33, 33)


def test_fault_12_picture_of_one_pixel() -> None:
    mask = small_model().eval().predict(torch.randn(1, 3, 1, 1))
    assert mask.shape == (1, 1, 1)


def test_fault_15_batch_of_one_in_training() -> None:
    """A gradient step with one picture, where the pooled branch has one value per channel."""
    model = small_model().train()
    bn = model.classifier[0].convs[4][2]
    statistics = bn.running_mean.clone(), bn.running_var.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    target = torch.randint(21, (1, 65, 65))
    loss = fdl.SegmentationLoss()(model(torch.randn(1, 3, 65, 65)), target)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter).all(), name
    assert not torch.equal(before["classifier.0.convs.4.1.weight"], model.classifier[0].convs[4][1].weight)
    assert torch.equal(bn.running_mean, statistics[0])
    assert torch.equal(bn.running_var, statistics[1])


def test_logits_are_the_dictionary_before_the_upsampling() -> None:
    model = small_model().eval()
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        low, same, full = model.logits(images), model(images, upsample=False), model(images)
    assert low["out"].shape == (2, 21, 8, 6)
    assert torch.equal(low["out"], same["out"])
    upsampled = nn.functional.interpolate(low["out"], size=(64, 48), mode="bilinear", align_corners=False)
    assert torch.equal(upsampled, full["out"])


def test_aux_is_at_low_resolution_too() -> None:
    outputs = small_model().train()(torch.randn(2, 3, 64, 48), upsample=False)
    assert outputs["aux"].shape == (2, 21, 8, 6)


def test_predict_is_the_argmax_of_out() -> None:
    model = small_model().eval()
    images = torch.randn(2, 3, 40, 56)
    mask = model.predict(images)
    assert mask.dtype == torch.int64
    assert not mask.requires_grad
    with torch.no_grad():
        assert torch.equal(mask, model(images)["out"].argmax(dim=1))
    for dtype in (torch.uint8, torch.int16, torch.int32):
        small = model.predict(images, dtype=dtype)
        assert small.dtype == dtype
        assert torch.equal(small.long(), mask)


def test_predict_in_training_mode_raises() -> None:
    with pytest.raises(RuntimeError, match="eval mode"):
        small_model().train().predict(torch.randn(1, 3, 33, 33))


@pytest.mark.parametrize(("dtype", "num_classes"), [(torch.uint8, 257), (torch.float32, 21), (torch.int8, 21)])
def test_predict_refuses_a_dtype(dtype: torch.dtype, num_classes: int) -> None:
    with pytest.raises(ValueError, match="dtype"):
        small_model(num_classes=num_classes).eval().predict(torch.randn(1, 3, 9, 9), dtype=dtype)


def test_first_block_dilation() -> None:
    def dilations(**arguments: object) -> list[int]:
        model = small_model(layers=(1, 1, 2, 3), **arguments)
        blocks = [*model.backbone.layer3, *model.backbone.layer4]
        return [block.conv2.dilation[0] for block in blocks]

    assert dilations() == [1, 2, 2, 4, 4]
    assert dilations(first_block_dilation="full") == [2, 2, 4, 4, 4]
    assert dilations(output_stride=16) == [1, 1, 1, 2, 2]
    assert dilations(output_stride=16, first_block_dilation="full") == [1, 1, 2, 2, 2]
    assert dilations(multi_grid=(1, 2, 4)) == [1, 2, 2, 8, 16]
    assert dilations(multi_grid=(1, 2, 4), first_block_dilation="full") == [2, 2, 4, 8, 16]


def test_atrous_rates() -> None:
    def rates(**arguments: object) -> list[int]:
        return [branch[0].dilation[0] for branch in small_model(**arguments).classifier[0].convs[1:4]]

    assert rates() == [12, 24, 36]
    assert rates(output_stride=16) == [6, 12, 18]
    assert rates(atrous_rates=(3, 5, 7)) == [3, 5, 7]


def test_other_arguments() -> None:
    model = small_model(in_channels=4, dropout=0.3, num_classes=7, layers=(1, 2, 1, 1), width=0.25)
    assert model.eval()(torch.randn(1, 4, 33, 33))["out"].shape == (1, 7, 33, 33)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.3, 0.3]
    assert len(model.backbone.layer2) == 2
    assert model.backbone.out_channels == [64, 128, 256, 512]
    assert small_model(aux_head=False).aux_classifier is None


@pytest.mark.parametrize("width", [0.05, 0.1, 0.33, 1.0, 1.5])
def test_width_scales_every_channel_count(width: float) -> None:
    with torch.device("meta"):
        narrow, full = fdl.ResNetModel(width=width, num_classes=9), fdl.ResNetModel(num_classes=9)
    for name, parameter in full.named_parameters():
        for scaled, channels in zip(narrow.get_parameter(name).shape[:2], parameter.shape[:2], strict=True):
            if channels in (3, 9, 1280):  # the images', the classes', and five branches beside each other
                continue
            assert scaled % 8 == 0
            assert scaled >= 8
            assert scaled == 8 or abs(scaled - width * channels) <= 4


def test_config_rebuilds_the_model() -> None:
    model = small_model(num_classes=5, multi_grid=(2,), output_stride=16, atrous_rates=(1, 2, 3), aux_head=False)
    again = fdl.ResNetModel(**model.config)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 40, 40)
    assert torch.equal(model.eval().predict(images), again.eval().predict(images))


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ({"depth": 34}, "50, 101 or 152"),
        ({"depth": [50]}, "50, 101 or 152"),
        ({"depth": 50.0}, "50, 101 or 152"),
        ({"atrous_rates": (6, 12, 2**70)}, "3 positive integers"),
        ({"width": 1e308}, "positive number up to 64"),
        ({"weights": "imagnet"}, '"torchvision", "imagenet", the path of a file'),
        ({"num_classes": 0}, "positive integer"),
        ({"num_classes": 2.5}, "positive integer"),
        ({"output_stride": 32}, "8 or 16"),
        ({"aux_head": "yes"}, "True or False"),
        ({"atrous_rates": (6, 12)}, "3 positive integers"),
        ({"atrous_rates": (6, 12, 0)}, "3 positive integers"),
        ({"atrous_rates": 6}, "3 positive integers"),
        ({"multi_grid": (1, 2)}, "3 positive integers"),
        ({"multi_grid": (1, 2), "layers": (1, 1, 1, 1)}, "1 positive integers"),
        ({"first_block_dilation": "half"}, '"previous" or "full"'),
        ({"in_channels": -1}, "positive integer"),
        ({"dropout": 1.0}, r"\[0, 1\)"),
        ({"dropout": float("nan")}, r"\[0, 1\)"),
        ({"width": 0}, "positive number"),
        ({"width": float("inf")}, "positive number"),
        ({"layers": (3, 4, 6)}, "4 positive integers"),
        ({"layers": (3, 4, 6, True)}, "4 positive integers"),
        ({"weights": 5}, "path"),
        ({"kernels": "cuda"}, '"auto"'),
    ],
)
def test_a_wrong_argument_is_a_value_error_that_says_what_is_allowed(
    arguments: dict[str, object], allowed: str
) -> None:
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=f"{name} must be .*{allowed}"), torch.device("meta"):
        fdl.ResNetModel(**arguments)  # type: ignore[arg-type]


def test_a_state_dict_of_an_older_torch_loads() -> None:
    """Before torch 0.4.1 batch norm did not count its batches."""
    model = small_model()
    state_dict = small_model().state_dict()
    for key in [key for key in state_dict if key.endswith("num_batches_tracked")]:
        del state_dict[key]
    model.load_state_dict(state_dict)
    assert torch.equal(model.backbone.conv1.weight, state_dict["backbone.conv1.weight"])


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_that_does_not_fit_changes_nothing(strict: bool) -> None:
    model = small_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(fdl.CheckpointError, match=r"classifier\.4\.weight"):
        model.load_state_dict(small_model(num_classes=5).state_dict(), strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_part_of_a_state_dict_loads_where_that_is_asked_for() -> None:
    model, other = small_model(), small_model()
    model.load_state_dict({"backbone.conv1.weight": other.backbone.conv1.weight, "more": torch.ones(1)}, strict=False)
    assert torch.equal(model.backbone.conv1.weight, other.backbone.conv1.weight)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 4, 32, 32), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 3, 0, 32), "from 1 up"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "floating-point"),
    ],
)
def test_wrong_images_are_a_value_error(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model().eval()(images)


def test_layouts_and_dtypes_of_images() -> None:
    model = small_model().eval()
    images = torch.randn(2, 33, 47, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(images.contiguous())["out"]
        torch.testing.assert_close(model(images)["out"], expected)
        assert model.bfloat16()(images.bfloat16())["out"].dtype == torch.bfloat16
