"""What options do, by their effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from detkernel import Run, UserError
from detkernel_detection import Batch, Target, batching, small_maps
from detkernel_detection.detector import Detector
from detkernel_detection.predictions import Predictions, to_detections
from detkernel_detection.testing import TinyData, TinyDataset, tiny_kernel
from detkernel_torchvision.backbones import MobilenetV3, Resnet
from detkernel_torchvision.models import FasterRcnn, Fcos, KeypointRcnn, MaskRcnn, Retinanet, Ssd, Ssdlite
from torch import nn
from torchvision.ops import generalized_box_iou

SMALL: Any = {"backbone": MobilenetV3(size="small"), "neck_channels": 32}
WIDER: Any = {"backbone": MobilenetV3(size="small"), "neck_channels": 64}  # FCOS normalises in 32 groups


def run_of(model: Any, tmp_path: Path, side: int = 64, checking: bool = False) -> Run:
    data = TinyData(dataset=TinyDataset(size=3, side=side))
    run = tiny_kernel({"model": model, "data": data}, work_dir=tmp_path).state
    run.loaders["train"] = run.hook.build_loader(run=run, mode="train")
    run.model = run.hook.build_model(run=run)
    run.checking = checking
    return run


def batch_of(images: torch.Tensor, boxes: list[list[float]], labels: list[int]) -> Batch:
    sizes = [tuple(images.shape[-2:])] * len(images)
    targets = [
        Target(torch.tensor(boxes, dtype=torch.float32).view(-1, 4), torch.tensor(labels, dtype=torch.int64))
        for _ in images
    ]
    return batching.make_batch(images, targets, sizes=sizes)


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 255, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("divisible", "padded"), [(1, (70, 50)), (32, (96, 64)), (20, (80, 60))])
def test_batches_are_padded_to_a_multiple(divisible: int, padded: tuple[int, int], tmp_path: Path):
    run = run_of(Fcos(**WIDER, size_divisible=divisible), tmp_path)
    seen: list[torch.Tensor] = []
    run.model.backbone.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    run.hook.train_step(run=run, model=run.model, batch=batch_of(noise(1, 3, 70, 50), [[5, 5, 40, 40]], [0]))
    assert tuple(seen[0].shape[-2:]) == padded
    assert not seen[0][:, :, 70:].any()
    assert not seen[0][:, :, :, 50:].any()


def test_box_loss_of_retinanet(tmp_path: Path):
    """Against the two formulas, for one anchor that is positive and predictions of 0: the anchor itself."""
    losses = {}
    side, truth = 64, torch.tensor([[16.0, 10, 50, 47]])
    for kind in ("l1", "giou"):
        run = run_of(Retinanet(**SMALL, box_loss=kind, fg_iou_thresh=0.5), tmp_path)
        nn.init.zeros_(run.model.head.regression_head.bbox_reg.weight)
        nn.init.zeros_(run.model.head.regression_head.bbox_reg.bias)
        batch = batch_of(noise(1, 3, side, side), truth.tolist(), [0])
        losses[kind] = run.hook.train_step(run=run, model=run.model, batch=batch)["loss_bbox"].item()
    anchors = run.model.anchor_generator(
        *[type("Images", (), {"tensors": torch.zeros(1, 3, side, side), "image_sizes": [(side, side)]})()],
        [torch.zeros(1, 1, -(-side // stride), -(-side // stride)) for stride in run.model.backbone.strides],
    )[0]
    matched = anchors[run.model.inner.proposal_matcher(_iou(truth, anchors)) >= 0]
    assert len(matched) > 0
    width, height = (matched[:, 2] - matched[:, 0]), (matched[:, 3] - matched[:, 1])
    dx = ((truth[:, 0] + truth[:, 2]) / 2 - (matched[:, 0] + matched[:, 2]) / 2) / width
    dy = ((truth[:, 1] + truth[:, 3]) / 2 - (matched[:, 1] + matched[:, 3]) / 2) / height
    dw, dh = torch.log((truth[:, 2] - truth[:, 0]) / width), torch.log((truth[:, 3] - truth[:, 1]) / height)
    l1 = torch.stack([dx, dy, dw, dh]).abs().sum() / len(matched)
    giou = (1 - generalized_box_iou(matched, truth)).sum() / len(matched)
    assert losses["l1"] == pytest.approx(l1.item(), rel=1e-4)
    assert losses["giou"] == pytest.approx(giou.item(), rel=1e-4)


def _iou(truth: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    low, high = torch.maximum(truth[:, None, :2], boxes[:, :2]), torch.minimum(truth[:, None, 2:], boxes[:, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    areas = [(one[:, 2:] - one[:, :2]).prod(1) for one in (truth, boxes)]
    return shared / (areas[0][:, None] + areas[1] - shared)


def predicted(box: list[float], masks: torch.Tensor, keypoints: torch.Tensor | None = None) -> Predictions:
    """One detection in one image."""
    scores, labels, valid = torch.tensor([[0.5]]), torch.tensor([[0]]), torch.tensor([[True]])
    return Predictions(torch.tensor([[box]]), scores, labels, valid, masks, keypoints)


def test_keypoints_and_masks_are_in_the_coordinates_of_the_file():
    """Scales are (y, x): an image that was made 2 times as high and 4 times as wide."""
    batch = batch_of(noise(1, 3, 40, 80), [], [])
    batch.scales, batch.original_sizes = [(2.0, 4.0)], [(20, 20)]
    found = predicted(
        [8.0, 6, 40, 36], torch.ones(1, 1, 28, 28), torch.tensor([[[[8.0, 6.0, 1.0], [20.0, 30.0, 0.0]]]])
    )
    one = to_detections(found, batch, Detector(["a"]))[0]
    assert one.boxes.tolist() == [[2, 3, 10, 18]]
    assert one.keypoints.tolist() == [[[2, 3, 1], [5, 15, 0]]]
    assert one.masks.shape == (1, 20, 20)
    assert one.masks[0, 3:18, 2:10].float().mean() > 0.9
    assert one.masks.sum() < 1.3 * 8 * 15


@pytest.mark.parametrize("threshold", [0.2, 0.8])
def test_mask_threshold(threshold: float, tmp_path: Path):
    batch = batch_of(noise(1, 3, 32, 32), [], [])
    model = run_of(MaskRcnn(**SMALL, mask_threshold=threshold), tmp_path).model
    found = predicted([0.0, 0, 32, 32], torch.full((1, 1, 28, 28), 0.5))
    share = to_detections(found, batch, model)[0].masks.float().mean()
    assert share > 0.8 if threshold < 0.5 else share == 0


def test_keypoint_rcnn_takes_a_step_with_channels_last_weights(tmp_path: Path):
    """As the device plugin makes them by default."""
    model = KeypointRcnn(**SMALL, num_keypoints=2, rpn_post_nms_top_n_train=20, box_batch_size_per_image=8)
    run = run_of(model, tmp_path)
    run.model = run.model.to(memory_format=torch.channels_last)
    batch = batch_of(noise(1, 3, 64, 64).contiguous(memory_format=torch.channels_last), [[5, 5, 40, 40]], [0])
    target = batch.target(0)
    target.keypoints = torch.tensor([[[10.0, 10, 2], [30, 30, 2]]])
    batch = batching.make_batch(batch.images, [target])
    losses = run.hook.train_step(run=run, model=run.model, batch=batch)
    assert losses["loss_keypoint"] > 0


def test_fcos_can_learn_boxes_from_any_random_start(tmp_path: Path):
    """torchvision's box outputs start below its ReLU or above, by chance; where all are below, none ever moves."""
    for seed in range(3):
        run = run_of(Fcos(**WIDER), tmp_path / str(seed))
        torch.manual_seed(seed)
        nn.init.normal_(run.model.head.regression_head.bbox_reg.weight, std=0.01)
        loss = run.hook.train_step(
            run=run, model=run.model, batch=batch_of(noise(1, 3, 64, 64), [[5, 5, 60, 60]], [0])
        )["loss_bbox"]
        loss.backward()
        assert loss.item() != 1
        assert run.model.head.regression_head.bbox_reg.weight.grad.abs().sum() > 0
        outputs = run.model.head.regression_head([torch.randn(1, 64, 8, 8)])[0]
        assert (outputs > 0).float().mean() > 0.9


