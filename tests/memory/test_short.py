"""The short bases: a memory that writes the one method keeps the contract."""

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.memory import Param, RecurrentMemory, RetrievalMemory, RowMemory, View
from mini_tfm.testing import check_memory
from mini_tfm.testing.trial import LENGTH, Reader, Trial, random_segments, small_model


class Oldest(RowMemory):
    """The first rows of the stream."""

    def keep(self, scores, positions):
        return -positions


class Gated(RecurrentMemory):
    """Rows that change by a trained share of what the last layer makes of them."""

    def parameters(self, dims):
        return {**super().parameters(dims), "gate": Param((dims.d_model,), init=0.0, lr_factor=10.0, weight_decay=False)}

    def update(self, state, outputs):
        share = 1 / (1 + np.exp(-state.params["gate"]))
        return (1 - share) * state["tokens"] + share * outputs


class Newest(RetrievalMemory):
    """The k newest rows, whatever is asked."""

    def search(self, state, bank, queries, k):
        hidden, positions, valid = (np.concatenate(x, axis=1) for x in zip(*self.held(state, bank), strict=True))
        newest = np.argsort(np.where(valid, -positions, np.iinfo(np.int64).max), axis=1, kind="stable")[:, :k]
        return View(("hidden", hidden), valid, index=newest, positions=positions)


SHORT = {"rows": lambda: Oldest(size=7), "recurrent": lambda: Gated(tokens=2), "retrieval": lambda: Newest(top_k=3, merge="gate")}


@pytest.mark.usefixtures("short_streams")
@pytest.mark.parametrize("name", SHORT)
def test_one_method_is_a_memory(name):
    check_memory(SHORT[name])


@pytest.mark.parametrize("memory", [RowMemory(size=2), RecurrentMemory(tokens=2)], ids=["rows", "recurrent"])
def test_the_method_must_be_written(memory):
    model = small_model("decoder-only")
    memory.name = "unfinished"
    model.add_memory_weights(memory)
    with pytest.raises(mt.errors.PluginError, match=r"memory 'unfinished' .* NotImplementedError"):
        Reader(model, memory, 1).read(random_segments(1, 1)[0])


def test_retrieval_without_a_search_of_its_own_is_exact():
    """The base alone is the store in RAM."""
    segments = random_segments(2, 5)
    base, store = (Reader(small_model("decoder-only"), memory, 2) for memory in (RetrievalMemory(top_k=3), mt.memory("store", top_k=3)))
    for tokens in segments:
        assert base.read(tokens).tobytes() == store.read(tokens).tobytes()


def test_search_is_asked_only_where_there_are_rows():
    asked = []

    class Spy(Newest):
        def search(self, state, bank, queries, k):
            asked.append((bank, queries.shape, k, self.count(state, bank)))
            return super().search(state, bank, queries, k)

    reader = Trial(lambda: Spy(top_k=3), "decoder-only").reader(2)
    first, second = random_segments(2, 2)
    reader.read(first)
    assert asked == []
    reader.read(second)
    shape = (2, reader.model.config.n_heads, LENGTH, reader.model.config.d_model)
    assert asked == [("decoder.0.", shape, 3, LENGTH), ("decoder.1.", shape, 3, LENGTH)]


def test_the_rows_of_a_segment_go_through_update_once():
    calls = []

    class Spy(Gated):
        def update(self, state, outputs):
            calls.append((state["tokens"].shape, outputs.shape))
            return super().update(state, outputs)

    reader = Trial(lambda: Spy(tokens=3), "encoder-decoder").reader(2)
    reader.read(random_segments(2, 1)[0])
    assert calls == [((2, 3, 8), (2, 3, 8))]
