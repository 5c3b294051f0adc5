"""docs/settings.md names every environment variable of the project, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACES = ("mini_tfm", "plugins", "tests", "benchmarks", ".ci", "setup.py", "noxfile.py", "pyproject.toml")
SUFFIXES = {"", ".c", ".h", ".md", ".pxd", ".pxi", ".py", ".pyi", ".pyx", ".sh", ".toml"}
NAME = re.compile(r"MINI_TFM_[A-Z][A-Z_]*")


def names_in_the_tree():
    """Every MINI_TFM_ name but include guards, which end in _H."""
    found = set()
    for place in PLACES:
        for path in [ROOT / place, *(ROOT / place).rglob("*")]:
            if path.is_file() and path.suffix in SUFFIXES and path.name not in ("kernels.c", Path(__file__).name):
                found.update(NAME.findall(path.read_text(encoding="utf-8")))
    return {name for name in found if not name.endswith("_H")}


def names_in_the_table():
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    return [name for line in page.splitlines() if line.startswith("| `") for name in NAME.findall(line.split("|")[1])]


def test_the_table_names_every_setting():
    missing = names_in_the_tree() - set(names_in_the_table())
    assert not missing, f"docs/settings.md has no row for {', '.join(sorted(missing))}"


def test_the_table_names_no_setting_that_is_gone():
    gone = set(names_in_the_table()) - names_in_the_tree()
    assert not gone, f"docs/settings.md has a row for {', '.join(sorted(gone))}, which nothing reads"


def test_each_setting_has_one_row():
    names = names_in_the_table()
    assert len(names) == len(set(names))
