"""The model folder: round trips, bad files by name, and saves that are cut, refused or raced."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mini_tfm.checkpoint.folder import load_folder, save_folder
from mini_tfm.checkpoint.safetensors import BFLOAT16, DTYPES, MAX_HEADER_BYTES, encode_safetensors, read_safetensors, widen_bfloat16
from mini_tfm.errors import FileProblem, InvalidType, InvalidValue, MiniTfmError
from mini_tfm.files import folders, writing
from mini_tfm.files.strict_json import read_json_strict

CONFIG = {"d_model": 8, "name": "é", "nested": {"list": [1, 2.5, None, True]}}
TENSORS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([True, False, True]),
    "scalar": np.array(3.0),
    "empty": np.zeros((0, 4), np.int64),
}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        (found[name].dtype, found[name].shape) == (expected[name].dtype, expected[name].shape)
        and found[name].tobytes() == expected[name].tobytes()
        for name in expected
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------- round trips

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
ARRAYS = hnp.arrays(
    st.sampled_from([dtype for dtype in DTYPES.values() if dtype != BFLOAT16]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(config=st.dictionaries(NAMES, JSON, max_size=4), tensors=st.dictionaries(NAMES, ARRAYS, max_size=5))
def test_save_load_save_gives_the_same_bytes(tmp_path_factory, config, tensors):
    first, second = (tmp_path_factory.getbasetemp() / name for name in ("first", "second"))
    save_folder(first, config, tensors)
    for mmap in (False, True):
        loaded_config, loaded = load_folder(first, mmap=mmap)
        assert loaded_config == config and same(loaded, tensors)
        save_folder(second, loaded_config, dict(reversed(loaded.items())))
        assert snapshot(second) == snapshot(first)


def test_the_safetensors_package_reads_ours_and_we_read_its(tmp_path):
    from safetensors.numpy import load, save

    data = b"".join(encode_safetensors(TENSORS))
    assert same(load(data), TENSORS)
    (tmp_path / "theirs").write_bytes(save(TENSORS, {"format": "np"}))
    assert same(read_safetensors(tmp_path / "theirs"), TENSORS)


def test_arrays_are_fresh_or_read_only_maps(tmp_path):
    save_folder(tmp_path / "m", CONFIG, TENSORS)
    fresh = load_folder(tmp_path / "m")[1]
    assert all(array.flags.writeable and array.flags.owndata for array in fresh.values())
    mapped = load_folder(tmp_path / "m", mmap=True)[1]
    assert not any(array.flags.writeable for array in mapped.values())
    save_folder(tmp_path / "m", CONFIG, mapped | {"w": TENSORS["w"] + 1})  # a new inode: the map is not disturbed
    assert same(mapped, TENSORS)
    assert load_folder(tmp_path / "m")[1]["w"][0, 0] == 1


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


@pytest.mark.parametrize(
    "tensors, error",
    [
        ({"x": np.zeros(2, complex)}, InvalidType),
        ({"x": np.array([None])}, InvalidType),
        ({"x": np.zeros(2, np.uint16)}, InvalidType),
        ({"x": [1.0]}, InvalidType),
        ({"x": np.float32(1)}, InvalidType),
        ({"": np.zeros(1)}, InvalidValue),
        ({3: np.zeros(1)}, InvalidValue),
        ({"x" * 1025: np.zeros(1)}, InvalidValue),
        ({"__metadata__": np.zeros(1)}, InvalidValue),
        ({"a\0": np.zeros(1)}, InvalidValue),
        ({"\ud800": np.zeros(1)}, InvalidValue),
        ({"x": np.zeros([1] * 9)}, InvalidValue),
    ],
)
def test_tensors_that_no_reader_would_take_are_not_written(tmp_path, tensors, error):
    with pytest.raises(error, match="tensor"):
        save_folder(tmp_path / "m", {}, tensors)
    assert not os.listdir(tmp_path)


CIRCULAR: dict = {}
CIRCULAR["self"] = CIRCULAR


@pytest.mark.parametrize(
    "config, error",
    [
        ([], InvalidType),
        ({1: 2}, InvalidValue),
        ({"x": float("nan")}, InvalidValue),
        ({"x": float("inf")}, InvalidValue),
        ({"x": {1, 2}}, InvalidValue),
        ({"x": np.float32(1)}, InvalidValue),
        ({"x": "\ud800"}, InvalidValue),
        (CIRCULAR, InvalidValue),
        ({"x": "y" * (1 << 20)}, InvalidValue),
    ],
)
def test_a_config_that_is_not_plain_json_is_not_written(tmp_path, config, error):
    with pytest.raises(error, match="config"):
        save_folder(tmp_path / "m", config, {})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc/x", ".hidden", "a\0b", "a b", "x" * 201, 3, "config.json"])
def test_file_names_stay_inside_the_folder(tmp_path, name):
    with pytest.raises(InvalidValue, match="files"):
        save_folder(tmp_path / "m", {}, {}, {name: b""})
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------- bad files


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


BAD_JSON = {
    "empty": b"",
    "blank": b"  \n",
    "a-list": b"[]",
    "a-string": b'"x"',
    "null": b"null",
    "cut": b'{"a": 1',
    "trailing-comma": b'{"a": 1,}',
    "two-values": b"{} {}",
    "comment": b"{} // no",
    "single-quotes": b"{'a': 1}",
    "utf8-mark": b"\xef\xbb\xbf{}",
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "not-utf8": b'{"a": "\xff"}',
    "nul": b'{"a": "\0"}',
    "key-twice": b'{"a": 1, "a": 1}',
    "key-twice-inside": b'{"x": [{"a": 1, "\\u0061": 2}]}',
    "nan": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "overflowing-float": b'{"a": [1e400]}',
    "endless-integer": b'{"a": ' + b"1" * 10_000 + b"}",
    "surrogate-value": b'{"a": "\\udc00"}',
    "surrogate-key": b'{"a": {"\\ud800": 1}}',
    "too-deep": b'{"a":' + b"[" * 70 + b"]" * 70 + b"}",
    "bottomless": b'{"a":' + b"[" * 500_000,
    "too-long": b'{"a": "' + b"x" * (1 << 20) + b'"}',
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_a_bad_config_is_refused_by_name(kind, tmp_path):
    save_folder(tmp_path / "m", {}, TENSORS)
    path = tmp_path / "m" / "config.json"
    path.write_bytes(BAD_JSON[kind])
    with pytest.raises(InvalidValue) as caught:
        load_folder(tmp_path / "m")
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000
    with pytest.raises(InvalidValue):
        read_json_strict(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "link-inside", "link-outside", "dangling", "device"])
def test_an_entry_that_is_not_a_file_of_the_folder_is_refused(name, kind, tmp_path):
    save_folder(tmp_path / "m", CONFIG, TENSORS)
    path = tmp_path / "m" / name
    path.rename(tmp_path / "moved")
    shutil.copy(tmp_path / "moved", tmp_path / "m" / "moved")
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "missing":
        path.symlink_to({"link-inside": "moved", "link-outside": "../moved", "device": "/dev/zero"}.get(kind, "nowhere"))
    with pytest.raises(FileProblem) as caught:
        load_folder(tmp_path / "m")
    assert str(path) in str(caught.value)


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing", tmp_path / "file", "a\0b", tmp_path / ("x" * 300), ""):
        with pytest.raises(FileProblem):
            load_folder(folder)
    with pytest.raises(InvalidType, match="path"):
        load_folder(None)


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


# ------------------------------------------------------------------------------------------- saves

OLD, NEW = {"w": np.zeros(2000, np.float32)}, {"w": np.ones(3000, np.float32)}


@pytest.fixture(params=["exchange", "renames"])
def way(request, monkeypatch):
    """Both ways to swap two folders: the system call, and the renames that stand in for it."""
    if request.param == "renames":
        monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    return request.param


def with_notes(folder: Path) -> None:
    """Things of a user: a note, a folder with a file, a link out, an executable."""
    (folder / "notes.txt").write_text("mine")
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "sub" / "deep" / ".hidden").write_text("also mine")
    (folder / "sub").chmod(0o500)
    (folder / "link").symlink_to("/nowhere")
    (folder / "run.sh").touch()
    (folder / "run.sh").chmod(0o750)


def assert_notes(folder: Path) -> None:
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "sub" / "deep" / ".hidden").read_text() == "also mine"
    assert (folder / "sub").stat().st_mode & 0o777 == 0o500
    assert os.readlink(folder / "link") == "/nowhere"
    assert (folder / "run.sh").stat().st_mode & 0o777 == 0o750


def test_what_is_not_ours_is_kept(way, tmp_path):
    folder = tmp_path / "m"
    save_folder(folder, {"v": 1}, OLD, {"tokenizer.json": b"{}"})
    with_notes(folder)
    folder.chmod(0o710)
    note = (folder / "notes.txt").stat()
    for _ in range(3):
        save_folder(folder, {"v": 2}, NEW)
        assert_notes(folder)
    assert (folder / "notes.txt").stat().st_ino == note.st_ino and folder.stat().st_mode & 0o777 == 0o710
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    assert load_folder(folder)[0] == {"v": 2} and os.listdir(tmp_path) == ["m"]


def test_without_hard_links_what_is_not_ours_is_copied(tmp_path, monkeypatch):
    def no_links(*_, **__):
        raise OSError(errno.EPERM, "no hard links here")

    save_folder(tmp_path / "m", {}, OLD)
    with_notes(tmp_path / "m")
    monkeypatch.setattr(os, "link", no_links)
    save_folder(tmp_path / "m", {}, NEW)
    assert_notes(tmp_path / "m")


def test_a_note_written_while_saving_is_kept(way, tmp_path, monkeypatch):
    folder, commit = tmp_path / "m", folders._commit
    save_folder(folder, {}, OLD)

    def note_then_commit(*arguments):
        (folder / "late.txt").write_text("late")
        commit(*arguments)

    monkeypatch.setattr(folders, "_commit", note_then_commit)
    save_folder(folder, {}, NEW)
    assert (folder / "late.txt").read_text() == "late" and same(load_folder(folder)[1], NEW)


def test_saves_are_byte_equal_and_do_not_depend_on_order(tmp_path):
    save_folder(tmp_path / "a", CONFIG, TENSORS, {"x.bin": b"1", "y.bin": b"2"})
    reverse = [dict(reversed(mapping.items())) for mapping in (CONFIG, TENSORS, {"x.bin": b"1", "y.bin": b"2"})]
    save_folder(tmp_path / "b", *reverse)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_parents_are_made_links_followed_and_the_working_folder_stays_valid(way, tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b" / "m"
    save_folder(folder, {"v": 1}, OLD)
    (tmp_path / "alias").symlink_to(folder)
    save_folder(tmp_path / "alias", {"v": 2}, NEW)
    assert (tmp_path / "alias").is_symlink() and load_folder(folder)[0] == {"v": 2}
    monkeypatch.chdir(folder)
    for version in (3, 4):
        save_folder(".", {"v": version}, NEW)
        assert load_folder(".")[0] == {"v": version}
    assert os.getcwd() == str(folder) and os.listdir(folder.parent) == ["m"]


def test_places_that_cannot_be_saved_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("keep")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/", "/proc/x/y", tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(FileProblem):
            save_folder(folder, {}, OLD)
    with pytest.raises(InvalidValue, match="folder"):
        save_folder("", {}, OLD)
    with pytest.raises(FileProblem):
        save_folder(tmp_path / "new" / "parents" / ("x" * 300), {}, OLD)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "keep"

    save_folder(tmp_path / "m", {}, OLD)
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors").mkdir()
    with pytest.raises(FileProblem, match="is a folder"):
        save_folder(tmp_path / "m", {}, NEW)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(FileProblem, match="not writable"):
        save_folder(tmp_path / "m", {}, NEW)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_a_file_problem(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FileProblem, match="permission"):
        save_folder(tmp_path / "m", {}, OLD)


class FailingOs:
    """The `os` module, whose k-th call of those that change the disk fails."""

    COUNTED = ("open", "write", "fsync", "rename", "mkdir", "chmod")

    def __init__(self, k: int, code: int) -> None:
        self.calls, self.k, self.code = 0, k, code

    def __getattr__(self, name: str):
        real = getattr(os, name)
        return real if name not in self.COUNTED else lambda *a, **kw: self.count(real, name, *a, **kw)

    def count(self, real, name, *arguments, **options):
        self.calls += 1
        if self.calls == self.k:
            raise OSError(self.code, os.strerror(self.code))
        if name == "write":  # and every write is short
            arguments = (arguments[0], arguments[1][: max(1, len(arguments[1]) // 2)])
        return real(*arguments, **options)

    def exchange(self, real, *arguments):
        return self.count(real, "exchange", *arguments)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("first_time", [False, True], ids=["over-an-old-one", "first-time"])
def test_whichever_call_fails_the_old_folder_is_intact(way, first_time, code, tmp_path, monkeypatch):
    folder = tmp_path / "parent" / "m"
    if not first_time:
        save_folder(folder, {"v": 1}, OLD)
        with_notes(folder)
    before, exchange = snapshot(folder), folders._exchange
    failures = 0
    for k in range(1, 1000):
        failing = FailingOs(k, code)
        with monkeypatch.context() as patch:
            for module in (folders, writing):
                patch.setattr(module, "os", failing)
            patch.setattr(folders, "_exchange", lambda *a, failing=failing: failing.exchange(exchange, *a))
            try:
                save_folder(folder, {"v": 2}, NEW)
            except FileProblem as error:
                failures += 1
                assert "nothing was changed" in str(error) and os.strerror(code) in str(error)
                assert snapshot(folder) == before
                assert [path.name for path in tmp_path.rglob(".m.*")] == []
                assert os.path.exists(tmp_path / "parent") != first_time
                continue
        assert load_folder(folder)[0] == {"v": 2}
        if failing.calls < k:
            break
        # The call that failed was one the save can do without (a lock): start over from the old folder.
        shutil.rmtree(folder.parent)
        if not first_time:
            save_folder(folder, {"v": 1}, OLD)
            with_notes(folder)
    assert failures > 20 and failing.calls < k
    if not first_time:
        assert_notes(folder)


SAVERS = """
import os, sys, numpy as np
from mini_tfm.checkpoint.folder import save_folder
from mini_tfm.files import folders, writing
folder, swap = sys.argv[1:]
if swap == "renames":
    folders._exchange = lambda first, second: False
