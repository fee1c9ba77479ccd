"""Detections as files: COCO JSON, YOLO text, VOC XML, CSV. Each form can be read again as a data set."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import yaml
from detkernel.errors import printable
from detkernel.files import write_atomic
from detkernel_detection.drawing import jpeg
from detkernel_detection.drawing.objects import SKELETON

from detkernel_export.results import Result

CSV_COLUMNS = ("image", "class", "score", "x1", "y1", "x2", "y2")


class Found(NamedTuple):
    """What is kept of an image until all are written."""

    name: str
    """Its name below the folder of images."""
    source: str
    """Where it came from, as it is shown in a table."""
    values: dict[str, Any]
    """`Result.to_dict()`."""


def keep_image(folder: Path, name: str, result: Result) -> str:
    """Put the image where the data set's are, as a link to its file, or a copy where links are not possible; a frame of
    a video as a JPEG. Returns its name with the suffix."""
    if result.path is None:
        write_atomic(folder / f"{name}.jpg", jpeg(result.plain(), quality=95), within=folder)
        return f"{name}.jpg"
    target = folder / f"{name}{Path(result.path).suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() or target.exists():
        target.unlink()
    try:
        target.symlink_to(os.path.abspath(result.path))  # noqa: PTH100 - what it is a link to is not asked
    except (OSError, NotImplementedError):
        shutil.copyfile(result.path, target)
    return target.relative_to(folder).as_posix()


def write_coco(folder: Path, found: Sequence[Found], classes: Sequence[str], keypoints: Sequence[str]) -> Path:
    """`coco.json`: images, categories and annotations with their scores."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, one in enumerate(found, start=1):
        images.append(
            {"id": number, "file_name": one.name, "width": one.values["width"], "height": one.values["height"]}
        )
        for entry in one.values["detections"]:
            x1, y1, x2, y2 = entry["box"]
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": entry["label"] + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "score": entry["score"],
            }
            if "mask" in entry:
                annotation["segmentation"] = entry["mask"]
            if "keypoints" in entry:
                annotation["keypoints"] = [value for x, y, _ in entry["keypoints"] for value in (x, y, 2)]
                annotation["num_keypoints"] = len(entry["keypoints"])
            annotations.append(annotation)
    persons: dict[str, Any] = {}
    if keypoints:
        places = {name: place for place, name in enumerate(keypoints, start=1)}
        lines = [[places[one], places[two]] for one, two in SKELETON if one in places and two in places]
        persons = {"keypoints": list(keypoints), "skeleton": lines}
    categories = [{"id": number, "name": name, **persons} for number, name in enumerate(classes, start=1)]
    content = {"images": images, "categories": categories, "annotations": annotations}
    write_atomic(folder / "coco.json", json.dumps(content) + "\n", within=folder)
    return folder / "coco.json"


def write_yolo(folder: Path, found: Sequence[Found], classes: Sequence[str], keypoints: Sequence[str]) -> Path:
    """`data.yaml`, and `labels/NAME.txt` with a line an object: class, centre, width, height in parts of the image."""
    for one in found:
        width, height = one.values["width"], one.values["height"]
        lines = []
        for entry in one.values["detections"]:
            x1, y1, x2, y2 = entry["box"]
            numbers = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
            lines.append(" ".join([str(entry["label"]), *(f"{number:.8f}" for number in numbers)]) + "\n")
        write_atomic(folder / "labels" / Path(one.name).with_suffix(".txt"), "".join(lines), within=folder)
    content = {"path": ".", "val": "images", "names": dict(enumerate(classes))}
    write_atomic(folder / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True), within=folder)
    return folder / "data.yaml"


def write_voc(folder: Path, found: Sequence[Found], classes: Sequence[str], keypoints: Sequence[str]) -> Path:
    """`Annotations/NAME.xml` of each image; coordinates count from 1, as VOC's do."""
    for one in found:
        objects = "".join(
            f"  <object>\n    <name>{escape(printable(entry['class']))}</name>\n    <difficult>0</difficult>\n"
            f"    <score>{entry['score']:.6f}</score>\n    <bndbox>"
            + "".join(
                f"<{side}>{value:.4f}</{side}>"
                for side, value in zip(("xmin", "ymin", "xmax", "ymax"), _from_one(entry["box"]), strict=True)
            )
            + "</bndbox>\n  </object>\n"
            for entry in one.values["detections"]
        )
        text = (
            f"<annotation>\n  <filename>{escape(printable(Path(one.name).name))}</filename>\n"
            f"  <size><width>{one.values['width']}</width><height>{one.values['height']}</height><depth>3</depth>"
            "</size>\n"
            f"{objects}</annotation>\n"
        )
        write_atomic(folder / "Annotations" / Path(one.name).with_suffix(".xml"), text, within=folder)
    return folder / "Annotations"


def _from_one(box: Sequence[float]) -> list[float]:
    """Corners as VOC counts pixels, from 1."""
    return [side + 1 for side in box]


def write_csv(folder: Path, found: Sequence[Found], classes: Sequence[str], keypoints: Sequence[str]) -> Path:
    """`detections.csv`: a line an object. A name that a spreadsheet would take for a formula gets a quote before it."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(CSV_COLUMNS)
    for one in found:
        for entry in one.values["detections"]:
            numbers = [f"{entry['score']:.6f}", *(f"{side:.3f}" for side in entry["box"])]
            writer.writerow([_harmless(one.source), _harmless(entry["class"]), *numbers])
    write_atomic(folder / "detections.csv", text.getvalue(), within=folder)
    return folder / "detections.csv"


def _harmless(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


WRITERS: Mapping[str, Callable[[Path, Sequence[Found], Sequence[str], Sequence[str]], Path]] = {
    "coco": write_coco,
    "yolo": write_yolo,
    "voc": write_voc,
    "csv": write_csv,
}
