"""The recall task: nothing but the fact gives the letter away, and the measure tells knowing from guessing."""

import numpy as np
import pytest
from helpers import assert_same_bits

import mini_tfm as mt
from mini_tfm.compare import Recall
from mini_tfm.compare.tasks.recall import CHANCE, FACT, LETTERS, cut_segments
from mini_tfm.config import Config
from mini_tfm.data import TextStreams
from mini_tfm.data.batches import fields
from mini_tfm.errors import InvalidValue
from mini_tfm.memory import Memory, MemorySpec
from mini_tfm.text.tokenizers import BPETokenizer, ByteTokenizer, train_bpe
from mini_tfm.transformer import Transformer

TEXT = "the quick brown fox jumps over the lazy dog, and again. " * 40  # no capital anywhere
LENGTH = 40


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    return train_bpe([TEXT, FACT.format("Q") * 30], 330)


@pytest.fixture(scope="module")
def data(tokenizer):
    return TextStreams([tokenizer.encode(TEXT)], segment_length=LENGTH, n_segments=5, batch_size=6)


def model_of(tokenizer, kind=Transformer, **changes):
    return kind(Config(vocab_size=tokenizer.vocab_size, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=8, **changes))


def places(batch, letter, row):
    """(segment, place) of a letter in a stream's sources and targets."""
    return [list(zip(*np.nonzero(x[row] == letter), strict=True)) for x in (batch.source, batch.target)]


def spells_it(recall, segment, at):
    """Whether a letter is the T of "The code word is"."""
    n = len(recall.before)
    return any((segment[i : i + n] == recall.before).all() for i in range(max(0, at - n + 1), at + 1) if i + n <= len(segment))


def test_the_letter_is_in_the_fact_and_in_the_answers_and_nowhere_else(tokenizer, data):
    recall, asked_before, kinds = Recall(tokenizer), 0, set()
    for seed in range(8):
        plain = data.batch(seed)
        batch, asked = recall.plant(plain, (seed,))
        for b in range(len(asked)):
            letters = set(asked[b][asked[b] >= 0].tolist())
            assert len(letters) <= 1
            if not letters:
                continue
            (letter,) = letters
            kinds.add(letter)
            in_source, in_target = places(batch, letter, b)
            in_source, in_target = (
                [(t, at) for t, at in found if not spells_it(recall, x[b, t], at)]
                for found, x in ((in_source, batch.source), (in_target, batch.target))
            )
            assert len(in_source) == 1, "one fact"
            fact_at, place = in_source[0]
            before = place - len(recall.before)
            planted = batch.source[b, fact_at, before : before + recall.length]
            assert tokenizer.decode(planted) == FACT.format(tokenizer.decode([letter]))
            assert before + recall.length <= batch.source_lengths[b, fact_at]
            assert in_target == [(t, len(recall.before)) for t in np.flatnonzero(asked[b] >= 0)], "its answers"
            for t in np.flatnonzero(asked[b] >= 0):
                assert t >= fact_at, "nothing is asked before it was told"
                assert tokenizer.decode(batch.target[b, t, : recall.length]) == FACT.format(tokenizer.decode([letter]))
            asked_before += (asked[b] >= 0).sum()
            kept = np.ones(plain.source.shape[1:], bool)
            kept[fact_at, before : before + recall.length] = False
            assert_same_bits(batch.source[b][kept], plain.source[b][kept])
    assert asked_before > 20 and len(kinds) > 8


def test_what_was_given_is_not_changed(tokenizer, data):
    plain, again = data.batch(0), data.batch(0)
    Recall(tokenizer).plant(plain, (0,), strays=2.0)
    assert_same_bits(fields(plain)[:4], fields(again)[:4])


def test_planting_is_a_function_of_its_seed(tokenizer, data):
    recall = Recall(tokenizer)
    one, again, other = (recall.plant(data.batch(0), seed) for seed in ((3, 1), (3, 1), (3, 2)))
    assert_same_bits([*fields(one[0]), one[1]], [*fields(again[0]), again[1]])
    assert (one[0].source != other[0].source).any()


def test_the_question_costs_nothing_and_the_letters_as_much_as_the_text(tokenizer, data):
    recall = Recall(tokenizer)
    batch, asked = recall.plant(data.batch(1), (0,))
    counted = np.arange(LENGTH) < batch.target_lengths[..., None]
    is_answer = np.zeros(batch.target.shape, bool)
    is_answer[..., len(recall.before)] = asked >= 0
    is_question = np.zeros(batch.target.shape, bool)
    is_question[..., : recall.length] = (asked >= 0)[..., None]
    assert (asked >= 0).any()
    assert (batch.weights[is_question & ~is_answer] == 0).all()
    assert (batch.weights[~is_question] == 1).all()
    np.testing.assert_allclose(batch.weights[is_answer].sum(), batch.weights[counted & ~is_answer].sum(), rtol=1e-4)


