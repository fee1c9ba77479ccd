"""What every native detector promises, on generated data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
import torch
import torch.distributed
from detkernel import ConfigError, plugin
from detkernel_detection import Backbone, Target, batching
from detkernel_detection.parts import Matches
from detkernel_detection.structures import Batch, Targets
from detkernel_detection.testing import ModelContract, TinyDataset
from detkernel_detection.weights import load_into, read_weights
from detkernel_detectors.assigners.atss import AtssAssigner
from detkernel_detectors.assigners.hungarian import HungarianAssigner
from detkernel_detectors.assigners.points import FcosAssigner
from detkernel_detectors.backbones import CspDarknet, Cspnext, Resnet
from detkernel_detectors.heads import (
    Branches,
    FcBoxHead,
    FcnMaskHead,
    LevelConvs,
    LevelTowers,
    StarTowers,
    TaskAlignedHead,
    Towers,
    UnequalTowers,
    YoloHead,
)
from detkernel_detectors.losses.classes import Softmax
from detkernel_detectors.models.atss import Atss
from detkernel_detectors.models.cascade_rcnn import CascadeMaskRcnn, CascadeRcnn
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
from detkernel_detectors.models.rcnn import drawn, needed
from detkernel_detectors.models.retinanet import Retinanet
from detkernel_detectors.models.rtdetr import RtDetr
from detkernel_detectors.models.rtmdet import Rtmdet
from detkernel_detectors.models.rtmdet_ins import RtmdetIns
from detkernel_detectors.models.ssd import Ssd
from detkernel_detectors.models.tood import Tood
from detkernel_detectors.models.vfnet import Vfnet
from detkernel_detectors.models.yolof import Yolof
from detkernel_detectors.models.yolov3 import Yolov3
from detkernel_detectors.models.yolox import Yolox
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
from detkernel_detectors.priors import Anchors, GridAnchors, LevelAnchors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

SMALL: Any = {
    "backbone": Resnet(depth=18, channels=8, stages=2, norm="group"),
    "neck": Fpn(channels=16, extra=1),
    "head": Towers(convs=1, channels=16, norm="group", groups=4),
}
RCNN: Any = {
    "backbone": SMALL["backbone"],
    "neck": Fpn(channels=16, finest=4, extra=1, extra_from="pool"),
    "box_head": FcBoxHead(channels=32),
    "proposals_train": 40,
    "proposals": 40,
}
EVERY: Any = {"sampled": 10**4, "rpn_sampled": 10**4}
"""Nothing is left to chance."""
MASKS: Any = {"mask_head": FcnMaskHead(convs=1, channels=8, pooled=4)}
DETR: Any = {
    "backbone": SMALL["backbone"],
    "queries": 8,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "attention_heads": 4,
    "ffn_channels": 16,
    "dropout": 0.0,
    "max_detections": 100,
}
RTDETR: Any = {
    "backbone": SMALL["backbone"],
    "neck": HybridEncoder(channels=16, attention_heads=2, ffn_channels=16, depth=0.34),
    "channels": 16,
    "decoder_layers": 2,
    "queries": 12,
    "attention_heads": 2,
    "ffn_channels": 16,
    "points": [2],
    "max_detections": 100,
    "denoising": 1,
    "label_noise": 0.0,  # nothing is left to chance
    "box_noise": 0.0,
}
LEVELS: Any = {"assigner": FcosAssigner(ranges=[16.0])}
FAMILIES: dict[str, tuple[type[BaseDetector], dict[str, Any]]] = {
    "retinanet": (Retinanet, {}),
    "fcos": (Fcos, LEVELS),
    "fcos_pixels": (Fcos, {**LEVELS, "distance": "pixels", "centreness_branch": "cls"}),
    "atss": (Atss, {}),
    "gfl": (Gfl, {"largest": 4}),
    "faster_rcnn": (FasterRcnn, EVERY),
    "mask_rcnn": (MaskRcnn, {**EVERY, **MASKS}),
    "cascade_rcnn": (CascadeRcnn, EVERY),
    "cascade_mask_rcnn": (CascadeMaskRcnn, {**EVERY, **MASKS}),
}
CSP: Any = {
    "backbone": Cspnext(depth=0.33, width=0.125),
    "neck": CspPafpn(channels=16, blocks=1),
    "head": LevelTowers(convs=1, channels=16),
    "max_detections": 100,
}
YOLOX: Any = {
    **CSP,
    "backbone": CspDarknet(depth=0.33, width=0.125),
    "neck": CspPafpn(channels=16, blocks=1, block="darknet", last_size=1),
    "head": LevelTowers(convs=1, channels=16, share=False, deviation=None),
}
FAMILIES |= {"yolox": (Yolox, YOLOX)}
FAMILIES |= {"rtmdet": (Rtmdet, CSP), "rtmdet_linear": (Rtmdet, {**CSP, "distance": "linear"})}
STAR: Any = {"head": StarTowers(convs=1, channels=16, groups=4)}
TASKS: Any = {"head": TaskAlignedHead(convs=2, channels=16, groups=4)}
FAMILIES |= {"vfnet": (Vfnet, STAR), "tood": (Tood, TASKS), "tood_initial": (Tood, TASKS)}
FAMILIES |= {"rtmdet_ins": (RtmdetIns, {**CSP, "mask_channels": 16, "mask_convs": 1})}
YOLOF: Any = {
    "neck": DilatedEncoder(channels=16, block_channels=8, dilations=[1, 2]),
    "head": UnequalTowers(convs=1, box_convs=1, channels=16, norm="group", groups=4),
    "anchors": Anchors(scales=[2.0, 4.0], ratios=[1.0]),  # of a map of stride 8
}
FAMILIES |= {"yolof": (Yolof, YOLOF)}
FAMILIES |= {"yolox_further": (Yolox, YOLOX)}
YOLOV3: Any = {
    "neck": YoloNeck(channels=[16]),
    "head": YoloHead(channels=[16]),
    "anchors": GridAnchors(sizes=[[(12.0, 12.0), (20.0, 24.0), (48.0, 40.0)]]),
}
FAMILIES |= {"yolov3": (Yolov3, YOLOV3)}
CENTRES: Any = {"neck": DeconvNeck(channels=[16]), "head": Branches(channels=16)}
FAMILIES |= {"centernet": (Centernet, CENTRES)}
SSD: Any = {
    "neck": SsdNeck(extra=[16], extra_strides=[2], extra_paddings=[1]),
    "head": LevelConvs(),
    "anchors": LevelAnchors(sides=[12.0, 24.0, 48.0], ratios=[[2.0], [2.0, 3.0]], steps=[8, 16]),
    "max_detections": 100,
}
FAMILIES |= {"ssd": (Ssd, SSD)}
FAMILIES |= {"centernet_update": (CenternetUpdate, {})}
STATES: Any = {"tood_initial": {"_initial": True}, "yolox_further": {"_further": True}}
"""What an event makes of a plugin in some epochs."""
TWO_STAGES = tuple(name for name in FAMILIES if "rcnn" in name)
ONE_MAP: Any = {"neck": ChannelMapper(channels=16, groups=None, extra=0)}
MAPS: Any = {"neck": ChannelMapper(channels=16, groups=4, extra=0), "points": 2}
DETRS: Any = {
    "detr": (Detr, ONE_MAP),
    "conditional_detr": (ConditionalDetr, ONE_MAP),
    "dab_detr": (DabDetr, ONE_MAP),
    "deformable_detr": (DeformableDetr, MAPS),
    "deformable_detr_two_stage": (DeformableDetr, {**MAPS, "refine": True, "two_stage": True}),
    "dino": (Dino, {**MAPS, "denoising": 9, "label_noise": 0.0, "box_noise": 0.0}),
}
RTDETRS: Any = {"rtdetr": (RtDetr, {}), "dfine": (Dfine, {"bins": 9})}
FAMILIES |= DETRS | RTDETRS
"""Name -> the family and its options beside `SMALL`."""


@plugin
class OneConv(Backbone):
    """A convolution."""

    def build(self) -> nn.Module:
        class Module(nn.Module):
            channels: ClassVar[list[int]] = [4]
            strides: ClassVar[list[int]] = [8]

            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 8, 8)

            def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
                return {"0": self.conv(images)}

        return Module()


class Contract(ModelContract):
    lr = 0.02
    family: type[DenseDetector]
    options: ClassVar[dict[str, Any]] = {"anchors": Anchors(scales=[1.5], ratios=[1.0])}

    def plugin(self) -> Any:
        return self.family(**{**SMALL, "neck": Fpn(channels=16, extra=0), **self.options})


class TestRetinanet(Contract):
    family = Retinanet


class TestFcos(Contract):
    family = Fcos
    options: ClassVar[dict[str, Any]] = {
        "neck": Fpn(channels=16, extra=0, finest=4),  # of stride 8, an object of 8 pixels may have no point inside
        "assigner": FcosAssigner(ranges=[16.0]),
    }


class TestFasterRcnn(ModelContract):
    def plugin(self) -> Any:
        return FasterRcnn(**RCNN, anchors=Anchors(scales=[2.0], ratios=[1.0]))


def boxed(family: type[Any]) -> type[Any]:
    """A family with masks, which learns the masks that fill the boxes where the data has none."""

    @plugin(needs=())
    class Boxed(family):
        """With boxes for masks."""

        def losses(self, maps: Any, targets: Targets, sizes: Any, heads: Any) -> Any:
            height, width = maps.size
            y, x = torch.arange(height)[:, None], torch.arange(width)
            left, top, right, bottom = targets.boxes[..., None, None].unbind(2)
            masks = (x >= left) & (x < right) & (y >= top) & (y < bottom)
            return super().losses(maps, targets._replace(masks=masks.to(torch.uint8)), sizes, heads)

    return Boxed


class TestMaskRcnn(ModelContract):
    family: Any = boxed(MaskRcnn)

    def plugin(self) -> Any:
        small = {**RCNN, **MASKS, "sampled": 64, "max_detections": 20}
        return self.family(**small, anchors=Anchors(scales=[2.0], ratios=[1.0]))


class TestCascadeRcnn(ModelContract):
    def plugin(self) -> Any:
        return CascadeRcnn(**RCNN, anchors=Anchors(scales=[2.0], ratios=[1.0]), rpn_border=None)


class TestCascadeMaskRcnn(TestMaskRcnn):
    family = boxed(CascadeMaskRcnn)


class DetrContract(ModelContract):
    """SGD with momentum is not what a transformer is trained with: it needs a smaller rate and more iterations."""

    lr = 0.003
    steps = 100


class TestDetr(DetrContract):
    def plugin(self) -> Any:
        return Detr(**DETR, **ONE_MAP)


class TestConditionalDetr(DetrContract):
    def plugin(self) -> Any:
        return ConditionalDetr(**DETR, **ONE_MAP)


class TestDabDetr(DetrContract):
    def plugin(self) -> Any:
        return DabDetr(**DETR, **ONE_MAP)


class TestDeformableDetr(DetrContract):
    def plugin(self) -> Any:
        return DeformableDetr(**DETR, **MAPS)


class TestDino(DetrContract):
    def plugin(self) -> Any:
        return Dino(**DETR, **MAPS, denoising=4)


class TestAtss(Contract):
    family = Atss


class TestGfl(Contract):
    """Its losses of boxes are weighted by its scores, so that they grow at first; that it learns is seen by what it
    finds."""

    lr = 0.1
    family = Gfl
    options: ClassVar[dict[str, Any]] = {**Contract.options, "largest": 4}
    test_overfits_two_images = None


class TestYolof(ModelContract):
    def plugin(self) -> Any:
        return Yolof(**{**SMALL, **YOLOF})


class TestCenternetUpdate(Contract):
    family = CenternetUpdate
    options: ClassVar[dict[str, Any]] = {"neck": TestFcos.options["neck"]}


class TestCenternet(ModelContract):
    def plugin(self) -> Any:
        return Centernet(backbone=SMALL["backbone"], **CENTRES)


class TestRtmdet(ModelContract):
    lr = 0.01

    def plugin(self) -> Any:
        return Rtmdet(**CSP)


class TestRtmdetIns(ModelContract):
    """Its losses grow at first, as GFL's."""

    lr = 0.03
    family: Any = boxed(RtmdetIns)
    test_overfits_two_images = None

    def dataset(self) -> Any:
        return TinyDataset(size=2, side=64)

    def plugin(self) -> Any:
        return self.family(**{**CSP, "max_detections": 20}, mask_channels=16, mask_convs=1)


