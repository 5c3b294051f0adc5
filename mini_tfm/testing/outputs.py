"""Checks of what a strategy does to the outputs: whom it sees, whose rows they are, what its state holds, what it drops."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ..autodiff import value_of
from ..memory.base import Memory, Segment
from ..memory.registry import memory as make_memory
from ..memory.run import members_of
from .trial import TOLERANCE, CheckFailed, Trial, between_taps, same

# Running


def runs(trial: Trial) -> None:
    """Ragged segments are read without an error, and all outputs are finite."""
    reader = trial.reader(2)
    for number, tokens in enumerate(trial.segments(2, 4)):
        out = reader.read(tokens, [trial.length, trial.length - number])
        if not np.isfinite(out).all():
            raise CheckFailed(f"segment {number}: expected finite outputs, got NaN or infinity")


def keeps_the_dtype(trial: Trial) -> None:
    """A float32 model stays one."""
    single = trial.like(dtype=np.float32)
    reader = single.reader(1)
    for tokens in trial.segments(1, 3):
        out = reader.read(tokens)
        if out.dtype != np.float32:
            raise CheckFailed(f"expected float32 outputs of a float32 model, got {out.dtype}")


def has_effect(trial: Trial) -> None:
    """After several segments, the next outputs differ from those without the memory."""
    reader, plain = trial.reader(1), trial.reader(1, without=True)
    for tokens in trial.segments(1, 6):
        out, other = reader.read(tokens), plain.read(tokens)
    if np.max(np.abs(out - other)) < TOLERANCE:
        raise CheckFailed("expected other outputs than without the memory after 6 segments, got the same")


def is_deterministic(trial: Trial) -> None:
    """The same text gives the same bits."""
    readers = [trial.reader(2), trial.reader(2)]
    for tokens in trial.segments(2, 3):
        a, b = (reader.read(tokens) for reader in readers)
        if a.tobytes() != b.tobytes():
            raise CheckFailed(f"expected the same bits from the same text, got a difference of {np.max(np.abs(a - b)):.3g}")


def text_makes_it_again(trial: Trial) -> None:
    """`memory.text`, which is saved with a model, recreates the same memory."""
    memory = trial.make()
    text = memory.text
    if text is None:
        return  # made by hand: the user hands it over again
    again = trial.like(make=lambda: make_memory(text))
    reader, other = trial.reader(1), again.reader(1)
    for tokens in trial.segments(1, 4):
        same(f"made from its text {text!r}", other.read(tokens), reader.read(tokens))


# Visibility


def empty_is_nothing(trial: Trial) -> None:
    """A memory that has read nothing changes nothing, unless it inserts rows of its own into the sequence."""
    if any(type(member).begin is not Memory.begin for member in members_of(trial.make())):
        return
    for tokens in trial.segments(2, 1):
        same("the first segment", trial.reader(2).read(tokens), trial.reader(2, without=True).read(tokens))


def padding_is_ignored(trial: Trial) -> None:
    """Tokens past a stream's length have no effect, now or later."""
    segments, lengths = trial.segments(2, 4), [trial.length, trial.length - 3]
    changed = segments.copy()
    changed[:, 1, trial.length - 3 :] = 3 + (changed[:, 1, trial.length - 3 :] + 5) % 20
    reader, other = trial.reader(2), trial.reader(2)
    for number, (tokens, alike) in enumerate(zip(segments, changed, strict=True)):
        same(f"segment {number} with other tokens in its padding", other.read(alike, lengths), reader.read(tokens, lengths))


