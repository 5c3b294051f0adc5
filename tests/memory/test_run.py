"""A memory at work: rows of the batch, dump and load, what is told to whom, and every nonsense that is stopped before C."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.autodiff import Var
from mini_tfm.errors import FileProblem, InvalidValue, PluginError
from mini_tfm.memory import Evicted, Memory, MemorySpec, Param, RowMemory, Rows, SideOutput, Stack, View
from mini_tfm.memory.base import MERGES
from mini_tfm.memory.run import MemoryRun, select_streams
from mini_tfm.stream import Stream
from mini_tfm.testing.trial import LENGTH, Reader, Trial, random_segments, small_model
from mini_tfm.text.tokenizers import ByteTokenizer
from mini_tfm_plugins.eviction import HeavyHitters
from mini_tfm_plugins.knn_lm import KnnLM

MODEL = small_model("decoder-only")
SEGMENTS = random_segments(2, 4)
H, D, WIDTH = MODEL.config.n_heads, MODEL.config.d_head, MODEL.config.d_model


class Hostile(Memory):
    """Does what `tricks` say, method by method; else it keeps rows of zeros."""

    def __init__(self, site="decoder", needs=("query",), **tricks):
        self.spec = MemorySpec(sites=frozenset({site}), needs=frozenset(needs))
        self.tricks = tricks
        self.name = "hostile"

    def _do(self, method, default, *args):
        trick = self.tricks.get(method, default)
        return trick(*args) if callable(trick) else trick

    def parameters(self, dims):
        return self._do("parameters", {})

    def start(self, batch, dims):
        return self._do("start", {"rows": np.zeros((batch, 2))})

    def begin(self, state, segment):
        return self._do("begin", None)

    def view(self, state, site, layer, segment):
        return self._do("view", None)

    def read(self, state, site, layer, query):
        return self._do("read", None)

    def write(self, state, site, layer, new):
        return self._do("write", None, state)

    def end(self, state, rows):
        return self._do("end", None)

    def logits(self, state, hidden, log_probs):
        return self._do("logits", None, log_probs)

    def flush(self, state):
        return self._do("flush", None)


def good_view(**changes):
    view = View(("hidden", np.zeros((2, 3, WIDTH))), np.ones((2, 3), bool), positions=np.zeros((2, 3), np.int64))
    return dataclasses.replace(view, **changes)


def hidden(*shape, dtype=np.float64, value=0.0):
    return {"bank": ("hidden", np.full(shape, value, dtype))}


KV = np.zeros((2, H, 3, D))
LOG_PROBS = np.full((2, LENGTH, 24), -np.log(24))

# method, what it returns, what the message must say
HOSTILE = [
    ("view", 7, "expected a View, a SideOutput or None, got int"),
    ("view", np.zeros(3), "expected a View, a SideOutput or None, got ndarray"),
    ("view", (good_view(),), "expected a View, a SideOutput or None, got tuple"),
    ("view", good_view(bank=None), "bank: expected ('hidden', X) or ('kv', K, V)"),
    ("view", good_view(bank=()), "bank: expected ('hidden', X) or ('kv', K, V)"),
    ("view", good_view(bank=("hidden",)), "bank: expected ('hidden', X) or ('kv', K, V)"),
    ("view", good_view(bank=("rows", KV)), "bank: expected ('hidden', X) or ('kv', K, V)"),
    ("view", good_view(bank=("hidden", None)), "bank: expected an array, got NoneType"),
    ("view", good_view(bank=("hidden", [[1.0]])), "bank: expected an array, got list"),
    ("view", good_view(**hidden(2, 3)), "bank: expected shape (2, any, 8), got (2, 3)"),
    ("view", good_view(**hidden(1, 3, WIDTH)), "bank: expected shape (2, any, 8), got (1, 3, 8)"),
    ("view", good_view(**hidden(2, 3, WIDTH + 1)), "bank: expected shape (2, any, 8), got (2, 3, 9)"),
    ("view", good_view(**hidden(2, 3, WIDTH, dtype=np.float32)), "bank: expected float64, as the model has, got float32"),
    ("view", good_view(**hidden(2, 3, WIDTH, dtype=np.int64)), "bank: expected floating point, got int64"),
    ("view", good_view(**hidden(2, 3, WIDTH, dtype=object)), "bank: expected floating point, got object"),
    ("view", good_view(**hidden(2, 3, WIDTH, dtype=complex)), "bank: expected floating point, got complex128"),
    ("view", good_view(**hidden(2, 3, WIDTH, value=np.nan)), "bank: holds NaN or infinity"),
    ("view", good_view(**hidden(2, 3, WIDTH, value=np.inf)), "bank: holds NaN or infinity"),
    ("view", good_view(bank=("kv", KV)), "bank: expected ('hidden', X) or ('kv', K, V)"),
    ("view", good_view(bank=("kv", KV, KV[:, :, :2])), "bank V: expected shape (2, 2, 3, 4), got (2, 2, 2, 4)"),
    ("view", good_view(bank=("kv", KV[:, :1], KV)), "bank K: expected shape (2, 2, 3, 4), got (2, 1, 3, 4)"),
    ("view", good_view(bank=("kv", KV[0], KV)), "bank K: expected shape (2, 2, any, 4), got (2, 3, 4)"),
    ("view", good_view(valid=None), "valid: expected an array, got NoneType"),
    ("view", good_view(valid=np.ones((2, 2), bool)), "valid: expected shape (2, 3), got (2, 2)"),
    ("view", good_view(valid=np.ones((2, 3))), "valid: expected bool, got float64"),
    ("view", good_view(positions=np.zeros((2, 3))), "positions: expected integer, got float64"),
    ("view", good_view(positions=np.zeros(3, np.int64)), "positions: expected shape (2, 3), got (3,)"),
    ("view", good_view(index=[[0], [1]]), "index: expected an array or None, got list"),
    ("view", good_view(index=np.array([[0], [3]])), "index: expected -1 to 2, got 0 to 3"),
    ("view", good_view(index=np.array([[0], [-2]])), "index: expected -1 to 2, got -2 to 0"),
    ("view", good_view(index=np.array([[0.0], [1.0]])), "index: expected integer, got float64"),
    ("view", good_view(index=np.array([0, 1])), "index: expected shape (2, 2, 5, any), got (2,)"),
    ("view", good_view(index=np.zeros((2, H, LENGTH + 1, 1), np.int64)), "index: expected shape (2, 2, 5, any), got (2, 2, 6, 1)"),
    ("view", good_view(index=np.zeros((2, H + 1, LENGTH, 1), np.int64)), "index: expected shape (2, 2, 5, any), got (2, 3, 5, 1)"),
    ("view", good_view(index=np.zeros((3, 1), np.int64)), "index: expected shape (2, any), got (3, 1)"),
    ("view", good_view(bias=np.zeros((2, H, LENGTH, 4))), "bias: expected a shape that broadcasts to (2, 2, 5, 3), got (2, 2, 5, 4)"),
    ("view", good_view(bias=np.zeros((1, 2, H, LENGTH, 3))), "bias: expected a shape that broadcasts to (2, 2, 5, 3)"),
    ("view", good_view(bias=np.full(3, np.nan)), "bias: holds NaN or infinity"),
    ("view", good_view(bias=np.full(3, np.inf)), "bias: holds NaN or infinity"),
    ("view", good_view(bias=np.zeros(3, np.float32)), "bias: expected float64, got float32"),
    ("view", good_view(bias=0.5), "bias: expected an array or None, got float"),
    ("view", good_view(merge="average"), "merge: expected one of joint, gate, add, replace, got 'average'"),
    ("view", good_view(merge="gate"), "gate: expected (H,) logits with merge='gate', got None"),
    ("view", good_view(merge="gate", gate=np.zeros(3)), "gate: expected shape (2,), got (3,)"),
    ("view", good_view(merge="gate", gate=np.full(2, np.nan)), "gate: holds NaN or infinity"),
    ("read", [], "expected a View, a SideOutput or None, got list"),
    ("read", SideOutput(None), "output: expected an array, got NoneType"),
    ("read", SideOutput(np.zeros((2, H, 1, D))), "output: expected shape (2, 2, 5, 4), got (2, 2, 1, 4)"),
    ("read", SideOutput(np.full((2, H, LENGTH, D), np.nan)), "output: holds NaN or infinity"),
    ("read", SideOutput(np.zeros((2, H, LENGTH, D), np.float32)), "output: expected float64, as the model has, got float32"),
    ("read", SideOutput(np.zeros((2, H, LENGTH, D)), "joint"), "merge: a SideOutput cannot be 'joint', it has no scores"),
    ("read", SideOutput(np.zeros((2, H, LENGTH, D)), "gate"), "gate: expected (H,) logits with merge='gate', got None"),
    ("read", SideOutput(np.zeros((2, H, LENGTH, D)), valid=np.ones(3, bool)), "valid: expected shape (2,), got (3,)"),
    ("begin", np.zeros((2, 1, WIDTH)), "expected Rows or None, got ndarray"),
    ("begin", Rows(np.zeros((2, WIDTH))), "values: expected shape (2, any, 8), got (2, 8)"),
    ("begin", Rows(np.zeros((2, 1, WIDTH), np.float32)), "values: expected float64, as the model has, got float32"),
    ("begin", Rows(np.full((2, 1, WIDTH), np.inf)), "values: holds NaN or infinity"),
    ("begin", Rows(np.zeros((2, 1, WIDTH)), "behind"), "where: 'behind' is not possible here"),
    ("write", True, "expected Evicted or None, got bool"),
    ("write", Evicted("decoder", 0, np.zeros((2, 3)), None, None), "hidden: expected shape (2, any, 8), got (2, 3)"),
    ("write", Evicted("decoder", 0, np.zeros((2, 1, WIDTH)), None, None), "valid: expected an array, got NoneType"),
    ("write", Evicted("decoder", 0, KV[:, 0].repeat(2, 2), KV[:, 0, :, 0] == 0, np.zeros((2, 2), int)), "positions: expected shape (2, 3)"),
    (
        "write",
        lambda state: state.update(rows=None),
        "state['rows']: expected an array of numbers or bools, 2 streams along axis 0, got NoneType",
    ),
    ("write", lambda state: state.update(rows=np.zeros((3, 1))), "state['rows']: expected an array of numbers or bools, 2 streams"),
    ("write", lambda state: state.update(rows=np.zeros(())), "state['rows']: expected an array of numbers or bools, 2 streams"),
    ("write", lambda state: state.update(rows=np.array(["a", "b"])), "got shape (2,), <U1"),
    ("write", lambda state: state.update({7: np.zeros(2)}), "state: expected names, got 7"),
    ("start", None, "expected a mapping of arrays, got NoneType"),
    ("start", [np.zeros(2)], "expected a mapping of arrays, got list"),
    ("start", {"rows": [1, 2]}, "state['rows']: expected an array of numbers or bools, 2 streams along axis 0, got list"),
    (
        "start",
        {"rows": np.zeros((1, 2))},
        "state['rows']: expected an array of numbers or bools, 2 streams along axis 0, got shape (1, 2), float64",
    ),
    ("logits", LOG_PROBS[:1], "expected shape (2, 5, 24), got (1, 5, 24)"),
    ("logits", LOG_PROBS.tolist(), "expected an array or None, got list"),
    ("logits", LOG_PROBS * np.nan, "expected numbers, got float64 or NaN"),
    ("logits", LOG_PROBS + 1, "expected log-probabilities, whose exponentials sum to 1"),
]


@pytest.mark.parametrize(("method", "returned", "told"), HOSTILE, ids=[f"{i}-{row[0]}" for i, row in enumerate(HOSTILE)])
def test_nonsense_is_stopped_before_it_is_computed_with(method, returned, told):
    with pytest.raises(PluginError) as caught:
        Reader(MODEL, Hostile(**{method: returned}), 2).read(SEGMENTS[0])
    place = "" if method in ("start", "logits") else ", site decoder"
    place += ", layer 0" if method in ("view", "read", "write") else ""
    who = "memory 'hostile' (" + f"{Hostile.__module__}.Hostile) failed in {method}{place}, segment 0: "
    assert str(caught.value).startswith(who) and told in str(caught.value)


def test_a_good_view_is_taken_and_an_index_may_be_of_any_integers():
    for index in (None, np.array([[0, -1], [2, 1]], np.int32), np.zeros((2, H, LENGTH, 2), np.int16)):
        assert np.isfinite(Reader(MODEL, Hostile(view=good_view(index=index)), 2).read(SEGMENTS[0])).all()


@pytest.mark.parametrize("rows", [3, 0])
@pytest.mark.parametrize("shape", [(2, 0), (2, H, LENGTH, 0)])
def test_an_index_of_no_rows_shows_none(shape, rows):
    """Among any number of them; which is allowed, as nothing was found."""
    bank, valid, positions = ("hidden", np.ones((2, rows, WIDTH))), np.ones((2, rows), bool), np.zeros((2, rows), np.int64)
    view = View(bank, valid, index=np.zeros(shape, np.int64), positions=positions)
    for merge in MERGES:
        view = dataclasses.replace(view, merge=merge, gate=np.zeros(H) if merge == "gate" else None)
        for kind in ("decoder-only", "encoder-decoder"):
            model = small_model(kind)
            out, plain = (Reader(model, memory, 2).read(SEGMENTS[0]) for memory in (Hostile(view=view), None))
            np.testing.assert_array_equal(out, plain)


@pytest.mark.parametrize("merge", MERGES)
def test_where_nothing_was_found_for_it_a_query_attends_as_without_a_memory(merge):
    """The others see what was found for them; by queries with an index of four axes, by streams with one of two."""
    model, gate = small_model("decoder-only"), np.zeros(H) if merge == "gate" else None
    plain = Reader(model, None, 2).read(SEGMENTS[0])
    for shape, found in (((2, H, LENGTH, 2), np.s_[:, :, 3:]), ((2, 2), np.s_[1])):
        index = np.full(shape, -1)
        index[found] = 1
        view = good_view(index=index, merge=merge, gate=gate, bank=("hidden", np.ones((2, 3, WIDTH))))
        out = Reader(model, Hostile(view=view, needs=()), 2).read(SEGMENTS[0])
        same = np.s_[:, :3] if len(shape) == 4 else np.s_[0]
        np.testing.assert_array_equal(out[same], plain[same])
        assert np.abs(out - plain).max() > 1e-6


@pytest.mark.parametrize("shape", [(3,), (1, 1, 1, 3), (2, 1, 1, 3), (1, H, 1, 3), (2, H, LENGTH, 3), (1, 1, 1, 1)])
def test_a_bias_goes_with_the_rows_that_an_index_takes(shape):
    """(regression)"""
    rng = np.random.default_rng(0)
    bank, bias = ("hidden", rng.standard_normal((2, 3, WIDTH))), rng.standard_normal(shape)
    index = np.array([[2, 0], [-1, 1]])
    valid = np.ones((2, 3), bool)
    view = View(bank, valid, bias=bias, positions=np.arange(3)[None].repeat(2, 0))
    hides = view.valid & (np.arange(3) == index[:, :, None]).any(axis=1)
    outs = [
        Reader(MODEL, Hostile(view=dataclasses.replace(view, **changes)), 2).read(SEGMENTS[0])
        for changes in ({"index": index}, {"valid": hides}, {"index": index, "bias": None})
    ]
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-12)
    assert bias.size == 1 or np.max(np.abs(outs[0] - outs[2])) > 1e-6


PARAMETERS = [
    (None, "parameters: expected a mapping, got NoneType"),
    ({"a": np.zeros(3)}, "parameters['a']: expected a Param, got ndarray"),
    ({3: Param((1,))}, "parameters: expected names, got 3"),
    ({"": Param((1,))}, "parameters: expected names, got ''"),
    ({"a": Param([2])}, "parameters['a']: shape: expected a tuple of sizes, got [2]"),
    ({"a": Param((-1,))}, "parameters['a']: shape: expected a tuple of sizes, got (-1,)"),
    ({"a": Param((2.0,))}, "parameters['a']: shape: expected a tuple of sizes, got (2.0,)"),
    ({"a": Param((2,), init=np.zeros(3))}, "parameters['a']: init: expected shape (2,), got (3,)"),
    ({"a": Param((2,), init=np.full(2, np.nan))}, "parameters['a']: init: holds NaN or infinity"),
    ({"a": Param((2,), init=-1.0)}, "parameters['a']: init: expected a standard deviation or an array, got -1.0"),
    ({"a": Param((2,), init="zeros")}, "parameters['a']: init: expected a standard deviation or an array, got 'zeros'"),
    ({"a": Param((2,), lr_factor=float("nan"))}, "parameters['a']: lr_factor: expected a number of at least 0, got nan"),
    ({"a": Param((2,), weight_decay="no")}, "parameters['a']: weight_decay: expected True or False, got 'no'"),
]


@pytest.mark.parametrize(("returned", "told"), PARAMETERS)
def test_nonsense_parameters_are_refused(returned, told):
    with pytest.raises(PluginError, match=r"memory 'hostile' .* failed in parameters, segment 0: ") as caught:
        small_model("decoder-only").add_memory_weights(Hostile(parameters=lambda: returned))
    assert told in str(caught.value)


# Blame


def raising(error):
    def trick(*args):
        raise error

    return trick


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(3), RecursionError("deep"), MemoryError(), AssertionError()], ids=repr)
@pytest.mark.parametrize("method", ["start", "begin", "view", "read", "write", "logits"])
def test_whatever_a_strategy_raises_is_told_with_its_place_and_kept(method, error):
    class Mine(Hostile):
        pass

    mt.register_memory("blamed", lambda: Mine(**{method: raising(error)}))
    made = mt.memory("blamed")
    with pytest.raises(PluginError) as caught:
        Reader(MODEL, made, 2).read(SEGMENTS[0])
    place = {"start": "", "begin": ", site decoder", "logits": ""}.get(method, ", site decoder, layer 0")
    told = f"{type(error).__name__}: {error}"
    assert str(caught.value) == f"memory 'blamed' (registered in this process) failed in {method}{place}, segment 0: {told}"
    assert caught.value.__cause__ is error


def test_the_segment_is_counted_and_end_and_flush_are_blamed_too():
    reader = Reader(MODEL, Hostile(begin=Rows(np.zeros((2, 1, WIDTH))), end=None, flush=raising(OSError("full"))), 2)
    reader.read(SEGMENTS[0])
    with pytest.raises(PluginError, match="failed in flush, segment 1: OSError: full"):
        reader.run.flush()
    reader.run.members[0].tricks["end"] = raising(ValueError("late"))
    with pytest.raises(PluginError, match="failed in end, site decoder, segment 1: ValueError: late"):
        reader.read(SEGMENTS[1])


def test_an_absorbing_memory_is_blamed_for_absorbing():
    class Absorbs(Hostile):
        def absorb(self, state, evicted):
            raise ValueError("full up")

    window = mt.memory("window", size=2)
    with pytest.raises(PluginError, match="failed in absorb, site decoder, layer 0, segment 0: ValueError: full up"):
        Reader(MODEL, Stack([window, Absorbs()]), 2).read(SEGMENTS[0])


def test_what_a_strategy_tells_the_user_on_purpose_keeps_its_kind():
    class Odd(FileProblem):
        def __init__(self, path, number):
            super().__init__(f"{path} {number}")

    for error, kind in ((FileProblem("path: full"), FileProblem), (InvalidValue("width"), InvalidValue), (Odd("a", 1), FileProblem)):
        with pytest.raises(kind, match=r"memory 'hostile' .* failed in view, site decoder, layer 0, segment 0: ") as caught:
            Reader(MODEL, Hostile(view=raising(error)), 2).read(SEGMENTS[0])
        assert caught.value.__cause__ is error


def test_interrupts_are_nobodys_fault():
    with pytest.raises(KeyboardInterrupt):
        Reader(MODEL, Hostile(view=raising(KeyboardInterrupt())), 2).read(SEGMENTS[0])


# What the library owns


@pytest.mark.parametrize("text", ["window:size=8,site=all", "recurrent:tokens=2", "store:top_k=3", "window:size=4+store:top_k=3"])
@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
class TestRows:
    def readers(self, text, kind, *batches):
        trial = Trial(lambda: mt.memory(text), kind)
        return [trial.reader(batch) for batch in batches]

    def test_reset_forgets_the_rows_and_no_others(self, text, kind):
        reader, steady, fresh = self.readers(text, kind, 3, 3, 3)
        tokens = random_segments(3, 3)
        for segment in tokens[:2]:
            reader.read(segment)
            steady.read(segment)
        reader.stream.begin_documents(np.array([True, False, True]))
        assert reader.run.start.tolist() == [0, 2 * LENGTH, 0]
        out, kept, new = (r.read(tokens[2]) for r in (reader, steady, fresh))
        np.testing.assert_allclose(out[[0, 2]], new[[0, 2]], atol=1e-10)
        np.testing.assert_allclose(out[1], kept[1], atol=1e-10)
        assert np.max(np.abs(out[0] - kept[0])) > 1e-6

    def test_a_write_for_part_of_the_batch_advances_those_rows_only(self, text, kind):
        reader, alone = self.readers(text, kind, 2, 1)
        tokens = random_segments(2, 4)
        for number, segment in enumerate(tokens):
            before = reader.run.dump()
            out = reader.read(segment, [LENGTH * (number % 2), LENGTH])
            np.testing.assert_allclose(out[1], alone.read(segment[1:])[0], atol=1e-10)
            if number == 2:  # row 0 paused: all it had is as it was
                after = reader.run.dump()
                for name in set(before) - {"number"}:
                    had = before[name][0]
                    np.testing.assert_array_equal(after[name][0][: len(had)] if had.ndim else after[name][0], had)
        assert reader.run.start.tolist() == [2 * LENGTH, 4 * LENGTH]

    def test_dump_load_continue_is_continue(self, text, kind):
        reader, other = self.readers(text, kind, 2, 2)
        tokens = random_segments(2, 4)
        for segment in tokens[:2]:
            reader.read(segment)
        dumped = {name: array.copy() for name, array in reader.run.dump().items()}
        other.run.load(dumped)
        other.stream.last = reader.stream.last
        for segment in tokens[2:]:
            assert other.read(segment).tobytes() == reader.read(segment).tobytes()

    def test_a_copy_goes_its_own_way(self, text, kind):
        reader, same = self.readers(text, kind, 2, 2)
        tokens = random_segments(2, 4)
        reader.read(tokens[0])
        same.read(tokens[0])
        twin = reader.copy()
        for segment in tokens[:0:-1]:
            twin.read(segment)
        for segment in tokens[1:]:
            assert reader.read(segment).tobytes() == same.read(segment).tobytes()


JOINED = [
    "window:size=7,sinks=2",
    "window:size=8,site=all",
    "recurrent:tokens=2",
    "store:top_k=3",
    "window:size=4+store:top_k=3,merge=gate",
]


@pytest.mark.parametrize("text", JOINED)
@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
class TestJoin:
    """Streams that were read apart, joined, go on as if they had been one batch from the start."""

    def test_bit_for_bit(self, text, kind):
        trial, tokens = Trial(lambda: mt.memory(text), kind), random_segments(3, 5)
        together, one, two = trial.reader(3), trial.reader(1), trial.reader(2)
        for segment in tokens[:3]:
            together.read(segment)
            one.read(segment[:1])
            two.read(segment[1:])
        one.stream.join(two.stream)
        assert one.run.batch == 3 and one.run.start.tolist() == [3 * LENGTH] * 3 and one.run.number == 3
        for segment in tokens[3:]:
            assert one.read(segment).tobytes() == together.read(segment).tobytes()
        for name, array in together.run.dump().items():
            np.testing.assert_array_equal(one.run.dump()[name], array)

    def test_streams_of_different_lengths(self, text, kind):
        trial, tokens = Trial(lambda: mt.memory(text), kind), random_segments(2, 6)
        together, short, long = trial.reader(2), trial.reader(1), trial.reader(1)
        for number, segment in enumerate(tokens[:4]):
            together.read(segment, [LENGTH * (number == 3), LENGTH])
            long.read(segment[1:])
        short.read(tokens[3][:1])
        short.stream.join(long.stream)
        assert short.run.start.tolist() == [LENGTH, 4 * LENGTH] and short.run.number == 4
        for segment in tokens[4:]:
            assert short.read(segment).tobytes() == together.read(segment).tobytes()


def open_and_decode(reader, tokens):
    """A segment up to the point where the cross site is written."""
    lengths = np.full(len(tokens), LENGTH)
    reader.stream.open(tokens, lengths, tokens)
    reader.stream.decode(tokens, lengths)


def test_streams_join_within_a_segment():
    """With the attention that their rows have received in it."""
    trial = Trial(lambda: HeavyHitters(size=8), "encoder-decoder")
    together, one, two = trial.reader(2), trial.reader(1), trial.reader(1)
    for reader, streams in ((together, slice(None)), (one, slice(0, 1)), (two, slice(1, 2))):
        reader.read(SEGMENTS[0][streams])
        open_and_decode(reader, SEGMENTS[1][streams])
    one.stream.join(two.stream)
    one.stream.finish()
    together.stream.finish()
    for name, array in together.run.dump().items():
        np.testing.assert_array_equal(one.run.dump()[name], array)
    assert one.read(SEGMENTS[2]).tobytes() == together.read(SEGMENTS[2]).tobytes()


def test_a_copy_within_a_segment_goes_its_own_way():
    trial = Trial(lambda: HeavyHitters(size=8), "encoder-decoder")
    alone, copied = trial.reader(2), trial.reader(2)
    lengths = np.full(2, LENGTH)
    for stream in (alone.stream, copied.stream):
        stream.open(SEGMENTS[0], lengths, SEGMENTS[0])
        if stream is copied.stream:
            stream.copy().decode(SEGMENTS[0], lengths)
        stream.decode(SEGMENTS[0], lengths)
        stream.finish()
    for name, array in alone.run.dump().items():
        np.testing.assert_array_equal(copied.run.dump()[name], array)


def test_a_run_of_something_else_does_not_join():
    run = Reader(MODEL, mt.memory("window", size=8), 1).run
    for other in (Reader(MODEL, mt.memory("window", size=9), 1).run, Reader(MODEL, None, 1).run):
        with pytest.raises(InvalidValue, match="other: expected a run with the same memory and model"):
            run.join(other)
    with pytest.raises(InvalidValue, match="other: expected a run with the same memory and model"):
        run.join(Reader(small_model("encoder-decoder"), mt.memory("window", size=8), 1).run)


def test_outputs_wait_for_the_end_of_a_segment_however_streams_are_reordered():
    """Within a segment, the decoder's outputs are reordered with the rest."""
    trial = Trial(lambda: KnnLM(top_k=2), "decoder-only")
    reader, plain, index = trial.reader(2), trial.reader(2), np.array([1, 0])
    for r, order in ((reader, slice(None)), (plain, index)):
        tokens, lengths = SEGMENTS[0][order], np.full(2, LENGTH)
        r.stream.open(None, lengths, tokens)
        r.stream.decode(tokens, lengths)
    reader.stream.reorder(index)
    reader.stream.finish()
    plain.stream.finish()
    for name, array in plain.run.dump().items():
        np.testing.assert_array_equal(reader.run.dump()[name], array)