class TestSsd(ModelContract):
    """The factors of its first map, which begin at 20, are of large gradients."""

    lr = 0.001

    def plugin(self) -> Any:
        return Ssd(**{**SMALL, **SSD})


class TestYolox(ModelContract):
    """Its loss of boxes has no gradient where none overlaps its object, so that images are larger; which points are
    positive changes as it learns, and its losses with it: that it learns is seen by what it finds."""

    lr = 0.03
    test_overfits_two_images = None

    def dataset(self) -> Any:
        return TinyDataset(size=2, side=96)

    def plugin(self) -> Any:
        return Yolox(**YOLOX)


class TestYolov3(ModelContract):
    """Its losses are sums, so that the rate is small."""

    lr = 0.001

    def plugin(self) -> Any:
        return Yolov3(backbone=SMALL["backbone"], **YOLOV3)


def made(plugin: BaseDetector, classes: int = 3) -> Any:
    torch.manual_seed(0)
    return Network(plugin, [f"class {number}" for number in range(classes)])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return of_family(request.param)


def of_family(name: str) -> Any:
    family, options = FAMILIES[name]
    small = RCNN if name in TWO_STAGES else DETR if name in DETRS else RTDETR if name in RTDETRS else SMALL
    return made(in_state(family(**{**small, **options}), STATES.get(name, {}))).train()


