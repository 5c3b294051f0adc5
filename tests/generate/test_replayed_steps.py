"""Decoding steps that are noted and run again without Python: the same bits, whatever happens to the streams in between."""

import os
import signal
import threading

import numpy as np
import pytest
from helpers import assert_same_bits
from variants import VARIANTS, tiny_model

import mini_tfm as mt
from mini_tfm import _core
from mini_tfm.errors import InvalidValue
from mini_tfm.generate import Session
from mini_tfm.generate.beams import Pool
from mini_tfm.generate.cache import FIRST_CAPACITY
from mini_tfm.stream import Stream

RNG = np.random.default_rng(3)
SOURCE = RNG.integers(3, 13, (5, 9))
LENGTHS = np.array([9, 4, 7, 9, 5])
TOKENS = RNG.integers(3, 13, (5, 3 * FIRST_CAPACITY))
DECODERS = [name for name in VARIANTS if not name.startswith(("encoder", "bert"))]

compiled = pytest.mark.skipif(_core.Program.__module__.startswith("mini_tfm.reference"), reason="the twins' steps are Python")


def session_of(model, memory=None, rows=5, cache_dtype=None):
    stream = Stream(model, memory, rows)
    if memory is not None:
        stream.read(SOURCE[:rows, :6], np.full(rows, 6))
    stream.open(SOURCE[:rows] if model.config.has_encoder else None, LENGTHS[:rows] if model.config.has_encoder else np.full(rows, 9))
    return Session(stream, cache_dtype=cache_dtype)


def program_of(session):
    return session.cache._program[0]


class InPython:
    """A program that notes nothing."""

    ready, hopeless, batch = False, True, 0

    def note(self, step, x):
        return step(x)


def both(monkeypatch, work):
    """What `work` gives with steps that are run again, and with all of them in Python."""
    found = work()
    with monkeypatch.context() as patch:
        patch.setattr(_core, "Program", InPython)
        expected = work()
    return found, expected


@compiled
@pytest.mark.parametrize("packed, cache_dtype", [(None, None), (None, "int8"), ("bfloat16", None), ("int8", None)])
@pytest.mark.parametrize("variant", DECODERS)
def test_steps_have_the_bits_of_python(variant, packed, cache_dtype, monkeypatch):
    """Beyond two growths of the cache, with rows that leave on the way."""
    ready = []

    def work():
        longer = {"max_positions": 100} if VARIANTS[variant].get("positions") == "learned" else {}
        model = tiny_model(variant, seed=2, dtype=np.float32, **longer)
        if packed:
            model.pack(packed)
        session, found, rows = session_of(model, cache_dtype=cache_dtype), [], np.arange(5)
        for i in range(TOKENS.shape[1]):
            if i in (10, 50):
                stay = np.array([0, 2, 3] if i == 10 else [0, 2])
                session.reorder(stay)
                rows = rows[stay]
            found.append(session.scores(session.step(TOKENS[rows, i : i + 1])))
            ready.append(bool(getattr(program_of(session), "ready", False)))
        return found

    found, expected = both(monkeypatch, work)
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)
    n = TOKENS.shape[1]
    assert any(ready[:n]) and not any(ready[n:])


@compiled
@pytest.mark.parametrize("variant", ["pre norm", "t5", "decoder only, llama", "marian", "ssru", "decoder only, qwen"])
def test_beams_that_change_places_have_the_bits_of_python(variant, monkeypatch):
    rng = np.random.default_rng(1)
    moves = [rng.integers(0, 5, 5) for _ in range(40)]

    def work():
        session, found = session_of(tiny_model(variant, seed=2, dtype=np.float32)), []
        for i, move in enumerate(moves):
            found.append(session.step(TOKENS[:, i : i + 1]))
            session.reorder(move)
        return found

    for one, other in zip(*both(monkeypatch, work), strict=True):
        assert_same_bits(one, other)


@compiled
@pytest.mark.parametrize("variant", ["decoder only, llama", "t5", "ssru"])
def test_streams_that_become_fewer_and_more_again_have_the_bits_of_python(variant, monkeypatch):
    """More rows are in other arrays, also where they are no more than were noted; sources keep having unequal numbers of rows."""

    def work():
        session, found = session_of(tiny_model(variant, seed=2, dtype=np.float32), rows=2), []
        moves = {0: [0, 0, 0, 0, 1, 1, 1], 4: [0, 1, 4, 5, 6], 7: [0, 1, 2, 3, 4, 4], 10: [5, 1, 2, 3]}
        for i in range(14):
            rows = len(session.numbers)
            found.append(session.step(TOKENS[np.arange(rows) % 5, i : i + 1]))
            if i in moves:
                session.reorder(np.array(moves[i]))
        return found

    for one, other in zip(*both(monkeypatch, work), strict=True):
        assert_same_bits(one, other)


