"""Each part against MMDetection's numbers for it, and its options by their effect."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from detkernel import ConfigError, Span
from detkernel_detection import boxes
from detkernel_detection.nms import suppressed
from detkernel_detection.parts import Predicted, Priors, Queries
from detkernel_detection.structures import Targets
from detkernel_detectors.assigners.atss import AtssAssigner
from detkernel_detectors.assigners.dynamic import DynamicSoftLabel, SimOta
from detkernel_detectors.assigners.hungarian import FocalCost, GiouCost, HungarianAssigner, L1Cost, SoftmaxCost
from detkernel_detectors.assigners.max_iou import MaxIouAssigner
from detkernel_detectors.assigners.points import FcosAssigner
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.coders.distance import DistanceCoder, centreness, distances
from detkernel_detectors.heads.rcnn import levels_of, pooled_of
from detkernel_detectors.losses.boxes import L1, Ciou, Diou, Giou, Iou, SmoothL1
from detkernel_detectors.losses.classes import CrossEntropy, Focal, QualityFocal, Softmax
from detkernel_detectors.losses.distribution import distribution_focal, expected
from detkernel_detectors.losses.sums import averaged
from detkernel_detectors.priors import Anchors, anchors, points
from torch import Tensor
from torchvision.ops import roi_align

SIZES = [(25, 30), (13, 15), (7, 8)]
"""Of the maps for which the reference assigns, of strides 8, 16 and 32."""


def maps_of(*sizes: tuple[int, int], images: int = 1) -> list[Tensor]:
    return [torch.zeros(images, 1, *size) for size in sizes]


def whole(images: int = 1) -> Tensor:
    return torch.full((images, 2), 1e4)


ANCHORS = {
    "rpn": (Anchors(), 4),
    "retinanet": (Anchors(scales=[4.0], octaves=3), 8),
    "atss": (Anchors(ratios=[1.0]), 8),
}


@pytest.mark.parametrize("name", ANCHORS)
def test_anchors(name: str, parts: dict[str, Tensor]):
    options, stride = ANCHORS[name]
    inside = torch.tensor([[stride + 1.0, stride * 2.0]])
    made = anchors(options, maps_of((2, 3)), [stride], inside)
    torch.testing.assert_close(made.boxes, parts[f"anchors.{name}.grid.0"])
    assert made.valid[0].tolist() == parts[f"anchors.{name}.valid.0"].tolist()
    for level in range(5):
        stride_here = stride * 2**level
        one = anchors(options, maps_of((1, 1)), [stride_here], whole())
        torch.testing.assert_close(one.boxes, parts[f"anchors.{name}.base.{level}"])
        assert set(one.strides.tolist()) == {float(stride_here)}


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_points(offset: float, parts: dict[str, Tensor]):
    made = points(maps_of((2, 3), (1, 2)), [8, 16], whole(), offset)
    expected = parts[f"points.offset{offset}.0"]
    torch.testing.assert_close(made.boxes[:6], expected[:, :2].repeat(1, 2))
    assert made.strides.tolist() == [8.0] * 6 + [16.0] * 2
    assert made.counts == (6, 2)


@pytest.mark.parametrize(("name", "options"), [("plain", {}), ("stds", {"stds": (0.1, 0.1, 0.2, 0.2)})])
def test_delta_coder(name: str, options: Any, parts: dict[str, Tensor]):
    coder, priors = DeltaCoder(**options), parts["delta.priors"]
    torch.testing.assert_close(coder.encode(priors, parts["delta.boxes"]), parts[f"delta.{name}.encode"])
    decoded = coder.decode(priors, parts["delta.deltas"])
    clipped = boxes.clip(decoded[None], torch.tensor([[150, 160]]))[0]
    torch.testing.assert_close(clipped, parts[f"delta.{name}.decode"])
    if name == "plain":
        torch.testing.assert_close(decoded, parts["delta.noclip.decode"])
    torch.testing.assert_close(coder.decode(priors, coder.encode(priors, parts["delta.boxes"])), parts["delta.boxes"])


def test_small_boxes_of_the_delta_coder_are_bounded_where_asked_for():
    priors, deltas = torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([[0.0, 0, -6, 6]])
    for below, narrow in ((True, 100 / 62.5), (False, 100 * math.exp(-6))):
        left, top, right, bottom = DeltaCoder(bound_below=below).decode(priors, deltas)[0].tolist()
        assert right - left == pytest.approx(narrow, rel=1e-4)
        assert bottom - top == pytest.approx(6250, rel=1e-4)


def test_anchors_in_whole_pixels_are_torchvisions():
    """Scales, corners and the distance of places, of an image of 160 x 224 whose coarsest map has 3 x 4 places."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList

    maps, size = maps_of((20, 28), (3, 4)), (160, 224)
    theirs = AnchorGenerator(((32, 40, 50), (203, 255, 322)), ((0.5, 1.0, 2.0),) * 2)
    expected = theirs(ImageList(torch.zeros(1, 3, *size), [size]), maps)[0]
    options: Any = {"scales": [4.0], "octaves": 3}
    coarse = Anchors(**{**options, "scales": [203 / 64]}, rounded=True, fitted=True)
    fine, whole_pixels = Anchors(**options, rounded=True), Anchors(**options, rounded=True, fitted=True)
    assert torch.equal(anchors(whole_pixels, maps[:1], [8], whole(), size).boxes, expected[: 20 * 28 * 9])
    assert torch.equal(anchors(fine, maps[:1], [8], whole(), size).boxes, expected[: 20 * 28 * 9])
    assert torch.equal(anchors(coarse, maps[1:], [64], whole(), size).boxes, expected[20 * 28 * 9 :])
    by_stride = anchors(fine, maps[1:], [64], whole(), size).boxes.view(3, 4, 9, 4)
    assert (by_stride[1, 1] - by_stride[0, 0]).tolist() == [[64.0] * 4] * 9
    plain = anchors(Anchors(**options), maps[:1], [8], whole(), size).boxes
    assert not torch.equal(plain, plain.round())


