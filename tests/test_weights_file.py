"""Files of weights: what is read, what is refused with which reason, and that writing is all or nothing."""

import argparse
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fastdeeplab.convert import CheckpointError
from fastdeeplab.weights_file import read_classes, read_state_dict, write_safetensors

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor] = TENSORS) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        assert torch.equal(actual[key], value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("container", [None, "state_dict", "model_state", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_torch_file(tmp_path: Path, zipped: bool, container: str | None, prefix: str) -> None:
    tensors: dict[str, Any] = {prefix + key: value for key, value in TENSORS.items()}
    content = tensors if container is None else {"epoch": 3, container: tensors, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    state_dict, config = read_state_dict(tmp_path / "weights.pth")
    assert_equal(state_dict)
    assert config is None


def test_training_scripts_keep_options_and_scores_beside_the_weights(tmp_path: Path) -> None:
    content = {"model": TENSORS, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "steps": np.int32(7)}
    torch.save(content, tmp_path / "weights.pth")
    allowed = torch.serialization.get_safe_globals()
    assert_equal(read_state_dict(str(tmp_path / "weights.pth"))[0])
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


def test_a_prefix_before_some_keys_stays(tmp_path: Path) -> None:
    tensors = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(tensors, tmp_path / "weights.pth")
    assert_equal(read_state_dict(tmp_path / "weights.pth")[0], tensors)


def test_safetensors_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "weights.safetensors", TENSORS, {"depth": 50, "multi_grid": [1, 2, 4]})
    state_dict, config = read_state_dict(tmp_path / "weights.safetensors")
    assert_equal(state_dict)
    assert config == {"depth": 50, "multi_grid": [1, 2, 4]}


def test_safetensors_file_of_others_has_no_configuration(tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "weights.safetensors", {"format": "pt", "config": "{}"})
    state_dict, config = read_state_dict(tmp_path / "weights.safetensors")
    assert_equal(state_dict)
    assert config is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"fastdeeplab": "2", "config": "{}"}, "format '2' of fastdeeplab, this version reads '1'"),
        ({"fastdeeplab": "1"}, "no readable configuration"),
        ({"fastdeeplab": "1", "config": "{"}, "no readable configuration"),
        ({"fastdeeplab": "1", "config": "[50]"}, "no readable configuration"),
    ],
)
def test_metadata_that_can_not_be_read(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "weights.safetensors", metadata)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "weights.safetensors")


def saved(name: str, path: Path) -> bytes:
    """The bytes of a whole file of the kind that `name` says."""
    tensors = {"weight": torch.arange(10_000.0)}
    if name.endswith(".safetensors"):
        write_safetensors(path / name, tensors, {})
    else:
        torch.save(tensors, path / name, _use_new_zipfile_serialization=not name.startswith("legacy"))
    return (path / name).read_bytes()


@pytest.mark.parametrize("name", ["weights.pth", "legacy.pth", "weights.safetensors"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_fault_16_truncated(tmp_path: Path, name: str, share: float) -> None:
    whole = saved(name, tmp_path)
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=f"{name} is truncated|{name} is not a checkpoint"):
        read_state_dict(tmp_path / name)


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_fault_16_pickle_with_code(tmp_path: Path, write: Callable[[Any, Path], None]) -> None:
    write({"weight": torch.ones(1), "code": RunsCode(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth (holds the Python object|is not a checkpoint)"):
        read_state_dict(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


def test_fault_16_whole_model_pickled(tmp_path: Path) -> None:
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"Python object torch.nn.modules.conv.Conv2d.*model.state_dict\(\)"):
        read_state_dict(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.pth", b"", "is an empty file"),
        ("weights.safetensors", b"", "is an empty file"),
        ("weights.pth", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "starts with b'<!DOCTYPE html>"),
        ("weights.safetensors", b"<!DOCTYPE html><html>", "not a safetensors file"),
        ("weights.pth", b"PK\x03\x04 and no more", "truncated"),
        ("weights.pdparams", b"\x80\x02}", "PaddleSeg's DeepLabV3 is another network"),
        ("model.ckpt.index", b"\x00", "TensorFlow's DeepLab is another network"),
        ("model_final.pkl", b"\x80\x02}", "Detectron2's DeepLab is another network"),
    ],
)
def test_fault_16_not_a_checkpoint(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} .*{message}"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, not a state dict"),
        ({}, "holds nothing, not a state dict"),
        ({"state_dict": {}}, "holds nothing, not a state dict"),
        ({"epoch": 3, "net": {"weight": torch.ones(1)}}, r"epoch \(int\), net \(dict\)"),
        ({0: torch.ones(1)}, r"0 \(Tensor\)"),
    ],
)
def test_fault_16_not_a_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "weights.pth")


