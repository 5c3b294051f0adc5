"""The pipeline: text cut anywhere reads the same, looking does not change what is remembered, and scores are the model's."""

import json
import math
import re
import tracemalloc

import numpy as np
import pytest
from helpers import assert_same_bits, examples
from hypothesis import given
from hypothesis import strategies as st
from variants import tiny_model

import mini_tfm as mt
from mini_tfm.checkpoint.models import save_model
from mini_tfm.data import TextStreams
from mini_tfm.errors import FileProblem, InvalidType, InvalidValue
from mini_tfm.generate import Session
from mini_tfm.generate.cache import KVCache
from mini_tfm.pipeline import Pipeline
from mini_tfm.stream import Stream
from mini_tfm.text import pieces
from mini_tfm.text.tokenizers import BPETokenizer, ByteTokenizer, train_bpe
from mini_tfm.train import Trainer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "naïve", "cafés", "serve", "東京", "tea", "🙂", "1234", "(a)"]
MEMORIES = ["window:size=20", "window:size=9,sinks=2,site=all", "recurrent:tokens=2", "store:top_k=3", "window:size=8+store:top_k=2"]
SEGMENT = 12
TOKENIZERS = {"bytes": ByteTokenizer(), "bpe": train_bpe([" ".join(WORDS) * 20], 300)}


def prose(n, seed=0):
    """n words, with new lines and runs of spaces between them."""
    rng = np.random.default_rng(seed)
    gaps = np.array([" ", " ", " ", "  ", "\n", "\n\n", "\t "])
    return "".join(WORDS[i] + str(gap) for i, gap in zip(rng.integers(len(WORDS), size=n), rng.choice(gaps, n), strict=True))


def cut(text, seed):
    """The text in pieces of 0 to 40 characters."""
    rng = np.random.default_rng(seed)
    ends = np.append(np.cumsum(rng.integers(0, 41, len(text))), len(text))
    pieces = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    assert "".join(pieces) == text
    return pieces


def pipe(memory="window:size=20", variant="pre norm", tokenizer="bytes", *, seed=0, segment_length=SEGMENT, dtype=np.float32, **fields):
    layers = {"n_encoder_layers": 0} if variant.startswith("decoder only") else {"n_encoder_layers": 1}
    fields = {"vocab_size": TOKENIZERS[tokenizer].vocab_size, "n_decoder_layers": 1, **layers, **fields}
    model = tiny_model(variant, dtype=dtype, seed=seed, **fields)
    return Pipeline(model, TOKENIZERS[tokenizer], memory, segment_length)


def state(p):
    """All that a pipeline remembers."""
    arrays = p._stream.run.dump()
    return [sorted(arrays), [arrays[name] for name in sorted(arrays)], p._stream.last.tolist()]


@pytest.fixture
def small_pieces(monkeypatch):
    """Text is tokenized in pieces so small that a short one has many, and words that are too long for one."""
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 64)
    monkeypatch.setattr(pieces, "LONGEST_WORD_CHARACTERS", 150)


# ------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_text_read_in_pieces_is_text_read_at_once(memory, variant, small_pieces):
    text = prose(60)
    whole = pipe(memory, variant)
    count = whole.read(text)
    assert count == len(text.encode())
    for seed in range(3):
        pieces = pipe(memory, variant)
        assert pieces.read(iter(cut(text, seed))) == count
        assert_same_bits(state(pieces), state(whole))
    other = pipe(memory, variant)
    other.read(text[:-4] + "~" + text[-3:])
    assert any(a.tobytes() != b.tobytes() for a, b in zip(state(other)[1], state(whole)[1], strict=True)), "the state is of the text"


@examples(10)
@given(
    st.sampled_from(MEMORIES),
    st.sampled_from(["pre norm", "decoder only", "t5", "decoder only, llama"]),
    st.text("ab \n\u00e9\u6771", max_size=120),
    st.integers(0, 1000),
)
def test_any_text_in_any_pieces_is_the_text(memory, variant, text, seed):
    whole, parts = pipe(memory, variant), pipe(memory, variant)
    assert whole.read(text) == parts.read(iter(cut(text, seed)))
    assert_same_bits(state(parts), state(whole))


LONG_WORD = "over" * 40 + "fo"  # longer than a piece may be, with merges across where it is cut
TEXTS = [LONG_WORD + " and" * 20, "word " * 80, "x" * 700, "y" * 149 + " z", " " * 400]
TEXTS += [prose(40) + "w" * 400 + prose(40), "a\u2003b\x1cc\n" * 60]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_tokens_do_not_depend_on_the_cuts(text, tokenizer, small_pieces):
    p = pipe("window:size=4", tokenizer=tokenizer)
    expected = [chunk.tokens.tolist() for chunk in p._chunks(text)]
    assert all(len(segment) == SEGMENT for segment in expected[:-1]) and 0 < len(expected[-1]) <= SEGMENT
    for cuts in (list(text), cut(text, 1), cut(text, 2), [text[:1], text[1:]], ["", text, ""]):
        assert [chunk.tokens.tolist() for chunk in p._chunks(cuts)] == expected
    assert p.tokenizer.decode(np.concatenate(expected)) == text


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_where_there_are_spaces_the_tokens_are_those_of_the_whole_text(tokenizer, small_pieces):
    text = prose(200)
    found = np.concatenate([chunk.tokens for chunk in pipe("window:size=4", tokenizer=tokenizer)._chunks(text)])
    np.testing.assert_array_equal(found, TOKENIZERS[tokenizer].encode(text))


