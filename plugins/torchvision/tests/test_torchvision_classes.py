"""Weights of other classes, or of these in another order: every output goes where its class is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import CheckpointError, ConfigError, Run
from detkernel_detection.testing import TinyData, TinyDataset, tiny_kernel
from detkernel_torchvision.backbones import MobilenetV3, Resnet
from detkernel_torchvision.models import FasterRcnn, Fcos, KeypointRcnn, MaskRcnn, Retinanet, Ssd, Ssdlite
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

SMALL: Any = {"backbone": MobilenetV3(size="small"), "neck_channels": 32}
FEW: Any = {"rpn_post_nms_top_n_test": 4, "box_score_thresh": 0.0, "box_detections_per_img": 40}
MODELS: dict[str, Any] = {
    "fcos": lambda **more: Fcos(**SMALL, score_thresh=0.0, detections_per_img=500, **more),
    "retinanet": lambda **more: Retinanet(**SMALL, score_thresh=0.0, topk_candidates=9999, **more),
    "faster_rcnn": lambda **more: FasterRcnn(**SMALL, **FEW, **more),
    "mask_rcnn": lambda **more: MaskRcnn(**SMALL, **FEW, **more),
    "keypoint_rcnn": lambda **more: KeypointRcnn(**SMALL, **FEW, num_keypoints=3, **more),
    "ssd": lambda **more: Ssd(score_thresh=0.0, topk_candidates=30, **more),
    "ssdlite": lambda **more: Ssdlite(size=96, score_thresh=0.0, topk_candidates=30, **more),
}
OLD = ("cat", "dog", "cow")


def run_of(model: Any, names: tuple[str, ...], tmp_path: Path, keypoints: tuple[str, ...] = ()) -> Run:
    class Named(TinyDataset):
        def load(self) -> None:
            super().load()
            self.classes, self.keypoint_names = names, keypoints

    side = model._side() if hasattr(model, "_side") else 64
    data = TinyData(dataset=Named(size=2, side=side))
    run = tiny_kernel({"model": model, "data": data}, work_dir=tmp_path).state
    run.loaders["train"] = run.hook.build_loader(run=run, mode="train")
    run.model = run.hook.build_model(run=run)
    return run


def trained(name: str, tmp_path: Path) -> Run:
    """A model whose outputs differ from class to class, and its weights in a file."""
    run = run_of(MODELS[name](), OLD, tmp_path)
    torch.manual_seed(1)
    with torch.no_grad():
        for key in run.model.class_outputs:
            tensor = run.model.state_dict()[key]
            tensor.copy_(torch.randn_like(tensor) * (0.05 if "bbox" not in key else 0.01))
    torch.save({"model": run.model.state_dict(), "classes": list(OLD)}, tmp_path / "w.pt")
    return run


def detected(run: Run) -> list[dict[str, list[tuple[Any, ...]]]]:
    """Of each image: by class, what was detected, by falling score."""
    batch = next(iter(run.loaders["train"].batches(0)))
    run.model.eval()
    with torch.no_grad():
        found = run.hook.val_step(run=run, model=run.model, batch=batch)
    result = []
    for one in found:
        by_class: dict[str, list[tuple[Any, ...]]] = {name: [] for name in run.classes}
        for place in range(len(one)):
            masks = [] if one.masks is None else [int(one.masks[place].sum())]
            points = [] if one.keypoints is None else one.keypoints[place].flatten().tolist()
            row = (one.scores[place].item(), *one.boxes[place].tolist(), *masks, *points)
            by_class[run.classes[int(one.labels[place])]].append(row)
        result.append(by_class)
    return result


@pytest.mark.parametrize("name", [name for name in MODELS if name != "ssd"])  # its head is ssdlite's, on a large body
def test_a_model_of_these_classes_in_another_order_detects_the_same_under_the_same_names(name: str, tmp_path: Path):
    """Nothing is asked of how a head is laid out: only what it detects."""
    first = trained(name, tmp_path)
    other = run_of(MODELS[name](weights=str(tmp_path / "w.pt")), ("cow", "cat", "dog"), tmp_path)
    for expected, found in zip(detected(first), detected(other), strict=True):
        assert all(expected.values())
        for label, rows in expected.items():
            parts = slice(None) if "rcnn" in name else slice(1)  # boxes of dense heads do not follow from the class
            best, wanted = (torch.tensor(max(one)[parts]) for one in (found[label], rows))
            torch.testing.assert_close(best, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_classes_come_and_go_by_name(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Of 3 classes 2 are kept, in another order, and 2 are new."""
    wanted = trained(name, tmp_path).model.state_dict()
    names = ("fox", "cow", "elk", "cat")
    with caplog.at_level("INFO", "detkernel"):
        run = run_of(MODELS[name](weights=str(tmp_path / "w.pt")), names, tmp_path)
    found, outputs = run.model.state_dict(), run.model.class_outputs
    assert outputs
    for key, value in found.items():
        if key not in outputs:
            assert torch.equal(value, wanted[key]), key
            continue
        axis = {"dense": 1, "score": 0, "box": 0}[
            "dense" if key.startswith("head") else "box" if "bbox" in key else "score"
        ]
        background = int(not name.startswith(("fcos", "retinanet")))

        def by_class(tensor: torch.Tensor, count: int, axis: int = axis) -> torch.Tensor:
            return (tensor.view(-1, count, *tensor.shape[1:]) if axis else tensor.view(count, -1)).movedim(axis, 0)

        mine, theirs = by_class(value, 4 + background), by_class(wanted[key], 3 + background)
        for new, (label, source) in enumerate((("fox", None), ("cow", 2), ("elk", None), ("cat", 0))):
            here = mine[new + background]
            if source is None:
                assert not any(torch.equal(here, other) for other in theirs), label
            else:
                assert torch.equal(here, theirs[source + background]), label
        if background:
            assert torch.equal(mine[0], theirs[0])
    assert "2 taken by name (cow, cat); 2 at random" in caplog.text
    assert "1 of the weights left out (dog)" in caplog.text


