"""What is predicted on: images, folders, globs, videos, a camera."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from detkernel import UserError
from detkernel.errors import did_you_mean, relative
from detkernel_detection.images import SUFFIXES

VIDEOS = frozenset((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"))
CAMERA = "camera"


class Source(NamedTuple):
    """One thing to predict on."""

    path: str
    """A file, or `camera:NUMBER`."""
    name: str
    """What its results are called: unique, relative, without suffix, and below no folder but the output's."""
    video: bool = False


def sources(given: Sequence[str]) -> list[Source]:
    """All images and videos, in the order given; those of a folder by name, and those below it.

    Raises `UserError` that lists every one that is not there, or is nothing that can be read.
    """
    problems: list[str] = []
    found: list[tuple[str, str]] = []
    for text in given:
        try:
            found += _expanded(text)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    taken: dict[str, int] = {}
    result = []
    for path, name in dict(found).items():
        number = taken[name] = taken.get(name, 0) + 1
        unique = name
        while number > 1 and unique in taken:
            unique, number = f"{name}_{number}", number + 1
        taken.setdefault(unique, 1)
        result.append(Source(path, unique, path.partition(":")[0] == CAMERA or Path(path).suffix.lower() in VIDEOS))
    return result


def _expanded(text: str) -> Iterator[tuple[str, str]]:
    """(path, name without suffix) of what an argument stands for."""
    head, _, number = text.partition(":")
    if head == CAMERA and not Path(text).exists():
        if number and not number.isdecimal():
            raise UserError(f"'{text}': expected a camera's number, such as camera:0")
        yield f"{CAMERA}:{number or 0}", f"camera_{number or 0}"
        return
    path = Path(text)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _known(file))
        if not files:
            raise UserError(f"{relative(path)}: there is no image or video in this folder or below it")
        yield from ((str(file), file.relative_to(path).with_suffix("").as_posix()) for file in files)
        return
    if path.exists():
        if path.is_file() and not _known(path):
            known = ", ".join(sorted(SUFFIXES | VIDEOS))
            raise UserError(f"{relative(path)}: neither an image nor a video by its name; expected one of {known}")
        yield str(path), path.stem
        return
    if glob.has_magic(text):
        matches = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        files = [file for file in map(Path, matches) if file.is_file() and _known(file)]
        if not files:
            raise UserError(f"'{text}': no image or video has a name like this")
        yield from ((str(file), file.stem) for file in files)
        return
    near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, near) if near else ""
    hint = f"; a camera is camera:{text}" if text.isdecimal() else hint if "?" in hint else ""
    raise UserError(f"{relative(path)}: there is no such image, folder or video{hint}")


def _known(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES | VIDEOS
