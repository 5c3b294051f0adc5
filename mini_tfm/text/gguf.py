"""The tokenizer that a GGUF file carries, as the `tokenizer.json` and `tokenizer_config.json` it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mini_tfm.errors import InvalidValue

from .tokenizers import BPETokenizer

# How text is cut into words before its pairs are merged, by the name that llama.cpp gives it.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = {"default": _GPT2, "gpt-2": _GPT2, "smollm": _GPT2, "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "qwen2": _QWEN2}
_DIGITS_APART = ("smollm",)
_NFC = ("qwen2",)
CONTROL, USER_DEFINED, UNKNOWN, BYTE = 3, 4, 2, 6  # token types


def tokenizer_of(fields: Mapping[str, Any], source: str) -> BPETokenizer:
    """The tokenizer of a file's fields. Raises InvalidValue naming the file `source` and what is missing or not supported."""
    kind, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens or ())
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens) or len(types) != len(tokens):
        raise InvalidValue(f"{source}: tokenizer.ggml.tokens and token_type: expected as many texts as numbers")
    if kind == "gpt2":
        rules = _byte_level(fields, tokens, source)
    elif kind == "llama":
        rules = _sentencepiece(fields, tokens, types, source)
    else:
        raise InvalidValue(f"{source}: tokenizer.ggml.model: {kind!r:.80} is not supported, only gpt2 and llama")
    rules["added_tokens"] = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for i, (token, one) in enumerate(zip(tokens, types, strict=True))
        if one in (CONTROL, USER_DEFINED) or (one == UNKNOWN and kind == "llama")
    ]
    rules |= {"version": "1.0", "truncation": None, "padding": None}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = fields.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None:
            if type(number) is not int or not 0 <= number < len(tokens):
                raise InvalidValue(f"{source}: tokenizer.ggml.{name}_token_id: expected 0 to {len(tokens) - 1}, got {number!r:.40}")
            config[f"{role}_token"] = tokens[number]
    if fields.get("tokenizer.ggml.add_bos_token", kind == "llama") and "bos_token" in config:
        begin = config["bos_token"]
        rules["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {begin: {"id": begin, "ids": [tokens.index(begin)], "tokens": [begin]}},
        }
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return BPETokenizer(json.dumps(rules).encode(), json.dumps(config, indent=2).encode() + b"\n", source)


def _merges(fields: Mapping[str, Any], source: str) -> list[str]:
    merges = fields.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges):
        raise InvalidValue(f"{source}: tokenizer.ggml.merges: expected pairs of texts")
    return merges  # two tokens with a space between them; byte-level tokens hold no space of their own


def _byte_level(fields: Mapping[str, Any], tokens: list[str], source: str) -> dict[str, Any]:
    words = fields.get("tokenizer.ggml.pre", "default")
    if words not in _WORDS:
        raise InvalidValue(f"{source}: tokenizer.ggml.pre: {words!r:.80} is not supported, only {', '.join(_WORDS)}")
    steps: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if words in _DIGITS_APART else []
    steps += [
        {"type": "Split", "pattern": {"Regex": _WORDS[words]}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ]
    return {
        "normalizer": {"type": "NFC"} if words in _NFC else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": words in ("llama-bpe", "llama3"),
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": _merges(fields, source),
        },
    }  # fmt: skip


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], types: list[int], source: str) -> dict[str, Any]:
    """SentencePiece's BPE: pieces with scores, the better of which are merged first; bytes where there is no piece."""
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InvalidValue(f"{source}: tokenizer.ggml.scores: expected {len(tokens)} numbers")
    vocab = {token: i for i, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == 1}
    pairs = [
        (-scores[vocab[token]], vocab[token[:at]], vocab[token[at:]], [token[:at], token[at:]])
        for token in normal
        if len(token) <= 64
        for at in range(1, len(token))
        if token[:at] in normal and token[at:] in normal
    ]
    space = [{"type": "Prepend", "prepend": "▁"}] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if space else []
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*space, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip,
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": tokens[unknown] if type(unknown) is int and 0 <= unknown < len(tokens) else None,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
            "byte_fallback": any(kind == BYTE for kind in types), "ignore_merges": False, "vocab": vocab,
            "merges": [pair for *_, pair in sorted(pairs)],
        },
    }  # fmt: skip