def test_fact_and_question_can_be_placed(tokenizer, data):
    recall = Recall(tokenizer)
    batch, asked = recall.plant(data.batch(2), (0,), facts_at=1, asked_at=3)
    told = (batch.source_lengths[:, 1] >= recall.length) & (batch.target_lengths[:, 3] >= recall.length)
    assert told.any()
    np.testing.assert_array_equal(asked[:, 3] >= 0, told)
    assert (np.delete(asked, 3, axis=1) == -1).all()
    for b in np.flatnonzero(told):
        assert [t for t, _ in places(batch, asked[b, 3], b)[0]] == [1]


def test_strays_are_lone_letters_in_sources_alone(tokenizer, data):
    recall = Recall(tokenizer)
    batch, asked = recall.plant(data.batch(3), (0,), strays=3.0)
    whole = batch.source_lengths == LENGTH
    count = np.isin(batch.source, recall.letters).sum(axis=2)[whole]
    assert 1.5 < count.mean() < 4.5
    a_question = 1 + np.isin(recall.before, recall.letters).sum()  # its letter, and where T is a token, that of "The"
    assert (np.isin(batch.target, recall.letters).sum(axis=2) == np.where(asked >= 0, a_question, 0)).all()


def test_a_segment_too_short_for_a_fact_has_none(tokenizer, data):
    recall = Recall(tokenizer)
    starts = data.cut([(data.documents[0], 0)], 3)  # the first segment is bos alone
    batch, asked = recall.plant(starts, (0,), facts_at=0)
    assert (asked == -1).all()
    assert_same_bits([batch.source, batch.target], [starts.source, starts.target])
    assert np.isnan(recall.accuracy(model_of(tokenizer), None, starts, 1))


class Listening:
    """An encoder that lets `heard` know what it reads."""

    def __init__(self, encoder, heard):
        self.encoder, self.heard, self.products = encoder, heard, encoder.products

    def __call__(self, tokens, lengths, p):
        self.heard(tokens, p)
        return self.encoder(tokens, lengths, p)


class Oracle(Transformer):
    """Remembers the letter of the last fact in each row of the batch, and says it; `forgets` so many segments later."""

    recall: Recall
    forgets = 99

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.encoder, self.output = Listening(self.encoder, self.hear), self.say

    def hear(self, tokens, p):
        if p.run.number == 0:
            self.known, self.since = np.zeros(len(tokens), int), np.zeros(len(tokens), int)
        n = len(self.recall.before)
        self.since += 1
        for b, row in enumerate(tokens):
            for i in range(len(row) - n):
                if (row[i : i + n] == self.recall.before).all():
                    self.known[b], self.since[b] = row[i + n], 0
        self.known[self.since > self.forgets] = 0

    def say(self, hidden, weights):
        scores = np.zeros((*hidden.shape[:-1], self.config.vocab_size))
        scores[np.arange(len(hidden)), self.known[: len(hidden)]] = 1
        return scores


def test_who_knows_is_always_right_and_who_forgets_is_not(tokenizer, data):
    oracle = model_of(tokenizer, Oracle)
    oracle.recall = Recall(tokenizer)
    batch = data.cut([(data.documents[0], start) for start in range(1, 40, 2)], 5)
    assert [oracle.recall.accuracy(oracle, None, batch, distance) for distance in (0, 1, 4)] == [1.0, 1.0, 1.0]
    oracle.forgets = 1
    assert [oracle.recall.accuracy(oracle, None, batch, distance) for distance in (0, 1, 2)] == [1.0, 1.0, 0.0]


def test_who_guesses_is_right_by_chance(tokenizer, data):
    class Guesser(Oracle):
        def say(self, hidden, weights):
            scores = np.zeros((*hidden.shape[:-1], self.config.vocab_size))
            drawn = np.random.default_rng(0).choice(self.recall.letters, len(hidden))
            scores[np.arange(len(hidden)), drawn] = 1
            return scores

    guesser = model_of(tokenizer, Guesser)
    guesser.recall = Recall(tokenizer)
    batch = data.cut([(data.documents[0], 1 + i % 50) for i in range(400)], 2)
    found = guesser.recall.accuracy(guesser, None, batch, 1)
    assert abs(found - CHANCE) < 0.04  # four standard deviations of 400 guesses
    assert 0.0 <= guesser.recall.accuracy(model_of(tokenizer), None, batch, 1) < 0.15, "a random model"


@pytest.mark.parametrize("text", ["window:size=8", "recurrent:tokens=2", "store:top_k=2"])
def test_a_memory_takes_part_in_the_measure(tokenizer, data, text):
    model, memory = model_of(tokenizer), mt.memory(text)
    model.add_memory_weights(memory)
    batch = data.cut([(data.documents[0], 1 + i) for i in range(8)], 3)
    found = Recall(tokenizer).accuracy(model, memory, batch, 2)
    assert 0 <= found <= 1
    assert found == Recall(tokenizer).accuracy(model, memory, batch, 2)


