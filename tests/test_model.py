"""The Transformer against the paper, against itself, and against bad input."""

import os

import numpy as np
import paper
import pytest
from helpers import assert_same_bits, examples
from hypothesis import given
from hypothesis import strategies as st
from variants import SIZES, VARIANTS, assert_gradients, tiny_model, tokens

import mini_tfm as mt
from mini_tfm import ops
from mini_tfm.autodiff import Var, backward
from mini_tfm.config import Config
from mini_tfm.context import Dropout
from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.generate import Session
from mini_tfm.model import weight_shapes
from mini_tfm.stream import Stream
from mini_tfm.transformer import Transformer

IS_REFERENCE = os.environ.get("MINI_TFM_ISA") == "reference"
WITH_DECODER = [name for name, fields in VARIANTS.items() if fields.get("n_decoder_layers") != 0]
WITH_ENCODER = [name for name, fields in VARIANTS.items() if fields.get("n_encoder_layers") != 0]

# Ragged on purpose: one row is full, one short, one of a single token.
SOURCE_LENGTHS, TARGET_LENGTHS = np.array([5, 7, 1]), np.array([6, 1, 4])


def batch(model, seed=0):
    """source (3, 7) or None, target (3, 6)."""
    rng = np.random.default_rng(seed)
    source, target = tokens(rng, 3, 7), tokens(rng, 3, 6)
    return (source if model.config.has_encoder else None), target


def logits(model, source, target, rows=slice(None), **cut):
    lengths = SOURCE_LENGTHS[rows] if source is not None else None
    return model.logits(None if source is None else source[rows], target[rows], lengths, TARGET_LENGTHS[rows], **cut)


# ------------------------------------------------------------------------------------------- the paper


