"""Small models with MMDetection's weights give MMDetection's numbers: every map, detection, loss and gradient."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from detkernel_detection import Target, batching
from detkernel_detection.predictions import to_detections
from detkernel_detection.weights import load_into, read_weights, renamed
from detkernel_detectors.assigners.points import FcosAssigner
from detkernel_detectors.backbones import CspDarknet, Cspnext, Hgnetv2, Resnet
from detkernel_detectors.backbones.hgnetv2 import Size, Stage
from detkernel_detectors.heads import (
    Branches,
    FcBoxHead,
    FcnMaskHead,
    LevelTowers,
    StarTowers,
    TaskAlignedHead,
    Towers,
    UnequalTowers,
    YoloHead,
)
from detkernel_detectors.losses.boxes import Iou
from detkernel_detectors.models.atss import Atss
from detkernel_detectors.models.cascade_rcnn import CascadeRcnn
from detkernel_detectors.models.centernet import Centernet
from detkernel_detectors.models.centernet_update import CenternetUpdate
from detkernel_detectors.models.conditional_detr import ConditionalDetr
from detkernel_detectors.models.dab_detr import DabDetr
from detkernel_detectors.models.deformable_detr import DeformableDetr
from detkernel_detectors.models.dense import BaseDetector, DenseDetector
from detkernel_detectors.models.detr import Detr
from detkernel_detectors.models.dfine import Dfine
from detkernel_detectors.models.dino import Dino
from detkernel_detectors.models.faster_rcnn import FasterRcnn
from detkernel_detectors.models.fcos import Fcos
from detkernel_detectors.models.gfl import Gfl
from detkernel_detectors.models.mask_rcnn import MaskRcnn
from detkernel_detectors.models.network import Network
from detkernel_detectors.models.retinanet import Retinanet
from detkernel_detectors.models.rtdetr import RtDetr
from detkernel_detectors.models.rtmdet import Rtmdet
from detkernel_detectors.models.sets import SetDetector
from detkernel_detectors.models.ssd import Ssd
from detkernel_detectors.models.tood import Tood, aligned_boxes, boxes_around
from detkernel_detectors.models.vfnet import Vfnet
from detkernel_detectors.models.yolof import Yolof, of_both
from detkernel_detectors.models.yolov3 import Yolov3
from detkernel_detectors.models.yolox import NORM, Yolox
from detkernel_detectors.necks import (
    ChannelMapper,
    CspPafpn,
    DeconvNeck,
    DilatedEncoder,
    Fpn,
    HybridEncoder,
    SsdNeck,
    YoloNeck,
)
from detkernel_detectors.transformers import denoising
from torch import Tensor

R18: Any = {"depth": 18, "channels": 3, "norm": "eval", "trainable_layers": 3}

GN: Any = {"convs": 2, "channels": 12, "norm": "group", "groups": 4}


def small(kind: Any, **options: Any) -> DenseDetector:
    """A family with the options of the reference's small models, but for what is given."""
    made: DenseDetector = kind()
    neck = attrs.evolve(made.neck, channels=12)
    return attrs.evolve(made, **{"backbone": Resnet(**R18), "neck": neck, "head": Towers(**GN), **options})


ALL: Any = {
    "rpn_sampled": 10**6, "sampled": 10**6, "candidates_train": 200, "candidates": 100, "proposals_train": 60,
    "proposals": 50,
}  # fmt: skip
"""Every proposal is in the loss, so that nothing is drawn."""

RCNN: Any = {
    "backbone": Resnet(**R18),
    "neck": Fpn(channels=8, finest=4, extra=1, extra_from="pool"),
    "box_head": FcBoxHead(channels=16),
}
TWO_STAGES = ("faster_rcnn", "mask_rcnn", "cascade_rcnn")
DETR: Any = {
    "backbone": Resnet(**{**R18, "norm": "frozen"}), "queries": 20, "encoder_layers": 2, "decoder_layers": 2,
    "attention_heads": 4, "ffn_channels": 24, "dropout": 0.0, "max_detections": 15,
}  # fmt: skip
LEVELS: Any = {"neck": ChannelMapper(channels=16, groups=4)}
ONE_MAP: Any = {"neck": ChannelMapper(channels=16, groups=None, finest=32, extra=0)}

