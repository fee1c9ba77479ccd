"""What the network sees: samples of each split behind their transforms, or the images as their files have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from detkernel import Kernel, Run, UserError
from detkernel.errors import as_typed, did_you_mean, printable
from detkernel.loop import load
from detkernel.run import Mode
from detkernel_detection import Annotations, Dataset
from detkernel_detection.drawing import Tile, draw, png, sheet
from detkernel_detection.segmentations import decode_counts
from PIL import Image, ImageDraw

from detkernel_report.metrics import SIZES
from detkernel_report.results import Bools, Floats, iou
from detkernel_report.statistics import findings

TINY = 4.0
"""Pixels of a side below which an object can hardly be seen."""
HUGE = 0.9
"""Share of the image that an object covers to be remarked on."""
SAME = 0.95
"""Overlap of two boxes of one class that are taken for one annotated twice."""


@attrs.frozen(eq=False)
class Shown:
    """An image with its objects, drawn."""

    split: str
    name: str
    """Its file."""
    drawn: Image.Image
    size: tuple[int, int]
    """(height, width) before it was scaled to be shown."""
    classes: frozenset[str]
    """Of its objects."""
    sizes: frozenset[str]
    """Names of COCO's ranges that its objects are in, in the pixels of this image."""
    findings: tuple[str, ...]
    """What is remarkable about it: what the reader of the data noted, and what is seen in its boxes."""
    objects: int


@attrs.frozen(eq=False)
class Split:
    name: str
    images: Sequence[Shown]
    total: int
    """Images that the split has."""
    classes: Sequence[str]

    def findings(self) -> Mapping[str, int]:
        """How many of these images have each finding, the commonest first."""
        return dict(Counter(finding for one in self.images for finding in one.findings).most_common())


def browse(kernel: Kernel, splits: Sequence[str], count: int, side: int, *, raw: bool) -> list[Split]:
    """The first images of each split, in the order of the first epoch; drawn, their longer side scaled to `side`.

    `splits`: names; empty: training, validation, and all further validation sets. Raises UserError for a split that
    there is not.
    """
    found = []
    with kernel.loading() as run:
        known = ["train", "val", *run.val_sets, "test"]
        for name in splits:
            if name not in known:
                raise UserError(f"no split is named '{printable(name)}'{did_you_mean(name, known)}")
        for mode in splits or known[:-1]:
            loader = load(run, mode)
            if loader is None and mode in splits:
                raise UserError(f"the config has no data for '{printable(mode)}'; give the loader a `{mode}` data set")
            if loader is not None:
                noted = _noted(loader.dataset)
                shown = _raw(mode, loader.dataset, noted, side) if raw else _seen(run, mode, noted, side)
                found.append(Split(mode, list(islice(shown, count)), len(loader.dataset), list(loader.dataset.classes)))
    return found


def _seen(run: Run, mode: Mode, noted: Mapping[str, list[str]], side: int) -> Iterator[Shown]:
    """Samples as they reach the model: transformed one by one, and then as a batch."""
    dataset = run.loaders[mode].dataset
    changers = [
        run.bus[impl.name]
        for impl in run.bus.implementations("before_train_iter")
        if mode == "train" and impl.name in {one.name for one in run.bus.implementations("build_loader")}
    ]
    for batch in run.loaders[mode].batches(0):
        for changer in changers:  # mixing and other transforms of whole batches are the loader's
            changer.before_train_iter(run=run, batch=batch)  # type: ignore[attr-defined]
        for number, (height, width) in enumerate(batch.sizes):
            notes, target = dataset.annotations(batch.indices[number]), batch.target(number)
            if target.masks is not None:
                target.masks = target.masks[:, :height, :width]
            pixels = _levels(batch.images[number, :, :height, :width])
            boxes, labels = target.boxes.cpu().numpy().astype(float), target.labels.tolist()
            lost = len(boxes) < int((~notes.crowd & ~notes.difficult).sum())
            drawn = draw(pixels, target, dataset.classes, longest=side, keypoint_names=dataset.keypoint_names)
            said = [*noted.get(Path(notes.path).stem, ()), *["objects left out by transforms"] * lost]
            yield _shown((mode, dataset), notes, drawn, (height, width), boxes, labels, said)


