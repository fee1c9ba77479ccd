"""Ways to look at an image: whole, in tiles, mirrored, in other sizes; and how what is found is put together."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs
import torch
from detkernel import UserError
from detkernel_detection import Detections, Sample
from detkernel_detection.images import decode
from detkernel_detection.predictor import Image, make_sample, to_tensor
from torch import Tensor
from torch.nn import functional
from torchvision.ops import batched_nms

if TYPE_CHECKING:
    from detkernel_export.model import Model

FLIPS = ("horizontal", "vertical")
_IOU = 0.5
"""Above which two detections of one class, from different looks at an image, are one object."""
_COVERED = 0.5
"""Of a detection that a tile's border cuts, the share that a larger one must cover to take its place."""
_CUT, _MASK = "cut by its tile", "place of its mask"
"""Fields of detections, as long as they are put together."""
MOST_MASKS = 2**30
"""Bytes of the masks of an image that is cut into tiles."""


class _TileMask(NamedTuple):
    """A detection's mask in its tile, as large as its box, and where that begins in the image."""

    x: int
    y: int
    pixels: Tensor


def _positive(_: Any, attribute: Any, value: Any) -> None:
    if any(not 0.1 <= one <= 10 for one in value):
        raise UserError(f"{attribute.name}: expected factors from 0.1 to 10, got {', '.join(map(str, value))}")


