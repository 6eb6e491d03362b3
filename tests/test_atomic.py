"""A file name only ever stands for a whole file."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeeplab.atomic import replace_when_complete


@pytest.fixture(params=["new", "existing"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "mask.png"
    if request.param == "existing":
        path.write_bytes(b"old")
    return path


def assert_untouched(target: Path, leftovers: int = 0) -> None:
    """The final name is as the fixture left it, and nothing but `leftovers` partial files lies beside it."""
    assert not target.exists() or target.read_bytes() == b"old"
    assert len(list(target.parent.glob(".*.partial"))) == leftovers
    assert len(list(target.parent.iterdir())) == leftovers + target.exists()


def write(target: Path, content: bytes, error: type[BaseException] | None = None) -> None:
    with replace_when_complete(target) as partial:
        partial.write_bytes(content)
        if error is not None:
            raise error


def test_complete(target: Path) -> None:
    with replace_when_complete(target) as partial:
        assert partial.parent == target.parent
        partial.write_bytes(b"new")
        assert not target.exists() or target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_fault_21_exception_while_writing(target: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write(target, b"ha", error)
    assert_untouched(target)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_fault_21_kill_while_writing(target: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from fastdeeplab.atomic import replace_when_complete\n"
        "with replace_when_complete(sys.argv[1]) as partial:\n"
        "    partial.write_bytes(b'ha')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert_untouched(target, leftovers=1)


def test_fault_21_full_disk(target: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a full disk, but for this process alone
    try:
        with pytest.raises(OSError, match="File too large"):
            write(target, bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_untouched(target)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_permissions_are_those_of_open_or_of_the_replaced_file(target: Path) -> None:
    existed = target.exists()
    if existed:
        target.chmod(0o604)
    umask = os.umask(0o027)
    try:
        with replace_when_complete(target) as partial:
            partial.unlink()  # some writers make a file of their own
            partial.write_bytes(b"new")
            partial.chmod(0o600)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == (0o604 if existed else 0o640)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
def test_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    with replace_when_complete(tmp_path / "link") as partial:
        partial.write_bytes(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").read_bytes() == b"new"


def test_targets_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder to write into does not exist"):
        replace_when_complete(tmp_path / "missing" / "file").__enter__()
    with pytest.raises(IsADirectoryError, match="can't replace a folder"):
        replace_when_complete(tmp_path).__enter__()
    with pytest.raises(OSError, match="not a regular file"):
        replace_when_complete(os.devnull).__enter__()
    assert list(tmp_path.iterdir()) == []
