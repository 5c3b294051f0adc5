"""JSON, stricter than the `json` module: what is unusual is refused, on the way in and on the way out."""

import json
import math
import os
from collections import Counter
from typing import Any

from mini_tfm.errors import InvalidType, InvalidValue

from .reading import as_path, read_bytes

# Far above any real model, far below what could hurt.
MAX_JSON_BYTES = 1 << 20
MAX_JSON_DEPTH = 64


def read_json_strict(path: str | os.PathLike, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `max_bytes` bytes.

    Stricter than `json.load`: UTF-8 without a mark, no key twice, no NaN or infinity (nor a number that overflows
    to one), no lone surrogate, at most MAX_JSON_DEPTH levels. Raises FileProblem, or InvalidValue naming the file.
    """
    return parse_json_strict(read_bytes(path, max_bytes), as_path(path))


def parse_json_strict(data: bytes, source: str) -> dict[str, Any]:
    """`read_json_strict` of bytes already read; `source` names them in errors."""

    def refuse_constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    def finite(text: str) -> float:
        number = float(text)
        if math.isinf(number):
            raise ValueError(f"the number {text[:40]} is out of range")
        return number

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"the key {twice[:80]!r} appears twice")
        return found

    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=refuse_constant, parse_float=finite, object_pairs_hook=unique)
        if not isinstance(value, dict):
            raise ValueError(f"expected an object in braces, got a {type(value).__name__}")
        _check_json(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidValue(f"{source}: not the JSON expected here: {error}") from error
    return value


def encode_json(config: dict[str, Any]) -> bytes:
    if not isinstance(config, dict):
        raise InvalidType(f"config: expected a dict, got {type(config).__name__}")
    try:
        _check_json(config)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    except (ValueError, TypeError) as error:
        raise InvalidValue(f"config: cannot be written as JSON: {error}") from error
    data = text.encode("utf-8")
    if len(data) > MAX_JSON_BYTES:
        raise InvalidValue(f"config: expected at most {MAX_JSON_BYTES} bytes of JSON, got {len(data)}")
    return data


def _check_json(value: Any) -> None:
    """What the `json` module lets through and we do not, on the way in and on the way out."""
    waiting = [(value, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"more than {MAX_JSON_DEPTH} levels deep")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise TypeError(f"the key {key!r} is a {type(key).__name__}, not text")
                key.encode("utf-8")
            waiting.extend((item, depth + 1) for item in value.values())
        elif isinstance(value, (list, tuple)):
            waiting.extend((item, depth + 1) for item in value)
        elif isinstance(value, str):
            value.encode("utf-8")
