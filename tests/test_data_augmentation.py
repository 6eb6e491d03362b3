"""Augmentation: image and target stay together, random numbers belong to the sample, a damaged picture ends no run."""

import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from fastdeeplab.data import IGNORED, Augmentation, Augmented, PairedFiles, SegmentationDataset, Shapes
from fastdeeplab.segmenter import Segmenter

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
STILL: dict[str, Any] = {"scale": (1, 1), "flip": 0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
STILL |= {"mean": (0, 0, 0), "std": (1, 1, 1)}


class Gradient:
    """One picture, whose red and green give a pixel's place, as its target's class does its column."""

    classes = tuple(map(str, range(100)))

    def __init__(self, height: int = 40, width: int = 60) -> None:
        self.y, self.x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.stack([self.y, self.x, torch.zeros_like(self.x)]).to(torch.uint8), self.x.to(torch.uint8)

    def name(self, index: int) -> str:
        return f"gradient {index}"


def places(image: Tensor) -> tuple[Tensor, Tensor]:
    return image[0] * 255, image[1] * 255


def test_nothing_random_is_the_picture_itself_normalised() -> None:
    image, target = Shapes(size=32)[0]
    augmented, same = Augmentation(
        crop_size=32, **{**STILL, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    )(image, target, np.random.default_rng(0))
    assert torch.equal(same, target)
    expected = Segmenter(torch.nn.Identity(), resize=None).preprocess(Image.fromarray(image.permute(1, 2, 0).numpy()))
    torch.testing.assert_close(augmented, expected, atol=1e-6, rtol=0)


def test_a_sample_is_normalised_floats_and_classes() -> None:
    image, target = Augmented(Shapes(size=64), Augmentation(crop_size=(24, 40)))[0, 0]
    assert (image.shape, image.dtype) == ((3, 24, 40), torch.float32)
    assert (target.shape, target.dtype) == ((24, 40), torch.uint8)
    assert image.is_contiguous()
    assert target.is_contiguous()
    assert image.abs().max() < 3


def test_crops_are_windows_of_image_and_target_alike() -> None:
    augmented = Augmented(Gradient(), Augmentation(crop_size=16, **STILL))
    corners = set()
    for index in range(300):
        image, target = augmented[0, index]
        rows, columns = places(image)
        assert torch.equal(columns.round().to(torch.uint8), target)
        top, left = int(rows[0, 0].round()), int(columns[0, 0].round())
        assert torch.allclose(rows, top + torch.arange(16.0)[:, None].expand(16, 16), atol=1e-3)
        assert torch.allclose(columns, left + torch.arange(16.0).expand(16, 16), atol=1e-3)
        corners.add((top, left))
    tops, lefts = zip(*corners, strict=True)
    assert (min(tops), max(tops)) == (0, 40 - 16)
    assert (min(lefts), max(lefts)) == (0, 60 - 16)


def test_flips_turn_image_and_target_half_of_the_time() -> None:
    augmented = Augmented(Gradient(), Augmentation(crop_size=16, **{**STILL, "flip": 0.5}))
    flipped = 0
    for index in range(200):
        image, target = augmented[0, index]
        assert torch.equal(places(image)[1].round().to(torch.uint8), target)
        flipped += int(target[0, 0] > target[0, 1])
    assert 70 <= flipped <= 130
    always = Augmented(Gradient(), Augmentation(crop_size=16, **{**STILL, "flip": 1}))
    assert (always[0, 0][1].diff() == 255).all()  # down by one, in uint8


@pytest.mark.parametrize("factor", [0.5, 1.37, 2.0])
def test_scaling_keeps_image_and_target_together(factor: float) -> None:
    """A pixel's red and green say where it comes from, to a pixel; the target says the same."""
    augmented = Augmented(Gradient(), Augmentation(crop_size=16, **{**STILL, "scale": (factor, factor)}))
    for index in range(20):
        image, target = augmented[0, index]
        rows, columns = places(image)
        inner = columns[:, 1:-1]
        assert (inner - target[:, 1:-1]).abs().max() <= 1
        step = columns[:, 2:-2].diff().mean().item()
        assert step == pytest.approx(1 / factor, rel=0.1)
        assert rows[2:-2].diff(dim=0).mean().item() == pytest.approx(1 / factor, rel=0.1)


def test_scales_fill_their_range() -> None:
    augmented = Augmented(Gradient(), Augmentation(crop_size=200, **{**STILL, "scale": (0.5, 2)}))
    widths = [int((augmented[0, index][1][0] != IGNORED).sum()) for index in range(200)]
    assert 30 <= min(widths) < 36
    assert 114 < max(widths) <= 120


def test_what_is_too_small_is_padded() -> None:
    """The image with the mean, which is 0 after normalising, the target with 255."""
    image, target = Augmented(Gradient(5, 7), Augmentation(crop_size=(8, 16), **{**STILL, **IMAGENET}))[0, 0]
    assert (target[:5, :7] != IGNORED).all()
    outside = torch.ones(8, 16, dtype=torch.bool)
    outside[:5, :7] = False
    assert (target[outside] == IGNORED).all()
    assert (image[:, outside] == 0).all()
    assert (image[:, :5, :7] != 0).all()


def test_ignored_pixels_are_not_blended_into_classes() -> None:
    target = torch.zeros(9, 9, dtype=torch.uint8)
    target[3:6, 3:6] = IGNORED
    augment = Augmentation(crop_size=32, **{**STILL, "scale": (0.5, 2)})
    for seed in range(20):
        _, scaled = augment(torch.zeros(3, 9, 9, dtype=torch.uint8), target, np.random.default_rng(seed))
        assert set(scaled.unique().tolist()) <= {0, IGNORED}


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colours_change_by_their_range(name: str) -> None:
    """The target stays, the image changes differently from sample to sample, and stays between 0 and 1."""
    image, target = Shapes(size=32)[3]
    augment = Augmentation(crop_size=32, **{**STILL, name: 0.5})
    plain = image.float() / 255
    changed = [augment(image, target, np.random.default_rng(seed)) for seed in range(8)]
    assert all(torch.equal(same, target) for _, same in changed)
    assert all(pixels.min() >= 0 and pixels.max() <= 1 for pixels, _ in changed)
    assert min((pixels - plain).abs().mean() for pixels, _ in changed) > 1e-4
    assert len({pixels.mean().item() for pixels, _ in changed} | {pixels.std().item() for pixels, _ in changed}) > 8


def test_brightness_is_a_factor_and_grey_has_no_colour_to_change() -> None:
    image, target = torch.full((3, 4, 4), 100, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)
    augment = Augmentation(crop_size=4, **{**STILL, "brightness": 0.5})
    factors = torch.tensor([augment(image, target, np.random.default_rng(s))[0].mean() * 255 / 100 for s in range(200)])
    assert 0.5 <= factors.min() < 0.52
    assert 1.48 < factors.max() <= 1.5
    augment = Augmentation(crop_size=4, **{**STILL, "saturation": 0.5, "hue": 0.5})
    pixels, _ = augment(image, target, np.random.default_rng(0))
    torch.testing.assert_close(pixels, image / 255)


def test_a_sample_depends_on_seed_epoch_and_index_alone() -> None:
    def sample(seed: int = 0, epoch: int = 0, index: int = 0) -> bytes:
        return Augmented(Gradient(), Augmentation(crop_size=16), seed)[epoch, index][0].numpy().tobytes()

    random.seed(0)
    before = sample()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert sample() == before
    others = [sample(seed=1), sample(epoch=1), sample(index=1), sample(1, 1, 0), sample(0, 1, 1), sample(1, 0, 1)]
    assert len({before, *others}) == 7


def test_global_random_states_stay_as_they_are() -> None:
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    Augmented(Shapes(size=32), Augmentation(crop_size=32))[0, 0]
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_the_number_of_workers_changes_nothing() -> None:
    augmented = Augmented(Shapes(size=32), Augmentation(crop_size=24), seed=3)
    keys = [(epoch, index) for epoch in (0, 1) for index in (5, 2, 7)]

    def batches(workers: int) -> list[Tensor]:
        loader = DataLoader(augmented, batch_sampler=[keys[:4], keys[4:]], num_workers=workers)  # type: ignore[arg-type]
        return [part for batch in loader for part in batch]

    assert all(torch.equal(a, b) for a, b in zip(batches(0), batches(2), strict=True))


@pytest.fixture
def damaged(tmp_path: Path) -> SegmentationDataset:
    """Three pictures; the second was damaged after the data set was opened, the mask of the third removed."""
    pairs = [(tmp_path / f"{name}.png", tmp_path / f"{name}-mask.png") for name in "abc"]
    for picture, mask in pairs:
        Image.effect_noise((20, 20), 60).convert("RGB").save(picture)
        Image.new("L", (20, 20)).save(mask)
    dataset = PairedFiles(pairs, ["all"])
    pairs[1][0].write_bytes(pairs[1][0].read_bytes()[:200])
    pairs[2][1].unlink()
    return dataset


def test_fault_17_a_damaged_picture_ends_no_training(damaged: SegmentationDataset) -> None:
    augmented = Augmented(damaged, Augmentation(crop_size=(16, 24)))
    with pytest.warns(RuntimeWarning, match=r"b\.png is left out: .*b\.png: ") as caught:
        image, target = augmented[0, 1]
    assert len(caught) == 1
    assert (image.shape, target.shape) == ((3, 16, 24), (16, 24))
    assert image.dtype == torch.float32
    assert (image == 0).all()
    assert (target == IGNORED).all()
    with pytest.warns(RuntimeWarning, match=r"c\.png is left out: .*c-mask\.png: No such file"):
        assert (augmented[0, 2][1] == IGNORED).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        augmented[1, 1]  # a warning once
        augmented[0, 0]  # the others are as they were


def test_the_warning_comes_once_whatever_the_number_of_workers(
    damaged: SegmentationDataset, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: os.write(2, str(message).encode()))
    augmented = Augmented(damaged, Augmentation(crop_size=16))
    for epoch in range(3):
        keys = [[(epoch, index)] for index in range(3)]
        targets = [target for _, target in DataLoader(augmented, batch_sampler=keys, num_workers=2)]  # type: ignore[arg-type]
        assert [bool((target == IGNORED).all()) for target in targets] == [False, True, True]
    assert capfd.readouterr().err.count("b.png is left out") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 0}, "crop_size must be at least 1, got 0"),
        ({"crop_size": (16, -1)}, "crop_size must be at least 1"),
        ({"scale": (2, 1)}, "scale must be a range"),
        ({"scale": (0, 1)}, "scale must be a range"),
        ({"scale": (1, 100)}, "scale must be a range"),
        ({"flip": 1.5}, "flip must be from 0 to 1, got 1.5"),
        ({"brightness": -0.1}, "brightness must be from 0 to 1"),
        ({"contrast": 2}, "contrast must be from 0 to 1"),
        ({"saturation": float("nan")}, "saturation must be from 0 to 1"),
        ({"hue": 0.6}, "hue must be from 0 to 0.5"),
        ({"mean": (0, 0)}, "mean must be three values"),
        ({"std": (1, 0, 1)}, "std must be three values above 0"),
    ],
)
def test_wrong_augmentations(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)


def test_a_wrong_seed() -> None:
    with pytest.raises(ValueError, match="seed must be an integer from 0 up, got -1"):
        Augmented(Shapes(), Augmentation(), -1)
