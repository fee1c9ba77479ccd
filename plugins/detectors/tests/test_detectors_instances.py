"""RTMDet's instance masks: networks of each object, their loss, and the options, by their effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel_detection import Target, batching
from detkernel_detection.parts import Output, Predicted, Priors
from detkernel_detection.predictions import to_detections
from detkernel_detection.structures import Targets
from detkernel_detection.weights import load_into, read_weights
from detkernel_detectors.assigners.dynamic import DynamicSoftLabel
from detkernel_detectors.backbones import Cspnext
from detkernel_detectors.heads import LevelTowers
from detkernel_detectors.heads.mask_kernels import PARAMETERS, dice, read_masks
from detkernel_detectors.models.network import Network
from detkernel_detectors.models.rtmdet_ins import RtmdetIns
from detkernel_detectors.necks import CspPafpn
from torch import Tensor, nn


def made(depth: float = 0.1, width: float = 0.125, blocks: int = 1, channels: int = 8, **options: Any) -> Any:
    plugin = RtmdetIns(
        backbone=Cspnext(depth=depth, width=width),
        neck=CspPafpn(channels=channels, blocks=blocks),
        head=LevelTowers(channels=channels),
        **{"mask_channels": channels, **options},
    )
    return Network(plugin, [str(number) for number in range(80)])


@pytest.mark.parametrize(
    ("width", "depth", "blocks", "millions"), [(0.375, 0.167, 1, 5.64), (0.5, 0.33, 1, 10.18), (1.0, 1.0, 3, 57.37)]
)
def test_it_has_as_many_parameters_as_published(width: float, depth: float, blocks: int, millions: float):
    with torch.device("meta"):
        model = made(depth, width, blocks, int(256 * width))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_an_objects_network_is_three_convolutions():
    """On the way to its point, in 8 of its strides, and the features: one object after the other."""
    torch.manual_seed(0)
    features, parameters = torch.randn(2, 8, 5, 6), torch.randn(2, 3, PARAMETERS)
    points, strides = torch.rand(2, 3, 2) * 40, torch.tensor([8.0, 16, 32]).expand(2, -1)
    found = read_masks(features, parameters, points, strides, 8)
    y, x = torch.arange(5) * 8.0, torch.arange(6) * 8.0
    grid = torch.stack([x.expand(5, 6), y[:, None].expand(5, 6)])
    for image in range(2):
        for number in range(3):
            way = (points[image, number][:, None, None] - grid) / (8 * strides[image, number])
            value = torch.cat([way, features[image]])[None]
            w1, w2, w3, b1, b2, b3 = parameters[image, number].split([80, 64, 8, 8, 8, 1])
            value = nn.functional.conv2d(value, w1.view(8, 10, 1, 1), b1).relu()
            value = nn.functional.conv2d(value, w2.view(8, 8, 1, 1), b2).relu()
            value = nn.functional.conv2d(value, w3.view(1, 8, 1, 1), b3)
            torch.testing.assert_close(found[image, number], value[0, 0], rtol=1e-3, atol=1e-3)


def test_dice():
    masks = torch.tensor([[[1.0, 1], [0, 0]], [[0, 0], [0, 0]]])
    assert dice(masks, masks).tolist() == pytest.approx([0, 1], abs=1e-4)
    assert dice(1 - masks, masks)[0].item() == pytest.approx(1)
    halves = torch.full((2, 2), 0.5)
    assert dice(halves, masks[0]).item() == pytest.approx(1 - 2 * 1 / (4 / 4 + 2), abs=1e-4)


@pytest.mark.parametrize(("centre", "expected"), [("box", 1), ("mask", 0)])
def test_the_centre_of_an_object_is_that_of_its_box_or_of_its_mask(centre: Any, expected: int):
    """An object of 64 pixels whose mask lies in the left upper corner: of two points, which is its own."""
    masks = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    masks[..., 4:13, 4:13] = 1
    targets = Targets(
        torch.tensor([[[0.0, 0, 64, 64]]]),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.ones(1, 1, dtype=torch.bool),
        masks,
    )
    points = torch.tensor([[8.0, 8.0], [32.0, 32.0]]).repeat(1, 2)
    priors = Priors(points, torch.full((2,), 8.0), torch.ones(1, 2, dtype=torch.bool), (2,))
    predicted = Predicted(torch.full((1, 2, 1), 0.5), torch.tensor([[[0.0, 0, 64, 16]] * 2]).view(1, 2, 4))
    matches = DynamicSoftLabel(centre=centre, radius=0.0).assign(priors, targets, predicted)
    assert matches.positive[0].tolist() == [number == expected for number in range(2)]


BOX = [16.0, 16, 48, 48]


def batch(scale: float = 1.0) -> Any:
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 16:48, 16:32] = 1
    target = Target(torch.tensor([BOX]), torch.tensor([1]), mask)
    return batching.make_batch(
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
        [target],
        sizes=[(64, 64)],
        original_sizes=[(round(64 / scale), round(64 / scale))],
        scales=[(scale, scale)],
    )


def constant(model: Any, last: float, **outputs: float) -> Any:
    """Outputs that are the same everywhere, and masks whose logits all are `last`."""
    for name, value in outputs.items():
        for conv in getattr(model.head, name):
            nn.init.zeros_(conv.weight)
            nn.init.constant_(conv.bias, value)
    for conv in model.head.kernels:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
        with torch.no_grad():
            conv.bias[-1] = last
    return model


def loss(**options: Any) -> float:
    given = batch()
    model = constant(made(**options).train(), 50.0, cls=0.0, reg=1.0)
    found: float = model(given.images, given.targets, given.image_sizes)["loss_mask"].item()
    return found


def test_the_loss_of_the_masks_is_dice_at_a_stride_of_4():
    """Every pixel is said to be the object's: 256 of them, of which 8 x 4 are."""
    expected = 2 * (1 - 2 * 32 / (256 + 32))
    assert loss() == pytest.approx(expected, rel=1e-4)
    assert loss(mask_weight=5.0) == pytest.approx(expected * 5 / 2, rel=1e-4)
    assert loss(masks=1) == pytest.approx(expected, rel=1e-4), "as many are counted as are drawn"


