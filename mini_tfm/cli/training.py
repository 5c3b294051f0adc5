"""A run of `mini-tfm train`, new or resumed: its processes, Ctrl-C, progress and result."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FileProblem, InvalidValue, MiniTfmError
from ..train.options import FitOptions, TrainerOptions
from .options import values_of
from .shared import Clock, check_out, command_line, count, duration, interrupt_between_steps, none_of, note, print_json, print_table
from .training_data import (
    DATA_FILE,
    PAIRS_A_STEP,
    Sources,
    TrainingData,
    describe_data,
    has_lines,
    n_sentinels,
    read_about,
    resolve_objective,
    take_piped,
)

if TYPE_CHECKING:
    from ..train import Trainer
    from ..train.parallel import Alone

SAVE_EVERY = 200  # steps, where --save-every is not given
SETTLED_FOR = 60.0  # seconds until it is tried again whether one thread is faster
WARMUP_STEPS = 50
BEST = "best"  # the folder of the best model, inside that of the run


def ranks_of_command() -> Alone:
    """The processes that `mpirun` started (only the first one prints), or this process alone."""
    from ..train.parallel import Alone, Ranks, launched

    if not launched():
        return Alone()
    ranks = Ranks(describe=_as_line)
    if ranks.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    return ranks


def _as_line(error: BaseException) -> str:
    """An error that ends all ranks, as one line to print."""
    if isinstance(error, click.ClickException):
        return f"error: {error.format_message()}"
    if isinstance(error, KeyboardInterrupt):
        return f"stopped: {error}".rstrip(": ")
    known = isinstance(error, MiniTfmError | OSError | MemoryError) and os.environ.get("MINI_TFM_DEBUG") != "1"
    return "error: " + " ".join(str(error).splitlines()) if known else "".join(traceback.format_exception(error)).rstrip()


def new_run(out: Path, options: dict[str, Any], shape: dict[str, Any], ranks: Alone) -> tuple[Trainer, TrainingData]:
    """A new model, its trainer and data. Checks as much as possible before the first file is read."""
    from ..config import Config
    from ..memory import memory as make_memory
    from ..text.tokenizers import ByteTokenizer
    from ..train import Trainer
    from ..transformer import Transformer

    check_out(out)
    _refuse_a_model(out)
    memory_text = none_of(options["memory"])
    memory = make_memory(memory_text) if memory_text else None
    shape = {**shape, "segment_length": options["segment_length"]}
    planned = Config(vocab_size=ByteTokenizer.vocab_size, **shape)
    trainer_options = _trainer_options(options)
    if memory is not None and shape["positions"] in ("sinusoidal", "learned"):
        note(
            f"--positions: {shape['positions']} ones begin anew in each segment, so nothing tells how far back the rows of a memory"
            " stand; rotary or relative ones do"
        )
    piped = take_piped(options, out)
    about, objectives = describe_data(options, memory)
    sources = Sources(about, piped)
    about["objective"] = resolve_objective(objectives, sources.kinds, planned.has_encoder)
    if "pairs" in about["objective"] and options["batch_size"] is None:
        about["batch_size"] = PAIRS_A_STEP
    shape["continues_source"] = "next-segment" in about["objective"] and planned.has_decoder
    about["fingerprint"] = sources.fingerprint()
    tokenizer = ByteTokenizer() if options["tokenizer"] == "bytes" else sources.train_tokenizer(options["vocab_size"])
    vocab_size = tokenizer.vocab_size + n_sentinels(about["objective"], options["segment_length"])
    model = Transformer(Config(vocab_size=vocab_size, **shape), seed=options["seed"])
    trainer = Trainer(model, memory, tokenizer=tokenizer, communicator=ranks, **trainer_options.to_dict())
    return trainer, TrainingData(sources, tokenizer, model.config, ranks)


def run_from(out: Path, options: dict[str, Any], given: Collection[str], ranks: Alone) -> tuple[Trainer, TrainingData]:
    """A model that is there, with its tokenizer, its trainer and data. given: the options that were told."""
    from ..generate.limits import segment_limit
    from ..memory import memory as make_memory
    from ..train import Trainer
    from ..transformer import Transformer, load_checkpoint

    check_out(out)
    _refuse_a_model(out)
    base, trainer_options = load_checkpoint(options["base"]), _trainer_options(options)
    model, tokenizer = base.model, base.tokenizer
    if tokenizer is None:
        raise InvalidValue(f"--from: {options['base']} has no tokenizer; put its tokenizer.json beside it")
    model.needs("decoder")
    memory_text = none_of(options["memory"])
    memory = base.memory() if "memory" not in given else make_memory(memory_text) if memory_text else None
    if "segment_length" not in given:
        limit = segment_limit(model.config, None)
        options["segment_length"] = model.config.segment_length or min(options["segment_length"], limit or options["segment_length"])
    if memory is not None or model.config.segment_length is not None:
        config = model.config.replace(segment_length=options["segment_length"])
        model = Transformer(config, weights=model.weights, generation=model.generation)
    if options["lora_rank"] is not None:
        targets = options["lora_targets"]
        model.add_lora(
            options["lora_rank"], options["lora_alpha"], "all-linear" if targets == ("all-linear",) else targets or None, options["seed"]
        )
    piped = take_piped(options, out)
    about, objectives = describe_data(options, memory, new_model=False)
    sources = Sources(about, piped)
    about["objective"] = resolve_objective(objectives, sources.kinds, model.config.has_encoder)
    if "pairs" in about["objective"] and options["batch_size"] is None:
        about["batch_size"] = PAIRS_A_STEP
    needed = tokenizer.vocab_size + n_sentinels(about["objective"], options["segment_length"])
    if needed > model.config.vocab_size:
        raise InvalidValue(
            f"--objective: denoise needs a vocabulary of {needed} ids, the model has {model.config.vocab_size}; choose another objective"
        )
    about["fingerprint"] = sources.fingerprint()
    trainer = Trainer(model, memory, tokenizer=tokenizer, communicator=ranks, **trainer_options.to_dict())
    return trainer, TrainingData(sources, tokenizer, model.config, ranks)


def _refuse_a_model(out: Path) -> None:
    from ..checkpoint.models import check_place

    if (out / "training.json").exists():
        raise FileProblem(f"--out: {out} holds a model already; --resume {out} continues it, or give another folder")
    if there := [name for name in ("config.json", "model.safetensors") if (out / name).exists()]:
        raise FileProblem(f"--out: {out} holds {there[0]} already, which would be lost; give another folder")
    try:
        check_place(out)
    except FileProblem as error:
        raise FileProblem(f"--out: {error}") from None


def _trainer_options(options: dict[str, Any]) -> TrainerOptions:
    given = values_of(TrainerOptions, options)
    if given["warmup_steps"] is None:
        given["warmup_steps"] = min(WARMUP_STEPS, options["steps"] // 4)
    return TrainerOptions.of({**given, "total_steps": options["steps"], "clip": given["clip"] or None})


def resumed_run(
    folder: Path, steps: int | None, early_stopping: dict[str, Any], memory_text: str | None, accept_changes: bool, ranks: Alone
) -> tuple[Trainer, TrainingData]:
    """The saved run and its data, with new options for early stopping. steps: None for the number planned before.

    Raises InvalidValue if the text has changed, unless that is accepted: it would not be the same run.
    """
    from ..memory import memory as make_memory
    from ..train import Trainer

    check_out(folder)
    trainer = Trainer.resume(folder, make_memory(memory_text) if memory_text else None, communicator=ranks)
    about, is_old = read_about(folder / DATA_FILE)
    if trainer.tokenizer is None:
        raise InvalidValue(f"{folder}: has no tokenizer; was it saved by `mini-tfm train`?")
    sources = Sources(about)
    before, about["fingerprint"] = about["fingerprint"], sources.fingerprint()
    changed = before != about["fingerprint"]
    if (changed or is_old) and not accept_changes:
        what = "the text has changed" if changed else "the way batches are made from the text has changed"
        raise InvalidValue(
            f"--resume: {what} since {folder} was trained on it ({sources.name}); start a new run with --text, or continue with the current"
            " text: --accept-changes"
        )
    steps = steps or trainer.options.total_steps or 0
    if steps <= trainer.step_count:
        raise InvalidValue(f"--steps: {folder} has {trainer.step_count} steps already; expected a larger total, got {steps}")
    trainer.options = trainer.options.replace(total_steps=steps, **early_stopping)
    return trainer, TrainingData(sources, trainer.tokenizer, trainer.model.config, ranks, overwrite=changed)


class Pace:
    """Speed of a run since it started or resumed."""

    def __init__(self, trainer: Trainer):
        self._trainer, self._clock = trainer, Clock()
        self._steps, self._tokens = trainer.step_count, trainer.tokens_seen

    @property
    def seconds(self) -> float:
        return self._clock.seconds

    @property
    def tokens_per_second(self) -> float:
        return (self._trainer.tokens_seen - self._tokens) / self.seconds

    def seconds_until(self, step: int) -> float:
        done = self._trainer.step_count
        return self.seconds / (done - self._steps) * (step - done)


def fit(trainer: Trainer, data: TrainingData, out: Path, options: dict[str, Any], as_json: bool, new: bool) -> None:
    """Trains, reports progress on standard error, and prints the result. new: `out` must not hold a model yet.

    Raises KeyboardInterrupt with the command that continues the run.
    """
    ranks, steps = trainer.communicator, trainer.options.total_steps
    parts = f"; {ranks.size} processes" if ranks.size > 1 else ""
    note(f"model: {count(trainer.model.n_parameters)} parameters; memory: {_memory_of(trainer) or 'none'}; to be saved in {out}{parts}")
    if new and ranks.rank == 0:
        _refuse_a_model(out)  # it may have come while the text was read
    threads = _Threads(trainer, data)
    if trainer.step_count < (steps or 0):
        threads.settle()
    pace = Pace(trainer)
    try:
        _fit(trainer, data, out, options, pace, threads)
    except KeyboardInterrupt as stop:
        if trainer.saved is None:
            raise type(stop)(f"no step was saved in {out}") from None
        step, place = trainer.saved
        again = command_line("train", "--resume", place, "--steps", str(steps))
        raise type(stop)(f"step {step} is saved in {place}; continue with\n  {again}") from None
    out = trainer.saved[1] if trainer.saved is not None else out
    if trainer.stopped_early and trainer.best is not None:
        note(
            f"stopped early at step {trainer.step_count}: {trainer.options.early_stopping_patience} validations in a row were no better"
            f" than {trainer.best[1]:.3f} nats/token, at step {trainer.best[0]}"
            + (f"; that model is in {out / BEST}" if trainer.fit_options.save_best else "")
        )
    if ranks.rank == 0:
        result = _result(trainer, data, out, pace)
        if as_json:
            print_json(result)
        else:
            _print_result(result, trainer, data)


class _Threads:
    """One thread where several are slower, as they are on a machine that others keep busy. Results do not depend on it."""

    def __init__(self, trainer: Trainer, data: TrainingData):
        from ..kernels import get_num_threads

        self._trainer, self._data, self._clock = trainer, data, Clock()
        self._many = self._now = get_num_threads()

    def settle_now_and_then(self) -> None:
        if self._clock.seconds > SETTLED_FOR:
            self.settle()

    def settle(self) -> None:
        from ..kernels import set_num_threads

        if self._many == 1 or self._trainer.communicator.size > 1 or not self._data.held_out:
            return
        self._seconds_with(self._many)  # the first call sets up what the others find
        before, self._now = self._now, faster_threads(self._seconds_with, self._many)
        set_num_threads(self._now)
        self._clock = Clock()
        if self._now < before:
            note(f"threads: {self._now}, because {self._many} are slower now; is the machine busy?")
        elif self._now > before:
            note(f"threads: {self._now} again")

    def _seconds_with(self, n: int) -> float:
        from ..kernels import set_num_threads

        set_num_threads(n)
        clock = Clock()
        self._trainer.evaluate(self._data.held_out[0])
        return clock.seconds


def faster_threads(seconds_with: Callable[[int], float], many: int, times: int = 3) -> int:
    """1 if that takes clearly less time than `many` threads, else `many`; the best of some tries in turn, as noise only adds."""
    tries = [(seconds_with(many), seconds_with(1)) for _ in range(times)]
    return 1 if min(one for _, one in tries) < 0.9 * min(all_of_them for all_of_them, _ in tries) else many


def _fit(trainer: Trainer, data: TrainingData, out: Path, options: dict[str, Any], pace: Pace, threads: _Threads) -> None:
    from ..files.folders import write_folder
    from ..train.parallel import StoppedTogether

    ranks = trainer.communicator
    with interrupt_between_steps() as stop_asked:

        def on_step(trainer: Trainer, loss: float) -> None:
            if trainer.validations and trainer.validations[-1][0] == trainer.step_count:
                note(_progress(trainer, data, loss, pace))
                threads.settle_now_and_then()
            if ranks.any(stop_asked()):
                raise StoppedTogether

        ranks.wait()  # every rank has read the folder
        if ranks.rank == 0:
            texts = {Path(path).name: text.encode() for path, text in data.piped.items()}
            write_folder(out, {**texts, DATA_FILE: json.dumps(data.about, indent=2).encode()})
        fit_options = values_of(FitOptions, options)
        fit_options["save_every"] = fit_options["save_every"] or trainer.fit_options.save_every or SAVE_EVERY
        try:
            trainer.fit(
                data.data,
                validation=data.held_out.__getitem__,
                validation_batches=len(data.held_out),
                folder=out,
                seconds=options["seconds"],
                on_step=on_step,
                other_data=options["accept_changes"],
                **fit_options,
            )
        finally:
            if trainer.saved is not None and trainer.saved[1] != out:  # beside a model that came meanwhile
                write_folder(trainer.saved[1], {DATA_FILE: json.dumps(data.about, indent=2).encode()})


def _progress(trainer: Trainer, data: TrainingData, loss: float, pace: Pace) -> str:
    """A line about the last validation."""
    held_out = trainer.validations[-1][1]
    bits = data.bits_per_byte(held_out)
    left = pace.seconds_until(trainer.options.total_steps or trainer.step_count)
    return (
        f"step {trainer.step_count}: loss {loss:.3f}, held out {held_out:.3f} nats/token"
        + (f", {bits:.3f} bits/byte" if bits is not None else "")
        + f"; learning rate {trainer.learning_rate:.2g}, {count(pace.tokens_per_second)} tokens/s, {duration(left)} left"
    )


def _memory_of(trainer: Trainer) -> str | None:
    return trainer.memory.text if trainer.memory is not None else None


def _result(trainer: Trainer, data: TrainingData, out: Path, pace: Pace) -> dict[str, Any]:
    """The command's result, ready for JSON."""
    seconds, speed = pace.seconds, pace.tokens_per_second
    held_out = data.measure(trainer)
    best = trainer.best
    return {
        "folder": str(out),
        "memory": _memory_of(trainer),
        "parameters": trainer.model.n_parameters,
        "steps": trainer.step_count,
        "loss": trainer.losses[-1] if trainer.losses else None,  # there may have been no time for a step
        "held_out_loss": held_out,
        "held_out_bits_per_byte": data.bits_per_byte(held_out),
        "best_step": best[0] if best else None,
        "best_held_out_loss": best[1] if best else None,
        "stopped_early": trainer.stopped_early,
        "tokens_per_second": speed,
        "seconds": seconds,
    }


def _print_result(result: dict[str, Any], trainer: Trainer, data: TrainingData) -> None:
    """A table, and commands to try next."""
    loss, bits, out = result["loss"], result["held_out_bits_per_byte"], result["folder"]
    columns = {
        "model": out,
        "memory": result["memory"] or "none",
        "steps": count(result["steps"]),
        "loss\n(nats/token)": f"{loss:.3f}" if loss is not None else "-",
        "held out\n(bits/byte)": f"{bits:.3f}" if bits is not None else "-",
        "tokens/s": count(result["tokens_per_second"]),
        "time": duration(result["seconds"]),
    }
    print_table([(name, "left" if name in ("model", "memory") else "right") for name in columns], [tuple(columns.values())])
    note("Try next:\n  " + command_line("generate", out, data.prompt, "--do-sample", "--top-p", "0.9"))
    if texts := [path for path in data.files_to_score if not has_lines(path)]:
        note("  " + command_line("score", out, texts[0]) + "  # most of it was trained on: other text tells more")
    note("  " + command_line("train", "--resume", out, "--steps", str(2 * trainer.step_count)))
