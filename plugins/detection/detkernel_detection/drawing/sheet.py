"""Many images on one sheet: a header, a legend, and a caption below each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from detkernel_detection.drawing.colours import BLACK, WHITE, Colour, colour
from detkernel_detection.drawing.text import font_for, shown

PAPER: Colour = (24, 26, 30)
_SOFT: Colour = (176, 182, 192)
_ALERT: Colour = (255, 196, 84)
_GAP = 12
_TITLE, _TEXT = 22, 15


class Tile(NamedTuple):
    """An image on a sheet."""

    image: Image.Image
    caption: str = ""
    alert: bool = False
    """Whether the caption is to be noticed."""


def sheet(
    tiles: Sequence[Tile],
    columns: int,
    *,
    title: str = "",
    notes: Sequence[str] = (),
    alerts: Sequence[str] = (),
    classes: Sequence[tuple[int, str]] = (),
    truth: bool = False,
) -> Image.Image:
    """Tiles in rows, below a title, notes, what is to be noticed, and a legend of (label, class); `truth`: with the
    dashes of annotations in it. Lines that are too long are wrapped at spaces."""
    columns = max(1, min(columns, len(tiles)))
    wide = max((tile.image.width for tile in tiles), default=320)
    width = max(columns * (wide + _GAP) + _GAP, 320)
    lines = [(text, _TITLE, WHITE) for text in _wrapped(title, width, _TITLE)]
    lines += [(text, _TEXT, _SOFT) for note in notes for text in _wrapped(note, width, _TEXT)]
    lines += [(text, _TEXT, _ALERT) for note in alerts for text in _wrapped(note, width, _TEXT)]
    entries = _legend([*([(-1, "annotated")] if truth else []), *classes], width)
    head = sum(round(size * 1.5) for _, size, _ in lines) + len(entries) * round(_TEXT * 1.7)
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    caption = round(_TEXT * 1.6) if any(tile.caption for tile in tiles) else 0
    heights = [max(tile.image.height for tile in row) + caption for row in rows]
    made = Image.new("RGB", (width, _GAP * (2 if head else 1) + head + sum(heights) + _GAP * len(rows)), PAPER)
    pen = ImageDraw.Draw(made)
    y = _GAP
    for text, size, paint in lines:
        pen.text((_GAP, y), text, fill=paint, font=font_for(text, size))
        y += round(size * 1.5)
    for entry in entries:
        for x, label, name in entry:
            _swatch(pen, x, y, label)
            pen.text((x + _TEXT + 6, y + _TEXT // 2), name, fill=WHITE, font=font_for(name, _TEXT), anchor="lm")
        y += round(_TEXT * 1.7)
    y = y + _GAP if head else y
    for row, high in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            x = _GAP + column * (wide + _GAP)
            made.paste(tile.image, (x, y))
            if tile.caption:
                text = _cut(tile.caption, wide)
                paint = _ALERT if tile.alert else _SOFT
                pen.text((x, y + tile.image.height + 3), text, fill=paint, font=font_for(text, _TEXT))
        y += high + _GAP
    return made


def png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """The image as a JPEG file, with colours as sharp as its lines."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _swatch(pen: ImageDraw.ImageDraw, x: int, y: int, label: int) -> None:
    if label >= 0:
        pen.rectangle((x, y + 1, x + _TEXT - 3, y + _TEXT - 2), fill=colour(label), outline=BLACK)
        return
    for start in (x, x + 5, x + 10):
        pen.line((start, y + 2, start + 2, y + 2), fill=WHITE, width=2)
        pen.line((start, y + _TEXT - 3, start + 2, y + _TEXT - 3), fill=WHITE, width=2)


def _legend(classes: Sequence[tuple[int, str]], width: int) -> list[list[tuple[int, int, str]]]:
    """(x, label, name) of each entry, line by line."""
    lines: list[list[tuple[int, int, str]]] = []
    x = width
    for label, given in classes:
        name = shown(given)
        size = _TEXT + 6 + math.ceil(_length(name, _TEXT)) + 18
        if x + size > width - _GAP:
            lines.append([])
            x = _GAP
        lines[-1].append((x, label, name))
        x += size
    return lines


def _length(text: str, size: int) -> float:
    found: Any = font_for(text, size)
    return float(found.getlength(text))


def _wrapped(text: str, width: int, size: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and _length(f"{lines[-1]} {word}", size) <= width - 2 * _GAP:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return lines


def _cut(text: str, width: int) -> str:
    """From its end as much as fits: of a path, the name of the file."""
    text = text.encode("ascii", "backslashreplace").decode() if not text.isprintable() else text
    while len(text) > 4 and _length(text, _TEXT) > width:
        text = f"...{text[4:]}"
    return text
