"""Curves of the loss and of metrics, as an image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from detkernel_detection.drawing import png
from detkernel_detection.drawing.colours import Colour, colour
from detkernel_detection.drawing.sheet import PAPER
from detkernel_detection.drawing.text import font, font_for, shown
from PIL import Image, ImageDraw

Points: TypeAlias = "Sequence[tuple[int, float]]"
"""(iteration, value)."""

_WIDTH, _HEIGHT = 620, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 60, 40
_GRID: Colour = (58, 62, 70)
_SOFT: Colour = (176, 182, 192)
_INK: Colour = (255, 255, 255)
_TEXT = 14


def curves(panels: Sequence[tuple[str, Mapping[str, Points]]]) -> bytes:
    """A PNG of panels side by side: each a title and lines by name."""
    image = Image.new("RGB", (_WIDTH * len(panels), _HEIGHT), PAPER)
    for number, (title, lines) in enumerate(panels):
        image.paste(_panel(title, lines), (number * _WIDTH, 0))
    return png(image)


def _panel(title: str, lines: Mapping[str, Points]) -> Image.Image:
    image = Image.new("RGB", (_WIDTH, _HEIGHT), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((_LEFT, 10), title, fill=_INK, font=font(18))
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in lines.items()}
    every = [point for points in finite.values() for point in points]
    if not every:
        pen.text((_LEFT, _TOP), "nothing yet", fill=_SOFT, font=font(_TEXT))
        return image
    xs, ys = ticks(0, max(x for x, _ in every)), ticks(min(y for _, y in every), max(y for _, y in every))
    across, up = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * across,
            _TOP + up - (y - ys[0]) / (ys[-1] - ys[0]) * up,
        )

    for y in ys:
        at = place(xs[0], y)[1]
        pen.line((_LEFT, at, _LEFT + across, at), fill=_GRID)
        pen.text((_LEFT - 8, at), f"{y:.4g}", fill=_SOFT, font=font(_TEXT), anchor="rm")
    for x in xs:
        pen.text((place(x, ys[0])[0], _TOP + up + 8), f"{x:g}", fill=_SOFT, font=font(_TEXT), anchor="ma")
    legend = float(_LEFT)
    for number, (name, points) in enumerate(finite.items()):
        places = [place(*point) for point in points]
        if len(places) > 1:
            pen.line(places, fill=colour(number), width=2, joint="curve")
        for x, y in places if len(places) <= 30 else places[-1:]:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour(number))
        text = shown(name) + (f" {points[-1][1]:.4g}" if points else "")
        pen.rectangle((legend, 39, legend + 11, 50), fill=colour(number))
        pen.text((legend + 17, 45), text, fill=_SOFT, font=font_for(text, _TEXT), anchor="lm")
        legend += 17 + pen.textlength(text, font_for(text, _TEXT)) + 18
    return image


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values, at most so many and two at least, the first at or below `low`, the last at or above `high`."""
    span = high - low if high > low else max(abs(high), 1.0) * 0.1
    step = 10 ** math.floor(math.log10(span / (most - 1)))
    while True:
        for factor in (1, 2, 5):
            first, last = math.floor(low / (step * factor)), math.ceil(high / (step * factor))
            if last - first < most:
                last = max(last, first + 1)
                return [number * step * factor for number in range(first, last + 1)]
        step *= 10