def in_state(family: Any, state: dict[str, Any]) -> Any:
    for name, value in state.items():
        setattr(family, name, value)
    return family


def batch_of(*objects: list[list[float]], side: int = 64) -> Batch:
    """Images of noise with such boxes; the last is smaller than the batch."""
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (len(objects), 3, side, side), dtype=torch.uint8, generator=noise)
    sizes = [(side, side)] * (len(objects) - 1) + [(side - 14, side - 4)]
    images[-1, :, side - 14 :] = 0
    images[-1, :, :, side - 4 :] = 0
    targets = [
        Target(torch.tensor(boxes).view(-1, 4), torch.arange(len(boxes)) % 3, disks(boxes, side)) for boxes in objects
    ]
    return batching.make_batch(images, targets, sizes=sizes)


def disks(boxes: list[list[float]], side: int) -> torch.Tensor:
    """The ellipses in boxes."""
    places = torch.arange(side) + 0.5
    masks = torch.zeros(len(boxes), side, side, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        x, y = ((places - (low + high) / 2) / (high - low) * 2 for low, high in ((left, right), (top, bottom)))
        mask[x[None].square() + y[:, None].square() < 1] = 1
    return masks


ONE, TWO = [[4.0, 6, 40, 30]], [[10.0, 10, 60, 50], [1.0, 2, 17, 22]]


def losses_of(model: Any, batch: Batch, targets: Targets | None = None) -> dict[str, float]:
    with torch.no_grad():
        losses = model(batch.images, batch.targets if targets is None else targets, batch.image_sizes)
    return {name: loss.item() for name, loss in losses.items()}


def test_what_is_in_the_padding_of_the_targets_is_of_no_matter(model: Any):
    batch = batch_of(ONE, TWO)
    padded = batch.targets.map(lambda values: torch.cat([values, values.flip(0)], 1))
    padded.valid[:, batch.targets.valid.shape[1] :] = False
    assert losses_of(model, batch, padded) == pytest.approx(losses_of(model, batch), rel=1e-6)


def test_an_image_without_objects_gives_a_gradient(model: Any):
    for objects in ([[], []], [[], TWO]):
        batch = batch_of(*objects)
        losses = model(batch.images, batch.targets, batch.image_sizes)
        total = sum(losses.values())
        total.backward()
        assert total.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        boxes = ("bbox", "mask", "loss_xy", "loss_wh")
        learned = [loss.item() for name, loss in losses.items() if any(word in name for word in boxes)]
        assert not any(learned) or objects[1]
        model.zero_grad()


@pytest.mark.parametrize("name", ["retinanet", "atss", "gfl"])
def test_an_image_without_objects_counts_as_one_positive(name: str):
    """In what the losses of classes are divided by, as in MMDetection."""
    model, batch = of_family(name), batch_of(TWO, [])
    maps = model.forward_outputs(model.normalize(batch.images, batch.image_sizes), batch.image_sizes)
    priors = model.family.priors(maps, batch.image_sizes)
    count = int(model.family.assigner.assign(priors, batch.targets).positive.sum())
    one, other, both = (losses_of(model, each)["loss_cls"] for each in (batch.keep([0]), batch.keep([1]), batch))
    assert count > 1
    assert both == pytest.approx((one * count + other) / (count + 1))


def test_what_an_assigner_gives_an_object_is_a_proposal_and_not_the_object():
    """The best of an object is its own with Mask R-CNN's assigner, even where it overlaps another object more."""
    one, other, best = [0.0, 0, 20, 10], [0.0, 0, 12, 10], [0.0, 0, 15, 10]  # IoU .75 and .8
    targets = batch_of([other, one]).targets
    proposals, valid = torch.tensor([[best, [40.0, 40, 60, 60]]]), torch.ones(1, 2, dtype=torch.bool)
    for family, owner in ((MaskRcnn(**EVERY), one), (FasterRcnn(**EVERY), other)):
        found = family.draw(family.assigner, proposals, valid, targets, 3)
        own = (found.boxes == torch.tensor(best)).all(-1)
        assert found.wanted[own].tolist() == [owner]
        assert found.boxes[found.given].tolist() == found.wanted[found.given].tolist()
        assert sorted(found.boxes[found.given].tolist()) == [other, one]


def with_own_statistics(model: Any) -> None:
    """Batch norm by its running statistics, so that images do not depend on what else is in the batch."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def test_two_processes_have_the_losses_of_one(model: Any, monkeypatch: pytest.MonkeyPatch):
    """Each with one image, and the counts of both averaged: the mean of their losses is that of the batch.

    YOLOv3's are sums over the images of a process, as in MMDetection, and count nothing."""
    batch = batch_of(ONE, TWO)
    with_own_statistics(model)
    halves = [batch.keep([number]) for number in range(2)]
    whole, seen, sums = losses_of(model, batch), [], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: seen.append(value.clone()))
    for half in halves:
        losses_of(model, half)
        sums.append(list(seen))
        seen.clear()
    if isinstance(model.family, Yolov3):
        assert not any(sums)
        one, other = (losses_of(model, half) for half in halves)
        assert whole == pytest.approx({name: one[name] + other[name] for name in whole})
        return
    shared = [one + other for one, other in zip(*sums, strict=True)]
    assert shared, "no count is shared"
    for half in halves:
        left = list(shared)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda value, left=left: value.copy_(left.pop(0)))
        for name, loss in losses_of(model, half).items():
            whole[name] -= loss / 2
    # How many noisy queries there are depends on the image of most objects that a process has.
    assert all(abs(rest) < 1e-5 for name, rest in whole.items() if "loss" in name and "dn_" not in name), whole


