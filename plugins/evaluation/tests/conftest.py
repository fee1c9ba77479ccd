"""Shared by the tests of the evaluators."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for `evaluation_cases`, which the processes of a test import as well


@pytest.fixture(scope="session")
def evaluator_data() -> Path:
    """COCO's own example for its evaluation; tests that need it skip where it is absent."""
    root = Path(os.environ.get("DETKERNEL_DATA") or HERE.parents[3] / "shared" / "data")
    if not (root / "evaluator").is_dir():
        pytest.skip("no real data here: set DETKERNEL_DATA to the folder that has evaluator/")
    return root / "evaluator"