def test_two_reads_go_on_from_each_other():
    """The end of a call ends a segment: at a segment's end, two calls are one."""
    text = "abcdefghijkl" * 4
    assert len(text) % SEGMENT == 0
    for memory in MEMORIES:
        for variant in ("pre norm", "decoder only"):
            one, two = pipe(memory, variant), pipe(memory, variant)
            one.read(text)
            two.read(text[: 2 * SEGMENT])
            two.read(text[2 * SEGMENT :])
            assert_same_bits(state(two), state(one))


def test_nothing_read_changes_nothing():
    p = pipe()
    before = state(p)
    assert p.read("") == p.read([]) == p.read(["", ""]) == 0
    assert_same_bits(state(p), before)


def test_what_a_prompt_recalls_is_text_that_was_read():
    text = prose(200).encode("ascii", "ignore").decode()
    p = pipe("window:size=12+blocks:block_size=16,margin=2", "decoder only")
    assert p.recall("quick") == []
    p.read(text + " zzz " + text + "@")  # the last token is asked for as well: it comes before the prompt
    before = state(p)
    (one,) = p.recall("#" * SEGMENT + "zz")  # the last segment asks
    assert "zz" in one.text and one.text in text + " zzz " + text and one.document is None
    assert one.n_tokens == len(p.tokenizer.encode(one.text)) and one.rows == one.n_tokens * p.model.config.n_decoder_layers
    whole = p.tokenizer.encode(text + " zzz " + text)
    assert p.tokenizer.decode(whole[one.position - 1 :][: one.n_tokens]) == one.text  # a row's token is the one before
    assert p.recall("###") == [] and pipe("window:size=12", "decoder only").recall("quick") == []
    assert_same_bits(state(p)[1], before[1])


def test_reset_forgets():
    p, text = pipe("recurrent:tokens=2+window:size=20"), prose(20)
    before = state(p)
    p.read(text)
    first = state(p)
    p.reset()
    assert_same_bits(state(p), before)
    p.read(text)
    assert_same_bits(state(p), first)


def test_ram_is_bounded_whatever_the_length(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1024)

    def peak(n_words):
        p = pipe("window:size=50", segment_length=128)
        p.read(prose(50))
        tracemalloc.start()
        p.read(word + " " for _ in range(n_words // len(WORDS)) for word in WORDS)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert p.state_bytes() < 50 * 200
        return used

    short, long = peak(300), peak(2_400)
    assert long < 1.2 * short + 20_000, (short, long)


def test_a_long_str_is_not_copied_for_every_piece(monkeypatch):
    """Once 100 MB of text took minutes: each piece cut from its front copied all the rest."""
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1024)
    text = "word " * 100_000
    assert max(len(piece) for piece in pieces._slices([text])) == 1024
    tracemalloc.start()
    count = sum(len(piece) for piece in pieces.in_pieces([text]))
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(text) and used < 100_000


def test_a_store_on_disk_outlives_the_process(tmp_path):
    text = prose(30)
    written, ram = (pipe(memory, seed=3) for memory in (f"store:path={tmp_path / 'notes'},top_k=3", "store:top_k=3"))
    for p in (written, ram):
        p.read(text)
    again = pipe(f"store:path={tmp_path / 'notes'},top_k=3", seed=3)
    assert again.memory.documents() == {"default": len(text.encode())}
    expected = ram.score("the lazy dog")["bits"]
    for p in (written, again):
        assert p.score("the lazy dog")["bits"] == pytest.approx(expected, rel=1e-5)
    assert pipe(None, seed=3).score("the lazy dog")["bits"] != pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------- looking


@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("rolls", [False, True])
def test_generate_and_score_leave_the_memory_as_it_was(memory, variant, rolls):
    p = pipe(memory, variant)
    if rolls:
        p = Pipeline(type(p.model)(p.model.config.replace(segment_length=SEGMENT), weights=p.model.weights), p.tokenizer, memory)
    p.read(prose(10))
    before = state(p)
    made = p.generate(prose(8, seed=1), max_new_tokens=30, stop_at_eos=False)
    p.score(prose(8, seed=2))
    "".join(p.generate("abc", max_new_tokens=20, stream=True))
    assert_same_bits(state(p), before)
    assert p.generate(prose(8, seed=1), max_new_tokens=30, stop_at_eos=False) == made


@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
def test_what_was_read_changes_what_is_said_and_scored(variant):
    for memory in MEMORIES:
        p = pipe(memory, variant, seed=5)
        before = p.score("the fox")["bits"]
        p.read(prose(10))
        assert abs(p.score("the fox")["bits"] - before) > 1e-4, memory


@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 2.0, "seed": 4}], ids=["greedy", "sampled"])
def test_streamed_pieces_join_to_the_text(variant, tokenizer, options):
    p = pipe("window:size=20", variant, tokenizer)
    p.read(prose(10))
    options = {"max_new_tokens": 40, "stop_at_eos": False, **options}
    text = p.generate("the quick", **options)
    pieces = list(p.generate("the quick", stream=True, **options))
    assert "".join(pieces) == text and all(pieces)
    assert len(pieces) > 5 or "do_sample" not in options


def test_a_stream_is_as_the_memory_was_when_it_was_asked_for():
    p = pipe("window:size=20", seed=5)
    expected = p.generate("the quick", max_new_tokens=20)
    stream = p.generate("the quick", max_new_tokens=20, stream=True)
    p.read(prose(30))
    assert "".join(stream) == expected


