"""Exchange: what working memory drops goes to long-term memory, on disk, and comes back into attention."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.autodiff import value_of
from mini_tfm.config import Config
from mini_tfm.context import Pass
from mini_tfm.errors import PluginError
from mini_tfm.memory import Memory, MemorySpec, RowMemory, Stack
from mini_tfm.testing import CHECKS, check_memory
from mini_tfm.testing.trial import LENGTH, Reader, Tap, random_segments, small_model
from mini_tfm.transformer import Transformer
from mini_tfm.weights import Weights
from mini_tfm_plugins.eviction import HeavyHitters
from mini_tfm_plugins.infini import Infini
from mini_tfm_plugins.knn_lm import KnnLM

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


# What rows bring along


class Takes(Memory):
    """Keeps what it is given."""

    spec = MemorySpec(sites=frozenset({"decoder"}), needs=frozenset({"mass", "tokens"}))

    def __init__(self):
        self.given = []

    def write(self, state, site, layer, new):
        self.given.append((layer, new, None if new.project is None else [value_of(x) for x in new.project(new.hidden)]))


class Weighs(RowMemory):
    """Keeps every row, and the attention that it receives."""

    def __init__(self, size=100):
        super().__init__(size=size, site="decoder")
        self.spec = dataclasses.replace(self.spec, needs=frozenset({"mass", "tokens"}))

    def keep(self, scores, positions):
        return positions


def test_rows_that_a_window_drops_bring_what_the_memory_behind_it_needs():
    """Their tokens and targets, the attention they received while they were in the window, and how their layer projects them."""
    takes, model = Takes(), small_model("decoder-only")
    reader, whole, fresh = Reader(model, Stack([mt.memory("window", size=LENGTH), takes]), 1), Reader(model, Weighs(), 1), Takes()
    for tokens in SEGMENTS[:2]:
        reader.read(tokens)
        whole.read(tokens)
    Reader(model, fresh, 1).read(SEGMENTS[0])
    assert [layer for layer, _, _ in takes.given] == [0, 1]
    for (layer, dropped, projected), (_, new, at_once) in zip(takes.given, fresh.given, strict=True):
        np.testing.assert_array_equal(dropped.tokens, new.tokens)
        np.testing.assert_array_equal(dropped.targets, SEGMENTS[0])
        np.testing.assert_allclose(dropped.mass, whole.run.states[0][f"decoder.{layer}.mass"][:, :LENGTH], rtol=1e-12)
        assert (dropped.mass > new.mass).all(), "the second segment attended to them, too"
        for a, b in zip(projected, at_once, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["decoder-only", "encoder-decoder"])
def test_at_the_end_of_the_streams_they_bring_it_too(kind):
    takes, model = Takes(), small_model(kind)
    reader = Reader(model, Stack([mt.memory("window:size=100,site=decoder"), takes]), 1)
    reader.read(SEGMENTS[0])
    reader.run.drain()
    assert [layer for layer, _, _ in takes.given] == [0, 1]
    for layer, dropped, projected in takes.given:
        np.testing.assert_array_equal(dropped.targets, SEGMENTS[0])
        assert dropped.mass.shape == (1, LENGTH) and (dropped.mass > 0).any()
        attention = model.decoder.layers[layer].attention.f
        expected = attention.keys_and_values(dropped.hidden, Pass(Weights(model.weights), reader.run))
        for a, b in zip(projected, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("behind", [HeavyHitters, lambda: Infini(site="decoder"), KnnLM, Weighs])
def test_any_memory_stands_behind_a_window(behind):
    """From the first segment to the end of the streams, in training and in use."""
    made = Stack([mt.memory("window:size=4,site=decoder"), behind()])
    check_memory(made, skip=set(CHECKS) - {"runs", "rows_reorder", "dump_and_load_go_on", "stacks", "gradients_are_right"})
    model = small_model("decoder-only")
    model.add_memory_weights(made)
    reader = Reader(model, made, 2)
    for tokens in random_segments(2, 4):
        reader.read(tokens)
    reader.run.drain()
    assert not any(x.shape[1] for name, x in reader.run.states[0].items())


def test_a_memory_behind_is_told_once_how_much_attention_its_own_rows_got():
    """The rows that it shows itself, since the working memory dropped some the last time."""
    stack, told = Stack([mt.memory("window:size=4,site=decoder"), Weighs()]), []
    stack.members[1].absorb = lambda state, evicted: told.append(evicted.view_mass) or Weighs.absorb(stack.members[1], state, evicted)
    reader = Reader(small_model("decoder-only"), stack, 1)
    for tokens in SEGMENTS[:3]:
        reader.read(tokens)
    rows = [None if mass is None else mass.shape for mass in told]
    assert rows == [None, None, (1, 1), (1, 1), (1, 6), (1, 6)]


class Drops(Memory):
    """Passes on what it is given, changed."""

    def __init__(self, **changes):
        self.changes = changes

    def write(self, state, site, layer, new):
        return dataclasses.replace(new, **self.changes)


def test_what_is_not_known_of_a_row_is_no_attention_and_no_token():
    reader = Reader(small_model("decoder-only"), Stack([Drops(mass=None, tokens=None, targets=None), Weighs()]), 1)
    reader.read(SEGMENTS[0])
    state = reader.run.states[1]
    assert not state["decoder.0.mass"].any() and (state["decoder.0.tokens"] == -1).all() and (state["decoder.0.targets"] == -1).all()


@pytest.mark.parametrize(("name", "value"), [("mass", np.zeros((1, 2))), ("tokens", np.zeros((1, LENGTH))), ("targets", [3])])
def test_what_a_memory_says_of_dropped_rows_must_fit_them(name, value):
    reader = Reader(small_model("decoder-only"), Stack([Drops(**{name: value}), Weighs()]), 1)
    with pytest.raises(PluginError, match=rf"memory 'Drops' .* failed in write, site decoder, layer 0, segment 0: {name}: expected "):
        reader.read(SEGMENTS[0])
    Reader(small_model("decoder-only"), Stack([Drops(**{name: value}), mt.memory("window", size=3)]), 1).read(SEGMENTS[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_streams_that_cannot_end_are_as_they_were(error):
    """Nothing is lost between the window, which has given up its rows, and the memory that did not take them."""

    class Fails(Memory):
        def absorb(self, state, evicted):
            raise error

    reader = Reader(small_model("decoder-only"), Stack([mt.memory("window", size=100), Fails()]), 1)
    reader.read(SEGMENTS[0])
    before = reader.copy()
    with pytest.raises((KeyboardInterrupt, PluginError)):
        reader.run.drain()
    assert reader.read(SEGMENTS[1]).tobytes() == before.read(SEGMENTS[1]).tobytes()


@pytest.mark.parametrize(
    "spec, idle",
    [
        ("store+window:size=4", "window"),
        ("window:size=4+store+window:size=9", "window"),
        ("store+blocks", "blocks"),
        ("store+blocks:cut=surprise", "blocks"),  # the decoder's outputs come to it alone, and are no rows to show
    ],
)
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


class Seen(Memory):
    """Counts the rows that it is offered."""

    spec = MemorySpec(sites=frozenset({"decoder"}), taps=True)

    def start(self, batch, dims):
        return {"rows": np.zeros(batch, np.int64)}

    def write(self, state, site, layer, new):
        state["rows"] = state["rows"] + new.valid.sum(axis=1)


def read_by(stack, model=MODEL):
    reader = Reader(model, stack, 1)
    for tokens in SEGMENTS:
        reader.read(tokens)
    return reader.run


def test_a_member_that_taps_sees_rows_and_passes_them_on():
    plain, n_layers = read_by(mt.memory("window:size=7+store:top_k=2,site=decoder")), 2
    before = read_by(Stack([Seen(), mt.memory("window:size=7+store:top_k=2,site=decoder")]))
    between = read_by(Stack([mt.memory("window", size=7), Seen(), mt.memory("store:top_k=2,site=decoder")]))
    behind = read_by(Stack([mt.memory("window", size=7), Seen()]))
    assert before.states[0]["rows"] == n_layers * SEGMENTS.size
    assert between.states[1]["rows"] == behind.states[1]["rows"] == n_layers * (SEGMENTS.size - 7)
    for run in (before.states[1:], [between.states[0], between.states[2]]):
        for state, expected in zip(run, plain.states, strict=True):
            assert state.keys() == expected.keys()
            assert all(value.tobytes() == expected[name].tobytes() for name, value in state.items())


def test_a_matrix_that_taps_learns_from_rows_that_a_window_still_has():
    model = Transformer(Config(**{**MODEL.config.to_dict(), "n_decoder_layers": 1}), seed=0)
    model.add_memory_weights(mt.memory("infini"))
    alone, window = (read_by(mt.memory(text), model) for text in ("infini", "window:size=7"))
    both = read_by(mt.memory("infini:taps=true+window:size=7"), model)
    for state, expected in zip(both.states, (alone.states[0], window.states[0]), strict=True):
        assert all(value.tobytes() == expected[name].tobytes() for name, value in state.items())  # one layer: what it reads is the text


def test_a_member_that_taps_drops_nothing():
    class Drops(Seen):
        def write(self, state, site, layer, new):
            return new

    with pytest.raises(PluginError, match=r"expected None with spec\.taps or spec\.early, where others get all rows, got New"):
        read_by(Stack([Drops(), mt.memory("window", size=7)]))
    with pytest.raises(PluginError, match=r"spec\.taps: expected True or False, got 1"):
        read_by(type("Odd", (Seen,), {"spec": dataclasses.replace(Seen.spec, taps=1)})())


class Early(Memory):
    """Counts what it is offered early, and what it is told that nobody holds."""

    spec = MemorySpec(sites=frozenset({"decoder"}), early=True)

    def start(self, batch, dims):
        return {"new": np.zeros(batch, np.int64), "free": np.zeros(batch, np.int64), "last": np.full(batch, -1)}

    def write(self, state, site, layer, new):
        state["new"] = state["new"] + new.valid.sum(axis=1)

    def absorb(self, state, evicted):
        state["free"] = state["free"] + evicted.valid.sum(axis=1)
        state["last"] = np.where(evicted.valid, evicted.positions, -1).max(axis=1, initial=-1)


def test_a_member_that_is_early_gets_rows_before_those_before_it_drop_them():
    rows = 2 * SEGMENTS.size  # of two layers
    alone = read_by(Early()).states[0]
    assert (alone["new"], alone["free"]) == (rows, rows)
    run = read_by(Stack([mt.memory("window", size=7), Early(), Seen()]))
    assert (run.states[1]["new"], run.states[1]["free"]) == (rows, rows - 14)
    assert run.states[1]["last"] == SEGMENTS.size - 8
    assert run.states[2]["rows"] == 0  # what nobody holds stays with it
    run.drain()
    assert (run.states[1]["new"], run.states[1]["free"]) == (rows, rows)
    behind = read_by(Stack([Seen(), Early()])).states
    assert behind[0]["rows"] == behind[1]["free"] == rows


def test_a_member_that_is_early_drops_nothing_that_it_is_offered_early():
    class Drops(Early):
        def write(self, state, site, layer, new):
            return new

    with pytest.raises(PluginError, match=r"expected None with spec\.taps or spec\.early"):
        read_by(Stack([mt.memory("window", size=7), Drops()]))
    with pytest.raises(PluginError, match=r"spec\.early: expected True or False, got 1"):
        read_by(type("Odd", (Early,), {"spec": dataclasses.replace(Early.spec, early=1)})())


def test_a_member_that_is_early_and_never_gets_a_row_for_itself_is_told():
    with pytest.warns(UserWarning, match="gets no row"):

        class Shows(Early):
            def view(self, state, site, layer, segment):
                return None

        read_by(Stack([mt.memory("store:top_k=2,site=decoder"), Shows()]))