def test_points_may_be_fitted_to_the_batch():
    made = points(maps_of((3, 4)), [64], whole(), 0.0, (160, 224))
    assert made.boxes[-1].tolist() == [3 * 56, 2 * 53] * 2


def test_distance_coder(parts: dict[str, Tensor]):
    coder, priors = DistanceCoder(), parts["distance.points"].repeat(1, 2)
    clipped = boxes.clip(coder.decode(priors, parts["distance.distances"])[None], torch.tensor([[150, 160]]))[0]
    torch.testing.assert_close(clipped, parts["distance.decode"])
    torch.testing.assert_close(coder.encode(priors, parts["delta.boxes"]), parts["distance.encode"])
    strides = coder.encode(priors / 8, parts["delta.boxes"] / 8).clamp(0, 15.9)  # as GFL has it
    torch.testing.assert_close(strides, parts["distance.encode_max16"])


def test_centreness():
    sides = torch.tensor([[4.0, 4, 4, 4], [1, 4, 4, 4], [1, 1, 4, 4], [0, 1, 1, 1], [-1, 1, 1, 1]])
    assert centreness(sides).tolist() == [1, 0.5, 0.25, 0, 0]
    assert distances(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1, 5, 9])).tolist() == [2, 3, 2, 5]


def test_overlaps(parts: dict[str, Tensor]):
    one, other = parts["delta.priors"], parts["delta.boxes"]
    torch.testing.assert_close(boxes.iou_of_all(one, other), parts["overlaps.iou"])
    torch.testing.assert_close(boxes.overlap(one, other).iou, parts["overlaps.iou.aligned"])
    torch.testing.assert_close(boxes.generalized_iou(one, other), parts["overlaps.giou.aligned"])
    torch.testing.assert_close(boxes.generalized_iou(one[:, None], other), parts["overlaps.giou"])


