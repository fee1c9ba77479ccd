"""Reads a `data.yaml` of YOLO form: class names and where the images of a split are."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from detkernel import DataError
from detkernel.errors import did_you_mean, relative
from detkernel.files import read_regular
from detkernel_detection.images import SUFFIXES, Listing, missing_folder

from detkernel_data.formats.entry import Entry
from detkernel_data.formats.missing_files import Near, walk
from detkernel_data.report import EXAMPLES, Problems, counted, note, tally

SPLITS = ("train", "val", "test")
_LARGEST = 2**24
"""Bytes of a data.yaml: ten times the names of the largest data sets."""
_LONGEST_LIST = 2**30


class Images(NamedTuple):
    """The image files of a split."""

    files: list[str]
    folders: list[str]
    """Those that were searched; a list of files searches none."""
    notes: list[str]


def read_yaml(path: Path) -> tuple[Path, Entry]:
    """The file itself and its content. Raises `DataError`."""
    path = path / "data.yaml" if path.is_dir() else path
    try:
        value = yaml.safe_load(read_regular(path, _LARGEST).decode("utf-8-sig"))
    except OSError as error:
        near = Near(path.parent).hint(path.name) if isinstance(error, FileNotFoundError) else ""
        raise DataError(
            f"{relative(path)}: the file of names and splits cannot be read ({error.strerror}){near}"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{relative(path)}:{mark.line + 1}:{mark.column + 1}" if mark else relative(path)
        raise DataError(f"{place}: broken YAML: {error.problem}") from None
    except Exception as error:  # PyYAML raises all sorts of errors for odd values
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{relative(path)}: broken YAML: {reason}") from None
    return path, Entry(relative(path), value)


def names_of(content: Entry) -> list[str]:
    """Class names by number: a list, or a map from 0..C-1."""
    names: Any = content.fields.get("names")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DataError(f"{content.place}: `names`: expected the numbers 0 to {len(names) - 1} as keys")
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise content.wrong("names", "a list of class names, or a map from numbers to names", names)
    seen: set[str] = set()
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise content.wrong(f"names.{number}", "text (in quotes where YAML reads something else)", name)
        if name in seen:
            raise DataError(f"{content.place}: `names`: '{name}' is listed twice; classes are matched by name")
        seen.add(name)
    if content.fields.get("nc", len(names)) != len(names):
        raise content.wrong("nc", f"{len(names)}, as `names` lists", content.fields["nc"])
    if "kpt_shape" in content.fields:
        raise DataError(f"{content.place}: `kpt_shape`: labels with keypoints are not read; convert them to COCO form")
    return names


def images_of(path: Path, content: Entry, split: str, drop_missing: bool) -> Images:
    """The image files of a split, sorted within each folder. Listed ones that are missing are an error, or left to
    `bad_images: drop`."""
    there = [name for name in content.fields if name in SPLITS]
    value = content.fields.get(split)
    if value is None:
        hint = did_you_mean(split, there)
        raise DataError(f"{content.place}: there is no split '{split}'{hint}")
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) for entry in entries):
        raise content.wrong(split, "a folder, a list of folders, or a .txt file of images", value)
    root = path.parent / (content.text("path") if content.fields.get("path") else "")
    found = Images([], [], [])
    for entry in entries:
        _add_files(found, root, entry, drop_missing)
    return found


def _add_files(found: Images, root: Path, entry: str, drop_missing: bool) -> None:
    place = root / entry
    if not place.exists() and entry.startswith("../"):  # Roboflow writes `../train/images` for `train/images`
        place = root / entry.removeprefix("../")
    if place.suffix == ".txt" and place.exists() and not place.is_dir():
        found.files.extend(_listed(place, drop_missing))
        return
    if not place.is_dir():
        raise DataError(missing_folder(place, "images"))
    images: list[str] = []
    others: Counter[str] = Counter()
    again: list[str] = []
    for folder, names in walk(place, again):
        found.folders.append(folder)
        for name in names:
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
            if suffix in SUFFIXES:
                images.append(os.path.join(folder, name))  # noqa: PTH118 - a path object for each takes seconds
            elif suffix not in (".txt", ".cache", ".npy", "") and not name.startswith("."):
                others[suffix] += 1
    found.files.extend(sorted(images))
    if others:
        what = (
            f"{counted(others.total(), 'file')} in {relative(place)} left out, not of a suffix that is read as images"
        )
        found.notes.append(note(f"{what}: {tally(sorted(others.items()))}"))
    if again:
        what = f"{counted(len(again), 'folder')} reached a second time through a link, and read once"
        found.notes.append(note(what, again, shown=[os.path.relpath(folder) for folder in again[:EXAMPLES]]))


def _listed(path: Path, drop_missing: bool) -> list[str]:
    try:
        lines = read_regular(path, _LONGEST_LIST).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{relative(path)}: expected a list of images in UTF-8 ({error})") from None
    problems, is_there, near = Problems(relative(path)), Listing(), Near(path.parent, "", SUFFIXES)
    files = []
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        file = str(path.parent / name)
        if name and not drop_missing and not is_there(file):
            hint = "" if problems.full else near.hint(name) or "; `bad_images: drop` leaves out such images"
            problems.add(f"{relative(path)}:{number}: the image {relative(file)} is missing{hint}")
        elif name:
            files.append(file)
    problems.stop()
    return files
