"""The command line, run on folders of good and bad pictures."""

import errno
import json
import os
import shutil
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastdeeplab.kernels.choice import why_not
from networks import randomise_batch_norm, small_model
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import fastdeeplab as fdl
from fastdeeplab import cli, pictures
from fastdeeplab.checkpoint import packaged_checkpoint
from fastdeeplab.palettes import PALETTES, choose_palette
from fastdeeplab.segmenter import Segmenter
from fastdeeplab.weights_file import write_safetensors


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network with 21 classes that finds several of them."""
    torch.manual_seed(0)
    model = small_model(aux_head=False)
    randomise_batch_norm(model)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    model.save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three pictures of different sizes and kinds."""
    folder = tmp_path / "photos"
    folder.mkdir()
    save_photograph(folder / "beach.jpg", 48, 33)
    save_photograph(folder / "street.png", 33, 48)
    save_photograph(folder / "TREE.JPG", 48, 33)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "masks"


@pytest.fixture
def segment(weights: Path) -> Callable[..., Any]:
    """Run ``fastdeeplab segment`` with the small network; an option given again replaces it."""

    def run(*arguments: object) -> Any:
        options = ["--weights", weights, "--resize", 64, "--device", "cpu", *arguments]
        return CliRunner().invoke(cli.app, ["segment", *map(str, options)], env={"COLUMNS": "200"})

    return run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if a model is built."""

    def build(*_: object, **__: object) -> None:
        pytest.fail("a model is built")

    monkeypatch.setattr(fdl.ResNetModel, "__init__", build)


def save_photograph(path: Path, width: int, height: int) -> None:
    rng = np.random.default_rng(sum(path.name.encode()))
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def states(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_folder(segment: Callable[..., Any], photos: Path, out: Path, weights: Path) -> None:
    result = segment(photos, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"{out}: 3 segmented" in result.stdout
    assert names(out) == ["TREE.png", "beach.png", "street.png"]
    segmenter = Segmenter(fdl.ResNetModel.load(weights), resize=64)
    for path in photos.iterdir():
        with Image.open(out / f"{path.stem}.png") as mask:
            assert mask.mode == "P"
            assert tuple(mask.getpalette()[:63]) == tuple(value for color in PALETTES["voc"].colors for value in color)
            np.testing.assert_array_equal(np.asarray(mask), segmenter(path))
            assert len(np.unique(np.asarray(mask))) > 1


def test_names_and_colours_are_those_that_the_checkpoint_was_trained_on(
    segment: Callable[..., Any], photos: Path, out: Path, tmp_path: Path
) -> None:
    model, classes = small_model(num_classes=21), ["background", *(f"part {index}" for index in range(20))]
    path = tmp_path / "trained.safetensors"
    write_safetensors(path, model.state_dict(), model.config, {"training": json.dumps({"classes": classes})})
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.pictures, "choose_palette", lambda *given: asked.append(given) or choose_palette(*given))
        assert segment(photos / "beach.jpg", "--out", out, "--weights", path).exit_code == 0
    assert asked == [("auto", 21, tuple(classes))]


def test_overlay(segment: Callable[..., Any], photos: Path, out: Path) -> None:
    assert segment(photos / "beach.jpg", "--out", out, "--overlay", "--opacity", 1).exit_code == 0
    assert names(out) == ["beach.overlay.png", "beach.png"]
    with Image.open(out / "beach.png") as mask, Image.open(out / "beach.overlay.png") as overlay:
        foreground = np.asarray(mask) != 0
        colors = np.asarray(mask.convert("RGB"))
        assert overlay.height > mask.height
        np.testing.assert_array_equal(np.asarray(overlay)[:33, :48][foreground], colors[foreground])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches_give_the_same_masks(segment: Callable[..., Any], photos: Path, out: Path, batch_size: int) -> None:
    assert segment(photos, "--out", out).exit_code == 0
    assert segment(photos, "--out", out.with_name("batches"), "--batch-size", batch_size).exit_code == 0
    for name in names(out):
        with Image.open(out / name) as one, Image.open(out.with_name("batches") / name) as batched:
            assert (np.asarray(one) == np.asarray(batched)).mean() > 0.99  # ties may round otherwise


def test_more_than_256_classes(segment: Callable[..., Any], photos: Path, out: Path, tmp_path: Path) -> None:
    small_model(num_classes=300, aux_head=False).save(tmp_path / "many.safetensors")
    result = segment(photos / "beach.jpg", "--out", out, "--overlay", "--weights", tmp_path / "many.safetensors")
    assert result.exit_code == 0, result.output
    with Image.open(out / "beach.png") as mask:
        assert mask.mode == "I;16"


def test_fault_17_bad_pictures_are_named_and_the_rest_is_done(
    segment: Callable[..., Any], photos: Path, out: Path
) -> None:
    (photos / "notes.jpg").write_text("These are notes.")
    (photos / "cut.png").write_bytes((photos / "street.png").read_bytes()[:2000])
    (photos / "empty.png").touch()
    for _ in range(2):  # the second run skips what is finished, and fails again where the first did
        result = segment(photos, "--out", out, "--batch-size", 4)
        assert result.exit_code == 1
        assert f"failed: {photos / 'notes.jpg'}: is not a picture in one of the formats" in result.stderr
        assert f"failed: {photos / 'cut.png'}: image file is truncated" in result.stderr
        assert f"failed: {photos / 'empty.png'}: is empty" in result.stderr
        assert names(out) == ["TREE.png", "beach.png", "street.png"]
    assert f"{out}: 0 segmented, 3 finished before, 3 failed" in result.stdout


def test_fault_17_a_folder_a_pipe_and_a_dangling_link_named_like_pictures(
    segment: Callable[..., Any], photos: Path, out: Path
) -> None:
    (photos / "folder.jpg").mkdir()
    os.mkfifo(photos / "pipe.jpg")
    (photos / "link.jpg").symlink_to("nowhere.jpg")
    result = segment(photos, "--out", out)
    assert result.exit_code == 1
    assert "pipe.jpg: is not a regular file" in result.stderr
    assert "link.jpg: No such file" in result.stderr
    assert "folder.jpg" not in result.stderr
    assert names(out) == ["TREE.png", "beach.png", "street.png"]


def test_fault_13_odd_sizes_and_one_pixel(segment: Callable[..., Any], out: Path, tmp_path: Path) -> None:
    sizes = {"dot": (1, 1), "line": (1, 50), "odd": (101, 67)}
    for name, size in sizes.items():
        save_photograph(tmp_path / f"{name}.png", *size)
    assert segment(*(tmp_path / f"{name}.png" for name in sizes), "--out", out, "--overlay").exit_code == 0
    for name, size in sizes.items():
        with Image.open(out / f"{name}.png") as mask:
            assert mask.size == size


def test_finished_pictures_need_no_model(
    segment: Callable[..., Any], photos: Path, out: Path, request: pytest.FixtureRequest
) -> None:
    segment(photos, "--out", out)
    before = states(out)
    request.getfixturevalue("no_model")
    result = segment(photos, "--out", out)
    assert result.exit_code == 0
    assert f"{out}: 0 segmented, 3 finished before" in result.stdout
    assert states(out) == before


def test_overlays_asked_for_later_are_made(segment: Callable[..., Any], photos: Path, out: Path) -> None:
    segment(photos, "--out", out)
    result = segment(photos, "--out", out, "--overlay")
    assert "3 segmented" in result.stdout
    assert len(names(out)) == 6
    assert "3 finished before" in segment(photos, "--out", out, "--overlay").stdout


def test_other_settings_and_overwrite(segment: Callable[..., Any], photos: Path, out: Path) -> None:
    segment(photos, "--out", out)
    before = states(out)
    result = segment(photos, "--out", out, "--resize", 32)
    assert result.exit_code == 0
    assert "3 kept from a run with other settings (--overwrite makes them anew)" in result.stdout
    assert states(out) == before
    assert "3 segmented" in segment(photos, "--out", out, "--resize", 32, "--overwrite").stdout
    assert names(out) == sorted(before)
    assert "3 finished before" in segment(photos, "--out", out, "--resize", 32).stdout


def test_two_sources_with_one_stem(segment: Callable[..., Any], photos: Path, out: Path) -> None:
    save_photograph(photos / "beach.png", 20, 10)
    result = segment(photos, "--out", out)
    assert f"{photos / 'beach.png'} -> {out / 'beach_2.png'}" in result.stdout
    for name, size in (("beach.png", (48, 33)), ("beach_2.png", (20, 10))):
        with Image.open(out / name) as mask:
            assert mask.size == size


def test_a_mask_of_another_folder_does_not_stand_for_this_picture(
    segment: Callable[..., Any], photos: Path, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    save_photograph(tmp_path / "other" / "beach.jpg", 20, 10)
    segment(photos / "beach.jpg", "--out", out)
    assert "1 segmented" in segment(tmp_path / "other", "--out", out).stdout
    assert names(out) == ["beach.png", "beach_2.png"]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("spelling", ["photos", "photos/../photos", "link"])
def test_an_input_picture_is_never_overwritten(
    spelling: str, segment: Callable[..., Any], photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(photos)
    before = states(photos)
    result = segment(photos, "--out", tmp_path / spelling, "--overwrite")
    assert result.exit_code == 2
    assert "choose another, so that no picture is replaced" in result.stderr
    assert states(photos) == before


def test_globs_folders_and_files_name_each_picture_once(
    segment: Callable[..., Any], photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "deep").mkdir()
    save_photograph(photos / "deep" / "cave.webp", 20, 20)
    save_photograph(photos / "odd[1].png", 20, 20)
    save_photograph(photos / ".hidden.png", 20, 20)
    (photos / "notes.txt").write_text("These are notes.")
    monkeypatch.chdir(photos.parent)
    result = segment("photos", "photos/odd[1].png", "photos/**/*.webp", photos / "beach.jpg", "--out", out)
    assert result.exit_code == 0, result.output
    assert names(out) == ["TREE.png", "beach.png", "cave.png", "odd[1].png", "street.png"]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.jpg", "there is no file or folder absent.jpg"),
        ("absent/*.jpg", "no files match absent/*.jpg"),
        ("empty", "no pictures in the folder empty (.jpg, .jpeg, .png"),
    ],
)
def test_nothing_found(
    source: str,
    message: str,
    segment: Callable[..., Any],
    photos: Path,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    result = segment(photos / "beach.jpg", source, "--out", out)
    assert result.exit_code == 2
    assert f"error: {message}" in result.stderr
    assert not out.exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--opacity", "1.5", "--opacity must be from 0 to 1, got 1.5"),
        ("--opacity", "nan", "--opacity must be from 0 to 1, got nan"),
        ("--depth", "34", "--depth must be 50, 101 or 152, got 34"),
        ("--output-stride", "32", "--output-stride must be 8 or 16, got 32"),
        ("--palette", "coco", "--palette must be voc, cityscapes, ade20k or auto, got coco"),
        ("--batch-size", "0", "--batch-size must be at least 1, got 0"),
        ("--batch-size", "two", "Invalid value for '--batch-size'"),
        ("--resize", "-1", "--resize must be at least 1, or 0 to keep the size, got -1"),
        ("--device", "gpu", "--device gpu can't be used"),
        ("--device", "meta", "--device meta can't be used"),
        ("--device", "cuda:99", "--device cuda:99 can't be used"),
        ("--weights", "absent.pth", "--weights: there is no file absent.pth"),
    ],
)
def test_wrong_options(
    option: str, value: str, message: str, segment: Callable[..., Any], photos: Path, out: Path
) -> None:
    result = segment(photos, "--out", out, option, value)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not out.exists()


@pytest.mark.usefixtures("no_model")
def test_depth_without_published_weights(segment: Callable[..., Any], photos: Path, out: Path) -> None:
    result = segment(photos, "--out", out, "--weights", "torchvision", "--depth", 152)
    assert result.exit_code == 2
    assert "torchvision has published weights of depth 50, 101, got 152" in result.stderr


@pytest.mark.usefixtures("no_model")
def test_output_that_is_a_file(segment: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("older")
    result = segment(photos, "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "File exists" in result.stderr
    assert (tmp_path / "file").read_text() == "older"


@pytest.mark.usefixtures("no_model")
def test_fault_16_damaged_weights(segment: Callable[..., Any], photos: Path, out: Path, weights: Path) -> None:
    damaged = photos / "damaged.safetensors"
    damaged.write_bytes(weights.read_bytes()[:10_000])
    result = segment(photos, "--out", out, "--weights", damaged)
    assert result.exit_code == 2
    assert "damaged.safetensors" in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert names(out) == []


def test_fault_16_weights_of_another_number_of_classes(segment: Callable[..., Any], photos: Path, out: Path) -> None:
    result = segment(photos, "--out", out, "--palette", "cityscapes")
    assert result.exit_code == 2
    assert "palette cityscapes has 19 classes, but the model has 21" in result.stderr
    assert names(out) == []


def test_weights_for_other_images(segment: Callable[..., Any], photos: Path, out: Path, tmp_path: Path) -> None:
    small_model(in_channels=4, aux_head=False).save(tmp_path / "four.safetensors")
    result = segment(photos, "--out", out, "--weights", tmp_path / "four.safetensors")
    assert result.exit_code == 2
    assert "pictures have 3 channels, the model takes 4" in result.stderr


def test_published_weights_out_of_reach(
    segment: Callable[..., Any], photos: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    result = segment(photos, "--out", out, "--weights", "torchvision")
    assert result.exit_code == 2
    assert "deeplabv3_resnet50_coco-cd0a2569.pth could not be downloaded" in result.stderr
    assert "no network" in result.stderr
    assert names(out) == []


def test_options_of_the_network_go_before_the_checkpoints(
    segment: Callable[..., Any], photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = []
    logits = fdl.ResNetModel.logits

    def watch(model: fdl.ResNetModel, images: Tensor) -> dict[str, Tensor]:
        configs.append(model.config["output_stride"])
        return logits(model, images)

    monkeypatch.setattr(fdl.ResNetModel, "logits", watch)
    segment(photos / "beach.jpg", "--out", out)
    segment(photos / "beach.jpg", "--out", out, "--output-stride", 16, "--overwrite")
    assert configs == [8, 16]


def test_fault_19_out_of_memory_in_the_middle_of_a_folder(
    segment: Callable[..., Any], photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_photograph(photos / "panorama.png", 150, 40)
    logits = fdl.ResNetModel.logits

    def small_memory(model: fdl.ResNetModel, images: Tensor) -> dict[str, Tensor]:
        if len(images) > 1 or images.shape[-1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return logits(model, images)

    monkeypatch.setattr(fdl.ResNetModel, "logits", small_memory)
    result = segment(photos, "--out", out, "--batch-size", 3)
    assert result.exit_code == 1
    assert f"failed: {photos / 'panorama.png'}: not enough memory to segment it" in result.stderr
    assert names(out) == ["TREE.png", "beach.png", "street.png"]


def test_fault_21_interrupted_run_leaves_whole_files_and_goes_on(
    segment: Callable[..., Any], photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save
    written = []

    def interrupted_at_the_third(image: Image.Image, path: Path, **options: object) -> None:
        written.append(path)
        if len(written) == 3:
            path.write_bytes(b"\x89PNG half")
            raise KeyboardInterrupt
        save(image, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted_at_the_third)
        result = segment(photos, "--out", out, "--overlay")
    assert result.exit_code == 130
    assert "the same command goes on with the rest" in result.stderr
    assert names(out) == ["TREE.overlay.png", "TREE.png"]
    result = segment(photos, "--out", out, "--overlay")
    assert "2 segmented, 1 finished before" in result.stdout


def test_fault_21_full_disk(
    segment: Callable[..., Any], photos: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save

    def full_for_one(image: Image.Image, path: Path, **options: object) -> None:
        if image.size == (33, 48):
            path.write_bytes(b"\x89PNG half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", full_for_one)
    result = segment(photos, "--out", out)
    assert result.exit_code == 1
    assert f"failed: {photos / 'street.png'}: No space left on device" in result.stderr
    assert names(out) == ["TREE.png", "beach.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse names that are no text")
def test_a_file_name_that_is_no_text(segment: Callable[..., Any], out: Path, photos: Path) -> None:
    path = photos / os.fsdecode(b"\xff.jpg")
    (photos / "beach.jpg").rename(path)
    (photos / os.fsdecode(b"\xfe.jpg")).touch()
    result = segment(photos, "--out", out)
    assert result.exit_code == 1
    assert "\\udcfe.jpg: is empty" in result.stderr
    assert "3 finished before" in segment(photos, "--out", out).stdout


def test_as_a_program(photos: Path, out: Path, weights: Path) -> None:
    (photos / "notes.jpg").write_text("These are notes.")
    command = [sys.executable, "-m", "fastdeeplab.cli", "segment", photos, "--out", out, "--weights", weights]
    done = subprocess.run([*command, "--resize", "64", "--overlay"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "3 segmented, 1 failed" in done.stdout
    assert "notes.jpg: is not a picture" in done.stderr
    assert len(names(out)) == 6


@pytest.mark.parametrize("package", ["typer", "rich", "PIL"])
def test_without_its_packages_the_program_names_the_extra(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from fastdeeplab.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"The command line needs the package {package}: pip install 'fastdeeplab[pictures]'\n"


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["segment photos --out masks", "demo --out masks", "info"])
def test_an_unknown_value_in_the_environment(command: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    monkeypatch.setenv("FASTDEEPLAB_KERNELS", "off")
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2
    message = "the environment variable FASTDEEPLAB_KERNELS must be \"torch\" or unset, got 'off'"
    assert result.stderr == f"error: {message}\n"
    assert names(photos.parent) == ["photos"]


def info() -> str:
    result = CliRunner().invoke(cli.app, ["info"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_info_shows_versions() -> None:
    lines = info()
    for package, version in (("fastdeeplab", fdl.__version__), ("torch", torch.__version__)):
        assert any(package in line and version in line for line in lines.splitlines())


def test_fault_18_info_without_triton() -> None:
    code = (
        "import sys, importlib.metadata as metadata\n"
        "sys.modules['triton'] = None\n"
        "version = metadata.version\n"
        "def without_triton(name):\n"
        "    if name == 'triton':\n        raise metadata.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "metadata.version = without_triton\n"
        "sys.argv = ['fastdeeplab', 'info']\n"
        "from fastdeeplab.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any("triton" in line and "not installed" in line for line in done.stdout.splitlines())


def test_fault_18_info_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    lines = info()
    assert "no: this PyTorch is built without CUDA" in lines
    for function in ("upsample_argmax", "upsample_cross_entropy"):
        assert any(f"kernel {function}" in line and "no, PyTorch instead: " in line for line in lines.splitlines())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no: PyTorch finds no NVIDIA GPU and driver" in info()


def test_fault_18_info_on_an_old_gpu_and_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    class Properties:
        name, major, minor, total_memory = "Tesla T4", 7, 5, 15 * 2**30

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: Properties.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    why_not.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    lines = info()
    assert "Tesla T4, compute capability 7.5, 15 GiB" in lines
    assert "Tesla T4 has compute capability 7.5, the kernels need 8.0" in lines

    why_not.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "Triton needs a C compiler" in info()
    why_not.cache_clear()


def test_info_finds_published_weights_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "to be downloaded on first use" in info()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "deeplabv3_resnet50_coco-cd0a2569.pth").touch()
    assert f"in {tmp_path}" in info()


def test_suffixes_are_those_of_formats_that_can_be_read() -> None:
    Image.init()
    assert {Image.EXTENSION[suffix] for suffix in cli.pictures.SUFFIXES} == set(pictures.FORMATS)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"})


def test_tune_where_no_kernel_runs(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDEEPLAB_KERNELS", "torch")
    result = run("tune", "--weights", str(weights), "--size", "33x40", "--device", "cpu")
    assert result.exit_code == 0
    assert "nothing to tune: FASTDEEPLAB_KERNELS=torch" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "--size", "33"), "--size must be HEIGHTxWIDTH"),
        (("tune", "--size", "0x33"), "--size must be two positive numbers"),
        (("tune", "--depth", "18"), "--depth must be 50, 101 or 152"),
        (("bench", "--dtype", "float64"), "--dtype must be float32, float16, bfloat16"),
        (("bench", "--seconds", "0"), "--seconds must be positive"),
        (("bench", "--batch-size", "0"), "--batch must be at least 1"),
        (("tune", "--weights", "nothing.pth", "--size", "33x33"), "nothing.pth"),
        (("verify", "--device", "abacus"), "--device abacus can't be used"),
    ],
)
def test_wrong_options_of_measuring(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("right", [True, False])
def test_the_status_of_verify(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run_verify(console: object, device: torch.device, *, quick: bool) -> bool:
        asked.append((device.type, quick))
        return right

    monkeypatch.setattr("fastdeeplab.verify.run_verify", run_verify)
    assert run("verify", "--quick", "--device", "cpu").exit_code == (0 if right else 1)
    assert asked == [("cpu", True)]


def test_what_bench_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run_bench(console: object, network: object, device: torch.device, **options: object) -> None:
        asked.append((str(network), options))
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdeeplab.bench.run_bench", run_bench)
    path = tmp_path / "rows.csv"
    chart, options = tmp_path / "bench.png", ("--size", "64x96", "--batch-size", "2", "--profile", "--device", "cpu")
    result = run("bench", *options, "--csv", str(path), "--chart", str(chart))
    assert result.exit_code == 130
    expected = {"quick": False, "csv": path, "chart": chart, "profile": True, "seconds": 2.0}
    assert asked == [("R50 OS8 64x96 B2 K=21", expected)]


@pytest.fixture(scope="module")
def six_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network for as many classes as the shapes have."""
    path = tmp_path_factory.mktemp("weights") / "six.safetensors"
    small_model(aux_head=False, num_classes=6).save(path)
    return path