def targets_of(parts: dict[str, Tensor], room: int = 8) -> Targets:
    """The reference's objects in the second of two images, padded with boxes that would match; the first has none."""
    given, labels = parts["assign.gt"], parts["assign.gt_labels"]
    truth = torch.zeros(2, room, 4)
    truth[:] = torch.tensor([0.0, 0, 64, 64])
    truth[1, : len(given)] = given
    places = torch.zeros(2, room, dtype=torch.int64)
    places[1, : len(given)] = labels
    valid = torch.zeros(2, room, dtype=torch.bool)
    valid[1, : len(given)] = True
    return Targets(truth, places, valid)


def assigned(matches: Any) -> list[list[int]]:
    """As MMDetection says it: 0 background, k + 1 the object k, -1 ignored."""
    found = torch.where(matches.positive, matches.matched + 1, torch.where(matches.negative, 0, -1))
    return [image.tolist() for image in found]


MAX_IOU = {
    "rpn": MaxIouAssigner(positive=0.7, negative=0.3, best=0.3),
    "retinanet": MaxIouAssigner(),
    "rcnn": MaxIouAssigner(positive=0.5, negative=0.5, best=None),
    "ssd": MaxIouAssigner(positive=0.5, negative=0.5, all_best=False),
}


@pytest.mark.parametrize("name", MAX_IOU)
def test_max_iou_assigner(name: str, parts: dict[str, Tensor]):
    priors = anchors(Anchors(scales=[4.0]), maps_of(*SIZES, images=2), [8, 16, 32], whole(2))
    empty, found = assigned(MAX_IOU[name].assign(priors, targets_of(parts)))
    assert found == parts[f"assign.max_iou.{name}.gt_inds"].tolist()
    assert empty == [0] * len(priors.boxes)


def test_priors_in_the_padding_are_neither_positive_nor_background(parts: dict[str, Tensor]):
    priors = anchors(Anchors(scales=[4.0]), maps_of(*SIZES, images=2), [8, 16, 32], torch.tensor([[64.0, 96]] * 2))
    matches = MaxIouAssigner().assign(priors, targets_of(parts))
    assert 0 < priors.valid.sum() < priors.valid.numel()
    assert not (matches.positive | matches.negative)[~priors.valid].any()


def test_atss_assigner(parts: dict[str, Tensor]):
    priors = anchors(Anchors(ratios=[1.0]), maps_of(*SIZES, images=2), [8, 16, 32], whole(2))
    empty, found = assigned(AtssAssigner().assign(priors, targets_of(parts)))
    assert found == parts["assign.atss.gt_inds"].tolist()
    assert empty == [0] * len(priors.boxes)


def test_atss_takes_no_prior_of_the_padding(parts: dict[str, Tensor]):
    """As if they were not there: the same as with smaller maps."""
    options, strides = Anchors(ratios=[1.0]), [8, 16, 32]
    inside = torch.tensor([[128.0, 160.0]] * 2)
    padded = anchors(options, maps_of(*SIZES, images=2), strides, inside)
    alone = anchors(options, maps_of((16, 20), (8, 10), (4, 5), images=2), strides, whole(2))
    matches, fewer = (AtssAssigner().assign(priors, targets_of(parts)) for priors in (padded, alone))
    assert (
        torch.where(matches.positive, matches.matched, -1)[:, padded.valid[0]].tolist()
        == torch.where(fewer.positive, fewer.matched, -1).tolist()
    )
    assert fewer.positive.any()
    assert not (matches.positive | matches.negative)[~padded.valid].any()


def test_fewer_nearest_priors_are_fewer_positive_ones(parts: dict[str, Tensor]):
    priors = anchors(Anchors(ratios=[1.0]), maps_of(*SIZES, images=2), [8, 16, 32], whole(2))
    few, usual = (AtssAssigner(nearest=count).assign(priors, targets_of(parts)) for count in (1, 9))
    assert few.positive.sum() < usual.positive.sum()


