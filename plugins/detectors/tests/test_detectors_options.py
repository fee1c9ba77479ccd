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
from detkernel import CheckpointError, ConfigError
from detkernel_detection import Target, batching
from detkernel_detection.parts import Output
from detkernel_detection.weights import renamed
from detkernel_detectors.assigners.max_iou import MaxIouAssigner
from detkernel_detectors.backbones import Resnet
from detkernel_detectors.backbones.deformable import DeformableConv2d
from detkernel_detectors.backbones.norms import EvalBatchNorm2d, FrozenBatchNorm2d
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.heads import FcBoxHead, FcnMaskHead, Towers
from detkernel_detectors.heads.towers import over_levels
from detkernel_detectors.losses.boxes import L1, SmoothL1
from detkernel_detectors.losses.classes import Focal
from detkernel_detectors.models.cascade_rcnn import CascadeMaskRcnn, CascadeRcnn
from detkernel_detectors.models.dense import Candidates, DenseDetector, Maps
from detkernel_detectors.models.fcos import Fcos
from detkernel_detectors.models.mask_rcnn import MaskRcnn
from detkernel_detectors.models.network import Network
from detkernel_detectors.models.rcnn import within
from detkernel_detectors.models.retinanet import Retinanet
from detkernel_detectors.necks import Fpn
from detkernel_detectors.priors import Anchors, anchors
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


@pytest.mark.parametrize(("least", "kept"), [(0.0, 2), (3.0, 1), (None, 3)])
def test_detections_with_too_short_a_side_are_dropped(least: float | None, kept: int):
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 20, 23, 29], [40, 40, 40, 49]])
    assert count(boxes, [0.9, 0.8, 0.7], min_size=least) == kept


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


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm), (None, nn.Identity)])
def test_the_pyramid_is_normalised_as_asked_for(norm: Any, kind: type):
    neck, found = pyramid(norm=norm)
    assert {type(one) for one in [*neck.lateral_norms, *neck.output_norms]} == {kind}
    assert all((conv.bias is None) == (norm is not None) for conv in [*neck.laterals, *neck.outputs[:2]])
    assert neck.outputs[2].bias is not None, "a further level is not normalised"
    if norm == "batch":
        mean = found[0].mean((0, 2, 3))
        torch.testing.assert_close(mean, torch.zeros(6), atol=1e-5, rtol=0)


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


@pytest.mark.parametrize(
    ("sides", "calls"),
    [
        ([(24, 33), (12, 17), (6, 9), (3, 5), (2, 3)], 3),
        ([(20, 2), (10, 1), (5, 1), (3, 1), (2, 1), (1, 1)], 3),
        ([(4, 4), (2, 2), (1, 1), (1, 1)], 3),
        ([(9, 4), (7, 2), (2, 5)], 3),
        ([(8, 8)], 1),
    ],
)
def test_coarse_levels_share_a_convolution_and_are_as_if_each_had_its_own(sides: list[tuple[int, int]], calls: int):
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    maps = [torch.randn(2, 3, *side, dtype=torch.float64, requires_grad=True) for side in sides]
    weights = [torch.randn(2, 4, *side, dtype=torch.float64) for side in sides]
    seen: list[torch.Size] = []
    handle = conv.register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
    found = over_levels(conv, maps)
    handle.remove()
    assert len(seen) == calls
    expected = [conv(one) for one in maps]
    inputs = [*maps, *conv.parameters()]
    ours, theirs = (
        torch.autograd.grad(sum((one * weight).sum() for one, weight in zip(values, weights, strict=True)), inputs)
        for values in (found, expected)
    )
    torch.testing.assert_close((found, ours), (expected, theirs), rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_a_norm_adds_to_the_variance_what_is_asked_for(norm: Any):
    model: Any = Resnet(depth=18, channels=4, stages=1, norm=norm, norm_eps=0.25).build()
    assert {one.eps for one in model.modules() if hasattr(one, "eps")} == {0.25}
    assert {one.eps for one in Resnet(depth=18, channels=4).build().modules() if hasattr(one, "eps")} == {1e-5}


@pytest.mark.parametrize(("style", "sides"), [("pytorch", (8, 4)), ("caffe", (4, 4))])
def test_the_style_says_which_convolution_has_the_stride(style: Any, sides: tuple[int, int]):
    """By what the first two convolutions of the second stage give."""
    model: Any = Resnet(depth=50, channels=4, stages=2, style=style).build()
    seen: list[int] = []
    for conv in (model.layer2[0].conv1, model.layer2[0].conv2):
        conv.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[-1]))
    model(torch.randn(2, 3, 32, 32))
    assert tuple(seen) == sides


