"""A corpus in RAM: what goes in comes out, is split, joined and named; what is no document is refused by its number."""

import numpy as np
import pytest
from helpers import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from mini_tfm.data import Corpus, TextFiles, TextStreams
from mini_tfm.data.batches import fields
from mini_tfm.data.corpus import token_dtype
from mini_tfm.errors import InvalidType, InvalidValue
from mini_tfm.text.tokenizers import ByteTokenizer, train_bpe

BYTES = ByteTokenizer()
TEXTS = ["eins", "zwei drei", "vier"]


def ids(text):
    return BYTES.encode(text).tolist()


def test_texts_in_and_tokens_out():
    for documents in (TEXTS, dict(enumerate(TEXTS)), iter(TEXTS), (text for text in TEXTS)):
        corpus = Corpus.of(documents, BYTES)
        assert [document.tolist() for document in corpus] == [ids(text) for text in TEXTS]
        assert (len(corpus), corpus.n_documents, corpus.n_tokens, corpus.kind, corpus.vocab_size) == (3, 3, 17, "texts", 259)
    assert corpus.tokens.dtype == np.uint16 and corpus[-1].tolist() == ids("vier")
    assert corpus.document(1, 5, 99).tolist() == ids("drei") and corpus.lengths().tolist() == [4, 9, 4]


def test_pairs_of_text_and_of_arrays():
    text = Corpus.of([("ja", "yes"), ("nein", "no")], BYTES)
    arrays = Corpus.of([(BYTES.encode("ja"), ids("yes")), [ids("nein"), ids("no")]], vocab_size=259)
    for corpus in (text, arrays):
        assert (len(corpus), corpus.n_documents, corpus.kind) == (2, 4, "pairs")
        assert [[side.tolist() for side in pair] for pair in corpus] == [[ids("ja"), ids("yes")], [ids("nein"), ids("no")]]
    assert text.fingerprint == arrays.fingerprint != Corpus.of(["ja", "yes", "nein", "no"], BYTES).fingerprint


def test_an_end_is_put_behind_documents_not_pairs():
    assert Corpus.of(["a", "b"], BYTES, end_id=2).tokens.tolist() == [*ids("a"), 2, *ids("b"), 2]
    assert Corpus.of([[5, 6], [7]], end_id=2).tokens.tolist() == [5, 6, 2, 7, 2]
    assert Corpus.of([("a", "b")], BYTES, end_id=2).tokens.tolist() == ids("ab")


def test_the_smallest_type_that_holds_the_vocabulary():
    assert [token_dtype(n).itemsize for n in (2, 256, 257, 65536, 65537, 1 << 22)] == [1, 1, 2, 2, 4, 4]
    assert Corpus.of([[0, 255]], vocab_size=256).tokens.dtype == np.uint8


def test_a_long_document_is_tokenized_in_pieces_and_is_the_same():
    text = "Die Würde des Menschen ist unantastbar. " * 6000
    tokenizer = train_bpe([text], 300)
    assert_same_bits(Corpus.of([text], tokenizer)[0].astype(np.int64), tokenizer.encode(text))


def test_files_are_documents(tmp_path):
    (tmp_path / "a.txt").write_text("eins")
    (tmp_path / "b.txt").write_text("zwei")
    (tmp_path / "c.tsv").write_text("ja\tyes\nnein\tno\n")
    assert [d.tolist() for d in Corpus.of(TextFiles([tmp_path / "a.txt", tmp_path / "b.txt"]), BYTES)] == [ids("eins"), ids("zwei")]
    pairs = Corpus.of(TextFiles(tmp_path / "c.tsv"), BYTES)
    assert pairs.kind == "pairs" and [d.tolist() for d in pairs[1]] == [ids("nein"), ids("no")]


@given(lengths=st.lists(st.integers(1, 50), min_size=2, max_size=40), share=st.floats(0.01, 0.99))
def test_a_split_has_every_token_on_one_side(lengths, share):
    documents = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    train, held_out = Corpus.of(documents).split(share)
    np.testing.assert_array_equal(np.concatenate([*train, *held_out]), np.arange(sum(lengths)))
    assert train.fingerprint != held_out.fingerprint
    error = abs(held_out.n_tokens - share * sum(lengths))
    if len(lengths) >= 10:
        assert all(len(d) in lengths for d in (*train, *held_out)) and error <= 2 * max(lengths)
    else:
        assert error <= 1


