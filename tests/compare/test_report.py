"""The report: all of an experiment in one file that loads nothing, and plots with their lines inside."""

import dataclasses
import itertools
import re
from xml.etree import ElementTree

import pytest
from experiments import small_experiment

from mini_tfm.cli.shared import command_line
from mini_tfm.compare.plot import Axis, line_chart
from mini_tfm.compare.report import html_report


@pytest.fixture
def experiment():
    return small_experiment(
        {"a <b>": "x", "c": "y"}, [None, "window:size=8", "a&b<script>"], None, seconds=60.0, seed=0, report=lambda line: None
    )


def parsed(page):
    """The page, which is well-formed but for what HTML closes by itself."""
    body = re.sub(r"<(meta|br)([^>]*)>", r"<\1\2/>", page.removeprefix("<!doctype html>\n"))
    return ElementTree.fromstring(body.replace("&ldquo;", "").replace("&rdquo;", ""))


def test_the_report_holds_all_and_loads_nothing(experiment):
    page = html_report(experiment, "mini-tfm demo --text 'a b' --seed 0")
    root = parsed(page)
    assert "<script" not in page and "http" not in page and "url(" not in page and "src=" not in page
    text = "".join(root.itertext())
    for word in ("window:size=8", "a&b<script>", "mini-tfm demo --text 'a b' --seed 0", "<fast> & small", "a <b>", "1.900", "98.8 MB"):
        assert word in text
    assert len(root.findall(".//svg")) == 2 and "nan" not in page.lower().replace("financ", "")


def test_on_a_narrow_screen_every_figure_has_its_name_beside_it(experiment):
    """The table's head is not shown there: a figure's name comes from its cell."""
    page = html_report(experiment, "mini-tfm demo")
    assert "@media (max-width: 48rem)" in page and "content: attr(data-name)" in page
    (table,) = parsed(page).findall(".//table[@class='rows']")
    head, *rows = table.findall("tr")
    names = [" ".join(" ".join(each.itertext()).split()) for each in head]
    assert [f"recall {d} back" for d in experiment.distances] == names[2:7] and len(rows) == len(experiment.rows)
    for row in rows:
        assert [cell.get("data-name") for cell in row][1:] == names[1:]


def test_a_plot_has_its_lines_inside():
    series = [(f"line {i}", "#123456", [(0.0, 1.0 + i / 1000), (3.0, 2.0), (5.0, float("nan"))]) for i in range(12)]
    root = ElementTree.fromstring(line_chart(series, Axis("x"), Axis("y")))
    _, _, width, height = map(float, root.get("viewBox").split())
    labels = [element for element in root.iter("text") if (element.text or "").startswith("line ")]
    heights = sorted(float(element.get("y")) for element in labels)
    assert len(labels) == 12 and heights[0] > 0 and heights[-1] < height
    assert all(after - before > 12 for before, after in itertools.pairwise(heights))
    for path in root.iter("path"):
        for number in re.findall(r"-?\d+\.\d", path.get("d")):
            assert -10 <= float(number) <= width


@pytest.mark.parametrize("points", [[(0.0, 0.0)], [(1.0, 5.0), (1.0, 5.0)], [(0.0, 1e-9), (1.0, 2e-9)], [(0.0, -1e9), (1e9, 1e9)]])
def test_a_plot_of_hardly_anything(points):
    ElementTree.fromstring(line_chart([("a", "#000", points)], Axis("x"), Axis("y")))


def test_a_plot_of_nothing():
    assert "Nothing was measured" in line_chart([("a", "#000", [(0.0, float("nan"))])], Axis("x"), Axis("y"))


def test_a_report_of_a_run_without_steps(experiment):
    rows = [dataclasses.replace(row, history=[], steps=0) for row in experiment.rows]
    parsed(html_report(dataclasses.replace(experiment, rows=rows, history={}), command_line("demo")))
