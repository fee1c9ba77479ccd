"""Draws objects over an image: boxes, masks, keypoints, and labels that do not lie on each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageDraw

from detkernel_detection.drawing.colours import BLACK, WHITE, Colour, colour, ink
from detkernel_detection.drawing.text import font_for, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

SMALLEST = 320
"""Pixels of the longer side below which an image is enlarged, by a whole number: no label could be read on it."""
_MASK_OPACITY = 0.4
_CROWDED = 0.15
"""Of an image, the share that labels may cover before those of small boxes are left out."""
_CONTOUR = 5
"""Pixels of the shorter side of a mask that get no contour: nothing would be left of its veil."""

SKELETON = (
    ("left_ankle", "left_knee"), ("left_knee", "left_hip"), ("right_ankle", "right_knee"), ("right_knee", "right_hip"),
    ("left_hip", "right_hip"), ("left_shoulder", "left_hip"), ("right_shoulder", "right_hip"),
    ("left_shoulder", "right_shoulder"), ("left_shoulder", "left_elbow"), ("right_shoulder", "right_elbow"),
    ("left_elbow", "left_wrist"), ("right_elbow", "right_wrist"), ("left_eye", "right_eye"), ("nose", "left_eye"),
    ("nose", "right_eye"), ("left_eye", "left_ear"), ("right_eye", "right_ear"), ("left_ear", "left_shoulder"),
    ("right_ear", "right_shoulder"),
)  # fmt: skip
"""COCO's lines between the keypoints of a person, by their names."""


class Drawable(Protocol):
    """What can be drawn: `Detections`, a `Target`, `Annotations`; boxes [N, 4] and labels [N]."""

    @property
    def boxes(self) -> Any: ...

    @property
    def labels(self) -> Any: ...


class Style(NamedTuple):
    """Sizes in pixels, for one image and its objects."""

    line: int
    font: int
    halo: int


class _Objects(NamedTuple):
    boxes: NDArray[Any]
    labels: list[int]
    scores: list[float] | None
    masks: NDArray[Any] | None
    keypoints: NDArray[Any] | None


def draw(
    image: Any,
    objects: Drawable | None = None,
    classes: Sequence[str] = (),
    *,
    truth: Drawable | None = None,
    longest: int | None = None,
    keypoint_names: Sequence[str] = (),
) -> Image.Image:
    """An image with its objects, coloured by class: the best lie on top, and labels where they cover no other label.

    `image`: uint8 RGB, a tensor [3, H, W], an array [H, W, 3], or one of Pillow's. `objects`: `Detections`, whose
    labels have the score, or what is annotated. `truth`: boxes that are drawn besides, dashed in white. `longest`: what
    the longer side is scaled to; None: as it is, but a tiny image is enlarged. Lines and letters go by the sizes of the
    image and of its objects; a label for which there is no room is shortened, and then left out. Objects whose boxes
    are not finite are left out.
    """
    canvas, scale = _scaled(_pixels(image), longest)
    found = None if objects is None else _taken(objects)
    boxes = np.zeros((0, 4)) if found is None else found.boxes * scale
    style = style_for(canvas.size, boxes)
    if found is not None and found.masks is not None:
        canvas = _with_masks(canvas, found, scale)
    pen = ImageDraw.Draw(canvas)
    order = (
        range(len(boxes)) if found is None or found.scores is None else np.argsort(found.scores, kind="stable").tolist()
    )
    if found is not None:
        for number in order:
            _box(pen, boxes[number], colour(found.labels[number]), style, canvas.size)
    if truth is not None:
        for box in _taken(truth).boxes * scale:
            _dashed(pen, box, style, canvas.size)
    if found is not None and found.keypoints is not None:
        for number in order:
            _keypoints(pen, found.keypoints[number], scale, colour(found.labels[number]), style, keypoint_names)
    if found is not None:
        _labels(pen, found, boxes, list(reversed(order)), classes, style, canvas.size)
    return canvas


def style_for(size: tuple[int, int], boxes: NDArray[Any]) -> Style:
    """Lines and letters for an image of (width, height): thinner and smaller where its objects are small."""
    longer = max(size)
    line, letters = max(2, longer / 320), max(11, longer / 48)
    if len(boxes):
        sides = np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
        median = float(np.median(sides))
        line, letters = min(line, max(2, median / 12) if median >= 20 else 1), min(letters, max(11, median / 4))
    width = max(1, round(line))
    return Style(width, round(letters), max(1, round(width / 3)))


