"""`mini-tfm compare`: memories side by side, on one text."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .shared import (
    EXPERIMENT_SECONDS,
    Clock,
    check_out,
    count,
    json_option,
    none_of,
    note,
    print_json,
    print_table,
    read_documents,
    size,
)

if TYPE_CHECKING:
    from ..compare.experiment import Experiment

STREAMS = 64  # facts asked for at each distance, on a saved model
DOCUMENTS_AT_ONCE = 16


@click.command(short_help="Memories side by side: quality, speed, size.")
@click.argument("paths", nargs=-1, metavar="[FOLDER]", type=click.Path(path_type=Path))
@click.option(
    "--memory",
    "memories",
    multiple=True,
    required=True,
    metavar="SPEC",
    help="A memory to compare, as name:option=value,...; none for no memory. Give several.",
)
@click.option(
    "--text",
    "files",
    multiple=True,
    metavar="FILE...",
    type=click.Path(path_type=Path),
    help="Text files, a document each; default: the documentation inside Python.",
)
@click.option(
    "--seconds",
    default=EXPERIMENT_SECONDS,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="For training and measuring all of them, about.",
)
@click.option("--seed", default=0, show_default=True, help="Of weights, batches and the split.")
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path), help="Keep the trained models, report.html (with plots) and results.json."
)
@json_option
def compare(
    paths: tuple[Path, ...], memories: tuple[str, ...], files: tuple[Path, ...], seconds: float, seed: int, out: Path | None, as_json: bool
) -> None:
    """Compares memories on one text: bits per byte on held-out documents, recall of a fact by distance (in segments),
    tokens/s, state (bytes a stream) and peak RAM (bytes).

    Without FOLDER each memory is trained, all from a common start and for the same number of steps. With FOLDER the
    saved model is measured as it is, with each memory in turn; nothing is trained, and all of the text counts.

    \b
    Examples:
      mini-tfm compare --memory none --memory window:size=64 --memory my_memory --out comparison
      mini-tfm compare model --text book.txt --memory window:size=512 --memory store
    """
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
        raise InvalidValue(f"--memory: expected each once, got {', '.join(memories)}")
    if folders and out is not None:
        raise click.UsageError("--out is for what is trained; with FOLDER use --json")
    if out is not None:
        check_results_folder(out)
    name, documents = read_documents([*files, *rest])
    if folders:
        rows = _measure(folders[0], memories, documents, seed)
        if as_json:
            print_json({"model": str(folders[0]), "text": name, "rows": rows})
        else:
            print_rows(rows)
        return
    from ..compare.experiment import run_experiment

    try:
        experiment = run_experiment(
            documents, [none_of(text) for text in memories], out, seconds=seconds, seed=seed, text_name=name, tell=note
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(saved_models(out)) from None
    again = [
        "compare",
        *(word for text in memories for word in ("--memory", text)),
        *text_words([*files, *rest]),
        "--seconds",
        f"{seconds:g}",
        "--seed",
        str(seed),
    ]
    if out is not None:
        write_results(out, experiment, again)
    if as_json:
        print_json(experiment.to_dict())
        return
    print_rows(experiment.to_dict()["rows"], experiment.chance)
    if out is not None:
        note(f"models, report.html and results.json are in {out}")


# What a demo and a comparison share

RESULTS, REPORT = "results.json", "report.html"
MADE_BY = "mini-tfm"


def text_words(files: list[Path]) -> list[str]:
    return [word for path in files for word in ("--text", str(path))]


def check_results_folder(out: Path) -> None:
    """That results can be written there, and that no file is lost that somebody else made."""
    import json

    from ..errors import FileProblem

    check_out(out)
    if not any((out / name).exists() for name in (RESULTS, REPORT, "models")):
        return
    try:
        ours = json.loads((out / RESULTS).read_text()).get("made_by") == MADE_BY
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        there = next(name for name in (RESULTS, REPORT, "models") if (out / name).exists())
        raise FileProblem(f"--out: {out} has a {there} that is not known to be of an earlier run; give another folder")


def write_results(out: Path, experiment: Experiment, words: list[str]) -> None:
    """report.html and results.json; the latter says that the folder is ours."""
    import json

    from ..compare.report import html_report
    from ..files.writing import write_file
    from .shared import _plain, command_line

    write_file(
        out / RESULTS, json.dumps(_plain({"made_by": MADE_BY, "command": command_line(*words), **experiment.to_dict()}), indent=1) + "\n"
    )
    write_file(out / REPORT, html_report(experiment, command_line(*words)))


def saved_models(out: Path | None) -> str:
    """What a run that was stopped has left."""
    found = sorted((out / "models").iterdir()) if out is not None and (out / "models").is_dir() else []
    folders = [str(path) for path in found if (path / "config.json").is_file()]
    return f"saved so far: {', '.join(folders)}" if folders else "no model was saved yet"


def far_distances(experiment: Experiment) -> str:
    """The distances that `recall_far` is the mean of, as they are told."""
    from ..compare.experiment import FAR

    return (
        "-".join(str(d) for d in sorted({min(FAR), max(FAR)})) if set(FAR) <= set(experiment.distances) else str(max(experiment.distances))
    )


def percent(share: float | None) -> str:
    return "-" if share is None or share != share else f"{100 * share:.0f} %"


def print_rows(rows: list[dict[str, Any]], chance: float | None = None) -> None:
    """A line a memory, a column a distance."""
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
                f"{row['bits_per_byte']:.3f}",
                *(percent(row["recall"][d]) for d in distances),
                count(row["tokens_per_second"]),
                size(row["state_bytes"]),
                size(row["peak_rss_bytes"]),
            ]
            for row in rows
        ],
    )
    if chance is not None:
        click.echo(
            f"bits/byte: of held-out text. fact: how often it is still known so many segments later; guessing gives {percent(chance)}."
        )


# A saved model, as it is


def _measure(folder: Path, memories: tuple[str, ...], documents: dict[str, str], seed: int) -> list[dict[str, Any]]:
    """A row for each memory: the model of `folder` on all documents, each read by an empty memory."""
    from ..compare import Recall
    from ..compare.experiment import DISTANCES
    from ..compare.measure import measure
    from ..data import TextStreams
    from ..errors import InvalidValue
    from ..pipeline import Pipeline
    from ..progress import progress_bar

    rows = []
    for spec in memories:  # all of them first: a wrong option must not be told after minutes
        Pipeline.load(folder, memory=none_of(spec))
    n_bytes = sum(len(text.encode()) for text in documents.values())
    for spec in memories:
        _forget_peak()
        pipe = Pipeline.load(folder, memory=none_of(spec))
        ids = sorted((pipe.tokenizer.encode(text) for text in documents.values()), key=len)
        streams = TextStreams(
            ids,
            segment_length=pipe.segment_length,
            n_segments=max(DISTANCES) + 1,
            batch_size=STREAMS,
            seed=seed,
            has_encoder=pipe.model.config.has_encoder,
        )
        bits, state, clock = 0.0, 0, Clock()
        with progress_bar(spec, sum(map(len, ids)), "tokens") as advance:
            for some in (ids[i : i + DOCUMENTS_AT_ONCE] for i in range(0, len(ids), DOCUMENTS_AT_ONCE)):
                batch = streams.cut([(document, 0) for document in some], -(-len(some[-1]) // pipe.segment_length))
                taken, held = measure(pipe.model, pipe.memory, batch)
                bits, state = bits + taken, max(state, held // len(some))
                advance(batch.n_tokens)
        seconds = clock.seconds
        try:
            facts = Recall(pipe.tokenizer)
            recall = {d: facts.accuracy(pipe.model, pipe.memory, streams.batch(0), d, seed=seed) for d in DISTANCES}
        except InvalidValue as error:
            note(f"{spec}: recall cannot be measured: {error}")
            recall = dict.fromkeys(DISTANCES, float("nan"))
        rows.append(
            {
                "memory": spec,
                "bits_per_byte": bits / n_bytes,
                "recall": recall,
                "tokens_per_second": sum(map(len, ids)) / seconds,
                "state_bytes": state,
                "peak_rss_bytes": _peak(),
            }
        )
    return rows


def _forget_peak() -> None:
    """Lets the peak of RAM start anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The most RAM this process has used, in bytes."""
    import resource

    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
