"""Data sets of files: matching pictures with masks, the layouts of VOC, Cityscapes and ADE20K, what can be wrong."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastdeeplab.data import PairedFiles, Problem, Shapes, check_dataset, open_dataset
from fastdeeplab.data.pairs import CITYSCAPES_IDS, read_mask
from fastdeeplab.palettes import PALETTES
from fastdeeplab.pictures import PictureError, write_mask

Save = Callable[..., Path]


def save_picture(path: Path, width: int = 6, height: int = 4, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((width, height), 60).convert("RGB").save(path, **options)
    return path


def save_mask(path: Path, values: Any = 0, width: int = 6, height: int = 4, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.broadcast_to(np.asarray(values), (height, width))
    image = Image.fromarray(pixels.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image.putpalette([value for color in PALETTES["voc"].colors for value in color])
    (image.convert("1", dither=Image.Dither.NONE) if mode == "1" else image).save(path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Twelve pictures, of different kinds, and their masks."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    for number in range(12):
        save_picture(images / f"picture {number:02}{('.jpg', '.png', '.WEBP')[number % 3]}", width=6 + number)
        save_mask(masks / f"picture {number:02}.png", number % 3, width=6 + number)
    return {"images": images, "masks": masks}


def stems(dataset: Any) -> list[str]:
    return [Path(dataset.name(index)).stem for index in range(len(dataset))]


def test_a_folder_of_pictures_and_one_of_masks(folders: dict[str, Path]) -> None:
    dataset = open_dataset("folder", "all", **folders, classes=["road", "sky", "tree"])
    assert dataset.classes == ("road", "sky", "tree")
    assert stems(dataset) == [f"picture {number:02}" for number in range(12)]
    assert dataset.name(0) == str(folders["images"] / "picture 00.jpg")
    for number in range(12):
        image, target = dataset[number]
        assert (image.shape, image.dtype) == ((3, 4, 6 + number), torch.uint8)
        assert torch.equal(target, torch.full((4, 6 + number), number % 3, dtype=torch.uint8))
    assert check_dataset(dataset) == []
    assert len(open_dataset("folder", "all", **folders, classes=3, limit=5)) == 5


def test_pictures_are_those_that_pillow_reads(folders: dict[str, Path]) -> None:
    dataset = open_dataset("folder", "all", **folders, classes=3)
    with Image.open(folders["images"] / "picture 01.png") as image:
        assert np.array_equal(dataset[1][0].permute(1, 2, 0).numpy(), np.asarray(image))


def test_a_tenth_is_held_out_for_validation(folders: dict[str, Path]) -> None:
    def split(name: str, seed: int = 0) -> set[str]:
        return set(stems(open_dataset("folder", name, **folders, classes=3, seed=seed)))

    assert len(split("val")) == 2
    assert split("train") | split("val") == split("all")
    assert not split("train") & split("val")
    assert len({frozenset(split("val", seed)) for seed in range(5)}) > 1


def test_subfolders_are_the_splits(tmp_path: Path) -> None:
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        save_picture(tmp_path / "images" / split / f"{name}.jpg")
        save_mask(tmp_path / "masks" / split / f"{name}.png")
    found = {
        split: stems(open_dataset("folder", split, images=tmp_path / "images", masks=tmp_path / "masks", classes=1))
        for split in ("train", "val", "all")
    }
    assert found == {"train": ["a", "b"], "val": ["c"], "all": ["a", "b", "c"]}


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "1"])
def test_kinds_of_masks(tmp_path: Path, mode: str) -> None:
    values = np.array([[0, 1, 1], [1, 0, 0]])
    stored = values * 255 if mode == "1" else values
    path = save_mask(tmp_path / "mask.png", stored, 3, 2, mode)
    assert np.array_equal(read_mask(path), values)


def test_masks_that_segment_writes_are_read_back(tmp_path: Path) -> None:
    mask = np.arange(20).reshape(4, 5).astype(np.uint8)
    write_mask(tmp_path / "mask.png", mask, PALETTES["voc"])
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask)


def test_fault_17_a_turned_picture_fits_its_upright_mask(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = save_picture(tmp_path / "a.jpg", 6, 4, exif=exif)
    upright, lying = save_mask(tmp_path / "up.png", 1, 4, 6), save_mask(tmp_path / "a.png", 1, 6, 4)
    image, target = PairedFiles([(picture, upright)], "ab")[0]
    assert image.shape[1:] == target.shape == (6, 4)
    with pytest.raises(PictureError, match=r"a\.png: is 6 x 4 pixels, its picture .*a\.jpg 4 x 6"):
        PairedFiles([(picture, lying)], "ab")[0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "CMYK", "L", "P", "1", "I;16"])
def test_fault_17_pictures_of_every_kind_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    grey = Image.effect_noise((6, 4), 60)
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    image.save(path)
    dataset = PairedFiles([(path, save_mask(tmp_path / "mask.png"))], ["all"])
    assert dataset[0][0].shape == (3, 4, 6)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:45])


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "which", "reason"),
    [
        (damage, 0, "a.jpg: "),
        (damage, 1, "a.png: "),
        (Path.unlink, 0, "a.jpg: No such file"),
        (Path.unlink, 1, "a.png: No such file"),
        (make_folder, 0, "a.jpg: is a folder"),
        (make_folder, 1, "a.png: Is a directory"),
        (lambda path: path.write_bytes(b""), 0, "a.jpg: is empty"),
        (lambda path: path.write_bytes(b""), 1, "a.png: is not a picture"),
        (lambda path: path.write_text("notes"), 1, "a.png: is not a picture"),
        (lambda path: save_picture(path, 7, 4), 0, "a.png: is 6 x 4 pixels, its picture"),
        (lambda path: save_mask(path, 1, 6, 5), 1, "a.png: is 6 x 5 pixels, its picture"),
        (lambda path: save_mask(path, [3, 9, 9, 2, 1, 255]), 1, "a.png: has the values 3, 9, which are none of the 3"),
        (lambda path: save_mask(path, 256, mode="I;16"), 1, "a.png: has the value 256"),
        (lambda path: save_picture(path), 1, "a.png: has the pixels of a RGB picture"),
        (lambda path: Image.new("L", (6, 4)).save(path, "JPEG"), 1, "a.png: is a JPEG file, which changes"),
    ],
)
def test_fault_17_every_unusable_pair_is_named(
    tmp_path: Path, spoil: Callable[[Path], object], which: int, reason: str
) -> None:
    pairs = [
        (save_picture(tmp_path / f"{name}.jpg"), save_mask(tmp_path / f"{name}.png", [0, 1, 2, 255, 0, 0]))
        for name in "zab"
    ]
    dataset = PairedFiles(pairs, ["road", "sky", "tree"])
    assert check_dataset(dataset) == []
    spoil(pairs[1][which])
    (problem,) = check_dataset(dataset, workers=2)
    assert problem.name == str(pairs[1][0])
    assert reason in problem.reason
    assert str(pairs[1][which].parent) in str(problem)


def test_problems_come_in_the_order_of_the_data_set(tmp_path: Path) -> None:
    pairs = [(tmp_path / f"{number}.jpg", tmp_path / f"{number}.png") for number in range(20)]
    seen: list[int] = []
    problems = check_dataset(PairedFiles(pairs, ["all"]), workers=4, progress=seen.append)
    assert [problem.name for problem in problems] == [str(picture) for picture, _ in pairs]
    assert isinstance(problems[0], Problem)
    assert seen == list(range(1, 21))


def test_an_interrupt_reads_no_more_pictures_but_those_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits until what is queued behind it is cancelled, or could be."""
    read: list[int] = []
    stopping = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            stopping.set()
            super().shutdown(wait)

    class Watched(Shapes):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            read.append(index)
            if index:
                stopping.wait()
            return super().__getitem__(index)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdeeplab.data.opening.ThreadPoolExecutor", Pool)
    with pytest.raises(KeyboardInterrupt):
        check_dataset(Watched(size=16, limit=20), workers=1, progress=interrupt)
    assert read in ([0], [0, 1])