def test_the_device_is_asked_nothing(model: Any):
    """Tensors without values: whatever depends on one raises."""
    batch = batch_of(ONE, TWO)
    there = made(model.family).train().to("meta")
    targets = batch.targets.map(lambda value: value.to("meta"))
    losses = there(batch.images.to("meta"), targets, batch.image_sizes.to("meta"))
    sum(losses.values()).backward()


class Asked(TorchDispatchMode):
    """Keeps the operations whose result, or its shape, the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.name().startswith("aten::index") and isinstance(args[1], list) else []
        masked = any(one is not None and one.dtype == torch.bool for one in indices)
        if masked or any(
            word in func.name() for word in ("nonzero", "_local_scalar_dense", "masked_select", "nms", "assignment")
        ):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TWO_STAGES)
def test_two_stages_ask_for_the_nms_of_proposals_alone(name: str):
    batch = batch_of(ONE, TWO)
    with Asked() as asked:
        losses = of_family(name)(batch.images, batch.targets, batch.image_sizes)
        sum(losses.values()).backward()
    assert asked.found == ["detkernel::nms"]


def test_on_a_cpu_masks_are_computed_for_no_more_boxes_than_are_positive(monkeypatch: pytest.MonkeyPatch):
    batch, model, counts = batch_of(ONE, TWO), of_family("mask_rcnn"), []
    few = needed

    def kept(positive: torch.Tensor, most: int) -> int:
        counts.append((few(positive, most), most))
        return counts[-1][0]

    monkeypatch.setattr("detkernel_detectors.models.rcnn.needed", kept)
    found = model(batch.images, batch.targets, batch.image_sizes)
    monkeypatch.setattr("detkernel_detectors.models.rcnn.needed", lambda positive, most: most)
    expected = model(batch.images, batch.targets, batch.image_sizes)
    assert 0 < counts[0][0] < counts[0][1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [*DETRS, *RTDETRS])
def test_detrs_ask_once_for_the_matches_of_all_images_and_layers(name: str):
    batch = batch_of(ONE, TWO)
    with Asked() as asked:
        losses = of_family(name)(batch.images, batch.targets, batch.image_sizes)
        sum(losses.values()).backward()
    assert asked.found == ["detkernel::linear_sum_assignment"]


def test_how_many_are_drawn():
    which = torch.zeros(2, 50, dtype=torch.bool)
    which[0, :20] = True
    which[1, 3] = True
    matches = Matches(torch.zeros(2, 50, dtype=torch.int64), which, ~which)
    torch.manual_seed(0)
    few, other = (drawn(matches, 16, 0.25) for _ in range(2))
    assert few.positive.sum(1).tolist() == [4, 1]
    assert few.negative.sum(1).tolist() == [12, 15]
    assert not (few.positive & ~which).any()
    assert not (few.negative & which).any()
    assert not torch.equal(few.positive, other.positive)
    everything = drawn(matches, 10**6, 0.5)
    assert torch.equal(everything.positive, which)
    assert torch.equal(everything.negative, ~which)


def test_it_compiles_as_one_graph(model: Any):
    batch = batch_of(ONE, TWO)
    torch.compiler.reset()  # all families share `forward`, which is compiled a few times at most
    family = attrs.evolve(model.family, backbone=OneConv())  # a deep one takes long
    states = {name: getattr(model.family, name) for name in ("_initial", "_further") if hasattr(family, name)}
    small = made(in_state(family, states)).train()
    compiled = torch.compile(small, fullgraph=True, backend="eager")
    losses = compiled(batch.images, batch.targets, batch.image_sizes)
    found = {name: loss.item() for name, loss in losses.items()}
    assert found == pytest.approx(losses_of(small, batch), rel=1e-5)


def test_predictions_have_a_fixed_shape(model: Any):
    batch = batch_of(ONE, TWO)
    model.eval()
    with torch.no_grad():
        found = model(batch.images, None, batch.image_sizes)
    model.train()
    assert found.boxes.shape == (2, 100, 4)
    assert not (found.boxes[1] > torch.tensor([60, 50, 60, 50])).any()


MINE = """
from detkernel import option, plugin
from detkernel_detection import Assigner, BoxLoss
from detkernel_detection.parts import Matches
import torch

