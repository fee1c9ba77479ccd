"""Families learn eight images by heart on the CPU: their sixteen objects are what they find first, each once, with the
right class and an IoU of at least 0.75, before anything else. One family by default; under `tox -e torture`
(DETKERNEL_LONG) all of them, in some minutes."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from detkernel import Run, hookimpl, plugin
from detkernel_detection import Annotations, Dataset, Detections
from detkernel_detection.testing import TinyData, TinySgd, tiny_kernel
from detkernel_detection.testing.boxes import iou
from detkernel_detection.testing.generators import seed_all
from detkernel_detection.testing.tiny import make_batch
from detkernel_detectors.necks import Fpn

MORE = (
    *(
        "retinanet",
        "atss",
        "gfl",
        "tood",
        "vfnet",
        "rtmdet",
        "rtmdet_ins",
        "yolof",
        "yolox",
        "yolov3",
        "centernet",
        "centernet_update",
        "ssd",
    ),
    *("faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"),
    *("detr", "conditional_detr", "dab_detr", "deformable_detr", "dino", "rtdetr", "dfine"),
)
FAMILIES = ("fcos", *(MORE if "DETKERNEL_LONG" in os.environ else ()))
SIDE, IMAGES, CLASSES = 64, 8, ("red", "green", "blue")
MOST, LOOK = 1500, 25
"""Iterations, each with all eight images: at most, and between looks at what is found."""


@plugin
class Rectangles(Dataset):
    """Dark images with two rectangles each, left and right, in the colours of their classes. None is so small that it
    lies between the anchors of stride 8: for ATSS, anchors are positive whose centres are in an object."""

    def load(self) -> None:
        self.classes = CLASSES
        draw = random.Random(0)
        self._boxes = [[self._box(draw, half * SIDE // 2) for half in range(2)] for _ in range(IMAGES)]

    @staticmethod
    def _box(draw: random.Random, left: int) -> tuple[int, int, int, int]:
        width, height = draw.randrange(14, 27), draw.randrange(14, 27)
        x, y = left + draw.randrange(SIDE // 2 - width), draw.randrange(SIDE - height)
        return x, y, x + width, y + height

    def __len__(self) -> int:
        return IMAGES

    def image(self, index: int) -> torch.Tensor:
        image = torch.full((3, SIDE, SIDE), 20).byte()
        for (x1, y1, x2, y2), label in zip(self._boxes[index], self._labels(index), strict=True):
            image[label, y1:y2, x1:x2] = 230
        return image

    def annotations(self, index: int) -> Annotations:
        boxes, none = np.array(self._boxes[index], dtype=np.float64), np.zeros(2, dtype=bool)
        return Annotations(
            image_id=index,
            path=f"rectangles-{index}",
            height=SIDE,
            width=SIDE,
            boxes=boxes,
            labels=np.array(self._labels(index)),
            area=(boxes[:, 2:] - boxes[:, :2]).prod(1),
            crowd=none,
            difficult=none,
        )

    @staticmethod
    def _labels(index: int) -> list[int]:
        return [index % 3, (index + index // 3) % 3]


@plugin
class TinyAdamW(TinySgd):
    """AdamW, of one rate for all families: SGD needs one of its own for each, and more iterations."""

    @hookimpl
    def before_run(self, run: Run) -> None:
        super().before_run(run)
        run.optimizer = torch.optim.AdamW([one for _, one in run.named_parameters()], lr=self.lr)


@plugin(priority="lowest")
class ByHeart:
    """Stops the run once all is found."""

    problem = ""

    @hookimpl(trylast=True)
    def after_train_iter(self, run: Run) -> None:
        if run.iter % LOOK:
            return
        dataset = run.loaders["train"].dataset
        run.model.eval()
        with torch.no_grad():
            found = run.hook.val_step(run=run, model=run.model, batch=make_batch(dataset, range(IMAGES)))
        run.model.train()
        self.problem = missed(found, dataset)
        if not self.problem:
            run.stop("it knows them by heart")


def missed(found: Sequence[Detections], dataset: Dataset) -> str:
    """What is wrong with the best detections of all images together, as many as there are objects, or nothing."""
    ranked = sorted(
        (
            (float(score), one.index, box.tolist(), int(label))
            for one in found
            for score, box, label in zip(one.scores, one.boxes, one.labels, strict=True)
        ),
        reverse=True,
    )
    notes = [dataset.annotations(index) for index in range(len(dataset))]
    left = [
        (index, box, int(label))
        for index, note in enumerate(notes)
        for box, label in zip(note.boxes.tolist(), note.labels, strict=True)
    ]
    for rank, (score, index, box, label) in enumerate(ranked[: len(left)]):
        hit = next((one for one in left if one[::2] == (index, label) and iou(one[1], box) >= 0.75), None)
        if hit is None:
            return f"detection {rank}, {box} of class {label} in image {index}, scored {score:.3f}, is none of {left}"
        left.remove(hit)
    return f"{left} are not found" if left else ""


def beside(name: str) -> ModuleType:
    """A module of tests beside this one."""
    spec = importlib.util.spec_from_file_location(f"overfit_{name}", Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(name: str) -> Any:
    """A small model of a family: that of its contract."""
    camel = "".join(part.title() for part in name.split("_"))
    if name in ("rtdetr", "dfine"):
        contract = getattr(beside("test_detectors_rtdetr"), {"rtdetr": "TestRtDetr"}.get(name, f"Test{camel}"))
        return contract().plugin()
    models = beside("test_detectors_models")
    if name in ("tood", "vfnet"):
        head = models.TASKS if name == "tood" else models.STAR
        return getattr(models, camel)(**{**models.SMALL, "neck": Fpn(channels=16, extra=0), **head})
    return getattr(models, f"Test{camel}")().plugin()


def learned(name: str, folder: Path) -> Run:
    """The run of a family that ends when it knows them by heart, or asserts what it does not know."""
    seed_all(0)
    watch = ByHeart()
    data, optimizer = TinyData(dataset=Rectangles(), batch_size=IMAGES), TinyAdamW(lr=0.003)
    plugins = {"model": small(name), "data": data, "optimizer": optimizer, "watch": watch}
    run = tiny_kernel(plugins, until=f"{MOST} iters", work_dir=folder).run()
    assert not watch.problem, f"after {run.iter} iterations, {watch.problem}"
    return run


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_learns_eight_images_by_heart(name: str, tmp_path: Path):
    learned(name, tmp_path)
