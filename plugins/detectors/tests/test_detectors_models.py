"""What every native detector promises, on generated data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from detkernel import ConfigError
from detkernel_detection import Target, batching
from detkernel_detection.structures import Batch, Targets
from detkernel_detection.testing import ModelContract
from detkernel_detectors.backbones import Resnet
from detkernel_detectors.heads import Towers
from detkernel_detectors.models.dense import DenseDetector
from detkernel_detectors.models.network import DenseNetwork
from detkernel_detectors.models.retinanet import Retinanet
from detkernel_detectors.necks import Fpn
from detkernel_detectors.priors import Anchors

SMALL: Any = {
    "backbone": Resnet(depth=18, channels=8, stages=2, norm="group"),
    "neck": Fpn(channels=16, extra=1),
    "head": Towers(convs=1, channels=16, norm="group", groups=4),
}
FAMILIES = {"retinanet": Retinanet}


class TestRetinanet(ModelContract):
    lr = 0.02

    def plugin(self) -> Any:
        return Retinanet(**{**SMALL, "neck": Fpn(channels=16, extra=0)}, anchors=Anchors(scales=[1.5], ratios=[1.0]))


def made(plugin: DenseDetector, classes: int = 3) -> Any:
    torch.manual_seed(0)
    return DenseNetwork(plugin, [f"class {number}" for number in range(classes)])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return made(FAMILIES[request.param](**SMALL)).train()


def batch_of(*objects: list[list[float]], side: int = 64) -> Batch:
    """Images of noise with such boxes; the last is smaller than the batch."""
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (len(objects), 3, side, side), dtype=torch.uint8, generator=noise)
    sizes = [(side, side)] * (len(objects) - 1) + [(side - 14, side - 4)]
    images[-1, :, side - 14 :] = 0
    images[-1, :, :, side - 4 :] = 0
    targets = [Target(torch.tensor(boxes).view(-1, 4), torch.arange(len(boxes)) % 3) for boxes in objects]
    return batching.make_batch(images, targets, sizes=sizes)


ONE, TWO = [[4.0, 6, 40, 30]], [[10.0, 10, 60, 50], [1.0, 2, 17, 22]]


def losses_of(model: Any, batch: Batch, targets: Targets | None = None) -> dict[str, float]:
    with torch.no_grad():
        losses = model(batch.images, batch.targets if targets is None else targets, batch.image_sizes)
    return {name: loss.item() for name, loss in losses.items()}


def test_what_is_in_the_padding_of_the_targets_is_of_no_matter(model: Any):
    batch = batch_of(ONE, TWO)
    boxes, labels, valid = (torch.cat([value, value.flip(0)], 1) for value in batch.targets[:3])
    valid[:, 8:] = False
    padded = Targets(boxes, labels, valid)
    assert losses_of(model, batch, padded) == pytest.approx(losses_of(model, batch), rel=1e-6)


def test_an_image_without_objects_gives_a_gradient(model: Any):
    for objects in ([[], []], [[], TWO]):
        batch = batch_of(*objects)
        losses = model(batch.images, batch.targets, batch.image_sizes)
        total = sum(losses.values())
        total.backward()
        assert total.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        assert losses["loss_bbox"].item() == 0 or objects[1]
        model.zero_grad()


def test_two_processes_have_the_losses_of_one(model: Any, monkeypatch: pytest.MonkeyPatch):
    """Each with one image, and the counts of both averaged: the mean of their losses is that of the batch."""
    batch = batch_of(ONE, TWO)
    halves = [batch.keep([number]) for number in range(2)]
    whole, seen, sums = losses_of(model, batch), [], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: seen.append(value.clone()))
    for half in halves:
        losses_of(model, half)
        sums.append(list(seen))
        seen.clear()
    shared = [one + other for one, other in zip(*sums, strict=True)]
    assert shared, "no count is shared"
    for half in halves:
        left = list(shared)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda value, left=left: value.copy_(left.pop(0)))
        for name, loss in losses_of(model, half).items():
            whole[name] -= loss / 2
    assert all(abs(rest) < 1e-5 for rest in whole.values()), whole


def test_the_device_is_asked_nothing(model: Any):
    """Tensors without values: whatever depends on one raises."""
    batch = batch_of(ONE, TWO)
    there = made(type(model.family)(**SMALL)).train().to("meta")
    targets = batch.targets.map(lambda value: value.to("meta"))
    losses = there(batch.images.to("meta"), targets, batch.image_sizes.to("meta"))
    sum(losses.values()).backward()


def test_it_compiles_as_one_graph(model: Any):
    batch = batch_of(ONE, TWO)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    losses = compiled(batch.images, batch.targets, batch.image_sizes)
    found = {name: loss.item() for name, loss in losses.items()}
    assert found == pytest.approx(losses_of(model, batch), rel=1e-5)


def test_predictions_have_a_fixed_shape(model: Any):
    batch = batch_of(ONE, TWO)
    model.eval()
    with torch.no_grad():
        found = model(batch.images, None, batch.image_sizes)
    model.train()
    assert found.boxes.shape == (2, 100, 4)
    assert not (found.boxes[1] > torch.tensor([60, 50, 60, 50])).any()


MINE = """
from detkernel import option, plugin
from detkernel_detection import Assigner, BoxLoss
from detkernel_detection.parts import Matches
import torch

