"""What was detected, kept small until a validation is complete, and put beside what there was to detect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from detkernel import Run
from detkernel_detection import Annotations, Detections
from numpy.typing import NDArray
from pycocotools import mask as rle


@attrs.frozen(eq=False)
class Found:
    """The detections of one image: arrays in main memory, masks as COCO run lengths."""

    boxes: NDArray[np.floating[Any]] = attrs.field(factory=lambda: np.zeros((0, 4)))
    """[N, 4] xyxy."""
    scores: NDArray[np.floating[Any]] = attrs.field(factory=lambda: np.zeros(0))
    labels: NDArray[np.int64] = attrs.field(factory=lambda: np.zeros(0, np.int64))
    masks: list[dict[str, Any]] = attrs.field(factory=list)
    keypoints: NDArray[np.floating[Any]] | None = None
    """[N, K, 3]."""


@attrs.define(eq=False)
class SavedDetections(Detections):
    """Detections that were read from a file; their masks are run lengths, which stay as they are."""

    found: Found = attrs.field(kw_only=True)


def compact(detections: Detections, *, masks: bool, keypoints: bool) -> Found:
    """Detections off the device, with their masks or keypoints only where asked for."""
    if isinstance(detections, SavedDetections):
        return detections.found
    return Found(
        boxes=_array(detections.boxes).reshape(-1, 4),
        scores=_array(detections.scores),
        labels=_array(detections.labels),
        masks=_run_lengths(detections.masks) if masks and detections.masks is not None else [],
        keypoints=_array(detections.keypoints) if keypoints and detections.keypoints is not None else None,
    )


def _array(tensor: torch.Tensor) -> Any:
    """A NumPy array; half precision, which NumPy knows in part or not at all, becomes float32."""
    tensor = tensor.detach()
    tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return tensor.cpu().numpy()


def _run_lengths(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Masks [N, H, W] as run lengths. pycocotools wants [H, W, N] in Fortran's order, which is [N, W, H] in C's."""
    columns = masks.detach().to(torch.uint8).permute(0, 2, 1).contiguous().cpu().numpy()
    encoded: list[dict[str, Any]] = rle.encode(columns.transpose(2, 1, 0))
    return encoded


def merged(parts: Sequence[Mapping[int, Found]]) -> dict[int, Found]:
    """What all processes found, each image once.

    Samplers show some images twice, so that every process gets equally many; the first process's word counts.
    """
    return {index: part[index] for part in reversed(parts) for index in part}


ImageResult = tuple[Annotations, Found]
"""What there is in an image, and what was found there."""


def results_by_image(run: Run, found: Mapping[int, Found]) -> list[ImageResult]:
    """The data set's images in the order of their ids, which is pycocotools' order: it decides between equal scores.

    Those that no process saw count as empty-handed, and that is said; in a check only those seen are there at all.
    """
    dataset = run.loader.dataset
    missing = len(dataset) - len(found)
    if missing and not run.checking:
        run.log.warning("%d of %d images were not seen: their objects count as missed", missing, len(dataset))
    indices = sorted(found) if run.checking else range(len(dataset))
    pairs = [(dataset.truth(index), found.get(index) or Found()) for index in indices]
    return sorted(pairs, key=lambda pair: (isinstance(pair[0].image_id, str), pair[0].image_id))
