"""COCO metrics of 5,000 images with 500,000 detections: pycocotools beside hotcoco, and whether their arrays are equal.

Timed is what an evaluation does once all detections are there: from annotations and detections, an image each, to the
arrays of precision, recall and scores. Each way runs in a fresh process.

    python benchmarks/evaluation.py [--images 5000] [--detections 500000] [--objects 36000] [--classes 80]
                                    [--kind bbox|segm] [--ways hotcoco pycocotools]
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from detkernel_detection import Annotations
from detkernel_evaluation.coco_evaluation import Evaluation, Rules
from detkernel_evaluation.found import Found, ImageResult
from pycocotools import mask as rle

SIDE = 640
NAMES = ("precision", "recall", "scores")


def made(images: int, objects: int, detections: int, classes: int, kind: str) -> list[ImageResult]:
    """Objects of all sizes, 1% of them crowds; a third of the detections lie near one; scores have three decimals."""
    draw = np.random.default_rng(0)
    image, label = draw.integers(0, images, objects), draw.integers(0, classes, objects)
    corner, size = draw.uniform(0, 500, (objects, 2)), draw.lognormal(3.5, 1, (objects, 2)).clip(2, 130)
    boxes, crowd = np.concatenate([corner, corner + size], 1), draw.random(objects) < 0.01
    near, which = draw.random(detections) < 0.3, draw.integers(0, objects, detections)
    their_image = np.where(near, image[which], draw.integers(0, images, detections))
    their_label = np.where(near, label[which], draw.integers(0, classes, detections))
    corner, size = draw.uniform(0, 500, (detections, 2)), draw.lognormal(3.5, 1, (detections, 2)).clip(2, 130)
    shifted = boxes[which] + draw.normal(0, 3, (detections, 4))
    shifted[:, 2:] = np.maximum(shifted[:, 2:], shifted[:, :2] + 1)
    their_boxes = np.where(near[:, None], shifted, np.concatenate([corner, corner + size], 1)).astype(np.float32)
    scores = np.round(0.5 * draw.random(detections) + 0.4 * near, 3).astype(np.float32)
    results = []
    for number in range(images):
        ours, theirs = np.flatnonzero(image == number), np.flatnonzero(their_image == number)
        theirs = theirs[np.argsort(-scores[theirs], kind="stable")]
        notes = Annotations(
            image_id=number,
            path=f"{number}.jpg",
            height=SIDE,
            width=SIDE,
            boxes=boxes[ours],
            labels=label[ours],
            area=np.prod(boxes[ours, 2:] - boxes[ours, :2], axis=1) * 0.7,
            crowd=crowd[ours],
            difficult=np.zeros(len(ours), bool),
            masks=[[_diamond(box)] for box in boxes[ours]] if kind == "segm" else None,
        )
        masks = [rle.frPyObjects([_diamond(box)], SIDE, SIDE)[0] for box in their_boxes[theirs] if kind == "segm"]
        results.append((notes, Found(their_boxes[theirs], scores[theirs], their_label[theirs], masks)))
    return results


def _diamond(box: Any) -> list[float]:
    left, top, right, bottom = map(float, box)
    return [left, (top + bottom) / 2, (left + right) / 2, top, right, (top + bottom) / 2, (left + right) / 2, bottom]


def measure(way: Any, kind: Any, sizes: tuple[int, int, int, int], file: str) -> tuple[float, float]:
    """Seconds and the megabytes that the peak of memory rose by; the arrays are written to a file."""
    images = made(*sizes, kind)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    evaluation = Evaluation(kind, images, list(range(sizes[3])), Rules(), way)
    seconds = time.perf_counter() - start
    np.savez(file, **{name: evaluation.eval[name] for name in NAMES})
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--objects", type=int, default=36000)
    parser.add_argument("--detections", type=int, default=500_000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--kind", choices=["bbox", "segm"], default="bbox")
    parser.add_argument("--ways", nargs="+", choices=["hotcoco", "pycocotools"], default=["hotcoco", "pycocotools"])
    given = parser.parse_args()
    sizes = (given.images, given.objects, given.detections, given.classes)
    print(f"{given.kind}: {given.images} images, {given.objects} objects, {given.detections} detections")
    with tempfile.TemporaryDirectory() as folder:
        files = {way: str(Path(folder) / f"{way}.npz") for way in given.ways}
        for way, file in files.items():
            with get_context("spawn").Pool(1) as pool:
                seconds, memory = pool.apply(measure, (way, given.kind, sizes, file))
            print(f"{way:<12} {seconds:7.2f} s  peak +{memory:.0f} MB")
        if len(files) == 2:
            one, other = (np.load(file) for file in files.values())
            for name in NAMES:
                equal = np.array_equal(one[name], other[name])
                print(f"{name:<12} {'equal, bit for bit' if equal else 'DIFFERENT'} ({one[name].size} values)")


if __name__ == "__main__":
    main()
