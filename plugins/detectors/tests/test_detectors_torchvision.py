"""torchvision's detectors with their own weights, and ours with them: the same detections."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision.models.detection as reference
from detkernel import ConfigError
from detkernel.config import load
from detkernel_detection import batching
from detkernel_detection.predictions import to_detections
from detkernel_detection.weights import load_into, read_weights, renamed
from detkernel_detectors.backbones import resnet
from detkernel_detectors.models.atss import Atss
from detkernel_detectors.models.network import Network
from torch import Tensor, nn
from torchvision.models.detection import faster_rcnn, fcos, mask_rcnn, retinanet
from torchvision.models.resnet import Bottleneck, ResNet

ROOT = Path(__file__).resolve().parents[3]
CLASSES = ["__background__", "cat", "dog", "fish"]
SIZES = [(150, 200), (128, 170)]
FEW: Any = {"rpn_post_nms_top_n_test": 60}
MODELS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "faster_rcnn": (reference.fasterrcnn_resnet50_fpn, FEW, {"proposals": 60}),
    "faster_rcnn_v2": (reference.fasterrcnn_resnet50_fpn_v2, FEW, {"proposals": 60}),
    "mask_rcnn": (
        reference.maskrcnn_resnet50_fpn,
        {**FEW, "box_detections_per_img": 40},
        {"proposals": 60, "max_detections": 40},
    ),
    "mask_rcnn_v2": (
        reference.maskrcnn_resnet50_fpn_v2,
        {**FEW, "box_detections_per_img": 40},
        {"proposals": 60, "max_detections": 40},
    ),
    "retinanet": (reference.retinanet_resnet50_fpn, {}, {}),
    "retinanet_v2": (reference.retinanet_resnet50_fpn_v2, {}, {}),
    "fcos": (reference.fcos_resnet50_fpn, {}, {}),
}
"""Name -> torchvision's function, its arguments, and options of ours that mean the same."""
OUTPUTS = ("cls_score", "bbox_pred", "cls_logits", "bbox_reg", "bbox_ctrness", "mask_fcn_logits")


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ResNet-50 with one block a stage, in torchvision and here."""
    for module in (faster_rcnn, fcos, mask_rcnn, retinanet):
        monkeypatch.setattr(module, "resnet50", _shallow)
    monkeypatch.setitem(resnet.BLOCKS, 50, (1, 1, 1, 1))


def _shallow(weights: Any = None, progress: bool = True, **options: Any) -> Any:
    return ResNet(Bottleneck, [1, 1, 1, 1], **options)


def theirs_of(name: str) -> Any:
    """torchvision's, with weights that see something, and images left as large as they are."""
    builder, arguments, _ = MODELS[name]
    torch.manual_seed(0)
    model = builder(weights=None, weights_backbone=None, num_classes=len(CLASSES), **arguments)
    for key, module in model.named_modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            if not name.endswith("v2") and name != "fcos":
                module.eps = 0.0  # as torchvision sets it where it loads COCO_V1
        if isinstance(module, (nn.Conv2d, nn.Linear)) and key.endswith(OUTPUTS):
            bound = 1.5 / math.sqrt(module.weight[0].numel())
            nn.init.normal_(module.weight, std=bound)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.3)
            if key.endswith("classification_head.cls_logits"):  # the background is a class, which is never found
                module.bias.data.view(-1, len(CLASSES))[:, 0] = -20
    model.transform.resize = lambda image, target: (image, target)
    return model.eval()


def ours_of(name: str, weights: str | None = None, **options: Any) -> Any:
    """The plugin of the config that is made for them."""
    path = ROOT / "configs" / "base" / f"torchvision_{name}.yaml"
    overrides = {**MODELS[name][2], **options}
    if weights is not None:
        overrides["weights"] = weights
    given = [f"model.{key}={value}" for key, value in overrides.items()]
    return load(path, ["run.until=1 iters", *given]).plugins["model"]


