"""Generated images: nothing to download, and as many as a test or a first look needs.

Everything follows from the key of an image, in whole numbers: the same on every machine. The key gives two streams of
random numbers: one for what is in it, which is all that its annotations need, and one for its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from detkernel import option, plugin
from detkernel_detection import Annotations, Dataset

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
TRIES = 20
"""Places that are tried for a shape before it is given up."""


class Plan(NamedTuple):
    """How many shapes of which sizes are drawn on images of which side."""

    side: int
    objects: tuple[int, int]
    sizes: tuple[int, int]
    overlap: float
    kinds: tuple[str, ...]


class Scene(NamedTuple):
    """What is in an image."""

    labels: list[int]
    """The classes of its shapes, at least one, from front to back."""
    canvas: NDArray[np.uint8]
    """[side, side] the number of the shape that is seen at each pixel, from 1; 0 is the background."""


def compose(key: Sequence[int], plan: Plan) -> Scene:
    """Put shapes behind each other, so that of each no more than `overlap` of its pixels is hidden."""
    import numpy as np

    draw = np.random.default_rng([*key, 0])
    scene = Scene([], np.zeros((plan.side, plan.side), dtype=np.uint8))
    for _ in range(draw.integers(plan.objects[0], plan.objects[1], endpoint=True)):
        label = int(draw.integers(len(plan.kinds)))
        size = int(draw.integers(plan.sizes[0], plan.sizes[1], endpoint=True))
        pixels = outline(plan.kinds[label], size)
        places = draw.integers(0, plan.side - size, size=(TRIES, 2), endpoint=True).tolist()
        if _put(scene.canvas, pixels, places, len(scene.labels) + 1, plan.overlap):
            scene.labels.append(label)
    return scene


def _put(
    canvas: NDArray[np.uint8], pixels: NDArray[np.bool_], places: Sequence[Sequence[int]], number: int, overlap: float
) -> bool:
    """Draw a shape at the first place where enough of it is seen; whether there was one."""
    import numpy as np

    allowed = overlap * np.count_nonzero(pixels)
    for x, y in places:
        window = canvas[y : y + len(pixels), x : x + len(pixels)]
        free = window == 0
        if np.count_nonzero(pixels & ~free) <= allowed:
            window[pixels & free] = number
            return True
    return False


def outline(kind: str, size: int) -> NDArray[np.bool_]:
    """[size, size] a shape's pixels. Twice the coordinates of the pixels' centres are whole numbers."""
    import numpy as np

    u = np.arange(1, 2 * size, 2) - size
    v = u[:, None]
    match kind:
        case "circle":
            return u * u + v * v <= size * size
        case "triangle":
            return 2 * abs(u) <= v + size
        case "diamond":
            return abs(u) + abs(v) <= size
        case "cross":
            return (3 * abs(u) <= size) | (3 * abs(v) <= size)
        case _:
            return np.ones((size, size), dtype=bool)


def tight_boxes(masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[N, 4] the smallest boxes around the pixels of [N, H, W], each of which has some."""
    import numpy as np

    rows: NDArray[np.bool_] = np.any(masks, axis=2)
    columns: NDArray[np.bool_] = np.any(masks, axis=1)
    low = np.stack([columns.argmax(1), rows.argmax(1)], axis=1)
    high = np.stack([columns[:, ::-1].argmax(1), rows[:, ::-1].argmax(1)], axis=1)
    return np.concatenate([low, masks.shape[:0:-1] - high], axis=1).astype(np.float64)


def paint(key: Sequence[int], scene: Scene) -> NDArray[np.uint8]:
    """[side, side, 3] bright shapes of one colour each, on a dark, blotched and noisy background."""
    import numpy as np

    draw = np.random.default_rng([*key, 1])
    side = len(scene.canvas)
    cells = -(-side // 16)
    blotches = draw.integers(20, 100, size=(cells, cells, 3), dtype=np.uint8)
    pixels = blotches.repeat(16, 0).repeat(16, 1)[:side, :side]
    pixels += draw.integers(0, 40, size=pixels.shape, dtype=np.uint8)
    colours = np.zeros((len(scene.labels) + 1, 3), dtype=np.uint8)
    for colour in colours[1:]:
        colour[:] = draw.permutation([draw.integers(200, 256), draw.integers(0, 256), draw.integers(0, 120)])
    inside = scene.canvas > 0
    pixels[inside] = colours[scene.canvas[inside]]
    return pixels


KINDS = ("circle", "square", "triangle", "diamond", "cross")
DRAWING = 1
"""Goes up when the same options give other images."""


@plugin
class Shapes(Dataset):
    """Coloured circles, squares and triangles on noise, drawn afresh from a seed, with exact boxes and masks.

    An image depends on (seed, split, its index) and the options below, not on `size`. Boxes and masks are those of
    the part that is seen. Where a shape finds no free place, the image has one less.
    """

    size: int = option(default=1000, at_least=1, help="number of images")
    split: Literal["train", "val", "test"] = option(default="train", help="other splits have other images")
    seed: int = option(default=0, at_least=0, help="where the shapes lie follows from it")
    side: int = option(default=128, at_least=16, help="height and width of an image, in pixels")
    objects: tuple[int, int] = option(default=(1, 5), at_least=1, at_most=100, help="fewest and most shapes an image")
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
            raise ValueError(f"sizes: expected at most the image's side of {self.side}, got {self.sizes[1]}")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError("kinds: expected at least one, and each once")

    def load(self) -> None:
        self.classes = self.kinds

    def __len__(self) -> int:
        return self.size

    def image(self, index: int) -> Tensor:
        import torch

        key = self._key(index)
        scene = compose(key, self._plan())
        return torch.from_numpy(paint(key, scene)).permute(2, 0, 1)

    def annotations(self, index: int) -> Annotations:
        import numpy as np

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
        return Plan(self.side, self.objects, self.sizes, self.overlap, self.kinds)

    def _key(self, index: int) -> tuple[int, int, int, int]:
        if not -self.size <= index < self.size:
            raise IndexError(f"image {index} of {self.size}")
        return DRAWING, self.seed, ("train", "val", "test").index(self.split), index % self.size


def _run_lengths(masks: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """COCO's run lengths of bool [N, H, W]."""
    from pycocotools import mask

    encoded = mask.encode(masks.transpose(1, 2, 0).astype("uint8", order="F"))
    return [{"size": runs["size"], "counts": runs["counts"].decode()} for runs in encoded]
