"""Ends of a sequence other than one eos: several, texts, functions, time; in batches, in beams and beyond a segment."""

import re
import sys

import numpy as np
import pytest
from variants import tiny_model, tokens

from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.generate import rules
from mini_tfm.generate.stops import BeforeStop, StopStrings
from mini_tfm.pipeline import Pipeline
from mini_tfm.text.tokenizers import ByteTokenizer, train_bpe

SEARCHES = [{}, {"num_beams": 3}, {"do_sample": True, "seed": 1}]
BPE = train_bpe(["the cat sat on the mat, and the dog sat too"] * 20, 290)


def prompts():
    return tokens(np.random.default_rng(0), 4, 6)


@pytest.mark.parametrize("options", SEARCHES[::2], ids=str)
def test_any_of_several_eos_ends_a_sequence(options):
    model = tiny_model("pre norm", seed=2)
    endless = model.generate(prompts(), max_new_tokens=12, stop_at_eos=False, **options)
    ends = [endless[0][0], endless[3][0]]
    made = model.generate(prompts(), max_new_tokens=12, eos_token_id=ends, **options)
    assert made == [row[: next((i for i, token in enumerate(row) if token in ends), 12)] for row in endless]
    for end in ends:
        assert model.generate(prompts(), max_new_tokens=12, eos_token_id=end, **options) != made


@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_a_function_ends_sequences(options):
    model = tiny_model("pre norm", seed=2)
    options = {**options, "max_new_tokens": 12, "stop_at_eos": False, **({"early_stopping": True} if "num_beams" in options else {})}
    made = model.generate(prompts(), stopping_criteria=lambda ids, _: ids[:, -1] == 6, **options)
    assert any(6 in row for row in made)
    for row in made:
        assert row.index(6) == len(row) - 1 if 6 in row else len(row) == 12
    if "num_beams" not in options:
        endless = model.generate(prompts(), **options)
        assert made == [row[: (row.index(6) if 6 in row else 11) + 1] for row in endless]
    four = model.generate(prompts(), stopping_criteria=[lambda ids, _: ids.shape[1] == 5], **options)
    assert [len(row) for row in four] == [4] * 4