def test_rows_can_be_reordered_within_a_segment():
    """As beams are, while a segment is open."""
    trial = Trial(lambda: mt.memory("window", size=8), "decoder-only")
    reader, plain = trial.reader(2), trial.reader(3)
    index = np.array([1, 0, 1])
    reader.read(SEGMENTS[0])
    plain.read(SEGMENTS[0][index])
    reader.run.open(np.array([LENGTH, 0]), SEGMENTS[1])
    reader.run.reorder(index)
    reader.run.close()
    plain.run.open(np.array([0, LENGTH, 0]), SEGMENTS[1][index])
    plain.run.close()
    reader.stream.last = plain.stream.last
    assert reader.run.start.tolist() == plain.run.start.tolist() == [LENGTH, 2 * LENGTH, LENGTH]
    np.testing.assert_allclose(reader.read(SEGMENTS[2][index]), plain.read(SEGMENTS[2][index]), atol=1e-12)


def test_a_dump_of_something_else_is_refused():
    run = Trial(lambda: mt.memory("window", size=8), "decoder-only").reader(2).run
    with pytest.raises(InvalidValue, match="expected the result of dump"):
        run.load({"start": np.zeros(2)})
    with pytest.raises(InvalidValue, match="expected the result of dump"):
        run.load({**run.dump(), "weights": np.zeros(2)})
    with pytest.raises(InvalidValue, match="expected a dump of 2 streams, got one of 3"):
        run.load(Trial(lambda: mt.memory("window", size=8), "decoder-only").reader(3).run.dump())