def _pixels(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB") if image.mode != "RGB" else image.copy()
    if not isinstance(image, np.ndarray):  # a tensor, wherever it is
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    if image.ndim == 2 or image.shape[2] == 1:
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return Image.fromarray(np.ascontiguousarray(image))


def _scaled(image: Image.Image, longest: int | None) -> tuple[Image.Image, float]:
    longer = max(image.size)
    scale = longest / longer if longest is not None else max(1.0, float(math.ceil(SMALLEST / longer)))
    if scale == 1:
        return image, scale
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    how = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BILINEAR
    return image.resize(size, how), scale


def _taken(objects: Any) -> _Objects:
    """Arrays of the objects whose boxes are finite."""
    boxes = _array(objects.boxes).astype(float).reshape(-1, 4)
    finite = np.isfinite(boxes).all(1)
    scores, keypoints = getattr(objects, "scores", None), getattr(objects, "keypoints", None)
    masks = getattr(objects, "masks", None)
    if masks is not None:
        masks = None if isinstance(masks, Sequence) else _array(masks)
    labels = _array(objects.labels)[finite].tolist()
    return _Objects(
        boxes[finite],
        [int(label) for label in labels],
        None if scores is None else [float(score) for score in np.nan_to_num(_array(scores)[finite])],
        None if masks is None else masks[finite],
        None if keypoints is None else _array(keypoints)[finite],
    )


def _array(values: Any) -> NDArray[Any]:
    return np.asarray(values if isinstance(values, np.ndarray) else values.detach().cpu().numpy())


def _inside(box: Iterable[float], style: Style, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Whole pixels, no farther out than a line is wide: Pillow would walk along every line."""
    out = 2 * (style.line + style.halo) + 2
    x1, y1, x2, y2 = (min(max(float(side), -out), limit + out) for side, limit in zip(box, (*size, *size), strict=True))
    left, top = round(x1), round(y1)
    return left, top, max(left, round(x2)), max(top, round(y2))


def _box(pen: ImageDraw.ImageDraw, box: Any, own: Colour, style: Style, size: tuple[int, int]) -> None:
    """A line within the box, and a dark one around it unless the box is tiny."""
    x1, y1, x2, y2 = _inside(box, style, size)
    if min(x2 - x1, y2 - y1) >= 4 * style.line:
        pen.rectangle(
            (x1 - style.halo, y1 - style.halo, x2 + style.halo, y2 + style.halo), outline=BLACK, width=style.halo
        )
    pen.rectangle((x1, y1, x2, y2), outline=own, width=style.line)


def _dashed(pen: ImageDraw.ImageDraw, box: Any, style: Style, size: tuple[int, int]) -> None:
    """White dashes with a dark halo, through which a line of the same place is seen."""
    x1, y1, x2, y2 = _inside(box, style, size)
    if x2 <= x1 or y2 <= y1:
        return
    width, dash = max(1, style.line - 1), max(5, 4 * style.line)
    for halo, paint in ((style.halo, BLACK), (0, WHITE)):
        for at in (y1, y2 - width + 1):
            for start in range(x1, x2, 2 * dash):
                end = min(start + dash, x2)
                pen.rectangle((start, at - halo, end, at + width - 1 + halo), fill=paint)
        for at in (x1, x2 - width + 1):
            for start in range(y1, y2, 2 * dash):
                end = min(start + dash, y2)
                pen.rectangle((at - halo, start, at + width - 1 + halo, end), fill=paint)


def _with_masks(image: Image.Image, found: _Objects, scale: float) -> Image.Image:
    """Each mask as a veil of its colour with an edge; only its own region is worked on, which costs little memory."""
    assert found.masks is not None
    pixels = np.array(image)
    for mask, label in zip(found.masks, found.labels, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            continue
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        y1, x1 = (
            min(math.floor(side * scale), limit - 1) for side, limit in ((top, image.height), (left, image.width))
        )
        y2, x2 = (
            min(max(round(bottom * scale), y1 + 1), image.height),
            min(max(round(right * scale), x1 + 1), image.width),
        )
        cut = Image.fromarray((mask[top:bottom, left:right] > 0).astype(np.uint8) * 255)
        inside = np.asarray(cut.resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)) > 127
        region, paint = pixels[y1:y2, x1:x2], np.array(colour(label), dtype=float)
        veiled = region[inside] * (1 - _MASK_OPACITY) + paint * _MASK_OPACITY
        region[inside] = veiled.round().astype(np.uint8)
        if min(inside.shape) > _CONTOUR:
            region[inside & ~_eroded(inside)] = paint.astype(np.uint8)
    return Image.fromarray(pixels)


def _eroded(inside: NDArray[Any]) -> NDArray[Any]:
    """Without its outermost pixels; those at the border of the region count as outermost."""
    padded = np.pad(inside, 1)
    eroded: NDArray[Any] = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return eroded


def _keypoints(
    pen: ImageDraw.ImageDraw, points: Any, scale: float, own: Colour, style: Style, names: Sequence[str]
) -> None:
    """Dots, and lines between those of a person. Those of an annotation that are not labelled (0) are left out."""
    radius = style.line + style.halo
    places = {
        number: (float(x * scale), float(y * scale))
        for number, (x, y, seen) in enumerate(points.tolist())
        if seen != 0 and math.isfinite(x + y) and max(abs(x), abs(y)) < 1e5
    }
    known = {name: places[number] for number, name in enumerate(names) if number in places}
    for width, paint in ((style.line + 2 * style.halo, BLACK), (style.line, own)):
        for one, other in SKELETON:
            if one in known and other in known:
                pen.line((*known[one], *known[other]), fill=paint, width=width)
    for x, y in places.values():
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=own, outline=BLACK, width=style.halo)


def _labels(
    pen: ImageDraw.ImageDraw,
    found: _Objects,
    boxes: NDArray[Any],
    order: Sequence[int],
    classes: Sequence[str],
    style: Style,
    size: tuple[int, int],
) -> None:
    """The best first, each where it covers no other: above the box, in it or below it; or shorter; or not at all.

    Where labels would cover much of the image, a box smaller than its label goes without: the image counts.
    """
    placed: list[tuple[float, float, float, float]] = []
    high = round(style.font * 1.3)

    def width(text: str) -> int:
        return math.ceil(pen.textlength(text, font_for(text, style.font))) + style.font // 2

    texts = [[(text, width(text)) for text in _texts(found, number, classes)] for number in range(len(boxes))]
    crowded = sum(several[0][1] * high for several in texts) > _CROWDED * size[0] * size[1]
    for number in order:
        room = 1.3 * (boxes[number, 2] - boxes[number, 0]) if crowded else size[0] / 2
        for text, wide in texts[number]:
            place = _free(boxes[number], wide, high, placed, style, size) if wide <= max(room, 0) else None
            if place is not None:
                placed.append((*place, place[0] + wide, place[1] + high))
                own = colour(found.labels[number])
                pen.rectangle((*place, place[0] + wide - 1, place[1] + high - 1), fill=own)
                middle = (place[0] + style.font // 4, place[1] + high / 2)
                pen.text(middle, text, fill=ink(own), font=font_for(text, style.font), anchor="lm")
                break


def _texts(found: _Objects, number: int, classes: Sequence[str]) -> list[str]:
    """What a label may say, the longest first."""
    label = found.labels[number]
    name = shown(classes[label]) if 0 <= label < len(classes) else str(label)
    if found.scores is None:
        return [name]
    score = f"{found.scores[number]:.2f}"
    return [f"{name} {score}".strip(), score]


def _free(
    box: Any, wide: int, high: int, placed: Sequence[tuple[float, ...]], style: Style, size: tuple[int, int]
) -> tuple[int, int] | None:
    """x and y of a label's corner where it lies in the image and on no other label."""
    x1, y1, x2, y2 = _inside(box, style, size)
    x1, x2, y1, y2 = max(x1, 0), min(x2, size[0] - 1), max(y1, 0), min(y2, size[1] - 1)
    if x2 < 0 or y2 < 0 or x1 >= size[0] or y1 >= size[1]:
        return None
    right = x2 - wide + 1
    places = [(x1, y1 - high), (right, y1 - high)]
    if wide * high * 3 < (x2 - x1) * (y2 - y1) and wide <= x2 - x1:
        places += [(x1, y1), (right, y1), (x1, y2 - high + 1), (right, y2 - high + 1)]
    places += [(x1, y2 + 1), (right, y2 + 1)]
    if y1 < high and y2 + high >= size[1]:  # from edge to edge: in it, though it be small
        places.append((x1, y1))
    taken = np.array(placed).reshape(-1, 4)
    for x, y in places:
        x = min(max(x, 0), max(size[0] - wide, 0))
        if y < 0 or y + high > size[1] or wide > size[0]:
            continue
        over = (taken[:, 0] < x + wide) & (taken[:, 2] > x) & (taken[:, 1] < y + high) & (taken[:, 3] > y)
        if not over.any():
            return x, y
    return None
