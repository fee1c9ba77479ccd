"""COCO's metrics, from the precision and recall that pycocotools accumulates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detkernel_evaluation.coco_evaluation import Evaluation


def summary(evaluation: Evaluation) -> dict[str, float]:
    """`bbox_mAP`, `bbox_mAP_50` and so on, in COCO's order; nan where there is nothing to find."""
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    areas = list(enumerate(evaluation.params.areaRngLbl))[1:]
    thresholds = evaluation.named_thresholds
    ap = {"": _mean(precision[..., 0, -1])}
    ap |= {f"_{name}": _mean(precision[at, ..., 0, -1]) for name, at in thresholds.items()}
    ap |= {f"_{name}": _mean(precision[..., area, -1]) for area, name in areas}
    ar = {f"@{limit}": _mean(recall[..., 0, at]) for at, limit in enumerate(evaluation.params.maxDets)}
    if evaluation.kind == "keypoints":
        ar |= {f"_{name}": _mean(recall[at, ..., 0, -1]) for name, at in thresholds.items()}
    ar |= {f"_{name}": _mean(recall[..., area, -1]) for area, name in areas}
    named = {f"mAP{key}": value for key, value in ap.items()} | {f"AR{key}": value for key, value in ar.items()}
    return {f"{evaluation.kind}_{key}": value for key, value in named.items()}


def ap_of(evaluation: Evaluation, places: Sequence[int]) -> float:
    """The mean AP of some of the K classes."""
    return _mean(evaluation.eval["precision"][:, :, list(places), 0, -1])


def by_class(evaluation: Evaluation) -> list[tuple[float, float]]:
    """AP of every class, by label, and its AP at the first of the named thresholds."""
    precision, at = evaluation.eval["precision"][..., 0, -1], next(iter(evaluation.named_thresholds.values()))
    rows = {label: (_mean(precision[:, :, k]), _mean(precision[at, :, k])) for k, label in enumerate(evaluation.labels)}
    return [rows[label] for label in sorted(rows)]


def _mean(values: NDArray[Any]) -> float:
    """The mean of what was measured; -1 marks what was not."""
    measured = values[values > -1]
    return float(np.mean(measured)) if measured.size else math.nan
