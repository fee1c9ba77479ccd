"""The parts that YOLOv3 is made of: MMDetection's numbers for them, and what each option changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import ConfigError
from detkernel_detection import Target, batching
from detkernel_detection.parts import Output
from detkernel_detection.structures import Targets
from detkernel_detection.weights import load_into, read_weights
from detkernel_detectors.assigners.grid import GridAssigner
from detkernel_detectors.backbones import Darknet, Resnet
from detkernel_detectors.coders.yolo import YoloCoder
from detkernel_detectors.heads import Towers, YoloHead
from detkernel_detectors.losses.boxes import L1, Giou, SquaredError
from detkernel_detectors.models.network import Network
from detkernel_detectors.models.retinanet import Retinanet
from detkernel_detectors.models.yolov3 import Yolov3
from detkernel_detectors.necks import Fpn, YoloNeck
from detkernel_detectors.priors import GridAnchors, grid_anchors
from torch import Tensor, nn

SIZES: Any = [[(12.0, 12.0), (40.0, 24.0)], [(30.0, 30.0), (60.0, 60.0)]]


def small(**options: Any) -> Any:
    """Two levels, of strides 8 and 16, and two classes."""
    torch.manual_seed(0)
    parts: Any = {
        "backbone": Resnet(depth=18, channels=4, stages=3),
        "neck": YoloNeck(channels=[4, 6]),
        "head": YoloHead(channels=[8, 10]),
        "anchors": GridAnchors(sizes=SIZES),
    }
    return Network(Yolov3(**{**parts, **options}), ["a", "b"]).eval()


def priors_of(*sizes: list[tuple[float, float]], side: int = 32, images: int = 1) -> Any:
    strides = [8 * 2**level for level in range(len(sizes))]
    maps = [torch.zeros(images, 1, side // stride, side // stride) for stride in strides]
    return grid_anchors(GridAnchors(sizes=list(sizes)), maps, strides, torch.full((images, 2), 1e4))


# backbone, neck and head


def test_darknet_is_as_large_as_published():
    """YOLOv3 for COCO has 61.95 million parameters, of which 40.58 are Darknet-53's without its classifier."""
    with torch.device("meta"):
        model = Network(Yolov3(), [str(number) for number in range(80)])
    counts = [sum(one.numel() for one in module.parameters()) for module in (model.backbone, model)]
    assert counts == [40_584_928, 61_949_149]
    found = model.backbone(torch.empty(1, 3, 64, 96, device="meta"))
    assert [tuple(one.shape[1:]) for one in found.values()] == [(256, 8, 12), (512, 4, 6), (1024, 2, 3)]
    assert (model.backbone.channels, model.backbone.strides) == ([256, 512, 1024], [8, 16, 32])
    assert model.neck.channels == [128, 256, 512]
    convs = [module for module in model.backbone.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 52, "and a classifier"


def test_stages_of_darknet_are_frozen_from_the_first_on():
    for trained, expected in ((5, set()), (4, {"conv1", "conv_res_block1"}), (0, None)):
        model: Any = Darknet(channels=2, trainable_layers=trained).build()
        frozen = {name.split(".")[0] for name, one in model.named_parameters() if not one.requires_grad}
        every = {name.split(".")[0] for name, _ in model.named_parameters()}
        assert frozen == (every if expected is None else expected)


def test_darknets_weights_are_read_from_a_file_and_its_statistics_kept(tmp_path: Path):
    other: Any = Darknet(channels=2).build()
    torch.save(
        {"state_dict": {f"backbone.{name}": one for name, one in other.state_dict().items()}}, tmp_path / "w.pth"
    )
    model: Any = Darknet(channels=2, weights=str(tmp_path / "w.pth")).build()
    assert all(torch.equal(one, other.state_dict()[name]) for name, one in model.state_dict().items())
    assert not model.train().conv1.bn.training, "eval with weights"
    assert other.train().conv1.bn.training, "batch without"
    assert Darknet(channels=2, norm="group").build().conv1.bn.num_groups == 2  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"weights: there is no file 'none\.pth'"):
        Darknet(weights="none.pth").build()


