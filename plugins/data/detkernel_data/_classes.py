"""Class names to labels: matched by name, never by position, and nothing is left out without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from detkernel.errors import did_you_mean

from detkernel_data._report import Problems, counted, tally

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from detkernel_data._table import Table

IGNORED = -1


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
    if ignored != "others":
        _check_listed(table, counts, classes, named)
    left_out = sorted((name, count) for name, count in counts.items() if name not in classes)
    if left_out:
        total = counted(sum(count for _, count in left_out), "object")
        notes.append(f"{total} left out by `ignore_classes`: {tally(left_out)}")
    absent = [name for name in classes if name not in counts]
    if absent:
        notes.append(f"no object here of {', '.join(absent)}")
    position = {name: label for label, name in enumerate(classes)}
    labels = np.fromiter((position.get(name, IGNORED) for name in table.names), np.int64, len(table.names))
    return classes, labels


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