def test_fcos_assigner():
    """By hand, on a map of 4 x 4 of stride 8 and one of 2 x 2 of stride 16."""
    priors = points(maps_of((4, 4), (2, 2)), [8, 16], whole())
    large, small = [0.0, 0, 32, 32], [2.0, 2, 15, 15]
    valid = torch.tensor([[True, True, False]])
    targets = Targets(torch.tensor([[large, small, [0.0, 0, 9, 9]]]), torch.zeros(1, 3), valid)
    any_place = FcosAssigner(ranges=[16.0], radius=None).assign(priors, targets)
    found = assigned(any_place)[0]
    assert found[:16] == [2, 2, 0, 0, 2, 2, 0, 0, *[0] * 8]  # the smaller one; sides of the larger one are too far
    assert found[16:] == [1, 1, 1, 1]
    central = assigned(FcosAssigner(ranges=[16.0], radius=0.55).assign(priors, targets))[0]
    assert central == [*[0] * 5, 2, *[0] * 10, 1, 1, 1, 1]  # the point at 12 is 3.5 pixels from 8.5, that at 4 is 4.5
    wide = assigned(FcosAssigner(ranges=[100.0], radius=None).assign(priors, targets))[0]
    assert wide == [2, 2, 1, 1, 2, 2, *[1] * 10, 0, 0, 0, 0]
    with pytest.raises(ConfigError, match="expected a number for each level of the pyramid but the last, got 2 for 2"):
        FcosAssigner(ranges=[16.0, 32.0]).assign(priors, targets)
    by_stride = assigned(FcosAssigner(radius=None).assign(priors, targets))[0]  # up to 64 pixels at stride 8
    assert by_stride == wide


def predicted(parts: dict[str, Tensor], logits: bool = True) -> Predicted:
    """The reference's predictions, for two images; in the first with other scores."""
    given, boxes = parts["assign.pred_logits"], parts["assign.pred_boxes"]
    both = torch.stack([given.flip(0), given])
    return Predicted(both.sigmoid(), boxes.expand(2, -1, -1), both if logits else None)


DYNAMIC = {"sim_ota": (SimOta(), 0.5), "dynamic_soft_label": (DynamicSoftLabel(), 0.0)}


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_assigners(name: str, logits: bool, parts: dict[str, Tensor]):
    assigner, offset = DYNAMIC[name]
    priors = points(maps_of(*SIZES, images=2), [8, 16, 32], whole(2), offset)
    matches = assigner.assign(priors, targets_of(parts), predicted(parts, logits))
    empty, found = assigned(matches)
    assert found == parts[f"assign.{name}.gt_inds"].tolist()
    assert empty == [0] * len(priors.boxes)
    torch.testing.assert_close(matches.quality[1, matches.positive[1]], parts[f"assign.{name}.pos_overlaps"])
    assert not matches.quality[~matches.positive].any()


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_assigners_take_no_prior_of_the_padding(name: str, parts: dict[str, Tensor]):
    """As if they were not there: they are neither taken nor counted."""
    assigner, offset = DYNAMIC[name]
    priors = points(maps_of(*SIZES, images=2), [8, 16, 32], torch.tensor([[96.0, 128.0]] * 2), offset)
    given = predicted(parts)
    matches = assigner.assign(priors, targets_of(parts), given)
    which = priors.valid[0]
    counts = tuple(int(level.sum()) for level in which.split(priors.counts))
    fewer = Priors(priors.boxes[which], priors.strides[which], priors.valid[:, which], counts)
    alone = Predicted(*(value[:, which] for value in given if value is not None))
    expected = assigner.assign(fewer, targets_of(parts), alone)
    assert expected.positive.any()
    assert matches.positive[:, which].tolist() == expected.positive.tolist()
    assert matches.matched[:, which].tolist() == expected.matched.tolist()
    assert not (matches.positive | matches.negative)[:, ~which].any()


def middle(**places: tuple[float, float]) -> tuple[Priors, Targets]:
    """Points of stride 8, and an object of 64 by 64 pixels with its centre at (0, 0)."""
    spots = torch.tensor(list(places.values()))
    count = len(spots)
    priors = Priors(spots.repeat(1, 2), torch.full((count,), 8.0), torch.ones(1, count, dtype=torch.bool), (count,))
    boxes = torch.tensor([[[-32.0, -32, 32, 32]]])
    return priors, Targets(boxes, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))


