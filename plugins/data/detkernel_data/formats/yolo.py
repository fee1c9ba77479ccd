"""YOLO form: a `data.yaml`, folders of images, and a text file of labels an image."""

from __future__ import annotations

import math
import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from detkernel import DataError, option, plugin
from detkernel.errors import relative
from detkernel.files import read_regular
from detkernel_detection.images import Listing

from detkernel_data.formats.dataset import FileDataset, check_names
from detkernel_data.formats.entry import number_in
from detkernel_data.formats.missing_files import Near
from detkernel_data.formats.table import Box, Table
from detkernel_data.formats.yolo_yaml import Images, images_of, names_of, read_yaml
from detkernel_data.report import EXAMPLES, Problems, counted, note

MARGIN = 1.0
"""How far out of 0..1 a box may be to be cut to its image like others; farther out it is something else, pixels say."""
POLYGON_MARGIN = 0.1
"""The same of a polygon's points, among which those of keypoints would have a visibility of 2."""
_LARGEST = 2**26
"""Bytes of a label file."""
_OTHER_TEXTS = {"classes.txt", "labels.txt", "notes.txt", "obj.names", "readme.txt", "train.txt", "val.txt", "test.txt"}
"""What tools write among the labels."""

_CLASS = re.compile("[0-9]{1,6}")


class Label(NamedTuple):
    """One line: fractions of the image's width and height."""

    name: str
    box: Box
    polygon: Sequence[float]
    """x, y, ...; empty for a box."""
    line: int
    fields: Sequence[float] = ()
    """The further columns that were asked for."""


def read(
    data: Path, split: str, unlabelled: str, orphans: str, *, drop_missing: bool, fields: Sequence[str] = ()
) -> Table:
    """Everything that the label files say. Raises `DataError` with all problems found.

    `unlabelled`, `orphans`: what becomes of images without a label file, and of label files without an image.
    """
    path, content = read_yaml(data)
    names = names_of(content)
    found = images_of(path, content, split, drop_missing)
    problems = Problems(content.place)
    _check_alone(found.files, problems)
    lines: list[int] = []
    table = _empty_table(f"{content.place}: {split}", names, lines)
    table.notes += found.notes
    table.fields = {name: [] for name in fields}
    without, is_there = [], Listing()
    for image, identity in zip(found.files, _identities(found.files, path.parent), strict=True):
        labels = label_file(image)
        labelled = is_there(labels)
        if not labelled:
            without.append(image)
            if unlabelled == "drop":
                continue
        try:
            _append(table, lines, image, identity, read_labels(labels, names, fields) if labelled else [])
        except DataError as error:
            problems.add(str(error))
    problems.stop()
    if without and len(without) == len(found.files):
        raise DataError(_no_labels(table.source, found.files))
    _report_unlabelled(table, without, unlabelled)
    _report_orphans(table, found, orphans)
    _report_corners(table)
    if not any(table.masks or ()):
        table.masks = None
    return table


def _no_labels(source: str, images: Sequence[str]) -> str:
    """The message for a split without labels."""
    labels = label_file(images[0])
    expected = Path(labels).parent
    folder = next((above for above in (expected, *expected.parents) if above.is_dir()), Path())
    found = Near(folder, "", frozenset({".txt"})).find(str(Path(labels).relative_to(folder)))
    of_another_split = f"{os.sep}labels{os.sep}" in f"{os.sep}{found}"
    hint = f"; there is {relative(found)}" if found and not of_another_split else ""
    return (
        f"{source}: none of {counted(len(images), 'image')} has labels; expected {relative(labels)} and so on"
        f"{hint}; training and evaluation need them"
    )


def _report_unlabelled(table: Table, images: Sequence[str], policy: str) -> None:
    if not images:
        return
    shown = [relative(image) for image in images[:EXAMPLES]]
    if policy == "error":
        problems = Problems(table.source)
        for image in images:
            problems.add(
                "" if problems.full else f"{relative(image)}: its {relative(label_file(image))} is missing; "
                "`unlabelled: keep` takes it as an image without objects, `unlabelled: drop` leaves it out"
            )  # fmt: skip
        problems.stop()
    done = "taken as images without objects" if policy == "keep" else "left out"
    remedy = "`unlabelled: drop` leaves them out" if policy == "keep" else "`unlabelled: keep` takes them"
    what = f"{counted(len(images), 'image')} without a label file {done}"
    table.notes.append(note(what, images, remedy, shown))


def _report_orphans(table: Table, found: Images, policy: str) -> None:
    """Label files whose image is not there, or has a suffix that is not read. A list of images has its own choice
    of them, so that only folders are compared."""
    owned = {label_file(image) for image in found.files}
    folders = dict.fromkeys(os.path.dirname(label_file(os.path.join(folder, "x.jpg"))) for folder in found.folders)  # noqa: PTH118, PTH120
    orphans: list[str] = []
    for folder in folders:
        try:
            names = sorted(name for name in os.listdir(folder or ".") if name.endswith(".txt"))  # noqa: PTH208
        except OSError:
            continue
        paths = (os.path.join(folder, name) for name in names if name.lower() not in _OTHER_TEXTS)  # noqa: PTH118
        orphans += [path for path in paths if path not in owned]
    if not orphans:
        return
    shown = [relative(path) for path in orphans[:EXAMPLES]]
    what = f"{counted(len(orphans), 'label file')} without an image"
    if policy == "error":
        raise DataError(f"{table.source}: {what}: {'; '.join(shown)}; `orphan_labels: drop` leaves them out")
    table.notes.append(note(f"{what} left out", orphans, "`orphan_labels: error` refuses them", shown))


