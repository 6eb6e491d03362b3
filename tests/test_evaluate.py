"""Evaluation: figures against matrices worked out by hand, masks against `predict`, and what is refused."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import randomise_batch_norm, small_model
from PIL import Image
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

import fastdeeplab as fdl
from fastdeeplab import cli
from fastdeeplab.data import PairedFiles, Shapes
from fastdeeplab.evaluate import Evaluation, evaluate, write_chart, write_json
from fastdeeplab.segmenter import IMAGENET_MEAN, IMAGENET_STD
from fastdeeplab.weights_file import write_safetensors


class InMemory:
    """Pictures and targets that are given."""

    def __init__(self, samples: list[tuple[Tensor, Tensor]], classes: int) -> None:
        self.samples = samples
        self.classes = tuple(f"class {index}" for index in range(classes))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]

    def name(self, index: int) -> str:
        return f"picture {index}"


def random_samples(sizes: list[tuple[int, int]], classes: int) -> list[tuple[Tensor, Tensor]]:
    return [
        (
            torch.randint(256, (3, *size), dtype=torch.uint8),
            torch.where(torch.rand(size) < 0.1, 255, torch.randint(classes, size)).to(torch.uint8),
        )
        for size in sizes
    ]


def normalise(image: Tensor) -> Tensor:
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return ((image.float() / 255 - mean) / std)[None]


def model_of(classes: int) -> fdl.ResNetModel:
    """A network whose masks have several classes."""
    model = small_model(num_classes=classes).eval()
    randomise_batch_norm(model)
    with torch.no_grad():  # every class wins somewhere: its logits have mean 0
        model.classifier[4].weight.normal_(0, 3)
        logits = model.logits(torch.randn(2, 3, 64, 64))["out"]
        model.classifier[4].bias.sub_(logits.mean((0, 2, 3)))
    return model


def counted_by_hand(model: fdl.ResNetModel, dataset: InMemory) -> Tensor:
    """Pixel by pixel, from full-size logits."""
    classes = len(dataset.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for image, target in dataset.samples:
        mask = fdl.accelerate(model, kernels="torch")(normalise(image))["out"].argmax(1)[0]
        for true, predicted in zip(target.flatten().tolist(), mask.flatten().tolist(), strict=True):
            if true != 255:
                confusion[true, predicted] += 1
    return confusion


def result_of(rows: list[list[int]]) -> Evaluation:
    return Evaluation(tuple("abcdefg"[: len(rows)]), torch.tensor(rows), 3)


def test_figures_of_a_matrix_worked_out_by_hand() -> None:
    result = result_of([[5, 1, 0], [2, 3, 0], [0, 1, 4]])
    assert result.iou.tolist() == pytest.approx([5 / 8, 3 / 7, 4 / 5])
    assert result.miou == pytest.approx((5 / 8 + 3 / 7 + 4 / 5) / 3)
    assert result.pixel_accuracy == 12 / 16


def test_a_class_that_is_nowhere_is_left_out_of_the_mean() -> None:
    """One that was only predicted, or is only in the targets, counts with 0."""
    result = result_of([[6, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    iou = result.iou.tolist()
    assert iou[0] == pytest.approx(6 / 9)
    assert math.isnan(iou[1])
    assert iou[2:] == [0, 0]
    assert result.miou == pytest.approx(6 / 9 / 3)


def test_without_a_valid_pixel_there_are_no_figures() -> None:
    result = result_of([[0, 0], [0, 0]])
    assert math.isnan(result.miou)
    assert math.isnan(result.pixel_accuracy)
    assert result.to_json()["miou"] is None


@pytest.mark.parametrize("classes", [2, 21, 150])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_masks_are_those_of_the_model_at_every_pictures_own_size(classes: int, batch_size: int) -> None:
    model = model_of(classes)
    dataset = InMemory(random_samples([(33, 40), (33, 40), (17, 65), (33, 40), (1, 1), (1, 1)], classes), classes)
    done: list[int] = []
    result = evaluate(model, dataset, batch_size=batch_size, progress=done.append)
    expected = counted_by_hand(model, dataset)
    assert (expected.sum(0) > 0).sum() > 1
    assert (result.confusion - expected).abs().sum() <= 2e-3 * expected.sum()  # equal logits but for rounding
    assert result.confusion.dtype == torch.int64
    assert torch.equal(result.confusion.sum(1), expected.sum(1))
    assert result.pictures == 6
    assert result.classes == dataset.classes
    assert done == ([1, 2, 3, 4, 5, 6] if batch_size == 1 else [2, 3, 4, 6])


def test_a_perfect_model() -> None:
    """Targets that are the model's own masks, but where they are ignored."""
    model = model_of(6)
    samples = []
    for image, target in random_samples([(24, 32)] * 3, 6):
        mask = fdl.accelerate(model).predict(normalise(image), dtype=torch.uint8)[0]
        samples.append((image, torch.where(target == 255, target, mask)))
    result = evaluate(model, InMemory(samples, 6))
    assert result.miou == 1
    assert result.pixel_accuracy == 1


