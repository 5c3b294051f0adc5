"""Long-term memory: exact, durable, shared by processes, and careful with files that are not its own."""

import dataclasses
import errno
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
from pathlib import Path

import lmdb
import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.errors import FileProblem, InvalidValue
from mini_tfm.memory import New, Query, State
from mini_tfm.memory.run import model_dims
from mini_tfm.testing.trial import LENGTH, Reader, random_segments, small_model
from mini_tfm_plugins import rows_lmdb
from mini_tfm_plugins.rows_lmdb import CHUNK_ROWS, MIDDLE_CHUNKS, LmdbRows

MODEL = small_model("decoder-only", np.float32)
SEGMENTS = random_segments(1, 6)
WIDTH = MODEL.config.d_model


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "notes.mdb")


def reader_of(path, model=MODEL, **options):
    return Reader(model, mt.memory("store", path=path, **options), 1)


def read_and_keep(path, segments=SEGMENTS[:3], model=MODEL, **options):
    reader = reader_of(path, model, **options)
    for tokens in segments:
        reader.read(tokens)
    reader.run.flush()
    return reader


def script(code, *arguments, **options):
    """Runs Python code in a process of its own; what it printed as JSON."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def digest(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


# Search


def state_of(store, batch=1, dtype=np.float32):
    dims = model_dims(MODEL.config, dtype, fingerprint=lambda: "weights")
    return State(store.start(batch, dims), dims)


def new_rows(rng, batch, n, start=0, valid=None, dtype=np.float32):
    valid = np.ones((batch, n), bool) if valid is None else valid
    rows = rng.standard_normal((batch, n, WIDTH)).astype(dtype)
    return New("decoder", 0, rows, valid, np.broadcast_to(start + np.arange(n), (batch, n)))


def best_by_brute_force(asked, rows, k):
    return np.argsort(-(asked.astype(np.float64) @ rows.astype(np.float64).T), axis=-1, kind="stable")[..., :k]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 7, 3000])
@pytest.mark.parametrize("where", ["memory", "disk", "both"])
def test_search_is_exact(path, where, k, dtype):
    """Over several chunks, in RAM, on disk, or some of each; against a plain sort of all scores."""
    rng = np.random.default_rng(k)
    store = mt.memory("store", path=path, top_k=k)
    state, rows = state_of(store, dtype=dtype), []
    for start in range(0, 2300, 230):
        new = new_rows(rng, 1, 230, start, dtype=np.float32)
        store.write(state, "decoder", 0, New("decoder", 0, new.hidden.astype(dtype), new.valid, new.positions))
        rows.append(new.hidden[0])
        if where == "disk" or (where == "both" and start == 1150):
            store.flush(state)
    rows = np.concatenate(rows)
    asked = rng.standard_normal((1, 2, 5, WIDTH)).astype(dtype)
    view = store.read(state, "decoder", 0, Query(np.zeros((1, 2, 5, 4), dtype), lambda: asked, np.zeros((1, 5), np.int64)))
    found = view.bank[1][0, view.index[0]]
    expected = best_by_brute_force(asked[0], rows, k)
    assert found.shape[2] == min(k, 2300) and found.dtype == dtype
    if k < 2300:
        np.testing.assert_array_equal(found.astype(np.float32), rows[expected])
        np.testing.assert_array_equal(view.positions[0, view.index[0]], expected)
    else:
        np.testing.assert_array_equal(np.sort(view.positions[0, view.index[0]], axis=-1), np.broadcast_to(np.arange(2300), (2, 5, 2300)))
    assert view.valid.all()


def test_rows_of_other_streams_and_padding_are_never_found():
    rng = np.random.default_rng(0)
    store = mt.memory("store", top_k=50)
    state = state_of(store, 3)
    valid = np.arange(20) < np.array([20, 4, 0])[:, None]
    new = new_rows(rng, 3, 20, valid=valid)
    store.write(state, "decoder", 0, new)
    asked = rng.standard_normal((3, 2, 4, WIDTH)).astype(np.float32)
    view = store.read(state, "decoder", 0, Query(np.zeros((3, 2, 4, 4), np.float32), lambda: asked, np.zeros((3, 4), np.int64)))
    for b, count in enumerate((20, 4, 0)):
        index = view.index[b]
        assert ((index >= 0).sum(axis=-1) == count).all()
        for row in np.unique(index[index >= 0]):
            assert (view.bank[1][b, row] == new.hidden[b, :count]).all(axis=-1).any()


# Files


def test_it_survives_the_process(path):
    code = """
        import sys, json, numpy as np, mini_tfm as mt
        from mini_tfm.testing.trial import Reader, random_segments, small_model
        model = small_model("decoder-only", np.float32)
        memory = mt.memory("store", path=sys.argv[1], top_k=4)
        reader = Reader(model, memory, 1)
        for tokens in random_segments(1, 6)[:3]:
            reader.read(tokens)
        reader.run.flush()
        print(json.dumps(memory.documents()))
    """
    assert script(code, path) == {"default": 30}
    reader, plain = reader_of(path, top_k=4), Reader(MODEL, None, 1)
    same = Reader(MODEL, mt.memory("store", top_k=4), 1)
    for tokens in SEGMENTS[:3]:
        same.read(tokens)
    reader.stream.last = same.stream.last
    out = reader.read(SEGMENTS[3])
    np.testing.assert_allclose(out, same.read(SEGMENTS[3]), atol=1e-5)
    assert np.max(np.abs(out - plain.read(SEGMENTS[3]))) > 1e-3


def test_flushing_changes_nothing_that_is_seen(path):
    flushed, in_ram = reader_of(path, top_k=3), Reader(MODEL, mt.memory("store", top_k=3), 1)
    for tokens in SEGMENTS:
        np.testing.assert_allclose(flushed.read(tokens), in_ram.read(tokens), atol=1e-5)
        flushed.run.flush()
    assert flushed.run.nbytes() < 100 < in_ram.run.nbytes()


def test_reading_goes_on_where_an_earlier_process_stopped(path):
    """Positions too: a store of two sittings is that of one."""
    read_and_keep(path, SEGMENTS[:3])
    second = reader_of(path, top_k=100)
    second.stream.last = SEGMENTS[2][:, -1]
    whole = Reader(MODEL, mt.memory("store", top_k=100), 1)
    for tokens in SEGMENTS[:3]:
        whole.read(tokens)
    for tokens in SEGMENTS[3:]:
        np.testing.assert_allclose(second.read(tokens), whole.read(tokens), atol=1e-5)
        second.run.flush()
    positions = []
    with LmdbRows(path).reading("default", "decoder.0.", 30) as chunks:
        positions = [p for _, chunk in chunks for p in chunk.tolist()]
    assert positions == list(range(6 * LENGTH))


NAMES = ["a", "b/c", "b", "notes 2024", "ünï/日本", "document/a", "x" * 200]


def test_one_path_holds_many_documents(path):
    for number, name in enumerate(NAMES):
        read_and_keep(path, SEGMENTS[: number % 3 + 1], document=name)
    memory = mt.memory("store", path=path)
    assert memory.documents() == {name: 2 * LENGTH * (number % 3 + 1) for number, name in enumerate(NAMES)}
    memory.reset("b")
    memory.reset("not there")
    assert set(memory.documents()) == set(NAMES) - {"b"}
    assert mt.memory("store", path=path, document="b/c").documents()["b/c"] == 20
    fresh, forgotten = Reader(MODEL, None, 1), reader_of(path, document="b")
    np.testing.assert_array_equal(forgotten.read(SEGMENTS[0]), fresh.read(SEGMENTS[0]))


def test_documents_do_not_see_each_other(path):
    read_and_keep(path, document="one")
    alone, other = Reader(MODEL, None, 1), reader_of(path, document="two")
    np.testing.assert_array_equal(other.read(SEGMENTS[4]), alone.read(SEGMENTS[4]))


@pytest.mark.parametrize("name", ["a,b.mdb", "a+b.mdb", "it's.mdb", "with space.mdb", "ünï.mdb", "a=b:c.mdb", "+window.mdb", 'quote".mdb'])
def test_paths_may_have_odd_characters(tmp_path, name):
    memory = mt.memory("store", path=str(tmp_path / name))
    again = mt.memory("window:size=2+" + memory.text).members[1]
    reader = Reader(MODEL, again, 1)
    reader.read(SEGMENTS[0])
    reader.run.flush()
    assert os.listdir(tmp_path)[0].startswith(name) and memory.documents() == {"default": 10}


def test_the_same_file_under_another_name(path, tmp_path):
    """LMDB cannot open a file twice in a process (regression)."""
    read_and_keep(path)
    os.symlink(path, tmp_path / "link.mdb")
    assert mt.memory("store", path=str(tmp_path / "link.mdb")).documents() == {"default": 30}


def test_a_file_deleted_by_the_user_is_made_anew(path):
    """What was written to the deleted one would be lost (regression)."""
    read_and_keep(path)
    os.remove(path)
    assert mt.memory("store", path=path).documents() == {}
    read_and_keep(path, SEGMENTS[:1])
    code = "import json, sys, mini_tfm as mt; print(json.dumps(mt.memory('store', path=sys.argv[1]).documents()))"
    assert script(code, path) == {"default": 10}


def test_a_document_deleted_while_it_is_read_is_no_memory(path):
    read_and_keep(path)
    reader = reader_of(path)
    mt.memory("store", path=path).reset("default")
    np.testing.assert_array_equal(reader.read(SEGMENTS[3]), Reader(MODEL, None, 1).read(SEGMENTS[3]))


def test_a_store_of_other_rows_is_refused_and_left_as_it_is(path):
    read_and_keep(path)
    before = digest(path)
    other_weights = small_model("decoder-only", np.float32)
    other_weights.weights["embedding.weight"][0, 0] += 1
    wide = mt.Transformer(mt.Config(vocab_size=24, d_model=16, n_heads=2, n_encoder_layers=0))
    for model, told in (
        (other_weights, "holds rows from other weights .*: read the text again into another path"),
        (wide, "holds rows of width 8, this model needs 16; give another path"),
    ):
        with pytest.raises(InvalidValue, match=f"path: the store {path} {told}"):
            reader_of(path, model)
    assert digest(path) == before and mt.memory("store", path=path).documents() == {"default": 30}


@pytest.mark.parametrize(
    "content", [b"hello, I am a diary\n" * 1000, b"x", b"", os.urandom(1 << 16)], ids=["text", "a byte", "empty", "noise"]
)
def test_a_file_that_is_no_store_is_refused_and_left_as_it_is(path, content):
    with open(path, "wb") as file:
        file.write(content)
    for use in (lambda: reader_of(path), lambda: mt.memory("store", path=path).documents()):
        with pytest.raises(FileProblem, match=r"path: cannot open the store .*; expected an LMDB file or a new path"):
            use()
    with open(path, "rb") as file:
        assert file.read() == content
    assert not os.path.exists(path + "-lock")


def test_an_lmdb_file_of_something_else_is_refused_and_left_as_it_is(path):
    with lmdb.open(path, subdir=False) as file, file.begin(write=True) as txn:
        txn.put(b"mine", b"1")
    with pytest.raises(InvalidValue, match="is not a store of format 1 to 3; give another path"):
        reader_of(path)
    with lmdb.open(path + "2", subdir=False) as file, file.begin(write=True) as txn:
        txn.put(b"meta", b"{not json")
    with pytest.raises(InvalidValue, match="is damaged"):
        reader_of(path + "2")


def test_a_folder_and_a_place_that_is_not_there_are_told(tmp_path):
    with pytest.raises(InvalidValue, match=r"path: expected a file, .* is a folder"):
        reader_of(str(tmp_path))
    with pytest.raises(FileProblem, match=r"path: cannot open the store .*no/notes.mdb"):
        reader_of(str(tmp_path / "no" / "notes.mdb"))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_is_told(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(FileProblem, match="path: cannot open the store"):
            reader_of(str(tmp_path / "notes.mdb"))
    finally:
        tmp_path.chmod(0o700)


def test_several_streams_cannot_write_one_document(path):
    reader = Reader(MODEL, mt.memory("store", path=path), 2)
    reader.read(np.repeat(SEGMENTS[0], 2, axis=0))
    with pytest.raises(InvalidValue, match="path: a store on disk is written by one stream at a time, got a batch of 2"):
        reader.run.flush()


def test_training_leaves_the_file_alone(path):
    tokens = np.moveaxis(SEGMENTS[:3], 0, 1)
    mt.Trainer(small_model("decoder-only", np.float32), mt.memory("store", path=path, top_k=3)).step(None, tokens)
    assert not os.path.exists(path)


def test_a_store_grows_while_others_read_it(path):
    """Threads and a second process search and look up documents while the file grows beyond any size it was opened with."""
    disk = LmdbRows(path)
    disk.open(WIDTH, "weights")
    rows = np.random.default_rng(0).standard_normal((CHUNK_ROWS, WIDTH)).astype(np.float32)
    disk.append("read", {"bank": [rows, np.arange(CHUNK_ROWS)]})
    other = f"""
        import sys, numpy as np
        from mini_tfm_plugins.rows_lmdb import LmdbRows
        disk = LmdbRows(sys.argv[1])
        for n in range(100):
            with disk.reading("read", "bank", {CHUNK_ROWS}) as chunks:
                seen = [hidden.copy() for hidden, _ in chunks]
            disk.append("other", {{"bank": [seen[0], np.arange({CHUNK_ROWS}) + {CHUNK_ROWS} * n]}})
        print(disk.counts("other")["bank"])
    """
    failed, done = [], threading.Event()

    def read():
        try:
            while not done.is_set():
                with disk.reading("read", "bank", CHUNK_ROWS) as chunks:
                    assert all(np.array_equal(hidden, rows) for hidden, _ in chunks)
                assert disk.documents()["read"] == CHUNK_ROWS
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    process = threading.Thread(target=lambda: failed.extend([] if script(other, path) == 100 * CHUNK_ROWS else ["the other process"]))
    process.start()
    for number in range(100):
        disk.append("written", {"bank": [rows, np.arange(CHUNK_ROWS) + CHUNK_ROWS * number]})
    process.join()
    done.set()
    for thread in threads:
        thread.join()
    assert not failed
    assert disk.documents() == {"other": 100 * CHUNK_ROWS, "read": CHUNK_ROWS, "written": 100 * CHUNK_ROWS}


def test_a_store_that_does_not_fit_is_named(path, monkeypatch):
    monkeypatch.setattr(rows_lmdb, "MAP_BYTES", 1 << 20)
    disk = LmdbRows(path)
    disk.open(WIDTH, "weights")
    rows = np.ones((CHUNK_ROWS, WIDTH), np.float32)
    disk.append("d", {"bank": [rows, np.arange(CHUNK_ROWS)]})
    with pytest.raises(FileProblem, match="does not fit into the 1 MB"):
        for number in range(1, 1000):
            disk.append("d", {"bank": [rows, np.arange(CHUNK_ROWS) + CHUNK_ROWS * number]})
    assert disk.counts("d")["bank"] == number * CHUNK_ROWS  # what was acknowledged is there


def test_the_map_takes_the_address_space_that_there_is(path):
    code = f"""
        import resource, sys, numpy as np
        from mini_tfm_plugins.rows_lmdb import LmdbRows
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        disk = LmdbRows(sys.argv[1])
        disk.open({WIDTH}, "weights")
        print(disk.append("d", {{"bank": [np.ones((7, {WIDTH}), np.float32), np.arange(7)]}})["bank"])
    """
    assert script(code, path) == 7


def spoilt(path, change):
    """A store of three chunks, changed, each in a process of its own, as LMDB keeps a file open."""
    make = f"""
        import sys, numpy as np
        from mini_tfm_plugins.rows_lmdb import LmdbRows
        disk = LmdbRows(sys.argv[1])
        disk.open({WIDTH}, "weights")
        rows = np.random.default_rng(0).standard_normal((3000, {WIDTH})).astype(np.float32)
        print(disk.append("d", {{"bank": [rows, np.arange(3000)]}})["bank"])
    """
    assert script(make, path) == 3000
    data = bytearray(Path(path).read_bytes())
    Path(path).write_bytes(change(data))
    os.remove(path + "-lock")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.6, 0.999])
def test_a_store_that_is_cut_off_is_refused(path, part):
    spoilt(path, lambda data: data[: int(len(data) * part)])
    code = """
        import sys
        from mini_tfm.errors import FileProblem
        from mini_tfm_plugins.rows_lmdb import LmdbRows
        try:
            LmdbRows(sys.argv[1]).documents()
        except FileProblem as error:
            print(int("cut off" in str(error) or "not a store" in str(error)))
    """
    assert script(code, path) == 1  # and no signal has ended the process


def test_rows_that_were_overwritten_are_refused(path):
    row = np.random.default_rng(0).standard_normal((3000, WIDTH)).astype(np.float32)[1500].tobytes()

    def overwrite(data):
        at = data.index(row)
        data[at] ^= 1
        return data

    spoilt(path, overwrite)
    disk = LmdbRows(path)
    with disk.reading("d", "bank", 1000) as chunks:
        assert sum(len(hidden) for hidden, _ in chunks) == 1000
    with pytest.raises(InvalidValue, match=r"rows of the store .* are damaged"), disk.reading("d", "bank", 3000) as chunks:
        list(chunks)


def test_a_store_of_the_first_format_is_read_and_continued(path, monkeypatch):
    monkeypatch.setattr(rows_lmdb, "FORMAT", 1)
    disk = LmdbRows(path)
    disk.open(WIDTH, "weights")
    disk.append("d", {"bank": [np.ones((1500, WIDTH), np.float32), np.arange(1500)]})
    monkeypatch.undo()
    disk.append("d", {"bank": [np.ones((1500, WIDTH), np.float32), np.arange(1500)]})
    with disk.reading("d", "bank", 3000) as chunks:
        assert sum(float(hidden.sum()) for hidden, _ in chunks) == 3000 * WIDTH


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_path_that_is_no_file_is_refused_at_once(path, make):
    make(path)
    with pytest.raises(InvalidValue, match="path: expected a file"):
        LmdbRows(path).open(WIDTH, "weights")


@pytest.mark.parametrize("join", [True, False])
@pytest.mark.parametrize("count", [0, 1, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 3, 30 * CHUNK_ROWS + 3])
def test_chunks_join_without_a_seam(path, count, join):
    disk = LmdbRows(path, join=join)
    disk.open(WIDTH, "weights")
    rows = np.random.default_rng(0).standard_normal((count, WIDTH)).astype(np.float32)
    for cut in np.array_split(np.arange(count), 3):
        disk.append("d", {"bank": [rows[cut], cut]})
    with disk.reading("d", "bank", count) as chunks:
        parts = [(hidden.copy(), positions.copy()) for hidden, positions in chunks]
    np.testing.assert_array_equal(np.concatenate([h for h, _ in parts]) if parts else rows[:0], rows)
    assert [p for _, chunk in parts for p in chunk] == list(range(count))
    for some in (np.arange(count % 7, count, 1000), np.arange(count)[5000:5001], np.arange(count)[-1:]):
        hidden, positions = disk.gather("d", "bank", some)
        np.testing.assert_array_equal(hidden, rows[some])
        np.testing.assert_array_equal(positions, some)


def chunks_of(path):
    """The rows of each chunk in the file."""
    with lmdb.open(path, subdir=False, readonly=True, lock=False) as file, file.begin() as txn:
        return [len(value) // (4 * WIDTH + 8) for key, value in txn.cursor() if key.startswith(b"rows/")]


def test_what_is_written_at_once_is_put_once(path, monkeypatch):
    """And not first in small chunks, which would be written, read and deleted for the large one."""
    packed, sizes = rows_lmdb._packed, []
    monkeypatch.setattr(rows_lmdb, "_packed", lambda hidden, *rest: sizes.append(len(hidden)) or packed(hidden, *rest))
    disk, large = LmdbRows(path), MIDDLE_CHUNKS * CHUNK_ROWS
    disk.open(WIDTH, "weights")
    disk.append("d", {"bank": [np.ones((2 * large + 5, WIDTH), np.float32), np.arange(2 * large + 5)]})
    assert sizes == [large, large, 5]
    LmdbRows(path, join=False).append("other", {"bank": [np.ones((large, WIDTH), np.float32), np.arange(large)]})
    assert sizes[3:] == [CHUNK_ROWS] * MIDDLE_CHUNKS
    del disk
    gc.collect()
    assert sorted(chunks_of(path)) == sorted(sizes)


def test_only_what_is_gathered_is_checked(path):
    """A question reads a few rows of a long document: it does not pay for the rest, and damage among them is found."""
    rows = np.random.default_rng(0).standard_normal((4 * CHUNK_ROWS, WIDTH)).astype(np.float32)
    disk = LmdbRows(path, join=False)
    disk.open(WIDTH, "weights")
    disk.append("d", {"bank": [rows, np.arange(len(rows))]})
    flip(path, rows[2 * CHUNK_ROWS + 7].tobytes())
    np.testing.assert_array_equal(disk.gather("d", "bank", np.array([0, 2 * CHUNK_ROWS - 1, 3 * CHUNK_ROWS]))[1], [0, 2047, 3072])
    for number in (2 * CHUNK_ROWS + 7, 2 * CHUNK_ROWS + 9):
        with pytest.raises(InvalidValue, match=r"rows of the store .* are damaged"):
            disk.gather("d", "bank", np.array([0, number]))


def flip(path, row):
    """One bit of a row is changed where it lies in the file."""
    at = Path(path).read_bytes().index(row)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes([row[0] ^ 1]))


def test_what_is_written_anew_is_checked_anew(path):
    disk = LmdbRows(path)
    disk.open(WIDTH, "weights")
    for seed in range(2):
        rows = np.random.default_rng(seed).standard_normal((100, WIDTH)).astype(np.float32)
        disk.append("d", {"bank": [rows, np.arange(100)]})
        if not seed:
            disk.gather("d", "bank", np.arange(3))
            disk.delete("d")
    flip(path, rows[50].tobytes())
    with pytest.raises(InvalidValue, match=r"rows of the store .* are damaged"):
        disk.gather("d", "bank", np.arange(3))


def test_a_flush_copies_a_bank_at_a_time(path, monkeypatch):
    """Beside the rows themselves there is no room for a second copy of all of them."""
    store = mt.memory(f"blocks:path={path}")
    dims = dataclasses.replace(model_dims(MODEL.config, np.float32, fingerprint=lambda: "weights"), layers={"encoder": 0, "decoder": 40})
    state = State(store.start(1, dims), dims)
    for layer in range(40):
        new = new_rows(np.random.default_rng(layer), 1, 2000)
        store.write(state, "decoder", layer, dataclasses.replace(new, layer=layer, tokens=np.ones((1, 2000), np.int64)))
    held = sum(value.nbytes for value in state.values())
    monkeypatch.setattr(rows_lmdb, "_packed", lambda hidden, *rest: bytes(len(hidden) * (4 * WIDTH + 8) + 4))  # LMDB's own are not counted
    tracemalloc.start()
    store.flush(state)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert store.documents() == {"default": 41 * 2000} and peak < held / 4


def test_a_store_of_format_1_is_read(path):
    """Written here key by key, as the first release wrote it: what was read then is not lost."""
    rows = np.random.default_rng(0).standard_normal((CHUNK_ROWS + 5, WIDTH)).astype("<f4")
    positions = np.arange(len(rows), dtype="<i8")
    prefix = b"rows/" + hashlib.sha256(b"notes").digest()[:16] + b"/decoder.1./"
    about = {"banks": {"decoder.1.": len(rows)}, "next_position": len(rows)}
    with lmdb.open(path, subdir=False) as file, file.begin(write=True) as txn:
        txn.put(b"meta", json.dumps({"format": 1, "d_model": WIDTH, "model": "weights"}).encode())
        txn.put(b"document/notes", json.dumps(about).encode())
        for number in (0, 1):
            part = slice(number * CHUNK_ROWS, (number + 1) * CHUNK_ROWS)
            txn.put(prefix + number.to_bytes(8, "big"), rows[part].tobytes() + positions[part].tobytes())
    store = LmdbRows(path)
    store.open(WIDTH, "weights")
    assert store.documents() == {"notes": len(rows)} and store.counts("notes") == about["banks"]
    assert store.next_position("notes") == len(rows)
    with store.reading("notes", "decoder.1.", len(rows)) as chunks:
        hidden, at = (np.concatenate(x) for x in zip(*[(h.copy(), p.copy()) for h, p in chunks], strict=True))
    np.testing.assert_array_equal(hidden, rows)
    np.testing.assert_array_equal(at, positions)


def test_joined_streams_see_of_the_file_what_each_had_seen(path):
    """One began when the document was shorter than for the other."""
    read_and_keep(path, SEGMENTS[:1])
    early, alone_early = (reader_of(path, top_k=3) for _ in range(2))
    read_and_keep(path, SEGMENTS[1:3])
    late, alone_late = (reader_of(path, top_k=3) for _ in range(2))
    early.stream.join(late.stream)
    assert early.run.states[0]["on_disk"].tolist() == [[5, 5], [15, 15]]
    for tokens in SEGMENTS[3:]:
        out = early.read(np.repeat(tokens, 2, axis=0))
        assert out[:1].tobytes() == alone_early.read(tokens).tobytes()
        assert out[1:].tobytes() == alone_late.read(tokens).tobytes()


# Processes

KILLS = """
    import json, os, random, signal, sys, time
    import numpy as np
    from mini_tfm_plugins.rows_lmdb import LmdbRows

    path, kills = sys.argv[1], int(sys.argv[2])
    LmdbRows(path).open(8, "weights")
    random.seed(0)
    count, acknowledged = 0, set()
    for _ in range(kills):
        out, into = os.pipe()
        child = os.fork()
        if not child:
            os.close(out)
            disk, value = LmdbRows(path), count
            while True:
                rows = np.repeat(np.arange(value, value + 30, dtype=np.float32), 8).reshape(30, 8)
                disk.append("d", {"bank": [rows, np.arange(value, value + 30)]})
                os.write(into, b"%d\\n" % value)
                value += 30
        os.close(into)
        with os.fdopen(out, "rb") as told:
            first = told.readline()
            time.sleep(random.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            lines = [first, *told.read().splitlines(keepends=True)]
        acknowledged.update(int(line) for line in lines if line.endswith(b"\\n"))
        disk = LmdbRows(path)
        count = disk.counts("d")["bank"]
        assert count % 30 == 0, f"{count} rows: half an append"
        with disk.reading("d", "bank", count) as chunks:
            hidden, positions = (np.concatenate(x) for x in zip(*[(h.copy(), p.copy()) for h, p in chunks], strict=True))
        assert (hidden == positions[:, None]).all(), "a torn row"
        appends = positions.reshape(-1, 30)
        assert (appends == appends[:, :1] + np.arange(30)).all(), "a torn append"
        # One that was durable but not yet acknowledged may be seen only after the next write: then it is there twice.
        assert acknowledged <= set(appends[:, 0].tolist()), "an acknowledged append is lost"
    print(json.dumps([kills, len(acknowledged)]))
"""


def test_killed_while_writing(path):
    """30 times kill -9 at a random moment: what was acknowledged is there, whole, and what is there is whole."""
    kills, acknowledged = script(KILLS, path, "30")
    assert kills == 30 and acknowledged >= 30


@pytest.mark.long
def test_killed_while_writing_a_thousand_times(path):
    assert script(KILLS, path, "1000")[0] == 1000


WRITER = """
    import sys, numpy as np
    from mini_tfm_plugins.rows_lmdb import LmdbRows

    disk, first = LmdbRows(sys.argv[1]), int(sys.argv[2])
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(150):
        rows = np.full((7, 8), first + number, np.float32)
        disk.append("shared", {"bank": [rows, np.full(7, first + number)]})
        disk.append(f"own {first}", {"bank": [rows, np.full(7, first + number)]})
    print("done")
"""


WAITER = """
    import os, sys, numpy as np
    from mini_tfm_plugins.rows_lmdb import LmdbRows

    disk, name, *last = LmdbRows(sys.argv[1]), *sys.argv[2:]
    disk.documents()
    if last:  # woken, it runs after all others on this processor
        os.sched_setaffinity(0, {int(last[0])})
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    print("ready", flush=True)
    disk.append(name, {"bank": [np.ones((7, 8), np.float32), np.arange(7)]})
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what LMDB waits for is another lock")
def test_a_writer_waits_for_no_one_that_was_killed_when_its_turn_had_come(path):
    """One that waits is woken and killed before it runs, while this process writes again: the other one that waits has its turn then."""
    disk = LmdbRows(path)
    disk.open(8, "weights")
    processor = max(os.sched_getaffinity(0))
    busy = f"import os\nos.sched_setaffinity(0, {{{processor}}})\nprint('ready', flush=True)\nwhile True: pass"
    waiter, started = [sys.executable, "-c", textwrap.dedent(WAITER), path], []

    def start(*command):
        started.append(process := subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert process.stdout.readline() == "ready\n"
        return process

    try:
        with disk._write():
            first = start(*waiter, "first", str(processor))
            time.sleep(0.5)
            second = start(*waiter, "second")
            time.sleep(0.5)
            spinning = [start(sys.executable, "-c", busy) for _ in range(2)]
        with disk._write():
            first.kill()
            for process in spinning:
                process.kill()
            first.wait()
        assert second.wait(30) == 0
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()
    assert disk.documents()["second"] == 7


def test_a_child_does_not_keep_the_turn_of_a_parent_that_was_killed_while_it_wrote(path):
    code = """
        import os, signal, sys
        from mini_tfm_plugins.rows_lmdb import LmdbRows
        with LmdbRows(sys.argv[1])._write():
            if child := os.fork():
                print(child, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
    """
    LmdbRows(path).open(8, "weights")
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), path], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        try:
            assert parent.wait() == -signal.SIGKILL
            writer = [sys.executable, "-c", textwrap.dedent(WAITER), path, "d"]
            assert subprocess.run(writer, capture_output=True, timeout=30).returncode == 0
        finally:
            os.kill(child, signal.SIGKILL)
    assert LmdbRows(path).documents() == {"d": 7}


