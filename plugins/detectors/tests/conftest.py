"""What the tests of the detectors share: the reference's numbers, and a small network's options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel_detectors.transformers import denoising

HERE = Path(__file__).resolve()
AS_TORCHVISION = ("fcos", "retinanet_v2", "faster_rcnn", "mask_rcnn")
LEARNING = ("test_finds_what_it_learned", "test_overfits_two_images", "test_detects_in_the_coordinates_of_the_file")
TRAINED = ("TestRetinanet", "TestFasterRcnn", "TestDino", "TestRtDetr", "TestResnet")
COMPILED = ("retinanet", "fcos", "cascade_mask_rcnn", "yolox", "rtmdet_ins", "tood", "dino")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Families made of the same parts are compiled, and trained until they find what they learned, by one of them; all
    of them with DETKERNEL_LONG, as in `tox -e torture`. What else is promised is tested of every family.
    """
    if "DETKERNEL_LONG" in os.environ or config.option.keyword:
        return
    long = [item for item in items if _is_long(item)]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


def _is_long(item: pytest.Item) -> bool:
    name, _, family = item.name.rstrip("]").partition("[")
    if name == "test_it_compiles_as_one_graph":
        return family not in COMPILED
    if name == "test_detections_are_torchvisions":
        return family not in AS_TORCHVISION
    return name in LEARNING and item.parent is not None and item.parent.name not in TRAINED


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


@pytest.fixture(scope="session")
def reference_draws() -> Any:
    """The reference's random numbers for denoising, at our places; MMDetection's are of the objects of all images one
    after the other."""
    return _draws


def _draws(expected: dict[str, torch.Tensor], targets: Any, pairs: int) -> denoising.Draws:
    counts, room = targets.valid.sum(1).tolist(), denoising.places(targets, pairs)
    if "dn.num_queries_and_groups" not in expected:  # RT-DETR draws for the padding, too
        names = ("0.rand_like", "1.randint_like", "2.randint_like", "3.rand_like")
        drawn = [expected[f"dn.draw.{name}"] for name in names]
        drawn = [torch.cat([one, one.new_zeros(len(one), room - one.shape[1], *one.shape[2:])], 1) for one in drawn]
        return denoising.Draws(drawn[0], drawn[1].long(), drawn[2] * 2 - 1, drawn[3])
    groups = int(expected["dn.num_queries_and_groups"][1])
    most, total = max(counts), sum(counts)
    change, labels = torch.ones(len(counts), room), torch.zeros(len(counts), room, dtype=torch.int64)
    sign, part = torch.ones(len(counts), room, 4), torch.zeros(len(counts), room, 4)
    chosen = (expected["dn.draw.0.rand_like"] < 0.25).nonzero()[:, 0].tolist()
    for image, count in enumerate(counts):
        for turn, number in ((turn, number) for turn in range(2 * groups) for number in range(count)):
            place, theirs = turn * most + number, turn * total + sum(counts[:image]) + number
            change[image, place] = expected["dn.draw.0.rand_like"][theirs]
            if theirs in chosen:
                labels[image, place] = expected["dn.draw.1.randint_like"][chosen.index(theirs)]
            sign[image, place] = expected["dn.draw.2.randint_like"][theirs] * 2 - 1
            part[image, place] = expected["dn.draw.3.rand_like"][theirs]
    return denoising.Draws(change, labels, sign, part)
