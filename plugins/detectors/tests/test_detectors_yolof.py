"""What YOLOF is made of: its neck, its head, uniform matching and implicit objectness, by their effect."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detkernel_detection import Target, batching
from detkernel_detection.boxes import xyxy
from detkernel_detection.parts import Output, Predicted, Priors
from detkernel_detection.structures import Targets
from detkernel_detectors.assigners.dynamic import SimOta
from detkernel_detectors.assigners.uniform import UniformAssigner
from detkernel_detectors.backbones import Resnet
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.heads import UnequalTowers
from detkernel_detectors.losses.boxes import Giou
from detkernel_detectors.models.network import Network
from detkernel_detectors.models.yolof import Yolof, of_both
from detkernel_detectors.necks import DilatedEncoder
from torch import Tensor, nn

FAR = 500.0


def squares(*boxes: tuple[float, float, float]) -> Tensor:
    """[N, 4] of centre and side."""
    return xyxy(torch.tensor([[x, y, side, side] for x, y, side in boxes]))


def matched(anchors: Tensor, predicted: Tensor, objects: Tensor, valid: Any = None, **options: Any) -> Any:
    """What the assigner says of one image."""
    count = len(anchors)
    inside = torch.ones(1, count, dtype=torch.bool) if valid is None else torch.tensor([valid])
    priors = Priors(anchors, torch.full((count,), 32.0), inside, (count,))
    none = torch.tensor([[3.0, 3, 90, 90]])  # what is in the padding
    boxes, exist = torch.cat([objects, none])[None], torch.arange(len(objects) + 1)[None] < len(objects)
    targets = Targets(boxes, torch.zeros(1, len(objects) + 1, dtype=torch.int64), exist)
    return UniformAssigner(**options).assign(priors, targets, Predicted(torch.zeros(1, count, 1), predicted[None]))


def test_every_object_gets_as_many_priors_whatever_its_size():
    """The nearest predictions and the nearest anchors; a prior that is both is in two pairs."""
    spots = [(16.0 * number, 0.0) for number in range(8)]
    anchors = squares(*((x, y, 32) for x, y in spots))
    predicted = anchors.flip(0)  # the first anchor predicts the last box
    found = matched(anchors, predicted, squares((1, 0, 30), (81, 0, 90)), nearest=2, least_iou=0.0)
    assert found.pairs[0].tolist() == [[7, 6, 0, 1], [2, 1, 5, 6], [-1] * 4]
    assert found.positive[0].nonzero()[:, 0].tolist() == [0, 1, 2, 5, 6, 7]
    assert found.negative[0].tolist() == (~found.positive[0]).tolist()
    both = matched(anchors, anchors, squares((1, 0, 30)), nearest=2)
    assert both.pairs[0].tolist() == [[0, 1, 0, 1], [-1] * 4]
    assert both.quality[0, :2].tolist() == pytest.approx([900 / 1024, 480 / (1024 + 900 - 480)])
    assert not both.quality[0, 2:].any()


def test_a_prior_of_two_objects_has_the_class_of_the_higher_rank_and_then_of_the_later():
    anchors = squares((0, 0, 32), (100, 0, 32))
    first, second = (0.0, 0.0, 32.0), (2.0, 0.0, 32.0)
    assert matched(anchors, anchors, squares(first, second), nearest=1).matched[0].tolist() == [1, 0]
    ranks = matched(anchors, anchors, squares((0, 0, 32), (90, 0, 32)), nearest=2, least_iou=0.0)
    assert ranks.matched[0].tolist() == [1, 0], "each has the other's nearest as its second"


def test_what_hardly_overlaps_and_what_predicts_well_is_neither_positive_nor_negative():
    anchors = squares((0, 0, 32), (30, 0, 32), (60, 0, 32), (FAR, 0, 32))
    predicted = squares((0, 0, 32), (FAR, 0, 32), (1, 0, 32), (FAR, 0, 32))  # the third: IoU .94
    states = []
    for near, options in ((1, {}), (2, {}), (2, {"least_iou": 0.0}), (1, {"ignored_iou": 0.95})):
        found = matched(anchors, predicted, squares((0, 0, 32)), nearest=near, **options)
        states.append((found.positive[0].tolist(), found.negative[0].tolist()))
    assert states == [
        ([True, False, False, False], [False, True, False, True]),
        ([True, False, False, False], [False, False, False, True]),  # the second nearest anchor: IoU .03
        ([True, True, True, False], [False, False, False, True]),
        ([True, False, False, False], [False, True, True, True]),
    ]


def test_priors_of_the_padding_are_not_taken_even_where_there_are_too_few():
    anchors = squares((0, 0, 32), (8, 0, 32), (16, 0, 32))
    found = matched(anchors, anchors, squares((0, 0, 32)), valid=[False, False, True], nearest=2)
    assert found.pairs[0, 0].tolist() == [2, -1, 2, -1]
    assert found.positive[0].tolist() == [False, False, True]
    assert not found.negative.any()


def test_a_score_is_the_product_of_two_probabilities_and_no_logit_is_infinite():
    one, other = torch.tensor([-3.0, 0.5, 4.0, 200, -200, 200]), torch.tensor([2.0, -1, 6.0, 200, 0, -200])
    one.requires_grad_()
    found = of_both(one, other)
    torch.testing.assert_close(found.sigmoid(), one.sigmoid() * other.sigmoid())
    found.sum().backward()
    assert found.isfinite().all()
    assert one.grad is not None
    assert one.grad.isfinite().all()


def test_a_centre_is_moved_by_so_many_pixels_at_most():
    anchor, deltas = squares((0, 0, 100)), torch.tensor([[0.5, -0.5, 0, 0], [0.1, 0.2, 0, 0]])
    moved = squares((32, -32, 100), (10, 20, 100))
    torch.testing.assert_close(DeltaCoder(largest_shift=32.0).decode(anchor, deltas), moved)
    torch.testing.assert_close(DeltaCoder().decode(anchor, deltas)[0], squares((50, -50, 100))[0])


def test_the_towers_are_as_deep_as_asked_for():
    outputs = [Output("cls", 3, "cls"), Output("reg", 4, "reg")]
    for convs, box_convs in ((1, 3), (0, 2), (2, 0)):
        head: Any = UnequalTowers(convs=convs, box_convs=box_convs, channels=8).build(4, 1, outputs)
        assert (len(head.cls_tower), len(head.reg_tower)) == (convs, box_convs)
        found = head([torch.zeros(1, 4, 2, 2)])
        assert [found[name][0].shape[1] for name in ("cls", "reg")] == [3, 4]


def test_a_dilated_encoder_sees_as_far_as_asked_for_in_the_coarsest_map():
    for dilations, reach in (([], 1), ([3], 4), ([1, 3], 5)):
        torch.manual_seed(0)
        neck: Any = DilatedEncoder(channels=4, block_channels=8, dilations=dilations).build([6, 3], [8, 16]).eval()
        assert (neck.channels, neck.strides) == (4, [16])
        assert all(block.conv2.conv.weight.shape == (8, 8, 3, 3) for block in neck.blocks)
        for module in neck.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data.fill_(1.0)
        coarse = torch.zeros(1, 3, 21, 21)
        coarse[0, :, 10, 10] = 1.0
        [found] = neck([torch.zeros(1, 6, 42, 42), coarse])
        seen = found[0, 0].nonzero()
        assert (10 - seen.amin(0)).tolist() == (seen.amax(0) - 10).tolist() == [reach, reach]


def test_boxes_are_learned_as_the_assigner_and_the_loss_say():
    """Another assigner gives a positive prior one object."""
    backbone, head = Resnet(depth=18, channels=4, stages=2, norm="group"), UnequalTowers(convs=0, box_convs=0)
    neck = DilatedEncoder(channels=8, block_channels=4, dilations=[1])
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    batch = batching.make_batch(images, [Target(torch.tensor([[4.0, 6, 40, 44]]), torch.tensor([1]))], sizes=[(64, 64)])
    found = {}
    for name, options in (
        ("usual", {}),
        ("twice", {"box_loss": Giou(weight=2.0)}),
        ("other", {"assigner": SimOta()}),
    ):
        torch.manual_seed(0)
        model = Network(Yolof(backbone=backbone, neck=neck, head=head, **options), ["a", "b"]).train()
        with torch.no_grad():
            losses = model(batch.images, batch.targets, batch.image_sizes)
        found[name] = {key: value.item() for key, value in losses.items()}
    assert found["twice"]["loss_bbox"] == pytest.approx(2 * found["usual"]["loss_bbox"])
    assert found["twice"]["loss_cls"] == found["usual"]["loss_cls"]
    assert found["other"]["loss_bbox"] > 0
    assert found["other"]["loss_bbox"] != pytest.approx(found["usual"]["loss_bbox"], rel=1e-3)
