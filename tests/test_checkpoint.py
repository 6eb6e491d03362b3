"""Weights into a model and out of it: what fits is loaded whole, what does not changes nothing."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from import_torchvision import torchvision
from networks import randomise_batch_norm, small_model, torchvision_model
from torch import Tensor, nn

import fastdeeplab as fdl
from fastdeeplab import checkpoint
from fastdeeplab.checkpoint import CheckpointError, infer_config, load_weights

StateDict = dict[str, Tensor]


def trained(**arguments: object) -> fdl.ResNetModel:
    """A small model whose every value differs from that of a new one."""
    model = small_model(**arguments)
    randomise_batch_norm(model)
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value.fill_(7)
    return model


def copy_of(model: nn.Module) -> StateDict:
    return {key: value.clone() for key, value in model.state_dict().items()}


def differing(actual: nn.Module, expected: StateDict) -> set[str]:
    """The keys whose values differ."""
    state_dict = actual.state_dict()
    assert state_dict.keys() >= expected.keys()
    return {key for key, value in expected.items() if not torch.equal(state_dict[key], value)}


def without(prefix: str, weights: StateDict) -> StateDict:
    return {key: value for key, value in weights.items() if not key.startswith(prefix)}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = copy_of(model)
    yield
    assert differing(model, before) == set()


def refused(model: fdl.ResNetModel, source: Any, *messages: str, **options: bool) -> None:
    """`load_weights` refuses `source` with all of the messages and leaves the model as it is."""
    with unchanged(model), pytest.raises(CheckpointError) as caught:
        load_weights(model, source, **options)
    for message in messages:
        assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("aux", [True, False])
def test_torchvision_state_dict_and_file(aux: bool, tmp_path: Path) -> None:
    theirs = torchvision_model(50, aux)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = fdl.ResNetModel(50, aux_head=aux)
    load_weights(ours, theirs.state_dict())
    assert differing(ours, theirs.state_dict()) == set()

    loaded = fdl.ResNetModel.load(tmp_path / "weights.pth")
    assert loaded.config == fdl.ResNetModel(50, aux_head=aux).config
    assert differing(loaded, theirs.state_dict()) == set()
    assert not loaded.training


def test_a_model_of_any_first_block_rule_takes_torchvision_keys() -> None:
    weights = copy_of(trained())
    for rule in ("previous", "full"):
        model = small_model(first_block_dilation=rule)
        load_weights(model, weights)
        assert differing(model, weights) == set()


def test_num_batches_tracked_may_be_missing() -> None:
    weights = {key: value for key, value in copy_of(trained()).items() if not key.endswith("num_batches_tracked")}
    by_load_weights, by_load_state_dict = small_model(), small_model()
    load_weights(by_load_weights, weights)
    by_load_state_dict.load_state_dict(weights)
    for model in (by_load_weights, by_load_state_dict):
        assert differing(model, weights) == set()
        assert model.backbone.bn1.num_batches_tracked == 0


def test_model_keeps_its_dtype_and_mode() -> None:
    model = small_model().bfloat16()
    weights = copy_of(trained())
    load_weights(model, weights)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.backbone.conv1.weight, weights["backbone.conv1.weight"].bfloat16())
    assert model.training


def test_skip_classifiers() -> None:
    model, weights = small_model(num_classes=5), copy_of(trained())
    own = copy_of(model)
    load_weights(model, weights, skip_classifiers=True)
    kept = {f"{head}.4.{name}" for head in ("classifier", "aux_classifier") for name in ("weight", "bias")}
    assert differing(model, {key: own[key] for key in kept}) == set()
    assert differing(model, {key: value for key, value in weights.items() if key not in kept}) == set()


@pytest.mark.parametrize("model_has_aux", [True, False])
@pytest.mark.parametrize("checkpoint_has_aux", [True, False])
def test_drop_aux(model_has_aux: bool, checkpoint_has_aux: bool) -> None:
    model, weights = small_model(aux_head=model_has_aux), copy_of(trained(aux_head=checkpoint_has_aux))
    own_aux = {key: value for key, value in copy_of(model).items() if key.startswith("aux_classifier.")}
    load_weights(model, weights, drop_aux=True)
    assert bool(own_aux) == model_has_aux
    assert differing(model, own_aux) == set()
    assert differing(model, without("aux_classifier.", weights)) == set()


def test_imagenet_file_gives_the_backbone(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet50()
    randomise_batch_norm(theirs)
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    model = fdl.ResNetModel(50, 4, aux_head=False)
    own_head = copy_of(model.classifier)
    load_weights(model, tmp_path / "resnet50.pth")
    backbone = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert differing(model.backbone, backbone) == set()
    assert differing(model.classifier, own_head) == set()
    with pytest.raises(CheckpointError, match=r"resnet50\.pth holds a backbone without a segmentation head"):
        fdl.ResNetModel.load(tmp_path / "resnet50.pth")


MISFITS = {
    "number of classes": (
        lambda: copy_of(trained(num_classes=5)),
        ["5 classes and the model 21", r"classifier\.4\.weight", r"aux_classifier\.4\.bias", "skip_classifiers=True"],
    ),
    "auxiliary head only in the model": (
        lambda: copy_of(trained(aux_head=False)),
        ["only the model has an auxiliary head", r"aux_classifier\.0\.weight", "aux_head=False", "drop_aux=True"],
    ),
    "depth": (
        lambda: copy_of(trained(layers=(1, 1, 3, 1))),
        ["another architecture", r"unexpected backbone\.layer3\.1\.conv1\.weight", r"and 33 more \(36 in all\)"],
    ),
    "fewer blocks": (
        lambda: without("backbone.layer4.", copy_of(trained())),
        ["another architecture", r"missing backbone\.layer4\.0\.conv1\.weight"],
    ),
    "width": (
        lambda: copy_of(trained(width=0.25)),
        [r"of another shape backbone\.conv1\.weight \(16, 3, 7, 7\), not \(8, 3, 7, 7\)", "width"],
    ),
    "channels of the images": (
        lambda: copy_of(trained(in_channels=4)),
        [r"backbone\.conv1\.weight \(8, 4, 7, 7\), not \(8, 3, 7, 7\)", "in_channels"],
    ),
    "integers": (
        lambda: copy_of(trained()) | {"backbone.conv1.weight": torch.ones(8, 3, 7, 7, dtype=torch.int8)},
        [r"of another type backbone\.conv1\.weight torch\.int8, not torch\.float32"],
    ),
    "no tensor": (lambda: copy_of(trained()) | {"epoch": 3}, [r"tensors by name, but this one has epoch \(int\)"]),
    "no values": (
        lambda: copy_of(trained()) | {"classifier.4.bias": torch.ones(21, device="meta")},
        [r"classifier\.4\.bias \(a tensor without values\)"],
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_fault_16_misfit(misfit: str) -> None:
    make, messages = MISFITS[misfit]
    model, weights = small_model(), make()
    refused(model, weights, *messages)
    with unchanged(model), pytest.raises(CheckpointError):
        model.load_state_dict(weights)


def test_fault_16_auxiliary_head_only_in_the_checkpoint() -> None:
    messages = ("only the checkpoint has an auxiliary head", r"aux_classifier\.0\.weight", "drop_aux", "aux_head=True")
    model, weights = small_model(aux_head=False), copy_of(trained())
    refused(model, weights, *messages)
    refused(model, weights, *messages, skip_classifiers=True)
    with unchanged(model), pytest.raises(CheckpointError, match="aux"):
        model.load_state_dict(weights)


def test_fault_16_auxiliary_head_only_in_the_model_with_other_classes() -> None:
    model, weights = small_model(num_classes=5), copy_of(trained(aux_head=False))
    refused(model, weights, "21 classes and the model 5", "Also, only the model has an auxiliary head")
    refused(model, weights, "only the model has an auxiliary head", skip_classifiers=True)
    load_weights(model, weights, skip_classifiers=True, drop_aux=True)
    assert differing(model, without("classifier.4.", weights)) == set()


def test_fault_16_errors_are_those_of_torch_too() -> None:
    with pytest.raises(RuntimeError):
        small_model().load_state_dict({})
    with pytest.raises(RuntimeError):
        load_weights(small_model(), {})


def smp_keys(weights: StateDict) -> StateDict:
    names = {"backbone.": "encoder.", "classifier.0.": "decoder.aspp.", "classifier.1.": "decoder.conv."}
    names |= {"classifier.2.": "decoder.bn.", "classifier.4.": "segmentation_head.0."}
    return {
        new + key.removeprefix(old): value
        for key, value in weights.items()
        for old, new in names.items()
        if key.startswith(old)
    }


def test_fault_16_other_rule_for_the_first_block(tmp_path: Path) -> None:
    """Weights of smp in a model of torchvision's rule: the keys would fit and the masks be wrong."""
    weights = copy_of(trained(aux_head=False))
    refused(small_model(aux_head=False), smp_keys(weights), "first_block_dilation='full'", r"ResNetModel\.load")
    model = small_model(aux_head=False, first_block_dilation="full")
    load_weights(model, smp_keys(weights))
    assert differing(model, weights) == set()

    vainf = {re.sub("^classifier", "classifier.classifier", key): value for key, value in weights.items()}
    refused(model, vainf, "first_block_dilation='previous'")
    load_weights(small_model(aux_head=False), vainf)

    small_model(first_block_dilation="full").save(tmp_path / "full.safetensors")
    refused(small_model(), tmp_path / "full.safetensors", "first_block_dilation='full'")
    small_model(layers=(1, 1, 1, 3), multi_grid=(1, 2, 4)).save(tmp_path / "grid.safetensors")
    refused(small_model(layers=(1, 1, 1, 3)), tmp_path / "grid.safetensors", r"multi_grid=\[1, 2, 4\]")


