"""The checks that every strategy must pass: one function each, and the table of them.

Each takes a `Trial` (a strategy and a kind of model) and raises CheckFailed, saying what was expected and what came.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from ..autodiff import backward, value_of
from ..errors import InvalidType, InvalidValue, MiniTfmError
from ..memory.base import Memory, Segment
from ..memory.registry import memory as make_memory
from ..memory.run import members_of, memory_parameters, parameter_prefixes
from ..memory.validate import check_spec
from ..train import Trainer
from .trial import LENGTH, Trial, between_taps, kinds_for, leaves, random_segments

TOLERANCE = 1e-8  # in float64, where the checks run: differences of rounding are a million times smaller


class CheckFailed(MiniTfmError, AssertionError):
    """A strategy breaks the contract; the message lists every check that failed, however many."""

    __str__ = AssertionError.__str__


def check_memory(memory: str | Memory | Callable[[], Memory], *, skip: Iterable[str] = ()) -> None:
    """Runs every check on a strategy: its text ("my_memory:size=8"), a Memory, or a function or class that gives one.

    For a strategy that keeps a file give a function that picks a new file each time: one file cannot serve two models.
    skip: names of checks that do not apply to this strategy (see CHECKS). Raises CheckFailed with all that failed.
    """
    make = _factory(memory)
    if unknown := sorted(set(skip) - set(CHECKS)):
        raise InvalidValue(f"skip: unknown check {unknown[0]!r}; the checks are {', '.join(CHECKS)}")
    try:
        made = make()
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit would end the tests of its author
        raise CheckFailed(f"memory: expected a Memory, making one raised {type(error).__name__}: {error}") from error
    if not isinstance(made, Memory):
        raise InvalidType(f"memory: expected a Memory, got {type(made).__name__}")
    for member in members_of(made):
        check_spec(member)
    who, faults = made.text or made.name or type(made).__name__, []
    for kind in kinds_for(made):
        for name, check in CHECKS.items():
            if name in skip:
                continue
            try:
                check(Trial(make, kind))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit and the like, too
                message = str(error) if isinstance(error, CheckFailed) else f"expected no error, got {type(error).__name__}: {error}"
                faults.append((f"  {name} ({kind}): {message}", error))
                if name == "runs":
                    break  # nothing else can be learned
    if faults:
        count = f"{len(faults)} check" + "s" * (len(faults) > 1)
        raise CheckFailed(f"memory {who!r} fails {count}:\n" + "\n".join(message for message, _ in faults)) from faults[0][1]


def _factory(memory: str | Memory | Callable[[], Memory]) -> Callable[[], Memory]:
    if isinstance(memory, str):
        return lambda: make_memory(memory)
    if isinstance(memory, Memory):
        return lambda: memory
    if callable(memory):
        return memory
    raise InvalidType(f"memory: expected text, a Memory or a function that returns a Memory, got {type(memory).__name__}")


def _same(what: str, actual: np.ndarray, expected: np.ndarray) -> None:
    """Fails unless the arrays are equal but for rounding."""
    if actual.shape != expected.shape:
        raise CheckFailed(f"{what}: expected shape {expected.shape}, got {actual.shape}")
    difference = float(np.max(np.abs(actual - expected), initial=0))
    if not difference <= TOLERANCE:
        raise CheckFailed(f"{what}: expected the same numbers, got a difference of {difference:.3g}")


# Running


def runs(trial: Trial) -> None:
    """Ragged segments are read without an error, and all outputs are finite."""
    reader = trial.reader(2)
    for number, tokens in enumerate(random_segments(2, 4)):
        out = reader.read(tokens, [LENGTH, LENGTH - number])
        if not np.isfinite(out).all():
            raise CheckFailed(f"segment {number}: expected finite outputs, got NaN or infinity")


def keeps_the_dtype(trial: Trial) -> None:
    """A float32 model stays one."""
    single = Trial(trial.make, trial.kind, np.float32)
    reader = single.reader(1)
    for tokens in random_segments(1, 3):
        out = reader.read(tokens)
        if out.dtype != np.float32:
            raise CheckFailed(f"expected float32 outputs of a float32 model, got {out.dtype}")


def has_effect(trial: Trial) -> None:
    """After several segments, the next outputs differ from those without the memory."""
    reader, plain = trial.reader(1), trial.reader(1, without=True)
    for tokens in random_segments(1, 6):
        out, other = reader.read(tokens), plain.read(tokens)
    if np.max(np.abs(out - other)) < TOLERANCE:
        raise CheckFailed("expected other outputs than without the memory after 6 segments, got the same")


def is_deterministic(trial: Trial) -> None:
    """The same text gives the same bits."""
    readers = [trial.reader(2), trial.reader(2)]
    for tokens in random_segments(2, 3):
        a, b = (reader.read(tokens) for reader in readers)
        if a.tobytes() != b.tobytes():
            raise CheckFailed(f"expected the same bits from the same text, got a difference of {np.max(np.abs(a - b)):.3g}")


def text_makes_it_again(trial: Trial) -> None:
    """`memory.text`, which is saved with a model, recreates the same memory."""
    memory = trial.make()
    text = memory.text
    if text is None:
        return  # made by hand: the user hands it over again
    again = Trial(lambda: make_memory(text), trial.kind)
    reader, other = trial.reader(1), again.reader(1)
    for tokens in random_segments(1, 4):
        _same(f"made from its text {text!r}", other.read(tokens), reader.read(tokens))


# Visibility


def empty_is_nothing(trial: Trial) -> None:
    """A memory that has read nothing changes nothing, unless it inserts rows of its own into the sequence."""
    if any(type(member).begin is not Memory.begin for member in members_of(trial.make())):
        return
    for tokens in random_segments(2, 1):
        _same("the first segment", trial.reader(2).read(tokens), trial.reader(2, without=True).read(tokens))


def padding_is_ignored(trial: Trial) -> None:
    """Tokens past a stream's length have no effect, now or later."""
    segments, lengths = random_segments(2, 4), [LENGTH, LENGTH - 3]
    changed = segments.copy()
    changed[:, 1, LENGTH - 3 :] = 3 + (changed[:, 1, LENGTH - 3 :] + 5) % 20
    reader, other = trial.reader(2), trial.reader(2)
    for number, (tokens, same) in enumerate(zip(segments, changed, strict=True)):
        _same(f"segment {number} with other tokens in its padding", other.read(same, lengths), reader.read(tokens, lengths))