def test_a_seed_repeats_and_another_does_not():
    p = pipe()
    draw = lambda seed: p.generate("a", max_new_tokens=20, do_sample=True, seed=seed)  # noqa: E731
    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
def test_only_ids_that_the_tokenizer_has_are_made(variant):
    """A model may have more ids than its tokenizer: vocabularies are padded to a round number."""
    p = pipe(None, variant, vocab_size=300)
    assert p.model.config.vocab_size > p.tokenizer.vocab_size
    made = [token for seed in range(5) for token in ids_of(p, "a", max_new_tokens=40, do_sample=True, temperature=50.0, seed=seed)]
    assert 200 < max(made) < p.tokenizer.vocab_size


def ids_of(p, text, **options):
    """What `generate` makes, as token ids."""
    made = []

    class Spy:
        def push(self, token):
            made.append(token)
            return ""

        def finish(self):
            return ""

    p.tokenizer = type(p.tokenizer)()
    p.tokenizer.decode_stream = Spy
    list(p.generate(text, stream=True, **{"stop_at_eos": False, **options}))
    return made


def test_generation_is_the_models():
    p = pipe(None)
    source = p.tokenizer.encode("the fox")
    assert ids_of(p, "the fox", max_new_tokens=30) == p.model.generate(source[None], max_new_tokens=30, stop_at_eos=False)[0]
    p = pipe(None, "decoder only")
    assert ids_of(p, "the fox", max_new_tokens=30) == p.model.generate(source[None], max_new_tokens=30, stop_at_eos=False)[0]


@pytest.mark.parametrize("variant", ["pre norm", "continues", "decoder only"])
def test_beyond_a_segment_generation_goes_on_from_what_it_made(variant):
    """A model trained on streams makes a segment, reads it, and makes the next; without a memory, from it alone."""
    model = pipe(None, variant).model
    model = type(model)(model.config.replace(segment_length=SEGMENT), weights=model.weights)
    p = Pipeline(model, ByteTokenizer())
    assert p.segment_length == SEGMENT
    source = p.tokenizer.encode("the fox jumps"[:SEGMENT])
    made = ids_of(p, "the fox jumps"[:SEGMENT], max_new_tokens=2 * SEGMENT + 5)
    assert len(made) == 2 * SEGMENT + 5
    before, expected = source, []
    while len(expected) < len(made):
        expected += model.generate(np.array([before]), max_new_tokens=min(SEGMENT, len(made) - len(expected)), stop_at_eos=False)[0]
        if variant == "decoder only":
            break  # the segments behind it begin with the token before them, where `generate` begins with bos
        before = expected[-SEGMENT:]
    assert made[: len(expected)] == expected
    for start in range(len(expected), len(made), SEGMENT):  # each of them is likeliest, given the token before it
        segment = made[start : start + SEGMENT]
        stream = Stream(model, None, 1)
        stream.last = np.array([made[start - 1]])
        stream.open(None, np.array([len(segment)]))
        scores = stream.logits(stream.decode(np.array([segment]), np.array([len(segment)])))[0]
        assert segment == np.argmax(scores[:, : p.tokenizer.vocab_size], axis=1).tolist()


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("variant", ["pre norm", "continues", "decoder only"])
def test_text_longer_than_a_segment_is_read_and_its_end_continued(memory, variant):
    text = "abcdefghijkl mnopqrstuv wxyz 0123456789"  # 3 segments and 3 tokens
    assert len(text) == 3 * SEGMENT + 3
    one, two = pipe(memory, variant), pipe(memory, variant)
    two.read(text[:3])
    two.read(text[3 : 3 + 2 * SEGMENT])
    options = {"max_new_tokens": 15, "stop_at_eos": False}
    assert one.generate(text, **options) == two.generate(text[-SEGMENT:], **options)


@pytest.mark.parametrize("memory", [None, "window:size=20,site=all", "recurrent:tokens=2", "store:top_k=3"])
@pytest.mark.parametrize(
    "variant", ["decoder only", "decoder only, learned", "decoder only, relative", "encoder and decoder", "encoder and decoder, continues"]
)
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 4}], ids=["greedy", "sampled"])
def test_a_long_continuation_has_the_bits_that_score_gives_it(variant, memory, options, monkeypatch):
    """No token stands where training and scoring put none: in a table as long as a segment the next position is an error."""
    fields = {"positions": "learned", "max_positions": SEGMENT} if "learned" in variant else {}
    if memory and memory.startswith("recurrent") and fields:
        fields["max_positions"] += 2  # its tokens stand before the segment's
    has_encoder = variant.startswith("encoder")
    name = ("continues" if "continues" in variant else "pre norm") if has_encoder else variant.removesuffix(", learned")
    p = pipe(memory, name, segment_length=None, dtype=np.float64, **fields)
    model = type(p.model)(p.model.config.replace(segment_length=SEGMENT), weights=p.model.weights, dtype=np.float64)
    p = Pipeline(model, ByteTokenizer(), memory)
    bits, scores = [], Session.scores

    def spy(session, hidden):
        bits.append(scores(session, hidden)[0])
        return scores(session, hidden)

    monkeypatch.setattr(Session, "scores", spy)
    monkeypatch.setattr(Session, "best", lambda session, hidden: np.argmax(session.scores(hidden), axis=1))
    monkeypatch.setattr(KVCache, "ahead", lambda *_: None)  # which computes no scores in Python
    for n in (0,) if has_encoder else (0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT - 2, 3 * SEGMENT):
        prompt = "".join(chr(97 + i % 7 * i % 26) for i in range(n))
        bits.clear()
        made = ids_of(p, prompt, max_new_tokens=40, **options)
        whole = p._stream.copy()
        found = [
            float(np.log2(np.exp(row - row.max()).sum()) - (row[i] - row.max()) / np.log(2)) for row, i in zip(bits, made, strict=True)
        ]
        text = np.concatenate([p.tokenizer.encode(prompt), made]).astype(np.int64)
        before, total, prefix = np.array([model.config.bos_id]), 0.0, 0.0
        for start in range(0, len(text), SEGMENT):
            segment = text[start : start + SEGMENT]
            if start <= n < start + SEGMENT and n > start:
                prefix = total + p._score_segment(whole.copy(), before, text[start:n])
            elif n == start:
                prefix = total
            total += p._score_segment(whole, before, segment)
            before = segment
        assert len(made) == 40 and sum(found) == pytest.approx(total - prefix, rel=1e-9), n


