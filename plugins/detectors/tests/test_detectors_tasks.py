"""What TOOD and VFNet are made of: their heads, the task-aligned assigner and the varifocal loss, by their effect."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detkernel import ConfigError
from detkernel_detection import Target, batching
from detkernel_detection.parts import Output, Predicted, Priors
from detkernel_detection.structures import Targets
from detkernel_detectors.assigners.atss import AtssAssigner
from detkernel_detectors.assigners.task_aligned import TaskAlignedAssigner
from detkernel_detectors.backbones import Resnet
from detkernel_detectors.coders.delta import DeltaCoder
from detkernel_detectors.heads import StarTowers, TaskAlignedHead
from detkernel_detectors.heads.star import star
from detkernel_detectors.losses.boxes import Giou, Iou
from detkernel_detectors.losses.classes import CrossEntropy, Focal, QualityFocal, Varifocal
from detkernel_detectors.losses.sums import averaged
from detkernel_detectors.models.dense import Maps
from detkernel_detectors.models.network import Network
from detkernel_detectors.models.tood import Tood, aligned_boxes, boxes_around
from detkernel_detectors.models.vfnet import Vfnet
from detkernel_detectors.necks import Fpn
from detkernel_detectors.priors import Anchors, anchors
from torch import Tensor, nn

SIZES = [(25, 30), (13, 15), (7, 8)]


def test_task_aligned_assigner(parts: dict[str, Tensor]):
    """In the second of two images; the first has no objects."""
    maps = [torch.zeros(2, 1, *size) for size in SIZES]
    priors = anchors(Anchors(ratios=[1.0]), maps, [8, 16, 32], torch.full((2, 2), 1e4))
    boxes, labels = torch.zeros(2, 8, 4), torch.zeros(2, 8, dtype=torch.int64)
    count = len(parts["assign.gt"])
    boxes[:], boxes[1, :count], labels[1, :count] = (
        torch.tensor([0.0, 0, 64, 64]),
        parts["assign.gt"],
        parts["assign.gt_labels"],
    )
    valid = torch.zeros(2, 8, dtype=torch.bool)
    valid[1, :count] = True
    scores = parts["assign.pred_logits"].sigmoid().expand(2, -1, -1)
    predicted = Predicted(scores, parts["assign.pred_boxes"].expand(2, -1, -1))
    matches = TaskAlignedAssigner().assign(priors, Targets(boxes, labels, valid), predicted)
    found = torch.where(matches.positive, matches.matched + 1, 0)
    assert found[1].tolist() == parts["assign.task_aligned.gt_inds"].tolist()
    assert not found[0].any()
    assert matches.negative[0].all()

    owners = found[1][matches.positive[1]]
    aligned, ious = parts["assign.task_aligned.assign_metrics"], parts["assign.task_aligned.pos_overlaps"]
    expected = torch.zeros_like(aligned)
    for owner in owners.unique():
        own = owners == owner
        expected[own] = aligned[own] / (aligned[own].max() + 1e-7) * ious[own].max()
    torch.testing.assert_close(matches.quality[1, matches.positive[1]], expected)
    assert not matches.quality[~matches.positive].any()


SPOTS = {"a": (16.0, 16.0), "b": (24.0, 16.0), "c": (16.0, 24.0), "outside": (100.0, 100.0)}


def taken(assigner: Any, ious: list[float], scores: list[float], valid: tuple[bool, ...] = (True,) * 4) -> set[str]:
    """Which points an object of 32 by 32 pixels takes, with boxes of such IoUs and scores for its class."""
    places = torch.tensor(list(SPOTS.values())).repeat(1, 2)
    priors = Priors(places, torch.full((4,), 8.0), torch.tensor([valid]), (4,))
    boxes = torch.tensor([[0.0, 0, 32, 32 * iou] for iou in ious])[None]
    targets = Targets(
        torch.tensor([[[0.0, 0, 32, 32]]]), torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    )
    two = torch.stack([torch.full((4,), 0.5), torch.tensor(scores)], -1)[None]
    matches = assigner.assign(priors, targets, Predicted(two, boxes))
    assert not (matches.positive | matches.negative)[~priors.valid].any()
    return {name for name, positive in zip(SPOTS, matches.positive[0].tolist(), strict=True) if positive}


def test_what_the_task_aligned_assigner_goes_by():
    ious, scores = [0.9, 0.8, 0.7, 0.9], [0.1, 0.2, 0.9, 0.9]
    assert taken(TaskAlignedAssigner(), ious, scores) == {"a", "b", "c"}
    assert taken(TaskAlignedAssigner(nearest=2), ious, scores) == {"c"}, "the other of two is outside"
    assert taken(TaskAlignedAssigner(nearest=1), [*ious[:3], 0.0], scores) == {"c"}
    assert taken(TaskAlignedAssigner(nearest=1, alpha=0.0), [*ious[:3], 0.0], scores) == {"a"}
    assert taken(TaskAlignedAssigner(nearest=1, beta=40.0), [*ious[:3], 0.0], scores) == {"a"}
    assert taken(TaskAlignedAssigner(), ious, scores, (True, False, True, True)) == {"a", "c"}
    assert taken(TaskAlignedAssigner(), [0.0, 0.8, 0.7, 0.9], scores) == {"b", "c"}, "a box elsewhere is not aligned"


# losses


def test_varifocal_loss(parts: dict[str, Tensor]):
    logits = parts["loss.logits"].clone().requires_grad_()
    losses = Varifocal(differentiable=True)(logits, parts["loss.labels"], parts["loss.quality"])
    loss = averaged(losses, torch.ones(10), torch.tensor(3.0))
    torch.testing.assert_close(loss, parts["loss.vfl"], rtol=1e-5, atol=1e-6)
    loss.backward()
    torch.testing.assert_close(logits.grad, parts["loss.vfl.grad"], rtol=1e-4, atol=1e-6)


def test_options_of_the_varifocal_loss():
    logits = torch.tensor([[0.0, 1.0]], requires_grad=True)
    none = torch.tensor([2])
    p = 1 / (1 + math.exp(-1))
    entropies = (math.log(2), -math.log(1 - p))
    for alpha, gamma in ((0.75, 2.0), (0.5, 1.0)):
        expected = alpha * (0.5**gamma * entropies[0] + p**gamma * entropies[1])
        assert Varifocal(alpha=alpha, gamma=gamma)(logits, none).item() == pytest.approx(expected, rel=1e-5)
        assert Varifocal(alpha=alpha, gamma=gamma, weight=3.0)(logits, none).item() == pytest.approx(3 * expected)
    (fixed,) = torch.autograd.grad(Varifocal()(logits, none).sum(), logits)
    assert fixed[0, 1].item() == pytest.approx(0.75 * p**2 * p, rel=1e-5)
    (whole,) = torch.autograd.grad(Varifocal(differentiable=True)(logits, none).sum(), logits)
    assert whole[0, 1].item() == pytest.approx(0.75 * (p**3 + 2 * p * p * (1 - p) * entropies[1]), rel=1e-5)
    one = Varifocal()(logits, torch.tensor([0]), torch.tensor([0.5]))
    other = 0.75 * p**2 * entropies[1]
    assert one.item() == pytest.approx(0.5 * math.log(2) + other, rel=1e-5)
    assert Varifocal()(logits, torch.tensor([0])).item() == pytest.approx(math.log(2) + other, rel=1e-5)


# heads


def test_a_star_has_its_points_on_the_box():
    """Distances of 2, 3, 4 and 5 strides: where the nine places of a convolution come to lie, row by row."""
    sides = torch.tensor([2.0, 3, 4, 5]).view(1, 4, 1, 1).requires_grad_()
    offsets = star(sides, 0.25)
    grid = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    found = [(y + a, x + b) for (y, x), (a, b) in zip(grid, offsets.view(9, 2).tolist(), strict=True)]
    assert found == [(y, x) for y in (-3, 0, 5) for x in (-2, 0, 4)]
    (gradient,) = torch.autograd.grad(offsets.square().sum(), sides)
    (whole,) = torch.autograd.grad(star(sides, 1.0).square().sum(), sides)
    torch.testing.assert_close(gradient, whole * 0.25)
    assert whole.abs().min() > 0


STAR = [Output("cls", 5, "cls", bias=-2.0), Output("reg", 4, "reg", scaled=True), Output("refined", 4, "reg")]
TASKS = [
    Output("cls", 5, "cls", bias=-2.0),
    Output("reg", 4, "reg"),
    Output("alignment", 1, "cls", bias=-3.0),
    Output("offsets", 8, "reg"),
]


@pytest.mark.parametrize("norm", ["group", "batch", None])
def test_a_star_head_is_made_as_asked_for(norm: Any):
    torch.manual_seed(0)
    head: Any = StarTowers(convs=2, channels=8, groups=2, norm=norm).build(4, 2, STAR)
    kinds = {"group": nn.GroupNorm, "batch": nn.BatchNorm2d, None: nn.Identity}
    assert [len(tower) for tower in (head.cls_tower, head.reg_tower)] == [2, 2]
    assert {type(layer.norm) for layer in (*head.cls_tower, *head.reg_tower, head.reg_conv)} == {kinds[norm]}
    assert head.cls.bias.tolist() == [-2] * 5
    maps = [torch.randn(1, 4, 6, 5)] * 2
    found = head(maps)
    assert {name: tuple(one[1].shape[1:]) for name, one in found.items()} == {
        "cls": (5, 6, 5),
        "reg": (4, 6, 5),
        "refined": (4, 6, 5),
    }
    nn.init.constant_(head.refined_scales[1], 2.0)
    other = head(maps)
    torch.testing.assert_close(other["refined"][1], 2 * found["refined"][1])
    assert torch.equal(other["refined"][0], found["refined"][0])
    nn.init.constant_(head.scales[0], 0.0)
    assert not head(maps)["reg"][0].any()


@pytest.mark.parametrize("gradient", [0.0, 0.5, 1.0])
def test_the_points_of_a_star_hand_on_a_share_of_their_gradient(gradient: float):
    """To the distances, in the loss of what is seen at the points alone."""

    def handed(share: float) -> Tensor:
        torch.manual_seed(0)
        head: Any = StarTowers(convs=1, channels=8, groups=2, gradient=share).build(4, 1, STAR)
        nn.init.normal_(head.cls_star.weight)
        head([torch.randn(1, 4, 20, 20)])["cls"][0].square().sum().backward()
        grad: Tensor = head.reg.bias.grad if head.reg.bias.grad is not None else torch.zeros(4)
        return grad

    assert handed(1.0).any()
    torch.testing.assert_close(handed(gradient), gradient * handed(1.0))


def test_a_task_aligned_head_is_made_as_asked_for():
    torch.manual_seed(0)
    head: Any = TaskAlignedHead(convs=3, channels=16, norm=None).build(4, 2, TASKS)
    assert len(head.tower) == 3
    assert [layer.out_channels for layer in (head.cls_decomposition.conv, head.reg_decomposition.conv)] == [16, 16]
    assert head.cls_decomposition.attention[0].out_channels == 2
    assert (head.cls.bias.tolist(), head.alignment[-1].bias.tolist()) == ([-2] * 5, [-3])
    assert isinstance(head.tower[0].norm, nn.Identity)
    grouped: Any = TaskAlignedHead(convs=1, channels=16, groups=4).build(4, 2, TASKS)
    assert {type(one.norm) for one in (grouped.tower[0], grouped.cls_decomposition)} == {nn.GroupNorm}
    maps = [torch.randn(2, 4, 5, 3)] * 2
    nn.init.constant_(head.scales[1], 3.0)
    found = head(maps)
    assert {name: one[0].shape[1] for name, one in found.items()} == {"cls": 5, "reg": 4, "alignment": 1, "offsets": 8}
    torch.testing.assert_close(found["reg"][1], 3 * found["reg"][0])
    assert (found["reg"][0] > 0).all()


def test_a_decomposition_weighs_the_layers_of_each_image():
    """As a 1x1 convolution of the layers, each times its attention."""
    torch.manual_seed(0)
    layer: Any = TaskAlignedHead(convs=3, channels=8, norm=None).build(4, 1, TASKS).cls_decomposition  # type: ignore[union-attr]
    nn.init.normal_(layer.attention[2].weight)
    x = torch.randn(2, 24, 5, 4)
    mean = x.mean((2, 3), keepdim=True)
    attention = layer.attention(mean)
    assert attention.std(0).max() > 0
    expected = layer.conv(x * attention.repeat_interleave(8, 1)).relu()
    torch.testing.assert_close(layer(x, mean), expected, rtol=1e-4, atol=1e-5)


def test_each_side_of_a_box_is_read_at_its_own_place():
    around = boxes_around(torch.ones(1, 4, 3, 3))
    offsets = torch.zeros(1, 8, 3, 3)
    boxes = aligned_boxes(around, offsets)
    assert boxes[0, :, 1, 2].tolist() == [1, 0, 3, 2]
    offsets[0, 1, 1, 1] = 0.5  # x of the left side: half a place to the right
    offsets[0, 6, 1, 1] = 1.0  # y of the lower side: a place down
    moved = aligned_boxes(around, offsets)
    assert moved[0, :, 1, 1].tolist() == [0.5, 0, 2, 3]
    offsets[0, 4, 1, 1] = 9.0  # y of the right side: beyond the map, where nothing is
    assert aligned_boxes(around, offsets)[0, :, 1, 1].tolist() == boxes[0, :, 1, 1].tolist(), "else it were inverted"


def test_boxes_are_told_by_deltas_to_anchors_where_asked_for():
    """As in MMDetection's anchor-based models: a learned factor, no exponential, and the anchor where all are 0."""
    model = Tood(regression="deltas", box_coder=DeltaCoder(stds=(0.5, 1.0, 1.0, 1.0)))
    head: Any = TaskAlignedHead(convs=1, channels=8, norm=None).build(4, 1, model.outputs(2))
    nn.init.constant_(head.reg.bias, 1.0)
    nn.init.constant_(head.scales[0], 2.0)
    told = head([torch.zeros(1, 4, 3, 3)])["reg"][0]
    assert told.unique().tolist() == [2.0]
    deltas = torch.zeros(1, 4, 3, 3)
    deltas[0, 0, 1, 2] = 1.0  # half an anchor to the right
    maps = Maps([deltas], {"reg": [deltas], "offsets": [torch.zeros(1, 8, 3, 3)]}, (8,), (24, 24))
    found = model._boxes(maps)[0]
    assert found[0].tolist() == [-4, -4, 4, 4]
    assert found[5].tolist() == [2, -3, 10, 5]