for line in sys.stdin:
    pid = os.fork()  # cheaper than a new interpreter for each kill
    if pid == 0:
        for version in range(int(line), 10**9):
            tensors = {"w": np.full(20_000, version, np.int64)}
            save_folder(folder, {"v": version}, tensors, {"v.txt": str(version).encode()})
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


@contextlib.contextmanager
def savers(folder: Path, swap: str):
    """A process that starts endless savers, one for each version number written to its stdin."""
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SAVERS, str(folder), swap],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=os.environ | {"PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1"},
    ) as process:
        yield process
        process.stdin.close()


def whole_version(folder: Path) -> int:
    config, tensors = load_folder(folder)
    assert (tensors["w"] == config["v"]).all()
    assert int((folder / "v.txt").read_text()) == config["v"]
    return config["v"]


@pytest.mark.parametrize("swap", ["exchange", "renames"])
def test_a_killed_save_leaves_the_old_folder_or_the_new_one(swap, tmp_path):
    folder, rng, version = tmp_path / "m", random.Random(time.time_ns()), 0
    save_folder(folder, {"v": 0}, {"w": np.zeros(20_000, np.int64)}, {"v.txt": b"0"})
    (folder / "notes.txt").write_text("mine")
    with savers(folder, swap) as process:
        for _ in range(15):
            process.stdin.write(f"{version + 1}\n")
            pid = int(process.stdout.readline())
            time.sleep(rng.random() * 0.15)
            os.kill(pid, signal.SIGKILL)
            assert process.stdout.readline() == "dead\n"
            found = whole_version(folder)
            assert found >= version and (folder / "notes.txt").read_text() == "mine"
            version = found
    assert version > 0
    save_folder(folder, {"v": 0}, {})
    assert os.listdir(tmp_path) == ["m"]  # what the killed ones left is gone