@attrs.frozen(kw_only=True)
class Ways:
    """How an image is looked at. By default once, whole."""

    tiles: int | None = None
    """Pixels of the sides of tiles that a larger image is cut into; None: it is taken whole."""
    overlap: float = 0.2
    """Of a tile's side, the share that it has in common with the next at least."""
    flips: Sequence[str] = ()
    """Mirrored too: "horizontal" (left to right), "vertical"."""
    scales: Sequence[float] = attrs.field(default=(1.0,), validator=_positive)
    """Sizes of the image that the model is given, each looked at: 1 is that of its validation."""

    def __attrs_post_init__(self) -> None:
        wrong = [flip for flip in self.flips if flip not in FLIPS]
        if wrong:
            raise UserError(f"flips: expected some of {', '.join(FLIPS)}, got '{wrong[0]}'")
        if self.tiles is not None and self.tiles < 32:
            raise UserError(f"tiles: expected a side of at least 32 pixels, got {self.tiles}")
        if not 0 <= self.overlap <= 0.9:
            raise UserError(f"overlap: expected a share from 0 to 0.9, got {self.overlap}")
        if not self.scales:
            raise UserError("scales: expected at least one factor, such as 1")

    def pixels(self, image: Image, bits: int | None = None) -> Tensor:
        """uint8 [3, H, W]. One that is cut into tiles may be larger than others."""
        if isinstance(image, (str, PathLike)):
            return decode(str(image), apply_exif=True, bits=bits, huge=self.tiles is not None)
        return to_tensor(image)

    def detect(
        self, model: Model, images: Sequence[Tensor], batch_size: int, score: float = -math.inf
    ) -> list[Detections]:
        """What is found in each image with a score of at least `score`, by falling score."""
        if self.tiles is None:
            looks = [list(self._looks(model, image)) for image in images]
            found = model.detect([sample for several in looks for sample, _ in several], batch_size)
            whole = iter(found)
            merged = [
                self._merged([_mirrored(next(whole), flip, image, model.keypoint_names) for _, flip in several])
                for several, image in zip(looks, images, strict=True)
            ]
            return [one.keep(one.scores >= score) for one in merged]
        return [self._in_tiles(model, image, batch_size, score) for image in images]

    def _looks(self, model: Model, image: Tensor) -> Iterator[tuple[Sample, str]]:
        """The samples of one image, and how each is mirrored."""
        for scale in self.scales:
            for flip in ("", *self.flips):
                sample = make_sample(image, 0, model.transforms)
                if scale != 1:
                    _rescale(sample, scale)
                if flip:
                    sample.image = sample.image.flip(-1 if flip == "horizontal" else -2)
                yield sample, flip

    def _merged(self, several: Sequence[Detections]) -> Detections:
        if len(several) == 1:
            return several[0]
        found = _joined(several)
        return found.keep(batched_nms(found.boxes, found.scores, found.labels, _IOU))

    def _in_tiles(self, model: Model, image: Tensor, batch_size: int, score: float) -> Detections:
        """Tile by tile, so that no more than a batch of them is in memory beside the image."""
        windows = list(self.windows(int(image.shape[1]), int(image.shape[2])))
        once = attrs.evolve(self, tiles=None)
        parts: list[Detections] = []
        masks: list[_TileMask] = []
        has_masks = False
        for start in range(0, len(windows), batch_size):
            some = windows[start : start + batch_size]
            crops = [image[:, y1:y2, x1:x2] for x1, y1, x2, y2 in some]
            for window, found in zip(some, once.detect(model, crops, batch_size), strict=True):
                has_masks |= found.masks is not None
                wanted = found.scores >= score
                found.fields[_MASK] = len(masks) - 1 + wanted.cumsum(0)
                masks += _tile_masks(found.keep(wanted), window[0], window[1])
                found.masks = None
                found.fields[_CUT] = _cut(found.boxes, window, int(image.shape[1]), int(image.shape[2]))
                parts.append(_moved(found, window[0], window[1]))
        found = _joined(parts)
        found = found.keep(_whole(found, found.fields.pop(_CUT)))
        found = found.keep(batched_nms(found.boxes, found.scores, found.labels, _IOU))
        found = found.keep(found.scores >= score)
        kept = found.fields.pop(_MASK).tolist()
        if has_masks:
            found.masks = _stitched([masks[number] for number in kept], int(image.shape[1]), int(image.shape[2]))
        return found

    def windows(self, height: int, width: int) -> Iterator[tuple[int, int, int, int]]:
        """(x1, y1, x2, y2) of each tile, row by row, evenly spread."""
        assert self.tiles is not None
        rows, columns = (_starts(side, self.tiles, self.overlap) for side in (height, width))
        for y in rows:
            for x in columns:
                yield x, y, min(x + self.tiles, width), min(y + self.tiles, height)


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin, so that the first and the last end with the image."""
    if side <= tile:
        return [0]
    step = max(1, int(tile * (1 - overlap)))
    count = -(-(side - tile) // step) + 1
    return [round(number * (side - tile) / (count - 1)) for number in range(count)]


def _rescale(sample: Sample, scale: float) -> None:
    """Another size of the image that the model is given."""
    height, width = (max(1, round(side * scale)) for side in sample.size)
    y, x = height / sample.size[0], width / sample.size[1]
    floats = sample.image[None].float()
    image = functional.interpolate(floats, (height, width), mode="bilinear", align_corners=False, antialias=True)[0]
    sample.image = image if sample.image.is_floating_point() else image.round().clamp(0, 255).to(torch.uint8)
    sample.scale = (sample.scale[0] * y, sample.scale[1] * x)


def _mirrored(found: Detections, flip: str, image: Tensor, keypoint_names: Sequence[str]) -> Detections:
    """What is found in a mirrored image, in the image itself."""
    if not flip:
        return found
    low, axis = (0, -1) if flip == "horizontal" else (1, -2)
    side = float(image.shape[axis])
    boxes = found.boxes.clone()
    boxes[:, low], boxes[:, low + 2] = side - found.boxes[:, low + 2], side - found.boxes[:, low]
    found.boxes = boxes
    if found.masks is not None:
        found.masks = found.masks.flip(axis)
    if found.keypoints is not None:
        points = found.keypoints.clone()
        points[..., low] = side - points[..., low]
        found.keypoints = points[:, _swapped(keypoint_names, points.shape[1])]
    return found


def _swapped(names: Sequence[str], count: int) -> list[int]:
    """The places of keypoints in a mirror image: left is right, by their names."""
    other = [name.replace("left", "\0").replace("right", "left").replace("\0", "right") for name in names]
    return [names.index(name) if name in names else place for place, name in enumerate(other)] or list(range(count))


def _tile_masks(found: Detections, x: int, y: int) -> list[_TileMask]:
    """The mask of each detection, no larger than its box, and where it lies in the image. Empty without masks."""
    if found.masks is None:
        return []
    height, width = found.masks.shape[-2:]
    kept = []
    for mask, box in zip(found.masks, found.boxes.tolist(), strict=True):
        left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
        part = mask[top : min(height, math.ceil(box[3])), left : min(width, math.ceil(box[2]))].clone()
        kept.append(_TileMask(x + left, y + top, part))
    return kept


def _stitched(masks: Sequence[_TileMask], height: int, width: int) -> Tensor | None:
    """uint8 [N, H, W]; None, with a warning, where that is more than a machine should be asked for."""
    size = len(masks) * height * width
    if size > MOST_MASKS:
        logging.getLogger("detkernel").warning(
            "masks left out: those of %d objects in an image of %dx%d take %.1f GB, more than %.1f; a higher score "
            "keeps fewer objects, and parts of the image have smaller masks",
            len(masks), width, height, size / 1e9, MOST_MASKS / 1e9,
        )  # fmt: skip
        return None
    found = torch.zeros(len(masks), height, width, dtype=torch.uint8)
    for whole, (x, y, part) in zip(found, masks, strict=True):
        whole[y : y + part.shape[0], x : x + part.shape[1]] = part
    return found


def _moved(found: Detections, x: int, y: int) -> Detections:
    """From a tile to the image that it was cut from."""
    found.boxes = found.boxes + torch.tensor([x, y, x, y])
    if found.keypoints is not None:
        found.keypoints = found.keypoints + torch.tensor([x, y, 0])
    return found


def _joined(several: Sequence[Detections]) -> Detections:
    """All detections of one image, by falling score."""

    def all_of(name: str) -> Any:
        values = [getattr(one, name) for one in several]
        return None if values[0] is None else torch.cat(values)

    fields = {name: torch.cat([one.fields[name] for one in several]) for name in several[0].fields}
    first = several[0]
    found = Detections(
        first.image_id, first.index, all_of("boxes"), all_of("scores"), all_of("labels"), all_of("masks"),
        all_of("keypoints"), fields,
    )  # fmt: skip
    return found.keep(found.scores.argsort(descending=True, stable=True))


def _cut(boxes: Tensor, window: tuple[int, int, int, int], height: int, width: int) -> Tensor:
    """bool [N]: which boxes end at a border of their tile that is not the image's: objects that are cut, it seems."""
    x1, y1, x2, y2 = window
    sides = [(0, x1 > 0, 0), (1, y1 > 0, 0), (2, x2 < width, x2 - x1), (3, y2 < height, y2 - y1)]
    found = torch.zeros(len(boxes), dtype=torch.bool)
    for column, inner, border in sides:
        if inner:
            found |= (boxes[:, column] - border).abs() < 2
    return found


def _whole(found: Detections, cut: Tensor) -> Tensor:
    """bool [N]: not a part of an object of which another tile has more."""
    kept = torch.ones(len(cut), dtype=torch.bool)
    areas = (found.boxes[:, 2:] - found.boxes[:, :2]).clamp(min=0).prod(1)
    for part in torch.split(cut.nonzero()[:, 0], 256):
        low = torch.maximum(found.boxes[part, None, :2], found.boxes[None, :, :2])
        high = torch.minimum(found.boxes[part, None, 2:], found.boxes[None, :, 2:])
        covered = (high - low).clamp(min=0).prod(-1) > _COVERED * areas[part, None]
        same = found.labels[part, None] == found.labels[None]
        larger = areas[None] > areas[part, None]
        kept[part] = ~(covered & same & larger).any(1)
    return kept
