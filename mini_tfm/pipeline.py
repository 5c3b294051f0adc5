"""Pipeline: text in, segments, memory, text out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import _core
from .autodiff import value_of
from .errors import InvalidType, InvalidValue
from .generate.options import GenerationOptions
from .generate.session import token_steps
from .memory.base import Memory
from .model import Encoded, Transformer
from .text.pieces import in_pieces
from .text.tokenizers import Tokenizer

DEFAULT_SEGMENT_TOKENS = 256
SEGMENTS_A_FLUSH = 16  # how often reading makes a long-term memory durable


class Pipeline:
    """A model, its tokenizer and a memory, for text.

    The memory goes on from call to call: `read` puts text into it; `generate` and `score` look at it and leave it
    as it was; `reset` forgets. segment_length: tokens read at once, by default what the model was trained with.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, memory: Memory | str | None = None, segment_length: int | None = None):
        if not isinstance(model, Transformer):
            raise InvalidType(f"model: expected a Transformer, got {type(model).__name__}; Pipeline.load(folder) takes a folder")
        if not isinstance(tokenizer, Tokenizer):
            raise InvalidType(f"tokenizer: expected a Tokenizer, got {type(tokenizer).__name__}")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise InvalidValue(f"tokenizer: expected at most the model's {model.config.vocab_size} tokens, got {tokenizer.vocab_size}")
        if isinstance(memory, str):
            from .memory import memory as make_memory

            memory = make_memory(memory)
        if memory is not None and not isinstance(memory, Memory):
            raise InvalidType(f"memory: expected a Memory, its text or None, got {type(memory).__name__}")
        self.model, self.tokenizer, self.memory = model, tokenizer, memory
        if segment_length is None:
            segment_length = model.config.segment_length or DEFAULT_SEGMENT_TOKENS
        self.segment_length = segment_length
        if not isinstance(segment_length, int) or isinstance(segment_length, bool) or segment_length < 1:
            raise InvalidValue(f"segment_length: expected a number of tokens of at least 1, got {segment_length!r}")
        model.add_memory_weights(memory)
        self.reset()

    @classmethod
    def load(
        cls, folder: str | Path, memory: Memory | str | None = "saved", dtype: str = "float32", segment_length: int | None = None
    ) -> Pipeline:
        """The pipeline of a model folder; memory: text or a Memory, None for none, "saved" for what it was trained with."""
        from .checkpoint.models import load_saved

        saved = load_saved(folder, dtype)
        if saved.tokenizer is None:
            raise InvalidValue(f"folder: {folder} has no tokenizer (tokenizer.json); use mt.load(folder) for the model alone")
        return cls(saved.model, saved.tokenizer, saved.memory_text if memory == "saved" else memory, segment_length)

    def reset(self) -> None:
        """Forgets what was read in this process; documents on disk stay (`memory.reset(name)` deletes one)."""
        self._run = self.model.start_run(self.memory, 1)
        self._last: int | None = None  # a decoder-only model's last token

    def close(self) -> None:
        """Ends the stream: what working memory holds goes to the long-term memory behind it, durable with a path."""
        self._run.drain()
        self._run.flush()
        self.reset()

    def read(self, text: str | Iterable[str]) -> int:
        """Streams text (or pieces of it, in which a piece may end anywhere) into the memory; returns tokens read.

        RAM stays bounded whatever the length. The end of a call ends a segment. With a long-term memory on disk,
        what was read is durable when this returns.
        """
        if self.memory is None:
            raise InvalidValue("memory: this pipeline has none to read into; give one, as in Pipeline.load(folder, memory='window')")
        count = 0
        for number, segment in enumerate(self._segments(text)):
            self._run, self._last = self._read_segment(self._run, segment, self._last)
            count += len(segment)
            if number % SEGMENTS_A_FLUSH == SEGMENTS_A_FLUSH - 1:
                self._run.flush()
        self._run.flush()
        return count

    def generate(self, text: str, *, stream: bool = False, **options: Any) -> str | Iterator[str]:
        """Goes on from `text`, with what the memory holds; the memory stays as it was.

        Text longer than a segment is read first, into a copy of the memory. What goes beyond a segment is read back
        the same way. Options: see `mini_tfm.generate.GenerationOptions`. stream: an iterator of pieces of text
        instead, as they come.
        """
        chosen = GenerationOptions.of(options)
        self.model._needs("decoder")
        pieces = self._generate(self._encode(text), chosen, self._run.copy(), self._last)
        return pieces if stream else "".join(pieces)

    def score(self, text: str | Iterable[str]) -> dict[str, float]:
        """How well the model predicts `text`, read from its beginning with what the memory holds.

        Returns tokens, bytes, bits, bits_per_token, bits_per_byte; the memory stays as it was.
        """
        self.model._needs("decoder")
        run, last = self._run.copy(), None
        tokens, n_bytes, bits = 0, 0, 0.0
        before = np.array([self.model.config.bos_id])
        for segment in self._segments(text, count_bytes := [0]):
            bits += self._score_segment(run, before, segment, last)
            tokens += len(segment)
            before, last = segment, int(segment[-1])
        n_bytes = count_bytes[0]
        if not tokens:
            raise InvalidValue("text: expected at least one token, got an empty text")
        return {
            "tokens": tokens,
            "bytes": n_bytes,
            "bits": bits,
            "bits_per_token": bits / tokens,
            "bits_per_byte": bits / n_bytes,
        }

    def embed(self, texts: str | Iterable[str]) -> np.ndarray:
        """One vector a text, the mean of the encoder's outputs over its tokens (at most a segment) -> (N, d_model)."""
        self.model._needs("encoder")
        if not isinstance(texts, Iterable):
            raise InvalidType(f"text: expected str or an iterable of str, got {type(texts).__name__}")
        many = [self._encode(text)[: self.segment_length] for text in ([texts] if isinstance(texts, str) else texts)]
        lengths = np.array([len(ids) for ids in many], np.int64)
        if not len(many):
            return np.zeros((0, self.model.config.d_model), self.model.dtype)
        tokens = np.full((len(many), max(1, lengths.max())), self.model.config.pad_id, np.int64)
        for row, ids in zip(tokens, many, strict=True):
            row[: len(ids)] = ids
        return self.model.encode(tokens, lengths).sum(axis=1) / np.maximum(lengths, 1)[:, None].astype(self.model.dtype)

    def state_bytes(self) -> int:
        """Bytes of memory state in RAM."""
        return self._run.nbytes()

    # Inside

    def _encode(self, text: str) -> np.ndarray:
        if not isinstance(text, str):
            raise InvalidType(f"text: expected str, got {type(text).__name__}")
        return self.tokenizer.encode(text)

    def _segments(self, text: str | Iterable[str], count_bytes: list[int] | None = None) -> Iterator[np.ndarray]:
        """Token ids of `text`, segment_length at a time; the last may be shorter. The same however it is cut in pieces."""
        pending = np.zeros(0, np.int64)
        for piece in in_pieces([text] if isinstance(text, str) else text):
            if count_bytes is not None:
                count_bytes[0] += len(piece.encode("utf-8", "surrogatepass"))
            pending = np.concatenate([pending, self.tokenizer.encode(piece)])
            whole = len(pending) // self.segment_length * self.segment_length
            yield from pending[:whole].reshape(-1, self.segment_length)
            pending = pending[whole:]
        if len(pending):
            yield pending

    def _read_segment(self, run: Any, segment: np.ndarray, last: int | None) -> tuple[Any, int]:
        """One segment into a memory. The decoder runs only where a memory lives in it."""
        model, length = self.model, np.array([len(segment)])
        run.open(length, segment[None])
        encoded = model.encode_segment(segment[None], length, run) if model.config.has_encoder else None
        if encoded is None or run.uses("decoder"):
            first = None if last is None or encoded is not None else np.array([last])
            model.decode_segment(model.shift_right(segment[None], first), length, encoded, run)
        model.finish_segment(encoded, run)
        return run, int(segment[-1])

    def _score_segment(self, run: Any, before: np.ndarray, segment: np.ndarray, last: int | None) -> float:
        """Bits of `segment`, given the one before it, which is read."""
        model, lengths = self.model, np.array([len(segment)])
        encoded = self._open(run, before if model.config.has_encoder else segment, segment)
        first = None if encoded is not None or last is None else np.array([last])
        hidden = model.decode_segment(model.shift_right(segment[None], first), lengths, encoded, run)
        scores = _core.log_softmax(value_of(model.output_logits(hidden))[0])
        log_probs = run.logits(value_of(hidden), scores[None])[0]
        model.finish_segment(encoded, run)
        return float(-log_probs[np.arange(len(segment)), segment].sum(dtype=np.float64) / math.log(2))

    def _open(self, run: Any, source: np.ndarray, target: np.ndarray | None = None) -> Encoded | None:
        lengths = np.array([len(source)])
        run.open(lengths, None if target is None else target[None])
        return self.model.encode_segment(source[None], lengths, run) if self.model.config.has_encoder else None

    def _generate(self, tokens: np.ndarray, options: GenerationOptions, run: Any, last: int | None) -> Iterator[str]:
        """Pieces of text; `run` is a copy of the memory as it was when they were asked for."""
        length, n_ids = self.segment_length, self.tokenizer.vocab_size
        decoder = self.tokenizer.decode_stream()
        # Whole segments from the end backwards: the last one, which is continued, is full if there is enough text.
        head = (len(tokens) - 1) % length + 1 if len(tokens) else 0
        # An encoder needs something to read; a decoder begins with bos anyway.
        nothing = np.array([self.model.config.bos_id] if self.model.config.has_encoder else [], np.int64)
        segments = [tokens[:head], *tokens[head:].reshape(-1, length)] if head else [nothing]
        for segment in segments[:-1]:
            run, last = self._read_segment(run, segment, last)
        source, left, done = segments[-1], options.max_new_tokens, np.zeros(1, bool)
        rolls = self.model.config.segment_length is not None  # trained to go on from segment to segment
        number = 0
        while left > 0 and not done.all():
            limit = min(left, length) if rolls else left
            if self.model.config.has_encoder:
                encoded = self._open(run, source)
                prompt = np.array([[self.model.config.bos_id]])
            else:
                encoded = self._open(run, source)
                start = self.model.config.bos_id if last is None else last
                prompt = np.concatenate([[start], source])[None] if number == 0 else np.array([[start]])
            seed = None if options.seed is None else options.seed * 1_000_003 + number
            here = dataclasses.replace(options, seed=seed)
            steps = token_steps(self.model, encoded, run, prompt, here, limit=limit, done=done, n_ids=n_ids)
            made = []
            for step in steps:
                if step[0] < 0:
                    done = np.ones(1, bool)
                    break
                made.append(int(step[0]))
                if piece := decoder.push(made[-1]):
                    yield piece
            left, number = left - len(made), number + 1
            if left > 0 and not done.all():
                if self.model.config.has_encoder:
                    self.model.finish_segment(encoded, run)
                    source = np.array(made)
                else:
                    whole = np.concatenate([source, made]) if number == 1 else np.array(made)
                    run, last = self._read_segment(run, whole, last)
                    source = np.zeros(0, np.int64)
        if piece := decoder.finish():
            yield piece
