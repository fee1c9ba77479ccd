"""A validation, looked at from all sides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import attrs
import numpy as np

from detkernel_report import metrics
from detkernel_report.mistakes import Confusion, ImageScore, Mistakes, confusion, find_mistakes, image_scores
from detkernel_report.results import Results
from detkernel_report.run_folder import Metric, RunFolder

DEFAULT_SCORE = 0.5


@attrs.frozen(eq=False)
class Analysis:
    """What the page says of one set."""

    results: Results
    matches: metrics.Matches
    curves: metrics.Curves
    mistakes: Mistakes
    best: metrics.Operating
    """The score threshold of the greatest F1."""
    best_of_class: Sequence[metrics.Operating]
    confusion: Confusion
    images: Sequence[ImageScore]
    """Worst first."""

    @property
    def score(self) -> float:
        """The threshold that images and counts go by."""
        return DEFAULT_SCORE if math.isnan(self.best.score) else self.best.score

    def ap(self, label: int | None = None, threshold: int | None = None, size: int = 0) -> float:
        """The mean over what is not given: classes, and overlaps from 0.5 (0) to 0.95 (9)."""
        chosen = self.curves.ap[slice(None) if threshold is None else threshold, size]
        return metrics.mean(np.atleast_1d(chosen[..., slice(None) if label is None else label]))


@lru_cache(maxsize=4)
def analyse(results: Results) -> Analysis:
    """Everything is computed of the detections; there is no model and no image. What was analysed last is remembered,
    for a page that is made again (`Results` are told apart by identity)."""
    matches = metrics.matched(results)
    best = metrics.best_threshold(matches)
    score = DEFAULT_SCORE if math.isnan(best.score) else best.score
    return Analysis(
        results,
        matches,
        metrics.curves(matches),
        find_mistakes(results, matches),
        best,
        [metrics.best_threshold(matches, label) for label in range(len(results.classes))],
        confusion(results, score),
        image_scores(results, matches, score),
    )


def primary(run: RunFolder) -> Metric | None:
    """The metric that a run is judged by: the one that the best checkpoint goes by, else the first mAP, else the first
    that has a direction."""
    chosen = at(run.config, "checkpoint", "best")
    ordered = [one for one in run.metrics if one.name == chosen]
    ordered += [one for one in run.metrics if one.name.endswith("mAP")]
    ordered += [one for one in run.metrics if one.better]
    return next(iter(ordered), None)


def at(values: Any, *path: str | int) -> Any:
    """What lies at a path in plain values; None where nothing does."""
    for step in path:
        if isinstance(step, str) and isinstance(values, Mapping):
            values = values.get(step)
        elif isinstance(step, int) and isinstance(values, list) and step < len(values):
            values = values[step]
        else:
            return None
    return values


def numbers(run: RunFolder, name: str) -> list[tuple[int, float]]:
    """(iteration, value) of a scalar of the training log."""
    return [
        (line["step"], math.nan if line[name] is None else float(line[name]))
        for line in run.train
        if name in line and (line[name] is None or type(line[name]) in (int, float))
    ]
