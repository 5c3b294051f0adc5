"""Makes all pages of benchmarks, as HTML that opens without a network:

    python benchmarks/pages.py                 an hour, on an idle machine
    python benchmarks/pages.py --quick         minutes, to see that all of it runs; its figures are not to be believed

    pages/index.html                    what there is
    pages/performance.html              beside the peers: performance.py; performance-training.html likewise
    pages/by-commit.html                what asv has measured so far, a column a commit

asv's own pages, of `asv publish`, load their scripts from the network; these hold all that they need. What asv measures goes to
.asv/results as ever: `asv run` for other commits, then `--only by-commit`, shows those, too.
"""

import argparse
import datetime
import html
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

from markdown_it import MarkdownIt  # rich brings it

from mini_tfm.compare.report import STYLE

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / ".asv" / "results"
QUICK = "^(start\\.|kernels\\.Softmax\\.|attention\\.OneQuery\\.)"  # of asv: half a minute on an idle machine
COMMITS = 6  # columns
PAGES = {
    "performance": "Beside the peers: kernels, decoding, search",
    "performance-training": "Training beside PyTorch",
    "by-commit": "By commit",
}


def from_markdown(text):
    return MarkdownIt().enable("table").render(text).replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")


def page(title, body):
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def performance(out, quick, *more):
    """A page of performance.py; its links lead to files of the repository, which are not beside it."""
    markdown = out.with_suffix(".md")
    words = [sys.executable, str(FOLDER / "performance.py"), "--out", str(markdown), *more, *(["--quick"] if quick else [])]
    subprocess.run(words, check=True)
    out.write_text(page("mini_tfm: performance", from_markdown(markdown.read_text(encoding="utf-8"))), encoding="utf-8")


def measure_commit(quick):
    """Runs the suite on the package of this environment, and keeps the results under the commit that is checked out."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=FOLDER, check=True, capture_output=True, text=True).stdout.strip()
    asv = [sys.executable, "-m", "asv"]
    subprocess.run([*asv, "machine", "--yes"], cwd=FOLDER, check=True, stdout=subprocess.DEVNULL)
    words = [*asv, "run", "--environment", f"existing:{sys.executable}", "--set-commit-hash", commit]
    done = subprocess.run([*words, *(["--quick", "--bench", QUICK] if quick else [])], cwd=FOLDER)
    if done.returncode not in (0, 2):  # 2: a benchmark failed, which the page shows
        raise SystemExit(done.returncode)


def results():
    """(machine, commit, date, benchmark, parameters) -> the figure, from asv's files."""
    found = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        if path.name == "machine.json":
            continue
        told = json.loads(path.read_text(encoding="utf-8"))
        when = datetime.datetime.fromtimestamp(told["date"] / 1000, datetime.UTC)
        for name, values in told["results"].items():
            values = dict(zip(told["result_columns"], values, strict=False))
            for parameters, figure in zip(itertools.product(*(values.get("params") or [])), values["result"] or [], strict=False):
                found[path.parent.name, told["commit_hash"], when, name, ", ".join(parameters)] = figure
    return found


def by_commit():
    """A table a machine and a file of the suite, a row a benchmark and its parameters, a column a commit."""
    units_file, found = RESULTS / "benchmarks.json", results()
    about = json.loads(units_file.read_text(encoding="utf-8")) if units_file.exists() else {}
    units = {name: each["unit"] for name, each in about.items() if isinstance(each, dict)}
    parts = ["# By commit", "Times are in seconds. A dash: not measured, or it failed. The newest commit is on the right."]
    if not found:
        parts.append("asv has measured nothing yet.")
    for machine in sorted({key[0] for key in found}):
        here = {key[1:]: figure for key, figure in found.items() if key[0] == machine}
        commits = [commit for _, commit in sorted({(key[1], key[0]) for key in here})][-COMMITS:]
        figures = {(commit, name, parameters): figure for (commit, _, name, parameters), figure in here.items()}
        for module in sorted({name.partition(".")[0] for _, name, _ in figures}):
            rows = sorted({(name, parameters) for _, name, parameters in figures if name.startswith(module + ".")})
            head = ["benchmark", "parameters", "unit", *(commit[:8] for commit in commits)]
            lines = [head, ["---"] * 3 + ["---:"] * len(commits)]
            for name, parameters in rows:
                shown = [number(figures.get((commit, name, parameters))) for commit in commits]
                lines.append(
                    [name.partition(".")[2], "`" + parameters.replace("|", "\\|") + "`" if parameters else "", units.get(name, ""), *shown]
                )
            parts += [f"## {module}, on {machine}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    return "\n\n".join(parts)


def number(figure):
    return "-" if not isinstance(figure, int | float) or figure != figure else f"{figure:.4g}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and short measurements")
    parser.add_argument("--only", nargs="+", choices=PAGES, default=list(PAGES))
    parser.add_argument("--measured", action="store_true", help="measure nothing: show what asv has measured before")
    parser.add_argument("--out", type=Path, default=FOLDER / "pages")
    given = parser.parse_args(arguments)
    needed = ["scipy", "threadpoolctl"] if set(given.only) != {"by-commit"} else []
    needed += ["asv", "virtualenv"] if "by-commit" in given.only and not given.measured else []
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        sys.exit(f"benchmarks/pages.py: {missing[0]} is not installed: {Path(sys.executable).parent}/pip install {' '.join(missing)}")
    given.out.mkdir(parents=True, exist_ok=True)
    if "performance" in given.only:
        performance(given.out / "performance.html", given.quick, *(["--only", "rows", "--threads", "1"] if given.quick else []))
    if "performance-training" in given.only and not given.quick:
        performance(given.out / "performance-training.html", given.quick, "--only", "steps")
    if "by-commit" in given.only:
        if not given.measured:
            measure_commit(given.quick)
        (given.out / "by-commit.html").write_text(page("mini_tfm: by commit", from_markdown(by_commit())), encoding="utf-8")
    there = [f'<li><a href="{name}.html">{title}</a></li>' for name, title in PAGES.items() if (given.out / f"{name}.html").exists()]
    (given.out / "index.html").write_text(page("mini_tfm: benchmarks", f"<h1>Benchmarks</h1><ul>{''.join(there)}</ul>"), encoding="utf-8")
    print(given.out / "index.html")


if __name__ == "__main__":
    main()