def test_fault_16_keys_of_another_project_in_load_state_dict() -> None:
    model = small_model(aux_head=False, first_block_dilation="full")
    with unchanged(model), pytest.raises(CheckpointError, match="keys of segmentation_models_pytorch, which load_wei"):
        model.load_state_dict(smp_keys(copy_of(trained(aux_head=False))))


def test_fault_16_missing_file() -> None:
    with pytest.raises(ValueError, match=r"weights must be .* the path of a file .*missing\.pth"):
        small_model(weights="missing.pth")
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        load_weights(small_model(), "missing.pth")
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        fdl.ResNetModel.load("missing.safetensors")


def test_published_files_are_those_of_torchvision() -> None:
    models, segmentation = torchvision.models, torchvision.models.segmentation
    expected = {
        "torchvision": {
            50: segmentation.DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.url,
            101: segmentation.DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1.url,
        },
        "imagenet": {
            50: models.ResNet50_Weights.IMAGENET1K_V1.url,
            101: models.ResNet101_Weights.IMAGENET1K_V1.url,
            152: models.ResNet152_Weights.IMAGENET1K_V1.url,
        },
    }
    published = checkpoint.PUBLISHED
    assert published == expected


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Publish a state dict for ResNet-50 at a file:// URL; gives the place in the (empty) cache where it will be."""

    def publish(source: str, state_dict: StateDict, digest: str | None = None) -> Path:
        file = tmp_path / "server.pth"
        torch.save(state_dict, file)
        digest = digest or hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        file = file.rename(tmp_path / f"weights-{digest}.pth")
        monkeypatch.setattr(checkpoint, "PUBLISHED", {source: {50: file.as_uri()}})
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
        return tmp_path / "cache" / "checkpoints" / file.name

    return publish


