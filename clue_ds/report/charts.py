"""Curves as SVG inside a page: no picture beside it, no library, and the page's own colours."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 34
NUM_COLOURS = 6
MOST_POINTS = 500  # of a curve; more would only make the page larger


class Curve(NamedTuple):
    """`points`: (step, value), in order of steps. `restarts`, `saves`: steps."""

    name: str
    colour: int
    points: list[tuple[float, float]]
    restarts: Sequence[int] = ()
    saves: Sequence[int] = ()


def colour(number: int) -> str:
    """The page's variable for the colour of run `number`."""
    return f"var(--c{number % NUM_COLOURS})"


def chart(title: str, curves: Sequence[Curve], show: Callable[[float], str], last: int) -> str:
    """A figure with all curves over the steps up to `last`; "" without any point.

    `show` writes a value.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    values = [y for curve in curves for _, y in curve.points]
    low, high, marks = _scale(min(values), max(values))
    x_marks = [mark for mark in _scale(0, last)[2] if mark <= last]

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / max(1, last)
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)

    parts = []
    for mark in marks:
        _, y = at(0, mark)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{show(mark)}</text>')
    for mark in x_marks:
        x, _ = at(mark, low)
        where = f'x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}"'
        parts.append(f'<text {where} text-anchor="middle">{short(mark)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    parts += [_drawn(curve, at, low, high, show) for curve in curves]
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def bars(title: str, counts: dict[str, int]) -> str:
    """A figure with a bar and its number for each key; "" without any."""
    if not counts:
        return ""
    most = max(1, *counts.values())
    rows = [
        f'<div class="bar"><span>{html.escape(name)}</span>'
        f'<i style="width:{100 * number / most:.1f}%"></i><b>{number:,}</b></div>'
        for name, number in counts.items()
    ]
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{''.join(rows)}</figure>"


def _drawn(
    curve: Curve,
    at: Callable[[float, float], tuple[float, float]],
    low: float,
    high: float,
    show: Callable[[float], str],
) -> str:
    """A curve, its restarts as dashed lines, its saves as triangles on the axis."""
    ink = colour(curve.colour)
    points = _thinned(curve.points)
    parts = []
    for step in curve.restarts:
        (x, top), (_, end) = at(step, high), at(step, low)
        parts.append(
            f'<path class="restart" d="M{x:.1f} {top:.1f}V{end:.1f}">'
            f"<title>{html.escape(curve.name)}: started again after step {step:,}</title></path>"
        )
    for step in curve.saves:
        x, y = at(step, low)
        parts.append(
            f'<path d="M{x:.1f} {y - 7:.1f}l-4 7h8z" style="fill:{ink}">'
            f"<title>{html.escape(curve.name)}: saved after step {step:,}</title></path>"
        )
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*point) for point in points))
    last_step, last = points[-1]
    said = f"{curve.name}: {show(last)} at step {last_step:,.0f}"
    if len(points) == 1:
        x, y = at(*points[0])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{ink}"/>')
    parts.append(
        f'<path class="curve" style="stroke:{ink}" d="M{line}">'
        f"<title>{html.escape(said)}</title></path>"
    )
    return "".join(parts)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS of the points, with the first and the last."""
    if len(points) <= MOST_POINTS:
        return points
    stride = (len(points) - 1) / (MOST_POINTS - 1)
    return [points[round(number * stride)] for number in range(MOST_POINTS)]


def _scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """(lowest, highest, marks) of an axis that shows both values, with three to six round marks."""
    if high <= low:
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = [step * number for number in range(first, last + 1)]
    return marks[0], marks[-1], marks


def short(value: float) -> str:
    """A number for an axis: 1,500 -> 1.5k, 2e6 -> 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