def test_select_streams_fills_the_shorter_with_zeros():
    a, b = np.ones((2, 3, 1)), np.full((2, 1, 1), 2.0)
    chosen = np.array([True, False])
    assert select_streams(chosen, a, b)[..., 0].tolist() == [[1, 1, 1], [2, 0, 0]]
    assert select_streams(chosen, b, a)[..., 0].tolist() == [[2, 0, 0], [1, 1, 1]]
    assert select_streams(chosen, a, a) is a
    assert isinstance(select_streams(chosen, Var(a), b), Var)


def test_a_site_or_layer_that_the_model_does_not_have_is_told():
    with pytest.raises(InvalidValue, match=r"memory 'store': works at \['cross'\], but this model has only \['decoder'\]"):
        Stream(MODEL, mt.memory("store", site="cross"), 1)
    for layers, has in ((0, r"\[\]"), (1, r"\['encoder', 'cross'\]")):
        recurrent = mt.Transformer(mt.Config(vocab_size=9, n_encoder_layers=layers, n_decoder_layers=1, decoder_mixer="ssru"))
        with pytest.raises(InvalidValue, match=rf"at \['decoder'\], but this model has only {has} \(a decoder with decoder_mixer='ssru'"):
            Stream(recurrent, mt.memory("window", site="decoder"), 1)
    for text in ("window:site=encoder", "recurrent:site=encoder"):
        with pytest.raises(InvalidValue, match=r"works at \['encoder'\], but this model has only \['decoder'\]"):
            Reader(MODEL, mt.memory(text), 1)
    for layer in (2, -3):
        with pytest.raises(InvalidValue, match=f"layer: expected -2 to 1 in this model, got {layer}"):
            Stream(MODEL, mt.memory("store", layer=layer), 1)


