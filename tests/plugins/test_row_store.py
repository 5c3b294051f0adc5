"""What every backend of the store keeps, LMDB and a plain one in RAM that is written here against the protocol alone."""

import contextlib
import dataclasses

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.errors import InvalidValue
from mini_tfm.memory import Claim, RowStore, Written
from mini_tfm.testing import check_memory
from mini_tfm.testing.trial import Reader, random_segments, small_model
from mini_tfm_plugins import store
from mini_tfm_plugins.rows_lmdb import LmdbRows

MODEL = small_model("decoder-only", np.float32)
WIDTH = MODEL.config.d_model


STORES = {}  # by path
DELETIONS = {}  # by path and document
WRITES = {}  # by path, document and writer


class RamRows:
    """The protocol in dictionaries: a backend is as short as this, but for durability."""

    def __init__(self, path, read_only=False, join=True):
        self.path = path

    def open(self, d_model, model, former=None):
        made = STORES.setdefault(self.path, (d_model, model, {}))
        if made[:2] != (d_model, model):
            raise InvalidValue(f"path: the store {self.path} holds rows of another width or other weights; give another path")

    def _documents(self):
        return STORES[self.path][2] if self.path in STORES else {}

    def documents(self):
        return {document: sum(self.counts(document).values()) for document in self._documents()}

    def counts(self, document):
        return {bank: len(hidden) for bank, (hidden, _) in self._documents().get(document, {}).items()}

    def next_position(self, document):
        return max((int(positions.max(initial=-1)) + 1 for _, positions in self._documents().get(document, {}).values()), default=0)

    def append(self, document, rows):
        banks = self._documents().setdefault(document, {})
        for bank, pair in rows.items():
            banks[bank] = tuple(np.concatenate(x) for x in zip(banks[bank], pair, strict=True)) if bank in banks else tuple(pair)
        return self.counts(document)

    def write(self, document, rows, claim, writer, number, end):
        if (self.identity(), self.deletions(document)) != (claim.identity, claim.deletions):
            return None
        last = WRITES.get((self.path, document, writer))
        if last and last[0] >= number:
            return dataclasses.replace(last[1], again=True)
        moved, counts = self.next_position(document) - end, self.counts(document)
        counts_now = self.append(document, {bank: (hidden, at + moved) for bank, (hidden, at) in rows.items()})
        first = {bank: counts.get(bank, 0) for bank in rows}
        done = Written(False, counts_now, first, moved, self.next_position(document))
        WRITES[self.path, document, writer] = number, done
        return done

    @contextlib.contextmanager
    def reading(self, document, bank, count, claim=None):
        if claim is not None and (self.identity(), self.deletions(document)) != (claim.identity, claim.deletions):
            count = 0
        hidden, positions = self._documents().get(document, {}).get(bank, (np.zeros((0, 1), np.float32), np.zeros(0, np.int64)))
        yield ((hidden[i : i + 7], positions[i : i + 7]) for i in range(0, min(count, len(hidden)), 7))

    def gather(self, document, bank, numbers, claim=None):
        if claim is not None and (self.identity(), self.deletions(document)) != (claim.identity, claim.deletions):
            numbers = numbers[:0]
        hidden, positions = self._documents().get(document, {}).get(bank, (np.zeros((0, WIDTH), np.float32), np.zeros(0, np.int64)))
        return hidden[numbers], positions[numbers]

    def delete(self, document):
        self._documents().pop(document, None)
        DELETIONS[self.path, document] = self.deletions(document) + 1

    def compact(self):
        return 0, 0

    def identity(self):
        return id(STORES[self.path]) if self.path in STORES else -1

    def deletions(self, document):
        return DELETIONS.get((self.path, document), 0)


@pytest.fixture(params=[LmdbRows, RamRows])
def rows(request, tmp_path):
    return request.param(str(tmp_path / "rows"))


def some(first, count):
    return np.arange(first, first + count, dtype=np.float32)[:, None].repeat(WIDTH, 1), np.arange(first, first + count)


def read(rows, document, bank, count):
    with rows.reading(document, bank, count) as chunks:
        return [position for hidden, positions in chunks for position in positions[: len(hidden)].tolist()][:count]


def test_it_is_a_row_store(rows):
    assert isinstance(rows, RowStore)