@pytest.mark.parametrize("reads_wanted", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_writers_and_readers_at_once(path, reads_wanted):
    """Two processes write, one document together and one each, while this one reads: no read is partial, no row is lost."""
    disk = LmdbRows(path)
    disk.open(8, "weights")
    command = [sys.executable, "-c", textwrap.dedent(WRITER), path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, str(first)], **pipes) for first in (1000, 2000)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            writer.stdin.write("go\n")
            writer.stdin.flush()
        reads, counts = 0, set()
        while reads < reads_wanted or any(writer.poll() is None for writer in writers):
            count = disk.counts("shared").get("bank", 0)
            with disk.reading("shared", "bank", count) as chunks:
                parts = [(hidden.copy(), positions.copy()) for hidden, positions in chunks]
            if parts:
                hidden, positions = (np.concatenate(x) for x in zip(*parts, strict=True))
                assert len(hidden) == count and count % 7 == 0
                assert (hidden == positions[:, None]).all()
                assert (positions.reshape(-1, 7) == positions[::7, None]).all()
            reads += 1
            counts.add(count)
        assert [writer.wait(60) for writer in writers] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            writer.stdin.close()
            writer.stdout.close()
    assert len(counts) > 3, "the readers saw the document grow"
    assert disk.documents() == {"shared": 2 * 7 * 150, "own 1000": 7 * 150, "own 2000": 7 * 150}
    with disk.reading("shared", "bank", 2100) as chunks:
        positions = np.concatenate([positions.copy() for _, positions in chunks])
    assert sorted(positions.tolist()) == sorted([*range(1000, 1150), *range(2000, 2150)] * 7)