def test_the_neck_joins_maps_of_odd_sizes_coarse_to_fine():
    neck: Any = YoloNeck(channels=[4, 6], norm_eps=0.5, norm_momentum=0.25).build([3, 5, 7], [4, 8, 16])
    assert (neck.channels, neck.strides) == ([4, 6], [8, 16])
    maps = [torch.randn(2, 3, 17, 13), torch.randn(2, 5, 9, 7), torch.randn(2, 7, 5, 4)]
    assert [tuple(one.shape[1:]) for one in neck(maps)] == [(4, 9, 7), (6, 5, 4)]
    assert [conv.conv.in_channels for conv in neck.detect1] == [7, 6, 12, 6, 12]
    assert [conv.conv.in_channels for conv in neck.detect2] == [5 + 4, 4, 8, 4, 8]
    assert (neck.conv1.conv.in_channels, neck.conv1.conv.out_channels) == (6, 4)
    norms = [module for module in neck.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(0.5, 0.25)}
    before = neck.eval()(maps)
    maps[2] += 1
    assert not torch.equal(neck(maps)[0], before[0]), "the finer sees the coarser"
    maps[1] += 1
    assert torch.equal(neck(maps)[1], neck([maps[0], maps[1] + 1, maps[2]])[1]), "and not the other way"


def test_the_head_has_convolutions_of_its_own_for_each_level():
    outputs = [Output("cls", 3, "cls", bias=-2.0), Output("reg", 4, "reg")]
    options = YoloHead(channels=[8, 6], deviation=0.1, norm_eps=0.5, norm_momentum=0.25)
    head: Any = options.build([4, 5], 2, outputs)
    found = head([torch.randn(2, 4, 6, 6), torch.randn(2, 5, 3, 3)])
    assert [tuple(one.shape[1:]) for one in found["cls"]] == [(3, 6, 6), (3, 3, 3)]
    assert [tuple(one.shape[1:]) for one in found["reg"]] == [(4, 6, 6), (4, 3, 3)]
    assert [(norm.eps, norm.momentum) for norm in (level.bn for level in head.bridge)] == [(0.5, 0.25)] * 2
    assert [conv.bias.tolist() for conv in head.cls] == [[-2.0] * 3] * 2
    assert head.bridge[0].conv.weight.std().item() == pytest.approx(0.1, rel=0.2)
    assert [level.conv.in_channels for level in options.build(7, 2, outputs).bridge] == [7, 7]  # type: ignore[union-attr]


def test_a_level_expects_eight_objects_at_first():
    model = small()
    for conv, stride in zip(model.head.pred, (8, 16), strict=True):
        for box in conv.bias.view(2, 7):
            assert box[:4].tolist() == [0] * 4
            assert (608 / stride) ** 2 * box[4].sigmoid().item() == pytest.approx(8, rel=1e-4)
            assert box[5:].sigmoid().tolist() == pytest.approx([0.01] * 2)


# anchors, box coder, assigner and loss


def test_grid_anchors(parts: dict[str, Tensor]):
    options = GridAnchors()
    for level, stride in enumerate((8, 16, 32)):
        one = GridAnchors(sizes=[options.sizes[level]])
        base = grid_anchors(one, [torch.zeros(1, 1, 1, 1)], [stride], torch.full((1, 2), 1e4))
        torch.testing.assert_close(base.boxes, parts[f"anchors.yolov3.base.{2 - level}"])
    coarse = grid_anchors(one, [torch.zeros(1, 1, 2, 3)], [32], torch.tensor([[64.0, 64.0]]))
    torch.testing.assert_close(coarse.boxes, parts["anchors.yolov3.grid.0"])
    assert coarse.valid[0].tolist() == parts["anchors.yolov3.valid.0"].tolist()
    assert (coarse.counts, set(coarse.strides.tolist())) == ((18,), {32.0})


def test_yolo_coder(parts: dict[str, Tensor]):
    coder, priors, strides = YoloCoder(), parts["delta.priors"], torch.full((12,), 16.0)
    torch.testing.assert_close(coder.decode(priors, parts["yolo.pred"], strides), parts["yolo.decode"])
    torch.testing.assert_close(coder.encode(priors, parts["delta.boxes"], strides), parts["yolo.encode"])
    inside = torch.tensor([[10.0, 10, 30, 50]])
    prior, stride = torch.tensor([[0.0, 0, 40, 40]]), torch.tensor([64.0])
    there = coder.encode(prior, inside, stride)
    torch.testing.assert_close(there[0, :2], torch.tensor([0.5, 0.5 + 10 / 64]))
    torch.testing.assert_close(coder.decode(prior, there, stride), inside)
    far = torch.tensor([[0.5, 0.5, 90.0, 90.0]])
    width = YoloCoder(bound=2.0).decode(prior, far, stride)
    assert (width[0, 2] - width[0, 0]).item() == pytest.approx(40 * math.exp(2))