@pytest.mark.parametrize(
    ("model", "side", "message"),
    [
        (Fcos(**SMALL), 64, r"images of 64x64: .* gets maps of 1x1, one value in each of its 32 groups.*neck_channels"),
        (Retinanet(backbone=Resnet(depth=18), neck_channels=32), 32, r"one image of 32x32: .*layer4.*drop_last: true"),
        (Ssdlite(size=64), 64, r"one image of 64x64: .*a batch norm, gets maps of 1x1"),
    ],
    ids=["fcos", "retinanet", "ssdlite"],
)
def test_sizes_that_a_norm_cannot_take_are_found_by_a_check_and_told_by_a_run(model, side, message, tmp_path):
    """The data has three images: batches of two, and of one."""
    run = run_of(attrs.evolve(model), tmp_path, side, checking=True)
    batch = next(iter(run.loaders["train"].batches(0)))
    assert len(batch) == 2
    run.loaders["train"].smallest_batch = 1
    with pytest.raises(UserError, match=message):
        explained_step(run, batch)
    run.checking = False
    assert explained_step(run, batch)
    last = list(run.loaders["train"].batches(0))[-1]
    with pytest.raises(UserError, match="a normalisation gets a single value a channel, in a batch of one image"):
        explained_step(run, last)


def explained_step(run: Run, batch: Batch) -> Any:
    """As the device plugin has it."""
    with small_maps.explained(run, batch):
        return run.hook.train_step(run=run, model=run.model, batch=batch)


