"""Round trips, streams, special tokens as text, determinism, hostile files."""

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mini_tfm.errors import FileProblem, InvalidType, InvalidValue, MiniTfmError
from mini_tfm.text import pieces
from mini_tfm.text.tokenizers import SPECIAL_TOKENS, BPETokenizer, ByteTokenizer, load_tokenizer, train_bpe

CORPUS = ["the cat sat on the mat, the cat sat", "naïve café ☕ 😀😀 l'été", "x = [i ** 2 for i in range(10)]\r\n\t\0"] * 5
TOKENIZERS = {"bytes": ByteTokenizer(), "bpe": train_bpe(CORPUS, 400)}

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.sampled_from(["<eos>", "<pad>", "<bos>", " ", "\0", "😀", "\u0301", "\r\n", "Ġ", "the", "\ufffd"])).map("".join),
)
each = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


@each
@given(text=TEXTS)
def test_every_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.bytes_of(i) for i in ids) == text.encode()
    assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())


@each
@given(data=st.data())
def test_a_stream_gives_what_decode_gives(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    decoder = tokenizer.decode_stream()
    for _ in range(2):  # finish() leaves it as new
        assert "".join([decoder.push(i) for i in ids] + [decoder.finish()]) == tokenizer.decode(ids)


@each
def test_a_stream_never_gives_a_part_of_a_character(tokenizer):
    text = "a😀é€🏳️‍🌈" * 3
    decoder = tokenizer.decode_stream()
    pieces = [decoder.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) == text and "\ufffd" not in text
    assert decoder.finish() == ""
    decoder = ByteTokenizer().decode_stream()
    assert [decoder.push(i) for i in ByteTokenizer().encode("😀")[:3]] == ["", "", ""]
    assert decoder.finish() == "\ufffd"


@given(ids=st.lists(st.integers(0, TOKENIZERS["bpe"].vocab_size - 1)))
def test_decoding_by_bytes_is_what_the_engine_decodes(ids):
    tokenizer = TOKENIZERS["bpe"]
    assert tokenizer.decode(ids) == tokenizer._engine.decode(ids, skip_special_tokens=True)


@each
def test_ids_of_the_special_tokens(tokenizer):
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert [tokenizer.bytes_of(i) for i in range(3)] == [b""] * 3
    around = [1, *tokenizer.encode("né"), 2, 0, 0]
    assert tokenizer.decode(around) == "né"
    assert tokenizer.encode("").shape == (0,) and tokenizer.decode([]) == ""


@each
def test_lone_surrogates_and_other_types_are_refused(tokenizer):
    for text in ("\ud800", "ab\udfff", "\ude00\ud83d"):
        with pytest.raises(InvalidValue, match="lone surrogate"):
            tokenizer.encode(text)
    for value in (b"abc", None, 3, ["a"]):
        with pytest.raises(InvalidType, match="text"):
            tokenizer.encode(value)


@each
def test_bad_ids_are_refused(tokenizer):
    for ids in ([-1], [tokenizer.vocab_size], [3, 4, 10**9], np.array([2**63], np.uint64)):
        with pytest.raises(InvalidValue, match=r"ids\["):
            tokenizer.decode(ids)
    for ids in ([1.0], "ab", [[1, 2]], 3, None, [True], [[1], [2, 3]], [10**30]):
        with pytest.raises(InvalidType, match="ids"):
            tokenizer.decode(ids)
    with pytest.raises(InvalidValue):
        tokenizer.bytes_of(tokenizer.vocab_size)
    with pytest.raises(InvalidValue):
        tokenizer.decode_stream().push(-1)


@each
def test_save_load_save_gives_the_same_bytes(tokenizer, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    tokenizer.save(tmp_path / "model")
    loaded = load_tokenizer(tmp_path / "model")
    assert type(loaded) is type(tokenizer) and loaded.vocab_size == tokenizer.vocab_size
    assert loaded.files() == tokenizer.files()
    assert (loaded.pad_id, loaded.bos_id, loaded.eos_id) == (0, 1, 2)
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert loaded.encode("the café <eos>").tolist() == tokenizer.encode("the café <eos>").tolist()


def test_a_kind_replaces_the_other_in_a_folder(tmp_path):
    for kind in ("bpe", "bytes", "bpe"):
        TOKENIZERS[kind].save(tmp_path / "model")
        assert type(load_tokenizer(tmp_path / "model")) is type(TOKENIZERS[kind])


def test_training_is_deterministic_across_processes():
    script = (
        "import sys; from mini_tfm.text import train_bpe; from tests.text.test_tokenizers import CORPUS\n"
        "sys.stdout.buffer.write(train_bpe(iter(CORPUS), 400).files()['tokenizer.json'])"
    )
    for seed, parallel in (("1", "true"), ("2", "false")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel}
        root = str(Path(__file__).parents[2])
        done = subprocess.run([sys.executable, "-c", script], env=environment | {"PYTHONPATH": root}, capture_output=True, check=True)
        assert done.stdout == TOKENIZERS["bpe"].files()["tokenizer.json"]


def test_training_learns_merges_and_stops_where_there_are_none():
    assert 300 < TOKENIZERS["bpe"].vocab_size <= 400
    assert len(TOKENIZERS["bpe"].encode(" the cat sat")) == 3
    assert train_bpe([], 1000).vocab_size == 259
    assert train_bpe(["abc"] * 3, 259).vocab_size == 259


def test_training_arguments_are_checked():
    with pytest.raises(InvalidValue, match="vocab_size"):
        train_bpe(["a"], 258)
    with pytest.raises(InvalidType, match="vocab_size"):
        train_bpe(["a"], 300.0)
    with pytest.raises(InvalidType, match="texts"):
        train_bpe("one text", 300)
    with pytest.raises(InvalidType, match="text"):
        train_bpe([b"bytes"], 300)
    with pytest.raises(InvalidValue, match="surrogate"):
        train_bpe(["\ud800"], 300)


def rules() -> dict:
    return json.loads(TOKENIZERS["bpe"].files()["tokenizer.json"])


def make(rules: dict, config: dict | None = None) -> BPETokenizer:
    return BPETokenizer(json.dumps(rules).encode(), None if config is None else json.dumps(config).encode())


def test_text_cannot_hold_a_special_token_even_if_the_file_calls_it_ordinary():
    changed = rules()
    for token in changed["added_tokens"]:
        token["special"] = False
    tokenizer = make(changed)
    assert tokenizer.eos_id == 2 and 2 not in tokenizer.encode("a<eos>b")
    assert tokenizer.decode(tokenizer.encode("a<eos>b")) == "a<eos>b"


def test_text_cannot_hold_a_special_token_of_a_unigram_vocabulary():
    """Such a model looks for all its pieces in a text; what ends a source there would cut it off."""
    pieces = ["</s>", "<unk>", "▁", "<", "/", "s", ">", "a", "</", "s>"]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    special = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, name in enumerate(pieces[:2])
    ]
    one, other, last = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}, {"id": "</s>", "type_id": 0}
    end = {"type": "TemplateProcessing", "single": [one, {"SpecialToken": last}], "pair": [one, other],
           "special_tokens": {"</s>": {"id": "</s>", "ids": [0], "tokens": ["</s>"]}}}  # fmt: skip
    made = make({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None, "pre_tokenizer": space,
        "post_processor": end, "decoder": space,
        "model": {"type": "Unigram", "unk_id": 1, "vocab": [[name, 0.0 if i < 2 else -2.0 - i / 8] for i, name in enumerate(pieces)]},
    })  # fmt: skip
    assert (made.vocab_size, made.eos_id) == (10, 0)
    for text, ids in (("</s>", [2, 8, 9]), ("a</s>a", [2, 7, 8, 9, 7]), ("<unk>", [2, 3, 1, 6]), ("</s", [2, 8, 5])):
        assert made.encode_alone(text, 100).tolist() == [*ids, 0], text
    assert made.decode([2, 8, 9, 0]) == "</s>"