def future_is_not_seen(trial: Trial) -> None:
    """In a decoder, later tokens of a segment do not change the outputs of earlier ones, in training or in use."""
    if not trial.model.config.has_decoder:
        return
    segments = random_segments(1, 3)
    changed = segments.copy()
    changed[-1, :, -2] = 3 + (changed[-1, :, -2] + 5) % 20  # the decoder's last input: its inputs lag by one
    for training in (False, True):
        reader, other = trial.reader(1, training=training), trial.reader(1, training=training)
        for tokens, same in zip(segments, changed, strict=True):
            out, seen = reader.read(tokens, source=tokens), other.read(same, source=tokens)
        when = "in training" if training else "in use"
        _same(f"outputs before the last input, which was changed, {when}", seen[:, :-1], out[:, :-1])


def generation_equals_reading(trial: Trial) -> None:
    """Decoding one token at a time, with a cache, gives the outputs of the whole segment."""
    if not trial.model.config.has_decoder:
        return
    reader = trial.reader(2)
    *before, tokens = random_segments(2, 4)
    for segment in before:
        reader.read(segment)
    whole = reader.copy().read(tokens)
    _same("token by token", reader.copy().token_by_token(tokens), whole)


# Streams: rows of the batch


def rows_are_independent(trial: Trial) -> None:
    """A stream's outputs do not depend on the other streams of the batch, nor on its position in it."""
    segments, lengths = random_segments(3, 4), np.array([LENGTH, LENGTH - 2, LENGTH - 1])
    together, turned, order = trial.reader(3), trial.reader(3), np.array([2, 0, 1])
    alone = [trial.reader(1) for _ in range(3)]
    for tokens in segments:
        out = together.read(tokens, lengths)
        _same("streams in another order", turned.read(tokens[order], lengths[order]), out[order])
        for b, reader in enumerate(alone):
            n = lengths[b]
            _same(f"stream {b} alone", reader.read(tokens[b : b + 1, :n])[0], out[b, :n])


