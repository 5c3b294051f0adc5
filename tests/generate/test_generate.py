"""Generation: what greedy, sampling and stopping mean, and that a row never depends on its neighbours."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from variants import VARIANTS, tiny_model, tokens

import mini_tfm as mt
from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.generate import sampling
from mini_tfm.generate.options import GenerationOptions
from mini_tfm.generate.rules import cutoffs_of

WITH_DECODER = [name for name, fields in VARIANTS.items() if fields.get("n_decoder_layers") != 0]
LENGTHS = np.array([4, 1, 6, 4])


def prompt(model, seed=0):
    return tokens(np.random.default_rng(seed), 4, 6)


def generate(model, source, lengths=LENGTHS, **options):
    return model.generate(source, lengths, **{"max_new_tokens": 8, "stop_at_eos": False, **options})


@pytest.mark.parametrize("variant", WITH_DECODER)
def test_greedy_takes_the_argmax_of_teacher_forced_logits(variant):
    model = tiny_model(variant, seed=2)
    source = prompt(model)
    made = generate(model, source)
    assert [len(row) for row in made] == [8] * 4
    for b, n in enumerate(LENGTHS):
        if model.config.has_encoder:
            scores = model.logits(source[b : b + 1, :n], [made[b]])[0]
        else:
            scores = model.logits(None, [[*source[b, :n], *made[b]]])[0, n:]
        assert made[b] == np.argmax(scores, axis=1).tolist()


def test_models_say_different_things():
    """The tests here would pass on a model that repeats one token for ever."""
    model = tiny_model("pre norm", seed=2)
    made = generate(model, prompt(model))
    assert len({token for row in made for token in row}) > 3 and len({tuple(row) for row in made}) > 1


@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
def test_the_likeliest_of_one_is_greedy(variant):
    model = tiny_model(variant, seed=2)
    source = prompt(model)
    greedy = generate(model, source)
    assert generate(model, source, do_sample=True, top_k=1, seed=5) == greedy
    assert generate(model, source, do_sample=True, top_p=1e-6, seed=5) == greedy
    assert generate(model, source, do_sample=True, temperature=1e-3, seed=5) == greedy
    assert generate(model, source, do_sample=True, temperature=5.0, seed=5) != greedy


@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_does_not_depend_on_its_neighbours(variant, do_sample, dtype):
    model = tiny_model(variant, seed=2, dtype=dtype)
    source = prompt(model)
    together = generate(model, source, do_sample=do_sample, seed=3)
    others = prompt(model, seed=9)
    for b in range(4):
        changed = others.copy()
        changed[b] = source[b]
        lengths = np.where(np.arange(4) == b, LENGTHS, [2, 3, 1, 5])
        assert generate(model, changed, lengths, do_sample=do_sample, seed=3)[b] == together[b]


@pytest.mark.parametrize("variant", WITH_DECODER)
def test_ragged_prompts_are_as_if_each_were_alone(variant):
    model = tiny_model(variant, seed=2)
    source = prompt(model)
    together = generate(model, source)
    for b, n in enumerate(LENGTHS):
        assert model.generate(source[b : b + 1, :n], max_new_tokens=8, stop_at_eos=False) == [together[b]]


def test_an_empty_prompt_starts_from_bos():
    model = tiny_model("decoder only", seed=2)
    empty = generate(model, np.zeros((1, 0), int), None)
    assert empty[0][0] == int(model.logits(None, [[0]])[0, 0].argmax())
    assert generate(model, np.full((2, 3), 5), [0, 3])[0] == empty[0]


@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
def test_no_rows_and_no_tokens(variant):
    model = tiny_model(variant)
    assert model.generate(np.zeros((0, 3), int)) == []
    assert model.generate(np.full((2, 3), 4), max_new_tokens=0) == [[], []]


@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
def test_a_row_ends_at_eos_and_the_others_go_on(variant):
    model = tiny_model(variant, seed=2)
    source = prompt(model)
    endless = generate(model, source, max_new_tokens=12)
    eos = next(token for token in endless[0][1:] if any(token not in row for row in endless))
    ended = tiny_model(variant, seed=2, eos_id=int(eos))
    expected = [row[: row.index(eos)] if eos in row else row for row in endless]
    assert generate(ended, source, max_new_tokens=12, stop_at_eos=True) == expected
    assert len({len(row) for row in expected}) > 1
    assert generate(ended, source, max_new_tokens=12, stop_at_eos=False) == endless


def test_a_seed_repeats_and_another_does_not():
    model = tiny_model("pre norm", seed=2)
    source = prompt(model)
    draw = lambda seed: generate(model, source, do_sample=True, temperature=3.0, seed=seed)  # noqa: E731
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)
    same = np.repeat(source[:1], 4, axis=0)
    rows = generate(model, same, np.full(4, 6), do_sample=True, temperature=3.0, seed=1)
    assert len({tuple(row) for row in rows}) > 1, "equal rows draw apart"


# ------------------------------------------------------------------------------------------- choosing one token

NO_IDS = np.zeros((0, 0), np.int64)
PROBABILITIES = np.array([0.05, 0.4, 0.15, 0.3, 0.1])


def drawn_from(scores, options, rngs):
    """A token for each row of scores (B, V)."""
    for processor in cutoffs_of(options, 1):
        scores = processor(NO_IDS, scores, NO_IDS)
    return [sampling.draw(row, rng) for row, rng in zip(scores, rngs, strict=True)]


def shares(n=20_000, **options):
    """How often each of the five is drawn."""
    chosen = GenerationOptions(do_sample=True, **options)
    draws = [np.random.default_rng(i) for i in range(2)]
    counts = np.zeros(5)
    scores = np.tile(np.log(PROBABILITIES) + 7, (n // 2, 1))  # a constant does not matter
    for rng in draws:
        counts += np.bincount(drawn_from(scores, chosen, [rng] * (n // 2)), minlength=5)
    return counts / n


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITIES),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 5}, PROBABILITIES),
        ({"top_k": 99}, PROBABILITIES),
        ({"top_p": 0.39}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.71}, [0, 0.4 / 0.85, 0.15 / 0.85, 0.3 / 0.85, 0]),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7, 0]),  # of the three, 0.4 / 0.85 alone is too little
        ({"temperature": 0.5}, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        ({"temperature": 2.0}, PROBABILITIES**0.5 / (PROBABILITIES**0.5).sum()),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_their_probabilities_say(options, expected):
    found = shares(**options)
    np.testing.assert_allclose(found, expected, atol=0.015)  # about four standard deviations
    np.testing.assert_array_equal(found[np.asarray(expected) == 0], 0)


def test_equals_of_the_last_of_top_k_are_drawn_too():
    chosen = GenerationOptions(do_sample=True, top_k=2)
    drawn = drawn_from(np.tile([1.0, 0, 0, 0, -1], (200, 1)), chosen, [np.random.default_rng(0)] * 200)
    assert set(drawn) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [1e-310, 1e-30, 1e-3])
def test_the_smallest_temperature_is_greedy(temperature):
    chosen = GenerationOptions(do_sample=True, temperature=temperature)
    for dtype in (np.float32, np.float64):
        assert drawn_from(np.array([[-3.0, 2.0, 1.0]], dtype), chosen, [np.random.default_rng(0)]) == [1]


@pytest.mark.parametrize("drawn", [0.0, 0.5, 1 - 2**-53])
def test_a_token_of_probability_zero_is_never_drawn(drawn):
    class Draws:
        def random(self):
            return drawn

    assert sampling.draw(np.array([-1e6, 0.0, 0.0, -1e6]), Draws()) in (1, 2)


def test_extreme_scores_are_drawn_without_overflow():
    chosen = GenerationOptions(do_sample=True, temperature=0.01)
    scores = np.array([[1e30, -1e30, 0.0], [-np.inf, -np.inf, 0.0]], np.float32)
    assert drawn_from(scores, chosen, [np.random.default_rng(0)] * 2) == [0, 2]


# ------------------------------------------------------------------------------------------- options

BAD = {
    "max_new_tokens": [-1, 1.5, "8", None, True],
    "temperature": [0, -1.0, float("inf"), float("nan"), "1", None],
    "top_k": [-1, 1.0, None],
    "top_p": [0, 1.1, -0.5, float("nan"), None, "all"],
    "seed": [-1, 1.5, "a"],
    "num_beams": [0, 1.5, None],
    "early_stopping": ["always", None, 1],
    "eos_token_id": [-1, 1.0, "2", [], [[1]], True],
    "stop_strings": ["", [], [""], 3],
    "bad_words_ids": [3, [3], [[]], [[-1]], []],
    "sequence_bias": [{}, {(): 1.0}, {(1,): "a"}, {(1,): float("nan")}, {(1,): float("inf")}, 3],
    "choices": ["text", [], [""], [[]], [3]],
    "logits_processor": [3, [3]],
    "prefix_allowed_tokens_fn": [3, "f"],
    "max_time": [0, -1, "1"],
    "length_penalty": [None, float("nan"), "1"],
    "do_sample": ["no", None, 1],
    "stop_at_eos": ["no", None, 0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=str)
def test_options_are_checked(name, value):
    with pytest.raises(InvalidValue, match=f"generate: {name}: expected"):
        tiny_model().generate(np.full((1, 2), 4), **{name: value})


def test_all_faults_are_told_at_once():
    with pytest.raises(InvalidValue, match=r"max_new_tokens.*temperature.*top_k.*top_p.*seed"):
        GenerationOptions(do_sample=True, max_new_tokens=-1, top_k=-1, temperature=0, top_p=2, seed=-1)


def test_an_unknown_option_is_named_with_those_there_are():
    with pytest.raises(InvalidType, match=r"unknown option 'max_lenght' .*'max_length'.*; it takes max_new_tokens, min_new"):
        tiny_model().generate(np.full((1, 2), 4), max_lenght=8)


@pytest.mark.parametrize("generations", [80, pytest.param(1000, marks=pytest.mark.long)])
def test_threads_share_a_model(generations):
    """Eight at once: each text is the one that a thread alone gets."""
    model = tiny_model("decoder only", seed=2, dtype=np.float32)
    sources = [prompt(model, seed) for seed in range(10)]
    write = lambda number: generate(model, sources[number % 10], do_sample=True, seed=number)  # noqa: E731
    alone = [write(number) for number in range(generations)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(write, range(generations))) == alone


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what a process holds is asked of /proc")
@pytest.mark.parametrize("cycles", [100, pytest.param(10_000, marks=[pytest.mark.long])])
def test_models_that_are_let_go_leave_nothing(cycles, tmp_path):
    tiny_model("pre norm", dtype=np.float32).save(tmp_path / "m")

    def cycle():
        model = mt.load(tmp_path / "m")
        generate(model, prompt(model))

    def held():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for _ in range(30):
        cycle()
    before = held()
    for _ in range(cycles):
        cycle()
    assert held() - before < 4 << 20
