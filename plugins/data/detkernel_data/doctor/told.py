"""What was said of a data set before, so that a run says what is new alone: a small file in the user's cache folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import attrs
from detkernel.config.dump import plain
from detkernel.files import read_regular, write_atomic
from detkernel_detection import Dataset
from detkernel_detection.findings import Finding

from detkernel_data.loading.check_images import cache_folder

READERS = "data_warnings"
"""The part of what the readers of the files say."""
VERSION = 1
_MOST_PLACES = 2_000
"""Of a finding, that are remembered; of more of them, only the count tells whether some are new."""
_LARGEST, _MOST_FILES = 2**24, 256


class Told:
    """The findings of a data set that somebody has seen, by the options that it was read with."""

    def __init__(self, dataset: Dataset) -> None:
        self._path: Path | None = None
        self._seen: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # where it fails, more is said
            options = _without_names(plain(dataset, lambda cls: cls.__qualname__))
            name = type(dataset).__qualname__, options, str(Path.cwd())
            digest = blake2b(json.dumps(name, sort_keys=True).encode(errors="replace"), digest_size=12)
            self._path = cache_folder().parent / "findings" / f"{digest.hexdigest()}.json"
            content = json.loads(read_regular(self._path, _LARGEST))
            if content["version"] == VERSION:
                self._seen = {str(part): dict(seen) for part, seen in content["seen"].items()}

    def new(self, part: str, findings: Iterable[Finding]) -> list[tuple[Finding, int]]:
        """Those that were not there before, or not as often, each with how many of its places are new. `part`: what
        looks for them."""
        before, found = self._seen.get(part, {}), []
        for one in findings:
            count, places = before.get(_kind(one), (-1, ()))
            many = one.count or len(one.places)
            fresh = many - count if many > count else 0
            if count >= 0 and len(one.places) <= _MOST_PLACES:
                fresh = max(fresh, len(set(_hashes(one.places)).difference(places)))
            if count < 0 or fresh:
                found.append((one, many if count < 0 else fresh))
        return found

    def remember(self, part: str, findings: Sequence[Finding]) -> None:
        """They have been said. What could not be kept is said again another time."""
        rows = {_kind(one): [one.count or len(one.places), _hashes(one.places)] for one in findings}
        if self._path is None or self._seen.get(part, {}) == rows:
            return
        self._seen[part] = rows
        with suppress(OSError):
            write_atomic(self._path, json.dumps({"version": VERSION, "seen": self._seen}))
            files = sorted(self._path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for path in files[: max(0, len(files) - _MOST_FILES)]:
                path.unlink(missing_ok=True)


def _kind(finding: Finding) -> str:
    """What it is, whether there is one or several: `box without area`, `boxes without area`."""
    thing, space, rest = finding.what.partition(" ")
    end = "es" if thing.endswith(("xes", "sses")) else "s" if thing.endswith("s") and not thing.endswith("ss") else ""
    return f"{thing.removesuffix(end)}{space}{rest}"


def _without_names(value: Any) -> Any:
    """Options, whether a config or a program gave them: only a config's say the names that plugins are installed as."""
    if isinstance(value, dict):
        return {name: _without_names(each) for name, each in value.items() if name != "use"}
    return [_without_names(each) for each in value] if isinstance(value, list) else value


def _hashes(places: Sequence[str]) -> list[str]:
    """Short ones, of the first places."""
    first = [str(place) for place in places[:_MOST_PLACES]]
    return [blake2b(place.encode(errors="replace"), digest_size=6).hexdigest() for place in first]


def lines(split: str, found: Sequence[tuple[Finding, int]]) -> list[str]:
    """A line for each new finding, without places: `train data: boxes without area dropped (7, 2 of them new)`."""
    told = []
    for one, fresh in found:
        many = one.count or len(one.places)
        said = attrs.evolve(one, count=0) if fresh < many else one
        told.append(f"{split} data: {said}" + (f" ({many:,}, {fresh:,} of them new)" if fresh < many else ""))
    return told
