"""Generated pictures: nothing to download, and as many as a test or a first look needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from detkernel import option, plugin
from detkernel_detection import Annotations, Dataset

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from detkernel_data._draw import Plan

KINDS = ("circle", "square", "triangle", "diamond", "cross")
DRAWING = 1
"""Goes up when the same options give other pictures."""


@plugin
class Shapes(Dataset):
    """Coloured circles, squares and triangles on noise, drawn afresh from a seed, with exact boxes and masks.

    A picture depends on (seed, split, its index) and the options below, not on `size`. Boxes and masks are those of
    the part that is seen. Where a shape finds no free place, the picture has one less.
    """

    size: int = option(default=1000, at_least=1, help="number of pictures")
    split: Literal["train", "val", "test"] = option(default="train", help="other splits have other pictures")
    seed: int = option(default=0, at_least=0, help="where the shapes lie follows from it")
    side: int = option(default=128, at_least=16, help="height and width of a picture, in pixels")
    objects: tuple[int, int] = option(default=(1, 5), at_least=1, at_most=100, help="fewest and most shapes a picture")
    sizes: tuple[int, int] = option(
        default=(12, 60), at_least=6, help="smallest and largest side of a shape, in pixels"
    )
    overlap: float = option(
        default=0.1, at_least=0, at_most=0.5, help="the most of a shape's pixels that others may hide"
    )
    kinds: tuple[Literal["circle", "square", "triangle", "diamond", "cross"], ...] = option(
        default=KINDS[:3], help="the classes, in label order"
    )

    def __attrs_post_init__(self) -> None:
        for name, (low, high) in (("objects", self.objects), ("sizes", self.sizes)):
            if low > high:
                raise ValueError(f"{name}: expected the smaller number first, got {[low, high]}")
        if self.sizes[1] > self.side:
            raise ValueError(f"sizes: expected at most the picture's side of {self.side}, got {self.sizes[1]}")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError("kinds: expected at least one, and each once")

    def load(self) -> None:
        self.classes = self.kinds

    def __len__(self) -> int:
        return self.size

    def image(self, index: int) -> Tensor:
        import torch

        from detkernel_data._draw import compose, paint

        key = self._key(index)
        scene = compose(key, self._plan())
        return torch.from_numpy(paint(key, scene)).permute(2, 0, 1)

    def annotations(self, index: int) -> Annotations:
        import numpy as np

        from detkernel_data._draw import compose, tight_boxes

        labels, canvas = compose(self._key(index), self._plan())
        masks = canvas == np.arange(1, len(labels) + 1, dtype=np.uint8)[:, None, None]
        return Annotations(
            image_id=index % self.size,
            path=f"shapes {self.split} {index % self.size}",
            height=self.side,
            width=self.side,
            boxes=tight_boxes(masks),
            labels=np.array(labels, dtype=np.int64),
            area=masks.sum((1, 2)).astype(np.float64),
            crowd=np.zeros(len(labels), dtype=bool),
            difficult=np.zeros(len(labels), dtype=bool),
            masks=_run_lengths(masks),
        )

    def fingerprint(self) -> str:
        from hashlib import sha256

        options = (DRAWING, self.size, self.split, self.seed, *self._plan())
        return sha256(repr(options).encode()).hexdigest()[:16]

    def _plan(self) -> Plan:
        from detkernel_data._draw import Plan

        return Plan(self.side, self.objects, self.sizes, self.overlap, self.kinds)

    def _key(self, index: int) -> tuple[int, int, int, int]:
        if not -self.size <= index < self.size:
            raise IndexError(f"picture {index} of {self.size}")
        return DRAWING, self.seed, ("train", "val", "test").index(self.split), index % self.size


def _run_lengths(masks: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """COCO's run lengths of bool [N, H, W]."""
    from pycocotools import mask

    encoded = mask.encode(masks.transpose(1, 2, 0).astype("uint8", order="F"))
    return [{"size": runs["size"], "counts": runs["counts"].decode()} for runs in encoded]