@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_time_ends_all_with_the_step_at_which_it_is_over(options, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(rules.time, "monotonic", lambda: next(ticks))  # once at the start, once a step
    made = tiny_model("pre norm", seed=2).generate(prompts(), max_new_tokens=12, stop_at_eos=False, max_time=3.5, **options)
    assert [len(row) for row in made] == [4] * 4


def pipe(variant="pre norm", tokenizer=None, **fields):
    tokenizer = tokenizer or ByteTokenizer()
    model = tiny_model(variant, seed=1, dtype=np.float32, vocab_size=tokenizer.vocab_size, **fields)
    return Pipeline(model, tokenizer, None)


LONG = {"max_new_tokens": 30, "stop_at_eos": False}
DRAWN = {"do_sample": True, "seed": 3, "temperature": 2.0}


@pytest.mark.parametrize("fields", [{}, {"segment_length": 7}], ids=str)
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
def test_a_stop_string_ends_the_text(variant, tokenizer, fields):
    """Wherever it begins and ends, in tokens and in segments; streamed or not."""
    p = pipe(variant, tokenizer, **fields)
    # Only tokens of whole characters: a stop string within the bytes of a broken one is none.
    plain = [i for i in range(tokenizer.vocab_size) if not tokenizer.bytes_of(i).isascii()]
    options = {**LONG, **DRAWN, "suppress_tokens": plain}
    endless = p.generate("the fox", **options)
    assert len(endless) >= 20
    for start in range(0, 15, 2):
        stop = endless[start + 1 : start + 4]
        end = endless.index(stop)
        cut = p.generate("the fox", stop_strings=[stop, "no such text"], include_stop_strings=False, **options)
        assert cut == endless[:end]
        whole = p.generate("the fox", stop_strings=stop, **options)
        assert whole.startswith(endless[: end + len(stop)]) and endless.startswith(whole)
        assert stop not in whole[:-1] or tokenizer is BPE, "nothing follows but the rest of the token"
        for include, expected in ((True, whole), (False, cut)):
            pieces = list(p.generate("the fox", stream=True, stop_strings=stop, include_stop_strings=include, **options))
            assert "".join(pieces) == expected and all(pieces)


def test_beams_end_with_a_stop_string():
    p = pipe()
    plain = [i for i in range(3 + 256) if not p.tokenizer.bytes_of(i).isascii()]
    options = {**LONG, "suppress_tokens": plain, "num_beams": 3, "num_return_sequences": 3}
    stop = p.generate("the fox", **options)[0][4:6]
    made = p.generate("the fox", stop_strings=stop, early_stopping=True, **options)
    assert any(text.endswith(stop) for text in made)
    assert all(text.index(stop) == len(text) - 2 for text in made if stop in text)
    cut = p.generate("the fox", stop_strings=stop, early_stopping=True, include_stop_strings=False, **options)
    assert cut == [text.removesuffix(stop) for text in made]


ROW = np.zeros(1, np.int64)


class Words:
    """A tokenizer whose ids are not made of bytes."""

    def bytes_of(self, token):
        raise InvalidValue("no bytes")

    def decode(self, ids):
        return " ".join(["", "st", "op", "stop", "opera", "x"][i] for i in ids)


def test_a_stop_string_must_overlap_the_last_token():
    words = StopStrings(Words(), ["st op"], 1, [[]])
    ended = {(1, 2): True, (5, 1, 4): True, (1, 2, 5): False, (3,): False, (1,): False, (5, 5, 1, 2): True}
    for said, expected in ended.items():
        assert words(np.array([[2, *said]]), ROW).tolist() == [expected], said
    text = "stopper"
    ids = [byte + 3 for byte in text.encode()]
    bytes_ = StopStrings(ByteTokenizer(), ["stop"], 0, [[]])
    assert [bool(bytes_(np.array([ids[: n + 1]]), ROW)[0]) for n in range(7)] == [False] * 3 + [True] + [False] * 3
    assert StopStrings(ByteTokenizer(), ["stop"], 2, [[]])(np.array([ids[:4]]), ROW).tolist() == [False], "the prompt does not count"
    assert StopStrings(ByteTokenizer(), ["stop"], 0, [ids[:2]])(np.array([ids[2:4]]), ROW).tolist() == [True]


def test_what_may_become_a_stop_string_is_held_back():
    text = BeforeStop(["abc", "bd"])
    assert [text.push(piece) for piece in ["x", "a", "b", "y", "ab", "d", "more"]] == ["x", "", "", "aby", "", "a", ""]
    assert text.finish() == ""
    text = BeforeStop(["abc"])
    assert [text.push("zab"), text.finish()] == ["z", "ab"]


def test_choices_are_kept_to():
    p = pipe()
    texts = ["yes", "no", "yesterday", "東京"]
    made = {p.generate("the fox", choices=texts, do_sample=True, temperature=3.0, seed=seed) for seed in range(40)}
    assert made == set(texts)
    best = p.generate("the fox", choices=texts, num_beams=8, num_return_sequences=4, length_penalty=0.0)
    source = p.tokenizer.encode("the fox")[None]
    score = lambda text: p.model.score_targets(source, [[*p.tokenizer.encode(text), p.model.config.eos_id]]).sum()  # noqa: E731
    assert best == sorted(texts, key=score, reverse=True)
    assert p.generate("the fox", choices=["no"], num_beams=2, num_return_sequences=2) == ["no"]
    model = p.model
    ids = [[5, 6], [5, 6, 7], [9]]
    assert all(row in ids for row in model.generate(np.full((3, 2), 4), choices=ids, do_sample=True, seed=0))


PATTERNS = [r"[0-9]{2}-(a|bc)+", r"[東京a]{1,4}", r"(yes|no|yesterday)"]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("fields", [{}, {"segment_length": 4}], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_regular_expression_is_kept_to(tokenizer, fields, pattern):
    pytest.importorskip("outlines_core")
    p = pipe("pre norm", tokenizer, **fields)
    drawn = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 60}
    made = [p.generate("the fox", regex=pattern, seed=seed, **drawn) for seed in range(10)]
    made += p.generate("the fox", regex=pattern, num_beams=3, num_return_sequences=2, max_new_tokens=60)
    ended = [text for text in made if len(p.tokenizer.encode(text)) < 60]
    assert len(ended) > 5 and len(set(ended)) > 1
    assert all(re.fullmatch(pattern, text) for text in ended), made


@pytest.mark.parametrize("fields", [{}, {"segment_length": 4}], ids=str)
def test_a_token_that_is_forced_first_is_no_part_of_a_choice_or_a_match(fields):
    pytest.importorskip("outlines_core")
    p = pipe(**fields)
    for how in ({"regex": "(yes|no|yesterday)"}, {"choices": ["yes", "no", "yesterday"]}):
        made = {p.generate("the fox", forced_bos_token_id=1, do_sample=True, temperature=3.0, seed=seed, **how) for seed in range(20)}
        assert len(made) > 1 and made <= {"yes", "no", "yesterday"}
    with pytest.raises(InvalidValue, match="max_new_tokens: expected at least 5"):
        p.generate("the fox", forced_bos_token_id=1, choices=["yes"], max_new_tokens=4)


def test_a_regular_expression_that_cannot_be_kept_to_is_told():
    pytest.importorskip("outlines_core")
    for pattern in ("(", "a(?=b)"):
        with pytest.raises(InvalidValue, match=r"regex: .* cannot be kept to with this tokenizer: Failed to build DFA"):
            pipe().generate("a", regex=pattern)
    with pytest.raises(InvalidValue, match="regex: texts need a tokenizer"):
        pipe().model.generate([[4]], regex="a")


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    with pytest.raises(InvalidValue, match=r"regex: needs outlines-core .*: pip install 'mini-tfm\[regex\]'"):
        pipe().generate("a", regex="never built before")


def test_choices_may_go_beyond_a_segment():
    p = pipe(segment_length=4)
    texts = ["yesterday", "yesterday evening", "no"]
    assert {p.generate("the fox", choices=texts, do_sample=True, temperature=3.0, seed=seed) for seed in range(20)} == set(texts)


REFUSED = {
    "stop strings without a tokenizer": (lambda p: p.model.generate([[4]], stop_strings="a"), "stop_strings: texts need a tokenizer"),
    "choices without a tokenizer": (lambda p: p.model.generate([[4]], choices=["a"]), "choices: texts need a tokenizer"),
    "choices that do not fit": (lambda p: p.generate("a", choices=["too long"], max_new_tokens=5), "max_new_tokens: expected at least 9"),
    "max_length of a text": (lambda p: p.generate("a", max_length=5), "max_length, min_length: they count the prompt"),
    "scores of a text": (lambda p: p.generate("a", output_scores=True), "output_scores: a pipeline gives text alone"),
    "a stream of several": (
        lambda p: p.generate("a", stream=True, num_beams=2, num_return_sequences=2),
        "num_return_sequences: expected 1 with stream=True",
    ),
    "a token that is none": (lambda p: p.generate("a", suppress_tokens=[3, 999]), "suppress_tokens: expected ids from 0 to 258, got 999"),
    "a wrong answer": (lambda p: p.generate("a", stopping_criteria=lambda ids, _: "yes"), "stopping_criteria: expected True or False"),
    "wrong scores": (lambda p: p.generate("a", logits_processor=lambda ids, s: s[:, :3]), "logits_processor: expected scores of shape"),
    "scores of NaN": (lambda p: p.generate("a", logits_processor=lambda ids, s: s * np.nan), "logits_processor: expected finite scores"),
    "nothing allowed": (
        lambda p: p.generate("a", prefix_allowed_tokens_fn=lambda n, ids: []),
        "expected at least one token id .* got none",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_done_is_refused(kind):
    call, told = REFUSED[kind]
    with pytest.raises((InvalidValue, InvalidType), match=told):
        call(pipe())


CONFLICTS = [
    ({"temperature": 0.5}, r"temperature: 0.5 needs do_sample=True \(--do-sample\)"),
    ({"top_k": 3, "top_p": 0.9}, r"top_k: 3 needs do_sample=True .*; top_p: 0.9 needs do_sample=True"),
    ({"min_p": 0.1}, "min_p: 0.1 needs"),
    ({"typical_p": 0.9}, "typical_p: 0.9 needs"),
    ({"epsilon_cutoff": 0.1}, "epsilon_cutoff: 0.1 needs"),
    ({"eta_cutoff": 0.1}, "eta_cutoff: 0.1 needs"),
    ({"length_penalty": 2}, r"length_penalty: 2 needs num_beams \(--num-beams\) above 1"),
    ({"early_stopping": True}, "early_stopping: True needs num_beams"),
    ({"num_beam_groups": 2}, "num_beam_groups: 2 needs num_beams"),
    ({"num_beams": 2, "diversity_penalty": 1}, "diversity_penalty: 1 needs num_beam_groups"),
    ({"num_beams": 3, "num_beam_groups": 2}, "num_beam_groups: expected a divisor of num_beams = 3, got 2"),
    ({"num_beams": 2, "num_beam_groups": 2, "do_sample": True}, "num_beam_groups: expected 1 with do_sample=True"),
    ({"num_return_sequences": 2}, "num_return_sequences: expected 1 without beams and draws, got 2"),
    ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences: expected at most num_beams = 2, got 3"),
    ({"max_length": 5, "max_new_tokens": 3}, "max_length: expected None beside max_new_tokens = 3; give one of them"),
    ({"min_new_tokens": 5, "max_new_tokens": 3}, "min_new_tokens: expected at most max_new_tokens = 3, got 5"),
    ({"stop_at_eos": False, "eos_token_id": 3}, "eos_token_id: .* needs an end"),
    ({"include_stop_strings": False}, "include_stop_strings: False needs stop_strings"),
    ({"top_logprobs": 2}, "top_logprobs: 2 needs output_scores=True"),
    ({"suppress_tokens": [3, 4], "forced_eos_token_id": 3}, r"forced_eos_token_id: \(3,\) is among suppress_tokens"),
]


@pytest.mark.parametrize(("options", "told"), CONFLICTS, ids=str)
def test_an_option_that_would_be_ignored_is_refused(options, told):
    with pytest.raises(InvalidValue, match=told):
        tiny_model().generate(np.full((1, 2), 4), **options)


@pytest.mark.parametrize("options", [{"max_length": 9}, {"max_length": 9, "num_beams": 2}], ids=str)
def test_max_length_counts_bos_and_the_prompt(options):
    model = tiny_model("decoder only", seed=2)
    made = model.generate(prompts(), [4, 1, 6, 4], stop_at_eos=False, **options)
    assert [len(row) for row in made] == [4, 7, 2, 4]
    with pytest.raises(InvalidValue, match="max_length: expected at least the prompt's 7 tokens, got 3"):
        model.generate(prompts(), max_length=3)
    made = tiny_model("pre norm", seed=2).generate(prompts(), stop_at_eos=False, **options)
    assert [len(row) for row in made] == [8] * 4


def test_penalties_of_what_was_generated():
    model = tiny_model("decoder only", seed=2)
    plain = model.generate(prompts(), max_new_tokens=12, stop_at_eos=False)
    assert any(len(set(row)) < 6 for row in plain)
    for row in model.generate(prompts(), max_new_tokens=12, stop_at_eos=False, presence_penalty=100.0):
        assert len(set(row)) == 12
    for row in model.generate(prompts(), max_new_tokens=13, stop_at_eos=False, frequency_penalty=100.0):
        assert sorted(row) == list(range(13)), "the prompt does not count"
    logits = model.logits(None, [[*prompts()[0], *plain[0][:4], 0]])[0, -1]
    counts = np.bincount(plain[0][:4], minlength=13)
    expected = int(np.argmax(logits - 0.3 * (counts > 0) - 0.2 * counts))

    def step(ids, scores):
        """The same four tokens, then a free one."""
        if ids.shape[1] == 11:
            return scores
        return np.where(np.arange(13) == plain[0][ids.shape[1] - 7], 0.0, -np.inf)[None]

    made = model.generate(
        prompts()[:1], max_new_tokens=5, stop_at_eos=False, presence_penalty=0.3, frequency_penalty=0.2, logits_processor=step
    )
    assert made[0] == [*plain[0][:4], expected]


def test_several_draws_are_independent_and_the_first_is_the_one():
    model = tiny_model("pre norm", seed=2)
    options = {"do_sample": True, "temperature": 2.0, "seed": 4, "max_new_tokens": 8}
    many = model.generate(prompts(), [4, 1, 6, 4], num_return_sequences=3, **options)
    assert [row[0] for row in many] == model.generate(prompts(), [4, 1, 6, 4], **options)
    assert all(len({tuple(one) for one in row}) > 1 for row in many)
    p = pipe()
    texts = p.generate("the fox", num_return_sequences=3, **options)
    assert texts[0] == p.generate("the fox", **options) and len(set(texts)) == 3
