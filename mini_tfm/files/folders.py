"""Writing a whole folder so that no crash can halve it.

`write_folder` builds the new folder beside the old one, flushes it to the disk, and swaps the two names in one system
call. A crash at any moment leaves the old folder or the new one, whole:

    .model.saving-<token>   the new folder while it is written; after the swap, the old one while it is removed
    .model.old-<token>      only where the system cannot exchange two folders (see `_swap`)

A saver holds a lock on its staging folder, so the next save can tell what a killed process left from what a live
one is writing, and removes the former; the swap itself is made under a lock on the parent folder. Files in the old
folder that a save does not write (a user's notes) are in the new one too, as hard links.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mini_tfm.errors import FileProblem, InvalidType, InvalidValue

from .reading import as_path, open_regular, reason
from .writing import Buffers, fsync, fsync_folder, write_new

LOCK_SECONDS = 5.0  # how long a saver waits for another one to swap


def write_folder(folder: str | os.PathLike, files: Mapping[str, bytes | Buffers], *, new: bool = False) -> None:
    """Write `files` (plain name -> content) into `folder` as one step: after a crash, none of them or all of them.

    new: a FileProblem where one of them is there already, also if it came while the others were written.

    Makes the folder and its parents where missing, follows a link to a folder, keeps every other file. On an error
    the folder is what it was. Raises InvalidValue for a name, FileProblem for everything the system refuses. Where
    the working directory of this process is inside the folder, it is entered again: the swap gives the folder a new
    inode. Two savers at once are safe; the last one to finish wins.
    """
    _check_files(files)
    shown = as_path(folder)
    if not shown:
        raise InvalidValue("folder: expected a path, got an empty one; '.' is the working directory")
    try:
        target = os.path.realpath(shown)
        parent = os.path.dirname(target)
        with _parents(parent):
            with alone_in(parent):
                _check_target(target, files)
            _write_staged(target, files, new)
    except FileProblem:
        raise
    except (OSError, ValueError) as error:
        raise FileProblem(
            f"{shown}: cannot be saved: {reason(error)}; nothing was changed. Check free space and permissions, then save again"
        ) from error


@contextlib.contextmanager
def claimed(folder: str | os.PathLike) -> Iterator[None]:
    """Only one process at a time has claimed `folder`, which need not be there yet: for work of hours whose results go there.

    The claim is a locked file beside it, `.NAME.claimed`, which ends with the block or the process. Raises FileProblem where another
    process has it, or where the file cannot be made.
    """
    target = os.path.realpath(as_path(folder))
    parent, name = os.path.split(target)
    path = os.path.join(parent, f".{name}.claimed")
    try:
        with _parents(parent):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not (os.path.lexists(path) and os.path.samestat(os.stat(path), os.fstat(fd))):
                    raise BlockingIOError  # whoever had it has just ended
            except BlockingIOError as error:
                os.close(fd)
                raise FileProblem(f"{folder}: another process is working on it; wait for its end, or give another folder") from error
            except OSError:
                pass  # a file system without locks
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                os.close(fd)
    except FileProblem:
        raise
    except OSError as error:
        if error.filename not in (path, parent):
            raise
        raise FileProblem(f"{folder}: cannot be written: {reason(error)}") from error


def _write_staged(target: str, files: Mapping[str, bytes | Buffers], new: bool) -> None:
    with _staging(target) as staging:
        for name in sorted(files):
            write_new(os.path.join(staging, name), files[name])
        with alone_in(os.path.dirname(target)):
            there = [name for name in sorted(files) if os.path.lexists(os.path.join(target, name))]
            if new and there:
                raise FileProblem(f"{target}: holds {there[0]} already; nothing was changed. Give another folder")
            if os.path.isdir(target):
                _carry_over(target, staging, files)
                os.chmod(staging, stat.S_IMODE(os.stat(target).st_mode))
            fsync_folder(staging)
            _commit(staging, target)
            _rescue(staging, target)


def _check_files(files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name):
            raise InvalidValue(f"files: expected plain names of letters, digits, '_', '-' and '.', got {str(name)[:80]!r}")
        if isinstance(content, (str, bytearray)) or not isinstance(content, Iterable):
            raise InvalidType(f"files[{name!r}]: expected bytes or several buffers, got {type(content).__name__}")


def _check_target(target: str, files: Mapping[str, Any]) -> None:
    if not os.path.lexists(target) and not recover(target):
        return
    if not os.path.isdir(target):
        raise FileProblem(f"{target}: is a file; choose the path of a folder")
    if os.path.ismount(target):
        raise FileProblem(f"{target}: is a mount point and cannot be replaced; choose a folder inside it")
    if not os.access(target, os.R_OK | os.W_OK | os.X_OK):
        raise FileProblem(f"{target}: is not writable; change its permissions or choose another folder")
    for name in files:
        path = os.path.join(target, name)
        if os.path.isdir(path) and not os.path.islink(path):
            raise FileProblem(f"{path}: is a folder, but a file must be written there; move it away")


@contextlib.contextmanager
def _parents(parent: str) -> Iterator[None]:
    """Make the missing parents; take back those that stay empty."""
    missing = []
    while not os.path.lexists(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    try:
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
                fsync_folder(os.path.dirname(path))
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                os.rmdir(path)
        raise


@contextlib.contextmanager
def _staging(target: str) -> Iterator[str]:
    """An empty locked folder beside `target`; whatever stands there in the end is removed."""
    parent, name = os.path.split(target)
    # An old folder that stepped aside is rubbish only while another has its name.
    dead = re.compile(re.escape(f".{name}.") + ("(saving|old)" if os.path.isdir(target) else "saving") + "-[0-9a-f]{16}")
    for entry in os.listdir(parent):
        path = os.path.join(parent, entry)
        if dead.fullmatch(entry) and (fd := _lock(path)) is not None:
            _remove_tree(path)
            os.close(fd)
    with contextlib.ExitStack() as stack:
        while True:
            staging = os.path.join(parent, f".{name}.saving-{secrets.token_hex(8)}")
            os.mkdir(staging)
            stack.callback(_remove_tree, staging)
            if (fd := _lock(staging)) is not None:
                stack.callback(os.close, fd)
                break  # otherwise another saver saw the folder before it was locked, and is removing it
        # The swap turns the old folder into what is staged, so it is locked as well.
        if os.path.isdir(target) and (fd := _lock(target)) is not None:
            stack.callback(os.close, fd)
        yield staging


def _lock(path: str) -> int | None:
    """A descriptor that locks the folder until it is closed or the process dies; None if it is locked or gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(fd)):
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


