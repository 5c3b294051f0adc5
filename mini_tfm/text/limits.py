"""What a `tokenizer.json` may ask for, checked before the `tokenizers` package sees it.

The package trusts its files: it can be made to abort the process, to make a gigabyte of ten letters, to search for hours. So the
kinds of components are a closed table; their numbers and sizes are limited far above what published tokenizers have; and how much
longer the normalizer makes a text is measured, a step at a time, before any text is given to it.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from typing import Any

from ..errors import shown
from .pieces import PIECE_CHARACTERS
from .regexes import check_regex

MAX_COMPONENTS = 64  # of a kind
MAX_CONTENT_CHARACTERS = 256  # of what is put in, for a match or before a text
MAX_GROWTH = 64  # characters for each that is replaced
MAX_PRECOMPILED_BYTES = 256  # of what a character becomes
MAX_WORD_CHARACTERS = 500  # a WordPiece model's time is cubic in them
MAX_UNIGRAM_CHARACTERS = 512  # of a token: a Unigram model's time grows with them
MAX_TEMPLATE_PIECES = 64
SLOW_CHARACTERS = 1 << 13  # tokenized at once where a regular expression may take quadratic time

_KINDS = {
    "normalizer": {
        "Sequence", "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Replace",
        "Strip", "StripAccents",
    },
    "pre_tokenizer": {
        "Sequence", "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "FixedLength", "Metaspace", "Punctuation", "Split",
        "UnicodeScripts", "Whitespace", "WhitespaceSplit",
    },
    "decoder": {
        "Sequence", "BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece",
    },
    "post_processor": {"Sequence", "BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"},
    "model": {"BPE", "Unigram", "WordLevel", "WordPiece"},
}  # fmt: skip
_MEMBERS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders", "post_processor": "processors"}


def check_rules(rules: dict[str, Any]) -> int:
    """Raises ValueError naming the component at fault; else, how many characters may be tokenized at once in good time."""
    parts = {place: list(_components(place, rules.get(place))) for place in _MEMBERS}
    for place, components in parts.items():
        if len(components) > MAX_COMPONENTS:
            raise ValueError(f"{place}: expected at most {MAX_COMPONENTS} components, found {len(components)}")
        for component in components:
            _check_component(place, component)
    for kind, most in (("ByteLevel", 2), ("Precompiled", 1)):  # each makes a text longer, one behind another exponentially
        found = sum(component.get("type") == kind for place in ("normalizer", "pre_tokenizer") for component in parts[place])
        if found > most:
            raise ValueError(f"normalizer, pre_tokenizer: expected at most {most} {kind}, found {found}")
    _check_model(rules.get("model"))
    growth = _check_growth(parts["normalizer"]) * _decoder_growth(parts["decoder"])
    regexes = [_regex_of(component) for place in ("normalizer", "pre_tokenizer") for component in parts[place]]
    is_slow = any(regex is not None and check_regex(regex) for regex in regexes)
    return max(64, int((SLOW_CHARACTERS if is_slow else PIECE_CHARACTERS) / max(1, growth / 4)))


def _components(place: str, rule: Any) -> Iterator[dict[str, Any]]:
    """The components of a place, in order, those of sequences one by one."""
    if rule is None:
        return
    if not isinstance(rule, dict):
        raise ValueError(f"{place}: expected an object or null, found {shown(rule)}")
    kind = rule.get("type")
    if not isinstance(kind, str) or kind not in _KINDS[place]:
        raise ValueError(f"{place}: expected one of {', '.join(sorted(_KINDS[place]))}, found {shown(kind)}")
    if kind != "Sequence":
        yield rule
        return
    members = rule.get(_MEMBERS[place])
    if not isinstance(members, list):
        raise ValueError(f"{place}: {_MEMBERS[place]}: expected a list, found {shown(members)}")
    if len(members) > MAX_COMPONENTS:
        raise ValueError(f"{place}: expected at most {MAX_COMPONENTS} components, found {len(members)}")
    for member in members:
        yield from _components(place, member)


def _regex_of(component: dict[str, Any]) -> str | None:
    pattern = component.get("pattern")
    return pattern["Regex"] if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str) else None


def _check_component(place: str, component: dict[str, Any]) -> None:
    kind = component["type"]
    where = f"{place}: {kind}"
    for name, value in component.items():
        if isinstance(value, str) and name != "precompiled_charsmap" and len(value) > MAX_CONTENT_CHARACTERS:
            raise ValueError(f"{where}: {name}: expected at most {MAX_CONTENT_CHARACTERS} characters, found {len(value)}")
        if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value <= PIECE_CHARACTERS:
            raise ValueError(f"{where}: {name}: expected 0 to {PIECE_CHARACTERS}, found {shown(value)}")
    pattern = component.get("pattern")
    if kind in ("Replace", "Split"):
        text = pattern.get("String") if isinstance(pattern, dict) else None
        regex = _regex_of(component)
        if (text is None) == (regex is None) or not isinstance(text if regex is None else regex, str) or not (text or regex):
            raise ValueError(f"{where}: pattern: expected a String or a Regex that is not empty, found {shown(pattern)}")
        if regex is not None:
            try:
                check_regex(regex)
            except ValueError as error:
                raise ValueError(f"{where}: the regular expression {shown(regex)}: {error}") from None
    if kind == "FixedLength" and component.get("length") == 0:
        raise ValueError(f"{where}: length: expected at least 1, found 0")
    if place == "decoder" and kind == "Strip" and component.get("stop"):
        raise ValueError(f"{where}: stop: expected 0, found {shown(component['stop'])}, which fails where a text is shorter")
    if kind == "Precompiled":
        _check_precompiled(where, component.get("precompiled_charsmap"))
    if kind == "TemplateProcessing":
        for name, wanted in (("single", ["A"]), ("pair", ["A", "B"])):
            _check_template(f"{where}: {name}", component.get(name), wanted)


def _check_template(where: str, pieces: Any, wanted: list[str]) -> None:
    """Each text once: the template is filled in whether special tokens are asked for or not."""
    if not isinstance(pieces, list) or len(pieces) > MAX_TEMPLATE_PIECES:
        raise ValueError(f"{where}: expected a list of at most {MAX_TEMPLATE_PIECES} pieces")
    texts = [piece["Sequence"].get("id") for piece in pieces if isinstance(piece, dict) and isinstance(piece.get("Sequence"), dict)]
    if any(texts.count(text) > 1 for text in wanted) or len(texts) > len(wanted):
        raise ValueError(f"{where}: expected each text once, found {shown(texts)}")


def _check_precompiled(where: str, encoded: Any) -> None:
    """4 bytes, the size of a trie in bytes; the trie, of 4-byte units; then texts, each closed by a zero byte (SentencePiece)."""
    if not isinstance(encoded, str):
        raise ValueError(f"{where}: precompiled_charsmap: expected base64, found {shown(encoded)}")
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: precompiled_charsmap: not base64: {error}") from None
    size = int.from_bytes(data[:4], "little")
    if len(data) < 8 or size % 4 or not 4 <= size <= len(data) - 4:
        raise ValueError(f"{where}: precompiled_charsmap: its trie of {size} bytes is not in its {len(data)} bytes")
    texts = data[4 + size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{where}: precompiled_charsmap: its texts are not UTF-8") from None
    if texts and not texts.endswith(b"\0"):
        raise ValueError(f"{where}: precompiled_charsmap: its last text is not closed")
    if (longest := max(map(len, texts.split(b"\0")))) > MAX_PRECOMPILED_BYTES:
        raise ValueError(f"{where}: precompiled_charsmap: expected at most {MAX_PRECOMPILED_BYTES} bytes for a character, found {longest}")


def _check_model(model: Any) -> None:
    if not isinstance(model, dict):
        raise ValueError(f"model: expected an object, found {shown(model)}")
    kind = model.get("type")
    if kind is not None and (not isinstance(kind, str) or kind not in _KINDS["model"]):
        raise ValueError(f"model: expected one of {', '.join(sorted(_KINDS['model']))}, found {shown(kind)}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):  # put around every character
        if isinstance(model.get(name), str) and len(model[name]) > MAX_CONTENT_CHARACTERS:
            raise ValueError(f"model: {name}: expected at most {MAX_CONTENT_CHARACTERS} characters, found {len(model[name])}")
    most = model.get("max_input_chars_per_word", 0)
    if not isinstance(most, int) or isinstance(most, bool) or not 0 <= most <= MAX_WORD_CHARACTERS:
        raise ValueError(f"model: max_input_chars_per_word: expected 0 to {MAX_WORD_CHARACTERS}, found {shown(most)}")
    vocab = model.get("vocab")
    if isinstance(vocab, list):
        longest = max((len(each[0]) for each in vocab if isinstance(each, list) and each and isinstance(each[0], str)), default=0)
        if longest > MAX_UNIGRAM_CHARACTERS:
            raise ValueError(f"model: vocab: expected tokens of at most {MAX_UNIGRAM_CHARACTERS} characters, found one of {longest}")


def _check_growth(components: list[dict[str, Any]]) -> float:
    """How many characters the normalizer can make of one, about, each step tried alone with what the steps before it put in."""
    steps = [_step(component) for component in components]
    most = 18.0 if any(component["type"] in ("NFKC", "NFKD", "Precompiled") for component in components) else 1.0
    for i, component in enumerate(components):
        content = component.get("content" if component["type"] == "Replace" else "prepend")
        if component["type"] not in ("Replace", "Prepend") or not isinstance(content, str):
            continue
        replaced = 1 if _regex_of(component) or component["type"] == "Prepend" else len(component["pattern"]["String"])
        room = MAX_CONTENT_CHARACTERS if component["type"] == "Prepend" else MAX_GROWTH * replaced
        text = content * 3  # what one puts in may be matched together with the next
        for step in [lambda same: same, *steps[i + 1 :]]:
            text = step(text)
            if len(text) > 3 * room:
                raise ValueError(f"normalizer: {component['type']} of {shown(content)} makes more than {room} characters of {replaced}")
        if component["type"] == "Replace":
            most = max(most, len(text) / 3 / replaced)
    return most


def _step(component: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    model = {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}
    return Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, "normalizer": component})).normalizer.normalize_str


def _decoder_growth(components: list[dict[str, Any]]) -> float:
    growth = 1.0
    for component in components:
        if component["type"] == "Replace" and isinstance(component.get("content"), str):
            replaced = 1 if _regex_of(component) else len(component["pattern"]["String"])
            growth *= max(1.0, len(component["content"]) / replaced)
    if growth > MAX_GROWTH:
        raise ValueError(f"decoder: its Replace steps make up to {growth:.0f} characters of one, expected at most {MAX_GROWTH}")
    return 1.0