def matched(assigner: GridAssigner, priors: Any, boxes: list[list[float]], room: int = 4) -> list[int]:
    """0 background, k + 1 the object k, -1 ignored. Beside the objects there are others that do not exist."""
    truth = torch.tensor([[0.0, 0, 8, 8]]).repeat(room, 1)
    truth[: len(boxes)] = torch.tensor(boxes).view(-1, 4)
    targets = Targets(truth[None], torch.zeros(1, room, dtype=torch.int64), torch.arange(room)[None] < len(boxes))
    found = assigner.assign(priors, targets)
    assert not (found.positive & found.negative).any()
    return torch.where(found.positive, found.matched + 1, torch.where(found.negative, 0, -1))[0].tolist()


def test_grid_assigner():
    """By hand: 4 x 4 cells of stride 8, each with an anchor of 16 x 16 and one of 16 x 12."""
    priors = priors_of([(16.0, 16.0), (16.0, 12.0)])
    cell = 2 * (4 + 1)  # row 1, column 1, whose middle is (12, 12)
    assert matched(GridAssigner(), priors, []) == [0] * 32
    one = matched(GridAssigner(), priors, [[4.0, 4, 20, 20]])
    assert one[cell : cell + 2] == [1, 1], "the best, and one of IoU 3/4 in the same cell"
    assert set(one[:cell] + one[cell + 2 :]) == {0}, "of an IoU of a third or less"
    strict = matched(GridAssigner(positive=0.8), priors, [[4.0, 4, 20, 20]])
    assert strict[cell : cell + 2] == [1, -1], "neither positive nor background"
    assert matched(GridAssigner(positive=0.8, negative=0.8), priors, [[4.0, 4, 20, 20]])[cell : cell + 2] == [1, 0]
    beside = matched(GridAssigner(negative=0.3), priors, [[4.0, 4, 20, 20]])
    assert [number for number, state in enumerate(beside) if state == -1] == [cell - 8, cell - 2, cell + 2, cell + 8]
    tiny = [[11.0, 11, 13, 13]]
    assert matched(GridAssigner(), priors, tiny)[cell : cell + 2] == [0, 1], "however little it overlaps"
    assert set(matched(GridAssigner(best=0.5), priors, tiny)) == {0}


def test_anchors_that_overlap_an_object_alike_are_all_its_own_and_of_several_the_last_ones():
    priors = priors_of([(16.0, 8.0), (8.0, 16.0)])
    first, second = [8.0, 8, 16, 16], [4.0, 8, 20, 16]  # of one cell, and the second is the first anchor
    cell = 2 * (4 + 1)
    assert matched(GridAssigner(), priors, [first])[cell : cell + 2] == [1, 1]
    assert matched(GridAssigner(), priors, [first, second])[cell : cell + 2] == [2, 1]
    assert matched(GridAssigner(), priors, [second, first])[cell : cell + 2] == [2, 2]


def test_an_object_is_the_best_anchors_of_all_levels():
    priors = priors_of([(8.0, 8.0)], [(24.0, 24.0)])
    states = matched(GridAssigner(), priors, [[2.0, 2, 8, 8], [6.0, 6, 28, 28]])
    assert [(number, state) for number, state in enumerate(states) if state > 0] == [(0, 1), (19, 2)]


def test_squared_error():
    one, other = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[2.0, 4, 3, 1]])
    assert SquaredError()(one, other).tolist() == [14]
    assert SquaredError(weight=2.0)(one[:, :2], other[:, :2]).tolist() == [10]


# the family


def batch() -> Any:
    torch.manual_seed(1)
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    boxes = torch.tensor([[4.0, 6, 40, 30], [30.0, 20, 60, 60]])
    return batching.make_batch(images, [Target(boxes, torch.tensor([0, 1])), Target(boxes[:1], torch.tensor([1]))])


def losses_of(**options: Any) -> dict[str, float]:
    given = batch()
    with torch.no_grad():
        found = small(**options).train()(given.images, given.targets, given.image_sizes)
    return {name: loss.item() for name, loss in found.items()}


def test_each_loss_has_a_weight_of_its_own():
    usual = losses_of()
    assert set(usual) == {"loss_cls", "loss_conf", "loss_xy", "loss_wh"}
    changes: dict[str, dict[str, Any]] = {
        "loss_conf": {"objectness_weight": 2.0},
        "loss_xy": {"centre_weight": 4.0},
        "loss_wh": {"size_loss": SquaredError(weight=4.0)},
    }
    for name, options in changes.items():
        assert losses_of(**options) == pytest.approx({**usual, name: 2 * usual[name]})
    other = losses_of(size_loss=L1())
    assert other["loss_wh"] != usual["loss_wh"]
    assert other == pytest.approx({**usual, "loss_wh": other["loss_wh"]})


