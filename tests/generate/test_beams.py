"""Beam search against plain enumeration: all sequences of a tiny vocabulary, each scored as a given target."""

import functools
import itertools

import numpy as np
import pytest
from helpers import assert_same_bits
from variants import tiny_model, tokens

import mini_tfm as mt
from mini_tfm.errors import InvalidValue
from mini_tfm.generate import GenerationOptions, Session
from mini_tfm.generate.rules import Rules
from mini_tfm.generate.search import search
from mini_tfm.generate.steps import Search, together
from mini_tfm.stream import Stream

V, EOS, STEPS = 4, 2, 3
LENGTHS = np.array([3, 1, 5])
KINDS = ["pre norm", "relative", "decoder only"]
MEMORIES = ["window:size=9,sinks=2,site=all", "recurrent:tokens=2", "store:top_k=3"]


def model_of(variant, **fields):
    return tiny_model(variant, seed=3, **{"vocab_size": V, **fields})


def source():
    return np.random.default_rng(1).integers(0, V, (3, 5))


def all_sequences(eos=EOS, steps=STEPS):
    """Those that end at eos, and those that are cut off."""
    for n in range(1, steps + 1):
        for ids in itertools.product(range(V), repeat=n):
            if eos not in ids[:-1] and (n == steps or ids[-1] == eos):
                yield list(ids)


@functools.cache
def log_probs_of_all(variant):
    """Of each row of the source, by sequence: the log-probabilities of its tokens."""
    model, rows = model_of(variant), [row[:n] for row, n in zip(source(), LENGTHS, strict=True)]

    def log_probs(row, ids):
        if model.config.has_encoder:
            return model.score_targets([row], [ids])[0]
        return model.score_targets(None, [[*row, *ids]])[0, len(row) :]

    return [{tuple(ids): log_probs(row, ids) for ids in all_sequences()} for row in rows]


def ranked(log_probs, length_penalty):
    """[(score, ids without eos)], best first, of all sequences; log_probs: of one, a number a token."""
    found = []
    for ids in all_sequences():
        score = float(np.sum(log_probs(ids))) / len(ids) ** length_penalty
        found.append((score, ids[:-1] if ids[-1] == EOS else ids))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("variant", KINDS)
def test_as_many_beams_as_sequences_are_exhaustive_search(variant, length_penalty, early_stopping):
    """All of them are found, in order, and no more: there are fewer than num_return_sequences."""
    model = model_of(variant)
    made = model.generate(
        source(),
        LENGTHS,
        max_new_tokens=STEPS,
        num_beams=V**STEPS,
        num_return_sequences=V**STEPS,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        output_scores=True,
    )
    for b, known in enumerate(log_probs_of_all(variant)):
        expected = ranked(lambda ids, known=known: known[tuple(ids)], length_penalty)
        assert made.sequences[b] == [ids for _, ids in expected]
        np.testing.assert_allclose(made.sequences_scores[b], [score for score, _ in expected], atol=1e-10)
        for ids, each, score in zip(made.sequences[b], made.log_probs[b], made.sequences_scores[b], strict=True):
            whole = ids if len(each) == len(ids) else [*ids, EOS]
            np.testing.assert_allclose(each, known[tuple(whole)], atol=1e-10)
            assert abs(sum(each) / len(each) ** length_penalty - score) < 1e-10


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("variant", KINDS)
def test_every_beam_has_its_own_memory(variant, memory):
    model, strategy = model_of(variant), mt.memory(memory)
    model.add_memory_weights(strategy, 1)
    text = np.random.default_rng(5).integers(0, V, (2, 20))

    def begun(rows):
        stream = Stream(model, strategy, len(rows))
        for t in range(2):
            stream.read(text[rows, 6 * t : 6 * t + 6], np.full(len(rows), 6))
        stream.open(text[rows, 12:17] if model.config.has_encoder else None, np.full(len(rows), 5))
        return stream

    stream = begun([0, 1])
    prompt = stream.shifted(np.zeros((2, 1), np.int64))
    options = GenerationOptions(max_new_tokens=STEPS, num_beams=V**STEPS, num_return_sequences=V**STEPS)
    found = run(search(Session(stream), prompt, Rules.of(options, model.config, 1, np.arange(2), n_ids=V)))[1]
    for b in range(2):

        def log_probs(ids, b=b):
            one = begun([b])
            return one.log_probs(one.decode(np.array([ids]), np.array([len(ids)])))[0][np.arange(len(ids)), ids]

        expected = ranked(log_probs, 1.0)
        assert [one.ids for one in found[b]] == [ids for _, ids in expected]
        np.testing.assert_allclose([one.score(1.0) for one in found[b]], [score for score, _ in expected], atol=1e-10)


