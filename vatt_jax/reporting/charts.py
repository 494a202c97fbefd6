"""Line charts: scales, ticks and points, which page/page.html draws as SVG.

By hand and not by a chart library: SVG follows the colours of the page, is read by screen readers
and without a script, and takes a few kilobytes; the libraries draw on a canvas or bring 50 kB to
several megabytes of script.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

# Size of a chart and the room around its plot, in the units of the SVG.
WIDTH, HEIGHT = 430, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 12, 44
# Of a line. A long run has more, which would only fill the page.
MOST_POINTS = 400
# Lines that differ in colour; beyond them they differ in their dashes too.
COLORS = 6
DASHES = ('', '7 3', '2 3')

# A name and its points (x, y).
Line = tuple[str, Sequence[tuple[float, Any]]]


@dataclasses.dataclass(frozen=True)
class Tick:
    """A mark of an axis.

    Attributes:
        position: in the units of the SVG.
        label: what it says.
    """

    position: float
    label: str


@dataclasses.dataclass(frozen=True)
class DrawnLine:
    """A line of a chart.

    Attributes:
        name: for the legend.
        color: number of its colour, from 0.
        dash: SVG's stroke-dasharray; '' for a solid line.
        path: its points, as SVG's polyline has them.
    """

    name: str
    color: int
    dash: str
    path: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart, ready to be drawn.

    Attributes:
        title: above it.
        summary: what a reader who does not see it should know.
        x_ticks: of steps.
        y_ticks: of values.
        lines: what is drawn.
        data: what the script needs to say the values at a step: `lines` with `name`, `steps`,
            `values`, `x` and `y`.
    """

    title: str
    summary: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[DrawnLine]
    data: dict[str, Any]


def line_chart(title: str, lines: Sequence[Line]) -> Chart | None:
    """One chart of values by step; None where there is nothing to draw.

    Points that are not finite numbers are left out.

    Args:
        title: of the chart.
        lines: its lines; further points than MOST_POINTS of each are thinned out, with the lowest
            and the highest of every stretch kept.
    """
    finite = []
    for name, points in lines:
        shown = [point for point in points if _is_finite(point[1])]
        if shown:
            finite.append((name, _thinned(shown)))
    if not finite:
        return None

    steps = [x for _, points in finite for x, _ in points]
    values = [y for _, points in finite for _, y in points]
    low, high = _value_range(values)
    # There is no half a step.
    x_values = [x for x in ticks(0, max(steps) or 1, 5) if x == int(x)]
    y_values = ticks(low, high, 5)
    # The plot ends at a tick on both sides, or with the last point where steps end between two.
    low, high = min(low, y_values[0]), max(high, y_values[-1])
    last_x = max(max(steps), 1)

    def across(x: float) -> float:
        return round(LEFT + x / last_x * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        # SVG's y axis points down.
        return round(TOP + (high - y) / (high - low) * (HEIGHT - BOTTOM - TOP), 1)

    drawn = []
    data = []
    for order, (name, points) in enumerate(finite):
        xs = [across(x) for x, _ in points]
        ys = [down(y) for _, y in points]
        path = ' '.join(f'{x},{y}' for x, y in zip(xs, ys, strict=True))
        color, dash = order % COLORS, DASHES[order // COLORS % len(DASHES)]
        drawn.append(DrawnLine(name, color, dash, path))
        data.append(
            {
                'name': name,
                'color': color,
                'steps': [x for x, _ in points],
                'values': [float(f'{y:.4g}') for _, y in points],
                'x': xs,
                'y': ys,
            }
        )
    return Chart(
        title=title,
        summary=_summary(title, finite),
        x_ticks=[Tick(across(x), number(x)) for x in x_values if x <= last_x],
        y_ticks=[Tick(down(y), label) for y, label in zip(y_values, labels(y_values), strict=True)],
        lines=drawn,
        data={'lines': data},
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that cover [low, high]: multiples of 1, 2 or 5 times a power of ten.

    Args:
        low: the lowest value.
        high: the highest value, above `low`.
        count: about how many steps between them.
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    # The smallest round step that needs no more than `count` of them.
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Rounded, since multiples of 0.1 are not exact: 0.30000000000000004.
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """The numbers of an axis, all with as many decimals as their distance needs."""
    largest = max(abs(value) for value in values)
    distance = values[1] - values[0]
    if 0 < largest < 1e-3:
        return ['0' if value == 0 else number(value) for value in values]
    if largest >= 1e4:
        return [number(value) for value in values]
    decimals = max(0, -math.floor(math.log10(distance) + 1e-9))
    return [f'{value:.{decimals}f}' for value in values]


def number(value: float) -> str:
    """A number in few characters: 250, 12.5k, 1M, 2e-05."""
    if abs(value) >= 1e6:
        return f'{value / 1e6:g}M'
    if abs(value) >= 1e4:
        return f'{value / 1e3:g}k'
    return f'{value:.4g}'


def _value_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        # A level line gets room above and below it.
        margin = abs(high) * 0.05 or 1.0
        return low - margin, high + margin
    # From zero, where that costs little: heights then compare. Never below, where nothing is.
    if 0 <= low < 0.4 * high:
        low = 0.0
    return low, high


def _thinned(points: Sequence[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """At most MOST_POINTS of them: the lowest and the highest of each stretch, in order."""
    if len(points) <= MOST_POINTS:
        return list(points)
    # Where the run began and where it stands stay.
    first, *rest, last = points
    kept = [first]
    stretches = (MOST_POINTS - 2) // 2
    for i in range(stretches):
        stretch = rest[len(rest) * i // stretches : len(rest) * (i + 1) // stretches]
        extremes = {
            min(stretch, key=lambda point: point[1]),
            max(stretch, key=lambda point: point[1]),
        }
        kept += sorted(extremes)
    return [*kept, last]


def _summary(title: str, lines: Sequence[Line]) -> str:
    """'loss by step: 5.42 at step 1, 1.2 at step 600, lowest 1.18, highest 5.42.'"""
    sentences = []
    for name, points in lines:
        values = [y for _, y in points]
        (first_x, first_y), (last_x, last_y) = points[0], points[-1]
        subject = f'{name}: ' if len(lines) > 1 else ''
        sentences.append(
            f'{subject}{first_y:.4g} at step {first_x:g}, {last_y:.4g} at step {last_x:g}, '
            f'lowest {min(values):.4g}, highest {max(values):.4g}.'
        )
    return f'{title} by step. {" ".join(sentences)}'


def _is_finite(value: Any) -> bool:
    # None stands for NaN in metrics.jsonl. Beyond 1e100, differences of two values may overflow.
    return isinstance(value, (int, float)) and abs(value) < 1e100
