"""`mini-tfm train`: text files -> a model folder. What it may be told; training.py is what it does, training_data.py on what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import FileProblem
from .shared import json_option
from .training import begun, fit, ranks_of_command, resumed

# The options a resumed run takes from the folder; giving one of them with --resume is refused.
_FIXED = (
    *("files", "more_files", "out", "memory", "tokenizer", "vocab_size", "seed", "segment_length", "n_segments", "batch_size"),
    *("documents", "field", "cache", "objective", "curriculum"),
    *("d_model", "n_heads", "n_encoder_layers", "n_decoder_layers", "d_ff", "positions"),
    *("learning_rate", "schedule", "warmup_steps", "dropout", "attention_dropout", "ff_dropout", "source_dropout"),
    *("weight_decay", "max_grad_norm", "label_smoothing", "bptt_segments", "recompute", "bfloat16"),
    "gradient_accumulation_steps",
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
@click.option("--accept-changes", is_flag=True, help="With --resume: go on, although the text, or what is made of it, has changed.")
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
@click.option("--schedule", default="cosine", show_default=True, help="cosine or linear (to 0 at --steps), inverse_sqrt or constant.")
@click.option("--weight-decay", default=0.01, show_default=True, help="Decoupled, of matrices.")
@click.option(
    "--max-grad-norm", default=1.0, show_default=True, metavar="NORM", help="A gradient with a larger norm is scaled down; 0: no limit."
)
@click.option(
    "--gradient-accumulation-steps",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    metavar="PARTS",
    help="Cut each batch into so many parts, one after the other: less RAM, the same step.",
)
@click.option(
    "--dropout", default=0.0, show_default=True, metavar="SHARE", help="Of embeddings, sublayers, attention weights and hidden layers."
)
@click.option("--attention-dropout", type=float, metavar="SHARE", help="Of attention weights; default: --dropout.")
@click.option("--ff-dropout", type=float, metavar="SHARE", help="Of the feed-forward's hidden layer; default: --dropout.")
@click.option(
    "--source-dropout",
    default=0.0,
    show_default=True,
    metavar="SHARE",
    help="Of segments hidden from the decoder, which must ask the memory.",
)
@click.option("--label-smoothing", default=0.0, show_default=True, metavar="SHARE", help="Of the probability, for all other tokens.")
@click.option(
    "--bptt-segments",
    type=click.IntRange(1),
    metavar="SEGMENTS",
    help="Gradients stop after so many segments; default: they go through all of a stream.",
)
@click.option(
    "--recompute", is_flag=True, help="Compute a segment again for its gradient: the same bits, in the RAM of one segment, for more time."
)
@click.option(
    "--bfloat16",
    is_flag=True,
    help="Factors of matrix products rounded to bfloat16: twice as fast where the processor has such products.",
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
    show_default="100",
    type=click.IntRange(1),
    metavar="STEPS",
    help="How often the held-out documents are looked at.",
)
@click.option(
    "--early-stopping-patience",
    type=click.IntRange(1),
    metavar="TIMES",
    help="Stop when so many looks in a row at the held-out documents find nothing better.",
)
@click.option(
    "--early-stopping-threshold",
    type=click.FloatRange(0),
    show_default="0",
    metavar="NATS",
    help="By how much a loss must be below the best to be better.",
)
@click.option("--save-every", show_default="200", type=click.IntRange(1), metavar="STEPS", help="How often the run is saved.")
@click.option(
    "--save-total-limit",
    type=click.IntRange(0),
    show_default="0",
    metavar="MODELS",
    help="Keep the models of so many of the last saves as well, in DIR/checkpoint-STEP.",
)
@click.option("--save-best", is_flag=True, default=None, help="Keep the model that is best on the held-out documents, in DIR/best.")
@click.option("--jsonl-log", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Append a line of JSON a step.")
@click.option("--csv-log", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Append a line of CSV a step.")
@click.option(
    "--tensorboard-log", metavar="LOGDIR", type=click.Path(path_type=Path, file_okay=False), help="Write event files for TensorBoard."
)
@json_option
@click.pass_context
def train(context: click.Context, /, resume: Path | None, out: Path, as_json: bool, **options: Any) -> None:
    """Trains a Transformer on text, with a memory or without, and saves it in a folder.

    A tenth of the text (whole documents; of a single file, a tenth part; with a cache, lines or pairs, the last tenth) is
    held out, and its bits per byte tell how well the rest was learnt. Ctrl-C saves; --resume goes on, bit for bit, with all
    that the run was told. A folder that holds a model is never written over. Under mpirun all processes train one model,
    each on its share of every batch.

    \b
    Examples:
      mini-tfm train --text notes/*.txt --out model --steps 2000
      mini-tfm train --memory window:size=256+store --n-segments 6 --out model
      mini-tfm train --text pairs.tsv --n-encoder-layers 2 --out translator
      mini-tfm train --text corpus.jsonl --field body --cache tokens --objective next-segment=0.8+denoise=0.2
      mini-tfm train --curriculum 0:1,500:2,1000:4 --memory recurrent --out model
      mini-tfm train --resume model --steps 4000
      mpirun -n 4 mini-tfm train --text notes/*.txt --out model
    """
    ranks = ranks_of_command()
    told = {name for name in context.params if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    with ranks.together():
        if resume is not None:
            if given := [name for name in _FIXED if name in told]:
                raise click.UsageError(f"--{given[0].replace('_', '-')} comes from the folder with --resume; leave it out")
            out = resume
            if "steps" not in told:
                options["steps"] = None
        elif options["accept_changes"]:
            raise click.UsageError("--accept-changes is for --resume")
        if options["curriculum"] is not None and "n_segments" in told:
            raise click.UsageError("--n-segments: --curriculum says how many; leave one of the two out")
        for name in ("jsonl_log", "csv_log", "tensorboard_log"):
            if options[name] is not None and not options[name].absolute().parent.is_dir():
                raise FileProblem(f"--{name.replace('_', '-')}: {options[name].parent} is not a folder")
        try:
            trainer, data = begun(out, options, ranks) if resume is None else resumed(resume, options, ranks)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("training had not begun; nothing is changed") from None
        options["steps"] = trainer.options["total_steps"]
        fit(trainer, data, out, options, as_json)
