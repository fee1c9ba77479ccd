"""Colours of classes."""

from __future__ import annotations

import colorsys
from typing import TypeAlias

Colour: TypeAlias = "tuple[int, int, int]"
"""R, G and B, 0..255."""

PALETTE = [
    "ff780f",
    "1e3cff",
    "1effe1",
    "ff1eff",
    "00783c",
    "962da5",
    "f0e100",
    "2db4a5",
    "e1a5ff",
    "f0005a",
    "1e87e1",
    "00f05a",
    "a578c3",
    "ff87a5",
    "b44b00",
    "b44b78",
    "694bd2",
    "78a500",
    "96c369",
    "a5f096",
    "f069e1",
    "a50fff",
    "ff5a69",
    "d200a5",
    "c35aff",
    "4bd2d2",
    "b40078",
    "e1b400",
    "a57800",
    "7869b4",
    "5ae196",
    "d25aa5",
]
"""Each is the one farthest from all before it in OKLab (Ottosson 2020), the distance being the lesser of that which
most people see and 1.6 times that which is left to people without green receptors (Machado et al. 2009)."""

WHITE: Colour = (255, 255, 255)
BLACK: Colour = (16, 17, 20)


def colour(label: int) -> Colour:
    """The colour of a class by its label: of the palette, and behind it hues by the golden ratio."""
    if label < len(PALETTE):
        text = PALETTE[label]
        return int(text[:2], 16), int(text[2:4], 16), int(text[4:], 16)
    red, green, blue = colorsys.hsv_to_rgb((0.07 + label * 0.618034) % 1, 0.55 + 0.15 * (label % 4), 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def ink(paper: Colour) -> Colour:
    """Black or white, whichever is read more easily on a colour (ITU-R BT.601 luma)."""
    red, green, blue = paper
    return BLACK if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else WHITE
