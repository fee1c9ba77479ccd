"""The pages about the families of detectors: what they say is what the code and the recipes say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("families", ROOT / "docs/families.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(made: Any) -> dict[str, str]:
    return {path: "\n".join(lines) for path, lines in made.pages()}


def test_every_family_has_a_page_with_its_recipes_and_their_published_ap(made: Any, pages: dict[str, str]):
    recipes = made.recipes()
    assert {one.family for one in recipes} == set(made.families()), "each has a recipe"
    for recipe in recipes:
        by, boxes, _ = recipe.published
        assert 20 < float(boxes) < 60
        assert by in ("MMDetection", "its authors")
        row = f"| `detkernel run detkernel_configs:{recipe.name}` | {boxes} |"
        assert row in pages[f"families/{recipe.family}.md"]
        [line] = [line for line in pages["families/index.md"].splitlines() if f"({recipe.family}.md)" in line]
        assert boxes in line.split("|")[3]


def test_a_page_tells_paper_parts_options_and_weights(pages: dict[str, str]):
    page = pages["families/retinanet.md"]
    assert "<https://arxiv.org/abs/1708.02002>" in page
    assert "| `detkernel run detkernel_configs:coco_retinanet_r50_1x.yaml` | 36.5 | MMDetection |" in page
    [assigner] = [line for line in page.splitlines() if line.startswith("| `assigner` |")]
    assert "| `max_iou_assigner` |" in assigner
    assert "`atss_assigner`" in assigner.split("|")[-2]
    assert "| `score_thresh` |" in page.split("## Options")[1]
    assert "| `assigner` |" not in page.split("## Options")[1]
    assert "`mmdet:retinanet_r50_fpn_1x_coco`" in page
    assert "base: [base/coco.yaml, base/schedule_1x.yaml]" in page
    masks = pages["families/mask_rcnn.md"]
    assert "| 38.2 | 34.7 | MMDetection |" in masks
    assert "`mmdet:rtmdet-ins_l" in pages["families/rtmdet_ins.md"]
    assert "rtmdet-ins" not in pages["families/rtmdet.md"].split("## Weights")[1].split("## Recipe")[0]
