"""`mini-tfm train`: text files -> a model folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FileProblem
from .shared import check_out, count, json_option, none_of, note, read_documents
from .training import DATA_FILE, fit, ranks_of_command

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer
    from ..train import TextStreams, Trainer
    from ..train.parallel import Alone

HELD_OUT = 0.1  # of the bytes, in whole documents
VALIDATION_BATCHES = 4

# The options a resumed run takes from the folder; giving one of them with --resume is refused.
_FIXED = (
    *("files", "more_files", "out", "memory", "tokenizer", "vocab_size", "seed", "segment_length", "n_segments", "batch_size"),
    *("d_model", "n_heads", "n_encoder_layers", "n_decoder_layers", "d_ff", "positions"),
    *("learning_rate", "schedule", "warmup_steps", "dropout", "source_dropout"),
    *("weight_decay", "max_grad_norm", "label_smoothing", "bptt_segments", "gradient_accumulation_steps"),
)
# Those that `fit` remembers: what a resumed run is not told is as it was. A new run begins with these.
_NEW_RUN = {"validate_every": 100, "save_every": 200, "validation_batches": VALIDATION_BATCHES}


@click.command(short_help="Train a model on text files.")
@click.argument("more_files", nargs=-1, metavar="", type=click.Path(path_type=Path))
@click.option(
    "--text",
    "files",
    multiple=True,
    metavar="FILE...",
    type=click.Path(path_type=Path),
    help="Text files (UTF-8), a document each; default: the documentation inside Python.",
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

    A tenth of the text (whole documents; of a single file, a tenth part) is held out, and its bits per byte tell how
    well the rest was learnt. Ctrl-C saves; --resume goes on, bit for bit, with all that the run was told. A folder
    that holds a model is never written over. Under mpirun all processes train one model, each on its share of every
    batch.

    \b
    Examples:
      mini-tfm train --text notes/*.txt --out model --steps 2000
      mini-tfm train --memory window:size=256+store --n-segments 6 --out model
      mini-tfm train --resume model --steps 4000
      mpirun -n 4 mini-tfm train --text notes/*.txt --out model
    """
    ranks = ranks_of_command()
    with ranks.together():
        if resume is not None:
            given = [name for name in _FIXED if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
            if given:
                raise click.UsageError(f"--{given[0].replace('_', '-')} comes from the folder with --resume; leave it out")
            out = resume
            if context.get_parameter_source("steps") is not click.core.ParameterSource.COMMANDLINE:
                options["steps"] = None
        for name in ("jsonl_log", "csv_log", "tensorboard_log"):
            if options[name] is not None and not options[name].absolute().parent.is_dir():
                raise FileProblem(f"--{name.replace('_', '-')}: {options[name].parent} is not a folder")
        try:
            trainer, run = _begun(out, options, ranks) if resume is None else _resumed(resume, options, ranks)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("training had not begun; nothing is changed") from None
        options["steps"] = trainer.options["total_steps"]
        fit(trainer, run, out, options, as_json)


class _Run:
    """The data of a run: streams to train on, fixed batches of held-out text, and what that is in bytes."""

    def __init__(self, about: dict[str, Any], documents: dict[str, str], name: str, tokenizer: Tokenizer):
        from ..progress import track
        from ..text import split_documents
        from ..train import TextStreams

        train, held_out = split_documents(documents, HELD_OUT, about["seed"])
        encoded = [
            [tokenizer.encode(text) for text in track(part.values(), "encoding", len(part), "documents")] for part in (train, held_out)
        ]
        shape = {name: about[name] for name in ("segment_length", "n_segments", "batch_size", "seed", "has_encoder")}
        self.about, self.tokenizer = about, tokenizer
        self.data: TextStreams = TextStreams(encoded[0], **shape)
        self.bytes = [sum(len(text.encode()) for text in part.values()) for part in (train, held_out)]
        self.tokens = [sum(map(len, part)) for part in encoded]
        note(
            f"text: {name}: {len(train)} documents, {count(self.bytes[0])} bytes, {count(self.tokens[0])} tokens;"
            f" held out: {len(held_out)} documents, {count(self.bytes[1])} bytes"
        )
        self.held_out = None
        if max(map(len, encoded[1])) > about["segment_length"]:
            streams = TextStreams(encoded[1], **shape)
            self.held_out = [streams.batch(i) for i in range(VALIDATION_BATCHES)]
        else:
            note("no held-out document is longer than a segment: nothing can be measured on them")

    def measure(self, trainer: Trainer) -> tuple[float, float] | None:
        """(nats per token, bits per byte) on the held-out batches."""
        if self.held_out is None:
            return None
        weights = [trainer.weight_of(batch) for batch in self.held_out]
        loss = sum(trainer.evaluate(batch) * n for batch, n in zip(self.held_out, weights, strict=True)) / sum(weights)
        return loss, self.bits_per_byte(loss)

    def bits_per_byte(self, loss: float) -> float:
        """Of the held-out text, from its loss in nats per token."""
        return loss / math.log(2) * self.tokens[1] / self.bytes[1]


def _begun(out: Path, options: dict[str, Any], ranks: Alone) -> tuple[Trainer, _Run]:
    """A new model. All that can be wrong is found before the first file is read, or soon after."""
    from ..config import Config
    from ..memory import memory as make_memory
    from ..model import Transformer
    from ..text import split_documents
    from ..tokenizer import ByteTokenizer, train_bpe
    from ..train import Trainer

    check_out(out)
    if options["warmup_steps"] is None:
        options["warmup_steps"] = min(50, options["steps"] // 4)
    if any((out / name).exists() for name in ("config.json", "model.safetensors")):
        raise FileProblem(f"--out: {out} holds a model already; --resume {out} goes on with it, or give another folder")
    text = none_of(options["memory"])
    memory = make_memory(text) if text else None
    files = [*options["files"], *options["more_files"]]
    architecture = {
        name: options[name]
        for name in ("d_model", "n_heads", "n_encoder_layers", "n_decoder_layers", "d_ff", "positions", "segment_length")
    }
    Config(vocab_size=259, **architecture)  # faults before work
    name, documents = read_documents(files)
    train_text, _ = split_documents(documents, HELD_OUT, options["seed"])
    tokenizer = ByteTokenizer() if options["tokenizer"] == "bytes" else train_bpe(train_text.values(), options["vocab_size"])
    model = Transformer(Config(vocab_size=tokenizer.vocab_size, **architecture), seed=options["seed"])
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
        **{name: options[name] for name in ("weight_decay", "label_smoothing", "bptt_segments", "gradient_accumulation_steps")},
    )
    trainer.fit_options.update(_NEW_RUN)
    about = {name: options[name] for name in ("segment_length", "n_segments", "batch_size", "seed")}
    about |= {
        "files": [str(path.resolve()) for path in files],
        "has_encoder": model.config.has_encoder,
        "fingerprint": _fingerprint(documents),
    }
    return trainer, _Run(about, documents, name, tokenizer)


def _resumed(folder: Path, options: dict[str, Any], ranks: Alone) -> tuple[Trainer, _Run]:
    """The saved run, on the same text: another one would not be the same run."""
    from ..checkpoint import read_json_strict
    from ..errors import InvalidValue
    from ..train import Trainer

    check_out(folder)
    trainer = Trainer.resume(folder, communicator=ranks)
    about = read_json_strict(folder / DATA_FILE)
    wanted = {
        "segment_length": int,
        "n_segments": int,
        "batch_size": int,
        "seed": int,
        "files": list,
        "has_encoder": bool,
        "fingerprint": str,
    }
    wrong = [name for name, kind in wanted.items() if type(about.get(name)) is not kind]
    if wrong or trainer.tokenizer is None:
        raise InvalidValue(f"{folder / DATA_FILE}: field {wrong[0] if wrong else 'tokenizer'!r} is missing or of the wrong type")
    name, documents = read_documents([Path(path) for path in about["files"]])
    if _fingerprint(documents) != about["fingerprint"]:
        raise InvalidValue(f"--resume: the text has changed since {folder} was trained on it ({name}); start anew with --text")
    planned: Any = trainer.options["total_steps"]
    steps: int = options["steps"] or planned or 0
    if steps <= trainer.step_count:
        raise InvalidValue(f"--steps: {folder} has {trainer.step_count} steps already; expected more in total, got {steps}")
    trainer.options["total_steps"] = steps
    trainer.fit_options["save_every"] = trainer.fit_options["save_every"] or _NEW_RUN["save_every"]  # 0.1.0 did not keep it
    for name in ("early_stopping_patience", "early_stopping_threshold"):
        if options[name] is not None:
            trainer.options[name] = options[name]
    return trainer, _Run(about, documents, name, trainer.tokenizer)


def _fingerprint(documents: dict[str, str]) -> str:
    """Names the texts, whatever the files are called."""
    import hashlib

    digest = hashlib.sha256()
    for text in documents.values():
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()