def test_a_forked_child_has_a_file_of_its_own(path):
    code = """
        import json, os, sys, numpy as np
        from mini_tfm_plugins.rows_lmdb import LmdbRows
        disk = LmdbRows(sys.argv[1])
        disk.open(8, "weights")
        add = lambda: disk.append("d", {"bank": [np.ones((5, 8), np.float32), np.arange(5)]})
        add()
        child = os.fork()
        if not child:
            add()
            os._exit(0 if disk.counts("d") == {"bank": 10} else 1)
        status = os.waitpid(child, 0)[1]
        add()
        print(json.dumps([status, disk.counts("d")["bank"]]))
    """
    assert script(code, path) == [0, 15]


def test_a_pipeline_keeps_what_it_reads(path):
    from mini_tfm.text.tokenizers import ByteTokenizer

    tokenizer = ByteTokenizer()
    model = mt.Transformer(mt.Config(vocab_size=tokenizer.vocab_size, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1))
    pipe = mt.Pipeline(model, tokenizer, f"window:size=8+store:path={path},top_k=4", segment_length=16)
    pipe.read("A first note. " * 10)
    assert pipe.memory.documents() == {"default": 140}, "what read has returned from is durable, the window's rows, too"
    again = mt.Pipeline(model, tokenizer, f"store:path={path},top_k=4", segment_length=16)
    plain = mt.Pipeline(model, tokenizer, None, segment_length=16)
    assert again.score("A first note.") != plain.score("A first note.")


