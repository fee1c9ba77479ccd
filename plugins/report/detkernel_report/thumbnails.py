"""Small JPEGs of images."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from PIL import Image

QUALITY = 80


def jpeg(pixels: Any, side: int) -> bytes:
    """A tensor [3, H, W] of uint8 as a JPEG whose longer side has at most `side` pixels."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    scale = side / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()
