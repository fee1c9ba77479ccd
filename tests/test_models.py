"""Every model that is shipped, trained for a moment and validated by `detkernel run`, with the default device."""

from __future__ import annotations

import json
import re
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import Detkernel, long

POINTS = [point for point in entry_points(group="detkernel.plugins") if re.search(r"\.models[.:]", point.value)]
MODELS = sorted(point.name for point in POINTS)
FEW = {
    "detkernel_torchvision": """
  rpn_post_nms_top_n_train: 40
  rpn_post_nms_top_n_test: 8
  box_batch_size_per_image: 16
""",
    "detkernel_detectors": """
  sampled: 16
  proposals: 40
  max_detections: 8
""",
}
"""What makes the R-CNNs' heads of masks and keypoints take seconds on a CPU, and is of no matter here."""
DETRS = {
    "dfine": "  decoder_layers: 2\n",
    "rtdetr": "  decoder_layers: 2\n",
    **dict.fromkeys(
        ("conditional_detr", "dab_detr", "deformable_detr", "detr", "dino"),
        "  encoder_layers: 1\n  decoder_layers: 2\n",
    ),
}
"""Six layers take as long as they are alike."""
NARROW = {
    "yolov3": """
  neck: {use: yolo_neck, channels: [8, 8, 8]}
  head: {use: yolo_head, channels: [8, 8, 8]}
""",
}
"""What widens necks and heads, and is of no matter here."""
OTHER_BACKBONES = {"dfine", "rtmdet", "rtmdet_ins", "yolox"}
"""Native models whose backbone is not a ResNet; the others get a small one."""
CONFIG = """
run: {until: 2 iters, validate: every 2 iters, work_dir: work}
data:
  use: loader
  train: {use: coco, annotation_file: DATA/a.json, image_folder: DATA}
  val: {use: coco, annotation_file: DATA/a.json, image_folder: DATA}
  train_transforms: [{use: resize, size: [SIDE, SIDE]}]
  val_transforms: [{use: resize, size: [SIDE, SIDE]}]
  batch_size: 2
  workers: 0
device: {}
optimizer: {use: sgd, lr: 0.001}
evaluation: {use: coco_map}
check_invalid_loss: {interval: 1}
model:
  use: NAME
"""


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images with two objects each: boxes, masks, three keypoints."""
    folder = tmp_path_factory.mktemp("objects")
    draw = np.random.default_rng(0)
    annotations = []
    for number in range(2):
        Image.fromarray(draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        for x, category in ((4 + number, 1), (34, 2)):
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0, "area": 600,
                "bbox": [x, 8, 24, 32], "segmentation": [[x, 8, x + 24, 8, x + 24, 40, x, 40]],
                "keypoints": [x + 2, 9, 2, x + 12, 20, 2, x + 20, 38, 1], "num_keypoints": 3,
            })  # fmt: skip
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 64, "height": 64} for n in range(2)],
        "annotations": annotations,
        "categories": [{"id": n, "name": name, "keypoints": ["a", "b", "c"]} for n, name in ((1, "cat"), (2, "dog"))],
    }
    (folder / "a.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=long if name == "torchvision_ssd" else ()) for name in MODELS]
)
def test_two_iterations_and_a_validation(name: str, objects: Path, tmp_path: Path, detkernel_here: Detkernel) -> None:
    side = {"ssd": 300, "torchvision_ssd": 300, "ssdlite": 320}.get(name, 64)
    config = CONFIG.replace("DATA", str(objects)).replace("SIDE", str(side)).replace("NAME", name)
    library = next(point.value.split(".")[0] for point in POINTS if point.name == name)
    if name == "ssd":
        config += "  backbone: {use: vgg, channels: 4}\n  neck: {use: ssd_neck, extra: [16, 8, 8, 8]}\n"
    elif library == "detkernel_detectors" and name not in OTHER_BACKBONES:
        config += "  backbone: {use: resnet, depth: 18, channels: 8}\n"
    elif library == "detkernel_torchvision" and name not in ("torchvision_ssd", "ssdlite"):
        config += "  backbone: {use: mobilenet_v3, size: small, layers: [3, 8]}\n  neck_channels: 64\n"
    config += DETRS.get(name, "") + NARROW.get(name, "")
    (tmp_path / "c.yaml").write_text(config + (FEW[library] if "rcnn" in name else ""))
    result = detkernel_here("run", "c.yaml")
    assert result.returncode == 0, result.stderr


def test_all_models_are_known() -> None:
    theirs = {
        "keypoint_rcnn",
        "ssdlite",
        *(f"torchvision_{name}" for name in ("faster_rcnn", "fcos", "mask_rcnn", "retinanet", "ssd")),
    }
    native = {
        "atss",
        "cascade_mask_rcnn",
        "cascade_rcnn",
        "centernet",
        "centernet_update",
        "conditional_detr",
        "dab_detr",
        "deformable_detr",
        "detr",
        "dfine",
        "dino",
        "gfl",
        "rtdetr",
        "rtmdet",
        "rtmdet_ins",
        "ssd",
        "tood",
        "vfnet",
        "yolof",
        "yolov3",
        "yolox",
        "faster_rcnn",
        "fcos",
        "mask_rcnn",
        "retinanet",
    }
    assert theirs | native <= set(MODELS)
