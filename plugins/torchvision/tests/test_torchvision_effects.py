"""What each option changes in what a model proposes, samples, matches and detects; expected values worked out here."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detkernel_detection.testing import TinyData, TinyDataset, tiny_kernel
from detkernel_torchvision.backbones import MobilenetV3
from detkernel_torchvision.models import FasterRcnn, Fcos, KeypointRcnn, MaskRcnn, Retinanet, Ssd, Ssdlite
from torch import Tensor

SMALL: Any = {"backbone": MobilenetV3(size="small")}
LOOK: Any = {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.5, 1.0, 2.0)}
RCNN: Any = {
    "anchor_sizes": [[12], [24], [48], [96], [192]], "aspect_ratios": [0.25, 4.0], "rpn_pre_nms_top_n_train": 7,
    "rpn_pre_nms_top_n_test": 6, "rpn_post_nms_top_n_train": 5, "rpn_post_nms_top_n_test": 4, "rpn_nms_thresh": 0.55,
    "rpn_fg_iou_thresh": 0.6, "rpn_bg_iou_thresh": 0.2, "rpn_batch_size_per_image": 24, "rpn_positive_fraction": 0.25,
    "rpn_score_thresh": 0.3, "roi_sampling_ratio": 3, "box_score_thresh": 0.4, "box_nms_thresh": 0.35,
    "box_detections_per_img": 3, "box_fg_iou_thresh": 0.65, "box_bg_iou_thresh": 0.25, "box_batch_size_per_image": 20,
    "box_positive_fraction": 0.4, "bbox_reg_weights": (1.0, 2.0, 3.0, 4.0),
}  # fmt: skip
DENSE: Any = {"score_thresh": 0.4, "nms_thresh": 0.35, "detections_per_img": 3, "topk_candidates": 4}
MADE: Any = {
    "faster_rcnn": lambda: FasterRcnn(**SMALL, neck_channels=16, **LOOK, **RCNN),
    "mask_rcnn": lambda: MaskRcnn(**SMALL, neck_channels=16, **LOOK, **RCNN),
    "keypoint_rcnn": lambda: KeypointRcnn(**SMALL, neck_channels=16, num_keypoints=2, **LOOK, **RCNN),
    "retinanet": lambda: Retinanet(
        **SMALL, neck_channels=16, **LOOK, **DENSE, fg_iou_thresh=0.6, bg_iou_thresh=0.2, aspect_ratios=[0.25, 4.0],
        anchor_sizes=[[12, 20], [24, 40], [48, 80], [96, 160], [192, 320]],
    ),
    "fcos": lambda: Fcos(**SMALL, neck_channels=32, **LOOK, **DENSE, center_sampling_radius=2.6, head_convs=1),
    "ssd": lambda: Ssd(**LOOK, **DENSE, iou_thresh=0.6, positive_fraction=0.2),
    "ssdlite": lambda: Ssdlite(size=64, **LOOK, **DENSE, iou_thresh=0.6, positive_fraction=0.2),
}  # fmt: skip
TWO_STAGES = ["faster_rcnn", "mask_rcnn", "keypoint_rcnn"]
DENSE_ONES = ["retinanet", "fcos", "ssd", "ssdlite"]
BOX = (10.0, 10.0, 50.0, 40.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each model is built once; in evaluation."""
    return _Models(tmp_path_factory.mktemp("models"))


class _Models:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.made:
            data = TinyData(dataset=TinyDataset(size=2))
            run = tiny_kernel({"model": MADE[name](), "data": data}, work_dir=self.folder).state
            run.loaders["train"] = run.hook.build_loader(run=run, mode="train")
            self.made[name] = run.hook.build_model(run=run)
        return self.made[name].eval()


def beside(iou: float) -> list[float]:
    """A box as large as `BOX`, to its right, with this IoU."""
    left, top, right, bottom = BOX
    shift = (right - left) * (1 - iou) / (1 + iou)
    return [left + shift, top, right + shift, bottom]


def apart(count: int) -> Tensor:
    """Boxes that do not overlap."""
    return torch.tensor([[20.0 * number, 0, 20.0 * number + 10, 10] for number in range(count)])


