"""Charts as SVG that follows the page's colours: no script, no inline style.

A series is told apart by its marker and its name, never by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 44
MARKERS = (
    Markup('<circle cx="{x}" cy="{y}" r="4"/>'),
    Markup('<path d="M{x} {y}m-4 4h8l-4-8z"/>'),
    Markup('<path d="M{x} {y}m-4-4h8v8h-8z"/>'),
    Markup('<path d="M{x} {y}m0-5l5 5l-5 5l-5-5z"/>'),
)


@dataclass(frozen=True)
class Dot:
    """One point of a chart.

    Args:
        x: Position.
        y: Position.
        words: What a pointer is shown.
        label: What stands beside it; empty for most.
        low: Lower end of the interval of y.
        high: Upper end.
    """

    x: float
    y: float
    words: str
    label: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points that belong together, joined by a line.

    Args:
        name: What stands in the legend.
        dots: The points, in order.
        marked: Whether every point has a marker; else the last alone.
    """

    name: str
    dots: tuple[Dot, ...]
    marked: bool = True


@dataclass(frozen=True)
class Axis:
    """One axis.

    Args:
        label: What it counts, with the unit.
        logarithmic: Whether equal lengths are equal factors.
    """

    label: str
    logarithmic: bool = False


def chart(title: str, series: Sequence[Series], x: Axis, y: Axis) -> Markup:
    """A figure: the drawing, its legend, and its title for who cannot see it.

    Raises:
        ValueError: If there is no point.
    """
    dots = [dot for one in series for dot in one.dots]
    if not dots:
        raise ValueError(f"the chart {title!r} has no point; leave it out")
    xs = _Scale([d.x for d in dots], LEFT, WIDTH - RIGHT, x.logarithmic)
    heights = [value for d in dots for value in (d.y, d.low, d.high) if value is not None]
    ys = _Scale(heights, HEIGHT - BOTTOM, TOP, y.logarithmic)
    parts = [_grid(xs, ys, x, y)]
    parts += [_drawn(one, number, xs, ys) for number, one in enumerate(series)]
    legend = Markup("").join(
        Markup(
            '<li class="s{}"><svg viewBox="-6 -6 12 12" class="key" aria-hidden="true">{}</svg>{}'
            "</li>"
        ).format(number % 4, _marker(number, 0, 0), one.name)
        for number, one in enumerate(series)
    )
    return Markup(
        '<figure class="chart"><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
        '<ul class="legend">{}</ul></figure>'
    ).format(WIDTH, HEIGHT, title, Markup("").join(parts), legend)


class _Scale:
    """From values to positions, with a little room around and round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool) -> None:
        self.log = log
        found = [self._of(value) for value in values]
        low, high = min(found), max(found)
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def at(self, value: float) -> float:
        share = (self._of(value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        if self.log:
            exponents = range(math.floor(self.low), math.ceil(self.high) + 1)
            every = [factor * 10.0**e for e in exponents for factor in (1, 2, 5)]
            inside = [v for v in every if self.low <= math.log10(v) <= self.high]
            decades = [v for v in inside if math.log10(v).is_integer()]
            return decades if len(decades) > 2 else inside
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 3))
        step *= next(f for f in (5, 2, 1) if step * f * 3 <= (self.high - self.low) * 1.001)
        first = math.ceil(self.low / step)
        count = math.floor(self.high / step) - first + 1
        return [round((first + i) * step, 10) for i in range(count)]


def _grid(xs: _Scale, ys: _Scale, x: Axis, y: Axis) -> Markup:
    parts = []
    for value in ys.ticks():
        at = ys.at(value)
        parts.append(
            Markup(
                '<path class="grid" d="M{} {}H{}"/><text x="{}" y="{}" text-anchor="end">{}</text>'
            ).format(LEFT, at, WIDTH - RIGHT, LEFT - 6, at + 4, f"{value:g}")
        )
    for value in xs.ticks():
        at = xs.at(value)
        parts.append(
            Markup(
                '<path class="grid" d="M{} {}V{}"/>'
                '<text x="{}" y="{}" text-anchor="middle">{}</text>'
            ).format(at, TOP, HEIGHT - BOTTOM, at, HEIGHT - BOTTOM + 16, f"{value:g}")
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            middle, HEIGHT - 6, x.label
        )
    )
    parts.append(
        Markup(
            '<text class="axis" transform="rotate(-90)" text-anchor="middle" x="{}" y="12">'
            "{}</text>"
        ).format(-(TOP + HEIGHT - BOTTOM) / 2, y.label)
    )
    return Markup("").join(parts)


def _drawn(one: Series, number: int, xs: _Scale, ys: _Scale) -> Markup:
    places = [(xs.at(dot.x), ys.at(dot.y)) for dot in one.dots]
    path = " ".join(f"{'L' if i else 'M'}{px} {py}" for i, (px, py) in enumerate(places))
    parts = [Markup('<path class="line" d="{}"/>').format(path)]
    for i, (dot, (px, py)) in enumerate(zip(one.dots, places, strict=True)):
        if not one.marked and i + 1 < len(places):
            continue
        whisker = Markup("")
        if dot.low is not None and dot.high is not None:
            whisker = Markup('<path class="whisker" d="M{} {}V{}"/>').format(
                px, ys.at(dot.low), ys.at(dot.high)
            )
        label = Markup("")
        if dot.label:
            end = px > (LEFT + WIDTH - RIGHT) / 2
            label = Markup('<text x="{}" y="{}"{}>{}</text>').format(
                px - 7 if end else px + 7,
                py - 7,
                Markup(' text-anchor="end"') if end else "",
                dot.label,
            )
        parts.append(
            Markup("<g><title>{}</title>{}{}{}</g>").format(
                dot.words, whisker, _marker(number, px, py), label
            )
        )
    return Markup('<g class="s{}">{}</g>').format(number % 4, Markup("").join(parts))


def _marker(number: int, x: float, y: float) -> Markup:
    return MARKERS[number % len(MARKERS)].format(x=x, y=y)
