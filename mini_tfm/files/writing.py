"""Writing one file so that a crash leaves the old one or the new one: beside it, fsynced, renamed.

write_file   content that is at hand
building     content that comes bit by bit, for as long as it takes; others who build the same file wait
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator

from mini_tfm.errors import FileProblem

from .reading import as_path, reason

Buffers = Iterable[bytes | memoryview]


def write_file(path: str | os.PathLike, content: str | bytes, *, new: bool = False) -> None:
    """A file that is there whole or not at all; text as UTF-8. Replaces what was there, unless `new`. Raises FileProblem."""
    folder, name = os.path.split(as_path(path))
    data = content.encode() if isinstance(content, str) else content
    try:
        handle, scratch = tempfile.mkstemp(dir=folder or ".", prefix="." + name)
        try:
            with os.fdopen(handle, "wb") as file:
                write_all(file.fileno(), data)
                fsync(file.fileno())
            os.chmod(scratch, 0o666 & ~_umask())
            if new:
                os.link(scratch, path)
                os.unlink(scratch)
            else:
                os.replace(scratch, path)
            fsync_folder(folder or ".")
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise
    except OSError as error:
        raise FileProblem(f"{as_path(path)}: cannot be written: {reason(error)}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class ThereAlready(FileProblem):
    """Someone else has built it."""


@contextlib.contextmanager
def building(target: str, overwrite: bool) -> Iterator[int]:
    """A descriptor of an empty file beside `target`, `.NAME.building`, which no other builder has.

    Where the block ends well, what was written is fsynced and takes the name; on an error it is removed. A builder holds
    a lock: of several at once one builds and the others wait, and what a killed one left is written over by the next.
    Raises ThereAlready where the target is there and `overwrite` is False.
    """
    folder, name = os.path.split(target)
    staging = os.path.join(folder, f".{name}.building")
    while True:
        fd = os.open(staging, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # waits for another builder, and for no dead one
            mine = os.path.lexists(staging) and os.path.samestat(os.stat(staging), os.fstat(fd))
            if os.path.lexists(target) and not overwrite:
                if mine:
                    os.unlink(staging)
                raise ThereAlready(f"{target}: is there already; open it, or build it again with overwrite=True")
            if not mine:
                continue  # the builder before finished or gave up
            try:
                os.ftruncate(fd, 0)
                yield fd
                fsync(fd)
                os.replace(staging, target)
                fsync_folder(folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(staging)
                raise
            return
        finally:
            os.close(fd)


def write_new(path: str, content: bytes | Buffers) -> None:
    """A file that is not there yet, fsynced."""
    buffers = [content] if isinstance(content, bytes) else content
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for buffer in buffers:
            write_all(fd, buffer)
        fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """All of `data`, however little the system takes at once."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[os.write(fd, rest) :]


def fsync(fd: int) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone stops at the drive's cache
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def fsync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
