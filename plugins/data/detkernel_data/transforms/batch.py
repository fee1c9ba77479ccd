"""The standard batch transforms, which change a training batch on its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from detkernel import option, plugin
from detkernel_detection import Batch, BatchContext, BatchTransform


@plugin
class MultiScale(BatchTransform):
    """Resize batches to one of several sizes, another every so many iterations, the same on every process (YOLOX, Ge et
    al. 2021). Height and width stay multiples of `step`, so that the aspect changes by less than a step.
    """

    moves_fields: ClassVar[tuple[str, ...]] = ("value", "angle")

    sizes: list[int] | None = option(default=None, at_least=1, help="pixels of the longer side, of which one is drawn")
    between: tuple[int, int] | None = option(
        default=None, at_least=1, help="in the place of `sizes`: least and most pixels of the longer side, by `step`"
    )
    step: int = option(default=32, at_least=1, help="what height and width are multiples of")
    every: int = option(default=10, at_least=1, help="iterations after which another size is drawn")

    def __attrs_post_init__(self) -> None:
        if (self.sizes is None) == (self.between is None) or self.sizes == []:
            raise ValueError("sizes: give either `sizes` or `between`, with at least one size")
        name, given = ("sizes", self.sizes) if self.between is None else ("between", list(self.between))
        if any(size % self.step for size in given or []) or not self._sizes():
            raise ValueError(f"{name}: expected multiples of `step`, {self.step}, the smaller first, got {given}")

    def output_sizes(self, size: tuple[int, int]) -> Sequence[tuple[int, int]]:
        return [self._target(size, longer) for longer in self._sizes()]

    def __call__(self, batch: Batch, context: BatchContext) -> None:
        import torch

        from detkernel_data.transforms.batch_geometry import resize_batch

        sizes = self._sizes()
        if context.checking:
            longer = min(sizes) if context.iteration else max(sizes)
        else:
            generator = context.generator(context.iteration // self.every)
            longer = sizes[int(torch.randint(len(sizes), (), generator=generator))]
        height, width = batch.images.shape[-2:]
        resize_batch(batch, self._target((height, width), longer), context.field_kinds)

    def _sizes(self) -> Sequence[int]:
        if self.between is None:
            return self.sizes or []
        return range(self.between[0], self.between[1] + 1, self.step)

    def _target(self, size: tuple[int, int], longer: int) -> tuple[int, int]:
        height, width = (max(1, int(side * longer / max(size) / self.step + 0.5)) * self.step for side in size)
        return height, width