# Sites


class Everywhere(Memory):
    """Every method, at every site of its spec; notes where it is called."""

    def __init__(self, chosen=None, **spec):
        self.spec, self.chosen, self.called = MemorySpec(needs=frozenset({"query"}), **spec), chosen, set()

    def sites(self, dims):
        return super().sites(dims) if self.chosen is None else self.chosen

    def begin(self, state, segment):
        self.called.add(segment.site)

    def view(self, state, site, layer, segment):
        self.called.add(site)

    def read(self, state, site, layer, query):
        self.called.add(site)

    def write(self, state, site, layer, new):
        self.called.add(site)


@pytest.mark.parametrize("chosen", [None, {"cross"}, {"encoder", "decoder"}])
def test_a_strategy_is_called_at_its_sites_alone(chosen):
    memory = Everywhere(chosen)
    reader = Reader(small_model("encoder-decoder"), memory, 2)
    reader.read(SEGMENTS[0])
    assert memory.called == (chosen or {"encoder", "decoder", "cross"})
    assert {site for site in ("encoder", "decoder", "cross") if reader.run.uses(site)} == memory.called


UNEQUAL = {"d_model": 16, "n_heads": 2, "decoder_n_heads": 4, "decoder_n_kv_heads": 2}


@pytest.mark.parametrize(
    "text, site",
    [(text, site) for text in ("infini", "gated_delta", "knn") for site in ("encoder", "decoder")]
    + [(text, site) for text in ("product_keys", "prefix", "store:merge=gate", "window") for site in ("encoder", "decoder", "cross")],
)
def test_a_memory_is_told_the_heads_of_its_site(text, site):
    """And its parameters, what it keeps and what it shows have them: the library checks each shape."""
    where = f"{text}{',' if ':' in text else ':'}site={site}"
    memory = mt.memory(where)
    model = small_model("encoder-decoder", np.float32, **UNEQUAL)
    model.add_memory_weights(memory)
    reader = Reader(model, memory, 2)
    heads = {"encoder": (2, 2, 8), "decoder": (4, 2, 4), "cross": (4, 2, 4)}[site]
    (dims,) = reader.run.dims
    assert (dims.n_heads, dims.n_kv_heads, dims.d_head) == heads
    for tokens in SEGMENTS:
        assert np.isfinite(reader.read(tokens)).all()


