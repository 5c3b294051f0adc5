"""Pipeline: text in, segments, memory, text out."""

from __future__ import annotations

import itertools
import math
import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .autodiff import value_of
from .checkpoint.models import check_place, save_model
from .chunks import Chunk, ending_full, streamed
from .config import LIMITS
from .errors import InvalidType, InvalidValue, shown
from .generate import GenerationOptions
from .generate.limits import segment_limit
from .generate.results import Hypothesis
from .generate.rules import deadline_of
from .generate.segments import check_length, goes_on, in_segments
from .generate.session import packed_weights
from .generate.steps import AT_ONCE, Search, Settled, Steps, alone, check_batch_tokens, found_by, in_lots, together
from .generate.stops import BeforeStop
from .memory.base import Memory
from .memory.registry import memory as make_memory
from .memory.text import command_that_trains
from .model import PACKED
from .options import LARGEST, takes
from .packing import encoder_weights
from .pooling import Pooling, normalized
from .prompt_cache import PromptCache
from .stream import Stream
from .text.languages import in_languages
from .text.tokenizers import StreamDecoder, Tokenizer
from .transformer import Transformer, load_checkpoint
from .weights import Weights

DEFAULT_SEGMENT_TOKENS = 256
TEXTS_AT_ONCE = 1024  # texts that `embed` sorts by length
EMBED_TOKENS = 4096  # that it reads at once
EMBED_LEAST, EMBED_PADDED = 384, 1.03  # fewer tokens are read with any padding, more with at most so many times as many
SEGMENTS_A_FLUSH = 16  # how often reading makes a long-term memory durable
FLUSH_BYTES = 128 << 20  # of new state; it does so sooner where there is more: a flush takes as much RAM again


