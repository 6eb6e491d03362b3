"""A frozen copy of a model: the same masks, from folded batch norms, and an original that nothing has touched."""

import copy
import io
import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_same_masks
from fastdeeplab.kernels.measure import relative_error
from networks import randomise_batch_norm, small_model, torchvision_model
from torch import Tensor, nn
from torch.nn.utils import prune

import fastdeeplab as fdl
from fastdeeplab import kernels
from fastdeeplab.accelerate import _fold
from fastdeeplab.backbone import Bottleneck
from fastdeeplab.fusion import FoldedBatchNorm

FLAGS = ("conv_bn_relu", "aspp", "upsample_argmax", "upsample_cross_entropy")


def trained(**arguments: object) -> fdl.ResNetModel:
    model = small_model(**arguments)
    randomise_batch_norm(model)
    return model.eval()


def exact_logits(model: nn.Module, images: Tensor) -> Tensor:
    """By the original in fp64, layer by layer."""
    out: Tensor = copy.deepcopy(model).double().eval()(images.double())["out"].detach()
    return out


@pytest.mark.parametrize("depth", [50, 101])
@torch.no_grad()
def test_torchvisions_model(depth: int) -> None:
    model, images = torchvision_model(depth).eval(), torch.randn(2, 3, 65, 97)
    fast = fdl.accelerate(model)
    expected = model(images)["out"]
    assert relative_error(fast(images)["out"], expected) < 1e-4
    assert_same_masks(fast.predict(images), expected)
    assert fast.config["depth"] == depth
    assert not hasattr(fast, "aux_classifier") or fast.aux_classifier is None


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_own_models(dtype: torch.dtype, output_stride: int) -> None:
    """No further from fp64 than the same model's own layers in the same dtype, but for a rounding."""
    model, images = trained(output_stride=output_stride, multi_grid=(2,)), torch.randn(2, 3, 49, 33)
    exact = exact_logits(model, images)
    fast = fdl.accelerate(model, dtype=dtype)
    with torch.no_grad():
        plain = copy.deepcopy(model).to(dtype)(images.to(dtype))["out"]
    out = fast(images)["out"]
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert relative_error(out, exact) <= relative_error(plain, exact) + 2 * torch.finfo(dtype).eps
    assert fast.logits(images)["out"].shape == (2, 21, -(-49 // output_stride), -(-33 // output_stride))
    assert fast.predict(images, dtype=torch.uint8).dtype == torch.uint8


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("values", list(product(("torch", "triton"), repeat=3)), ids="-".join)
def test_every_combination_of_flags(values: tuple[str, ...], device: torch.device) -> None:
    """The fourth flag is the loss's: it changes nothing here. In the interpreter the kernels run the narrow network."""
    model, images = trained().to(device), torch.randn(1, 3, 33, 40, device=device)
    flags = fdl.Kernels(**dict(zip(FLAGS, values, strict=False)))
    fast = fdl.accelerate(model, kernels=flags)
    exact = exact_logits(model, images)
    assert relative_error(fast(images)["out"], exact) < 1e-4
    assert_same_masks(fast.predict(images), exact)


def test_all_kernels_run_the_network_in_half_precision(device: torch.device) -> None:
    """Among them the classifier, with 21 classes padded to 24 that nobody sees."""
    model, images = trained().to(device), torch.randn(1, 3, 33, 40, device=device)
    with kernels.recording() as layers:
        fast = fdl.accelerate(model, kernels="triton", dtype=torch.float16)
        out = fast(images)["out"]
    ran = [layer.kernel for layer, decision in layers if decision.impl == "torch"]
    assert ran == [(7, 7), (1, 1)]  # the stem, and the pooled branch of one pixel
    assert layers[-1][0].C_out == 24
    assert out.shape == (1, 21, 33, 40)
    assert relative_error(out, exact_logits(model, images)) < 0.01


def with_gamma_zero(model: fdl.ResNetModel) -> None:
    nn.init.zeros_(model.backbone.layer2[0].bn2.weight)
    nn.init.zeros_(model.classifier[0].convs[1][1].weight)


def with_tiny_variances(model: fdl.ResNetModel) -> None:
    """Such a channel's folded weights are 300 times as large; in training its convolution gave nearly a constant."""
    for block in (model.backbone.layer1[0], model.backbone.layer3[0]):
        block.bn1.running_var[::2] = 1e-12
        block.conv1.weight.data[::2] *= 1e-4
        block.bn1.running_mean[::2] = 0


def without_affine(model: fdl.ResNetModel) -> None:
    for name in ("weight", "bias"):
        setattr(model.backbone.layer2[0].bn1, name, None)
        setattr(model.classifier[2], name, None)


def with_bias(model: fdl.ResNetModel) -> None:
    for conv in (model.backbone.conv1, model.classifier[0].convs[2][0], model.backbone.layer4[0].conv2):
        conv.bias = nn.Parameter(torch.randn(conv.out_channels))


def with_other_eps(model: fdl.ResNetModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("change", [with_gamma_zero, with_tiny_variances, without_affine, with_bias, with_other_eps])
def test_folding_survives(change: Callable[[fdl.ResNetModel], None], dtype: torch.dtype) -> None:
    model, images = trained(), torch.randn(1, 3, 33, 33)
    change(model)
    out = fdl.accelerate(model, dtype=dtype)(images)["out"]
    assert out.isfinite().all()
    assert relative_error(out, exact_logits(model, images)) < {torch.float32: 1e-5, torch.float16: 0.01}[dtype]


@pytest.mark.parametrize("factor", [1e-8, 1e8])
@pytest.mark.parametrize("layer", ["backbone.layer2.0.bn1", "classifier.0.convs.2.1", "classifier.0.project.1"])
def test_weight_and_gamma_may_be_extreme_where_their_product_is_not(layer: str, factor: float) -> None:
    model, images = trained(), torch.randn(1, 3, 33, 33)
    norm = model.get_submodule(layer)
    model.get_submodule(layer.replace("bn", "conv") if "bn" in layer else f"{layer[:-1]}0").weight.data /= factor
    norm.running_mean /= factor
    norm.running_var /= factor**2
    norm.eps /= factor**2
    fast = fdl.accelerate(model, dtype=torch.float16)
    assert relative_error(fast(images)["out"], exact_logits(model, images)) < 0.01


@pytest.mark.parametrize("factor", [1e-12, 1e-5, 1.0, 1e8])
def test_folded_weights_that_half_precision_can_not_hold_keep_a_scale(factor: float) -> None:
    conv, scale = nn.Conv2d(8, 6, 3), torch.rand(6, dtype=torch.float64) + 0.5
    scale[:3] *= factor
    scale[5] = 0
    weight, rest = _fold(conv, scale, torch.zeros(6, dtype=torch.float64), torch.float16)
    assert (rest.scale is None) == (factor == 1)
    kept = 1.0 if rest.scale is None else rest.scale.double()[:, None, None, None]
    assert torch.allclose(weight.double() * kept, conv.weight.double() * scale[:, None, None, None], rtol=2**-11)
    folded, rest = _fold(conv, scale, torch.zeros(6, dtype=torch.float64), torch.bfloat16)
    assert rest.scale is None
    assert folded.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_class_with_tiny_weights(dtype: torch.dtype) -> None:
    """As weight decay leaves one that no picture has: the classifier has no scale that could be kept."""
    model, images = trained(), torch.randn(1, 3, 33, 33)
    model.classifier[4].weight.data[7] *= 1e-3
    model.classifier[4].weight.data[9] *= 1e-9
    fast = fdl.accelerate(model, dtype=dtype)
    assert relative_error(fast(images)["out"], exact_logits(model, images)) < {torch.float32: 1e-5}.get(dtype, 0.01)


def test_kernels_and_layers_take_scales_that_were_kept(device: torch.device) -> None:
    model, images = trained().to(device), torch.randn(1, 3, 33, 33, device=device)
    for name in ("backbone.layer1.0.bn2", "backbone.layer2.0.downsample.1", "classifier.0.convs.1.1"):
        model.get_submodule(name).weight.data[:4] *= 1e-8
    exact = exact_logits(model, images)
    for flag in ("triton", "torch"):
        fast = fdl.accelerate(model, kernels=flag, dtype=torch.float16)
        assert fast.backbone.layer1[0].bn2.scale is not None
        assert fast.backbone.layer1[0].bn1.scale is None
        assert relative_error(fast(images)["out"], exact) < 0.01
    with torch.no_grad():
        c5 = fast.backbone(images.half())[1]
        assert relative_error(fast.classifier(c5)[:, :21], model.classifier(c5.float())) < 0.01


def test_a_frozen_batch_norm_of_another_class() -> None:
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, norm: nn.BatchNorm2d) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, getattr(norm, name).detach())
            self.eps = norm.eps

    model, images = trained(), torch.randn(1, 3, 33, 33)
    exact = exact_logits(model, images)
    model.backbone.bn1 = FrozenBatchNorm2d(model.backbone.bn1)
    model.classifier[2] = nn.SyncBatchNorm(32).eval()
    fast = fdl.accelerate(model)
    assert relative_error(fast(images)["out"], exact) > 1e-3  # the other one is new
    model = trained()
    exact = exact_logits(model, images)
    model.backbone.bn1 = FrozenBatchNorm2d(model.backbone.bn1)
    assert relative_error(fdl.accelerate(model)(images)["out"], exact) < 1e-5


def test_the_original_is_untouched() -> None:
    model = trained().train()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    fast = fdl.accelerate(model, dtype=torch.bfloat16)
    fast(torch.randn(1, 3, 33, 33))
    assert model.training
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert not own & {tensor.data_ptr() for tensor in (*fast.parameters(), *fast.buffers())}
    images = torch.randn(1, 3, 33, 33)
    out = fast(images)["out"]
    model.backbone.conv1.weight.data.zero_()
    assert torch.equal(fast(images)["out"], out)


def test_copies_pickles_and_files(tmp_path: Path) -> None:
    fast, images = fdl.accelerate(trained()), torch.randn(1, 3, 33, 33)
    out = fast(images)["out"]
    assert torch.equal(copy.deepcopy(fast)(images)["out"], out)
    assert torch.equal(pickle.loads(pickle.dumps(fast))(images)["out"], out)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(images)["out"], out)
    with pytest.raises(RuntimeError, match="save the model this one was made from"):
        fast.save(tmp_path / "model.safetensors")


