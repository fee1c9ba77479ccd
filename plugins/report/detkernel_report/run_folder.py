"""What a run's folder has. The run may be over, killed or still going on, and from any machine.

Every file may be missing, torn or made up by somebody: what cannot be used is one line in `problems`, and everything
else is read all the same. Nothing is read through a link inside of the folder.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import attrs
from detkernel import UserError
from detkernel.config.read import read_text
from detkernel.errors import printable, relative
from detkernel.files import read_regular

from detkernel_report.record import FOLDER
from detkernel_report.results import Results, results_of

LARGEST = 2**28
"""Bytes of a file of lines that are read."""
LARGEST_IMAGE = 2**23
MOST_IMAGES = 200
CONTENT = ("config.yaml", "log.jsonl", "log.txt", FOLDER, "checkpoints")
"""By what a folder is known as a run's."""

MOST_READ = 4
_READ: dict[tuple[str, int, int], Results] = {}
"""Validations that were read, by path, size and time of change: a live page asks again and again."""

T = TypeVar("T")
Line = dict[str, Any]


@attrs.frozen
class Metric:
    """What was measured, in every validation."""

    name: str
    better: str | None
    """"higher", "lower", or None where neither is known to be better."""
    history: list[tuple[int, float]]
    """(iteration, value); a value may be nan."""

    @property
    def last(self) -> float:
        return self.history[-1][1]

    @property
    def best(self) -> tuple[int, float] | None:
        """The best validation, the first of equals; None where no value or no direction is known."""
        known = [pair for pair in self.history if not math.isnan(pair[1])]
        if not known or self.better is None:
            return None
        sign = 1 if self.better == "higher" else -1
        return max(known, key=lambda pair: sign * pair[1])


@attrs.frozen
class Checkpoint:
    name: str
    bytes: int
    saved: float
    """Seconds since 1970."""


@attrs.define(eq=False)
class RunFolder:
    """All that a page shows."""

    path: Path
    problems: list[str] = attrs.field(factory=list)
    """One line each."""
    run: Line = attrs.field(factory=dict)
    """How the run stands, as the report plugin said last; empty where it was not there."""
    config_text: str = ""
    config: Mapping[str, Any] = attrs.field(factory=dict)
    """Plain values."""
    train: list[Line] = attrs.field(factory=list)
    """The training lines of `log.jsonl`."""
    metrics: list[Metric] = attrs.field(factory=list)
    test_metrics: list[Metric] = attrs.field(factory=list)
    data: list[Line] = attrs.field(factory=list)
    times: list[Line] = attrs.field(factory=list)
    """A head, and a line for each plugin and event."""
    results: list[Results] = attrs.field(factory=list)
    images: dict[tuple[str, int], bytes] = attrs.field(factory=dict)
    """JPEGs by set and position."""
    checkpoints: list[Checkpoint] = attrs.field(factory=list)
    updated: float = 0.0
    """When a file of it was last written."""

    @property
    def name(self) -> str:
        return printable(self.path.resolve().name)

    def scalars(self) -> list[str]:
        """Names of what the training lines have."""
        return [
            name
            for name in dict.fromkeys(name for line in self.train for name in line)
            if name not in ("mode", "epoch", "iter", "step")
        ]

    def when(self) -> str:
        return f"{datetime.fromtimestamp(self.updated, UTC):%Y-%m-%d %H:%M} UTC" if self.updated else ""


def read_run(path: Path) -> RunFolder:
    """Raises UserError for what is not a run's folder."""
    if not path.is_dir():
        found = "it is a file" if path.exists() else "there is no such folder"
        raise UserError(f"{relative(path)}: {found}; expected the work dir of a run, such as runs/shapes")
    if not any((path / name).exists() for name in CONTENT):
        inside = sorted(one.parent.name for one in path.glob("*/config.yaml"))[:8]
        hint = f"; these in it are: {', '.join(map(printable, inside))}" if inside else ""
        raise UserError(
            f"{relative(path)}: it is not a run's folder: it has none of {', '.join(CONTENT)}{hint}; expected the work "
            "dir of a run, such as runs/shapes"
        )
    reader = _Reader(path)
    run = RunFolder(path, reader.problems)
    run.run = next(iter(reader.lines(f"{FOLDER}/run.json", needed=False)), {})
    run.config_text = reader.text("config.yaml")
    run.config = reader.config(run.config_text)
    log = reader.lines("log.jsonl")
    run.train = [line for line in log if line.get("mode") == "train" and type(line.get("step")) is int]
    run.metrics = reader.metrics(f"{FOLDER}/metrics.jsonl") or _from_log(log, "val")
    run.test_metrics = reader.metrics(f"{FOLDER}/metrics_test.jsonl") or _from_log(log, "test")
    run.data = reader.lines(f"{FOLDER}/data.jsonl", needed=False)
    run.times = reader.lines(f"{FOLDER}/times.jsonl", needed=False)
    run.results = list(reader.results())
    run.images = dict(reader.images())
    run.checkpoints = reader.checkpoints()
    run.updated = reader.updated
    if not run.run and not (path / FOLDER / "run.json").exists():
        reader.problems.append(
            f"{FOLDER}/run.json: missing; the run was made without the `report` plugin, so its data, mistakes, images "
            "and times are not known (`report: {}` in the config keeps them)"
        )
    return run


