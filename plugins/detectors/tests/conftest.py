"""What the tests of the detectors share: the reference's numbers, and a small network's options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve()


@pytest.fixture(scope="session")
def oracle() -> Path:
    """The folder of MMDetection's numbers for small models: DETKERNEL_ORACLE, or `shared/oracle` beside the project."""
    beside = next((parent / "shared" / "oracle" for parent in HERE.parents[4:] if (parent / "shared").is_dir()), None)
    given = os.environ.get("DETKERNEL_ORACLE")
    folder = Path(given) if given else beside
    if folder is None or not folder.is_dir():
        pytest.skip("the numbers of the reference are not here; DETKERNEL_ORACLE names their folder")
    return folder


@pytest.fixture(scope="session")
def parts(oracle: Path) -> dict[str, torch.Tensor]:
    """The reference's numbers for functions alone."""
    found: dict[str, Any] = torch.load(oracle / "parts" / "parts.pt", weights_only=True)
    return found