def run(steps):
    """(what each step settled, what it returns)."""
    one = Search(steps)
    return [settled for _, settled in together([one])], one.found


@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 4, "num_beam_groups": 2}, {"num_beams": 3, "do_sample": True}], ids=str
)
def test_a_row_does_not_depend_on_its_neighbours(variant, options):
    model = tiny_model(variant, seed=2, dtype=np.float32)
    rows, others = (tokens(np.random.default_rng(seed), 4, 6) for seed in (0, 9))
    options = {
        "num_beams": 4,
        **options,
        "max_new_tokens": 8,
        "output_scores": True,
        "num_return_sequences": 3,
        "seed": 5,
        "eos_token_id": [2, 5],
    }
    together = model.generate(rows, [4, 1, 6, 4], **options)
    for b in range(4):
        changed = others.copy()
        changed[b] = rows[b]
        alone = model.generate(changed, np.where(np.arange(4) == b, [4, 1, 6, 4], [2, 3, 1, 5]), **options)
        assert alone.sequences[b] == together.sequences[b]
        assert_same_bits(alone.sequences_scores[b], together.sequences_scores[b])


def in_groups(log_probs, n_groups, width, penalty, steps):
    """Diverse beam search (arXiv 1610.02424, algorithm 1) without an end of sequence, as plain as can be."""
    groups = [[(0.0, [])] for _ in range(n_groups)]
    for _ in range(steps):
        said = []
        for g, beams in enumerate(groups):
            candidates = [
                (score + float(p) - penalty * said.count(token), [*ids, token])
                for score, ids in beams
                for token, p in enumerate(log_probs(ids))
            ]
            groups[g] = sorted(candidates, reverse=True)[:width]
            said += [ids[-1] for _, ids in groups[g]]
    return sorted([(score / steps, ids) for beams in groups for score, ids in beams], reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 0.3, 5.0])
def test_groups_of_beams_differ_by_the_penalty(penalty):
    model = tiny_model("pre norm", seed=2)
    row = tokens(np.random.default_rng(0), 1, 6)

    def log_probs(ids):
        scores = model.logits(row, [[*ids, 0]])[0, -1]
        return scores - np.log(np.exp(scores).sum())

    options = {"num_beams": 6, "num_beam_groups": 3, "num_return_sequences": 6, "max_new_tokens": 4, "stop_at_eos": False}
    made = model.generate(row, **options, diversity_penalty=penalty, output_scores=True)
    expected = in_groups(log_probs, 3, 2, penalty, 4)
    np.testing.assert_allclose(made.sequences_scores[0], [score for score, _ in expected], atol=1e-10)
    assert sorted(made.sequences[0]) == sorted(ids for _, ids in expected)
    firsts = {ids[0] for ids in made.sequences[0]}
    assert len(firsts) > 3 if penalty == 5.0 else len(firsts) <= 4


def test_drawn_beams_repeat_with_their_seed_and_have_their_scores():
    model = tiny_model("pre norm", seed=2)
    row = tokens(np.random.default_rng(0), 1, 6)
    options = {"num_beams": 3, "do_sample": True, "max_new_tokens": 5, "num_return_sequences": 3, "output_scores": True}
    made = [model.generate(row, seed=seed, **options) for seed in (0, 0, *range(1, 8))]
    assert made[0] == made[1] and len({str(one.sequences) for one in made}) > 4
    for one in made:
        assert one.sequences_scores[0] == sorted(one.sequences_scores[0], reverse=True)
        for ids, each, score in zip(one.sequences[0], one.log_probs[0], one.sequences_scores[0], strict=True):
            whole = ids if len(each) == len(ids) else [*ids, 2]
            np.testing.assert_allclose(each, model.score_targets(row, [whole])[0], atol=1e-10)
            assert abs(sum(each) / len(each) - score) < 1e-10