def future_is_not_seen(trial: Trial) -> None:
    """In a decoder, later tokens of a segment do not change the outputs of earlier ones, in training or in use."""
    if not trial.model.config.has_decoder:
        return
    segments = trial.segments(1, 3)
    for training in (False, True):
        when = "in training" if training else "in use"
        before, changed_at = trial.reader(1, training=training), sorted({0, trial.length // 2 - 1, trial.length - 2})
        for tokens in segments[:-1]:
            before.read(tokens)
        out = before.copy().read(segments[-1])
        for at in changed_at:
            changed = segments[-1].copy()
            changed[:, at] = 3 + (changed[:, at] + 5) % 20
            seen = before.copy().read(changed, source=segments[-1])
            same(f"outputs up to token {at}, which was changed, {when}", seen[:, : at + 1], out[:, : at + 1])  # its inputs lag by one


def generation_equals_reading(trial: Trial) -> None:
    """Decoding one token at a time, with a cache, gives the outputs of the whole segment."""
    if not trial.model.config.has_decoder:
        return
    reader = trial.reader(2)
    *before, tokens = trial.segments(2, 4)
    for segment in before:
        reader.read(segment)
    whole = reader.copy().read(tokens)
    same("token by token", reader.copy().token_by_token(tokens), whole)


# Streams: rows of the batch


def rows_are_independent(trial: Trial) -> None:
    """A stream's outputs do not depend on the other streams of the batch, nor on its position in it."""
    segments, lengths = trial.segments(3, 4), np.array([trial.length, trial.length - 2, trial.length - 1])
    together, turned, order = trial.reader(3), trial.reader(3), np.array([2, 0, 1])
    alone = [trial.reader(1) for _ in range(3)]
    for tokens in segments:
        out = together.read(tokens, lengths)
        same("streams in another order", turned.read(tokens[order], lengths[order]), out[order])
        for b, reader in enumerate(alone):
            n = lengths[b]
            same(f"stream {b} alone", reader.read(tokens[b : b + 1, :n])[0], out[b, :n])


def rows_pause(trial: Trial) -> None:
    """A stream without a token in a segment keeps its memory unchanged; the others continue."""
    segments = trial.segments(2, 4)
    reader, other, steady = trial.reader(2), trial.reader(1), trial.reader(1)
    for number, tokens in enumerate(segments):
        pauses = number in (0, 2)
        out = reader.read(tokens, [trial.length, 0 if pauses else trial.length])
        same(f"segment {number}: the stream that goes on", out[:1], steady.read(tokens[:1]))
        if not pauses:
            same(f"segment {number}: the stream that paused", out[1:], other.read(tokens[1:]))


def reset_forgets(trial: Trial) -> None:
    """After `reset` a stream is as if it had read nothing, and the others are unchanged."""
    *before, tokens = trial.segments(2, 4)
    reader, fresh, steady = trial.reader(2), trial.reader(1), trial.reader(1)
    for segment in before:
        reader.read(segment)
        steady.read(segment[:1])
    reader.stream.begin_documents(np.array([False, True]))
    out = reader.read(tokens)
    same("the stream that was reset", out[1:], fresh.read(tokens[1:]))
    same("the stream that was not", out[:1], steady.read(tokens[:1]))


def rows_reorder(trial: Trial) -> None:
    """Streams can be reordered, dropped and repeated, as beams are."""
    first, second, third = trial.segments(2, 3)
    reader, plain = trial.reader(2), trial.reader(2)
    for tokens in (first, second):
        reader.read(tokens)
        plain.read(tokens)
    index = np.array([1, 1, 0])
    reader.stream.reorder(index)
    same("streams 1, 1, 0", reader.read(third[index]), plain.read(third)[index])


# State


def dump_and_load_go_on(trial: Trial) -> None:
    """The state holds everything: after a dump is loaded into a new memory, reading continues with the same outputs."""
    segments = trial.segments(2, 5)
    reader = trial.reader(2)
    for tokens in segments[:3]:
        reader.read(tokens)
    again = trial.reader(2)
    again.run.load({name: array.copy() for name, array in reader.run.dump().items()})
    again.stream.last = reader.stream.last
    for tokens in segments[3:]:
        same("after dump and load", again.read(tokens), reader.read(tokens))


def state_is_not_written_into(trial: Trial) -> None:
    """Arrays of the state are replaced, never changed: copies of a run share them."""
    reader = trial.reader(2)
    for tokens in trial.segments(2, 4):
        held = [(name, array, array.copy()) for state in reader.run.states for name, array in state.items()]
        reader.read(tokens)
        for name, array, before in held:
            if array.tobytes() != before.tobytes():
                raise CheckFailed(f"state[{name!r}]: expected a new array to be assigned, got a change within the old one")


def capacity_holds(trial: Trial) -> None:
    """No array of the state has more rows than `spec.capacity`, however much is read."""
    reader = trial.reader(1)
    for tokens in trial.segments(1, 8):
        reader.read(tokens)
    for member, state in zip(reader.run.members, reader.run.states, strict=True):
        for name, array in state.items():
            if member.spec.capacity is not None and array.ndim > 1 and array.shape[1] > member.spec.capacity:
                raise CheckFailed(f"state[{name!r}]: expected at most capacity = {member.spec.capacity} rows, got {array.shape[1]}")


def dropped_rows_were_held(trial: Trial) -> None:
    """`write` returns only rows that it was given, each at most once, and none that is still shown."""
    memory = trial.make()
    if type(memory).write is Memory.write or members_of(memory) != [memory]:
        return
    before, stack, behind = between_taps(memory)
    reader = trial.reader(2, memory=stack)
    for tokens in trial.segments(2, 8):
        reader.read(tokens)
    for b in range(2):
        given, dropped = before.rows(b), behind.rows(b)
        if strange := [row for row in dropped if row not in set(given)]:
            raise CheckFailed(f"expected only rows that were written to be dropped, got position {strange[0][2]} with other values")
        if len(set(dropped)) != len(dropped):
            raise CheckFailed(f"expected each row to be dropped once, got {len(dropped) - len(set(dropped))} again")
        for site, layer in {row[:2] for row in dropped}:
            if not any(i == 1 and has_view for i, has_view, _ in reader.run._sites.show.get((site, layer), ())):
                continue  # rows that go past it: it is never asked there
            # Values, as a view may say that a row stands elsewhere (arXiv 2309.17453, section 3.2); several rows may have the same.
            held, gone = (Counter(row[3] for row in rows if row[:2] == (site, layer)) for rows in (given, dropped))
            shown = Counter(_shown_rows(reader.run.states[1], memory, site, layer, b, trial.length))
            if twice := sum(max(0, gone[row] + shown[row] - held[row]) for row in gone):
                raise CheckFailed(f"expected a dropped row to be shown no more, got {twice} at {site}, layer {layer}")


def _shown_rows(state: dict, memory: Memory, site: str, layer: int, b: int, length: int) -> list[bytes]:
    """The values of the rows in the view of stream b."""
    now = Segment(8, site, np.full(2, 8 * length), np.full(2, length))
    view = memory.view(state, site, layer, now)  # type: ignore[arg-type]
    if view is None or view.bank[0] != "hidden":
        return []
    return [row.tobytes() for row in value_of(view.bank[1])[b, view.valid[b]]]


def stacks(trial: Trial) -> None:
    """It works in a stack: it takes rows from the memory before it, and the memory after it takes the rows it drops."""
    before, stack, _ = between_taps(trial.make())
    reader = trial.reader(2, memory=stack)
    for tokens in trial.segments(2, 4):
        out = reader.read(tokens)
    if not np.isfinite(out).all() or not (before.seen or trial.kind == "encoder-only"):
        raise CheckFailed("expected finite outputs in a stack, got NaN or infinity")