def taken(assigner: Any, places: dict[str, tuple[float, float]], ious: list[float], scores: list[float]) -> set[str]:
    """Which points the object takes, with boxes of such IoUs and scores for its class."""
    priors, targets = middle(**places)
    height = torch.tensor(ious) * 64 - 32
    boxes = torch.stack([torch.full_like(height, -32), torch.full_like(height, -32), height * 0 + 32, height], -1)
    matches = assigner.assign(priors, targets, Predicted(torch.tensor(scores)[None, :, None], boxes[None]))
    return {name for name, positive in zip(places, matches.positive[0].tolist(), strict=True) if positive}


@pytest.mark.parametrize(
    ("kind", "scores"), [(SimOta, [0.9, 0.1, 0.3, 0.1]), (DynamicSoftLabel, [0.3, 0.999, 0.999, 0.1])]
)
def test_what_dynamic_assigners_go_by(kind: Any, scores: list[float]):
    """By SimOTA's cost a higher score is better, by RTMDet's one that is nearer to the IoU."""
    spots = {"a": (0.0, 1.0), "b": (1.0, 0.0), "c": (0.0, -1.0), "far": (31.0, 0.0)}
    same, ious = [0.5] * 4, [0.3, 0.3, 0.4, 0.1]
    assert taken(kind(), spots, [0.8, 0.7, 0.6, 0.5], same) == {"a", "b"}, "the sum is 2.6"
    assert taken(kind(nearest=1), spots, [0.8, 0.7, 0.6, 0.5], same) == {"a"}
    assert taken(kind(), spots, [0.3, 0.2, 0.1, 0.9], same) == {"a"}
    assert taken(kind(radius=20.0), spots, [0.3, 0.2, 0.1, 0.9], same) == {"far"}
    assert taken(kind(), spots, ious, scores) == {"a"}
    assert taken(kind(iou_weight=40.0), spots, ious, scores) == {"c"}
    if kind is SimOta:
        assert taken(kind(class_weight=0.0), spots, ious, scores) == {"c"}


CLASS_LOSSES = {"focal": Focal(), "qfl": QualityFocal()}


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_class_losses(name: str, parts: dict[str, Tensor]):
    logits = parts["loss.logits"].clone().requires_grad_()
    quality = parts["loss.quality"] if name == "qfl" else None
    losses = CLASS_LOSSES[name](logits, parts["loss.labels"], quality)
    check_loss(name, averaged(losses, parts["loss.weight"], torch.tensor(3.0)), logits, parts)


BOX_LOSSES = {
    "iou_log": (Iou(), 1),
    "iou_linear": (Iou(form="linear"), 1),
    "iou_square": (Iou(form="square"), 1),
    "giou": (Giou(), 1),
    "diou": (Diou(), 1),
    "ciou": (Ciou(), 1),
    "l1": (L1(), 20),
    "smooth_l1": (SmoothL1(beta=1 / 9), 20),
}


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_box_losses(name: str, parts: dict[str, Tensor]):
    loss, divisor = BOX_LOSSES[name]
    predicted = (parts["loss.boxes"] / divisor).requires_grad_()
    losses = loss(predicted, parts["loss.box_targets"] / divisor)
    check_loss(name, averaged(losses, torch.ones(10), torch.tensor(5.0)), predicted, parts)


def check_loss(name: str, loss: Tensor, inputs: Tensor, parts: dict[str, Tensor]) -> None:
    torch.testing.assert_close(loss, parts[f"loss.{name}"], rtol=1e-5, atol=1e-6)
    loss.backward()
    torch.testing.assert_close(inputs.grad, parts[f"loss.{name}.grad"], rtol=1e-4, atol=1e-6)


def test_distribution_focal_loss(parts: dict[str, Tensor]):
    logits = parts["loss.dfl.logits"].clone().requires_grad_()
    losses = 0.25 * distribution_focal(logits, parts["loss.dfl.targets"])
    check_loss("dfl", averaged(losses, torch.ones(8), torch.tensor(4.0)), logits, parts)
    assert expected(torch.tensor([[50.0, 0, 0], [0, 50, 0], [50, 0, 50]])).tolist() == pytest.approx([0, 1, 1])


