"""Cases for the evaluators: given truths and detections, run through a real `detkernel test`."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detkernel import Kernel, Mode, Run, RunOptions, Span, hookimpl, option, plugin
from detkernel_detection import Annotations, Batch, Dataset, Detections
from detkernel_detection.batching import make_batch
from pycocotools import mask as rle

Case = tuple["GivenData", list[Detections]]


class GivenData(Dataset):
    """A data set of given annotations; its images are never looked at."""

    def __init__(self, classes: Sequence[str], notes: Sequence[Annotations]) -> None:
        self.classes = tuple(classes)
        self.given = list(notes)

    def load(self) -> None:
        """Everything is there."""

    def __len__(self) -> int:
        return len(self.given)

    def image(self, index: int) -> torch.Tensor:
        raise AssertionError("an evaluator decodes no image")

    def annotations(self, index: int) -> Annotations:
        return self.given[index]


class GivenLoader:
    """Batches of given positions."""

    def __init__(self, dataset: Dataset, order: Sequence[int], batch_size: int) -> None:
        self.dataset = dataset
        self.parts = [list(order[at : at + batch_size]) for at in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.parts)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for indices in self.parts[start:]:
            ids = [self.dataset.annotations(index).image_id for index in indices]
            sizes = [(1, 1)] * len(indices)
            yield make_batch(torch.zeros(len(indices), 3, 1, 1), indices=indices, image_ids=ids, original_sizes=sizes)


@plugin
class Given:
    """Data and a detector that knows what it will find."""

    case: Any = option(help="the data set, and the detections in its order")
    batch_size: int = option(default=3, help="images a batch")
    max_detections: int | None = option(default=None, help="what the model says it gives at most")
    order: list[int] | None = option(default=None, help="the positions to go through; null: all")

    @hookimpl
    def build_loader(self, run: Run, mode: Mode) -> GivenLoader:
        dataset = self.case[0]
        return GivenLoader(dataset, range(len(dataset)) if self.order is None else self.order, self.batch_size)

    @hookimpl
    def build_model(self, run: Run) -> torch.nn.Module:
        model = torch.nn.Identity()
        if self.max_detections is not None:
            model.max_detections = self.max_detections
        return model

    @hookimpl
    def train_step(self, run: Run, batch: Batch) -> Mapping[str, torch.Tensor]:
        return {"loss": torch.zeros(())}

    @hookimpl
    def val_step(self, run: Run, batch: Batch) -> list[Detections]:
        return [self.case[1][index] for index in batch.indices]


def kernel(evaluator: Any, case: Case, folder: Path | str, *more: Any, **given: Any) -> Kernel:
    options = RunOptions(until=Span(1, "epochs"), validate=Span(1, "epochs"), work_dir=Path(folder))
    parts = {f"more{number}": part for number, part in enumerate(more)}
    return Kernel({"given": Given(case=case, **given), "evaluator": evaluator, **parts}, options)


def evaluated(evaluator: Any, case: Case, folder: Path | str = "never-written", **given: Any) -> dict[str, float]:
    """The metrics of a test run."""
    return kernel(evaluator, case, folder, **given).test().metrics


def annotations(
    image_id: int | str,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    *,
    area: Sequence[float] | None = None,
    crowd: Sequence[bool] | None = None,
    difficult: Sequence[bool] | None = None,
    size: tuple[int, int] = (100, 100),
    **more: Any,
) -> Annotations:
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    none = [False] * len(labels)
    return Annotations(
        image_id=image_id,
        path=f"{image_id}.jpg",
        height=size[0],
        width=size[1],
        boxes=corners,
        labels=np.asarray(labels, dtype=np.int64),
        area=np.prod(corners[:, 2:] - corners[:, :2], axis=1) if area is None else np.asarray(area, dtype=np.float64),
        crowd=np.asarray(crowd or none, dtype=bool),
        difficult=np.asarray(difficult or none, dtype=bool),
        **more,
    )


def detections(
    index: int,
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    labels: Sequence[int],
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Detections:
    return Detections(
        image_id=index,
        index=index,
        boxes=torch.tensor(boxes, dtype=dtype).reshape(-1, 4),
        scores=torch.tensor(scores, dtype=dtype),
        labels=torch.tensor(labels, dtype=torch.int64),
        **more,
    )


def from_coco(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Case:
    """COCO's JSON and COCO's form of results, as a data set and detections."""
    categories = sorted(truth["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    notes = [_notes(image, truth["annotations"], label_of) for image in truth["images"]]
    found = [_found(index, note, results, label_of) for index, note in enumerate(notes)]
    return GivenData([category["name"] for category in categories], notes), found


def _notes(
    image: Mapping[str, Any], everything: Sequence[Mapping[str, Any]], label_of: Mapping[int, int]
) -> Annotations:
    own = [one for one in everything if one["image_id"] == image["id"]]
    points = np.array([one["keypoints"] for one in own if "keypoints" in one], dtype=np.float32)
    return annotations(
        image["id"],
        [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in own)],
        [label_of[one["category_id"]] for one in own],
        area=[one["area"] for one in own],
        crowd=[bool(one["iscrowd"]) for one in own],
        size=(image["height"], image["width"]),
        masks=[one["segmentation"] for one in own] if own and "segmentation" in own[0] else None,
        keypoints=points.reshape(len(own), -1, 3) if len(points) else None,
    )


def _found(
    index: int, note: Annotations, results: Sequence[Mapping[str, Any]], label_of: Mapping[int, int]
) -> Detections:
    own = sorted((one for one in results if one["image_id"] == note.image_id), key=lambda one: -one["score"])
    masks = [_decoded(one["segmentation"]) for one in own if "segmentation" in one]
    points = torch.tensor([one["keypoints"] for one in own if "keypoints" in one], dtype=torch.float32)
    boxes = [one.get("bbox", [0, 0, 1, 1]) for one in own]
    if masks:
        boxes = [rle.toBbox(one["segmentation"]).tolist() for one in own]
    return detections(
        index,
        [[x, y, x + w, y + h] for x, y, w, h in boxes],
        [one["score"] for one in own],
        [label_of[one["category_id"]] for one in own],
        masks=torch.tensor(np.array(masks)) if masks else None,
        keypoints=points.reshape(len(own), -1, 3) if len(points) else None,
        dtype=torch.float64,  # COCO's example has overlaps that lie on a threshold; a bit less is another value
    )


def _decoded(mask: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 with NumPy 2
        return rle.decode(mask)


def random_coco(seed: int, images: int = 12, side: int = 320) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Truths and results in COCO's JSON: crowds, all sizes, equal scores, ids with gaps, and images without either.

    Coordinates are quarters of a pixel, which float32 holds exactly.
    """
    draw = random.Random(seed)
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    truth["categories"] = [{"id": number, "name": f"class {number}"} for number in (3, 7, 20, 21)]
    results: list[dict[str, Any]] = []
    for image_id in draw.sample(range(1000), images):
        truth["images"].append({"id": image_id, "height": side, "width": side})
        for _ in range(draw.choice([0, 1, 3, 8])):
            one = _object(draw, image_id, side)
            truth["annotations"].append({"id": len(truth["annotations"]) + 1, **one})
            results += [_noisy(draw, one, side) for _ in range(draw.choice([0, 1, 1, 3]))]
        results += [_noisy(draw, _object(draw, image_id, side), side) for _ in range(draw.choice([0, 0, 4]))]
    draw.shuffle(results)
    return truth, results