@plugin
class Centre(BoxLoss):
    '''How far centres are apart, in pixels.'''

    factor: float = option(default=1.0, help="of it")

    def __call__(self, predicted, wanted):
        return self.factor * ((predicted + predicted.roll(2, -1)) / 2 - (wanted + wanted.roll(2, -1)) / 2).abs().sum(-1)

@plugin
class All(Assigner):
    '''All anchors to the first object.'''

    def assign(self, priors, targets):
        valid = priors.valid & targets.valid[:, :1]
        return Matches(torch.zeros_like(valid, dtype=torch.int64), valid, ~valid)
"""


def of_config(folder: Path, **model: str) -> Any:
    """The model of a config."""
    from detkernel.config import load

    (folder / "mine.py").write_text(MINE)
    options = "".join(f", {name}: {value}" for name, value in model.items())
    backbone = "{use: resnet, depth: 18, channels: 8, norm: group}"
    (folder / "c.yaml").write_text(
        f"run: {{until: 1 iters}}\nmodel: {{use: retinanet, backbone: {backbone}, neck: {{use: fpn, channels: 16}}, "
        f"head: {{use: towers, convs: 1, channels: 16}}{options}}}\n"
    )
    return made(load(folder / "c.yaml").plugins["model"])


def test_a_loss_and_an_assigner_are_replaced_in_a_config(tmp_path: Path):
    """By what is installed, and by a local file: the losses are the replaced part's."""
    batch = batch_of(ONE, TWO)
    usual = losses_of(of_config(tmp_path).train(), batch)
    ciou = losses_of(of_config(tmp_path, box_loss="{use: ciou}").train(), batch)
    assert ciou["loss_bbox"] != usual["loss_bbox"]
    assert ciou["loss_cls"] == usual["loss_cls"]
    mine, twice = (
        losses_of(of_config(tmp_path, box_loss=f"{{use: ./mine.py:Centre, factor: {factor}}}").train(), batch)
        for factor in (1.0, 2.0)
    )
    assert twice["loss_bbox"] == pytest.approx(2 * mine["loss_bbox"])
    assert mine["loss_cls"] == usual["loss_cls"]
    assert losses_of(of_config(tmp_path, assigner="./mine.py:All").train(), batch)["loss_cls"] != usual["loss_cls"]


def test_a_part_of_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model.box_loss.use: 'focal' is a ClassLoss, not a BoxLoss"):
        of_config(tmp_path, box_loss="focal")
