"""A long input for an encoder-decoder: its encoder reads chunks that overlap, and the decoder sees what was kept of all of them."""

import tracemalloc

import numpy as np
import pytest
from helpers import assert_same_bits, in_a_process
from variants import tiny_model

import mini_tfm as mt
from mini_tfm.attention import Encoded
from mini_tfm.checkpoint.models import save_model
from mini_tfm.chunks import ending_full, streamed
from mini_tfm.errors import InvalidValue
from mini_tfm.stream import Stream
from mini_tfm.text import pieces
from mini_tfm.text.tokenizers import ByteTokenizer

TEXT = "".join(f"{i} quick brown foxes jump over {i * i} lazy dogs. " for i in range(9))
SEGMENT = 24
REPLACE = "store:top_k=100000,site=cross,merge=replace"
JOINT = ["store:top_k=100000,site=cross", "window:size=100000,site=cross"]
FAMILIES = ["paper", "t5", "bart", "marian", "m2m100", "grouped", "unequal", "rotary"]
PROMPT = np.array([[70, 71, 72, 73, 74]])


def pipe(memory=REPLACE, variant="pre norm", *, overlap=0.5, segment_length=SEGMENT, dtype=np.float32, **fields):
    fields = {"vocab_size": ByteTokenizer.vocab_size, "n_encoder_layers": 1, "n_decoder_layers": 2, **fields}
    model = tiny_model(variant, dtype=dtype, **fields)
    return mt.Pipeline(model, ByteTokenizer(), memory, segment_length, overlap=overlap)


def shared(p):
    return int(p.overlap * p.segment_length)


def kept_rows(p, text, cut):
    """(1, n, d): what is kept of the encoder's outputs, a chunk at a time."""
    chunks = cut(p.tokenizer.encode(text), p.segment_length, shared(p))
    return np.concatenate([p.model.encode(c.tokens[None])[:, c.first : c.stop] for c in chunks], axis=1)


def from_the_front(tokens, length, in_common):
    return list(streamed([tokens], length, in_common))


def remembered(p):
    """The rows of a pipeline's store in RAM or its window: hidden (n, d) and their positions (n,)."""
    (state,) = p._stream.run.states
    names = sorted({name.removesuffix("valid") for name in state if name.endswith("valid")}, key=lambda name: (len(name), name))
    valid = [state[name + "valid"][0] for name in names]
    hidden, at = ([state[name + part][0][rows] for name, rows in zip(names, valid, strict=True)] for part in ("hidden", "positions"))
    return np.concatenate(hidden), np.concatenate(at)


def logits_beside(model, rows, valid=None):
    """Of the prompt, by dense cross-attention to rows (1, n, d)."""
    stream, lengths = Stream(model, None, 1), np.array([PROMPT.shape[1]])
    stream.open(None, lengths)
    stream.encoded = Encoded(rows, np.ones(rows.shape[:2], bool) if valid is None else valid, 0)
    return stream.logits(stream.decode(PROMPT, lengths))


def logits_of(p, source, kept=None):
    stream, lengths = p._stream.copy(), np.array([source.shape[1]])
    stream.open(source, lengths, kept=kept)
    return stream.logits(stream.decode(PROMPT, np.array([PROMPT.shape[1]])))


def scores_of(generate):
    """(12, ids): the scores that a generation chooses its tokens by."""
    seen = []

    def noting(ids, scores):
        seen.append(scores[0, 3 : ByteTokenizer.vocab_size].copy())
        return scores

    generate(max_new_tokens=12, stop_at_eos=False, logits_processor=noting)
    return np.array(seen)


# What is kept


