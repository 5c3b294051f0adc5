"""The README, CONTRIBUTING.md and docs/: their code runs, their links lead somewhere, nothing public is left out of them, and their
tree is the tree there is.

docs/write-a-memory.md is followed from its first line to its last by test_plugin_packages.py. docs/command-line.md is
made of the commands' own help and docs/api.md of the docstrings: `python tests/test_docs.py` writes both again.
"""

import dataclasses
import importlib.util
import inspect
import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import api
import click
import pytest
import reliability

import mini_tfm as mt
from mini_tfm.cli import COMMANDS, main
from mini_tfm.memory import Dims, Memory, MemorySpec, New, Param, Query, Rows, Segment, SideOutput, View, describe_memory
from mini_tfm.text import python_topics

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DECISIONS = DOCS / "decisions"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCED = re.compile(r"(?:^<!-- (?P<mark>[^>]*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.S | re.M)
SHELLS = ("bash", "sh", "console")


def blocks(page):
    """(mark, language, code) of each fenced block; the mark is an HTML comment on the line before."""
    return [(match["mark"] or "", match["language"], match["code"]) for match in FENCED.finditer(page.read_text(encoding="utf-8"))]


def to_run(page):
    """Python blocks, and commands that are marked to be run; not files, nor what takes minutes."""
    if page.name == "write-a-memory.md":
        return []
    return [
        (language, code)
        for mark, language, code in blocks(page)
        if (language == "python" and not mark.startswith(("file:", "run: long", "needs:"))) or (language in SHELLS and mark == "run")
    ]


def page_id(page):
    return page.relative_to(ROOT).as_posix()


def text_of(*pages):
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


def is_in(name, text):
    """As a word: `read` is not in `already`, `--out` not in `--outer`."""
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


# Names


def test_each_field_of_the_contracts_types_is_explained():
    """In a row of the table of docs/memory-examples.md, under the name of its type."""
    rows, kind = {}, ""
    for line in (DOCS / "memory-examples.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 3:
            kind = cells[0] or kind
            rows.setdefault(kind, set()).update(re.findall(r"`(\w+)`", cells[1]))
    for made in (MemorySpec, Dims, Param, Segment, Rows, New, Query, View, SideOutput):
        fields = {field.name for field in dataclasses.fields(made)}
        named = next(names for kind, names in rows.items() if f"`{made.__name__}`" in kind)
        assert fields - named == set(), f"{made.__name__}: no word of {sorted(fields - named)}"


# The code


def as_program(page):
    """All that runs of a page, in order, as one Python program: Python shares its names, commands run in between."""
    parts = ["import subprocess"]
    for language, code in to_run(page):
        parts.append(code if language == "python" else f"subprocess.run(['bash', '-euo', 'pipefail', '-c', {code!r}], check=True)")
    return "\n\n".join(parts)


@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)], ids=page_id)
def test_the_code_of_a_page_runs(page, tmp_path):
    scripts = str(Path(sys.executable).parent)  # where mini-tfm is
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"], "PYTHONWARNINGS": "error"}
    program = tmp_path / "page.py"
    program.write_text(as_program(page), encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    done = subprocess.run([sys.executable, str(program)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{page.name}\n{done.stdout}{done.stderr}"
    if page == ROOT / "README.md":
        written, seen, unseen = done.stdout.rstrip("\n").rsplit("\n", 2)
        known, words = set(" ".join(python_topics().values()).split()), written.split()
        assert len(set(words)) > 5 and sum(word in known for word in words) > len(words) / 2, f"not what one would like to see: {written}"
        assert 0 < float(seen.removeprefix("while ")) < 1.5 < float(unseen.removeprefix("try ")) < 8
        command = [sys.executable, "-m", "mini_tfm", "generate", "my-model", "The if statement", "--max-new-tokens", "4"]
        assert subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=300).returncode == 0


def with_packages():
    """(page, packages, language, code, what is printed) of each block that is marked `needs: package package`: the text block after
    it shows what it prints."""
    for page in PAGES:
        on_it = [*blocks(page), ("", "", "")]
        for (mark, language, code), (_, next_language, printed) in itertools.pairwise(on_it):
            if mark.startswith("needs:"):
                yield page, mark.removeprefix("needs:").split(), language, code, printed if next_language == "text" else None


@pytest.mark.parametrize("page, packages, language, code, printed", list(with_packages()))
def test_code_that_needs_packages_prints_what_is_shown(page, packages, language, code, printed, tmp_path):
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    words = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{page.name}\n{done.stdout}{done.stderr}"
    assert printed is None or done.stdout == printed


def test_there_is_code_in_the_readme():
    assert to_run(ROOT / "README.md")


def test_every_fence_is_closed():
    for page in PAGES:
        fences = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("```")]
        assert len(fences) == 2 * len(blocks(page)), f"{page.name}: a block that is not closed, or a comment between its mark and it"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(FENCED, "", page.read_text(encoding="utf-8"))):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def test_the_decisions_are_indexed():
    linked = re.findall(r"\]\(([\w-]+\.md)\)", text_of(DECISIONS / "README.md"))
    assert sorted(linked) == sorted(page.name for page in DECISIONS.glob("*.md") if page.name != "README.md")


