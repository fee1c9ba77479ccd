"""What each option of a detector and of its parts changes; expected values worked out here or by torchvision."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from detkernel import ConfigError
from detkernel_detection import Target, batching
from detkernel_detection.parts import Output
from detkernel_detectors.backbones import Resnet
from detkernel_detectors.backbones.norms import EvalBatchNorm2d
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.heads import Towers
from detkernel_detectors.losses.boxes import SmoothL1
from detkernel_detectors.losses.classes import Focal
from detkernel_detectors.models.dense import Candidates, DenseDetector
from detkernel_detectors.models.network import Network
from detkernel_detectors.models.retinanet import Retinanet
from detkernel_detectors.necks import Fpn
from detkernel_detectors.priors import Anchors
from torch import Tensor, nn

SMALL: Any = {
    "backbone": Resnet(depth=18, channels=8, stages=2, norm="group"),
    "neck": Fpn(channels=16, extra=0),
    "head": Towers(convs=0),
}
BOX = (10.0, 10.0, 50.0, 40.0)


def beside(iou: float) -> list[float]:
    """A box as large as `BOX`, to its right, with this IoU."""
    left, top, right, bottom = BOX
    shift = (right - left) * (1 - iou) / (1 + iou)
    return [left + shift, top, right + shift, bottom]


def apart(count: int) -> Tensor:
    """Boxes that do not overlap."""
    return torch.tensor([[20.0 * number, 0, 20.0 * number + 10, 10] for number in range(count)])


# what is detected


class Given(DenseDetector):
    """Detects what it is told to, of one class."""

    candidates_given: Any

    def detected(self, maps: Any, sizes: Tensor | None) -> Candidates:
        return self.candidates_given


def count(boxes: Any, scores: list[float], counts: list[int] | None = None, **options: Any) -> int:
    """How many of these are detected, of so many a level."""
    given = Given(**{"score_thresh": 0.0, "nms_thresh": 0.9, **options})
    boxes = torch.as_tensor(boxes)[None]
    given.candidates_given = Candidates(torch.tensor(scores)[None, :, None], boxes, counts or [len(scores)])
    return int(given.predictions(None, None).valid.sum())  # type: ignore[arg-type]


def test_detections_that_score_too_little_overlap_or_are_too_many_are_dropped():
    assert count(apart(3), [0.9, 0.45, 0.35], score_thresh=0.4) == 2
    assert count([BOX, beside(0.3)], [0.9, 0.8], nms_thresh=0.35) == 2
    assert count([BOX, beside(0.4)], [0.9, 0.8], nms_thresh=0.35) == 1
    assert count(apart(5), [0.9, 0.8, 0.7, 0.6, 0.5], max_detections=3) == 3


def test_as_many_candidates_of_each_level_as_asked_for_reach_nms():
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    assert count(apart(7), scores, [4, 3], candidates=2) == 4
    assert count(apart(7), scores, [4, 3], candidates=3) == 6
    same = torch.cat([apart(1)] * 4 + [apart(3) + 200])
    assert count(same, scores, [4, 3], candidates=2) == 3, "of four, two are at one place"


def test_a_factor_acts_behind_the_threshold():
    """As the centre-ness of FCOS does in MMDetection."""
    given = Given(score_thresh=0.4, nms_thresh=0.9)
    scores, factor = torch.tensor([[[0.5], [0.8], [0.3]]]), torch.tensor([[0.9, 0.25, 1.0]])
    given.candidates_given = Candidates(scores, apart(3)[None], [3], factor)
    found = given.predictions(None, None)  # type: ignore[arg-type]
    assert found.scores[found.valid].tolist() == pytest.approx([0.45, 0.2])


# what a network is given


@pytest.mark.parametrize(
    ("order", "expected"), [("rgb", [(255 - 5) / 50, -0.2, -0.15]), ("bgr", [-0.15, -0.2, (255 - 5) / 50])]
)
def test_images_are_normalised_and_ordered_and_padded_as_asked_for(order: Any, expected: list[float]):
    """A red image; the mean and the deviation are of R, G and B in either order."""
    options: Any = {"image_mean": (5.0, 20.0, 30.0), "image_std": (50.0, 100.0, 200.0), "size_divisible": 20}
    model = Network(Retinanet(**SMALL, **options, channel_order=order), ["a"])
    red = torch.zeros(1, 3, 70, 50, dtype=torch.uint8)
    red[:, 0] = 255
    found = model.normalize(red, None)
    assert found.shape == (1, 3, 80, 60)
    torch.testing.assert_close(found[0, :, 5, 5], torch.tensor(expected))
    assert not found[:, :, 70:].any()
    assert not found[:, :, :, 50:].any()


# weights


def loaded(path: Path, given: Any) -> list[float]:
    """The bias of the first anchor's three classes, with the weights of a file."""
    plugin = Retinanet(**SMALL, anchors=Anchors(ratios=[1.0]), weights=str(path), weights_classes=given)
    assert plugin.loads_weights
    run: Any = SimpleNamespace(classes=("a", "b", "c"), log=logging.getLogger("detkernel"))
    model: Any = Network(plugin, run.classes)
    with torch.no_grad():
        model.head.cls.bias.fill_(-1)
    plugin.load(run, model)
    found: list[float] = model.head.cls.bias.tolist()
    return found


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("same_order", [10, 20, 30]),
        (["c", "b", "a"], [30, 20, 10]),
        (["x", "a", "y"], [20, -1, -1]),
        ("none", [-1] * 3),
    ],
)
def test_outputs_for_classes_are_taken_by_the_names_of_the_weights(given: Any, expected: list[float], tmp_path: Path):
    model: Any = Network(Retinanet(**SMALL, anchors=Anchors(ratios=[1.0])), ["1", "2", "3"])
    with torch.no_grad():
        model.head.cls.bias.copy_(torch.tensor([10.0, 20, 30]))
    torch.save(model.state_dict(), tmp_path / "retinanet.pt")
    assert loaded(tmp_path / "retinanet.pt", given) == expected