def _object(draw: random.Random, image_id: int, side: int) -> dict[str, Any]:
    w, h = (draw.choice([draw.randint(8, 120), draw.randint(400, 640)]) / 4 for _ in range(2))
    box = [draw.randint(0, 4 * (side - 160)) / 4, draw.randint(0, 4 * (side - 160)) / 4, w, h]
    category = draw.choice([3, 3, 7, 20])  # nothing is of class 21
    crowd = int(draw.random() < 0.1)
    return {"image_id": image_id, "category_id": category, "bbox": box, "area": w * h * 0.75, "iscrowd": crowd}


def _noisy(draw: random.Random, one: Mapping[str, Any], side: int) -> dict[str, Any]:
    """A detection near an object, now and then of another class; scores are coarse, so that many are equal."""
    x, y, w, h = one["bbox"]
    jitter = [draw.randint(-6, 6) / 4 for _ in range(4)]
    box = [max(x + jitter[0], 0), max(y + jitter[1], 0), max(w + jitter[2], 1), max(h + jitter[3], 1)]
    category = one["category_id"] if draw.random() < 0.9 else draw.choice([3, 7, 20, 21])
    score = draw.randint(1, 20) / 32
    return {"image_id": one["image_id"], "category_id": category, "bbox": box, "score": score}


def with_masks(truth: dict[str, Any], results: list[dict[str, Any]], side: int = 320) -> None:
    """Give every box the diamond in it: polygons, run lengths for crowds, and run lengths alone for the results."""
    for one in truth["annotations"]:
        one["segmentation"] = _runs(_rhombus(one["bbox"]), side) if one["iscrowd"] else [_rhombus(one["bbox"])]
    for one in results:
        mask = rle.frPyObjects([_rhombus(one.pop("bbox"))], side, side)[0]
        one["segmentation"] = {"size": mask["size"], "counts": mask["counts"].decode()}


def _rhombus(box: Sequence[float]) -> list[float]:
    x, y, w, h = box
    return [x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]


def _runs(polygon: list[float], side: int) -> dict[str, Any]:
    """Run lengths, not packed: COCO's form of a crowd."""
    flat = _decoded(rle.frPyObjects([polygon], side, side)[0]).reshape(-1, order="F")
    changes = np.flatnonzero(np.diff(flat, prepend=0, append=2))
    return {"size": [side, side], "counts": np.diff(changes, prepend=0).tolist()}


def with_keypoints(truth: dict[str, Any], results: list[dict[str, Any]], many: int = 17) -> None:
    """Give everything keypoints near the box's; some are not labelled, some objects have none."""
    draw = random.Random(len(results))
    for one in truth["annotations"]:
        seen = [0 if one["iscrowd"] else draw.choice([0, 1, 2]) for _ in range(many)]
        seen = seen if draw.random() < 0.9 else [0] * many
        one["keypoints"] = _points(one["bbox"], seen)
        one["num_keypoints"] = sum(value > 0 for value in seen)
    for one in results:
        one["keypoints"] = _points(one.pop("bbox"), [1] * many)


def _points(box: Sequence[float], seen: Sequence[int]) -> list[float]:
    x, y, w, h = (round(value) for value in box)
    many = len(seen)
    places = [(x + w * at // many, y + h * (at * 5 % many) // many, value) for at, value in enumerate(seen)]
    return [float(number) for place in places for number in place]