@pytest.mark.parametrize("memory", [REPLACE, *JOINT])
@pytest.mark.parametrize("overlap", [0, 0.5, 0.3, 0.9])
def test_the_memory_holds_each_token_once_as_its_chunk_encodes_it(memory, overlap):
    p = pipe(memory, "relative", overlap=overlap)
    n = p.read(TEXT)
    hidden, positions = remembered(p)
    assert n == len(TEXT) and positions.tolist() == list(range(n))
    np.testing.assert_allclose(hidden, kept_rows(p, TEXT, from_the_front)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_one_chunk_is_the_plain_encoding(overlap):
    p = pipe(overlap=overlap)
    p.read(TEXT[:SEGMENT])
    assert_same_bits(remembered(p)[0], p.model.encode(p.tokenizer.encode(TEXT[:SEGMENT])[None])[0])


def test_without_overlap_nothing_has_changed():
    """As one reads segments by hand."""
    p, tokens = pipe(overlap=0), ByteTokenizer().encode(TEXT)
    stream = Stream(p.model, mt.memory(REPLACE), 1)
    for start in range(0, len(tokens), SEGMENT):
        part = tokens[start : start + SEGMENT]
        stream.read(part[None], np.array([len(part)]))
    p.read(TEXT)
    expected, found = stream.run.dump(), p._stream.run.dump()
    assert_same_bits([found[name] for name in sorted(found)], [expected[name] for name in sorted(expected)])


def test_a_text_in_pieces_is_the_text_at_once():
    one, other = pipe(), pipe()
    one.read(TEXT)
    assert other.read(TEXT[i : i + 7] for i in range(0, len(TEXT), 7)) == len(TEXT)
    assert_same_bits(remembered(other), remembered(one))


def test_streams_of_a_batch_keep_what_each_keeps_alone():
    model, rng = tiny_model("relative", dtype=np.float32), np.random.default_rng(0)
    tokens, lengths = rng.integers(3, 13, (3, 2, 8)), np.array([[8, 8], [8, 5], [8, 0]])
    kept = np.zeros((3, 2, 8), bool)
    kept[:, 0, :6] = kept[0, 1, 2:] = kept[1, 1, 3:] = True
    together, found = Stream(model, mt.memory(REPLACE), 3), []
    for t in range(2):
        together.read(tokens[:, t], lengths[:, t], kept[:, t])
    together.open(np.ones((3, 1), np.int64), np.ones(3, np.int64))
    found = together.decode(PROMPT[[0, 0, 0]] % 13, np.full(3, PROMPT.shape[1]))
    assert together.run.start.tolist() == [6 + 6, 6 + 2, 6]
    for b in range(3):
        alone = Stream(model, mt.memory(REPLACE), 1)
        for t in range(2):
            if lengths[b, t]:
                alone.read(tokens[b : b + 1, t, : lengths[b, t]], lengths[b : b + 1, t], kept[b : b + 1, t, : lengths[b, t]])
        alone.open(np.ones((1, 1), np.int64), np.ones(1, np.int64))
        np.testing.assert_allclose(found[b : b + 1], alone.decode(PROMPT % 13, np.array([PROMPT.shape[1]])), rtol=1e-5, atol=1e-5)


def test_ram_is_bounded_whatever_the_length(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1024)

    def peak(n):
        p = pipe("window:size=50,site=cross", segment_length=128)
        p.read("some words first " * 20)
        tracemalloc.start()
        p.read("word " * 5 for _ in range(n))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    short, long = peak(60), peak(500)
    assert long < 1.2 * short + 20_000, (short, long)


# What is seen of it


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize("overlap", [0, 0.5])
def test_a_memory_that_replaces_and_shows_all_is_dense_attention_to_what_was_kept(variant, overlap):
    p = pipe(REPLACE, variant, overlap=overlap, dtype=np.float64)
    p.read(TEXT)
    expected = logits_beside(p.model, kept_rows(p, TEXT, from_the_front))
    found = logits_of(p, np.array([[p.model.config.bos_id]]))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert not np.allclose(found, logits_beside(p.model, p.model.encode(p.tokenizer.encode(TEXT[:SEGMENT])[None])), atol=1e-3)


@pytest.mark.parametrize("memory", [REPLACE, *JOINT])
@pytest.mark.parametrize("variant", ["t5", "bart"])
@pytest.mark.parametrize("overlap", [0, 0.5])
def test_a_long_prompt_is_seen_whole_and_once(memory, variant, overlap):
    """Read or given as one prompt; what the last segment has in common with the one before is not seen twice."""
    p = pipe(memory, variant, overlap=overlap, dtype=np.float64)
    expected = scores_of(lambda **given: p.model.generate(encoder_outputs=kept_rows(p, TEXT, ending_full), **given))
    np.testing.assert_allclose(scores_of(lambda **given: p.generate(TEXT, **given)), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scores_of(lambda **given: p.generate_many([TEXT], **given)), expected, rtol=1e-6, atol=1e-6)
    if memory == REPLACE:
        p.read(TEXT)
        expected = scores_of(lambda **given: p.model.generate(encoder_outputs=kept_rows(p, TEXT, from_the_front), **given))
        np.testing.assert_allclose(scores_of(lambda **given: p.generate("", **given)), expected, rtol=1e-6, atol=1e-6)


def test_a_few_rows_are_the_best_of_the_whole_input():
    """The row that a query is most like is found wherever it stands."""
    p = pipe("store:top_k=1,site=cross,merge=replace", "no positions", n_decoder_layers=1, n_heads=1, dtype=np.float64)
    p.read(TEXT)
    hidden = remembered(p)[0]
    stream, seen = p._stream.copy(), {}
    read = stream.run.members[0].read

    def noting(state, site, layer, query):
        seen["queries"], seen["view"] = query.hidden(), read(state, site, layer, query)
        return seen["view"]

    stream.run.members[0].read = noting
    try:
        stream.open(np.array([[1]]), np.array([1]))
        stream.decode(PROMPT, np.array([PROMPT.shape[1]]))
    finally:
        del stream.run.members[0].read
    best = (seen["queries"][0, 0] @ hidden.T).argmax(axis=1)
    view = seen["view"]
    np.testing.assert_array_equal(view.bank[1][0, view.index[0, 0, :, 0]], hidden[best])


def test_training_goes_through_rows_that_replace():
    """An encoder that is trained by what a later segment asks of its outputs alone."""
    rng, weights = np.random.default_rng(0), np.ones((16, 2, 1)) * [[[0], [1]]]
    config = mt.Config(vocab_size=11, d_model=32, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, segment_length=4)
    trainer = mt.Trainer(mt.Transformer(config, seed=0), mt.memory(REPLACE), learning_rate=3e-3, warmup_steps=5, total_steps=150)
    losses = []
    for _ in range(150):
        source, target = rng.integers(3, 11, (16, 2, 4)), np.zeros((16, 2, 1), np.int64)
        source[:, 1], target[:, :, 0] = 3, source[:, :1, 2]
        losses.append(trainer.step(source, target, weights=weights))
    assert np.mean(losses[:5]) > 1.8 and np.mean(losses[-5:]) < 0.5


# Interrupted, killed, refused


@pytest.mark.parametrize("memory", ["store", "window:size=10,site=cross+store"])
def test_the_same_answer_in_another_process(memory, tmp_path):
    """Of a store alone, and of one that a window hands its rows to when the streams end."""
    path = tmp_path / "notes.mdb"
    memory = memory.replace("store", f"store:path={path},top_k=4,site=cross,merge=replace")
    p = pipe(memory)
    save_model(tmp_path / "model", p.model, tokenizer=p.tokenizer)
    p.read(TEXT)
    expected = pipe("store:top_k=4,site=cross,merge=replace")
    expected.read(TEXT)
    p.close()
    asks = """if True:
        import sys
        import mini_tfm as mt
        pipe = mt.Pipeline.load(sys.argv[1], sys.argv[2], segment_length=24, overlap=0.5)
        print(repr(pipe.generate("dogs? ", max_new_tokens=20, stop_at_eos=False)))
    """
    found = in_a_process(asks, tmp_path / "model", memory).stdout.strip()
    assert found == repr(expected.generate("dogs? ", max_new_tokens=20, stop_at_eos=False))


def test_a_reading_that_was_interrupted_goes_on(tmp_path):
    """With what `durable` was told, read chunks are left out, and the rows are those of one reading."""
    p, told, left = pipe(f"store:path={tmp_path}/notes.mdb,site=cross,top_k=100000,merge=replace"), [], [20]
    read = Stream.read

    def stopped(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return read(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "read", stopped)
        with pytest.raises(KeyboardInterrupt):
            p.read(TEXT, durable=told.append)
    assert told == [SEGMENT * 3 // 4 + 15 * SEGMENT // 2] and told[0] < len(TEXT)
    again = pipe(p.memory.text)
    assert again.read(TEXT, skip=told[-1]) == len(TEXT) - told[-1]
    whole = pipe()
    whole.read(TEXT)
    assert again.memory.documents() == {"default": len(TEXT)}
    np.testing.assert_allclose(logits_of(again, np.ones((1, 1), int)), logits_of(whole, np.ones((1, 1), int)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overlap", [-0.1, 1, 1.5, float("nan"), True, "half", None])
def test_what_is_no_share_is_refused(overlap):
    with pytest.raises(InvalidValue, match="overlap: expected a share of a segment from 0 to below 1, got"):
        pipe(overlap=overlap)


@pytest.mark.parametrize("memory", [None, "window:size=8,site=all", "recurrent:tokens=2", "store:site=encoder", "store:site=decoder"])
def test_an_overlap_that_nothing_would_use_is_refused(memory):
    with pytest.raises(InvalidValue, match=r"overlap: expected 0 unless an encoder-decoder has a memory of the encoder's outputs alone"):
        pipe(memory)


def test_decoders_have_no_overlap():
    with pytest.raises(InvalidValue, match="overlap: expected 0 unless"):
        pipe("store", "decoder only", n_encoder_layers=0)


@pytest.mark.long
def test_a_model_of_t5_smalls_shape_sees_all_of_a_long_input():
    """60 million random weights, 3,000 tokens where it was trained for 512; float32."""
    t5_small = {"d_model": 512, "n_heads": 8, "d_head": 64, "d_ff": 2048, "n_encoder_layers": 6, "n_decoder_layers": 6,
                "relative_buckets": 32, "relative_max_distance": 128, "tie_embeddings": True, "output_scale": 512**-0.5,
                "context_length": 512, "bos_id": 0, "eos_id": 1, "framed_by_tokenizer": True, "vocab_size": 32128}  # fmt: skip
    p, text = pipe(REPLACE, "t5", segment_length=512, **t5_small), (TEXT * 9)[:3000]
    assert p.read(text) == 3000
    expected = logits_beside(p.model, kept_rows(p, text, from_the_front))
    found = logits_of(p, np.array([[0]]))
    assert np.abs(found - expected).max() < 1e-4 * np.ptp(expected)
    assert np.abs(logits_beside(p.model, kept_rows(p, text[:512], from_the_front)) - expected).max() > 0.05 * np.ptp(expected)
