"""Where a missing file probably is: under another separator, suffix, case, Unicode form or folder."""

from __future__ import annotations

import difflib
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from unicodedata import normalize
from urllib.parse import unquote

from detkernel.errors import relative

MOST = 200_000
"""Files that are looked at: on a network disk listing them takes long enough."""
_DEEPEST = 4
_FOLDERS = 2_000
_FEW = 2_000
"""Names that are compared letter by letter: that takes a second for some thousands."""


def walk(top: str | Path, skipped: list[str] | None = None) -> Iterator[tuple[str, Sequence[str]]]:
    """Every folder below `top`, itself first, level by level, and the names of its files. Links are followed, and each
    folder is visited once: one that links to a folder above it would never end. `skipped` collects those."""
    seen: set[tuple[int, int]] = set()
    waiting = deque([str(top)])
    while waiting:
        folder = waiting.popleft()
        try:
            status = os.stat(folder)  # noqa: PTH116 - called for many folders
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        if (status.st_dev, status.st_ino) in seen:
            if skipped is not None:
                skipped.append(folder)
            continue
        seen.add((status.st_dev, status.st_ino))
        folders = [entry.path for entry in entries if _is_folder(entry)]
        inside = set(folders)
        yield folder, [entry.name for entry in entries if entry.path not in inside]
        waiting += folders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


class Near:
    """Finds what a missing file is called, or where it lies. Folders are listed once, when the first one is missing."""

    def __init__(self, folder: str | Path, folder_option: str = "", suffixes: frozenset[str] | None = None) -> None:
        self._folder, self._option, self._suffixes = str(folder), folder_option, suffixes

    def hint(self, name: str) -> str:
        """What to say behind `FILE is missing`: `; there is FILE (another case), ...`, or nothing."""
        found = self.find(name)
        if not found:
            there = [os.path.basename(path) for paths in self._below.values() for path in paths[:1]]  # noqa: PTH119
            near = slip(os.path.basename(name), there)  # noqa: PTH119
            return f", did you mean '{near}'?" if near else ""
        ways, remedy = self._difference(name, found)
        return f"; there is {relative(found)}{f' ({ways})' if ways else ''}{remedy}"

    def find(self, name: str) -> str:
        """The file that is probably meant, or nothing."""
        return self._best(name, self._below) or self._best(name, self._beside)

    def _best(self, name: str, index: dict[str, list[str]]) -> str:
        """The file whose path has most in common with the wanted name."""
        candidates = index.get(fold(name), [])
        wanted = _parts(name)

        def likeness(path: str) -> tuple[int, int, bool]:
            parts = _parts(path)
            shared = next((n for n, (a, b) in enumerate(zip(wanted, parts, strict=False)) if a != b), len(wanted))
            exact = os.path.basename(path) == os.path.basename(name.replace("\\", "/"))  # noqa: PTH119
            return shared, exact, os.path.dirname(path) == self._folder  # noqa: PTH120

        return max(candidates, key=likeness, default="")

    def _difference(self, name: str, path: str) -> tuple[str, str]:
        """How the two differ, and the option that would find it, where there is one."""
        slashed = name.replace("\\", "/")
        ways = ["'/' as the separator, not '\\'"] if "\\" in name else []
        plain = unquote(slashed)
        if plain != slashed:
            ways.append("without URL encoding")
        wanted, given = os.path.basename(plain), os.path.basename(path)  # noqa: PTH119
        if unquote(given) != given:
            ways.append("with URL encoding")
            given = unquote(given)
        wanted_stem, wanted_suffix = os.path.splitext(wanted.strip())  # noqa: PTH122
        stem, suffix = os.path.splitext(given.strip())  # noqa: PTH122
        if wanted.strip() != wanted or given.strip() != given:
            ways.append("blanks around the name")
        if normalize("NFC", wanted_stem) == normalize("NFC", stem) and wanted_stem != stem:
            ways.append("another Unicode form of the same name")
        elif wanted_stem != stem or (wanted_suffix != suffix and wanted_suffix.lower() == suffix.lower()):
            ways.append("another case")
        if wanted_suffix.lower() != suffix.lower():
            ways.append("another suffix")
        folder = _folder_for(plain, path)
        there = os.path.normpath(os.path.join(self._folder, os.path.dirname(plain)))  # noqa: PTH118, PTH120
        if os.path.normpath(os.path.dirname(path)) != there:  # noqa: PTH120
            ways.append("another folder")
            if folder and self._option:
                return ", ".join(ways), f": set `{self._option}` to {relative(folder)}"
        return ", ".join(ways), ""

    @cached_property
    def _below(self) -> dict[str, list[str]]:
        return self._index(self._folder)

    @cached_property
    def _beside(self) -> dict[str, list[str]]:
        """Files beside the folder: it may be one too deep, or the wrong one of several."""
        above = Path(os.path.abspath(self._folder)).parent  # noqa: PTH100 - follows no link
        top = os.path.dirname(os.path.normpath(self._folder)) or "."  # noqa: PTH120
        return {} if above in (Path(above.anchor), Path.home()) else self._index(top)

    def _index(self, top: str) -> dict[str, list[str]]:
        index: dict[str, list[str]] = {}
        count, depth = 0, top.count(os.sep)
        for number, (folder, names) in enumerate(walk(top)):
            if folder.count(os.sep) - depth > _DEEPEST or number > _FOLDERS or count > MOST:
                break
            for name in names:
                if self._suffixes is None or os.path.splitext(name)[1].lower() in self._suffixes:  # noqa: PTH122
                    index.setdefault(fold(name), []).append(os.path.join(folder, name))  # noqa: PTH118
                    count += 1
        return index


def slip(name: str, there: Sequence[str]) -> str:
    """The one that is probably meant. Digits are the same then: frame 12 is not a slip for frame 13."""
    digits = re.sub(r"\D", "", name)
    near = difflib.get_close_matches(name, there[:_FEW], n=3, cutoff=0.8) if len(name) > 5 else []
    return next((other for other in near if re.sub(r"\D", "", other) == digits), "")


def fold(name: str) -> str:
    """What is equal for two names of one file: the name without folders, suffix, case and encoding."""
    base = os.path.basename(unquote(name.replace("\\", "/")).strip())  # noqa: PTH119
    return normalize("NFC", os.path.splitext(base)[0]).casefold()  # noqa: PTH122


def _parts(path: str) -> list[str]:
    """The folders of a path, from the last one up, as they are compared."""
    return [normalize("NFC", part).casefold() for part in reversed(unquote(path.replace("\\", "/")).split("/")[:-1])]


def _folder_for(name: str, path: str) -> str:
    """The folder below which `path` is `name`, or nothing."""
    tail = f"/{name.lstrip('/')}"
    whole = os.path.abspath(path)  # noqa: PTH100 - follows no link
    return whole[: -len(tail)] if whole.endswith(tail) else ""