RTDETR: Any = {
    "channels": 16, "queries": 20, "attention_heads": 4, "ffn_channels": 24, "denoising": 10, "max_detections": 15,
}  # fmt: skip
ENCODER: Any = {"channels": 16, "attention_heads": 4, "ffn_channels": 24, "expansion": 0.5}


class TinyHgnetv2(Hgnetv2):
    """The reference's small one."""

    @property
    def table(self) -> Size:
        stages = (Stage(8, 8, 16), Stage(16, 8, 24), Stage(24, 12, 32, 2, True, 5), Stage(32, 16, 48, 1, True, 5))
        return Size((8, 8), stages, layers=2, affine=True)


FAMILIES: dict[str, tuple[BaseDetector, tuple[str, ...]]] = {
    "retinanet": (small(Retinanet, head=Towers(convs=2, channels=12)), ("cls", "reg")),
    "fcos": (
        small(
            Fcos,
            backbone=Resnet(depth=50, channels=2, norm="frozen", trainable_layers=3, style="caffe"),
            head=Towers(**GN, bias=False),
            image_mean=(122.7717, 115.9465, 102.9801),
            image_std=(1.0, 1.0, 1.0),
            channel_order="bgr",
            assigner=FcosAssigner(radius=None),
            distance="pixels",
            centreness_branch="cls",
            box_loss=Iou(),
            nms_thresh=0.5,
        ),
        ("cls", "reg", "centreness"),
    ),
    "fcos_center": (
        small(
            Fcos,
            backbone=Resnet(depth=18, channels=3, norm="frozen", trainable_layers=3),
            head=Towers(**GN, bias=True),
            image_mean=(123.675, 116.28, 103.53),
            image_std=(1.0, 1.0, 1.0),
            channel_order="bgr",
        ),
        ("cls", "reg", "centreness"),
    ),
    "atss": (small(Atss), ("cls", "reg", "centreness")),
    "gfl": (small(Gfl), ("cls", "reg")),
    "faster_rcnn": (
        FasterRcnn(
            backbone=Resnet(depth=50, channels=2, norm="eval", trainable_layers=3),
            neck=Fpn(channels=8, finest=4, extra=1, extra_from="pool"),
            box_head=FcBoxHead(channels=16),
            **ALL,
        ),
        ("cls", "reg"),
    ),
    "rtmdet": (
        Rtmdet(
            backbone=Cspnext(depth=0.33, width=0.04),
            neck=CspPafpn(channels=10, blocks=1),
            head=LevelTowers(channels=10),
        ),
        ("cls", "reg"),
    ),
    "mask_rcnn": (
        MaskRcnn(**RCNN, mask_head=FcnMaskHead(convs=2, channels=8), **{**ALL, "proposals": 40, "max_detections": 20}),
        ("cls", "reg"),
    ),
    "cascade_rcnn": (CascadeRcnn(**RCNN, **ALL), ("cls", "reg")),
    "yolox": (
        Yolox(
            backbone=CspDarknet(depth=0.33, width=0.04),
            neck=CspPafpn(channels=10, blocks=1, block="darknet", last_size=1, **NORM),
            head=LevelTowers(channels=10, share=False, **NORM),
        ),
        ("cls", "reg", "objectness"),
    ),
    "yolov3": (
        Yolov3(
            backbone=Resnet(depth=18, channels=3, norm="eval"),
            neck=YoloNeck(channels=[12, 12, 12]),
            head=YoloHead(channels=[12, 12, 12]),
            image_mean=(123.675, 116.28, 103.53),
            image_std=(58.395, 57.12, 57.375),
        ),
        ("pred",),
    ),
    "detr": (Detr(**DETR, **ONE_MAP), ()),
    "conditional_detr": (ConditionalDetr(**DETR, **ONE_MAP), ()),
    "dab_detr": (DabDetr(**DETR, **ONE_MAP), ()),
    "deformable_detr": (DeformableDetr(**DETR, **LEVELS), ()),
    "deformable_detr_twostage": (DeformableDetr(**DETR, **LEVELS, refine=True, two_stage=True), ()),
    "dino": (Dino(**DETR, **LEVELS, denoising=10), ()),
    "rtdetrv2": (
        RtDetr(
            **RTDETR,
            backbone=Resnet(depth=18, channels=4, variant="vd"),
            neck=HybridEncoder(**ENCODER),
            decoder_layers=2,
        ),
        (),
    ),
    "dfine": (
        Dfine(
            **RTDETR,
            backbone=TinyHgnetv2(),
            neck=HybridEncoder(**ENCODER, fusion="elan", depth=0.34),
            decoder_layers=3,
        ),
        (),
    ),
    "ssd": (
        Ssd(
            backbone=Resnet(depth=18, channels=3, stages=3, norm="eval", trainable_layers=5),
            neck=SsdNeck(extra=[12, 8, 8, 8]),
        ),
        ("cls", "reg"),
    ),
    "vfnet": (small(Vfnet, head=StarTowers(**GN)), ("cls", "refined")),
    "tood": (small(Tood, head=TaskAlignedHead(**{**GN, "convs": 3})), ("cls", "reg")),
    "yolof": (
        Yolof(
            backbone=Resnet(depth=18, channels=3, norm="frozen", trainable_layers=3),
            neck=DilatedEncoder(channels=16, block_channels=8),
            head=UnequalTowers(channels=16),
            image_mean=(123.675, 116.28, 103.53),
            image_std=(1.0, 1.0, 1.0),
            channel_order="bgr",
        ),
        ("cls", "reg"),
    ),
    "centernet_update": (
        small(
            CenternetUpdate,
            backbone=Resnet(depth=18, channels=3, norm="frozen", trainable_layers=3),
            image_mean=(123.675, 116.28, 103.53),
            image_std=(1.0, 1.0, 1.0),
            channel_order="bgr",
        ),
        ("cls", "reg"),
    ),
    "centernet": (
        Centernet(
            backbone=Resnet(depth=18, channels=3),
            neck=DeconvNeck(channels=[16, 8, 8]),
            head=Branches(channels=8),
            min_size=None,
        ),
        ("cls", "size", "offset"),
    ),
}
"""Family -> the plugin with the options of the reference's small model, and its outputs in MMDetection's order."""

