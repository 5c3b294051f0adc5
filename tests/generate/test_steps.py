"""Many sequences in one session, which others join as some end: each is what it is alone."""

import re
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from variants import tiny_model

from mini_tfm.errors import InvalidValue
from mini_tfm.generate import Session
from mini_tfm.generate.cache import KVCache
from mini_tfm.generate.steps import in_lots
from mini_tfm.stream import Stream

RNG = np.random.default_rng(6)
SOURCE, LENGTHS = RNG.integers(3, 13, (9, 12)), RNG.integers(1, 13, 9)
MODELS = ["pre norm", "t5", "rotary", "ssru", "grouped", "decoder only, llama", "decoder only, relative", "decoder only, gemma"]
NEW = 40


@pytest.fixture
def at_work(monkeypatch):
    """The rows of each step of one token."""
    rows, outputs, ahead = [], Session.outputs, KVCache.ahead

    def in_a_row(self, run, n_rows, *given):
        steps = ahead(self, run, n_rows, *given)

        def counted(*arguments):
            before = self.n_keys
            found = steps(*arguments)
            rows.extend([n_rows] * (self.n_keys - before))
            return found

        return steps and counted

    monkeypatch.setattr(KVCache, "ahead", in_a_row)
    monkeypatch.setattr(
        Session,
        "outputs",
        lambda self, tokens, n: (rows.append(len(tokens)) if tokens.shape[1] == 1 else None, outputs(self, tokens, n))[1],
    )
    return rows


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "seed": 1, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("variant", MODELS)
def test_what_joins_is_what_it_is_alone(variant, options):
    """To the last bit of its log-probabilities, past a growth of the cache."""
    model = tiny_model(variant, seed=2, dtype=np.float32)
    options = {"max_new_tokens": NEW, "output_scores": True, **options}
    joined = model.generate(SOURCE, LENGTHS, batch_tokens=400, **options)
    if "seed" in options:  # draws differ by the number of the row
        alone = model.generate(SOURCE, LENGTHS, batch_tokens=1, **options)
        assert (joined.sequences, joined.log_probs) == (alone.sequences, alone.log_probs)
    else:
        for row in range(len(SOURCE)):
            alone = model.generate(SOURCE[[row]], LENGTHS[[row]], **options)
            assert (joined.sequences[row], joined.log_probs[row]) == (alone.sequences[0], alone.log_probs[0])


def test_others_take_the_places_of_those_that_end(at_work):
    model = tiny_model("pre norm", seed=2, dtype=np.float32)

    def ends(ids, _):  # as the first token says
        return np.array([len(row) - 1 >= 1 + row[1] % 7 * 4 for row in ids])

    source = np.random.default_rng(1).integers(3, 13, (40, 6))
    options = {"max_new_tokens": 28, "stop_at_eos": False, "do_sample": True, "seed": 3, "stopping_criteria": [ends]}
    whole = model.generate(source, **options)
    assert len({len(row) for row in whole}) > 3
    at_work.clear()
    most = 8
    assert model.generate(source, batch_tokens=most * (6 + 28), **options) == whole
    assert max(at_work) <= most and sum(at_work) == sum(map(len, whole))
    of_groups = sum(max(len(row) for row in whole[i : i + most]) for i in range(0, len(whole), most))
    assert len(at_work) < 0.75 * of_groups


@pytest.mark.parametrize("variant", MODELS)
def test_steps_in_a_row_make_the_tokens_and_take_the_steps_of_one_by_one(variant, at_work):
    """Greedy search looks at its tokens after several steps; with scores asked for, after each."""
    model = tiny_model(variant, seed=2, dtype=np.float32)
    free = model.generate(SOURCE, LENGTHS, max_new_tokens=NEW, stop_at_eos=False)
    ends = [row[n] for row, n in zip(free, (0, 3, 20), strict=False)]  # some rows end early, some late, some not
    for options in ({"stop_at_eos": False}, {"eos_token_id": ends}, {"eos_token_id": ends[1:]}, {"eos_token_id": ends[2:]}):
        for batch_tokens in (None, 200, 1):
            options = {"max_new_tokens": NEW, "batch_tokens": batch_tokens, **options}
            at_work.clear()
            whole = model.generate(SOURCE, LENGTHS, output_scores=True, **options).sequences
            steps = at_work[:]
            at_work.clear()
            assert model.generate(SOURCE, LENGTHS, **options) == whole
            assert at_work == steps