def test_weights_that_are_not_there_are_told():
    assert not Retinanet().loads_weights
    with pytest.raises(ConfigError, match=r"weights: there is no file 'none\.pt'"):
        loaded(Path("none.pt"), None)


# what is learned


def losses(objects: list[list[float]], **options: Any) -> dict[str, float]:
    """Of outputs that are 0: every probability a half, every box its anchor."""
    model: Any = Network(Retinanet(**SMALL, anchors=Anchors(scales=[2.0], ratios=[1.0]), **options), ["a", "b"])
    for output in (model.head.cls, model.head.reg):
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
    target = Target(torch.tensor(objects).view(-1, 4), torch.zeros(len(objects), dtype=torch.int64))
    batch = batching.make_batch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [target], sizes=[(64, 64)])
    found = model(batch.images, batch.targets, batch.image_sizes)
    return {name: loss.item() for name, loss in found.items()}


def test_the_class_loss_of_retinanet_is_the_one_asked_for():
    """Without objects, each of 64 places has two classes that are not there, at a probability of a half."""
    entries = 64 * 2
    assert losses([])["loss_cls"] == pytest.approx(entries * 0.75 * 0.25 * math.log(2), rel=1e-5)
    other = losses([], class_loss=Focal(alpha=0.4, gamma=1.0))["loss_cls"]
    assert other == pytest.approx(entries * 0.6 * 0.5 * math.log(2), rel=1e-5)


def test_the_coder_and_the_box_loss_of_retinanet_are_those_asked_for():
    """An anchor of 16 by 16 around (24, 24) and an object 2 pixels to its right, at an IoU of 7 / 9; no other anchor is
    positive."""
    objects = [[18.0, 16, 34, 32]]
    assert losses(objects)["loss_bbox"] == pytest.approx(2 / 16, rel=1e-5)
    halved = losses(objects, box_coder=DeltaCoder(stds=(0.5, 1.0, 1.0, 1.0)))["loss_bbox"]
    assert halved == pytest.approx(2 / 16 / 0.5, rel=1e-5)
    smooth = losses(objects, box_loss=SmoothL1(beta=1.0))["loss_bbox"]
    assert smooth == pytest.approx((2 / 16) ** 2 / 2, rel=1e-5)


# the pyramid


MAPS = [torch.randn(1, count, side, side) for count, side in ((2, 32), (3, 16), (4, 8))]


def pyramid(**options: Any) -> tuple[Any, list[Tensor]]:
    torch.manual_seed(0)
    neck: Any = Fpn(channels=6, **options).build([2, 3, 4], [4, 8, 16])
    return neck, neck(MAPS)


