"""Kinds of parts that detectors are made of. Each is replaceable in a config: `box_loss: {use: ciou}`.

Shapes: B images, N priors (anchors or points) of all levels of a pyramid, fine to coarse and row by row, M places for
the objects of an image (`Targets`), C classes. Nothing here depends on how many objects there are: what is not an
object or not a positive prior is masked, never left out, so that a model has the same shapes in every iteration and
asks the device nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, dataclass_transform

import attrs
from detkernel.plugin import Part, option

if TYPE_CHECKING:
    from torch import Tensor, nn

    from detkernel_detection.structures import Targets


Kind = TypeVar("Kind", bound=type[Any])


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(option,))
def _kind(cls: Kind) -> Kind:
    """Not `plugin`: it is a kind of parts with options, and not itself a part."""
    return attrs.define(kw_only=True, eq=False, slots=False)(cls)


class Backbone(Part, ABC):
    """A feature extractor for detectors."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the module. It maps float [B, 3, H, W] to a dict of feature maps, fine to coarse, and has the
        attributes `channels: list[int]` and `strides: list[int]`, one entry a map."""


class Neck(Part, ABC):
    """Joins the maps of a backbone, such as a feature pyramid."""

    @abstractmethod
    def build(self, channels: Sequence[int], strides: Sequence[int]) -> nn.Module:
        """Make the module for maps of such channels and strides, fine to coarse. It maps a list of them to a list of
        maps, fine to coarse, and has the attributes `channels: int`, of each of these, and `strides: list[int]`. Where
        maps differ in channels, `channels` is a list, one a map; not every head takes these (`Head.per_level`)."""


RARE = -math.log(99)
"""The logit of a probability of 0.01."""


class Output(NamedTuple):
    """A map that a head gives for every level."""

    name: str
    channels: int
    branch: Literal["cls", "reg", "kernel"]
    """Which branch it belongs to: of features for classes, for boxes, or for kernels of masks."""
    bias: float = 0.0
    """What its bias begins with: `RARE` for classes, which at first are background almost everywhere."""
    scaled: bool = False
    """Whether each level has a learned factor for it."""
    priors: tuple[int, ...] | None = None
    """How many priors are at a place of each level, where levels differ in that: `channels` are then of one of them."""


class Head(Part, ABC):
    """Predicts from the maps of a pyramid, with the same weights at each level or with others."""

    per_level: ClassVar[bool] = False
    """Whether the maps may differ in channels; `build` is then given a list, one a level."""

    per_prior: ClassVar[bool] = False
    """Whether levels may differ in how many priors they have at a place (`Output.priors`)."""

    @abstractmethod
    def build(self, channels: int, levels: int, outputs: Sequence[Output]) -> nn.Module:
        """Make the module. It maps a list of `levels` maps [B, channels, H, W] to a dict: for each output's name a list
        of [B, its channels, H, W]. Its last convolution of each output is the attribute of that name, or a list of
        them, one a level."""


class BoxHead(Part, ABC):
    """Predicts classes and boxes from what is pooled of a box."""

    pooled: int
    """Height and width of what is pooled."""

    @abstractmethod
    def build(self, channels: int, classes: int, boxes: int) -> nn.Module:
        """Make the module. It maps [R, channels, pooled, pooled] to logits [R, classes] and numbers of a box coder
        [R, 4 * boxes]. Its last layers are the attributes `cls` and `reg`, with an output a row of their weights."""


class MaskHead(Part, ABC):
    """Predicts masks from what is pooled of a box."""

    pooled: int
    """Height and width of what is pooled."""

    @abstractmethod
    def build(self, channels: int, classes: int) -> nn.Module:
        """Make the module. It maps [R, channels, pooled, pooled] and labels int64 [R] to logits [R, side, side], those
        of the label's mask, and has `side` as an attribute. Its last layer is the attribute `logits`, with a class a
        row of its weight."""


class Priors(NamedTuple):
    """What boxes are predicted from: anchors, or points as boxes without extent."""

    boxes: Tensor
    """float32 [N, 4] xyxy in pixels of the batch's images; [B, N, 4] where each image has its own, as proposals are."""
    strides: Tensor
    """float32 [N], in pixels."""
    valid: Tensor
    """bool [B, N]: which lie in an image rather than in its padding."""
    counts: tuple[int, ...]
    """How many of the N are of each level."""


class Matches(NamedTuple):
    """What each prior is to predict."""

    matched: Tensor
    """int64 [B, N]: the place of its object in `Targets`, 0 where it has none."""
    positive: Tensor
    """bool [B, N]: it has an object."""
    negative: Tensor
    """bool [B, N]: it is background. What is neither plays no part in a loss."""
    quality: Tensor | None = None
    """float32 [B, N], 0..1: what the score of a positive prior is to be; 0 elsewhere. None: an assigner that does not
    know the predictions."""
    pairs: Tensor | None = None
    """int64 [B, M, K]: the places of the priors that learn the box of each object, -1 for none, from an assigner that
    gives a prior several. None: a positive prior learns the box of its object."""


class Assigner(Part, ABC):
    """Decides which priors are to predict which objects."""

    by_level: ClassVar[bool] = False
    """Whether it goes by the levels of a pyramid, so that it cannot match proposals, which have none."""

    @abstractmethod
    def assign(self, priors: Priors, targets: Targets) -> Matches:
        """Match all images at once. An object where `targets.valid` is false does not exist; a prior where
        `priors.valid` is false is neither positive nor negative."""


