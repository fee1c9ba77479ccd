"""Class names to labels: matched by name, never by position, and nothing is left out without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from detkernel.errors import did_you_mean
from detkernel_detection.findings import Note

from detkernel_data.report import EXAMPLES, Problems, counted, first, note, tally

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from detkernel_data.formats.table import Table

IGNORED = -1


def rename_classes(table: Table, names: Mapping[str, str]) -> None:
    """Give classes other names; those that get one name are merged. Raises `DataError` for a name that is not there."""
    if not names:
        return
    declared = list(table.declared())
    problems = Problems(table.source)
    for name in names:
        if name not in declared:
            near = did_you_mean(name, declared)
            problems.add(
                f"{table.source}: `rename_classes` names '{name}', which the annotations do not have"
                f"{near if '?' in near else ''}; they have: {', '.join(first(declared)) or 'no class'}"
            )
    problems.stop()
    table.names = [names.get(name, name) for name in table.names]
    renamed = list(dict.fromkeys(names.get(name, name) for name in declared))
    table.declared = lambda: renamed


def match_classes(
    table: Table,
    wanted: Sequence[str] | None,
    ignored: Sequence[str] | Literal["others"],
    notes: list[str],
    *,
    may_lack: bool,
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The classes in label order, and every object's label, `IGNORED` for one to leave out.

    Without `wanted`, the classes are those that the data set declares. Raises `DataError` for an object whose class
    is neither wanted nor ignored, and for a name that the data set does not know (unless it `may_lack` some).
    """
    counts = Counter(table.names)
    named = [] if ignored == "others" else list(ignored)
    if wanted is None:
        classes = tuple(name for name in table.declared() if name not in named)
        _check_known(table, counts, [], named)
    else:
        classes = tuple(wanted)
        _check_known(table, counts, [] if may_lack else classes, named)
    _check_text(table, classes)
    if ignored != "others":
        _check_listed(table, counts, classes, named)
    left_out = sorted((name, count) for name, count in counts.items() if name not in classes)
    if left_out:
        total = counted(sum(count for _, count in left_out), "object")
        notes.append(f"{total} left out by `ignore_classes`: {tally(left_out)}")
    absent = [name for name in classes if name not in counts]
    if absent:
        rest = f" and {len(absent) - EXAMPLES} more" if len(absent) > EXAMPLES else ""
        notes.append(Note(f"no object here of {', '.join(absent[:EXAMPLES])}{rest}", absent))
    notes += _alike(classes)
    label_of = {**dict.fromkeys(counts, IGNORED), **{name: label for label, name in enumerate(classes)}}
    labels = np.fromiter(map(label_of.__getitem__, table.names), np.int64, len(table.names))
    return classes, labels


def _check_text(table: Table, classes: Sequence[str]) -> None:
    """Names that nobody can read, or that no file of UTF-8 can hold, would end a run when they are written."""
    problems = Problems(table.source)
    for name in classes:
        if not name.strip() or any("\ud800" <= char <= "\udfff" for char in name):
            what = "consists of blanks" if not name.strip() else "has half of a surrogate pair, which is not text"
            problems.add(
                f"{table.source}: the class name {name!a} {what}; give it another in the file, or with `rename_classes`"
            )
    problems.stop()


def _alike(classes: Sequence[str]) -> list[str]:
    """Remarks on classes that are probably one."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        groups.setdefault(" ".join(name.casefold().split()), []).append(name)
    alike = [", ".join(f"'{name}'" for name in group) for group in groups.values() if len(group) > 1]
    if not alike:
        return []
    return [note("classes that differ in case or blanks alone are taken for different ones", alike, _MERGE)]


_MERGE = "`rename_classes: {OLD: NEW}` merges them"


def _check_known(table: Table, counts: Counter[str], wanted: Sequence[str], ignored: Sequence[str]) -> None:
    """Names in the options that the data set does not know are slips of the pen."""
    unseen = [(option, name) for option, names in _options(wanted, ignored) for name in names if name not in counts]
    if not unseen:
        return
    declared = table.declared()
    there = tally(sorted(counts.items())) if counts else ", ".join(declared)
    problems = Problems(table.source)
    for option, name in unseen:
        if name not in declared:
            near = did_you_mean(name, declared)
            problems.add(
                f"{table.source}: `{option}` names '{name}', which the annotations do not have"
                f"{near if '?' in near else ''}; they have: {there or 'no object'}"
            )
    problems.stop()


def _check_listed(table: Table, counts: Counter[str], classes: Sequence[str], ignored: Sequence[str]) -> None:
    """Names in the annotations that the options do not know."""
    problems = Problems(table.source)
    for name, count in sorted(counts.items()):
        if name not in classes and name not in ignored:
            problems.add(
                f"{table.where(table.names.index(name))}: {counted(count, 'object')} of class '{name}', which is not "
                f"in `class_names`{did_you_mean(name, classes)}; add it there, or to `ignore_classes` to leave it out"
            )
    problems.stop()


def _options(wanted: Sequence[str], ignored: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    return [("class_names", wanted), ("ignore_classes", ignored)]
