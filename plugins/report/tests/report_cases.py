"""Validations of made-up detections, for the tests."""

from __future__ import annotations

import numpy as np
from detkernel_report.results import ImageResult, Results


def image(index=0, boxes=(), labels=(), found=(), crowd=(), ignore=(), size=(100, 100), path=None):
    """`boxes`: xyxy; `found`: (x1, y1, x2, y2, score, label)."""
    boxes = np.array(boxes, float).reshape(-1, 4)
    rows = np.array(found, float).reshape(-1, 6)
    rows = rows[np.argsort(-rows[:, 4], kind="stable")]
    flags = np.zeros((2, len(boxes)), bool)
    flags[0, list(crowd)] = True
    flags[1, [*crowd, *ignore]] = True
    return ImageResult(
        index, index, path or f"image-{index}.png", size[0], size[1], boxes, np.array(labels, np.int64),
        np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), flags[0], flags[1],
        rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64),
    )  # fmt: skip


def results(*images, classes=("cat", "dog"), name="val", iteration=10):
    return Results(name, iteration, list(classes), list(images))


def random_results(seed, images=12, classes=3):
    """Boxes of all sizes, some of them crowds or ignored, and detections near some and far from others."""
    draw = np.random.default_rng(seed)
    made = []
    for index in range(images):
        many = int(draw.integers(0, 9))
        low = draw.uniform(0, 200, (many, 2))
        boxes = np.concatenate([low, low + draw.uniform(4, 180, (many, 2))], axis=1)
        labels = draw.integers(0, classes, many)
        near = np.repeat(boxes, 3, axis=0) + draw.normal(0, 6, (3 * many, 4))
        far = draw.uniform(0, 200, (5, 2))
        found = np.concatenate([near, np.concatenate([far, far + draw.uniform(5, 90, (5, 2))], axis=1)])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        guessed = np.concatenate([np.repeat(labels, 3), draw.integers(0, classes, 5)])
        wrong = draw.uniform(size=len(guessed)) < 0.2
        guessed = np.where(wrong, draw.integers(0, classes, len(guessed)), guessed)
        scores = np.round(draw.uniform(0.01, 1, len(found)), 2)  # with equal ones
        rows = np.concatenate([found, scores[:, None], guessed[:, None]], axis=1)
        crowd = np.flatnonzero(draw.uniform(size=many) < 0.1)
        ignore = np.flatnonzero(draw.uniform(size=many) < 0.1)
        made.append(image(index, boxes, labels, rows, crowd, ignore, size=(400, 400)))
    return results(*made, classes=[f"class {number}" for number in range(classes)])