def test_segments_are_cut_of_every_field(data):
    batch = cut_segments(data.batch(0), 2)
    assert batch.source.shape == batch.target.shape == (6, 2, LENGTH)
    assert batch.source_lengths.shape == batch.target_lengths.shape == (6, 2) and batch.weights is None


@pytest.fixture(scope="module")
def targets(tokenizer):
    """Streams of a decoder-only model, whose segments hold a fact and its question."""
    length = 2 * Recall(tokenizer).length + 5
    return TextStreams([tokenizer.encode(TEXT)], segment_length=length, n_segments=4, batch_size=8, has_encoder=False)


def test_without_sources_the_fact_stands_in_a_target_before_its_questions(tokenizer, targets):
    recall, n_facts = Recall(tokenizer), 0
    for seed in range(6):
        plain = targets.batch(seed)
        batch, asked = recall.plant(plain, (seed,))
        at = recall.asked_from(batch)
        assert batch.source is None and not np.shares_memory(batch.target, plain.target)
        for b in range(len(asked)):
            if not (asked[b] >= 0).any():
                continue  # the document ends in the segment of the fact
            (letter,) = set(asked[b][asked[b] >= 0].tolist())
            (fact_at, fact_place), *questions = zip(*np.nonzero(batch.target[b] == letter), strict=True)
            assert spells_it(recall, batch.target[b, fact_at], fact_place - 1) and fact_place < at
            assert questions == [(t, at + len(recall.before)) for t in np.flatnonzero(asked[b] >= 0)] and questions[0][0] == fact_at
            assert batch.weights[b, fact_at, fact_place] == 0  # nobody could know the letter
            n_facts += 1
    assert n_facts > 24


def test_a_decoder_alone_that_knows_is_always_right(tokenizer, targets):
    recall = Recall(tokenizer)

    class Reads(Memory):
        """Says the letter of the last fact it has read, where a question is due; keeps it for `keeps` segments."""

        spec = MemorySpec(sites=frozenset({"decoder"}), needs=frozenset({"tokens"}))
        keeps = 99

        def start(self, batch, dims):
            return {"letter": np.zeros((batch, 1), np.int64), "age": np.zeros((batch, 1), np.int64)}

        def write(self, state, site, layer, new):
            letters, ages = state["letter"].copy(), state["age"] + 1
            n = len(recall.before)
            for b, row in enumerate(new.targets):
                for i in range(len(row) - recall.length):  # not the question, at the end
                    if (row[i : i + n] == recall.before).all():
                        letters[b], ages[b] = row[i + n], 0
            state["letter"], state["age"] = np.where(ages > self.keeps, 0, letters), ages

        def logits(self, state, hidden, log_probs):
            n = log_probs.shape[-1]
            known = (np.arange(n) == state["letter"])[:, None, :]
            return np.where(known, np.log(0.9), np.log(0.1 / (n - 1))).astype(log_probs.dtype) + 0 * log_probs

    batch = targets.cut([(targets.documents[0], start) for start in range(1, 20, 2)], 4)
    model, memory = model_of(tokenizer), Reads()
    model = Transformer(model.config.replace(n_encoder_layers=0))
    assert [recall.accuracy(model, memory, batch, distance) for distance in (1, 2, 3)] == [1.0, 1.0, 1.0]
    memory.keeps = 2  # logits are asked when the segment is written
    assert [recall.accuracy(model, memory, batch, distance) for distance in (1, 2, 3)] == [1.0, 1.0, 0.0]


def test_what_cannot_be_planted_is_refused(tokenizer, data):
    recall = Recall(tokenizer)
    one = TextStreams(data.documents, segment_length=2 * recall.length - 1, n_segments=2, batch_size=2, has_encoder=False)
    with pytest.raises(InvalidValue, match=f"batch: expected segments of at least {2 * recall.length} tokens, as long as a fact and its"):
        recall.plant(one.batch(0), (0,))
    short = TextStreams(data.documents, segment_length=recall.length - 1, n_segments=2, batch_size=2)
    with pytest.raises(InvalidValue, match=f"batch: expected segments of at least {recall.length} tokens"):
        recall.plant(short.batch(0), (0,))


def test_a_tokenizer_must_know_the_letters():
    import json

    rules = {"model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}, "pre_tokenizer": {"type": "Whitespace"}}
    words = BPETokenizer(json.dumps({"version": "1.0", "added_tokens": [], **rules}).encode())
    with pytest.raises(InvalidValue, match="tokenizer: expected a token for each capital letter"):
        Recall(words)
    assert len(LETTERS) == 26 and 1 / CHANCE == 26