def test_a_memory_at_sites_with_other_heads_asks_for_those_of_each():
    memory = mt.memory("prefix:tokens=3,site=all")
    model = small_model("encoder-decoder", np.float32, **UNEQUAL)
    model.add_memory_weights(memory)
    shapes = {name.rpartition(".")[2]: weight.shape for name, weight in model.weights.items() if name.startswith("memory.prefix.")}
    assert shapes["encoder_keys"][1:] == (2, 3, 8) and shapes["decoder_keys"][1:] == shapes["cross_values"][1:] == (2, 3, 4)
    reader = Reader(model, memory, 2)
    assert reader.run.dims[0].n_heads == 4, "where it reads earlier text by default"
    assert np.isfinite(reader.read(SEGMENTS[0])).all()


def test_rows_go_directly_to_a_member_at_a_site_of_its_own():
    """A window at the cross site does not stand between the encoder and a store there."""
    run = Reader(small_model("encoder-decoder"), mt.memory("window:size=8+store:site=encoder,top_k=2"), 2)
    run.read(SEGMENTS[0])
    window, store = run.run.states
    assert {name.partition(".")[0] for name in window} == {"cross"}
    assert store["encoder.0.0.positions"].tolist() == store["encoder.1.0.positions"].tolist() == [list(range(LENGTH))] * 2