def test_its_state_dict_is_for_weights_of_any_size() -> None:
    """Some keep scales, which others do not have."""
    images = torch.randn(1, 3, 33, 33)
    plain, tiny = trained(), trained()
    with torch.no_grad():
        tiny.backbone.layer2[0].bn1.weight.mul_(1e-7)
    fast, scaled = (fdl.accelerate(model, dtype=torch.float16) for model in (plain, tiny))
    assert len(scaled.state_dict()) > len(fast.state_dict())
    expected = [model(images)["out"] for model in (fast, scaled)]
    states = [copy.deepcopy(model.state_dict()) for model in (fast, scaled)]
    with pytest.raises(fdl.CheckpointError):
        fast.load_state_dict(states[1] | {"other": torch.ones(3)})
    assert fast.state_dict().keys() == states[0].keys()
    for model, state, logits in ((fast, states[1], expected[1]), (scaled, states[0], expected[0])):
        model.load_state_dict(state)
        assert relative_error(model(images)["out"], logits) < 1e-3


def test_its_state_dict_is_for_its_like() -> None:
    model, images = trained(), torch.randn(1, 3, 33, 33)
    fast, other = fdl.accelerate(model), fdl.accelerate(trained())
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(images)["out"], fast(images)["out"])
    with pytest.raises(fdl.CheckpointError):
        fast.load_state_dict(model.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_padded_classes_are_nowhere_to_be_seen(assign: bool) -> None:
    """21 and 24 classes are computed as 24, and fit only their like."""
    fast, images = fdl.accelerate(trained()), torch.randn(1, 3, 33, 33)
    state, seen = fast.state_dict(), []
    assert state["classifier.4.weight"].shape[0] == state["classifier.4.bias"].shape[0] == 21
    fast.classifier.register_forward_hook(lambda module, given, result: seen.append(result.shape[1]))
    fast(images)
    assert seen == [21]
    others = {classes: fdl.accelerate(trained(num_classes=classes)) for classes in (20, 21, 24)}
    for classes in (20, 24):
        before = others[classes](images)["out"]
        with pytest.raises(fdl.CheckpointError, match=f"the checkpoint has 21 classes and the model {classes}"):
            others[classes].load_state_dict(state, assign=assign)
        assert torch.equal(others[classes](images)["out"], before)
    others[21].load_state_dict(state, assign=assign)
    assert torch.equal(others[21](images)["out"], fast(images)["out"])
    assert others[21].classifier[4].weight.shape[0] == 24


def test_casting_rounds_once_more() -> None:
    model, images = trained(), torch.randn(1, 3, 33, 33)
    exact = exact_logits(model, images)
    fast = fdl.accelerate(model)
    shift = fast.backbone.bn1.shift.clone()
    assert fast.half()(images)["out"].dtype == torch.float16
    assert torch.equal(fast.backbone.bn1.shift, shift)
    assert relative_error(fast(images)["out"], exact) < 0.01
    assert fast.to("cpu", torch.float32)(images.double())["out"].dtype == torch.float32


def test_it_stays_in_eval_mode_and_without_gradients() -> None:
    fast, images = fdl.accelerate(trained().train()), torch.randn(1, 3, 33, 33)
    assert not any(module.training for module in fast.modules())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    with pytest.raises(RuntimeError, match="frozen"):
        fast.train()
    assert fast.eval() is fast
    with torch.enable_grad():
        assert not fast(images)["out"].requires_grad
        with pytest.raises(RuntimeError, match="no gradients"):
            fast(images.clone().requires_grad_())
    with torch.no_grad():
        fast(images.clone().requires_grad_())


def test_autocast_changes_nothing() -> None:
    fast, images = fdl.accelerate(trained()), torch.randn(1, 3, 33, 33)
    out = fast(images)["out"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(images)["out"], out)


def test_its_parts_run_layer_by_layer_too() -> None:
    """Called by hand, without what the model passes down."""
    model, images = trained(), torch.randn(1, 3, 33, 33)
    fast = fdl.accelerate(model)
    assert isinstance(fast.backbone.bn1, FoldedBatchNorm)
    with torch.no_grad():
        c4, c5 = fast.backbone(images)
        expected = model.backbone(images)
        assert relative_error((c4, c5), expected) < 1e-5
        assert relative_error(fast.classifier(c5), model.classifier(c5)) < 1e-5


def test_it_says_what_it_is() -> None:
    fast = fdl.accelerate(trained(), kernels=fdl.Kernels(aspp="torch"), dtype=torch.bfloat16)
    text = repr(fast)
    assert text.startswith("AcceleratedModel(")
    first = text.splitlines()[1].strip()
    assert first == ("frozen, torch.bfloat16 weights, torch.float32 shifts, 21 classes, auxiliary head dropped")
    assert "aspp='torch'" in text
    assert "BatchNorm2d" not in text
    assert "FoldedBatchNorm(8)" in text
    assert "24, kernel_size=(1, 1), stride=(1, 1), of which 21 are classes)" in text
    rows = [line.split()[:2] for line in fdl.explain(fast).splitlines()]
    assert ["classifier.0", "aspp_branches"] in rows
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert repr(copied) == text
    assert "frozen, torch.float16 weights, torch.float32 shifts" in repr(fast.half())
    without = repr(fdl.accelerate(trained(num_classes=16, aux_head=False)))
    assert "shifts, 16 classes\n" in without


def without_statistics(model: fdl.ResNetModel) -> None:
    model.backbone.layer1[0].bn1 = nn.BatchNorm2d(8, track_running_stats=False)


def with_group_norm(model: fdl.ResNetModel) -> None:
    model.backbone.layer1[0].bn1 = nn.GroupNorm(2, 8)


def with_another_activation(model: fdl.ResNetModel) -> None:
    model.backbone.layer2[0].relu = nn.SiLU()


def with_a_part_more(model: fdl.ResNetModel) -> None:
    model.backbone.layer2[0].attention = nn.Conv2d(32, 32, 1)


def with_groups(model: fdl.ResNetModel) -> None:
    model.backbone.layer1[0].conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)