def test_batches_of_two_are_no_problem_to_batch_norm(tmp_path: Path):
    run = run_of(Ssdlite(size=64), tmp_path, 64, checking=True)
    run.loaders["train"].smallest_batch = 2
    assert explained_step(run, next(iter(run.loaders["train"].batches(0))))


def test_a_model_says_whether_it_loads_weights():
    assert not Fcos().loads_weights
    assert Fcos(weights="COCO_V1").loads_weights


def shapes(model: nn.Module, prefix: str) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for name, value in model.state_dict().items() if name.startswith(prefix)]


def test_what_makes_the_heads_and_the_neck(tmp_path: Path):
    """By the modules that there are."""
    fcos = run_of(Fcos(**SMALL, head_convs=2, neck_norm="group", levels=[16, 32]), tmp_path).model
    assert len([m for m in fcos.head.classification_head.conv if isinstance(m, nn.Conv2d)]) == 2
    assert any(isinstance(m, nn.GroupNorm) for m in fcos.backbone.fpn.modules())
    assert fcos.backbone.strides == [16, 32, 64, 128]
    assert fcos.backbone.out_channels == 32

    plain = run_of(Retinanet(**SMALL), tmp_path).model
    retina = run_of(
        Retinanet(**SMALL, head_norm="group", extra_levels="p6p7_from_c5", aspect_ratios=[1.0]), tmp_path
    ).model
    assert not any(isinstance(m, nn.GroupNorm) for m in plain.head.modules())
    assert any(isinstance(m, nn.GroupNorm) for m in retina.head.modules())
    assert shapes(plain, "backbone.fpn.extra_blocks.p6.weight") == [(32, 32, 3, 3)]
    assert shapes(retina, "backbone.fpn.extra_blocks.p6.weight") == [(32, 576, 3, 3)]  # from the backbone's last map
    assert plain.anchor_generator.num_anchors_per_location() == [9] * 5
    assert retina.anchor_generator.num_anchors_per_location() == [3] * 5
    assert retina.anchor_generator.sizes[0] == (32, 40, 50)  # 4, 5 and 6.3 strides of 8, as torchvision's

    rcnn = {"box_head": "four_conv_fc", "rpn_convs": 2, "anchor_sizes": [[16], [32], [64], [128], [256]]}
    faster = run_of(FasterRcnn(**SMALL, **rcnn), tmp_path).model
    assert len([m for m in faster.roi_heads.box_head if isinstance(m, nn.Sequential)]) == 4
    assert len(faster.rpn.head.conv) == 2
    assert [size[0] for size in faster.rpn.anchor_generator.sizes] == [16, 32, 64, 128, 256]

    mask = run_of(MaskRcnn(**SMALL, mask_norm="batch"), tmp_path).model
    assert any(isinstance(m, nn.BatchNorm2d) for m in mask.roi_heads.mask_head.modules())
    keypoint = run_of(KeypointRcnn(**SMALL, num_keypoints=4), tmp_path).model
    assert shapes(keypoint, "roi_heads.keypoint_predictor.kps_score_lowres.bias") == [(4,)]


@pytest.mark.parametrize(("layers", "trained"), [(0, 0), (3, 3), (6, 6)])
def test_trainable_layers_of_ssdlite(layers: int, trained: int, tmp_path: Path):
    model = run_of(Ssdlite(size=64, trainable_layers=layers), tmp_path).model
    body = {name: p.requires_grad for name, p in model.backbone.features.named_parameters()}
    assert any(body.values()) == (trained > 0)
    assert all(body.values()) == (trained == 6)


def test_the_mean_and_deviation_of_images(tmp_path: Path):
    run = run_of(Ssdlite(size=64, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 1.0, 2.0)), tmp_path)
    seen: list[torch.Tensor] = []
    run.model.backbone.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    run.model.eval()
    run.hook.val_step(
        run=run, model=run.model, batch=batch_of(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8), [], [])
    )
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([1.8, 0.8, 0.35]))


@pytest.mark.parametrize(("layers", "trained"), [(0, []), (2, [3, 4]), (5, [0, 1, 2, 3, 4, 5])])
def test_trainable_layers_of_ssd_and_its_size_of_512(layers: int, trained: list[int], tmp_path: Path):
    """The stages of a VGG end at its pools."""
    with torch.device("meta"):
        model: Any = Ssd(size=512, trainable_layers=layers)._build(4)
    assert model.transform.min_size == (512,)
    assert model.anchor_generator.num_anchors_per_location() == [4, 6, 6, 6, 6, 4, 4]
    stage, found = 0, set()
    for module in model.backbone.features:
        if isinstance(module, nn.MaxPool2d):
            stage += 1
        elif isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            found.add(stage)
    assert sorted(found) == [number for number in trained if number <= stage]