def test_a_memory_at_the_cross_site_needs_no_decoder_to_read(monkeypatch):
    """Unless it wants to know the attention that its rows receive there."""
    tokenizer = ByteTokenizer()
    model = mt.Transformer(mt.Config(vocab_size=tokenizer.vocab_size, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1))
    decoded, decode = [], model.decoder
    monkeypatch.setattr(model, "decoder", lambda *args: decoded.append(1) or decode(*args))
    for memory, count in (("window:size=4+store:top_k=2", 0), (HeavyHitters(size=4, sinks=1), 3), ("window:size=4,site=decoder", 3)):
        mt.Pipeline(model, tokenizer, memory, segment_length=8).read("twenty-four characters..")
        assert len(decoded) == count, memory
        decoded.clear()


@pytest.mark.parametrize("wrong", [None, "cross", {"everywhere"}, {"encoder"}, [3]], ids=repr)
def test_sites_that_the_spec_does_not_have_are_refused(wrong):
    memory = Everywhere({"cross"}, sites=frozenset({"cross", "decoder"}))
    memory.sites = lambda dims: wrong
    with pytest.raises(
        PluginError, match=r"failed in sites, segment 0: sites: expected a set of those in spec.sites \(decoder, cross\), got "
    ):
        Reader(MODEL, memory, 1)