def with_a_wider_layer(model: fdl.ResNetModel) -> None:
    model.backbone.layer1[0].conv2 = nn.Conv2d(8, 16, 3, padding=1)


def with_another_pool(model: fdl.ResNetModel) -> None:
    model.backbone.maxpool = nn.MaxPool2d(2, 2)


def with_a_layer_more(model: fdl.ResNetModel) -> None:
    model.classifier.append(nn.Sigmoid())


def with_output_stride_32(model: fdl.ResNetModel) -> None:
    for stage in (model.backbone.layer3, model.backbone.layer4):
        stage[0].conv2.stride = stage[0].downsample[0].stride = (2, 2)


def with_another_dropout(model: fdl.ResNetModel) -> None:
    model.classifier[0].project[3] = nn.Sigmoid()


def with_a_hook(model: fdl.ResNetModel) -> None:
    model.backbone.layer1[0].register_forward_hook(lambda module, given, result: 2 * result)


def with_a_weight_of_a_hook(model: fdl.ResNetModel) -> None:
    prune.random_unstructured(model.backbone.layer1[0].conv1, "weight", 0.5)


def with_a_forward_of_its_own(name: str, *, of_class: bool = True) -> Callable[[fdl.ResNetModel], None]:
    def change(model: fdl.ResNetModel) -> None:
        part = model.get_submodule(name)
        kind = type(part)

        class Doubled(kind):  # type: ignore[misc, valid-type]
            def forward(self, *arguments: Any) -> Any:
                return 2 * super().forward(*arguments)

        if of_class:
            part.__class__ = Doubled
        else:
            part.forward = lambda *arguments: 2 * kind.forward(part, *arguments)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_another_dropout, "classifier.0.project.3 is a Sigmoid, not a Dropout"),
        (with_a_hook, "backbone.layer1.0 has a forward hook"),
        (with_a_weight_of_a_hook, "backbone.layer1.0.conv1 has a forward hook"),
        *(
            (
                with_a_forward_of_its_own(name, of_class=of_class),
                f"{name or 'model'} is a .* whose forward is not known",
            )
            for name in ("", "backbone.layer1.0", "backbone.layer1", "backbone.layer1.0.bn1", "classifier.0.convs.1")
            for of_class in (True, False)
        ),
        (without_statistics, "backbone.layer1.0.bn1 has no running statistics"),
        (with_group_norm, "backbone.layer1.0.bn1 is a GroupNorm"),
        (with_another_activation, "backbone.layer2.0.relu is a SiLU"),
        (with_a_part_more, "backbone.layer2.0 has a attention"),
        (with_groups, "backbone.layer1.0.conv2 is Conv2d.*groups=8"),
        (with_a_wider_layer, r"backbone.layer1.0.conv2 has a weight of shape \(16, 8, 3, 3\), not \(8, 8, 3, 3\)"),
        (with_another_pool, "backbone.maxpool is MaxPool2d"),
        (with_a_layer_more, "classifier has a 5"),
        (with_output_stride_32, "the output stride is 32"),
    ],
)
def test_what_is_not_known_is_named(change: Callable[[fdl.ResNetModel], None], message: str) -> None:
    model = trained()
    change(model)
    with pytest.raises(ValueError, match=message):
        fdl.accelerate(model)


