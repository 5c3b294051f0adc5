"""The safetensors format: round trips, and bad files refused by name."""

import json
import random
import struct

import numpy as np
import pytest
from contents import CONFIG, TENSORS, load_folder, same

from mini_tfm.checkpoint.safetensors import BFLOAT16, MAX_HEADER_BYTES, encode_safetensors, read_safetensors, widen_bfloat16
from mini_tfm.errors import InvalidType, InvalidValue, MiniTfmError
from mini_tfm.files.strict_json import read_json_strict


def test_the_safetensors_package_reads_ours_and_we_read_its(tmp_path):
    from safetensors.numpy import load, save

    data = b"".join(encode_safetensors(TENSORS))
    assert same(load(data), TENSORS)
    (tmp_path / "theirs").write_bytes(save(TENSORS, {"format": "np"}))
    assert same(read_safetensors(tmp_path / "theirs"), TENSORS)


def test_a_map_of_a_misaligned_file_is_copied(tmp_path):
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} '
    header += b" " * (-(8 + len(header)) % 4 + 1)
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + np.float32([1, 2]).tobytes())
    array = read_safetensors(tmp_path / "x", mmap=True)["w"]
    assert array.flags.aligned and not array.flags.writeable and array.tolist() == [1, 2]


def test_bfloat16_keeps_its_bits_and_widens_exactly(tmp_path):
    values = np.float32([1, -2.5, np.inf, 0, 3.140625])
    halves = (values.view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16)
    (tmp_path / "x").write_bytes(b"".join(encode_safetensors({"h": halves.reshape(1, 5)})))
    loaded = read_safetensors(tmp_path / "x")["h"]
    assert loaded.dtype == BFLOAT16 and widen_bfloat16(loaded).tolist() == [values.tolist()]
    with pytest.raises(InvalidType, match="BFLOAT16"):
        widen_bfloat16(values)


def test_any_memory_layout_is_written_in_c_order(tmp_path):
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    views = {"f": np.asfortranarray(array), "step": array[::2, ::-1], "swapped": array.astype(">i4")}
    (tmp_path / "x").write_bytes(b"".join(encode_safetensors(views)))
    loaded = read_safetensors(tmp_path / "x")
    assert all(np.array_equal(loaded[name], view) for name, view in views.items())


def packed(header: object, data: bytes = b"", pad: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text + pad)) + text + pad + data


def entry(**changes: object) -> dict:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def one(**changes: object) -> bytes:
    return packed({"w": entry(**changes)}, bytes(8))


def two(first: list[int], second: list[int], data_bytes: int) -> bytes:
    both = {"a": entry(shape=[1], data_offsets=first), "b": entry(shape=[1], data_offsets=second)}
    return packed(both, bytes(data_bytes))