def test_a_crash_between_the_two_renames_is_repaired_by_load_and_by_save(tmp_path):
    folder, aside = tmp_path / "m", tmp_path / ".m.old-0123456789abcdef"
    for repair in (load_folder, lambda path: save_folder(path, {"v": 2}, NEW)):
        save_folder(folder, {"v": 1}, OLD)
        with_notes(folder)
        folder.rename(aside)
        assert not folder.exists()
        repair(folder)
        assert_notes(folder)
        assert os.listdir(tmp_path) == ["m"]
        (folder / "sub").chmod(0o700)
        shutil.rmtree(folder)


def test_the_staging_of_a_live_save_and_foreign_names_are_left_alone(tmp_path):
    live, dead, foreign = (tmp_path / f".m.saving-{end}" for end in ("0" * 16, "1" * 16, "mine"))
    for path in (live, dead, foreign):
        path.mkdir()
    fd = folders._lock(str(live))
    try:
        save_folder(tmp_path / "m", {}, OLD)
    finally:
        os.close(fd)
    assert sorted(os.listdir(tmp_path)) == sorted([live.name, foreign.name, "m"])


def test_a_lock_that_someone_else_holds_for_ever_does_not_stop_a_save(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LOCK_SECONDS", 0.02)
    with folders.alone_in(str(tmp_path)):
        for version in (1, 2):
            save_folder(tmp_path / "m", {"v": version}, OLD)
    assert load_folder(tmp_path / "m")[0] == {"v": 2} and os.listdir(tmp_path) == ["m"]


def test_two_savers_and_readers_at_once(way, tmp_path):
    folder, problems = tmp_path / "m", []
    stop = threading.Event()

    def save(start: int) -> None:
        for version in range(start, 1000, 2):
            if stop.is_set():
                return
            save_folder(folder, {"v": version}, {"w": np.full(5000, version, np.int64)})

    def read() -> None:
        while not stop.is_set():
            config, tensors = load_folder(folder)
            if not (tensors["w"] == config["v"]).all():
                problems.append("a reader saw two versions")

    def guarded(work, *arguments) -> None:
        try:
            work(*arguments)
        except Exception as error:  # reported by the main thread
            problems.append(error)
            stop.set()

    save(999)
    (folder / "notes.txt").write_text("mine")
    threads = [threading.Thread(target=guarded, args=job) for job in ((save, 0), (save, 1), (read,), (read,))]
    for thread in threads:
        thread.start()
    stop.wait(1.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert (folder / "notes.txt").read_text() == "mine"
    save_folder(folder, {"v": 0}, {})
    assert os.listdir(tmp_path) == ["m"]


def test_an_interrupt_leaves_no_litter(way, tmp_path, monkeypatch):
    save_folder(tmp_path / "m", {"v": 1}, OLD)
    for name in ("write_new", "_commit", "fsync_folder"):
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(folders, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            save_folder(tmp_path / "m", {"v": 2}, NEW)
        assert load_folder(tmp_path / "m")[0] == {"v": 1} and os.listdir(tmp_path) == ["m"]


def test_loading_runs_nothing_and_stays_inside(tmp_path):
    save_folder(tmp_path / "m", CONFIG, TENSORS)
    events: list[tuple] = []
    listening = True

    def hook(event, arguments):
        if listening and event in ("open", "exec", "import", "pickle.find_class", "subprocess.Popen", "compile"):
            events.append((event, arguments[0]))

    sys.addaudithook(hook)  # cannot be removed, hence the flag
    load_folder(tmp_path / "m")
    listening = False
    assert {event for event, _ in events} <= {"open"}
    opened = {path for _, path in events if isinstance(path, str)}  # the rest are descriptors
    assert opened == {str(tmp_path / "m"), "config.json", "model.safetensors"}
