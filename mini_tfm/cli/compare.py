"""`mini-tfm compare`: compares memories on one text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .results import check_results_folder, print_rows, run, seconds_option, seed_option, text_words, write_results
from .shared import json_option, none_of, note, print_json, read_documents

STREAMS = 64  # questions asked of a saved model at each distance
DOCUMENTS_AT_ONCE = 16


@click.command(short_help="Compare memories: quality, speed, size.")
@click.argument("paths", nargs=-1, metavar="[FOLDER]", type=click.Path(path_type=Path))
@click.option(
    "--memory",
    "memories",
    multiple=True,
    required=True,
    metavar="SPEC",
    help="A memory to compare, as name:option=value,...; none: no memory. Repeat the option for each memory.",
)
@click.option(
    "--text",
    "files",
    multiple=True,
    metavar="FILE...",
    type=click.Path(path_type=Path),
    help="Text files, one document each; default: Python's own documentation.",
)
@seconds_option("Approximate time to train and measure all memories.")
@seed_option
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Save models, report.html (with plots) and results.json here.")
@json_option
def compare(
    paths: tuple[Path, ...], memories: tuple[str, ...], files: tuple[Path, ...], seconds: float, seed: int, out: Path | None, as_json: bool
) -> None:
    """Compares memories on one text: bits per byte of held-out documents, recall of a fact by distance (in segments),
    tokens/s, state (bytes per stream) and peak RAM (bytes).

    Without FOLDER, trains a model with each memory, all from the same start and for the same number of steps. With FOLDER,
    measures the saved model with each memory on all of the text, without training.

    \b
    Examples:
      mini-tfm compare --memory none --memory window:size=64 --memory my_memory --out comparison
      mini-tfm compare model --text book.txt --memory window:size=512 --memory store
    """
    folder, texts = _check_usage(paths, files, memories, out)
    name, documents = read_documents(texts)
    if folder is not None:
        rows = measure_saved(folder, memories, documents, seed)
        if as_json:
            print_json({"model": str(folder), "text": name, "rows": rows})
        else:
            print_rows(rows)
        return
    experiment = run(documents, [none_of(text) for text in memories], out, seconds=seconds, seed=seed, text_name=name)
    if out is not None:
        words = [word for text in memories for word in ("--memory", text)]
        write_results(out, experiment, ["compare", *words, *text_words(texts), "--seconds", f"{seconds:g}", "--seed", str(seed)])
    if as_json:
        print_json(experiment.to_dict())
        return
    print_rows(experiment.to_dict()["rows"], experiment.chance)
    if out is not None:
        note(f"models, report.html and results.json are in {out}")


def _check_usage(
    paths: tuple[Path, ...], files: tuple[Path, ...], memories: tuple[str, ...], out: Path | None
) -> tuple[Path | None, list[Path]]:
    """(the model's folder, the text files). A shell expands `--text *.txt`: all files but the first arrive as arguments."""
    from ..errors import FileProblem, InvalidValue

    folders = [path for path in paths if path.is_dir()]
    rest = [path for path in paths if path not in folders]
    if missing := [path for path in rest if not path.exists()]:
        raise FileProblem(f"{missing[0]}: there is no such file or folder")
    if rest and not files:
        raise click.UsageError(f"{rest[0]} is not a model folder; text files come after --text")
    if len(folders) > 1:
        raise click.UsageError(f"expected one model folder, got {len(folders)}")
    if len(set(memories)) < len(memories):
        raise InvalidValue(f"--memory: expected each memory once, got {', '.join(memories)}")
    if folders and out is not None:
        raise click.UsageError("--out: not with FOLDER, which trains no models; use --json")
    if out is not None:
        check_results_folder(out)
    return (folders[0] if folders else None), [*files, *rest]


def measure_saved(folder: Path, memories: tuple[str, ...], documents: dict[str, str], seed: int) -> list[dict[str, Any]]:
    """One table row per memory: the model in `folder` on all documents, each read with an empty memory."""
    from ..compare.experiment import n_bytes
    from ..compare.machine import forget_peak_ram
    from ..compare.measure import measure_memory, refuse_durable
    from ..compare.tasks import HeldOut
    from ..compare.tasks.recall import DISTANCES
    from ..data import TextStreams
    from ..errors import InvalidValue
    from ..memory import memory as make_memory
    from ..pipeline import Pipeline
    from ..progress import progress_bar
    from ..transformer import load_checkpoint

    trained = set(load_checkpoint(folder).model.weights)
    for spec in memories:  # report what cannot be measured now, not after minutes
        if spec not in ("none", "saved"):
            refuse_durable(make_memory(spec))
        if new := sorted(set(Pipeline.load(folder, memory=none_of(spec)).model.weights) - trained):
            raise InvalidValue(f"--memory: {spec} has parameters ({new[0]}) that {folder} was not trained with; train it with this memory")
    rows = []
    for spec in memories:
        forget_peak_ram()
        pipe = Pipeline.load(folder, memory=none_of(spec))
        ids = sorted((pipe.tokenizer.encode(text) for text in documents.values()), key=len)
        shape: dict[str, Any] = {"segment_length": pipe.segment_length, "n_segments": max(DISTANCES) + 1, "batch_size": STREAMS}
        cutter = TextStreams(ids, **shape, seed=seed, has_encoder=pipe.model.config.has_encoder)
        held_out = HeldOut(ids, n_bytes(documents), cutter, cutter.batch(0), DOCUMENTS_AT_ONCE, seed)
        with progress_bar(spec, sum(map(len, ids)), "tokens") as advance:
            report = lambda line, spec=spec: note(f"{spec}: {line}")  # noqa: E731
            figures = measure_memory(pipe.model, pipe.memory, pipe.tokenizer, held_out, advance=advance, report=report)
        rows.append({"memory": spec, **figures})
    return rows
