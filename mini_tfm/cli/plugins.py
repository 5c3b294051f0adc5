"""`mini-tfm plugins`: lists the installed memories, checks one against the contract, or starts a new one."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shlex
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import click

from ..errors import PluginError
from .shared import check_out, command_line, json_option, note, print_json, print_table


@click.group()
def plugins() -> None:
    """List the installed memories, check one, or start a new one."""


@plugins.command("list")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@json_option
def list_(names: tuple[str, ...], as_json: bool) -> None:
    """Lists every installed memory with its plugin, description and options (sizes are in rows or tokens).

    Nobody else's plugin is imported for that, so of their memories no options are listed. With NAMEs it lists these memories alone,
    and imports their plugins; one that cannot be loaded is listed as broken, with the reason.
    """
    found = _installed(names)
    if as_json:
        print_json(found)
        return
    print_table(
        [("memory", "left"), ("plugin", "left"), ("about", "left"), ("options", "left")],
        [
            (each["name"], each["plugin"], each["about"] if not each["broken"] else f"broken: {each['broken']}", _options(each["options"]))
            for each in found
        ],
    )
    if unseen := [each["name"] for each in found if each["options"] is None and not each["broken"]]:
        note("To see the options of a memory, name it: " + command_line("plugins", "list", unseen[0]))


def _installed(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """`describe_memory` of each memory, plus the reason why it is broken (None: it is not)."""
    from ..memory import describe_memory
    from ..memory.registry import PluginWarning, list_plugins

    found = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* could not be loaded", PluginWarning)  # those are in the list
        listed = list_plugins()
        for name in dict.fromkeys(names or listed):
            each: dict[str, Any] = {**listed.get(name, {}), "broken": None}
            if names:
                try:
                    each.update(describe_memory(name))
                except PluginError as error:
                    each["broken"] = str(error)
            found.append(each)
    return found


def _options(options: dict[str, Any] | None) -> str:
    return ", ".join(
        name if value == "required" else f"{name}={str(value).lower() if value in (None, True, False) else value}"
        for name, value in (options or {}).items()
    )


@plugins.command()
@click.argument("spec", metavar="NAME[:OPTION=VALUE,...]")
@click.option("--skip", multiple=True, metavar="CHECK", help="A check that does not apply to this memory; may be given several times.")
@click.option("--only", multiple=True, metavar="CHECK", help="A check to run, and no others; may be given several times.")
@click.option(
    "--limit", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, metavar="SECONDS", help="Time for each check."
)
@json_option
@click.pass_context
def check(context: click.Context, spec: str, skip: tuple[str, ...], only: tuple[str, ...], limit: float, as_json: bool) -> None:
    """Checks that an installed memory follows the memory contract. Prints one line per check, with its time in seconds. The
    exit code is 1 if a check fails.

    Choose small sizes, as in window:size=8: a window of 512 rows never fills up in a check of thirty tokens. The memory runs in
    a process of its own, which gets 4 GB: one that exits, prints, eats memory or never ends fails a check.
    """
    from ..errors import InvalidValue, shown
    from ..memory.registry import check_names
    from ..progress import track
    from ..testing import CHECKS
    from ..testing.apart import check_apart

    for option, names in (("--skip", skip), ("--only", only)):
        if unknown := [name for name in names if name not in CHECKS]:
            raise InvalidValue(f"{option}: expected one of {', '.join(CHECKS)}, got {shown(unknown[0])}")
    check_names(spec)
    chosen = [name for name in CHECKS if name not in skip and (name in only or not only)]
    about = {name: (CHECKS[name].__doc__ or "").strip().partition("\n")[0] for name in CHECKS}
    results: list[dict[str, Any]] = []
    for result in track(check_apart(spec, chosen, limit=limit), "checking", len(chosen), "checks"):
        name, failures, seconds = result
        results.append({"check": name, "passed": not failures, "about": about[name], "failures": failures, "seconds": seconds})
    failed, skipped = sum(not each["passed"] for each in results), [name for name in CHECKS if name in skip]
    if as_json:
        print_json({"memory": spec, "passed": not failed, "checks": results, "skipped": skipped})
    else:
        print_table(
            [("check", "left"), ("", "left"), ("requirement", "left"), ("time (s)", "right")],
            [
                (
                    each["check"],
                    "passes" if each["passed"] else "FAILS",
                    "\n".join([each["about"], *each["failures"]]),
                    f"{each['seconds']:.2f}",
                )
                for each in results
            ]
            + [(name, "skipped", about[name], "") for name in skipped],
        )
        if failed:
            first = next(each["check"] for each in results if not each["passed"])
            click.echo("one check alone: " + command_line("plugins", "check", spec, "--only", first))
        said = f"{failed} of {len(chosen)} checks fail" if failed else f"all {len(results)} checks pass"
        click.echo(f"{spec}: {said}" + (f"; skipped: {', '.join(skipped)}" if skipped else ""))
    context.exit(1 if failed else 0)


@plugins.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--name", help="Name of the memory: lowercase letters, digits and _.  [default: that of DIR]")
def new(folder: Path, name: str | None) -> None:
    """Writes a new plugin into DIR: a strategy of a few dozen lines, its test and its package, ready to install.

    DIR must be new or empty. You decide what the strategy keeps, in rows or bytes.
    """
    from ..errors import FileProblem, InvalidValue
    from ..files.writing import write_file
    from ..memory.registry import list_memories

    check_out(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileProblem(f"{folder}: expected a new or empty folder; it holds {next(folder.iterdir()).name}")
    what, name = ("--name", name) if name else (f"{folder}: its name, which the memory gets without --name", _name_of(folder))
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise InvalidValue(f"{what}: expected lowercase letters, digits and _, a letter first, got {name!r}")
    module = importlib.util.find_spec(name)
    if name in list_memories() or (module is not None and module.origin is not None):  # a folder that is none has no origin
        raise InvalidValue(f"{what}: expected one that no memory and no Python module has that is installed, got {name!r}")
    template = resources.files("mini_tfm_plugins") / "template"
    if not template.is_dir():
        raise FileProblem("mini_tfm_plugins/template is missing from this installation; install mini-tfm again")
    written = []
    for source, place in _files(template, ""):
        target = folder / _renamed(place, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, _renamed(source.read_text(encoding="utf-8"), name))
        written.append(target)
    for target in sorted(written):
        click.echo(target)
    note(f"\nTry next:\n  pip install -e {shlex.quote(str(folder))}\n  " + command_line("plugins", "check", f"{name}:size=8"))


def _files(folder: Any, place: str) -> Iterator[tuple[Any, str]]:
    """(file, its path in the template) of all files, without files that Python or an installer left there."""
    for entry in folder.iterdir():
        if entry.name == "__pycache__" or entry.name.endswith((".pyc", ".egg-info")):
            continue
        path = f"{place}{entry.name}"
        if entry.is_dir():
            yield from _files(entry, path + "/")
        else:
            yield entry, path


def _name_of(folder: Path) -> str:
    return re.sub("[ .-]+", "_", folder.resolve().name.lower())


def _renamed(text: str, name: str) -> str:
    """Replaces the template's name in all spellings: my_memory, my-memory, MyMemory."""
    text = text.replace("my_memory", name).replace("my-memory", name.strip("_").replace("_", "-"))
    return text.replace("MyMemory", "".join(part.title() for part in name.split("_")) or "MyMemory")