SECTIONS = ["The question", "The decision", "Why", "What it costs", "When to look again"]


@pytest.mark.parametrize("page", [page for page in DECISIONS.glob("*.md") if page.name != "README.md"], ids=page_id)
def test_a_decision_is_one_page_with_the_same_five_questions(page):
    text = text_of(page)
    assert re.findall(r"^## (.*)$", text, re.M) == SECTIONS
    assert len(text.split()) < 500


def test_the_test_command_is_one_block():
    """What .ci/run takes out of the README and runs."""
    (part,) = re.findall(r"<!-- test-command -->(.*?)<!-- /test-command -->", text_of(ROOT / "README.md"), re.S)
    (match,) = FENCED.finditer(part)
    assert "pytest" in match["code"] and "[test]" in match["code"]


# Nothing is left out


@pytest.mark.parametrize("name", [name for name in mt.__all__ if name != "__version__"])
def test_a_public_name_is_documented(name):
    assert (getattr(mt, name).__doc__ or "").strip(), f"mt.{name} has no docstring"
    assert is_in(f"mt.{name}", text_of(*PAGES)), f"mt.{name} is neither in README.md nor in docs/"


METHODS = [name for name, value in vars(Memory).items() if callable(value) and not name.startswith("_")]


def test_the_contract_is_not_empty():
    assert {"begin", "view", "read", "write", "absorb", "end", "logits"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_the_contract_is_documented(name):
    assert getattr(Memory, name).__doc__
    contract = text_of(DOCS / "memory-contract.md")
    assert f"`{name}(" in contract or f"`{name}`" in contract, f"Memory.{name} is not in docs/memory-contract.md"


def commands(command=main, words=()):
    """("plugins", "check") and its click.Command, for every command."""
    if not isinstance(command, click.Group):
        return [(words, command)]
    context = click.Context(command)
    found = [commands(command.get_command(context, name), (*words, name)) for name in command.list_commands(context)]
    return [each for some in found for each in some]


def option_row(option):
    """What help says of an option, without what depends on click's version."""
    words = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts]) + (f" {option.metavar}" if option.metavar else "")
    default = option.show_default if isinstance(option.show_default, str) else option.default
    told = f" Default: {default}." if option.show_default and not (default is None or default is False or default == ()) else ""
    return f"| {words} | {option.help or ''}{told} |".replace("  ", " ")


def argument_name(argument):
    name = argument.metavar or argument.name.upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def paragraph(text):
    """Of help; what click must not wrap is a heading and lines of code."""
    if not text.startswith("\b\n"):
        return text
    heading, *lines = text.splitlines()[1:]
    return "\n".join([heading, "", "```text", *(line.strip() for line in lines), "```"])