def rows_pause(trial: Trial) -> None:
    """A stream without a token in a segment keeps its memory unchanged; the others continue."""
    segments = random_segments(2, 4)
    reader, other, steady = trial.reader(2), trial.reader(1), trial.reader(1)
    for number, tokens in enumerate(segments):
        pauses = number in (0, 2)
        out = reader.read(tokens, [LENGTH, 0 if pauses else LENGTH])
        _same(f"segment {number}: the stream that goes on", out[:1], steady.read(tokens[:1]))
        if not pauses:
            _same(f"segment {number}: the stream that paused", out[1:], other.read(tokens[1:]))


def reset_forgets(trial: Trial) -> None:
    """After `reset` a stream is as if it had read nothing, and the others are unchanged."""
    *before, tokens = random_segments(2, 4)
    reader, fresh, steady = trial.reader(2), trial.reader(1), trial.reader(1)
    for segment in before:
        reader.read(segment)
        steady.read(segment[:1])
    reader.stream.begin_documents(np.array([False, True]))
    out = reader.read(tokens)
    _same("the stream that was reset", out[1:], fresh.read(tokens[1:]))
    _same("the stream that was not", out[:1], steady.read(tokens[:1]))


def rows_reorder(trial: Trial) -> None:
    """Streams can be reordered, dropped and repeated, as beams are."""
    first, second, third = random_segments(2, 3)
    reader, plain = trial.reader(2), trial.reader(2)
    for tokens in (first, second):
        reader.read(tokens)
        plain.read(tokens)
    index = np.array([1, 1, 0])
    reader.stream.reorder(index)
    _same("streams 1, 1, 0", reader.read(third[index]), plain.read(third)[index])


# State


def dump_and_load_go_on(trial: Trial) -> None:
    """The state holds everything: after a dump is loaded into a new memory, reading continues with the same outputs."""
    segments = random_segments(2, 5)
    reader = trial.reader(2)
    for tokens in segments[:3]:
        reader.read(tokens)
    again = trial.reader(2)
    again.run.load({name: array.copy() for name, array in reader.run.dump().items()})
    again.stream.last = reader.stream.last
    for tokens in segments[3:]:
        _same("after dump and load", again.read(tokens), reader.read(tokens))


def state_is_not_written_into(trial: Trial) -> None:
    """Arrays of the state are replaced, never changed: copies of a run share them."""
    reader = trial.reader(2)
    for tokens in random_segments(2, 4):
        held = [(name, array, array.copy()) for state in reader.run.states for name, array in state.items()]
        reader.read(tokens)
        for name, array, before in held:
            if array.tobytes() != before.tobytes():
                raise CheckFailed(f"state[{name!r}]: expected a new array to be assigned, got a change within the old one")


def capacity_holds(trial: Trial) -> None:
    """No array of the state has more rows than `spec.capacity`, however much is read."""
    reader = trial.reader(1)
    for tokens in random_segments(1, 8):
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
    for tokens in random_segments(2, 8):
        reader.read(tokens)
    for b in range(2):
        given, dropped = before.rows(b), behind.rows(b)
        if strange := [row for row in dropped if row not in set(given)]:
            raise CheckFailed(f"expected only rows that were written to be dropped, got position {strange[0][2]} with other values")
        if len(set(dropped)) != len(dropped):
            raise CheckFailed(f"expected each row to be dropped once, got {len(dropped) - len(set(dropped))} again")
        for site, layer in {row[:2] for row in dropped}:
            # Values, as a view may say that a row stands elsewhere (arXiv 2309.17453, section 3.2); several rows may have the same.
            held, gone = (Counter(row[3] for row in rows if row[:2] == (site, layer)) for rows in (given, dropped))
            shown = Counter(_shown_rows(reader.run.states[1], memory, site, layer, b))
            if twice := sum(max(0, gone[row] + shown[row] - held[row]) for row in gone):
                raise CheckFailed(f"expected a dropped row to be shown no more, got {twice} at {site}, layer {layer}")


