"""What published tokenizers ask for is allowed, and quick enough on the worst text; what asks for more is refused by name."""

import base64
import json
import struct

import pytest
from hostile import normalizers, replace, rules, split

from mini_tfm.errors import InvalidValue
from mini_tfm.text.regexes import check_regex
from mini_tfm.text.tokenizers import BPETokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
USUAL = [
    GPT2,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s+$",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    r"[\p{Han}]+|[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+(?i:'s|'t)?",
    r"<\|startoftext\|>|[\p{L}]+|[^\s\p{L}\p{N}]+",
    r"(?=(\d{3})+(?!\d))",
    "[0-9][0-9][0-9]",
    "[一-龥぀-ゟ゠-ヿ]+",
    " {2,}",
    r"[]a]+|[^]a]|[[:alpha:]-]+",
]


@pytest.mark.parametrize("pattern", USUAL)
def test_the_regular_expressions_of_published_tokenizers_are_allowed(pattern):
    check_regex(pattern)
    made = BPETokenizer(json.dumps(rules(pre_tokenizer=split(pattern))).encode())
    for text in (" " * 20_000, "a" * 20_000, "12" * 10_000, "aB\r\n" * 5_000):
        made.encode(text)


REFUSED = {
    "(a+)+b": "a repetition of what has repetitions", "(a|b)*": "a repetition of what has", "(?:a?){2,}": "a repetition of what has",
    "a*b*c": "behind two repetitions", "a+a+(?!b)": "behind two repetitions", "((a*)b*)c": "behind two", "(?:a*b*|c)d": "behind two",
    "(?=a*)(?=a*)b": "behind two", "a{1,99}a{1,99}b": "more than 1000 ways", "a{2000}": "more than 1000 ways", "a**": "is repeated",
    "a{1,3}+": "is repeated", r"(a)\1": "a reference", r"\k<x>": "a reference", "(?~a)": "unusual group", "(?(1)a|b)": "unusual group",
    "(?x) a": "unusual group", "(": "not closed", "[": "not closed", "[[a]": "not closed", "a)": "not open", "a{999999999}": "more than",
    "a" * 20_000: "at most 16384 characters", "*a": "nothing is repeated", "[" * 50: "classes inside each other",
}  # fmt: skip


@pytest.mark.parametrize("pattern", REFUSED, ids=range(len(REFUSED)))
def test_a_regular_expression_that_may_take_for_ever_is_refused(pattern):
    with pytest.raises(ValueError) as caught:
        check_regex(pattern)
    assert REFUSED[pattern] in str(caught.value)


def test_what_is_tried_again_at_every_character_is_told_from_what_is_not():
    assert not any(map(check_regex, [" {2,}", r"\s+|a+", "[a-z]+b?", "a*b*"]))
    assert all(map(check_regex, [GPT2, "a+b", "(?:a*b)?", r"\s+$"]))


def charsmap(texts: bytes) -> str:
    return base64.b64encode(struct.pack("<I", 2048) + bytes(2048) + texts).decode()


def test_the_normalizers_of_published_tokenizers_are_allowed():
    precompiled = {"type": "Precompiled", "precompiled_charsmap": charsmap(b"a\0bc\0")}
    for steps in (
        [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")],
        [replace("``", '"'), replace("''", '"'), {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}, precompiled],
        [precompiled, replace({"Regex": " {2,}"}, "▁")],
        [{"type": "NFC"}, replace({"Regex": r"\s+"}, " "), {"type": "Lowercase"}],
        [{"type": "Strip", "strip_left": False, "strip_right": True}, *[replace(chr(0x2020 + i), "...") for i in range(30)]],
    ):
        made = BPETokenizer(json.dumps(normalizers(*steps)).encode())
        assert made._at_once >= 10_000
        made.encode("ﷺ a``b " * 10)


def test_a_text_is_given_to_a_tokenizer_that_makes_it_longer_in_smaller_pieces():
    made = BPETokenizer(json.dumps(normalizers(replace("a", "b" * 64))).encode())
    assert made._at_once < 5_000
    assert made.encode("a" * 10_000).tolist() == [1] * 640_000


def test_the_limits_name_the_file_and_the_component():
    with pytest.raises(InvalidValue, match=r"place/tokenizer\.json: pre_tokenizer: Split: the regular expression '\(a\*\)\*': a repet"):
        BPETokenizer(json.dumps(rules(pre_tokenizer=split("(a*)*"))).encode(), source="place")
