"""Open a data set by its name, and check every file of one before hours are spent on it."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fastdeeplab.data import pairs
from fastdeeplab.data.dataset import IGNORED, SegmentationDataset
from fastdeeplab.data.shapes import SIZE, Shapes

DATASETS = ("shapes", "folder", *pairs.OPENERS)

FolderPath = str | os.PathLike[str]


def open_dataset(
    data: str,
    split: str = "train",
    *,
    root: FolderPath | None = None,
    images: FolderPath | None = None,
    masks: FolderPath | None = None,
    classes: int | Sequence[str] | None = None,
    seed: int = 0,
    limit: int | None = None,
    size: int | Sequence[int] | None = None,
) -> SegmentationDataset:
    """Open a data set; what is missing or contradictory is an error now, before any picture is read.

    Args:
        data: ``"shapes"``: scenes made on the fly. ``"folder"``: a folder of pictures and one of masks with the same
            names, whose pixel values are class indices, 255 to ignore a pixel. ``"voc"``, ``"cityscapes"``,
            ``"ade20k"``: these data sets, as their archives unpack.
        split: ``"train"``, ``"val"`` or, for files, ``"all"``, which is both. Folders without the subfolders ``train``
            and ``val`` are split by name and seed, every tenth picture for validation.
        root: the folder that VOC, Cityscapes or ADE20K was unpacked into.
        images, masks: the two folders of ``"folder"``.
        classes: of ``"folder"``: their names, or how many there are.
        seed: of the scenes, and of which pictures of a folder are held out.
        limit: how many samples at most, the first ones.
        size: of the scenes, (H, W) or one number for both; 128 by default.

    Raises:
        ValueError: an argument is not one of those above or not for this kind of data, a folder or file is missing,
            or a picture of a folder has no mask or a mask no picture. The message names the path.
    """
    given = {"root": root, "images": images, "masks": masks, "classes": classes, "size": size}
    needed = {"shapes": (), "folder": ("images", "masks", "classes")}.get(data, ("root",))
    if data not in DATASETS:
        raise ValueError(f"data must be {', '.join(DATASETS)}, got {data!r}")
    splits = ("train", "val") if data == "shapes" else tuple(pairs.SPLITS)
    if split not in splits:
        raise ValueError(f"split must be {' or '.join(splits)} for {data}, got {split!r}")
    if absent := [name for name in needed if given[name] is None]:
        raise ValueError(f"{data} needs {' and '.join(absent)}")
    optional = ("size",) if data == "shapes" else ()
    if extra := [name for name, value in given.items() if value is not None and name not in (*needed, *optional)]:
        raise ValueError(f"{' and '.join(extra)} can't be given for {data}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")

    if data == "shapes":
        return Shapes(split, seed=seed, limit=limit, size=SIZE if size is None else size)
    try:
        if data == "folder":
            assert images is not None
            assert masks is not None
            assert classes is not None
            return pairs.open_folders(Path(images), Path(masks), classes, split, seed, limit)
        assert root is not None
        return pairs.OPENERS[data](Path(root), split, limit)
    except OSError as error:  # no permission to look into a folder
        raise ValueError(f"{error.filename}: {error.strerror}") from error


@dataclass(frozen=True)
class Problem:
    """A sample that can't be used: what the data set calls it, and why, with the path of the file at fault."""

    name: str
    reason: str

    def __str__(self) -> str:
        return self.reason


def check_dataset(
    dataset: SegmentationDataset, *, workers: int | None = None, progress: Callable[[int], None] | None = None
) -> list[Problem]:
    """Read every picture and mask, and list those that can't be used, in the data set's order.

    They are missing, can't be read, differ in size, or the mask has a value that is no class.

    Args:
        workers: threads that read; by default as many as there are CPUs.
        progress: called with the number of samples read so far, after each.
    """
    found = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        reasons: Iterable[str | None] = pool.map(lambda index: _why_unusable(dataset, index), range(len(dataset)))
        try:
            for index, reason in enumerate(reasons):
                if reason is not None:
                    found.append(Problem(dataset.name(index), reason))
                if progress is not None:
                    progress(index + 1)
        finally:  # an interrupt would wait until all are read
            pool.shutdown(cancel_futures=True)
    return found


def _why_unusable(dataset: SegmentationDataset, index: int) -> str | None:
    try:
        image, target = dataset[index]
    except (ValueError, OSError) as error:
        return str(error)
    name = dataset.name(index)
    if image.shape[1:] != target.shape:
        return f"{name}: the image is {tuple(image.shape)}, its target {tuple(target.shape)}"
    if ((target >= len(dataset.classes)) & (target != IGNORED)).any():
        return f"{name}: the target has the class {int(target[target != IGNORED].max())} of {len(dataset.classes)}"
    return None