@compiled
@pytest.mark.parametrize("variant", ["rotary", "t5", "learned", "decoder only, llama", "ssru", "decoder only, qwen"])
def test_streams_that_join_at_different_steps_have_the_bits_of_python(variant, monkeypatch):
    """In place where others have left, past a growth of the cache; steps of streams that have come differently far are run again, too."""
    ready = []

    def work():
        longer = {"max_positions": 100} if VARIANTS[variant].get("positions") == "learned" else {}
        model = tiny_model(variant, seed=2, dtype=np.float32, **longer)
        one, others, found = session_of(model, rows=5), [session_of(model, rows=n) for n in (2, 3, 2)], []
        joins = {4: (others[0], 3), 9: (others[1], 5), 30: (others[2], 1)}
        for i in range(45):
            found.append(one.scores(one.step(TOKENS[np.arange(one.batch) % 5, i : i + 1])))
            ready.append(bool(getattr(program_of(one), "ready", False)))
            if i == 3:
                one.reorder(np.array([4, 1, 2]))
            if i == 29:
                one.reorder(np.array([7, 0, 5, 3, 1]))
            if i in joins:
                other, n = joins[i]
                for k in range(n):
                    other.step(TOKENS[: other.batch, k : k + 1])
                one.join(other)
        return found

    found, expected = both(monkeypatch, work)
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)
    assert ready[8] and ready[20] and ready[40] and ready[:45].count(False) < 16


@compiled
@pytest.mark.parametrize("packed, cache_dtype", [(None, None), (None, "int8"), ("bfloat16", None), ("int8", None)])
@pytest.mark.parametrize("variant", DECODERS)
def test_greedy_steps_in_a_row_have_the_bits_of_python(variant, packed, cache_dtype, monkeypatch):
    """The tokens, and what comes after them: scores of a step that shows what the cache has become. With rows that have left."""
    longer = {"max_positions": 100} if VARIANTS[variant].get("positions") == "learned" else {}
    model, ends = tiny_model(variant, seed=2, dtype=np.float32, **longer), np.zeros(0, np.int64)
    if packed:
        model.pack(packed)
    without_python = []

    def work():
        session, found, tokens = session_of(model, cache_dtype=cache_dtype), [], TOKENS[:, :1]
        tokens = session.best(session.step(tokens))[:, None]
        for i, n in enumerate((1, 5, 16, 3, 40)):
            if i == 2:
                session.reorder(np.array([0, 2, 3]))
                tokens = tokens[[0, 2, 3]]
            found.append(session.best_of_next(tokens, n, ends))
            tokens = found[-1][:, -1:]
            found.append(session.scores(session.step(tokens)))
            tokens = np.argmax(found[-1], axis=1)[:, None]
            found.append(np.array([session.cache.n_keys, session.cache.positions[0], *session.n_steps]))
        return found

    run = _core.Program.run_greedily

    class Counting(_core.Program):
        def run_greedily(self, *given):
            found = run(self, *given)
            without_python.append(found[0].shape[1])
            return found

    monkeypatch.setattr(_core, "Program", Counting)
    found, expected = both(monkeypatch, work)
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)
    assert sum(without_python) > 45, "of 65, but for those that are noted"


@compiled
def test_a_beam_whose_scores_are_not_finite_is_an_error_at_its_step(monkeypatch):
    """Also where the other beams have enough to go on with."""
    found = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        model = tiny_model("untied", seed=seed, dtype=np.float32, vocab_size=40)
        model.weights["embedding.weight"][rng.integers(3, 40, 3)] = np.nan

        def work(model=model):
            try:
                return model.generate(np.array([[3, 4, 5]]), max_new_tokens=30, num_beams=3, stop_at_eos=False)
            except InvalidValue as error:
                return str(error)

        found.append(both(monkeypatch, work))
    assert all(one == other for one, other in found)
    assert sum("not finite" in one for one, _ in found) > 3


