"""Packages of other people: whole ones, the template and the tutorial's among them, and broken ones, which cost a warning.

A package is installed as pip leaves it, a module and a `.dist-info` on the path, but without pip.
"""

import contextlib
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest

import mini_tfm as mt
from mini_tfm.errors import InvalidValue, PluginError
from mini_tfm.memory import describe_memory
from mini_tfm.memory import registry as manager
from mini_tfm.memory.registry import PluginWarning
from mini_tfm.testing.trial import Reader, random_segments, small_model

ROOT = Path(__file__).parent.parent
TEMPLATE = ROOT / "plugins" / "template"
TUTORIAL = ROOT / "docs" / "write-a-memory.md"

GOOD = """
from mini_tfm.memory import RowMemory, hookimpl

class Mine(RowMemory):
    "Keeps the newest."
    def __init__(self, *, size=4):
        super().__init__(size=size)
    def keep(self, scores, positions):
        return positions

@hookimpl
def register_memories(register):
    register({name!r}, Mine)
"""


def write_distribution(folder, name, version, entry_points):
    info = Path(folder) / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("")
    (info / "entry_points.txt").write_text("[mini_tfm]\n" + "".join(f"{key} = {value}\n" for key, value in entry_points.items()))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty folder on the path, and a registry that has seen nothing yet; install(name, code) puts a package there."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(manager, "_registry", manager._Registry())
    modules = []

    def install(name, code, *, version="1.2.3", distribution=None, entry=None):
        module = f"plugin_module_{name.replace('-', '_')}"
        (folder / f"{module}.py").write_text(code)
        write_distribution(folder, distribution or f"{name}-package", version, {name: entry or module})
        modules.append(module)
        importlib.invalidate_caches()
        return module

    yield install
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def elsewhere(tmp_path):
    """Environment of a process that sees the folder of `site`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])}


def works(name):
    reader = Reader(small_model("decoder-only"), mt.memory(name), 1)
    return all(np.isfinite(reader.read(tokens)).all() for tokens in random_segments(1, 3))


def test_a_third_party_strategy_is_found_by_name(site):
    site("mine", GOOD.format(name="mine"))
    assert "mine" in mt.list_memories() and works("mine:size=3") and works("mine+store")
    assert describe_memory("mine") == {
        "name": "mine",
        "plugin": "mine (mine-package 1.2.3)",
        "about": "Keeps the newest.",
        "options": {"size": 4},
    }


def test_a_list_of_names_imports_nobody(site, tmp_path):
    module = site("mine", f"open({str(tmp_path / 'imported')!r}, 'w').close()\n" + GOOD.format(name="mine"))
    assert "mine" in mt.list_memories() and works("window")
    assert module not in sys.modules and not (tmp_path / "imported").exists()
    mt.memory("mine")
    assert module in sys.modules


def test_a_memory_is_found_by_the_name_of_its_entry_point(site):
    module = site("bundle", GOOD.format(name="hidden-one"))
    with pytest.raises(InvalidValue, match=r"expected an installed strategy \((.*, )?bundle, .*\), got 'hidden-one'"):
        mt.memory("hidden-one")
    assert module not in sys.modules
    with pytest.raises(PluginError, match="memory 'bundle': the plugin of that name offers only hidden-one; a memory is found by its name"):
        mt.memory("bundle")


def test_one_module_may_have_several_memories(site, tmp_path):
    """Each with an entry point; whichever is asked for first."""
    code = GOOD.format(name="first") + "    register('second', Mine)\n"
    module = site("first", code)
    write_distribution(tmp_path / "site", "second-package", "1.0", {"second": module})
    importlib.invalidate_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert works("second") and works("first") and works("first+second")


@pytest.mark.parametrize("text", ["windw", "qqqq", "mine2", "window+stor"])
def test_a_misspelt_name_imports_nobody(site, text):
    """Not even to look for it: another's module may take for ever."""
    modules = [site("mine", GOOD.format(name="mine")), site("endless", "while True: pass")]
    with pytest.raises(InvalidValue, match="expected an installed strategy"):
        mt.memory(text)
    assert not set(modules) & set(sys.modules)


def test_an_interrupted_import_is_begun_again(site):
    code = "import mini_tfm\nif not hasattr(mini_tfm, 'interrupted'):\n    mini_tfm.interrupted = True\n    raise KeyboardInterrupt\n"
    hook = GOOD.format(name="mine").replace("    register(", "    " + code.replace("\n", "\n    ") + "register(")
    site("mine", hook)
    try:
        with pytest.raises(KeyboardInterrupt):
            mt.memory("mine")
        assert works("mine")
    finally:
        del mt.interrupted