def test_evaluate_shows_and_writes_what_it_finds(six_classes: Path, tmp_path: Path) -> None:
    figures, chart = tmp_path / "figures.json", tmp_path / "chart.png"
    options = ("--data", "shapes", "--limit", "4", "--size", "40x56", "--batch-size", "3", "--device", "cpu")
    result = run("evaluate", str(six_classes), *options, "--json", str(figures), "--chart", str(chart))
    assert result.exit_code == 0, result.output
    found = json.loads(figures.read_text())
    assert found["pictures"] == 4
    assert sum(map(sum, found["confusion"])) == 4 * 40 * 56
    assert [row["name"] for row in found["classes"]] == ["background", "disc", "ring", "square", "triangle", "star"]
    assert "mIoU" in result.stdout
    assert f"{found['miou']:.4f}" in result.stdout
    with Image.open(chart) as image:
        assert image.format == "PNG"


def test_evaluate_takes_the_packaged_checkpoint_for_shapes(six_classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(cli.training, "packaged_checkpoint", lambda name: asked.append(name) or six_classes)
    result = run("evaluate", "--limit", "2", "--size", "32x32", "--seed", "5", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert asked == ["shapes"]


def test_evaluate_a_folder_with_the_masks_that_segment_wrote(
    segment: Callable[..., Any], photos: Path, out: Path, weights: Path, tmp_path: Path
) -> None:
    """Its own masks, at the pictures' own size, but with one class ignored and one picture's mask of another class."""
    segment(photos, "--out", out, "--resize", 0)
    ignored = 0
    for path in out.iterdir():
        mask = np.asarray(Image.open(path))
        ignored += int((mask == mask[0, 0]).sum())
        Image.fromarray(np.where(mask == mask[0, 0], 255, mask).astype(np.uint8)).save(path)
    options = ["--data", "folder", "--images", str(photos), "--masks", str(out), "--json", str(tmp_path / "f.json")]
    assert run("evaluate", str(weights), *options, "--device", "cpu").exit_code == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["pictures"] == 3
    assert found["pixel_accuracy"] > 0.995  # folding the batch norms rounds differently
    assert sum(map(sum, found["confusion"])) == 3 * 48 * 33 - ignored
    assert found["classes"][20]["name"] == "class 20"


def test_fault_17_evaluate_names_a_picture_that_can_not_be_read(
    segment: Callable[..., Any], photos: Path, out: Path, weights: Path, tmp_path: Path
) -> None:
    segment(photos, "--out", out)
    (photos / "street.png").write_bytes(b"")
    options = ["--images", str(photos), "--masks", str(out), "--json", str(tmp_path / "figures.json")]
    result = run("evaluate", str(weights), "--data", "folder", *options, "--device", "cpu")
    assert result.exit_code == 1
    assert f"failed: {photos / 'street.png'}: is empty\n" in result.stderr
    assert json.loads((tmp_path / "figures.json").read_text())["pictures"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "coco"), "--data must be shapes, folder, voc, cityscapes, ade20k, got coco"),
        (("--data", "ade20k"), "--data ade20k needs the weights of a model for its classes"),
        (("--data", "folder"), "--data folder needs the weights of a model for its classes"),
        (("--size", "big"), "--size must be HEIGHTxWIDTH"),
        (("--dtype", "float64"), "--dtype must be float32, float16, bfloat16"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--json", "nowhere/figures.json"), "--json nowhere/figures.json: there is no folder nowhere"),
        (("--chart", "nowhere/chart.png"), "--chart nowhere/chart.png: there is no folder nowhere"),
        (("nothing.safetensors",), "error: there is no file nothing.safetensors"),
        ((__file__,), "is not a checkpoint"),
    ],
)
def test_wrong_options_of_evaluate(arguments: tuple[str, ...], message: str, six_classes: Path) -> None:
    if arguments[0].startswith("--") and arguments[0] != "--data":
        arguments += (str(six_classes),)
    result = run("evaluate", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "voc"), "voc needs root"),
        (("--data", "voc", "--root", "nowhere"), "nowhere: there is no such folder"),
        (("--data", "folder", "--images", "nowhere"), "folder needs masks"),
        (("--root", "nowhere"), "root can't be given for shapes"),
        (("--split", "test"), "split must be train or val for shapes"),
        (("--seed", "-1"), "seed must be an integer from 0 up"),
        (("--limit", "0"), "limit must be at least 1"),
    ],
)
def test_data_that_evaluate_can_not_open(arguments: tuple[str, ...], message: str, six_classes: Path) -> None:
    result = run("evaluate", str(six_classes), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_evaluate_another_number_of_classes(weights: Path) -> None:
    result = run("evaluate", str(weights))
    assert result.exit_code == 2
    assert "the model has 21 classes, the data set 6" in result.stderr


def test_there_is_no_packaged_checkpoint_of_an_unknown_name() -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint named nothing comes with the package"):
        packaged_checkpoint("nothing")
