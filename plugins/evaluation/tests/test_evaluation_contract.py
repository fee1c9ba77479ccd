"""The evaluators keep what every evaluator promises; on two processes, test_evaluation_ranks.py has it quicker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from detkernel_detection.testing import EvaluatorContract
from detkernel_evaluation.coco import CocoMap
from detkernel_evaluation.voc import VocMap


class Contract(EvaluatorContract):
    @pytest.mark.skipif("DETKERNEL_LONG" not in os.environ, reason="takes long: in `tox -e torture`")
    def test_merges_over_processes(self, tmp_path: Path) -> None:
        super().test_merges_over_processes(tmp_path)


class TestCocoMap(Contract):
    metric = "coco/bbox_mAP"

    def plugin(self) -> Any:
        return CocoMap()


class TestVocMap(Contract):
    metric = "pascal_voc/mAP"

    def plugin(self) -> Any:
        return VocMap()
