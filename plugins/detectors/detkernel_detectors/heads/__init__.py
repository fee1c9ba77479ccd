"""Heads: from the maps of a pyramid, or from what is pooled of them, to predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from detkernel import option, plugin, wrong
from detkernel_detection import BoxHead, Head, MaskHead
from detkernel_detection.parts import Output

if TYPE_CHECKING:
    from torch import nn


REACH = 8.0
"""Strides that VFNet tells distances in."""


@plugin
class Towers(Head):
    """Two towers of 3x3 convolutions, one for classes and one for boxes, shared by all levels (Lin et al. 2017)."""

    convs: int = option(default=4, at_least=0, help="convolutions in each tower")
    channels: int = option(default=256, at_least=1, help="channels of each")
    norm: Literal["group", "batch"] | None = option(default=None, help="normalisation after each; null: none")
    groups: int = option(default=32, at_least=1, help="of the group norm; channels are a multiple of it")
    bias: bool | None = option(default=None, help="whether each has a bias; null: where it is not normalised")

    def __attrs_post_init__(self) -> None:
        if self.norm == "group" and self.channels % self.groups:
            raise ValueError(f"channels: expected a multiple of the {self.groups} groups, got {self.channels}")

    @property
    def depths(self) -> dict[str, int]:
        """Convolutions in the tower of each branch."""
        return {"cls": self.convs, "reg": self.convs}

    def build(self, channels: int, levels: int, outputs: Sequence[Output]) -> nn.Module:
        from detkernel_detectors.heads.towers import TwoTowers

        return TwoTowers(self, channels, levels, outputs)


@plugin
class UnequalTowers(Towers):
    """Towers as in YOLOF's head (Chen et al. 2021): boxes need more convolutions than classes.

    https://arxiv.org/abs/2103.09460, section 4.4
    """

    convs: int = option(default=2, at_least=0, help="convolutions in the tower for classes")
    box_convs: int = option(default=4, at_least=0, help="convolutions in the tower for boxes")
    channels: int = option(default=512, at_least=1, help="channels of each")
    norm: Literal["group", "batch"] | None = option(default="batch", help="normalisation after each; null: none")

    @property
    def depths(self) -> dict[str, int]:
        return {"cls": self.convs, "reg": self.box_convs}


@plugin
class LevelTowers(Head):
    """Two towers for each level, one for classes and one for boxes, with batch norm and SiLU (Ge et al. 2021).

    With `share`, only batch norm and what gives the outputs are a level's own, and the convolutions are the same (Lyu
    et al. 2022): levels differ in their statistics more than in what is to be found. A third tower, for kernels of
    masks, has its own at each level.
    """

    convs: int = option(default=2, at_least=0, help="convolutions in each tower")
    channels: int = option(default=256, at_least=1, help="channels of each")
    share: bool = option(default=True, help="the same convolutions at all levels, as in RTMDet; YOLOX: false")
    deviation: float | None = option(
        default=0.01, above=0, help="standard deviation of the first weights; null: uniform, by the number of inputs"
    )
    norm_eps: float = option(default=1e-5, above=0, help="what a batch norm adds to the variance")
    norm_momentum: float = option(default=0.1, above=0, at_most=1, help="share of a batch in its running statistics")

    def build(self, channels: int, levels: int, outputs: Sequence[Output]) -> nn.Module:
        from detkernel_detectors.heads.level_towers import TowersEach

        return TowersEach(self, channels, levels, outputs)


@plugin
class YoloHead(Head):
    """YOLOv3's head (Redmon and Farhadi 2018): at each level a 3x3 convolution of its own, then one of 1x1.

    https://arxiv.org/abs/1804.02767, section 2.3. Levels may differ in channels.
    """

    per_level: ClassVar[bool] = True

    channels: list[int] = option(
        factory=lambda: [256, 512, 1024], at_least=1, help="of the 3x3 convolution of each level, fine to coarse"
    )
    deviation: float = option(default=0.01, above=0, help="standard deviation of the first weights")
    norm_eps: float = option(default=1e-5, above=0, help="what a batch norm adds to the variance")
    norm_momentum: float = option(default=0.1, above=0, at_most=1, help="share of a batch in its running statistics")

    def build(self, channels: int | Sequence[int], levels: int, outputs: Sequence[Output]) -> nn.Module:
        from detkernel_detectors.heads.yolo import YoloConvs

        if len(self.channels) != levels:
            raise wrong(self, "channels", f"expected {levels}, one for each level of the neck, got {self.channels}")
        return YoloConvs(self, [channels] * levels if isinstance(channels, int) else channels, outputs)


@plugin
class LevelConvs(Head):
    """SSD's head (Liu et al. 2016): at each level one convolution for each output. Levels may differ in their channels
    and in how many priors they have at a place."""

    per_level: ClassVar[bool] = True
    per_prior: ClassVar[bool] = True

    size: Literal[1, 3] = option(default=3, help="height and width of the convolutions")

    def build(self, channels: int | Sequence[int], levels: int, outputs: Sequence[Output]) -> nn.Module:
        from detkernel_detectors.heads.level_convs import ConvsEach

        return ConvsEach(self, [channels] * levels if isinstance(channels, int) else list(channels), outputs)


@plugin
class FcBoxHead(BoxHead):
    """Two fully connected layers (Girshick 2015), which 3x3 convolutions may precede."""

    convs: int = option(default=0, at_least=0, help="convolutions before the layers")
    conv_channels: int = option(default=256, at_least=1, help="channels of each")
    norm: Literal["batch", "group"] | None = option(default=None, help="normalisation after each; null: none")
    fcs: int = option(default=2, at_least=0, help="fully connected layers")
    channels: int = option(default=1024, at_least=1, help="outputs of each")
    pooled: int = option(default=7, at_least=1, help="height and width of what is pooled of a box")

    def build(self, channels: int, classes: int, boxes: int) -> nn.Module:
        from detkernel_detectors.heads.rcnn import FullyConnected

        return FullyConnected(self, channels, classes, boxes)


@plugin
class FcnMaskHead(MaskHead):
    """3x3 convolutions, and a transposed one that doubles height and width (He et al. 2017)."""

    convs: int = option(default=4, at_least=0, help="3x3 convolutions")
    channels: int = option(default=256, at_least=1, help="channels of each")
    norm: Literal["batch", "group"] | None = option(default=None, help="normalisation after each; null: none")
    pooled: int = option(default=14, at_least=1, help="height and width of what is pooled of a box; masks have twice")

    def build(self, channels: int, classes: int) -> nn.Module:
        from detkernel_detectors.heads.rcnn import FullyConvolutional

        return FullyConvolutional(self, channels, classes)


@plugin
class StarTowers(Towers):
    """VFNet's head (Zhang et al. 2021): from the boxes of its first output, deformable convolutions look at nine points
    of each (its corners, sides and centre), and what they see gives the classes and how the boxes are corrected.

    Its outputs are `cls`, `reg`, logarithms of distances in 8 strides, and `refined`, logarithms of factors of these.
    """

    convs: int = option(default=3, at_least=0, help="convolutions in each tower")
    norm: Literal["group", "batch"] | None = option(default="group", help="normalisation after each; null: none")
    gradient: float = option(
        default=0.1, at_least=0, at_most=1, help="share of their gradient that the points hand on to the boxes"
    )

    def build(self, channels: int, levels: int, outputs: Sequence[Output]) -> nn.Module:
        from detkernel_detectors.heads.star import StarHead

        names = [output.name for output in outputs]
        if names != ["cls", "reg", "refined"]:
            raise wrong(self, "", f"it predicts cls, reg and refined, and is asked for {', '.join(names)}")
        return StarHead(self, channels, levels, outputs)


@plugin
class TaskAlignedHead(Towers):
    """TOOD's head (Feng et al. 2021): one tower, of whose layers classes and boxes each take what they need.

    How much of each layer is told by attention to the mean of all. `reg` is given as distances in strides, or as it is
    where a learned factor is asked for; outputs beside `cls` and `reg` see all layers.
    """

    convs: int = option(default=6, at_least=1, help="convolutions in the tower")
    norm: Literal["group", "batch"] | None = option(default="group", help="normalisation after each; null: none")

    def build(self, channels: int, levels: int, outputs: Sequence[Output]) -> nn.Module:
        from detkernel_detectors.heads.task_aligned import TaskAligned

        return TaskAligned(self, channels, levels, outputs)


@plugin
class Branches(Head):
    """A branch of its own for each output, shared by all levels: a 3x3 convolution, a ReLU and a 1x1 one (Zhou et al.
    2019)."""

    channels: int = option(default=64, at_least=1, help="between the two convolutions of a branch")

    def build(self, channels: int, levels: int, outputs: Sequence[Output]) -> nn.Module:
        from detkernel_detectors.heads.branches import BranchesEach

        return BranchesEach(self, channels, outputs)