# A working memory in front


STACKED = ["window:size=24", "window:size=24,sinks=3", "window:size=6+window:size=30"]


def pipeline(spec, **options):
    from mini_tfm.text.tokenizers import ByteTokenizer

    model = mt.Transformer(
        mt.Config(vocab_size=259, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, segment_length=16), seed=0
    )
    return mt.Pipeline(model, ByteTokenizer(), spec, **options)


def rows_on_disk(path, document="default"):
    disk = LmdbRows(path)
    with disk.reading(document, "cross.", sum(disk.counts(document).values())) as chunks:
        return [position for _, positions in chunks for position in positions.tolist()]


@pytest.mark.parametrize("front", STACKED)
def test_what_read_has_returned_from_survives_a_kill(path, front):
    code = f"""
        import os, signal, sys
        sys.path.insert(0, sys.argv[2])
        from test_store import pipeline
        pipe = pipeline("{front}+store:path=" + sys.argv[1])
        pipe.read("x" * 150)
        pipe.read("y" * 50)
        print("200", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), path, str(Path(__file__).parent)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "200\n", done.stderr
    assert sorted(rows_on_disk(path)) == list(range(200))


@pytest.mark.parametrize("front", STACKED)
def test_rows_written_ahead_are_there_once_and_shown_once(path, front):
    pipe, at_once = pipeline(f"{front}+store:path={path},top_k=5"), pipeline(f"{front}+store:top_k=5")
    text = "".join(chr(97 + i * i % 26) for i in range(300))
    for start in range(0, 300, 40):
        pipe.read(text[start : start + 40])
    for start in range(0, 300, 40):  # the end of a call ends a segment
        at_once.read(text[start : start + 40])
    assert sorted(rows_on_disk(path)) == list(range(300))
    assert pipe.score("what was it?")["bits"] == pytest.approx(at_once.score("what was it?")["bits"], rel=1e-6)
    pipe.close()
    assert sorted(rows_on_disk(path)) == list(range(300))


@pytest.mark.parametrize("front", ["", "window:size=24+", "window:size=6+window:size=30+"])
@pytest.mark.parametrize("by", ["memory", "another memory", "another process"])
def test_a_deleted_document_does_not_come_back(path, front, by):
    spec = f"{front}store:path={path},document=alice"
    pipe, fresh = pipeline(spec), pipeline(spec.replace("alice", "nobody"))
    other = pipeline(spec)  # another open session with rows of its own
    pipe.read("alice's secret is 4711. " * 8)
    other.read("another of hers")
    before = fresh.score("alice's secret is")["bits"]
    assert pipe.score("alice's secret is")["bits"] != before
    if by == "memory":
        pipe.memory.reset("alice")
    elif by == "another memory":
        mt.memory(f"store:path={path}").reset("alice")
    else:
        script("import sys, mini_tfm as mt; mt.memory(f'store:path={sys.argv[1]}').reset('alice'); print(0)", path)
    assert pipe.score("alice's secret is")["bits"] == before
    for session in (pipe, other):
        session.close()
    assert pipe.memory.documents() == {}
    pipe.read("something new")
    assert pipe.memory.documents() == {"alice": len("something new")}
    assert sorted(rows_on_disk(path, "alice")) == list(range(len("something new")))


def test_deleting_before_anything_is_on_disk_forgets_what_is_queued(path):
    model = small_model("decoder-only", np.float32)
    reader = Reader(model, mt.memory(f"window:size=4+store:path={path},document=a"), 1)
    reader.read(SEGMENTS[0])
    reader.run.memory.reset("a")
    reader.run.drain()
    reader.run.flush()
    assert reader.run.memory.documents() == {}


@pytest.mark.parametrize("front", ["", "window:size=24+"])
def test_short_readings_leave_nothing_in_ram(path, front):
    pipe = pipeline(f"{front}store:path={path}")
    sizes = []
    for _ in range(3):
        for _ in range(12):
            pipe.read("hello world abcd")
        sizes.append(pipe.state_bytes())
    assert sizes[0] == sizes[1] == sizes[2]


def test_many_processes_may_make_one_store(path):
    code = f"""
        import sys, time
        from mini_tfm_plugins.rows_lmdb import LmdbRows
        time.sleep(max(0, float(sys.argv[2]) - time.time()))
        LmdbRows(sys.argv[1]).open({WIDTH}, "weights")
        print(0)
    """
    at = str(time.time() + 2)
    command = [sys.executable, "-c", textwrap.dedent(code), path, at]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(6)]
    for process in running:
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 0, errors.decode()


def test_forgetting_and_looking_make_no_store(path):
    memory = mt.memory(f"store:path={path}")
    memory.reset("x")
    assert memory.documents() == {} and not os.path.exists(path)


def test_a_store_that_was_removed_is_made_again_and_its_rows_forgotten(path):
    pipe = pipeline(f"store:path={path},document=a")
    fresh = pipe.score("what was it?")["bits"]
    pipe.read("the first text. " * 4)
    os.remove(path)
    assert pipe.score("what was it?")["bits"] == fresh
    os.remove(path)  # which was made again, empty
    other = pipeline(f"store:path={path},document=a")
    assert other.score("what was it?")["bits"] == fresh
    other.read("another text. " * 8)
    seen = other.score("what was it?")["bits"]
    assert pipeline(f"store:path={path},document=a").score("what was it?")["bits"] == seen
    assert pipe.score("what was it?")["bits"] == seen  # it begins anew with what is there


def test_stores_that_are_no_longer_used_are_closed(tmp_path):
    gc.collect()
    before = len(rows_lmdb._open)
    for number in range(200):  # 1 TiB of address space each
        disk = LmdbRows(str(tmp_path / f"{number}.mdb"))
        disk.open(WIDTH, "weights")
    assert len(rows_lmdb._open) <= before + 1


def test_an_interrupted_segment_is_not_remembered(path, monkeypatch):
    pipe, steady = pipeline(f"window:size=24+store:path={path}"), pipeline("window:size=24+store")
    for each in (pipe, steady):
        each.read("0123456789abcdef")
    with monkeypatch.context() as patched:
        patched.setattr("mini_tfm.model.Decoder.last_norm", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patched.setattr("mini_tfm.memory.run.MemoryRun.close", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pipe.read("fedcba9876543210")
    for each in (pipe, steady):
        each.read("fedcba9876543210")
    assert pipe.score("what?")["bits"] == pytest.approx(steady.score("what?")["bits"], rel=1e-6)
    pipe.close()
    assert sorted(rows_on_disk(path)) == list(range(32))


def test_forgetting_leaves_a_file_of_something_else_as_it_is(path):
    with lmdb.open(path, subdir=False) as file, file.begin(write=True) as txn:
        txn.put(b"mine", b"1")
    before = digest(path)
    with pytest.raises(InvalidValue, match="is not a store"):
        mt.memory(f"store:path={path}").reset("x")
    assert digest(path) == before


# Weights that change


def trained(model, name="embedding.weight"):
    model.weights[name] += 0.25


@pytest.mark.parametrize("spec", ["window:size=24", "recurrent:tokens=2", "store", "store:path={}", "window:size=24+store:path={}"])
def test_rows_of_weights_that_were_trained_meanwhile_are_not_mixed_with_new_ones(path, spec):
    pipe = pipeline(spec.format(path))
    pipe.read("a text of the old weights")
    rows = mt.memory(f"store:path={path}").documents()
    trained(pipe.model)
    for use in (lambda: pipe.read("a text of the new weights"), lambda: pipe.score("x"), lambda: pipe.generate("x", max_new_tokens=2)):
        with pytest.raises(InvalidValue, match=r"memory: the model's weights are not those .*Pipeline.reset.* read the text again"):
            use()
    assert mt.memory(f"store:path={path}").documents() == rows
    if "path" in spec:
        with pytest.raises(InvalidValue, match="holds rows from other weights"):
            pipe.reset()
        pipe.memory.reset("default")
    pipe.reset()
    pipe.read("a text of the new weights")
    assert pipe.score("x")["bits"] > 0


@pytest.mark.parametrize("spec", ["window:size=24", "store:path={}", "window:size=24+store:path={}"])
def test_a_memory_that_has_read_nothing_follows_the_weights(path, spec):
    pipe = pipeline(spec.format(path))
    trained(pipe.model)
    assert pipe.read("a text of the new weights") == 25
    assert pipe.score("x")["bits"] > 0


def test_weights_that_no_row_depends_on_may_be_trained(path):
    pipe = pipeline(f"window:size=8+store:path={path}")
    pipe.read("a text " * 8)
    trained(pipe.model, "decoder.0.cross.k.weight")  # what is kept is projected again
    pipe.read("another")
    again = mt.Pipeline(pipe.model, pipe.tokenizer, pipe.memory, segment_length=16)
    assert again.score("x")["bits"] > 0


def test_an_empty_store_is_for_the_model_that_fills_it(path):
    """And a session that opened it for another model cannot mix its rows in."""
    first, second = pipeline(f"store:path={path}"), pipeline(f"store:path={path}")
    trained(second.model)
    second.read("a text")
    with pytest.raises(InvalidValue, match="holds rows from other weights"):
        first.read("a text")
    assert mt.memory(f"store:path={path}").documents() == {"default": 6}
    second.memory.reset("default")
    pipeline(f"store:path={path}").read("a text")


def test_layers_of_a_store_are_told_apart(path):
    """A document of the first layer is of use whatever the layers above it are."""
    model = small_model("decoder-only", np.float32)
    read_and_keep(path, layer=0, document="low", model=model)
    trained(model, "decoder.0.feed_forward.in.weight")
    assert reader_of(path, model, layer=0, document="low").run.states[0]["on_disk"][0, 0] == 15
    read_and_keep(path, layer=1, document="high", model=model)
    trained(model, "decoder.0.feed_forward.in.weight")
    with pytest.raises(InvalidValue, match="holds rows from other weights"):
        reader_of(path, model, layer=1, document="high")


def as_format(path, number, model):
    """Writes a store's meta as an earlier version did."""
    with lmdb.open(path, subdir=False) as file, file.begin(write=True) as txn:
        meta = json.loads(txn.get(b"meta"))
        del meta["models"]
        txn.put(b"meta", json.dumps({**meta, "format": number, "model": model.fingerprint()}).encode())