SHOWN: Any = {
    "centernet_update": {"reg": lambda value, stride, others: value.relu() * stride},
    "centernet": {"cls": lambda value, stride, others: value.sigmoid()},
    "fcos": {"reg": lambda value, stride, others: value.exp()},
    "fcos_center": {"reg": lambda value, stride, others: value.relu() * stride},
    "rtmdet": {"reg": lambda value, stride, others: value.exp() * stride},
    "vfnet": {"refined": lambda value, stride, others: (value + others["reg"]).exp() * 8 * stride},
    "tood": {
        "cls": lambda value, stride, others: (value.sigmoid() * others["alignment"].sigmoid()).sqrt(),
        "reg": lambda value, stride, others: aligned_boxes(boxes_around(value), others["offsets"]),
    },
    "yolof": {
        "cls": lambda value, stride, others: of_both(
            value.unflatten(1, (5, -1)), others["objectness"][:, :, None]
        ).flatten(1, 2)
    },
}
"""What MMDetection's head gives where it is not the output itself: mostly distances in pixels. `others`: all outputs of
that level."""

OTHER_LOSSES: Any = {
    "yolox": ("loss_last_epochs", {"_further": True}),
    "tood": ("loss_initial_epochs", {"_initial": True}),
}
"""Further losses of a family: how they are named, and in which state of the plugin it has them."""

UNCLIPPED = ("yolox", "tood", "yolov3")
"""Families whose boxes MMDetection does not clip to the image."""

COARSE_FIRST = ("yolov3",)
"""Families whose levels MMDetection counts from the coarsest."""


UNUSED: Any = {"ssd": ("backbone.layer4.",)}
"""How the names of weights begin that a reference's model has and does not use."""