def test_padding_truncation_and_dropout_of_the_file_are_off():
    changed = rules()
    changed["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    changed["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    changed["model"]["dropout"] = 0.9
    tokenizer = make(changed)
    for text in ("the cat sat on the mat", "the"):
        assert all(tokenizer.encode(text).tolist() == TOKENIZERS["bpe"].encode(text).tolist() for _ in range(10))


def test_the_roles_of_tokens_come_from_the_config_then_from_usual_names():
    changed = rules()
    assert make(changed, {"eos_token": {"content": "<bos>"}, "bos_token": None}).eos_id == 1
    assert make(changed, {"bos_token": None}).bos_id is None
    assert make(changed, {"sep_token": "<pad>"}).eos_id == 0
    assert make(changed, {}).eos_id == 2
    for name in ("nope", 3, {"content": 3}, [1]):
        with pytest.raises(InvalidValue, match="eos_token"):
            make(changed, {"eos_token": name})


def wordpiece() -> BPETokenizer:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "the", "cat", "."]
    special = [
        {"id": i, "content": vocab[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for i in range(4)
    ]  # fmt: skip
    return make(
        {
            "added_tokens": special,
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                           "strip_accents": None, "lowercase": True},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": {token: i for i, token in enumerate(vocab)}},
        }
    )  # fmt: skip


def test_a_tokenizer_that_is_not_made_of_bytes():
    tokenizer = wordpiece()
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 2, 3)
    ids = tokenizer.encode("The unaffable cat")
    assert ids.tolist() == [7, 4, 5, 6, 8]
    assert tokenizer.decode([2, *ids, 3]) == "the unaffable cat"
    decoder = tokenizer.decode_stream()
    pieces = [decoder.push(i) for i in [2, *ids, 3]]
    assert pieces == ["", "the", " un", "aff", "able", " cat", ""] and decoder.finish() == ""
    with pytest.raises(InvalidValue, match="bytes"):
        tokenizer.bytes_of(4)


