"""Shared by `demo` and `compare`: options, the results folder, the table."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import FileProblem
from .shared import check_out, command_line, count, note, plain, print_table, size

if TYPE_CHECKING:
    from ..compare.experiment import Experiment

C = TypeVar("C", bound=Callable[..., Any])

RESULTS, REPORT = "results.json", "report.html"
MADE_BY = "mini-tfm"


def budget_options(steps: int, help: str) -> Callable[[C], C]:
    """--steps, the budget; and --seconds, which may cut it short."""

    def decorate(command: C) -> C:
        seconds = "Take fewer steps, the same number with each memory, where all of them would take longer than about this."
        command = click.option("--seconds", type=click.FloatRange(0, min_open=True), help=seconds)(command)
        return click.option("--steps", default=steps, show_default=True, type=click.IntRange(1), help=help)(command)

    return decorate


EXPERIMENT_STEPS = 800  # as compare/training.py has them, which is not imported for --help
seed_option = click.option("--seed", default=0, show_default=True, help="Seed of weights, batches and the held-out split.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the results of an earlier run in --out; other files there stay.")


def text_words(files: list[Path]) -> list[str]:
    return [word for path in files for word in ("--text", str(path))]


def run(documents: dict[str, str], memories: list[str | None], out: Path | None, **options: Any) -> Experiment:
    """`run_experiment`, with progress on standard error. On Ctrl-C, raises KeyboardInterrupt naming the models saved so far."""
    from ..compare import experiment
    from ..files.folders import claimed

    try:
        # What a plugin prints is not the command's answer.
        with claimed(out) if out is not None else contextlib.nullcontext(), contextlib.redirect_stdout(sys.stderr):
            return experiment.run_experiment(documents, memories, out, report=note, **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_saved_models(out)) from None


def _saved_models(out: Path | None) -> str:
    found = sorted((out / "models").iterdir()) if out is not None and (out / "models").is_dir() else []
    folders = [str(path) for path in found if (path / "config.json").is_file()]
    return f"saved so far: {', '.join(folders)}" if folders else "no model was saved yet"


def check_results_folder(out: Path, overwrite: bool) -> None:
    """Raises FileProblem if the folder cannot be written to, or holds results: another's always, an earlier run's unless `overwrite`."""
    check_out(out)
    there = [name for name in (RESULTS, REPORT, "models") if (out / name).exists()]
    if not there:
        return
    try:
        ours = json.loads((out / RESULTS).read_text()).get("made_by") == MADE_BY
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise FileProblem(f"--out: {out} holds {there[0]}, not known to be from an earlier run; give another folder")
    if not overwrite:
        raise FileProblem(f"--out: {out} holds the results of an earlier run; give another folder, or --overwrite to replace them")


def write_results(out: Path, experiment: Experiment, words: list[str], runs: Sequence[Experiment] = ()) -> None:
    """Writes report.html and results.json; the latter marks the folder as written by mini-tfm. runs: one of each seed, if several."""
    from ..compare.report import html_report
    from ..files.writing import write_file

    out.mkdir(parents=True, exist_ok=True)  # not there yet where no memory has a model
    results = {"made_by": MADE_BY, "command": command_line(*words), **experiment.to_dict()}
    if len(runs) > 1:
        results["runs"] = [each.to_dict() for each in runs]
    write_file(out / RESULTS, json.dumps(plain(results), indent=1) + "\n")
    write_file(out / REPORT, html_report(experiment, command_line(*words)))


def tell_what_went_wrong(experiment: Experiment) -> None:
    """Below the table: fewer steps than planned, memories that failed."""
    if experiment.cut_short:
        click.echo(experiment.cut_short)
    for row in experiment.failed:
        click.echo(f"{row.memory} failed: {row.error}")


def far_distances(experiment: Experiment) -> str:
    """The range of distances that `recall_far` averages over."""
    from ..compare.tasks.recall import FAR

    if not set(FAR) <= set(experiment.distances):
        return str(max(experiment.distances))
    return "-".join(str(distance) for distance in sorted({min(FAR), max(FAR)}))


def percent(share: float | None) -> str:
    return "-" if share is None or share != share else f"{100 * share:.0f} %"


def bits(row: dict[str, Any]) -> str:
    """Bits per byte of a row, with their spread over several seeds."""
    if row.get("error"):
        return "-"
    spread = row.get("spread") or {}
    return f"{row['bits_per_byte']:.3f}" + (f" \u00b1 {spread['bits_per_byte']:.3f}" if spread else "")


def costs(row: dict[str, Any]) -> tuple[str, str, str]:
    """Tokens/s, state and peak RAM of a row."""
    if row.get("error"):
        return "-", "-", "-"
    return count(row["tokens_per_second"]), size(row["state_bytes"]), size(row["peak_rss_bytes"])


def print_rows(rows: list[dict[str, Any]], chance: float | None = None) -> None:
    """One line per memory, one column per distance."""
    distances = list(rows[0]["recall"])
    print_table(
        [
            ("memory", "left"),
            ("bits/\nbyte", "right"),
            *((f"fact\n{d} back", "right") for d in distances),
            ("tokens/s", "right"),
            ("state", "right"),
            ("peak\nRAM", "right"),
        ],
        [
            [
                row["memory"],
                bits(row),
                *(percent(row["recall"][d]) for d in distances),
                *costs(row),
            ]
            for row in rows
        ],
    )
    if chance is not None:
        click.echo(
            f"bits/byte: on held-out text. fact: how often it is recalled that many segments later; guessing gives {percent(chance)}."
        )
