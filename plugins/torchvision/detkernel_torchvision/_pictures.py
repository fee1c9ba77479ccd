"""Between the loader's padded batch and torchvision's detectors, which expect a list of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from detkernel_detection import Batch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

Size = tuple[int, int]


class Pictures:
    """A padded batch that looks like a list of pictures: their sizes are all that is asked of each.

    It is no list, so that DistributedDataParallel passes it on as it is.
    """

    def __init__(self, batch: Batch) -> None:
        self.tensor, self.sizes = batch.images, batch.sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Tensor]:
        return (image[:, :h, :w] for image, (h, w) in zip(self.tensor, self.sizes, strict=True))


class Normalise(nn.Module):
    """In place of torchvision's `GeneralizedRCNNTransform`: normalises the whole batch at once, on its device.

    The pictures are resized and padded already. The arithmetic and the zeros in the padding are torchvision's, so that
    losses are equal bit for bit. A float batch has been normalised by a transform and is left as it is.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], size_divisible: int, check: Callable[[Sequence[Size]], None]
    ) -> None:
        super().__init__()
        self.mean, self.std = list(mean), list(std)
        for name, values in (("_mean", mean), ("_std", std)):  # on the model's device, and in no checkpoint
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.size_divisible = size_divisible
        self._check = check

    def forward(self, pictures: Pictures, targets: Any = None) -> tuple[ImageList, Any]:
        self._check(pictures.sizes)
        tensor = pictures.tensor
        if not tensor.is_floating_point():
            tensor = tensor.float().div_(255).sub_(self._mean).div_(self._std)
            _clear(tensor, pictures.sizes)
        return ImageList(self._padded(tensor), pictures.sizes), targets

    def postprocess(self, detections: Any, _sizes: Any, _originals: Any) -> Any:
        """Detections stay in the coordinates of the batch here."""
        return detections

    def _padded(self, tensor: Tensor) -> Tensor:
        height, width = tensor.shape[-2:]
        high, wide = (-(-side // self.size_divisible) * self.size_divisible for side in (height, width))
        if (high, wide) == (height, width):
            return tensor
        shape = (len(tensor), 3, high, wide)
        padded = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device).to(memory_format=torch.channels_last)
        padded[:, :, :height, :width] = tensor
        return padded


def _clear(tensor: Tensor, sizes: Sequence[Size]) -> None:
    """Zero what is beyond each picture."""
    for image, (height, width) in zip(tensor, sizes, strict=True):
        image[:, height:].zero_()
        image[:, :, width:].zero_()