class Predicted(NamedTuple):
    """What a network says of each prior, without a gradient."""

    scores: Tensor
    """float32 [B, N, C], 0..1."""
    boxes: Tensor
    """float32 [B, N, 4] xyxy in pixels of the batch's images."""
    logits: Tensor | None = None
    """float32 [B, N, C]: whose sigmoids the scores are; None: they are made otherwise."""


class DynamicAssigner(Part, ABC):
    """Decides by what is predicted which priors are to predict which objects."""

    @abstractmethod
    def assign(self, priors: Priors, targets: Targets, predicted: Predicted) -> Matches:
        """Match all images at once, with a `quality`. What is not valid is as for an `Assigner`."""


class BoxCoder(Part, ABC):
    """The numbers by which a network says where a box lies, relative to a prior."""

    @abstractmethod
    def encode(self, priors: Tensor, boxes: Tensor) -> Tensor:
        """Boxes [..., 4], xyxy in pixels, as numbers [..., 4]. Both boxes and priors have an extent."""

    @abstractmethod
    def decode(self, priors: Tensor, deltas: Tensor) -> Tensor:
        """The boxes [..., 4] of numbers [..., 4], not clipped. Always finite for finite numbers."""


class CellCoder(Part, ABC):
    """The same where a prior lies in a cell of a grid, in which the network says where the centre is."""

    @abstractmethod
    def encode(self, priors: Tensor, boxes: Tensor, strides: Tensor) -> Tensor:
        """Boxes [..., 4], xyxy in pixels, as numbers [..., 4]: of the centre as shares of the cell, above 0 and below
        1, and of the sides. `strides` [...]: sides of the cells of the priors, in pixels."""

    @abstractmethod
    def decode(self, priors: Tensor, deltas: Tensor, strides: Tensor) -> Tensor:
        """The boxes [..., 4] of numbers [..., 4], not clipped. Always finite for finite numbers."""


@_kind
class BoxLoss(Part, ABC):
    """How far a predicted box is from its object."""

    compares: ClassVar[Literal["boxes", "deltas"]] = "boxes"
    """What it is given: boxes, xyxy, or the numbers of the detector's box coder."""

    weight: float = option(default=1.0, at_least=0, help="factor of this loss")

    @abstractmethod
    def __call__(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        """[..., 4] and [..., 4] -> [...], one loss each, with the factor `weight`; the detector masks, sums and
        divides. It must be finite for any box of positive extent, and for a predicted one without."""


@_kind
class ClassLoss(Part, ABC):
    """How wrong the class logits of a prior are; each class is a yes or no of its own."""

    weight: float = option(default=1.0, at_least=0, help="factor of this loss")
    of_one_choice: ClassVar[bool] = False
    """Whether it is of one choice among all classes and no object, which has a logit of its own, the last."""

    @abstractmethod
    def __call__(self, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
        """Logits [..., C] and labels [...], C where there is no object -> [...], summed over classes, with the factor
        `weight`. `quality` [...] 0..1: how good the prior's box is, for losses that want it as the score."""


class Heatmap(Part, ABC):
    """How near priors are to the centres of objects, which is what class logits of centre detectors are to say."""

    @abstractmethod
    def __call__(self, priors: Priors, targets: Targets) -> Tensor:
        """float32 [B, M, N], 0 and more: how far each prior is from the centre of each object, exactly 0 where it lies,
        infinite where that is of no matter. The map of a class is e to the power of minus that, of its nearest object;
        what would be less than 1e-4 is 0."""


class Region(Part, ABC):
    """Which priors are candidates for which objects."""

    @abstractmethod
    def __call__(self, priors: Priors, targets: Targets) -> tuple[Tensor, Tensor]:
        """bool [B, M, N]: which priors may predict the box of each object, and which are its centre, at each level that
        is to find it. An object where `targets.valid` is false has none."""


@_kind
class HeatmapLoss(Part, ABC):
    """How wrong class logits are about where centres of objects are."""

    weight: float = option(default=1.0, at_least=0, help="factor of this loss")

    @abstractmethod
    def __call__(self, logits: Tensor, wanted: Tensor, positive: Tensor) -> Tensor:
        """Logits [..., C], how near each place is to a centre of the class, 0..1, and how often it is one -> [...],
        summed over classes, with the factor `weight`."""


class Queries(NamedTuple):
    """What sets of queries predict: one set after the other, such as those of all layers of a decoder."""

    logits: Tensor
    """float32 [B, N, C]."""
    boxes: Tensor
    """float32 [B, N, 4] cxcywh in shares of the image, 0..1."""
    scale: Tensor
    """float32 [B, 1, 4]: (width, height, width, height) of each image in pixels."""
    counts: tuple[int, ...]
    """How many of the N are of each set. Each set is matched by itself."""


@_kind
class MatchCost(Part, ABC):
    """How badly a query fits an object, for `SetAssigner`."""

    weight: float = option(default=1.0, at_least=0, help="factor of this cost")

    @abstractmethod
    def __call__(self, queries: Queries, targets: Targets) -> Tensor:
        """[B, N, M], with the factor `weight`. No gradient is asked for."""


class SetAssigner(Part, ABC):
    """Decides which queries are to predict which objects: each object is one query's of each set."""

    @abstractmethod
    def assign(self, queries: Queries, targets: Targets) -> Matches:
        """Match all sets of all images at once. Queries without an object are negative."""