class Case:
    """A model with the reference's weights, its batch, and what is expected of it."""

    def __init__(self, folder: Path, plugin: BaseDetector) -> None:
        self.expected: dict[str, Tensor] = torch.load(folder / "expected.pt", weights_only=True)
        inputs: dict[str, Any] = torch.load(folder / "inputs.pt", weights_only=True)
        self.classes = [f"class {number}" for number in range(inputs["num_classes"])]
        self.model: Any = Network(plugin, self.classes)
        unused = UNUSED.get(folder.name, ())
        load_into(self.model, read_weights(folder / "weights.pt"), self.classes, given="same_order", ignore=unused)
        self.grad_names = list(renamed(dict.fromkeys(inputs["grad_names"]), self.model.key_maps[plugin.published_by]))
        self.batch = _batch(inputs)

    def check(self, name: str, found: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
        """Compare with what is expected under a name, `name|2d|8` where only every 8th pixel is kept."""
        key = next(key for key in self.expected if key.partition("|")[0] == name)
        _, kind, step = [*key.split("|"), "", "1"][:3]
        if kind == "2d":
            found = found[..., :: int(step), :: int(step)]
        if kind == "rows":
            found = found[:, :: int(step)]
        # Sums of numbers of thousands are known to a few 1e-4 in float32: in double precision they differ by more.
        atol = max(atol, 1e-6 * float(self.expected[key].abs().max()))
        torch.testing.assert_close(found, self.expected[key], rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


def _batch(inputs: Mapping[str, Any]) -> Any:
    sizes = [tuple(size) for size in inputs["sizes"]]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    images = torch.zeros(len(sizes), 3, height, width, dtype=torch.uint8)
    for image, small, (h, w) in zip(images, inputs["images"], sizes, strict=True):
        large = small.repeat_interleave(inputs["enlarge"], 1).repeat_interleave(inputs["enlarge"], 2)
        image[:, :h, :w] = large
    targets = [Target(target["boxes"], target["labels"], _unpacked(target)) for target in inputs["targets"]]
    scale = inputs["scale"]
    originals = [(math.ceil(h / scale), math.ceil(w / scale)) for h, w in sizes]  # it clips to images, not to files
    return batching.make_batch(
        images, targets, sizes=sizes, original_sizes=originals, scales=[(scale, scale)] * len(sizes)
    )


def _unpacked(values: Mapping[str, Tensor], before: str = "") -> Tensor | None:
    """The masks of a file, eight pixels a byte; None where it has none."""
    if f"{before}masks_packed" not in values:
        return None
    shape = [int(side) for side in values[f"{before}masks_shape"]]
    bits = np.unpackbits(values[f"{before}masks_packed"].numpy())
    return torch.from_numpy(bits[: math.prod(shape)].reshape(shape))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, oracle: Path) -> Case:
    made = Case(oracle / request.param, FAMILIES[request.param][0])
    made.name, made.outputs = request.param, FAMILIES[request.param][1]
    return made


def test_the_maps_are_equal(case: Case):
    model, batch = case.model.eval(), case.batch
    with torch.no_grad():
        images = model.normalize(batch.images, batch.image_sizes)
        case.check("input", images)
        features = list(model.backbone(images).values())
        maps = model.forward_outputs(images, batch.image_sizes)
    used = [key for key in case.expected if key.startswith("backbone.")]  # some have the coarsest maps alone
    for number, one in enumerate(features[-len(used) :]):
        case.check(f"backbone.{number}", one)
    levels = range(len(maps.features))
    theirs = levels[::-1] if case.name in COARSE_FIRST else levels
    for level, one in zip(theirs, maps.features, strict=True):
        case.check(f"neck.{level}", one)
    for number, name in enumerate(case.outputs):
        for level, one in enumerate(maps.outputs[name]):
            shown = SHOWN.get(case.name, {}).get(name, lambda value, stride, others: value)
            others = {other: levels[level] for other, levels in maps.outputs.items()}
            named = f"rpn.{name}.{level}" if case.name in TWO_STAGES else f"head.{number}.{theirs[level]}"
            case.check(named, shown(one, maps.strides[level], others))


@pytest.mark.parametrize("name", [name for name, (family, _) in FAMILIES.items() if isinstance(family, SetDetector)])
def test_what_the_layers_of_a_decoder_predict_is_equal(name: str, oracle: Path):
    case = Case(oracle / name, FAMILIES[name][0])
    model, batch = case.model.eval(), case.batch
    with torch.no_grad():
        encoded = model.forward_outputs(model.normalize(batch.images, batch.image_sizes), batch.image_sizes)
        queries = model.family.predicted(encoded, model)
    if name in ("rtdetrv2", "dfine"):  # what the last layer predicts is known
        case.check("head.logits", queries.logits)
        case.check("head.boxes_cxcywh", queries.boxes)
        return
    case.check("encoder.memory", encoded.memory)
    parts = [torch.split(value, list(queries.counts), 1) for value in (queries.logits, queries.boxes)]
    for number, layers in enumerate(parts):
        for layer, one in enumerate(layers):
            case.check(f"head.{number}.{layer}", one)


def test_the_detections_are_equal(case: Case):
    model, batch = case.model.eval(), case.batch
    with torch.no_grad():
        detections = to_detections(model(batch.images, None, batch.image_sizes), batch, model)
    for number, found in enumerate(detections):
        scores = case.expected[f"detections.{number}.scores"]
        assert len(found) == len(scores)
        case.check(f"detections.{number}.scores", found.scores, rtol=0, atol=2e-5)
        order = _same_order(found.labels, case.expected[f"detections.{number}.labels"], scores)
        if case.name in UNCLIPPED:
            height, width = (side / batch.scales[number][0] for side in batch.sizes[number])
            expected = case.expected[f"detections.{number}.boxes"]
            expected.copy_(expected.clamp(min=0).minimum(expected.new_tensor([width, height, width, height])))
        boxes = f"detections.{number}.boxes"
        height, width = batch.original_sizes[number]  # RT-DETR's and D-FINE's are not clipped
        case.expected[boxes] = case.expected[boxes].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        case.check(boxes, found.boxes[order], rtol=0, atol=2e-2)
        masks = _unpacked(case.expected, f"detections.{number}.")
        if masks is not None:
            assert found.masks is not None
            wrong = (found.masks[order] != masks).float().mean().item()
            assert wrong < 1e-5, f"{wrong} of the pixels differ"


def _same_order(labels: Tensor, expected: Tensor, scores: Tensor) -> Tensor:
    """The places of the detections in the reference's order: neighbours whose scores are nearer than 1e-5 may change
    places."""
    order = torch.arange(len(labels))
    for place in range(len(labels) - 1):
        if labels[order[place]] != expected[place] and scores[place] - scores[place + 1] < 1e-5:
            order[[place, place + 1]] = order[[place + 1, place]]
    assert labels[order].tolist() == expected.tolist()
    return order


def test_the_losses_and_the_gradients_are_equal(case: Case, reference_draws: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(denoising, "draw", lambda targets, _, pairs: reference_draws(case.expected, targets, pairs))
    check_losses(case, "loss")


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_the_losses_of_other_epochs_are_equal(name: str, oracle: Path, monkeypatch: pytest.MonkeyPatch):
    prefix, state = OTHER_LOSSES[name]
    case = Case(oracle / name, FAMILIES[name][0])
    for key, value in state.items():
        monkeypatch.setattr(case.model.family, key, value)
    check_losses(case, prefix)


def check_losses(case: Case, prefix: str) -> None:
    model, batch = case.model.train(), case.batch
    model.zero_grad()
    losses = model(batch.images, batch.targets, batch.image_sizes)
    for name, loss in losses.items():
        case.check(f"{prefix}.{name}", loss)
    wanted = {key.removeprefix(f"{prefix}.") for key in case.expected if re.match(prefix + r"\..*loss", key)}
    assert {name for name in losses if "loss" in name} == wanted
    total = sum(loss for name, loss in losses.items() if "loss" in name)
    total.backward()
    parameters = dict(model.named_parameters())
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == set(case.grad_names)
    expected = case.expected[f"{prefix}.grad_norm"]
    for name, norm in zip(case.grad_names, expected, strict=True):
        if norm > 1e-3 * expected.max():
            torch.testing.assert_close(
                parameters[name].grad.norm(), norm, rtol=1e-3, atol=0, msg=lambda t, n=name: f"{n}: {t}"
            )
