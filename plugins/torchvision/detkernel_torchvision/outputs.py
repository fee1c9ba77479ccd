"""Which tensors of torchvision's detectors are outputs for classes."""

from __future__ import annotations

import re
from typing import Any

from detkernel_detection.class_mapping import ClassOutput

_DENSE = re.compile(r"head\.classification_head\.(?:cls_logits|module_list\.(\d+)(?:\.1)?)\.(?:weight|bias)")
"""(anchor, class) in the rows of FCOS, RetinaNet, SSD (a head for each level) and SSDlite (behind a depthwise one)."""
_SCORES = re.compile(r"roi_heads\.(?:box_predictor\.cls_score|mask_predictor\.mask_fcn_logits)\.(?:weight|bias)")
_BOXES = re.compile(r"roi_heads\.box_predictor\.bbox_pred\.(?:weight|bias)")
"""(class, coordinate) in the rows of the R-CNNs, with boxes of the background that nobody uses."""


def class_outputs(model: Any, background: bool) -> dict[str, ClassOutput]:
    """The class outputs of a detector; `background`: label 0 is the background inside the model."""
    counted: Any = "first" if background else "none"
    found = {}
    for name in model.state_dict():
        dense = _DENSE.fullmatch(name)
        if dense:
            anchors = model.anchor_generator.num_anchors_per_location()[int(dense[1] or 0)]
            found[name] = ClassOutput(before=anchors, background=counted)
        elif _SCORES.fullmatch(name):
            found[name] = ClassOutput(background=counted)
        elif _BOXES.fullmatch(name):
            found[name] = ClassOutput(after=4, background=counted)
    return found


def keypoint_outputs() -> dict[str, ClassOutput]:
    """The outputs for keypoints, of a transposed convolution."""
    name = "roi_heads.keypoint_predictor.kps_score_lowres"
    return {f"{name}.weight": ClassOutput(dim=1), f"{name}.bias": ClassOutput()}