def test_published_weights(publish: Callable[..., Path]) -> None:
    theirs = torchvision_model(50).state_dict()
    cached = publish("torchvision", theirs)
    model = fdl.ResNetModel(50, weights="torchvision")
    assert cached.is_file()
    assert differing(model, theirs) == set()

    (cached.parents[2] / cached.name).unlink()  # from here on it is in the cache only
    fine_tuned = fdl.ResNetModel(50, 5, aux_head=False)
    load_weights(fine_tuned, "torchvision", skip_classifiers=True)
    assert differing(fine_tuned, without("classifier.4.", without("aux_classifier.", theirs))) == set()


def test_published_backbone(publish: Callable[..., Path]) -> None:
    theirs = torchvision.models.resnet50().state_dict()
    publish("imagenet", theirs)
    model = fdl.ResNetModel(50, 5, first_block_dilation="full", output_stride=16, weights="imagenet")
    assert differing(model.backbone, without("fc.", theirs)) == set()


def test_fault_16_published_file_with_another_hash(publish: Callable[..., Path]) -> None:
    cached = publish("torchvision", {"weight": torch.ones(1)}, digest="0123abcd")
    with pytest.raises(CheckpointError, match=r'weights-0123abcd\.pth could not .*invalid hash value \(expected "0123'):
        fdl.ResNetModel(50, weights="torchvision")
    assert list(cached.parent.iterdir()) == []