@attrs.define(eq=False)
class _Reader:
    folder: Path
    problems: list[str] = attrs.field(factory=list)
    updated: float = 0.0

    def content(self, name: str, needed: bool, limit: int = LARGEST) -> bytes:
        """The content; none where there is none, or where it cannot be had."""
        path = self.folder / name
        try:
            if any((self.folder / part).is_symlink() for part in (name, *map(str, Path(name).parents[:-1]))):
                raise OSError(0, "it is a link, and what it leads to is not shown")
            if not needed and not path.exists():
                return b""
            content = read_regular(path, limit)
            self.updated = max(self.updated, path.stat().st_mtime)
            return content
        except (OSError, ValueError) as error:
            self.problems.append(f"{printable(name)}: {printable(str(getattr(error, 'strerror', None) or error))}")
            return b""

    def text(self, name: str, needed: bool = True) -> str:
        return self.content(name, needed).decode("utf-8", "replace")

    def config(self, text: str) -> Mapping[str, Any]:
        try:
            value = read_text(text, "config.yaml").plain() if text else {}
        except UserError as error:
            self.problems.append(f"config.yaml: it is not a valid config ({printable(str(error).splitlines()[0])})")
            return {}
        return value if isinstance(value, dict) else {}

    def lines(self, name: str, needed: bool = True) -> list[Line]:
        """The JSON objects of a file. A last line that is not whole is one that is being written."""
        content = self.content(name, needed).splitlines()
        found, wrong = [], []
        for number, line in enumerate(content, start=1):
            try:
                value = json.loads(line, parse_constant=lambda _: None)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                found.append(value)
            elif line.strip() and number < len(content):
                wrong.append(number)
        if wrong:
            more = f" and {len(wrong) - 1} more" * (len(wrong) > 1)
            self.problems.append(f"{name}: line {wrong[0]}{more}: expected a JSON object; left out")
        return found

    def metrics(self, name: str) -> list[Metric]:
        def metric(line: Line) -> Metric:
            better = line["better"] if line["better"] in ("higher", "lower") else None
            history = [(int(step), _number(value)) for step, value in line["history"]]
            return Metric(str(line["name"]), better, history)

        found = self._each(name, self.lines(name, needed=False), metric)
        return [one for one in found if one.history]

    def results(self) -> Iterator[Results]:
        for path in sorted((self.folder / FOLDER).glob("images_*.jsonl"), key=_val_first):
            name = f"{FOLDER}/{path.name}"
            before = len(self.problems)
            mark = _mark(path)
            if mark in _READ:
                self.updated = max(self.updated, path.stat().st_mtime)
                yield _READ[mark]
                continue
            lines = self.lines(name)
            if not lines and len(self.problems) > before:
                continue
            try:
                made = results_of(lines)
                if mark is not None and len(self.problems) == before:
                    _READ[mark] = made
                    while len(_READ) > MOST_READ:
                        del _READ[next(iter(_READ))]
                yield made
            except (ValueError, TypeError, IndexError, OverflowError) as error:
                self.problems.append(f"{printable(name)}: {printable(str(error))}; left out")

    def images(self) -> Iterator[tuple[tuple[str, int], bytes]]:
        for path in sorted((self.folder / FOLDER / "images").glob("*_*.jpg"))[:MOST_IMAGES]:
            name, _, index = path.stem.rpartition("_")
            content = self.content(f"{FOLDER}/images/{path.name}", needed=True, limit=LARGEST_IMAGE)
            if content and index.isdecimal():
                if content.startswith(b"\xff\xd8\xff"):
                    yield (name, int(index)), content
                else:
                    self.problems.append(f"{FOLDER}/images/{printable(path.name)}: it is not a JPEG; left out")

    def checkpoints(self) -> list[Checkpoint]:
        """By the time they were saved; nothing of them is read."""
        found = []
        try:
            with os.scandir(self.folder / "checkpoints") as entries:
                for entry in entries:
                    if entry.name.endswith(".pt") and entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        found.append(Checkpoint(printable(entry.name), status.st_size, status.st_mtime))
        except OSError:
            return []
        return sorted(found, key=lambda one: one.saved)

    def _each(self, name: str, lines: list[Line], make: Callable[[Line], T]) -> list[T]:
        found, wrong = [], 0
        for line in lines:
            try:
                found.append(make(line))
            except (KeyError, TypeError, ValueError, OverflowError):
                wrong += 1
        if wrong:
            self.problems.append(f"{name}: {wrong} of {len(lines)} lines are not as expected; left out")
        return found


def _mark(path: Path) -> tuple[str, int, int] | None:
    """What tells a regular file's content apart; None for anything else."""
    try:
        status = path.lstat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return os.path.abspath(path), status.st_size, status.st_mtime_ns  # noqa: PTH100 - follows no link


def _val_first(path: Path) -> tuple[bool, bool, str]:
    return path.name != "images_val.jsonl", path.name != "images_test.jsonl", path.name


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _from_log(log: list[Line], mode: str) -> list[Metric]:
    """The metrics of an earlier detkernel's run, or of one without the report plugin: those of the log, which has no
    direction. What is called AP or AR is better when it is higher."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in log:
        if line.get("mode") == mode and type(line.get("step")) is int:
            for name, value in line.items():
                if name not in ("mode", "epoch", "iter", "step") and (value is None or type(value) in (int, float)):
                    found.setdefault(name, []).append((line["step"], _number(value)))
    return [
        Metric(name, "higher" if "AP" in name or "AR" in name else None, history) for name, history in found.items()
    ]
