"""COCO's figures, from the precision and recall that pycocotools accumulates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detkernel_evaluation._coco_eval import Evaluation

AT_50, AT_75 = 0, 5
"""Positions in COCO's thresholds .50:.05:.95."""


def figures(evaluation: Evaluation) -> dict[str, float]:
    """`bbox_mAP`, `bbox_mAP_50` and so on, in COCO's order; nan where there is nothing to find."""
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    limits, areas = evaluation.params.maxDets, evaluation.params.areaRngLbl[1:]
    ap = {"": _mean(precision[..., 0, -1])}
    ap |= {"_50": _mean(precision[AT_50, ..., 0, -1]), "_75": _mean(precision[AT_75, ..., 0, -1])}
    ap |= {f"_{name[0]}": _mean(precision[..., area, -1]) for area, name in enumerate(areas, start=1)}
    ar = {f"@{limit}": _mean(recall[..., 0, at]) for at, limit in enumerate(limits)}
    if evaluation.kind == "keypoints":
        ar |= {"_50": _mean(recall[AT_50, ..., 0, -1]), "_75": _mean(recall[AT_75, ..., 0, -1])}
    ar |= {f"_{name[0]}": _mean(recall[..., area, -1]) for area, name in enumerate(areas, start=1)}
    named = {f"mAP{key}": value for key, value in ap.items()} | {f"AR{key}": value for key, value in ar.items()}
    return {f"{evaluation.kind}_{key}": value for key, value in named.items()}


def by_class(evaluation: Evaluation) -> list[tuple[float, float]]:
    """AP and AP50 of every class."""
    precision = evaluation.eval["precision"][..., 0, -1]
    return [(_mean(precision[:, :, k]), _mean(precision[AT_50, :, k])) for k in range(precision.shape[2])]


def _mean(values: NDArray[Any]) -> float:
    """The mean of what was measured; -1 marks what was not."""
    measured = values[values > -1]
    return float(np.mean(measured)) if measured.size else math.nan