def test_one_row_is_always_at_work(at_work):
    model = tiny_model("pre norm", seed=2, dtype=np.float32)
    assert len(model.generate(SOURCE, LENGTHS, max_new_tokens=5, batch_tokens=1)) == len(SOURCE)
    assert set(at_work) == {1}
    for bad in (0, True, 2.5):
        with pytest.raises(InvalidValue, match=re.escape(f"batch_tokens: expected an integer of at least 1, got {bad}")):
            model.generate(SOURCE, LENGTHS, batch_tokens=bad)


def test_an_error_names_the_row_and_the_token_that_it_is_about():
    model = tiny_model("untied", seed=2, dtype=np.float32)
    model.weights["embedding.weight"][12] = np.nan  # which one source has
    source = np.random.default_rng(1).integers(3, 12, (9, 12))
    source[LENGTHS.argmin(), 0] = 12  # the shortest source is the last to begin
    with pytest.raises(InvalidValue, match=f"token 1 of sequence {LENGTHS.argmin()} are not finite"):
        model.generate(source, LENGTHS, batch_tokens=200, max_new_tokens=30, stop_at_eos=False, suppress_tokens=[12])


def test_streams_that_have_come_differently_far_are_fed_a_token_each():
    sessions = []
    for n in (1, 2):
        stream = Stream(tiny_model("decoder only", seed=2), None, 1)
        stream.open(None, np.array([n]))
        sessions.append(Session(stream))
        sessions[-1].step(np.full((1, n), 5))
    first, second = sessions
    first.join(second)
    with pytest.raises(InvalidValue, match="tokens: expected one of each stream, where they have come differently far, got 2"):
        first.step(np.full((2, 2), 5))


def test_lots_are_of_one_kind_and_of_like_length():
    assert list(in_lots([0] * 5, [3, 9, 5, 9, 4], 1, None)) == [[1, 3, 2, 4, 0]]
    assert list(in_lots([0] * 5, [3, 9, 5, 9, 4], 1, 80)) == [[1, 3], [2, 4, 0]], "a lot takes a quarter"
    assert list(in_lots([0] * 5, [3, 9, 5, 9, 4], 2, 80)) == [[1], [3], [2, 4], [0]]
    assert list(in_lots("abaab", [3, 9, 5, 9, 4], 1, None)) == [[3], [1], [2], [4], [0]]
    assert list(in_lots([], [], 1, 7)) == []


@pytest.mark.parametrize("packed", [None, "int8"])
def test_threads_begin_at_once_on_a_model_that_nobody_has_used(packed):
    """Its weights are packed, and its steps noted, by all of them."""

    def fresh():
        model = tiny_model("t5", seed=2, dtype=np.float32)
        if packed is not None:
            model.pack(packed)
        return model

    calls = [
        {"batch_tokens": 200},
        {},
        {"num_beams": 2},
        {"do_sample": True, "seed": 1},
        {"prompt_lookup_num_tokens": 3},
        {"min_new_tokens": 9},
    ]

    def made(model, options, begin=lambda: None):
        begin()
        return model.generate(SOURCE, LENGTHS, max_new_tokens=20, **options)

    alone = [made(fresh(), options) for options in calls]
    for _ in range(3):
        model, barrier = fresh(), Barrier(len(calls))
        with ThreadPoolExecutor(len(calls)) as pool:
            assert list(pool.map(lambda options: made(model, options, barrier.wait), calls)) == alone  # noqa: B023
