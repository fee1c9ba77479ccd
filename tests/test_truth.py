"""What is measured by is what the files say: the metrics are those of pycocotools and of VOC on the very same files."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detkernel import Kernel, Mode, Run, RunOptions, Span, hookimpl, option, plugin
from detkernel_data.formats.coco import Coco
from detkernel_data.formats.voc import Voc
from detkernel_data.wrappers import Concat, Repeat, Subset
from detkernel_detection import Batch, Dataset, Detections
from detkernel_detection.batching import make_batch
from detkernel_evaluation.coco import CocoMap
from detkernel_evaluation.voc import VocMap
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

WIDTH, HEIGHT = 96, 64
ODD = [
    ("inside", {"bbox": [10, 10, 30, 20]}),
    ("beyond the right", {"bbox": [60, 20, 60, 30]}),
    ("beyond the left and the top", {"bbox": [-20, -10, 50, 40]}),
    ("outside altogether", {"bbox": [200, 200, 30, 30]}),
    ("of negative width", {"bbox": [40, 10, -20, 20]}),
    ("of no size", {"bbox": [5, 5, 0, 0]}),
    ("of no height", {"bbox": [50, 50, 20, 0]}),
    ("a crowd", {"bbox": [0, 0, 90, 60], "iscrowd": 1}),
    ("a crowd beyond", {"bbox": [30, 30, 90, 60], "iscrowd": 1}),
    ("flagged to be ignored", {"bbox": [2, 40, 40, 20], "ignore": 1}),
    ("of an area that lies", {"bbox": [70, 5, 20, 20], "area": 20000}),
    ("of an area of nothing", {"bbox": [72, 40, 20, 20], "area": 0}),
    ("there twice", {"bbox": [10, 10, 30, 20]}),
    ("larger than the image", {"bbox": [-50, -50, 300, 300]}),
    ("a pixel out", {"bbox": [80.5, 30, 16.4, 20]}),
]


class Loader:
    """One image a batch, none of them decoded."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for index in range(start, len(self)):
            image_id = self.dataset.annotations(index).image_id
            yield make_batch(torch.zeros(1, 3, 1, 1), indices=[index], image_ids=[image_id])