@pytest.mark.parametrize(("finest", "strides"), [(4, [4, 8, 16]), (8, [8, 16]), (16, [16])])
def test_the_pyramid_begins_at_the_stride_that_is_asked_for(finest: int, strides: list[int]):
    neck, found = pyramid(finest=finest, extra=0)
    assert neck.strides == strides
    assert [one.shape[-1] for one in found] == [128 // stride for stride in strides]
    with pytest.raises(ConfigError, match=r"finest: the backbone has maps of strides \[4, 8, 16\], none of 32"):
        pyramid(finest=32)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("source", ["input", "output", "pool"])
def test_further_levels_are_made_of_what_is_asked_for(source: Any, relu: bool):
    neck, found = pyramid(extra=2, extra_from=source, extra_relu=relu)
    assert neck.strides == [8, 16, 32, 64]
    if source == "pool":
        first, second = found[1][:, :, ::2, ::2], found[1][:, :, ::4, ::4]
    else:
        convs = neck.outputs[2:]
        first = convs[0](MAPS[-1] if source == "input" else found[1])
        second = convs[1](first.clamp(min=0) if relu else first)
    torch.testing.assert_close(found[2], first)
    torch.testing.assert_close(found[3], second)


# the head


@pytest.mark.parametrize(
    ("options", "norm", "biased"),
    [
        ({}, nn.Identity, True),
        ({"bias": False}, nn.Identity, False),
        ({"norm": "batch"}, nn.BatchNorm2d, False),
        ({"norm": "batch", "bias": True}, nn.BatchNorm2d, True),
        ({"norm": "group", "groups": 3}, nn.GroupNorm, False),
    ],
)
def test_towers_are_made_as_asked_for(options: dict[str, Any], norm: type, biased: bool):
    head: Any = Towers(convs=2, channels=12, **options).build(6, 1, [Output("cls", 5, "cls"), Output("reg", 4, "reg")])
    for tower in (head.cls_tower, head.reg_tower):
        assert [(layer.conv.in_channels, layer.conv.out_channels) for layer in tower] == [(6, 12), (12, 12)]
        assert all(type(layer.norm) is norm and (layer.conv.bias is not None) == biased for layer in tower)
        assert all(getattr(layer.norm, "num_groups", 3) == 3 for layer in tower)
    found = head([torch.randn(1, 6, 4, 4)])
    assert {name: one[0].shape[1] for name, one in found.items()} == {"cls": 5, "reg": 4}


# the backbone


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"depth": 50, "groups": 32, "width_per_group": 4}, "resnext50_32x4d"),
        ({"depth": 50, "width_per_group": 128}, "wide_resnet50_2"),
        ({"depth": 34}, "resnet34"),
    ],
)
def test_a_resnet_has_the_parameters_of_torchvisions(options: dict[str, Any], name: str):
    with torch.device("meta"):
        ours, theirs = Resnet(**options).build(), getattr(torchvision.models, name)()
    expected = {key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected


@pytest.mark.parametrize(("style", "sides"), [("pytorch", (8, 4)), ("caffe", (4, 4))])
def test_the_style_says_which_convolution_has_the_stride(style: Any, sides: tuple[int, int]):
    """By what the first two convolutions of the second stage give."""
    model: Any = Resnet(depth=50, channels=4, stages=2, style=style).build()
    seen: list[int] = []
    for conv in (model.layer2[0].conv1, model.layer2[0].conv2):
        conv.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[-1]))
    model(torch.randn(2, 3, 32, 32))
    assert tuple(seen) == sides


@pytest.mark.parametrize("stages", [1, 3])
def test_a_resnet_gives_a_map_for_each_stage_that_is_kept(stages: int):
    model: Any = Resnet(depth=18, channels=4, stages=stages).build()
    found = model(torch.randn(2, 3, 64, 64))
    assert [tuple(one.shape[1:]) for one in found.values()] == [(4, 16, 16), (8, 8, 8), (16, 4, 4)][:stages]
    assert (model.channels, model.strides) == ([4, 8, 16][:stages], [4, 8, 16][:stages])


@pytest.mark.parametrize(
    ("layers", "trained"),
    [(0, set()), (2, {"layer3", "layer4"}), (5, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"})],
)
def test_stages_that_are_not_trained_get_no_gradient_and_keep_their_statistics(layers: int, trained: set[str]):
    model: Any = Resnet(depth=18, channels=4, trainable_layers=layers).build()
    model.train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(2, 3, 64, 64))
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == trained
    moved = {name.split(".")[0] for name, value in model.named_buffers() if not torch.equal(value, before[name])}
    assert moved == trained - {"conv1"}


@pytest.mark.parametrize(
    ("norm", "kind", "trained"),
    [
        ("frozen", EvalBatchNorm2d, False),
        ("eval", EvalBatchNorm2d, True),
        ("batch", nn.BatchNorm2d, True),
        (None, nn.BatchNorm2d, True),
        ("group", nn.GroupNorm, True),
    ],
)
def test_the_norm_of_a_resnet_is_the_one_asked_for(norm: Any, kind: type, trained: bool):
    model: Any = Resnet(depth=18, channels=4, stages=1, norm=norm).build()
    assert type(model.bn1) is kind
    assert model.bn1.weight.requires_grad is trained
    model.train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(2, 3, 64, 64))
    moved = any(not torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert moved == (kind is nn.BatchNorm2d)