def test_parts_of_other_names_that_compute_the_same() -> None:
    """A subclass without a forward of its own, and a copy of a part's code, in a class of another name."""
    model, images = trained(), torch.randn(1, 3, 33, 33)
    expected = exact_logits(model, images)

    class Renamed(type(model.backbone.layer1[0])):  # type: ignore[misc]
        pass

    class Copied(nn.Module):
        forward, _fused = Bottleneck.forward, Bottleneck._fused

    model.backbone.layer1[0].__class__ = Renamed
    model.backbone.layer2[0].__class__ = Copied
    model.classifier[0].project[3] = nn.Identity()
    assert relative_error(fdl.accelerate(model)(images)["out"], expected) < 1e-5


def test_other_arguments() -> None:
    model = trained()
    with pytest.raises(ValueError, match=r"it has no backbone\.conv1"):
        fdl.accelerate(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="model must be"):
        fdl.accelerate("model.pth")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accelerated already"):
        fdl.accelerate(fdl.accelerate(model))
    with pytest.raises(ValueError, match="dtype must be"):
        fdl.accelerate(model, dtype=torch.float64)
    with pytest.raises(ValueError, match="dtype must be"):
        fdl.accelerate(model.double())
    with pytest.raises(ValueError, match="kernels"):
        fdl.accelerate(model.float(), kernels="cuda")