def _shown_rows(state: dict, memory: Memory, site: str, layer: int, b: int) -> list[bytes]:
    """The values of the rows in the view of stream b."""
    now = Segment(8, site, np.full(2, 8 * LENGTH), np.full(2, LENGTH))
    view = memory.view(state, site, layer, now)  # type: ignore[arg-type]
    if view is None or view.bank[0] != "hidden":
        return []
    return [row.tobytes() for row in value_of(view.bank[1])[b, view.valid[b]]]


def stacks(trial: Trial) -> None:
    """It works in a stack: it takes rows from the memory before it, and the memory after it takes the rows it drops."""
    before, stack, _ = between_taps(trial.make())
    reader = trial.reader(2, memory=stack)
    for tokens in random_segments(2, 4):
        out = reader.read(tokens)
    if not np.isfinite(out).all() or not (before.seen or trial.kind == "encoder-only"):
        raise CheckFailed("expected finite outputs in a stack, got NaN or infinity")


# Training


def gradients_are_right(trial: Trial) -> None:
    """The gradient of a segment's loss, given the state before it, agrees with finite differences."""
    if not trial.model.config.has_decoder:
        return
    segments = random_segments(2, 3)
    reader = trial.reader(2)
    for tokens in segments[:2]:
        reader.read(tokens)
    _compare_gradient(trial, segments[2:], reader.run.dump())
    if all(member.spec.gradient != "none" for member in members_of(trial.make())):
        _compare_gradient(trial, segments, None)


def _compare_gradient(trial: Trial, segments: np.ndarray, state: dict | None) -> None:
    model = trial.model
    w = leaves(model)
    backward(trial.loss(segments, w, state))
    rng = np.random.default_rng(0)
    for names in (list(w), [name for name in w if name.startswith("memory.")]):
        direction = {name: rng.standard_normal(w[name].shape) for name in names}
        got = sum(float((w[n].grad * d).sum()) for n, d in direction.items() if w[n].grad is not None)

        def loss_at(step: float, direction: dict = direction) -> float:
            return float(trial.loss(segments, {n: x + step * direction.get(n, 0.0) for n, x in model.weights.items()}, state))

        for step in STEPS:
            expected = _slope(loss_at, step)
            if abs(got - expected) <= 1e-5 * max(1.0, abs(expected)):
                break
        else:
            what = "all weights" if len(names) == len(w) else "the strategy's parameters"
            through = f"through {len(segments)} segments" if state is None else "of one segment"
            raise CheckFailed(f"gradient {through}, along {what}: expected {expected:.6g} by finite differences, got {got:.6g}")


STEPS = (1e-5, 1e-6, 1e-7)  # of finite differences: the smaller, the more a loss may curve, and the more rounding there is


def _slope(f: Callable[[float], float], step: float) -> float:
    """f'(0) by Richardson's extrapolation of two central differences, whose error is of order step^4."""
    wide, narrow = ((f(h) - f(-h)) / (2 * h) for h in (step, step / 2))
    return (4 * narrow - wide) / 3


