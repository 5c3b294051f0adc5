"""What `mini-tfm train` does when model and data are there: processes, Ctrl-C, what is told."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import MiniTfmError
from .shared import Clock, command_line, count, duration, interrupt_between_steps, note, print_json, print_table

if TYPE_CHECKING:
    from ..train import Trainer
    from ..train.parallel import Alone
    from .train import _Run

DATA_FILE = "training_data.json"  # what --resume needs to see the same batches
_TOLD_TO_FIT = ("validate_every", "save_every", "save_total_limit", "save_best", "jsonl_log", "csv_log", "tensorboard_log")


def ranks_of_command() -> Alone:
    """The processes that `mpirun` started, of which only the first says anything; else this one alone."""
    from ..train.parallel import Alone, Ranks, launched

    if not launched():
        return Alone()
    ranks = Ranks(tell=_as_line)
    if ranks.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    return ranks


def _as_line(error: BaseException) -> str:
    """An error that ends all ranks, as the command line tells errors."""
    if isinstance(error, click.ClickException):
        return f"error: {error.format_message()}"
    if isinstance(error, KeyboardInterrupt):
        return f"stopped: {error}".rstrip(": ")
    known = isinstance(error, MiniTfmError | OSError | MemoryError) and os.environ.get("MINI_TFM_DEBUG") != "1"
    return "error: " + " ".join(str(error).splitlines()) if known else "".join(traceback.format_exception(error)).rstrip()


def fit(trainer: Trainer, run: _Run, out: Path, options: dict[str, Any], as_json: bool) -> None:
    """Trains, with what the run is told on standard error and in the folder, and gives the answer.

    Raises KeyboardInterrupt that tells how to go on.
    """
    from ..checkpoint import write_folder
    from ..train.parallel import StoppedTogether
    from ..train.saved import BEST

    memory, ranks = trainer.memory.text if trainer.memory is not None else None, trainer.communicator
    parts = f"; {ranks.size} processes" if ranks.size > 1 else ""
    note(f"model: {count(trainer.model.n_parameters)} parameters; memory: {memory or 'none'}; saved in {out}{parts}")
    clock, tokens_before, steps_before = Clock(), trainer.tokens_seen, trainer.step_count

    with interrupt_between_steps() as stop_asked:

        def on_step(trainer: Trainer, loss: float) -> None:
            step, looks = trainer.step_count, trainer.validations
            if looks and looks[-1][0] == step:
                speed = (trainer.tokens_seen - tokens_before) / clock.seconds
                left = clock.seconds / (step - steps_before) * (options["steps"] - step)
                found = looks[-1][1]
                note(
                    f"step {step}: loss {loss:.3f}, held out {found:.3f} nats/token, {run.bits_per_byte(found):.3f} bits/byte;"
                    f" rate {trainer.learning_rate:.2g}, {count(speed)} tokens/s, {duration(left)} left"
                )
            if ranks.any(stop_asked()):
                raise StoppedTogether

        try:
            ranks.wait()  # nobody looks at the folder any more
            if ranks.rank == 0:
                write_folder(out, {DATA_FILE: json.dumps(run.about, indent=2).encode()})
            trainer.fit(
                run.data,
                options["steps"],
                validation=run.held_out.__getitem__ if run.held_out is not None else None,
                folder=out,
                seconds=options["seconds"],
                on_step=on_step,
                **{name: options[name] for name in _TOLD_TO_FIT},
            )
        except KeyboardInterrupt as stop:
            again = command_line("train", "--resume", out, "--steps", str(options["steps"]))
            raise type(stop)(f"step {trainer.step_count} is saved in {out}; go on with\n  {again}") from None
    if trainer.stopped_early and trainer.best is not None:
        note(
            f"stopped early at step {trainer.step_count}: {trainer.options['early_stopping_patience']} looks in a row at the held-out"
            f" documents found nothing better than {trainer.best[1]:.3f} nats/token, at step {trainer.best[0]}"
            + (f"; that model is in {out / BEST}" if trainer.fit_options["save_best"] else "")
        )
    if ranks.rank == 0:
        _tell(trainer, run, out, clock.seconds, tokens_before, as_json)


def _tell(trainer: Trainer, run: _Run, out: Path, seconds: float, tokens_before: int, as_json: bool) -> None:
    memory = trainer.memory.text if trainer.memory is not None else None
    measured = run.measure(trainer)  # after the last step
    loss = trainer.losses[-1] if trainer.losses else None  # there was no time for a step
    speed = (trainer.tokens_seen - tokens_before) / seconds
    best = trainer.best
    answer = {
        "folder": str(out),
        "memory": memory,
        "parameters": trainer.model.n_parameters,
        "steps": trainer.step_count,
        "loss": loss,
        "held_out_loss": measured[0] if measured else None,
        "held_out_bits_per_byte": measured[1] if measured else None,
        "best_step": best[0] if best else None,
        "best_held_out_loss": best[1] if best else None,
        "stopped_early": trainer.stopped_early,
        "tokens_per_second": speed,
        "seconds": seconds,
    }
    if as_json:
        print_json(answer)
        return
    print_table(
        [
            ("model", "left"),
            ("memory", "left"),
            ("steps", "right"),
            ("loss\n(nats/token)", "right"),
            ("held out\n(bits/byte)", "right"),
            ("tokens/s", "right"),
            ("time", "right"),
        ],
        [
            (
                str(out),
                memory or "none",
                count(trainer.step_count),
                f"{loss:.3f}" if loss is not None else "-",
                f"{measured[1]:.3f}" if measured else "-",
                count(speed),
                duration(seconds),
            )
        ],
    )
    note("Try next:\n  " + command_line("generate", out, "The", "--do-sample", "--top-p", "0.9"))
    if run.about["files"]:
        note("  " + command_line("score", out, run.about["files"][0]))
    note("  " + command_line("train", "--resume", out, "--steps", str(2 * trainer.step_count)))
