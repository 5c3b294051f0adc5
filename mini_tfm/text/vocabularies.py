"""Tokenizers of folders without a `tokenizer.json`: their vocabularies, as the rules that such a file has.

    vocab.json, merges.txt              byte-level BPE: GPT-2, RoBERTa, BART
    vocab.txt                           WordPiece: BERT, DistilBERT
    spiece.model, tokenizer.model,      SentencePiece (arXiv 1808.06226): T5, Pegasus; Llama; XLM-R, mBART, NLLB
    sentencepiece.bpe.model
    source.spm, vocab.json              SentencePiece with ids of its own: Marian, converted for Transformers
    sentencepiece.bpe.model, vocab.json the same: M2M100
    *.spm                               SentencePiece: Marian's own (see checkpoint/marian.py, which says when)
    none                                bytes: ByT5

Which rules a vocabulary goes with says `tokenizer_class` in tokenizer_config.json, or else `model_type` in config.json.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from mini_tfm.errors import FileProblem, InvalidValue
from mini_tfm.files.reading import read_bytes
from mini_tfm.files.strict_json import MAX_JSON_BYTES, parse_json_strict

from . import languages

MAX_FILE_BYTES = 1 << 27
MAX_PIECES = 1 << 22
_UNIGRAM, _BPE = 1, 2
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
_LAST_RESORT = -1e6  # no sum of scores is as low

Rules = dict[str, Any]


def tokenizer_files(folder: str) -> tuple[bytes, bytes] | None:
    """The `tokenizer.json` and `tokenizer_config.json` of a folder's vocabulary, or None where it has none that is known.

    Raises FileProblem, InvalidValue naming the file at fault.
    """
    told = {name: _json_or_nothing(folder, name) for name in ("tokenizer_config.json", "config.json")}
    given = told["tokenizer_config.json"]
    name = given.get("tokenizer_class") or told["config.json"].get("model_type")
    if not isinstance(name, str):
        return None
    kind = name.removesuffix("Fast").removesuffix("Tokenizer").lower().replace("-", "").replace("_", "")
    make = _KINDS.get(kind)
    found = make(folder, given) if make is not None else None
    if found is None:
        return None
    return _files(*found, given)


def sentencepiece_files(folder: str, name: str) -> tuple[bytes, bytes]:
    """The same of a SentencePiece model whose pieces are numbered as they are, and whose texts end with </s>: Marian's.

    Raises FileProblem, InvalidValue naming the file.
    """
    model = _sentencepiece(folder, name)
    if model is None:
        raise FileProblem(f"{os.path.join(folder, name)}: there is no such file")
    if model.kind != _UNIGRAM:
        raise InvalidValue(f"{os.path.join(folder, name)}: expected a model of the kind unigram, got kind {model.kind}")
    falls_back = any(piece.kind == _BYTE for piece in model.pieces)
    # The name of a byte is no text that anybody has written.
    pieces = [
        (text, _LAST_RESORT if piece.kind == _BYTE else score) for (text, score), piece in zip(model.scored(), model.pieces, strict=True)
    ]
    rules = _of_pieces(model, pieces, model.unknown)
    if falls_back:
        rules["model"]["byte_fallback"] = True
        rules["decoder"] = {"type": "Sequence", "decoders": [rules["decoder"], {"type": "ByteFallback"}]}
    roles = {"eos_token": "</s>", "unk_token": model.pieces[model.unknown].text}
    return _files(_framed(os.path.join(folder, name), rules, [None, "</s>"]), roles, {})


def _files(rules: Rules, roles: Mapping[str, str], given: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """The two files of rules; roles: the names of special tokens by their keys."""
    special = set(roles.values())
    known = {token["content"] for token in rules.get("added_tokens", [])}
    rules["added_tokens"] = rules.get("added_tokens", []) + [
        _added(token, place) for token in special - known if (place := _id_of(rules["model"], token)) is not None
    ]
    rules["added_tokens"].sort(key=lambda token: token["id"])
    rules = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None, **rules}
    config = {**roles, **{key: value for key, value in given.items() if key.endswith("_token") or key == "chat_template"}}
    return json.dumps(rules).encode(), json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2).encode() + b"\n"


# The vocabularies


def _byte_level(folder: str, given: Mapping[str, Any], roles: dict[str, str], is_framed: bool) -> tuple[Rules, dict[str, str]] | None:
    if not _has(folder, "vocab.json", "merges.txt"):
        return None
    vocab = _ids(folder, "vocab.json")
    lines = _text(folder, "merges.txt").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if wrong := [pair for pair in merges if len(pair) != 2]:
        raise InvalidValue(f"{os.path.join(folder, 'merges.txt')}: expected two tokens a line, got {' '.join(wrong[0])!r:.80}")
    is_prefixed = given.get("add_prefix_space", False) is True
    rules = {
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": merges,
        },
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": is_prefixed, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }  # fmt: skip
    if is_framed:
        rules["post_processor"] = _frame(vocab, [roles["cls_token"], None, roles["sep_token"]], folder)
    return rules, {key: token for key, token in roles.items() if token in vocab}


def _word_piece(folder: str, given: Mapping[str, Any]) -> tuple[Rules, dict[str, str]] | None:
    if not _has(folder, "vocab.txt"):
        return None
    lines = _text(folder, "vocab.txt").split("\n")
    vocab = {token.rstrip("\r"): place for place, token in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    rules = {
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
                  "vocab": vocab},
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": given.get("tokenize_chinese_chars", True) is not False,
            "strip_accents": given.get("strip_accents"), "lowercase": given.get("do_lower_case", True) is not False,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "post_processor": _frame(vocab, ["[CLS]", None, "[SEP]"], folder),
    }  # fmt: skip
    return rules, {key: token for key, token in roles.items() if token in vocab}


def _t5(folder: str, given: Mapping[str, Any]) -> tuple[Rules, dict[str, str]] | None:
    """Pieces as they are numbered, and behind them the names of masked spans, the last of which is called 0."""
    model = _sentencepiece(folder, "spiece.model")
    if model is None:
        return None
    n = given.get("extra_ids", 100)
    if type(n) is not int or not 0 <= n <= 10_000:
        raise InvalidValue(f"{os.path.join(folder, 'tokenizer_config.json')}: field 'extra_ids': expected 0 to 10000, got {n!r:.40}")
    pieces = model.scored() + [(f"<extra_id_{i}>", 0.0) for i in reversed(range(n))]
    added = [_added(text, place) for place, (text, _) in enumerate(pieces) if place >= len(model.pieces)]
    rules = _of_pieces(model, pieces, model.unknown) | {"added_tokens": added}
    return _framed(folder, rules, [None, "</s>"]), {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def _pegasus(folder: str, given: Mapping[str, Any]) -> tuple[Rules, dict[str, str]] | None:
    """Two masks and names that training alone uses stand before the pieces, of which the first two are left out."""
    model = _sentencepiece(folder, "spiece.model")
    if model is None:
        return None
    offset = given.get("offset", 103)
    if type(offset) is not int or not 2 <= offset <= 10_000:
        raise InvalidValue(f"{os.path.join(folder, 'tokenizer_config.json')}: field 'offset': expected 2 to 10000, got {offset!r:.40}")
    own = ["<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{i}>" for i in range(2, offset))]
    pieces = [(token, 0.0) for token in own] + model.scored()[2:]
    rules = _of_pieces(model, pieces, model.unknown + offset) | {"added_tokens": [_added(token, i) for i, token in enumerate(own)]}
    roles = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask_2>"}
    return _framed(folder, rules, [None, "</s>"]), roles


def _fairseq(folder: str, given: Mapping[str, Any], kind: str) -> tuple[Rules, dict[str, str]] | None:
    """Fairseq's numbers: four tokens of its own before the pieces, of which the first three are left out, and languages behind them."""
    model = _sentencepiece(folder, "sentencepiece.bpe.model")
    if model is None:
        return None
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *model.scored()[3:]]
    n_own = len(pieces)
    frame: list[str | None] = ["<s>", None, "</s>"]
    if kind in languages.CODES:
        source = given.get("src_lang") or languages.ENGLISH[kind]
        is_last = kind == "mbart" or (kind == "nllb" and given.get("legacy_behaviour") is True)
        frame = [None, "</s>", source] if is_last else [source, None, "</s>"]
        pieces += [(code, 0.0) for code in languages.CODES[kind]]
    pieces.append(("<mask>", 0.0))
    rules = _of_pieces(model, pieces, 3) | {"added_tokens": [_added(text, i) for i, (text, _) in enumerate(pieces) if i >= n_own]}
    return _framed(folder, rules, frame), {**_FAIRSEQ, "mask_token": "<mask>"}


