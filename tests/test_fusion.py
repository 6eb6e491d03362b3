"""The model on its live parameters: convolution and batch norm as one call, wherever PyTorch's layers need not run."""

import copy
from collections.abc import Callable

import pytest
import torch
from fastdeeplab.kernels.measure import relative_error
from networks import randomise_batch_norm, small_model
from torch import Tensor, nn

import fastdeeplab as fdl
from fastdeeplab import kernels
from fastdeeplab.fusion import affine_of_batch_norms, conv_bn_relu


def trained(**arguments: object) -> fdl.ResNetModel:
    model = small_model(**arguments)
    randomise_batch_norm(model)
    return model.eval()


def layer_by_layer(model: fdl.ResNetModel, images: Tensor) -> Tensor:
    """With gradients enabled PyTorch's own layers run."""
    with torch.enable_grad():  # of a copy, whose tensors are none of inference mode
        return copy.deepcopy(model).logits(images)["out"].detach()


@torch.no_grad()
def fused(model: fdl.ResNetModel, images: Tensor) -> Tensor:
    assert affine_of_batch_norms(model) is not None
    return model.logits(images)["out"]


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("size", [(33, 47), (1, 1), (64, 8)], ids=str)
def test_the_same_logits_as_layer_by_layer(size: tuple[int, int], output_stride: int) -> None:
    model, images = trained(output_stride=output_stride), torch.randn(2, 3, *size)
    assert relative_error(fused(model, images), layer_by_layer(model, images)) < 1e-5


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("flag", ["conv_bn_relu", "aspp", "upsample_argmax", "all"])
def test_the_kernels_run_the_network(flag: str, device: torch.device) -> None:
    """In the interpreter, narrow: every layer but the stem, the pooled branch and the classifier."""
    flags = "triton" if flag == "all" else fdl.Kernels(**(dict.fromkeys(FLAGS, "torch") | {flag: "triton"}))
    model, images = trained(kernels=flags).to(device), torch.randn(1, 3, 33, 40, device=device)
    exact = layer_by_layer(model.double(), images.double())
    assert relative_error(fused(model.float(), images), exact) < 1e-5
    top = model.upsample_argmax(exact.float(), (33, 40))
    assert (model.predict(images) == top).float().mean() > 0.99


FLAGS = ("conv_bn_relu", "aspp", "upsample_argmax", "upsample_cross_entropy")


def test_every_layer_asks_for_what_its_flag_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[tuple[str, str]] = set()

    def choose(function: str, impl: str, *_: object) -> kernels.Choice:
        asked.add((function, impl))
        return kernels.Choice("torch", "for this test")

    monkeypatch.setattr(kernels, "choose", choose)
    model = trained(kernels=fdl.Kernels(conv_bn_relu="triton", aspp="auto"))
    fused(model, torch.randn(1, 3, 17, 17))
    assert asked == {
        ("conv_bn_relu", "triton"),
        ("conv_bn_relu", "auto"),  # the stem, which has no kernel
        ("conv_bn_relu", "torch"),  # the pooled branch
        ("aspp_branches", "auto"),
        ("aspp_projection", "auto"),
    }


def change_data(model: fdl.ResNetModel) -> None:
    model.backbone.layer1[0].bn2.weight.data.mul_(3)
    model.classifier[0].convs[1][0].weight.data.neg_()


def load_others(model: fdl.ResNetModel) -> None:
    model.load_state_dict(trained().state_dict())


def assign_others(model: fdl.ResNetModel) -> None:
    """In another memory format than the model's own weights."""
    others = {name: value.contiguous() for name, value in trained().state_dict().items()}
    model.load_state_dict(others, assign=True)
    assert model.backbone.layer1[0].conv2.weight.data_ptr() == others["backbone.layer1.0.conv2.weight"].data_ptr()


def step(model: fdl.ResNetModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(torch.randn(2, 3, 17, 17))["out"].square().mean().backward()
    optimizer.step()
    model.eval()


def inference_tensors(model: fdl.ResNetModel) -> None:
    with torch.inference_mode():
        model.backbone.bn1.running_mean = torch.ones_like(model.backbone.bn1.running_mean)


@pytest.mark.parametrize("change", [change_data, load_others, assign_others, step, inference_tensors])
def test_no_weight_is_ever_stale(change: Callable[[fdl.ResNetModel], None]) -> None:
    model, images = trained(), torch.randn(1, 3, 33, 33)
    before = fused(model, images)
    change(model)
    after = fused(model, images)
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, layer_by_layer(model, images)) < 1e-5


def test_other_dtypes_follow() -> None:
    model, images = trained(), torch.randn(1, 3, 33, 33)
    exact = fused(model, images)
    assert relative_error(fused(model.bfloat16(), images.bfloat16()), exact) < 0.05
    assert fused(model, images.bfloat16()).dtype == torch.bfloat16


def test_no_weight_is_stale_after_half() -> None:
    """The logits are those of the rounded weights, of others written into them, and of fp32 again."""
    model, images = trained(), torch.randn(1, 3, 33, 33)
    fused(model, images)
    found = []
    for change in (model.half, lambda: change_data(model)):
        change()
        actual = fused(model, images.half())
        assert actual.dtype == torch.float16
        found.append(layer_by_layer(copy.deepcopy(model).double(), images.half().double()))
        assert relative_error(actual, found[-1]) < 0.01
    assert relative_error(found[0], found[1]) > 0.1
    model.float()
    assert relative_error(fused(model, images.half().float()), found[-1]) < 1e-5