def test_the_model_is_left_as_it_is_and_may_be_accelerated_already() -> None:
    model = model_of(6).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dataset = Shapes("val", limit=3, size=40)
    result = evaluate(model, dataset)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(evaluate(fdl.accelerate(model), dataset).confusion, result.confusion)


def test_full_size_logits_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("full-size logits were computed")

    for name in ("fastdeeplab.accelerate", "fastdeeplab.model"):
        monkeypatch.setattr(sys.modules[name], "upsample_logits", forbidden)
    assert evaluate(model_of(6), Shapes("val", limit=2, size=40)).pictures == 2


def test_pictures_are_read_a_few_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the whole data set."""
    read: list[int] = []
    ahead: list[int] = []

    class Watched(Shapes):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            read.append(index)
            return super().__getitem__(index)

    evaluate(model_of(6), Watched("val", limit=30, size=16), progress=lambda done: ahead.append(len(read) - done))
    assert sorted(read) == list(range(30))
    assert max(ahead) <= 7


def test_deterministic_algorithms_take_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchmetrics then compares every pixel with every entry of the matrix; the pixels come in parts."""
    from torchmetrics.classification import MulticlassConfusionMatrix

    model, dataset = model_of(6), Shapes("val", limit=2, size=40)
    expected = evaluate(model, dataset).confusion
    update, parts = MulticlassConfusionMatrix.update, []

    def watch(self: Any, masks: Tensor, targets: Tensor) -> None:
        parts.append(len(masks))
        update(self, masks, targets)

    monkeypatch.setattr(MulticlassConfusionMatrix, "update", watch)
    monkeypatch.setattr(sys.modules["fastdeeplab.evaluate"], "COUNTED", 1000 * 6**2)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(evaluate(model, dataset, batch_size=2).confusion, expected)
    finally:
        torch.use_deterministic_algorithms(False)
    assert parts == [1000, 1000, 1000, 200]


