"""Draws detections over images, and images on a sheet."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from detkernel.errors import printable
from detkernel_detection import Dataset, Detections
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from detkernel_report.draw_predictions import DrawPredictions

_GAP = 6
_PAPER = (24, 26, 30)
_TRUTH = (255, 255, 255)
_MASK_OPACITY = 90
_FAR = 10_000
"""Pixels beyond which nothing is drawn: Pillow would walk along every line."""
_LONGEST = 40
"""Characters of a class name that are drawn."""


def colour(label: int) -> tuple[int, int, int]:
    """Bright and far from its neighbours: hues by the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb((0.07 + label * 0.618034) % 1, 0.75, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def tile(options: DrawPredictions, dataset: Dataset, found: Detections) -> Image.Image:
    """One image with its annotations and detections."""
    pixels = dataset.image(found.index).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    found = found.keep((found.scores >= options.score) & found.boxes.isfinite().all(1)).to("cpu")
    if found.masks is not None:
        image = _with_masks(image, found)
    scale = options.side / max(image.size)
    small = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(small, Image.Resampling.BILINEAR if scale < 2 else Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    if options.annotations:
        for box in dataset.annotations(found.index).boxes.tolist():
            draw.rectangle([round(side * scale) for side in box], outline=_TRUTH)
    _draw_boxes(draw, dataset.classes, found, scale)
    return image


def _draw_boxes(draw: ImageDraw.ImageDraw, classes: Sequence[str], found: Detections, scale: float) -> None:
    """The best last, so that it lies on top."""
    font = ImageFont.load_default(11)
    boxes, scores, labels = found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()
    for box, score, label in reversed(list(zip(boxes, scores, labels, strict=True))):
        x1, y1, x2, y2 = (min(max(round(side * scale), -_FAR), _FAR) for side in box)
        draw.rectangle([x1, y1, max(x1, x2), max(y1, y2)], outline=colour(label), width=2)
        text = f"{_label(classes[label])} {score:.2f}"
        high = 13
        top = y1 - high if y1 >= high else y1
        draw.rectangle([x1, top, x1 + draw.textlength(text, font) + 4, top + high], fill=colour(label))
        draw.text((x1 + 2, top), text, fill=_ink(colour(label)), font=font)


def _label(name: str) -> str:
    """A class name that can be drawn: in one line, and not longer than the sheet is wide."""
    name = printable(name)
    return f"{name[: _LONGEST - 3]}..." if len(name) > _LONGEST else name


def _ink(paper: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is read more easily (ITU-R BT.601 luma)."""
    red, green, blue = paper
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else (255, 255, 255)


def _with_masks(image: Image.Image, found: Detections) -> Image.Image:
    import numpy as np

    base = image.convert("RGBA")
    assert found.masks is not None
    for mask, label in zip(found.masks.numpy(), found.labels.tolist(), strict=True):
        layer = Image.new("RGBA", base.size, (*colour(label), 0))
        layer.putalpha(Image.fromarray((mask > 0).astype(np.uint8) * _MASK_OPACITY))
        base = Image.alpha_composite(base, layer)
    return base.convert("RGB")


def encode(tiles: Sequence[Image.Image], columns: int) -> bytes:
    """All images in rows, as a PNG."""
    columns = min(columns, len(tiles))
    wide, high = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (wide + _GAP) + _GAP, rows * (high + _GAP) + _GAP), _PAPER)
    for number, image in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(image, (_GAP + column * (wide + _GAP), _GAP + row * (high + _GAP)))
    return png(sheet)


def png(image: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