def _report_corners(table: Table) -> None:
    """Oriented boxes look like polygons of four points, and nothing in the files says which they are."""
    polygons = [mask[0] for mask in table.masks or () if mask]
    if polygons and all(len(polygon) == 8 for polygon in polygons):
        table.notes.append(
            note(
                f"all {len(polygons)} polygons have four points, as oriented boxes have: they are read as masks, and "
                "as the upright boxes around them"
            )
        )


def _append(table: Table, lines: list[int], image: str, identity: str, labels: Sequence[Label]) -> None:
    assert table.masks is not None
    position = table.add_image(identity, image, 0, 0)
    for label in labels:
        table.add_object(position, label.name, label.box)
        table.masks.append([array("d", label.polygon)] if label.polygon else [])
        lines.append(label.line)
        for name, value in zip(table.fields, label.fields, strict=True):
            table.fields[name].append(value)


def _check_alone(images: Sequence[str], problems: Problems) -> None:
    """Each image counts once, and has labels of its own."""
    owners: dict[str, str] = {}
    for image in images:
        owner = owners.setdefault(labels := label_file(image), image)
        if owner is not image:
            both = f"{relative(image)} and {relative(owner)} have one label file, {relative(labels)}; rename one"
            problems.add(f"{relative(image)}: listed twice in {problems.source}" if owner == image else both)
    problems.stop()


def _identities(images: Sequence[str], root: Path) -> list[str]:
    """The names without suffix; where folders share some, the paths from the data.yaml's folder."""
    stems = [Path(image).stem for image in images]
    if len(set(stems)) == len(stems):
        return stems
    return [Path(os.path.relpath(image, root)).as_posix() for image in images]


def label_file(image: str) -> str:
    """The labels of `.../images/.../a.jpg` are `.../labels/.../a.txt`; without such a folder, they lie beside it."""
    folder, slash, name = f"{os.sep}{image}".rpartition(f"{os.sep}images{os.sep}")
    moved = f"{folder}{os.sep}labels{os.sep}{name}"[1:] if slash else image
    return f"{os.path.splitext(moved)[0]}.txt"  # noqa: PTH122


def read_labels(path: str, names: Sequence[str], fields: Sequence[str] = ()) -> list[Label]:
    """Read a label file, each line of which ends with so many fields. Raises `DataError` with its line."""
    try:
        lines = read_regular(Path(path), _LARGEST).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{relative(path)}: the labels cannot be read ({error})") from None
    found = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        end = max(0, len(words) - len(fields))
        label = _label(path, number, words[:end], names, fields)
        if fields:
            place = f"{relative(path)}:{number}"
            values = [number_in(place, name, word) for name, word in zip(fields, words[end:], strict=True)]
            label = label._replace(fields=values)
        found.append(label)
    return found


def _label(path: str, line: int, words: Sequence[str], names: Sequence[str], fields: Sequence[str]) -> Label:
    place = f"{relative(path)}:{line}"
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        before = f" before {', '.join(fields)}" if fields else ""
        raise DataError(
            f"{place}: expected 'class x y width height', or a class and the points of a polygon; "
            f"got {counted(len(words), 'value')}{before}"
        )
    if not _CLASS.fullmatch(words[0]) or int(words[0]) >= len(names):
        raise DataError(
            f"{place}: expected a class of 0 to {len(names) - 1} (data.yaml's names), got '{words[0][:20]}'"
        )
    margin = MARGIN if len(words) == 5 else POLYGON_MARGIN
    name, values = names[int(words[0])], [_fraction(place, word, margin) for word in words[1:]]
    if len(values) == 4:
        x, y, width, height = values
        return Label(name, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), (), line)
    xs, ys = values[0::2], values[1::2]
    return Label(name, (min(xs), min(ys), max(xs), max(ys)), values, line)


def _fraction(place: str, word: str, margin: float) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not -margin <= value <= 1 + margin:
        raise DataError(f"{place}: expected fractions of the image's width and height, 0 to 1; got '{word[:20]}'")
    return value


def _empty_table(source: str, names: list[str], lines: list[int]) -> Table:
    table: Table

    def where(index: int) -> str:
        return f"{relative(label_file(table.files[table.image[index]]))}:{lines[index]}"

    table = Table(
        source=source,
        declared=lambda: names,
        where=where,
        where_image=lambda index: relative(table.files[index]),
        fractions=True,
        masks=[],
    )
    return table


@plugin
class Yolo(FileDataset):
    """Images and labels in YOLO form: boxes, or polygons, which become masks and boxes.

    The labels of `.../images/.../a.jpg` are `.../labels/.../a.txt`; an image without such a file has no objects,
    unless `unlabelled` says otherwise. Boxes are those of the upright image, as the tools that write this form show it.
    """

    data: Path = option(help="the data.yaml with `names`, `path` and the splits, or the folder that has it")
    split: str = option(help="which of the file's splits: train, val or test")
    class_names: list[str] | None = option(
        default=None, help="some of the file's `names` in label order; null: all of them, in their order"
    )
    exif_orientation: Literal["ignore", "apply"] = option(
        default="apply", help="whether boxes were drawn on the image as stored, or on the upright one"
    )
    unlabelled: Literal["keep", "drop", "error"] = option(
        default="keep", help="images without a label file: taken as images without objects, left out, or an error"
    )
    orphan_labels: Literal["drop", "error"] = option(
        default="drop", help="label files without an image: left out and counted, or an error"
    )

    def __attrs_post_init__(self) -> None:
        check_names(self.class_names, self.ignore_classes)

    def load(self) -> None:
        table = read(
            self.data,
            self.split,
            self.unlabelled,
            self.orphan_labels,
            drop_missing=self.bad_images == "drop",
            fields=tuple(self.fields),
        )
        self._clean(table, self.class_names)
