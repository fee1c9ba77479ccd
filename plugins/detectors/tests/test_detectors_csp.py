"""The parts that YOLOX and RTMDet are made of: what each of their options changes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detkernel import ConfigError, Span
from detkernel_detection import Target, batching
from detkernel_detection.parts import Output
from detkernel_detection.weights import load_into, read_weights
from detkernel_detectors.backbones import CspDarknet, Cspnext
from detkernel_detectors.blocks import BatchNorm, CspLayer, CspnextBlock, DarknetBlock, SpatialPyramidPooling
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.heads import LevelTowers
from detkernel_detectors.losses.boxes import L1, Iou
from detkernel_detectors.losses.classes import CrossEntropy
from detkernel_detectors.models.dense import Candidates
from detkernel_detectors.models.network import Network
from detkernel_detectors.models.rtmdet import Rtmdet
from detkernel_detectors.models.yolox import Yolox
from detkernel_detectors.necks import CspPafpn
from torch import nn

OUTPUTS = [Output("cls", 5, "cls", bias=-2.0), Output("reg", 4, "reg")]
MAKERS = {
    "csp_darknet": lambda **options: CspDarknet(width=0.125, depth=0.1, **options).build(),
    "cspnext": lambda **options: Cspnext(width=0.125, depth=0.1, **options).build(),
    "csp_pafpn": lambda **options: CspPafpn(channels=4, blocks=1, **options).build([4, 8], [8, 16]),
    "level_towers": lambda **options: LevelTowers(channels=4, **options).build(4, 2, OUTPUTS),
}


@pytest.mark.parametrize("name", MAKERS)
def test_batch_norm_is_made_as_asked_for(name: str):
    usual = (1e-3, 0.03) if name == "csp_darknet" else (1e-5, 0.1)
    for options, expected in (({}, usual), ({"norm_eps": 0.5, "norm_momentum": 0.25}, (0.5, 0.25))):
        norms = [module for module in MAKERS[name](**options).modules() if isinstance(module, nn.BatchNorm2d)]
        assert {(norm.eps, norm.momentum) for norm in norms} == {expected}


@pytest.mark.parametrize(
    ("kind", "depth", "blocks"),
    [(CspDarknet, 1.0, [3, 9, 9, 3]), (CspDarknet, 0.33, [1, 3, 3, 1]), (Cspnext, 1.0, [3, 6, 6, 3])],
)
def test_depth_and_width_of_the_backbones(kind: Any, depth: float, blocks: list[int]):
    with torch.device("meta"):
        model = kind(depth=depth, width=0.25).build()
    layers = [layer for layer in model.modules() if isinstance(layer, CspLayer)]
    assert [len(layer.blocks) for layer in layers] == blocks
    assert [layer.blocks[0].identity for layer in layers] == [True, True, True, False]
    assert {type(layer.blocks[0]) for layer in layers} == {DarknetBlock if kind is CspDarknet else CspnextBlock}
    assert (model.channels, model.strides) == ([64, 128, 256], [8, 16, 32])
    found = model(torch.empty(1, 3, 64, 96, device="meta"))
    assert [tuple(one.shape[1:]) for one in found.values()] == [(64, 8, 12), (128, 4, 6), (256, 2, 3)]


@pytest.mark.parametrize(
    ("width", "depth", "blocks", "millions"), [(0.375, 0.167, 1, 4.90), (0.5, 0.33, 1, 8.89), (1.0, 1.0, 3, 52.32)]
)
def test_rtmdet_has_as_many_parameters_as_published(width: float, depth: float, blocks: int, millions: float):
    channels = int(256 * width)
    with torch.device("meta"):
        plugin = Rtmdet(
            backbone=Cspnext(depth=depth, width=width),
            neck=CspPafpn(channels=channels, blocks=blocks),
            head=LevelTowers(channels=channels),
        )
        model = Network(plugin, [str(number) for number in range(80)])
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_pooling_sees_5_9_and_13_pixels():
    model = SpatialPyramidPooling(2, BatchNorm(1e-5, 0.1))
    x = torch.randn(1, 2, 20, 20)
    seen: list[torch.Tensor] = []
    model.conv2.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    model.eval()(x)
    first = model.conv1(x)
    expected = [first, *(nn.functional.max_pool2d(first, size, 1, size // 2) for size in (5, 9, 13))]
    torch.testing.assert_close(seen[0], torch.cat(expected, 1))


@pytest.mark.parametrize("kind", [CspDarknet, Cspnext])
def test_weights_of_a_backbone_are_read_from_a_file(kind: Any, tmp_path: Path):
    """A classifier of MMPretrain: its names begin with `backbone.`, and it has a head that is left out."""
    options: dict[str, Any] = {"width": 0.125, "depth": 0.1}
    other = kind(**options).build()
    tensors = {f"backbone.{name}": value for name, value in other.state_dict().items()}
    torch.save({"state_dict": {**tensors, "head.fc.weight": torch.zeros(9, 9)}}, tmp_path / "w.pth")
    model = kind(**options, weights=str(tmp_path / "w.pth")).build()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match=r"weights: there is no file 'none\.pth'"):
        kind(**options, weights="none.pth").build()


@pytest.mark.parametrize("block", ["cspnext", "darknet"])
def test_options_of_the_path_aggregation(block: Any):
    neck: Any = CspPafpn(channels=6, blocks=2, block=block, last_size=1).build([4, 8, 16], [8, 16, 32])
    layers = [layer for layer in neck.modules() if isinstance(layer, CspLayer)]
    assert len(layers) == 4
    assert all(len(layer.blocks) == 2 and not layer.blocks[0].identity for layer in layers)
    assert {type(layer.blocks[0]) for layer in layers} == {DarknetBlock if block == "darknet" else CspnextBlock}
    assert {conv.conv.kernel_size for conv in neck.out_convs} == {(1, 1)}
    odd = [torch.randn(2, 4, 9, 7), torch.randn(2, 8, 5, 4), torch.randn(2, 16, 3, 2)]
    assert [tuple(one.shape[1:]) for one in neck(odd)] == [(6, 9, 7), (6, 5, 4), (6, 3, 2)]
    assert (neck.channels, neck.strides) == (6, [8, 16, 32])
    assert CspPafpn().build([4], [8]).out_convs[0].conv.kernel_size == (3, 3)  # type: ignore[union-attr,operator,index]


@pytest.mark.parametrize("share", [True, False])
def test_levels_share_convolutions_and_never_norms(share: bool):
    head: Any = LevelTowers(convs=3, channels=6, share=share).build(4, 2, OUTPUTS)
    for tower in (head.cls_tower, head.reg_tower):
        assert [[conv.in_channels for conv in convs] for convs in tower.convs] == [[4, 6, 6]] * (1 if share else 2)
        assert [len(norms) for norms in tower.norms] == [3, 3]
    maps = [torch.randn(2, 4, 6, 6)] * 2
    found = head(maps)
    assert [tuple(one.shape[1:]) for one in found["cls"]] == [(5, 6, 6)] * 2
    nn.init.constant_(head.cls_tower.norms[1][0].bias, 3.0)
    nn.init.constant_(head.reg[0].bias, 7.0)
    other = head(maps)
    assert torch.equal(found["cls"][0], other["cls"][0])
    assert not torch.equal(found["cls"][1], other["cls"][1])
    torch.testing.assert_close(other["reg"][0], found["reg"][0] + 7)
    assert torch.equal(found["reg"][1], other["reg"][1])
    nn.init.zeros_(head.cls_tower.convs[0][0].weight)
    changed = head(maps)
    assert not torch.equal(changed["cls"][0], other["cls"][0])
    assert torch.equal(changed["cls"][1], other["cls"][1]) != share


@pytest.mark.parametrize(("deviation", "expected"), [(0.01, 0.01), (0.3, 0.3), (None, (1 / (3 * 64 * 9)) ** 0.5)])
def test_how_the_weights_of_the_head_begin(deviation: float | None, expected: float):
    torch.manual_seed(0)
    head: Any = LevelTowers(convs=2, channels=64, deviation=deviation).build(64, 1, OUTPUTS)
    assert head.cls_tower.convs[0][0].weight.std().item() == pytest.approx(expected, rel=0.05)
    assert head.cls[0].bias.tolist() == [-2] * 5
    assert head.reg[0].bias.tolist() == [0] * 4


def small(**options: Any) -> Any:
    torch.manual_seed(0)
    parts: Any = {
        "backbone": Cspnext(depth=0.1, width=0.125),
        "neck": CspPafpn(channels=8, blocks=1),
        "head": LevelTowers(convs=1, channels=8),
    }
    return Network(Rtmdet(**{**parts, **options}), ["a", "b"]).eval()


@pytest.mark.parametrize(("distance", "side"), [("exponential", 8 * 2.718281828), ("linear", 8.0)])
def test_what_rtmdets_distances_are_told_in(distance: Any, side: float):
    """A head that gives 1 everywhere: at stride 8 the boxes reach one stride, or e of them, from their points."""
    model = small(distance=distance)
    for conv in model.head.reg:
        nn.init.zeros_(conv.weight)
        nn.init.ones_(conv.bias)
    with torch.no_grad():
        maps = model.forward_outputs(torch.randn(1, 3, 64, 64))
    boxes = model.family.detected(maps, None).boxes[0]
    torch.testing.assert_close(boxes[:2], torch.tensor([[-side, -side, side, side], [8 - side, -side, 8 + side, side]]))


def test_rtmdets_weights_are_read_by_mmdetections_names(tmp_path: Path):
    """Its state dict repeats the shared convolutions for every level."""
    model = small()
    theirs = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] != "head":
            theirs[name] = value + 1
        elif parts[1] in ("cls", "reg"):
            theirs[f"bbox_head.rtm_{parts[1]}.{'.'.join(parts[2:])}"] = value + 1
        else:
            branch, kind, level, number, leaf = parts[1].removesuffix("_tower"), *parts[2:]
            for at in range(3) if kind == "convs" else [int(level)]:
                layer = "conv" if kind == "convs" else "bn"
                theirs[f"bbox_head.{branch}_convs.{at}.{number}.{layer}.{leaf}"] = value + 1
    torch.save({"state_dict": theirs, "meta": {"dataset_meta": {"classes": ["b", "a"]}}}, tmp_path / "theirs.pth")
    expected = {name: value + 1 for name, value in model.state_dict().items()}
    for name in [name for name in expected if name.startswith("head.cls.")]:
        expected[name] = expected[name].flip(0)
    load_into(model, read_weights(tmp_path / "theirs.pth"), model.classes)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def yolox(**options: Any) -> Any:
    torch.manual_seed(0)
    parts: Any = {
        "backbone": CspDarknet(depth=0.1, width=0.125),
        "neck": CspPafpn(channels=8, blocks=1, block="darknet", last_size=1),
        "head": LevelTowers(convs=1, channels=8, share=False, deviation=None),
    }
    return Network(Yolox(**{**parts, **options}), ["a", "b"]).eval()


def constant(model: Any, **outputs: float) -> Any:
    """Outputs that are the same everywhere."""
    for name, value in outputs.items():
        for conv in getattr(model.head, name):
            nn.init.zeros_(conv.weight)
            nn.init.constant_(conv.bias, value)
    return model


BATCH = batching.make_batch(
    torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
    [Target(torch.tensor([[20.0, 20, 44, 44]]), torch.tensor([1]))],
    sizes=[(64, 64)],
)


def losses_of(model: Any) -> dict[str, float]:
    with torch.no_grad():
        losses = model(BATCH.images, BATCH.targets, BATCH.image_sizes)
    return {name: loss.item() for name, loss in losses.items()}


def test_the_losses_of_yolox_are_those_asked_for():
    """Every probability is a half, and every box a square of one stride around its point. One point is positive: that
    of stride 16 at (32, 32), whose square covers 4/9 of the object."""
    usual = losses_of(constant(yolox(), cls=0.0, reg=0.0, objectness=0.0))
    assert usual["loss_cls"] == pytest.approx(2 * math.log(2), rel=1e-5)
    assert usual["loss_obj"] == pytest.approx((64 + 16 + 4) * math.log(2), rel=1e-5)
    assert usual["loss_bbox"] == pytest.approx(5 * (1 - (4 / 9) ** 2), rel=1e-5)
    options: dict[str, Any] = {"class_loss": CrossEntropy(weight=3.0), "box_loss": Iou(form="linear")}
    other = losses_of(constant(yolox(**options, objectness_weight=0.5), cls=0.0, reg=0.0, objectness=0.0))
    assert other["loss_cls"] == pytest.approx(3 * usual["loss_cls"])
    assert other["loss_obj"] == pytest.approx(usual["loss_obj"] / 2)
    assert other["loss_bbox"] == pytest.approx(1 - 4 / 9)


def test_yolox_has_its_second_box_loss_from_where_it_is_asked_for():
    model = constant(
        yolox(further_from=Span(1, "epochs"), further_box_loss=L1(weight=3.0)), cls=0.0, reg=0.0, objectness=0.0
    )
    found = []
    for iteration in (0, 4, 5, 9):
        model.family.before_train_iter(SimpleNamespace(iter=iteration, epoch_length=5))
        found.append(losses_of(model).get("loss_l1"))
    assert found == [None, None, *[pytest.approx(3 * 2 * math.log(24 / 16))] * 2]
    model = yolox()
    model.family.before_train_iter(SimpleNamespace(iter=9, epoch_length=5))
    assert "loss_l1" not in losses_of(model)


def test_a_point_of_yolox_detects_its_best_class_alone():
    """Of two classes as likely, and by the product with the objectness."""
    model = constant(yolox(score_thresh=0.2, nms_thresh=1.0), cls=0.0, reg=0.0, objectness=0.0)
    with torch.no_grad():
        found = model(BATCH.images, None, BATCH.image_sizes)
    assert found.valid.sum() == 64 + 16 + 4
    assert found.scores[found.valid].tolist() == pytest.approx([0.25] * 84)
    assert found.boxes.min() == 0, "clipped to the image"


def test_yolox_clips_boxes_after_nms():
    """Two boxes that are the same within the image and not beyond it are both detected."""
    boxes = torch.tensor([[[-64.0, 0, 10, 10], [0.0, 0, 10, 10]]])
    family = yolox(score_thresh=0.2, nms_thresh=0.5).family
    scores, labels = torch.tensor([[[0.9], [0.8]]]), torch.tensor([[1, 1]])
    for clipped, expected in ((False, 2), (True, 1)):
        given = Candidates(scores, boxes, [2], labels=labels, clipped=clipped)
        family.detected = lambda maps, sizes, given=given: given
        found = family.predictions(None, torch.tensor([[64, 64]]))
        assert found.valid.sum() == expected
        assert found.boxes.min() == 0
        assert found.labels[found.valid].tolist() == [1] * expected


def test_the_bound_of_the_coder():
    anchor, deltas = torch.tensor([-5.0, -5, 5, 5]), torch.tensor([0.0, 0.0, 6.0, -6.0])
    assert DeltaCoder().decode(anchor, deltas)[2].item() == pytest.approx(5 * 62.5)
    assert DeltaCoder(bound=20.0).decode(anchor, deltas)[2].item() == pytest.approx(5 * math.exp(6.0))
    assert DeltaCoder(bound=0.5).decode(anchor, deltas)[3].item() == pytest.approx(5 * math.exp(-0.5))


def test_yolox_has_as_many_parameters_as_published():
    with torch.device("meta"):
        model = Network(Yolox(), [str(number) for number in range(80)])
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(54.21, abs=0.01)
