from pathlib import Path

import pytest
import torch
from centre_assigner import CentreAssigner
from detkernel.config import load
from detkernel_detection import Target, batching
from detkernel_detection.parts import Priors
from detkernel_detectors.assigners.max_iou import MaxIouAssigner
from detkernel_detectors.models.network import Network

CONFIG = """
run: {until: 2 iters, work_dir: work}
data: {use: loader, train: {use: shapes, size: 2}, batch_size: 2}
model:
  use: retinanet
  backbone: {use: resnet, depth: 18, channels: 8, stages: 2}
  neck: {use: fpn, channels: 8, extra: 0}
  head: {use: towers, convs: 0}
ASSIGNER
optimizer: {use: sgd, lr: 0.001}
"""
BOXES = torch.tensor([[8.0, 8.0, 56.0, 56.0], [10.0, 10.0, 30.0, 30.0]])
"""The second lies within the first."""


def loaded(folder, assigner):
    (folder / "config.yaml").write_text(CONFIG.replace("ASSIGNER", assigner))
    return load(folder / "config.yaml").plugins["model"]


@pytest.fixture
def batch():
    images = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8)
    return batching.make_batch(images, [Target(BOXES, torch.tensor([0, 1]))])


def test_a_config_replaces_the_assigner_of_retinanet_by_the_installed_one(tmp_path, batch):
    """Nine anchors every 8 pixels: 5 x 5 places lie in the large object, and 2 x 2 of these in the small."""
    found = {}
    for name, line in {"before": "", "after": "  assigner: {use: centre_assigner}"}.items():
        family = loaded(tmp_path, line)
        assert isinstance(family.assigner, CentreAssigner if name == "after" else MaxIouAssigner)
        torch.manual_seed(0)
        model = Network(family, ["a", "b", "c"]).train()
        maps = model.forward_outputs(model.normalize(batch.images, None))
        matches = family.assigner.assign(family.priors(maps, None), batch.targets)
        found[name] = matches, model.losses(maps, batch.targets)
    matches, losses = found["after"]
    counts = [int((matches.positive & (matches.matched == number)).sum()) for number in (0, 1)]
    assert counts == [9 * (5 * 5 - 2 * 2), 9 * 2 * 2]
    assert not torch.equal(matches.positive, found["before"][0].positive)
    assert losses["loss_cls"] != found["before"][1]["loss_cls"]


def test_centres_decide_and_the_smallest_object_wins(batch):
    points = torch.tensor([[20.0, 20.0], [40.0, 40.0], [4.0, 4.0], [20.0, 20.0]])
    boxes = torch.cat([points - 30, points + 30], 1)
    valid = torch.tensor([[True, True, True, False]])
    matches = CentreAssigner().assign(Priors(boxes, torch.full((4,), 8.0), valid, (4,)), batch.targets)
    assert matches.matched.tolist() == [[1, 0, 0, 0]]
    assert matches.positive.tolist() == [[True, True, False, False]]
    assert matches.negative.tolist() == [[False, False, True, False]]


def test_the_page_about_parts_shows_this_module():
    here = Path(__file__).parent
    pages = "".join(page.read_text() for page in (here.parents[1]).rglob("*.md"))
    source = (here / "centre_assigner.py").read_text()
    assert source[source.index("@plugin") :].rstrip() in pages
