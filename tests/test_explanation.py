"""explain() says what runs, and the module flags do what they say."""

import re
from unittest.mock import Mock

import pytest
import torch
from fastdeeplab.kernels import candidates, decisions, library, ops
from fastdeeplab.kernels.measure import peak_memory
from networks import small_model

import fastdeeplab as fdl
from fastdeeplab import explanation, kernels


def test_a_model_and_a_loss_on_a_cpu() -> None:
    lines = fdl.explain(small_model()).splitlines()
    assert lines[0].split() == ["module", "function", "runs", "because"]
    assert ["backbone.layer1.0", "conv_bn_relu", "torch"] in [line.split()[:3] for line in lines]
    assert ["classifier.0", "aspp_branches", "torch"] in [line.split()[:3] for line in lines]
    assert lines[-1].split()[:3] == ["upsample_argmax", "upsample_argmax", "torch"]
    both = torch.nn.ModuleDict({"model": small_model(), "loss": fdl.SegmentationLoss()})
    assert [line.split()[0] for line in fdl.explain(both).splitlines()[-2:]] == ["model.upsample_argmax", "loss"]


def test_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "as asked for" in fdl.explain(small_model(kernels="torch"))
    double = fdl.explain(small_model(kernels=fdl.Kernels(upsample_argmax="triton")).double())
    assert "nothing" in double
    assert "float64 is not one of" in double
    monkeypatch.setenv("FASTDEEPLAB_KERNELS", "torch")
    assert "FASTDEEPLAB_KERNELS=torch" in fdl.explain(small_model())


