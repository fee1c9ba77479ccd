"""Reads a `data.yaml` of YOLO form: class names and where the pictures of a split are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from detkernel import DataError
from detkernel.errors import did_you_mean, relative

from detkernel_data._json import Entry
from detkernel_data._pictures import SUFFIXES, missing_folder

SPLITS = ("train", "val", "test")


def read_yaml(path: Path) -> tuple[Path, Entry]:
    """The file itself and its content. Raises `DataError`."""
    path = path / "data.yaml" if path.is_dir() else path
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{relative(path)}: the file of names and splits cannot be read ({error.strerror})") from None
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
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise content.wrong(f"names.{number}", "text (in quotes where YAML reads something else)", name)
        if name in names[:number]:
            raise DataError(f"{content.place}: `names`: '{name}' is listed twice; classes are matched by name")
    if content.fields.get("nc", len(names)) != len(names):
        raise content.wrong("nc", f"{len(names)}, as `names` lists", content.fields["nc"])
    if "kpt_shape" in content.fields:
        raise DataError(f"{content.place}: `kpt_shape`: labels with keypoints are not read; convert them to COCO form")
    return names


def pictures_of(path: Path, content: Entry, split: str) -> list[str]:
    """The picture files of a split, sorted within each folder."""
    there = [name for name in content.fields if name in SPLITS]
    value = content.fields.get(split)
    if value is None:
        hint = did_you_mean(split, there)
        raise DataError(f"{content.place}: there is no split '{split}'{hint}")
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) for entry in entries):
        raise content.wrong(split, "a folder, a list of folders, or a .txt file of pictures", value)
    root = path.parent / (content.text("path") if content.fields.get("path") else "")
    return [file for entry in entries for file in _files(root, entry)]


def _files(root: Path, entry: str) -> list[str]:
    place = root / entry
    if not place.exists() and entry.startswith("../"):  # Roboflow writes `../train/images` for `train/images`
        place = root / entry.removeprefix("../")
    if place.suffix == ".txt" and place.is_file():
        return _listed(place)
    if not place.is_dir():
        raise DataError(missing_folder(place, "pictures"))
    return sorted(
        os.path.join(folder, name)  # noqa: PTH118 - a path object for each of 100,000 pictures takes seconds
        for folder, _, names in os.walk(place, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122
    )


def _listed(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{relative(path)}: expected a list of pictures in UTF-8 ({error})") from None
    return [str(path.parent / line.strip()) for line in lines if line.strip()]
