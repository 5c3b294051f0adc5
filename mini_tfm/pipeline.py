"""Pipeline: text in, segments, memory, text out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InvalidType, InvalidValue
from .generate import GenerationOptions, Session
from .generate.results import Hypothesis, Search
from .generate.rules import Rules, deadline_of
from .generate.search import found_by, search
from .generate.stops import BeforeStop, StopStrings
from .memory.base import Memory
from .memory.registry import memory as make_memory
from .stream import Stream
from .text.pieces import in_pieces
from .text.tokenizers import StreamDecoder, Tokenizer
from .transformer import Transformer, load_checkpoint

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
        saved = load_checkpoint(folder, dtype)
        if saved.tokenizer is None:
            raise InvalidValue(f"folder: {folder} has no tokenizer (tokenizer.json); use mt.load(folder) for the model alone")
        return cls(saved.model, saved.tokenizer, saved.memory() if memory == "saved" else memory, segment_length)

    def reset(self) -> None:
        """Forgets what was read in this process; documents on disk stay (`memory.reset(name)` deletes one)."""
        self._stream = Stream(self.model, self.memory, 1)

    def close(self) -> None:
        """Ends the stream: what working memory holds goes to the long-term memory behind it, durable with a path."""
        self._stream.run.drain()
        self._stream.run.flush()
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
            self._stream.read(segment[None], np.array([len(segment)]))
            count += len(segment)
            if number % SEGMENTS_A_FLUSH == SEGMENTS_A_FLUSH - 1:
                self._stream.run.flush()
        self._stream.run.flush()
        return count

    def generate(self, text: str, *, stream: bool = False, **options: Any) -> str | list[str] | Iterator[str]:
        """Goes on from `text`, with what the memory holds; the memory stays as it was.

        Text longer than a segment is read first, into a copy of the memory. What goes beyond a segment is read back
        the same way. Options: see `mini_tfm.generate.GenerationOptions`. stream: an iterator of pieces of text
        instead, as they come; of beams, as soon as all of them agree. With num_return_sequences above 1: a list of texts.
        """
        chosen = self._options(GenerationOptions.of(options), stream)
        self.model.needs("decoder")
        tokens, memory = self._encode(text), self._stream.copy()
        if chosen.num_return_sequences > 1:
            return self._several(tokens, chosen, memory)
        pieces = self._generate(tokens, chosen, memory)
        return pieces if stream else "".join(pieces)

    def score(self, text: str | Iterable[str]) -> dict[str, float]:
        """How well the model predicts `text`, read from its beginning with what the memory holds.

        Returns tokens, bytes, bits, bits_per_token, bits_per_byte; the memory stays as it was.
        """
        self.model.needs("decoder")
        stream, tokens, bits = self._stream.copy(), 0, 0.0
        stream.begin_text()
        before = np.array([self.model.config.bos_id])
        for segment in self._segments(text, count_bytes := [0]):
            bits += self._score_segment(stream, before, segment)
            tokens += len(segment)
            before = segment
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
        self.model.needs("encoder")
        if not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) == 0:
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
        return self._stream.run.nbytes()

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

    def _score_segment(self, stream: Stream, before: np.ndarray, segment: np.ndarray) -> float:
        """Bits of `segment`, given the one before it, which an encoder reads."""
        source = before if self.model.config.has_encoder else None
        lengths = np.array([len(segment)])
        stream.open(None if source is None else source[None], lengths if source is None else np.array([len(source)]), segment[None])
        log_probs = stream.log_probs(stream.decode(segment[None], lengths))[0]
        bits = -log_probs[np.arange(len(segment)), segment].astype(np.float64) / math.log(2)
        if not np.isfinite(bits).all():
            at = int(np.flatnonzero(~np.isfinite(bits))[0])
            raise InvalidValue(
                f"score: token {at} of segment {stream.run.number} takes {bits[at]} bits; check that the model's weights and the memory's"
                " rows are finite"
            )
        stream.finish()
        return float(bits.sum())

    def _options(self, options: GenerationOptions, stream: bool) -> GenerationOptions:
        """The options with choices as token ids. Raises InvalidValue for those that have no meaning for text."""
        if options.max_length is not None or options.min_length:
            raise InvalidValue(
                "generate: max_length, min_length: they count the prompt, which a pipeline may read into the memory; give max_new_tokens"
                " and min_new_tokens"
            )
        if options.output_scores:
            raise InvalidValue("generate: output_scores: a pipeline gives text alone; use model.generate for scores")
        if stream and options.num_return_sequences > 1:
            raise InvalidValue(f"generate: num_return_sequences: expected 1 with stream=True, got {options.num_return_sequences}")
        rolls = self.model.config.segment_length is not None and options.max_new_tokens > self.segment_length
        if rolls and options.num_beams > 1 and options.num_return_sequences > 1:
            raise InvalidValue(
                f"generate: num_return_sequences: expected 1 for beams that go beyond a segment of {self.segment_length} tokens, got"
                f" {options.num_return_sequences}"
            )
        if options.choices is None:
            return options
        return options.replace(choices=[self._encode(each) if isinstance(each, str) else each for each in options.choices])

    def _several(self, tokens: np.ndarray, options: GenerationOptions, stream: Stream) -> list[str]:
        """The best of one beam search, or independent draws."""
        if options.num_beams == 1:
            seeds = [None if options.seed is None else _seed_of_draw(options.seed, k) for k in range(options.num_return_sequences)]
            draws = [dataclasses.replace(options, seed=seed, num_return_sequences=1) for seed in seeds]
            return ["".join(self._generate(tokens, draw, stream.copy())) for draw in draws]
        source = self._read_to_continue(tokens, stream)
        found = found_by(self._search(stream, source, options, deadline=deadline_of(options)))[0]
        return ["".join(_before_stop([self.tokenizer.decode(one.ids)], options)) for one in found]

    def _generate(self, tokens: np.ndarray, options: GenerationOptions, stream: Stream) -> Iterator[str]:
        """Pieces of text; `stream` is a copy of the memory as it was when they were asked for."""
        return _before_stop(self._pieces(tokens, options, stream), options)

    def _pieces(self, tokens: np.ndarray, options: GenerationOptions, stream: Stream) -> Iterator[str]:
        """The same, stop strings included."""
        length, has_encoder = self.segment_length, self.model.config.has_encoder
        decoder, deadline = self.tokenizer.decode_stream(), deadline_of(options)
        source = self._read_to_continue(tokens, stream)
        rolls = self.model.config.segment_length is not None  # trained to go on from segment to segment
        all_made: list[int] = []
        left, number = options.max_new_tokens, 0
        while left > 0:
            limit = min(left, length) if rolls else left
            least = min(limit, max(0, options.min_new_tokens - len(all_made)))
            seed = None if options.seed is None else options.seed * 1_000_003 + number
            part = dataclasses.replace(options, seed=seed, max_new_tokens=limit, min_new_tokens=least)
            steps = self._search(stream, source, part, before=all_made, deadline=deadline, goes_on=limit < left)
            best = yield from _decoded(steps, decoder)
            made = best.ids
            all_made, left, number = all_made + made, left - len(made), number + 1
            if best.ended or left == 0:
                break
            if has_encoder:
                stream.finish()
                source = np.array(made)
            else:
                written = np.concatenate([source, made])
                stream.read(written[None], np.array([len(written)]))
                source = np.zeros(0, np.int64)
        if piece := decoder.finish():
            yield piece

    def _read_to_continue(self, tokens: np.ndarray, stream: Stream) -> np.ndarray:
        """Reads all but the segment that is continued, which it returns."""
        *whole, source = self._to_continue(tokens)
        for segment in whole:
            stream.read(segment[None], np.array([len(segment)]))
        return source

    def _to_continue(self, tokens: np.ndarray) -> list[np.ndarray]:
        """Whole segments from the end backwards: the last one, which is continued, is full if there is enough text."""
        if not len(tokens):  # an encoder needs something to read; a decoder begins with bos anyway
            return [np.array([self.model.config.bos_id] if self.model.config.has_encoder else [], np.int64)]
        head = (len(tokens) - 1) % self.segment_length + 1
        return [tokens[:head], *tokens[head:].reshape(-1, self.segment_length)]

    def _search(
        self,
        stream: Stream,
        source: np.ndarray,
        options: GenerationOptions,
        *,
        before: Sequence[int] = (),
        deadline: float | None = None,
        goes_on: bool = False,
    ) -> Search:
        """Opens a segment that begins with `source`, for what follows. before: what was generated in earlier segments."""
        has_encoder, n_ids = self.model.config.has_encoder, self.tokenizer.vocab_size
        stream.open(source[None] if has_encoder else None, np.array([len(source)]))
        # The first inputs of a decoder are bos, or what came before, and then its own text.
        prompt = stream.shifted(np.append([] if has_encoder else source, 0).astype(np.int64)[None])
        stops = [StopStrings(self.tokenizer, options.stop_strings, prompt.shape[1], before)] if options.stop_strings else []
        rules = Rules.of(
            options,
            self.model.config,
            prompt.shape[1],
            n_ids=n_ids,
            sources=(lambda row: source) if has_encoder else None,
            stops=stops,
            deadline=deadline,
            goes_on=goes_on,
        )
        return search(Session(stream, n_ids=n_ids), prompt, rules)


def _decoded(steps: Search, decoder: StreamDecoder) -> Generator[str, None, Hypothesis]:
    """The text of the first result of the first sequence, as it is settled; returns that result."""
    while True:
        try:
            settled = next(steps)
        except StopIteration as end:
            return end.value[0][0]
        for token in settled[0]:
            if piece := decoder.push(token):
                yield piece


def _before_stop(pieces: Iterable[str], options: GenerationOptions) -> Iterator[str]:
    """Pieces of text up to a stop string, if the options leave it out."""
    if options.include_stop_strings or options.stop_strings is None:
        yield from pieces
        return
    text = BeforeStop(options.stop_strings)
    for piece in pieces:
        if known := text.push(piece):
            yield known
    if rest := text.finish():
        yield rest


def _seed_of_draw(seed: int, number: int) -> int:
    return seed if number == 0 else int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