@pytest.mark.parametrize(("version", "rows"), [("v1", 36), ("v2", 54)])
def test_deformable_convolutions_have_the_names_of_mmdetection(version: Any, rows: int):
    options: Any = {"depth": 50, "channels": 4, "groups": 2, "width_per_group": 32}
    model: Any = Resnet(deformable=version, deformable_stages=[3, 4], deformable_groups=2, **options).build()
    own, plain = model.state_dict(), Resnet(**options).build().state_dict()
    added = {name: value for name, value in own.items() if name not in plain}
    blocks = [f"layer3.{number}" for number in range(6)] + [f"layer4.{number}" for number in range(3)]
    assert set(added) == {f"{block}.conv2.conv_offset.{kind}" for block in blocks for kind in ("weight", "bias")}
    assert {len(value) for value in added.values()} == {rows}
    assert all(own[name].shape == value.shape for name, value in plain.items())
    found = model(torch.randn(2, 3, 64, 96))
    assert [tuple(one.shape[2:]) for one in found.values()] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    nn.init.ones_(model.layer3[0].bn3.weight)  # else a block begins as its shortcut
    sum(one.square().mean() for one in model(torch.randn(2, 3, 64, 96)).values()).backward()
    assert model.layer3[0].conv2.conv_offset.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_deformable_convolution_begins_as_the_ordinary_one_and_goes_by_its_offsets(version: Any):
    conv = DeformableConv2d(4, 6, 1, 2, version, 1)
    conv.begin()
    share = 1.0 if version == "v1" else 0.5
    x = torch.randn(2, 4, 7, 9)
    plain = nn.functional.conv2d(x, conv.weight, padding=1, groups=2)
    torch.testing.assert_close(conv(x), plain * share, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        conv.conv_offset.bias[1:18:2] = 1.0  # x of each point
        if version == "v2":
            conv.conv_offset.bias[18:] = 50.0  # all of it counts
    torch.testing.assert_close(conv(x)[..., 1:-2], plain[..., 2:-1], rtol=1e-4, atol=1e-5)


def test_weights_of_an_ordinary_resnet_fit_one_with_deformable_convolutions(tmp_path: Path):
    plain: Any = Resnet(depth=50, channels=4).build()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    model: Any = Resnet(
        depth=50, channels=4, deformable="v1", weights=str(tmp_path / "plain.pth"), norm="batch"
    ).build()
    x = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(model.eval()(x).values(), plain.eval()(x).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    state = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "deformed.pth")
    again: Any = Resnet(depth=50, channels=4, deformable="v1", weights=str(tmp_path / "deformed.pth")).build()
    assert again.layer4[2].conv2.conv_offset.bias.eq(1).all()
    with pytest.raises(CheckpointError, match=r"unexpected: .*conv_offset"):
        Resnet(depth=50, channels=4, weights=str(tmp_path / "deformed.pth")).build()


def test_a_resnet_without_bottlenecks_has_no_deformable_convolutions():
    with pytest.raises(ConfigError, match="deformable: a ResNet-34 has no bottlenecks"):
        Resnet(depth=34, deformable="v2").build()


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
        ("frozen", FrozenBatchNorm2d, False),
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


# what is proposed and found in two stages


RCNN: Any = {
    "backbone": SMALL["backbone"],
    "neck": Fpn(channels=16, finest=4, extra=1, extra_from="pool"),
    "anchors": Anchors(scales=[4.0]),
    "box_head": FcBoxHead(channels=16, pooled=4),
    "mask_head": FcnMaskHead(convs=1, channels=8, pooled=4),
    "max_detections": 20,
}
LOOSE = MaxIouAssigner(positive=0.2, negative=0.1, best=None)
LEARNED: dict[str, tuple[Any, set[str]]] = {
    "anchors": (Anchors(scales=[3.0]), {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls"}),
    "rpn_convs": (2, {"loss_rpn_cls", "loss_rpn_bbox"}),
    "rpn_assigner": (LOOSE, {"loss_rpn_cls", "loss_rpn_bbox"}),
    "rpn_border": (0, {"loss_rpn_cls"}),
    "rpn_sampled": (8, {"loss_rpn_cls", "loss_rpn_bbox"}),
    "rpn_positive": (0.01, {"loss_rpn_bbox"}),
    "rpn_box_coder": (DeltaCoder(stds=(0.5, 0.5, 0.5, 0.5)), {"loss_rpn_bbox"}),
    "rpn_box_loss": (SmoothL1(), {"loss_rpn_bbox"}),
    "rpn_nms_thresh": (0.2, {"loss_cls"}),
    "rpn_min_size": (40.0, {"loss_cls"}),
    "candidates_train": (3, {"loss_cls"}),
    "proposals_train": (3, {"loss_cls"}),
    "assigner": (LOOSE, {"loss_cls", "loss_bbox", "loss_mask"}),
    "sampled": (8, {"loss_cls", "loss_bbox"}),
    "positive": (0.01, {"loss_bbox", "loss_mask"}),
    "box_coder": (DeltaCoder(), {"loss_bbox"}),
    "box_loss": (SmoothL1(), {"loss_bbox"}),
    "sampling_ratio": (1, {"loss_cls", "loss_bbox", "loss_mask"}),
    "aligned": (False, {"loss_cls", "loss_bbox", "loss_mask"}),
}
"""Option -> another value, and the losses that it changes."""


def of_masks(**options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = Network(MaskRcnn(**{**RCNN, **options}), ["a", "b"])
    for layer in (model.head.cls, model.head.reg, model.box_head.cls, model.box_head.reg):
        nn.init.normal_(layer.weight, std=0.3)
    return model


def images_with_masks() -> Any:
    noise = torch.randint(0, 255, (1, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[10.0, 12, 50, 40], [40, 50, 90, 90]])
    masks = torch.zeros(2, 96, 96, dtype=torch.uint8)
    masks[0, 12:30, 10:50] = masks[1, 50:90, 60:90] = 1
    return batching.make_batch(noise, [Target(boxes, torch.tensor([0, 1]), masks)], sizes=[(96, 96)])


def learned(**options: Any) -> dict[str, float]:
    model, batch = of_masks(**options).train(), images_with_masks()
    torch.manual_seed(0)
    return {name: loss.item() for name, loss in model(batch.images, batch.targets, batch.image_sizes).items()}


@pytest.mark.parametrize("name", LEARNED)
def test_what_an_option_of_the_r_cnns_changes_in_training(name: str):
    value, expected = LEARNED[name]
    usual, other = learned(), learned(**{name: value})
    changed = {loss for loss in usual if usual[loss] != other[loss]}
    assert expected <= changed


def found_in(**options: Any) -> Any:
    model, batch = of_masks(**options).eval(), images_with_masks()
    with torch.no_grad():
        return model(batch.images, None, batch.image_sizes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("candidates", 1),
        ("proposals", 2),
        ("rpn_nms_thresh", 0.05),
        ("score_thresh", 0.5),
        ("nms_thresh", 0.0),
        ("min_size", 20.0),
    ],
)
def test_what_an_option_of_the_r_cnns_changes_in_validation(name: str, value: Any):
    usual, other = found_in(max_detections=1000), found_in(max_detections=1000, **{name: value})
    assert other.valid.sum() < usual.valid.sum()
    if name == "score_thresh":
        assert other.scores[other.valid].min() > 0.5
    if name == "min_size":
        sides = (other.boxes[..., 2:] - other.boxes[..., :2])[other.valid]
        assert sides.min() > 20


def test_masks_are_of_the_class_that_is_detected():
    model, batch = of_masks().eval(), images_with_masks()
    nn.init.zeros_(model.box_head.cls.weight)  # either class at a third
    nn.init.zeros_(model.mask_head.logits.weight)
    with torch.no_grad():
        model.mask_head.logits.bias.copy_(torch.tensor([4.0, -4.0]))
        found = model(batch.images, None, batch.image_sizes)
    labels, masks = found.labels[found.valid], found.masks[found.valid]
    assert masks.shape[1:] == (8, 8)
    assert set(labels.tolist()) == {0, 1}
    assert masks[labels == 0].min() > 0.9
    assert masks[labels == 1].max() < 0.1


@pytest.mark.parametrize(("name", "value"), [("mask_paste", "expanded"), ("mask_threshold", 0.25)])
def test_a_model_pastes_its_masks_as_asked_for(name: str, value: Any):
    assert getattr(of_masks(), name) != value
    assert getattr(of_masks(**{name: value}), name) == value


def test_only_as_many_boxes_as_can_be_positive_go_through_the_mask_head():
    model, batch, seen = of_masks(sampled=16, positive=0.25).train(), images_with_masks(), []
    model.mask_head.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    model(batch.images, batch.targets, batch.image_sizes)
    assert seen == [4]


def test_an_anchor_may_reach_over_a_side_by_as_much_as_asked_for():
    """Of anchors of 32 pixels around (0, 0) and (32, 32), in an image of 64: the first reaches over by 16."""
    maps = Maps([torch.zeros(1, 1, 2, 2)], {}, (32,), (64, 64))
    priors = anchors(Anchors(scales=[1.0], ratios=[1.0]), maps.features, maps.strides, torch.tensor([[64.0, 64]]))
    assert [within(priors, border, maps, None).valid.sum().item() for border in (16, 15)] == [4, 1]
    smaller = torch.tensor([[64, 40]])
    assert [within(priors, border, maps, smaller).valid.sum().item() for border in (16, 7, 8)] == [4, 0, 0]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"fcs.0": (16, 6 * 16), "fcs.1": (16, 16), "cls": (4, 16), "reg": (12, 16)}),
        (
            {"convs": 1, "conv_channels": 8, "norm": "group", "fcs": 1},
            {
                "convs.0.conv": (8, 6, 3, 3),
                "convs.0.norm": (8,),
                "fcs.0": (16, 8 * 16),
                "cls": (4, 16),
                "reg": (12, 16),
            },
        ),
        ({"fcs": 0, "pooled": 2}, {"cls": (4, 6 * 4), "reg": (12, 6 * 4)}),
    ],
)
def test_a_box_head_is_made_as_asked_for(options: Any, names: dict[str, tuple[int, ...]]):
    given = FcBoxHead(**{"channels": 16, "pooled": 4, **options})
    head = given.build(6, 4, 3)
    weights = {name.removesuffix(".weight"): tuple(one.shape) for name, one in head.named_parameters()}
    assert {name: shape for name, shape in weights.items() if not name.endswith(".bias")} == names
    logits, deltas = head(torch.randn(5, 6, given.pooled, given.pooled))
    assert (logits.shape, deltas.shape) == ((5, 4), (5, 12))


