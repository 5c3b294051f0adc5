"""A model folder: what is written is read, the same bytes each time, and what is no model folder is refused by name."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from contents import CONFIG, TENSORS, load_folder, same, snapshot
from helpers import in_a_process
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mini_tfm.checkpoint.folder import save_folder
from mini_tfm.checkpoint.safetensors import BFLOAT16, DTYPES
from mini_tfm.errors import FileProblem, InvalidType, InvalidValue
from mini_tfm.files.strict_json import read_json_strict

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


def test_arrays_are_fresh_or_read_only_maps(tmp_path):
    save_folder(tmp_path / "m", CONFIG, TENSORS)
    fresh = load_folder(tmp_path / "m")[1]
    assert all(array.flags.writeable and array.flags.owndata for array in fresh.values())
    mapped = load_folder(tmp_path / "m", mmap=True)[1]
    assert not any(array.flags.writeable for array in mapped.values())
    save_folder(tmp_path / "m", CONFIG, mapped | {"w": TENSORS["w"] + 1})  # a new inode: the map is not disturbed
    assert same(mapped, TENSORS)
    assert load_folder(tmp_path / "m")[1]["w"][0, 0] == 1


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


WITHOUT_ASSERTS = """
import sys
from pathlib import Path

folder, *places = map(Path, sys.argv[1:])
sys.path[:0] = map(str, places)
from test_folder import BAD_JSON, TENSORS
from test_safetensors import BAD_TENSORS
from contents import load_folder
from mini_tfm.checkpoint.folder import save_folder
from mini_tfm.errors import InvalidValue

if __debug__:
    raise SystemExit("asserts are on")
for name, table in (("config.json", BAD_JSON), ("model.safetensors", BAD_TENSORS)):
    for kind, content in table.items():
        save_folder(folder, {}, TENSORS)
        (folder / name).write_bytes(content)
        try:
            load_folder(folder)
        except InvalidValue:
            continue
        raise SystemExit(f"{kind} was taken")
    print(len(table))
"""


def test_bad_files_are_refused_without_asserts(tmp_path):
    """Under `python -O`."""
    places = Path(__file__).parent, Path(__file__).parents[1]
    counts = in_a_process(WITHOUT_ASSERTS, tmp_path / "m", *places, PYTHONOPTIMIZE="1").stdout.split()
    assert int(counts[0]) == len(BAD_JSON) and int(counts[1]) > 45


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


AUDITED = 100


def test_loading_runs_nothing_and_stays_inside(tmp_path):
    rng, folders = np.random.default_rng(0), [str(tmp_path / f"m{number}") for number in range(AUDITED)]
    for number, folder in enumerate(folders):
        tensors = {f"w{i}": rng.standard_normal(rng.integers(0, 9, rng.integers(0, 4))) for i in range(number % 5)}
        save_folder(folder, {**CONFIG, "number": number}, {**TENSORS, **tensors})
    events: list[tuple] = []
    listening = True

    def hook(event, arguments):
        if listening and event in ("open", "exec", "import", "pickle.find_class", "subprocess.Popen", "compile"):
            events.append((event, arguments[0]))

    sys.addaudithook(hook)  # cannot be removed, hence the flag
    for folder in folders:
        load_folder(folder)
    listening = False
    assert {event for event, _ in events} <= {"open"}
    opened = {path for _, path in events if isinstance(path, str)}  # the rest are descriptors
    assert opened == {*folders, "config.json", "model.safetensors"}


def test_saves_are_byte_equal_and_do_not_depend_on_order(tmp_path):
    save_folder(tmp_path / "a", CONFIG, TENSORS, {"x.bin": b"1", "y.bin": b"2"})
    reverse = [dict(reversed(mapping.items())) for mapping in (CONFIG, TENSORS, {"x.bin": b"1", "y.bin": b"2"})]
    save_folder(tmp_path / "b", *reverse)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
