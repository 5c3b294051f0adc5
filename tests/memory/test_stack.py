"""Exchange: what working memory drops goes to long-term memory, on disk, and comes back into attention."""

import json
import subprocess
import sys

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.memory import Memory, Stack
from mini_tfm.testing.trial import LENGTH, Reader, Tap, random_segments, small_model

MODEL = small_model("decoder-only", np.float32)
SEGMENTS = random_segments(1, 5)

# Another process, which knows nothing of this library: it opens the file with lmdb and looks for the bytes.
LOOK = """
import json, sys, lmdb
wanted = bytes.fromhex(sys.stdin.read())
with lmdb.open(sys.argv[1], subdir=False, readonly=True) as file, file.begin() as txn:
    found = [key.hex() for key, value in txn.cursor() if wanted in value]
    names = [key.decode() for key, value in txn.cursor() if key.startswith(b"document/")]
    about = json.loads(txn.get(b"document/notes"))
print(json.dumps({"found": found, "names": names, "about": about}))
"""


def test_one_row_goes_from_working_memory_to_disk_and_back_into_attention(tmp_path):
    path = str(tmp_path / "notes.mdb")
    window, store, given = mt.memory("window", size=LENGTH), mt.memory("store", path=path, document="notes", top_k=100), Tap(passes=True)
    reader = Reader(MODEL, Stack([given, window, store]), 1)
    reader.read(SEGMENTS[0])
    # The row of token 2, as layer 1 computed it: it is in working memory now, and nowhere else.
    row = next(values for site, layer, position, values in given.rows(0) if (layer, position) == (1, 2))
    held = reader.run.states[1]["decoder.1.hidden"]
    assert held[0, 2].tobytes() == row
    assert reader.run.states[1]["decoder.1.positions"].tolist() == [[0, 1, 2, 3, 4]]

    reader.read(SEGMENTS[1])  # the window is full: it drops the first segment
    assert 2 not in reader.run.states[1]["decoder.1.positions"]
    assert row not in reader.run.states[1]["decoder.1.hidden"].tobytes()
    reader.run.flush()
    assert not [name for name in reader.run.states[2] if name.endswith("hidden")], "after a flush no row is left in RAM"

    done = subprocess.run([sys.executable, "-c", LOOK, path], input=row.hex(), capture_output=True, text=True, check=True, timeout=60)
    told = json.loads(done.stdout)
    assert len(told["found"]) == 1 and b"/decoder.1./" in bytes.fromhex(told["found"][0])
    assert told["names"] == ["document/notes"] and told["about"]["banks"] == {"decoder.0.": 2 * LENGTH, "decoder.1.": 2 * LENGTH}, (
        "the window's rows, too"
    )

    # Both together see all that was read, so the next segment comes out as with a window that holds everything.
    all_in_ram = Reader(MODEL, mt.memory("window", size=100), 1)
    for tokens in SEGMENTS[:2]:
        all_in_ram.read(tokens)
    out = reader.copy().read(SEGMENTS[2])
    np.testing.assert_allclose(out, all_in_ram.read(SEGMENTS[2]), atol=1e-5)

    # And it is that row which is attended to: without it in the file, and only then, the output differs.
    alone = Reader(MODEL, window, 1)
    for tokens in SEGMENTS[:2]:
        alone.read(tokens)
    assert np.max(np.abs(alone.read(SEGMENTS[2]) - out)) > 1e-4
    assert np.array_equal(reader.copy().read(SEGMENTS[2]), out)
    overwrite_row(path, row)
    assert np.max(np.abs(reader.copy().read(SEGMENTS[2]) - out)) > 1e-4


def overwrite_row(path, row):
    """Changes this one row where it lies in the file, in another process."""
    code = """
import sys, lmdb
wanted = bytes.fromhex(sys.stdin.read())
with lmdb.open(sys.argv[1], subdir=False) as file, file.begin(write=True) as txn:
    (pair,) = [(key, value) for key, value in txn.cursor() if wanted in value]
    txn.put(pair[0], pair[1].replace(wanted, bytes(len(wanted))))
"""
    subprocess.run([sys.executable, "-c", code, path], input=row.hex(), text=True, check=True, timeout=60)