@compiled
@pytest.mark.parametrize("variant", ["learned", "bart", "marian", "t5"])
def test_weights_that_c_cannot_read_where_they_lie_are_read_by_python(variant, tmp_path, monkeypatch):
    """Mapped, or unaligned: what follows is the same."""
    longer = {"max_positions": 100} if VARIANTS[variant].get("positions") == "learned" else {}
    model = tiny_model(variant, seed=2, dtype=np.float32, **longer)
    names = [name for name in model.weights if name in ("embedding.weight", "decoder.positions.weight", "output.bias")]
    expected = model.generate(SOURCE, LENGTHS, max_new_tokens=40, stop_at_eos=False)

    def mapped(array):
        np.save(tmp_path / "w.npy", array)
        return np.load(tmp_path / "w.npy", mmap_mode="r")

    def unaligned(array):
        return np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)

    for name in names:
        plain = model.weights[name]
        for changed in (mapped, unaligned):
            model.weights[name] = changed(plain)
            for beams in (1, 3):
                found = model.generate(SOURCE, LENGTHS, max_new_tokens=40, stop_at_eos=False, num_beams=beams)
                assert beams > 1 or found == expected, (name, changed)
        model.weights[name] = plain


@compiled
def test_more_beams_than_the_vocabulary_has_room_for(monkeypatch):
    """Fewer candidates than are asked for: the steps are Python's, and the same."""
    model = tiny_model("decoder only, llama", seed=2, dtype=np.float32)
    n = model.config.vocab_size
    for width in (n // 2 + 1, n - 1):
        options = {"num_beams": width, "num_return_sequences": width, "max_new_tokens": 9, "stop_at_eos": False}
        found, expected = both(monkeypatch, lambda options=options: model.generate(SOURCE[:2, :4], **options))
        assert found == expected


@compiled
def test_greedy_steps_end_with_the_first_that_is_an_end_or_not_finite():
    model = tiny_model("decoder only, llama", seed=2, dtype=np.float32)

    def made(n, ends=(), begin=3):
        session = session_of(model)
        session.step(TOKENS[:, :1])
        for i in range(1, begin):
            session.step(TOKENS[:, i : i + 1])
        return session, session.best_of_next(TOKENS[:, begin : begin + 1], n, np.array(ends, np.int64))

    session, whole = made(20)
    assert whole.shape == (5, 20) and (session.n_steps == 23).all() and session.cache.n_keys == 23
    end = whole[2, 11]
    first = int((whole == end).any(axis=0).argmax()) + 1
    session, found = made(20, [999, end])
    assert_same_bits(found, whole[:, :first])
    assert (session.n_steps == 3 + first).all() and session.cache.n_keys == 3 + first
    model.weights["embedding.weight"][whole[1, 4]] = np.nan
    with pytest.raises(InvalidValue, match=r"the scores of token \d+ of sequence \d are not finite"):
        made(20)


def generated(monkeypatch, model, counts, **options):
    """Beams with their scores, by steps in a row, and step by step in Python; counts: of the steps that each call ran in a row."""

    class Counting(_core.Program):
        def run_beams(self, *given):
            found = super().run_beams(*given)
            counts.append(found[2].shape[1] + 1)
            return found

    source = SOURCE if model.config.has_encoder else SOURCE[:, :5]
    lengths = LENGTHS if model.config.has_encoder else None
    monkeypatch.setattr(_core, "Program", Counting)
    given = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 70, **options}

    def work():
        found = []
        with monkeypatch.context() as patch:
            patch.setattr(Pool, "add", lambda pool, one, add=Pool.add: (found.append((one.ids, one.log_prob)), add(pool, one))[1])
            return [np.array(row) for each in model.generate(source, lengths, **given) for row in each], found

    return both(monkeypatch, work)


@compiled
@pytest.mark.parametrize("packed", [None, "int8"])
@pytest.mark.parametrize("variant", DECODERS)
def test_beams_in_a_row_are_those_of_python(variant, packed, monkeypatch):
    """Their tokens, and their scores to the last bit, past two growths of the cache; also where some end on the way."""
    longer = {"max_positions": 100} if VARIANTS[variant].get("positions") == "learned" else {}
    model, counts = tiny_model(variant, seed=2, dtype=np.float32, **longer), []
    if packed:
        model.pack(packed)
    free, expected = generated(monkeypatch, model, counts, stop_at_eos=False)
    for one, other in zip(free[0], expected[0], strict=True):
        assert_same_bits(one, other)
    assert free[1] == expected[1] and len(free[1]) == 15
    goes_on = not any(name in variant for name in ("ssru", "gemma"))  # whose states move, and whose scores are capped
    assert (sum(counts) > 55 and max(counts) > 10) if goes_on else not counts
    ends = [int(free[0][i][n]) for i, n in ((0, 4), (4, 20), (7, 50))]
    for options in ({"eos_token_id": ends[:1]}, {"eos_token_id": ends}, {"eos_token_id": ends[1:], "early_stopping": True}):
        found, expected = generated(monkeypatch, model, counts, **options)
        for one, other in zip(found[0], expected[0], strict=True):
            assert_same_bits(one, other)
        assert found[1] == expected[1]


