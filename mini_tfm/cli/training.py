"""A run of `mini-tfm train`: begun or resumed, its processes, Ctrl-C, what is told."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FileProblem, InvalidValue, MiniTfmError
from .shared import Clock, check_out, command_line, count, duration, interrupt_between_steps, none_of, note, print_json, print_table
from .training_data import DATA_FILE, Sources, TrainingData, asked_for, has_lines, n_sentinels, read_about, resolve_objective

if TYPE_CHECKING:
    from ..train import Trainer
    from ..train.parallel import Alone

SAVE_EVERY = 200  # steps, unless a run is told otherwise
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


def begun(out: Path, options: dict[str, Any], ranks: Alone) -> tuple[Trainer, TrainingData]:
    """A new model. All that can be wrong is found before the first file is read, or soon after."""
    from ..config import Config
    from ..memory import memory as make_memory
    from ..text.tokenizers import ByteTokenizer
    from ..train import Trainer
    from ..transformer import Transformer

    check_out(out)
    if options["warmup_steps"] is None:
        options["warmup_steps"] = min(50, options["steps"] // 4)
    if any((out / name).exists() for name in ("config.json", "model.safetensors")):
        raise FileProblem(f"--out: {out} holds a model already; --resume {out} goes on with it, or give another folder")
    text = none_of(options["memory"])
    memory = make_memory(text) if text else None
    architecture = {
        name: options[name]
        for name in ("d_model", "n_heads", "n_encoder_layers", "n_decoder_layers", "d_ff", "positions", "segment_length")
    }
    has_encoder = Config(vocab_size=259, **architecture).has_encoder  # faults before work
    about, asked = asked_for(options)
    sources = Sources(about)
    about["objective"] = resolve_objective(asked, sources.kinds, has_encoder)
    about["fingerprint"] = sources.fingerprint()
    tokenizer = ByteTokenizer() if options["tokenizer"] == "bytes" else sources.train_tokenizer(options["vocab_size"])
    vocab_size = tokenizer.vocab_size + n_sentinels(about["objective"], options["segment_length"])
    model = Transformer(Config(vocab_size=vocab_size, **architecture), seed=options["seed"])
    trainer = Trainer(
        model,
        memory,
        tokenizer=tokenizer,
        total_steps=options["steps"],
        clip=options["max_grad_norm"] or None,
        early_stopping_patience=options["early_stopping_patience"],
        early_stopping_threshold=options["early_stopping_threshold"] or 0.0,
        communicator=ranks,
        **{name: options[name] for name in ("learning_rate", "schedule", "warmup_steps", "dropout", "source_dropout", "seed")},
        **{name: options[name] for name in ("attention_dropout", "ff_dropout", "weight_decay", "label_smoothing")},
        **{name: options[name] for name in ("bptt_segments", "recompute", "bfloat16", "gradient_accumulation_steps")},
    )
    trainer.fit_options["save_every"] = SAVE_EVERY
    return trainer, TrainingData(sources, tokenizer, model.config, ranks)


def resumed(folder: Path, options: dict[str, Any], ranks: Alone) -> tuple[Trainer, TrainingData]:
    """The saved run, on the same text: another one would not be the same run, and must be asked for."""
    from ..train import Trainer

    check_out(folder)
    trainer = Trainer.resume(folder, communicator=ranks)
    about, is_old = read_about(folder / DATA_FILE)
    if trainer.tokenizer is None:
        raise InvalidValue(f"{folder}: has no tokenizer; was it saved by `mini-tfm train`?")
    sources = Sources(about)
    before, about["fingerprint"] = about["fingerprint"], sources.fingerprint()
    changed = before != about["fingerprint"]
    if (changed or is_old) and not options["accept_changes"]:
        what = "the text has changed" if changed else "what batches are made of the text has changed"
        raise InvalidValue(
            f"--resume: {what} since {folder} was trained on it ({sources.name}); start anew with --text, or go on with what it is now:"
            " --accept-changes"
        )
    planned: Any = trainer.options["total_steps"]
    steps: int = options["steps"] or planned or 0
    if steps <= trainer.step_count:
        raise InvalidValue(f"--steps: {folder} has {trainer.step_count} steps already; expected more in total, got {steps}")
    trainer.options["total_steps"] = steps
    trainer.fit_options["save_every"] = trainer.fit_options["save_every"] or SAVE_EVERY  # 0.1.0 did not keep it
    for name in ("early_stopping_patience", "early_stopping_threshold"):
        if options[name] is not None:
            trainer.options[name] = options[name]
    return trainer, TrainingData(sources, trainer.tokenizer, trainer.model.config, ranks, overwrite=changed)


def fit(trainer: Trainer, data: TrainingData, out: Path, options: dict[str, Any], as_json: bool) -> None:
    """Trains, with what the run is told on standard error and in the folder, and gives the answer.

    Raises KeyboardInterrupt that tells how to go on.
    """
    from ..files.folders import write_folder
    from ..train.parallel import StoppedTogether
    from ..train.run_folder import BEST

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
                bits = data.bits_per_byte(looks[-1][1])
                note(
                    f"step {step}: loss {loss:.3f}, held out {looks[-1][1]:.3f} nats/token"
                    + (f", {bits:.3f} bits/byte" if bits is not None else "")
                    + f"; rate {trainer.learning_rate:.2g}, {count(speed)} tokens/s, {duration(left)} left"
                )
            if ranks.any(stop_asked()):
                raise StoppedTogether

        try:
            ranks.wait()  # nobody looks at the folder any more
            if ranks.rank == 0:
                write_folder(out, {DATA_FILE: json.dumps(data.about, indent=2).encode()})
            trainer.fit(
                data.data,
                options["steps"],
                validation=data.held_out.__getitem__,
                validation_batches=len(data.held_out),
                folder=out,
                seconds=options["seconds"],
                on_step=on_step,
                other_data=options["accept_changes"],
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
        _tell(trainer, data, out, clock.seconds, tokens_before, as_json)


def _tell(trainer: Trainer, data: TrainingData, out: Path, seconds: float, tokens_before: int, as_json: bool) -> None:
    memory = trainer.memory.text if trainer.memory is not None else None
    held_out = data.measure(trainer)  # after the last step
    bits = data.bits_per_byte(held_out)
    loss = trainer.losses[-1] if trainer.losses else None  # there was no time for a step
    speed = (trainer.tokens_seen - tokens_before) / seconds
    best = trainer.best
    answer = {
        "folder": str(out),
        "memory": memory,
        "parameters": trainer.model.n_parameters,
        "steps": trainer.step_count,
        "loss": loss,
        "held_out_loss": held_out,
        "held_out_bits_per_byte": bits,
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
                f"{bits:.3f}" if bits is not None else "-",
                count(speed),
                duration(seconds),
            )
        ],
    )
    note("Try next:\n  " + command_line("generate", out, "The", "--do-sample", "--top-p", "0.9"))
    if texts := [path for path in data.about["files"] if not has_lines(path)]:
        note("  " + command_line("score", out, texts[0]))
    note("  " + command_line("train", "--resume", out, "--steps", str(2 * trainer.step_count)))