def remove_mask(folders: dict[str, Path]) -> None:
    (folders["masks"] / "picture 03.png").unlink()
    (folders["masks"] / "picture 05.png").unlink()


def remove_picture(folders: dict[str, Path]) -> None:
    (folders["images"] / "picture 03.jpg").unlink()


def double(folders: dict[str, Path]) -> None:
    save_picture(folders["images"] / "picture 03.png")


def empty(folders: dict[str, Path]) -> None:
    for path in folders["masks"].iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_mask, r"picture 03\.jpg has no mask of the same name in .*masks\n.*has no mask of the same name"),
        (remove_picture, r"picture 03\.png has no picture of the same name in .*images$"),
        (double, r"picture 03\.jpg and .*picture 03\.png have the same name but for the suffix"),
        (empty, r"masks: has no pictures \("),
        (lambda folders: folders.update(masks=Path("nowhere")), "nowhere: there is no such folder"),
    ],
)
def test_folders_that_do_not_match(
    folders: dict[str, Path], spoil: Callable[[dict[str, Path]], object], message: str
) -> None:
    spoil(folders)
    with pytest.raises(ValueError, match=message):
        open_dataset("folder", "all", **folders, classes=3)


def test_other_files_in_a_folder_do_not_matter(folders: dict[str, Path]) -> None:
    (folders["masks"] / "classes.txt").write_text("road")
    (folders["images"] / ".picture 99.jpg").write_text("")
    assert len(open_dataset("folder", "all", **folders, classes=3)) == 12


