"""The network that comes with the package: what it says of itself, how good it is, and the kernels on its weights."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_same_masks
from fastdeeplab.kernels.measure import relative_error
from safetensors import safe_open
from torch import Tensor
from training_runs import options

import fastdeeplab as fdl
from fastdeeplab.checkpoint import packaged_checkpoint
from fastdeeplab.data import Shapes
from fastdeeplab.evaluate import evaluate
from fastdeeplab.segmenter import IMAGENET_MEAN, IMAGENET_STD
from fastdeeplab.train import train
from fastdeeplab.training.options import TrainingOptions
from fastdeeplab.weights_file import read_classes

ROOT = Path(__file__).parents[1]
SEED = 1  # of scenes that it has not seen: it was trained, and the best epoch chosen, on those of seed 0


@pytest.fixture(scope="module")
def model() -> fdl.ResNetModel:
    return fdl.ResNetModel.load(packaged_checkpoint("shapes"), aux_head=False)


@pytest.fixture(scope="module")
def origin() -> dict[str, Any]:
    with safe_open(packaged_checkpoint("shapes"), "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["training"])
    return found


def scenes(count: int, size: int) -> tuple[Tensor, Tensor]:
    dataset = Shapes("val", seed=SEED, limit=count, size=size)
    images, targets = (torch.stack(parts) for parts in zip(*(dataset[i] for i in range(count)), strict=True))
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return (images.float() / 255 - mean) / std, targets


def test_it_is_small_and_was_made_by_the_command_that_is_printed(origin: dict[str, Any]) -> None:
    path = packaged_checkpoint("shapes")
    assert path.stat().st_size <= 3_000_000
    assert read_classes(path) == tuple(origin["classes"]) == Shapes.classes
    made_with = TrainingOptions(**{name: value for name, value in origin["options"].items() if value is not None})
    assert (made_with.data, made_with.seed, made_with.pretrained) == ("shapes", SEED - 1, None)
    for name in ("README.md", "CONTRIBUTING.md"):
        assert origin["command"] in (ROOT / name).read_text(), name


def test_it_finds_what_is_in_scenes_that_it_has_not_seen(model: fdl.ResNetModel) -> None:
    found = evaluate(model, Shapes("val", seed=SEED, limit=64))
    print(f"mIoU {found.miou:.4f}, pixel accuracy {found.pixel_accuracy:.4f}")
    assert found.miou > 0.85
    assert found.iou.min() > 0.7


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_kernel_runs_it_and_finds_the_same(
    model: fdl.ResNetModel, dtype: torch.dtype, device: torch.device
) -> None:
    """Trained weights and real batch norms, in the interpreter where there is no GPU."""
    images, targets = scenes(2, 128)
    exact = copy.deepcopy(model).double()(images.double())["out"].detach()
    fast: Any = fdl.accelerate(copy.deepcopy(model).to(device), kernels="triton", dtype=dtype)
    error = 1e-4 if dtype == torch.float32 else 0.02
    assert relative_error(fast(images.to(device))["out"].cpu(), exact) < error
    masks = fast.predict(images.to(device), dtype=torch.uint8).cpu()
    assert_same_masks(masks, exact, error)
    assert float((masks == targets).float().mean()) > 0.9


def test_the_loss_kernel_on_its_logits(model: fdl.ResNetModel, device: torch.device) -> None:
    images, targets = scenes(2, 128)
    with torch.no_grad():
        logits = model.logits(images)["out"].to(device)
    found = []
    for kernel, computed in (("triton", logits), ("torch", logits.double().cpu())):
        leaf = computed.clone().requires_grad_()
        loss = fdl.SegmentationLoss(kernel=kernel)(leaf.float() if kernel == "torch" else leaf, targets.to(leaf.device))
        loss.backward()
        assert leaf.grad is not None
        found.append((loss.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    assert relative_error(found[0][1], found[1][1]) < 1e-4
    assert found[0][0] < 0.3, "of trained weights"


def test_training_from_scratch_in_a_shorter_form(tmp_path: Path) -> None:
    """The printed command on fewer pictures, of half the size, with half the blocks."""
    result = train(
        options(
            tmp_path / "run", size=64, limit=3072, val_limit=64, epochs=1, batch_size=8, lr=0.1, warmup_steps=50,
            scale_min=1.0, scale_max=1.0, jitter=0.0, dropout=0.0, workers=1, output_stride=8,
        )
    )  # fmt: skip
    assert result.miou is not None
    print(f"mIoU {result.miou:.4f}")
    assert result.miou > 0.2, "0.13 is the background alone; with other rounding it ends between 0.29 and 0.36"