@plugin
class Centre(BoxLoss):
    '''How far centres are apart, in pixels.'''

    factor: float = option(default=1.0, help="of it")

    def __call__(self, predicted, wanted):
        return self.factor * ((predicted + predicted.roll(2, -1)) / 2 - (wanted + wanted.roll(2, -1)) / 2).abs().sum(-1)

@plugin
class All(Assigner):
    '''All anchors to the first object.'''

    def assign(self, priors, targets):
        valid = priors.valid & targets.valid[:, :1]
        return Matches(torch.zeros_like(valid, dtype=torch.int64), valid, ~valid)
"""


def of_config(folder: Path, **model: str) -> Any:
    """The model of a config."""
    from detkernel.config import load

    (folder / "mine.py").write_text(MINE)
    options = "".join(f", {name}: {value}" for name, value in model.items())
    backbone = "{use: resnet, depth: 18, channels: 8, norm: group}"
    (folder / "c.yaml").write_text(
        f"run: {{until: 1 iters}}\nmodel: {{use: retinanet, backbone: {backbone}, "
        f"neck: {{use: fpn, channels: 16}}, head: {{use: towers, convs: 1, channels: 16}}{options}}}\n"
    )
    return made(load(folder / "c.yaml").plugins["model"])


def test_a_loss_and_an_assigner_are_replaced_in_a_config(tmp_path: Path):
    """By what is installed, and by a local file: the losses are the replaced part's."""
    batch = batch_of(ONE, TWO)
    usual = losses_of(of_config(tmp_path).train(), batch)
    ciou = losses_of(of_config(tmp_path, box_loss="{use: ciou}").train(), batch)
    assert ciou["loss_bbox"] != usual["loss_bbox"]
    assert ciou["loss_cls"] == usual["loss_cls"]
    mine, twice = (
        losses_of(of_config(tmp_path, box_loss=f"{{use: ./mine.py:Centre, factor: {factor}}}").train(), batch)
        for factor in (1.0, 2.0)
    )
    assert twice["loss_bbox"] == pytest.approx(2 * mine["loss_bbox"])
    assert mine["loss_cls"] == usual["loss_cls"]
    assert losses_of(of_config(tmp_path, assigner="./mine.py:All").train(), batch)["loss_cls"] != usual["loss_cls"]


