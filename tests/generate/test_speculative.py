"""Guesses, looked up or of another model: the tokens of greedy search, in fewer steps."""

import numpy as np
import pytest
from variants import tiny_model

import mini_tfm as mt
from mini_tfm.errors import InvalidValue
from mini_tfm.generate import Session
from mini_tfm.generate.speculative import looked_up
from mini_tfm.text.tokenizers import ByteTokenizer

VARIANTS = ["pre norm", "t5", "bart", "marian", "grouped", "decoder only", "decoder only, llama", "decoder only, gemma"]
RNG = np.random.default_rng(8)
SOURCE = RNG.integers(3, 13, (6, 9))


@pytest.fixture
def steps(monkeypatch):
    """What was fed to the sessions: the model of each step, and the shape of its tokens."""
    taken, outputs = [], Session.outputs

    def noted(self, tokens, n):
        taken.append((self.stream.model, tokens.shape))
        return outputs(self, tokens, n)

    monkeypatch.setattr(Session, "outputs", noted)
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
        for name, guesses in (("prompt_lookup_num_tokens", 3), ("assistant_model", model)):
            with pytest.raises(InvalidValue, match=f"{name}: expected none .*{told}"):
                model.generate(SOURCE[:1], **{name: guesses}, **options)
    recurrent = tiny_model("ssru", seed=4)
    for given in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": recurrent}):
        with pytest.raises(InvalidValue, match=f"{next(iter(given))}: needs a decoder with attention"):
            recurrent.generate(SOURCE[:1], **given)
    with pytest.raises(InvalidValue, match="max_matching_ngram_size: 3 needs prompt_lookup_num_tokens"):
        model.generate(SOURCE[:1], max_matching_ngram_size=3)


# Another model


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_model_guesses_and_the_tokens_are_those_of_greedy_search(variant, steps):
    """One that agrees always, one that does sometimes, one that never does."""
    model = tiny_model(variant, seed=4)
    near = mt.Transformer(model.config, dtype=np.float64, weights={name: w + 0.05 * np.abs(w).max() for name, w in model.weights.items()})
    for row in range(3):
        plain = model.generate(SOURCE[row : row + 1], max_new_tokens=24)
        for assistant in (model, near, tiny_model(variant, seed=5)):
            for n in (1, 4):
                found = model.generate(SOURCE[row : row + 1], max_new_tokens=24, assistant_model=assistant, num_assistant_tokens=n)
                assert found == plain


def test_what_the_model_itself_guesses_is_right(steps):
    model, same = tiny_model("pre norm", seed=4), tiny_model("pre norm", seed=4)
    made = model.generate(SOURCE[:1], max_new_tokens=24, stop_at_eos=False, assistant_model=same, num_assistant_tokens=5)
    taken = [shape for who, shape in steps if who is model]
    assert taken == [(1, 6)] * 4, "each step confirms five tokens and adds one"
    assert made == model.generate(SOURCE[:1], max_new_tokens=24, stop_at_eos=False)


def test_an_assistant_without_positions_left_guesses_no_more(steps):
    model = tiny_model("decoder only", seed=4)
    config = model.config.replace(positions="learned", max_positions=12)
    assistant = mt.Transformer(config, seed=1)
    plain = model.generate(SOURCE[:1], max_new_tokens=24, stop_at_eos=False)
    assert model.generate(SOURCE[:1], max_new_tokens=24, stop_at_eos=False, assistant_model=assistant) == plain
    assert any(who is assistant for who, _ in steps)
    before = len(steps)
    long = np.tile(SOURCE[:1], 2)  # longer than it reads at all
    assert model.generate(long, max_new_tokens=5, assistant_model=assistant) == model.generate(long, max_new_tokens=5)
    assert not any(who is assistant for who, _ in steps[before:])


def test_many_sequences_are_guessed_one_after_the_other():
    model = tiny_model("t5", seed=4)
    plain = model.generate(SOURCE, max_new_tokens=12)
    assert model.generate(SOURCE, max_new_tokens=12, prompt_lookup_num_tokens=3) == plain
    assert model.generate(SOURCE, max_new_tokens=12, assistant_model=tiny_model("t5", seed=5)) == plain


def test_beside_a_memory_the_assistant_has_none():
    text = bytes(RNG.integers(97, 100, 40).tolist()).decode()
    fields = {"vocab_size": 300, "d_model": 16, "n_heads": 2, "n_encoder_layers": 0, "segment_length": 16}
    model, small = (mt.Transformer(mt.Config(n_decoder_layers=n, **fields), seed=n) for n in (2, 1))
    pipe = mt.Pipeline(model, ByteTokenizer(), memory="window:size=9,sinks=2")
    pipe.read(text)
    plain = pipe.generate(text[:5], max_new_tokens=40)
    assert pipe.generate(text[:5], max_new_tokens=40, assistant_model=small) == plain
    assert pipe.generate_many([text[:5], text[:9]], max_new_tokens=40, assistant_model=small)[0] == plain


def test_an_assistant_that_does_not_fit_is_refused():
    model = tiny_model("decoder only", seed=4)
    for assistant, told in (
        (tiny_model("decoder only", seed=4, vocab_size=17), "expected a model of the same vocabulary, whose vocab_size is 13, got 17"),
        (tiny_model("decoder only", seed=4, eos_id=7), "expected a model of the same vocabulary, whose eos_id is 2, got 7"),
        (tiny_model("pre norm", seed=4), "expected a model with a decoder alone"),
        (tiny_model("decoder only, ssru", seed=4), "needs a decoder with attention"),
        ("gpt2", "expected a Transformer or None, got .gpt2"),
    ):
        with pytest.raises(InvalidValue, match=f"assistant_model: {told}"):
            model.generate(SOURCE[:1], assistant_model=assistant)
    with pytest.raises(InvalidValue, match="num_assistant_tokens: 3 needs assistant_model"):
        model.generate(SOURCE[:1], num_assistant_tokens=3)
    with pytest.raises(InvalidValue, match="prompt_lookup_num_tokens: expected 0 beside assistant_model, got 4"):
        model.generate(SOURCE[:1], assistant_model=model, prompt_lookup_num_tokens=4)


# What is looked up


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
    assert looked_up(np.array(ids), ngram, n).tolist() == expected