@compiled
def test_a_handler_that_raises_ends_greedy_steps(monkeypatch):
    """Between two steps, however short they are."""
    model = tiny_model("decoder only, llama", seed=2, dtype=np.float32)
    session = session_of(model)
    for i in range(3):
        session.step(TOKENS[:, i : i + 1])
    session.cache._grow(1 << 20)
    session.cache.forget_step()
    for i in range(2):
        session.step(TOKENS[:, i : i + 1])
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        session.best_of_next(TOKENS[:, :1], 1 << 19, np.zeros(0, np.int64))
    timer.join()


MEMORIES = {
    "window:size=9,sinks=2,site=decoder": True,
    "recurrent:tokens=2": True,
    "store:top_k=3,site=decoder": False,
    "window:size=9,site=decoder+store:top_k=3,site=decoder": False,
    "infini": False,
}


@compiled
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_with_a_memory_steps_have_the_bits_of_python(memory, cache_dtype, monkeypatch):
    """Rows that stay while a segment is decoded are part of the step; a memory that is asked at every token stops that."""
    ready = []

    def work():
        model, made = tiny_model("decoder only, llama", seed=2, dtype=np.float32), mt.memory(memory)
        model.add_memory_weights(made, 1)
        session, found = session_of(model, made, cache_dtype=cache_dtype), []
        for i in range(12):
            found.append(session.scores(session.step(TOKENS[:, i : i + 1])))
            if i == 7:
                session.reorder(np.array([1, 0, 3]))
                session.reorder(np.array([0, 1, 2, 2, 1]))
        ready.append(bool(getattr(program_of(session), "ready", False)))
        return found

    for one, other in zip(*both(monkeypatch, work), strict=True):
        assert_same_bits(one, other)
    assert ready == [MEMORIES[memory], False]


@compiled
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "seed": 4}, {"num_return_sequences": 2, "do_sample": True, "seed": 1}]
)
def test_generation_is_the_same(options, monkeypatch):
    def work():
        return tiny_model("t5", seed=2, dtype=np.float32).generate(SOURCE, LENGTHS, max_new_tokens=50, **options)

    found, expected = both(monkeypatch, work)
    assert found == expected