def test_dtype() -> None:
    dataset = Shapes("val", limit=2, size=40)
    model = model_of(6)
    close = evaluate(model, dataset, dtype=torch.bfloat16).confusion - evaluate(model, dataset).confusion
    assert 0 < close.abs().sum() < 0.2 * 2 * 40 * 40


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({"num_classes": 5}, {}, "the model has 5 classes, the data set 6"),
        ({"in_channels": 4}, {}, "pictures have 3 channels, the model takes 4"),
        ({}, {"batch_size": 0}, "batch_size and workers must be at least 1"),
        ({}, {"workers": 0}, "batch_size and workers must be at least 1"),
        ({}, {"dtype": torch.float64}, "dtype must be"),
    ],
)
def test_what_does_not_fit(model: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(small_model(**{"num_classes": 6} | model), Shapes("val", limit=1, size=16), **options)


def test_fault_14_targets_outside_the_classes_are_named() -> None:
    samples = random_samples([(8, 8)] * 3, 6)
    samples[1][1][3, 3] = 6
    with pytest.raises(ValueError, match="picture 1: the target has the class 6, where there are 6"):
        evaluate(model_of(6), InMemory(samples, 6))
    samples[1] = (samples[1][0], torch.zeros(8, 9, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"picture 1: image \(3, 8, 8\) and target \(8, 9\) differ"):
        evaluate(model_of(6), InMemory(samples, 6))


def test_fault_17_a_picture_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "mask.png")
    (tmp_path / "b.png").write_bytes(b"")
    pairs = [(tmp_path / name, tmp_path / "mask.png") for name in ("a.png", "b.png")]
    model, dataset = model_of(2), PairedFiles(pairs, "xy")
    with pytest.raises(ValueError, match=r"b\.png: is empty"):
        evaluate(model, dataset)
    skipped: list[Exception] = []
    result = evaluate(model, dataset, skip=skipped.append)
    assert [str(error) for error in skipped] == [f"{tmp_path / 'b.png'}: is empty"]
    assert (result.pictures, result.confusion.sum()) == (1, 8 * 8)


def run_command(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of two classes, a and b."""
    model = model_of(2)
    training = json.dumps({"classes": ["a", "b"]})
    write_safetensors(tmp_path / "two.safetensors", model.state_dict(), model.config, {"training": training})
    return tmp_path / "two.safetensors"


def test_fault_17_the_command_goes_on_without_pictures_that_can_not_be_used(weights: Path, tmp_path: Path) -> None:
    for folder, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / folder).mkdir()
        for name in "uvw":
            Image.new(mode, (8, 8)).save(tmp_path / folder / f"{name}.png")
    (tmp_path / "images/u.png").write_bytes(b"")
    Image.new("L", (8, 8), 2).save(tmp_path / "masks/v.png")
    folders = ("--images", tmp_path / "images", "--masks", tmp_path / "masks", "--json", tmp_path / "figures.json")
    ended = run_command(weights, "--data", "folder", *folders)
    assert ended.exit_code == 1, ended.output
    assert f"failed: {tmp_path / 'images/u.png'}: is empty\n" in ended.stderr
    assert f"failed: {tmp_path / 'masks/v.png'}: has the values 2, which are none of" in ended.stderr
    assert "2 of 3 pictures failed, and are left out" in ended.stdout
    assert json.loads((tmp_path / "figures.json").read_text())["pictures"] == 1
    reordered = run_command(weights, "--data", "folder", *folders, "--classes", "b,a")
    assert reordered.exit_code == 2
    assert "error: the classes must be in the checkpoint's order, a,b\n" in reordered.stderr


@pytest.mark.parametrize("option", ["--json", "--chart"])
def test_files_that_can_not_be_written_are_refused_before_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("fastdeeplab.cli.training.load_model", None)
    for path, message in ((tmp_path, "is a folder, not a file"), (tmp_path / "none/file", "there is no folder")):
        ended = run_command(option, path)
        assert (ended.exit_code, message in ended.stderr) == (2, True)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as it is for others than root
    assert "no permission to write there" in run_command(option, tmp_path / "file").stderr


def test_the_table() -> None:
    console = Console(width=80, record=True)
    console.print(result_of([[5, 1, 0], [2, 3, 0], [0, 0, 0]]).table())
    text = console.export_text()
    assert ["a", "0.6250", "54.5%"] in [line.strip("│ ").replace("│", " ").split() for line in text.splitlines()]
    assert ["c", "-", "<0.1%"] in [line.strip("│ ").replace("│", " ").split() for line in text.splitlines()]
    assert "0.5625" in text  # (5 / 8 + 3 / 6) / 2
    assert "3 pictures" in text


def test_json_holds_every_figure(tmp_path: Path) -> None:
    rows = [[5, 1, 0], [2, 3, 0], [0, 0, 0]]
    write_json(tmp_path / "figures.json", result_of(rows))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["miou"] == pytest.approx(0.5625)
    assert figures["pixel_accuracy"] == pytest.approx(8 / 11)
    assert figures["pictures"] == 3
    assert figures["confusion"] == rows
    assert figures["classes"][2] == {"name": "c", "iou": None, "pixels": 0}
    assert figures["classes"][0]["pixels"] == 6


def test_the_chart_is_a_png_that_grows_with_the_classes(tmp_path: Path) -> None:
    heights = []
    for count in (3, 30):
        confusion = torch.eye(count, dtype=torch.int64) * 5 + 1
        write_chart(tmp_path / "chart", Evaluation(tuple(f"class {i}" for i in range(count)), confusion, 1))
        with Image.open(tmp_path / "chart") as chart:
            assert chart.format == "PNG"
            assert len(chart.convert("RGB").getcolors(1 << 20)) > 2
            heights.append(chart.height)
    assert heights[1] > 2 * heights[0]


def test_fault_21_an_interrupted_write_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    path.write_text("older")
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_json(path, result_of([[1]]))
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_torchvision_that_does_not_fit_pytorch_does_not_matter(tmp_path: Path) -> None:
    """torchmetrics imports torchvision; here one that fails as a build for another PyTorch does."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from fastdeeplab.evaluate import _confusion_metric
print(_confusion_metric().__name__, "torchvision" in sys.modules)
"""
    assert run(code) == "MulticlassConfusionMatrix False"


def test_without_torchmetrics_the_extra_is_named() -> None:
    code = """
import sys
sys.modules["torchmetrics"] = None
from fastdeeplab.evaluate import _confusion_metric
try:
    _confusion_metric()
except ImportError as error:
    print(error)
"""
    assert run(code) == "evaluation needs the package torchmetrics: pip install 'fastdeeplab[training]'"