def test_no_more_masks_are_read_than_asked_for(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def read(features: Tensor, parameters: Tensor, *others: Any) -> Tensor:
        seen.append(parameters.shape[1])
        return read_masks(features, parameters, *others)

    monkeypatch.setattr("detkernel_detectors.heads.mask_kernels.read_masks", read)
    loss(masks=3)
    loss(masks=5)
    assert seen == [3, 5]


def test_masks_are_found_in_the_size_of_the_file():
    given = batch(scale=2.0)
    model = constant(made(max_detections=3).eval(), 50.0, cls=3.0, reg=1.0)
    with torch.no_grad():
        [found] = to_detections(model(given.images, None, given.image_sizes), given, model)
    assert len(found) == 3
    assert found.masks is not None
    assert found.masks.shape == (3, 32, 32)
    assert found.masks.all()
    nobody = constant(model, -50.0)
    with torch.no_grad():
        [found] = to_detections(nobody(given.images, None, given.image_sizes), given, nobody)
    assert found.masks is not None
    assert not found.masks.any()


def test_rectified_distances_begin_at_a_stride_and_are_never_negative():
    model = made()
    assert {bias for conv in model.head.reg for bias in conv.bias.tolist()} == {1.0}
    model = constant(model.eval(), 0.0, reg=-1.0)
    with torch.no_grad():
        maps = model.forward_outputs(torch.randn(1, 3, 64, 64))
    boxes = model.family.detected(maps, None).boxes[0]
    assert torch.equal(boxes[:, :2], boxes[:, 2:])


@pytest.mark.parametrize("convs", [0, 3])
def test_the_features_of_the_masks_are_made_as_asked_for(convs: int):
    model = made(mask_channels=12, mask_convs=convs)
    assert [conv.conv.out_channels for conv in model.mask_features.convs] == [12] * convs
    assert model.mask_features([torch.randn(1, 8, 9, 7), torch.randn(1, 8, 5, 4), torch.randn(1, 8, 3, 2)]).shape == (
        1,
        8,
        9,
        7,
    )


def test_kernels_have_convolutions_of_their_own_at_each_level():
    head: Any = LevelTowers(convs=2, channels=8).build(
        8, 3, [Output("cls", 3, "cls"), Output("reg", 4, "cls"), Output("kernels", 5, "kernel")]
    )
    assert head.branches == ("cls", "kernel")
    assert (len(head.cls_tower.convs), len(head.kernel_tower.convs)) == (1, 3)


def test_mmdetections_names_are_read(tmp_path: Path):
    """Its state dict has the tower of the classes twice: once as that of the boxes."""
    model = made()
    theirs: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "mask_features":
            kind = {"fusion": "fusion_conv", "convs": "stacked_convs", "projection": "projection"}[parts[1]]
            theirs[".".join(["bbox_head.mask_head", kind, *parts[2:]])] = value + 1
        elif parts[0] != "head":
            theirs[name] = value + 1
        elif parts[1] in ("cls", "reg", "kernels"):
            output = parts[1].replace("kernels", "kernel")
            theirs[".".join([f"bbox_head.rtm_{output}", *parts[2:]])] = value + 1
        else:
            branch, kind, level, number, leaf = parts[1].removesuffix("_tower"), *parts[2:]
            every = kind == "convs" and branch == "cls"
            for at in range(3) if every else [int(level)]:
                for other in ("cls", "reg") if branch == "cls" else ("kernel",):
                    layer = "conv" if kind == "convs" else "bn"
                    theirs[f"bbox_head.{other}_convs.{at}.{number}.{layer}.{leaf}"] = value + 1
    torch.save({"state_dict": theirs, "meta": {"dataset_meta": {"classes": model.classes}}}, tmp_path / "theirs.pth")
    expected = {name: value + 1 for name, value in model.state_dict().items()}
    load_into(model, read_weights(tmp_path / "theirs.pth"), model.classes)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