@compiled
def test_threads_that_decode_at_the_same_time_note_their_own_steps(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    model = tiny_model("t5", seed=2, dtype=np.float32)
    alone = [model.generate(SOURCE[i : i + 1], LENGTHS[i : i + 1], max_new_tokens=40) for i in range(5)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            assert list(pool.map(lambda i: model.generate(SOURCE[i : i + 1], LENGTHS[i : i + 1], max_new_tokens=40), range(5))) == alone


# The program itself


def linear(n=8):
    return _core.pack(RNG.standard_normal((n, n)).astype(np.float32))


def noted(step, times=2, batch=2):
    program = _core.Program()
    for _ in range(times):
        program.note(step, RNG.standard_normal((batch, 1, 8)).astype(np.float32))
    return program


@compiled
def test_a_step_with_something_that_no_kernel_has_computed_is_not_run_again():
    w = linear()
    plain = noted(lambda x: _core.packed_linear(x, w))
    assert plain.ready and not plain.hopeless
    for step in (
        lambda x: _core.packed_linear(x * 2, w),
        lambda x: _core.packed_linear(x, w) + 1,
        lambda x: _core.packed_linear(x, w, RNG.standard_normal(8).astype(np.float32)),
        lambda x: _core.packed_linear(_core.softmax(x), w),
        lambda x: _core.recurrence(x, _core.packed_linear(x, w), np.zeros((2, 8), np.float32)),
        lambda x: _core.packed_linear(x, linear()),
        lambda x: x,
    ):
        program = noted(step)
        assert program.hopeless and not program.ready
        program.note(step, np.ones((2, 1, 8), np.float32))  # and is not noted again


@compiled
def test_what_a_program_is_given_is_checked():
    w = linear()
    program = noted(lambda x: _core.packed_linear(x, w))
    x = np.ones((2, 1, 8), np.float32)
    assert_same_bits(program.run(x, 1), _core.packed_linear(x, w))
    assert_same_bits(program.run(x[:1], 1), _core.packed_linear(x[:1], w))
    for bad, keys in ((np.ones((3, 1, 8), np.float32), 1), (np.ones((2, 1, 7), np.float32), 1), (x.astype(np.float64), 1), (x, 0)):
        with pytest.raises(InvalidValue, match="x: expected"):
            program.run(bad, keys)
    with pytest.raises(InvalidValue, match="ready"):
        _core.Program().run(x, 1)


@compiled
def test_what_greedy_steps_are_given_is_checked():
    w = linear()
    program, x = noted(lambda x: _core.packed_linear(x, w)), np.ones((2, 1, 8), np.float32)
    table = RNG.standard_normal((8, 8)).astype(np.float32)
    good = {
        "tokens": np.array([3, 7]),
        "keys": 1,
        "steps": 4,
        "ends": np.zeros(0, np.int64),
        "feed": _core.Feed(table, 2.0, table),
        "choice": _core.Choice(linear(), 0.5, table[0]),
        "position": np.array([0]),
        "owners": np.zeros((2, 4), np.int64),
    }
    ids, scores = program.run_greedily(**good)
    assert ids.shape == (2, 4) and scores.shape == (2,) and good["position"] == 4
    wrong = {
        "tokens": [np.array([1, 2, 3]), np.array([[1, 2]]), np.array([1, 2], np.int32), [1, 2]],
        "keys": [0],
        "steps": [0],
        "ends": [np.array([1.0])],
        "feed": [
            _core.Feed(table[:, :7]),
            _core.Feed(table.astype(np.float64)),
            _core.Feed(table, None, table[:3]),
            _core.Feed(table[:, ::-1]),
            _core.Feed(table[:7]),
        ],
        "choice": [
            _core.Choice(linear(7)),
            _core.Choice(_core.pack(np.ones((8, 9), np.float32))),
            _core.Choice(_core.pack(np.ones((8, 8), np.float32), gate=np.ones((8, 8), np.float32))),
            _core.Choice(_core.pack(np.ones((8, 8)), dtype="float64")),
            _core.Choice(linear(), None, table[0, :7]),
            _core.Choice(linear(), None, None, np.arange(7)),
            _core.Choice(linear(), None, None, np.arange(1, 9)),
        ],
        "position": [np.array([5]), np.array([-1]), np.array([0, 1])],
        "owners": [np.zeros((2, 3), np.int64), np.zeros(8, np.int64)],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(InvalidValue, match=name):
                program.run_greedily(**{**good, "position": np.array([0]), name: value})
    with pytest.raises(InvalidValue, match="run_greedily: expected a program that is ready"):
        _core.Program().run_greedily(**good)
    beams = {**good, "scores": np.zeros(2), "width": 2, "k": 4}
    log_probs, ids, parents, chosen = program.run_beams(**{**beams, "position": np.array([0])})
    assert log_probs.shape == ids.shape == (2, 4) and parents.shape == chosen.shape == (2, 3) and beams["scores"].all()
    for name, bad in (("width", 0), ("width", 3), ("k", 1), ("owners", None), ("scores", np.zeros(3)), ("scores", np.zeros(2, np.float32))):
        with pytest.raises(InvalidValue, match=r"width|scores"):
            program.run_beams(**{**beams, "position": np.array([0]), name: bad})
    with pytest.raises(InvalidValue, match="run_beams: expected a program that is ready"):
        _core.Program().run_beams(**beams)
    assert_same_bits(program.run(x, 1), _core.packed_linear(x, w))


@compiled
def test_what_raises_is_not_noted():
    program = _core.Program()
    with pytest.raises(ZeroDivisionError):
        program.note(lambda x: 1 / 0, np.ones((2, 1, 8), np.float32))
    w = linear()
    for _ in range(2):
        program.note(lambda x: _core.packed_linear(x, w), np.ones((2, 1, 8), np.float32))
    assert program.ready


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_are_kept_where_they_belong(dtype):
    store, rows = np.zeros((2, 3, 8, 4), dtype), RNG.standard_normal((2, 2, 3, 4)).astype(dtype).swapaxes(1, 2)
    expected = store.copy()
    expected[:, :, 5:7] = rows
    _core.keep_rows(store, 5, rows)
    assert_same_bits(store, expected)
    expected[0, :, 1:3], expected[1, :, 3:5] = rows
    _core.keep_rows(store, np.array([1, 3]), rows)
    assert_same_bits(store, expected)
    wrong = [7, -1, np.array([2, 7]), np.array([-1, 4]), np.array([4, 4, 4])]
    for arguments in (*((store, at, rows) for at in wrong), (store, 0, rows[:, :2]), (store[0], 0, rows)):
        with pytest.raises(InvalidValue):
            _core.keep_rows(*arguments)