def test_a_part_of_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model.box_loss.use: 'focal' is a ClassLoss, not a BoxLoss"):
        of_config(tmp_path, box_loss="focal")
    with pytest.raises(ConfigError, match=r"model.assigner.use: 'focal' is a ClassLoss, not an Assigner"):
        of_config(tmp_path, assigner="focal")
    with pytest.raises(ConfigError, match=r"model.box_loss: expected a box loss, such as .*, got the number 3"):
        of_config(tmp_path, box_loss="3")
    (tmp_path / "lacking.py").write_text(LACKING)
    with pytest.raises(ConfigError, match=r"model.box_loss.use: Mine lacks __call__, which every one of its kind has"):
        of_config(tmp_path, box_loss="{use: ./lacking.py:Mine}")


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            Retinanet,
            {"class_loss": Softmax()},
            "class_loss: Softmax is of one choice among classes and no object",
        ),
        (
            Retinanet,
            {"head": StarTowers(channels=8, groups=4)},
            "it predicts cls, reg and refined, and is asked",
        ),
        (
            FasterRcnn,
            {"assigner": AtssAssigner()},
            "assigner: AtssAssigner goes by the levels of a pyramid",
        ),
        (CascadeRcnn, {"assigners": [FcosAssigner()] * 3}, "assigners.0: FcosAssigner goes by the levels of a pyramid"),
        (
            Dino,
            {"attention_heads": 3},
            "attention_heads: expected channels of the neck that are",
        ),
        (
            Detr,
            {"attention_heads": 3},
            "attention_heads: expected channels of the neck that are",
        ),
    ],
)
def test_parts_that_do_not_fit_their_family_are_one_line(family: Any, options: dict[str, Any], message: str):
    small = {Detr: {**DETR, **ONE_MAP}, Dino: {**DETR, **MAPS}}.get(family, RCNN if "rcnn" in str(family) else SMALL)
    with pytest.raises(ConfigError, match=message):
        made(family(**{**small, **options}))