def images() -> list[Tensor]:
    noise = torch.Generator().manual_seed(1)
    found = []
    for height, width in SIZES:
        small = torch.rand(1, 3, height // 8, width // 8, generator=noise)
        found.append(nn.functional.interpolate(small, (height, width), mode="bicubic")[0].clamp(0, 1))
    return [(image * 255).round().to(torch.uint8) for image in found]


def batch_of(given: list[Tensor]) -> Any:
    height, width = (max(sides) for sides in zip(*SIZES, strict=True))
    padded = torch.zeros(len(given), 3, height, width, dtype=torch.uint8)
    for place, image in zip(padded, given, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batching.make_batch(padded, sizes=SIZES)


@pytest.mark.parametrize("name", MODELS)
def test_detections_are_torchvisions(name: str, shallow: None, tmp_path: Path):
    theirs, model = theirs_of(name), Network(ours_of(name), CLASSES[1:])
    torch.save({"model": theirs.state_dict(), "classes": CLASSES}, tmp_path / "theirs.pth")
    loaded = load_into(model, read_weights(tmp_path / "theirs.pth"), CLASSES[1:])
    assert "names of torchvision" in loaded.text
    given = images()
    batch = batch_of(given)
    with torch.no_grad():
        expected = theirs([image.float() / 255 for image in given])
        found = to_detections(model.eval()(batch.images, None, batch.image_sizes), batch, model)
    assert len({label for wanted in expected for label in wanted["labels"].tolist()}) > 1
    for ours, wanted in zip(found, expected, strict=True):
        assert len(wanted["labels"]) >= 5
        torch.testing.assert_close(ours.scores, wanted["scores"], rtol=0, atol=2e-5)
        ours = ours.keep(_same_order(ours, wanted["boxes"]))
        assert ours.labels.tolist() == (wanted["labels"] - 1).tolist()
        torch.testing.assert_close(ours.boxes, wanted["boxes"], rtol=0, atol=2e-2)
        if "masks" in wanted:
            masks = (wanted["masks"][:, 0] >= 0.5).to(torch.uint8)
            assert masks.float().mean() > 0.01
            assert (ours.masks != masks).float().mean() < 1e-4


def _same_order(found: Any, boxes: Tensor) -> Tensor:
    """The places of detections in torchvision's order: neighbours whose scores are nearer than 1e-5 may change
    places."""
    order = torch.arange(len(boxes))
    for place in range(len(boxes) - 1):
        apart = (found.boxes[order[place]] - boxes[place]).abs().max()
        if apart > 0.02 and found.scores[place] - found.scores[place + 1] < 1e-5:
            order[[place, place + 1]] = order[[place + 1, place]]
    return order


@pytest.mark.parametrize("name", MODELS)
def test_what_torchvision_publishes_has_a_place_in_ours(name: str):
    """At full size: every tensor by its name, of a shape that its class outputs explain."""
    builder, plugin = MODELS[name][0], ours_of(name)
    with torch.device("meta"):
        theirs = builder(weights=None, weights_backbone=None).state_dict()
        model = Network(plugin, [f"class {number}" for number in range(80)])
    own = {key: value.shape for key, value in model.state_dict().items()}
    moved = renamed({key: value.shape for key, value in theirs.items()}, model.key_maps["torchvision"])
    counters = {key for key in [*own, *moved] if key.endswith("num_batches_tracked")}
    assert moved.keys() - counters == own.keys() - counters
    assert {key for key in own if own[key] != moved.get(key, own[key])} == model.class_outputs.keys()
    assert builder.__name__ in plugin.torchvision_builders


OLD = {
    "faster_rcnn": [
        (r"(backbone\.fpn\.\w+_blocks\.\d+)\.0\.", r"\1."),
        (r"rpn\.head\.conv\.0\.0\.", "rpn.head.conv."),
    ],
    "mask_rcnn": [
        (r"(backbone\.fpn\.\w+_blocks\.\d+)\.0\.", r"\1."),
        (r"rpn\.head\.conv\.0\.0\.", "rpn.head.conv."),
        *((rf"roi_heads\.mask_head\.{layer}\.0\.", f"roi_heads.mask_head.mask_fcn{layer + 1}.") for layer in range(4)),
    ],
    "retinanet": [
        (r"(backbone\.fpn\.\w+_blocks\.\d+)\.0\.", r"\1."),
        *((rf"(head\.\w+_head\.conv)\.{layer}\.0\.", rf"\1.{2 * layer}.") for layer in range(4)),
    ],
}
"""How the names of today's torchvision become those of the files that it published first."""


@pytest.mark.parametrize("name", OLD)
def test_names_of_the_first_files_are_read(name: str):
    with torch.device("meta"):
        today = MODELS[name][0](weights=None, weights_backbone=None).state_dict()
        model = Network(ours_of(name), ["a"])
    first = renamed({key: key for key in today}, OLD[name])
    assert first.keys() != today.keys()
    new, old = (renamed(names, model.key_maps["torchvision"]) for names in ({key: key for key in today}, first))
    assert new == old


def loaded(plugin: Any, classes: list[str]) -> Any:
    run: Any = SimpleNamespace(classes=tuple(classes), log=logging.getLogger("detkernel"))
    model = Network(plugin, classes)
    plugin.load(run, model)
    return model


def test_published_weights_are_asked_for_by_name(shallow: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torchvision's COCO classes, the background and those without a name among them, taken by name."""
    theirs = reference.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    path = tmp_path / "checkpoints" / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
    path.parent.mkdir()
    torch.save(theirs.state_dict(), path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    categories = reference.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    for name in ("torchvision:COCO_V1", "torchvision:DEFAULT", "torchvision:FasterRCNN_ResNet50_FPN_Weights.COCO_V1"):
        plugin = ours_of("faster_rcnn", weights=name)
        assert plugin.loads_weights
        model = loaded(plugin, ["zebra", "tie", "gnu"])
        predictor = theirs.roi_heads.box_predictor
        for number, one in enumerate(["zebra", "tie"]):
            place = categories.index(one)
            assert torch.equal(model.box_head.cls.weight[number], predictor.cls_score.weight[place])
            own, their = model.box_head.reg.bias.view(-1, 4), predictor.bbox_pred.bias.view(-1, 4)
            assert torch.equal(own[number], their[place])
        assert torch.equal(model.box_head.cls.bias[3], predictor.cls_score.bias[0]), "the background"
        assert torch.equal(model.head.convs[0].weight, theirs.rpn.head.conv[0][0].weight)


def test_weights_that_torchvision_does_not_publish_are_told():
    with pytest.raises(ConfigError, match=r"weights: no weights are named 'COCO_V3'.*COCO_V1"):
        loaded(ours_of("fcos", weights="torchvision:COCO_V3"), ["a"])
    with pytest.raises(ConfigError, match="weights: torchvision publishes none for Atss"):
        loaded(Atss(weights="torchvision:COCO_V1"), ["a"])


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet"])
def test_classes_of_a_file_without_their_names_may_be_those_of_the_data(name: str, shallow: None, tmp_path: Path):
    """Of a file of torchvision's, the background is the first class, though the names do not count it."""
    theirs = theirs_of(name)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model: Any = Network(ours_of(name), CLASSES[1:])
    load_into(model, read_weights(tmp_path / "theirs.pth"), CLASSES[1:], given="same_order")
    if name == "faster_rcnn":
        bias = theirs.roi_heads.box_predictor.cls_score.bias
        assert model.box_head.cls.bias.tolist() == [*bias[1:].tolist(), bias[0].item()]
        assert torch.equal(model.box_head.reg.bias, theirs.roi_heads.box_predictor.bbox_pred.bias[4:])
    else:
        bias = theirs.head.classification_head.cls_logits.bias.view(9, 4)
        assert torch.equal(model.head.cls.bias.view(9, 3), bias[:, 1:])
