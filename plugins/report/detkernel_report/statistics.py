"""What a data set has: objects by class, size and image, and what was found to be wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
from detkernel_detection import Dataset
from detkernel_detection.findings import Finding

from detkernel_report.metrics import SIZES

MOST = 20_000
"""Images that are looked at; of more, as many are taken evenly."""
SIDES = (0, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
"""Limits between bins of the square root of an object's area, in pixels."""
NOTES = 200
"""Findings that are kept."""
PLACES = 2000
"""Places of a finding that are kept."""


def statistics(split: str, dataset: Dataset, found: Iterable[str | Finding] | None = None) -> dict[str, Any]:
    """Plain values, for a line of `data.jsonl`. `found`: what there is to say of it, where that is more than its
    notes."""
    total = len(dataset)
    looked = min(total, MOST)
    objects: Counter[int] = Counter()
    images: Counter[int] = Counter()
    per_image: Counter[int] = Counter()
    shapes: Counter[tuple[int, int]] = Counter()
    sides = np.zeros(len(SIDES), np.int64)
    areas: list[Any] = []
    crowd = difficult = 0
    for number in range(looked):
        notes = dataset.annotations(number * total // looked)
        labels = notes.labels.tolist()
        objects.update(labels)
        images.update(set(labels))
        per_image[len(labels)] += 1
        shapes[notes.width, notes.height] += 1
        crowd += int(notes.crowd.sum())
        difficult += int(notes.difficult.sum())
        areas.append(notes.area)
    area = np.concatenate(areas) if areas else np.zeros(0)
    sides = np.bincount(np.searchsorted(SIDES, np.sqrt(area), side="right") - 1, minlength=len(SIDES))
    return {
        "split": split,
        "images": total,
        "looked": looked,
        "classes": {name: [objects[label], images[label]] for label, name in enumerate(dataset.classes)},
        "empty": per_image[0],
        "per_image": [[many, count] for many, count in sorted(per_image.items())],
        "image_sizes": [[*size, count] for size, count in shapes.most_common(12)],
        "image_size_count": len(shapes),
        "sides": sides.tolist(),
        "sizes": {name: int(((area >= low) & (area < high)).sum()) for name, (low, high) in SIZES.items()},
        "side": float(np.median(np.sqrt(area))) if area.size else None,
        "crowd": crowd,
        "difficult": difficult,
        "findings": findings(dataset.notes if found is None else found),
    }


def findings(notes: Iterable[str | Finding]) -> list[dict[str, Any]]:
    """What a data set noted while it was read, or another looked for: in parts, and the places that it is about where
    they are known."""
    found = []
    for note in islice(notes, NOTES):
        one = note if isinstance(note, Finding) else Finding.of_note(note)
        places = [str(place) for place in one.places[:PLACES]]
        said = {"what": one.what, "count": one.count, "advice": one.advice, "option": one.option, "split": one.split}
        found.append({"text": str(one) if note is one else str(note), **said, "places": places})
    return found
