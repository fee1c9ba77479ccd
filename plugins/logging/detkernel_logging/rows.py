"""Lines for a person at a terminal: a training line in one row, a validation in two, a message wrapped at words."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterable, Mapping

from detkernel import Run
from detkernel.errors import printable
from detkernel.terminal import columns, wrapped

from detkernel_logging.log_lines import duration, is_rate
from detkernel_logging.progress import Progress
from detkernel_logging.sink import Entry, Metrics

BEST = "best so far"
_TASKS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
_LABELS = {logging.WARNING: "warning: ", logging.ERROR: "error: ", logging.CRITICAL: "error: "}


def shown(run: Run, progress: Progress, entry: Entry) -> str:
    """An entry of the log as a terminal shows it."""
    clock = time.strftime("%H:%M:%S  ", time.localtime(entry.time))
    if entry.metrics is None:
        return wrapped(entry.message, " " * len(clock), f"{clock}{_LABELS.get(entry.level, '')}")
    if entry.metrics.mode == "train":
        return _joined(clock, [_position(run, entry.metrics), *facts(entry.metrics.values, progress.left(run))])
    return _validation(run, clock, entry.metrics)


def facts(values: Mapping[str, float], left: float | None) -> list[str]:
    """What a person looks for in the values of a training line: loss, learning rate, speed, the time that remains."""
    found = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    found += [f"{name} {value:.2e}" for name, value in values.items() if is_rate(name)][:1]
    found += [speed(1 / values["time"])] if values.get("time") else []
    return found + ([f"eta {duration(left)}"] if left is not None else [])


def speed(rate: float) -> str:
    """`12.3 it/s`, or `4.0 s/it`: by what is more than one."""
    return f"{rate:.1f} it/s" if rate >= 1 else f"{1 / rate:.1f} s/it"


def _position(run: Run, metrics: Metrics) -> str:
    if run.options.until.unit == "iters":
        return f"train {metrics.iter}/{run.max_iters}"
    return f"epoch {metrics.epoch}/{run.max_epochs} {metrics.iter}/{run.epoch_length}"


def _validation(run: Run, clock: str, metrics: Metrics) -> str:
    """The first metrics and whether they are the best so far; in the second row what fits of the others."""
    head = "test" if metrics.mode == "test" else f"val @{metrics.step}"
    names = short_names(metrics.values)
    said = [f"{names[name]} {value:.3f}" for name, value in metrics.values.items()]
    best = [_standing(run)] if metrics.mode == "val" else []
    first = [head, *said[:2], *filter(None, best)]
    if len(said) <= 2:
        return _joined(clock, first)
    return f"{_joined(clock, first)}\n{_joined(' ' * len(clock), said[2:], more=True)}"


def _standing(run: Run) -> str:
    """Whether the first metric that has a direction is the best so far, and else the best one."""
    for name in run.metrics:
        better, known = (
            run.metrics.better(name),
            [pair for pair in run.metrics.history(name) if not math.isnan(pair[1])],
        )
        if better is None or not known:
            continue
        best = (max if better == "higher" else min)(value for _, value in known)
        step = next(iteration for iteration, value in known if value == best)
        return BEST if run.metrics[name] == best else f"best {best:.3f} @{step}"
    return ""


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Metrics as people call them: `AP50` for `coco/bbox_mAP_50`, where only boxes are measured, and by one evaluator.

    What is needed to tell them apart stays: `mask mAP`, `night mAP`.
    """
    names = list(names)
    parts = {name: _parts(name) for name in names}
    bare = {found[-1] for found in parts.values() if len(found) == 1}  # of no evaluator, such as `score_threshold`
    evaluators = {found[-2] for found in parts.values() if found[-1] not in bare}
    tasks = {task for name in names if (task := parts[name][-1].partition("_")[0]) in _TASKS}
    short = {}
    for name, found in parts.items():
        task, _, rest = found[-1].partition("_")
        last = rest if task in _TASKS and rest else found[-1]
        last = re.sub(r"^mAP_(\w+)$", r"AP\1", last)
        words = found[:-2] if len(evaluators) == 1 and found[-1] not in bare else found[:-1]
        words += [_TASKS[task]] if task in _TASKS and rest and len(tasks) > 1 else []
        short[name] = printable(" ".join([*words, last]))
    return short if len(set(short.values())) == len(names) else {name: printable(name) for name in names}


def _parts(name: str) -> list[str]:
    """Validation set, evaluator and metric; a class's, `bbox_AP/red cell`, is one part: `bbox_AP red cell`."""
    parts = name.split("/")
    place = next((at for at, part in enumerate(parts[:-1]) if re.fullmatch(r"([a-z]+_)?AP\d*", part)), None)
    return parts if place is None else [*parts[:place], f"{parts[place]} {'/'.join(parts[place + 1 :])}"]


def _joined(head: str, said: Iterable[str], more: bool = False) -> str:
    """What fits of it in one row; with `more`, how many are left for the log file."""
    said, room = list(said), columns() - len(head)
    for count in range(len(said), 0, -1):
        left = [f"+{len(said) - count} in log.txt"] if more and count < len(said) else []
        text = "  ".join([*said[:count], *left])
        if len(text) <= room or count == 1:
            return head + text
    return head.rstrip()
