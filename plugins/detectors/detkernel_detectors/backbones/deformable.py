"""Deformable convolution: a convolution whose points are moved by offsets that another one predicts."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformableConv2d(nn.Conv2d):
    """A 3x3 without bias, of the first version (https://arxiv.org/abs/1703.06211) or the second, which also weighs each
    point (https://arxiv.org/abs/1811.11168), with MMDetection's names of parameters.

    It begins as the ordinary convolution, in the second version as half of it.
    """

    def __init__(
        self, inside: int, outside: int, stride: int, groups: int, version: Literal["v1", "v2"], offset_groups: int
    ) -> None:
        super().__init__(inside, outside, 3, stride, 1, groups=groups, bias=False)
        self.moves = offset_groups * 18  # (y, x) of nine points
        self.conv_offset = nn.Conv2d(inside, self.moves if version == "v1" else self.moves // 2 * 3, 3, stride, 1)

    def begin(self) -> None:
        """No point is moved."""
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv_offset(x).float()  # in bf16 an offset of 8 has steps of 1/16
        offsets, logits = found[:, : self.moves], found[:, self.moves :]
        mask = logits.sigmoid() if logits.shape[1] else None
        result: Tensor = deform_conv2d(
            x.float(), offsets, self.weight.float(), stride=self.stride, padding=self.padding, mask=mask
        )
        return result.to(x.dtype)