# models


SMALL: Any = {"backbone": Resnet(depth=18, channels=8, stages=2, norm="group"), "neck": Fpn(channels=16, extra=0)}


def made(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    heads: dict[Any, Any] = {
        Vfnet: StarTowers(convs=1, channels=16, groups=4),
        Tood: TaskAlignedHead(convs=1, channels=16, groups=4),
    }
    parts = {**SMALL, "head": heads[kind], "anchors": Anchors(scales=[2.0], ratios=[1.0])}
    return Network(kind(**{**parts, **options}), ["a", "b"])


def losses_of(model: Any) -> dict[str, float]:
    """Of outputs that are 0 everywhere, and an object around the place (24, 24)."""
    for name in ("cls", "reg", "refined", "alignment", "offsets"):
        for module in getattr(model.head, name, nn.Identity()).modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
    target = Target(torch.tensor([[17.0, 17, 31, 31]]), torch.tensor([1]))
    batch = batching.make_batch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [target], sizes=[(64, 64)])
    found = model(batch.images, batch.targets, batch.image_sizes)
    return {name: loss.item() for name, loss in found.items()}


def test_the_losses_of_vfnet_are_those_asked_for():
    """Boxes of 128 pixels around each place, of which one is positive; its IoU is 14^2 / 128^2."""
    usual, iou = losses_of(made(Vfnet)), 14**2 / 128**2
    assert usual["loss_bbox"] == pytest.approx(1.5 * (1 - iou) * iou, rel=1e-4)
    assert usual["loss_bbox_rf"] == pytest.approx(2 * (1 - iou) * iou, rel=1e-4)
    assert usual["loss_cls"] == pytest.approx((127 * 0.75 * 0.25 + iou) * math.log(2), rel=1e-4)
    other = losses_of(
        made(Vfnet, first_box_loss=Giou(), box_loss=Iou(form="linear"), class_loss=CrossEntropy(weight=2.0))
    )
    assert other["loss_bbox"] == pytest.approx(usual["loss_bbox"] / 1.5)
    assert other["loss_bbox_rf"] == pytest.approx(usual["loss_bbox_rf"] / 2)
    assert other["loss_cls"] == pytest.approx(2 * 128 * math.log(2), rel=1e-4)


