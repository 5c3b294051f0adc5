"""A stream: long text read segment after segment, with a memory that goes on. The only module that knows the order.

    open     a segment of so many tokens begins; streams without any in it pause
    encode   the encoder reads the segment, with the memory
    decode   the decoder predicts the target, with the encoder's outputs and the memory
    finish   the memory takes what the segment computed; `last` is what a decoder-only model goes on from

Training, scoring, reading, generating and the conformance kit all go through it. A decoder is fed its target shifted right by
one: it begins with `bos`, or with the token that the target follows: in a decoder-only model the last one of the segment before, in
an encoder-decoder that continues its source (`Config.continues_source`) the last one of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from . import _core
from .attention import Encoded
from .autodiff import value_of
from .context import NO_DROPOUT, Dropout, Pass
from .fingerprint import Fingerprint
from .memory.base import Memory
from .memory.run import MemoryRun, Project
from .model import Model
from .packing import weights_to_encode
from .weights import Array, Weights


class Stream:
    """A batch of streams of a model, with `memory` at work on them.

    weights: arrays or Vars by name, or a Weights of them, if not the model's own. training: what a memory is told (see `memory.Dims`).
    run: the memory's states. last: (B,) the token that each stream ended with so far, bos where none was read.
    """

    def __init__(
        self, model: Model, memory: Memory | None, batch: int, *, weights: Mapping[str, Any] | None = None, training: bool = False
    ):
        given = model.weights if weights is None else weights
        self.model, self.weights = model, given if isinstance(given, Weights) else Weights(given)
        self._packs = weights is None and not training  # else the weights are about to change
        self.run = MemoryRun(
            memory,
            model.config,
            self.weights.kept,
            batch,
            training=training,
            fingerprint=model.fingerprint,
            projections=partial(_projection, model, self.weights),
            surprises=partial(_surprise, model, self.weights),
            made_of=None if training else Fingerprint(model.config, self.weights.kept),
        )
        self.last = np.full(batch, self._nothing, np.int64)
        self.encoded: Encoded | None = None
        self._pass = Pass(self.weights, self.run)
        self._target: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def _nothing(self) -> int:
        """`last` where nothing was read: bos, or -1 where the tokenizer would have put it into the text."""
        return -1 if self.model.config.framed_by_tokenizer else self.model.config.bos_id

    def begin(self, tokens: np.ndarray) -> np.ndarray:
        """What is to be read of (B, T) tokens that come next.

        All of them; but where no bos precedes a text, its first token is what all others follow from, and predicted by nobody.
        """
        if self.model.encoder is not None or not tokens.shape[1] or not (self.last < 0).all():
            return tokens
        self.last = tokens[:, 0].astype(np.int64)
        return tokens[:, 1:]

    # One segment

    def open(
        self,
        source: np.ndarray | None,
        lengths: np.ndarray,
        target: np.ndarray | None = None,
        dropout: Dropout = NO_DROPOUT,
        kept: np.ndarray | None = None,
    ) -> None:
        """Begins a segment, and has the encoder read it.

        source: (B, S) tokens, the first `lengths` (B,) of each row; None for a decoder-only model, where `lengths` counts
        the target's. target: (B, T) what the decoder is to predict, where it is known. kept: (B, S) bool, one run of each row, or
        None for all: the outputs that are attended to, remembered and counted. The other tokens are context for the encoder alone:
        they belong to the segment before or to the next one, which overlap with this.
        """
        if self.run.forget_deleted():
            self.begin_text()
        self.run.check_weights()
        self._pass = Pass(self.weights, self.run, dropout)
        self._target = None
        if kept is not None and source is not None:
            kept = kept & (np.arange(source.shape[1]) < lengths[:, None])
        self.run.open(lengths if kept is None else kept.sum(axis=1), target)
        self.encoded = None
        if self.model.encoder is not None and source is not None:
            self.follow(source, lengths)
            weights = weights_to_encode(self.model, source.size) if self._packs else self.weights
            self.encoded = self.model.encoder(source, lengths, dataclasses.replace(self._pass, weights=weights))
            if kept is not None:
                rows = self.encoded.valid[:, : self.encoded.n_rows]
                self.encoded = dataclasses.replace(self.encoded, valid=np.concatenate([rows, kept], axis=1))

    def follow(self, source: np.ndarray, lengths: np.ndarray) -> None:
        """Has the decoder of a model that continues its source (B, S) begin with its last token; but a source of bos is nothing."""
        if self.model.config.continues_source:
            ends = _ends(source, lengths, self.last)
            self.last = np.where(ends == self.model.config.bos_id, self.last, ends)

    def decode(self, target: np.ndarray, lengths: np.ndarray, hide_source: np.ndarray | None = None) -> Array:
        """The decoder's outputs (B, T, d) as it predicts target (B, T), whole.

        hide_source: (B,) bool, where it does not see the encoder's outputs at the source, but the memory alone.
        """
        assert self.model.decoder is not None
        encoded = self.encoded
        if encoded is not None and hide_source is not None:
            valid = encoded.valid.copy()
            valid[hide_source, encoded.n_rows :] = False
            encoded = dataclasses.replace(encoded, valid=valid)
        hidden = self.model.decoder(self.shifted(target), lengths, encoded, self._pass)
        self._target = target, lengths
        return hidden

    def finish(self) -> Array | None:
        """Ends the segment: the memory takes the encoder's outputs at the cross site, and streams move on.

        In training: what the memories add to the loss, a sum over streams; None where they add nothing.
        """
        if self.encoded is not None and self.model.decoder is not None:
            self.run.wrote("cross", 0, self.encoded.text, self.encoded.valid[:, self.encoded.n_rows :])
        added = self.run.close()
        if self._target is not None:
            self.last = _ends(*self._target, self.last)
        self.encoded = self._target = None
        self._pass = Pass(self.weights, self.run)  # the old one may hold on to a tape
        return added

    def read(self, tokens: np.ndarray, lengths: np.ndarray, kept: np.ndarray | None = None) -> None:
        """A whole segment (B, S) into the memory. The decoder runs only where a memory lives in it. kept: as of `open`."""
        has_encoder, before = self.model.encoder is not None, self.last
        try:
            self.open(tokens if has_encoder else None, lengths, tokens, kept=kept)
            self.last, self._target = before, (tokens, lengths)  # the decoder goes through what the encoder reads, not on from it
            if self.model.decoder is not None and (not has_encoder or self.run.uses("decoder")):
                self.decode(tokens, lengths)
            self.finish()
        except BaseException:  # an interrupt, too: a segment is remembered whole or not at all
            self.run.abandon()
            self.encoded, self._target, self.last = None, None, before
            raise

    def shifted(self, target: np.ndarray) -> np.ndarray:
        """The decoder's inputs for target (B, T): what comes before it, then all but the last token."""
        bos = self.model.config.bos_id
        follows = self.model.encoder is None or self.model.config.continues_source
        before = np.where(self.last < 0, bos, self.last) if follows else np.full(len(target), bos)
        return np.concatenate([before[:, None], target[:, :-1]], axis=1)[:, : target.shape[1]].astype(np.int64)

    # From the decoder's outputs

    def logits(self, hidden: Array) -> Array:
        """(..., d) -> scores (..., V), as the output layer gives them."""
        return self.model.output(hidden, self.weights)

    def log_probs(self, hidden: Array) -> np.ndarray:
        """(B, T, d) -> log-probabilities (B, T, V), as the memory changes them."""
        hidden = value_of(hidden)
        return self.run.logits(hidden, _core.log_softmax(value_of(self.logits(hidden))))

    # Rows of the batch

    def begin_documents(self, rows: np.ndarray) -> None:
        """Other documents begin where (B,) bool `rows` is set: nothing of what was read is known there."""
        self.run.reset(rows)
        self.last = np.where(rows, self._nothing, self.last)

    def begin_text(self) -> None:
        """What is read next is another text, which begins with bos; the memory stays."""
        self.last = np.full(len(self.last), self._nothing, np.int64)

    def reorder(self, index: np.ndarray, *, same_sources: bool = False) -> None:
        """Row i becomes what row index[i] was, within a segment, too: rows can be dropped, repeated, sorted.

        same_sources: the encoder has read the same for row i and row index[i].
        """
        self.run.reorder(index)
        self.last = self.last[index]
        if self.encoded is not None and not same_sources:
            self.encoded = dataclasses.replace(self.encoded, hidden=self.encoded.hidden[index], valid=self.encoded.valid[index])
        if self._target is not None:
            self._target = self._target[0][index], self._target[1][index]

    def join(self, other: Stream) -> None:
        """Takes in the rows of `other`, a stream of the same model and memory, behind its own; within a segment, too."""
        self.run.join(other.run)
        self.last = np.concatenate([self.last, other.last])
        if self._target is not None and other._target is not None:
            self._target = np.concatenate([self._target[0], other._target[0]]), np.concatenate([self._target[1], other._target[1]])
        if self.encoded is not None and other.encoded is not None:
            most = max(self.encoded.valid.shape[1], other.encoded.valid.shape[1])
            pair = [(value_of(e.hidden), e.valid, most - e.valid.shape[1]) for e in (self.encoded, other.encoded)]
            hidden = np.concatenate([np.pad(h, [(0, 0), (0, more), (0, 0)]) for h, _, more in pair])
            valid = np.concatenate([np.pad(v, [(0, 0), (0, more)]) for _, v, more in pair])
            self.encoded = dataclasses.replace(self.encoded, hidden=hidden, valid=valid)

    def copy(self) -> Stream:
        """An independent stream from here on; arrays are shared, as nobody writes into one."""
        twin = object.__new__(Stream)
        twin.__dict__.update(self.__dict__)
        twin.run = self.run.copy()
        twin._pass = dataclasses.replace(self._pass, run=twin.run)
        return twin


def _ends(tokens: np.ndarray, lengths: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """(B,) the last of the first `lengths` (B,) tokens (B, T) of each row; where there is none, as `otherwise`."""
    if not tokens.shape[1]:
        return otherwise
    return np.where(lengths > 0, tokens[np.arange(len(tokens)), np.maximum(lengths - 1, 0)], otherwise).astype(np.int64)


def _surprise(model: Model, weights: Weights, hidden: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p, in nats, of targets (N,) after the decoder's outputs (N, d): (N,). By the model alone: no memory changes it."""
    return model.output.surprise(hidden, weights, targets)


def _projection(model: Model, weights: Weights, site: str, layer: int) -> Project | None:
    """Rows to the keys and values of a layer of self-attention; None where there is no such layer. Holds on to no stream, nor its tape."""
    stack = {"encoder": model.encoder, "decoder": model.decoder}.get(site)
    if stack is None or layer >= len(stack.layers):
        return None
    attention, alone = stack.layers[layer].attention.f, Pass(weights, MemoryRun(None, model.config, weights.kept, 0))
    return partial(attention.rows_projected, alone)
