"""Reading a file that may be anything: a device is never waited for, nothing is read past a limit."""

import contextlib
import errno
import mmap
import os
import re
import stat
from typing import Any

import numpy as np

from mini_tfm.errors import FileProblem, InvalidType, InvalidValue


class NamedFile(contextlib.AbstractContextManager["NamedFile"]):
    """A binary file that knows the path to name in errors, even when it was opened relative to a folder."""

    def __init__(self, fd: int, name: str) -> None:
        self._file = os.fdopen(fd, "rb")
        self.name = name
        self.fileno = self._file.fileno
        self.read = self._file.read
        self.readinto = self._file.readinto
        self.seek = self._file.seek

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def open_regular(path: str | os.PathLike, name: str | None = None, folder_fd: int | None = None) -> NamedFile:
    """Open a regular file for reading: a device, a FIFO or a folder is refused, and never waited for.

    With `name`, opens that entry of the folder `path` (through `folder_fd` if given) and refuses a link, which could
    lead out of the folder; only a link of Hugging Face's cache is followed, see `_open_in_cache`. Raises FileProblem.
    """
    path = as_path(path)
    shown = os.path.join(path, name) if name else path
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if name else 0)
    try:
        try:
            fd = os.open(shown if name is None or folder_fd is None else name, flags, dir_fd=folder_fd)
        except OSError as error:
            if name is None or error.errno != errno.ELOOP:
                raise
            fd = _open_in_cache(path, name, flags)
    except FileNotFoundError as error:
        raise FileProblem(f"{shown}: there is no such file; check the path") from error
    except (OSError, ValueError) as error:
        is_link = isinstance(error, OSError) and error.errno == errno.ELOOP
        hint = "it is a link; put the file itself in the folder" if is_link else reason(error)
        raise FileProblem(f"{shown}: cannot be opened: {hint}") from error
    if not stat.S_ISREG(mode := os.fstat(fd).st_mode):
        os.close(fd)
        found = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise FileProblem(f"{shown}: expected a regular file, found {found}")
    return NamedFile(fd, shown)


def mapped(path: str | os.PathLike) -> tuple[str, mmap.mmap | bytes]:
    """A regular file's name for errors, and its bytes, which are read when they are used. Raises FileProblem."""
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            return file.name, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except (OSError, ValueError) as error:
            raise FileProblem(f"{file.name}: cannot be read: {reason(error)}") from error


def mapping_of(array: np.ndarray) -> mmap.mmap | None:
    """The mapped file in which an array lies, if nobody can write to it through the mapping; else None."""
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.obj if isinstance(base, memoryview) else base.base
    return base if isinstance(base, mmap.mmap) and memoryview(base).readonly else None


def forget_pages(array: np.ndarray) -> None:
    """Gives back the RAM of the mapped file in which an array lies, if it does; what is used again is read again."""
    mapping = mapping_of(array)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _open_in_cache(folder: str, name: str, flags: int) -> int:
    """The file behind a link of Hugging Face's cache: models--org--name/snapshots/<revision>/<name> -> ../../blobs/<hash>.

    The target must be an entry of the same model's blobs, and itself no link. Raises OSError, ELOOP for any other link.
    """
    snapshot = os.path.realpath(folder)
    snapshots, revision = os.path.split(snapshot)
    root = os.path.dirname(snapshots)
    blobs = os.path.join(root, "blobs")
    target = os.path.join(snapshot, os.path.dirname(name), os.readlink(os.path.join(snapshot, name)))
    parent, blob = os.path.split(os.path.normpath(target))
    is_cache = revision and os.path.basename(snapshots) == "snapshots" and os.path.basename(root).startswith("models--")
    if not is_cache or parent != blobs or not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z._-]*", blob):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), target)
    blobs_fd = os.open(blobs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return os.open(blob, flags, dir_fd=blobs_fd)
    finally:
        os.close(blobs_fd)


def as_path(path: str | os.PathLike) -> str:
    """The path as text. Raises InvalidType."""
    try:
        return os.fsdecode(path)
    except TypeError:
        raise InvalidType(f"path: expected a str or an os.PathLike, got {type(path).__name__}") from None


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def ram_bytes() -> int:
    """The machine's RAM: nothing larger is read into it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_all(file: NamedFile, max_bytes: int) -> bytes:
    try:
        data = file.read(min(max_bytes, os.fstat(file.fileno()).st_size) + 1)  # a buffer of that many bytes is allocated first
    except OSError as error:
        raise FileProblem(f"{file.name}: cannot be read: {reason(error)}") from error
    if len(data) > max_bytes:
        raise InvalidValue(f"{file.name}: expected at most {max_bytes} bytes, found more")
    return data


def read_bytes(path: str | os.PathLike, max_bytes: int, name: str | None = None) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes; `name` as in `open_regular`.

    Raises FileProblem, or InvalidValue if the file is longer.
    """
    with open_regular(path, name) as file:
        return read_all(file, max_bytes)
