"""What centre detectors are made of: maps of centres, their loss, the neck, and CenterNet's own options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from detkernel import ConfigError
from detkernel_detection.parts import Priors
from detkernel_detection.structures import Targets
from detkernel_detectors.assigners.heatmap import AreaHeatmap, CentreRegion, RadiusHeatmap, corner_radius, map_of
from detkernel_detectors.backbones import Resnet
from detkernel_detectors.heads import Branches
from detkernel_detectors.losses.boxes import Giou
from detkernel_detectors.losses.classes import GaussianFocal
from detkernel_detectors.losses.sums import averaged
from detkernel_detectors.models.centernet import Centernet
from detkernel_detectors.models.centernet_update import CenternetUpdate
from detkernel_detectors.models.dense import Maps
from detkernel_detectors.models.network import Network
from detkernel_detectors.necks import DeconvNeck, Fpn
from torch import Tensor

SIDE = 12


def targets_of(*boxes: list[float], labels: list[int]) -> Targets:
    """One image with such objects, and a place without one."""
    valid = torch.tensor([[*(True for _ in boxes), False]])
    return Targets(torch.tensor([[*boxes, [0.0, 0, 40, 40]]]), torch.tensor([[*labels, 0]]), valid)


def heat(targets: Targets, **options: Any) -> Tensor:
    """[2 classes, SIDE, SIDE] at stride 4."""
    y, x = (values.flatten() * 4.0 for values in torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"))
    count = SIDE * SIDE
    priors = Priors(
        torch.stack([x, y, x, y], 1), torch.full((count,), 4.0), torch.ones(1, count, dtype=torch.bool), (count,)
    )
    return map_of(RadiusHeatmap(**options)(priors, targets), targets, 2)[0].T.reshape(2, SIDE, SIDE)


# maps of centres


def test_a_corner_may_move_by_the_radius():
    """Both corners of a box of 20 by 10, by the radius: outwards, inwards, and as a whole; the worst has the IoU."""
    width, height = 20.0, 10.0
    for overlap in (0.3, 0.7):
        r = corner_radius(torch.tensor([width, height]), overlap).item()
        shared = (width - r) * (height - r)
        area = width * height
        moved = shared / (2 * area - shared)
        smaller, larger = (width - 2 * r) * (height - 2 * r) / area, area / ((width + 2 * r) * (height + 2 * r))
        assert min(moved, smaller, larger) == pytest.approx(overlap, rel=1e-5)


def test_a_centre_is_a_peak_with_a_gaussian_of_its_radius():
    targets = targets_of([0.0, 4, 40, 44], labels=[1])  # centre (20, 24): place (5, 6)
    found = heat(targets)
    assert found[0].count_nonzero() == 0
    assert found[1, 6, 5] == 1
    radius = int(corner_radius(torch.tensor([10.0, 10.0]), 0.3))
    assert radius > 0
    assert found[1].count_nonzero() == (2 * radius + 1) ** 2
    assert found[1, 6, 5 + radius].item() == pytest.approx(math.exp(-(radius**2) / (2 * ((2 * radius + 1) / 6) ** 2)))
    assert heat(targets, min_overlap=0.9).count_nonzero() < found.count_nonzero()


def test_of_two_gaussians_of_a_class_the_higher_counts():
    one, other = [0.0, 4, 40, 44], [8.0, 4, 44, 44]
    both = heat(targets_of(one, other, labels=[0, 0]))
    alone = [heat(targets_of(box, labels=[0])) for box in (one, other)]
    assert torch.equal(both, torch.maximum(*alone))
    assert (both == 1).sum() == 2


# the loss


def test_gaussian_focal_loss(parts: dict[str, Tensor]):
    """The reference is given probabilities."""
    score = parts["loss.gaussian.pred"].clone().requires_grad_()
    wanted = parts["loss.gaussian.target"]
    losses = GaussianFocal()(score.logit(), wanted, wanted == 1)
    loss = averaged(losses, torch.ones_like(losses), torch.tensor(2.0))
    torch.testing.assert_close(loss, parts["loss.gaussian"], rtol=1e-5, atol=1e-6)
    loss.backward()
    torch.testing.assert_close(score.grad, parts["loss.gaussian.grad"], rtol=1e-4, atol=1e-5)


def test_options_of_the_gaussian_focal_loss():
    logits, p = torch.tensor([0.0, 1.0]), 1 / (1 + math.exp(-1))
    wanted, positive = torch.tensor([1.0, 0.4]), torch.tensor([2.0, 0.0])  # the first is a centre twice
    for alpha, beta, yes, no in ((2.0, 4.0, 1.0, 1.0), (1.0, 3.0, 0.25, 0.75)):
        expected = yes * 2 * 0.5**alpha * math.log(2) - no * 0.6**beta * p**alpha * math.log(1 - p)
        loss = GaussianFocal(alpha=alpha, beta=beta, yes=yes, no=no, weight=3.0)
        assert loss(logits, wanted, positive).item() == pytest.approx(3 * expected, rel=1e-5)
    far = torch.tensor([-20.0], requires_grad=True)
    loss = GaussianFocal(least=0.01)(far, torch.ones(1), torch.ones(1))
    assert loss.item() == pytest.approx(-(0.99**2) * math.log(0.01), rel=1e-5)
    loss.backward()
    assert far.grad.item() == 0


# the neck and the family


def test_a_deconvolution_doubles_and_begins_bilinear():
    neck: Any = DeconvNeck(channels=[6, 4]).build([8, 16], [16, 32])
    assert (neck.channels, neck.strides) == (4, [8])
    (found,) = neck([torch.zeros(1, 8, 4, 6), torch.zeros(1, 16, 2, 3)])
    assert found.shape == (1, 4, 8, 12)
    even = neck.layers[1].conv(torch.ones(1, 6, 5, 5))[0, 0]
    torch.testing.assert_close(even[2:-2, 2:-2], torch.full((6, 6), 6.0))  # of six channels of ones
    with pytest.raises(ConfigError, match="channels: 4 doublings of the backbone's map of stride 8 are too many"):
        DeconvNeck(channels=[4] * 4).build([8], [8])
    with pytest.raises(ValueError, match="channels: expected at least one"):
        DeconvNeck(channels=[])


def made(**options: Any) -> Any:
    torch.manual_seed(0)
    small = {"backbone": Resnet(depth=18, channels=4, stages=1), "neck": DeconvNeck(channels=[4]), "head": Branches()}
    return Centernet(**{**small, **options})


def test_a_pyramid_is_refused():
    with pytest.raises(ConfigError, match="neck: expected one that gives one map, such as deconv_neck; Fpn gives 2"):
        Network(made(neck=Fpn(channels=4, finest=4, extra=1)), ["a"])
    with pytest.raises(ValueError, match="peak: expected an odd number, got 4"):
        made(peak=4)


def maps_of(**values: Tensor) -> Maps:
    """Outputs [channels, SIDE, SIDE] at stride 4; size 2 and offset 0 where none are given."""
    usual = {"size": torch.full((2, SIDE, SIDE), 2.0), "offset": torch.zeros(2, SIDE, SIDE)}
    outputs = {name: [one[None]] for name, one in {**usual, **values}.items()}
    return Maps([torch.zeros(1, 4, SIDE, SIDE)], outputs, (4,), (4 * SIDE, 4 * SIDE))


def test_peaks_are_detections():
    logits = torch.full((2, SIDE, SIDE), -9.0)
    logits[1, 3, 4], logits[1, 3, 5], logits[0, 3, 6] = 3.0, 2.0, 1.0  # a neighbour of the class; one of another class
    size, offset = torch.full((2, SIDE, SIDE), 2.0), torch.zeros(2, SIDE, SIDE)
    size[:, 3, 4], offset[:, 3, 4] = torch.tensor([4.0, 1.0]), torch.tensor([0.5, 0.25])
    maps = maps_of(cls=logits, size=size, offset=offset)
    found = made(score_thresh=0.5, max_detections=3).predictions(maps, None)
    assert found.valid[0].tolist() == [True, True, False]
    assert found.labels[0].tolist() == [1, 0, 0]
    torch.testing.assert_close(found.scores[0], torch.tensor([3.0, 1.0, -math.inf]).sigmoid())
    assert found.boxes[0].tolist() == [[10.0, 11.0, 26.0, 15.0], [20.0, 8.0, 28.0, 16.0], [0.0] * 4]
    everywhere = made(score_thresh=0.5, peak=1, max_detections=3).predictions(maps, None)
    assert everywhere.labels[0].tolist() == [1, 1, 0], "every place is its own neighbourhood"
    many = made(max_detections=400).predictions(maps, None)
    assert many.boxes.shape == (1, 400, 4), "more than the map has places for"
    size[0, 3, 4] = -4.0
    assert made(score_thresh=0.5).predictions(maps, None).valid.sum() == 1, "a box without extent is none"
    assert made(score_thresh=0.5, min_size=None).predictions(maps, None).valid.sum() == 2


def test_sizes_and_offsets_are_learned_at_centres_of_the_last_object_of_a_place():
    first, last = [10.0, 10, 30, 30], [9.0, 9, 33, 33]  # centres (20, 20) and (21, 21): place (5, 5)
    maps = maps_of(cls=torch.zeros(2, SIDE, SIDE))
    targets = targets_of(first, last, labels=[0, 1])
    losses = made().losses(maps, targets, None, None)
    assert losses["loss_wh"].item() == pytest.approx(0.1 * 2 * (6 - 2) / 4)  # of two peaks, and two numbers each
    assert losses["loss_offset"].item() == pytest.approx(2 * 0.25 / 4)
    other = made(size_weight=1.0, offset_weight=3.0, heatmap_loss=GaussianFocal(weight=2.0))
    changed = other.losses(maps, targets, None, None)
    factors = {name: (changed[name] / losses[name]).item() for name in losses}
    assert factors == pytest.approx({"loss_center_heatmap": 2.0, "loss_wh": 10.0, "loss_offset": 3.0})
    assert other.losses(maps, targets._replace(valid=torch.zeros(1, 3, dtype=torch.bool)), None, None)["loss_wh"] == 0


# CenterNetUpdate


LEVELS = (8, 4)
"""Places of a side at strides 8 and 16."""


def priors_of() -> Priors:
    boxes, strides = [], []
    for side, stride in zip(LEVELS, (8.0, 16.0), strict=True):
        y, x = (
            (values.flatten() + 0.5) * stride for values in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij")
        )
        boxes.append(torch.stack([x, y, x, y], 1))
        strides.append(torch.full((side * side,), stride))
    counts = tuple(side * side for side in LEVELS)
    return Priors(torch.cat(boxes), torch.cat(strides), torch.ones(1, sum(counts), dtype=torch.bool), counts)


def test_a_region_is_nine_places_of_the_levels_for_its_size():
    large, small, sliver = [4.0, 4, 60, 60], [20.0, 20, 30, 30], [30.0, 20, 31, 30]
    targets = targets_of(large, small, sliver, labels=[0, 0, 1])
    region, middle = CentreRegion(sizes=(2.0, 2.4))(priors_of(), targets)  # half diagonals of 39.6, 7.1 and 5.0
    each = [part.sum(2)[0].tolist() for part in torch.split(region, [64, 16], 2)]
    assert each == [[0, 1, 0, 0], [9, 0, 0, 0]], "in a small one lies one point of stride 8, in a sliver none"
    centre = [part[0].nonzero().tolist() for part in torch.split(middle, [64, 16], 2)]
    assert centre == [[[1, 3 * 8 + 3], [2, 3 * 8 + 3]], [[0, 2 * 4 + 2]]], "a sliver has a centre nonetheless"
    both = CentreRegion(sizes=(0.1, 100.0))(priors_of(), targets)[1]
    assert both.sum(2)[0].tolist() == [2, 2, 2, 0]


def test_a_centre_is_as_wide_as_its_area():
    targets = targets_of([10.0, 10, 50, 40], [20.0, 20, 24, 24], labels=[0, 0])
    away = AreaHeatmap(min_overlap=0.5, min_radius=3.0)(priors_of(), targets)[0]
    place = 3 * 8 + 3  # centre (30, 25): the point (28, 28)
    assert away[0, place] == 0
    assert away[0, place + 1].item() == pytest.approx((6**2 + 3**2) / (2 / 9 * 1200))
    assert away[1, 2 * 8 + 3].item() == pytest.approx((6**2 + 2**2) / 9), "the least radius"


def test_centres_are_the_points_whose_boxes_are_best():
    """Of an object of stride 16 alone; all points but one predict its box."""
    box = [4.0, 4, 60, 60]
    targets, priors = targets_of(box, labels=[1]), priors_of()
    points, strides = priors.boxes[:, :2], priors.strides[:, None]
    told = torch.cat([points - torch.tensor(box[:2]), torch.tensor(box[2:]) - points], 1) / strides
    told[64 + 1 * 4 + 1] *= 2.0
    region, middle = CentreRegion(sizes=(2.0, 2.4))(priors, targets)

    def centres_of(**options: Any) -> set[int]:
        found = CenternetUpdate(**options)._centres(priors, told[None], targets, region, middle)
        assert not found[0, 1].any()
        return set((found[0, 0].nonzero()[:, 0] - 64).tolist())

    around = {row * 4 + column for row in (1, 2, 3) for column in (1, 2, 3)}
    assert centres_of() == around - {5}
    assert centres_of(good_points=10) == around - {5}, "its loss is too large"
    assert centres_of(good_points=10, good_loss=2.0) == around
    assert centres_of(good_points=1) == {10}, "its own"
    assert centres_of(box_loss=Giou(weight=0.0)) == {10}