@pytest.mark.parametrize(("convs", "norm"), [(0, None), (2, None), (2, "batch")])
def test_a_mask_head_is_made_as_asked_for(convs: int, norm: Any):
    head: Any = FcnMaskHead(convs=convs, channels=8, norm=norm, pooled=5).build(6, 3)
    assert head(torch.randn(4, 6, 5, 5), torch.tensor([0, 2, 1, 2])).shape == (4, 10, 10)
    assert len(head.convs) == convs
    assert all(isinstance(layer.norm, nn.BatchNorm2d) == (norm == "batch") for layer in head.convs)
    assert all((layer.conv.bias is None) == (norm == "batch") for layer in head.convs)


@pytest.mark.parametrize("classes", [1, 3])
def test_a_mask_is_that_of_its_class_of_the_masks_of_all_classes(classes: int):
    head: Any = FcnMaskHead(convs=1, channels=4, pooled=3).build(4, classes).double()
    nn.init.normal_(head.logits.bias)
    pooled, labels = torch.randn(5, 4, 3, 3, dtype=torch.float64), torch.tensor([2, 0, 1, 2, 2])
    every = head.logits(head.upsample(head.convs(pooled)).relu())
    expected = every[torch.arange(5), labels.clamp(max=classes - 1)]
    weights = torch.randn_like(expected)
    ours, theirs = (
        torch.autograd.grad((found * weights).sum(), list(head.parameters()))
        for found in (head(pooled, labels), expected)
    )
    torch.testing.assert_close((head(pooled, labels), ours), (expected, theirs), rtol=1e-12, atol=1e-12)