OLD = """
    import json, sys
    sys.path.insert(0, sys.argv[2])
    from test_store import as_format, pipeline
    pipe = pipeline("store:path=" + sys.argv[1])
    pipe.read("a text " * 20)
    bits = pipe.score("what?")["bits"]
    pipe.close()
    del pipe
    as_format(sys.argv[1], 2, pipeline(None).model)
    print(json.dumps(bits))
"""


def test_a_store_of_an_earlier_version_gets_the_names_of_its_rows(path):
    bits = script(OLD, path, str(Path(__file__).parent))
    other = pipeline(None).model
    trained(other)
    with pytest.raises(InvalidValue, match="holds rows from other weights"):
        mt.Pipeline(other, pipeline(None).tokenizer, f"store:path={path}", segment_length=16)
    assert pipeline(f"store:path={path}").score("what?")["bits"] == bits
    trained(model := pipeline(None).model, "decoder.0.cross.v.weight")  # now the names of its rows count
    assert mt.Pipeline(model, pipeline(None).tokenizer, f"store:path={path}", segment_length=16).score("what?")["bits"] > 0


# Two sessions, interrupts


SESSION = """
    import json, sys, time
    sys.path.insert(0, sys.argv[2])
    from test_store import pipeline
    pipe = pipeline(sys.argv[3] + "store:path=" + sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(12):
        pipe.read("a session reads " * 3)
    pipe.close()
"""


