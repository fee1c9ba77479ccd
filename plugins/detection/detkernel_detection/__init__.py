"""What every detection plugin shares: the vocabulary, the kinds of parts, and what is done once for every detector."""

from detkernel_detection.batch_transform import BatchContext, BatchTransform
from detkernel_detection.dataset import Dataset
from detkernel_detection.loader import Loader
from detkernel_detection.parts import (
    Assigner,
    Backbone,
    BoxCoder,
    BoxHead,
    BoxLoss,
    CellCoder,
    ClassLoss,
    DynamicAssigner,
    Head,
    Heatmap,
    HeatmapLoss,
    MaskHead,
    MatchCost,
    Neck,
    Region,
    SetAssigner,
)
from detkernel_detection.sampler import Sampler
from detkernel_detection.structures import Annotations, Batch, Context, Detections, ImageId, Losses, Sample, Target
from detkernel_detection.transform import Transform

__all__ = [
    "Annotations",
    "Assigner",
    "Backbone",
    "Batch",
    "BatchContext",
    "BatchTransform",
    "BoxCoder",
    "BoxHead",
    "BoxLoss",
    "CellCoder",
    "ClassLoss",
    "Context",
    "Dataset",
    "Detections",
    "DynamicAssigner",
    "Head",
    "Heatmap",
    "HeatmapLoss",
    "ImageId",
    "Loader",
    "Losses",
    "MaskHead",
    "MatchCost",
    "Neck",
    "Region",
    "Sample",
    "Sampler",
    "SetAssigner",
    "Target",
    "Transform",
]
