"""The project's own model folder: read with suspicion, written so that no crash can halve it.

Reading. A file is hostile until shown otherwise: everything it declares is checked against the closed table of
dtypes, the caps below and the real size of the file, in Python integers, before the first array is allocated.
Nothing is unpickled, imported or executed.

Writing. `write_folder` builds the whole new folder beside the old one, flushes it to the disk, and swaps the two
names in one system call. A crash at any moment leaves the old folder or the new one, whole:

    .model.saving-<token>   the new folder while it is written; after the swap, the old one while it is removed
    .model.old-<token>      only where the system cannot exchange two folders (see `_swap`)

A saver holds a lock on its staging folder, so the next save can tell what a killed process left from what a live
one is writing, and removes the former; the swap itself is made under a lock on the parent folder. Files in the old
folder that a save does not write (a user's notes) are in the new one too, as hard links.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import stat
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from mmap import ACCESS_READ
from mmap import mmap as map_file
from typing import Any, NamedTuple

import numpy as np

from mini_tfm.errors import FileProblem, InvalidType, InvalidValue

CONFIG_FILE = "config.json"
TENSORS_FILE = "model.safetensors"

# Far above any real model, far below what could hurt.
MAX_JSON_BYTES = 1 << 20
MAX_JSON_DEPTH = 64
MAX_HEADER_BYTES = 1 << 24
MAX_TENSORS = 100_000
MAX_NAME_CHARS = 1024
MAX_RANK = 8
MAX_TENSOR_BYTES = 1 << 47

LOCK_SECONDS = 5.0  # how long a saver waits for another one to swap

# NumPy has no bfloat16. A field of its own, rather than bare uint16, so that no arithmetic is done on the bits.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}

Buffers = Iterable[bytes | memoryview]


def widen_bfloat16(array: np.ndarray) -> np.ndarray:
    """BFLOAT16 of any shape -> float32 of the same shape and value: a bfloat16 is the upper half of a float32."""
    if array.dtype != BFLOAT16:
        raise InvalidType(f"array: expected dtype BFLOAT16, got {array.dtype}")
    return (array["bfloat16"].astype(np.uint32) << 16).view(np.float32)


# ------------------------------------------------------------------------------------------- the folder


def save_folder(
    folder: str | os.PathLike,
    config: dict[str, Any],
    tensors: Mapping[str, np.ndarray],
    extra_files: Mapping[str, bytes | Buffers] | None = None,
) -> None:
    """Write a model folder: `config.json`, `model.safetensors` and `extra_files` (plain name -> content).

    The same arguments give the same bytes. Whatever else the folder held is kept. Raises what `write_folder` and
    `encode_safetensors` raise, and InvalidValue when `config` is not plain, finite JSON with text keys.
    """
    files = dict(extra_files or {})
    for name in (CONFIG_FILE, TENSORS_FILE):
        if name in files:
            raise InvalidValue(f"extra_files: {name!r} is written from the other arguments; choose another name")
    write_folder(folder, files | {CONFIG_FILE: _encode_json(config), TENSORS_FILE: encode_safetensors(tensors)})


def load_folder(folder: str | os.PathLike, *, mmap: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a folder written by `save_folder` -> (config, tensors by name).

    Tensors are fresh arrays, or with `mmap` read-only views of the mapped file (those that the file does not align
    are copied). A save that replaces the folder meanwhile does not disturb either: the answer is all old or all new.
    Raises FileProblem when something is missing, unreadable or a link, InvalidValue when a content is refused.
    """
    folder = as_path(folder)
    while True:
        try:
            folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError as error:
            with contextlib.suppress(OSError), _alone_in(os.path.dirname(os.path.realpath(folder))):
                if _recover(folder):
                    continue
            raise FileProblem(f"{folder}: there is no such folder; check the path") from error
        except (OSError, ValueError) as error:
            raise FileProblem(f"{folder}: expected a model folder that can be read: {_reason(error)}") from error
        # Both files are opened through one descriptor: by path, a save in between would pair an old
        # configuration with new tensors.
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, folder_fd)
            try:
                config_file = stack.enter_context(open_regular(folder, CONFIG_FILE, folder_fd))
                tensors_file = stack.enter_context(open_regular(folder, TENSORS_FILE, folder_fd))
            except FileProblem:
                if _was_replaced(folder, folder_fd):
                    continue
                raise
            config = parse_json_strict(_read_all(config_file, MAX_JSON_BYTES), config_file.name)
            return config, _read_tensors(tensors_file, mmap)


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
    lead out of the folder. Raises FileProblem.
    """
    path = as_path(path)
    shown = os.path.join(path, name) if name else path
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if name else 0)
    try:
        fd = os.open(shown if name is None or folder_fd is None else name, flags, dir_fd=folder_fd)
    except FileNotFoundError as error:
        raise FileProblem(f"{shown}: there is no such file; check the path") from error
    except (OSError, ValueError) as error:
        is_link = isinstance(error, OSError) and error.errno == errno.ELOOP
        hint = "it is a link; put the file itself in the folder" if is_link else _reason(error)
        raise FileProblem(f"{shown}: cannot be opened: {hint}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileProblem(f"{shown}: expected a regular file, found a folder, a device or a pipe")
    return NamedFile(fd, shown)


def as_path(path: str | os.PathLike) -> str:
    """The path as text. Raises InvalidType."""
    try:
        return os.fsdecode(path)
    except TypeError:
        raise InvalidType(f"path: expected a str or an os.PathLike, got {type(path).__name__}") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _was_replaced(folder: str, folder_fd: int) -> bool:
    try:
        return not os.path.samestat(os.stat(folder), os.fstat(folder_fd))
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _read_all(file: NamedFile, max_bytes: int) -> bytes:
    try:
        data = file.read(max_bytes + 1)
    except OSError as error:
        raise FileProblem(f"{file.name}: cannot be read: {_reason(error)}") from error
    if len(data) > max_bytes:
        raise InvalidValue(f"{file.name}: expected at most {max_bytes} bytes, found more")
    return data


def read_bytes(path: str | os.PathLike, max_bytes: int, name: str | None = None) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes; `name` as in `open_regular`.

    Raises FileProblem, or InvalidValue if the file is longer.
    """
    with open_regular(path, name) as file:
        return _read_all(file, max_bytes)


