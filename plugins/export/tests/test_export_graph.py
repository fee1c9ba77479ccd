"""A small detector of tensors through both forms of files: NMS is said in ONNX as torch has it."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from detkernel import DataError, UserError
from detkernel_detection.detector import Detector
from detkernel_detection.nms import suppressed
from detkernel_detection.normalize import Normalize
from detkernel_detection.predictions import Predictions
from detkernel_export import graph
from detkernel_export.export import differences, write
from detkernel_export.exported import Exported, metadata
from detkernel_export.session import OnnxDetector


class Pixels(Detector):
    """Each pixel of the upper left corner is a box: R, G its centre, B its score. Images of some multiple of 8."""

    def __init__(self):
        super().__init__(["dark", "bright"], Normalize((0, 0, 0), (1, 1, 1), 8))
        self.max_detections = 30

    def forward_outputs(self, images, sizes=None):
        return images[:, :, :8, :8].flatten(2)

    def predictions(self, outputs, sizes=None):
        centres = outputs[:, :2].transpose(1, 2) * 60
        boxes = torch.cat([centres - 12, centres + 12], -1)
        scores = outputs[:, 2]
        return suppressed(boxes, scores, (scores > 0.5).long(), scores > 0.1, 0.4, 30)


class Asks(Pixels):
    """Asks its tensors, so that it is no graph."""

    def predictions(self, outputs, sizes=None):
        if outputs.sum() > 3:
            outputs = outputs * 2
        return super().predictions(outputs, sizes)


class Clamps(Pixels):
    """Clamps a tensor in two ways, twice each: torch's converter joins both pairs, and loses limits of equal names."""

    def predictions(self, outputs, sizes=None):
        low, high = (outputs.clamp(0, 1).clamp(min=least) for least in (0.2, 0.4))
        return super().predictions(torch.where(torch.arange(3)[:, None] < 2, outputs, (low + high) / 2))


class Sized(Pixels):
    """Takes images of one size alone."""

    def forward_outputs(self, images, sizes=None):
        return super().forward_outputs(images + torch.zeros(64, 64))


class Coarse(Pixels):
    """Has a map of a pixel for each 32."""

    def forward_outputs(self, images, sizes=None):
        coarse = torch.nn.functional.avg_pool2d(images, 32, ceil_mode=True).flatten(2)
        return super().forward_outputs(images) + 0 * coarse.mean(2, keepdim=True)


class Bends(Pixels):
    """Has an operation that ONNX does not."""

    def forward_outputs(self, images, sizes=None):
        return torch.special.bessel_j0(super().forward_outputs(images))


class Refuses(Pixels):
    unexportable = "its shapes depend on the image"


def model(network):
    config = SimpleNamespace(plain={"run": {}, "model": {"use": "pixels"}, "data": {"use": "d"}, "ema": {"use": "ema"}})
    answers = {"build_model": ["model"], "build_loader": ["data"]}
    return SimpleNamespace(
        name="x.pt", module=network, transforms=[], classes=network.classes, keypoint_names=(), data=None,
        config=config, answering=lambda event: answers.get(event, []), best_score=0.25,
    )  # fmt: skip


def images(count, height=64, width=64):
    draw = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), generator=draw, dtype=torch.uint8)


