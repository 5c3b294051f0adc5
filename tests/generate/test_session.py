"""A decoding session: what its steps give, and its streams dropped, repeated, sorted and joined at any of them."""

import copy
import pickle

import numpy as np
import pytest
from helpers import assert_same_bits
from variants import tiny_model

import mini_tfm as mt
from mini_tfm import _core
from mini_tfm.errors import InvalidValue
from mini_tfm.generate import Session
from mini_tfm.generate.cache import FIRST_CAPACITY
from mini_tfm.stream import Stream

VARIANTS_OF_OUTPUTS = ["pre norm", "untied", "bart", "marian", "decoder only, gemma"]
VARIANTS = ["pre norm", "relative", "rotary", "decoder only", "ssru"]
WITHOUT_MEMORIES = [*VARIANTS, "decoder only, ssru"]
MEMORIES = [None, "window:size=9,sinks=2,site=all", "recurrent:tokens=2", "store:top_k=3", "window:size=4+store:top_k=3"]
RNG = np.random.default_rng(5)
TEXT = RNG.integers(3, 13, (5, 24))


def model_for(variant, memory=None, dtype=np.float32):
    model = tiny_model(variant, seed=3, dtype=dtype)
    if memory is not None:
        model.add_memory_weights(memory, 1)
    return model


def begun(model, memory, rows, *, read=2, length=6):
    """A session of the streams `rows` of TEXT, which have read some segments of it."""
    stream = Stream(model, memory, len(rows))
    for t in range(read):
        stream.read(TEXT[rows, 6 * t : 6 * t + 6], np.full(len(rows), 6))
    source = TEXT[rows, 12 : 12 + length]
    stream.open(source if model.config.has_encoder else None, np.full(len(rows), length))
    return Session(stream)


def steps(session, tokens):
    """Scores (B, n, V) after each of tokens (B, n)."""
    return np.stack([session.scores(session.step(tokens[:, i : i + 1])) for i in range(tokens.shape[1])], axis=1)


@pytest.mark.parametrize("variant", WITHOUT_MEMORIES)
def test_decoding_past_every_growth_of_the_cache_is_full_decoding(variant):
    model = model_for(variant, dtype=np.float64)
    n = 4 * FIRST_CAPACITY + 3
    target = np.random.default_rng(1).integers(3, 13, (2, n))
    stream = Stream(model, None, 2)
    stream.open(TEXT[:2, :7] if model.config.has_encoder else None, np.array([7, 5]))
    inputs, session = stream.shifted(target), Session(stream)
    found = steps(session, inputs)
    whole = model.logits(*((TEXT[:2, :7], target, [7, 5]) if model.config.has_encoder else (None, target)))
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-10 * np.abs(whole).max())


PAST_GROWTHS = 2 * FIRST_CAPACITY + 5  # tokens
AROUND_GROWTHS = [n for capacity in (FIRST_CAPACITY, 2 * FIRST_CAPACITY) for n in range(capacity - 1, capacity + 3)]


def full_decoding(model, tokens, length=6):
    """Scores (V,) of what follows the decoded tokens of each (stream of TEXT, tokens): a forward pass alone, without a cache."""
    found = []
    for row, decoded in tokens:
        target = np.append(decoded[1:], 0)[None]  # what is fed is the target before: the last one is not read
        source = TEXT[[row], 12 : 12 + length] if model.config.has_encoder else None
        found.append(model.logits(source, target, *([[length]] if model.config.has_encoder else []))[0, -1])
    return np.stack(found)


@pytest.mark.parametrize("variant", WITHOUT_MEMORIES)
def test_beams_past_every_growth_of_the_cache_are_full_decoding(variant):
    """At every step a beam goes on from any of those before: streams dropped, repeated and sorted while the cache grows."""
    model, rng = model_for(variant, dtype=np.float64), np.random.default_rng(7)
    session = begun(model, None, [0, 1, 2], read=0)
    rows, decoded = np.arange(3), np.zeros((3, 0), np.int64)
    for n in range(1, PAST_GROWTHS):
        fed = np.full((3, 1), model.config.bos_id) if n == 1 else rng.integers(3, 13, (3, 1))
        decoded = np.concatenate([decoded, fed], axis=1)
        scores = session.scores(session.step(fed))
        if n in AROUND_GROWTHS or n == PAST_GROWTHS - 1:
            whole = full_decoding(model, zip(rows, decoded, strict=True))
            np.testing.assert_allclose(scores, whole, rtol=0, atol=1e-10 * np.abs(whole).max())
        beams = rng.integers(0, 3, 3)
        session.reorder(beams)
        rows, decoded = rows[beams], decoded[beams]


