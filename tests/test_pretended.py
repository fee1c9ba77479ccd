"""A whole run away from the CPU, on a device in pretence: nothing is left behind, nothing waits, and it resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch.utils import backend_registration

from .conftest import long

THEIRS = f"{Path(torchvision.__file__).parent}{os.sep}"
SCRIPT = Path(__file__).parent / "pretended.py"
CONFIG = """
run: {until: 5 iters, validate: every 5 iters}
device: {threads: 1, deterministic: true}
data:
  use: loader
  train: {use: shapes, size: 8, side: 64, sizes: [12, 40]}
  val: {use: shapes, size: 3, side: 64, sizes: [12, 40], split: val}
  train_transforms: [flip, color]
  batch_size: 2
  workers: 1
model: {use: torchvision_fcos, backbone: {use: mobilenet_v3, size: small, layers: [3, 8]}, neck_channels: 64}
optimizer: {use: adamw, lr: 1e-4, clip_norm: 10, accumulate: 2}
schedule: {use: cosine, warmup: 4 iters}
ema: {}
evaluation: {use: coco_map}
log: {}
checkpoint: {every: 3 iters, best: coco/bbox_mAP}
draw_predictions: {score: 0, training: 2}  # samples are drawn in the first iterations, not in the watched one
signals: {}
check_invalid_loss: {}
check_classes: {}
"""
VARYING = (
    *("adaptive_max_pool", "_adaptive_avg_pool2d_backward", "avg_pool3d_backward", "fractional_max_pool", "max_unpool"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "grid_sampler_2d_backward", "nll_loss2d", "ctc_loss"),
    *("put_", "put", "histc", "bincount", "median.dim", "kthvalue", "scatter_reduce", "index_reduce"),
)
"""What has no CUDA algorithm whose results repeat (torch.use_deterministic_algorithms); RoI align has."""
MODELS = {
    "torchvision_fcos": ["model.head_convs=1"],
    "torchvision_retinanet": ["model.backbone={use: mobilenet_v3, size: small, layers: [3, 8]}"],
    "torchvision_mask_rcnn": [
        "model.rpn_post_nms_top_n_train=50",
        "model.rpn_post_nms_top_n_test=50",
        "model.box_batch_size_per_image=32",
        "model.box_detections_per_img=5",
    ],
    "ssdlite": [
        "model={use: ssdlite}",
        *(f"data.{part}_transforms=[{{use: resize, size: [320, 320]}}]" for part in ("train", "val")),
    ],
}

NATIVE = {
    "retinanet": [
        "model={use: retinanet, backbone: {use: resnet, depth: 18, channels: 8}, "
        "neck: {use: fpn, channels: 16}, head: {use: towers, convs: 1, channels: 16}}",
        "data.batch_transforms=[{use: multi_scale, sizes: [96]}]",
    ]
}
"""Detectors that must not wait for the device."""
ONCE = {
    "dino": [
        "model={use: dino, backbone: {use: resnet, depth: 18, channels: 8}, neck: {use: channel_mapper, "
        "channels: 16, groups: 4}, queries: 20, encoder_layers: 1, decoder_layers: 2, ffn_channels: 16}"
    ]
}
"""Detectors that wait in one operation of their own alone, which matches queries."""

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no back ends in Python",
)


def train(folder: Path, *runs: tuple[int, list[str]]) -> list[dict[str, list[str]]]:
    """Train there: for each run, what one iteration did."""
    (folder / "config.yaml").write_text(CONFIG)
    command = [sys.executable, str(SCRIPT), "config.yaml", json.dumps(runs)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen: list[dict[str, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return seen


def last(folder: Path) -> Any:
    newest = max((folder / "checkpoints").glob("*iter_*.pt"), key=lambda path: (path.stem.split("_")[-1], path.name))
    return torch.load(newest, weights_only=True)


def test_models_train_there_without_waiting_and_can_be_repeated(tmp_path: Path) -> None:
    chosen = MODELS if os.environ.get("DETKERNEL_LONG") else ("torchvision_fcos",)
    models = {**{name: MODELS[name] for name in chosen}, **NATIVE, **ONCE}
    runs = [(0, [f"model.use={name}", *options, f"run.work_dir={name}"]) for name, options in models.items()]
    for name, seen in zip(models, train(tmp_path, *runs), strict=True):
        waits, operations = seen["waits"], {operation.partition("::")[2] for operation in seen["operations"]}
        if name in NATIVE:
            assert waits == [], name
        elif name in ONCE:
            assert "linear_sum_assignment" in operations, name
        else:
            assert waits, f"{name}: torchvision's models look at their targets; a run that never waits was not watched"
        assert [place for place in waits if not place.startswith(THEIRS)] == [], name
        assert {"convolution", "convolution_backward"} < operations
        assert [operation for operation in operations if operation.startswith(VARYING)] == [], name


@long
def test_a_run_stopped_there_resumes_bit_for_bit(tmp_path: Path) -> None:
    train(tmp_path, (0, ["run.work_dir=whole"]), (3, ["run.work_dir=stopped"]), (0, ["run.work_dir=stopped"]))
    kept = [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()]
    assert "iter_3.pt" in kept
    assert "aside_1" not in kept, "it began afresh"
    whole, stopped = last(tmp_path / "whole"), last(tmp_path / "stopped")
    assert whole["position"]["iter"] == stopped["position"]["iter"] == 5
    for part in ("model", "training_model", "plugins"):
        assert list(differences(whole[part], stopped[part])) == []


def differences(one: Any, other: Any, path: str = "") -> Any:
    if isinstance(one, torch.Tensor):
        if not torch.equal(one, other):
            yield path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            yield from differences(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from differences(left, right, f"{path}.{number}")
    elif one != other:
        yield path