def _raw(mode: Mode, dataset: Dataset, noted: Mapping[str, list[str]], side: int) -> Iterator[Shown]:
    """Images and annotations as the files have them, those with a finding first; what does not count is dashed."""
    marked = [index for index in range(len(dataset)) if noted and Path(dataset.annotations(index).path).stem in noted]
    for index in dict.fromkeys([*marked, *range(len(dataset))]):
        notes = dataset.truth(index)
        regular = ~(notes.crowd | notes.difficult)
        own = attrs.evolve(
            notes,
            boxes=notes.boxes[regular],
            labels=notes.labels[regular],
            masks=_masks(notes, regular),
            keypoints=None if notes.keypoints is None else notes.keypoints[regular],
        )
        others = attrs.evolve(notes, boxes=notes.boxes[~regular], labels=notes.labels[~regular], masks=None)
        drawn = draw(
            dataset.image(index), own, dataset.classes, truth=others if len(others) else None, longest=side,
            keypoint_names=dataset.keypoint_names,
        )  # fmt: skip
        said = [*noted.get(Path(notes.path).stem, ()), *["crowds or difficult objects"] * bool(len(others))]
        size = (notes.height, notes.width)
        yield _shown((mode, dataset), notes, drawn, size, notes.boxes, notes.labels.tolist(), said)


def _shown(
    split: tuple[Mode, Dataset],
    notes: Annotations,
    drawn: Image.Image,
    size: tuple[int, int],
    boxes: Floats,
    labels: Sequence[int],
    said: Sequence[str],
) -> Shown:
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) if len(boxes) else np.zeros(0)
    sizes = [name for name, (low, high) in list(SIZES.items())[1:] if ((area >= low) & (area < high)).any()]
    found = [*said, *_remarks(boxes, np.array(labels, np.int64), size)]
    names = frozenset(split[1].classes[label] for label in labels)
    return Shown(split[0], as_typed(notes.path), drawn, size, names, frozenset(sizes), tuple(found), len(boxes))


def _remarks(boxes: Floats, labels: Any, size: tuple[int, int]) -> Iterator[str]:
    """What is seen in an image's boxes."""
    if not len(boxes):
        yield "no object"
        return
    sides = boxes[:, 2:] - boxes[:, :2]
    if (sides.min(1) < TINY).any():
        yield f"an object narrower than {TINY:g} pixels"
    if (sides.prod(1) > HUGE * size[0] * size[1]).any():
        yield f"an object that covers more than {HUGE:.0%} of the image"
    same: Bools = (iou(boxes, boxes) > SAME) & (labels[:, None] == labels[None])
    if np.triu(same, 1).any():
        yield "an object annotated twice"


def _noted(dataset: Dataset) -> dict[str, list[str]]:
    """What the reader of the data noted, by the names of the files that it is about, without their suffixes: an
    annotation's file is called as its image's."""
    found: dict[str, list[str]] = {}
    for one in findings(dataset.notes):
        text = str(one["text"]).partition(":")[0]
        for place in one["places"]:
            names = found.setdefault(Path(str(place).partition(":")[0]).stem, [])
            if text not in names:
                names.append(text)
    return found


def _levels(image: Any) -> Any:
    """uint8 on the CPU; an image that a transform has normalised is spread over all levels."""
    image = image.cpu()
    if not image.is_floating_point():
        return image
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp(min=1e-6) * 255).byte()


def _masks(notes: Annotations, which: Bools) -> Any:
    """[N, H, W] of some objects' segmentations; None where the data has none."""
    if notes.masks is None:
        return None
    made = np.zeros((int(which.sum()), notes.height, notes.width), np.uint8)
    for into, number in zip(made, np.flatnonzero(which).tolist(), strict=True):
        given = notes.masks[number]
        if isinstance(given, dict):
            counts = given["counts"]
            text = counts.decode() if isinstance(counts, bytes) else counts
            runs = np.array((decode_counts(text) or []) if isinstance(text, str) else text, np.int64)
            values = np.repeat(np.arange(len(runs)) % 2, runs)
            if len(values) == into.size:
                into[:] = values.reshape(notes.width, notes.height).T
        else:
            outline = Image.new("L", (notes.width, notes.height))
            for part in given or ():
                ImageDraw.Draw(outline).polygon([round(value) for value in part], fill=1)
            into[:] = np.asarray(outline)
    return made


def contact_sheet(split: Split, *, raw: bool, columns: int = 4) -> bytes:
    """All images of a split on one sheet, as a PNG."""
    tiles = [Tile(one.drawn, f"{printable(Path(one.name).name)}: {counted(one.objects)}") for one in split.images]
    seen = "as their files have them" if raw else "as the network sees them"
    there = {name for one in split.images for name in one.classes}
    labels = [(label, name) for label, name in enumerate(split.classes) if name in there]
    title = f"{len(split.images)} of {split.total} images of {printable(split.name)}, {seen}"
    notes = [f"{many} with: {printable(finding)}" for finding, many in split.findings().items()]
    return png(sheet(tiles, columns, title=title, notes=notes, classes=labels))


def counted(objects: int) -> str:
    """`1 object`, `2 objects`."""
    return f"{objects} object{'s' * (objects != 1)}"