@pytest.mark.parametrize("front", ["", "window:size=24+"])
def test_two_sessions_read_into_one_document(path, front):
    """Each row has a position of its own, whichever process wrote it."""
    command = [sys.executable, "-c", textwrap.dedent(SESSION), path, str(Path(__file__).parent), front]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert sorted(rows_on_disk(path)) == list(range(2 * 12 * 48))


def test_rows_of_another_session_come_between_those_of_a_stream(path):
    first, second = pipeline(f"store:path={path}"), pipeline(f"store:path={path}")
    for pipe in (first, second, first, second):
        pipe.read("0123456789abcdef" * 2)
    assert rows_on_disk(path) == list(range(128))
    state = second._stream.run.states[0]
    # What it reads next stands behind all of the document.
    assert state["next_position"][0] + second._stream.run.start[0] == 128 and state["end"][0] == 128


def interrupting(monkeypatch, at):
    """Writes to a store are interrupted after they are durable: those with these numbers, counted from 0."""
    write, count = LmdbRows.write, iter(range(1000))

    def interrupted(self, *arguments, **options):
        done = write(self, *arguments, **options)
        if next(count) in at:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(LmdbRows, "write", interrupted)


@pytest.mark.parametrize("front", ["", *(front + "+" for front in STACKED)])
@pytest.mark.parametrize("at", [{0}, {1}, {2, 3}, {0, 2, 4}])
def test_rows_that_are_durable_when_an_interrupt_comes_are_there_once(path, monkeypatch, front, at):
    pipe, steady = pipeline(f"{front}store:path={path},top_k=5"), pipeline(f"{front}store:top_k=5")
    text = "".join(chr(97 + i * i % 26) for i in range(192))
    interrupts = 0
    with monkeypatch.context() as patched:
        interrupting(patched, at)
        for start in range(0, 192, 48):
            steady.read(text[start : start + 48])
            try:
                pipe.read(text[start : start + 48])
            except KeyboardInterrupt:
                interrupts += 1
    assert interrupts == len(at)
    assert pipe.score("what was it?")["bits"] == pytest.approx(steady.score("what was it?")["bits"], rel=1e-6)
    pipe.close()
    assert sorted(rows_on_disk(path)) == list(range(192))
    again, whole = pipeline(f"store:path={path},top_k=5"), pipeline("store:top_k=5")
    whole.read(text)
    assert again.score("what was it?")["bits"] == pytest.approx(whole.score("what was it?")["bits"], rel=1e-6)


