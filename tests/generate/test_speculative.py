"""Prompt lookup: the tokens of greedy search, in fewer steps."""

import numpy as np
import pytest
from variants import tiny_model

import mini_tfm as mt
from mini_tfm.errors import InvalidValue
from mini_tfm.generate import Session
from mini_tfm.generate.lookup import guess
from mini_tfm.text.tokenizers import ByteTokenizer

VARIANTS = ["pre norm", "t5", "bart", "marian", "grouped", "decoder only", "decoder only, llama", "decoder only, gemma"]
RNG = np.random.default_rng(8)
SOURCE = RNG.integers(3, 13, (6, 9))


@pytest.fixture
def steps(monkeypatch):
    """How many steps the sessions took."""
    taken, outputs = [], Session.outputs
    monkeypatch.setattr(Session, "outputs", lambda self, tokens, n: (taken.append(tokens.shape), outputs(self, tokens, n))[1])
    return taken


@pytest.mark.parametrize("options", [{}, {"stop_at_eos": False}, {"eos_token_id": [5, 7]}, {"max_new_tokens": 1}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tokens_are_those_of_greedy_search(variant, options, steps):
    model = tiny_model(variant, seed=4)
    for row in range(len(SOURCE)):
        for n in (1, 3, 10):
            given = {"max_new_tokens": 24} | options
            plain = model.generate(SOURCE[row : row + 1], **given)
            before = len(steps)
            assert model.generate(SOURCE[row : row + 1], prompt_lookup_num_tokens=n, **given) == plain
            assert len(steps) - before <= len(plain[0]) + 1


def test_a_text_that_repeats_itself_takes_few_steps(steps):
    model = tiny_model("decoder only, llama", seed=4)
    text = model.generate(SOURCE[:1], max_new_tokens=60, stop_at_eos=False)[0]
    period = next(p for p in range(1, 30) if text[-p * 2 : -p] == text[-p:])  # a tiny model falls into a loop
    assert period < 30
    prompt, before = np.array([text[:40]]), len(steps)
    model.generate(prompt, max_new_tokens=20, stop_at_eos=False, prompt_lookup_num_tokens=10)
    assert len(steps) - before <= 6


@pytest.mark.parametrize("memory", ["window:size=9,sinks=2", "recurrent:tokens=2", "store:top_k=3,site=decoder"])
def test_beside_a_memory_in_several_segments(memory):
    text = bytes(RNG.integers(97, 100, 40).tolist()).decode()
    model = mt.Transformer(mt.Config(vocab_size=300, d_model=16, n_heads=2, n_encoder_layers=0, n_decoder_layers=2, segment_length=16))
    found = []
    for n in (0, 5):
        pipe = mt.Pipeline(model, ByteTokenizer(), memory=memory)
        pipe.read(text)
        found.append(pipe.generate(text[:5], max_new_tokens=40, prompt_lookup_num_tokens=n))
    assert found[0] == found[1]


def test_a_stop_ends_it_as_it_ends_greedy_search():
    model = tiny_model("pre norm", seed=4)
    whole = model.generate(SOURCE[:1], max_new_tokens=24, stop_at_eos=False)[0]

    def fifth(ids, scores):
        return len(ids[0]) - 1 >= 5

    options = {"max_new_tokens": 24, "stop_at_eos": False, "stopping_criteria": [fifth]}
    assert model.generate(SOURCE[:1], prompt_lookup_num_tokens=8, **options)[0] == whole[:5]


def test_what_it_cannot_do_is_refused():
    model = tiny_model("pre norm", seed=4)
    for options, told in (
        ({"num_beams": 2}, "greedy"),
        ({"do_sample": True}, "greedy"),
        ({"output_scores": True}, "greedy"),
        ({"repetition_penalty": 1.2}, "change scores"),
    ):
        with pytest.raises(InvalidValue, match=f"prompt_lookup_num_tokens: expected 0 .*{told}"):
            model.generate(SOURCE[:1], prompt_lookup_num_tokens=3, **options)
    with pytest.raises(InvalidValue, match="one sequence at a time, got 2"):
        model.generate(SOURCE[:2], prompt_lookup_num_tokens=3)
    with pytest.raises(InvalidValue, match="recurrence"):
        tiny_model("ssru", seed=4).generate(SOURCE[:1], prompt_lookup_num_tokens=3)
    with pytest.raises(InvalidValue, match="max_matching_ngram_size: 3 needs prompt_lookup_num_tokens"):
        model.generate(SOURCE[:1], max_matching_ngram_size=3)


@pytest.mark.parametrize(
    "ids, ngram, n, expected",
    [
        ([1, 2, 3, 4, 1, 2], 2, 3, [3, 4, 1]),
        ([1, 2, 3, 4, 9, 2], 2, 2, [3, 4]),  # 9, 2 does not occur: by 2 alone
        ([1, 2, 3, 1, 2, 4, 1, 2], 2, 1, [4]),  # the last occurrence,
        ([1, 2, 3, 1, 2, 4, 1, 2], 2, 6, [3, 1, 2, 4, 1, 2]),  # or one that is followed by enough
        ([1, 2, 3, -1, 7, 2], 1, 5, [3]),  # not beyond the source's end
        ([5, 5, 5], 2, 4, [5]),
        ([1, 2, 3], 2, 4, []),
        ([1, 2, 1], 2, 0, []),
        ([1], 2, 3, []),
    ],
)
def test_what_is_guessed(ids, ngram, n, expected):
    assert guess(np.array(ids), ngram, n).tolist() == expected
