"""Names of masks and overlays: one per source, the same in every run, never another source's file."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdeeplab.outputs import MASK, OVERLAY, Output, State, plan
from fastdeeplab.palettes import PALETTES
from fastdeeplab.pictures import write_mask

SETTINGS: dict[str, dict[str, Any]] = {MASK: {"resize": 520}, OVERLAY: {"resize": 520, "opacity": 0.5}}


def make(folder: Path, *names: str) -> list[Path]:
    """Files that stand for pictures; here nobody reads them."""
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a picture")
    return paths


def finish(outputs: list[Output], *suffixes: str) -> None:
    for output in outputs:
        output.folder.mkdir(exist_ok=True)
        for suffix in suffixes or (MASK, OVERLAY):
            path = output.folder / (output.stem + suffix)
            write_mask(path, np.zeros((2, 2), int), PALETTES["voc"], output.text(suffix, SETTINGS[suffix]))


def stems(outputs: list[Output]) -> list[str]:
    return [output.stem for output in outputs]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jpg", "b.jpg"], ["a", "b"]),
        (["a.jpg", "a.png", "a.webp"], ["a", "a_2", "a_3"]),
        (["one/a.jpg", "two/a.jpg"], ["a", "a_2"]),
        (["a.jpg", "A.png"], ["a", "A_2"]),
        (["straße.jpg", "STRASSE.jpg"], ["straße", "STRASSE_2"]),
        (["caf\u00e9.jpg", "cafe\u0301.png"], ["caf\u00e9", "cafe\u0301_2"]),
        (["a.jpg", "a.overlay.jpg"], ["a", "a.overlay_2"]),
        (["a.overlay.jpg", "a.png"], ["a.overlay", "a_2"]),
        (["a_2.jpg", "a.jpg", "a.png"], ["a_2", "a", "a_3"]),
        (["a.tar.jpg", ".a.jpg"], ["a.tar", ".a"]),
    ],
)
def test_every_source_has_names_of_its_own(names: list[str], expected: list[str], tmp_path: Path) -> None:
    outputs = plan(make(tmp_path / "in", *names), tmp_path / "out")
    assert stems(outputs) == expected
    files = [path.name.casefold() for output in outputs for path in (output.mask, output.overlay)]
    assert len(set(files)) == len(files)


def test_finished_sources_are_known_again(tmp_path: Path) -> None:
    sources = make(tmp_path / "in", "a.jpg", "a.png", "b.jpg", "two/a.jpg")
    outputs = plan(sources, tmp_path / "out")
    assert [output.state(SETTINGS) for output in outputs] == [State.MISSING] * 4
    finish(outputs)
    again = plan(sources, tmp_path / "out")
    assert stems(again) == stems(outputs)
    assert [output.state(SETTINGS) for output in again] == [State.FINISHED] * 4


def test_names_do_not_depend_on_what_else_is_in_the_run(tmp_path: Path) -> None:
    sources = make(tmp_path / "in", *(f"{folder}/a.{suffix}" for folder in "xyz" for suffix in ("jpg", "PNG")))
    first = plan(sources, tmp_path / "out")
    finish(first)
    names = dict(zip(sources, stems(first), strict=True))
    for _ in range(10):
        some = random.sample(sources, 3)
        for output in plan(some, tmp_path / "out"):
            assert output.stem == names[output.source]
            assert output.state(SETTINGS) is State.FINISHED


def test_a_mask_of_another_source_with_the_same_stem(tmp_path: Path) -> None:
    first, second = make(tmp_path / "in", "a.jpg", "a.png")
    finish(plan([first], tmp_path / "out"))
    [output] = plan([second], tmp_path / "out")
    assert output.stem == "a_2"
    assert output.state(SETTINGS) is State.MISSING


def test_an_overlay_that_has_the_name_of_a_mask(tmp_path: Path) -> None:
    first, second = make(tmp_path / "in", "a.jpg", "a.overlay.jpg")
    finish(plan([first], tmp_path / "out"))
    [output] = plan([second], tmp_path / "out")
    assert output.stem == "a.overlay_2"


@pytest.mark.parametrize("name", ["a.png", "A.PNG", "a.overlay.png"])
def test_files_that_no_run_wrote_are_left_alone(name: str, tmp_path: Path) -> None:
    [source] = make(tmp_path / "in", "a.jpg")
    make(tmp_path / "out", name)
    assert stems(plan([source], tmp_path / "out")) == ["a_2"]
    Image.new("P", (2, 2)).save(tmp_path / "out" / name)
    assert stems(plan([source], tmp_path / "out")) == ["a_2"]


def test_a_renamed_mask_is_not_taken_for_an_overlay(tmp_path: Path) -> None:
    [source] = make(tmp_path / "in", "a.jpg")
    outputs = plan([source], tmp_path / "out")
    finish(outputs)
    outputs[0].mask.replace(outputs[0].overlay)
    [output] = plan([source], tmp_path / "out")
    assert output.state(SETTINGS) is State.MISSING


def test_an_overlay_asked_for_later_is_missing(tmp_path: Path) -> None:
    sources = make(tmp_path / "in", "a.jpg")
    finish(plan(sources, tmp_path / "out"), MASK)
    [output] = plan(sources, tmp_path / "out")
    assert output.stem == "a"
    assert output.state({MASK: SETTINGS[MASK]}) is State.FINISHED
    assert output.state(SETTINGS) is State.MISSING


def test_a_changed_picture_is_segmented_again(tmp_path: Path) -> None:
    sources = make(tmp_path / "in", "a.jpg")
    finish(plan(sources, tmp_path / "out"))
    sources[0].write_bytes(b"another picture")
    [output] = plan(sources, tmp_path / "out")
    assert output.stem == "a"
    assert output.state(SETTINGS) is State.MISSING


def test_other_settings_are_told_apart(tmp_path: Path) -> None:
    sources = make(tmp_path / "in", "a.jpg")
    finish(plan(sources, tmp_path / "out"))
    [output] = plan(sources, tmp_path / "out")
    assert output.state(SETTINGS | {OVERLAY: {"resize": 520, "opacity": 1}}) is State.OTHER_SETTINGS
    assert output.state({MASK: {"resize": 100}}) is State.OTHER_SETTINGS


def test_masks_are_known_again_after_both_folders_moved(tmp_path: Path) -> None:
    sources = make(tmp_path / "project" / "in", "a.jpg")
    finish(plan(sources, tmp_path / "project" / "out"))
    (tmp_path / "project").rename(tmp_path / "moved")
    [output] = plan([tmp_path / "moved" / "in" / "a.jpg"], tmp_path / "moved" / "out")
    assert output.state(SETTINGS) is State.FINISHED


def test_thousands_of_equal_names_take_no_time(tmp_path: Path) -> None:
    sources = [tmp_path / str(number) / "rgb.png" for number in range(3000)]
    outputs = plan(sources, tmp_path / "out")
    assert outputs[-1].stem == "rgb_3000"