def test_pairs_are_not_torn_apart():
    corpus = Corpus.of([([i] * (1 + i % 3), [i + 100]) for i in range(20)])
    for share in np.linspace(0.01, 0.97, 40).tolist():
        sides = corpus.split(share)
        assert [int(target[0]) for side in sides for _, target in side] == list(range(100, 120))
        assert all(source[0] + 100 == target[0] for side in sides for source, target in side)


def test_joined_documents_are_one():
    corpus = Corpus.of([[5, 6], [7]], end_id=2)
    assert [d.tolist() for d in corpus.joined()] == [[5, 6, 2, 7, 2]]
    assert corpus.joined().fingerprint != corpus.fingerprint
    with pytest.raises(InvalidValue, match="expected texts for joined, got pairs"):
        Corpus.of([([1], [2])]).joined()


def test_streams_of_a_corpus_are_those_of_its_documents():
    documents = [np.arange(3, 60), np.arange(100, 140)]
    shape = {"segment_length": 5, "n_segments": 3, "batch_size": 4}
    one, other = TextStreams(Corpus.of(documents, vocab_size=200), **shape), TextStreams(documents, **shape)
    for step in range(5):
        assert_same_bits(fields(one.batch(step)), fields(other.batch(step)))
    assert one.state == other.state != TextStreams(documents[:1], **shape).state
    assert one.documents[0].base is not None, "views, not copies"


@pytest.mark.parametrize(
    ("documents", "options", "error", "told"),
    [
        ([], {}, InvalidValue, "at least one, got none"),
        ("text", {}, InvalidType, "documents: expected several"),
        (np.arange(5), {}, InvalidType, "documents: expected several"),
        (5, {}, InvalidType, "documents: expected several"),
        (["text"], {}, InvalidType, r"documents\[0\]: .* without a tokenizer"),
        ([[1], []], {}, InvalidValue, r"documents\[1\]: no tokens"),
        (["a", ""], {"tokenizer": BYTES}, InvalidValue, r"documents\[1\]: no tokens"),
        (["a", "\ud800"], {"tokenizer": BYTES}, InvalidValue, r"documents\[1\]: .*surrogate"),
        ([[1.5]], {}, InvalidType, r"documents\[0\]: expected token ids"),
        ([[1], [[2]]], {}, InvalidType, r"documents\[1\]: expected token ids"),
        ([[1], [-2]], {}, InvalidValue, r"documents\[1\]: expected ids from 0, got -2"),
        ([[1], [9]], {"vocab_size": 9}, InvalidValue, r"documents\[1\]: expected ids from 0 to 8, got 9"),
        ([([1], [2]), [3]], {}, InvalidType, r"documents\[1\]: expected pairs"),
        ([[3, 3, 3], ([1], [2])], {}, InvalidType, r"documents\[1\]: expected texts"),
        ([([1], [2], [3])], {}, InvalidType, r"documents\[0\]: expected \(source, target\), got 3"),
        ([([1], [])], {}, InvalidValue, r"documents\[0\]\[1\]: no tokens"),
        ([[1]], {"end_id": -1}, InvalidValue, "end_id: expected"),
        ([[1]], {"end_id": 9, "vocab_size": 9}, InvalidValue, "end_id: expected"),
    ],
)
def test_what_is_no_document_is_refused_by_its_number(documents, options, error, told):
    with pytest.raises(error, match=told):
        Corpus.of(documents, **options)


def test_a_split_needs_something_on_either_side():
    with pytest.raises(InvalidValue, match="expected a share between 0 and 1"):
        Corpus.of([[1, 2]]).split(1.0)
    with pytest.raises(InvalidValue, match="expected enough text to hold out a part"):
        Corpus.of([[1]]).split(0.1)
    with pytest.raises(InvalidValue, match="expected enough text to hold out a part"):
        Corpus.of([([1], [2])]).split(0.5)