def test_classes_that_were_replaced(device: torch.device) -> None:
    """As fine-tuning does it; the model's configuration still says 21."""
    model, images = trained(), torch.randn(1, 3, 33, 33)
    model.classifier[4] = nn.Conv2d(32, 30, 1)
    fast = fdl.accelerate(model)
    assert fast(images)["out"].shape[1] == 30
    assert relative_error(fast(images)["out"], exact_logits(model, images)) < 1e-5
    assert fast.predict(images).shape == (1, 33, 33)


@pytest.mark.parametrize("shape", [(0, 3, 33, 33), (1, 3, 1, 1), (2, 3, 7, 5)], ids=str)
def test_any_size(shape: tuple[int, ...]) -> None:
    fast = fdl.accelerate(trained())
    assert fast(torch.randn(shape))["out"].shape == (shape[0], 21, *shape[2:])
    assert fast.predict(torch.randn(shape)).shape == (shape[0], *shape[2:])
    with pytest.raises(ValueError, match="images must be"):
        fast(torch.randn(1, 4, 33, 33))


def test_pictures_through_an_accelerated_model() -> None:
    from fastdeeplab.segmenter import Segmenter

    model, picture = trained(), torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8).numpy()
    masks = [Segmenter(each)(picture) for each in (model, fdl.accelerate(model))]
    assert (masks[0] == masks[1]).mean() > 0.999


