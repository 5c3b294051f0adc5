"""`mini-tfm compare`: compares memories on one text."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import click

from .results import (
    EXPERIMENT_STEPS,
    budget_options,
    check_results_folder,
    overwrite_option,
    print_rows,
    run,
    seed_option,
    tell_what_went_wrong,
    text_words,
    write_results,
)
from .shared import json_option, none_of, note, print_json, read_documents


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
@budget_options(EXPERIMENT_STEPS, "Training steps with each memory.")
@seed_option
@click.option(
    "--seeds",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Repeat with this many seeds, counted from --seed: means, and the standard deviation of bits per byte.",
)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help='The model, as a JSON object of fields such as {"d_model": 128, "n_encoder_layers": 0}; what is not there stays as it is.',
)
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Save models, report.html (with plots) and results.json here.")
@overwrite_option
@json_option
@click.pass_context
def compare(
    context: click.Context,
    paths: tuple[Path, ...],
    memories: tuple[str, ...],
    files: tuple[Path, ...],
    steps: int,
    seconds: float | None,
    seed: int,
    seeds: int,
    config_file: Path | None,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Compares memories on one text: bits per byte of held-out documents, recall of a fact by distance (in segments),
    tokens/s, state (bytes per stream) and peak RAM (bytes).

    Without FOLDER, trains a model with each memory, all from the same start and for the same number of steps. With FOLDER,
    measures the saved model with each memory on all of the text, without training. A memory that fails is a row that says why;
    the others stay, and the exit code is 1.

    \b
    Examples:
      mini-tfm compare --memory none --memory window:size=64 --memory my_memory --out comparison
      mini-tfm compare model --text book.txt --memory window:size=512 --memory store
    """
    folder, texts = _check_usage(context, paths, files, memories, out, overwrite)
    if folder is not None:
        name, documents = read_documents(texts, parts=False)
        rows = _measured(folder, memories, documents, seed)
        if as_json:
            print_json({"model": str(folder), "text": name, "rows": rows})
        else:
            print_rows(rows)
            if not any(share for row in rows for share in (row["recall"] or {}).values()):
                click.echo("No fact is recalled: only a model that was trained to recall them can, as `demo` and `compare` train theirs.")
            for row in rows:
                if row["error"]:
                    click.echo(f"{row['memory']} failed: {row['error']}")
        context.exit(1 if any(row["error"] for row in rows) else 0)
    from ..compare.experiment import over_seeds

    config = _config(config_file)
    name, documents = read_documents(texts)
    runs: list[Any] = []
    for each in range(seed, seed + seeds):
        place = out / f"seed-{each}" if out is not None and seeds > 1 else out
        if runs:
            steps, seconds = runs[0].steps, None
        if seeds > 1:
            note(f"seed {each}, {len(runs) + 1} of {seeds}:")
        options: dict[str, Any] = {"steps": steps, "seconds": seconds, "config": config, "seed": each, "text_name": name}
        runs.append(run(documents, [none_of(text) for text in memories], place, **options))
    experiment = over_seeds(runs)
    if out is not None:
        words = [word for text in memories for word in ("--memory", text)]
        words += [*text_words(texts), "--steps", str(experiment.steps), "--seed", str(seed)]
        words += ["--seeds", str(seeds)] if seeds > 1 else []
        words += ["--config", str(config_file)] if config_file is not None else []
        write_results(out, experiment, ["compare", *words], runs)
    if as_json:
        more = {"runs": [each.to_dict() for each in runs]} if seeds > 1 else {}
        print_json({**experiment.to_dict(), **more})
    else:
        print_rows(experiment.to_dict()["rows"], experiment.chance)
        tell_what_went_wrong(experiment)
    if out is not None and not as_json:
        note(f"models, report.html and results.json are in {out}")
    context.exit(1 if experiment.failed else 0)


def _config(file: Path | None) -> dict[str, Any] | None:
    """The fields of --config."""
    if file is None:
        return None
    from ..files.strict_json import read_json_strict

    return read_json_strict(file)


_OF_TRAINING = ("steps", "seconds", "seeds", "config_file", "out", "overwrite")  # without a meaning where nothing is trained


def _check_usage(
    context: click.Context, paths: tuple[Path, ...], files: tuple[Path, ...], memories: tuple[str, ...], out: Path | None, overwrite: bool
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
    given = [name for name in _OF_TRAINING if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    if folders and given:
        option = "--" + given[0].removesuffix("_file")
        raise click.UsageError(f"{option}: not with FOLDER, which trains no models" + ("; use --json" if option == "--out" else ""))
    if out is not None:
        check_results_folder(out, overwrite)
    return (folders[0] if folders else None), [*files, *rest]


def _measured(folder: Path, memories: tuple[str, ...], documents: dict[str, str], seed: int) -> list[dict[str, Any]]:
    """`measure_saved`, with progress on standard error."""
    from ..compare.saved import measure_saved
    from ..progress import progress_bar

    with progress_bar("measuring", None, "tokens") as advance, contextlib.redirect_stdout(sys.stderr):
        return measure_saved(folder, memories, documents, seed, advance=advance, report=note)
