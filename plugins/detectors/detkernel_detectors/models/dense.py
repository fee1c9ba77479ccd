"""What dense detectors share: backbone, neck and head in a row, and what is done with their maps after that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

from detkernel import Run, option, plugin, wrong
from detkernel_detection import Backbone, BoxCoder, BoxLoss, Head, Neck
from detkernel_detection.boxes import clip
from detkernel_detection.model_plugin import DetectorPlugin
from detkernel_detection.parts import Matches, Output, Priors

from detkernel_detectors.backbones import Resnet
from detkernel_detectors.heads import Towers
from detkernel_detectors.necks import Fpn
from detkernel_detectors.priors import Anchors, anchors

if TYPE_CHECKING:
    import torch
    from detkernel_detection.class_mapping import ClassOutput
    from detkernel_detection.detector import Detector
    from detkernel_detection.predictions import Predictions
    from detkernel_detection.structures import Targets
    from torch import Tensor, nn
else:
    from detkernel_detection import lazy_torch as torch

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

KeyMap: TypeAlias = "tuple[tuple[str, str | None], ...]"

MMDETECTION: KeyMap = (
    (r"neck\.lateral_convs\.(\d+)\.conv\.", r"neck.laterals.\1."),
    (r"neck\.fpn_convs\.(\d+)\.conv\.", r"neck.outputs.\1."),
    (r"neck\.reduction_conv\.conv\.", "neck.reduction."),
    (r"bbox_head\.(cls|reg)_convs\.(\d+)\.conv\.", r"head.\1_tower.\2.conv."),
    (r"bbox_head\.(cls|reg)_convs\.(\d+)\.[bg]n\.", r"head.\1_tower.\2.norm."),
    (r"bbox_head\.scales\.(\d+)\.scale", r"head.scales.\1"),
)
"""How MMDetection's names of parameters begin, and ours, where all dense detectors have the same."""

TORCHVISION: KeyMap = (
    (r"backbone\.body\.", "backbone."),
    (r"backbone\.fpn\.inner_blocks\.(\d+)\.(0\.)?(weight|bias)", r"neck.laterals.\1.\3"),
    (r"backbone\.fpn\.inner_blocks\.(\d+)\.1\.", r"neck.lateral_norms.\1."),
    (r"backbone\.fpn\.layer_blocks\.(\d+)\.(0\.)?(weight|bias)", r"neck.outputs.\1.\3"),
    (r"backbone\.fpn\.layer_blocks\.(\d+)\.1\.", r"neck.output_norms.\1."),
    (r"backbone\.fpn\.extra_blocks\.p6\.", "neck.outputs.3."),
    (r"backbone\.fpn\.extra_blocks\.p7\.", "neck.outputs.4."),
)
"""The same of torchvision's, now and of version 0.12 and before (without the 0), in which most files are."""

DENSE_TORCHVISION: KeyMap = tuple(
    (rf"head\.{theirs}_head\.conv\.{before}\.", rf"head.{ours}_tower.{after}.")
    for theirs, ours in (("classification", "cls"), ("regression", "reg"))
    for before, after in (
        *((rf"{layer}\.0", f"{layer}.conv") for layer in range(4)),  # a block each
        *((rf"{layer}\.1", f"{layer}.norm") for layer in range(4)),
        *((f"{2 * layer}", f"{layer}.conv") for layer in range(4)),  # before: a row of convolutions and ReLUs
    )
)
"""The same of the towers of torchvision's RetinaNet."""


