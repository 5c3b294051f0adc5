"""`mini-tfm demo`: shows what each memory is good for, in minutes, on text that comes with Python."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .results import (
    REPORT,
    RESULTS,
    check_results_folder,
    far_distances,
    percent,
    run,
    seconds_option,
    seed_option,
    text_words,
    write_results,
)
from .shared import command_line, count, duration, json_option, none_of, note, print_json, print_table, read_documents, size

if TYPE_CHECKING:
    from ..compare.experiment import Experiment

# Small on purpose, so that not everything fits. A window of 64 rows is two segments of the experiment.
MEMORIES = ("none", "window:size=64", "recurrent:tokens=4", "store:top_k=16", "window:size=64+store:top_k=16")
QUICK_SECONDS = 90.0
HELD_OUT_TEXT = "held-out.txt"


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
@seconds_option("Approximate total time.")
@click.option("--quick", is_flag=True, help=f"Take {QUICK_SECONDS:.0f} seconds: too short for some memories to learn recall.")
@seed_option
@json_option
@click.pass_context
def demo(
    context: click.Context,
    more_files: tuple[Path, ...],
    files: tuple[Path, ...],
    out: Path,
    seconds: float,
    quick: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Trains the same small Transformer with no memory, a window, a recurrent memory, a store, and a window plus a store.

    Each is trained on the same text for the same number of steps, then measured on held-out documents: bits per byte, recall
    of a fact from several segments back, tokens/s, state and peak RAM in bytes. Prints a table, writes a report with plots,
    and shows commands to try on the models.
    """
    if quick and context.get_parameter_source("seconds") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("give --quick or --seconds, not both")
    seconds = QUICK_SECONDS if quick else seconds
    check_results_folder(out)
    paths = [*files, *more_files]
    name, documents = read_documents(paths)
    note(f"text: {name}; {len(MEMORIES)} memories, about {duration(seconds)} in all; results go to {out}")
    experiment = run(documents, [none_of(text) for text in MEMORIES], out, seconds=seconds, seed=seed, text_name=name)
    words = ["demo", *text_words(paths), "--seconds", f"{seconds:g}", "--seed", str(seed)]
    _write_held_out(out, experiment, documents)
    write_results(out, experiment, words)
    if as_json:
        print_json({"out": str(out), "command": command_line(*words), **experiment.to_dict()})
    else:
        _print(experiment)
    note(f"report: {out / REPORT}   numbers: {out / RESULTS}\n\nTry next:")
    for line in try_next(out, experiment):
        note("  " + line)


def _write_held_out(out: Path, experiment: Experiment, documents: dict[str, str]) -> None:
    from ..files.writing import write_file

    write_file(out / HELD_OUT_TEXT, "\n\n".join(documents[name] for name in experiment.held_out_names))


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
                row.memory,
                f"{row.bits_per_byte:.3f}",
                percent(row.recall_far),
                count(row.tokens_per_second),
                size(row.state_bytes),
                size(row.peak_rss_bytes),
            )
            for row in experiment.rows
        ],
    )
    steps = sorted({row.steps for row in experiment.rows})
    taken = f"{count(steps[0])} to {count(steps[-1])}" if len(steps) > 1 else count(steps[0])
    click.echo(f"Guessing recalls {percent(experiment.chance)} of the facts. {taken} steps each, {duration(experiment.seconds)} in all.")


def try_next(out: Path, experiment: Experiment) -> list[str]:
    """Commands to try on the saved models: generation, and reading into a memory on disk."""
    best = max(experiment.rows, key=lambda row: (row.recall_far == row.recall_far, row.recall_far))
    prompt, held_out = "The import statement", out / HELD_OUT_TEXT
    lines: list[tuple[str | Path, ...]] = []
    if best.folder is not None:
        lines.append(("generate", best.folder, prompt, "--do-sample", "--top-p", "0.9"))
        lines.append(("score", best.folder, held_out))
    for row in experiment.rows:
        spec = on_disk(row.memory, out / "notes.mdb")
        if row.folder is not None and spec is not None:
            lines.append(("read", row.folder, held_out, "--memory", spec))
            sampled = ("--do-sample", "--top-p", "0.9")
            lines.append(("generate", row.folder, prompt, *sampled, "--memory", spec))
            break
    return [command_line(*line) for line in lines]


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