def test_nothing_is_held_twice():
    stack = mt.memory("window:size=7+store:top_k=100")
    reader = Reader(MODEL, stack, 1)
    for number, tokens in enumerate(SEGMENTS, 1):
        reader.read(tokens)
        window, store = reader.run.states
        in_window = set(window["decoder.0.positions"][window["decoder.0.valid"]].tolist())
        chunks = [name[: -len("valid")] for name in store if name.startswith("decoder.0.") and name.endswith(".valid")]
        in_store = [p for chunk in chunks for p in store[chunk + "positions"][store[chunk + "valid"]]]
        assert not in_window & set(in_store) and len(set(in_store)) == len(in_store)
        assert in_window | set(in_store) == set(range(number * LENGTH))


def test_rows_go_from_member_to_member_until_one_keeps_them():
    taps = [Tap(passes=True), Tap(passes=True), Tap(passes=False), Tap(passes=False)]
    Reader(MODEL, Stack([*taps[:2], mt.memory("window", size=3), *taps[2:]]), 1).read(SEGMENTS[0])
    assert [len(tap.rows(0)) for tap in taps] == [10, 10, 4, 0]  # two layers of 5 rows; the window keeps 3 of each


def test_new_rows_enter_at_the_first_member_that_writes():
    """One that only absorbs takes nothing while nobody stands before it, and takes part behind others."""

    class Absorbs(Memory):
        def __init__(self):
            self.rows = 0

        def absorb(self, state, evicted):
            self.rows += int(evicted.valid.sum())

    first, last = Absorbs(), Absorbs()
    Reader(MODEL, Stack([first, mt.memory("window", size=3), last]), 1).read(SEGMENTS[0])
    assert (first.rows, last.rows) == (0, 4)


def test_members_of_one_name_have_parameters_of_their_own():
    model = small_model("decoder-only")
    stack = mt.memory("recurrent:tokens=1+recurrent:tokens=2")
    model.add_memory_weights(stack)
    shapes = {name: w.shape for name, w in model.weights.items() if name.startswith("memory.")}
    assert shapes == {"memory.recurrent.tokens": (1, 8), "memory.recurrent.2.tokens": (2, 8)}
    reader = Reader(model, stack, 1)
    for tokens in SEGMENTS:
        assert np.isfinite(reader.read(tokens)).all()
    assert [state["tokens"].shape for state in reader.run.states] == [(1, 1, 8), (1, 2, 8)]


def test_a_stack_lists_and_forgets_documents_of_its_members(tmp_path):
    stack = mt.memory(f"window:size=2+store:path={tmp_path}/notes.mdb,document=a")
    reader = Reader(MODEL, stack, 1)
    reader.read(SEGMENTS[0])
    reader.run.flush()
    assert stack.documents() == {"a": 10}
    stack.reset("b")
    stack.reset("a")
    assert stack.documents() == {}


@pytest.mark.filterwarnings("ignore:memory 'window' gets no row")
@pytest.mark.parametrize("order", ["window:size=4+store:top_k=3", "store:top_k=3+window:size=4"])
def test_a_store_in_front_keeps_everything(order):
    reader = Reader(MODEL, mt.memory(order), 1)
    for tokens in SEGMENTS:
        reader.read(tokens)
    by_name = {member.name: state for member, state in zip(reader.run.members, reader.run.states, strict=True)}
    held = sum(by_name["store"][name].sum() for name in by_name["store"] if name.startswith("decoder.0.") and name.endswith("valid"))
    assert held == (21 if order.startswith("window") else 25)


@pytest.mark.parametrize("spec, idle", [("store+window:size=4", "window"), ("window:size=4+store+window:size=9", "window")])
def test_a_memory_that_never_gets_a_row_is_told(spec, idle):
    reader = Reader(MODEL, mt.memory(spec), 1)
    with pytest.warns(UserWarning, match=f"memory '{idle}' gets no row: 'store' before it .* put '{idle}' before it, as in {idle}[+]store"):
        for tokens in SEGMENTS:
            reader.read(tokens)


@pytest.mark.parametrize(
    "spec", ["window:size=4+store", "window:size=400+store", "recurrent:tokens=2+window", "window:size=4+window:size=400+store"]
)
def test_a_memory_that_waits_for_its_rows_is_not_told(spec, recwarn):
    model = small_model("decoder-only", np.float32)
    model.add_memory_weights(mt.memory(spec))
    reader = Reader(model, mt.memory(spec), 1)
    for tokens in SEGMENTS:
        reader.read(tokens)
    reader.run.drain()
    assert not recwarn.list