def write_broken(kind, folder):
    """A package whose metadata is broken, as an interrupted installer or a full disk leaves it; its name in the warning."""
    info = folder / "sad-1.0.dist-info"
    if kind == "a line without =":
        write_distribution(folder, "sad", "1.0", {})
        (info / "entry_points.txt").write_text("[console_scripts]\nnothing\n")
    elif kind == "no text":
        write_distribution(folder, "sad", "1.0", {})
        (info / "entry_points.txt").write_bytes(b"[mini_tfm]\nx = \xff\xfe")
    elif kind == "no metadata":
        write_distribution(folder, "sad", "1.0", {"sad": "sad"})
        (info / "METADATA").unlink()
    elif kind == "no name":
        info = folder / ".dist-info"
        info.mkdir()
        (info / "entry_points.txt").write_text("[mini_tfm]\nsad = sad\n")
    return info


@pytest.mark.parametrize("kind", ["a line without =", "no text", "no metadata", "no name"])
def test_a_package_whose_metadata_is_broken_costs_one_warning_that_names_it(site, tmp_path, kind):
    site("mine", GOOD.format(name="mine"))
    info = write_broken(kind, tmp_path / "site")
    importlib.invalidate_caches()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert "mine" in mt.list_memories() and works("mine") and works("window+store")
    told = [str(warning.message) for warning in told if issubclass(warning.category, PluginWarning)]
    assert len(told) == 1 and told[0].startswith(f"package {info}: its entry points cannot be read, and it is left out: ")


def test_nobody_takes_the_name_of_another(site):
    site("window", GOOD.format(name="window"), distribution="usurper")
    with pytest.warns(PluginWarning, match=r"memory plugin window \(usurper 1.2.3\) is left out: window \(mini-tfm .*\) has that name"):
        assert mt.memory("window", sinks=1).sinks == 1
    site("thief", GOOD.format(name="window"))
    told = r"memory 'window' of plugin thief \(thief-package 1.2.3\) is left out"
    with pytest.warns(PluginWarning, match=told), contextlib.suppress(PluginError):
        mt.memory("thief")
    assert mt.memory("window", sinks=1).sinks == 1


# Broken distributions

