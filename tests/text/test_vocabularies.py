"""Folders without a tokenizer.json: their ids are those of Transformers' tokenizers and of SentencePiece itself."""

import base64
import contextlib
import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from vocabularies import CORPUS, KINDS, PLAIN, TIDY, model_of, texts, theirs_of, train, write

from mini_tfm.errors import FileProblem, InvalidValue
from mini_tfm.text.languages import languages_of
from mini_tfm.text.tokenizers import BPETokenizer, load_tokenizer, train_bpe
from mini_tfm.text.vocabularies import sentencepiece_files


def byte_level(folder, kind, special):
    """vocab.json and merges.txt of a BPE that was trained here."""
    rules = json.loads(train_bpe(CORPUS, 500).files()["tokenizer.json"])["model"]
    vocab = {
        token: i for i, token in enumerate([*special, *(token for token in rules["vocab"] if token not in ("<pad>", "<bos>", "<eos>"))])
    }
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in rules["merges"]) + "\n"
    return write(folder, {"tokenizer_class": kind}, vocab__json=json.dumps(vocab), merges__txt=merges)


def word_piece(folder, **options):
    letters = sorted({letter for text in CORPUS for letter in text.lower() if not letter.isspace()})
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "cafe", "naive", "##s", *letters]
    vocab += [f"##{letter}" for letter in letters if letter.isalnum()]
    return write(folder, {"tokenizer_class": "BertTokenizer", **options}, vocab__txt="\n".join(dict.fromkeys(vocab)) + "\n")


def t5(folder):
    write(folder, {"tokenizer_class": "T5Tokenizer", "extra_ids": 7})
    return train(folder, "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


def test_byte_level_bpe_has_the_ids_of_the_rules_it_was_made_of(tmp_path):
    loaded, trained = load_tokenizer(byte_level(tmp_path / "m", "GPT2Tokenizer", ["<|endoftext|>"])), train_bpe(CORPUS, 500)
    for text in texts():
        np.testing.assert_array_equal(loaded.encode(text), trained.encode(text) - 2)
        assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.bos_id, loaded.eos_id, loaded.encode("<|endoftext|>").tolist() != [0]) == (0, 0, True)


def test_word_pieces_are_the_longest_ones(tmp_path):
    tokenizer = load_tokenizer(word_piece(tmp_path / "m"))
    names = json.loads(tokenizer.files()["tokenizer.json"])["model"]["vocab"]
    places = {i: token for token, i in names.items()}
    assert [places[i] for i in tokenizer.encode_alone("The Cats. café", 20)] == ["[CLS]", "the", "cat", "##s", ".", "cafe", "[SEP]"]
    cased = load_tokenizer(word_piece(tmp_path / "cased", do_lower_case=False))
    assert [places[i] for i in cased.encode("The cat")] == ["[UNK]", "cat"]


