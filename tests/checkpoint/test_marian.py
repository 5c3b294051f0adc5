"""Marian's files, written here: what is read of them is what was written, and the model in them is the paper's."""

import struct

import broken_models
import numpy as np
import paper
import pytest
from helpers import assert_same_bits

import mini_tfm as mt
from mini_tfm.checkpoint import marian
from mini_tfm.checkpoint.header import read_header
from mini_tfm.data import Pairs
from mini_tfm.errors import InvalidValue

SOURCE, TARGET = np.array([5, 9, 3, 20, 0]), np.array([4, 8, 8, 23, 0])


def written(tmp_path, *changes, **more):
    path = tmp_path / "model.bin"
    path.write_bytes(broken_models.marian(*changes, **more))
    return path


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("mixer", ["rnn", "self-attention"])
@pytest.mark.parametrize("pad", [0, 100])
def test_every_weight_is_where_it_belongs(tmp_path, mixer, quantized, pad):
    """By the names of the file, in Marian's own layout: the logits are those of an oracle that reads it by itself."""
    options = {"transformer-decoder-autoreg": mixer, "transformer-ffn-activation": "swish", "dec-depth": 2}
    model = mt.load(written(tmp_path, options, quantized=quantized, pad=pad))
    given = {
        name: broken_models.tensor(name, shape)
        for name, shape in broken_models.marian_shapes({**broken_models.MARIAN_OPTIONS, **options}).items()
    }
    if quantized:
        for name, array in given.items():
            if "W" in name and "_ln_" not in name:
                scale = np.float32(127 / np.abs(array).max())
                given[name] = np.rint(array * scale) / scale
    config, weights = model.config, {}
    for name in model.weights:
        theirs = in_their_words(name)
        weights[name] = given[theirs].astype(np.float64)
        if name.endswith(".bias") or "_norm." in name:
            weights[name] = weights[name][0]
    weights["embedding.weight"] = np.vstack([weights["embedding.weight"], np.zeros((1, 8))])  # what a decoder begins with
    weights["output.bias"] = np.append(weights["output.bias"], -100)
    assert (config.norm_eps, config.sinusoids, config.norm_position, config.eos_id, config.bos_id) == (1e-6, "fairseq", "post", 0, 24)
    expected = paper.logits(config, weights, SOURCE, TARGET)
    found = model.logits(SOURCE[None], TARGET[None])[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(expected).max() > 0.5 and (found[:, 24] < -50).all()


def in_their_words(name):
    """encoder.0.attention.q.weight -> encoder_l1_self_Wq, and so on."""
    if name in ("embedding.weight", "output.bias"):
        return {"embedding.weight": "Wemb", "output.bias": "decoder_ff_logit_out_b"}[name]
    stack, layer, part, *rest = name.split(".")
    prefix, site, norm = f"{stack}_l{int(layer) + 1}_", part.removesuffix("_norm"), part.endswith("_norm")
    if norm:
        body = {"attention": "self_Wo", "cross": "context_Wo", "feed_forward": "ffn_ffn", "ssru": "rnn_ffn"}[site]
        return f"{prefix}{body}_ln_{'scale' if rest == ['weight'] else 'bias'}"
    letter = {"in": "1", "out": "2"} if site == "feed_forward" else {"in": "", "forget": "f"} if site == "ssru" else {}
    body = {"attention": "self", "cross": "context", "feed_forward": "ffn", "ssru": "rnn"}[site]
    return f"{prefix}{body}_{'W' if rest[1] == 'weight' else 'b'}{letter.get(rest[0], rest[0])}"


def test_a_decoder_begins_with_an_embedding_of_zeros_that_no_text_has(tmp_path):
    model = mt.load(written(tmp_path))
    assert not model.weights["embedding.weight"][24].any() and model.config.vocab_size == 25
    for options in ({}, {"num_beams": 3}):
        assert 24 not in model.generate([SOURCE], max_new_tokens=50, stop_at_eos=False, **options)[0]


def test_it_learns(tmp_path):
    """Its weights may lie in the mapped file, some of them transposed."""
    model = mt.load(written(tmp_path, quantized=True))
    pairs = [(np.array([3 + i, 4, 0]), np.array([5 + i, 6, 7, 0])) for i in range(8)]
    history = mt.Trainer(model, learning_rate=1e-2, warmup_steps=1, total_steps=40, label_smoothing=0.1).fit(Pairs(pairs, batch_size=4))
    assert history["loss"][-1] < 0.7 * history["loss"][0]


def test_a_folder_of_ours_gives_the_same_logits(tmp_path, monkeypatch):
    model = mt.load(written(tmp_path, quantized=True))
    model.save(tmp_path / "ours")
    again = mt.load(tmp_path / "ours")
    assert again.config == model.config and again.config.decoder_mixer == "ssru"
    assert_same_bits(again.logits(SOURCE[None], TARGET[None]), model.logits(SOURCE[None], TARGET[None]))
    with pytest.raises(InvalidValue, match="no published family has models of this architecture"):
        model.save_hugging_face(tmp_path / "theirs")


def test_a_folder_has_one_model(tmp_path):
    path = written(tmp_path)
    assert marian.find(str(tmp_path)) == str(path)
    (tmp_path / "lex.bin").write_bytes(b"another file")
    assert mt.load(tmp_path).config == mt.load(path).config
    (tmp_path / "other.bin").write_bytes(path.read_bytes())
    with pytest.raises(InvalidValue, match=r"has several models, model.bin, other.bin; give the path of one"):
        mt.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert marian.find(str(tmp_path)) is None


def test_what_it_is_is_told_from_its_header(tmp_path):
    told = read_header(written(tmp_path, quantized=True))
    assert (told.layout, told.family, told.tokenizer, told.faults) == ("Marian", "transformer", None, [])
    assert told.config.decoder_mixer == "ssru" and told.stored["int8 with a scale"] == 24 * 8 + 10 * 64 + 4 * 96
    yaml = broken_models.marian_yaml({**broken_models.MARIAN_OPTIONS, "transformer-preprocess": "n", "enc-depth": 1 << 40})
    told = read_header(written(tmp_path, yaml=yaml))
    assert told.config is None and "transformer-preprocess" in told.faults[0] and "enc-depth" in told.faults[0]


def test_yaml_is_read_as_marian_writes_it():
    lines = [
        "a: 1",
        "b: -2.5e-3",
        "c: true",
        "d: ~",
        "# no key",
        'e: ""',
        r'f: "x\ty"',
        "g: 'it''s'",
        "h: []",
        "i: [1, b]",
        "j:",
        "  - 3",
        "  - x: y",
    ]
    text = "\n".join([*lines, "k: v1: 2", "", "l:", ""])
    assert marian.options_of(text) == {
        "a": 1, "b": -0.0025, "c": True, "d": None, "e": "", "f": "x\ty", "g": "it's", "h": [], "i": [1, "b"], "j": [3, "x: y"],
        "k": "v1: 2", "l": None,
    }  # fmt: skip
    for wrong in ("a: 1\na: 2", "a:\n  b: 1", "- 1", "a: 1\n- 1", "just text", "a: [1, [2]]", "a: [1", 'a: "\\x"', "a: {b: 1}\n  c"):
        with pytest.raises(ValueError, match=r"special:model.yml"):
            marian.options_of(wrong)


def shortlist(n_always=2, offsets=(0, 1, 3), tokens=(5, 6, 7), *, n_offsets=None, n_tokens=None, end=b""):
    """A binary shortlist."""
    n_offsets, n_tokens = len(offsets) if n_offsets is None else n_offsets, len(tokens) if n_tokens is None else n_tokens
    head = marian.SHORTLIST + struct.pack("<5Q", 99, n_always, 2, n_offsets, n_tokens)
    return head + struct.pack(f"<{len(offsets)}Q", *offsets) + struct.pack(f"<{len(tokens)}I", *tokens) + end


def test_the_shortlist_beside_a_model_is_its_own(tmp_path):
    path = written(tmp_path)
    (tmp_path / "lex.s2t.bin").write_bytes(shortlist())
    model = mt.load(path)
    assert np.flatnonzero(model.generation["shortlist"](np.array([1, 24]), 24)).tolist() == [0, 1, 6, 7]
    assert set(model.generate([[1, 1, 0]], max_new_tokens=40, stop_at_eos=False)[0]) <= {0, 1, 5, 6, 7}
    (tmp_path / "another.bin").write_bytes(shortlist())
    assert mt.load(path).generation == {}


@pytest.mark.parametrize(
    "data",
    [
        shortlist()[:8], shortlist()[:47], shortlist()[:-1], shortlist(end=b"1"), shortlist(n_always=1 << 40), shortlist(n_offsets=1 << 61),
        shortlist(n_tokens=(1 << 64) - 1), shortlist(n_offsets=5, n_tokens=(1 << 64) - 1), shortlist(offsets=(0, 2, 1)),
        shortlist(offsets=(0, 1, 4)), shortlist(offsets=(1, 1, 3)), shortlist(offsets=(0, 1 << 63, 3)), shortlist(offsets=()),
    ],
)  # fmt: skip
def test_a_bad_shortlist_is_refused(tmp_path, data):
    (tmp_path / "lex.bin").write_bytes(data)
    with pytest.raises(InvalidValue, match=r"lex.bin: .*(bytes|offsets)"):
        mt.load(written(tmp_path))