def test_a_strategy_is_blamed_for_its_sites():
    memory = Everywhere()
    memory.sites = raising(KeyError("where"))
    with pytest.raises(PluginError, match=r"memory 'Everywhere' .* failed in sites, segment 0: KeyError: 'where'"):
        Reader(MODEL, memory, 1)


# What is told to whom


class Listens(Memory):
    def __init__(self, *needs, site="decoder"):
        self.spec, self.heard = MemorySpec(sites=frozenset({site}), needs=frozenset(needs)), []

    def view(self, state, site, layer, segment):
        self.heard.append(("view", layer, segment))

    def write(self, state, site, layer, new):
        self.heard.append(("write", layer, new))


def heard(kind, memory, lengths=None):
    Reader(small_model(kind), memory, 2).read(SEGMENTS[0], lengths)
    return memory.heard


def test_tokens_are_what_a_row_was_made_from_and_targets_what_it_predicts():
    for kind in ("encoder-decoder", "decoder-only"):
        for _, _, said in heard(kind, Listens("tokens")):
            assert said.tokens[:, 1:].tolist() == SEGMENTS[0][:, :-1].tolist() and said.tokens[:, 0].tolist() == [1, 1]
            assert not hasattr(said, "targets") or said.targets.tolist() == SEGMENTS[0].tolist()
    for site in ("encoder", "cross"):
        (*_, (_, _, new)) = heard("encoder-decoder", Listens("tokens", site=site))
        assert new.tokens.tolist() == SEGMENTS[0].tolist() and new.targets is None


def test_what_is_not_asked_for_is_not_given():
    for _, _, said in heard("decoder-only", Listens()):
        assert said.tokens is None
        assert not hasattr(said, "targets") or (said.targets is None and said.mass is None)


def test_the_outputs_come_as_one_layer_more_once_the_segment_is_over():
    calls = [(what, layer) for what, layer, _ in heard("decoder-only", Listens("hidden"))]
    assert calls == [("view", 0), ("write", 0), ("view", 1), ("write", 1), ("write", 2)]
    assert [layer for what, layer, _ in heard("decoder-only", Listens()) if what == "write"] == [0, 1]


def test_the_cross_site_is_written_once_after_the_decoder():
    calls = [(what, layer) for what, layer, _ in heard("encoder-decoder", Listens(site="cross"))]
    assert calls == [("view", 0), ("view", 1), ("write", 0)]
    assert heard("encoder-decoder", Listens(site="cross"))[-1][2].project is None


def test_rows_say_where_they_stand():
    (*_, (_, _, new)) = heard("decoder-only", Listens(), [LENGTH, 2])
    assert new.valid.tolist() == [[True] * 5, [True, True, False, False, False]]
    assert new.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    model = small_model("encoder-decoder")
    listens = Listens(site="decoder")
    reader = Reader(model, listens, 2)
    for lengths in ([LENGTH, 2], [1, 3]):
        reader.read(SEGMENTS[0], lengths)
    assert listens.heard[-1][2].positions[:, 0].tolist() == [LENGTH, 2]


def test_keep_must_give_a_priority_a_row():
    class Bad(RowMemory):
        priorities = None

        def keep(self, scores, positions):
            return self.priorities

    for bad, told in ((np.zeros(3), r"for each of \(2, 5\) rows, got shape \(3,\)"), (np.full((2, 5), np.nan), "got NaN")):
        memory = Bad(size=4)
        memory.priorities = bad
        with pytest.raises(InvalidValue, match=f"failed in write, site decoder, layer 0, segment 0: keep: .*{told}"):
            Reader(MODEL, memory, 2).read(SEGMENTS[0])


def test_rows_that_are_none_go_before_any_that_is():
    """Even one whose priority is minus infinity."""

    class Oldest(RowMemory):
        def keep(self, scores, positions):
            return np.where(positions == 0, -np.inf, 0.0)

    reader = Reader(MODEL, Oldest(size=2), 2)
    reader.read(SEGMENTS[0], [2, 5])
    assert reader.run.states[0]["decoder.0.valid"].tolist() == [[True, True], [True, True]]


@pytest.mark.parametrize("positions", ["relative", "rotary", "sinusoidal"])
@pytest.mark.parametrize("spec", ["store:top_k=4", "window:size=8+store:top_k=4", "store:top_k=4,merge=gate", "window:size=8,site=all"])
def test_a_memory_whose_rows_were_all_forgotten_is_as_none(spec, positions):
    """Streams begin a document one after the other, so rows are held, and none of them is valid."""
    shape = {"d_model": 16, "n_heads": 2, "n_encoder_layers": 0, "n_decoder_layers": 1}
    model = mt.Transformer(mt.Config(vocab_size=40, segment_length=8, positions=positions, **shape), seed=0)
    tokens, lengths = np.random.default_rng(0).integers(3, 40, (2, 8)), np.full(2, 8)
    model.add_memory_weights(mt.memory(spec))
    stream, fresh = (Stream(model, mt.memory(spec), 2) for _ in range(2))
    stream.read(tokens, lengths)
    for streams in ([True, False], [False, True]):
        stream.begin_documents(np.array(streams))
    for _ in range(2):
        outputs = []
        for each in (stream, fresh):
            each.open(None, lengths, tokens)
            outputs.append(each.decode(tokens, lengths))
            each.finish()
        np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