@pytest.mark.parametrize("variant", ["pre norm", "continues", "decoder only"])
def test_a_model_of_segments_makes_a_batch_in_segments(variant):
    """The same as the pipeline, row by row, drawn or not, and rows that end on the way do not matter to the others."""
    model = pipe(None, variant).model
    model = type(model)(model.config.replace(segment_length=SEGMENT), weights=model.weights)
    texts = ["the fox jumps", "over", "the lazy dog serves tea and cakes", "over"]
    ids = [ByteTokenizer().encode(text)[0 if variant == "decoder only" else -SEGMENT :] for text in texts]
    source = np.array([np.pad(each, (0, 40 - len(each))) for each in ids])
    made = model.generate(source, [len(each) for each in ids], max_new_tokens=30, stop_at_eos=False)
    assert made == [ids_of(Pipeline(model, ByteTokenizer()), text, max_new_tokens=30) for text in texts]
    options = {"max_new_tokens": 30, "do_sample": True, "temperature": 3.0, "seed": 4}
    endless = model.generate(source, [len(each) for each in ids], stop_at_eos=False, **options)
    assert endless[0] == ids_of(Pipeline(model, ByteTokenizer()), texts[0], **options)
    eos = next(token for i, token in enumerate(endless[3]) if i >= 9 and token not in endless[3][:i])
    ended = type(model)(model.config.replace(eos_id=eos), weights=model.weights)
    expected = [row[: row.index(eos)] if eos in row else row for row in endless]
    assert ended.generate(source, [len(each) for each in ids], **options) == expected


def test_a_table_of_positions_bounds_a_segment_that_nothing_else_does():
    """Of a model that was not trained on segments: once an error in the middle of a text."""
    for layers in (0, 1):
        p = pipe(None, "learned", n_encoder_layers=layers, segment_length=None)
        assert p.segment_length == p.model.config.max_positions == 40
        assert len(ids_of(p, "the quick brown fox jumps over the lazy dog", max_new_tokens=100)) == 100
        assert len(p.model.generate(np.full((2, 90 - 60 * layers), 5), max_new_tokens=70, stop_at_eos=False)[1]) == 70


def test_generation_ends_at_eos_also_beyond_a_segment():
    model = pipe(None, seed=1).model
    model = type(model)(model.config.replace(segment_length=4), weights=model.weights)
    endless = ids_of(Pipeline(model, ByteTokenizer()), "the", max_new_tokens=40, do_sample=True, temperature=3.0, seed=3)
    eos = next(token for i, token in enumerate(endless) if i >= 9 and token not in endless[:i])
    ended = type(model)(model.config.replace(eos_id=eos), weights=model.weights)
    made = ids_of(Pipeline(ended, ByteTokenizer()), "the", max_new_tokens=40, do_sample=True, temperature=3.0, seed=3, stop_at_eos=True)
    assert made == endless[: endless.index(eos)]


@pytest.mark.parametrize("memory", [None, "window:size=20,site=all", "store:site=cross,merge=replace"])
def test_a_model_that_continues_its_source_is_fed_the_last_token_before(memory, monkeypatch):
    """Also where that was read into a memory which stands in the place of the last segment."""
    p, fed = pipe(memory, "continues"), []
    decoder = type(p.model.decoder).__call__
    monkeypatch.setattr(type(p.model.decoder), "__call__", lambda self, tokens, *given: fed.append(tokens) or decoder(self, tokens, *given))
    for text in ("x", "the fox jumps over the lazy dog", "x" * SEGMENT + "y"):
        fed.clear()
        made = ids_of(p, text, max_new_tokens=3)
        steps = [tokens.tolist() for tokens in fed[-3:]]  # behind what it is fed while it reads
        assert steps == [[[p.tokenizer.encode(text)[-1]]], [made[:1]], [made[1:2]]]
        assert p.score(text)["tokens"] == len(text)
    fed.clear()
    p.score("fox")
    assert fed[0].tolist() == [[p.model.config.bos_id, *p.tokenizer.encode("fo")]]
    if memory is not None:
        fed.clear()
        p.read("the lazy dog")
        assert all(tokens[0, 0] == p.model.config.bos_id for tokens in fed), "reading, the decoder follows what was read before"
        fed.clear()
        ids_of(p, "", max_new_tokens=1)
        assert fed[-1].tolist() == [p.tokenizer.encode("g").tolist()], "nothing to go on from but what was read"