def test_weights_of_inference_mode_that_were_cast_outside() -> None:
    """PyTorch lets nobody take views of these parameters."""
    images = torch.randn(1, 3, 33, 33)
    with torch.inference_mode():
        model = trained()
        fast = fdl.accelerate(model)
        expected = model.logits(images)["out"]
    for cast in (model, fast):
        with pytest.raises(RuntimeError, match="do not track version counter"):
            cast.double().float().classifier[0].project[0].weight.view(-1)
        with torch.no_grad():
            assert relative_error(cast.logits(images)["out"], expected) < 1e-5


def test_where_pytorchs_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    assert affine_of_batch_norms(model) is None  # gradients are enabled
    with torch.no_grad():
        assert affine_of_batch_norms(model) is not None
        assert affine_of_batch_norms(model.train()) is None
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            assert affine_of_batch_norms(model) is None
        model.backbone.bn1.train()
        assert affine_of_batch_norms(model) is None
        model.eval()
        for layer in (model.backbone.layer1[0].conv1, model.classifier[0].project[3]):
            handle = layer.register_forward_hook(lambda *_: None)
            assert affine_of_batch_norms(model) is None
            handle.remove()
        assert affine_of_batch_norms(model) is not None

        class Other(nn.Conv2d):
            pass

        for conv in (
            Other(32, 32, 3, padding=1),
            nn.Conv2d(32, 32, 3, padding=1, groups=2),
            nn.Conv2d(32, 32, 3, padding="same"),
            nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
            nn.Conv2d(32, 32, (3, 1), padding=(1, 0)),
        ):
            model.classifier[1] = conv
            assert affine_of_batch_norms(model) is None


def test_batch_statistics_need_pytorchs_layers() -> None:
    model = trained()
    model.backbone.bn1 = nn.BatchNorm2d(8, track_running_stats=False).eval()
    with torch.no_grad():
        assert affine_of_batch_norms(model) is None


@pytest.mark.parametrize(
    "norm",
    [
        pytest.param(nn.BatchNorm2d(8), id="as new"),
        pytest.param(nn.BatchNorm2d(8, affine=False), id="no affine map"),
        pytest.param(nn.BatchNorm2d(8, eps=0.1), id="another epsilon"),
    ],
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_folding(norm: nn.BatchNorm2d, bias: bool) -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1, bias=bias)
    norm.running_var.uniform_(0.5, 1.5)
    norm.running_var[0] = 1e-30
    norm.running_mean.normal_()
    if norm.affine:
        nn.init.uniform_(norm.weight)
        norm.weight.data[1] = 0
        nn.init.normal_(norm.bias)
    both, x = nn.Sequential(conv, norm).eval(), torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        affine = affine_of_batch_norms(both)
        assert affine is not None
        actual = conv_bn_relu(conv, norm, x, affine, relu=False)
        assert relative_error(actual, both.double()(x.double())) < 1e-5


def test_weights_stay_channels_last() -> None:
    model = trained()
    model.load_state_dict({key: value.contiguous() for key, value in trained().state_dict().items()})
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_containers_that_are_hooked_or_replaced_are_called() -> None:
    """The block or ASPP that holds them runs layer by layer then."""
    model, images = trained(), torch.randn(1, 3, 33, 33)
    before = fused(model, images)
    for name in (
        "backbone.layer2.0.downsample",
        "classifier.0.convs.1",
        "classifier.0.convs.4",
        "classifier.0.project",
    ):
        handle = model.get_submodule(name).register_forward_hook(lambda module, given, result: 2 * result)
        doubled = fused(model, images)
        assert relative_error(doubled, before) > 1e-3, name
        assert relative_error(doubled, layer_by_layer(model, images)) < 1e-5, name
        handle.remove()

    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    kept = model.classifier[0].convs[1]
    model.classifier[0].convs[1] = Doubled(*kept)
    doubled = fused(model, images)
    assert relative_error(doubled, before) > 1e-3
    assert relative_error(doubled, layer_by_layer(model, images)) < 1e-5
    model.classifier[0].convs[1] = kept
    fast = fdl.accelerate(model)
    fast.classifier[0].convs[1].register_forward_hook(lambda module, given, result: 0 * result)
    assert relative_error(fast.logits(images)["out"], before) > 1e-3
    model.classifier[0].project[3] = nn.Sigmoid()
    model.backbone.layer2[0].downsample.insert(0, nn.AvgPool2d(1))
    changed = fused(model, images)
    assert relative_error(changed, before) > 1e-3
    assert relative_error(changed, layer_by_layer(model, images)) < 1e-5


def test_hooks_on_blocks_and_stages_fire() -> None:
    model, seen = trained(), []
    for name in ("backbone", "backbone.layer4", "backbone.layer1.0", "classifier", "classifier.0"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    fused(model, torch.randn(1, 3, 17, 17))
    assert seen == ["backbone.layer1.0", "backbone.layer4", "backbone", "classifier.0", "classifier"]