def test_what_was_appended_is_read_in_order(rows):
    assert rows.documents() == {}
    rows.open(WIDTH, "weights")
    assert rows.append("a", {"x": some(0, 5), "y": some(0, 2)}) == {"x": 5, "y": 2}
    assert rows.append("a", {"x": some(5, 4)}) == {"x": 9, "y": 2}
    rows.append("b", {"x": some(3, 1)})
    assert rows.documents() == {"a": 11, "b": 1} and rows.counts("a") == {"x": 9, "y": 2}
    assert (rows.next_position("a"), rows.next_position("b"), rows.next_position("c")) == (9, 4, 0)
    assert read(rows, "a", "x", 9) == list(range(9)) and read(rows, "a", "x", 3) == [0, 1, 2] and read(rows, "a", "y", 2) == [0, 1]
    with rows.reading("a", "x", 9) as chunks:
        for hidden, positions in chunks:
            assert hidden.dtype == np.float32 and positions.dtype == np.int64 and (hidden == positions[:, None]).all()


def test_a_deleted_document_is_gone_and_the_others_are_not(rows):
    rows.open(WIDTH, "weights")
    rows.append("a", {"x": some(0, 5)})
    rows.append("b", {"x": some(0, 3)})
    rows.delete("a")
    rows.delete("not there")
    assert rows.documents() == {"b": 3} and rows.counts("a") == {} and read(rows, "a", "x", 5) == []


def test_rows_of_another_width_or_other_weights_are_refused(rows):
    rows.open(WIDTH, "weights")
    rows.open(WIDTH, "weights")
    rows.append("a", {"x": some(0, 5)})
    for other in ((WIDTH + 1, "weights"), (WIDTH, "other")):
        with pytest.raises(InvalidValue, match=r"path: the store .* give another path|into another path"):
            rows.open(*other)


def test_the_store_is_the_same_over_any_backend(tmp_path, monkeypatch):
    """It knows the protocol alone, and one function chooses."""
    outputs = []
    for backend in (LmdbRows, RamRows):
        monkeypatch.setattr(store, "backend_of", backend)
        reader = Reader(MODEL, mt.memory("store", path=str(tmp_path / backend.__name__), top_k=4), 1)
        for tokens in random_segments(1, 6):
            outputs.append(reader.read(tokens).tobytes())
            reader.run.flush()
        again = Reader(MODEL, mt.memory("store", path=str(tmp_path / backend.__name__), top_k=4), 1)
        outputs.append(again.read(random_segments(1, 1)[0]).tobytes())
    assert outputs[:7] == outputs[7:]


@pytest.mark.usefixtures("short_streams")
def test_the_kit_passes_a_store_over_another_backend(monkeypatch):
    monkeypatch.setattr(store, "backend_of", RamRows)
    monkeypatch.setattr("mini_tfm.testing.checks.kinds_for", lambda memory: ["decoder-only"])
    paths = iter(range(1000))
    check_memory(lambda: mt.memory("store", path=f"ram {next(paths)}", top_k=3))


def test_a_write_is_checked_against_what_the_stream_knows(rows):
    """Behind what others wrote, once, and not into a document that was deleted."""
    rows.open(WIDTH, "weights")
    claim = Claim(rows.identity(), 0)
    first = rows.write("a", {"x": some(0, 3)}, claim, writer=7, number=1, end=0)
    assert (first.again, first.first, first.counts, first.moved, first.end) == (False, {"x": 0}, {"x": 3}, 0, 3)
    others = rows.write("a", {"x": some(0, 4)}, claim, writer=8, number=1, end=0)
    assert (others.first, others.moved, others.end) == ({"x": 3}, 3, 7)
    again = rows.write("a", {"x": some(0, 3)}, claim, writer=7, number=1, end=0)
    assert again.again and again.first == first.first and dict(again.counts) == {"x": 3} and (again.moved, again.end) == (0, 3)
    assert read(rows, "a", "x", 7) == list(range(7))
    rows.delete("a")
    assert rows.write("a", {"x": some(3, 3)}, claim, writer=7, number=2, end=3) is None and rows.documents() == {}
    assert rows.write("a", {"x": some(0, 2)}, Claim(rows.identity(), 1), writer=7, number=2, end=0).counts == {"x": 2}
    with rows.reading("a", "x", 2, claim) as chunks:
        assert list(chunks) == []
    assert len(rows.gather("a", "x", np.array([0, 1]), claim)[1]) == 0


def test_rows_are_given_by_their_numbers(rows):
    rows.open(WIDTH, "weights")
    rows.append("a", {"x": some(100, 20), "y": some(0, 3)})
    for numbers in ([], [0], [19], [3, 4, 5, 11, 17]):
        hidden, positions = rows.gather("a", "x", np.array(numbers, np.int64))
        assert positions.tolist() == [100 + number for number in numbers] and hidden.shape == (len(numbers), WIDTH)
        assert (hidden == positions[:, None]).all()