def test_a_copy_of_a_stream_is_no_interrupted_write(path):
    """Two copies go on differently; both keep what they read."""
    reader = reader_of(path)
    reader.read(SEGMENTS[0])
    reader.run.flush()
    twin = reader.copy()
    for each, tokens in ((twin, SEGMENTS[1]), (reader, SEGMENTS[2])):
        each.read(tokens)
        each.run.flush()
    assert LmdbRows(path).counts("default") == {"decoder.0.": 15, "decoder.1.": 15}
    with LmdbRows(path).reading("default", "decoder.1.", 15) as chunks:
        assert [p for _, positions in chunks for p in positions.tolist()] == list(range(15))


@pytest.mark.parametrize("front", ["", "window:size=24+"])
def test_a_document_deleted_while_rows_are_written_does_not_come_back(path, monkeypatch, front):
    pipe, write = pipeline(f"{front}store:path={path}"), LmdbRows.write
    pipe.read("a secret " * 10)

    def delete_first(self, *arguments, **options):
        monkeypatch.undo()
        self.delete("default")
        return write(self, *arguments, **options)

    monkeypatch.setattr(LmdbRows, "write", delete_first)
    pipe.read("another secret " * 10)
    assert pipe.memory.documents() == {}
    assert pipe.score("x")["bits"] == pipeline(f"{front}store:path={path}").score("x")["bits"]
    pipe.read("new")
    assert pipe.memory.documents() == {"default": 3}


# Reading alone


def refuses_to_write(pipe):
    """It answers as before, and what is on disk stays."""
    with pytest.raises(FileProblem, match=r"path: nothing was written to the store .*; it can be read alone"):
        pipe.read("more text")
    with pytest.raises(FileProblem, match="path: nothing was written to the store"):
        pipe.memory.reset("default")
    pipe.reset()
    return pipe.memory.documents()


@pytest.mark.parametrize("front", ["", "window:size=8+"])
def test_a_store_is_read_and_left_as_it_is(path, front):
    pipe = pipeline(f"store:path={path}")
    pipe.read("a text to remember " * 8)
    before, bits = digest(path), pipeline(f"{front}store:path={path}").score("a text")["bits"]
    reading = pipeline(f"{front}store:path={path},read_only=true")
    assert reading.score("a text")["bits"] == bits
    assert reading.generate("a text " * 20, max_new_tokens=3) is not None  # read into a copy in RAM
    assert refuses_to_write(reading) == {"default": 152}
    assert reading.score("a text")["bits"] == bits and digest(path) == before
    pipe.read("it is written by others")
    reading.reset()
    assert reading.score("a text")["bits"] == pipeline(f"{front}store:path={path}").score("a text")["bits"] != bits


def test_a_store_that_is_not_there_is_not_made_for_reading(path):
    with pytest.raises(FileProblem, match=r"path: there is no store at .* with read_only=true none is made"):
        pipeline(f"store:path={path},read_only=true")
    assert not os.path.exists(path)
    for wrong in ({"read_only": True}, {"path": path, "read_only": 3}):
        with pytest.raises(InvalidValue, match="read_only: expected true or false"):
            mt.memory("store", **wrong)


def test_a_store_of_an_earlier_version_is_read_and_left_as_it_is(path):
    bits = script(OLD, path, str(Path(__file__).parent))
    before = digest(path)
    assert pipeline(f"store:path={path},read_only=true").score("what?")["bits"] == bits
    assert digest(path) == before


AS_NOBODY = """
    import json, os, sys
    sys.path.insert(0, sys.argv[2])
    import tempfile
    from test_store import pipeline, refuses_to_write
    path, option = sys.argv[1], sys.argv[3]
    with tempfile.TemporaryDirectory() as folder:  # imports all, which nobody may not
        pipeline(f"store:path={folder}/notes.mdb").read("x")
        pipe = pipeline(f"store:path={folder}/notes.mdb,read_only=true")
        pipe.score("x")
        refuses_to_write(pipe)
    if os.geteuid() == 0:
        os.setuid(65534)
    pipe = pipeline("store:path=" + path + option)
    bits = pipe.score("a text")["bits"]
    assert refuses_to_write(pipe) == {"default": 152}
    print(json.dumps(bits))
"""