BAD_TENSORS = {
    "file-empty": b"",
    "file-shorter-than-the-length": b"\1\0\0",
    "file-is-a-pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x02os.",
    "header-length-past-the-end": struct.pack("<Q", 100) + b"{}",
    "header-length-by-one": struct.pack("<Q", 3) + b"{}",
    "header-length-2-to-63": struct.pack("<Q", 1 << 63) + b"{}",
    "header-length-all-ones": b"\xff" * 8 + b"{}",
    "header-length-zero": bytes(8),
    "header-over-the-cap": packed({}, pad=b" " * (MAX_HEADER_BYTES - 1)),
    "header-starts-with-a-space": packed(b" {}"),
    "header-not-json": packed(b"{oops}"),
    "header-cut-json": packed(b'{"w":'),
    "header-two-values": packed(b"{}{}"),
    "header-a-list": packed(b"[]"),
    "header-not-utf8": packed(b'{"\xff": 1}'),
    "header-lone-surrogate": packed(b'{"\\ud800": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "header-too-deep": packed(b'{"a":' * 100 + b"1" + b"}" * 100),
    "header-bottomless": packed(b'{"a":' * 100_000),
    "header-name-twice": packed(b'{"w":%s,"w":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "header-field-twice": packed(b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "header-nan": packed(b'{"w":NaN}'),
    "header-infinite-number": packed(b'{"w":1e999}'),
    "header-endless-integer": packed(b'{"w":' + b"9" * 5000 + b"}"),
    "metadata-not-an-object": packed({"__metadata__": []}),
    "metadata-not-strings": packed({"__metadata__": {"a": 1}}),
    "name-empty": packed({"": entry()}, bytes(8)),
    "name-too-long": packed({"w" * 1025: entry()}, bytes(8)),
    "name-with-nul": packed({"a\0b": entry()}, bytes(8)),
    "too-many-tensors": packed({str(i): 0 for i in range(100_001)}),
    "entry-a-number": packed({"w": 3}),
    "entry-null": packed({"w": None}),
    "entry-lacks-a-field": packed({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "entry-with-a-field-more": one(strides=[4]),
    "dtype-unknown": one(dtype="F8_E4M3"),
    "dtype-lower-case": one(dtype="f32"),
    "dtype-a-number": one(dtype=32),
    "dtype-a-list": one(dtype=["F32"]),
    "dtype-of-another-width": one(dtype="F64"),
    "shape-a-number": one(shape=2),
    "shape-a-string": one(shape="2"),
    "shape-negative": one(shape=[-2]),
    "shape-two-negatives": one(shape=[-1, -2]),
    "shape-float": one(shape=[2.0]),
    "shape-boolean": one(shape=[True, 2]),
    "shape-null": one(shape=[None]),
    "shape-too-small": one(shape=[1]),
    "shape-too-large": one(shape=[3]),
    "shape-overflows-64-bits": one(shape=[1 << 32, 1 << 32, 1 << 32]),
    "shape-wraps-to-the-right-size": one(shape=[(1 << 62) + 2]),
    "shape-empty-but-vast": one(shape=[0, 1 << 62], data_offsets=[0, 0]),
    "shape-rank-9": one(shape=[1] * 8 + [2]),
    "shape-rank-1000": one(shape=[1] * 999 + [2]),
    "offsets-one": one(data_offsets=[8]),
    "offsets-three": one(data_offsets=[0, 8, 8]),
    "offsets-an-object": one(data_offsets={"0": 8}),
    "offsets-backwards": one(data_offsets=[8, 0]),
    "offsets-negative": one(data_offsets=[-8, 0]),
    "offsets-float": one(data_offsets=[0, 8.0]),
    "offsets-boolean": one(data_offsets=[False, 8]),
    "offsets-past-the-end": one(shape=[4], data_offsets=[0, 16]),
    "offsets-of-2-to-64": one(data_offsets=[1 << 64, (1 << 64) + 8]),
    "data-starts-with-a-hole": packed({"w": entry(data_offsets=[4, 12])}, bytes(12)),
    "data-ends-with-a-hole": packed({"w": entry()}, bytes(12)),
    "data-with-no-tensor": packed({}, bytes(1)),
    "data-hole-between": two([0, 4], [8, 12], 12),
    "data-overlap": two([0, 4], [2, 6], 6),
    "data-same-place-twice": two([0, 4], [0, 4], 4),
    "data-missing": packed({"w": entry()}),
    "bool-of-two": packed({"w": entry(dtype="BOOL", shape=[3], data_offsets=[0, 3])}, b"\0\1\2"),
}


@pytest.mark.parametrize("mmap", [False, True], ids=["copied", "mapped"])
@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_bad_tensor_file_is_refused_by_name(kind, mmap, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_TENSORS[kind])
    with pytest.raises(InvalidValue) as caught:
        load_folder(tmp_path, mmap=mmap)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


def small_file() -> bytes:
    return b"".join(encode_safetensors({"w": TENSORS["w"], "b": TENSORS["b"]}))


def test_every_prefix_of_a_file_is_refused(tmp_path):
    data, path = small_file(), tmp_path / "x"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(InvalidValue):
            read_safetensors(path)
    config = json.dumps(CONFIG).encode()
    for length in range(len(config)):
        path.write_bytes(config[:length])
        with pytest.raises(InvalidValue):
            read_json_strict(path)


def test_mutated_files_raise_our_errors_or_load(tmp_path):
    source, path, rng = small_file(), tmp_path / "x", random.Random(11)
    pieces = [b"", b"0", b"-", b'"', b"]", b"{", b"1e9", b"null", b"\xff", b"9" * 20, b'"w":']
    refused = 0
    for _ in range(4000):
        data = bytearray(source)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 1, 1, 1, 8])] = rng.choice([bytes([rng.randrange(256)]), rng.choice(pieces)])
        path.write_bytes(data)
        try:
            tensors = read_safetensors(path)
        except MiniTfmError:
            refused += 1
        else:
            assert sum(array.nbytes for array in tensors.values()) <= len(data)
    assert refused > 2000
