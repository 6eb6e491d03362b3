"""Data sets of picture and mask files: a pair of folders, PASCAL VOC, Cityscapes and ADE20K as they are unpacked.

Sources of the facts: the PASCAL VOC 2012 development kit, mcordts/cityscapesScripts ``helpers/labels.py`` (which ids
have a training index), and the README of ADEChallengeData2016. Needs Pillow.
"""

import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastdeeplab.data.dataset import IGNORED, MAX_CLASSES, Pixels
from fastdeeplab.palettes import PALETTES
from fastdeeplab.pictures import FORMATS, PictureError, read_picture

MASK_FORMATS = ("PNG", "BMP", "TIFF", "GIF", "PPM")  # that keep every pixel's value
SPLITS = {"train": ("train",), "val": ("val",), "all": ("train", "val")}
HELD_OUT = 10  # one picture of so many, in a folder that says nothing of validation
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # by training index
CITYSCAPES_MAX_ID = 33
UNKNOWN = -1  # in a table of values: no mask may have it

Pair = tuple[Path, Path]
Values = Mapping[int, int]


class PairedFiles:
    """A `SegmentationDataset` of picture files and their mask files.

    Pictures are read as `fastdeeplab.pictures.read_picture` does. A mask is a palette, grey or 1-bit file of the
    picture's size, after both are turned as their EXIF orientations say; its pixel values are looked up in `values`.

    Args:
        pairs: picture and mask of each sample.
        classes: the names of the classes, all different, 255 at most.
        values: the class of each value that a mask may have, or 255 for pixels to ignore; by default every class is
            its own value and 255 is ignored.

    Raises:
        ValueError: there are no pairs, or the classes are not those above.
    """

    def __init__(self, pairs: Iterable[Pair], classes: Sequence[str], values: Values | None = None) -> None:
        self.pairs = tuple(pairs)
        self.classes = tuple(classes)
        if not self.pairs:
            raise ValueError("there are no pictures")
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            raise ValueError(f"classes must be 1 to {MAX_CLASSES}, got {len(self.classes)}")
        if twice := [name for name in self.classes if self.classes.count(name) > 1]:
            raise ValueError(f"classes must have different names, got {twice[0]!r} twice")
        if values is None:
            values = {index: index for index in (*range(len(self.classes)), IGNORED)}
        self._table = np.full(256, UNKNOWN, np.int16)
        for value, index in values.items():
            self._table[value] = index

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture_path, mask_path = self.pairs[index]
        image, target = np.array(read_picture(picture_path)), self._classes_of(mask_path)
        if image.shape[:2] != target.shape:
            sizes = [f"{width} x {height}" for height, width in (image.shape[:2], target.shape)]
            raise PictureError(f"{mask_path}: is {sizes[1]} pixels, its picture {picture_path} {sizes[0]}")
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(target)

    def name(self, index: int) -> str:
        return str(self.pairs[index][0])

    def _classes_of(self, path: Path) -> Pixels:
        target = self._table[read_mask(path)]
        if (target == UNKNOWN).any():
            values = np.unique(read_mask(path)[target == UNKNOWN])
            listed = ", ".join(map(str, values[:5])) + (" ..." if len(values) > 5 else "")
            known = np.flatnonzero(self._table != UNKNOWN)
            raise PictureError(
                f"{path}: has the values {listed}, which are none of the {len(self.classes)} classes "
                f"({known[0]} to {known[known != IGNORED][-1]}{', 255 is ignored' if IGNORED in known else ''})"
            )
        return target.astype(np.uint8)


