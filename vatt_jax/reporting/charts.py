"""Line charts as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

# As many lines as colours are drawn; further ones are dropped (zip, strict=False).
COLORS = ('#2563eb', '#dc2626', '#059669', '#d97706', '#7c3aed', '#0891b2')
# Size of a chart, and the room left of and below its plot, in the units of the SVG.
WIDTH, HEIGHT, LEFT, BOTTOM = 430, 230, 66, 26
TOP, RIGHT = 12, 10

# A name and its points (x, y).
Line = tuple[str, Sequence[tuple[float, Any]]]


def line_chart(title: str, lines: Sequence[Line]) -> str:
    """One line chart as HTML; '' where there is nothing to draw.

    Points that are not finite numbers are left out.
    """
    finite = [(name, [p for p in points if _is_finite(p[1])]) for name, points in lines]
    everything = [point for _, points in finite for point in points]
    if not everything:
        return ''
    plot = _Plot(everything)
    parts = [plot.rules(), plot.step_labels()]
    for (_, points), color in zip(finite, COLORS, strict=False):
        path = ' '.join(','.join(plot.position(x, y)) for x, y in points)
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.6" points="{path}"/>')
    legend = _legend([name for name, _ in finite]) if len(finite) > 1 else ''
    return (
        f'<figure><figcaption>{html.escape(title, quote=True)} {legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg></figure>'
    )


class _Plot:
    """The scales of one chart. points: all that is drawn."""

    def __init__(self, points: Sequence[tuple[float, float]]):
        heights = [y for _, y in points]
        low, high = min(heights), max(heights)
        # A line that is level still gets room above and below it.
        margin = (high - low) * 0.05 or abs(high) * 0.05 or 1
        self.low, self.high = low - margin, high + margin
        # x is a step: the axis begins at 0.
        self.last_x = max(x for x, _ in points) or 1

    def position(self, x: float, y: float) -> tuple[str, str]:
        """Coordinates in the SVG, as text."""
        across = LEFT + x / self.last_x * (WIDTH - LEFT - RIGHT)
        # SVG's y axis points down.
        down = TOP + (self.high - y) / (self.high - self.low) * (HEIGHT - BOTTOM - TOP)
        return f'{across:.1f}', f'{down:.1f}'

    def rules(self) -> str:
        """Five horizontal lines with their values."""
        parts = []
        for i in range(5):
            value = self.low + (self.high - self.low) * i / 4
            x, y = self.position(0, value)
            parts.append(
                f'<line x1="{x}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" class="grid"/>'
                f'<text x="{LEFT - 6}" y="{float(y) + 4}" text-anchor="end">{value:.3g}</text>'
            )
        return ''.join(parts)

    def step_labels(self) -> str:
        """First, middle and last x below the plot."""
        parts = []
        for value in (0, self.last_x / 2, self.last_x):
            x, _ = self.position(value, self.low)
            # The last label would run out of the picture if it were centred.
            anchor = 'end' if value == self.last_x else 'middle'
            parts.append(
                f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="{anchor}">{value:.0f}</text>'
            )
        return ''.join(parts)


def _is_finite(value: Any) -> bool:
    # None stands for NaN in metrics.jsonl.
    return isinstance(value, (int, float)) and math.isfinite(value)


def _legend(names: Sequence[str]) -> str:
    entries = []
    for name, color in zip(names, COLORS, strict=False):
        entries.append(f'<span style="color:{color}">— {html.escape(name, quote=True)}</span> ')
    return ''.join(entries)
