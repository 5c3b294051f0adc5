"""`mini-tfm train`: text files -> a model folder. Defines the options; training.py runs it, training_data.py makes its data."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import click

from ..config import Config
from ..errors import FileProblem
from ..train.options import FitOptions, TrainerOptions
from .options import options_of, values_of
from .shared import json_option
from .training import SAVE_EVERY, WARMUP_STEPS, fit, new_run, ranks_of_command, resumed_run, run_from
from .training_data import MOST_SEGMENTS, PAIRS_A_STEP, SEGMENTS_A_STEP

SHAPE = ("d_model", "n_heads", "n_encoder_layers", "n_decoder_layers", "d_ff", "positions")
POSITIONS = "rotary"  # unlike the paper's, they tell how far back the rows of a memory stand
EARLY_STOPPING = ("early_stopping_patience", "early_stopping_threshold")
# A resumed run takes everything else from its folder; giving it with --resume is an error.
_FREE_ON_RESUME = (
    *("resume", "memory", "steps", "seconds", "accept_changes", "as_json", *EARLY_STOPPING),
    *(field.name for field in dataclasses.fields(FitOptions)),
)


@click.command(short_help="Train a model on text files.")
@click.argument("more_files", nargs=-1, metavar="", type=click.Path(path_type=Path))
@click.option(
    "--text",
    "files",
    multiple=True,
    metavar="FILE...",
    type=click.Path(path_type=Path),
    help="Text files (UTF-8; - is standard input). .jsonl: one object per line; .tsv: source and target; any other: one document"
    " per file. Default: Python's own documentation.",
)
@click.option(
    "--documents",
    default="file",
    show_default=True,
    type=click.Choice(["file", "line"]),
    help="What counts as a document in a plain text file: the whole file, or each line that is not empty.",
)
@click.option(
    "--field", metavar="NAME[,NAME]", help="Field of .jsonl objects to read, or source and target; default: text, or source,target."
)
@click.option(
    "--cache",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Store the tokens of --text in this folder and map them into memory: for text larger than RAM.",
)
@click.option(
    "--out", default=Path("mini-tfm-model"), show_default=True, metavar="DIR", type=click.Path(path_type=Path), help="Save the model here."
)
@click.option(
    "--from",
    "base",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Start from the model and the tokenizer in this folder, ours or Hugging Face's, or GGUF file, which stays as it is.",
)
@click.option(
    "--lora-rank", type=click.IntRange(1), metavar="ROWS", help="With --from: train new LoRA adapters of this rank beside frozen weights."
)
@click.option(
    "--lora-alpha",
    type=click.FloatRange(0, min_open=True),
    default=16,
    show_default=True,
    help="What an adapter adds counts for alpha / rank.",
)
@click.option(
    "--lora-targets",
    multiple=True,
    metavar="NAME",
    help="End of the names of layers that get an adapter, such as q_proj, or all-linear; can be repeated. Default: q and v of attention.",
)
@click.option("--resume", metavar="DIR", type=click.Path(path_type=Path), help="Continue the run in this folder.")
@click.option("--accept-changes", is_flag=True, help="With --resume: continue even if the text or its batches have changed.")
@click.option(
    "--memory",
    default="none",
    show_default=True,
    metavar="SPEC",
    help="The memory to train with, as name:option=value,...; stack several with +. With --from: default: the model's own. With"
    " --resume: only needed if it is not built in.",
)
@click.option("--steps", default=1000, show_default=True, type=click.IntRange(1), help="Optimizer steps in total.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Stop after this many seconds of training.")
@click.option("--segment-length", default=64, show_default=True, metavar="TOKENS", help="Tokens per segment, processed at once.")
@click.option(
    "--n-segments",
    type=click.IntRange(1),
    metavar="SEGMENTS",
    help=f"Segments per stream: how far a memory reaches, and gradients flow, in training. Default: 1 without a memory;"
    f" else enough to fill it, at most {MOST_SEGMENTS}, and fewer in the first two thirds of the steps.",
)
@click.option(
    "--curriculum",
    metavar="STEP:SEGMENTS,...",
    help="Change the number of segments per stream at these steps, as in 0:1,500:2,1000:4; replaces --n-segments.",
)
@click.option(
    "--objective",
    metavar="NAME[=SHARE]+...",
    help="next-segment, lm (decoder-only), denoise or pairs; or a mixture: next-segment=0.7+denoise=0.3. Default: depends on the files.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    metavar="STREAMS",
    help=f"Streams per batch. Default: so many that a batch has {SEGMENTS_A_STEP} segments; {PAIRS_A_STEP} pairs.",
)
@click.option("--tokenizer", default="bpe", show_default=True, type=click.Choice(["bytes", "bpe"]), help="bpe is trained on the text.")
@click.option("--vocab-size", default=1024, show_default=True, metavar="TOKENS", help="Vocabulary size of bpe.")
@options_of(Config, SHAPE, positions={"default": POSITIONS})
@click.option("--seed", default=0, show_default=True, help="Seed of weights, batches, dropout and the held-out split.")
@options_of(
    TrainerOptions,
    learning_rate={"default": 2e-3},
    warmup_steps={
        "default": None,
        "help": f"Steps over which the learning rate rises; default: {WARMUP_STEPS}, or a quarter of --steps if that is less.",
    },
    clip={"flag": "--max-grad-norm", "help": "Scale down gradients with a larger norm; 0: no limit."},
)
@options_of(FitOptions, keeps=True, save_every={"show_default": str(SAVE_EVERY)})
@json_option
@click.pass_context
def train(context: click.Context, /, resume: Path | None, out: Path, as_json: bool, **options: Any) -> None:
    """Trains a Transformer on text, with or without a memory, and saves it in a folder.

    A tenth of the text is held out to measure bits per byte: whole documents; for a single file, its last part; with --cache,
    lines or pairs, the last tenth. Ctrl-C saves the run. --resume continues it, bit for bit, with the same options. A folder
    that holds a model is never overwritten. Under mpirun all processes train one model, each on its share of every batch.

    On plain text the model learns to continue it: an encoder-decoder (the default) reads a segment and predicts the next
    one. A window then lowers bits per byte in a decoder-only model (--n-encoder-layers 0). In an encoder-decoder knn_lm does, which
    needs no training, and a window only after long training.

    \b
    Examples:
      mini-tfm train --text notes/*.txt --out model --steps 2000
      mini-tfm train --memory window:size=256+store --out model
      mini-tfm train --text pairs.tsv --n-encoder-layers 2 --out translator
      mini-tfm train --text corpus.jsonl --field body --cache tokens --objective next-segment=0.8+denoise=0.2
      mini-tfm train --curriculum 0:1,500:2,1000:4 --memory recurrent --out model
      mini-tfm train --from published --text notes/*.txt --memory recurrent --trainable 'memory.*' --out model
      mini-tfm train --from published --text notes/*.txt --lora-rank 8 --out model
      mini-tfm train --resume model --steps 4000
      mpirun -n 4 mini-tfm train --text notes/*.txt --out model
    """
    given = _given(context)
    from ..files.folders import claimed

    ranks = ranks_of_command()
    with contextlib.ExitStack() as claim, ranks.together():
        _check_usage(options, given, resume)
        if ranks.rank == 0:
            claim.enter_context(claimed(resume or out))
        try:
            if resume is not None:
                early_stopping = {name: options[name] for name in EARLY_STOPPING if name in given}
                steps = options["steps"] if "steps" in given else None
                memory_text = options["memory"] if "memory" in given else None
                trainer, data = resumed_run(resume, steps, early_stopping, memory_text, options["accept_changes"], ranks)
            elif options["base"] is not None:
                trainer, data = run_from(out, options, given, ranks)
            else:
                trainer, data = new_run(out, options, {name: options[name] for name in SHAPE}, ranks)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("training had not begun; nothing is changed") from None
        fit(trainer, data, resume or out, options, as_json, new=resume is None)


def _given(context: click.Context) -> dict[str, str]:
    """The parameters given on the command line: name -> its spelling there."""
    written = {each.name: each.opts[0] if isinstance(each, click.Option) else "--text" for each in context.command.params if each.name}
    source = click.core.ParameterSource.COMMANDLINE
    return {name: option for name, option in written.items() if context.get_parameter_source(name) is source}


def _check_usage(options: dict[str, Any], given: dict[str, str], resume: Path | None) -> None:
    """Raises an error for options that do not go together and for values out of range, before any work."""
    if resume is not None and (fixed := [name for name in given if name not in _FREE_ON_RESUME]):
        raise click.UsageError(f"{given[fixed[0]]} comes from the folder with --resume; leave it out")
    if resume is None and options["accept_changes"]:
        raise click.UsageError("--accept-changes needs --resume")
    if options["base"] is not None and (fixed := [name for name in given if name in (*SHAPE, "tokenizer", "vocab_size")]):
        raise click.UsageError(f"{given[fixed[0]]} comes from the model with --from; leave it out")
    if options["lora_rank"] is not None and options["base"] is None:
        raise click.UsageError("--lora-rank needs --from: adapters go beside the weights of a model that is there")
    if options["lora_rank"] is None and (alone := [name for name in ("lora_alpha", "lora_targets") if name in given]):
        raise click.UsageError(f"{given[alone[0]]} needs --lora-rank")
    if options["curriculum"] is not None and "n_segments" in given:
        raise click.UsageError("give --n-segments or --curriculum, not both")
    FitOptions.of({name: value for name, value in values_of(FitOptions, options).items() if value is not None})
    for name in ("jsonl_log", "csv_log", "tensorboard_log"):
        if options[name] is not None and not options[name].absolute().parent.is_dir():
            raise FileProblem(f"{given[name]}: {options[name].parent} is not a folder")
