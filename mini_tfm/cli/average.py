"""`mini-tfm average`: averages the weights of several models."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import FileProblem
from .shared import check_out, command_line, json_option, note, print_json


@click.command(short_help="Average the models of a run.")
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...", type=click.Path(path_type=Path))
@click.option(
    "--last",
    type=click.IntRange(1),
    metavar="MODELS",
    help="Average this many of the last checkpoint-STEP folders of the run in FOLDER.",
)
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Save the average here.")
@json_option
def average(folders: tuple[Path, ...], last: int | None, out: Path, as_json: bool) -> None:
    """Averages the weights of the models in FOLDERs, which must have the same architecture, tokenizer and memory.

    Sums are in float64. With --last, FOLDER is a run, and the checkpoints of its last saved steps are averaged. A folder that
    holds a model is never overwritten.

    \b
    Example:
      mini-tfm train --text notes/*.txt --out model --save-every 100 --save-total-limit 5
      mini-tfm average model --last 5 --out averaged
    """
    from ..train.average import average_models, last_checkpoints

    if last is not None and len(folders) != 1:
        raise click.UsageError(f"--last: expected one FOLDER, a run; got {len(folders)}")
    check_out(out)
    if any((out / name).exists() for name in ("config.json", "model.safetensors")):
        raise FileProblem(f"--out: {out} holds a model already; give another folder")
    paths = average_models(last_checkpoints(folders[0], last) if last is not None else folders, out)
    if as_json:
        print_json({"folder": str(out), "models": [str(path) for path in paths]})
        return
    click.echo(f"{out}: the mean of {len(paths)} models: " + ", ".join(map(str, paths)))
    note("Try next:\n  " + command_line("generate", out, "PROMPT", "--do-sample", "--top-p", "0.9"))
