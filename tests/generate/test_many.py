"""Many texts at once, and many segments: each text is what it is alone."""

import numpy as np
import pytest
from variants import tiny_model, tokens

from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.pipeline import Pipeline
from mini_tfm.text.tokenizers import ByteTokenizer

TEXTS = ["the fox", "", "a", "jumps over the lazy dog and back again", "the dog", "tea", "serve", "a"]
OPTIONS = [
    {},
    {"do_sample": True, "seed": 5, "temperature": 2.0},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2},
    {"do_sample": True, "seed": 5, "num_return_sequences": 2},
]


def pipe(variant="pre norm", memory=None, **fields):
    model = tiny_model(variant, seed=1, dtype=np.float32, vocab_size=259, **{"n_decoder_layers": 1, **fields})
    p = Pipeline(model, ByteTokenizer(), memory, segment_length=fields.get("segment_length", 12))
    if memory is not None:
        p.read("something to remember, long enough")
    return p


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("fields", [{}, {"segment_length": 5}], ids=str)
@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
@pytest.mark.parametrize("memory", [None, "window:size=9,sinks=2,site=all", "recurrent:tokens=2"])
def test_a_text_among_many_is_what_it_is_alone(variant, memory, fields, options):
    p = pipe(variant, memory, **fields)
    options = {"max_new_tokens": 9, **options}
    together = p.generate_many(TEXTS, batch_tokens=200, **options)
    assert together[0] == p.generate(TEXTS[0], **options)
    assert together[3:5] == p.generate_many(TEXTS[3:5], numbers=[3, 4], **options)
    if "seed" not in options:
        assert together == [p.generate(text, **options) for text in TEXTS]
    else:
        assert together == p.generate_many(iter(TEXTS), batch_tokens=1, **options)
        assert together[2] != together[7], "equal texts draw apart"


def test_many_of_nothing_and_of_what_is_no_text():
    p = pipe()
    assert p.generate_many([]) == []
    assert p.generate_many(["a", "b"], max_new_tokens=0) == ["", ""]
    with pytest.raises(InvalidType, match="texts: expected an iterable of str, got str; `generate` takes one text"):
        p.generate_many("a")
    with pytest.raises(InvalidType, match="text: expected str, got int"):
        p.generate_many(["a", 3])
    with pytest.raises(InvalidValue, match="batch_tokens: expected an integer of at least 1, got 0"):
        p.generate_many(["a"], batch_tokens=0)
    with pytest.raises(InvalidValue, match=r"numbers: expected 1 integers of at least 0, got int64 of shape \(2,\)"):
        p.generate_many(["a"], numbers=[1, 2])


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 3, "length_penalty": 0.0}], ids=str)
def test_beams_go_on_from_the_best_of_a_segment(options):
    """Without a memory, from it alone."""
    whole = tiny_model("pre norm", seed=2)
    model = type(whole)(whole.config.replace(segment_length=4), weights=whole.weights, dtype=np.float64)
    source = tokens(np.random.default_rng(0), 4, 4)
    options = {"stop_at_eos": False, **options}
    made = model.generate(source, max_new_tokens=10, output_scores=True, **options)
    before, expected, scores = source, np.zeros((4, 0), int), 0
    for n in (4, 4, 2):
        part = whole.generate(before, max_new_tokens=n, output_scores=True, **options)
        before = np.array(part.sequences)
        expected = np.concatenate([expected, before], axis=1)
        scores = scores + np.array([sum(each) for each in part.log_probs])
    assert made.sequences == expected.tolist()
    assert [len(each) for each in made.log_probs] == [10] * 4
    np.testing.assert_allclose(made.sequences_scores, scores / 10 ** options.get("length_penalty", 1.0), atol=1e-12)
    best = model.generate(source, max_new_tokens=10, num_return_sequences=2, output_scores=True, **options)
    assert all(a >= b for a, b in best.sequences_scores) and all(len(one) == 10 for row in best.sequences for one in row)
    assert all(one in row for one, row in zip(made.sequences, best.sequences, strict=True)), "each of them has gone on"
