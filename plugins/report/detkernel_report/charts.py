"""Line charts as SVG: whole without a script, to zoom with one, and each with its values as a table."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import attrs
from markupsafe import Markup

from detkernel_report.html import cut, details, html, joined, number, table

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 42
"""Margins of the plot."""
COLOURS = 8
POINTS = 600
"""That are drawn of a line."""
ROWS = 40
"""Of a chart's table."""

Point = tuple[float, float]


@attrs.frozen
class Series:
    name: str
    points: Sequence[Point]
    """By rising x; where y is nan, the line has a gap."""
    shown: bool = True
    """Whether it is drawn at first."""


@attrs.frozen
class View:
    """What of the plane is to be seen."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x: str = "iteration",
    y: str = "",
    y_range: tuple[float, float] | None = None,
    x_range: tuple[float, float] | None = None,
    last: bool = True,
) -> Markup:
    """A chart with its legend and table; a line of text where there is no point to draw.

    `last`: whether the legend has each line's last value.
    """
    series = [one for one in series if any(math.isfinite(value) for _, value in one.points)]
    if not series:
        return html('<p class="none">{}: there are no values.</p>', title)
    name = "c" + hashlib.sha256("\0".join([title, *(one.name for one in series)]).encode()).hexdigest()[:10]
    view = _view(series, x_range, y_range)
    lines = joined(_line(at, one, view) for at, one in enumerate(series))
    return html(
        '<figure class="chart" data-view="{view}">'
        '<figcaption><h3>{title}</h3><span class="zoom" role="group" aria-label="Zoom {title}"></span></figcaption>'
        '<svg viewBox="0 0 {width} {height}" role="img" aria-label="{said}">'
        '<clipPath id="{name}"><rect x="{left}" y="{top}" width="{inner}" height="{high}"/></clipPath>'
        '<g class="axes">{axes}</g><g clip-path="url(#{name})"><g class="lines">{lines}</g></g>'
        '<text class="label" x="{middle}" y="{low}" text-anchor="middle">{x}</text>'
        '<text class="label" x="4" y="9">{y}</text><g class="cursor"></g></svg>{legend}{values}</figure>',
        view=f"{view.x0!r} {view.x1!r} {view.y0!r} {view.y1!r}", title=title,
        said=_said(title, series, x), name=Markup(name), width=WIDTH, height=HEIGHT, left=LEFT,
        top=TOP, inner=WIDTH - LEFT - RIGHT, high=HEIGHT - TOP - BOTTOM, axes=joined(_axes(view)), lines=lines,
        middle=(LEFT + WIDTH - RIGHT) / 2, low=HEIGHT - 6, x=x, y=y, legend=_legend(title, series, last),
        values=details("Values as a table", _values(title, series, x)),
    )  # fmt: skip


def _view(series: Sequence[Series], x_range: tuple[float, float] | None, y_range: tuple[float, float] | None) -> View:
    xs = [x for one in series for x, y in one.points if math.isfinite(y)]
    ys = [y for one in series if one.shown or not any(each.shown for each in series) for _, y in one.points]
    ys = [y for y in ys if math.isfinite(y)]
    x0, x1 = x_range or (min(xs), max(xs))
    y0, y1 = y_range or _padded(ys)
    if x0 == x1:
        x0, x1 = x0 - 1, x1 + 1
    return View(x0, x1, y0, y1)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < 0.3 * high else low - room), high + room


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in a range, about `count`."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= count)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"


def _axes(view: View) -> Iterator[Markup]:
    for value in ticks(view.y0, view.y1):
        yield html(
            '<path d="M{:.1f},{:.1f}H{}"/><text x="{}" y="{:.1f}" text-anchor="end">{}</text>',
            LEFT, view.y(value), WIDTH - RIGHT, LEFT - 6, view.y(value) + 4, tick_label(value),
        )  # fmt: skip
    for value in ticks(view.x0, view.x1, 6):
        yield html(
            '<path d="M{:.1f},{}V{}"/><text x="{:.1f}" y="{}" text-anchor="middle">{}</text>',
            view.x(value), TOP, HEIGHT - BOTTOM, view.x(value), HEIGHT - BOTTOM + 16, tick_label(value),
        )  # fmt: skip


def _line(at: int, one: Series, view: View) -> Markup:
    """A path of the finite points, with dots where they are few."""
    points = _thinned(one.points)
    path, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            path.append(f"{pen}{view.x(x):.1f},{view.y(y):.1f}")
            pen = "L"
        else:
            pen = "M"
    dots = "".join(f"M{view.x(x):.1f},{view.y(y):.1f}h0" for x, y in points if math.isfinite(y))
    return html(
        '<g class="{}{}" data-line="{}"><path d="{}"/>{}</g>',
        _look(at), "" if one.shown else " off", at, Markup("".join(path)),
        html('<path class="dots" d="{}"/>', Markup(dots)) if len(points) <= 30 else Markup(""),
    )  # fmt: skip


def _look(at: int) -> str:
    return f"s{at % COLOURS}" + " dashed" * (at // COLOURS % 2)


def _thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """Evenly fewer points, the last among them."""
    step = -(-len(points) // most)
    return list(points) if step <= 1 else [*points[:-1:step], points[-1]]


def _legend(title: str, series: Sequence[Series], last: bool) -> Markup:
    rows = joined(
        html(
            '<li><label><input type="checkbox" data-line="{}"{}><svg class="swatch {}" viewBox="0 0 22 8" '
            'aria-hidden="true"><path d="M0,4H22"/></svg><span>{}</span>{}</label></li>',
            at, Markup(" checked") if one.shown else Markup(""), _look(at), cut(one.name),
            html(" <b>{}</b>", number(_last(one))) if last else "",
        )
        for at, one in enumerate(series)
    )  # fmt: skip
    return html('<ul class="legend" aria-label="Lines of {}">{}</ul>', title, rows)


def _last(one: Series) -> float:
    return next((y for _, y in reversed(one.points) if math.isfinite(y)), math.nan)


def _said(title: str, series: Sequence[Series], x: str) -> str:
    """The chart in words, for a screen reader."""
    said = []
    for one in series[:6]:
        known = [(at, y) for at, y in one.points if math.isfinite(y)]
        (first, start), (last, end) = known[0], known[-1]
        said.append(f"{cut(one.name)} from {number(start)} at {x} {first:g} to {number(end)} at {last:g}")
    more = f", and {len(series) - 6} more lines" if len(series) > 6 else ""
    return f"{title}: {'; '.join(said)}{more}. The values are in the table below the chart."


def _values(title: str, series: Sequence[Series], x: str) -> Markup:
    """Up to `ROWS` rows, evenly chosen."""
    columns = [dict(one.points) for one in series]
    places = sorted({place for column in columns for place in column})
    rows = [
        [f"{place:g}", *(number(column.get(place)) for column in columns)]
        for place, _ in _thinned([(place, 0.0) for place in places], ROWS)
    ]
    return table(title, [x, *(cut(one.name) for one in series)], rows, numeric=0)
