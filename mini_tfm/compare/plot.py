"""Line charts as SVG, without a plotting library: two small charts in one file that opens anywhere."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 920, 340, 62, 270, 14, 46
MARKS = (
    '<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{c}"/>',
    '<rect x="{x0:.1f}" y="{y0:.1f}" width="8" height="8" fill="{c}"/>',
    '<path d="M{x:.1f} {y1:.1f}l5 9h-10z" fill="{c}"/>',
    '<path d="M{x:.1f} {y1:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z" fill="{c}"/>',
)
Series = tuple[str, str, Sequence[tuple[float, float]]]  # name, colour, points


class Axis(NamedTuple):
    """name: with its unit. range and ticks: None finds them from the data."""

    name: str
    range: tuple[float, float] | None = None
    ticks: Sequence[float] | None = None


class _Scale(NamedTuple):
    """Numbers to places: from `low` to `high` lies between the pixels `first` and `last`."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, number: float) -> float:
        return self.first + (number - self.low) / ((self.high - self.low) or 1) * (self.last - self.first)


def line_chart(
    series: Sequence[Series], x_axis: Axis, y_axis: Axis, *, level: float | None = None, dashed: Sequence[str] = (), marks: bool = True
) -> str:
    """Lines as SVG, named at their right ends. level: a dashed horizontal line. dashed: the series drawn so."""
    finite = [(x, y) for _, _, points in series for x, y in points if math.isfinite(y)]
    if not finite:
        return '<p class="dim">Nothing was measured.</p>'
    xs, ys = zip(*finite, strict=True)
    x_ticks = list(x_axis.ticks or _ticks(min(xs), max(xs)))
    y_ticks = _ticks(*(y_axis.range or (min(ys), max(ys))))
    low, high = y_axis.range or (min(y_ticks[0], *ys), max(y_ticks[-1], *ys))
    at_x = _Scale(min(*xs, x_ticks[0]), max(*xs, x_ticks[-1]), LEFT, WIDTH - RIGHT)
    at_y = _Scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{_text(y_axis.name)} by {_text(x_axis.name)}">']
    parts += _grid(x_ticks, y_ticks, at_x, at_y, x_axis.name, y_axis.name)
    if level is not None:
        parts.append(f'<path d="M{LEFT} {at_y(level):.1f}H{WIDTH - RIGHT}" stroke="#98a1b3" stroke-dasharray="5 5" fill="none"/>')
    ends = []
    for number, (name, colour, points) in enumerate(series):
        drawn = [(at_x(x), at_y(y)) for x, y in points if math.isfinite(y)]
        if drawn:
            parts += _line(drawn, colour, name in dashed, MARKS[number % len(MARKS)] if marks else None)
            ends.append((drawn[-1], name, colour))
    return "".join(parts + _labels(ends)) + "</svg>"


def _grid(x_ticks: Sequence[float], y_ticks: Sequence[float], at_x: _Scale, at_y: _Scale, x_name: str, y_name: str) -> list[str]:
    right, bottom, middle = WIDTH - RIGHT, HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    parts = []
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {at_y(y):.1f}H{right}"/>')
        parts.append(f'<text class="dim" x="{LEFT - 8}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        parts.append(f'<text class="dim" x="{at_x(x):.1f}" y="{bottom + 18}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{_text(x_name)}</text>')
    parts.append(f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{_text(y_name)}</text>')
    return parts


def _line(drawn: Sequence[tuple[float, float]], colour: str, is_dashed: bool, mark: str | None) -> list[str]:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in drawn)
    dash = ' stroke-dasharray="5 4"' if is_dashed else ""
    parts = [f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2.2"{dash}/>']
    if mark is not None:
        parts += [mark.format(x=x, y=y, x0=x - 4, y0=y - 4, y1=y - 5.5, c=colour) for x, y in drawn]
    return parts


def _labels(ends: Sequence[Any]) -> list[str]:
    """Names at the right ends of the lines: ((x, y), name, colour)."""
    right, parts = WIDTH - RIGHT, []
    for y, ((end_x, end_y), name, colour) in _spread(ends):
        parts.append(f'<path d="M{end_x + 6:.1f} {end_y:.1f}L{right + 16} {y:.1f}" stroke="{colour}" stroke-opacity=".45" fill="none"/>')
        short = name if len(name) <= 34 else name[:33] + "…"
        parts.append(f'<text x="{right + 20}" y="{y + 4:.1f}" style="fill:{colour}">{_text(short)}</text>')
    return parts


def _spread(ends: Sequence[Any]) -> list[tuple[float, Any]]:
    """(y, end) with labels at least a line apart, in the order of the lines' ends."""
    gap = 17.0
    placed: list[tuple[float, Any]] = []
    for end in sorted(ends, key=lambda end: end[0][1]):
        placed.append((max(end[0][1], placed[-1][0] + gap) if placed else end[0][1], end))
    over = max(0.0, placed[-1][0] - (HEIGHT - BOTTOM + 10)) if placed else 0.0
    moved: list[tuple[float, Any]] = []
    for y, end in reversed(placed):  # push back up what went below the plot
        y = min(y, HEIGHT - BOTTOM + 10) if not moved else min(y, moved[-1][0] - gap) if over else y
        moved.append((y, end))
    return moved[::-1]


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    first = math.ceil(low / step - 1e-9)
    found = [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return found or [low]


def _text(text: object) -> str:
    return html.escape(str(text))
