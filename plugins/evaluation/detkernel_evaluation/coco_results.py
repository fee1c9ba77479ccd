"""Writes detections in COCO's form of results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detkernel.files import write_atomic

from detkernel_evaluation.coco_evaluation import detected
from detkernel_evaluation.evaluator import Kind
from detkernel_evaluation.found import ImageResult


def write(path: Path, kind: Kind, images: Sequence[ImageResult], categories: Sequence[int], within: Path) -> None:
    """`categories`: the category id of each class; `within`: below it, links are not followed. JSON in ASCII."""
    write_atomic(path, json.dumps(list(_results(kind, images, categories))), within=within)


def _results(kind: Kind, images: Sequence[ImageResult], categories: Sequence[int]) -> Iterator[dict[str, Any]]:
    for notes, found in images:
        for entry in detected(found, kind):
            name = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[kind]
            yield {
                "image_id": notes.image_id,
                "category_id": categories[entry["category_id"]],
                name: _plain(entry[name]),
                "score": entry["score"],
            }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {"size": list(value["size"]), "counts": value["counts"].decode()}
    return value if isinstance(value, list) else value.tolist()