def test_lists_of_parts_without_any_and_ranges_that_fall_are_refused():
    for make, message in (
        (lambda: Anchors(ratios=[]), "ratios: expected at least one"),
        (lambda: Anchors(scales=[]), "scales: expected at least one"),
        (lambda: HungarianAssigner(costs=[]), "costs: expected at least one"),
        (lambda: FcosAssigner(ranges=[64.0, 32.0]), "ranges: expected rising numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


LACKING = """
from detkernel import plugin
from detkernel_detection import BoxLoss
@plugin
class Mine(BoxLoss):
    'Has yet to be written.'
"""

THEIRS = [
    ("neck.laterals.", "neck.lateral_convs.{}.conv"),
    ("neck.outputs.", "neck.fpn_convs.{}.conv"),
    ("head.scales.", "bbox_head.scales.{}.scale"),
]


def mmdetections(name: str, family: str) -> str:
    """MMDetection's name of a parameter of ours."""
    for ours, theirs in THEIRS:
        if name.startswith(ours):
            number, dot, rest = name.removeprefix(ours).partition(".")
            return theirs.format(number) + dot + rest
    if "_tower." in name:
        name = name.replace("_tower.", "_convs.").replace(".norm.", ".gn.")
        return name.replace("head.", "bbox_head.")
    return name.replace("head.", f"bbox_head.{family}_").replace("centreness", "centerness")


@pytest.mark.parametrize(
    ("name", "family"), [("retinanet", "retina"), ("fcos", "conv"), ("atss", "atss"), ("gfl", "gfl")]
)
def test_weights_with_mmdetections_names_are_read(name: str, family: str, tmp_path: Path):
    model = of_family(name)
    other = {mmdetections(key, family): value + 1 for key, value in model.state_dict().items()}
    if name == "gfl":
        other["bbox_head.integral.project"] = torch.arange(5.0)
    assert not other.keys() & {key for key in model.state_dict() if key.startswith(("head", "neck"))}
    torch.save({"state_dict": other, "meta": {"dataset_meta": {"classes": model.classes}}}, tmp_path / "theirs.pth")
    expected = {key: value + 1 for key, value in model.state_dict().items()}
    load_into(model, read_weights(tmp_path / "theirs.pth"), model.classes)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