def test_a_read_that_fails_leaves_the_token_to_go_on_from(monkeypatch):
    p = pipe("window:size=20", "continues")
    p.read("fox")
    before = state(p)
    monkeypatch.setattr(type(p.model.encoder), "__call__", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        p.read("dog")
    assert_same_bits(state(p), before)


@pytest.mark.parametrize("variant", ["pre norm", "decoder only"])
def test_nothing_asked_and_nothing_to_go_on_from(variant):
    p = pipe("window:size=20", variant)
    assert p.generate("the fox", max_new_tokens=0) == ""
    assert list(p.generate("the fox", max_new_tokens=0, stream=True)) == []
    made = ids_of(p, "", max_new_tokens=5)
    nothing = [[p.model.config.bos_id]] if p.model.config.has_encoder else np.zeros((1, 0), int)
    assert made == p.model.generate(nothing, max_new_tokens=5, stop_at_eos=False)[0]


# ------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("variant", ["pre norm", "decoder only", "rotary", "continues", "decoder only, relative"])
@pytest.mark.parametrize("memory", [None, *MEMORIES])
def test_a_score_is_the_loss_that_training_measures(memory, variant):
    """The same segments, walked by the trainer's code: bits are nats times tokens over ln 2."""
    p = pipe(memory, variant, dtype=np.float64)
    text = prose(20)
    ids = p.tokenizer.encode(text)
    n = math.ceil(len(ids) / SEGMENT)
    has_encoder = p.model.config.has_encoder
    data = TextStreams([ids], segment_length=SEGMENT, n_segments=n, batch_size=1, has_encoder=has_encoder)
    found = p.score(text)
    loss = Trainer(p.model, p.memory).evaluate(data.cut([(ids, 0)], n))
    assert (found["tokens"], found["bytes"]) == (len(ids), len(text.encode()))
    assert found["bits"] == pytest.approx(loss * len(ids) / math.log(2), rel=1e-9)
    assert found["bits_per_token"] == found["bits"] / found["tokens"]
    assert found["bits_per_byte"] == found["bits"] / found["bytes"]


def test_a_score_is_the_sum_of_the_log_probabilities():
    """Once more, from the model's public logits."""
    p = pipe(None, dtype=np.float64)
    text = prose(12)
    ids, bits, before = p.tokenizer.encode(text), 0.0, np.array([p.model.config.bos_id])
    for start in range(0, len(ids), SEGMENT):
        segment = ids[start : start + SEGMENT]
        scores = p.model.logits(before[None], segment[None])[0]
        for token, row in zip(segment, scores, strict=True):
            bits -= math.log2(math.exp(row[token]) / np.exp(row).sum())
        before = segment
    assert p.score(text)["bits"] == pytest.approx(bits, rel=1e-9)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "relative"])
def test_logits_of_a_long_target_are_those_of_segments(positions):
    """Of a decoder-only model: what `score` adds up, what `generate` chooses from, and the same in a ragged batch."""
    fields = {"n_encoder_layers": 0, "segment_length": SEGMENT, "positions": positions}
    fields |= {"max_positions": SEGMENT} if positions == "learned" else {}
    p = Pipeline(tiny_model(vocab_size=259, **fields), ByteTokenizer())
    ids = p.tokenizer.encode(prose(12))
    assert len(ids) > 4 * SEGMENT and len(ids) % SEGMENT
    found = p.model.score_targets(None, ids[None])
    assert -found.sum() / math.log(2) == pytest.approx(p.score(prose(12))["bits"], rel=1e-9)
    prompt = ids[: SEGMENT + 4]
    [made] = p.model.generate(prompt[None], max_new_tokens=2 * SEGMENT, stop_at_eos=False)
    logits = p.model.logits(None, [[*prompt, *made]])[0]
    assert logits[len(prompt) :].argmax(axis=1).tolist() == made
    rows, lengths = np.stack([ids, ids[::-1]]), np.array([2 * SEGMENT - 3, len(ids)])
    both = p.model.score_targets(None, rows, target_lengths=lengths)
    for row, n, alone in zip(both, lengths, rows, strict=True):
        np.testing.assert_allclose(row[:n], p.model.score_targets(None, alone[None, :n])[0], rtol=1e-9)
        assert (row[n:] == 0).all()


def test_a_score_of_pieces_is_that_of_the_text(small_pieces):
    p, text = pipe("window:size=20", tokenizer="bpe"), prose(40)
    assert p.score(cut(text, 1)) == p.score(text)
    assert p.score(text)["bytes"] == len(text.encode()) > p.score(text)["tokens"]


# ------------------------------------------------------------------------------------------- vectors


@pytest.mark.parametrize("variant", ["pre norm", "encoder only", "relative"])
def test_a_vector_is_the_mean_of_the_encodings(variant):
    model = tiny_model(variant, vocab_size=300)
    p = Pipeline(model, ByteTokenizer(), segment_length=20)
    texts = ["the fox", "x", "a text longer than one segment, of which the rest is left out", ""]
    found = p.embed(texts)
    assert found.shape == (4, 8) and found.dtype == np.float64
    for text, vector in zip(texts[:3], found, strict=False):
        np.testing.assert_allclose(vector, model.encode(p.tokenizer.encode(text)[None, :20])[0].mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(found[3], 0)
    np.testing.assert_allclose(p.embed("the fox"), found[:1], rtol=1e-12)
    np.testing.assert_array_equal(p.embed(iter(texts)), found)
    assert p.embed([]).shape == (0, 8)
    assert p.embed([""]).shape == (1, 8)


def with_ends(kind="TemplateProcessing"):
    """The BPE tokenizer, with bos before and eos behind a text."""
    rules = json.loads(TOKENIZERS["bpe"].files()["tokenizer.json"])
    ends = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (("<bos>", 1), ("<eos>", 2))}
    single = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    single.append({"SpecialToken": {"id": "<eos>", "type_id": 0}})
    rules["post_processor"] = {"type": kind, "single": single, "pair": single, "special_tokens": ends}
    if kind == "BertProcessing":
        rules["post_processor"] = {"type": kind, "sep": ["<eos>", 2], "cls": ["<bos>", 1]}
    return BPETokenizer(json.dumps(rules).encode())