HOOK = "from mini_tfm.memory import hookimpl\n@hookimpl\ndef register_memories(register): "
BROKEN = {
    "import error": ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
    "raises at import": ("1 / 0", "ZeroDivisionError: division by zero"),
    "exits at import": ("import sys; sys.exit('goodbye')", "SystemExit: goodbye"),
    "syntax error": ("def (:", "SyntaxError: invalid syntax"),
    "null bytes": ("x = 1\0", "null bytes"),
    "no hook": ("x = 1", "it registers no strategy"),
    "hook not marked": ("def register_memories(register): register('broken', dict)", "it registers no strategy"),
    "hook of another signature": (
        "from mini_tfm.memory import hookimpl\n@hookimpl\ndef register_memories(registry, extra): pass",
        "PluginValidationError",
    ),
    "hook that raises": (HOOK + "raise RuntimeError('no')", "RuntimeError: no"),
    "hook that exits": (HOOK + "raise SystemExit", "SystemExit"),
    "hook that registers nothing": (HOOK + "pass", "it registers no strategy"),
    "registers no factory": (
        HOOK + "register('broken', 7)",
        "factory: expected a Memory class or a callable that returns a Memory, got 7",
    ),
    "registers an odd name": (
        HOOK + "register(7, dict)",
        "name: expected letters, digits, _ and -, a letter first, got 7",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_costs_one_warning_that_names_it(site, kind):
    code, reason = BROKEN[kind]
    site("broken", code)
    site("mine", GOOD.format(name="mine"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(PluginError, match="memory 'broken': its plugin could not be loaded: "):
            mt.memory("broken")
        with pytest.raises(PluginError):
            mt.memory("broken")  # the second time without a warning
        with pytest.raises(InvalidValue, match="expected an installed strategy"):
            mt.memory("qqqq")
        assert works("mine") and works("window:size=4+store")
    told = [str(warning.message) for warning in told if issubclass(warning.category, PluginWarning)]
    assert len(told) == 1
    assert told[0].startswith("memory plugin broken (broken-package 1.2.3) could not be loaded and is left out: ") and reason in told[0]


def test_an_entry_point_to_nowhere(site):
    module = site("broken", "", entry="plugin_module_broken:nothing_of_that_name")
    told = r"broken \(broken-package 1.2.3\) .* has no attribute 'nothing_of_that_name'"
    with pytest.warns(PluginWarning, match=told), pytest.raises(PluginError):
        mt.memory("broken")
    assert module and works("window")


def test_an_interrupt_at_import_is_an_interrupt(site):
    site("broken", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        mt.memory("broken")


RAISES = """
from mini_tfm.memory import Memory, MemorySpec, Param, Rows, View, hookimpl
import numpy as np

class Bad(Memory):
    spec = MemorySpec(needs=frozenset({{"query"}}))
    def {method}(self, *args):
        {body}

@hookimpl
def register_memories(register):
    register("bad", Bad)
"""
METHODS = ["__init__", "parameters", "start", "begin", "view", "read", "write", "logits", "flush"]


@pytest.mark.parametrize(
    "body",
    ["raise ValueError('mine')", "import sys; sys.exit(4)", "raise GeneratorExit", "raise BaseException('own')", "return 'nonsense'"],
    ids=lambda x: x.replace("(", " ").split()[1 - x.startswith("import")],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_goes_wrong_in_a_method_is_told_with_plugin_version_and_place(site, method, body):
    if body.startswith("return") and method in ("__init__", "flush"):
        pytest.skip("what it returns is not looked at")
    site("bad", RAISES.format(method=method, body=body), version="0.9b1")
    model = small_model("decoder-only")
    with pytest.raises(PluginError) as caught:
        made = mt.memory("bad")
        model.add_memory_weights(made)
        reader = Reader(model, made, 1)
        reader.read(random_segments(1, 1)[0])
        reader.run.flush()
    told = str(caught.value)
    assert told.startswith(f"memory 'bad' (bad (bad-package 0.9b1)) failed in {method}")
    place = {"begin": ", site decoder, segment 0", "flush": ", segment 1", "__init__": ""}.get(method, ", segment 0")
    place = ", site decoder, layer 0, segment 0" if method in ("view", "read", "write") else place
    assert f"failed in {method}{place}: " in told
    if not body.startswith("return"):
        assert type(caught.value.__cause__).__name__ in body.replace("sys.exit", "SystemExit")
    assert works("window")


def test_the_command_line_lists_plugins_though_all_are_broken(site, elsewhere):
    for number, (code, _) in enumerate(BROKEN.values()):
        if "\0" not in code:
            site(f"broken{number}", code)
    done = subprocess.run([sys.executable, "-m", "mini_tfm", "plugins", "list"], env=elsewhere, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "window" in done.stdout and "broken3" in done.stdout


# The template and the tutorial


def install_project(folder, site_folder):
    """What `pip install` would do with a project of modules."""
    about = tomllib.loads((folder / "pyproject.toml").read_text())
    for module in about["tool"]["setuptools"]["py-modules"]:
        (site_folder / f"{module}.py").write_text((folder / f"{module}.py").read_text())
    project = about["project"]
    write_distribution(site_folder, project["name"], project["version"], project["entry-points"]["mini_tfm"])


def run_tests(folder, environment):
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_template_passes_its_own_tests(site, tmp_path, elsewhere):
    install_project(TEMPLATE, tmp_path / "site")
    project = tmp_path / "project"
    (project / "tests").mkdir(parents=True)
    (project / "tests" / "test_my_memory.py").write_text((TEMPLATE / "tests" / "test_my_memory.py").read_text())
    run_tests(project, elsewhere)
    importlib.invalidate_caches()
    assert works("my_memory:size=6,every=2")
    sys.modules.pop("my_memory")


def blocks():
    """(mark, text) of every code block of the tutorial that is a file or is to be run."""
    return re.findall(r"<!-- (file: [^ ]+|run|run: long) -->\n```\w+\n(.*?)```", TUTORIAL.read_text(), re.S)


def test_every_block_of_the_tutorial_is_marked():
    text = TUTORIAL.read_text()
    assert text.count("```") // 2 == len(blocks()) + 1, "one more shows what a failure looks like"
    assert [mark for mark, _ in blocks() if mark.startswith("file")] == [
        "file: gist-memory/pyproject.toml",
        "file: gist-memory/gist_memory.py",
        "file: gist-memory/tests/test_gist_memory.py",
    ]


def test_the_strategy_of_the_tutorial_is_short():
    (code,) = [text for mark, text in blocks() if mark.endswith("gist_memory.py") and "tests" not in mark]
    assert len(code.splitlines()) < 40


def follow(tmp_path, environment, marks):
    """Writes the tutorial's files, installs them, and runs the blocks marked so."""
    for mark, text in blocks():
        if mark.startswith("file: "):
            target = tmp_path / mark.removeprefix("file: ")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    install_project(tmp_path / "gist-memory", tmp_path / "site")
    for mark, text in blocks():
        if mark not in marks:
            continue
        is_python = "import" in text
        commands = [[sys.executable, "-W", "error", "-c", text]] if is_python else [shlex.split(line) for line in text.splitlines()]
        for command in commands:
            if command[:2] == ["pip", "install"]:
                continue  # done above
            if command[0] == "mini-tfm":
                command = [sys.executable, "-m", "mini_tfm", *command[1:]]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_the_tutorial_works_as_it_stands(site, tmp_path, elsewhere):
    follow(tmp_path, elsewhere, {"run"})
    run_tests(tmp_path / "gist-memory" / "tests", elsewhere)


@pytest.mark.long
def test_the_comparison_of_the_tutorial_works(site, tmp_path, elsewhere):
    follow(tmp_path, elsewhere, {"run: long"})
    assert (tmp_path / "comparison" / "report.html").exists()
