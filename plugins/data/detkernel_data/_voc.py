"""Reads folders of Pascal VOC form."""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from detkernel import DataError
from detkernel.errors import relative

from detkernel_data._pictures import missing_folder, picture_files, scan
from detkernel_data._report import Problems
from detkernel_data._table import Table
from detkernel_data._voc_xml import VocFile, read_xml


def read(*, images: Path, annotations: Path, splits: Path, split: Sequence[str] | None, origin: int) -> Table:
    """Everything that the annotation files of the split say. Raises `DataError` with all problems found."""
    with scan(annotations, "annotations") as entries:
        known = {entry.name[:-4] for entry in entries if entry.name.endswith(".xml")}
    pictures = _pictures_by_stem(images)
    listed = dict.fromkeys(sorted(known), annotations) if split is None else _listed(splits, split)
    source = relative(annotations if split is None else splits / f"{split[0]}.txt")
    problems = Problems(source)
    lines: list[int] = []
    table = _empty_table(source, annotations, known, lines)
    for name, place in listed.items():
        path = annotations / f"{name}.xml"
        if name not in known:
            problems.add(_missing(name, place, path, "annotation file", known))
        elif len(pictures.get(name, ())) != 1:
            problems.add(_no_picture(name, place, images, pictures))
        else:
            try:
                _append(table, lines, name, images / pictures[name][0], read_xml(path), origin)
            except DataError as error:
                problems.add(str(error))
    problems.stop()
    return table


def _empty_table(source: str, annotations: Path, known: set[str], lines: list[int]) -> Table:
    table: Table

    def file_of(picture: int) -> str:
        return relative(annotations / f"{table.image_ids[picture]}.xml")

    def where(index: int) -> str:
        picture = table.picture[index]
        number = index - bisect_left(table.picture, picture) + 1
        return f"{file_of(picture)}:{lines[index]}: object {number} '{table.names[index]}'"

    @cache
    def declared() -> list[str]:
        """Classes of the whole folder, so that the parts of one data set agree on them."""
        names = set(table.names)
        for name in known.difference(map(str, table.image_ids)):
            try:
                names.update(found.name for found in read_xml(annotations / f"{name}.xml").objects)
            except DataError:  # told when its own split is loaded
                continue
        return sorted(names)

    table = Table(source=source, declared=declared, where=where, where_picture=file_of, difficult=[])
    return table


def _append(table: Table, lines: list[int], name: str, picture: Path, found: VocFile, origin: int) -> None:
    assert table.difficult is not None
    position = table.add_picture(name, str(picture), found.height, found.width)
    for seen in found.objects:
        x1, y1, x2, y2 = seen.box
        table.add_object(position, seen.name, (x1 - origin, y1 - origin, x2 - origin, y2 - origin))
        table.difficult.append(seen.difficult)
        lines.append(seen.line)


def _listed(folder: Path, split: Sequence[str]) -> dict[str, str]:
    """Name -> the place that lists it, over all lists of the split."""
    places: dict[str, str] = {}
    for part in split:
        path = folder / f"{part}.txt"
        for number, line in enumerate(_read_list(path), start=1):
            name, place = line.strip(), f"{relative(path)}:{number}"
            if name and name in places:
                raise DataError(f"{place}: '{name}' is listed already, in {places[name]}; each picture counts once")
            if name:
                places[name] = place
    return places


def _read_list(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{relative(path)}: expected a list of names in UTF-8, got {error.reason}") from None
    except OSError:
        if not path.parent.is_dir():
            raise DataError(missing_folder(path.parent, "split lists")) from None
        there = sorted(entry.stem for entry in path.parent.glob("*.txt"))[:12]
        raise DataError(
            f"{relative(path)}: there is no such list; {relative(path.parent)} has {', '.join(there) or 'none'}"
        ) from None


def _pictures_by_stem(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(picture_files(folder)):
        found.setdefault(Path(name).stem, []).append(name)
    return found


def _no_picture(name: str, place: str | Path, images: Path, pictures: Mapping[str, Sequence[str]]) -> str:
    several = pictures.get(name, ())
    if several:
        return f"{relative(images)}: several pictures are called '{name}': {', '.join(several)}; keep one of them"
    return _missing(name, place, images / name, "picture", pictures)


def _missing(name: str, place: str | Path, path: Path, what: str, known: set[str] | Mapping[str, object]) -> str:
    near = [name.rpartition(".")[0]] if name.rpartition(".")[0] in known else []
    near = near or difflib.get_close_matches(name, list(known)[:20000], n=1, cutoff=0.8)
    hint = f", did you mean '{near[0]}'?" if near else ""
    where = place if isinstance(place, str) else relative(place)
    return f"{where}: the {what} of '{name}', {relative(path)}, is missing{hint}"