@pytest.mark.parametrize("kind", ["TemplateProcessing", "BertProcessing"])
def test_a_vector_is_of_the_tokens_that_the_model_was_trained_to_read(kind):
    model = tiny_model("encoder only", vocab_size=300)
    p = Pipeline(model, with_ends(kind), segment_length=6)
    for text in ("the fox", "the quick brown fox jumps over the lazy dog", ""):
        ids = [1, *p.tokenizer.encode(text)[:4].tolist(), 2]
        assert p.tokenizer.encode_alone(text, 6).tolist() == ids and 1 not in p.tokenizer.encode(text)
        np.testing.assert_allclose(p.embed([text, "x"])[0], model.encode([ids])[0].mean(axis=0), rtol=1e-10, atol=1e-12)
    with pytest.raises(InvalidValue, match=r"tokenizer\.json: puts 2 tokens around a text, the most that are read are 1"):
        Pipeline(model, with_ends(kind), segment_length=1).embed("x")


# ------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_pipeline_comes_back_from_its_folder(tokenizer, tmp_path):
    p = pipe("recurrent:tokens=2+window:size=9", tokenizer=tokenizer)
    model = type(p.model)(p.model.config.replace(segment_length=7), weights=p.model.weights)
    p = Pipeline(model, p.tokenizer, p.memory)
    save_model(tmp_path / "model", model, tokenizer=p.tokenizer, memory_text=p.memory.text)
    loaded = Pipeline.load(tmp_path / "model")
    assert loaded.segment_length == 7 and loaded.memory.text == p.memory.text
    for one in (p, loaded):
        one.read(prose(10))
    assert_same_bits(state(loaded), state(p))
    assert loaded.generate("the fox", max_new_tokens=9) == p.generate("the fox", max_new_tokens=9)
    assert loaded.score("the fox") == p.score("the fox")

    assert Pipeline.load(tmp_path / "model", memory=None).memory is None
    assert Pipeline.load(tmp_path / "model", memory="window:size=3").memory.text == "window:size=3"
    assert Pipeline.load(tmp_path / "model", segment_length=5).segment_length == 5
    with pytest.raises(InvalidValue, match="tokens has shape"):
        Pipeline.load(tmp_path / "model", memory="recurrent:tokens=3")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    tiny_model(dtype=np.float32).save(tmp_path / "model")
    with pytest.raises(InvalidValue, match=r"has no tokenizer.*mt\.load"):
        Pipeline.load(tmp_path / "model")
    with pytest.raises(FileProblem, match="there is no such folder"):
        Pipeline.load(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------- bad input

MAKING = {
    "a folder for a model": (lambda m: Pipeline("folder", ByteTokenizer()), InvalidType, r"model: expected a Transformer, got str; Pipe"),
    "no tokenizer": (lambda m: Pipeline(m, None), InvalidType, "tokenizer: expected a Tokenizer, got NoneType"),
    "a tokenizer too large": (lambda m: Pipeline(tiny_model(), ByteTokenizer()), InvalidValue, r"tokenizer: expected at most .*13 tokens"),
    "an unknown memory": (lambda m: Pipeline(m, ByteTokenizer(), "windo"), InvalidValue, "did you mean 'window'"),
    "a memory of another type": (lambda m: Pipeline(m, ByteTokenizer(), 3), InvalidType, "memory: expected a Memory"),
    "segment_length 0": (lambda m: Pipeline(m, ByteTokenizer(), segment_length=0), InvalidValue, "segment_length: expected.*got 0"),
    "segment_length -1": (lambda m: Pipeline(m, ByteTokenizer(), segment_length=-1), InvalidValue, "segment_length: expected.*got -1"),
    "segment_length 1.5": (lambda m: Pipeline(m, ByteTokenizer(), segment_length=1.5), InvalidValue, "segment_length: expected"),
    "segment_length True": (lambda m: Pipeline(m, ByteTokenizer(), segment_length=True), InvalidValue, "segment_length: expected"),
}


@pytest.mark.parametrize("kind", MAKING)
def test_what_makes_no_pipeline_is_refused(kind):
    call, error, told = MAKING[kind]
    with pytest.raises(error, match=told):
        call(tiny_model(vocab_size=300))


USING = {
    "read without a memory": (lambda p: pipe(None).read("text"), InvalidValue, "memory: this pipeline has none"),
    "read bytes": (lambda p: p.read(b"text"), InvalidType, "text: expected str or an iterable of str, got int"),
    "read None": (lambda p: p.read(None), InvalidType, "text: expected str or an iterable of str, got NoneType"),
    "read a number": (lambda p: p.read(3), InvalidType, "text: expected str"),
    "read numbers": (lambda p: p.read(["a", 3]), InvalidType, "text: expected str or an iterable of str, got int"),
    "read a lone surrogate": (lambda p: p.read("a\ud800b"), InvalidValue, "lone surrogate"),
    "generate from None": (lambda p: p.generate(None), InvalidType, "text: expected str, got NoneType"),
    "generate from a list": (lambda p: p.generate(["a"]), InvalidType, "text: expected str, got list"),
    "generate with an unknown option": (lambda p: p.generate("a", max_lenght=3), InvalidType, "unknown option 'max_lenght'"),
    "generate with a bad option": (lambda p: p.generate("a", top_p=2), InvalidValue, "top_p: expected"),
    "stream with a bad option": (lambda p: p.generate("a", stream=True, top_p=2), InvalidValue, "top_p: expected"),
    "score nothing": (lambda p: p.score(""), InvalidValue, "text: expected at least one token"),
    "score None": (lambda p: p.score(None), InvalidType, "text: expected str"),
    "embed None": (lambda p: p.embed(None), InvalidType, "text: expected str or an iterable of str, got NoneType"),
    "embed numbers": (lambda p: p.embed([1]), InvalidType, "text: expected str, got int"),
    "embed without an encoder": (lambda p: pipe(None, "decoder only").embed("a"), InvalidValue, "no encoder"),
    "past the learned positions": (
        lambda p: pipe(None, "learned", segment_length=50).score("a" * 50),
        InvalidValue,
        "expected at most max_positions = 40 positions, .*, got 50; give a shorter .*a memory and a segment_length of at most 40",
    ),
    "generate past the learned positions": (
        lambda p: pipe(None, "learned", segment_length=50).generate("a" * 45, max_new_tokens=5),
        InvalidValue,
        "max_positions = 40 positions, .*, got 45; give a shorter text or prompt, fewer max_new_tokens",
    ),
}


@pytest.mark.parametrize("kind", USING)
def test_what_cannot_be_used_is_refused_and_nothing_is_remembered(kind):
    call, error, told = USING[kind]
    p = pipe()
    before = state(p)
    with pytest.raises(error, match=told):
        call(p)
    assert_same_bits(state(p), before)
    assert isinstance(p.generate("it still works", max_new_tokens=2), str)


def test_models_without_a_decoder_can_only_embed():
    p = Pipeline(tiny_model("encoder only", vocab_size=300), ByteTokenizer())
    for call in (lambda: p.generate("a"), lambda: p.score("a")):
        with pytest.raises(InvalidValue, match="no decoder"):
            call()


def test_mt_names():
    assert mt.Pipeline is Pipeline


@pytest.mark.parametrize("encoders", [0, 1])
@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_a_score_that_is_not_finite_is_an_error(encoders, value):
    model = mt.Transformer(
        mt.Config(vocab_size=259, d_model=8, n_heads=2, n_encoder_layers=encoders, n_decoder_layers=1, segment_length=16)
    )
    for part in ("in", "out"):
        model.weights[f"decoder.0.feed_forward.{part}.weight"][:] = value
    with np.errstate(all="ignore"), pytest.raises(InvalidValue, match=r"score: token \d of segment 0 takes \S+ bits"):
        mt.Pipeline(model, ByteTokenizer()).score("abc")


BUILT_IN = [
    "window:size=8",
    "window:size=8,sinks=2,site=all",
    "recurrent:tokens=2",
    "recurrent:tokens=2,residual=true",
    "store:top_k=3",
    "store:top_k=3,merge=gate,layer=-1",
    "store:top_k=3,merge=replace",
    "store:path={path},top_k=3",
    "window:size=8+store:path={path},top_k=3",
    *(
        f"{name},site={site}"
        for name in ("window:size=8", "recurrent:tokens=2", "store:top_k=3")
        for site in ("encoder", "decoder", "cross")
    ),
]


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("stacks", [(2, 0), (0, 2), (1, 1)], ids=["encoder-only", "decoder-only", "encoder-decoder"])
@pytest.mark.parametrize("spec", BUILT_IN)
def test_every_model_with_every_memory_does_what_it_can_and_refuses_the_rest(spec, stacks, positions, tmp_path):
    """Before any work: a memory at a site that the model has not, a call for a stack that it has not."""
    encoders, decoders = stacks
    config = mt.Config(
        vocab_size=259,
        d_model=8,
        n_heads=2,
        n_encoder_layers=encoders,
        n_decoder_layers=decoders,
        segment_length=SEGMENT,
        positions=positions,
        max_positions=64,
    )
    model, spec = mt.Transformer(config, seed=0), spec.format(path=tmp_path / "notes.mdb")
    has = {"encoder": bool(encoders), "decoder": bool(decoders), "cross": bool(encoders and decoders)}
    wanted = spec.partition("site=")[2]
    if wanted in has and (not has[wanted] or (wanted == "cross" and "recurrent" in spec)):
        with pytest.raises(InvalidValue, match=f"works at \\['{wanted}'\\], but this model has only|site: expected encoder or decoder"):
            Pipeline(model, ByteTokenizer(), spec)
        return
    p, text = Pipeline(model, ByteTokenizer(), spec), prose(12)
    if encoders:
        assert np.isfinite(p.embed([text, "b"])).all()
    else:
        with pytest.raises(InvalidValue, match="no encoder"):
            p.embed([text])
    if not decoders:
        for call in (p.read, p.score, p.generate):
            with pytest.raises(InvalidValue, match="no decoder"):
                call(text)
        assert p._stream.run.number == 0
        return
    for part in (text, text[:5]):  # the last segments are short
        assert p.read(part) == len(part.encode())
        assert np.isfinite(p.score(text)["bits"])
        assert isinstance(p.generate(text, max_new_tokens=SEGMENT + 3, seed=0, do_sample=True), str)
    p.close()
    assert p.read("again") == 5


@pytest.mark.parametrize("memory", ["window:size=8", "recurrent:tokens=2", None])
def test_what_is_saved_is_what_is_loaded(memory, tmp_path):
    config = mt.Config(vocab_size=ByteTokenizer.vocab_size, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, segment_length=8)
    pipe = Pipeline(mt.Transformer(config, seed=3), ByteTokenizer(), memory)
    pipe.save(tmp_path / "m")
    again = Pipeline.load(tmp_path / "m")
    assert (again.memory.text if again.memory else None) == memory and again.segment_length == 8
    assert again.score("The quick brown fox jumps.") == pipe.score("The quick brown fox jumps.")


FOREIGN = {
    "a plugin's source": (
        {"pyproject.toml": "[project]", "plug.py": ""},
        "holds pyproject.toml, so it is the source.*give a new folder, such as .*model",
    ),
    "a config.json of something else": (
        {"config.json": '{"mine": 1}'},
        "holds config.json, which is of no model of ours and would be lost",
    ),
    "a published model": ({"config.json": '{"model_type": "gpt2"}', "model.safetensors": ""}, "holds config.json.*give another folder"),
    "weights alone": ({"model.safetensors": "mine"}, "holds model.safetensors"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("saved", ["pipeline", "model", "run"])
def test_a_folder_of_something_else_is_no_place_for_a_model(kind, saved, tmp_path):
    """Its files were replaced, or it became a model's (regression)."""
    files, told = FOREIGN[kind]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    made = pipe(None)
    save = {
        "pipeline": made.save,
        "model": made.model.save,
        "run": lambda folder: Trainer(made.model).fit(lambda step: None, 1, folder=folder),
    }
    with pytest.raises(FileProblem, match=f"^{re.escape(str(tmp_path))} {told}"):
        save[saved](tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_a_model_is_replaced_by_the_next_and_what_is_beside_it_stays(tmp_path):
    made = pipe(None)
    made.tokenizer.save(tmp_path)
    made.save(tmp_path)  # beside a tokenizer alone
    (tmp_path / "notes.txt").write_text("mine")
    made.model.weights["embedding.weight"][:] = 1
    made.save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (Pipeline.load(tmp_path).model.weights["embedding.weight"] == 1).all()


def test_a_memory_that_no_text_makes_is_not_saved(tmp_path):
    from mini_tfm.memory import Memory

    config = mt.Config(vocab_size=ByteTokenizer.vocab_size, d_model=8, n_heads=2, n_encoder_layers=1, n_decoder_layers=1)
    with pytest.raises(InvalidValue, match=r"memory: Memory was not made by its name.*mt\.register_memory"):
        Pipeline(mt.Transformer(config), ByteTokenizer(), Memory()).save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("memory", ["window:size=400", "window:size=400,sinks=2", "store:top_k=400"])
@pytest.mark.parametrize("length", [16, 50])
def test_a_published_model_that_remembers_all_is_the_one_that_reads_at_once(memory, length):
    """In segments, with rotary positions that begin anew in each: the rows of a memory stand where they stood."""
    config = mt.Config(
        vocab_size=259, d_model=16, n_heads=4, n_kv_heads=2, n_encoder_layers=0, n_decoder_layers=3, positions="rotary",
        norm="rms", gated=True, activation="silu", bias=("q", "k", "v"), qk_norm=True, context_length=512, framed_by_tokenizer=True,
    )  # fmt: skip
    rng, model = np.random.default_rng(0), mt.Transformer(config, seed=1, dtype=np.float64)
    model.weights = {name: weight + 0.3 * rng.standard_normal(weight.shape) for name, weight in model.weights.items()}
    whole, parts = Pipeline(model, ByteTokenizer()), Pipeline(model, ByteTokenizer(), memory, segment_length=length)
    text = prose(30)
    assert parts.score(text)["bits"] == pytest.approx(whole.score(text)["bits"], rel=1e-9)
    assert parts.generate(text, max_new_tokens=30) == whole.generate(text, max_new_tokens=30)
    some = text[:70]
    parts.read(some)
    again = Pipeline(model, ByteTokenizer(), memory, segment_length=length)
    assert again.read(some) == len(some.encode()) and again.score("and so on")["bits"] == parts.score("and so on")["bits"]


def test_a_published_model_without_a_memory_refuses_what_it_cannot_read():
    config = mt.Config(
        vocab_size=259, d_model=8, n_heads=2, n_encoder_layers=0, n_decoder_layers=1, positions="rotary", context_length=24,
        framed_by_tokenizer=True,
    )  # fmt: skip
    pipe = Pipeline(mt.Transformer(config, seed=0), ByteTokenizer())
    with pytest.raises(InvalidValue, match=r"has 29 tokens, and the model reads at most 24 at once; shorten it, or give a memory"):
        pipe.generate("x" * 30)
    with pytest.raises(InvalidValue, match="reads at most 24 at once"):
        pipe.model.generate(np.full((1, 30), 5))
    assert len(pipe.model.generate(np.full((1, 20), 5), max_new_tokens=50, stop_at_eos=False)[0]) == 5  # up to its context
    assert isinstance(Pipeline(pipe.model, ByteTokenizer(), "window:size=24").generate("x" * 300, max_new_tokens=30), str)
