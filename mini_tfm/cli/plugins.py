"""`mini-tfm plugins`: lists the installed memories, checks one against the contract, or starts a new one."""

from __future__ import annotations

import keyword
import re
import shlex
import warnings
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import click

from ..errors import MiniTfmError
from .shared import Clock, check_out, command_line, json_option, note, print_json, print_table


@click.group()
def plugins() -> None:
    """List the installed memories, check one, or start a new one."""


@plugins.command("list")
@json_option
def list_(as_json: bool) -> None:
    """Lists every installed memory with its plugin, description and options (sizes are in rows or tokens).

    A plugin that cannot be loaded is listed as broken, with the reason.
    """
    found = _installed()
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


def _installed() -> list[dict[str, Any]]:
    """`describe_memory` of each memory, plus the reason why it is broken (None: it is not)."""
    from ..memory import describe_memory, list_memories
    from ..memory import registry as manager

    found: dict[str, dict[str, Any]] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # the second pass also sees strategies that plugins of other names registered in the first
            for name in list_memories():
                try:
                    found[name] = {**describe_memory(name), "broken": None}
                except Exception as error:  # a broken plugin must not end the list
                    reasons = manager._registry.failed
                    if name in reasons or not isinstance(error, MiniTfmError):
                        found[name] = {
                            "name": name,
                            "plugin": _owner(name),
                            "about": "",
                            "options": {},
                            "broken": reasons.get(name, str(error)),
                        }
                    # else it is a plugin, but no strategy, of that name
    for warning in caught:
        if "could not be loaded" not in str(warning.message):  # those are in the list
            note(f"warning: {warning.message}")
    return [found[name] for name in sorted(found)]


def _owner(name: str) -> str:
    """The plugin and its distribution, named as in `describe_memory`, without loading it."""
    from ..memory.hookspecs import ENTRY_POINT_GROUP

    points = [point for point in metadata.entry_points(group=ENTRY_POINT_GROUP) if point.name == name]
    return f"{name} ({points[0].dist.name} {points[0].dist.version})" if points and points[0].dist else name


def _options(options: dict[str, Any]) -> str:
    return ", ".join(
        name if value == "required" else f"{name}={str(value).lower() if value in (None, True, False) else value}"
        for name, value in options.items()
    )


@plugins.command()
@click.argument("spec", metavar="NAME[:OPTION=VALUE,...]")
@json_option
@click.pass_context
def check(context: click.Context, spec: str, as_json: bool) -> None:
    """Checks that an installed memory follows the memory contract. Prints one line per check, with its time in seconds. The
    exit code is 1 if a check fails.

    Choose small sizes, as in window:size=8: a window of 512 rows never fills up in a check of thirty tokens.
    """
    from ..memory import memory as make_memory
    from ..progress import track
    from ..testing import CHECKS, CheckFailed, check_memory

    make_memory(spec)  # an unknown name or option is an error, not a failed check
    results: list[dict[str, Any]] = []
    for name in track(CHECKS, "checking", len(CHECKS), "checks"):
        clock, failures = Clock(), []
        try:
            check_memory(spec, skip=set(CHECKS) - {name})
        except CheckFailed as error:
            failures = [line.strip().removeprefix(name).strip() for line in str(error).splitlines()[1:]]
        about = (CHECKS[name].__doc__ or "").strip().partition("\n")[0]
        results.append({"check": name, "passed": not failures, "about": about, "failures": failures, "seconds": clock.seconds})
        if name == "runs" and failures:
            break  # nothing else can be learned
    failed = sum(not each["passed"] for each in results)
    if as_json:
        print_json({"memory": spec, "passed": not failed, "checks": results})
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
            ],
        )
        click.echo(f"{spec}: " + (f"{failed} of {len(CHECKS)} checks fail" if failed else f"all {len(results)} checks pass"))
    context.exit(1 if failed else 0)


TEMPLATE_NAME = "my_memory"


@plugins.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--name", default=TEMPLATE_NAME, show_default=True, help="Name of the memory: lowercase letters, digits and _.")
def new(folder: Path, name: str) -> None:
    """Writes a new plugin into DIR: a strategy of a few dozen lines, its test and its package, ready to install.

    DIR must be new or empty. You decide what the strategy keeps, in rows or bytes.
    """
    from ..errors import FileProblem, InvalidValue
    from ..files.writing import write_file

    if not re.fullmatch(r"[a-z_][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise InvalidValue(f"--name: expected lowercase letters, digits and _, a letter first, got {name!r}")
    check_out(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileProblem(f"{folder}: expected a new or empty folder; it holds {next(folder.iterdir()).name}")
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
    note(f"\nTry next:\n  pip install -e {shlex.quote(str(folder))}\n  " + command_line("plugins", "check", name))


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


def _renamed(text: str, name: str) -> str:
    """Replaces the template's name in all spellings: my_memory, my-memory, MyMemory."""
    text = text.replace("my_memory", name).replace("my-memory", name.strip("_").replace("_", "-"))
    return text.replace("MyMemory", "".join(part.title() for part in name.split("_")) or "MyMemory")