def test_training_masks_keeps_nothing_for_classes_that_a_box_is_not_of():
    def kept(classes: int) -> int:
        sizes: list[int] = []
        head: Any = FcnMaskHead(convs=0, channels=4, pooled=7).build(4, classes)
        with torch.autograd.graph.saved_tensors_hooks(lambda one: sizes.append(one.numel()) or one, lambda one: one):
            head(torch.randn(6, 4, 7, 7, requires_grad=True), torch.arange(6)).sum()
        return sum(sizes)

    assert kept(80) - kept(20) < 6 * 14**2, "of one of the classes"


# what is refined from stage to stage


def cascade(**options: Any) -> Any:
    torch.manual_seed(0)
    given = {name: value for name, value in RCNN.items() if name != "mask_head"}
    return Network(CascadeRcnn(**{**given, "sampled": 10**4, **options}), ["a", "b"])


def cascaded(**options: Any) -> dict[str, float]:
    model, batch = cascade(**options).train(), images_with_masks()
    torch.manual_seed(0)
    return {name: loss.item() for name, loss in model(batch.images, batch.targets, batch.image_sizes).items()}


def test_the_losses_of_each_stage_have_its_factor():
    usual, other = cascaded(), cascaded(stage_weights=[3.0, 0.5, 0.0])
    for name in ("loss_cls", "loss_bbox"):
        assert other[f"s0.{name}"] == pytest.approx(3 * usual[f"s0.{name}"])
        assert other[f"s1.{name}"] == pytest.approx(usual[f"s1.{name}"])
        assert other[f"s2.{name}"] == 0
    assert other["s2.acc"] == usual["s2.acc"]


