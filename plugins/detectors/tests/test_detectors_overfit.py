"""Families learn eight images by heart on the CPU: they find all of their objects. One by default; under
`tox -e torture` (DETKERNEL_LONG) more, in some minutes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import attrs
import pytest

LONG = "DETKERNEL_LONG" in os.environ
MORE = (
    *("TestRetinanet", "TestFasterRcnn", "TestCascadeRcnn", "TestCascadeMaskRcnn"),
    *("TestConditionalDetr", "TestDabDetr", "TestDeformableDetr"),
)


def contract(name: str) -> Any:
    """The model contract of a family, which trains a small model."""
    path = Path(__file__).parent / "test_detectors_models.py"
    spec = importlib.util.spec_from_file_location("contracts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


@pytest.mark.parametrize("name", ["TestFcos", *(MORE if LONG else ())])
def test_a_family_learns_eight_images_by_heart(name: str, tmp_path: Path):
    family = contract(name)

    class Eight(family):  # type: ignore[misc, valid-type]
        steps = 5 * family.steps

        def dataset(self) -> Any:
            return attrs.evolve(super().dataset(), size=8)

    Eight().test_finds_what_it_learned(tmp_path)
