"""A strategy on trial: tiny models with it, and a reader that takes a batch of streams through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .. import ops
from ..autodiff import Var, value_of
from ..config import Config
from ..errors import MiniTfmError
from ..generate import Session
from ..memory.base import Memory
from ..memory.run import MemoryRun, has_losses, members_of
from ..memory.short import RetrievalMemory, RowMemory
from ..memory.stack import Stack
from ..stream import Stream
from ..transformer import Transformer

VOCAB = 24
LENGTH = 5  # tokens a segment
TOLERANCE = 1e-8  # in float64, where the checks run: differences of rounding are a million times smaller

# Between them they have all sites, both ways of reading, and positions that are added and that are distances.
KINDS: dict[str, dict[str, Any]] = {
    "encoder-decoder": {"n_encoder_layers": 2, "n_decoder_layers": 2, "positions": "relative", "norm": "rms", "bias": False},
    "decoder-only": {"n_encoder_layers": 0, "n_decoder_layers": 2, "positions": "rotary"},
    "encoder-only": {"n_encoder_layers": 2, "n_decoder_layers": 0, "positions": "sinusoidal"},
}
SITES_OF = {"encoder-decoder": {"encoder", "decoder", "cross"}, "decoder-only": {"decoder"}, "encoder-only": {"encoder"}}


def kinds_for(memory: Memory) -> list[str]:
    """The models a strategy can be tried on; the encoder alone only where there is nothing else."""
    sites = {site for member in members_of(memory) for site in member.spec.sites}
    kinds = [kind for kind, has in SITES_OF.items() if sites & has]
    return [kind for kind in kinds if kind != "encoder-only"] or kinds


class CheckFailed(MiniTfmError, AssertionError):
    """A strategy breaks the contract; the message lists every check that failed, however many."""

    __str__ = AssertionError.__str__


def same(what: str, actual: np.ndarray, expected: np.ndarray) -> None:
    """Fails unless the arrays are equal but for rounding."""
    if actual.shape != expected.shape:
        raise CheckFailed(f"{what}: expected shape {expected.shape}, got {actual.shape}")
    difference = float(np.max(np.abs(actual - expected), initial=0))
    if not difference <= TOLERANCE:
        raise CheckFailed(f"{what}: expected the same numbers, got a difference of {difference:.3g}")


def small_model(kind: str, dtype: Any = np.float64, **fields: Any) -> Transformer:
    sizes = {"vocab_size": VOCAB, "d_model": 8, "n_heads": 2, "d_ff": 16, "activation": "gelu", "segment_length": LENGTH}
    config = Config(**{**sizes, "relative_buckets": 8, "relative_max_distance": 16, **KINDS[kind], **fields})
    return Transformer(config, seed=1, dtype=dtype)


def random_segments(batch: int, count: int, seed: int = 0, length: int = LENGTH) -> np.ndarray:
    """(count, B, length) token ids."""
    return np.random.default_rng(seed).integers(3, VOCAB, (count, batch, length))


class Trial:
    """A strategy and one kind of model. make: gives the strategy, or what the kit makes of it; fields: other ones of the Config."""

    def __init__(self, make: Callable[[], Memory], kind: str, dtype: Any = np.float64, **fields: Any):
        self.make, self.kind, self.dtype, self.fields = make, kind, dtype, fields
        self.model = small_model(kind, dtype, **fields)
        self.model.add_memory_weights(make(), seed=1)

    @property
    def length(self) -> int:
        """Tokens a segment."""
        assert self.model.config.segment_length is not None
        return self.model.config.segment_length

    def like(self, *, make: Callable[[], Memory] | None = None, dtype: Any = None, **fields: Any) -> Trial:
        """The same but for what is given."""
        return Trial(make or self.make, self.kind, dtype or self.dtype, **{**self.fields, **fields})

    def segments(self, batch: int, count: int) -> np.ndarray:
        """(count, B, length) token ids."""
        return random_segments(batch, count, length=self.length)

    def reader(
        self, batch: int, w: Mapping[str, Any] | None = None, memory: Memory | None = None, without: bool = False, training: bool = False
    ) -> Reader:
        """A reader of `batch` streams with the strategy, or with `memory` in its place, or `without` any."""
        chosen = None if without else memory if memory is not None else self.make()
        return Reader(self.model, chosen, batch, w, training)

    def loss(self, segments: np.ndarray, w: Mapping[str, Any], state: Mapping | None = None, detach_at: int | None = None) -> Any:
        """Sum over segments of the mean negative log-likelihood and of what the strategy adds to it.

        From a dumped `state`; gradients are cut before segment `detach_at`.
        """
        reader = self.reader(segments.shape[1], w, training=has_losses(self.make()))
        if state is not None:
            reader.run.load(state)
        total: Any = 0.0
        for t, tokens in enumerate(segments):
            if t == detach_at:
                reader.run.detach()
            hidden = reader.hidden(tokens)
            flat = np.reshape(hidden, (-1, self.model.config.d_model))
            logits = reader.stream.logits(flat)
            total = total + ops.cross_entropy(logits, np.roll(tokens, 1, axis=1).ravel())
            total = total if reader.added is None else total + reader.added
        return total


class Reader:
    """Reads a batch of streams, segment by segment."""

    def __init__(self, model: Transformer, memory: Memory | None, batch: int, w: Mapping[str, Any] | None = None, training: bool = False):
        self.model, self.stream = model, Stream(model, memory, batch, weights=w, training=training)
        self.added: Any = None  # to the loss of the last segment, by the memory

    @property
    def run(self) -> MemoryRun:
        return self.stream.run

    def copy(self) -> Reader:
        twin = object.__new__(Reader)
        twin.model, twin.stream, twin.added = self.model, self.stream.copy(), None
        return twin

    def read(self, tokens: np.ndarray, lengths: Any = None, source: np.ndarray | None = None) -> np.ndarray:
        """One segment (B, L); its log-probabilities (B, L, V), or an encoder's outputs, 0 where there is no token.

        source: (B, L) what an encoder reads, if not the same tokens.
        """
        lengths = self._lengths(tokens, lengths)
        scores = self._segment(tokens, lengths, self.stream.log_probs if self.model.config.has_decoder else value_of, source)
        return np.where((np.arange(tokens.shape[1]) < lengths[:, None])[..., None], scores, 0)

    def hidden(self, tokens: np.ndarray, lengths: Any = None) -> Any:
        """The stack's outputs (B, L, d) of one segment, which is then over."""
        return self._segment(tokens, self._lengths(tokens, lengths), lambda hidden: hidden)

    def _segment(self, tokens: np.ndarray, lengths: np.ndarray, result: Callable[[Any], Any], source: np.ndarray | None = None) -> Any:
        """What `result` makes of the stack's outputs, before the segment is closed."""
        self._open(tokens, lengths, source)
        out = self.stream.encoded.text if self.stream.encoded is not None else None
        if self.model.config.has_decoder:
            out = self.stream.decode(tokens, lengths)
        out = result(out)
        self.added = self.stream.finish()
        return out

    def token_by_token(self, tokens: np.ndarray) -> np.ndarray:
        """The same as `read`, the way generation does it: one decoder token at a time, with a cache."""
        self._open(tokens, self._lengths(tokens, None))
        session, inputs = Session(self.stream), self.stream.shifted(tokens)
        steps = [session.step(inputs[:, t : t + 1])[:, None] for t in range(tokens.shape[1])]
        return np.concatenate([self.stream.log_probs(hidden) for hidden in steps], axis=1)

    def _open(self, tokens: np.ndarray, lengths: np.ndarray, source: np.ndarray | None = None) -> None:
        source = tokens if source is None else source
        self.stream.open(source if self.model.config.has_encoder else None, lengths, tokens)

    @staticmethod
    def _lengths(tokens: np.ndarray, lengths: Any) -> np.ndarray:
        return np.full(len(tokens), tokens.shape[1], np.int64) if lengths is None else np.asarray(lengths, np.int64)