@plugin
class Given:
    """A data set, and a detector that knows what it will find, by image id."""

    dataset: Any = option(help="the data")
    found: Any = option(help="results in COCO's form, with labels")

    @hookimpl
    def build_loader(self, run: Run, mode: Mode) -> Loader:
        self.dataset.load()
        return Loader(self.dataset)

    @hookimpl
    def build_model(self, run: Run) -> torch.nn.Module:
        return torch.nn.Identity()

    @hookimpl
    def train_step(self, run: Run, batch: Batch) -> Mapping[str, torch.Tensor]:
        return {"loss": torch.zeros(())}

    @hookimpl
    def val_step(self, run: Run, batch: Batch) -> list[Detections]:
        mine = [one for one in self.found if one["image_id"] == batch.image_ids[0]]
        mine.sort(key=lambda one: -one["score"])
        boxes = torch.tensor([one["bbox"] for one in mine], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        scores = torch.tensor([one["score"] for one in mine], dtype=torch.float64)
        ids = [self.dataset.category_ids.get(name, label + 1) for label, name in enumerate(self.dataset.classes)]
        labels = torch.tensor([ids.index(one["category_id"]) for one in mine], dtype=torch.int64)
        return [Detections(batch.image_ids[0], batch.indices[0], boxes, scores, labels)]


def measured(dataset: Dataset, found: list[dict[str, Any]], evaluator: Any) -> dict[str, float]:
    options = RunOptions(until=Span(1, "epochs"), work_dir=Path("never-written"))
    kernel = Kernel({"given": Given(dataset=dataset, found=found), "evaluator": evaluator}, options)
    return dict(kernel.test().metrics)


def by_pycocotools(truth: Path, found: list[dict[str, Any]]) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def ours(metrics: Mapping[str, float]) -> list[float]:
    names = ["mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l", "AR@1", "AR@10", "AR@100", "AR_s", "AR_m", "AR_l"]
    return np.nan_to_num([metrics[f"coco/bbox_{name}"] for name in names], nan=-1).tolist()


@pytest.fixture
def truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every odd box beside a plain one, in an image of its own; all of them once more in a last one."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    images, annotations = [], []
    for number in range(len(ODD) + 1):
        Image.new("RGB", (WIDTH, HEIGHT)).save(f"images/{number}.bmp")
        images.append({"id": number, "file_name": f"{number}.bmp", "width": WIDTH, "height": HEIGHT})
        fields = [ODD[number][1], {"bbox": [44, 2, 20, 12]}] if number < len(ODD) else [odd for _, odd in ODD]
        for one in fields:
            _, _, width, height = one["bbox"]  # type: ignore[misc]
            annotation = {"area": abs(width * height), "iscrowd": 0, "category_id": 1 + len(annotations) % 2, **one}
            annotations.append({"id": len(annotations) + 1, "image_id": number, **annotation})
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


def cut(box: list[float]) -> list[float]:
    """A box as a model could give it: inside of the image."""
    x1, y1, x2, y2 = box[0], box[1], box[0] + box[2], box[1] + box[3]
    x1, x2 = sorted(np.clip([x1, x2], 0, WIDTH).tolist())
    y1, y2 = sorted(np.clip([y1, y2], 0, HEIGHT).tolist())
    return [x1, y1, x2 - x1, y2 - y1]


def detections(annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every object its box, as it is and cut to the image, and one beside it, with scores in some order."""
    draw = np.random.default_rng(0)
    found = []
    for one in annotations:
        shifted = (np.array(one["bbox"], dtype=float) + draw.uniform(-4, 4, 4)).tolist()
        for box in (one["bbox"], cut(one["bbox"]), cut(shifted)):
            score = round(float(draw.random()), 4)
            found.append({**{key: one[key] for key in ("image_id", "category_id")}, "bbox": box, "score": score})
    return found


@pytest.mark.parametrize("policy", ["clip", "drop"])
def test_coco_metrics_are_those_of_pycocotools_on_the_same_file(truth: dict[str, Any], policy: Any) -> None:
    path, found = Path("truth.json"), detections(truth["annotations"])
    path.write_text(json.dumps(truth))
    dataset = Coco(annotation_file=path, image_folder=Path("images"), bad_boxes=policy)
    expected = by_pycocotools(path, found)
    assert ours(measured(dataset, found, CocoMap())) == expected
    assert 0 < expected[0] < 1
    trained = [dataset.annotations(index) for index in range(len(dataset))]
    assert all((notes.boxes >= 0).all() and (notes.boxes <= [WIDTH, HEIGHT] * 2).all() for notes in trained)
    assert sum(map(len, trained)) < len(truth["annotations"])


@pytest.mark.parametrize("ids", ["with gaps", "text"])
def test_saved_detections_give_pycocotools_the_same_metrics(
    ids: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ids with gaps or text, in no order; images and a class without objects, areas other than the boxes'."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    draw = np.random.default_rng(3)
    numbers = draw.choice(10_000, 14, replace=False).tolist()
    names = [f"frame {number}" if ids == "text" else number for number in numbers]
    images = [{"id": name, "file_name": f"{at}.bmp", "width": WIDTH, "height": HEIGHT} for at, name in enumerate(names)]
    for at in range(len(images)):
        Image.new("RGB", (WIDTH, HEIGHT)).save(f"images/{at}.bmp")
    categories = [
        {"id": 40, "name": "z"},
        {"id": 7, "name": "a"},
        {"id": 1000, "name": "nothing"},
        {"id": 8, "name": "m"},
    ]
    annotations: list[dict[str, Any]] = []
    for name in names[:10]:
        for _ in range(int(draw.integers(1, 6))):
            x, y, w, h = (round(float(side), 2) for side in draw.uniform([0, 0, 5, 5], [60, 40, 50, 40]))
            one = {"id": 3 + 7 * len(annotations), "image_id": name, "category_id": int(draw.choice([40, 7, 8]))}
            crowd = int(draw.random() < 0.1)
            annotations.append({**one, "bbox": [x, y, w, h], "area": round(w * h * 0.8, 3), "iscrowd": crowd})
    truth = {"images": images, "annotations": annotations, "categories": categories}
    Path("truth.json").write_text(json.dumps(truth))
    found = detections(annotations)
    found += [{"image_id": names[12], "category_id": 1000, "bbox": [1.5, 2.25, 30, 30], "score": 0.75}]
    dataset = Coco(annotation_file=Path("truth.json"), image_folder=Path("images"))
    metrics = measured(dataset, found, CocoMap(save=Path("saved.json"), per_class=True))
    saved = json.loads((Path("never-written") / "saved.json").read_text())
    assert {one["image_id"] for one in saved} == {one["image_id"] for one in found}
    assert len(saved) == len(found)
    assert ours(metrics) == by_pycocotools(Path("truth.json"), saved)
    assert 0 < metrics["coco/bbox_mAP"] < 1
    assert np.isnan(metrics["coco/bbox_AP/nothing"])


@pytest.mark.parametrize("number", range(len(ODD)), ids=[name.replace(" ", "_") for name, _ in ODD])
def test_each_odd_box_alone(truth: dict[str, Any], number: int) -> None:
    keep = [truth["images"][number]]
    annotations = [one for one in truth["annotations"] if one["image_id"] == number]
    path, found = Path("truth.json"), detections(annotations)[:-2]
    path.write_text(json.dumps({**truth, "images": keep, "annotations": annotations}))
    dataset = Coco(annotation_file=path, image_folder=Path("images"))
    assert ours(measured(dataset, found, CocoMap())) == by_pycocotools(path, found)


def test_wrapped_data_sets_hand_the_truth_on(truth: dict[str, Any]) -> None:
    Path("truth.json").write_text(json.dumps(truth))

    def coco() -> Coco:
        return Coco(annotation_file=Path("truth.json"), image_folder=Path("images"))

    raw = coco()
    raw.load()
    wrapped: list[Dataset] = [
        Concat(datasets=[coco()]),
        Repeat(dataset=coco(), times=1),
        Subset(dataset=coco(), first=9),
    ]
    for dataset in wrapped:
        dataset.load()
        for index in range(len(dataset)):
            assert dataset.truth(index).boxes.tolist() == raw.truth(index).boxes.tolist()
            assert dataset.annotations(index).boxes.tolist() == raw.annotations(index).boxes.tolist()


def test_voc_boxes_are_measured_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A box beyond its image is not found by a detection inside of it; difficult objects count neither way."""
    monkeypatch.chdir(tmp_path)
    for name in ("JPEGImages", "Annotations"):
        Path(name).mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save("JPEGImages/0.bmp")
    things = [(61, 21, 140, 40, 0), (1, 1, 20, 20, 1), (1, 41, 20, 60, 0), (30, 30, 29, 29, 0)]
    text = "".join(
        f"<object><name>a</name><difficult>{hard}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for x1, y1, x2, y2, hard in things
    )
    Path("Annotations/0.xml").write_text(f"<annotation>{text}</annotation>")
    boxes = [[60, 20, 36, 20], [0, 0, 19, 19], [0, 40, 19, 19]]
    found = [{"image_id": "0", "category_id": 1, "bbox": box, "score": 0.9 - at / 10} for at, box in enumerate(boxes)]
    dataset = Voc(root=Path(), split=None)
    metrics = measured(dataset, found, VocMap(metric="area"))
    # of three objects that count, one is found, behind one detection that finds none; the difficult one is passed over
    assert metrics["pascal_voc/mAP"] == pytest.approx(1 / 3 * 1 / 2)
    assert len(dataset.annotations(0)) == 3
