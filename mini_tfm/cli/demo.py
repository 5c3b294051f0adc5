"""`mini-tfm demo`: shows what each memory is good for, in minutes, on text that comes with Python."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .results import (
    EXPERIMENT_STEPS,
    REPORT,
    RESULTS,
    bits,
    budget_options,
    check_results_folder,
    costs,
    far_distances,
    overwrite_option,
    percent,
    run,
    seed_option,
    tell_what_went_wrong,
    text_words,
    write_results,
)
from .shared import command_line, count, duration, json_option, none_of, note, print_json, print_table, prompt_from, read_documents

if TYPE_CHECKING:
    from ..compare.experiment import Experiment

# Small on purpose, so that not everything fits. A window of 64 rows is two segments of the experiment.
MEMORIES = ("none", "window:size=64", "recurrent:tokens=4", "store:top_k=16", "window:size=64+store:top_k=16")
QUICK_STEPS = 150
HELD_OUT = "held-out"


@click.command(short_help="Train and compare the built-in memories, in minutes.")
@click.argument("more_files", nargs=-1, metavar="", type=click.Path(path_type=Path))
@click.option(
    "--text",
    "files",
    multiple=True,
    metavar="FILE...",
    type=click.Path(path_type=Path),
    help="Text files to use instead of Python's documentation.",
)
@click.option(
    "--out",
    default=Path("mini-tfm-demo"),
    show_default=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Save the models, report.html and results.json here.",
)
@overwrite_option
@budget_options(EXPERIMENT_STEPS, "Training steps with each memory.")
@click.option("--quick", is_flag=True, help=f"Take {QUICK_STEPS} steps: too few for some memories to learn recall.")
@seed_option
@json_option
@click.pass_context
def demo(
    context: click.Context,
    more_files: tuple[Path, ...],
    files: tuple[Path, ...],
    out: Path,
    overwrite: bool,
    steps: int,
    seconds: float | None,
    quick: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Trains the same small Transformer with no memory, a window, a recurrent memory, a store, and a window plus a store.

    Each is trained on the same text for the same number of steps, then measured on held-out documents: bits per byte, recall
    of a fact from several segments back, tokens/s, state and peak RAM in bytes. Prints a table, writes a report with plots,
    and shows commands to try on the models.
    """
    if quick and context.get_parameter_source("steps") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("give --quick or --steps, not both")
    steps = QUICK_STEPS if quick else steps
    check_results_folder(out, overwrite)
    paths = [*files, *more_files]
    name, documents = read_documents(paths)
    note(f"text: {name}; {len(MEMORIES)} memories; results go to {out}")
    options: dict[str, Any] = {"steps": steps, "seconds": seconds, "seed": seed, "text_name": name}
    experiment = run(documents, [none_of(text) for text in MEMORIES], out, **options)
    words = ["demo", *text_words(paths), "--steps", str(experiment.steps), "--seed", str(seed)]
    _write_held_out(out, experiment, documents)
    write_results(out, experiment, words)
    if as_json:
        print_json({"out": str(out), "command": command_line(*words), **experiment.to_dict()})
    else:
        _print(experiment)
    note(f"report: {out / REPORT}   numbers: {out / RESULTS}\n\nTry next:")
    for line in try_next(out, experiment, prompt_from(documents[experiment.held_out_names[0]])):
        note("  " + line)
    context.exit(1 if experiment.failed else 0)


def _write_held_out(out: Path, experiment: Experiment, documents: dict[str, str]) -> None:
    """Each held-out document as a file, so that `score` measures what was measured here."""
    from ..files.writing import write_file

    (out / HELD_OUT).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(experiment.held_out_names, 1):
        write_file(out / HELD_OUT / f"{number:03}.txt", documents[name])


def _print(experiment: Experiment) -> None:
    print_table(
        [
            ("memory", "left"),
            ("bits per byte,\nheld-out text", "right"),
            (f"fact recalled\n{far_distances(experiment)} segments back", "right"),
            ("tokens/s", "right"),
            ("state", "right"),
            ("peak RAM", "right"),
        ],
        [
            (
                row["memory"],
                bits(row),
                percent(row["recall_far"]),
                *costs(row),
            )
            for row in experiment.to_dict()["rows"]
        ],
    )
    taken = f"{count(experiment.steps)} steps each, {duration(experiment.seconds)} in all."
    click.echo(f"Guessing recalls {percent(experiment.chance)} of the facts. {taken}")
    tell_what_went_wrong(experiment)


def try_next(out: Path, experiment: Experiment, prompt: str) -> list[str]:
    """Commands to try on the saved models: generation, and reading into a memory on disk."""
    worked = [row for row in experiment.rows if row.folder is not None]
    sampled = ("--do-sample", "--top-p", "0.9")
    lines: list[str] = []
    if worked:
        best = max(worked, key=lambda row: (row.recall_far == row.recall_far, row.recall_far))
        lines.append(command_line("generate", best.folder or "", prompt, *sampled))
        lines.append(command_line("score", best.folder or "") + f" {shlex.quote(str(out / HELD_OUT))}/*.txt")
    for row in worked:
        spec = on_disk(row.memory, _free(out / "notes.mdb"))
        if spec is not None:
            lines.append(command_line("read", row.folder or "", out / HELD_OUT / "001.txt", "--memory", spec))
            lines.append(command_line("generate", row.folder or "", prompt, *sampled, "--memory", spec))
            break
    return lines


def _free(path: Path) -> Path:
    """The path, with a number where something is there: the rows of an earlier run are of other weights."""
    number, free = 2, path
    while free.exists():
        number, free = number + 1, path.with_stem(f"{path.stem}-{number}")
    return free


def on_disk(memory: str, path: Path) -> str | None:
    """The memory's text with a `path` for its rows; None if none of its strategies has that option."""
    from ..memory import describe_memory
    from ..memory import memory as make_memory

    if memory == "none":
        return None
    made = make_memory(memory)
    given = repr(str(path)) if set(str(path)) & set(",+='\"\\") else str(path)
    found, texts = False, []
    for member in getattr(made, "members", [made]):
        text = str(member.text)
        if not found and "path" in describe_memory(member.name)["options"]:
            text, found = f"{text}{',' if ':' in text else ':'}path={given}", True
        texts.append(text)
    return "+".join(texts) if found else None