def test_every_loss_has_a_weight():
    logits, labels = torch.randn(3, 2), torch.tensor([0, 1, 2])
    one, other = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[1.0, 1, 6, 4]])
    for kind in (CrossEntropy, Focal, QualityFocal):
        torch.testing.assert_close(kind(weight=3)(logits, labels), 3 * kind()(logits, labels))
    for kind in (L1, SmoothL1, Iou, Giou, Diou, Ciou):
        torch.testing.assert_close(kind(weight=3)(one, other), 3 * kind()(one, other))


def test_cross_entropy_is_torchs():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 1])
    wanted = torch.eye(4)[labels][:, :3]
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1)
    torch.testing.assert_close(CrossEntropy()(logits, labels), expected)
    halves = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted / 2, reduction="none").sum(1)
    torch.testing.assert_close(CrossEntropy()(logits, labels, torch.full((5,), 0.5)), halves)


def test_focal_options():
    logits, labels = torch.tensor([[0.0]]), torch.tensor([0])
    assert Focal(alpha=1, gamma=0)(logits, labels).item() == pytest.approx(0.6931, abs=1e-4)
    assert Focal(alpha=0.5, gamma=1)(logits, labels).item() == pytest.approx(0.6931 / 4, abs=1e-4)
    assert QualityFocal(beta=1)(logits, labels, torch.tensor([1.0])).item() == pytest.approx(0.6931 / 2, abs=1e-4)


