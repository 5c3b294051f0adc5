"""Backpropagation through segments: the loss of a batch and its gradient, segment by segment from the last to the first.

Between two segments the tape is cut: a segment starts from leaves that hold the states it was given. What its backward
pass leaves in them is what the backward pass of the segment before starts from. So a segment's tape may be kept until
then, or dropped and made again: one order of sums, and so the same gradients to the bit. Computed again, a batch takes the
RAM of one segment and of the states between them (arXiv 1604.06174 for layers; arXiv 2207.06881 is what needs it here).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..autodiff import Var, backward, value_of
from ..context import NO_DROPOUT, Dropout
from ..data.batches import Batch
from ..memory.validate import attributed, require
from ..model import Model
from ..stream import Stream
from .segments import read_segment


def counts_of(batch: Batch, dtype: Any) -> np.ndarray:
    """(B, n, L): what each target token weighs in the loss."""
    counts = (np.arange(batch.target.shape[2]) < batch.target_lengths[..., None]).astype(dtype)
    return counts if batch.weights is None else counts * batch.weights


def read_in(batch: Batch) -> int:
    """The segments of all streams that have a token."""
    lengths = batch.target_lengths if batch.source_lengths is None else batch.source_lengths
    return int((lengths > 0).sum())


class Part(NamedTuple):
    """What a segment adds to the loss, or what all do: of the target tokens, and of memories' own (`Memory.loss`). None: nothing."""

    text: Any
    memory: Any


class SegmentLoss:
    """The mean negative log-likelihood, in nats, of all target tokens of a batch, as a sum over its segments.

    To it comes the mean of memories' own losses over segments and streams. total, n_read: what all target tokens weigh, and the
    segments of all streams that are read, if the batch is a part of another one, whose mean is meant.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,
        *,
        total: float | None = None,
        n_read: int | None = None,
        dropout: Dropout = NO_DROPOUT,
        hide_source: np.ndarray | None = None,
        label_smoothing: float = 0.0,
    ):
        self.model, self.batch, self.label_smoothing = model, batch, label_smoothing
        self.dropout, self.hide_source = dropout, hide_source
        self.counts = counts_of(batch, model.dtype)
        shares = self.counts.sum(axis=(0, 2), dtype=np.float64)
        self.shares = shares / (total or shares.sum() or 1.0)
        self.share_of_memory = 1 / (n_read or read_in(batch) or 1)
        self.n_segments = len(shares)

    def segment(self, stream: Stream, t: int, states_only: bool = False) -> Part:
        """Reads segment t; its part of the sum, nothing of the text where no token counts (or at all if states alone are asked for)."""
        hidden, text = read_segment(stream, self.batch, t, self.dropout, self.hide_source), None
        if self.shares[t] > 0 and not states_only:
            targets, counts = self.batch.target[:, t], self.counts[:, t]
            text = self.model.output.loss(hidden, stream.weights, targets, counts, self.label_smoothing)
            text = text * self.model.dtype.type(self.shares[t])
        added = stream.finish()
        if added is None or states_only:
            return Part(text, None)
        return Part(text, added * self.model.dtype.type(self.share_of_memory))

    def value(self, stream: Stream) -> float:
        """Of the target tokens alone."""
        return self.sum([self.segment(stream, t) for t in range(self.n_segments)]).text

    def sum(self, parts: list[Part]) -> Part:
        """Of all parts, as floats."""
        totals = []
        for of_segments in zip(*parts, strict=True):
            total = self.model.dtype.type(0)
            for part in of_segments:
                total = total if part is None else total + value_of(part)
            totals.append(float(total))
        return Part(*totals)

    def is_finite(self, parts: list[Part]) -> bool:
        return bool(np.isfinite(self.sum(parts)).all())


def backpropagate(loss: SegmentLoss, stream: Stream, *, truncate: int | None = None, recompute: bool = False) -> Part:
    """The loss of a stream, from its first segment; the gradient of its sum is added to the stream's weights, which are Vars.

    truncate: gradients stop after so many segments, None: never. recompute: computes each segment twice instead of
    keeping its tape; PluginError if a memory then holds something else. If the loss is not finite, no gradient is whole.
    """
    parts: list[Part] = []
    born = stream.run.traced()  # what memories start from is trained, too
    size = truncate or max(1, loss.n_segments)
    for first in range(0, loss.n_segments, size):
        if first:
            stream.run.detach()
        more, start = _chunk(loss, stream, range(first, min(first + size, loss.n_segments)), recompute)
        parts += more
        if not loss.is_finite(parts):
            break
        if not first:
            _send(Part(None, None), born, start)
    return loss.sum(parts)


Leaves = dict[tuple[int, str], Var]  # states by member and name


def _chunk(loss: SegmentLoss, stream: Stream, segments: range, recompute: bool) -> tuple[list[Part], Leaves]:
    """Forward and backward through `segments`: their parts of the loss, and the leaves that the first one started from."""
    parts: list[Part] = []
    given: list[Stream] = []  # each segment's incoming states
    made: list[Leaves] = []  # and its outgoing ones, on its tape
    for t in segments:
        stream.run.cut()
        given.append(stream.copy())
        dropped = recompute and t != segments[-1]
        part = loss.segment(stream, t, states_only=dropped)
        parts.append(part)
        made.append({} if dropped else stream.run.traced())
    arrived: Leaves = {}
    following = stream
    for i in reversed(range(len(segments))):
        started = given[i].run.traced()
        if recompute and i + 1 < len(segments):
            again = given[i].copy()
            parts[i] = loss.segment(again, segments[i])
            made[i] = _same(again, following, segments[i])
        if not loss.is_finite(parts):
            return parts, {}
        part, parts[i] = parts[i], Part(*map(value_of, parts[i]))
        _send(part, made.pop(), arrived)
        arrived, following = started, given.pop()
    return parts, arrived


def _send(part: Part, made: Leaves, arrived: Leaves) -> None:
    """A segment's backward pass: from its part of the loss, and from what the next one's left in the leaves it started from.

    part: plain where no weight that is trained had a part in it.
    """
    outputs: list[Any] = [one for one in part if isinstance(one, Var)]
    grads: list[Any] = [None] * len(outputs)
    for key, leaf in arrived.items():
        if leaf.grad is not None:
            outputs.append(made[key])
            grads.append(leaf.grad)
    backward(*outputs, grads=grads)


def _same(again: Stream, before: Stream, t: int) -> Leaves:
    """The states on the tape of a segment computed again, which must be what they were."""
    for i, (new, old) in enumerate(zip(again.run.states, before.run.states, strict=True)):
        with attributed(again.run.members[i], "write", None, None, t):
            fault = "the segment, computed again from the same state, leaves {}; keep everything in the state and write into no array of it"
            require(new.keys() == old.keys(), fault.format(f"{sorted(new)}, before {sorted(old)}"))
            for name in new:
                require(_equal(new[name], old[name]), fault.format(f"another state[{name!r}]"))
    return again.run.traced()


def _equal(a: Any, b: Any) -> bool:
    x, y = value_of(a), value_of(b)
    return isinstance(a, Var) == isinstance(b, Var) and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