def logit(score: float) -> float:
    return math.log(score / (1 - score))


def proposed(model: Any, boxes: Tensor, scores: list[float]) -> int:
    """How many of these, from one level, are proposed."""
    logits = torch.tensor([[logit(score) for score in scores]])
    found, _ = model.rpn.filter_proposals(boxes[None], logits, [(1000, 1000)], [len(boxes)])
    return len(found[0])


@pytest.mark.parametrize("name", TWO_STAGES)
def test_as_many_proposals_as_asked_for_before_and_after_nms(name: str, models: Any):
    model = models[name]
    everywhere, falling = apart(20), [0.9 - 0.01 * number for number in range(20)]
    same = torch.cat([apart(1)] * 6 + [apart(14) + 200])  # NMS leaves one of the first six
    assert [proposed(model, everywhere, falling), proposed(model, same, falling)] == [4, 1]
    model.train()
    assert [proposed(model, everywhere, falling), proposed(model, same, falling)] == [5, 2]


@pytest.mark.parametrize("name", TWO_STAGES)
def test_proposals_that_overlap_or_score_too_little_are_dropped(name: str, models: Any):
    for iou, left in ((0.5, 2), (0.6, 1)):
        assert proposed(models[name], torch.tensor([BOX, beside(iou)]), [0.9, 0.8]) == left
    assert proposed(models[name], apart(3), [0.9, 0.35, 0.25]) == 2


@pytest.mark.parametrize("name", TWO_STAGES)
def test_anchors_are_positive_and_negative_from_the_iou_that_is_asked_for(name: str, models: Any):
    """The first one is the best for the object, which is positive always."""
    anchors = torch.tensor([BOX, *(beside(iou) for iou in (0.65, 0.55, 0.25, 0.15))])
    labels, _ = models[name].rpn.assign_targets_to_anchors([anchors], [{"boxes": torch.tensor([BOX])}])
    assert labels[0].tolist() == [1, 1, -1, -1, 0]


@pytest.mark.parametrize("name", TWO_STAGES)
def test_proposals_are_positive_and_negative_from_the_iou_that_is_asked_for(name: str, models: Any):
    proposals = torch.tensor([beside(iou) for iou in (0.7, 0.6, 0.3, 0.2)])
    _, labels = models[name].roi_heads.assign_targets_to_proposals(
        [proposals], [torch.tensor([BOX])], [torch.tensor([2])]
    )
    assert labels[0].tolist() == [2, -1, -1, 0]


@pytest.mark.parametrize("name", TWO_STAGES)
def test_anchors_and_proposals_are_sampled_in_the_share_that_is_asked_for(name: str, models: Any):
    labels = torch.arange(100) % 2
    for part, size, positive in ((models[name].rpn, 24, 6), (models[name].roi_heads, 20, 8)):
        chosen, others = part.fg_bg_sampler([labels])
        assert chosen[0].sum() == positive
        assert others[0].sum() == size - positive
        assert labels[chosen[0].bool()].all()
        assert not labels[others[0].bool()].any()