def test_levels_and_pooling_of_boxes(parts: dict[str, Tensor]):
    sides = parts["roi.level_sides"]
    square = torch.stack([torch.zeros(12), torch.zeros(12), sides, sides], 1)
    assert levels_of(square, 4).tolist() == parts["roi.levels"].tolist()
    rois = parts["roi.rois"]
    of_images = torch.stack([rois[rois[:, 0] == number, 1:] for number in range(2)])
    found = pooled_of([parts["roi.feat.0"], parts["roi.feat.1"]], [16, 32], of_images, 3, 0, True)
    expected = torch.cat([parts["roi.align"][rois[:, 0] == number] for number in range(2)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("samples", "aligned"), [(2, False), (2, True), (0, False)])
def test_pooling_of_levels_is_torchvisions(samples: int, aligned: bool):
    """With samples of a fixed number too, where a box without extent has a value."""
    torch.manual_seed(0)
    maps = [torch.randn(1, 3, 64, 64), torch.randn(1, 3, 32, 32)]
    corners = torch.rand(1, 20, 2) * 60
    rois = torch.cat([corners, corners + torch.rand(1, 20, 2) * 190], -1)
    found = pooled_of(maps, [4, 8], rois, 5, samples, aligned)
    levels = levels_of(rois[0], 2)
    assert set(levels.tolist()) == {0, 1}
    for number, (level, roi) in enumerate(zip(levels.tolist(), rois[0], strict=True)):
        expected = roi_align(maps[level], [roi[None]], 5, (1 / 4, 1 / 8)[level], samples, aligned)
        torch.testing.assert_close(found[number], expected[0], rtol=1e-4, atol=1e-4)


def test_nms(parts: dict[str, Tensor]):
    given, scores, labels = (parts[f"nms.{name}"] for name in ("boxes", "scores", "ids"))
    kept = parts["nms.batched.keep"]
    valid = torch.ones(2, 70, dtype=torch.bool)
    valid[:, 60:] = False
    valid[1] = False
    padded = [torch.nn.functional.pad(value, (0, 0, 0, 10)) for value in (given,)]
    padded += [torch.nn.functional.pad(value, (0, 10)) for value in (scores, labels)]
    found = suppressed(*(value.expand(2, *value.shape) for value in padded), valid, 0.5, 100)
    assert found.boxes.shape == (2, 100, 4)
    assert found.valid.sum(1).tolist() == [len(kept), 0]
    assert found.boxes[0, : len(kept)].tolist() == given[kept].tolist()
    assert found.scores[0, : len(kept)].tolist() == scores[kept].tolist()
    assert found.labels[0, : len(kept)].tolist() == labels[kept].tolist()
    assert not found.boxes[1].any()
    few = suppressed(*(value.expand(2, *value.shape) for value in padded), valid, 0.5, 3)
    assert few.boxes[0].tolist() == given[kept[:3]].tolist()


def test_nms_of_pairs_of_box_and_class(parts: dict[str, Tensor]):
    scores, best = parts["nms.multi_scores"][:, :-1], parts["nms.multiclass.dets"]  # the last are of no object
    count, classes = scores.shape
    boxes = parts["nms.boxes"].repeat_interleave(classes, 0)[None]
    labels = torch.arange(classes).repeat(count)[None]
    found = suppressed(boxes, scores.flatten()[None], labels, scores.flatten()[None] > 0.3, 0.5, len(best))
    torch.testing.assert_close(torch.cat([found.boxes[0], found.scores[0, :, None]], 1), best)
    assert found.labels[0].tolist() == parts["nms.multiclass.labels"].tolist()


def test_softmax_cross_entropy(parts: dict[str, Tensor]):
    """Of one choice among the classes and no object, the last; all with the same weight."""
    logits = torch.cat([parts["loss.logits"], parts["loss.logits"][:, :1]], 1)
    losses = Softmax(background=1.0)(logits, parts["loss.labels"])
    torch.testing.assert_close(averaged(losses, parts["loss.weight"], torch.tensor(3.0)), parts["loss.ce"])


DETR = [SoftmaxCost(), L1Cost(weight=5), GiouCost(weight=2)]


@pytest.mark.parametrize("name", ["detr", "focal"])
def test_hungarian_assigner(name: str, parts: dict[str, Tensor]):
    """The reference's queries as the second set of the second image."""
    targets = targets_of(parts)
    scale = torch.tensor([[[240.0, 200, 240, 200]]]).expand(2, -1, -1)
    logits = parts["hungarian.pred_logits_softmax" if name == "detr" else "hungarian.pred_logits"]
    found = boxes.cxcywh(parts["hungarian.pred_boxes"]) / scale[0]
    noise = torch.Generator().manual_seed(0)
    every = [torch.rand(2, 40, value.shape[1], generator=noise) for value in (logits, found)]
    every[0][1, 10:], every[1][1, 10:] = logits, found
    assigner = HungarianAssigner(costs=DETR) if name == "detr" else HungarianAssigner()
    queries = Queries(*every, scale, (10, 30))
    count = int(targets.valid[1].sum())
    cost = assigner.cost(queries, targets)[1, 10:, :count]
    torch.testing.assert_close(cost, parts[f"hungarian.{name}.cost"], rtol=1e-5, atol=1e-5)
    empty, image = assigned(assigner.assign(queries, targets))
    assert image[10:] == parts[f"hungarian.{name}.gt_inds"].tolist()
    assert sorted(place for place in image[:10] if place) == list(range(1, count + 1))  # the other set has its own
    assert empty == [0] * 40


def test_costs_that_are_no_numbers_are_the_highest():
    targets = Targets(torch.tensor([[[0.0, 0, 4, 4]]]), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).bool())
    logits = torch.tensor([[[torch.nan], [-9.0], [torch.nan]]])
    scale = torch.full((1, 1, 4), 8.0)
    matches = HungarianAssigner().assign(Queries(logits, torch.full((1, 3, 4), 0.5), scale, (3,)), targets)
    assert matches.positive.tolist() == [[False, True, False]]