class Places(RowMemory):
    """Notes where its rows and the segment stand, whenever it is asked for rows."""

    def __init__(self, site):
        super().__init__(size=6, site=site)
        self.seen = []

    def keep(self, scores, positions):
        return np.where(positions < 2, np.inf, positions)

    def view(self, state, site, layer, segment):
        view = super().view(state, site, layer, segment)
        if view is not None:
            self.seen.append((np.where(view.valid, view.positions, -1), segment.start))
        return view


@pytest.mark.parametrize(
    ("kind", "site"),
    [("encoder-only", "encoder"), ("decoder-only", "decoder"), *(("encoder-decoder", site) for site in ("encoder", "decoder", "cross"))],
)
def test_rows_stand_before_the_segment_and_the_first_are_at_0(kind, site):
    """However long the encoder's segments are, and the decoder's, and where a stream pauses."""
    memory, model = Places(site), small_model(kind)
    stream = Stream(model, memory, 2)
    for source, target in (([5, 5], [5, 3]), ([2, 5], [5, 1]), ([1, 0], [5, 0]), ([5, 2], [1, 5]), ([1, 1], [1, 1])):
        tokens = SEGMENTS[0]
        lengths = np.array(source if kind != "decoder-only" else target)
        stream.open(None if kind == "decoder-only" else tokens, lengths, tokens)
        if kind != "encoder-only":
            stream.decode(tokens, np.array(target))
        stream.finish()
    assert memory.seen
    for positions, start in memory.seen:
        assert (positions < start[:, None]).all()
    assert [row[row >= 0][:2].tolist() for row in positions] == [[0, 1]] * 2


@pytest.mark.parametrize("spec", ["window:size=6,sinks=2,site=decoder", "store:top_k=3,site=decoder"])
def test_a_short_segment_sees_no_row_of_a_decoder_in_its_future(spec, monkeypatch):
    """The last segment of a text is short: rows of the one before were placed behind its beginning."""
    model, seen = small_model("encoder-decoder"), []
    stream, views = Stream(model, mt.memory(spec), 1), MemoryRun.views

    def noting(run, site, layer, query, n_queries, **more):
        found = views(run, site, layer, query, n_queries, **more)
        seen.extend((view.positions.max() if site == "decoder" else -1) < query().positions.min() for _, view in found)
        return found

    monkeypatch.setattr(MemoryRun, "views", noting)
    for length in (LENGTH, LENGTH, 1, 2):
        stream.read(SEGMENTS[0][:1, :length], np.array([length]))
    assert seen and all(seen)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("full")])
@pytest.mark.parametrize("streams", [[True, True], [False, True]])
def test_a_reset_that_fails_changes_no_memory(error, streams):
    """One of the stack cannot begin anew: the others have not forgotten either."""
    begun = []

    def start():
        begun.append(1)
        if len(begun) == 2:
            raise error
        return {"rows": np.zeros((2, 2))}

    stack = Stack([mt.memory("window:size=8"), Hostile(needs=(), start=start)])
    reader = Reader(MODEL, stack, 2)
    reader.read(SEGMENTS[0])
    before = reader.copy()
    with pytest.raises((KeyboardInterrupt, PluginError)):
        reader.run.reset(np.array(streams))
    assert reader.read(SEGMENTS[1]).tobytes() == before.read(SEGMENTS[1]).tobytes()
    reader.run.reset(np.array(streams))
    assert (reader.run.start > 0).tolist() == [not reset for reset in streams]


def test_a_stream_is_freed_when_nobody_holds_it():
    """With all that its tape holds, at once: a training step makes one."""
    model = small_model("decoder-only")
    gc.disable()
    try:
        stream = Stream(model, mt.memory("window:size=6"), 2, weights={name: Var(x) for name, x in model.weights.items()})
        stream.open(None, np.full(2, LENGTH), SEGMENTS[0])
        stream.decode(SEGMENTS[0], np.full(2, LENGTH))
        stream.finish()
        gone = weakref.ref(stream.run)
        del stream
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("answer", [ValueError("mine"), SystemExit(3), "nonsense"], ids=["error", "exit", "nonsense"])
@pytest.mark.parametrize("method", ["documents", "compact", "reset"])
def test_what_is_asked_of_a_stack_names_the_member_that_fails(method, answer):
    def fails(self, *_):
        if isinstance(answer, BaseException):
            raise answer
        return answer

    if method == "reset" and isinstance(answer, str):
        pytest.skip("what it returns is not looked at")
    bad = type("Bad", (Memory,), {method: fails})()
    bad.name = "bad"
    with pytest.raises(PluginError, match=rf"memory 'bad' \(.*\) failed in {method}: ") as caught:
        getattr(Stack([mt.memory("window", size=2), bad]), method)(*["a"] * (method == "reset"))
    assert "segment" not in str(caught.value)


def test_documents_of_two_members_are_counted_together():
    class Two(Memory):
        def documents(self):
            return {"a": 2, "b": 1}

    assert Stack([Two(), Two()]).documents() == {"a": 4, "b": 2}


def test_streams_that_keep_their_places_are_not_copied():
    """An answer begins with such a step, and a memory may be long."""
    reader = Reader(MODEL, mt.memory("store:top_k=2,site=decoder"), 2)
    reader.read(SEGMENTS[0])
    run = reader.run.copy()
    before = dict(run.states[0])
    run.reorder(np.arange(2))
    assert all(run.states[0][name] is before[name] for name in before)
    run.reorder(np.array([1, 0]))
    assert not any(run.states[0][name] is before[name] for name in before)