def test_byte_fallback_streams_whole_characters():
    vocab = {"<unk>": 0, "a": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True, "unk_token": "<unk>"}
    tokenizer = make({"added_tokens": [], "decoder": decoder, "model": model})
    ids = tokenizer.encode("a😀a")
    stream = tokenizer.decode_stream()
    assert [stream.push(i) for i in ids] == ["a", "", "", "", "😀", "a"]


def every_kind() -> dict[str, BPETokenizer]:
    """A tokenizer of each kind that published models have, trained on a few lines."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def trained(model, trainer, decoder=None, normalizer=None, pre_tokenizer=None, **more):
        engine = Tokenizer(model)
        for name, part in (("decoder", decoder), ("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer)):
            if part is not None:
                setattr(engine, name, part)
        special = [*SPECIAL_TOKENS, "<unk>", *more.pop("tokens", [])]
        engine.train_from_iterator(LINES, trainer(vocab_size=500 + len(special), special_tokens=special, show_progress=False, **more))
        rules = json.loads(engine.to_str())
        rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] in special[:4]]
        return make(rules)

    bpe, sequence = trainers.BpeTrainer, decoders.Sequence
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    return {
        "byte-level": train_bpe(LINES, 500),
        "byte-level with a space": trained(models.BPE(), bpe, decoders.ByteLevel(), None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "WordPiece": trained(
            models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer, decoders.WordPiece(), normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        ),
        "Metaspace": trained(models.BPE(unk_token="<unk>"), bpe, decoders.Metaspace(), None, pre_tokenizers.Metaspace()),
        "Unigram": trained(
            models.Unigram(), trainers.UnigramTrainer, decoders.Metaspace(), normalizers.Sequence([normalizers.NFKC(), spaces]),
            pre_tokenizers.Metaspace(), unk_token="<unk>",
        ),
        "byte fallback": trained(
            models.BPE(unk_token="<unk>", byte_fallback=True), bpe,
            sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
            tokens=[f"<0x{byte:02X}>" for byte in range(256)],
        ),
        "end of word": trained(
            models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), bpe, decoders.BPEDecoder(), None, pre_tokenizers.Whitespace(),
            end_of_word_suffix="</w>",
        ),
        "no decoder": trained(models.BPE(unk_token="<unk>"), bpe),
        "one that looks back": trained(models.BPE(unk_token="<unk>"), bpe, sequence([decoders.Fuse(), decoders.Replace("the", "X")])),
        "bytes, then stripped": trained(
            models.BPE(), bpe, sequence([decoders.ByteLevel(), decoders.Strip(" ", 2, 0)]), None,
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ),
    }  # fmt: skip


LINES = ["the cat sat on the mat, the cat  sat", "naïve café ☕ 😀😀 l'été 東京", "x = [i ** 2 for i in range(10)]\n\n\t"] * 9
KINDS = [
    "byte-level", "byte-level with a space", "WordPiece", "Metaspace", "Unigram", "byte fallback", "end of word", "no decoder",
    "one that looks back", "bytes, then stripped",
]  # fmt: skip


@functools.cache
def of_kind(kind: str) -> BPETokenizer:
    made = every_kind()
    assert list(made) == KINDS
    return made[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_any_kind_gives_what_decode_gives(kind):
    tokenizer, rng = of_kind(kind), np.random.default_rng(0)
    text = tokenizer.encode("naïve ☕ 😀😀 l'été  東京 \t").tolist()
    spaces = [i for token in ("▁", "▁▁", "Ġ", " ", "a", "<0xC3>", "<0xA9>") if (i := tokenizer._engine.token_to_id(token)) is not None]
    for case in range(200):
        n = rng.integers(0, 30)
        random_ids = rng.integers(0, tokenizer.vocab_size if case % 2 else min(262, tokenizer.vocab_size), n).tolist()
        runs = rng.choice([*spaces, 3], n).tolist()
        ids = [random_ids, runs, [*text[:n], 2, *text[n + 1 :]]][case % 3]
        stream = tokenizer.decode_stream()
        for _ in range(2):
            assert "".join([stream.push(i) for i in ids] + [stream.finish()]) == tokenizer.decode(ids)


def test_a_byte_that_is_wrong_leaves_the_characters_beside_it():
    """The engine makes a whole run of bytes U+FFFD: a character that a stream has given would change."""
    tokenizer = of_kind("byte fallback")
    ids = [tokenizer._engine.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode() + b"\xff" + "é".encode()]
    assert tokenizer.decode(ids) == "é\ufffdé"
    assert tokenizer.decode(tokenizer.encode("☕ é😀")) == "☕ é😀"


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_pieces_has_the_tokens_of_the_whole(kind, monkeypatch):
    """Once a space was put before each piece of a long text."""
    tokenizer, rng = of_kind(kind), np.random.default_rng(1)
    lines = np.array([*LINES[:3], "\n\n", " over", "  ", "e\u0301 ", "\u3000"])
    texts = ["".join(rng.choice(lines, 60)), " " * 400 + "x" * 400 + "cat" * 100 + "\n" * 300, "sat", ""]
    for size in (64, 150, 1000):
        monkeypatch.setattr(pieces, "PIECE_CHARACTERS", size)
        for text in texts:
            cuts = np.sort(rng.integers(0, len(text) + 1, 9))
            for given_texts in ([text], [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]):
                found = list(tokenizer.encode_pieces(given_texts))
                assert np.concatenate([np.zeros(0, np.int64), *found]).tolist() == tokenizer.encode(text).tolist()
            assert len(found) > 2 or text is not texts[0] or size == 1000
    for wrong in ("\ud800", 3):
        with pytest.raises((InvalidValue, InvalidType), match="text"):
            list(tokenizer.encode_pieces([wrong]))


def test_a_word_without_end_is_cut_all_the_same(monkeypatch):
    """A word of which the tokenizer makes one token has no place to cut it at: RAM stays bounded."""
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 64)
    monkeypatch.setattr(pieces, "LONGEST_WORD_CHARACTERS", 500)
    tokenizer = of_kind("WordPiece")
    found = np.concatenate(list(tokenizer.encode_pieces(["z" * 2000 + " cat sat"])))
    unknown = tokenizer._engine.token_to_id("<unk>")
    assert found.tolist()[-2:] == tokenizer.encode("cat sat").tolist() and 1 < (found == unknown).sum() < 40


GARBAGE = {
    "empty": b"",
    "not-json": b"\x80\x04.",
    "list": b"[]",
    "no-model": b"{}",
    "duplicate-key": b'{"model": 1, "model": 2}',
    "nan": b'{"model": NaN}',
    "model-of-no-kind": b'{"model": {"type": "Nope"}}',
    "merge-out-of-vocabulary": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
    "huge-id": b'{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}',
    "negative-id": b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
    "empty-vocabulary": b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
    "empty-unigram": b'{"model": {"type": "Unigram", "vocab": [], "unk_id": 5}}',
    "broken-regex": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer":'
    b' {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}}',
    "panics-in-rust": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "normalizer":'
    b' {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}',
    "decoder-of-no-kind": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": 3}',
    "too-deep": b'{"model":' * 2000 + b"1" + b"}" * 2000,
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_garbage_file_is_refused_by_name(kind, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(GARBAGE[kind])
    with pytest.raises(InvalidValue, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"tokenizer_class": "ByteTokenizer", "x": 1}', b'{"a": 1, "a": 1}'])
def test_a_garbage_config_is_refused_by_name(content, tmp_path):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    (tmp_path / "tokenizer.json").write_bytes(TOKENIZERS["bpe"].files()["tokenizer.json"])
    with pytest.raises(InvalidValue, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_a_missing_or_linked_file_is_a_file_problem(tmp_path):
    for folder in (tmp_path, tmp_path / "missing", "a\0b"):
        with pytest.raises(FileProblem):
            load_tokenizer(folder)
    TOKENIZERS["bpe"].save(tmp_path / "real")
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "real" / "tokenizer.json")
    with pytest.raises(FileProblem, match="link"):
        load_tokenizer(tmp_path)
    with pytest.raises(InvalidType):
        load_tokenizer(None)


def test_an_engine_error_while_encoding_names_the_file():
    changed = json.loads(wordpiece().files()["tokenizer.json"])
    changed["model"]["unk_token"] = "[NONE]"
    with pytest.raises(InvalidValue, match=r"tokenizer\.json"):
        make(changed).encode("zebra")


def test_mutated_files_raise_our_errors_or_work(capfd):
    source = train_bpe(["the cat sat"] * 3, 262).files()["tokenizer.json"]
    rng = random.Random(5)
    for _ in range(300):
        data = bytearray(source)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 1, 1, 9])] = rng.choice([b"", b"0", b'"', b"-1", b"{", b"null", b"true"])
        try:
            tokenizer = BPETokenizer(bytes(data))
            tokenizer.decode(tokenizer.encode("the cat <eos> é"))
        except MiniTfmError:
            pass
    capfd.readouterr()  # a panic is printed by Rust before we hear of it


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=30)
@given(text=st.text(alphabet="ab \n", max_size=5000))
def test_long_runs_round_trip(text):
    assert TOKENIZERS["bpe"].decode(TOKENIZERS["bpe"].encode(text)) == text


@pytest.mark.parametrize(
    "template, frame", [("$A", ([], [])), ("<s> $A", ([0], [])), ("$A </s>", ([], [1])), ("<s> $A </s> </s>", ([0], [1, 1]))]
)
def test_a_frame_is_what_encode_alone_puts_around_a_text(template, frame, tmp_path):
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4}, "<unk>"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    engine.post_processor = tokenizers.processors.TemplateProcessing(template, special_tokens=[("<s>", 0), ("</s>", 1)])
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    before, after = tokenizer.frame()
    assert (before.tolist(), after.tolist()) == frame
    np.testing.assert_array_equal(tokenizer.encode_alone("b a", 99), [*before, 4, 3, *after])
    assert [len(ids) for ids in ByteTokenizer().frame()] == [0, 0]
