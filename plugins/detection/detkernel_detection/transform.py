"""Transforms: what changes a sample on its way to a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from detkernel.plugin import Part

from detkernel_detection.dataset import Dataset
from detkernel_detection.structures import Sample


class Transform(Part, ABC):
    """Changes one sample. Random numbers come from torch's, NumPy's or Python's global generator: the loader seeds all
    three by (seed, epoch, index) before the first transform, so results do not depend on workers or order."""

    scales_only: ClassVar[bool] = False
    """Whether every point stays where it is but for a scaling that `sample.scale` records: what validation may use,
    since detections are divided by that scale to get back to the file's coordinates."""

    def prepare(self, dataset: Dataset) -> None:
        """Called once before the first sample: the place to check options against the data."""

    @abstractmethod
    def __call__(self, sample: Sample) -> Sample:
        """Return the changed sample; the given one may be changed in place."""