@pytest.mark.parametrize("option", ["", ",read_only=true"])
@pytest.mark.parametrize("lock", ["none", "unwritable", "writable"])
def test_a_store_without_permission_to_write_is_read(option, lock):
    """In a folder without it, too, where there is no lock file."""
    with tempfile.TemporaryDirectory() as folder:  # which others may enter, as pytest's is not
        path = os.path.join(folder, "notes.mdb")
        bits = script(FILL, path, str(Path(__file__).parent))
        if lock == "none":
            os.remove(path + "-lock")
        else:
            os.chmod(path + "-lock", 0o444 if lock == "unwritable" else 0o666)
        os.chmod(path, 0o444)
        os.chmod(folder, 0o555)
        before = digest(path)
        assert script(AS_NOBODY, path, str(Path(__file__).parent), option) == bits
        os.chmod(folder, 0o755)
        assert digest(path) == before


FILL = """
    import json, sys
    sys.path.insert(0, sys.argv[2])
    from test_store import pipeline
    pipe = pipeline("store:path=" + sys.argv[1])
    pipe.read("a text to remember " * 8)
    print(json.dumps(pipeline("store:path=" + sys.argv[1]).score("a text")["bits"]))
"""


# Compaction


def filled(path, documents=4, rows=3000):
    disk = LmdbRows(path)
    disk.open(8, "weights")
    for number in range(documents):
        values = np.repeat(np.arange(rows, dtype=np.float32), 8).reshape(rows, 8) + number
        disk.append(f"d{number}", {"bank": (values, np.arange(rows))})
    return disk


def contents_of(disk):
    found = {}
    for document in disk.documents():
        for bank, count in disk.counts(document).items():
            with disk.reading(document, bank, count) as chunks:
                hidden, positions = (np.concatenate(x) for x in zip(*[(h.copy(), p.copy()) for h, p in chunks], strict=True))
            assert len(hidden) == count
            found[document, bank] = hidden.tobytes(), positions.tobytes()
    return found


def test_a_store_is_made_smaller(path):
    disk = filled(path)
    for document in ("d1", "d2"):
        disk.delete(document)
    before, identity, size = contents_of(disk), disk.identity(), os.path.getsize(path)
    was, now = disk.compact()
    assert was == size and now == os.path.getsize(path) < 0.6 * size
    assert contents_of(disk) == before and disk.identity() == identity and disk.deletions("d1") == 1
    disk.append("d0", {"bank": (np.ones((5, 8), np.float32), np.arange(5))})
    assert disk.counts("d0")["bank"] == 3005
    assert sorted(os.listdir(os.path.dirname(path))) == ["notes.mdb", "notes.mdb-lock"]
    assert disk.compact()[1] <= now + (1 << 16)


def test_sessions_go_on_over_a_compaction(path):
    pipe, steady = pipeline(f"window:size=24+store:path={path}"), pipeline("window:size=24+store")
    for number in range(6):
        for each in (pipe, steady):
            each.read(f"text {number} of a long evening")
        if number % 2:
            mt.memory(f"store:path={path}").compact()
    assert pipe.score("what?")["bits"] == pytest.approx(steady.score("what?")["bits"], rel=1e-6)
    pipe.close()
    assert sorted(rows_on_disk(path)) == list(range(6 * 24))


def test_there_is_nothing_to_compact(path):
    with pytest.raises(FileProblem, match="path: there is no store at"):
        mt.memory(f"store:path={path}").compact()
    pipeline(f"store:path={path}")
    with pytest.raises(FileProblem, match="nothing was written to the store"):
        mt.memory(f"store:path={path},read_only=true").compact()


COMPACTS = """
    import sys
    from mini_tfm_plugins.rows_lmdb import LmdbRows
    disk = LmdbRows(sys.argv[1])
    print("ready", flush=True)
    while True:
        disk.compact()
"""


def test_a_store_is_compacted_while_it_is_written_and_read(path):
    """By processes that are killed at some moment: no acknowledged row is lost, no read is partial."""
    disk = filled(path, documents=1, rows=10)
    command = [sys.executable, "-c", textwrap.dedent(WRITER), path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, str(first)], **pipes) for first in (1000, 2000)]
    compacting, kills = [], 0
    try:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
            writer.stdin.write("go\n")
            writer.stdin.flush()
        while any(writer.poll() is None for writer in writers) or kills < 10:
            compacting.append(subprocess.Popen([sys.executable, "-c", textwrap.dedent(COMPACTS), path], stdout=subprocess.PIPE, text=True))
            assert compacting[-1].stdout.readline() == "ready\n"
            for _ in range(10 + kills):
                count = disk.counts("shared").get("bank", 0)
                with disk.reading("shared", "bank", count) as chunks:
                    parts = [(hidden.copy(), positions.copy()) for hidden, positions in chunks]
                assert sum(len(hidden) for hidden, _ in parts) == count and count % 7 == 0
                assert all((hidden == positions[:, None]).all() for hidden, positions in parts)
            compacting[-1].kill()
            compacting[-1].wait()
            kills += 1
        assert [writer.wait(60) for writer in writers] == [0, 0]
    finally:
        for process in (*writers, *compacting):
            process.kill()
            process.wait()
            process.stdout.close()
            if process.stdin:
                process.stdin.close()
    assert disk.documents() == {"d0": 10, "shared": 2 * 7 * 150, "own 1000": 7 * 150, "own 2000": 7 * 150}
    disk.compact()
    assert disk.documents()["shared"] == 2100 and not [name for name in os.listdir(os.path.dirname(path)) if "compacting" in name]


def test_a_writer_that_waited_for_a_compaction_writes_into_the_new_file(path, monkeypatch):
    disk = filled(path, documents=2)
    disk.delete("d1")
    opened = LmdbRows._environment

    def opened_then_replaced(self, create=False):
        environment = opened(self, create)
        monkeypatch.undo()
        script("import sys, mini_tfm_plugins.rows_lmdb as r; print(r.LmdbRows(sys.argv[1]).compact()[1])", path)
        return environment

    monkeypatch.setattr(LmdbRows, "_environment", opened_then_replaced)
    disk.append("d0", {"bank": (np.ones((5, 8), np.float32), np.arange(5))})
    assert script("import sys, mini_tfm_plugins.rows_lmdb as r; print(r.LmdbRows(sys.argv[1]).documents()['d0'])", path) == 3005


def test_an_interrupt_between_segments_brings_nothing_back_into_ram(path, monkeypatch):
    pipe = pipeline(f"store:path={path}")
    pipe.read("a text of some length")
    size = pipe.state_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("mini_tfm.memory.run.MemoryRun.forget_deleted", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pipe.read("more")
    assert pipe.state_bytes() == size


def test_a_name_that_could_not_be_made_durable_is_synced_again(tmp_path, monkeypatch):
    """Only then is the file a store."""
    synced = []

    def sync(folder):
        synced.append(folder)
        if len(synced) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(rows_lmdb, "_sync_folder", sync)
    with pytest.raises(FileProblem, match=r"cannot be made durable: .* try again"):
        LmdbRows(str(tmp_path / "rows.mdb")).open(4, "model")
    LmdbRows(str(tmp_path / "rows.mdb")).open(4, "model")
    assert synced == [str(tmp_path)] * 2
    LmdbRows(str(tmp_path / "rows.mdb")).open(4, "model")
    assert len(synced) == 2