@pytest.mark.parametrize("variant", WITHOUT_MEMORIES)
def test_joined_streams_past_every_growth_of_the_cache_are_full_decoding(variant):
    """Streams that have come differently far reach the end of the room at different steps."""
    model, rng = model_for(variant, dtype=np.float64), np.random.default_rng(8)
    first, second = begun(model, None, [0, 1], read=0), begun(model, None, [2], read=0)
    bos = np.full((3, 1), model.config.bos_id)
    tokens = np.concatenate([bos, rng.integers(3, 13, (3, 20 + PAST_GROWTHS))], axis=1)
    steps(first, tokens[:2, :3])
    steps(second, tokens[2:, :20])
    first.join(second)
    done = np.array([3, 3, 20])
    for _ in range(PAST_GROWTHS):
        scores = first.scores(first.step(tokens[np.arange(3), done][:, None]))
        done = done + 1
        if np.isin(done, AROUND_GROWTHS).any():
            whole = full_decoding(model, [(row, tokens[row, :n]) for row, n in enumerate(done)])
            np.testing.assert_allclose(scores, whole, rtol=0, atol=1e-10 * np.abs(whole).max())


@pytest.mark.parametrize("variant", WITHOUT_MEMORIES)
def test_what_is_generated_past_every_growth_of_the_cache_is_the_argmax_without_one(variant):
    model = model_for(variant, dtype=np.float64)
    prompts, n = TEXT[:2, 12:18], PAST_GROWTHS
    for prompt, made in zip(prompts, model.generate(prompts, max_new_tokens=n, stop_at_eos=False), strict=True):
        if model.config.has_encoder:
            whole = model.logits(prompt[None], np.array(made)[None])[0]
        else:
            whole = model.logits(None, np.concatenate([prompt, made])[None])[0, len(prompt) :]
        assert made == whole.argmax(-1).tolist()


@pytest.mark.parametrize("spec", MEMORIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_streams_are_dropped_repeated_and_sorted(variant, spec):
    """Each goes on as if the others had never been there: the same bits."""
    memory = mt.memory(spec) if spec else None
    model = model_for(variant, memory)
    tokens = np.random.default_rng(2).integers(3, 13, (4, 9))
    alone = [steps(begun(model, memory, [b]), tokens[b : b + 1])[0] for b in range(4)]
    session, order = begun(model, memory, [0, 1, 2, 3]), np.arange(4)
    for i, index in enumerate(([0, 1, 2, 3], [3, 0, 2], [2, 1], [1, 0, 0, 1], [3, 2, 0])):
        session.reorder(np.array(index))
        order = order[index]
        found = session.scores(session.step(tokens[order, i : i + 1]))
        assert session.batch == len(order)
        assert_same_bits(found, np.stack([alone[b][i] for b in order]))


@pytest.mark.parametrize("spec", MEMORIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_streams_join_that_have_come_differently_far(variant, spec):
    """Another source length, another number of segments read, another number of tokens decoded."""
    memory = mt.memory(spec) if spec else None
    model = model_for(variant, memory, np.float64)
    tokens = np.random.default_rng(3).integers(3, 13, (5, 60))

    def three():
        return [
            begun(model, memory, [0, 1]),
            begun(model, memory, [2], read=1, length=4),
            begun(model, memory, [3, 4], read=0, length=9),
        ]

    before = (7, 2, 3)  # tokens that each has decoded
    rows = ([0, 1], [2], [3, 4])
    alone, joined = three(), three()
    for sessions in (alone, joined):
        for session, n, some in zip(sessions, before, rows, strict=True):
            steps(session, tokens[some, :n])
    expected = np.concatenate([steps(session, tokens[some, n : n + 40]) for session, n, some in zip(alone, before, rows, strict=True)])
    first, *others = joined
    for other in others:
        first.join(other)
    assert first.batch == 5
    at = np.repeat(before, [len(some) for some in rows])
    found = np.stack([first.scores(first.step(tokens[np.arange(5), at + i][:, None])) for i in range(20)], axis=1)
    np.testing.assert_allclose(found, expected[:, :20], rtol=0, atol=1e-10 * np.abs(expected).max())
    first.reorder(np.array([4, 2, 0]))
    kept = np.array([4, 2, 0])
    found = np.stack([first.scores(first.step(tokens[kept, at[kept] + i][:, None])) for i in range(20, 40)], axis=1)
    np.testing.assert_allclose(found, expected[kept, 20:], rtol=0, atol=1e-10 * np.abs(expected).max())


def test_a_shorter_text_is_the_beginning_of_a_longer_one():
    for variant in WITHOUT_MEMORIES:
        model = model_for(variant)
        made = [model.generate(TEXT[:, :7], max_new_tokens=n, stop_at_eos=False) for n in (3, 40)]
        assert [row[:3] for row in made[1]] == made[0]


@pytest.mark.parametrize("name", ["decoder.1.feed_forward.out.weight", "embedding.weight", "decoder.0.attention.k.weight"])
def test_a_weight_that_is_written_into_counts_at_once(name):
    """What was packed for an earlier session is not used for another model's weights."""
    model = model_for("pre norm")
    before = model.generate(TEXT[:, :7], max_new_tokens=12, stop_at_eos=False)
    assert model.generate(TEXT[:, :7], max_new_tokens=12, stop_at_eos=False) == before
    model.weights[name] *= -1
    after = model.generate(TEXT[:, :7], max_new_tokens=12, stop_at_eos=False)
    fresh = mt.Transformer(model.config, weights={n: w.copy() for n, w in model.weights.items()})
    assert after != before and after == fresh.generate(TEXT[:, :7], max_new_tokens=12, stop_at_eos=False)


def test_a_model_that_has_generated_can_be_copied():
    model = model_for("pre norm")
    made = model.generate(TEXT[:, :7], max_new_tokens=5)
    assert copy.deepcopy(model).generate(TEXT[:, :7], max_new_tokens=5) == made
    assert pickle.loads(pickle.dumps(model)).generate(TEXT[:, :7], max_new_tokens=5) == made


def test_only_ids_of_the_tokenizer_are_chosen():
    model = model_for("pre norm")
    session = begun(model, None, [0, 1])
    hidden = session.step(np.array([[1], [1]]))
    best = np.argsort(-session.scores(hidden), axis=1)
    limited = Session(begun(model, None, [0, 1]).stream, n_ids=4)
    assert limited.scores(limited.step(np.array([[1], [1]]))).shape == (2, 4)
    chosen = limited.best(hidden)
    assert chosen.tolist() == [next(i for i in row if i < 4) for row in best.tolist()]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 0}], ids=["greedy", "drawn"])
