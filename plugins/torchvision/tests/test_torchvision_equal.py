"""The numbers equal torchvision's own, on the same weights and images."""

import os
from typing import Any

import pytest
import torch
import torchvision.models.detection as reference
from detkernel_detection import Target, batching
from detkernel_detection.testing import TinyData, TinyDataset, tiny_kernel
from detkernel_torchvision.backbones import Resnet
from detkernel_torchvision.models import FasterRcnn, Fcos, KeypointRcnn, MaskRcnn, Retinanet, Ssd, Ssdlite
from torch import nn
from torchvision.models.detection import backbone_utils
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

CLASSES = 3  # those of TinyDataset
FPN_18 = {"backbone": Resnet(depth=18)}
FEW: Any = {
    "rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 16,
    "box_detections_per_img": 4,
}  # fmt: skip
"""The heads of mask and keypoint R-CNN take seconds for each hundred proposals."""


def resnet18(returned=(1, 2, 3, 4), extra=None):
    return backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5,
        returned_layers=list(returned), extra_blocks=extra,
    )  # fmt: skip


def p6p7():
    return LastLevelP6P7(256, 256)


CASES = {
    "faster_rcnn": (
        lambda: FasterRcnn(**FPN_18, **FEW),
        lambda: reference.FasterRCNN(resnet18(), CLASSES + 1, **FEW),
        (64, 96),
    ),
    "mask_rcnn": (
        lambda: MaskRcnn(**FPN_18, **FEW),
        lambda: reference.MaskRCNN(resnet18(), CLASSES + 1, **FEW),
        (64, 96),
    ),
    "keypoint_rcnn": (
        lambda: KeypointRcnn(**FPN_18, **FEW, num_keypoints=5),
        lambda: reference.KeypointRCNN(resnet18(), CLASSES + 1, **FEW, num_keypoints=5),
        (64, 96),
    ),
    "retinanet": (
        lambda: Retinanet(**FPN_18, score_thresh=0.001),
        lambda: reference.RetinaNet(resnet18((2, 3, 4), p6p7()), CLASSES, score_thresh=0.001),
        (64, 96),
    ),
    "fcos": (
        lambda: Fcos(**FPN_18, score_thresh=0.01),
        lambda: reference.FCOS(resnet18((2, 3, 4), p6p7()), CLASSES, score_thresh=0.01),
        (64, 96),
    ),
    "ssd": (
        Ssd,
        lambda: reference.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=CLASSES + 1),
        (300, 300),
    ),
    "ssdlite": (
        Ssdlite,
        lambda: reference.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES + 1),
        (320, 320),
    ),
}


def make_batch(size):
    """Two images, the second one smaller where that is allowed, with masks and keypoints."""
    torch.manual_seed(1)
    height, width = size
    sizes = [size, size if height == width else (height - 11, width - 23)]
    images = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    targets = []
    for image, (h, w) in zip(images, sizes, strict=True):
        image[:, :h, :w] = torch.randint(0, 255, (3, h, w))
        boxes = torch.tensor([[2.0, 3, w / 2, h / 2], [w / 3, h / 3, w - 2, h - 1]])
        points = torch.rand(2, 5, 3) * torch.tensor([w / 3, h / 3, 0]) + torch.tensor([w / 3, h / 3, 1])
        masks = torch.zeros(2, h, w, dtype=torch.uint8)
        masks[0, 4 : h // 2, 5 : w // 2] = 1
        masks[1, h // 2 :, w // 2 :] = 1
        targets.append(Target(boxes, torch.tensor([0, 2]), masks, points))
    return batching.make_batch(images, targets, sizes=sizes)


def theirs(model, batch, background, training):
    """What a plain torchvision loop would do."""
    images = [image[:, :h, :w].float() / 255 for image, (h, w) in zip(batch.images, batch.sizes, strict=True)]
    model.transform.min_size, model.transform.max_size = (64,), 96  # resized already
    model.transform.resize = lambda image, target: (image, target)
    targets = [
        {"boxes": t.boxes, "labels": t.labels + background, "masks": t.masks, "keypoints": t.keypoints}
        for t in batch.each_target()
    ]
    torch.manual_seed(0)
    return model.train(training)(images, targets if training else None)


def norms(model):
    """What the state does not hold of batch norms."""
    return [(one.eps, one.momentum) for one in model.modules() if isinstance(one, nn.BatchNorm2d)]


SLOW = pytest.mark.skipif("DETKERNEL_LONG" not in os.environ, reason="VGG-16 takes long: in `tox -e torture`")


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name == "ssd" else ()) for name in CASES])
def test_losses_and_detections_equal_torchvisions(name, tmp_path):
    ours, make_theirs, size = CASES[name]
    plugin, batch = ours(), make_batch(size)
    run = tiny_kernel({"model": plugin, "data": TinyData(dataset=TinyDataset(size=2))}, work_dir=tmp_path).state
    run.loaders["train"] = run.hook.build_loader(run=run, mode="train")
    run.model = run.hook.build_model(run=run)
    peer = make_theirs()
    assert list(peer.state_dict()) == list(run.model.state_dict())
    assert run.model.max_detections == getattr(peer, "roi_heads", peer).detections_per_img
    assert norms(run.model) == norms(peer)
    peer.load_state_dict(run.model.state_dict())

    expected = theirs(peer, batch, int(plugin.background), training=True)
    torch.manual_seed(0)
    losses = run.hook.train_step(run=run, model=run.model, batch=batch)
    assert all("loss" in key for key in losses)
    assert sorted(loss.item() for loss in losses.values()) == sorted(loss.item() for loss in expected.values())
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    gradients = {key: value.grad for key, value in peer.named_parameters()}
    for key, parameter in run.model.named_parameters():
        assert (parameter.grad is None) == (gradients[key] is None), key
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-6)

    peer.load_state_dict(run.model.state_dict())
    run.model.eval()
    with torch.no_grad():
        wanted = theirs(peer, batch, int(plugin.background), training=False)
        found = run.hook.val_step(run=run, model=run.model, batch=batch)
    assert sum(len(one) for one in found) > 0
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.scores, other["scores"])
        assert torch.equal(one.labels, other["labels"] - int(plugin.background))
        torch.testing.assert_close(one.boxes, other["boxes"])
        if name == "mask_rcnn":
            assert torch.equal(one.masks, (other["masks"][:, 0] >= 0.5).to(torch.uint8))
        if name == "keypoint_rcnn":
            torch.testing.assert_close(one.keypoints, other["keypoints"])
