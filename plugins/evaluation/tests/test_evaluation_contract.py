"""The evaluators keep what every evaluator promises, on one process and on two."""

from __future__ import annotations

from typing import Any

from detkernel_detection.testing import EvaluatorContract
from detkernel_evaluation.coco import CocoMap
from detkernel_evaluation.voc import VocMap


class TestCocoMap(EvaluatorContract):
    metric = "coco/bbox_mAP"

    def plugin(self) -> Any:
        return CocoMap()


class TestVocMap(EvaluatorContract):
    metric = "pascal_voc/mAP"

    def plugin(self) -> Any:
        return VocMap()
