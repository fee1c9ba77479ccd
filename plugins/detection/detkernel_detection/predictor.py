"""From an image, as it comes, to detections: a trained model with the transforms that it was measured with."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from detkernel import DataError
from torch import Tensor

from detkernel_detection.batching import pack_samples
from detkernel_detection.images import decode
from detkernel_detection.predictions import detect
from detkernel_detection.structures import Detections, Sample, Target
from detkernel_detection.transform import Transform

if TYPE_CHECKING:
    from detkernel_detection.detector import Detector

Image: TypeAlias = "np.ndarray[Any, Any] | Tensor | str | PathLike[str]"
"""uint8 RGB: an array [H, W, 3], a tensor [3, H, W], or the path of a file."""
SCORE_THRESHOLD = "score_threshold"
"""The metric that says from which score on a validation's detections give the best F1; predictions go by it."""


class Predictor:
    """Finds objects in images with a model that is trained.

        found = Predictor(run.bare_model, transforms=[Resize(short=480, long=640)]).predict("image.jpg")
        print(found.boxes, found.scores, [run.classes[label] for label in found.labels])

    `transforms` are those of the validation that the model was measured with; they may scale an image and change its
    colours, and move nothing. The model stays where it is, in the mode it is in; what it finds is on its device.
    """

    def __init__(self, model: Detector, transforms: Sequence[Transform] = ()) -> None:
        moving = [type(transform).__name__ for transform in transforms if not transform.scales_only]
        if moving:
            raise ValueError(f"transforms: {moving[0]} moves objects; prediction takes those that only scale")
        self.model, self.transforms = model, list(transforms)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in label order."""
        return self.model.classes

    def predict(self, image: Image, min_score: float = 0.0) -> Detections:
        """What is found in one image, in its own pixels, by falling score.

        Detections below `min_score` are left out. Raises `DataError` for what is not an image.
        """
        return self.predict_batch([image], min_score)[0]

    def predict_batch(self, images: Sequence[Image], min_score: float = 0.0) -> list[Detections]:
        """The same for several images, which go through the model at once. One of another size is padded."""
        if not images:
            return []
        samples = [make_sample(image, number, self.transforms) for number, image in enumerate(images)]
        batch = pack_samples(samples).unpack()
        batch.move(self.model.normalize.mean.device)
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                found = detect(self.model, batch)
        finally:
            self.model.train(training)
        return [detections.keep(detections.scores >= min_score) for detections in found]


def make_sample(image: Image, number: int, transforms: Sequence[Transform] = ()) -> Sample:
    """An image, number `number` of some, on its way into a batch, transformed. Raises `DataError`."""
    pixels = to_tensor(image)
    sample = Sample(
        image=pixels,
        target=Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
        index=number,
        image_id=number if isinstance(image, (np.ndarray, Tensor)) else str(image),
        original_size=(int(pixels.shape[1]), int(pixels.shape[2])),
    )
    for transform in transforms:
        sample = transform(sample)
    return sample


def to_tensor(image: Image) -> Tensor:
    """uint8 [3, H, W], RGB; a file is decoded as for training, and turned as its EXIF orientation says.

    Raises `DataError` that says what was found.
    """
    if isinstance(image, (str, PathLike)):
        return decode(str(image), apply_exif=True)
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return torch.from_numpy(np.array(image, order="C")).permute(2, 0, 1)
        raise DataError(f"an array of {image.dtype} {list(image.shape)} is not an image; expected uint8 RGB [H, W, 3]")
    if image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3 and image.numel():
        return image.to("cpu", copy=True)  # a transform may change it in place
    raise DataError(
        f"a tensor of {image.dtype} {list(image.shape)} is not an image; expected torch.uint8 RGB [3, H, W]"
    )
