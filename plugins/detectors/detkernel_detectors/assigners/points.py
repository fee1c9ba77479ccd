"""Points go to the object that they lie in (Tian et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from detkernel import option, plugin, wrong
from detkernel_detection import Assigner
from detkernel_detection.boxes import areas, centres
from detkernel_detection.parts import Matches, Priors

from detkernel_detectors.coders.distance import distances

if TYPE_CHECKING:
    import torch
    from detkernel_detection.structures import Targets
    from torch import Tensor
else:
    from detkernel_detection import lazy_torch as torch

FARTHEST = 1e8
"""Upper bound of the last level."""


@plugin
class FcosAssigner(Assigner):
    """A point is to find the smallest object that it lies in and whose size is for its level.

    https://arxiv.org/abs/1904.01355, and "centre sampling" of its later versions. The size is the distance of the
    farthest side.
    """

    by_level: ClassVar[bool] = True

    ranges: list[float] | None = option(
        default=None,
        above=0,
        help="pixels up to which a side may be away, at each level but the last; from there on it is the next level's; "
        "null: 8 strides of each level, such as 64 at stride 8",
    )
    radius: float | None = option(
        default=1.5, above=0, help="strides that a point may be away from the centre, in x and in y; null: any"
    )

    def __attrs_post_init__(self) -> None:
        if self.ranges is not None and self.ranges != sorted(set(self.ranges)):
            raise ValueError(f"ranges: expected rising numbers, got {self.ranges}")

    def assign(self, priors: Priors, targets: Targets) -> Matches:
        points, boxes = centres(priors.boxes), targets.boxes[:, :, None]
        sides = distances(points, boxes)  # [B, M, N, 4]
        low, high = self._ranges(priors)
        farthest = sides.amax(-1)
        good = self._inside(priors, points, boxes, sides) & (farthest >= low) & (farthest <= high)
        good = good & targets.valid[..., None] & priors.valid[:, None]
        smallest, matched = torch.where(good, areas(boxes), torch.inf).min(1)
        positive = smallest < torch.inf
        return Matches(torch.where(positive, matched, 0), positive, priors.valid & ~positive)

    def _inside(self, priors: Priors, points: Tensor, boxes: Tensor, sides: Tensor) -> Tensor:
        """bool [B, M, N]: whether a point lies in an object, near enough to its centre."""
        if self.radius is None:
            return sides.amin(-1) > 0
        reach = (priors.strides * self.radius)[:, None]
        middle = centres(boxes)
        low, high = torch.maximum(middle - reach, boxes[..., :2]), torch.minimum(middle + reach, boxes[..., 2:])
        return ((points > low) & (points < high)).all(-1)

    def _ranges(self, priors: Priors) -> tuple[Tensor, Tensor]:
        """[N] each: from which size on and up to which an object is a prior's."""
        starts = [sum(priors.counts[:level]) for level in range(len(priors.counts))]
        usual: Sequence[Tensor | float] = [8 * priors.strides[start] for start in starts[:-1]]
        bounds: list[Tensor | float] = [-1.0, *(usual if self.ranges is None else self.ranges)]
        if len(bounds) != len(priors.counts):
            found = f"got {len(bounds) - 1} for {len(priors.counts)} levels"
            raise wrong(self, "ranges", f"expected a number for each level of the pyramid but the last, {found}")
        bounds.append(FARTHEST)
        each = [priors.strides.new_ones(count) for count in priors.counts]
        low, high = (
            torch.cat([ones * bound for ones, bound in zip(each, part, strict=True)])
            for part in (bounds[:-1], bounds[1:])
        )
        return low, high
