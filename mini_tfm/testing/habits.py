"""Checks of what shows late, at other sizes, or not in the outputs: long streams, every layer, neighbours in a stack, the process."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from .. import _core
from ..autodiff import Var, value_of
from ..memory.base import Memory
from ..memory.registry import memory as make_memory
from ..memory.run import members_of, memory_parameters, model_dims
from ..memory.stack import Stack
from ..train import Trainer
from .outputs import future_is_not_seen, generation_equals_reading, rows_are_independent, runs
from .trial import TOLERANCE, CheckFailed, Found, Newest, Reader, Trial, kinds_for, same

# Heads that share keys, of a size of their own, and longer segments; a decoder with other heads than the encoder; and the kinds of
# positions that a trial's model has not.
OTHER_MODELS: list[dict[str, Any]] = [
    {"n_heads": 4, "n_kv_heads": 2, "d_head": 6, "segment_length": 16},
    {"decoder_n_heads": 4, "positions": "learned", "max_positions": 32, "segment_length": 16},
    {"positions": "none", "segment_length": 16},
]
MANY_SEGMENTS = 200


def other_models(trial: Trial) -> None:
    """It works with grouped heads of another size, other heads in the decoder, longer segments and other kinds of positions."""
    for fields in OTHER_MODELS:
        other = trial.like(**fields)
        for check in (runs, future_is_not_seen, generation_equals_reading, rows_are_independent):
            try:
                check(other)
            except CheckFailed as error:
                told = ", ".join(f"{name}={value}" for name, value in fields.items())
                raise CheckFailed(f"{check.__name__}, in a model with {told}: {error}") from error


def long_streams(trial: Trial) -> None:
    """After 200 segments its outputs are finite, and the same bits as in another run."""
    single = trial.like(dtype=np.float32)
    readers = [single.reader(1), single.reader(1)]
    for number, tokens in enumerate(single.segments(1, MANY_SEGMENTS)):
        a, b = (reader.read(tokens) for reader in readers)
        if not np.isfinite(a).all():
            raise CheckFailed(f"segment {number}: expected finite outputs, got NaN or infinity")
        if a.tobytes() != b.tobytes():
            raise CheckFailed(f"segment {number}: expected the same bits in both runs, got a difference of {np.max(np.abs(a - b)):.3g}")


def every_place_counts(trial: Trial) -> None:
    """What it shows or adds at each site and layer changes the outputs; layers that it does not use are left out by `spec.layers`."""
    *before, tokens = trial.segments(1, 7)
    reader = trial.reader(1)
    for segment in before:
        reader.read(segment)
    whole = reader.copy().read(tokens)
    for kind in ("show", "enter"):
        for site, layer in getattr(reader.run._sites, kind):
            without = reader.copy()
            without.run._sites = sites = copy.copy(reader.run._sites)
            setattr(sites, kind, {place: members for place, members in getattr(sites, kind).items() if place != (site, layer)})
            if np.max(np.abs(without.read(tokens) - whole)) < TOLERANCE:
                raise CheckFailed(f"{site}, layer {layer}: expected other outputs than without what is shown or added there, got the same")


# In a stack


def _stacked(trial: Trial, *, behind: bool) -> Iterator[tuple[str, Memory, Stack]]:
    """By site: the strategy alone, and behind a working memory; with a long-term memory behind it."""
    dims = model_dims(trial.model.config, trial.dtype)
    sites = {site for member in members_of(trial.make()) for site in member.sites(dims)}
    for site in sorted(site for site in sites if dims.layers[site]):
        memory = trial.make()
        yield site, memory, Stack([Newest(site), memory, *([Found(site)] if behind else [])])


def takes_what_is_dropped(trial: Trial) -> None:
    """Behind a working memory it shows something: what that one drops is not lost."""
    memory = trial.make()
    takes = type(memory).absorb is not Memory.absorb or type(memory).write is not Memory.write
    if members_of(memory) != [memory] or not takes:
        return
    for site, _, stack in _stacked(trial, behind=False):
        reader, plain = trial.reader(1, memory=stack), trial.reader(1, memory=Newest(site))
        if not any(i == 1 for members in reader.run._sites.take.values() for i in members):
            continue
        for tokens in trial.segments(1, 8):
            out, other = reader.read(tokens), plain.read(tokens)
        if np.max(np.abs(out - other)) < TOLERANCE:
            raise CheckFailed(f"behind a working memory at {site}: expected other outputs than without it after 8 segments, got the same")


def streams_end(trial: Trial) -> None:
    """`drain`, `flush`, `documents` and `reset` work, alone and in a stack, and reading goes on afterwards."""
    first, *more = trial.segments(1, 5)
    for _, memory, stack in [("", trial.make(), None), *_stacked(trial, behind=True)]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a strategy may drop nothing, so that what is behind it gets no row
            reader = trial.reader(1, memory=memory if stack is None else stack)
            for tokens in more:
                reader.read(tokens)
            reader.run.drain()
            reader.run.flush()
            if not np.isfinite(reader.read(first)).all():
                raise CheckFailed("expected finite outputs after the streams had ended, got NaN or infinity")
        Stack([memory]).documents()
        memory.reset("a document that is not there")


def comes_back_from_disk(trial: Trial) -> None:
    """What a durable strategy has written is there when it is made again from its text, until its document is deleted."""
    memory = trial.make()
    if not memory.durable or memory.text is None:
        return
    *before, tokens = trial.segments(1, 4)
    reader, plain = trial.reader(1, memory=memory), trial.reader(1, without=True)
    for segment in before:
        reader.read(segment)
    reader.run.drain()
    reader.run.flush()
    written, again = memory.documents(), make_memory(memory.text)
    if not written or again.documents() != written:
        raise CheckFailed(f"made again from {memory.text!r}: expected the documents {written or 'that were read'}, got {again.documents()}")
    if np.max(np.abs(trial.reader(1, memory=again).read(tokens) - plain.copy().read(tokens))) < TOLERANCE:
        raise CheckFailed("made again from its text: expected other outputs than without the memory, got the same")
    for name in written:
        again.reset(name)
    if again.documents():
        raise CheckFailed(f"reset: expected no document to be left, got {again.documents()}")
    same("after `reset`", trial.reader(1, memory=make_memory(memory.text)).read(tokens), plain.read(tokens))


# In training and after it


def training_leaves_nothing_else(trial: Trial) -> None:
    """After training, a strategy that is made anew gives the same outputs from the trained weights: nothing that counts is elsewhere."""
    if not trial.model.config.has_decoder:
        return
    single = trial.like(dtype=np.float32)
    memory = single.make()
    _train(Trainer(single.model, memory, learning_rate=1e-2), single, 3)
    trained, anew = Reader(single.model, memory, 1), Reader(single.model, single.make(), 1)
    for tokens in single.segments(1, 4):
        out, other = trained.read(tokens), anew.read(tokens)
        if out.tobytes() != other.tobytes():
            raise CheckFailed(
                f"expected a strategy made anew to give the same outputs, got a difference of {np.max(np.abs(out - other)):.3g}"
            )


def tapes_are_let_go(trial: Trial) -> None:
    """What a training step has recorded is gone when the step is over."""
    if not trial.model.config.has_decoder:
        return
    single = trial.like(dtype=np.float32)
    trainer, alive = Trainer(single.model, single.make()), []
    for steps in (2, 3):
        _train(trainer, single, steps)
        gc.collect()
        alive.append(sum(isinstance(thing, Var) for thing in gc.get_objects()))
    if alive[1] > alive[0]:
        raise CheckFailed(f"expected nothing of a step to be held, got {alive[1] - alive[0]} more recorded values after 3 steps")


def _train(trainer: Trainer, trial: Trial, steps: int) -> None:
    tokens = np.moveaxis(trial.segments(2, 3), 0, 1)
    for _ in range(steps):
        trainer.step(tokens if trial.model.config.has_encoder else None, tokens)


def parameters_are_the_same_everywhere(trial: Trial) -> None:
    """`parameters` gives the same initial values each time, and in another process."""
    memory = trial.make()
    first, again = _digest(memory, trial), _digest(trial.make(), trial)
    if first != again:
        raise CheckFailed("expected the same initial values each time, got others")
    if memory.text is None or not memory_parameters(memory, trial.model.config, trial.dtype):
        return
    elsewhere = _digests_elsewhere(memory.text)
    if elsewhere and elsewhere.get(trial.kind) != first:
        raise CheckFailed("expected the same initial values in another process, got others")


@functools.lru_cache(maxsize=1)  # the kinds of models come one after another, and a process takes a second
def _digests_elsewhere(text: str) -> dict[str, str]:
    """By kind of model, what another process finds; nothing where it cannot make the strategy, which its author has registered here."""
    program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _print_digests; _print_digests(*sys.argv[1:])"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    child = subprocess.run([sys.executable, "-P", "-c", program, text], env=environment, capture_output=True, text=True)
    return json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else {}


def _digest(memory: Memory, trial: Trial) -> str:
    digest = hashlib.sha256()
    for name, param in memory_parameters(memory, trial.model.config, trial.dtype).items():
        digest.update(repr((name, param.shape, param.lr_factor, param.weight_decay)).encode())
        digest.update(np.asarray(param.init, np.float64).tobytes())
    return digest.hexdigest()


def _print_digests(text: str) -> None:
    make = lambda: make_memory(text)  # noqa: E731
    print(json.dumps({kind: _digest(make(), Trial(make, kind)) for kind in kinds_for(make())}))


# Its manners


def arguments_stay_as_they_are(trial: Trial) -> None:
    """No method changes an array that it is given."""
    faults: list[str] = []
    memory = trial.make()
    with contextlib.ExitStack() as watching:
        for member in members_of(memory):
            for method in ("begin", "enter", "view", "read", "write", "absorb", "leave", "end", "logits"):
                if getattr(type(member), method) is not getattr(Memory, method):
                    watched = _watched(method, getattr(member, method), faults)
                    watching.enter_context(mock.patch.object(member, method, watched))
        reader = trial.reader(2, memory=memory)
        for tokens in trial.segments(2, 4):
            reader.read(tokens, [trial.length, trial.length - 2])
    if faults:
        raise CheckFailed(faults[0])


def _watched(method: str, call: Callable[..., Any], faults: list[str]) -> Callable[..., Any]:
    def watched(state: Any, *arguments: Any) -> Any:
        held = [(name, array, array.tobytes()) for number, one in enumerate(arguments) for name, array in _arrays(one, str(number + 1))]
        result = call(state, *arguments)
        faults.extend(
            f"{method}: expected argument {name} to stay as it was, its numbers were changed"
            for name, array, before in held
            if array.tobytes() != before
        )
        return result

    return watched


def _arrays(value: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _arrays(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, np.ndarray | Var):
        yield name, value_of(value)


_asked: list[str] = []  # of the operating system, as Python's audit events tell
_watches = False
ASKING = ("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system", "subprocess.Popen")


def _listen() -> None:
    """An audit hook stays for ever: there is one, which is deaf but for a check."""
    global _watches
    if not _watches:
        sys.addaudithook(lambda event, _: _asked.append(event) if event in ASKING else None)
        _watches = True


def leaves_the_process_alone(trial: Trial) -> None:
    """It draws no numbers from generators that all share, starts no processes or threads, does not sleep, and changes no settings."""
    _listen()
    before, slept = _process(), list[float]()
    _asked.clear()
    with mock.patch.object(time, "sleep", slept.append):
        reader = trial.reader(1)
        for tokens in trial.segments(1, 4):
            reader.read(tokens)
        if trial.model.config.has_decoder:
            single = trial.like(dtype=np.float32)
            _train(Trainer(single.model, single.make()), single, 1)
    after = _process()
    if _asked:
        raise CheckFailed(f"expected no other process to be started, got {_asked[0]}")
    if slept:
        raise CheckFailed(f"expected it not to sleep, got {len(slept)} calls of time.sleep")
    for what in before:
        if before[what] != after[what]:
            raise CheckFailed(f"expected {what} to stay as it was, got {_difference(before[what], after[what])}")


def _process() -> dict[str, Any]:
    return {
        "NumPy's global generator": [str(part) for part in np.random.get_state()],  # noqa: NPY002
        "Python's global generator": random.getstate(),
        "the number of threads of the kernels": _core.get_num_threads(),
        "the number of Python's threads": threading.active_count(),
        "the working folder": os.getcwd(),
        "the environment": dict(os.environ),
        "NumPy's handling of errors": np.geterr(),
        "what Ctrl-C does": signal.getsignal(signal.SIGINT),
    }


def _difference(before: Any, after: Any) -> str:
    return f"{after} for {before}" if isinstance(before, int | str) else "something else"