@pytest.mark.parametrize("variant", WITH_DECODER)
def test_logits_are_the_papers(variant):
    model = tiny_model(variant)
    source, target = batch(model)
    found = logits(model, source, target)
    assert found.shape == (3, 6, SIZES["vocab_size"]) and found.dtype == np.float64
    for b, (s, t) in enumerate(zip(SOURCE_LENGTHS, TARGET_LENGTHS, strict=True)):
        expected = paper.logits(model.config, model.weights, None if source is None else source[b, :s], target[b, :t])
        np.testing.assert_allclose(found[b, :t], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", WITH_ENCODER)
def test_encodings_are_the_papers_and_zero_past_the_length(variant):
    model = tiny_model(variant)
    source = tokens(np.random.default_rng(0), 3, 7)
    found = model.encode(source, SOURCE_LENGTHS)
    for b, n in enumerate(SOURCE_LENGTHS):
        np.testing.assert_allclose(found[b, :n], paper.encode(model.config, model.weights, source[b, :n]), rtol=1e-10, atol=1e-10)
        assert (found[b, n:] == 0).all()


@pytest.mark.parametrize("variant", WITH_DECODER)
def test_every_weight_counts_in_the_paper(variant):
    """Otherwise agreement with it would say nothing about that weight."""
    model = tiny_model(variant)
    source, target = batch(model)
    source = source[0] if source is not None else None
    before = paper.logits(model.config, model.weights, source, target[0])
    for name, weight in model.weights.items():
        changed = {**model.weights, name: weight + np.random.default_rng(0).standard_normal(weight.shape)}
        after = paper.logits(model.config, changed, source, target[0])
        if name.endswith(".k.bias"):  # adds the same to all scores of a query, unless positions turn it
            continue
        assert np.abs(after - before).max() > 1e-9, name


# ------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_the_whole_model_are_those_of_finite_differences(variant):
    layers = {name: min(1, VARIANTS[variant].get(name, 1)) for name in ("n_encoder_layers", "n_decoder_layers")}
    model = tiny_model(variant, **layers)
    source, target = batch(model)
    weights = np.random.default_rng(1).random(target.size) * (np.arange(6) < TARGET_LENGTHS[:, None]).ravel()
    shares = np.random.default_rng(2).standard_normal((*(source if source is not None else target).shape, SIZES["d_model"]))
    all_lengths = SOURCE_LENGTHS if source is not None else TARGET_LENGTHS

    def loss(w):
        stream = Stream(model, None, 3, weights=w)
        stream.open(source, all_lengths)
        if not model.config.has_decoder:
            return np.sum(stream.encoded.text * shares * stream.encoded.valid[..., None])
        scores = np.reshape(stream.logits(stream.decode(target, TARGET_LENGTHS)), (-1, SIZES["vocab_size"]))
        return ops.cross_entropy(scores, target.ravel(), weights, 0.1)

    leaves = {name: Var(weight) for name, weight in model.weights.items()}
    backward(loss(leaves))
    gradients = {name: np.zeros_like(leaf.value) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    assert_gradients(lambda w: float(loss(w)), model.weights, gradients, tolerance=3e-6)


def test_dropout_is_differentiated_with_the_mask_it_had():
    model = tiny_model("pre norm", n_encoder_layers=1, n_decoder_layers=1)
    source, target = batch(model)

    def loss(w):
        stream = Stream(model, None, 3, weights=w)
        stream.open(source, SOURCE_LENGTHS, dropout=Dropout(0.3, seed=5))
        return np.sum(stream.decode(target, TARGET_LENGTHS) ** 2)

    leaves = {name: Var(weight) for name, weight in model.weights.items()}
    backward(loss(leaves))
    assert_gradients(lambda w: float(loss(w)), model.weights, {name: leaf.grad for name, leaf in leaves.items()}, tolerance=3e-6)


# ------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("variant", WITH_DECODER)
def test_the_decoder_does_not_see_what_comes(variant):
    model = tiny_model(variant)
    source, target = batch(model)
    whole = model.logits(source, target)
    for t in range(6):
        changed = target.copy()
        changed[:, t] = 3 + (changed[:, t] - 2) % 10
        found = model.logits(source, changed)
        assert_same_bits(found[:, : t + 1], whole[:, : t + 1])
        assert t == 5 or (found[:, t + 1 :] != whole[:, t + 1 :]).any(axis=2).all(), "what came before must be seen"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_lies_past_the_length_does_not_matter(variant, dtype):
    model = tiny_model(variant, dtype=dtype)
    source, target = batch(model)
    call = logits if model.config.has_decoder else lambda model, source, target: model.encode(source, SOURCE_LENGTHS)
    whole = call(model, source, target)
    others = [None if x is None else x.copy() for x in (source, target)]
    for x, lengths in zip(others, (SOURCE_LENGTHS, TARGET_LENGTHS), strict=True):
        if x is not None:
            x[np.arange(x.shape[1]) >= lengths[:, None]] = 0
    found = call(model, *others)
    lengths = TARGET_LENGTHS if model.config.has_decoder else SOURCE_LENGTHS
    for b, n in enumerate(lengths):
        assert_same_bits(found[b, :n], whole[b, :n])


def assert_same_row(found, expected):
    """The same bits. The NumPy twins promise it of float32 alone, which they compute in float64 and round."""
    if IS_REFERENCE and expected.dtype == np.float64:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * np.abs(expected).max())
    else:
        assert_same_bits(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_alone_is_the_row_in_the_batch(variant, dtype):
    model = tiny_model(variant, dtype=dtype)
    source, target = batch(model)
    if model.config.has_decoder:
        whole = logits(model, source, target)
        for b in range(3):
            assert_same_row(logits(model, source, target, slice(b, b + 1)), whole[b : b + 1])
    if model.config.has_encoder:
        whole = model.encode(source, SOURCE_LENGTHS)
        for b in range(3):
            assert_same_row(model.encode(source[b : b + 1], SOURCE_LENGTHS[b : b + 1]), whole[b : b + 1])


def test_a_row_alone_is_the_row_in_a_large_batch():
    """Sizes at which the kernels work in panels and on several threads."""
    model = Transformer(Config(vocab_size=300, d_model=96, n_heads=4, n_encoder_layers=1, n_decoder_layers=1))
    rng = np.random.default_rng(0)
    source, target = tokens(rng, 9, 37, vocab_size=300), tokens(rng, 9, 33, vocab_size=300)
    lengths = rng.integers(1, 38, 9)
    whole = model.logits(source, target, lengths)
    for b in (0, 4, 8):
        assert_same_bits(model.logits(source[b : b + 1], target[b : b + 1], lengths[b : b + 1]), whole[b : b + 1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_is_near_float64(variant):
    single, double = tiny_model(variant, dtype=np.float32), tiny_model(variant)
    source, target = batch(double)
    if double.config.has_decoder:
        found, expected = logits(single, source, target), logits(double, source, target)
    else:
        found, expected = (model.encode(source, SOURCE_LENGTHS) for model in (single, double))
    assert found.dtype == np.float32
    # A few hundred roundings on the way, each of 6e-8 of the largest term.
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def test_permuting_the_source_changes_nothing_without_positions():
    model = tiny_model("no positions")
    source, target = batch(model)
    order = np.random.default_rng(0).permutation(7)
    np.testing.assert_allclose(model.logits(source[:, order], target), model.logits(source, target), rtol=1e-9, atol=1e-12)
    with_positions = tiny_model("pre norm")
    assert np.abs(with_positions.logits(source[:, order], target) - with_positions.logits(source, target)).max() > 1e-3


@pytest.mark.parametrize("variant", ["paper", "relative", "decoder only"])
def test_nothing_to_read_and_nothing_to_say(variant):
    model = tiny_model(variant)
    source = np.zeros((2, 0), int) if model.config.has_encoder else None
    some = np.full((2, 3), 4)
    assert np.isfinite(model.logits(source, some)).all()
    assert model.logits(source, np.zeros((2, 0), int)).shape == (2, 0, 13)
    nobody = np.zeros((0, 3), int)
    assert model.logits(None if source is None else nobody, nobody).shape == (0, 3, 13)
    if source is not None:
        assert model.encode(source).shape == (2, 0, 8)
        assert_same_bits(model.logits(source, some), model.logits(some, some, source_lengths=[0, 0]))


# ------------------------------------------------------------------------------------------- of any architecture

ARCHITECTURES = st.fixed_dictionaries(
    {
        "n_encoder_layers": st.integers(0, 2),
        "n_decoder_layers": st.integers(1, 2),
        "heads": st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]),
        "d_head": st.sampled_from([2, 4]),
        "norm": st.sampled_from(["layer", "rms"]),
        "norm_position": st.sampled_from(["pre", "post"]),
        "activation": st.sampled_from(["relu", "gelu", "silu"]),
        "positions": st.sampled_from(["sinusoidal", "learned", "rotary", "relative", "none"]),
        "bias": st.booleans(),
        "tie_embeddings": st.booleans(),
    }
)


def any_model(fields, seed, single):
    heads = dict(zip(("n_heads", "n_kv_heads"), fields["heads"], strict=True))
    fields = {name: value for name, value in fields.items() if name != "heads"} | heads
    return tiny_model(seed=seed, dtype=np.float32 if single else np.float64, **fields, relative_buckets=8, relative_max_distance=9)


STREAMS = st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=2, max_size=4)  # lengths of segments, stream by stream
MEMORIES = [None, "window:size=3", "window:size=5,sinks=1,site=all", "recurrent:tokens=2", "store:top_k=2", "window:size=2+store:top_k=2"]


@examples(10)
@given(ARCHITECTURES, st.integers(0, 1000), STREAMS, st.sampled_from(MEMORIES))
def test_a_stream_alone_is_the_stream_in_a_batch(fields, seed, lengths, memory):
    """Whatever is read beside it, by a memory or without one."""
    model, rng = any_model(fields, seed, single=True), np.random.default_rng(seed)
    if memory is not None:
        memory = mt.memory(memory)
        model.add_memory_weights(memory, 1)
    lengths = np.array(lengths)
    source, target = (rng.integers(3, 13, (*lengths.shape, 4)) for _ in range(2))

    def outputs(rows):
        stream, found = Stream(model, memory, len(lengths[rows])), []
        for n, read, said in zip(lengths[rows].T, source[rows].swapaxes(0, 1), target[rows].swapaxes(0, 1), strict=True):
            stream.open(read if model.config.has_encoder else None, n)
            found.append(stream.logits(stream.decode(said, n)) * (np.arange(4) < n[:, None])[..., None])
            stream.finish()
        return np.stack(found, axis=1)

    whole = outputs(slice(None))
    for row in range(len(lengths)):
        assert_same_row(outputs(slice(row, row + 1)), whole[row : row + 1])


# ------------------------------------------------------------------------------------------- the cache


@examples(10)
@given(ARCHITECTURES, st.integers(0, 1000), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.booleans())
def test_cached_decoding_is_full_decoding(fields, seed, pieces, single):
    """The decoder fed piece by piece, from one token on, gives the logits it gives all at once."""
    model, rng = any_model(fields, seed, single), np.random.default_rng(seed)
    target, lengths = tokens(rng, 2, sum(pieces)), np.array([3, 1])
    source = tokens(rng, 2, 3) if model.config.has_encoder else None
    whole = model.logits(source, target, lengths if source is not None else None)

    stream = Stream(model, None, 2)
    stream.open(source, lengths)
    inputs, session, done = stream.shifted(target), Session(stream), 0
    tolerance = (2e-5 if single else 1e-12) * np.abs(whole).max()
    for n in pieces:
        scores = session.scores(session.step(inputs[:, done : done + n]))
        done += n
        np.testing.assert_allclose(scores, whole[:, done - 1], rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_those_announced(variant):
    model = Transformer(Config(**{**SIZES, **VARIANTS[variant]}))
    assert {name: w.shape for name, w in model.weights.items()} == weight_shapes(model.config)
    assert {w.dtype for w in model.weights.values()} == {np.dtype(np.float32)}
    assert model.n_parameters == sum(w.size for w in model.weights.values())


def test_the_paper_model_has_as_many_weights_as_the_paper_says():
    """Table 3, base: 65 million with a shared vocabulary of about 37,000; counted without making them."""
    shapes = weight_shapes(Config(vocab_size=37_000, d_model=512, n_heads=8, n_encoder_layers=6, n_decoder_layers=6, d_ff=2048))
    assert 62e6 < sum(int(np.prod(shape)) for shape in shapes.values()) < 66e6


def test_the_seed_decides_the_weights():
    config = Config(**SIZES)
    first, again, other = (Transformer(config, seed=seed).weights for seed in (1, 1, 2))
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)
    assert any((first[name] != other[name]).any() for name in first)


def test_initial_weights_keep_the_size_of_what_passes_through():
    model = Transformer(Config(vocab_size=1000, d_model=256, n_encoder_layers=1, n_decoder_layers=1))
    for name in ("encoder.0.attention.q.weight", "decoder.0.feed_forward.out.weight"):
        weight = model.weights[name]
        assert abs(weight.std() * weight.shape[0] ** 0.5 - 1) < 0.02, name
    assert abs(model.weights["embedding.weight"].std() * 16 - 1) < 0.02


def test_fingerprints_tell_weights_apart():
    model = tiny_model()
    before = model.fingerprint()
    assert before == tiny_model().fingerprint()
    model.weights["encoder.0.feed_forward.in.bias"][3] += 1e-9
    assert model.fingerprint() != before


# ------------------------------------------------------------------------------------------- bad input

GOOD = np.full((2, 3), 4)
BAD_TOKENS = {
    "None": (None, InvalidType),
    "text": ("abc", InvalidType),
    "one number": (4, InvalidValue),
    "one row": ([4, 5], InvalidValue),
    "rank 3": (np.full((1, 2, 3), 4), InvalidValue),
    "no rows": ([], InvalidValue),
    "real numbers": (np.full((2, 3), 4.0), InvalidType),
    "NaN": (np.full((2, 3), np.nan), InvalidType),
    "bool": (np.ones((2, 3), bool), InvalidType),
    "objects": (np.full((2, 3), None), InvalidType),
    "strings": ([["a", "b"]], InvalidType),
    "ragged": ([[4, 5], [4]], InvalidValue),
    "vocab_size": (np.full((2, 3), 13), InvalidValue),
    "negative": (np.full((2, 3), -1), InvalidValue),
    "huge": (np.full((2, 3), 2**63, np.uint64), InvalidValue),
    "a dict": ({"input_ids": GOOD}, InvalidType),
    "a Var": (Var(np.ones((2, 3))), InvalidType),
}
BAD_LENGTHS = {
    "too many": [3, 3, 3],
    "too few": [3],
    "one number": 3,
    "rank 2": [[3], [3]],
    "longer than the row": [3, 4],
    "negative": [3, -1],
    "real numbers": [3.0, 3.0],
    "text": "ab",
    "bool": np.ones(2, bool),
    "ragged": [[1], [1, 2]],
}


@pytest.mark.parametrize("kind", BAD_TOKENS)
@pytest.mark.parametrize("call", ["encode", "logits source", "logits target", "generate"])
def test_tokens_are_checked(call, kind):
    model, (bad, error) = tiny_model(), BAD_TOKENS[kind]
    calls = {
        "encode": (lambda: model.encode(bad), "tokens"),
        "logits source": (lambda: model.logits(bad, GOOD), "source"),
        "logits target": (lambda: model.logits(GOOD, bad), "target"),
        "generate": (lambda: model.generate(bad), "source"),
    }
    function, name = calls[call]
    with pytest.raises(error, match=rf"^({name}: expected|a Var would)"):
        function()


@pytest.mark.parametrize("kind", BAD_LENGTHS)
@pytest.mark.parametrize("call", ["encode", "logits source", "logits target", "generate"])
def test_lengths_are_checked(call, kind):
    model, bad = tiny_model(), BAD_LENGTHS[kind]
    calls = {
        "encode": (lambda: model.encode(GOOD, bad), "tokens"),
        "logits source": (lambda: model.logits(GOOD, GOOD, source_lengths=bad), "source"),
        "logits target": (lambda: model.logits(GOOD, GOOD, target_lengths=bad), "target"),
        "generate": (lambda: model.generate(GOOD, bad), "source"),
    }
    function, name = calls[call]
    with pytest.raises(InvalidValue, match=f"^{name} lengths: expected"):
        function()


CALLS = {
    "a source for a decoder-only model": (lambda: tiny_model("decoder only").logits(GOOD, GOOD), InvalidValue, "source: expected None"),
    "batches of different sizes": (lambda: tiny_model().logits(GOOD, GOOD[:1]), InvalidValue, "target: expected 2 sequences"),
    "logits without a decoder": (lambda: tiny_model("encoder only").logits(GOOD, GOOD), InvalidValue, "no decoder"),
    "generate without a decoder": (lambda: tiny_model("encoder only").generate(GOOD), InvalidValue, "no decoder"),
    "encode without an encoder": (lambda: tiny_model("decoder only").encode(GOOD), InvalidValue, "no encoder"),
    "past the learned positions": (
        lambda: tiny_model("learned").encode(np.full((1, 41), 4)),
        InvalidValue,
        "tokens: has 41 tokens, and the model reads at most 40 at once; shorten it, or give a memory",
    ),
    "a target past the learned positions": (
        lambda: tiny_model("learned").logits(GOOD, np.full((2, 41), 4)),
        InvalidValue,
        "target: has 41",
    ),
    "a dict for a config": (lambda: Transformer({"vocab_size": 5}), InvalidType, "config: expected a Config, got dict"),
    "float16": (lambda: Transformer(Config(**SIZES), dtype=np.float16), InvalidType, "dtype: expected float32 or float64"),
    "no dtype": (lambda: Transformer(Config(**SIZES), dtype="float3"), InvalidType, "dtype: expected float32 or float64"),
    "a negative seed": (lambda: Transformer(Config(**SIZES), seed=-1), InvalidValue, "seed: expected"),
    "a seed that is text": (lambda: Transformer(Config(**SIZES), seed="a"), InvalidValue, "seed: expected"),
}


@pytest.mark.parametrize("kind", CALLS)
def test_what_a_model_cannot_do_is_said(kind):
    function, error, told = CALLS[kind]
    with pytest.raises(error, match=told):
        function()


def test_input_is_not_changed():
    model = tiny_model()
    source, target, lengths = GOOD.copy(), GOOD.astype(np.int32), np.array([2, 3], np.uint8)
    for array in (source, target, lengths):
        array.setflags(write=False)
    before = {name: w.tobytes() for name, w in model.weights.items()}
    model.logits(source, target, lengths, lengths)
    model.generate(source, lengths, max_new_tokens=3)
    assert before == {name: w.tobytes() for name, w in model.weights.items()}