def leaves(model: Transformer) -> dict[str, Var]:
    """The weights as Vars."""
    return {name: Var(weight) for name, weight in model.weights.items()}


class Newest(RowMemory):
    """A working memory of one segment, for a stack with the strategy behind it."""

    def __init__(self, site: str):
        super().__init__(size=LENGTH, site=site, gradient="rows")
        self.name = "newest"

    def keep(self, scores: np.ndarray | None, positions: np.ndarray) -> np.ndarray:
        return positions


class Found(RetrievalMemory):
    """A long-term memory, for a stack with the strategy before it."""

    def __init__(self, site: str):
        super().__init__(top_k=2, site=site)
        self.name = "found"


class Tap(Memory):
    """Notes every row that passes. `passes` on: rows go on to the next memory; off: they end here."""

    def __init__(self, passes: bool):
        self.name, self.passes = "tap", passes
        self.seen: list[tuple[str, int, np.ndarray, np.ndarray, np.ndarray]] = []

    def write(self, state: Any, site: str, layer: int, new: Any) -> Any:
        self.seen.append((site, layer, np.array(new.hidden), new.valid.copy(), new.positions.copy()))
        return dataclasses.replace(new, mass=new.mass) if self.passes else None

    def rows(self, batch_row: int) -> list[tuple[str, int, int, bytes]]:
        """(site, layer, position, values) of every valid row of a batch row, in order."""
        return [
            (site, layer, int(positions[batch_row, j]), hidden[batch_row, j].tobytes())
            for site, layer, hidden, valid, positions in self.seen
            for j in np.flatnonzero(valid[batch_row])
        ]


def between_taps(memory: Memory) -> tuple[Tap, Stack, Tap]:
    """`memory` with a tap before it and one behind."""
    before, behind = Tap(passes=True), Tap(passes=False)
    return before, Stack([before, memory, behind]), behind