class Maps(NamedTuple):
    """What a dense detector's network gives."""

    features: list[Tensor]
    """The pyramid's maps, fine to coarse."""
    outputs: dict[str, list[Tensor]]
    """The head's maps by name, one [B, channels, H, W] for each level."""
    strides: tuple[int, ...]
    """Of the levels."""
    size: tuple[int, int]
    """Height and width of the padded batch."""

    def flat(self, name: str, entries: int) -> Tensor:
        """float32 [B, N, entries] of an output: level by level, row by row, and prior by prior of a place."""
        return torch.cat([_flat(one, entries) for one in self.outputs[name]], 1)

    def inside(self, sizes: Tensor | None, divisor: int) -> Tensor:
        """[B, 2]: height and width in which priors are valid, those of each image rounded up to `divisor`."""
        if sizes is None:
            height, width = self.size
            rows = self.features[0].new_full((len(self.features[0]), 2), height, dtype=torch.float32)
            return torch.where(torch.arange(2, device=rows.device) == 0, rows, float(width))
        return ((sizes + divisor - 1) // divisor * divisor).float()


def _flat(one: Tensor, entries: int) -> Tensor:
    return one.permute(0, 2, 3, 1).reshape(len(one), -1, entries).float()


class Candidates(NamedTuple):
    """What may be detected: a score of every prior for every class, and how its box is made."""

    scores: Tensor
    """float32 [B, N, C], 0..1."""
    boxes: Tensor
    """float32 [B, N, 4] xyxy, not clipped."""
    counts: Sequence[int]
    """How many of the N are of each level."""
    factor: Tensor | None = None
    """[B, N]: what a score is multiplied by after the threshold and the choice of the best of a level."""
    labels: Tensor | None = None
    """int64 [B, N]: the class of each where `scores` are of one alone, C = 1."""
    clipped: bool = True
    """Whether boxes are clipped to the images before NMS rather than behind it."""


@plugin
class BaseDetector(DetectorPlugin):
    """What all native detectors share: backbone, neck, weights, and normalisation on the device."""

    key_map: ClassVar[KeyMap] = ()
    """What is the family's own in the names of parameters of published weights, as (expression, replacement)."""
    published_by: ClassVar[str] = "MMDetection"
    """Whose names these are."""
    torchvision_key_map: ClassVar[KeyMap] = ()
    """The same of torchvision's names."""
    torchvision_builders: ClassVar[tuple[str, ...]] = ()
    """torchvision's functions whose published weights fit, by options (`configs/base/torchvision_*.yaml`)."""

    one_choice: ClassVar[bool] = False
    """Whether logits are of one choice among all classes and no object, the last."""

    backbone: Backbone = option(factory=Resnet, help="what makes feature maps of an image")
    neck: Neck = option(factory=Fpn, help="what makes a pyramid of them")
    weights: str | None = option(
        default=None,
        help="weights of the whole detector: a file, ours, MMDetection's or torchvision's; by name, such as "
        "torchvision:COCO_V1 or mmdet:retinanet_r50_fpn_1x_coco; null: random. Outputs for classes are taken by class "
        "name, the others start at random",
    )
    weights_classes: Literal["same_order", "none"] | list[str] | None = option(
        default=None,
        help="classes of the weights, where the file does not say: a list of names in its order; same_order: as the "
        "data's; none: class outputs start at random",
    )
    image_mean: tuple[float, float, float] = option(default=IMAGENET_MEAN, help="of R, G and B, on 0..255")
    image_std: tuple[float, float, float] = option(default=IMAGENET_STD, above=0, help="of R, G and B, on 0..255")
    channel_order: Literal["rgb", "bgr"] = option(
        default="rgb", help="of what the backbone is given; bgr for weights from Caffe and Detectron"
    )
    size_divisible: int = option(default=32, at_least=1, help="batches are padded to a multiple of this, in pixels")
    max_detections: int = option(default=100, at_least=1, help="detections an image")

    def heads(self, channels: Any, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        """The modules behind the neck, by name; `head` is given its maps. `channels`: an int, or for a `Head` with
        `per_level` maybe a list of them."""
        raise NotImplementedError

    def class_outputs(self) -> dict[str, ClassOutput]:
        """Which tensors of the model hold classes, by their names or patterns of them (`head.cls.*`)."""
        raise NotImplementedError

    def forwarded(self, network: Any, features: list[Tensor], sizes: Tensor | None, size: tuple[int, int]) -> Any:
        """What the network gives, of the neck's maps; `size`: height and width of the padded batch. `losses` and
        `predictions` are given it."""
        return Maps(features, network.head(features), network.strides, size)

    def losses(self, maps: Any, targets: Targets, sizes: Tensor | None, heads: Any) -> dict[str, Tensor]:
        """What is minimised. `heads`: the network, for modules that come after the first."""
        raise NotImplementedError

    def predictions(self, maps: Any, sizes: Tensor | None, heads: Any) -> Predictions:
        """What is found."""
        raise NotImplementedError

    @property
    def loads_weights(self) -> bool:
        return self.weights is not None

    def build(self, run: Run) -> Detector:
        from detkernel_detectors.models.network import Network

        return Network(self, run.classes)

    def load(self, run: Run, model: Any) -> None:
        from detkernel_detectors.models.network import load

        load(self, run, model)


@plugin
class NativeDetector(BaseDetector):
    """What native detectors share whose detections may overlap."""

    score_thresh: float = option(default=0.05, at_least=0, at_most=1, help="score above which an object is detected")
    nms_thresh: float = option(default=0.5, at_least=0, at_most=1, help="IoU above which a detection is dropped")


@plugin
class DenseDetector(NativeDetector):
    """What dense detectors share. A family says which outputs its head has, and what is made of them."""

    head: Head = option(factory=Towers, help="what predicts from the pyramid")
    candidates: int = option(default=1000, at_least=1, help="detections of a level before NMS, by falling score")
    min_size: float | None = option(
        default=0.0, at_least=0, help="pixels that width and height of a detection must exceed; null: they may be 0"
    )

    def outputs(self, classes: int) -> list[Output]:
        """The outputs of the head."""
        raise NotImplementedError

    @property
    def per_place(self) -> int:
        """How many priors are at a place of a map."""
        return 1

    def class_outputs(self) -> dict[str, ClassOutput]:
        from detkernel_detection.class_mapping import ClassOutput

        return {"head.cls.*": ClassOutput(before=self.per_place)}

    def logits(self, maps: Maps) -> Tensor:
        """Of the classes, [B, N, C]."""
        return maps.flat("cls", maps.outputs["cls"][0].shape[1] // self.per_place)

    def heads(self, channels: Any, strides: Sequence[int], classes: int) -> dict[str, nn.Module]:
        return {"head": self.head.build(channels, len(strides), self.outputs(classes))}

    def detected(self, maps: Maps, sizes: Tensor | None) -> Candidates:
        """What may be there."""
        raise NotImplementedError

    def predictions(self, maps: Maps, sizes: Tensor | None, heads: Any = None) -> Predictions:
        return self.chosen(maps, sizes)._replace(fields=None)

    def chosen(self, maps: Maps, sizes: Tensor | None) -> Predictions:
        """The best candidates of each level, clipped to the images, without those that a better one overlaps; the field
        `prior` says what each is predicted from."""
        from detkernel_detection.nms import suppressed

        found = self.detected(maps, sizes)
        classes = found.scores.shape[-1]
        scores, places = [], []
        start = 0
        for count in found.counts:
            level = found.scores[:, start : start + count]
            flat = torch.where(level > self.score_thresh, level, -1.0).flatten(1)
            best, index = flat.topk(min(self.candidates, flat.shape[1]))
            scores.append(best)
            places.append(index + start * classes)
            start += count
        score, place = torch.cat(scores, 1), torch.cat(places, 1)
        prior = place // classes
        label = place % classes if found.labels is None else found.labels.gather(1, prior)
        boxes = found.boxes.gather(1, prior[..., None].expand(-1, -1, 4))
        if found.clipped:
            boxes = clip(boxes, sizes)
        valid = (score > self.score_thresh) & larger(boxes, self.min_size)
        if found.factor is not None:
            score = score * found.factor.gather(1, prior)
        kept = suppressed(boxes, score, label, valid, self.nms_thresh, self.max_detections, fields={"prior": prior})
        return kept if found.clipped else kept._replace(boxes=clip(kept.boxes, sizes))


@plugin
class AnchorDetector(DenseDetector):
    """What dense detectors with anchors share."""

    anchors: Anchors = option(factory=lambda: Anchors(ratios=[1.0]), help="what boxes are predicted from")

    @property
    def per_place(self) -> int:
        return len(self.anchors.sides)

    def check_one_per_place(self) -> None:
        """Raise `ConfigError` where there are several anchors at a place."""
        if self.per_place != 1:
            raise wrong(self, "anchors", f"expected one scale and one ratio, got {self.per_place} anchors at a place")

    def priors(self, maps: Maps, sizes: Tensor | None) -> Priors:
        """The anchors. Those in the padding of an image are not valid."""
        return anchors(self.anchors, maps.features, maps.strides, maps.inside(sizes, self.size_divisible), maps.size)


def larger(boxes: Tensor, size: float | None) -> Tensor:
    """bool [...]: of boxes [..., 4], whether both sides are longer than `size`; None: all."""
    if size is None:
        return torch.ones_like(boxes[..., 0], dtype=torch.bool)
    return (boxes[..., 2:] - boxes[..., :2] > size).all(-1)


def around(priors: Priors, sides: float = 2.0) -> Tensor:
    """[N, 4]: a box of so many strides around each point, as one of positive extent."""
    half = sides / 2
    return priors.boxes + priors.strides[:, None] * priors.boxes.new_tensor([-half, -half, half, half])


def wanted_of(matches: Matches, targets: Targets, others: Tensor, background: int) -> tuple[Tensor, Tensor]:
    """Labels [B, N] and boxes [B, N, 4] that the priors are to predict: those of their objects, and elsewhere the label
    `background` and the boxes `others` [N, 4], of any positive extent, so that no masked loss is infinite."""
    labels = torch.where(matches.positive, targets.labels.gather(1, matches.matched), background)
    boxes = targets.boxes.gather(1, matches.matched[..., None].expand(-1, -1, 4))
    return labels, torch.where(matches.positive[..., None], boxes, others)


def box_losses(loss: BoxLoss, coder: BoxCoder, priors: Tensor, deltas: Tensor, wanted: Tensor) -> Tensor:
    """[B, N]: of the boxes, or of the coder's numbers, as the loss compares them."""
    if loss.compares == "deltas":
        return loss(deltas, coder.encode(priors, wanted))
    return loss(coder.decode(priors, deltas), wanted)
