"""explain() says what runs, and the module flags do what they say."""

import re
from unittest.mock import Mock

import pytest
import torch
from fastdeeplab.kernels import candidates, decisions, library, ops
from fastdeeplab.kernels.measure import peak_memory
from networks import small_model

import fastdeeplab as fdl
from fastdeeplab import kernels


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
    assert fdl.explain(small_model()).endswith("here")


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


def test_each_layer_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = small_model().train(), torch.randn(1, 3, 64, 64)
    lines = fdl.explain(model, images).splitlines()
    assert model.training
    assert lines[0].split() == ["module", "function", "layer", "runs", "because"]
    found = [re.split("  +", line) for line in lines[1:]]
    assert found[0][:4] == ["backbone", "conv_bn_relu", "1x3x64x64->8 7x7 stride 2", "torch"]
    assert found[4][:3] == ["backbone.layer1.0", "conv_bn_relu", "1x8x16x16->32 1x1 residual"]
    assert [row[:2] for row in found[-5:]] == [
        ["classifier.0", "aspp_branches"],
        ["classifier.0", "conv_bn_relu"],
        ["classifier.0", "aspp_projection"],
        ["classifier", "conv_bn_relu"],
        ["classifier", "conv_bn_relu"],
    ]
    assert {row[4] for row in found} == {"the interpreter is for tests"}


def test_a_run_says_what_was_measured_and_what_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    def decide(layer: candidates.Layer, impl: str, device: torch.device) -> decisions.Decision:
        why = "measured on NVIDIA H200" if layer.residual else "predicted: for this test"
        return decisions.Decision("torch", None, candidates.DEFAULT_FORM, why)

    monkeypatch.setattr(ops, "decide", decide)
    monkeypatch.setattr(ops, "_runs_triton", lambda *_: True)  # as on a GPU
    lines = fdl.explain(small_model(), torch.randn(1, 3, 64, 64)).splitlines()
    assert sum(line.endswith("measured on NVIDIA H200") for line in lines) == 4
    assert sum(line.endswith("predicted: for this test") for line in lines) == len(lines) - 5


def test_one_value_for_all() -> None:
    assert small_model(kernels="torch").upsample_argmax.kernel == "torch"
    assert small_model().upsample_argmax.kernel == "auto"


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