def read_mask(path: str | os.PathLike[str]) -> Pixels:
    """Read the pixel values of a mask file, (H, W), turned as its EXIF orientation says.

    Raises PictureError if it can't be read whole, holds colours in place of indices, or values above 255.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.format not in MASK_FORMATS:
                raise ValueError(f"is a {image.format} file, which changes pixel values: a mask must be a PNG")
            if image.mode not in ("P", "L", "1", "I") and not image.mode.startswith("I;16"):
                raise ValueError(f"has the pixels of a {image.mode} picture: a mask must be palette or grey")
            values = np.asarray(ImageOps.exif_transpose(image))
        if values.min() < 0 or values.max() > 255:
            raise ValueError(f"has the value {values.max()}, where classes are below 255")
        return values.astype(np.uint8)
    except UnidentifiedImageError as error:
        raise PictureError(f"{path}: is not a picture in one of the formats {', '.join(MASK_FORMATS)}") from error
    except Exception as error:  # a decoder meets damaged bytes with any kind of exception
        raise PictureError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def open_folders(
    images: Path, masks: Path, classes: int | Sequence[str], split: str, seed: int, limit: int | None
) -> PairedFiles:
    """Match the pictures of a folder with the masks of another, by their names without suffix.

    If both folders have the subfolders ``train`` and ``val``, these are the splits. Otherwise every tenth picture is
    held out for validation, chosen by its name and the seed.
    """
    names = [f"class {index}" for index in range(classes)] if isinstance(classes, int) else list(classes)
    for folder in (images, masks):
        _require_folder(folder)
    if has_splits(images, masks):
        pairs = [pair for part in SPLITS[split] for pair in _match(images / part, masks / part)]
    else:
        pairs = _match(images, masks)
        ordered = sorted(pairs, key=lambda pair: (zlib.crc32(f"{seed}/{pair[0].stem}".encode()), pair))
        held_out = set(ordered[: -(-len(pairs) // HELD_OUT)])
        pairs = [pair for pair in pairs if split == "all" or (pair in held_out) == (split == "val")]
        if not pairs:
            raise ValueError(f"{images}: has one picture only, which is held out for validation")
    return PairedFiles(pairs[:limit], names)


def has_splits(images: Path, masks: Path) -> bool:
    """Whether both folders have the subfolders ``train`` and ``val``."""
    return all((folder / part).is_dir() for folder in (images, masks) for part in SPLITS["all"])


def _match(images: Path, masks: Path) -> list[Pair]:
    pictures, targets = _by_stem(images), _by_stem(masks)
    alone = [
        f"{path} has no {what} of the same name in {folder}"
        for there, here, what, folder in ((pictures, targets, "mask", masks), (targets, pictures, "picture", images))
        for stem, path in there.items()
        if stem not in here
    ]
    if alone:
        raise ValueError("\n".join(alone))
    return [(path, targets[stem]) for stem, path in sorted(pictures.items())]


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.name.startswith(".") or path.suffix.lower() not in _suffixes():
            continue
        if other := found.get(path.stem):
            raise ValueError(f"{other} and {path} have the same name but for the suffix")
        found[path.stem] = path
    if not found:
        raise ValueError(f"{folder}: has no pictures ({', '.join(sorted(_suffixes()))})")
    return found


def _suffixes() -> set[str]:
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def open_voc(root: Path, split: str, limit: int | None) -> PairedFiles:
    """PASCAL VOC 2012 as its archive unpacks; `root` holds VOCdevkit, or is it, or is the VOC2012 within."""
    base = _find(root, ("VOCdevkit/VOC2012", "VOC2012", "."), "JPEGImages")
    names = []
    for part in SPLITS[split]:
        listing = base / "ImageSets/Segmentation" / f"{part}.txt"
        try:
            names += listing.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{listing}: {getattr(error, 'strerror', None) or 'is not text'}") from None
    pairs = [(base / "JPEGImages" / f"{name}.jpg", base / "SegmentationClass" / f"{name}.png") for name in names]
    return _paired(pairs, PALETTES["voc"].classes, None, base, limit)


def open_cityscapes(root: Path, split: str, limit: int | None) -> PairedFiles:
    """Cityscapes' fine annotations: `root` holds leftImg8bit and gtFine.

    Masks are ``*_labelTrainIds.png`` where they have been made, else ``*_labelIds.png``; the classes are the 19 that
    are evaluated, and all other pixels are ignored.
    """
    base = _find(root, (".",), "leftImg8bit", "gtFine")
    pairs, training_indices = [], True
    for part in SPLITS[split]:
        for picture in sorted((base / "leftImg8bit" / part).glob("*/*_leftImg8bit.png")):
            stem = picture.name.removesuffix("_leftImg8bit.png")
            pairs.append((picture, base / "gtFine" / part / picture.parent.name / f"{stem}_gtFine_labelTrainIds.png"))
            training_indices &= pairs[-1][1].is_file()
    values = {index: index for index in (*range(19), IGNORED)}
    if not training_indices:
        pairs = [(picture, mask.with_name(mask.name.replace("TrainIds", "Ids"))) for picture, mask in pairs]
        values = dict.fromkeys((*range(CITYSCAPES_MAX_ID + 1), IGNORED), IGNORED)
        values |= {label: index for index, label in enumerate(CITYSCAPES_IDS)}
    return _paired(pairs, PALETTES["cityscapes"].classes, values, base, limit)


def open_ade20k(root: Path, split: str, limit: int | None) -> PairedFiles:
    """ADE20K's 150 classes of 2016: `root` holds ADEChallengeData2016 or is it. Value 0, anything else, is ignored."""
    base = _find(root, ("ADEChallengeData2016", "."), "images", "annotations")
    folders = {"train": "training", "val": "validation"}
    pairs = [
        (picture, base / "annotations" / folders[part] / f"{picture.stem}.png")
        for part in SPLITS[split]
        for picture in sorted((base / "images" / folders[part]).glob("*.jpg"))
    ]
    values = {0: IGNORED} | {index + 1: index for index in range(150)}
    return _paired(pairs, PALETTES["ade20k"].classes, values, base, limit)


def _paired(
    pairs: Sequence[Pair], classes: Sequence[str], values: Values | None, base: Path, limit: int | None
) -> PairedFiles:
    if not pairs:
        raise ValueError(f"{base}: has no pictures of this split")
    missing = [f"{path}: there is no such file" for pair in pairs for path in pair if not path.is_file()]
    if missing:
        raise ValueError("\n".join(missing))
    return PairedFiles(pairs[:limit], classes, values)


def _find(root: Path, places: Sequence[str], *folders: str) -> Path:
    _require_folder(root)
    for place in places:
        if all((root / place / folder).is_dir() for folder in folders):
            return root / place
    raise ValueError(f"{root}: has no {' and '.join(folders)}, in itself or in {' or '.join(places)}")


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder")


OPENERS: dict[str, Callable[[Path, str, int | None], PairedFiles]] = {
    "voc": open_voc,
    "cityscapes": open_cityscapes,
    "ade20k": open_ade20k,
}
