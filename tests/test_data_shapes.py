"""Scenes of shapes: what decides about a scene, what is in it, and opening data sets by name."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastdeeplab.data import DATASETS, IGNORED, Augmentation, Augmented, Shapes, check_dataset, open_dataset
from fastdeeplab.data.shapes import CLASSES, OUTLINES


def test_a_scene_is_an_image_and_its_target() -> None:
    dataset = open_dataset("shapes", "val", size=(40, 56), limit=3)
    assert len(dataset) == 3
    assert dataset.classes == ("background", "disc", "ring", "square", "triangle", "star")
    image, target = dataset[2]
    assert (image.shape, image.dtype) == ((3, 40, 56), torch.uint8)
    assert (target.shape, target.dtype) == ((40, 56), torch.uint8)
    assert "val scene 2" in dataset.name(2)
    with pytest.raises(IndexError):
        dataset[3]


def test_a_scene_depends_on_seed_split_index_and_size_alone() -> None:
    def scene(split: str = "train", seed: int = 0, index: int = 0, size: int = 32, limit: int = 9) -> bytes:
        return Shapes(split, seed=seed, size=size, limit=limit)[index][0].numpy().tobytes()

    np.random.seed(1)
    before = scene()
    np.random.seed(2)
    assert scene() == before
    assert scene(limit=3) == before
    others = [scene("val"), scene(seed=1), scene(index=1), scene(seed=1, index=1), scene(size=33)]
    assert len({before, *others}) == 6


def test_drawing_leaves_the_global_random_states_alone() -> None:
    numbers, tensor = np.random.get_state()[1].copy(), torch.get_rng_state()
    Shapes(size=32)[0]
    assert (np.random.get_state()[1] == numbers).all()
    assert torch.equal(torch.get_rng_state(), tensor)


def test_no_scene_is_in_both_splits() -> None:
    train, val = (
        {dataset[index][0].numpy().tobytes() for index in range(50)}
        for dataset in (Shapes("train", size=24), Shapes("val", size=24))
    )
    assert len(train | val) == 100


def test_every_class_occurs_and_none_fills_the_scenes() -> None:
    pixels = sum(torch.bincount(Shapes(size=64)[index][1].flatten(), minlength=6) for index in range(60))
    shares = pixels / pixels.sum()
    assert len(shares) == len(CLASSES)
    assert (shares > 0.02).all()
    assert shares.max() < 0.75


@pytest.mark.parametrize(
    ("name", "area", "symmetry"),
    [
        ("disc", np.pi, 360),
        ("ring", np.pi * 0.75, 360),
        ("square", 2.0, 4),
        ("triangle", 0.75 * 3**0.5, 3),
        ("star", 5 * 0.45 * np.sin(np.pi / 5), 5),  # ten triangles with sides 1 and 0.45 and 36 degrees between
    ],
)
def test_outlines(name: str, area: float, symmetry: int) -> None:
    """Within the unit circle, reaching it, of the exact area, and the same when turned by its symmetry."""
    axis = np.linspace(-1.1, 1.1, 801, dtype=np.float32)
    u, v = axis[None, :], axis[:, None]
    inside = OUTLINES[name](u, v)
    assert inside.mean() * 2.2**2 == pytest.approx(area, rel=0.01)
    distance = np.hypot(u, v)[inside].max()
    assert 0.98 < distance <= 1.001
    turn = 2 * np.pi / symmetry
    turned = OUTLINES[name](np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u)
    assert (turned != inside).mean() < 0.003
    half = OUTLINES[name](np.cos(turn / 2) * u + np.sin(turn / 2) * v, np.cos(turn / 2) * v - np.sin(turn / 2) * u)
    assert ((half != inside).mean() > 0.05) == (symmetry < 10)


def test_triangles_and_stars_point_up() -> None:
    top, bottom = (np.array([[0.0]]), np.array([[-0.97]])), (np.array([[0.0]]), np.array([[0.6]]))
    for name in ("triangle", "star"):
        assert OUTLINES[name](*top).item()
        assert not OUTLINES[name](*bottom).item()


def test_colour_tells_no_class() -> None:
    """The mean colours of the classes over many scenes are alike."""
    total, count = np.zeros((6, 3)), np.zeros((6, 1))
    for index in range(150):
        image, target = Shapes(size=48)[index]
        for kind in range(6):
            values = image[:, target == kind].numpy().T
            total[kind] += values.sum(0)
            count[kind] += len(values)
    assert np.ptp(total / count / 255, axis=0).max() < 0.2


def test_a_scene_takes_milliseconds() -> None:
    """Of computing; the best, for other processes may be busy."""
    dataset, seconds = Shapes(), []
    for index in range(20):
        start = time.thread_time()
        dataset[index]
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.05


@pytest.mark.parametrize("size", [8, (8, 300), (257, 31)])
def test_scenes_of_odd_sizes(size: Any) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    image, target = Shapes(size=size)[5]
    assert image.shape == (3, height, width)
    assert target.max() < 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: open_dataset("coco"), f"data must be {', '.join(DATASETS)}, got 'coco'"),
        (lambda: open_dataset("shapes", "test"), "split must be train or val for shapes, got 'test'"),
        (lambda: open_dataset("shapes", "all"), "split must be train or val for shapes"),
        (lambda: open_dataset("shapes", limit=0), "limit must be at least 1, got 0"),
        (lambda: open_dataset("shapes", seed=-1), "seed must be an integer from 0 up, got -1"),
        (lambda: open_dataset("shapes", size=7), "size must be from 8 to 8192 pixels, got 7 x 7"),
        (lambda: open_dataset("shapes", size=(64, 9000)), "size must be from 8 to 8192 pixels, got 64 x 9000"),
        (lambda: open_dataset("shapes", root="."), "root can't be given for shapes"),
        (lambda: open_dataset("shapes", classes=6), "classes can't be given for shapes"),
        (lambda: open_dataset("folder", images="."), "folder needs masks and classes"),
        (lambda: open_dataset("voc"), "voc needs root"),
        (lambda: open_dataset("voc", root=".", images="."), "images can't be given for voc"),
        (lambda: open_dataset("ade20k", root=".", size=64), "size can't be given for ade20k"),
    ],
)
def test_wrong_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_shapes_have_no_problems() -> None:
    seen: list[int] = []
    assert check_dataset(Shapes(size=16, limit=5), progress=seen.append) == []
    assert seen == [1, 2, 3, 4, 5]


def test_shapes_can_be_augmented() -> None:
    image, target = Augmented(Shapes(size=64), Augmentation(crop_size=48))[1, 0]
    assert image.shape == (3, 48, 48)
    assert set(target.unique().tolist()) <= {*range(6), IGNORED}