def test_a_loss_on_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert "Tesla T4 has compute capability 7.5" in fdl.explain(fdl.SegmentationLoss())
    assert "Tesla T4" not in fdl.explain(fdl.SegmentationLoss(weight=torch.ones(3)))  # on the CPU


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_what_auto_leaves_to_pytorch(kernel: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of full-size logits is what the loss does with them."""
    monkeypatch.setattr(kernels, "choose", lambda *_: kernels.Choice("triton", "here"))
    pytorch = Mock(wraps=library.upsample_cross_entropy)
    monkeypatch.setattr(library, "upsample_cross_entropy", pytorch)
    loss = fdl.SegmentationLoss(kernel=kernel)
    low, full = torch.randn(1, 3, 2, 2, device=device), torch.randn(1, 3, 4, 4, device=device)
    for logits in (low, full):
        loss(logits, torch.zeros(1, 4, 4, dtype=torch.uint8, device=device))
    assert [call.args[0] is full for call in pytorch.call_args_list] == ([True] if kernel == "auto" else [])
    limit = f"; {fdl.SegmentationLoss.auto_limit}" if kernel == "auto" else ""
    assert fdl.explain(loss).endswith(f"here{limit}")
    assert fdl.explain(small_model()).endswith("here; PyTorch where tuning has measured it to be faster")


def test_every_flag_reaches_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def choose(function: str, impl: str, *_: object) -> kernels.Choice:
        asked.append((function, impl))
        return kernels.Choice("torch", "for this test")

    monkeypatch.setattr(kernels, "choose", choose)
    for kernel in ("auto", "torch", "triton"):
        model = small_model(kernels=fdl.Kernels(upsample_argmax=kernel)).eval()
        images = torch.randn(1, 3, 17, 17)
        model.predict(images)
        fdl.SegmentationLoss(kernel=kernel)(model.logits(images), torch.zeros(1, 17, 17, dtype=torch.uint8))
        assert asked[-2:] == [("upsample_argmax", kernel), ("upsample_cross_entropy", kernel)]


@pytest.mark.interpreter
def test_each_layer_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = small_model().train(), torch.randn(1, 3, 64, 64)
    lines = fdl.explain(model, images).splitlines()
    assert model.training
    assert lines[0].split() == ["module", "function", "layer", "runs", "because"]
    found = [re.split("  +", line) for line in lines[1:]]
    assert found[0][:4] == ["backbone", "conv_bn_relu", "1x3x64x64->8 7x7 stride 2", "torch"]
    assert found[4][:3] == ["backbone.layer1.0", "conv_bn_relu", "1x8x16x16->32 1x1 residual"]
    assert [row[:2] for row in found[-6:]] == [
        ["classifier.0", "aspp_branches"],
        ["classifier.0", "conv_bn_relu"],
        ["classifier.0", "aspp_projection"],
        ["classifier", "conv_bn_relu"],
        ["classifier", "conv_bn_relu"],
        ["upsample_argmax", "upsample_argmax"],
    ]
    assert found[-1][2] == "1x21x8x8->64x64"
    assert {row[4] for row in found} == {"the interpreter is for tests"}


def test_a_run_says_what_was_measured_and_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    def decide(layer: candidates.Layer, impl: str, device: torch.device) -> decisions.Decision:
        why = "measured on NVIDIA H200" if layer.residual else "predicted: for this test"
        return decisions.Decision("torch", None, candidates.DEFAULT_FORM, why)

    monkeypatch.setattr(ops, "decide", decide)
    measured = decisions.TailDecision("torch", None, "measured on NVIDIA H200")
    monkeypatch.setattr(ops, "decide_tail", lambda *_: measured)
    monkeypatch.setattr(ops, "_runs_triton", lambda *_: True)  # as on a GPU
    lines = fdl.explain(small_model(), torch.randn(1, 3, 64, 64)).splitlines()
    assert sum(line.endswith("measured on NVIDIA H200") for line in lines) == 5
    assert sum(line.endswith("predicted: for this test") for line in lines) == len(lines) - 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_weights_are_told_of_where_they_serve(dtype: torch.dtype) -> None:
    """The model's dtype decides, to which images are cast."""
    model = fdl.accelerate(small_model().eval(), dtype=dtype)
    for images in (torch.randn(1, 3, 33, 33), torch.randn(1, 3, 33, 33, dtype=torch.float64)):
        assert (explanation.PACKED in fdl.explain(model, images)) == (dtype == torch.float32)


def flags(model: torch.nn.Module) -> dict[str, str]:
    return {name: part.kernel for name, part in model.named_modules() if hasattr(part, "kernel")}


@pytest.mark.parametrize("kernel", ["auto", "torch", "triton"])
def test_one_value_for_all(kernel: str) -> None:
    """Each module that calls a kernel bears the flag, and shows it; the stem, which has no kernel, never "triton"."""
    model = small_model(kernels=kernel)
    found = flags(model)
    assert list(found) == [
        "backbone", *(f"backbone.layer{i}.0" for i in range(1, 5)), "classifier", "classifier.0", "upsample_argmax",
    ]  # fmt: skip
    assert found.pop("backbone") == ("auto" if kernel == "triton" else kernel)
    assert set(found.values()) == {kernel}
    for name in found:
        assert f"kernel={kernel!r}" in "".join(repr(model.get_submodule(name)).splitlines()[:2])


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_the_stem_says_why_it_has_no_kernel(kernel: str, device: torch.device) -> None:
    """And runs all the same, with the rest through the kernels."""
    model = small_model(kernels=kernel).eval().to(device)
    stem = next(line for line in fdl.explain(model).splitlines() if line.startswith("backbone "))
    assert stem.split()[1:3] == ["conv_bn_relu", "torch"]
    assert stem.count("the stem's 7x7 convolution is PyTorch's") == 1
    with torch.no_grad():
        model(torch.randn(1, 3, 17, 17, device=device))


def test_a_stem_that_is_asked_for_by_its_own_flag(device: torch.device) -> None:
    model = small_model(kernels="torch").eval().to(device)
    assert "as asked for; the stem's 7x7" in fdl.explain(model)
    model.backbone.kernel = "triton"
    assert re.search(r"backbone +conv_bn_relu +nothing .*: the stem's 7x7 convolution is PyTorch's", fdl.explain(model))
    with torch.no_grad(), pytest.raises(RuntimeError, match="can't run as a Triton kernel here"):
        model(torch.randn(1, 3, 17, 17, device=device))
    model.backbone.conv1 = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False).to(device)
    assert model.backbone.kernel_obstacle is None


@pytest.mark.parametrize(
    "arguments",
    [{"upsample_argmax": "cuda"}, {"upsample_cross_entropy": None}, {"conv_bn_relu": "fast"}, {"aspp": "cudnn"}],
)
def test_a_wrong_kernel_is_a_value_error(arguments: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        fdl.Kernels(**arguments)
    with pytest.raises(ValueError, match="kernel must be"):
        fdl.SegmentationLoss(kernel="cuda")


def test_predict_never_holds_full_size_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 classes of 65x65 pixels, in chunks of a few rows."""
    monkeypatch.setitem(library.CHUNK_ELEMENTS, "cpu", 1 << 18)
    model = small_model(num_classes=1000).eval()
    logits = model.logits(torch.randn(1, 3, 65, 65))["out"].detach()
    used = peak_memory(lambda: model.upsample_argmax(logits, (65, 65)), logits.device)
    assert used < 1000 * 65 * 65 * 4 / 2
