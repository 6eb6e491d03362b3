"""Read and write files of weights.

A pickle is read with ``weights_only=True`` and never otherwise, so that no file can run code. A file is written under a
temporary name and renamed when it is complete.
"""

import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdeeplab.atomic import replace_when_complete
from fastdeeplab.convert import FOREIGN_FILES, CheckpointError, require_tensors

FORMAT_VERSION = "1"  # of the metadata in the safetensors files written here
CONTAINERS = ("state_dict", "model_state", "model")  # where training scripts keep the weights beside other things


def read_state_dict(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read the tensors of a checkpoint on the CPU, and the model's configuration if fastdeeplab wrote it.

    ``.safetensors`` files are read as such, all others as torch's. ``unwrap`` says what is taken out of them.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it can't be read, is damaged, holds more than data, or is not a checkpoint.
        ImportError: the package safetensors is needed and missing.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error
    if not start:
        raise CheckpointError(f"{path} is an empty file")
    if suffix in FOREIGN_FILES:
        raise CheckpointError(f"{path} can't be converted: {FOREIGN_FILES[suffix]}")
    if suffix == ".safetensors":
        return _read_safetensors(path)
    return unwrap(_read_torch(path, start), path), None


def unwrap(content: Any, name: str | Path = "The state dict") -> dict[str, Tensor]:
    """The tensors by name in what a training script saved.

    They are looked for under ``state_dict``, ``model_state`` and ``model``, else at the top. The ``module.`` of
    DistributedDataParallel and the ``_orig_mod.`` of torch.compile before every key are removed.

    Raises:
        CheckpointError: it is not a state dict; the message begins with ``name``.
    """
    if isinstance(content, Mapping):
        content = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        kind = "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise CheckpointError(f"{name} holds {kind}, not a state dict (tensors by name)")
    require_tensors(content)
    wrapper = re.match(r"(module\.|_orig_mod\.)*", next(iter(content)))
    prefix = wrapper[0] if wrapper and all(key.startswith(wrapper[0]) for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors and a model's configuration to one file, which appears under its name when it is complete.

    ``metadata`` is kept beside the configuration. ``"training"`` says as JSON where the weights come from; nothing
    reads it but ``read_classes``.

    Raises:
        ValueError: the name does not end in ``.safetensors``.
        OSError: the file can't be written.
        ImportError: the package safetensors is missing.
    """
    if Path(path).suffix.lower() != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {os.fspath(path)!r}")
    safetensors = _import_safetensors()
    packed = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    known = {"format": "pt", "fastdeeplab": FORMAT_VERSION, "config": json.dumps(config)}
    with replace_when_complete(path) as partial:
        try:
            safetensors.torch.save_file(packed, partial, {**(metadata or {}), **known})
        except safetensors.SafetensorError as error:
            raise OSError(f"{os.fspath(path)} could not be written: {error}") from error


def read_classes(path: str | os.PathLike[str]) -> tuple[str, ...] | None:
    """The names of the classes that a file from a training run was trained on; None for any other file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged.
        ImportError: the package safetensors is missing.
    """
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        return None
    safetensors = _import_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            origin = json.loads((file.metadata() or {}).get("training", "null"))
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is truncated, damaged or not a safetensors file ({error})") from error
    except ValueError:
        return None
    names = origin.get("classes") if isinstance(origin, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    safetensors = _import_safetensors()
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            state_dict = unwrap({key: file.get_tensor(key) for key in file.keys()}, path)  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is truncated, damaged or not a safetensors file ({error})") from error
    if "fastdeeplab" not in metadata:
        return state_dict, None
    if metadata["fastdeeplab"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is in format {metadata['fastdeeplab']!r} of fastdeeplab, this version reads {FORMAT_VERSION!r}"
        )
    try:
        config = json.loads(metadata["config"])
    except (KeyError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} has no readable configuration in its metadata")
    return state_dict, config


def _import_safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Files named .safetensors need the package safetensors: pip install 'fastdeeplab[weights]'"
        ) from error
    return safetensors


class _Skipped:
    """Takes the place of a plain object beside the weights, such as a score or a script's options."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Training scripts keep these beside the weights: torchvision's their options, VainF's a score. None of them is made.
_SKIPPED = ("argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")


def _read_torch(path: Path, start: bytes) -> Any:
    try:
        with torch.serialization.safe_globals([(_Skipped, name) for name in _SKIPPED]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many kinds on a damaged file
        is_zip, is_pickle_error = start.startswith(b"PK\x03\x04"), isinstance(error, pickle.UnpicklingError)
        if is_pickle_error and (found := re.search(r"GLOBAL (\S+)", str(error))):
            reason = (
                f"holds the Python object {found[1]}, not only weights, and to read that is to run code of the file. "
                "If you trust it, save the weights alone where it comes from: torch.save(model.state_dict(), path)"
            )
        elif is_pickle_error and not is_zip:
            reason = f"is not a checkpoint of torch: it starts with {start!r}"
        else:
            reason = f"is truncated, damaged or not a checkpoint of torch ({str(error).partition(chr(10))[0]})"
        raise CheckpointError(f"{path} {reason}") from error