@dataclass(frozen=True)
class Recalled:
    """A passage that a prompt recalls: its text, and where that stands.

    position: of its first token, counted from the beginning of what was read. document: where it is kept outside the process, or None.
    n_tokens, rows: how long it is, and how many rows of memory that makes, over all layers.
    """

    text: str
    position: int
    document: str | None
    n_tokens: int
    rows: int


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
        overlap: float = 0.0,
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
        self.overlap = self._checked_overlap(overlap)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        memory: Memory | str | None = "saved",
        dtype: str | None = None,
        segment_length: int | None = None,
        lora: str | Path | None = None,
        overlap: float = 0.0,
    ) -> Pipeline:
        """The pipeline of a model: a folder, ours, Hugging Face's or Marian's, a GGUF file, a name on the Hub (`org/name`), or of a model
        that a package carries: "smollm2", "minilm", "en-pt", "pt-en" (see docs/published-models.md).

        memory: text or a Memory, None for none, "saved" for what it was trained with. lora: a folder of LoRA adapters as PEFT has them,
        merged into the weights. dtype: "float32"; "bfloat16" or "int8" take less RAM and time, and round: see `Transformer.pack`;
        None: what the folder has.
        Warns where the model lacks the memory's parameters, which are random then.
        """
        later = dtype if lora is not None and dtype in PACKED else None  # adapters are added to what is not rounded yet
        saved = load_checkpoint(folder, dtype if later is None else None)
        if saved.tokenizer is None:
            raise InvalidValue(f"folder: {folder} has no tokenizer (tokenizer.json); use mt.load(folder) for the model alone")
        if lora is not None:
            saved.model.load_lora(lora)
            saved.model.merge_lora()
        if later is not None:
            saved.model.pack(later)
        known = set(saved.model.weights)
        pipe = cls(saved.model, saved.tokenizer, saved.memory() if memory == "saved" else memory, segment_length, saved.pooling, overlap)
        if pipe.memory is not None and (new := sorted(set(pipe.model.weights) - known)):
            text = pipe.memory.text or pipe.memory.name
            warnings.warn(
                f"memory: {folder} was not trained with {text}, and its parameters ({new[0]}) are random here; mini-tfm"
                f" {shlex.join(command_that_trains(text, pipe.model.config.has_encoder))} trains one",
                stacklevel=2,
            )
        return pipe

    def save(self, folder: str | Path) -> None:
        """Writes model, tokenizer, the text of the memory and the pooling into `folder`, all or nothing: `load` gives them back.

        A model that was saved there before is replaced when all is written. Raises FileProblem for a folder of something else.
        Trained parameters of the memory are among the model's weights; what it has read is not saved (a store with a `path` keeps
        that). Raises InvalidValue for a memory that was not made from text.
        """
        if self.memory is not None and self.memory.text is None:
            raise InvalidValue(
                f"memory: {type(self.memory).__name__} was not made by its name, so no file can name it; register it"
                " (mt.register_memory) and make it with mt.memory"
            )
        text = None if self.memory is None else self.memory.text
        check_place(folder)
        save_model(folder, self.model, tokenizer=self.tokenizer, memory_text=text, pooling=self.pooling)

    def reset(self) -> None:
        """Forgets what was read in this process; documents on disk stay (`memory.reset(name)` deletes one)."""
        self._stream = Stream(self.model, self.memory, 1)

    def close(self) -> None:
        """Ends the stream: what working memory holds goes to the long-term memory behind it, durable with a path."""
        self._stream.run.drain()
        self._stream.run.flush()
        self.reset()

    def read(
        self,
        text: str | Iterable[str],
        *,
        skip: int = 0,
        durable: Callable[[int], None] = lambda tokens: None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Streams text (or pieces of it, in which a piece may end anywhere) into the memory; returns tokens read.

        RAM stays bounded whatever the length. The end of a call ends a segment. With a long-term memory on disk,
        what was read is durable when this returns. durable: called now and then with the tokens of the text that are. skip: so many
        were read before, as `durable` was told: reading goes on behind them. progress: called after each segment with its bytes of
        text, as its tokens are decoded.
        """
        if self.memory is None:
            raise InvalidValue("memory: this pipeline has none to read into; give one, as in Pipeline.load(folder, memory='window')")
        if not self.model.config.has_decoder:
            raise InvalidValue(
                "read: this model has no decoder (n_decoder_layers is 0), and embed takes each text alone: nothing would look at it"
            )
        if not isinstance(skip, int | np.integer) or isinstance(skip, bool) or not 0 <= skip <= LARGEST:
            raise InvalidValue(f"skip: expected a number of tokens of at least 0, got {shown(skip)}")
        count, kept = 0, self.state_bytes()
        for number, chunk in enumerate(self._chunks(text, shared=self._shared, progress=progress)):
            count += chunk.n_kept
            if count <= skip:
                self._stream.last = chunk.tokens[-1:].astype(np.int64)
                continue
            segment = self._stream.begin(chunk.tokens[None])
            self._stream.read(segment, np.array([segment.shape[1]]), chunk.kept[None] if self._shared else None)
            if number % SEGMENTS_A_FLUSH == SEGMENTS_A_FLUSH - 1 or self.state_bytes() > kept + FLUSH_BYTES:
                self._stream.run.flush()
                kept = self.state_bytes()
                durable(count)
        self._stream.run.flush()
        durable(count)
        return count - min(skip, count)

    @takes(GenerationOptions)
    def generate(
        self, text: str, *, stream: bool = False, prompt_cache: str | Path | None = None, **options: Any
    ) -> str | list[str] | Iterator[str]:
        """Goes on from `text`, with what the memory holds; the memory stays as it was.

        Text longer than a segment is read first, into a copy of the memory. What goes beyond a segment is read back
        the same way: a model that was trained on segments never writes at a position that it was not trained at.
        Options: see `mini_tfm.generate.GenerationOptions`. stream: an iterator of pieces of text
        instead, as they come; of beams, as soon as all of them agree. With num_return_sequences above 1: a list of texts.
        prompt_cache: a folder that keeps what a decoder-only model without a memory has read of prompts, so that what another one began
        with is not read again, by this process or another. The answers are the same. A file is as large as its keys and values.
        """
        return self._generate(self._encode(text), stream, options, prompt_cache)

    @takes(GenerationOptions)
    def chat(
        self, messages: Sequence[Mapping[str, str]], *, stream: bool = False, prompt_cache: str | Path | None = None, **options: Any
    ) -> str | list[str] | Iterator[str]:
        """What the assistant says next, with what the memory holds; the memory stays as it was.

        messages: mappings with "role" ("system", "user", "assistant") and "content", oldest first, laid out by the chat template that
        the tokenizer carries. Options, `stream` and `prompt_cache`: as in `generate`, but for max_new_tokens, which is 512 by default.
        """
        return self._generate(self.tokenizer.encode_chat(messages), stream, {"max_new_tokens": 512, **options}, prompt_cache)

    def recall(self, prompt: str | Sequence[Mapping[str, str]]) -> list[Recalled]:
        """What of the text that was read `generate` (for a str) or `chat` (for messages) would look up, in the order of the text.

        Only memories that look up passages have any, such as `blocks`. Of a prompt longer than a segment it is the last segment that asks.
        """
        tokens = self._encode(prompt) if isinstance(prompt, str) else self.tokenizer.encode_chat(prompt)
        stream = self._stream.copy()
        stream.last, tokens = self._begun(tokens)
        last = self._to_continue(tokens)[-1].tokens
        asked = stream.shifted(np.pad(last[None], [(0, 0), (0, 1)]))
        return [
            Recalled(self.tokenizer.decode(one.tokens), one.position, one.document, len(one.tokens), len(one.tokens) * one.layers)
            for one in stream.run.recall(asked)[0]
        ]

    @takes(GenerationOptions)
    def generate_many(
        self, texts: Iterable[str], *, batch_tokens: int = 4096, numbers: Sequence[int] | None = None, **options: Any
    ) -> list[Any]:
        """Goes on from each of `texts` by itself, several at once: what `generate` gives for each, in their order.

        Each is what it would be alone; draws differ by the text's number, which is its place, or that of `numbers`. batch_tokens:
        the most that are computed at once, where a text counts with its own tokens, and those that it may get, for each beam
        or draw.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise InvalidType(f"texts: expected an iterable of str, got {type(texts).__name__}; `generate` takes one text")
        check_batch_tokens(batch_tokens)
        chosen = self._options(options, False)
        self.model.needs("decoder")
        spoken = [self._in_languages(self._encode(text), chosen) for text in texts]
        chosen = spoken[0][1] if spoken else chosen
        begun_texts = [self._begun(tokens) for tokens, _ in spoken]
        parts = [self._to_continue(tokens) for _, tokens in begun_texts]
        results: list[Any] = [None] * len(parts)
        own = np.arange(len(parts)) if numbers is None else np.asarray(numbers)
        if own.shape != (len(parts),) or own.dtype.kind not in "iu" or (len(own) and own.min() < 0):
            raise InvalidValue(f"numbers: expected {len(parts)} integers of at least 0, got {own.dtype} of shape {own.shape}")
        copies = max(chosen.num_beams, chosen.num_return_sequences)
        weights = packed_weights(self.model, self.tokenizer.vocab_size) if len(parts) > 1 else None  # those that join have the same

        def begun(rows: list[int]) -> Steps:
            last = np.concatenate([begun_texts[row][0] for row in rows])
            found = yield from self._search([parts[row] for row in rows], chosen, self._stream.copy(), own[rows], last, weights=weights)
            for row, ones in zip(rows, found, strict=True):
                made = self._texts(ones, chosen)
                results[row] = made if chosen.num_return_sequences > 1 else made[0]
            return found

        tokens = [len(part[-1].tokens) + chosen.max_new_tokens for part in parts]
        kinds = [(n,) for n in range(len(parts))] if chosen.guesses_by else [self._kind(part) for part in parts]
        lots = in_lots(kinds, tokens, copies, batch_tokens)
        for _ in together((Search(begun(lot), len(lot) * copies, tokens[lot[0]]) for lot in lots), batch_tokens, AT_ONCE):
            pass
        return results

    def score(self, text: str | Iterable[str], *, progress: Callable[[int], None] | None = None) -> dict[str, float]:
        """How well the model predicts `text`, read from its beginning with what the memory holds.

        Returns tokens, bytes, bits, bits_per_token, bits_per_byte; the memory stays as it was. progress: as of `read`.
        """
        self.model.needs("decoder")
        stream, tokens, bits = self._stream.copy(), 0, 0.0
        stream.begin_text()
        before = np.array([self.model.config.bos_id])
        for chunk in self._chunks(text, count_bytes := [0], progress=progress):
            segment = stream.begin(chunk.tokens[None])[0]
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
        if self.model.config.has_encoder:  # many texts through one encoder, whose weights are worth packing
            stream = Stream(self.model, None, len(tokens), weights=encoder_weights(self.model))
            stream.open(tokens, lengths)
            assert stream.encoded is not None
            return value_of(stream.encoded.hidden)
        stream = Stream(self.model, None, len(tokens))
        after = np.pad(stream.begin(tokens), [(0, 0), (0, 1)])  # a decoder is fed what comes before its target
        stream.open(None, lengths)
        return value_of(stream.decode(after, lengths))

    @property
    def _shared(self) -> int:
        """Tokens that a segment has in common with the next."""
        return int(self.overlap * self.segment_length)

    def _checked_overlap(self, overlap: float) -> float:
        """Raises InvalidValue for what is no share, and where nothing would make use of it."""
        if not isinstance(overlap, int | float | np.number) or isinstance(overlap, bool) or not 0 <= overlap < 1:
            raise InvalidValue(f"overlap: expected a share of a segment from 0 to below 1, got {shown(overlap)}")
        uses = self._stream.run.uses
        if overlap and (not uses("cross") or uses("encoder") or uses("decoder")):
            raise InvalidValue(
                f"overlap: expected 0 unless an encoder-decoder has a memory of the encoder's outputs alone, got {overlap}; give one, as"
                " memory='store:site=cross,merge=replace', or leave overlap out"
            )
        return float(overlap)

    def _chunks(
        self,
        text: str | Iterable[str],
        count_bytes: list[int] | None = None,
        shared: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Chunk]:
        """Token ids of `text`, segment_length at a time; the last may be shorter. The same however it is cut in pieces.

        progress: told the bytes of each chunk when the next one is asked for, that is, after it was processed.
        """
        texts = [text] if isinstance(text, str) else text
        if count_bytes is not None and isinstance(texts, Iterable):
            texts = _counted(texts, count_bytes)
        for chunk in streamed(self.tokenizer.encode_pieces(texts), self.segment_length, shared):
            yield chunk
            if progress is not None:
                progress(len(self.tokenizer.decode(chunk.tokens[chunk.first : chunk.stop]).encode("utf-8", "surrogatepass")))

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

    def _generate(
        self, tokens: np.ndarray, stream: bool, given: Mapping[str, Any], prompt_cache: str | Path | None
    ) -> str | list[str] | Iterator[str]:
        chosen = self._options(given, stream)
        self.model.needs("decoder")
        prompts = None if prompt_cache is None else PromptCache(prompt_cache, self._stream)
        tokens, chosen = self._in_languages(tokens, chosen)
        last, tokens = self._begun(tokens)
        steps = self._search([self._to_continue(tokens)], chosen, self._stream.copy(), np.zeros(1, np.int64), last, prompts)
        if stream:
            return _before_stop(_decoded(alone(steps), self.tokenizer.decode_stream()), chosen)
        texts = self._texts(found_by(steps)[0], chosen)
        return texts if chosen.num_return_sequences > 1 else texts[0]

    def _in_languages(self, tokens: np.ndarray, options: GenerationOptions) -> tuple[np.ndarray, GenerationOptions]:
        """A text's tokens with the languages of the options in them, and the options without languages."""
        if options.src_lang is None and options.tgt_lang is None:
            return tokens, options
        tokens, first = in_languages(tokens, self.tokenizer.special_tokens, options.src_lang, options.tgt_lang)
        forced = {} if first is None else {"forced_bos_token_id": first}
        return tokens, options.replace(src_lang=None, tgt_lang=None, **forced)

    def _begun(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the stream ended with (1,), and what is to be read of a text: see `Stream.begin`."""
        stream = self._stream.copy()
        tokens = stream.begin(tokens[None])[0]
        if self.model.config.framed_by_tokenizer:
            check_length(stream, len(tokens), segment_limit(self.model.config, self.segment_length))
        return stream.last, tokens

    def _options(self, given: Mapping[str, Any], stream: bool) -> GenerationOptions:
        """The options with choices as token ids. Raises InvalidValue for those that have no meaning for text."""
        options = GenerationOptions.over(self.model.generation, given)
        if options.max_length is not None or options.min_length:
            raise InvalidValue(
                "generate: max_length, min_length: they count the prompt, which a pipeline may read into the memory; give max_new_tokens"
                " and min_new_tokens"
            )
        if options.output_scores:
            raise InvalidValue("generate: output_scores: a pipeline gives text alone; use model.generate for scores")
        if stream and options.num_return_sequences > 1:
            raise InvalidValue(f"generate: num_return_sequences: expected 1 with stream=True, got {options.num_return_sequences}")
        if options.choices is None:
            return options
        return options.replace(choices=[self.tokenizer.encode(each) if isinstance(each, str) else each for each in options.choices])

    def _kind(self, part: list[Chunk]) -> tuple[int, ...]:
        """Texts of one kind may begin together: of as many segments, and all but single ones of an encoder of the same length."""
        return (1,) if self.model.config.has_encoder and len(part) == 1 else (len(part), len(part[0].tokens), len(part[-1].tokens))

    def _search(
        self,
        parts: list[list[Chunk]],
        options: GenerationOptions,
        stream: Stream,
        numbers: np.ndarray,
        last: np.ndarray,
        prompts: PromptCache | None = None,
        weights: Weights | None = None,
    ) -> Steps:
        """Reads all but the last segment of each text, and goes on from that.

        stream: of one row, that each begins with. last (B,): the token that each follows, see `_begun`. weights: a session's.
        """
        deadline = deadline_of(options)
        stream.reorder(np.zeros(len(parts), np.int64))
        stream.last = last
        for chunks in zip(*(part[:-1] for part in parts), strict=True):
            kept = np.stack([chunk.kept for chunk in chunks]) if self._shared else None
            stream.read(np.stack([chunk.tokens for chunk in chunks]), np.full(len(parts), len(chunks[0].tokens)), kept)
        lengths = np.array([len(part[-1].tokens) for part in parts])
        source = np.full((len(parts), lengths.max()), self.model.config.pad_id)
        kept = np.zeros(source.shape, bool)
        for n, part in enumerate(parts):
            source[n, : lengths[n]], kept[n, : lengths[n]] = part[-1].tokens, part[-1].kept
        limit = segment_limit(self.model.config, self.segment_length)
        return (
            yield from in_segments(
                stream,
                source,
                lengths,
                options,
                limit,
                rows=numbers,
                tokenizer=self.tokenizer,
                deadline=deadline,
                kept=kept if self._shared else None,
                prompts=prompts,
                weights=weights,
            )
        )

    def _texts(self, found: list[Hypothesis], options: GenerationOptions) -> list[str]:
        return ["".join(_before_stop([self.tokenizer.decode(one.ids)], options)) for one in found]

    def _to_continue(self, tokens: np.ndarray) -> list[Chunk]:
        """Whole segments, and what is continued: a segment that the encoder reads, or the beginning of the decoder's own."""
        config, length = self.model.config, self.segment_length
        nothing = np.array([config.bos_id] if config.has_encoder else [], np.int64)  # a decoder begins with bos anyway
        if not len(tokens):
            return [_whole(nothing)]
        if config.segment_length is not None and not config.has_encoder:  # as `read` and `score` cut it
            whole = len(tokens) // length * length
            return [_whole(each) for each in (*tokens[:whole].reshape(-1, length), tokens[whole:])]
        chunks = ending_full(tokens, length, self._shared)
        # Where a memory stands in place of the last segment, that is read into it like all others.
        return [*chunks, _whole(nothing)] if self._stream.run.replaces("cross") else chunks


def _whole(tokens: np.ndarray) -> Chunk:
    return Chunk(tokens, 0, len(tokens))


def _windows(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts, TEXTS_AT_ONCE at a time."""
    texts = iter(texts)
    while some := list(itertools.islice(texts, TEXTS_AT_ONCE)):
        yield some


def _batches(lengths: list[int]) -> Iterator[np.ndarray]:
    """Rows to read at once, of about one length, the longest last; those without a token are left out.

    A shorter row is taken in while there is room and padding stays a small part, or there would be too few tokens.
    """
    order = np.argsort(lengths, kind="stable")
    order = order[np.searchsorted(np.sort(lengths), 1) :]
    while len(order):
        longest, n, tokens = lengths[order[-1]], 0, 0
        for row in order[::-1]:
            tokens += lengths[row]
            padded = (n + 1) * longest
            if n and (padded > EMBED_TOKENS or (padded > EMBED_LEAST and padded > EMBED_PADDED * tokens)):
                break
            n += 1
        yield order[-n:]
        order = order[:-n]


def _counted(texts: Iterable[str], count_bytes: list[int]) -> Iterator[str]:
    """The texts; their bytes are added up in count_bytes[0]."""
    for text in texts:
        if isinstance(text, str):
            count_bytes[0] += len(text.encode("utf-8", "surrogatepass"))
        yield text


def _decoded(settled: Iterator[Settled], decoder: StreamDecoder) -> Iterator[str]:
    """The text of the first result of the first sequence, as it is settled."""
    for each in settled:
        for token in each[0]:
            if piece := decoder.push(token):
                yield piece
    if piece := decoder.finish():
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