@contextlib.contextmanager
def alone_in(parent: str) -> Iterator[None]:
    """Only one process or thread at a time moves folders in `parent`.

    Gives up waiting after LOCK_SECONDS: whoever started us under `flock parent ...` would wait for ever, and where
    two folders can be exchanged in one step, a swap without the lock is safe as well.
    """
    fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.002)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(fd)


def _carry_over(source: str, destination: str, without: Iterable[str]) -> None:
    """Everything of `source` but `without` also in `destination`: files as hard links, folders made again.

    Linking before the swap, rather than moving after it, leaves no moment at which a crash could lose a file.
    """
    with os.scandir(source) as entries:
        for entry in entries:
            copy = os.path.join(destination, entry.name)
            if entry.name in without:
                continue
            if entry.is_dir(follow_symlinks=False):
                if os.path.ismount(entry.path):
                    raise FileProblem(f"{entry.path}: is a mount point and cannot be moved to the new folder; unmount it")
                os.mkdir(copy)
                _carry_over(entry.path, copy, ())
                fsync_folder(copy)
                shutil.copystat(entry.path, copy)
                continue
            try:
                os.link(entry.path, copy, follow_symlinks=False)
            except OSError:  # a file system without hard links, or a file of someone else
                shutil.copy2(entry.path, copy, follow_symlinks=False)
                if entry.is_file(follow_symlinks=False):
                    with open_regular(copy) as file:
                        fsync(file.fileno())


def _commit(staging: str, target: str) -> None:
    """The new folder takes the name; the old one, if any, is then at `staging`. Undone if it cannot be made durable."""
    inside = None
    with contextlib.suppress(OSError):
        working = os.getcwd()
        inside = working if os.path.commonpath([working, target]) == target else None
    had_old = _put(staging, target)
    try:
        fsync_folder(os.path.dirname(target))
    except OSError:
        if had_old:
            _swap(staging, target)
        else:
            os.rename(target, staging)
        raise
    finally:
        if inside:
            with contextlib.suppress(OSError):
                os.chdir(inside)


def _put(staging: str, target: str) -> bool:
    """Staged folder to its name; True if another folder stood there, which is then at `staging`."""
    for _ in range(100):
        try:
            if os.path.isdir(target):
                _swap(staging, target)
                return True
            os.rename(staging, target)
            return False
        except OSError as error:  # another saver came or went between the question and the answer
            if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
                raise
            last = error
    raise last


def _swap(staging: str, target: str) -> None:
    """Exchange two folders. POSIX cannot replace a folder that is not empty, so this takes Linux's or macOS's own call.

    Without one, the old folder steps aside for two renames. A crash between them leaves no folder under the name and
    the old one, whole, beside it: `recover` puts it back on the next load or save.
    """
    if _exchange(staging, target):
        return
    aside = staging.replace(".saving-", ".old-")
    done = []
    try:
        for source, destination in ((target, aside), (staging, target), (aside, staging)):
            os.rename(source, destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            with contextlib.suppress(OSError):  # another saver took the name meanwhile: `_put` tries again
                os.rename(destination, source)
        raise


def _exchange(first: str, second: str) -> bool:
    """Swap two paths in one system call; False where the system or the file system has none."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    first_c, second_c = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin":
        failed = libc.renamex_np(first_c, second_c, ctypes.c_uint(2))  # RENAME_SWAP
    elif hasattr(libc, "renameat2"):
        here = -100  # AT_FDCWD
        failed = libc.renameat2(here, first_c, here, second_c, ctypes.c_uint(2))  # RENAME_EXCHANGE
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), second)


def recover(target: str) -> bool:
    """Put back the old folder after a crash in the middle of `_swap`; True if there is a folder to look at now.

    To be called alone in the parent folder: a live saver between its renames needs no help.
    """
    parent, name = os.path.split(os.path.realpath(target))
    aside = re.compile(re.escape(f".{name}.old-") + r"[0-9a-f]{16}")
    if not os.path.lexists(os.path.join(parent, name)):
        for entry in sorted(filter(aside.fullmatch, os.listdir(parent)))[:1]:
            os.rename(os.path.join(parent, entry), os.path.join(parent, name))
    return os.path.exists(target)


def _rescue(old: str, new: str) -> None:
    """Move over what someone put in the old folder after it was carried over."""
    with contextlib.suppress(OSError):  # the save is done: nothing here may report it as failed
        for name in os.listdir(old):
            if not os.path.lexists(os.path.join(new, name)):
                os.rename(os.path.join(old, name), os.path.join(new, name))


def _remove_tree(path: str) -> None:
    """Best effort: what cannot be removed now is tried again by the next save."""
    for folder, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            os.chmod(folder, 0o700)
    shutil.rmtree(path, ignore_errors=True)