def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: Any, state: dict[str, torch.Tensor]) -> None:
    """Put a file where torchvision keeps what it downloaded."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / weights.url.rsplit("/", 1)[-1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def test_published_weights_are_taken_by_name_though_the_count_is_equal(monkeypatch, tmp_path):
    """COCO_V1 has 91 rows, the first of the background and some of no class."""
    meant = FCOS_ResNet50_FPN_Weights.COCO_V1
    categories = meant.meta["categories"]
    names = tuple(sorted(set(categories) - {"N/A", "__background__"})) + tuple(f"new {n}" for n in range(11))
    assert len(names) == len(categories) == 91
    model = {"backbone": Resnet(depth=50), "head_convs": 4}
    state = run_of(Fcos(**model), names, tmp_path).model.state_dict()
    state["head.classification_head.cls_logits.bias"] = torch.arange(91.0)
    published(monkeypatch, tmp_path, meant, state)
    found = run_of(Fcos(**model, weights="COCO_V1"), names, tmp_path).model.head.classification_head.cls_logits.bias
    for number, name in enumerate(names[:80]):
        assert found[number] == categories.index(name), name
    assert found[80:].tolist() == [pytest.approx(-4.595, abs=1e-3)] * 11  # as focal loss starts


def test_a_file_without_names_is_refused_unless_it_is_said_whose_it_is(tmp_path):
    state = trained("fcos", tmp_path).model.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    plain = {"weights": str(tmp_path / "plain.pt")}
    with pytest.raises(CheckpointError, match=r"plain\.pt does not say .* \(3 by their shapes\).*weights_classes"):
        run_of(MODELS["fcos"](**plain), OLD, tmp_path)
    key = "head.classification_head.cls_logits.bias"
    for given, order in (("same_order", [0, 1, 2]), (["dog", "cow", "cat"], [2, 0, 1])):
        found = run_of(MODELS["fcos"](**plain, weights_classes=given), OLD, tmp_path).model.state_dict()
        assert torch.equal(found[key], state[key][order])
    found = run_of(MODELS["fcos"](**plain, weights_classes="none"), OLD, tmp_path).model.state_dict()
    assert torch.equal(found[key], torch.full((3,), found[key][0].item()))
    assert torch.equal(found["backbone.fpn.layer_blocks.0.0.bias"], state["backbone.fpn.layer_blocks.0.0.bias"])
    with pytest.raises(CheckpointError, match="said to be of 2 classes"):
        run_of(MODELS["fcos"](**plain, weights_classes=["cat", "dog"]), OLD, tmp_path)


@pytest.mark.parametrize("body", [Resnet(depth=18), MobilenetV3(size="small")])
def test_a_backbone_takes_its_part_of_a_detectors_checkpoint(body, tmp_path):
    run = run_of(Fcos(backbone=body, neck_channels=32), OLD, tmp_path)
    state = run.model.state_dict()
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "w.pt")
    again = type(body)(
        **({"depth": 18} if isinstance(body, Resnet) else {"size": "small"}), weights=str(tmp_path / "w.pt")
    )
    found = again.build().state_dict()
    assert all(torch.equal(value, state[f"backbone.body.{key}"]) for key, value in found.items())


def test_a_weight_that_is_missing_names_the_option(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file 'none\.pt'"):
        run_of(MODELS["fcos"](weights="none.pt"), OLD, tmp_path)


def test_the_heat_maps_of_keypoints_follow_their_names(tmp_path: Path):
    source = run_of(KeypointRcnn(**SMALL), OLD, tmp_path, ("nose", "left", "right"))
    content = {"model": source.model.state_dict(), "classes": list(OLD), "keypoints": list(source.model.keypoint_names)}
    torch.save(content, tmp_path / "w.pt")
    order = KeypointRcnn(**SMALL, weights=str(tmp_path / "w.pt"))
    found = run_of(order, OLD, tmp_path, ("right", "nose", "left")).model.state_dict()
    name = "roi_heads.keypoint_predictor.kps_score_lowres.weight"
    assert torch.equal(found[name], source.model.state_dict()[name][:, [2, 0, 1]])