def test_one_picture_can_not_be_split(tmp_path: Path) -> None:
    save_picture(tmp_path / "images/a.jpg")
    save_mask(tmp_path / "masks/a.png")
    where = {"images": tmp_path / "images", "masks": tmp_path / "masks", "classes": 1}
    assert len(open_dataset("folder", "val", **where)) == 1
    with pytest.raises(ValueError, match="one picture only"):
        open_dataset("folder", "train", **where)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "classes must be 1 to 255, got 0"),
        (256, "classes must be 1 to 255, got 256"),
        (["a", "b", "a"], "different names, got 'a' twice"),
    ],
)
def test_wrong_classes(folders: dict[str, Path], classes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset("folder", "all", **folders, classes=classes)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    base = tmp_path / "VOCdevkit/VOC2012"
    values = [0, 1, 20, 255, 0, 0]
    for name in ("2007_000032", "2007_000039", "2008_000008"):
        save_picture(base / f"JPEGImages/{name}.jpg")
        save_mask(base / f"SegmentationClass/{name}.png", values, mode="P")
    save_picture(base / "JPEGImages/2011_000999.jpg")  # of another task
    lists = base / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n2008_000008\n")
    (lists / "val.txt").write_text("2007_000039\n")
    return tmp_path


@pytest.mark.parametrize("place", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc(voc: Path, place: str) -> None:
    train = open_dataset("voc", "train", root=voc / place)
    assert stems(train) == ["2007_000032", "2008_000008"]
    assert stems(open_dataset("voc", "val", root=voc / place)) == ["2007_000039"]
    assert len(open_dataset("voc", "all", root=voc / place)) == 3
    assert train.classes == PALETTES["voc"].classes
    assert train[0][1][0].tolist() == [0, 1, 20, 255, 0, 0]


def test_voc_with_missing_files(voc: Path) -> None:
    base = voc / "VOCdevkit/VOC2012"
    (base / "SegmentationClass/2008_000008.png").unlink()
    with pytest.raises(ValueError, match=r"SegmentationClass/2008_000008\.png: there is no such file"):
        open_dataset("voc", "train", root=voc)
    (base / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(ValueError, match=r"val\.txt: No such file"):
        open_dataset("voc", "val", root=voc)
    with pytest.raises(ValueError, match="ImageSets: has no JPEGImages, in itself or in VOCdevkit/VOC2012"):
        open_dataset("voc", "val", root=base / "ImageSets")


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    for split, city, number in (("train", "ulm", 0), ("train", "aachen", 1), ("val", "lindau", 0)):
        stem = f"{city}_{number:06}_000019"
        save_picture(tmp_path / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", 35, 4)
        save_mask(tmp_path / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png", [*range(34), 255], 35, 4)
        save_picture(tmp_path / f"gtFine/{split}/{city}/{stem}_gtFine_color.png", 35, 4)
    return tmp_path


def test_cityscapes_ids_become_the_19_classes(cityscapes: Path) -> None:
    train = open_dataset("cityscapes", "train", root=cityscapes)
    assert stems(train) == ["aachen_000001_000019_leftImg8bit", "ulm_000000_000019_leftImg8bit"]
    assert train.classes == PALETTES["cityscapes"].classes
    row = train[0][1][0].tolist()
    named = {"road": 7, "sidewalk": 8, "building": 11, "sky": 23, "person": 24, "train": 31, "bicycle": 33}
    assert {name: row[value] for name, value in named.items()} == {name: train.classes.index(name) for name in named}
    assert [row[value] for value in CITYSCAPES_IDS] == list(range(19))
    assert sorted(row) == [*range(19), *[255] * 16]
    assert len(open_dataset("cityscapes", "val", root=cityscapes)) == 1


def test_cityscapes_training_ids_are_taken_where_all_pictures_have_them(cityscapes: Path) -> None:
    for path in list((cityscapes / "gtFine/train").glob("*/*_labelIds.png")):
        save_mask(path.with_name(path.name.replace("labelIds", "labelTrainIds")), 18, 35, 4)
    dataset = open_dataset("cityscapes", "all", root=cityscapes)
    assert dataset[0][1].unique().tolist() == [*range(19), 255]  # val has none
    dataset = open_dataset("cityscapes", "train", root=cityscapes)
    assert dataset[0][1].unique().tolist() == [18]


def test_cityscapes_with_a_wrong_value_or_without_a_mask(cityscapes: Path) -> None:
    path = next((cityscapes / "gtFine/val").glob("*/*_labelIds.png"))
    save_mask(path, 34, 35, 4)
    (problem,) = check_dataset(open_dataset("cityscapes", "val", root=cityscapes))
    assert "_labelIds.png: has the values 34, which are none of the 19 classes" in problem.reason
    path.unlink()
    with pytest.raises(ValueError, match=r"_labelIds\.png: there is no such file"):
        open_dataset("cityscapes", "val", root=cityscapes)


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    base = tmp_path / "ADEChallengeData2016"
    for folder, name in (("training", "ADE_train_1"), ("training", "ADE_train_2"), ("validation", "ADE_val_1")):
        save_picture(base / f"images/{folder}/{name}.jpg")
        save_mask(base / f"annotations/{folder}/{name}.png", [0, 1, 2, 150, 0, 0])
    return tmp_path


@pytest.mark.parametrize("place", [".", "ADEChallengeData2016"])
def test_ade20k(ade20k: Path, place: str) -> None:
    train = open_dataset("ade20k", "train", root=ade20k / place)
    assert len(train) == 2
    assert train.classes == PALETTES["ade20k"].classes
    assert train[0][1][0].tolist() == [255, 0, 1, 149, 255, 255]
    assert len(open_dataset("ade20k", "val", root=ade20k / place)) == 1


def test_ade20k_with_a_value_above_150(ade20k: Path) -> None:
    path = ade20k / "ADEChallengeData2016/annotations/validation/ADE_val_1.png"
    save_mask(path, 151)
    (problem,) = check_dataset(open_dataset("ade20k", "val", root=ade20k))
    assert f"{path}: has the values 151" in problem.reason


def test_a_split_without_pictures(ade20k: Path) -> None:
    for path in (ade20k / "ADEChallengeData2016/images/validation").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="ADEChallengeData2016: has no pictures of this split"):
        open_dataset("ade20k", "val", root=ade20k)