def test_what_is_detected():
    """By objectness, then the best pairs of all levels by the class alone; scores are the product of both."""
    model = small(nms_thresh=1.0, min_size=None)
    for conv in model.head.pred:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    fine, coarse = (conv.bias.data.view(2, 7) for conv in model.head.pred)
    fine[:, 4], coarse[:, 4] = torch.logit(torch.tensor(0.3)), torch.logit(torch.tensor(0.2))
    fine[:, 5:], coarse[:, 5:] = torch.logit(torch.tensor(0.5)), torch.logit(torch.tensor(0.9))
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    def scores(**options: Any) -> list[float]:
        for name, value in options.items():
            setattr(model.family, name, value)
        with torch.no_grad():
            found = model(images)
        return sorted({round(value, 4) for value in found.scores[found.valid].tolist()})

    assert scores() == [0.15, 0.18]
    assert scores(score_thresh=0.5) == [0.18]
    assert scores(score_thresh=0.05, objectness_thresh=0.25) == [0.15]
    assert scores(objectness_thresh=0.005, candidates=16) == [0.18], "of 2 x 2 places, two anchors and two classes"
    assert scores(candidates=17) == [0.15, 0.18]


def test_weights_are_read_by_mmdetections_names(tmp_path: Path):
    """Its levels are counted from the coarsest, and classes lie behind the box of every anchor."""
    sizes: Any = [[(8.0, 8.0)] * 2] * 3
    model = small(
        backbone=Resnet(depth=18, channels=4), neck=YoloNeck(channels=[4, 6, 8]), head=YoloHead(channels=[4, 6, 8]),
        anchors=GridAnchors(sizes=sizes),
    )  # fmt: skip
    theirs = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "head":
            name = ".".join(["bbox_head", f"convs_{parts[1]}", str(2 - int(parts[2])), *parts[3:]])
        theirs[name] = value + 1
    torch.save({"state_dict": theirs, "meta": {"dataset_meta": {"classes": ["b", "a"]}}}, tmp_path / "theirs.pth")
    expected = {name: value + 1 for name, value in model.state_dict().items()}
    for name in [name for name in expected if name.startswith("head.pred.")]:
        expected[name] = expected[name][[0, 1, 2, 3, 4, 6, 5, 7, 8, 9, 10, 11, 13, 12]]
    load_into(model, read_weights(tmp_path / "theirs.pth"), model.classes)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_maps_of_one_width_are_taken_too():
    model = small(neck=Fpn(channels=5, extra=0))
    assert [level.conv.in_channels for level in model.head.bridge] == [5, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"neck": YoloNeck(channels=[4] * 4)},
            r"YoloNeck: channels: expected at most 3, as many as",
        ),
        ({"neck": YoloNeck(channels=[4])}, r"anchors: sizes: the neck has 1 level"),
        (
            {"head": YoloHead(channels=[4])},
            r"YoloHead: channels: expected 2, one for each level of the neck, got",
        ),
        (
            {"head": Towers(channels=8)},
            r"neck: it gives maps of 4, 6 channels, and the head Towers takes",
        ),
        ({"size_loss": Giou()}, r"size_loss: Giou compares boxes, not numbers of the box coder"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        small(**options)


def test_a_neck_of_several_widths_is_refused_by_other_families():
    with pytest.raises(ConfigError, match="and the head Towers takes maps of equal channels"):
        Network(Retinanet(backbone=Resnet(depth=18, channels=4), neck=YoloNeck(channels=[4, 6, 8])), ["a"])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "as many anchors at each level, and at least one, got \\[\\]"),
        ([[]], "as many anchors at each level, and at least one, got \\[0\\]"),
        ([[(8.0, 8.0)], [(8.0, 8.0)] * 2], "got \\[1, 2\\]"),
        ([[(8.0, -8.0)]], "expected numbers above 0, got -8"),
    ],
)
def test_sizes_that_are_no_anchors_are_refused(sizes: Any, message: str):
    with pytest.raises(ValueError, match=message):
        GridAnchors(sizes=sizes)
    with pytest.raises(ValueError, match="channels: expected at least one"):
        YoloNeck(channels=[])
