"""Which files a picture's mask and overlay go to, and whether an earlier run has finished them.

Every file that a run writes carries a record of its source and settings in the PNG's text. So a mask is known again
whatever else lies in the folder, and a file that is not the picture's own is never taken for it nor overwritten.
"""

import json
import os
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from PIL import Image

KEYWORD = "fastdeeplab"  # of the PNG text that holds the record
MASK, OVERLAY = ".png", ".overlay.png"


class State(Enum):
    """What a run finds of a picture in the output folder."""

    MISSING = "not segmented yet, or the picture has changed since"
    FINISHED = "segmented with these settings"
    OTHER_SETTINGS = "segmented with other settings"


@dataclass(frozen=True)
class Output:
    """The files of one source: ``folder/stem.png`` and ``folder/stem.overlay.png``."""

    source: Path
    folder: Path
    stem: str
    found: Mapping[str, dict[str, Any]]  # the records of the two files, by suffix, as far as the files exist

    @property
    def mask(self) -> Path:
        return self.folder / (self.stem + MASK)

    @property
    def overlay(self) -> Path:
        return self.folder / (self.stem + OVERLAY)

    def text(self, suffix: str, settings: Mapping[str, Any]) -> dict[str, str]:
        """The PNG text for the file with this suffix, read again by `plan`."""
        record = {
            "source": _relative(self.source, self.folder),
            "version": _version(self.source),
            "suffix": suffix,
            "settings": settings,
        }
        return {KEYWORD: json.dumps(record)}

    def state(self, settings: Mapping[str, Mapping[str, Any]]) -> State:
        """Compare what was found with what is wanted: the settings of each file to be made, by suffix."""
        found = {suffix: self.found[suffix] for suffix in settings if suffix in self.found}
        if any(record["version"] != _version(self.source) for record in found.values()):
            return State.MISSING
        if any(record["settings"] != settings[suffix] for suffix, record in found.items()):
            return State.OTHER_SETTINGS
        return State.FINISHED if found.keys() == settings.keys() else State.MISSING


def plan(sources: Iterable[Path], folder: Path) -> list[Output]:
    """Choose the output files of each source.

    The stem is the source's own. Where that is taken, by another source (in letters of either case, as some file
    systems see them) or by a file in the folder that was not made from this very source, ``_2``, ``_3`` ... is added.
    A source that was segmented before keeps its stem.
    """
    records = {path.name: _read_record(path) for path in sorted(folder.iterdir())} if folder.is_dir() else {}
    owners = {_same_name(name): record.get("source") for name, record in records.items()}
    stems: dict[str, list[str]] = {}  # of the files found, by their source
    for name, record in records.items():
        if record:
            stems.setdefault(record["source"], []).append(name.removesuffix(record["suffix"]))

    claimed: set[str] = set()
    tried: dict[str, int] = {}  # the last number given to a stem
    outputs = []
    for source in sources:
        key = _relative(source, folder)
        for stem in _candidates(source.stem, stems.get(key, []), tried):
            names = {_same_name(stem + MASK), _same_name(stem + OVERLAY)}
            if not names & claimed and all(owners.get(name, key) == key for name in names):
                break
        claimed |= names
        found = {suffix: records.get(stem + suffix, {}) for suffix in (MASK, OVERLAY)}
        found = {suffix: record for suffix, record in found.items() if record.get("suffix") == suffix}
        outputs.append(Output(source, folder, stem, found))
    return outputs


def _candidates(own: str, earlier: Iterable[str], tried: dict[str, int]) -> Iterable[str]:
    yield from sorted((stem for stem in earlier if stem.startswith(own)), key=len)
    while True:
        number = tried[_same_name(own)] = tried.get(_same_name(own), 0) + 1
        yield own if number == 1 else f"{own}_{number}"


def _same_name(name: str) -> str:
    """Equal for names that some file system takes for the same."""
    return unicodedata.normalize("NFC", name.casefold())


def _relative(source: Path, folder: Path) -> str:
    """The source as seen from the output folder, which stays true when both are moved together."""
    try:
        return Path(os.path.relpath(source, folder)).as_posix()
    except ValueError:  # on another drive
        return source.absolute().as_posix()


def _version(source: Path) -> list[int]:
    """Size and time of change; zeros for a source that can't be looked at, which will fail when it is read."""
    try:
        stat = source.stat()
    except OSError:
        return [0, 0]
    return [stat.st_size, stat.st_mtime_ns]


def _read_record(path: Path) -> dict[str, Any]:
    """The record in a PNG; empty for any other file, which may be a PNG that was given another name."""
    if path.suffix != MASK or not path.is_file():
        return {}
    try:
        with Image.open(path, formats=["PNG"]) as image:
            record = json.loads(image.info[KEYWORD])
    except Exception:  # not ours: damaged or foreign files raise anything
        return {}
    whole = isinstance(record, dict) and record.keys() == {"source", "version", "suffix", "settings"}
    return record if whole and path.name.endswith(record["suffix"]) else {}