def test_it_compiles_into_one_graph(device: torch.device) -> None:
    fast, images = fdl.accelerate(trained().to(device)), torch.randn(1, 3, 33, 40, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    predict = torch.compile(fast.predict, fullgraph=True, backend="aot_eager")
    for each in (images, torch.randn(2, 3, 17, 25, device=device)):
        assert relative_error(compiled(each)["out"], fast(each)["out"]) < 1e-5
        assert torch.equal(predict(each, dtype=torch.uint8), fast.predict(each, dtype=torch.uint8))


def test_the_model_on_its_live_parameters_compiles_into_one_graph() -> None:
    model, images = trained(), torch.randn(1, 3, 33, 40)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(compiled(images)["out"], model(images)["out"]) < 1e-5
        model.backbone.layer1[0].bn2.weight.data.mul_(3)
        assert relative_error(compiled(images)["out"], model(images)["out"]) < 1e-5


@pytest.mark.gpu
@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_on_a_gpu(dtype: torch.dtype, device: torch.device) -> None:
    fast, images = fdl.accelerate(trained().to(device), dtype=dtype), torch.randn(2, 3, 65, 97, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True)
    assert relative_error(compiled(images)["out"], fast(images)["out"]) < 4 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_it_exports_on_a_gpu(dtype: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    """The kernels run in the program that is loaded, whose tail is a call of them, too."""

    class Masks(nn.Module):
        def __init__(self, model: fdl.ResNetModel) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return self.model.predict(images)

    model, images = trained().to(device), torch.randn(2, 3, 33, 40, device=device)
    fast = fdl.accelerate(model, kernels="triton", dtype=dtype)
    # torch 2.11 refuses a height of any size: max pooling ties it to the example's, modulo 4
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim.AUTO}
    exported = torch.export.export(fast, (images,), dynamic_shapes=(sizes,))
    torch.export.save(exported, tmp_path / "fast.pt2")
    loaded = torch.export.load(tmp_path / "fast.pt2").module()
    for shape in ((2, 3, 33, 40), (3, 3, 57, 40)):
        images = torch.randn(shape, device=device)
        with kernels.recording() as layers:
            out = loaded(images)["out"]
        assert {decision.impl for layer, decision in layers if layer.kernel in ((1, 1), (3, 3))} >= {"triton"}
        assert relative_error(out, fast(images)["out"]) < 4 * torch.finfo(dtype).eps
    masks = torch.export.export(Masks(fast), (images,)).module()(images)
    assert torch.equal(masks, fast.predict(images))
    with torch.no_grad():
        live = torch.export.export(model, (images,)).module()
        assert relative_error(live(images)["out"], model(images)["out"]) < 1e-3


def test_it_exports_for_any_size(tmp_path: Path) -> None:
    """Or, where PyTorch's own max pooling can't be exported for any, for those it can."""
    fast, images = fdl.accelerate(trained()), torch.randn(2, 3, 33, 40)
    sizes: dict[int, Any] = {2: torch.export.Dim("height", min=9), 3: torch.export.Dim("width", min=9)}
    width = 34
    try:
        torch.export.export(nn.MaxPool2d(3, 2, 1), (images,), dynamic_shapes=(sizes,))
    except torch._dynamo.exc.UserError:  # torch 2.11 makes a guard of each size's remainder
        sizes, width = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}, 44
    program = torch.export.export(fast, (images,), dynamic_shapes=({0: torch.export.Dim("batch")} | sizes,))
    torch.export.save(program, tmp_path / "fast.pt2")
    loaded = torch.export.load(tmp_path / "fast.pt2").module()
    for shape in ((2, 3, 33, 40), (3, 3, 57, width)):
        images = torch.randn(shape)
        assert relative_error(loaded(images)["out"], fast(images)["out"]) < 1e-5
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    operators = {str(node.target) for graph in graphs for node in graph.nodes}
    assert {f"fastdeeplab.{name}.default" for name in ("conv_bn_relu", "aspp_branches", "aspp_projection")} <= operators
