"""The demonstration: on scenes with the packaged weights, on photographs with a small network for the published one."""

import io
import socket
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import small_model
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from fastdeeplab import checkpoint, cli, demo
from fastdeeplab.data import Shapes


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_photographs_come_with_scikit_image() -> None:
    sizes = {"astronaut.png": (512, 512), "chelsea.png": (451, 300), "motorcycle_left.png": (741, 500)}
    for path in demo.find_photographs():
        with Image.open(path) as picture:
            assert picture.size == sizes[path.name]


def test_scenes_are_segmented_by_the_packaged_weights_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket, "socket", no_network)
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "demo")], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if "scene-" in line]
    assert len(rows) == demo.SCENES
    for index, row in enumerate(rows):
        name = f"scene-{index + 1}"
        expected = Shapes("val", seed=demo.SCENE_SEED, size=demo.SCENE_SIZE)[index][1].numpy()
        with Image.open(tmp_path / f"demo/{name}.png") as image:
            mask = np.asarray(image)
        right = float((mask == expected).mean())
        assert right > 0.9
        assert f"{right:.1%}" in row
        assert "background" in row
        for suffix in (f"scenes/{name}.png", f"{name}.overlay.png"):
            assert (tmp_path / "demo" / suffix).is_file()


def test_photographs(console: Console, tmp_path: Path) -> None:
    demo.segment_photographs(tmp_path, console, load_model=lambda _: small_model(num_classes=21, aux_head=False).eval())
    stems = ("astronaut", "chelsea", "motorcycle_left")
    expected = {f"{stem}{suffix}" for stem in stems for suffix in (".png", ".overlay.png")}
    assert {path.name for path in tmp_path.iterdir()} == expected
    with Image.open(tmp_path / "chelsea.png") as mask:
        assert mask.size == (451, 300)
        assert mask.mode == "P"
        assert np.asarray(mask).max() < 21
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for stage in ("load the model", "read", "preprocess", "network", "upsample + argmax", "write"):
        assert stage in printed
    assert "chelsea.png" in printed
    assert "%" in printed


def test_without_a_network_one_line_says_that_the_masks_mean_nothing(
    console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts = []

    def no_network(*_: object, **__: object) -> None:
        timeouts.append(socket.getdefaulttimeout())
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(demo, "ResNetModel", lambda depth, **arguments: small_model(**arguments, weights=None))
    monkeypatch.setattr(
        demo, "load_weights", lambda model, _: checkpoint._download(checkpoint.PUBLISHED["torchvision"][50])
    )
    before = torch.get_rng_state()
    model = demo.load_published(console)
    assert not model.training
    assert timeouts == [demo.CONNECT_SECONDS]
    assert socket.getdefaulttimeout() is None
    assert torch.equal(torch.get_rng_state(), before)
    [line] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert line.endswith("the weights are random and the masks mean nothing.")


def test_published_weights_are_used_where_they_can_be_had(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(demo, "ResNetModel", lambda depth, **arguments: small_model(**arguments))
    monkeypatch.setattr(demo, "load_weights", lambda model, source: loaded.append(source))
    demo.load_published(console)
    assert loaded == ["torchvision"]
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_without_scikit_image_the_command_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda _: None)
    result = CliRunner().invoke(cli.app, ["demo", "--photographs"])
    assert result.exit_code == 2
    assert "scikit-image is missing: pip install 'fastdeeplab[demo]'" in result.stderr
