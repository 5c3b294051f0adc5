"""The floors of docs/architecture.md: what may import what, read from the table there and from every import in the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the tests stand alone, there are no docs")

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in (ROOT / "mini_tfm").rglob("*.py")
}


def imports_of(name, path):
    """Modules of ours that a module imports, anywhere in it: at its top, in a function, or for types alone."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            wanted = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in wanted:
            while target and target not in MODULES:
                target = target.rpartition(".")[0]
            if target not in ("", "mini_tfm", name):
                yield target


IMPORTS = {name: set(imports_of(name, path)) for name, path in MODULES.items() if name != "mini_tfm"}


def floors():
    """Room -> its floor, counted from the bottom: the rows of the table, whose first column names rooms."""
    text = PAGE.read_text(encoding="utf-8").partition("\n## Floors\n")[2].partition("\n## ")[0]
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in text.splitlines() if line.startswith("| `")]
    return {room: number for number, rooms in enumerate(reversed(rows)) for room in rooms}


def room(name):
    return name.split(".")[1]


def test_every_room_has_a_floor():
    assert set(floors()) == {room(name) for name in IMPORTS}
    assert len(set(floors().values())) > 12


@pytest.mark.parametrize("name", sorted(IMPORTS))
def test_imports_run_down(name):
    floor = floors()
    up = [target for target in IMPORTS[name] if room(target) != room(name) and floor[room(target)] >= floor[room(name)]]
    assert not up, f"{name} imports {up}, which stand on its floor or above"


def test_there_is_no_circle():
    """Modules that import nothing of what is left are taken away, until none is left."""
    left = dict(IMPORTS)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other in a circle: {sorted(left)}"