# ------------------------------------------------------------------------------------------- JSON


def read_json_strict(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `max_bytes` bytes.

    Stricter than `json.load`: UTF-8 without a mark, no key twice, no NaN or infinity (nor a number that overflows
    to one), no lone surrogate, at most MAX_JSON_DEPTH levels. Raises FileProblem, or InvalidValue naming the file.
    """
    return parse_json_strict(read_bytes(path, max_bytes), as_path(path))


def parse_json_strict(data: bytes, source: str) -> dict[str, Any]:
    """`read_json_strict` of bytes already read; `source` names them in errors."""

    def refuse_constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    def finite(text: str) -> float:
        number = float(text)
        if math.isinf(number):
            raise ValueError(f"the number {text[:40]} is out of range")
        return number

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"the key {twice[:80]!r} appears twice")
        return found

    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=refuse_constant, parse_float=finite, object_pairs_hook=unique)
        if not isinstance(value, dict):
            raise ValueError(f"expected an object in braces, got a {type(value).__name__}")
        _check_json(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidValue(f"{source}: not the JSON expected here: {error}") from error
    return value


def _encode_json(config: dict[str, Any]) -> bytes:
    if not isinstance(config, dict):
        raise InvalidType(f"config: expected a dict, got {type(config).__name__}")
    try:
        _check_json(config)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    except (ValueError, TypeError) as error:
        raise InvalidValue(f"config: cannot be written as JSON: {error}") from error
    data = text.encode("utf-8")
    if len(data) > MAX_JSON_BYTES:
        raise InvalidValue(f"config: expected at most {MAX_JSON_BYTES} bytes of JSON, got {len(data)}")
    return data


def _check_json(value: Any) -> None:
    """What the `json` module lets through and we do not, on the way in and on the way out."""
    waiting = [(value, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"more than {MAX_JSON_DEPTH} levels deep")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise TypeError(f"the key {key!r} is a {type(key).__name__}, not text")
                key.encode("utf-8")
            waiting.extend((item, depth + 1) for item in value.values())
        elif isinstance(value, (list, tuple)):
            waiting.extend((item, depth + 1) for item in value)
        elif isinstance(value, str):
            value.encode("utf-8")


# ------------------------------------------------------------------------------------------- safetensors
#
# 8 bytes    length of the header, little-endian
# header     JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}; spaces pad it
# data       offsets count from here; the tensors cover it with no hole and no overlap


class _Entry(NamedTuple):
    begin: int
    end: int
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


def encode_safetensors(tensors: Mapping[str, np.ndarray]) -> list[bytes | memoryview]:
    """The bytes of a safetensors file, as a list of buffers to write one after the other (arrays are not copied).

    Widest dtype first and then by name, so that every tensor is aligned to its item and equal input gives equal
    bytes. Raises InvalidType for a dtype outside DTYPES, InvalidValue for a name or shape that no reader would take.
    """
    if len(tensors) > MAX_TENSORS:
        raise InvalidValue(f"tensors: expected at most {MAX_TENSORS}, got {len(tensors)}")
    codes = {dtype: code for code, dtype in DTYPES.items()}
    arrays: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        dtype = getattr(array, "dtype", None)
        little = dtype.newbyteorder("<") if isinstance(dtype, np.dtype) else None
        if not isinstance(array, np.ndarray) or little not in codes:
            raise InvalidType(f"tensors[{name!r}]: expected an array of {', '.join(DTYPES)}, got {dtype or type(array).__name__}")
        if problem := _name_problem(name):
            raise InvalidValue(f"tensors: {problem}")
        if array.ndim > MAX_RANK:
            raise InvalidValue(f"tensors[{name!r}]: expected at most {MAX_RANK} dimensions, got {array.ndim}")
        arrays[name] = np.asarray(array, dtype=little, order="C")
    header, begin = {}, 0
    ordered = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    for name in ordered:
        array = arrays[name]
        end = begin + array.nbytes
        header[name] = {"dtype": codes[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % 64)  # the data then starts on a cache line of the mapped file
    if len(text) > MAX_HEADER_BYTES:
        raise InvalidValue(f"tensors: names and shapes take {len(text)} bytes, at most {MAX_HEADER_BYTES} expected")
    return [struct.pack("<Q", len(text)), text, *(arrays[name].reshape(-1).view(np.uint8).data for name in ordered)]


def read_safetensors(path: str | os.PathLike, *, mmap: bool = False) -> dict[str, np.ndarray]:
    """Tensors by name, in the file's order; `mmap` as in `load_folder`. Raises FileProblem, InvalidValue."""
    with open_regular(path) as file:
        return _read_tensors(file, mmap)


def _read_tensors(file: NamedFile, mmap: bool) -> dict[str, np.ndarray]:
    try:
        data_start, entries = _read_header(file)
        if mmap:
            raw = np.frombuffer(map_file(file.fileno(), 0, access=ACCESS_READ), np.uint8)
            tensors = {entry.name: _map_tensor(raw[data_start:], entry) for entry in entries}
        else:
            tensors = {entry.name: _copy_tensor(file, data_start, entry) for entry in entries}
    except OSError as error:
        raise FileProblem(f"{file.name}: cannot be read: {_reason(error)}") from error
    except ValueError as error:  # includes what the strict JSON reader refused
        problem = str(error).removeprefix(f"{file.name}: ")
        raise InvalidValue(f"{file.name}: {problem}; the file is damaged or is not safetensors") from error
    return tensors


def _map_tensor(data: np.ndarray, entry: _Entry) -> np.ndarray:
    array = data[entry.begin : entry.end].view(entry.dtype).reshape(entry.shape)
    if not array.flags.aligned:  # a kernel may load whole vectors; a foreign writer may not have aligned them
        array = array.copy()
        array.flags.writeable = False
    return _check_booleans(array, entry)


def _copy_tensor(file: NamedFile, data_start: int, entry: _Entry) -> np.ndarray:
    array = np.empty(entry.shape, entry.dtype)
    file.seek(data_start + entry.begin)
    if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
        raise ValueError(f"tensor {entry.name!r}: the file ends before the tensor does")
    return _check_booleans(array, entry)


def _check_booleans(array: np.ndarray, entry: _Entry) -> np.ndarray:
    # A bool that is neither 0 nor 1 is undefined behaviour for compiled code.
    if array.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise ValueError(f"tensor {entry.name!r}: a BOOL is neither 0 nor 1")
    return array


def _read_header(file: NamedFile) -> tuple[int, list[_Entry]]:
    """Where the data starts, in bytes, and every tensor in the order of the data. All checks, no allocation."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise ValueError(f"expected at least 8 bytes, found {size}")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"the header claims {length} bytes, the file has {size - 8} after the length, the cap is {MAX_HEADER_BYTES}")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError("the header does not start with a brace")
    header = parse_json_strict(text, file.name)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__: expected an object of strings")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"expected at most {MAX_TENSORS} tensors, found {len(header)}")
    entries = sorted(_read_entry(name, fields) for name, fields in header.items())
    position = 0
    for entry in entries:
        if entry.begin != position:
            fault = "a hole" if entry.begin > position else "an overlap"
            raise ValueError(f"tensor {entry.name!r}: {fault} before it, expected at {position}, is at {entry.begin}")
        position = entry.end
    data_bytes = size - 8 - length
    if position != data_bytes:
        raise ValueError(f"the tensors take {position} bytes, the file has {data_bytes}")
    return 8 + length, entries


def _read_entry(name: str, fields: Any) -> _Entry:
    if problem := _name_problem(name):
        raise ValueError(problem)
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r}: expected exactly dtype, shape and data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"tensor {name!r}: dtype: expected one of {', '.join(DTYPES)}, found {str(code)[:40]!r}")
    if not _are_counts(shape) or len(shape) > MAX_RANK:
        raise ValueError(f"tensor {name!r}: shape: expected at most {MAX_RANK} integers from 0")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r}: data_offsets: expected two integers from 0, the first not the larger")
    dtype = DTYPES[code]
    # Zeros are left out of the cap: NumPy too refuses an empty array whose other dimensions overflow.
    if math.prod(count or 1 for count in shape) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise ValueError(f"tensor {name!r}: shape: more than {MAX_TENSOR_BYTES} bytes")
    expected = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise ValueError(f"tensor {name!r}: its shape takes {expected} bytes, its data_offsets {offsets[1] - offsets[0]}")
    return _Entry(offsets[0], offsets[1], name, dtype, tuple(shape))


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)  # bool is an int too


def _name_problem(name: Any) -> str | None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        return f"expected tensor names of 1 to {MAX_NAME_CHARS} characters, got {str(name)[:40]!r}"
    if name == "__metadata__" or "\0" in name or any("\ud800" <= char <= "\udfff" for char in name):
        return f"the tensor name {name[:40]!r} is reserved, or holds NUL or a lone surrogate"
    return None


# ------------------------------------------------------------------------------------------- the one writer


def write_folder(folder: str | os.PathLike, files: Mapping[str, bytes | Buffers]) -> None:
    """Write `files` (plain name -> content) into `folder` as one step: after a crash, none of them or all of them.

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
            with _alone_in(parent):
                _check_target(target, files)
            _write_staged(target, files)
    except FileProblem:
        raise
    except (OSError, ValueError) as error:
        raise FileProblem(
            f"{shown}: cannot be saved: {_reason(error)}; what was there is untouched. Check free space and permissions, then save again"
        ) from error


def _write_staged(target: str, files: Mapping[str, bytes | Buffers]) -> None:
    with _staging(target) as staging:
        for name in sorted(files):
            _write_file(os.path.join(staging, name), files[name])
        with _alone_in(os.path.dirname(target)):
            if os.path.isdir(target):
                _carry_over(target, staging, files)
                os.chmod(staging, stat.S_IMODE(os.stat(target).st_mode))
            _fsync_folder(staging)
            _commit(staging, target)
            _rescue(staging, target)


def _check_files(files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name):
            raise InvalidValue(f"files: expected plain names of letters, digits, '_', '-' and '.', got {str(name)[:80]!r}")
        if isinstance(content, (str, bytearray)) or not isinstance(content, Iterable):
            raise InvalidType(f"files[{name!r}]: expected bytes or several buffers, got {type(content).__name__}")


def _check_target(target: str, files: Mapping[str, Any]) -> None:
    if not os.path.lexists(target) and not _recover(target):
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
            raise FileProblem(f"{path}: is a folder where a file is to be written; move it away")


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
                _fsync_folder(os.path.dirname(path))
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
def _alone_in(parent: str) -> Iterator[None]:
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


def _write_file(path: str, content: bytes | Buffers) -> None:
    buffers = [content] if isinstance(content, bytes) else content
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for buffer in buffers:
            rest = memoryview(buffer)
            while len(rest):
                rest = rest[os.write(fd, rest) :]
        _fsync(fd)
    finally:
        os.close(fd)


def _fsync(fd: int) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone stops at the drive's cache
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def _fsync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
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
                    raise FileProblem(f"{entry.path}: is a mount point and cannot be carried over; unmount it")
                os.mkdir(copy)
                _carry_over(entry.path, copy, ())
                _fsync_folder(copy)
                shutil.copystat(entry.path, copy)
                continue
            try:
                os.link(entry.path, copy, follow_symlinks=False)
            except OSError:  # a file system without hard links, or a file of someone else
                shutil.copy2(entry.path, copy, follow_symlinks=False)
                if entry.is_file(follow_symlinks=False):
                    with open_regular(copy) as file:
                        _fsync(file.fileno())


def _commit(staging: str, target: str) -> None:
    """The new folder takes the name; the old one, if any, is then at `staging`. Undone if it cannot be made durable."""
    inside = None
    with contextlib.suppress(OSError):
        working = os.getcwd()
        inside = working if os.path.commonpath([working, target]) == target else None
    had_old = _put(staging, target)
    try:
        _fsync_folder(os.path.dirname(target))
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
    the old one, whole, beside it: `_recover` puts it back on the next load or save.
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


def _recover(target: str) -> bool:
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
