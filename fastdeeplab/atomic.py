"""Write a file so that its name only ever stands for a whole file."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replace_when_complete(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file beside `path`, and rename it to `path` when the block ends without an error.

    An exception, a kill or a full disk inside the block leaves no file under the final name, or the old file as it was.
    The temporary name ends in ".partial", so that no search by extension finds it; only a kill leaves one behind.
    A new file gets the permissions that open() would give it, a replaced one keeps its own. A symbolic link is
    followed, so that the file it points to is replaced.

    Raises FileNotFoundError if the folder does not exist, IsADirectoryError if `path` is a folder, and OSError if it is
    something else that can't be replaced by a file, such as a device: all before anything is written.
    """
    final = Path(os.path.realpath(path))
    if not final.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "The folder to write into does not exist", str(final.parent))
    if final.is_dir():
        raise IsADirectoryError(errno.EISDIR, "A file can't replace a folder", str(final))
    if final.exists() and not final.is_file():
        raise OSError(errno.EINVAL, "A file can't replace what is not a regular file", str(final))

    partial = final.parent / f".{uuid.uuid4().hex}.partial"
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # as open() would, the umask applies
    try:
        mode = (final if final.exists() else partial).stat().st_mode & 0o7777
        yield partial
        partial.chmod(mode)  # a writer may have put a file of its own in the place
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can (Windows opens no folders)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