def command_line_page():
    """docs/command-line.md."""
    parts = [
        "# The command line",
        (main.help or "").partition("\n")[0],
        "`mini-tfm COMMAND --help` shows the same text. Results go to standard output, everything else to standard error. Exit codes: 0"
        " done, 1 a check failed, 2 an error, in one line (`MINI_TFM_DEBUG=1` adds the traceback), 130 Ctrl-C.",
    ]
    for words, command in commands():
        arguments = [argument_name(each) for each in command.params if isinstance(each, click.Argument) and each.metavar != ""]
        parts += ["## mini-tfm " + " ".join([*words, *arguments]), *map(paragraph, inspect.cleandoc(command.help or "").split("\n\n"))]
        rows = [option_row(each) for each in command.params if isinstance(each, click.Option) and "--help" not in each.opts]
        if rows:
            parts.append("\n".join(["| option | what it does |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def test_every_command_and_option_is_documented():
    page = DOCS / "command-line.md"
    assert page.read_text(encoding="utf-8") == command_line_page(), f"{page.name} is out of date: python tests/test_docs.py"


def test_every_public_name_is_in_the_reference():
    assert api.PAGE.read_text(encoding="utf-8") == api.page(), f"{api.PAGE.name} is out of date: python tests/test_docs.py"


@pytest.mark.parametrize("words, command", [pytest.param(*each, id="-".join(each[0])) for each in commands()])
def test_a_command_says_what_it_does(words, command):
    assert is_in("mini-tfm " + " ".join(words), text_of(*PAGES))
    assert command.help
    for each in command.params:
        if isinstance(each, click.Option):
            assert each.help and is_in(each.opts[-1], text_of(DOCS / "command-line.md")), each.name


def test_every_command_was_asked_for():
    assert {words[0] for words, _ in commands()} == set(COMMANDS)


BUILT_IN = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["mini_tfm"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_memory_and_its_options_are_documented(name):
    rows = [line for line in text_of(*PAGES).splitlines() if line.startswith(f"| `{name}` ")]
    options = describe_memory(name)["options"]
    assert any(all(f"`{option}`" in row for option in options) for row in rows), f"no table has {name} with {', '.join(options)}"
    assert re.search(rf"^## .*\b{name}\b", text_of(DOCS / "memories.md"), re.M), f"docs/memories.md has no section about {name}"


def test_the_counts_of_reliability_are_those_of_the_tests():
    assert reliability.PAGE.read_text(encoding="utf-8") == reliability.page(), "out of date: python tests/reliability.py"


# The tree


def documented_tree():
    """Paths of the tree in docs/architecture.md, folders with a slash: by indentation, the names that begin each line."""
    (tree,) = [code for _, _, code in blocks(DOCS / "architecture.md") if re.search(r"^mini_tfm/$", code, re.M)]
    found, above = set(), {}
    for line in tree.splitlines():
        depth = len(line) - len(line.lstrip())
        above = {indent: folder for indent, folder in above.items() if indent < depth}
        inside = "".join(above[indent] for indent in sorted(above))
        for word in line.split():
            if not re.fullmatch(r"[\w-]+(/|\.\w+)", word):
                break  # the line goes on with what it is for
            found.add(inside + word)
            if word.endswith("/"):
                above[depth] = word
    return found


def test_the_tree_names_nothing_else():
    assert not [path for path in documented_tree() if not (ROOT / path).exists()]


def test_the_tree_names_every_module():
    """One by one, or by a folder of which nothing is named."""
    tree = documented_tree()
    assert {"mini_tfm/", "mini_tfm/model.py", "mini_tfm/memory/base.py", "plugins/", "tests/", "benchmarks/", "docs/"} <= tree
    opened = {path.rpartition("/")[0] + "/" for path in tree if not path.endswith("/")} | {"mini_tfm/"}
    missing = []
    for path in sorted((ROOT / "mini_tfm").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        folder = name.rpartition("/")[0] + "/"
        if path.name == "__init__.py":
            named = folder in tree
        elif folder in opened:
            named = name in tree
        else:
            named = folder in tree
        if not named:
            missing.append(name)
    assert not missing


if __name__ == "__main__":
    (DOCS / "command-line.md").write_text(command_line_page(), encoding="utf-8")
    api.PAGE.write_text(api.page(), encoding="utf-8")
