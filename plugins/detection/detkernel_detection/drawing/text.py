"""Text in images: a font that has the characters, and class names that fit."""

from __future__ import annotations

from functools import lru_cache

from detkernel.errors import printable
from PIL import ImageFont

LONGEST = 40
"""Characters of a name that are drawn."""
_LATIN = "\u024f"
"""The last character that Pillow's own font is sure to have."""
_SYSTEM = (
    "NotoSansCJK-Regular.ttc",
    "ArialUnicode.ttf",
    "Arial Unicode.ttf",
    "msyh.ttc",
    "DejaVuSans.ttf",
    "Arial.ttf",
)


@lru_cache(64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, of a size in pixels."""
    return ImageFont.load_default(size)


def shown(name: str) -> str:
    """A name from a file that can be drawn: in one line, not too long, and without characters that no font here has."""
    name = printable(name)
    name = f"{name[: LONGEST - 3]}..." if len(name) > LONGEST else name
    return name if _capable(name, 16) is not None else name.encode("ascii", "backslashreplace").decode()


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font that has the characters of a text that is `shown`."""
    return _capable(text, size) or font(size)


def _capable(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    if all(char <= _LATIN for char in text):
        return font(size)
    fonts = (_system(name, size) for name in _SYSTEM)
    return next((found for found in fonts if found is not None and _has(found, text)), None)


@lru_cache(64)
def _system(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font of the system, where it is installed."""
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _has(found: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether every character is drawn otherwise than one that no font has."""
    missing = bytes(found.getmask("\U0010ffff"))
    return all(char.isspace() or bytes(found.getmask(char)) != missing for char in text)