def test_fewer_queries_than_objects_and_the_weights_of_costs():
    truth = torch.tensor([[[0.0, 0, 4, 4], [4, 4, 8, 8], [0, 4, 4, 8]]])
    targets = Targets(truth, torch.tensor([[0, 1, 0]]), torch.ones(1, 3).bool())
    queries = Queries(torch.zeros(1, 1, 2), torch.tensor([[[0.7, 0.7, 0.5, 0.5]]]), torch.full((1, 1, 4), 8.0), (1,))
    assert HungarianAssigner().assign(queries, targets).matched.tolist() == [[1]]
    for kind in (FocalCost, SoftmaxCost, L1Cost, GiouCost):
        torch.testing.assert_close(kind(weight=3)(queries, targets), 3 * kind()(queries, targets))
    assert FocalCost(alpha=1, gamma=0)(queries, targets)[0, 0, 0].item() == pytest.approx(0.6931, abs=1e-4)
    assert FocalCost(alpha=0, gamma=1)(queries, targets)[0, 0, 0].item() == pytest.approx(-0.6931 / 2, abs=1e-4)
    assert FocalCost(alpha=1, gamma=0, epsilon=0.5)(queries, targets)[0, 0, 0].item() == pytest.approx(0)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("levels", [1, 4])
def test_boxes_are_pooled_of_their_level_up_to_the_border(aligned: bool, levels: int):
    torch.manual_seed(0)
    sides = [(61, 43), (31, 22), (16, 11), (8, 6)][:levels]
    maps = [torch.randn(2, 3, *side, requires_grad=True) for side in sides]
    strides = [4, 8, 16, 32][:levels]
    width, height = 43 * 4.0, 61 * 4.0
    corners = torch.rand(2, 40, 2, 2) * torch.tensor([width, height])
    boxes = torch.cat([corners.amin(2), corners.amax(2)], -1)
    boxes[:, 0] = torch.tensor([0.0, 0.0, width, height])
    boxes[:, 1] = torch.tensor([width - 9, height - 7, width, height])
    boxes[:, 2] = 0.0
    found = pooled_of(maps, strides, boxes, 7, 0, aligned)
    loss = found.square().sum()
    grads = torch.autograd.grad(loss, maps)

    level = levels_of(boxes, levels).flatten()
    rois = torch.cat([torch.arange(2.0).repeat_interleave(40)[:, None], boxes.flatten(0, 1)], 1)
    expected = torch.stack(
        [
            roi_align(maps[one], roi[None], 7, 1 / strides[one], 0, aligned)[0]
            for one, roi in zip(level.tolist(), rois, strict=True)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for grad, other in zip(grads, torch.autograd.grad(expected.square().sum(), maps, allow_unused=True), strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(grad) if other is None else other, rtol=1e-3, atol=1e-3)


def test_learning_rates_are_those_of_mmdetections_recipes(parts: dict[str, Tensor]):
    """1x, YOLOX and RTMDet with 10 iterations an epoch; YOLOX's half cosine is longer than what is run of it."""
    schedules = pytest.importorskip("detkernel_optim.schedules")
    epochs, iters = (lambda count: Span(count, "epochs")), (lambda count: Span(count, "iters"))
    stage, constant, cosine = schedules.Stage, schedules.Constant(), schedules.Cosine
    last = 0.05 + 0.95 * (1 + math.cos(math.pi * 99 / 150)) / 2
    yolox = [
        stage(schedule=constant, until=epochs(5)),
        stage(schedule=cosine(end=0.05, length=epochs(15)), until=epochs(15)),
        stage(schedule=constant, factor=last),
    ]
    rtmdet = [stage(schedule=constant, until=epochs(10)), stage(schedule=cosine(end=0.05))]
    for name, rate, schedule in (
        ("1x", 0.02, schedules.Multistep(milestones=[epochs(8), epochs(11)], warmup=iters(25))),
        ("yolox", 0.01, schedules.Chain(stages=yolox, warmup=epochs(5), warmup_factor=0.0, warmup_kind="quadratic")),
        ("rtmdet", 0.004, schedules.Chain(stages=rtmdet, warmup=iters(30), warmup_factor=1e-5)),
    ):
        wanted = parts[f"lr.{name}"]
        found = [rate * schedule.factor_at(iteration, len(wanted), 10) for iteration in range(len(wanted))]
        assert found == pytest.approx(wanted.tolist(), rel=1e-9), name