def _m2m100(folder: str, given: Mapping[str, Any]) -> tuple[Rules, dict[str, str]] | None:
    """Pieces of sentencepiece.bpe.model with the numbers of vocab.json, and languages behind them."""
    if (found := _renumbered(folder, "sentencepiece.bpe.model")) is None:
        return None
    model, vocab, pieces = found
    kind = given.get("language_codes", "m2m100")
    if kind not in ("m2m100", "wmt21"):
        where = os.path.join(folder, "tokenizer_config.json")
        raise InvalidValue(f"{where}: field 'language_codes': expected 'm2m100' or 'wmt21', got {kind!r:.40}")
    codes = [f"__{code}__" for code in languages.CODES[kind]]
    rules = _of_pieces(model, [*pieces, *((code, 0.0) for code in codes)], vocab["<unk>"])
    rules["added_tokens"] = [_added(code, len(vocab) + i) for i, code in enumerate(codes)]
    source = f"__{given.get('src_lang') or languages.ENGLISH[kind]}__"
    return _framed(folder, rules, [source, None, "</s>"]), _FAIRSEQ


def _llama(folder: str, given: Mapping[str, Any]) -> tuple[Rules, dict[str, str]] | None:
    model = _sentencepiece(folder, "tokenizer.model")
    if model is None:
        return None
    if model.kind != _BPE:
        raise InvalidValue(f"{os.path.join(folder, 'tokenizer.model')}: expected a model of the kind BPE, got {model.kind}")
    rules: Rules = {
        "model": _bpe(model, {piece.text: i for i, piece in enumerate(model.pieces)}, model.unknown) | {"byte_fallback": True},
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "added_tokens": [_added(piece.text, i) for i, piece in enumerate(model.pieces) if piece.kind == _CONTROL],
    }  # fmt: skip
    if own := sorted((piece.text for piece in model.pieces if piece.kind == _USER_DEFINED), key=len, reverse=True):
        # Text, which is cut out before pieces are merged: the longest that begins at a place. No merge makes it.
        pattern = "|".join(map(re.escape, own))
        rules["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        rules["model"]["ignore_merges"] = True
    frame = [*(["<s>"] if given.get("add_bos_token", True) is not False else []), None]
    frame += ["</s>"] if given.get("add_eos_token") is True else []
    return _framed(folder, rules, frame), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _marian(folder: str, given: Mapping[str, Any]) -> tuple[Rules, dict[str, str]] | None:
    if (found := _renumbered(folder, "source.spm")) is None:
        return None
    model, vocab, pieces = found
    rules = _of_pieces(model, pieces, vocab["<unk>"])
    rules["added_tokens"] = [_added(token, vocab[token]) for token in vocab if token.startswith(">>") and token.endswith("<<")]
    return _framed(folder, rules, [None, "</s>"]), {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def _renumbered(folder: str, name: str) -> tuple[_Model, dict[str, int], list[tuple[str, float]]] | None:
    """A SentencePiece model, the ids of vocab.json, and by them the pieces. What it has beside them is a last resort, before the
    unknown token; a piece that it does not have is not used."""
    if not _has(folder, name, "vocab.json"):
        return None
    model, vocab = _sentencepiece(folder, name), _ids(folder, "vocab.json")
    assert model is not None
    if sorted(vocab.values()) != list(range(len(vocab))) or "<unk>" not in vocab:
        raise InvalidValue(f"{os.path.join(folder, 'vocab.json')}: expected the ids 0 to {len(vocab) - 1} and the token '<unk>'")
    scores = {
        text: score for (text, score), piece in zip(model.scored(), model.pieces, strict=True) if piece.kind in (_NORMAL, _USER_DEFINED)
    }
    return model, vocab, [(token, scores.get(token, _LAST_RESORT)) for token in sorted(vocab, key=vocab.__getitem__)]


def _byt5(folder: str, given: Mapping[str, Any]) -> tuple[Rules, dict[str, str]]:
    """Padding 0, the end 1, unknown 2, the 256 bytes, then the names of masked spans."""
    n = given.get("extra_ids", 125)
    if type(n) is not int or not 0 <= n <= 10_000:
        raise InvalidValue(f"{os.path.join(folder, 'tokenizer_config.json')}: field 'extra_ids': expected 0 to 10000, got {n!r:.40}")
    own = ["<pad>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate(own)} | {letter: 3 + byte for letter, byte in byte_letters().items()}
    spans = {f"<extra_id_{i}>": 259 + i for i in range(n)}
    rules: Rules = {
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab | spans, "merges": [],
        },
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "added_tokens": [_added(token, i) for token, i in spans.items()],
    }  # fmt: skip
    return _framed(folder, rules, [None, "</s>"]), {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


_GPT2 = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_FAIRSEQ = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_KINDS: dict[str, Callable[[str, Mapping[str, Any]], tuple[Rules, dict[str, str]] | None]] = {
    "gpt2": lambda folder, given: _byte_level(folder, given, _GPT2, False),
    "roberta": lambda folder, given: _byte_level(folder, given, {**_ROBERTA, "mask_token": "<mask>"}, True),
    "bart": lambda folder, given: _byte_level(folder, given, {**_ROBERTA, "mask_token": "<mask>"}, True),
    "bert": _word_piece,
    "distilbert": _word_piece,
    "t5": _t5,
    "mt5": _t5,
    "pegasus": _pegasus,
    **{kind: functools.partial(_fairseq, kind=kind) for kind in ("xlmroberta", "mbart", "mbart50", "nllb")},
    "llama": _llama,
    "marian": _marian,
    "m2m100": _m2m100,
    "byt5": _byt5,
}


def byte_letters() -> dict[str, int]:
    """Letter -> byte, GPT-2's way to write bytes in JSON: printable ones are themselves, the rest start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


# SentencePiece's files


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


class _Model(NamedTuple):
    """A model: its pieces, the number of the unknown one, its kind, and how text is normalised."""

    pieces: list[_Piece]
    unknown: int
    kind: int
    charsmap: bytes
    is_prefixed: bool
    is_trimmed: bool

    def scored(self) -> list[tuple[str, float]]:
        """The pieces with their scores; those of a user's own with one by which they are always taken, as SentencePiece has it."""
        best = max((piece.score for piece in self.pieces if piece.kind == _NORMAL), default=0.0)
        return [(one.text, len(one.text) * best - 0.1 if one.kind == _USER_DEFINED else one.score) for one in self.pieces]


def _sentencepiece(folder: str, name: str) -> _Model | None:
    """https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto"""
    if not _has(folder, name):
        return None
    where, pieces = os.path.join(folder, name), []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for field, value in _fields(read_bytes(folder, MAX_FILE_BYTES, name)):
            if field == 1:
                one = dict(_fields(_bytes(value)))
                score = struct.unpack("<f", _bytes(one.get(2, b"\0\0\0\0")))[0]
                pieces.append(_Piece(_bytes(one[1]).decode(), score, _number(one.get(3, 1))))
                if len(pieces) > MAX_PIECES or score != score:
                    raise ValueError(f"expected at most {MAX_PIECES} pieces with scores")
            elif field == 2:
                trainer = dict(_fields(_bytes(value)))
            elif field == 3:
                normalizer = dict(_fields(_bytes(value)))
        unknown = next(i for i, piece in enumerate(pieces) if piece.kind == 2)
        charsmap = _bytes(normalizer.get(2, b""))
    except (ValueError, KeyError, IndexError, StopIteration, struct.error) as error:
        raise InvalidValue(f"{where}: {error or 'has no unknown piece'}; the file is damaged or is not SentencePiece's") from error
    return _Model(pieces, unknown, trainer.get(3, _UNIGRAM), charsmap, bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message of Protocol Buffers: numbers, and the bytes of all else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 64, 7):
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number has more than 64 bits")

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        n = varint() if kind == 2 else {1: 8, 5: 4}.get(kind, -1)
        if not 0 <= n <= len(data) - at:
            raise ValueError(f"a field at byte {at} does not fit in the file")
        yield key >> 3, data[at : at + n]
        at += n


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where text should")
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError("text stands where a number should")
    return value


def _of_pieces(model: _Model, pieces: list[tuple[str, float]], unknown: int) -> Rules:
    """The rules of a SentencePiece model whose pieces have these ids."""
    steps: list[Rules] = []
    if model.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()})
    if model.is_trimmed:
        steps += [
            {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
            for pattern, content in ((r"\A +| +\z", ""), (" {2,}", " "))
        ]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always" if model.is_prefixed else "never", "split": False}
    unigram = {"type": "Unigram", "unk_id": unknown, "vocab": [list(piece) for piece in pieces], "byte_fallback": False}
    return {
        "model": _bpe(model, {text: i for i, (text, _) in enumerate(pieces)}, unknown) if model.kind == _BPE else unigram,
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": space,
        "decoder": space,
    }


def _bpe(model: _Model, places: dict[str, int], unknown: int) -> Rules:
    """The pieces of a model of the kind BPE, by their ids, and the pairs that make them."""
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == _NORMAL and piece.text in places}
    # Pairs in the order of what they make: the better piece first, of equal ones the earlier pair.
    pairs = sorted(
        (-score, places[text[:at]], places[text[at:]], text[:at], text[at:])
        for text, score in scores.items()
        if len(text) <= 64
        for at in range(1, len(text))
        if text[:at] in places and text[at:] in places
    )
    return {
        "type": "BPE", "dropout": None, "unk_token": next(text for text, i in places.items() if i == unknown),
        "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": False, "ignore_merges": False,
        "vocab": places, "merges": [list(pair[3:]) for pair in pairs],
    }  # fmt: skip


# What the rules have in common


def _framed(folder: str, rules: Rules, frame: list[str | None]) -> Rules:
    model = rules["model"]
    vocab = model["vocab"] if isinstance(model["vocab"], dict) else {token: i for i, (token, _) in enumerate(model["vocab"])}
    return rules | {"post_processor": _frame(vocab, frame, folder)}


def _frame(vocab: Mapping[str, int], frame: list[str | None], folder: str) -> Rules:
    """The post-processor that puts tokens around a text, None in `frame`."""
    names = [token for token in frame if token is not None]
    if missing := [token for token in names if token not in vocab]:
        raise InvalidValue(f"{folder}: the vocabulary has no {missing[0]!r:.40}, which stands around every text")
    own = [{"Sequence": {"id": "A", "type_id": 0}} if token is None else {"SpecialToken": {"id": token, "type_id": 0}} for token in frame]
    return {
        "type": "TemplateProcessing",
        "single": own,
        "pair": [*own, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in names},
    }


def _added(token: str, place: int) -> Rules:
    return {"id": place, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _id_of(model: Rules, token: str) -> int | None:
    if isinstance(model["vocab"], dict):
        return model["vocab"].get(token)
    return next((i for i, (one, _) in enumerate(model["vocab"]) if one == token), None)


def _has(folder: str, *names: str) -> bool:
    return all(os.path.lexists(os.path.join(folder, name)) for name in names)


def _text(folder: str, name: str) -> str:
    try:
        return read_bytes(folder, MAX_FILE_BYTES, name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{os.path.join(folder, name)}: expected UTF-8: {error}") from error


def _ids(folder: str, name: str) -> dict[str, int]:
    where = os.path.join(folder, name)
    found = parse_json_strict(read_bytes(folder, MAX_FILE_BYTES, name), where)
    if not found or not all(type(value) is int and 0 <= value < MAX_PIECES for value in found.values()):
        raise InvalidValue(f"{where}: expected tokens and their ids, 0 to {MAX_PIECES - 1}")
    return found


def _json_or_nothing(folder: str, name: str) -> dict[str, Any]:
    try:
        return parse_json_strict(read_bytes(folder, MAX_JSON_BYTES, name), os.path.join(folder, name)) if _has(folder, name) else {}
    except FileProblem:
        return {}
