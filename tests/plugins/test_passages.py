"""Passages are found as BM25 says, and read as if they had been written in front of the text."""

import math

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.errors import InvalidValue
from mini_tfm.generate import Session
from mini_tfm.testing.trial import Reader, small_model

RNG = np.random.default_rng(5)


def bm25(passages, asked):
    """Okapi BM25, term by term; passages of one length."""
    scores = []
    for passage in passages:
        score = 0.0
        for term in set(asked):
            n = sum(term in other for other in passages)
            f = list(passage).count(term)
            score += math.log(1 + (len(passages) - n + 0.5) / (n + 0.5)) * f * 2.5 / (f + 1.5)
        scores.append(score)
    return scores


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_best_by_bm25_are_found_in_order(top_k):
    memory = mt.memory("passages", size=6, top_k=top_k)
    for _ in range(20):
        passages, asked = RNG.integers(3, 15, (9, 6)), RNG.integers(3, 15, 4)
        scores = bm25(passages.tolist(), asked.tolist())
        expected = sorted(sorted(range(9), key=lambda i: -scores[i])[:top_k])
        assert memory.best(passages, asked).tolist() == [i for i in expected if scores[i] > 0]
    assert memory.best(passages, np.array([20])).tolist() == [] == memory.best(passages[:0], asked).tolist()


def read_twice(kind, text, segments, **fields):
    """A reader that has read all segments but the last, and what it gives for that one."""
    reader = Reader(small_model(kind, **fields), mt.memory(text), 1)
    for tokens in segments[:-1]:
        reader.read(tokens)
    return reader, reader.copy().read(segments[-1])


@pytest.mark.parametrize("positions", ["rotary", "relative", "none"])
def test_a_decoder_reads_them_as_text(positions):
    """The outputs are those of a model without memory that is given the passages and then the segment."""
    segments = RNG.integers(3, 12, (6, 1, 5))
    reader, out = read_twice("decoder-only", "passages:size=4,top_k=2,query=3", segments, positions=positions)
    held = reader.run.states[0]["tokens"][0]
    inputs = np.concatenate([[1], segments[:5].ravel()])  # shifted: a decoder reads each token a place later
    assert held.tolist() == inputs[:25].tolist()
    passages = held[:22].reshape(-1)[:20].reshape(5, 4)
    found = passages[reader.run.members[0].best(passages, held[-3:])].ravel()
    assert len(found) == 8
    plain = Reader(reader.model, None, 1)
    plain.stream.last = np.array([found[0]])
    whole = np.concatenate([found[1:], [inputs[25]], segments[5, 0]])[None]
    np.testing.assert_allclose(out[0], plain.read(whole)[0, 8:], atol=1e-12)


def test_an_encoder_reads_them_as_text():
    segments = RNG.integers(3, 12, (5, 1, 5))
    reader, out = read_twice("encoder-decoder", "passages:size=5,top_k=2", segments)
    passages = segments[:4, 0]
    found = passages[reader.run.members[0].best(passages, segments[4, 0])].ravel()
    plain = Reader(reader.model, None, 1)
    source = np.concatenate([found, segments[4, 0]])[None]
    plain.stream.open(source, np.array([source.shape[1]]), segments[4])
    expected = plain.stream.log_probs(plain.stream.decode(segments[4], np.array([5])))
    np.testing.assert_allclose(out, expected, atol=1e-12)


def test_no_passage_is_as_no_memory():
    segments = RNG.integers(3, 12, (2, 1, 5))
    reader, out = read_twice("decoder-only", "passages:size=8,query=9", segments)
    plain = Reader(reader.model, None, 1)
    plain.read(segments[0])
    np.testing.assert_allclose(out, plain.read(segments[1]), atol=1e-12)


