"""Images of two objects, to see where a transform moves them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from detkernel import declared

from detkernel_detection import Context, Sample, Target, Transform
from detkernel_detection.testing.boxes import Box

HEIGHT, WIDTH = 64, 96  # not as high as wide: a transform that mixes up the axes shows


def probe_for(transform: Transform, number: int, **annotations: Any) -> Sample:
    """A probe with what a transform says that it needs, and with the fields that it changes."""
    for name in set(declared(transform).needs) & {"masks", "keypoints"}:
        annotations.setdefault(name, True)
    return probe(number, added=transform.adds_fields(), **annotations)


def probe(
    number: int,
    *,
    masks: bool = False,
    keypoints: bool = False,
    fields: bool = False,
    without: int | None = None,
    added: Mapping[str, float] = MappingProxyType({}),
) -> Sample:
    """A dark image of two bright objects of two of three classes; `without` leaves one out of the image alone.

    The keypoints are an object's corners, and its field is its class.
    """
    draw = random.Random(number)
    image = torch.full((HEIGHT, WIDTH, 3), 20, dtype=torch.uint8).permute(2, 0, 1)  # channels-last, as decoded
    boxes, labels = [], [number % 3, (number + 1) % 3]
    for left in (2, 50):
        x, y = left + draw.randrange(16), 2 + draw.randrange(28)
        boxes.append((x, y, x + 16 + draw.randrange(10), y + 12 + draw.randrange(18)))
    drawn = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, label, (x1, y1, x2, y2) in zip(drawn, labels, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
        if label != without:
            image[label, y1:y2, x1:x2] = 230
    corners = [[(x1, y1, 2), (x2, y1, 2), (x2, y2, 2), (x1, y2, 2)] for x1, y1, x2, y2 in boxes]
    target = Target(
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor(labels),
        drawn if masks else None,
        torch.tensor(corners, dtype=torch.float32) if keypoints else None,
        {"number": torch.tensor(labels)} if fields else {},
    )
    target.fields |= {name: torch.full((2,), value) for name, value in added.items()}
    context = Context(
        fetch=lambda index: probe(index, masks=masks, keypoints=keypoints, fields=fields, added=added),
        indices=range(8),
        classes=("red", "green", "blue"),
        epochs=None,
    )
    sample = Sample(image, target, number % 8, f"probe-{number}", (HEIGHT, WIDTH), context=context)
    sample.field_kinds = dict.fromkeys(target.fields, "value")
    return sample


def seen(whole: Sample, less: Sample) -> Box | None:
    """Where two transformed images differ: the object that only one of them has. None where it cannot be told."""
    if whole.image.shape != less.image.shape:
        return None
    one, other = whole.image.float(), less.image.float()
    difference = (one - other).abs().amax(0)
    span, peak = float(one.max() - one.min()), float(difference.max())
    if peak <= 0.2 * span:
        return None
    where = difference > peak / 2
    found = envelope(where)
    if found is None or min(found[2] - found[0], found[3] - found[1]) < 4:
        return None
    area = (found[2] - found[0]) * (found[3] - found[1])
    # Scattered, it is noise; all over, colours that follow the mean of the image.
    clear = area < 0.9 * where.numel() and float(where.sum()) > 0.5 * area
    return found if clear else None


def envelope(where: Any) -> Box | None:
    """The box around what is not 0 in [H, W]."""
    rows, columns = where.any(1).nonzero(), where.any(0).nonzero()
    if not len(rows):
        return None
    return [float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1]


def annotated(sample: Sample, label: int) -> list[Box]:
    """The boxes of a class."""
    boxes: list[Box] = sample.target.boxes[sample.target.labels == label].tolist()
    return boxes


def masked(sample: Sample, label: int) -> list[Box]:
    """The boxes around the masks of a class."""
    found = map(envelope, sample.target.masks[sample.target.labels == label])  # type: ignore[index]
    return [box for box in found if box is not None]


def cornered(sample: Sample, label: int) -> list[Box]:
    """The boxes around the keypoints of a class, of the objects of which all are seen."""
    points: Any = sample.target.keypoints
    whole = [one for one in points[sample.target.labels == label] if bool((one[:, 2] > 0).all())]
    return [[*one[:, :2].amin(0).tolist(), *one[:, :2].amax(0).tolist()] for one in whole]
