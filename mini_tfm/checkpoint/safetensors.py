"""The safetensors format: https://huggingface.co/docs/safetensors

    8 bytes    length of the header, little-endian
    header     JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}; spaces pad it
    data       offsets count from here; the tensors cover it with no hole and no overlap

A file is hostile until shown otherwise: all that its header declares is checked against the closed table of dtypes, the
limits below and the real size of the file, in Python integers, before the first array is allocated.
"""

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from mmap import ACCESS_READ
from mmap import mmap as map_file
from typing import Any, NamedTuple

import numpy as np

from mini_tfm.errors import FileProblem, InvalidType, InvalidValue
from mini_tfm.files.reading import NamedFile, open_regular, ram_bytes, reason
from mini_tfm.files.strict_json import parse_json_strict

MAX_HEADER_BYTES = 1 << 24
MAX_TENSORS = 100_000
MAX_NAME_CHARS = 1024
MAX_RANK = 8
MAX_TENSOR_BYTES = 1 << 47
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
    "I8": np.dtype("i1"),
    "BOOL": np.dtype("?"),
}


def widen_bfloat16(array: np.ndarray) -> np.ndarray:
    """BFLOAT16 of any shape -> float32 of the same shape and value: a bfloat16 is the upper half of a float32."""
    if array.dtype != BFLOAT16:
        raise InvalidType(f"array: expected dtype BFLOAT16, got {array.dtype}")
    return (array["bfloat16"].astype(np.uint32) << 16).view(np.float32)


class Entry(NamedTuple):
    """A tensor as the header declares it; begin and end in bytes of the data."""

    begin: int
    end: int
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


def encode_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
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
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    ordered = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    for name in ordered:
        array = arrays[name]
        end = begin + array.nbytes
        header[name] = {"dtype": codes[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % 64)  # the data then starts on a cache line of the mapped file
    if len(text) > MAX_HEADER_BYTES:
        raise InvalidValue(f"tensors: expected at most {MAX_HEADER_BYTES} bytes of names and shapes, got {len(text)}")
    return [struct.pack("<Q", len(text)), text, *(arrays[name].reshape(-1).view(np.uint8).data for name in ordered)]


def read_safetensors(path: str | os.PathLike, *, mmap: bool = False) -> dict[str, np.ndarray]:
    """Tensors by name, in the file's order; with `mmap` read-only views of the mapped file (copies where it does not
    align them). Raises FileProblem, InvalidValue."""
    with open_regular(path) as file:
        return read_tensors(file, mmap)


def read_entries(file: NamedFile) -> dict[str, Entry]:
    """What the header declares, by name: enough to compare with a configuration before a tensor is read."""
    with _errors_of(file):
        return {entry.name: entry for entry in _read_header(file)[1]}


def read_tensors(file: NamedFile, mmap: bool) -> dict[str, np.ndarray]:
    with _errors_of(file):
        data_start, entries = _read_header(file)
        if mmap:
            raw = np.frombuffer(map_file(file.fileno(), 0, access=ACCESS_READ), np.uint8)
            return {entry.name: _map_tensor(raw[data_start:], entry) for entry in entries}
        if entries and entries[-1].end > (most := ram_bytes()):
            raise FileProblem(f"{file.name}: its tensors take {entries[-1].end} bytes, this machine has {most} bytes of RAM")
        return {entry.name: _copy_tensor(file, data_start, entry) for entry in entries}


@contextlib.contextmanager
def _errors_of(file: NamedFile) -> Iterator[None]:
    """Errors that name the file."""
    try:
        yield
    except FileProblem:
        raise
    except OSError as error:
        raise FileProblem(f"{file.name}: cannot be read: {reason(error)}") from error
    except MemoryError as error:
        raise FileProblem(f"{file.name}: its tensors take more RAM than there is") from error
    except ValueError as error:  # includes what the strict JSON reader refused
        problem = str(error).removeprefix(f"{file.name}: ")
        raise InvalidValue(f"{file.name}: {problem}; the file is damaged or is not safetensors") from error


def _map_tensor(data: np.ndarray, entry: Entry) -> np.ndarray:
    array = data[entry.begin : entry.end].view(entry.dtype).reshape(entry.shape)
    if not array.flags.aligned:  # a kernel may load whole vectors; a foreign writer may not have aligned them
        array = array.copy()
        array.flags.writeable = False
    return _check_booleans(array, entry)


def _copy_tensor(file: NamedFile, data_start: int, entry: Entry) -> np.ndarray:
    array = np.empty(entry.shape, entry.dtype)
    file.seek(data_start + entry.begin)
    if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
        raise ValueError(f"tensor {entry.name!r}: the file ends before the tensor does")
    return _check_booleans(array, entry)


def _check_booleans(array: np.ndarray, entry: Entry) -> np.ndarray:
    # A bool that is neither 0 nor 1 is undefined behaviour for compiled code.
    if array.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise ValueError(f"tensor {entry.name!r}: a BOOL is neither 0 nor 1")
    return array


def _read_header(file: NamedFile) -> tuple[int, list[Entry]]:
    """Where the data starts, in bytes, and every tensor in the order of the data. All checks, no allocation."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise ValueError(f"expected at least 8 bytes, found {size}")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"the header claims {length} bytes, the file has {size - 8} after the length, the limit is {MAX_HEADER_BYTES}")
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


def _read_entry(name: str, fields: Any) -> Entry:
    if problem := _name_problem(name):
        raise ValueError(problem)
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r}: expected exactly dtype, shape and data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"tensor {name!r}: dtype: expected one of {', '.join(DTYPES)}, found {str(code)[:40]!r}")
    if not _are_counts(shape) or len(shape) > MAX_RANK:
        raise ValueError(f"tensor {name!r}: shape: expected at most {MAX_RANK} integers of at least 0")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r}: data_offsets: expected two integers of at least 0 in ascending order")
    dtype = DTYPES[code]
    # Zeros are left out of the cap: NumPy too refuses an empty array whose other dimensions overflow.
    if math.prod(count or 1 for count in shape) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise ValueError(f"tensor {name!r}: shape: more than {MAX_TENSOR_BYTES} bytes")
    expected = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        raise ValueError(f"tensor {name!r}: its shape takes {expected} bytes, its data_offsets {offsets[1] - offsets[0]}")
    return Entry(offsets[0], offsets[1], name, dtype, tuple(shape))


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)  # bool is an int too


def _name_problem(name: Any) -> str | None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        return f"expected tensor names of 1 to {MAX_NAME_CHARS} characters, got {str(name)[:40]!r}"
    if name == "__metadata__" or "\0" in name or any("\ud800" <= char <= "\udfff" for char in name):
        return f"the tensor name {name[:40]!r} is reserved, or holds NUL or a lone surrogate"
    return None
