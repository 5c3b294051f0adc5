"""`mini-tfm train`: text files -> a model folder."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FileProblem
from .shared import (
    Clock,
    check_out,
    command_line,
    count,
    duration,
    interrupt_between_steps,
    json_option,
    none_of,
    note,
    print_json,
    print_table,
)
from .training_data import Sources, TrainingData, check_about, has_lines, n_sentinels, parse_curriculum, parse_objective, resolve_objective

if TYPE_CHECKING:
    from ..train import Trainer

DATA_FILE = "training_data.json"  # what --resume needs to see the same batches

# The options a resumed run takes from the folder; giving one of them with --resume is refused.
_FIXED = (
    *("files", "more_files", "out", "memory", "tokenizer", "vocab_size", "seed", "segment_length", "n_segments", "batch_size"),
    *("documents", "field", "cache", "objective", "curriculum"),
    *("d_model", "n_heads", "n_encoder_layers", "n_decoder_layers", "d_ff", "positions"),
    *("learning_rate", "schedule", "warmup_steps", "dropout", "source_dropout"),
)


@click.command(short_help="Train a model on text files.")
@click.argument("more_files", nargs=-1, metavar="", type=click.Path(path_type=Path))
@click.option(
    "--text",
    "files",
    multiple=True,
    metavar="FILE...",
    type=click.Path(path_type=Path),
    help="Files (UTF-8): .jsonl, an object a line; .tsv, source and target; others, a document each; default: the documentation inside"
    " Python.",
)
@click.option(
    "--documents",
    default="file",
    show_default=True,
    type=click.Choice(["file", "line"]),
    help="What a document is in a plain text file; an empty line is none.",
)
@click.option("--field", metavar="NAME[,NAME]", help="Of .jsonl: the text's field, or source and target; default: text, or source,target.")
@click.option(
    "--cache",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the tokens of --text in this folder and map them into memory, for text larger than RAM.",
)
@click.option(
    "--out",
    default=Path("mini-tfm-model"),
    show_default=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where the model is saved.",
)
@click.option("--resume", metavar="DIR", type=click.Path(path_type=Path), help="Go on with a model that `train` saved.")
@click.option("--accept-changes", is_flag=True, help="With --resume: go on, although the text has changed.")
@click.option(
    "--memory",
    default="none",
    show_default=True,
    metavar="SPEC",
    help="The memory to train with, as name:option=value,...; stacked with +.",
)
@click.option("--steps", default=1000, show_default=True, type=click.IntRange(1), help="Optimizer steps, in total.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Stop after so many seconds of training.")
@click.option("--segment-length", default=64, show_default=True, metavar="TOKENS", help="Tokens in a segment: what is read at once.")
@click.option(
    "--n-segments", default=4, show_default=True, metavar="SEGMENTS", help="Segments in a stream: how far gradients go through a memory."
)
@click.option(
    "--curriculum", metavar="STEP:SEGMENTS,...", help="Segments that grow with training, as 0:1,500:2,1000:4, instead of --n-segments."
)
@click.option(
    "--objective",
    metavar="NAME[=SHARE]+...",
    help="next-segment, lm (decoder-only), denoise, pairs, or several by share, as next-segment=0.7+denoise=0.3; default: what suits"
    " the files.",
)
@click.option("--batch-size", default=16, show_default=True, metavar="STREAMS", help="Streams in a batch.")
@click.option("--learning-rate", default=2e-3, show_default=True, help="At its peak.")
@click.option(
    "--warmup-steps", type=int, metavar="STEPS", help="Steps until the peak; default: 50, or a quarter of --steps if that is less."
)
@click.option("--schedule", default="cosine", show_default=True, help="cosine (to 0 at --steps) or constant.")
@click.option("--dropout", default=0.0, show_default=True, metavar="SHARE", help="Of embeddings and sublayers.")
@click.option(
    "--source-dropout",
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="Of segments hidden from the decoder, which must ask the memory.",
)
@click.option("--tokenizer", default="bpe", show_default=True, type=click.Choice(["bytes", "bpe"]), help="bpe is learnt from the text.")
@click.option("--vocab-size", default=1024, show_default=True, metavar="TOKENS", help="Tokens of bpe.")
@click.option("--d-model", default=128, show_default=True, help="Width of the model, in numbers a token.")
@click.option("--n-heads", default=4, show_default=True, help="Attention heads.")
@click.option("--n-encoder-layers", default=2, show_default=True, help="0 for a decoder-only model.")
@click.option("--n-decoder-layers", default=2, show_default=True, help="Decoder layers.")
@click.option("--d-ff", type=int, help="Width of the feed-forward layers; default: 4 d_model.")
@click.option("--positions", default="sinusoidal", show_default=True, help="sinusoidal, learned, rotary, relative or none.")
@click.option("--seed", default=0, show_default=True, help="Of weights, batches and the split.")
@click.option(
    "--validate-every",
    default=100,
    show_default=True,
    type=click.IntRange(1),
    metavar="STEPS",
    help="How often the held-out documents are looked at.",
)
@click.option("--save-every", default=200, show_default=True, type=click.IntRange(1), metavar="STEPS", help="How often the run is saved.")
@click.option("--jsonl-log", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Append a line of JSON a step.")
@json_option
@click.pass_context
def train(context: click.Context, /, resume: Path | None, out: Path, as_json: bool, jsonl_log: Path | None, **options: Any) -> None:
    """Trains a Transformer on text, with a memory or without, and saves it in a folder.

    A tenth of the text (whole documents; of a single file, a tenth part; with a cache, lines or pairs, the last tenth) is
    held out, and its bits per byte tell how well the rest was learnt. Ctrl-C saves; --resume goes on, bit for bit. A folder
    that holds a model is never written over.

    \b
    Examples:
      mini-tfm train --text notes/*.txt --out model --steps 2000
      mini-tfm train --memory window:size=256+store --n-segments 6 --out model
      mini-tfm train --text pairs.tsv --n-encoder-layers 2 --out translator
      mini-tfm train --text corpus.jsonl --field body --cache tokens --objective next-segment=0.8+denoise=0.2
      mini-tfm train --curriculum 0:1,500:2,1000:4 --memory recurrent --out model
      mini-tfm train --resume model --steps 4000
    """
    if resume is not None:
        given = [name for name in _FIXED if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
        if given:
            raise click.UsageError(f"--{given[0].replace('_', '-')} comes from the folder with --resume; leave it out")
        out = resume
        if context.get_parameter_source("steps") is not click.core.ParameterSource.COMMANDLINE:
            options["steps"] = None
    elif options["accept_changes"]:
        raise click.UsageError("--accept-changes is for --resume")
    if options["curriculum"] and context.get_parameter_source("n_segments") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--n-segments: --curriculum says how many; leave one of the two out")
    if jsonl_log is not None and not jsonl_log.absolute().parent.is_dir():
        raise FileProblem(f"--jsonl-log: {jsonl_log.parent} is not a folder")
    try:
        trainer, run = _begun(out, options) if resume is None else _resumed(resume, options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("training had not begun; nothing is changed") from None
    options["steps"] = trainer.options["total_steps"]
    _fit(trainer, run, out, options, jsonl_log, as_json)


def _begun(out: Path, options: dict[str, Any]) -> tuple[Trainer, TrainingData]:
    """A new model. All that can be wrong is found before the first file is read, or soon after."""
    from ..config import Config
    from ..memory import memory as make_memory
    from ..model import Transformer
    from ..tokenizer import ByteTokenizer
    from ..train import Trainer

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
    faultless = Config(vocab_size=259, **architecture)  # faults before work
    asked, stages = parse_objective(options["objective"]), parse_curriculum(options["curriculum"])
    about = {name: options[name] for name in ("documents", "segment_length", "n_segments", "batch_size", "seed")}
    about |= {
        "files": [str(path.resolve()) for path in (*options["files"], *options["more_files"])],
        "fields": options["field"].split(",") if options["field"] else None,
        "cache": str(options["cache"].resolve()) if options["cache"] else None,
        "curriculum": stages,
    }
    if stages:
        about["n_segments"] = stages[-1][1]
    sources = Sources(about)
    about["objective"] = resolve_objective(asked, sources.kinds, faultless.has_encoder)
    about["fingerprint"] = sources.fingerprint()
    tokenizer = ByteTokenizer() if options["tokenizer"] == "bytes" else sources.train_tokenizer(options["vocab_size"])
    vocab_size = tokenizer.vocab_size + n_sentinels(about["objective"], options["segment_length"])
    model = Transformer(Config(vocab_size=vocab_size, **architecture), seed=options["seed"])
    trainer = Trainer(
        model,
        memory,
        tokenizer=tokenizer,
        total_steps=options["steps"],
        **{name: options[name] for name in ("learning_rate", "schedule", "warmup_steps", "dropout", "source_dropout", "seed")},
    )
    return trainer, TrainingData(sources, tokenizer, model.config)


def _resumed(folder: Path, options: dict[str, Any]) -> tuple[Trainer, TrainingData]:
    """The saved run, on the same text: another one would not be the same run, and must be asked for."""
    from ..checkpoint import read_json_strict
    from ..errors import InvalidValue
    from ..train import Trainer

    check_out(folder)
    trainer = Trainer.resume(folder)
    about = read_json_strict(folder / DATA_FILE)
    check_about(about, str(folder / DATA_FILE))
    if trainer.tokenizer is None:
        raise InvalidValue(f"{folder}: has no tokenizer; was it saved by `mini-tfm train`?")
    sources = Sources(about)
    fingerprint = sources.fingerprint()
    changed = fingerprint != about["fingerprint"]
    if changed and not options["accept_changes"]:
        raise InvalidValue(
            f"--resume: the text has changed since {folder} was trained on it ({sources.name}); start anew with --text, or go on with"
            " the new text: --accept-changes"
        )
    about["fingerprint"] = fingerprint
    planned: Any = trainer.options["total_steps"]
    steps: int = options["steps"] or planned or 0
    if steps <= trainer.step_count:
        raise InvalidValue(f"--steps: {folder} has {trainer.step_count} steps already; expected more in total, got {steps}")
    trainer.options["total_steps"] = steps
    return trainer, TrainingData(sources, trainer.tokenizer, trainer.model.config, overwrite=changed)


def _fit(trainer: Trainer, run: TrainingData, out: Path, options: dict[str, Any], jsonl_log: Path | None, as_json: bool) -> None:
    from ..checkpoint import write_folder

    memory = trainer.memory.text if trainer.memory is not None else None
    note(f"model: {count(trainer.model.n_parameters)} parameters; memory: {memory or 'none'}; saved in {out}")
    clock, tokens_before = Clock(), trainer.tokens_seen
    measured: tuple[float, float | None] | None = None

    with contextlib.ExitStack() as stack, interrupt_between_steps() as stop_if_asked:
        log = stack.enter_context(open(jsonl_log, "a", encoding="utf-8")) if jsonl_log is not None else None

        def on_step(trainer: Trainer, loss: float) -> None:
            nonlocal measured
            line: dict[str, float | None] = {
                "step": trainer.step_count,
                "loss": loss,
                "learning_rate": trainer.learning_rate,
                "tokens": trainer.tokens_seen,
                "seconds": clock.seconds,
            }
            if trainer.step_count % options["validate_every"] == 0:
                measured = run.measure(trainer)
                line |= {"held_out_loss": measured[0], "held_out_bits_per_byte": measured[1]}
                bits = f", {measured[1]:.3f} bits/byte" if measured[1] is not None else ""
                note(f"step {trainer.step_count}: loss {loss:.3f}, held out {measured[0]:.3f} nats/token{bits}")
            if log is not None:
                log.write(json.dumps(line) + "\n")
                log.flush()
            stop_if_asked()

        try:
            write_folder(out, {DATA_FILE: json.dumps(run.about, indent=2).encode()})
            trainer.fit(
                run.data,
                options["steps"],
                folder=out,
                save_every=options["save_every"],
                seconds=options["seconds"],
                on_step=on_step,
                other_data=options["accept_changes"],
            )
        except KeyboardInterrupt:
            again = command_line("train", "--resume", out, "--steps", str(options["steps"]))
            raise KeyboardInterrupt(f"step {trainer.step_count} is saved in {out}; go on with\n  {again}") from None
    seconds = clock.seconds
    measured = run.measure(trainer)  # after the last step
    loss = trainer.losses[-1] if trainer.losses else None  # there was no time for a step
    speed = (trainer.tokens_seen - tokens_before) / seconds
    answer = {
        "folder": str(out),
        "memory": memory,
        "parameters": trainer.model.n_parameters,
        "steps": trainer.step_count,
        "loss": loss,
        "held_out_loss": measured[0],
        "held_out_bits_per_byte": measured[1],
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
                f"{measured[1]:.3f}" if measured[1] is not None else "-",
                count(speed),
                duration(seconds),
            )
        ],
    )
    note("Try next:\n  " + command_line("generate", out, "The", "--do-sample", "--top-p", "0.9"))
    if texts := [path for path in run.about["files"] if not has_lines(path)]:
        note("  " + command_line("score", out, texts[0]))
    note("  " + command_line("train", "--resume", out, "--steps", str(2 * trainer.step_count)))