def test_each_stage_has_its_own_assigner_and_coder():
    usual = cascaded()
    assigners = [MaxIouAssigner(positive=iou, negative=iou, best=None) for iou in (0.5, 0.2, 0.7)]
    other = cascaded(assigners=assigners)
    assert other["s0.loss_bbox"] == usual["s0.loss_bbox"]
    assert other["s1.loss_bbox"] != usual["s1.loss_bbox"]
    stds = [(0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (1.0, 1.0, 1.0, 1.0)]
    other = cascaded(box_coders=[DeltaCoder(stds=each) for each in stds])
    assert other["s1.loss_bbox"] == usual["s1.loss_bbox"]
    assert other["s2.loss_bbox"] != usual["s2.loss_bbox"]
    assert cascaded(box_loss=L1())["s0.loss_bbox"] != usual["s0.loss_bbox"]
    with pytest.raises(ConfigError, match="assigners: expected one for each of the 2 stages, got 3"):
        cascade(stage_weights=[1.0, 0.5])


def test_each_stage_is_given_the_boxes_of_the_one_before_without_the_objects():
    """Coders that move every box by 2 pixels to the right: the third stage sees them 4 pixels further."""
    model, batch, seen = cascade(rpn_border=None).eval(), images_with_masks(), []
    pool = model.family.pool
    for head in model.box_heads:
        nn.init.zeros_(head.reg.weight)
    object.__setattr__(model.family, "pool", lambda maps, boxes, side: (seen.append(boxes), pool(maps, boxes, side))[1])
    with torch.no_grad():
        model(batch.images, None, batch.image_sizes)
        assert torch.allclose(seen[0], seen[2], atol=1e-3)
        seen.clear()
        model.box_heads[0].reg.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        model(batch.images, None, batch.image_sizes)
    width = seen[0][..., 2] - seen[0][..., 0]
    moved = (seen[0][..., 0] + 0.1 * width).clamp(max=96)
    torch.testing.assert_close(seen[1][..., 0], moved, rtol=1e-4, atol=1e-3)
    model.train()
    seen.clear()
    losses = model(batch.images, batch.targets, batch.image_sizes)
    assert losses["s1.loss_cls"].isfinite()
    given = [(boxes[0, :, None] == batch.targets.boxes[0, :2]).all(-1).sum(0).tolist() for boxes in seen]
    assert given == [[1, 1]] * 3, "the objects are among the boxes of each stage once"


def test_the_names_of_mmdetections_cascade_mask_r_cnn_are_read():
    torch.manual_seed(0)
    model = Network(CascadeMaskRcnn(**RCNN), ["a", "b"])
    theirs = {
        "roi_head.bbox_head.2.fc_reg.bias": "box_heads.2.reg.bias",
        "roi_head.bbox_head.0.shared_fcs.1.weight": "box_heads.0.fcs.1.weight",
        "roi_head.mask_head.1.convs.0.conv.weight": "mask_heads.1.convs.0.conv.weight",
        "roi_head.mask_head.1.upsample.bias": "mask_heads.1.upsample.bias",
        "roi_head.mask_head.2.conv_logits.weight": "mask_heads.2.logits.weight",
        "rpn_head.rpn_cls.weight": "head.cls.weight",
    }
    assert set(theirs.values()) <= model.state_dict().keys()
    assert list(renamed(dict.fromkeys(theirs), model.key_maps["MMDetection"])) == list(theirs.values())
    assert model.class_outputs.keys() >= {"mask_heads.2.logits.bias", "box_heads.1.cls.weight"}
    assert not any("reg" in name for name in model.class_outputs), "a box is one for all classes"


# what the points of FCOS are and how they score


def points_of(**options: Any) -> Any:
    return Fcos(backbone=SMALL["backbone"], neck=Fpn(channels=16, extra=0), head=Towers(convs=0), **options)


def test_the_factors_of_the_levels_of_fcos_may_be_left_out():
    assert len(Network(points_of(), ["a"]).head.scales) == 1
    assert not len(Network(points_of(scaled=False), ["a"]).head.scales)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [84.0, 52.0]), ({"offset": 0.25}, [82.0, 50.0]), ({"offset": 0.0, "fitted": True}, [90.0, 54.0])],
)
def test_the_points_of_fcos_lie_where_asked_for(options: Any, expected: list[float]):
    """Of a map of 7 x 11 for 63 x 99 pixels: strides of 8, or 9 pixels between points."""
    outputs = {name: [torch.zeros(1, count, 7, 11)] for name, count in (("cls", 1), ("reg", 4), ("centreness", 1))}
    maps = Maps([torch.zeros(1, 1, 7, 11)], outputs, (8,), (63, 99))
    found = points_of(**options).detected(maps, None)
    assert found.boxes[0, -1, :2].tolist() == expected


@pytest.mark.parametrize(("score", "scores", "factor"), [("product", [0.8], [0.5]), ("root", [0.4**0.5], None)])
def test_the_scores_of_fcos_are_made_as_asked_for(score: Any, scores: list[float], factor: Any):
    outputs = {"cls": torch.full((1, 1, 1, 1), math.log(4)), "reg": torch.zeros(1, 4, 1, 1)}
    outputs["centreness"] = torch.zeros(1, 1, 1, 1)
    maps = Maps([torch.zeros(1, 1, 1, 1)], {name: [one] for name, one in outputs.items()}, (8,), (8, 8))
    found = points_of(score=score).detected(maps, None)
    assert found.scores[0, 0].tolist() == pytest.approx(scores)
    assert factor == (None if found.factor is None else found.factor[0].tolist())