def test_beams_are_drawn_without_replacement():
    """One step, one beam of two: of four drawn candidates the best two are left."""
    model = tiny_model("pre norm", seed=2)
    row = tokens(np.random.default_rng(0), 1, 6)
    p = np.exp(model.score_targets(np.repeat(row, 13, axis=0), np.arange(13)[:, None])[:, 0])
    options = {"num_beams": 2, "do_sample": True, "max_new_tokens": 1, "stop_at_eos": False, "num_return_sequences": 2}
    made = [[ids[0] for ids in model.generate(row, seed=seed, **options)[0]] for seed in range(1500)]
    assert all(p[a] >= p[b] and a != b for a, b in made)
    rng = np.random.default_rng(0)
    drawn = [sorted(rng.choice(13, 4, replace=False, p=p / p.sum()), key=lambda i: -p[i])[:2] for _ in range(3000)]
    for place in range(2):
        shares = [np.bincount([one[place] for one in each], minlength=13) / len(each) for each in (made, drawn)]
        np.testing.assert_allclose(*shares, atol=0.06)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}], ids=str)
def test_what_is_settled_is_what_is_found(options):
    early = 0
    for seed in range(6):
        model = tiny_model("pre norm", seed=seed)
        rows = tokens(np.random.default_rng(0), 4, 6)
        stream = Stream(model, None, 4)
        stream.open(rows, np.full(4, 6))
        rules = Rules.of(GenerationOptions(max_new_tokens=10, eos_token_id=[2, 5], **options), model.config, 1, np.arange(4), n_ids=13)
        settled, found = run(search(Session(stream), np.full((4, 1), 1), rules))
        for b in range(4):
            assert [token for step in settled for token in step[b]] == found[b][0].ids
            early += sum(bool(step[b]) for step in settled[:-1])
    assert early > 5, "some tokens are settled before the end"


def test_the_best_tokens_of_each_step_are_told():
    model = tiny_model("pre norm", seed=2)
    row = tokens(np.random.default_rng(0), 2, 6)
    for options in ({}, {"num_beams": 3}, {"num_beams": 3, "repetition_penalty": 1.5}, {"do_sample": True, "seed": 1}):
        made = model.generate(row, max_new_tokens=4, output_scores=True, top_logprobs=3, stop_at_eos=False, **options)
        for b, ids in enumerate(made.sequences):
            assert [len(top) for top in made.top_logprobs[b]] == [3] * 4
            for t, top in enumerate(made.top_logprobs[b]):
                assert [p for _, p in top] == sorted([p for _, p in top], reverse=True)
                assert dict(top).get(ids[t], made.log_probs[b][t]) == made.log_probs[b][t]
                if "repetition_penalty" not in options:
                    logits = model.logits(row[b : b + 1], [[*ids[:t], 0]])[0, t]
                    p = logits - np.log(np.exp(logits).sum())
                    assert [i for i, _ in top] == np.argsort(-p)[:3].tolist()
                    np.testing.assert_allclose([each for _, each in top], np.sort(p)[::-1][:3], atol=1e-10)


def test_encoder_outputs_stand_for_the_source():
    model = tiny_model("pre norm", seed=2)
    rows, lengths = tokens(np.random.default_rng(0), 4, 6), np.array([4, 1, 6, 4])
    outputs = model.encode(rows, lengths)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        expected = model.generate(rows, lengths, max_new_tokens=6, **options)
        assert model.generate(encoder_outputs=outputs, lengths=lengths, max_new_tokens=6, **options) == expected
    with pytest.raises(InvalidValue, match="encoder_no_repeat_ngram_size: needs a model with an encoder, and the source's token ids"):
        model.generate(encoder_outputs=outputs, lengths=lengths, encoder_no_repeat_ngram_size=2)
    with pytest.raises(InvalidValue, match=r"encoder_outputs: expected shape \(batch, source, 8\), got \(4, 6\)"):
        model.generate(encoder_outputs=outputs[..., 0])


@pytest.mark.parametrize("beams", [1, 3])
def test_where_no_token_is_left_the_options_are_named(beams):
    model = tiny_model("pre norm", seed=2)
    everything = list(range(13))
    with pytest.raises(InvalidValue, match="the options rule out every token at token 1 of sequence 0"):
        model.generate(np.full((2, 3), 4), num_beams=beams, suppress_tokens=everything)
    with pytest.raises(InvalidValue, match="the options rule out every token at token 3 of sequence 0"):
        late = lambda ids, scores: scores if ids.shape[1] < 3 else np.full_like(scores, -np.inf)  # noqa: E731
        model.generate(np.full((2, 3), 4), num_beams=beams, logits_processor=late, stop_at_eos=False)


def test_encoder_outputs_do_not_tell_what_to_go_on_from():
    model = tiny_model("continues")
    with pytest.raises(InvalidValue, match=r"encoder_outputs: this model goes on from its source's last token .*; give the source"):
        model.generate(encoder_outputs=np.zeros((1, 2, 8), np.float32))
