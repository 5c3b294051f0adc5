"""A corpus: documents of token ids, one after another in a flat array, in RAM or mapped from a file (cache.py).

    tokens   (n_tokens,) integers      the documents, with nothing between them
    offsets  (n_documents + 1,) int64  where each begins; the last is where the last ends

Source-target pairs are the same with two documents each: 2 i is the source of pair i, 2 i + 1 its target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InvalidType, InvalidValue, shown
from ..text.tokenizers import Tokenizer
from .checks import MOST, integers, number
from .sources import TextFiles

KINDS = ("texts", "pairs")
CHUNK = 1 << 18  # tokens or offsets that are looked at at once
CUT_BELOW = 10  # a corpus of fewer documents is split inside of one


class Corpus:
    """Documents or pairs of token ids; made by `Corpus.of`, `token_cache` or `open_token_cache`.

    `len(corpus)` counts documents or pairs; `corpus[i]` is a document's (tokens,) ids, or (source, target), as they lie
    in the array: read-only, of the smallest type. kind: "texts" or "pairs". vocab_size: ids are below it, or None.
    fingerprint: names the contents.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        *,
        kind: str = "texts",
        vocab_size: int | None = None,
        fingerprint: str | None = None,
    ):
        if kind not in KINDS:
            raise InvalidValue(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or offsets.ndim != 1 or offsets.dtype.kind not in "iu":
            raise InvalidType(f"tokens, offsets: expected flat arrays of integers, got {tokens.dtype}, {offsets.dtype}")
        if len(offsets) < 2 or (kind == "pairs" and len(offsets) % 2 == 0):
            raise InvalidValue(f"offsets: expected at least 2, for pairs an odd number of at least 3, got {len(offsets)}")
        self.tokens, self.offsets, self.kind, self.vocab_size = tokens, offsets, kind, vocab_size
        self._fingerprint = fingerprint

    @classmethod
    def of(cls, documents: Any, tokenizer: Tokenizer | None = None, *, end_id: int | None = None, vocab_size: int | None = None) -> Corpus:
        """A corpus in RAM.

        documents: TextFiles, or an iterable (a mapping counts by its values) of str, of (source, target) str, of arrays of
        ids (tokens,), or of (source, target) arrays. tokenizer: needed for text. end_id: put behind each document (not
        pairs, whose targets get their end in the batch). vocab_size: of ids that no tokenizer made. Raises InvalidType,
        InvalidValue naming the document.
        """
        source = TokenSource(documents, tokenizer, end_id, vocab_size)
        dtype = token_dtype(source.vocab_size) if source.vocab_size else np.dtype(np.int64)
        parts, offsets, at = [], [0], 0
        for ids, ends in source:
            parts.append(ids.astype(dtype))
            at += len(ids)
            if ends:
                offsets.append(at)
        return cls(np.concatenate(parts), np.array(offsets, np.int64), kind=source.kind, vocab_size=source.vocab_size)

    def __len__(self) -> int:
        return self.n_documents // (2 if self.kind == "pairs" else 1)

    def __getitem__(self, i: int) -> Any:
        if not isinstance(i, int | np.integer):
            raise InvalidType(f"i: expected an integer, got {type(i).__name__}")
        if not -len(self) <= i < len(self):
            raise IndexError(f"expected 0 to {len(self) - 1}, got {shown(i)}")  # what ends a loop over a sequence
        i = int(i) % len(self)
        return self.document(i) if self.kind == "texts" else (self.document(2 * i), self.document(2 * i + 1))

    def document(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens `start` to `stop` of document i (a side of a pair is one)."""
        first, last = int(self.offsets[i]), int(self.offsets[i + 1])
        if not 0 <= first <= last <= len(self.tokens):
            raise InvalidValue(f"offsets: document {i} is damaged: {first} to {last} of {len(self.tokens)} tokens")
        return self.tokens[first + start : last if stop is None else min(last, first + stop)]

    @property
    def n_documents(self) -> int:
        """Documents; two a pair."""
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        return int(self.offsets[-1]) - int(self.offsets[0])

    @property
    def fingerprint(self) -> str:
        """Names the contents: SHA-256 of tokens and offsets, in hexadecimal. Reads all of them the first time."""
        if self._fingerprint is None:
            digest = hashlib.sha256(self.kind.encode())
            first, last = int(self.offsets[0]), int(self.offsets[-1])
            for start in range(first, last, CHUNK):
                digest.update(self.tokens[start : min(last, start + CHUNK)].astype("<i8").tobytes())
            for start in range(0, len(self.offsets), CHUNK):
                digest.update((self.offsets[start : start + CHUNK].astype("<i8") - first).tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def lengths(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens of documents `start` to `stop`, int64."""
        return np.diff(self.offsets[start : self.n_documents + 1 if stop is None else stop + 1].astype(np.int64))

    def joined(self) -> Corpus:
        """All documents as one, so that segments have no padding and nothing stops at a document's end: for language
        models of many short documents without a memory. Make it with `end_id`, or the ends of documents are lost."""
        self._are_texts("joined")
        whole = self.offsets[[0, -1]].astype(np.int64)
        return Corpus(self.tokens, whole, vocab_size=self.vocab_size, fingerprint=f"{self.fingerprint}:joined")

    def split(self, held_out: float) -> tuple[Corpus, Corpus]:
        """(the rest, the last part), where the last part has about the share `held_out` of the tokens.

        Splits between documents or pairs; of fewer than ten texts, one may be cut in two. Copies nothing.
        """
        if not 0 < number(held_out) < 1:
            raise InvalidValue(f"held_out: expected a share between 0 and 1, got {shown(held_out)}")
        first, last = int(self.offsets[0]), int(self.offsets[-1])
        wanted = max(first + 1, min(last - 1, last - round(self.n_tokens * held_out)))
        a_unit = 2 if self.kind == "pairs" else 1
        if self.kind == "texts" and len(self) < CUT_BELOW:
            offsets = np.array(self.offsets, np.int64)
            if wanted not in offsets and self.n_tokens > 1:
                offsets = np.insert(offsets, np.searchsorted(offsets, wanted), wanted)
            cut = int(np.searchsorted(offsets, wanted))
        else:
            offsets = self.offsets
            cut = int(np.searchsorted(offsets, wanted)) // a_unit * a_unit
            cut = min(max(cut, a_unit), self.n_documents - a_unit)
        if not 0 < cut < len(offsets) - 1:
            raise InvalidValue(f"corpus: expected enough text to hold out a part, got {self.n_tokens} tokens in {len(self)} {self.kind}")
        sides = (offsets[: cut + 1], offsets[cut:])
        names = (f"{self.fingerprint}:before {wanted}", f"{self.fingerprint}:from {wanted}")
        train, rest = (
            Corpus(self.tokens, side, kind=self.kind, vocab_size=self.vocab_size, fingerprint=name)
            for side, name in zip(sides, names, strict=True)
        )
        return train, rest

    def _are_texts(self, what: str) -> None:
        if self.kind != "texts":
            raise InvalidValue(f"corpus: expected texts for {what}, got {self.kind}")


def as_corpus(documents: Any, kind: str) -> Corpus:
    """The argument of an objective as a corpus of the kind it needs."""
    corpus = documents if isinstance(documents, Corpus) else Corpus.of(documents)
    if corpus.kind != kind:
        raise InvalidValue(f"documents: expected {kind} for this objective, got {corpus.kind}")
    return corpus


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer that holds every id."""
    return np.dtype("u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


class TokenSource:
    """Iterates over any source of documents: (ids, whether a document ends with them), checked, in pieces that fit into RAM.

    kind: known after the first piece (of TextFiles, at once).
    """

    def __init__(self, documents: Any, tokenizer: Tokenizer | None, end_id: int | None = None, vocab_size: int | None = None):
        if isinstance(documents, str | bytes | np.ndarray) or not isinstance(documents, Iterable):
            raise InvalidType(f"documents: expected several, or TextFiles, got {type(documents).__name__}; put one document into a list")
        if isinstance(documents, TextFiles) and tokenizer is None:
            raise InvalidType("tokenizer: expected a Tokenizer, because the documents are text; got None")
        if vocab_size is not None:
            [vocab_size] = integers(vocab_size=vocab_size)
        self.vocab_size = tokenizer.vocab_size if tokenizer is not None else vocab_size
        if end_id is not None:
            [end_id] = integers(0, (self.vocab_size or MOST + 1) - 1, end_id=end_id)
        self.documents, self.tokenizer, self.end_id = documents, tokenizer, end_id
        self.kind = documents.kind if isinstance(documents, TextFiles) else "texts"

    def __iter__(self) -> Iterator[tuple[np.ndarray, bool]]:
        pieces = self._of_files(self.documents) if isinstance(self.documents, TextFiles) else self._of_items(self.documents)
        count = 0
        for ids, ends, where in pieces:
            count += len(ids)
            if ends and not count:
                raise InvalidValue(f"{where}: no tokens; leave empty documents out")
            if ends and self.end_id is not None and self.kind == "texts":
                ids = np.append(ids, self.end_id)
            yield ids, ends
            count = 0 if ends else count

    def _of_files(self, files: TextFiles) -> Iterator[tuple[np.ndarray, bool, str]]:
        waiting: list[str] = []
        where = ""

        def document() -> Iterator[str]:
            """The pieces of a document as they come; `where` ends up where it ends."""
            nonlocal where
            for piece in pieces:
                where = piece.where
                yield piece.text
                if piece.ends:
                    return

        pieces = files.pieces()
        for first in pieces:
            where = first.where
            waiting = [first.text]
            texts: Iterable[str] = waiting if first.ends else _chain(waiting, document())
            yield from self._encoded(texts, where)

    def _of_items(self, documents: Iterable[Any]) -> Iterator[tuple[np.ndarray, bool, str]]:
        kind = None
        for i, item in enumerate(documents.values() if isinstance(documents, Mapping) else documents):
            is_pair = isinstance(item, tuple) or (isinstance(item, list) and len(item) == 2 and all(_is_document(side) for side in item))
            if is_pair and len(item) != 2:
                raise InvalidType(f"documents[{i}]: expected (source, target), got {len(item)} values")
            if kind is None:
                kind = self.kind = "pairs" if is_pair else "texts"
            elif kind != ("pairs" if is_pair else "texts"):
                raise InvalidType(f"documents[{i}]: expected {kind}, like the first document, got {type(item).__name__}")
            for side, document in enumerate(item if is_pair else [item]):
                where = f"documents[{i}]" + (f"[{side}]" if is_pair else "")
                if isinstance(document, str):
                    yield from self._encoded([document], where)
                else:
                    yield self._checked(document, where), True, where
        if kind is None:
            raise InvalidValue("documents: expected at least one, got none")

    def _encoded(self, texts: Iterable[str], where: str) -> Iterator[tuple[np.ndarray, bool, str]]:
        if self.tokenizer is None:
            raise InvalidType(f"{where}: expected token ids without a tokenizer, got text; give the tokenizer")
        try:
            for ids in self.tokenizer.encode_pieces(texts):  # as long text is tokenized when it is read
                yield ids, False, where
        except InvalidValue as error:
            raise InvalidValue(f"{where}: {error}") from error
        yield np.zeros(0, np.int64), True, where

    def _checked(self, document: Any, where: str) -> np.ndarray:
        try:
            ids = np.asarray(document)
        except ValueError as error:
            raise InvalidType(f"{where}: expected token ids (tokens,): {error}") from error
        if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
            raise InvalidType(f"{where}: expected token ids (tokens,), got {ids.dtype} of shape {ids.shape}")
        if ids.size and (ids.min() < 0 or (self.vocab_size and ids.max() >= self.vocab_size)):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise InvalidValue(f"{where}: expected ids from 0{f' to {self.vocab_size - 1}' if self.vocab_size else ''}, got {bad}")
        return ids.astype(np.int64)


def _is_document(value: Any) -> bool:
    return isinstance(value, str | np.ndarray | Sequence)


def _chain(first: Iterable[str], rest: Iterable[str]) -> Iterator[str]:
    yield from first
    yield from rest