def test_fault_16_directory_or_missing(tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.pth can't be read"):
        read_state_dict(tmp_path / "folder.pth")
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        read_state_dict(tmp_path / "missing.pth")


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything, so be nobody for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_fault_16_no_permission(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "weights.pth")
    (tmp_path / "weights.pth").chmod(0)
    with without_privileges(), pytest.raises(CheckpointError, match=r"weights\.pth can't be read: Permission denied"):
        read_state_dict(tmp_path / "weights.pth")


@pytest.mark.parametrize("existing", [False, True])
def test_fault_21_full_disk(tmp_path: Path, existing: bool) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "weights.safetensors"
    if existing:
        write_safetensors(path, TENSORS, {})
    before = path.read_bytes() if existing else None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a full disk, but for this process alone
    try:
        with pytest.raises(OSError, match=r"weights\.safetensors could not be written"):
            write_safetensors(path, {"weight": torch.ones(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    assert not existing or path.read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_fault_21_kill(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, TENSORS, {})
    script = (
        "import os, signal, sys, torch, safetensors.torch\n"
        "from fastdeeplab.weights_file import write_safetensors\n"
        "save_file = safetensors.torch.save_file\n"
        "def killed(*arguments):\n"
        "    save_file(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "safetensors.torch.save_file = killed\n"
        "write_safetensors(sys.argv[1], {'weight': torch.ones(1)}, {})\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert ended.returncode == -9
    assert_equal(read_state_dict(path)[0])


def test_written_names_end_in_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, got .*weights\.pth"):
        write_safetensors(tmp_path / "weights.pth", TENSORS, {})
    assert list(tmp_path.iterdir()) == []


def test_written_file_is_for_all_to_read(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_safetensors(tmp_path / "weights.safetensors", TENSORS, {})
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_channels_last_tensors_are_written(tmp_path: Path) -> None:
    tensors = {"weight": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)}
    write_safetensors(tmp_path / "weights.safetensors", tensors, {})
    assert_equal(read_state_dict(tmp_path / "weights.safetensors")[0], tensors)


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(tmp_path / "weights.safetensors", TENSORS, {})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'fastdeeplab\[weights\]'"):
        read_state_dict(tmp_path / "weights.safetensors")
    with pytest.raises(ImportError, match=r"pip install 'fastdeeplab\[weights\]'"):
        write_safetensors(tmp_path / "new.safetensors", TENSORS, {})
    assert not (tmp_path / "new.safetensors").exists()
    torch.save(TENSORS, tmp_path / "weights.pth")
    assert_equal(read_state_dict(tmp_path / "weights.pth")[0])


def test_configuration_is_json_in_the_header(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "weights.safetensors", TENSORS, {"depth": 50})
    with safetensors.safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"]) == {"depth": 50}
    assert metadata["fastdeeplab"] == "1"


def test_names_of_classes(tmp_path: Path) -> None:
    def classes(metadata: dict[str, str] | None) -> tuple[str, ...] | None:
        write_safetensors(tmp_path / "weights.safetensors", TENSORS, {}, metadata)
        return read_classes(tmp_path / "weights.safetensors")

    assert classes({"training": '{"classes": ["road", "kerb"]}'}) == ("road", "kerb")
    for damaged in ("", "{", "[1]", "{}", '{"classes": 2}', '{"classes": ["road", 2]}'):
        assert classes({"training": damaged}) is None
    assert classes(None) is None
    assert read_classes(tmp_path / "weights.pth") is None
    (tmp_path / "weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        read_classes(tmp_path / "weights.safetensors")
    with pytest.raises(FileNotFoundError):
        read_classes(tmp_path / "missing.safetensors")
