"""Loads what was found, with the options that it needs, and counts what is in it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from detkernel import DataError
from detkernel.errors import as_typed
from detkernel_detection import Dataset
from numpy.typing import NDArray

from detkernel_data.formats.coco import Coco
from detkernel_data.formats.labelme import Labelme
from detkernel_data.formats.voc import Voc
from detkernel_data.formats.yolo import Yolo
from detkernel_data.starting.look import Part
from detkernel_data.wrappers import Concat

CLASSES: dict[str, Any] = {"voc": Voc, "coco": Coco, "yolo": Yolo, "labelme": Labelme}
_REMEDIES = {
    ("bad_images", "drop"),
    ("orphan_labels", "drop"),
    ("unlabelled", "keep"),
    ("exif_orientation", "apply"),
    ("exif_orientation", "ignore"),
    ("bbox_unit", "fractions"),
    ("bbox_format", "xyxy"),
    ("masks", "false"),
    ("origin", "0"),
}
"""What a reader's message may advise that changes no meaning: it settles what the files really are."""
_ADVICE = re.compile(r"`(\w+): (\w+)`")
_VALUES: dict[str, Any] = {"false": False, "0": 0}
DECODED = 1_000
"""Images up to which all are decoded here; of more, only the headers are read, and `detkernel check` decodes them."""


@attrs.define
class Loaded:
    """The data of one split, loaded, and how a config names it."""

    config: dict[str, Any]
    dataset: Dataset
    settled: list[str] = attrs.field(factory=list)
    """What a reader refused, and the option that was set for it."""


def load(parts: Sequence[Part], split: str) -> Loaded:
    """The data of one split. Raises `DataError` for what no option settles."""
    several = [_load_part(part, split) for part in parts]
    if len(several) == 1:
        return several[0]
    joined = Concat(datasets=[one.dataset for one in several])
    try:
        joined.load()
    except DataError:  # classes that differ, in files that were written one by one
        names = list(dict.fromkeys(name for one in several for name in one.dataset.classes))
        joined = Concat(datasets=[one.dataset for one in several], class_names=names)
        joined.load()
    config: dict[str, Any] = {"use": "concat"}
    if joined.class_names is not None:
        config["class_names"] = list(joined.class_names)
    config["datasets"] = [one.config for one in several]
    return Loaded(config, joined, [text for one in several for text in one.settled])


def _load_part(part: Part, split: str) -> Loaded:
    options = dict(part.options)
    if part.use == "coco":
        options["masks"] = False  # boxes are what the config trains on
    settled: list[str] = []
    while True:
        dataset: Dataset = CLASSES[part.use](**options)
        try:
            dataset.load()
            _check_images(dataset, split)
        except DataError as error:
            remedy = _remedy(str(error), options)
            if remedy is None:
                raise
            options[remedy[0]] = remedy[1]
            settled.append(f"{_short(str(error))}: set `{remedy[0]}: {_plain(remedy[1])}`")
            continue
        remedy = next((one for note in dataset.notes if (one := _remedy(note, options, only="origin"))), None)
        if remedy is None:
            config = {"use": part.use, **{name: _typed(value) for name, value in options.items()}}
            return Loaded(config, dataset, settled)
        options[remedy[0]] = remedy[1]
        settled.append("some boxes begin at pixel 0: set `origin: 0`")


def _check_images(dataset: Dataset, split: str) -> None:
    """Decode all images of a data set that is not large: what cannot be decoded would be refused by a check."""
    from detkernel_data.loading.check_images import check_images

    if len(dataset) <= DECODED:
        check_images(dataset, split, workers=0)


def _remedy(message: str, options: dict[str, Any], only: str = "") -> tuple[str, Any] | None:
    """The first option that a message advises and that may be set."""
    for name, value in _ADVICE.findall(message):
        if (name, value) in _REMEDIES and name not in options and (not only or name == only):
            return name, _VALUES.get(value, value)
    return None


def _short(message: str) -> str:
    """The first problem of a message, without its advice."""
    lines = message.splitlines()
    text = lines[1].strip() if len(lines) > 1 and lines[0].endswith("problems") else lines[0]
    return text.partition(";")[0][:300]


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _typed(value: Any) -> Any:
    return as_typed(value) if isinstance(value, Path) else value


@attrs.define
class Survey:
    """What is in the data of a split."""

    ids: list[str]
    sizes: NDArray[np.int64]
    """[n, 2] height and width of the images."""
    sides: NDArray[np.float64]
    """[M] square roots of the boxes' areas, in pixels."""
    scale: NDArray[np.float64]
    """[M] the same by the longer side of the image."""
    labels: list[NDArray[np.int64]]
    """Of each image."""


def survey(dataset: Dataset) -> Survey:
    """Look at all annotations; nothing is decoded."""
    ids, sizes, sides, scale, labels = [], [], [], [], []
    for index in range(len(dataset)):
        notes = dataset.annotations(index)
        ids.append(str(notes.image_id))
        sizes.append((notes.height, notes.width))
        own = np.sqrt((notes.boxes[:, 2:] - notes.boxes[:, :2]).prod(1))
        sides.append(own)
        scale.append(own / max(notes.height, notes.width))
        labels.append(np.asarray(notes.labels))
    return Survey(
        ids, np.array(sizes, dtype=np.int64).reshape(-1, 2), np.concatenate(sides), np.concatenate(scale), labels
    )


def yolo_yaml(target: Path, names: Sequence[str], parts: Sequence[Part]) -> str:
    """The text of a data.yaml for label files that have none, to be written to `target`; the parts then name it."""
    import json

    lines = ["# Written by `detkernel init`: where the images are; the labels of images/a.jpg are labels/a.txt."]
    for part in parts:
        folders = [os.path.abspath(folder) for folder in part.options["folders"]]  # noqa: PTH100
        lines.append(f"{part.split}: {json.dumps(folders, ensure_ascii=False)}")
    lines.append(f"names: {json.dumps(list(names), ensure_ascii=False)}")
    for part in parts:
        part.options = {"data": target, "split": part.split}
    return "\n".join(lines) + "\n"


def unknown_classes(train: Dataset, other: Dataset) -> list[str]:
    """Classes of another split that the training data lacks."""
    return [name for name in other.classes if name not in train.classes]


def sizes_text(sizes: NDArray[np.int64]) -> str:
    """`640x480`, or `320x240 to 1024x768, half of them at least 640x480 in area`."""
    low, high = sizes.min(0), sizes.max(0)
    if (low == high).all():
        return f"{low[1]}x{low[0]}"
    areas = sizes.prod(1)
    order = np.argsort(areas, kind="stable")
    texts = [f"{sizes[number][1]}x{sizes[number][0]}" for number in (order[0], order[len(order) // 2], order[-1])]
    return f"{texts[0]} to {texts[2]} (median {texts[1]})"
