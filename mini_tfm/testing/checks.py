"""check_memory, and the table of the checks that every strategy must pass: one function each, in the modules beside this one.

Each takes a `Trial` (a strategy and a kind of model) and raises CheckFailed, saying what was expected and what came.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from functools import partial

from ..errors import InvalidType, InvalidValue
from ..memory.base import Memory
from ..memory.registry import memory as make_memory
from ..memory.run import members_of
from ..memory.text import with_files_in
from ..memory.validate import check_spec
from . import gradients, habits, outputs, topics
from .trial import CheckFailed, Trial, kinds_for


def check_memory(memory: str | Memory | Callable[[], Memory], *, skip: Iterable[str] = (), only: Iterable[str] | None = None) -> None:
    """Runs every check on a strategy: its text ("my_memory:size=8"), a Memory, or a function or class that gives one.

    A file that text names as `path` is left alone: each check has one of its own. For another strategy that keeps a file give a function
    that picks a new file each time: one file cannot serve two models. skip: names of checks that do not apply to this strategy (see
    CHECKS); only: the names of those to run. Raises CheckFailed with all that failed.
    """
    with tempfile.TemporaryDirectory() as files:
        _check(memory, files, skip, only)


def _check(memory: str | Memory | Callable[[], Memory], files: str, skip: Iterable[str], only: Iterable[str] | None) -> None:
    for option, names in (("skip", skip), ("only", only or ())):
        if unknown := sorted(set(names) - set(CHECKS)):
            raise InvalidValue(f"{option}: unknown check {unknown[0]!r}; the checks are {', '.join(CHECKS)}")
    chosen = [name for name in CHECKS if name not in set(skip) and (only is None or name in set(only))]
    try:
        made = _factory(memory, files)()
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit would end the tests of its author
        raise CheckFailed(f"memory: expected a Memory, making one raised {type(error).__name__}: {error}") from error
    if not isinstance(made, Memory):
        raise InvalidType(f"memory: expected a Memory, got {type(made).__name__}")
    for member in members_of(made):
        check_spec(member)
    who = memory if isinstance(memory, str) else made.text or made.name or type(made).__name__
    faults = []
    for kind in kinds_for(made):
        for name in chosen:
            try:
                CHECKS[name](Trial(_factory(memory, files), kind))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit and the like, too
                message = str(error) if isinstance(error, CheckFailed) else f"expected no error, got {type(error).__name__}: {error}"
                faults.append((name, f"  {name} ({kind}): {message}", error))
                if name == "runs":
                    break  # nothing else can be learned
    if faults:
        count = f"{len(faults)} check" + "s" * (len(faults) > 1)
        told, again = "\n".join(message for _, message, _ in faults), f"check_memory(..., only=[{faults[0][0]!r}])"
        raise CheckFailed(f"memory {who!r} fails {count}:\n{told}\none check alone: {again}") from faults[0][2]


def _factory(memory: str | Memory | Callable[[], Memory], files: str) -> Callable[[], Memory]:
    """What makes it; of text, with its files in a new folder in `files`."""
    if isinstance(memory, str):
        return partial(make_memory, with_files_in(tempfile.mkdtemp(dir=files), memory))
    if isinstance(memory, Memory):
        return lambda: memory
    if callable(memory):
        return memory
    raise InvalidType(f"memory: expected text, a Memory or a function that returns a Memory, got {type(memory).__name__}")


# check_memory runs these, in this order. The others make no sense where `runs` fails.
CHECKS: dict[str, Callable[[Trial], None]] = {
    check.__name__: check
    for check in (
        outputs.runs,
        outputs.keeps_the_dtype,
        outputs.has_effect,
        habits.every_place_counts,
        outputs.is_deterministic,
        outputs.text_makes_it_again,
        habits.other_models,
        habits.long_streams,
        outputs.empty_is_nothing,
        outputs.padding_is_ignored,
        outputs.future_is_not_seen,
        outputs.generation_equals_reading,
        outputs.rows_are_independent,
        outputs.rows_pause,
        outputs.reset_forgets,
        outputs.rows_reorder,
        outputs.dump_and_load_go_on,
        outputs.state_is_not_written_into,
        habits.arguments_stay_as_they_are,
        habits.leaves_the_process_alone,
        outputs.capacity_holds,
        outputs.dropped_rows_were_held,
        outputs.stacks,
        habits.takes_what_is_dropped,
        habits.streams_end,
        habits.comes_back_from_disk,
        habits.parameters_are_the_same_everywhere,
        gradients.gradients_are_right,
        gradients.gradient_is_as_declared,
        gradients.parameters_learn,
        gradients.recomputing_gives_the_same,
        gradients.training_resumes,
        habits.training_leaves_nothing_else,
        habits.tapes_are_let_go,
        topics.helps,
    )
}
