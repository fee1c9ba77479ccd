"""Draws pictures of shapes. Everything follows from the key of a picture, in whole numbers: the same on every machine.

A picture's key gives two streams of random numbers: one for what is in it, which is all that its annotations need, and
one for its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRIES = 20
"""Places that are tried for a shape before it is given up."""


class Plan(NamedTuple):
    """How many shapes of which sizes are drawn on pictures of which side."""

    side: int
    objects: tuple[int, int]
    sizes: tuple[int, int]
    overlap: float
    kinds: tuple[str, ...]


class Scene(NamedTuple):
    """What is in a picture."""

    labels: list[int]
    """The classes of its shapes, at least one, from front to back."""
    canvas: NDArray[np.uint8]
    """[side, side] the number of the shape that is seen at each pixel, from 1; 0 is the background."""


def compose(key: Sequence[int], plan: Plan) -> Scene:
    """Put shapes behind each other, so that of each no more than `overlap` of its pixels is hidden."""
    draw = np.random.default_rng([*key, 0])
    scene = Scene([], np.zeros((plan.side, plan.side), dtype=np.uint8))
    for _ in range(draw.integers(plan.objects[0], plan.objects[1], endpoint=True)):
        label = int(draw.integers(len(plan.kinds)))
        size = int(draw.integers(plan.sizes[0], plan.sizes[1], endpoint=True))
        pixels = outline(plan.kinds[label], size)
        places = draw.integers(0, plan.side - size, size=(TRIES, 2), endpoint=True).tolist()
        if _put(scene.canvas, pixels, places, len(scene.labels) + 1, plan.overlap):
            scene.labels.append(label)
    return scene


def _put(
    canvas: NDArray[np.uint8], pixels: NDArray[np.bool_], places: Sequence[Sequence[int]], number: int, overlap: float
) -> bool:
    """Draw a shape at the first place where enough of it is seen; whether there was one."""
    allowed = overlap * np.count_nonzero(pixels)
    for x, y in places:
        window = canvas[y : y + len(pixels), x : x + len(pixels)]
        free = window == 0
        if np.count_nonzero(pixels & ~free) <= allowed:
            window[pixels & free] = number
            return True
    return False


def outline(kind: str, size: int) -> NDArray[np.bool_]:
    """[size, size] a shape's pixels. Twice the coordinates of the pixels' centres are whole numbers."""
    u = np.arange(1, 2 * size, 2) - size
    v = u[:, None]
    match kind:
        case "circle":
            return u * u + v * v <= size * size
        case "triangle":
            return 2 * abs(u) <= v + size
        case "diamond":
            return abs(u) + abs(v) <= size
        case "cross":
            return (3 * abs(u) <= size) | (3 * abs(v) <= size)
        case _:
            return np.ones((size, size), dtype=bool)


def tight_boxes(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[N, 4] the smallest boxes around the pixels of [N, H, W], each of which has some."""
    rows: NDArray[np.bool_] = np.any(masks, axis=2)
    columns: NDArray[np.bool_] = np.any(masks, axis=1)
    low = np.stack([columns.argmax(1), rows.argmax(1)], axis=1)
    high = np.stack([columns[:, ::-1].argmax(1), rows[:, ::-1].argmax(1)], axis=1)
    return np.concatenate([low, masks.shape[:0:-1] - high], axis=1).astype(np.float64)


def paint(key: Sequence[int], scene: Scene) -> NDArray[np.uint8]:
    """[side, side, 3] bright shapes of one colour each, on a dark, blotched and noisy background."""
    draw = np.random.default_rng([*key, 1])
    side = len(scene.canvas)
    cells = -(-side // 16)
    blotches = draw.integers(20, 100, size=(cells, cells, 3), dtype=np.uint8)
    pixels = blotches.repeat(16, 0).repeat(16, 1)[:side, :side]
    pixels += draw.integers(0, 40, size=pixels.shape, dtype=np.uint8)
    colours = np.zeros((len(scene.labels) + 1, 3), dtype=np.uint8)
    for colour in colours[1:]:
        colour[:] = draw.permutation([draw.integers(200, 256), draw.integers(0, 256), draw.integers(0, 120)])
    inside = scene.canvas > 0
    pixels[inside] = colours[scene.canvas[inside]]
    return pixels