def test_onnx_suppresses_as_torch_does_for_any_batch_and_size(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    lines = list(write(model(Coarse()), tmp_path / "a.onnx", "onnx", size="32x32", dynamic=True))
    assert lines[0].endswith("any number of images of any size from 16x16 to 4096x4096 (multiples of 8)")
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"))
    for batch in (images(1), images(5), images(2, 128, 72)):
        sizes = torch.tensor([batch.shape[-2:]] * len(batch))
        arrays = session.run(None, {"images": batch.numpy(), "sizes": sizes.numpy()})
        found = Predictions(*map(torch.from_numpy, arrays))
        with torch.no_grad():
            wanted = Pixels()(batch, None, sizes)
        assert 5 * len(batch) < int(wanted.valid.sum()) < 50 * len(batch), "some are suppressed, some are not"
        assert torch.equal(found.valid, wanted.valid)
        assert torch.equal(found.scores, wanted.scores)
        assert max(differences(found, wanted, 64).values()) < 1e-5
    detector = OnnxDetector(tmp_path / "a.onnx", metadata(tmp_path / "a.onnx"), Pixels().classes, "cpu")
    small = images(2, 8, 16)
    padded = torch.nn.functional.pad(small, (0, 0, 0, 8))
    assert torch.equal(detector(small).scores, detector(padded, None, torch.tensor([[8, 16]] * 2)).scores)
    with pytest.raises(DataError, match="up to 4096x4096, got one with a side of 4104; make them smaller"):
        detector(images(1, 8, 4104))


def test_a_model_of_one_size_says_so_in_one_line(tmp_path, capfd):
    told = "Sized cannot be exported for images of any size: torch cannot .* graph of it .*; leave out --dynamic-size"
    with pytest.raises(UserError, match=told):
        list(write(model(Sized()), tmp_path / "a.pt2", "torch-export", size="64x64", dynamic=True))
    assert "Traceback" not in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_torch_export_file_says_what_it_is_and_finds_the_same(tmp_path):
    network = model(Pixels())
    lines = list(write(network, tmp_path / "a.pt2", "torch-export", size="60x64"))
    assert lines[0].endswith("any number of images of 64x64"), "rounded up to a multiple of 8"
    assert lines[1].startswith("checked with torch.export: ")
    assert "in 4 made-up images" in lines[1]
    extra = {"detkernel.json": ""}
    module = torch.export.load(tmp_path / "a.pt2", extra_files=extra).module()
    held = json.loads(extra["detkernel.json"])
    assert (held["classes"], held["outputs"]) == (["dark", "bright"], ["boxes", "scores", "labels", "valid"])
    assert set(held["config"]) == {"run", "data"}, "what has a part in a test"
    run = SimpleNamespace(mode="predict", metrics={})
    Exported(file=tmp_path / "a.pt2").setup(run)
    assert (run.known_classes, run.metrics) == (("dark", "bright"), {"score_threshold": 0.25})
    batch = images(3)
    sizes = torch.tensor([[64, 64]] * 3)
    found = Predictions(*module(batch, sizes))
    assert torch.equal(found.scores, network.module(batch, None, sizes).scores)


def test_what_is_no_graph_is_told_and_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match="Asks cannot be exported: torch cannot make one graph of it"):
        list(write(model(Asks()), tmp_path / "a.pt2", "torch-export", size="64x64"))
    with pytest.raises(UserError, match="is not a detector of detkernel's"):
        list(write(model(SimpleNamespace(classes=("a",))), tmp_path / "a.pt2", "torch-export"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_a_model_that_says_why_it_is_no_graph_is_refused_in_a_line(form, tmp_path):
    with pytest.raises(UserError) as refused:
        list(write(model(Refuses()), tmp_path / "a.onnx", form))
    assert str(refused.value).startswith("x.pt: pixels cannot be exported: its shapes depend on the image; native")
    assert not list(tmp_path.iterdir())


def test_what_onnx_has_no_operation_for_is_told_in_a_line(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(UserError) as refused:
        list(write(model(Bends()), tmp_path / "a.onnx", "onnx", size="64x64"))
    assert "bessel_j0" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif("DETKERNEL_LONG" not in os.environ, reason="takes long: in `tox -e torture`")
def test_limits_of_clamps_are_not_lost(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    lines = list(write(model(Clamps()), tmp_path / "a.onnx", "onnx", size="64x64"))
    assert lines[1].startswith("checked with ONNX Runtime: ")


def test_names_of_outputs_go_by_what_there_is():
    found = Predictions(*[torch.zeros(1, 1)] * 4, None, torch.zeros(1, 1))
    assert graph.outputs_of(found) == ["boxes", "scores", "labels", "valid", "keypoints"]