def gradient_is_as_declared(trial: Trial) -> None:
    """With spec.gradient "none" no gradient flows from a segment to earlier ones; otherwise some does."""
    if not trial.model.config.has_decoder:
        return
    grads = []
    segments = random_segments(1, 3)
    for detach_at in (None, 2):
        w = leaves(trial.model)
        backward(trial.loss(segments, w, detach_at=detach_at))
        grads.append(np.concatenate([x.grad.ravel() for x in w.values() if x.grad is not None]))
    declared = {member.spec.gradient for member in members_of(trial.make())} - {"none"}
    differ = grads[0].shape != grads[1].shape or np.max(np.abs(grads[0] - grads[1])) > TOLERANCE
    if declared and not differ:
        message = "expected other gradients when they are cut before the last segment, got the same"
        raise CheckFailed(f"spec.gradient is {min(declared)!r}: {message}")
    if not declared and differ:
        raise CheckFailed("spec.gradient is 'none': expected no gradient from one segment to another, got some")


def parameters_learn(trial: Trial) -> None:
    """Every parameter of the strategy gets a gradient, and training moves it."""
    memory = trial.make()
    names = list(memory_parameters(memory, trial.model.config, trial.model.dtype))
    if not names or not trial.model.config.has_decoder:
        return
    trainer = Trainer(trial.model, memory, learning_rate=1e-2, weight_decay=0.0, schedule="constant")
    before = {name: trial.model.weights[name].copy() for name in names}
    tokens = np.moveaxis(random_segments(2, 4), 0, 1)
    for _ in range(2):
        trainer.step(tokens if trial.model.config.has_encoder else None, tokens)
    for name in names:
        if np.array_equal(before[name], trial.model.weights[name]):
            raise CheckFailed(f"parameter {_short(memory, name)!r}: expected training to move it, got no change in 2 steps")


def _short(memory: Memory, name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in parameter_prefixes(memory) if name.startswith(prefix)), name)


def recomputing_gives_the_same(trial: Trial) -> None:
    """Recomputed segments give the same gradients as kept segments, bit for bit."""
    if not trial.model.config.has_decoder:
        return
    tokens, grads = np.moveaxis(random_segments(2, 3), 0, 1), []
    for recompute in (False, True):
        single = Trial(trial.make, trial.kind, np.float32)
        trainer = Trainer(single.model, single.make(), recompute=recompute)
        trainer.step(tokens if single.model.config.has_encoder else None, tokens)
        grads.append(trainer.optimizer.grad)
    kept, again = grads
    if not np.array_equal(kept, again):
        raise CheckFailed(f"expected the same gradients, got a difference of {np.max(np.abs(kept - again)):.3g}")


def training_resumes(trial: Trial) -> None:
    """Saved and resumed training continues with the same bits."""
    if not trial.model.config.has_decoder:
        return
    single = Trial(trial.make, trial.kind, np.float32)
    trainer = Trainer(single.model, single.make(), learning_rate=1e-2)
    tokens = np.moveaxis(random_segments(2, 3), 0, 1)
    source = tokens if single.model.config.has_encoder else None
    trainer.step(source, tokens)
    with tempfile.TemporaryDirectory() as folder:
        trainer.save(f"{folder}/model")
        text = trainer.memory.text if trainer.memory is not None else None
        again = Trainer.resume(f"{folder}/model", make_memory(text) if text else single.make())
    losses = [(value_of(trainer.step(source, tokens)), value_of(again.step(source, tokens))) for _ in range(2)]
    if any(a != b for a, b in losses):
        raise CheckFailed(f"expected the losses {[a for a, _ in losses]} after resuming, got {[b for _, b in losses]}")


# check_memory runs these, in this order. The others make no sense where `runs` fails.
CHECKS: dict[str, Callable[[Trial], None]] = {
    check.__name__: check
    for check in (
        runs,
        keeps_the_dtype,
        has_effect,
        is_deterministic,
        text_makes_it_again,
        empty_is_nothing,
        padding_is_ignored,
        future_is_not_seen,
        generation_equals_reading,
        rows_are_independent,
        rows_pause,
        reset_forgets,
        rows_reorder,
        dump_and_load_go_on,
        state_is_not_written_into,
        capacity_holds,
        dropped_rows_were_held,
        stacks,
        gradients_are_right,
        gradient_is_as_declared,
        parameters_learn,
        recomputing_gives_the_same,
        training_resumes,
    )
}