def test_byt5_has_bytes_and_three(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "m", {"tokenizer_class": "ByT5Tokenizer"}))
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id) == (384, 0, 1)
    for text in texts():
        np.testing.assert_array_equal(tokenizer.encode_alone(text, 10_000), [*(byte + 3 for byte in text.encode()), 1])
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_t5s_pieces_are_sentencepieces(tmp_path):
    (tmp_path / "m").mkdir()
    processor = t5(tmp_path / "m")
    tokenizer = load_tokenizer(tmp_path / "m")
    assert tokenizer.vocab_size == processor.vocab_size() + 7 and (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    for text in PLAIN:
        assert tokenizer.encode_alone(text, 10_000).tolist() == [*processor.encode(text), 1], repr(text)
        if 2 not in processor.encode(text):  # an unknown character is a special token here
            assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(processor.encode(text))


@pytest.mark.parametrize("kind, frame", [("XLMRobertaTokenizer", ([0], [2])), ("MBartTokenizer", ([], [2, "de_DE"]))])
def test_fairseqs_numbers(kind, frame, tmp_path):
    """Pieces one further on, unknown at 3, languages behind them."""
    folder = write(tmp_path / "m", {"tokenizer_class": kind, "src_lang": "de_DE"})
    processor = train(folder, "sentencepiece.bpe.model")
    tokenizer = load_tokenizer(folder)
    n = processor.vocab_size() + 1
    frame = [[n + 2 if token == "de_DE" else token for token in part] for part in frame]
    for text in PLAIN:
        expected = [3 if i == 0 else i + 1 for i in processor.encode(text)]
        assert tokenizer.encode_alone(text, 10_000).tolist() == [*frame[0], *expected, *frame[1]], repr(text)


@pytest.mark.parametrize("own", [[], ["<turn>", "cat d", "cat", "▁▁", "a.b"]], ids=["pieces", "pieces of a user's own"])
def test_llamas_pieces_are_sentencepieces(own, tmp_path):
    folder = write(tmp_path / "m", {"tokenizer_class": "LlamaTokenizer"})
    processor = train(
        folder, "tokenizer.model", vocab_size=600, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, user_defined_symbols=own,
    )  # fmt: skip
    tokenizer = load_tokenizer(folder)
    for text in [*PLAIN, "<turn>a b <turn>", "a<turn></s><turn>b", "the cat don't, the cat did", "<turn>  <turn>", "a.b axb"]:
        if "\x00" not in text and text:
            assert tokenizer.encode_alone(text, 10_000).tolist() == [1, *processor.encode(text)], repr(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def of_pieces(kind, *pieces):
    """A SentencePiece model: its kind, and (text, score, kind) of each piece."""
    made = [b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([of]) for text, score, of in pieces]
    return b"".join(b"\x0a" + bytes([len(piece)]) + piece for piece in made) + b"\x12\x02\x18" + bytes([kind])


def test_pieces_of_a_users_own_are_text_and_are_cut_out_first(tmp_path):
    own = [(b"<unk>", 0, 2), (b"<s>", 0, 3), (b"</s>", 0, 3), (b"<t>", 0, 4), (b"ab", -1, 1), ("▁a".encode(), -2, 1)]
    letters = [(letter.encode(), -9, 1) for letter in "▁ab<>t/s"]
    folder = write(tmp_path / "m", {"tokenizer_class": "LlamaTokenizer"})
    (folder / "tokenizer.model").write_bytes(of_pieces(2, *own, *letters))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.special_tokens == {0: "<unk>", 1: "<s>", 2: "</s>"}
    for text, ids in (("a<t>ab", [5, 3, 4]), ("<t>", [6, 3]), ("<t></s><t>", [6, 3, 9, 12, 13, 10, 3]), ("<t", [6, 9, 11])):
        assert (tokenizer.encode(text).tolist(), tokenizer.decode(ids)) == (ids, text)


VOCABULARIES = json.loads(Path(__file__).with_name("vocabularies.json").read_text())


def of_golden(folder, name):
    """A folder with the files of a golden, and what is expected of it."""
    golden = VOCABULARIES[name]
    write(folder, golden["about"])
    for file, content in golden["files"].items():
        (folder / file).write_bytes(base64.b64decode(content))
    return load_tokenizer(folder), golden


@pytest.mark.parametrize("name", VOCABULARIES)
def test_models_of_many_languages_and_pegasus_have_the_ids_of_the_golden(name, tmp_path):
    """M2M100's numbers are those of vocab.json; NLLB's and mBART-50's are fairseq's; Pegasus' begin behind its masks."""
    tokenizer, golden = of_golden(tmp_path / "m", name)
    assert tokenizer.vocab_size == golden["size"]
    known = languages_of(tokenizer.special_tokens)
    assert {code: known[code] for code in golden["languages"]} == golden["languages"]
    for text, expected in golden["texts"].items():
        ids = tokenizer.encode_alone(text, 10_000)
        assert ids.tolist() == expected, repr(text)
        if not np.isin(tokenizer.encode(text), list(tokenizer.special_tokens)).any() and "  " not in text:
            assert tokenizer.decode(ids) == text.strip(" ")


def test_a_character_that_only_vocab_json_knows_has_its_id(tmp_path):
    tokenizer, golden = of_golden(tmp_path / "m", "m2m100-unigram")
    vocab = json.loads(base64.b64decode(golden["files"]["vocab.json"]))
    assert tokenizer.encode("Ж").tolist()[-1] == vocab["Ж"]


def test_marian_has_numbers_of_its_own(tmp_path):
    folder = write(tmp_path / "m", {"tokenizer_class": "MarianTokenizer"})
    processor = train(folder, "source.spm")
    pieces = [processor.id_to_piece(i) for i in range(3, processor.vocab_size())]
    vocab = {token: i for i, token in enumerate(["</s>", "<unk>", *reversed(pieces), ">>fra<<", "▁cible", "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, len(vocab) - 1, len(vocab))
    for text in PLAIN:
        expected = [vocab.get(piece, 1) for piece in processor.encode(text, out_type=str)]
        assert tokenizer.encode_alone(text, 10_000).tolist() == [*expected, 0], repr(text)
    assert tokenizer.decode([vocab["▁cible"], vocab[">>fra<<"], 0]) == "cible"


@pytest.mark.parametrize("falls_back", [False, True], ids=["unknown", "bytes"])
def test_marians_own_pieces_are_sentencepieces(falls_back, tmp_path):
    (tmp_path / "m").mkdir()
    ids = {"eos_id": 0, "unk_id": 1, "bos_id": -1, "pad_id": -1}
    processor = train(tmp_path / "m", "vocab.spm", vocab_size=450 if falls_back else 150, byte_fallback=falls_back, **ids)
    tokenizer = BPETokenizer(*sentencepiece_files(str(tmp_path / "m"), "vocab.spm"), "m")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (processor.vocab_size(), 0, None)
    for text in PLAIN:
        if "\x00" in text:  # it is no text to their normalizer
            continue
        ids = processor.encode(text)
        assert tokenizer.encode_alone(text, 10_000).tolist() == [*ids, 0], repr(text)
        assert tokenizer.decode(ids) == (processor.decode(ids) if 1 not in ids else tokenizer.decode([i for i in ids if i != 1]))
        stream = tokenizer.decode_stream()
        assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)
    for text in ("</s>", "<unk>", "a</s>b", " </s> x <unk>"):  # text like any other, which ends nothing
        assert tokenizer.encode(text).tolist() == processor.encode(text) and 0 not in tokenizer.encode(text)
    with pytest.raises(FileProblem, match=r"other.spm: there is no such file"):
        sentencepiece_files(str(tmp_path / "m"), "other.spm")


@pytest.mark.parametrize("normal_form", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("name", KINDS)
def test_transformers_has_the_ids_of_many_languages_and_pegasus(name, normal_form, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    processor = model_of(name, tmp_path / "m", normal_form)
    theirs = theirs_of(tmp_path / "m", name)
    ours = load_tokenizer(tmp_path / "m")
    texts = PLAIN if name.startswith(("m2m100", "wmt21")) else TIDY
    for text in texts:
        if "▁" not in text:
            assert ours.encode_alone(text, 10_000).tolist() == theirs(text)["input_ids"], repr(text)
    for text in PLAIN:
        if "▁" not in text:
            expected = theirs.convert_tokens_to_ids(processor.encode(text, out_type=str))
            assert ours.encode(text).tolist() == expected, repr(text)


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "bert", "t5", "byt5", "xlm-roberta"])
def test_transformers_has_the_same_ids(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "m"
    folder.mkdir()
    if kind == "gpt2":
        byte_level(folder, "GPT2Tokenizer", ["<|endoftext|>"])
        theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    elif kind == "roberta":
        byte_level(folder, "RobertaTokenizer", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        theirs = transformers.RobertaTokenizer.from_pretrained(folder)
    elif kind == "bert":
        theirs = transformers.BertTokenizer.from_pretrained(word_piece(folder))
    elif kind == "byt5":
        theirs = transformers.ByT5Tokenizer()
        write(folder, {"tokenizer_class": "ByT5Tokenizer"})
    elif kind == "t5":
        pytest.importorskip("google.protobuf")
        t5(folder)
        theirs = transformers.T5Tokenizer.from_pretrained(folder)
    else:
        pytest.importorskip("google.protobuf")
        write(folder, {"tokenizer_class": "XLMRobertaTokenizer"})
        train(folder, "sentencepiece.bpe.model")
        theirs = transformers.XLMRobertaTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    for text in PLAIN:
        if not (kind in ("t5", "xlm-roberta") and "▁" in text):
            assert ours.encode_alone(text, 10_000).tolist() == theirs(text)["input_ids"], repr(text)


_UNKNOWN = b"\x0a\x09\x0a\x05<unk>\x18\x02"  # a model of one piece
BAD = {
    "merges of three": ({"tokenizer_class": "GPT2Tokenizer"}, {"vocab.json": b'{"a": 0}', "merges.txt": b"a b c\n"}, "merges.txt"),
    "ids that are text": ({"tokenizer_class": "GPT2Tokenizer"}, {"vocab.json": b'{"a": "0"}', "merges.txt": b""}, "vocab.json"),
    "merges that are no tokens": ({"tokenizer_class": "GPT2Tokenizer"}, {"vocab.json": b'{"a": 0}', "merges.txt": b"a b\n"}, "tokenizer"),
    "no frame": ({"tokenizer_class": "BertTokenizer"}, {"vocab.txt": b"a\nb\n"}, "CLS"),
    "not UTF-8": ({"tokenizer_class": "BertTokenizer"}, {"vocab.txt": b"\xff\n"}, "vocab.txt"),
    "too many spans": ({"tokenizer_class": "ByT5Tokenizer", "extra_ids": 1 << 40}, {}, "extra_ids"),
    "a model of noise": ({"tokenizer_class": "T5Tokenizer"}, {"spiece.model": b"\x0a\xff\xff\xff\xff\x0fabc"}, "spiece.model"),
    "a model of nothing": ({"tokenizer_class": "T5Tokenizer"}, {"spiece.model": b""}, "spiece.model"),
    "a pointer of Git LFS": ({"tokenizer_class": "LlamaTokenizer"}, {"tokenizer.model": b"version https://git-lfs\n"}, "tokenizer.model"),
    "an offset that is text": ({"tokenizer_class": "PegasusTokenizer", "offset": "103"}, {"spiece.model": _UNKNOWN}, "offset"),
    "no such language": ({"tokenizer_class": "NllbTokenizer", "src_lang": "eng"}, {"sentencepiece.bpe.model": _UNKNOWN}, "'eng'"),
    "no such languages": (
        {"tokenizer_class": "M2M100Tokenizer", "language_codes": "x"},
        {"sentencepiece.bpe.model": _UNKNOWN, "vocab.json": b'{"<unk>": 0}'},
        "language_codes",
    ),
    "ids with a hole": (
        {"tokenizer_class": "MarianTokenizer"},
        {"source.spm": _UNKNOWN, "vocab.json": b'{"<unk>": 5}'},
        "vocab.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_vocabulary_is_refused_by_name(name, tmp_path):
    about, files, said = BAD[name]
    folder = write(tmp_path / "m", about)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    with pytest.raises(InvalidValue, match=said):
        load_tokenizer(folder)


def test_mutated_models_are_refused_or_are_tokenizers(tmp_path):
    folder = write(tmp_path / "m", {"tokenizer_class": "T5Tokenizer"})
    kinds = ((b"<pad>", 3), (b"</s>", 3), (b"<unk>", 2), ("▁".encode(), 1), (b"a", 1), (b"b", 1))
    good = of_pieces(1, *((text, -1, kind) for text, kind in kinds))
    (folder / "spiece.model").write_bytes(good)
    assert load_tokenizer(folder).encode("ab a").tolist() == [3, 4, 5, 3, 4]
    for seed in range(500):
        draw, data = random.Random(seed), bytearray(good)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.choice([0, 1, 2, 8, 10, 127, 128, 255, draw.randrange(256)])
        (folder / "spiece.model").write_bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
        with contextlib.suppress(InvalidValue):
            load_tokenizer(folder).encode("ab a")


def test_a_folder_of_an_unknown_kind_asks_for_its_tokenizer(tmp_path):
    with pytest.raises(FileProblem, match=r"tokenizer\.json"):
        load_tokenizer(write(tmp_path / "m", {"tokenizer_class": "NobodyTokenizer"}))