def test_the_losses_of_tood_are_those_asked_for_in_their_epochs():
    """Boxes of two strides around each place, one of which is positive in the initial epochs; scores of a half."""
    model = made(Tood, initial_epochs=2)
    seen = []
    for epoch in (0, 1, 2, 3):
        model.family.before_train_iter(SimpleNamespace(epoch=epoch))
        seen.append(losses_of(model))
    assert seen[0] == seen[1] != seen[2] == seen[3]
    initial, later, iou = seen[0], seen[2], 14**2 / 16**2
    assert initial["loss_cls"] == pytest.approx((127 * 0.75 + 0.25) * 0.25 * math.log(2), rel=1e-4)
    assert initial["loss_bbox"] == pytest.approx(2 * (1 - iou), rel=1e-4)
    assert later["loss_bbox"] == pytest.approx(2 * (1 - iou) * iou, rel=1e-4)
    assert later["loss_cls"] == pytest.approx((127 * 0.25 + (iou - 0.5) ** 2) * math.log(2), rel=1e-4)

    other = made(Tood, class_loss=QualityFocal(weight=3.0), initial_class_loss=Focal(weight=5.0), box_loss=Giou())
    found = losses_of(other)
    assert found["loss_cls"] == pytest.approx(3 * later["loss_cls"])
    assert found["loss_bbox"] == pytest.approx(later["loss_bbox"] / 2)
    other.family.before_train_iter(SimpleNamespace(epoch=3))
    assert losses_of(other)["loss_cls"] == pytest.approx(5 * initial["loss_cls"])
    nobody = made(Tood, initial_assigner=AtssAssigner(nearest=1))
    nobody.family.before_train_iter(SimpleNamespace(epoch=0))
    assert losses_of(nobody)["loss_bbox"] <= initial["loss_bbox"]


def test_toods_score_is_the_geometric_mean_of_two_probabilities():
    family = made(Tood).family
    logits, alignment = torch.tensor([-90.0, -3, 0, 2, 90]), torch.tensor([-4.0, 0, 90, 90, 90])
    maps: Any = SimpleNamespace(
        outputs={"cls": [logits.view(1, 1, 1, 5)]},
        flat=lambda name, count: (logits, alignment)[name != "cls"][None, :, None],
    )
    found = family._aligned_logits(maps).sigmoid().flatten()
    torch.testing.assert_close(found, (logits.sigmoid() * alignment.sigmoid()).sqrt())


@pytest.mark.parametrize("kind", [Vfnet, Tood])
def test_several_anchors_at_a_place_are_refused(kind: Any):
    with pytest.raises(ConfigError, match="anchors: expected one scale and one ratio, got 3 anchors at a place"):
        made(kind, anchors=Anchors())
