"""From bytes to what a network expects: normalised on the device, the padding zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """(x / unit - mean) / std of a padded batch, 0 beyond each image, padded on to a multiple of `size_divisible`.

    The arithmetic is that of torchvision's `GeneralizedRCNNTransform`, bit for bit. A float batch has been normalised
    by a transform, and only its channels may be reversed. Shapes follow from the input's shape alone; the device is
    asked nothing.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        size_divisible: int = 1,
        unit: float = 255.0,
        bgr: bool = False,
    ) -> None:
        """`mean` and `std` are of R, G and B, in units of `unit` levels: 255 where they are of 0..1, 1 of 0..255.
        `bgr`: the network's first convolution wants B, G and R."""
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):  # moved with the model, and in no checkpoint
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.size_divisible, self.unit, self.bgr = size_divisible, unit, bgr

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """uint8 or float [B, 3, H, W] -> float32 [B, 3, H', W']. `sizes`: [B, 2] height and width of each image without
        its padding; None: there is none."""
        if not images.is_floating_point():
            images = images.float().div(self.unit).sub(self.mean).div(self.std)
            if sizes is not None:
                known = inside(sizes, images.shape[-2], images.shape[-1])
                images = torch.where(known[:, None], images, 0.0)
        if self.bgr:
            images = images.flip(1)
        height, width = (-side % self.size_divisible for side in images.shape[-2:])
        return nn.functional.pad(images, (0, width, 0, height)) if height or width else images


def inside(sizes: Tensor, height: int, width: int) -> Tensor:
    """bool [B, height, width]: which pixels of a padded batch are of its images, of `sizes` [B, 2]."""
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]