def test_scores_that_are_not_numbers_are_an_error(options):
    model = model_for("pre norm")
    model.weights["decoder.norm.weight"][0] = np.nan
    with pytest.raises(InvalidValue, match=r"the scores of token 1 of sequence 0 are not finite \(.*\); check that the model's weights"):
        model.generate(TEXT[:, :7], max_new_tokens=4, **options)


@pytest.mark.parametrize("variant", VARIANTS_OF_OUTPUTS)
def test_the_likeliest_are_those_of_all_scores(variant):
    """A beam search asks for no others; an output layer may have a bias, a scale and a cap."""
    model = model_for(variant)
    session = begun(model, None, [0, 1, 2])
    hidden = session.step(TEXT[:3, :4])
    log_probs = _core.log_softmax(session.scores(hidden))
    found, ids = session.likeliest(hidden, 5)
    order = np.argsort(-log_probs, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(found, np.take_along_axis(log_probs, order, 1), rtol=1e-5)
    np.testing.assert_array_equal(session.best(hidden), order[:, 0])


@pytest.mark.parametrize(
    "moves", [[[0, 0, 0, 1, 1, 1]], [[1, 1, 0, 0], [1, 0, 2, 3], [2, 3]], [[0, 0, 1], [0, 1, 2, 2]], [[0, 0, 1, 1], [0, 1, 2], [2, 0]]]
)
@pytest.mark.parametrize("variant", ["pre norm", "t5", "bart"])
def test_rows_that_share_a_source_have_the_bits_they_have_alone(variant, moves):
    """Whether they stand side by side, in equal numbers, or not; one of two sources is shorter."""
    model = model_for(variant, dtype=np.float32)

    def opened(rows):
        stream = Stream(model, None, len(rows))
        stream.open(TEXT[rows, :7], np.array([7, 5])[rows])
        return Session(stream)

    tokens = np.random.default_rng(2).integers(3, 13, (2, 9))
    session, sources = opened([0, 1]), np.arange(2)
    texts = [tokens[0, :1], tokens[1, :1]]
    session.step(tokens[:, :1])
    for at, move in enumerate(moves, 1):
        session.reorder(np.array(move))
        sources, texts = sources[move], [texts[row] for row in move]
        for _ in range(3):
            new = np.random.default_rng(at).integers(3, 13, len(move))
            texts = [np.append(text, token) for text, token in zip(texts, new, strict=True)]
            found = session.step(new[:, None])
            for row, (source, text) in enumerate(zip(sources, texts, strict=True)):
                single = opened([source])
                single.step(text[None, :-1])
                assert_same_bits(found[row : row + 1], single.step(text[None, -1:]))
