"""Pascal VOC form: a folder of images, one of XML files, and lists of names."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from detkernel import DataError, option, plugin
from detkernel.errors import did_you_mean, relative
from detkernel.files import read_regular
from detkernel_detection.images import SUFFIXES, image_files, missing_folder, scan

from detkernel_data.download.published import hint as download_hint
from detkernel_data.formats.dataset import FileDataset, check_names
from detkernel_data.formats.missing_files import Near, fold, slip
from detkernel_data.formats.table import Table
from detkernel_data.formats.voc_xml import VocFile, VocObject, read_xml
from detkernel_data.report import EXAMPLES, Problems, counted, note

_LONGEST_LIST = 2**28
_FLAGGED = re.compile(r"\S.*\s-?[01]$")
"""A line of the lists of one class: `000012 -1`."""


def read(
    *,
    images: Path,
    annotations: Path,
    splits: Path,
    split: Sequence[str] | None,
    origin: int,
    unlabelled: str | None,
    orphans: str,
    fields: Sequence[str] = (),
) -> Table:
    """Everything that the annotation files of the split say. Raises `DataError` with all problems found.

    `unlabelled`, `orphans`: what becomes of images without an XML file, and of XML files without an image.
    """
    with scan(annotations, "annotations") as entries:
        known = {entry.name[:-4] for entry in entries if entry.name.endswith(".xml")}
    by_stem = _images_by_stem(images)
    everything = sorted(known | set(by_stem))
    listed = dict.fromkeys(everything, annotations) if split is None else _listed(splits, split)
    unlabelled = unlabelled or ("drop" if split is None else "error")
    source = relative(annotations if split is None else splits / f"{split[0]}.txt")
    problems, found = Problems(source), _Found(source, images, annotations, by_stem, known, origin)
    found.table.fields = {name: [] for name in fields}
    for name, place in listed.items():
        try:
            if len(by_stem.get(name, ())) > 1:
                raise DataError(found.several(name))
            if name not in known and name in by_stem and unlabelled != "error":
                found.without_xml(name, keep=unlabelled == "keep")
            elif name not in known:
                hint = "" if problems.full else found.xml_hint(name)
                raise DataError(_missing(name, place, annotations / f"{name}.xml", "annotation file") + hint)
            elif name not in by_stem and orphans == "drop":
                found.orphans.append(name)
            elif name not in by_stem:
                hint = "" if problems.full else found.image_hint(name)
                raise DataError(_missing(name, place, images / name, "image") + hint)
            else:
                found.add(name, read_xml(annotations / f"{name}.xml", fields))
        except DataError as error:
            problems.add(str(error))
    problems.stop()
    found.report(unlabelled)
    return found.table


class _Found:
    """The table of what was read, and the names of what was not."""

    def __init__(
        self,
        source: str,
        images: Path,
        annotations: Path,
        by_stem: Mapping[str, Sequence[str]],
        known: set[str],
        origin: int,
    ) -> None:
        self.images, self.annotations, self.by_stem = images, annotations, by_stem
        self.lines: list[int] = []
        self.table = _empty_table(source, annotations, known, self.lines)
        self.table.origin = origin
        self.unlabelled: list[str] = []
        self.orphans: list[str] = []
        self.deleted: list[str] = []
        self._known = known
        self._near = Near(images, "image_folder", SUFFIXES)

    def add(self, name: str, file: VocFile) -> None:
        table = self.table
        assert table.difficult is not None
        position = table.add_image(name, str(self.images / self.by_stem[name][0]), file.height, file.width)
        for seen in file.objects:
            if seen.deleted:
                self.deleted.append(f"{relative(self.annotations / name)}.xml:{seen.line}")
                continue
            table.add_object(position, seen.name, _from_origin(seen, table.origin))
            table.difficult.append(seen.difficult)
            for name, value in zip(table.fields, seen.fields, strict=True):
                table.fields[name].append(value)
            self.lines.append(seen.line)

    def without_xml(self, name: str, *, keep: bool) -> None:
        file = str(self.images / self.by_stem[name][0])
        self.unlabelled.append(file)
        if keep:
            self.table.add_image(name, file, 0, 0)

    def report(self, unlabelled: str) -> None:
        """Tell what was left out, or taken for empty."""
        if self.unlabelled:
            kept = unlabelled == "keep"
            done = "taken as images without objects" if kept else "left out"
            other = "`unlabelled: drop` leaves them out" if kept else "`unlabelled: keep` takes them as without objects"
            shown = [relative(file) for file in self.unlabelled[:EXAMPLES]]
            what = f"{counted(len(self.unlabelled), 'image')} without an annotation file {done}"
            self.table.notes.append(note(what, self.unlabelled, other, shown))
        if self.orphans:
            files = [str(self.annotations / f"{name}.xml") for name in self.orphans]
            shown = [relative(file) for file in files[:EXAMPLES]]
            what = f"{counted(len(files), 'annotation file')} without an image left out"
            self.table.notes.append(note(what, files, "`orphan_labels: error` refuses them", shown))
        if self.deleted:
            what = f"{counted(len(self.deleted), 'object')} marked as <deleted> left out"
            self.table.notes.append(note(what, self.deleted))

    def several(self, name: str) -> str:
        return (
            f"{relative(self.images)}: several images are called '{name}': {', '.join(self.by_stem[name])}; "
            "keep one of them"
        )

    def xml_hint(self, name: str) -> str:
        if _FLAGGED.match(name):
            return "; lists of one class have a flag behind each name: take the list of the whole split"
        near = self._near_stem(name, self._known)
        if near or name not in self.by_stem:
            return near
        return "; `unlabelled: keep` takes it as an image without objects, `unlabelled: drop` leaves it out"

    def image_hint(self, name: str) -> str:
        return self._near.hint(f"{name}.jpg") or f"{self._near_stem(name, self.by_stem)}; {_ORPHANS}"

    def _near_stem(self, name: str, stems: set[str] | Mapping[str, object]) -> str:
        near = {fold(stem): stem for stem in stems}.get(fold(name)) or slip(name, list(stems))
        return f", did you mean '{near}'?" if near else ""


_ORPHANS = "`orphan_labels: drop` leaves such annotation files out"


def _from_origin(seen: VocObject, origin: int) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = seen.box
    return x1 - origin, y1 - origin, x2 - origin, y2 - origin


def _empty_table(source: str, annotations: Path, known: set[str], lines: list[int]) -> Table:
    table: Table

    def file_of(image: int) -> str:
        return relative(annotations / f"{table.image_ids[image]}.xml")

    def where(index: int) -> str:
        image = table.image[index]
        number = index - bisect_left(table.image, image) + 1
        return f"{file_of(image)}:{lines[index]}: object {number} '{table.names[index]}'"

    @cache
    def declared() -> list[str]:
        """Classes of the whole folder, so that the parts of one data set agree on them."""
        names = set(table.names)
        for name in known.difference(map(str, table.image_ids)):
            try:
                names.update(found.name for found in read_xml(annotations / f"{name}.xml").objects)
            except DataError:  # reported when its own split is loaded
                continue
        return sorted(names)

    table = Table(source=source, declared=declared, where=where, where_image=file_of, difficult=[])
    return table


def _listed(folder: Path, split: Sequence[str]) -> dict[str, str]:
    """Name -> the place that lists it, over all lists of the split."""
    places: dict[str, str] = {}
    for part in split:
        path = folder / f"{part}.txt"
        shown = relative(path)
        for number, line in enumerate(_read_list(path), start=1):
            name, place = line.strip(), f"{shown}:{number}"
            if name and name in places:
                raise DataError(f"{place}: '{name}' is listed already, in {places[name]}; each image counts once")
            if name:
                places[name] = place
    return places


def _read_list(path: Path) -> list[str]:
    try:
        return read_regular(path, _LONGEST_LIST).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{relative(path)}: expected a list of names in UTF-8, got {error.reason}") from None
    except FileNotFoundError:
        if not path.parent.is_dir():
            where = missing_folder(path.parent, "split lists")
            raise DataError(f"{where}; `split: null` takes every annotation file") from None
        there = sorted(entry.stem for entry in path.parent.glob("*.txt"))
        near = did_you_mean(path.stem, there)
        raise DataError(
            f"{relative(path)}: there is no such list{near if '?' in near else ''}; {relative(path.parent)} has "
            f"{', '.join(there[:12]) or 'none'}; `split: null` takes every annotation file"
        ) from None
    except OSError as error:
        raise DataError(f"{relative(path)}: the list of names cannot be read ({error.strerror})") from None


def _images_by_stem(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(image_files(folder)):
        found.setdefault(Path(name).stem, []).append(name)
    return found


def _missing(name: str, place: str | Path, path: Path, what: str) -> str:
    where = place if isinstance(place, str) else relative(place)
    return f"{where}: the {what} of '{name}', {relative(path)}, is missing"


VOC_CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
"""The 20 classes, in the order of the challenge and of MMDetection."""


@plugin
class Voc(FileDataset):
    """Images and annotations in Pascal VOC form.

    Boxes are the file's coordinates less `origin`, fractions kept; width is `xmax - xmin`, as in MMDetection 2.x.
    Objects that are `difficult` are kept and flagged. An image belongs to the XML file of the same stem.
    """

    root: Path = option(help="the folder with the three below, such as VOCdevkit/VOC2007")
    split: str | list[str] | None = option(
        help="name or names of lists in `split_folder`, such as trainval; null: every annotation file"
    )
    class_names: list[str] | Literal["voc"] | None = option(
        default=None, help="classes in label order; 'voc': the 20 of the challenge; null: all in the folder, sorted"
    )
    origin: Literal[0, 1] = option(default=1, help="the coordinate of the first pixel: 1 as VOC writes, or 0")
    image_folder: str = option(default="JPEGImages", help="the images' folder in `root`")
    annotation_folder: str = option(default="Annotations", help="the XML files' folder in `root`")
    split_folder: str = option(default="ImageSets/Main", help="the lists' folder in `root`")
    unlabelled: Literal["keep", "drop", "error"] | None = option(
        default=None,
        help="images without an XML file: taken as images without objects, left out, or an error; null: an error where "
        "a list names them, else left out, and counted",
    )
    orphan_labels: Literal["drop", "error"] = option(
        default="error", help="XML files without an image: left out and counted, or an error"
    )

    def __attrs_post_init__(self) -> None:
        check_names(self.class_names, self.ignore_classes)

    def load(self) -> None:
        if not self.root.exists():
            raise DataError(f"{missing_folder(self.root, 'VOC form')}{download_hint(self.root)}")
        table = read(
            images=self.root / self.image_folder,
            annotations=self.root / self.annotation_folder,
            splits=self.root / self.split_folder,
            split=[self.split] if isinstance(self.split, str) else self.split,
            origin=self.origin,
            unlabelled=self.unlabelled,
            orphans=self.orphan_labels,
            fields=tuple(self.fields),
        )
        standard = self.class_names == "voc"
        wanted = VOC_CLASSES if standard or isinstance(self.class_names, str) else self.class_names
        self._clean(table, wanted, may_lack=standard)
