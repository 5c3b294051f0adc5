"""Generation beside Transformers: the same processors, beams and results. goldens.json has some of it for where there is no torch."""

import itertools

import numpy as np
import pytest
import transformers_models as models
import transformers_processors as processors


@pytest.fixture(scope="module", autouse=True)
def peers():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", processors.PROCESSORS)
def test_processors_leave_the_same_tokens_with_the_same_probabilities(name):
    for ids, logits in processors.trials(150):  # of seven lengths
        found, expected = processors.ours(name, ids, logits), processors.theirs(name, ids, logits)
        if name in processors.CUT_EQUALS:
            found, expected = np.sort(found, axis=1), np.sort(expected, axis=1)
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def agree(kind, model, peer, **options):
    """Greedy or beams: the same tokens, and scores to 1e-4."""
    source, lengths = models.inputs(kind)
    expected, scores = models.generated(peer, kind, source, lengths, **options)
    found = model.generate(source, lengths, eos_token_id=models.ENDS, output_scores=True, **options)
    if options.get("num_return_sequences", 1) == 1:
        sequences, found_scores = [[one] for one in found.sequences], [[one] for one in found.sequences_scores]
    else:
        sequences, found_scores = found.sequences, found.sequences_scores
    assert sequences == expected, options
    if scores is not None:
        np.testing.assert_allclose(found_scores, scores, atol=1e-4, err_msg=str(options))
    return sequences


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", models.KINDS)
def test_beams_are_the_same(kind):
    model, peer = models.ours(kind), models.theirs(kind)
    lengths = set()
    for options in models.BEAMS:
        lengths |= {len(one) for row in agree(kind, model, peer, **options) for one in row}
    assert len(lengths) > 5, "some end early"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", models.KINDS)
def test_options_do_the_same(kind, beams):
    model, peer = models.ours(kind), models.theirs(kind)
    plain = agree(kind, model, peer, num_beams=beams, max_new_tokens=9)
    same = [
        options
        for options in (
            {"min_new_tokens": 5},
            {"suppress_tokens": [5, 9, plain[0][0][0], plain[4][0][0]]},
            {"bad_words_ids": [[plain[0][0][0]], plain[4][0][:2], [33, 33]]},
            {"begin_suppress_tokens": [2, 5, 9, 11, 17, plain[4][0][0]]},
            {"forced_eos_token_id": 11},
            {"sequence_bias": [[[22], 1.0], [plain[0][0][:2], -3.0]]},
            {"prefix_allowed_tokens_fn": lambda number, ids: [int(ids[-1] + number + i) % 40 for i in range(1, 9)]},
            {"forced_bos_token_id": 31},
        )
        if agree(kind, model, peer, num_beams=beams, max_new_tokens=9, **options) == plain
    ]
    assert len(same) <= 3, same


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", models.KINDS)
def test_rules_on_what_was_said_do_the_same(kind):
    """Of prompts of one length: Transformers counts what fills up short ones."""
    model, peer = models.ours(kind), models.theirs(kind)
    source = models.inputs(kind)[0]
    for beams, options in itertools.product(
        (1, 4),
        ({"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 2}, {"encoder_no_repeat_ngram_size": 1}, {"min_length": 15}),
    ):
        if "encoder_no_repeat_ngram_size" in options:
            if kind == "gpt2":
                continue
            source = source % 7  # what it says, too
        expected, _ = models.generated(peer, kind, source, np.full(5, 7), num_beams=beams, max_new_tokens=10, **options)
        found = model.generate(source, eos_token_id=models.ENDS, num_beams=beams, max_new_tokens=10, **options)
        assert [[one] for one in found] == expected
        plain = model.generate(source, eos_token_id=models.ENDS, num_beams=beams, max_new_tokens=10)
        assert found != plain or "min_length" in options