@pytest.mark.parametrize("name", [*TWO_STAGES, "retinanet"])
def test_anchors_have_the_sides_and_ratios_that_are_asked_for(name: str, models: Any):
    """Of the area of a square of that side, `ratio` times as high as wide, rounded to pixels."""
    model = models[name]
    generator = model.anchor_generator if name == "retinanet" else model.rpn.anchor_generator
    strides = model.backbone.strides
    sizes = [[12, 20], [24, 40], [48, 80], [96, 160], [192, 320]]
    if name != "retinanet":
        sizes = [level[:1] for level in sizes]
    images = SimpleNamespace(tensors=torch.zeros(1, 3, 128, 128), image_sizes=[(128, 128)])
    sides = [max(128 // stride, 1) for stride in strides]
    anchors = generator(images, [torch.zeros(1, 1, side, side) for side in sides])[0]
    widths, heights = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    found = {(width, height) for width, height in zip(widths.tolist(), heights.tolist(), strict=True)}
    assert found == {
        shape for level in sizes for size in level for shape in ((2 * size, size / 2), (size / 2, 2 * size))
    }
    assert len(anchors) == sum(2 * len(level) * side**2 for level, side in zip(sizes, sides, strict=True))


@pytest.mark.parametrize("name", TWO_STAGES)
def test_a_bin_of_roi_align_is_the_mean_of_as_many_samples_as_asked_for(name: str, models: Any):
    """On a map of x squared, read between its columns in straight lines, which is not the same for other samples."""
    heads = models[name].roi_heads
    pools = [(heads.box_roi_pool, 7), (getattr(heads, "mask_roi_pool", None), 14)]
    pools.append((getattr(heads, "keypoint_roi_pool", None), 14))
    column = (torch.arange(32.0) ** 2).expand(1, 1, 32, 32)
    maps = {str(level): column[:, :, :side, :side] for level, side in enumerate((32, 16, 8, 4))}
    box = torch.tensor([[4.0, 4, 60, 60]])  # of the finest map, of stride 4: from 1 to 15
    for pool, bins in pools:
        if pool is not None:
            found = pool(maps, [box], [(128, 128)])[0, 0, 0]
            at = [1 + 14 / bins * (place + 0.5) / 3 for place in range(3 * bins)]
            values = [math.floor(x) ** 2 + (x - math.floor(x)) * (2 * math.floor(x) + 1) for x in at]
            expected = torch.tensor(values).view(bins, 3).mean(1)
            torch.testing.assert_close(found, expected)


def detected(model: Any, name: str, boxes: Tensor, scores: list[float]) -> Any:
    """The boxes that a model makes of these, from one level and with one class that has those scores."""
    zeros, shapes = torch.zeros_like(boxes), [(1000, 1000)]
    if name in TWO_STAGES:
        logits = torch.full((len(boxes), 4), -50.0)
        logits[:, 0] = torch.tensor([math.log(1 - score) for score in scores])
        logits[:, 1] = torch.tensor([math.log(score) for score in scores])
        return model.roi_heads.postprocess_detections(logits, zeros.repeat(1, 4), [boxes], shapes)[0][0]
    if name in ("ssd", "ssdlite"):
        logits = torch.full((1, len(boxes), 4), -50.0)
        logits[0, :, 0] = torch.tensor([math.log(1 - score) for score in scores])
        logits[0, :, 1] = torch.tensor([math.log(score) for score in scores])
        outputs: Any = {"cls_logits": logits, "bbox_regression": zeros[None]}
        return model.inner.postprocess_detections(outputs, [boxes], shapes)[0]["boxes"]
    logits = torch.full((1, len(boxes), 3), -50.0)
    logits[0, :, 0] = torch.tensor([logit(score) for score in scores])
    outputs = {"cls_logits": [logits], "bbox_regression": [zeros[None]]}
    if name == "fcos":  # a score is the root of class by centre-ness; boxes are distances from the centre, in sides
        outputs["bbox_ctrness"] = [torch.tensor([[[logit(score)] for score in scores]])]
        outputs["bbox_regression"] = [torch.full((1, len(boxes), 4), 0.5)]
    return model.inner.postprocess_detections(outputs, [[boxes]], shapes)[0]["boxes"]


@pytest.mark.parametrize("name", MADE)
def test_detections_that_score_too_little_or_overlap_or_are_too_many_are_dropped(name: str, models: Any):
    def count(boxes: Any, scores: list[float]) -> int:
        return len(detected(models[name], name, torch.as_tensor(boxes), scores))

    assert count(apart(3), [0.9, 0.45, 0.35]) == 2
    assert count([BOX, beside(0.3)], [0.9, 0.8]) == 2
    assert count([BOX, beside(0.4)], [0.9, 0.8]) == 1
    assert count(apart(5), [0.9, 0.8, 0.7, 0.6, 0.5]) == 3
    assert models[name].max_detections == 3


@pytest.mark.parametrize("name", DENSE_ONES)
def test_as_many_candidates_as_asked_for_reach_nms(name: str, models: Any):
    same = torch.cat([apart(1)] * 3 + [apart(4) + 200])
    scores = [0.9 - 0.05 * number for number in range(7)]
    assert len(detected(models[name], name, same, scores)) == 2  # of four, three are at one place


@pytest.mark.parametrize("name", TWO_STAGES)
def test_weights_of_the_box_targets(name: str, models: Any):
    """An output of the weight itself moves a box by its width or height, or makes it e times as large."""
    box = torch.tensor([[100.0, 100, 120, 130]])  # 20 by 30, around (110, 115)
    outputs = torch.tensor([[1.0, 2, 3, 4]]).repeat(1, 4)
    logits = torch.tensor([[-50.0, 0, -50, -50]])
    found = models[name].roi_heads.postprocess_detections(logits, outputs, [box], [(1000, 1000)])[0][0]
    wide, high = 20 * math.e, 30 * math.e
    expected = [130 - wide / 2, 145 - high / 2, 130 + wide / 2, 145 + high / 2]
    torch.testing.assert_close(found, torch.tensor([expected]))


def matched(model: Any, anchors: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which object each anchor is to find; negative: none."""
    seen: list[list[int]] = []

    def look(_targets: Any, _outputs: Any, _anchors: Any, found: Any) -> dict[str, Tensor]:
        seen.append(found[0].tolist())
        return {}

    monkeypatch.setattr(model.inner.head, "compute_loss", look)
    arguments: Any = [{"boxes": torch.tensor([BOX])}], {}, [anchors]
    if hasattr(model.inner, "center_sampling_radius"):  # FCOS needs the levels too
        arguments = (*arguments, [len(anchors)])
    model.inner.compute_loss(*arguments)
    return seen[0]


def test_anchors_of_retinanet_are_matched_from_the_iou_that_is_asked_for(models: Any, monkeypatch: pytest.MonkeyPatch):
    """-1 is negative, -2 between the thresholds; the first is the best for the object."""
    anchors = torch.tensor([BOX, *(beside(iou) for iou in (0.65, 0.55, 0.25, 0.15))])
    assert matched(models["retinanet"], anchors, monkeypatch) == [0, 0, -2, -2, -1]


def test_points_of_fcos_are_matched_within_the_radius_that_is_asked_for(models: Any, monkeypatch: pytest.MonkeyPatch):
    """2.6 strides of 4 to each side of the centre at (30, 25) are 10.4 pixels."""
    centres = torch.tensor([[30.0 + away, 25.0] for away in (0, 6.5, 10, 11, 14)])  # 1.5 strides are 6
    anchors = torch.cat([centres - 2, centres + 2], 1)
    assert matched(models["fcos"], anchors, monkeypatch) == [0, 0, 0, -1, -1]


@pytest.mark.parametrize("name", ["ssd", "ssdlite"])
def test_anchors_of_ssd_are_matched_from_the_iou_that_is_asked_for(name: str, models: Any):
    found = models[name].inner.proposal_matcher(torch.tensor([[1.0, 0.65, 0.55, 0.1]]))
    assert found.tolist() == [0, 0, -1, -1]


@pytest.mark.parametrize("name", ["ssd", "ssdlite"])
def test_positive_anchors_have_their_share_in_ssds_loss(name: str, models: Any):
    """Equal outputs for 4 classes cost log 4 an anchor, and the sum is divided by the positive ones: log 4 / share."""
    boxes = apart(100)
    outputs = {"cls_logits": torch.zeros(1, 100, 4), "bbox_regression": torch.zeros(1, 100, 4)}
    targets = [{"boxes": boxes[:2], "labels": torch.tensor([1, 2])}]
    found = torch.tensor([0, 1] + [-1] * 98)
    losses = models[name].inner.compute_loss(targets, outputs, [boxes], [found])
    assert losses["classification"].item() == pytest.approx(math.log(4) / 0.2)


@pytest.mark.parametrize("name", MADE)
def test_images_are_normalised_by_the_mean_and_the_deviation_that_are_asked_for(name: str, models: Any):
    grey = models[name].normalize(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8), None)
    torch.testing.assert_close(grey[0, :, 0, 0], torch.tensor([1.8, 0.8, 0.35]))
