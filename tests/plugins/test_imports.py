"""The built-in strategies use the contract and nothing else of the library, as anyone's do."""

import ast
import sys
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[2] / "plugins"
FILES = sorted(PLUGINS.rglob("*.py"))
ALLOWED = {"mini_tfm.memory", "mini_tfm.errors", "numpy"}
ALSO = {"rows_lmdb.py": {"lmdb"}}


def imports(path):
    """Full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            yield node.module


def test_there_are_files_to_look_at():
    assert {"window.py", "recurrent.py", "store.py", "rows_lmdb.py", "my_memory.py"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in FILES if "tests" not in path.parts[len(PLUGINS.parts) :]])
def test_a_plugin_imports_the_contract_alone(path):
    for name in imports(path):
        own = name.partition(".")[0] in {"mini_tfm_plugins", *sys.stdlib_module_names}
        assert own or name in ALLOWED | ALSO.get(path.name, set()), f"{path.name} imports {name}"