def test_streams_have_passages_of_their_own():
    """One is shorter than the other, and paused; each is as alone."""
    tokens = RNG.integers(3, 9, (7, 2, 5))
    lengths = [[5, 5], [5, 2], [5, 0], [5, 5], [5, 1], [5, 5], [5, 5]]
    text = "passages:size=3,top_k=2,query=4"
    together = Reader(small_model("decoder-only"), mt.memory(text), 2)
    alone = [Reader(together.model, mt.memory(text), 1) for _ in range(2)]
    for segment, of in zip(tokens, lengths, strict=True):
        out = together.read(segment, of)
        for b in range(2):
            if of[b]:
                np.testing.assert_allclose(out[b, : of[b]], alone[b].read(segment[b : b + 1], of[b : b + 1])[0, : of[b]], atol=1e-12)


def test_streams_change_places_while_they_are_decoded():
    """Beams are dropped, repeated and sorted, and sessions joined; each row goes on as alone, with the passages that it has."""
    tokens = RNG.integers(3, 9, (5, 2, 5))
    tokens[3, 1] = np.arange(15, 20)  # asks for what was never said
    text = "passages:size=3,top_k=2,query=4"
    model = small_model("decoder-only")

    def session(streams, n_read):
        reader = Reader(model, mt.memory(text), len(streams))
        for segment in tokens[:n_read]:
            reader.read(segment[streams])
        reader.stream.open(None, np.full(len(streams), 5), tokens[n_read][streams])
        return Session(reader.stream)

    def steps(of, streams, n_read):
        inputs = tokens[n_read][streams]
        return [of.step(inputs[:, t : t + 1]) for t in range(2)]

    together, alone = session([0, 1], 4), [session([b], 4) for b in range(2)]
    steps(together, [0, 1], 4)
    for b in range(2):
        steps(alone[b], [b], 4)
    assert together.cache.valid[:, :6].any(axis=1).tolist() == [True, False]
    together.reorder(np.array([1, 1, 0]))
    joined, other = session([1], 1), session([1], 1)
    steps(joined, [1], 1), steps(other, [1], 1)
    together.join(joined)
    out = together.step(np.array([[7], [7], [7], [7]]))
    expected = [alone[1].step(np.array([[7]])), alone[0].step(np.array([[7]])), other.step(np.array([[7]]))]
    np.testing.assert_allclose(out, np.concatenate([expected[0], expected[0], expected[1], expected[2]]), atol=1e-12)


def test_they_stand_next_to_the_text():
    """Behind the rows of every other memory, whatever the order of the stack."""
    outs = []
    for text in ("passages:size=4,query=3+recurrent:tokens=2", "recurrent:tokens=2+passages:size=4,query=3"):
        made, memory = small_model("decoder-only"), mt.memory(text)
        made.add_memory_weights(memory, seed=1)
        reader = Reader(made, memory, 1)
        outs.append([reader.read(tokens[None]) for tokens in np.random.default_rng(3).integers(3, 9, (5, 5))])
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-12)


def test_an_embedding_learns_from_a_passage():
    """Token 5 was said in the first segment, and is read again before the third, whose loss alone counts."""
    tokens, weights = np.array([[[3, 4, 5, 6, 7], [8, 9, 3, 4, 3], [3, 4, 8, 9, 12]]]), np.zeros((1, 3, 5))
    weights[0, 2] = 1
    grads = []
    for memory in (mt.memory("passages:size=4,query=3"), None):
        trainer = mt.Trainer(small_model("decoder-only"), memory, learning_rate=0.0)
        trainer.step(None, tokens, weights=weights)
        grads.append(trainer.optimizer.grads["embedding.weight"][5])
    assert np.abs(grads[0] - grads[1]).max() > 1e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passages:size=0", "size: expected a number of at least 1, got 0"),
        ("passages:query=0", "query: expected a number of at least 1, got 0"),
        ("passages:site=cross", "site: expected encoder or decoder, which read text, got 'cross'"),
    ],
)
def test_what_makes_no_sense_is_told(text, message):
    with pytest.raises(InvalidValue, match=message):
        mt.memory(text)