def test_fault_16_published_file_damaged_in_the_cache(publish: Callable[..., Path]) -> None:
    cached = publish("torchvision", {"weight": torch.ones(1)})
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=f"{cached.name} is truncated"):
        fdl.ResNetModel(50, weights="torchvision")


def test_no_network(publish: Callable[..., Path]) -> None:
    cached = publish("torchvision", {"weight": torch.ones(1)})
    (cached.parents[2] / cached.name).unlink()
    with pytest.raises(CheckpointError) as caught:
        fdl.ResNetModel(50, weights="torchvision")
    for part in (f"{cached.name} could not be downloaded", f"put it at {cached}", "--weights FILE"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("torchvision", {"depth": 152}, "exists for the depths 50, 101, got depth=152"),
        ("torchvision", {"num_classes": 5}, "needs num_classes=21, got 5.*skip_classifiers=True"),
        ("torchvision", {"in_channels": 4}, "needs in_channels=3, got 4"),
        ("torchvision", {"first_block_dilation": "full"}, "needs first_block_dilation='previous', got 'full'"),
        ("torchvision", {"multi_grid": (1, 2, 4)}, r"needs multi_grid=None, got \[1, 2, 4\]"),
        ("imagenet", {"in_channels": 1}, "needs in_channels=3, got 1"),
        ("imagenet", {"width": 0.125}, r"needs width=1.0, got 0.125"),
        ("imagenet", {"layers": (1, 1, 1, 1)}, r"needs layers=\[3, 4, 6, 3\], got \[1, 1, 1, 1\]"),
    ],
)
def test_models_without_published_weights(
    source: str, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("nothing is to be downloaded"))
    with pytest.raises(ValueError, match=message):
        fdl.ResNetModel(**({"depth": 50, "width": 1.0} | arguments), weights=source)


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ({"depth": 50}, {"depth": 50, "layers": None}),
        ({"depth": 101, "num_classes": 3, "aux_head": False}, {"depth": 101, "layers": None}),
        ({"depth": 152, "in_channels": 1}, {"depth": 152, "layers": None}),
        ({"depth": 101, "layers": (3, 4, 6, 3)}, {"depth": 50, "layers": None}),
        ({"depth": 101, "layers": (1, 2, 12, 1)}, {"depth": 50, "layers": [1, 2, 12, 1]}),
    ],
)
def test_infer_config(network: dict[str, Any], settings: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = fdl.ResNetModel(**network)
    shown = ("num_classes", "aux_head", "in_channels", "width")
    assert infer_config(model.state_dict()) == settings | {name: model.config[name] for name in shown}


def test_infer_config_needs_the_width_of_a_narrow_network() -> None:
    weights = small_model().state_dict()
    with pytest.raises(CheckpointError, match=r"8 channels, 64 at width 1, .*ResNetModel.load"):
        infer_config(weights)
    with pytest.raises(CheckpointError, match=r"8 channels, which is not what width=0.5 gives"):
        infer_config(weights, width=0.5)
    assert infer_config(weights, width=0.125)["layers"] == [1, 1, 1, 1]


def test_infer_config_of_another_network() -> None:
    with pytest.raises(CheckpointError, match=r"not a DeepLabV3 on a ResNet: classifier\.0\.convs.*missing"):
        infer_config(without("classifier.", small_model().state_dict()), width=0.125)


UNUSUAL: dict[str, Any] = {
    "depth": 101,
    "num_classes": 5,
    "output_stride": 16,
    "aux_head": False,
    "atrous_rates": (2, 4, 6),
    "layers": (1, 1, 2, 3),
    "multi_grid": (1, 2, 4),
    "first_block_dilation": "full",
    "in_channels": 4,
    "dropout": 0.3,
}


@pytest.mark.parametrize("arguments", [{}, UNUSUAL])
def test_save_and_load(arguments: dict[str, Any], tmp_path: Path) -> None:
    model = trained(**arguments).eval()
    model.save(tmp_path / "street.safetensors")
    loaded = fdl.ResNetModel.load(tmp_path / "street.safetensors")
    assert loaded.config == model.config
    assert differing(loaded, model.state_dict()) == set()
    assert not loaded.training
    images = torch.randn(1, model.config["in_channels"], 33, 47)
    assert torch.equal(loaded(images)["out"], model(images)["out"])


def test_save_needs_the_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.safetensors"):
        small_model().save(tmp_path / "street.pth")


def test_load_with_overrides(tmp_path: Path) -> None:
    model = trained()
    model.save(tmp_path / "street.safetensors")
    loaded = fdl.ResNetModel.load(tmp_path / "street.safetensors", output_stride=16, aux_head=False)
    assert loaded.config == model.config | {"output_stride": 16, "aux_head": False}
    assert differing(loaded, without("aux_classifier.", copy_of(model))) == set()

    torch.save({"model": model.state_dict()}, tmp_path / "street.pth")
    loaded = fdl.ResNetModel.load(tmp_path / "street.pth", width=0.125, dropout=0.0)
    assert loaded.config == model.config | {"dropout": 0.0}
    assert differing(loaded, copy_of(model)) == set()

    with pytest.raises(ValueError, match="output_stride must be 8 or 16, got 7"):
        fdl.ResNetModel.load(tmp_path / "street.safetensors", output_stride=7)
    with pytest.raises(CheckpointError, match="21 classes and the model 5"):
        fdl.ResNetModel.load(tmp_path / "street.safetensors", num_classes=5)
    with pytest.raises(ValueError, match="takes the weights from path, got weights='imagenet'"):
        fdl.ResNetModel.load(tmp_path / "street.safetensors", weights="imagenet")


def test_load_of_a_converted_checkpoint_takes_its_settings(tmp_path: Path) -> None:
    torch.save(smp_keys(copy_of(trained(aux_head=False))), tmp_path / "smp.pth")
    loaded = fdl.ResNetModel.load(tmp_path / "smp.pth", width=0.125, output_stride=16)
    assert loaded.config["first_block_dilation"] == "full"
    assert loaded.config["atrous_rates"] == [12, 24, 36]  # smp's at both strides
    assert loaded.config["output_stride"] == 16


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["bfloat16"], "bfloat16"),
        (["float16"], "float16"),
        (["float64"], "float64"),
        (["bfloat16", "float32"], "float32"),
        (["float16", "bfloat16"], "float32"),
        (["float8_e4m3fn"], "float32"),
    ],
)
def test_load_keeps_the_dtype(dtypes: list[str], expected: str, tmp_path: Path) -> None:
    weights = copy_of(trained())
    for index, (key, value) in enumerate(weights.items()):
        if value.is_floating_point():
            weights[key] = value.to(getattr(torch, dtypes[index % len(dtypes)]))
    torch.save(weights, tmp_path / "weights.pth")
    loaded = fdl.ResNetModel.load(tmp_path / "weights.pth", width=0.125)
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, expected)}
    for key, value in loaded.state_dict().items():
        assert torch.equal(value.double(), weights[key].double())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_classes", 10**12),
        ("num_classes", "21"),
        ("in_channels", 10**9),
        ("layers", [10**9, 1, 1, 1]),
        ("layers", None),
        ("layers", "abcd"),
        ("width", 1e6),
        ("width", "0.125"),
        ("width", float("inf")),
        ("depth", 51),
        ("aux_head", False),
        ("output_stride", 7),
        ("atrous_rates", [1, 2]),
        ("multi_grid", [1] * 10),
        ("dropout", 2),
        ("weights", "torchvision"),
        ("surprise", 1),
    ],
)
def test_fault_16_configuration_that_contradicts_the_weights(setting: str, value: object, tmp_path: Path) -> None:
    model = trained()
    metadata = {"fastdeeplab": "1", "config": json.dumps(model.config | {setting: value})}
    weights = {key: value.contiguous() for key, value in copy_of(model).items()}
    safetensors.torch.save_file(weights, tmp_path / "odd.safetensors", metadata)
    with pytest.raises((CheckpointError, ValueError), match=setting):
        fdl.ResNetModel.load(tmp_path / "odd.safetensors")


def test_fault_21_interrupted_save_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    model.save(tmp_path / "last.safetensors")

    def interrupted(tensors: StateDict, path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small_model().save(tmp_path / "last.safetensors")
    assert list(tmp_path.iterdir()) == [tmp_path / "last.safetensors"]
    assert differing(fdl.ResNetModel.load(tmp_path / "last.safetensors"), copy_of(model)) == set()
