"""What SSD is made of: VGG-16, anchors of each level, its neck and head, hard negatives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from detkernel import ConfigError, UserError
from detkernel_detection import Target, batching
from detkernel_detection.parts import Output
from detkernel_detection.weights import renamed
from detkernel_detectors.backbones import Resnet, Vgg
from detkernel_detectors.heads import LevelConvs, Towers
from detkernel_detectors.losses.sums import hardest
from detkernel_detectors.models.network import Network
from detkernel_detectors.models.retinanet import Retinanet
from detkernel_detectors.models.ssd import Ssd
from detkernel_detectors.necks import Fpn, SsdNeck
from detkernel_detectors.priors import Anchors, LevelAnchors, level_anchors
from torch import Tensor
from torch.nn import functional
from torchvision.models.vgg import make_layers

SSD512 = LevelAnchors(
    sides=[20.0, 51.0, 133.0, 215.0, 296.0, 378.0, 460.0, 542.0],
    ratios=[[2.0], [2.0, 3.0], [2.0, 3.0], [2.0, 3.0], [2.0, 3.0], [2.0], [2.0]],
    steps=[8, 16, 32, 64, 128, 256, 512],
)
TINY: Any = {
    "backbone": Resnet(depth=18, channels=4, stages=3, norm="group"),
    "neck": SsdNeck(extra=[8], extra_strides=[2], extra_paddings=[1]),
    "anchors": LevelAnchors(sides=[12.0, 24.0, 48.0, 60.0], ratios=[[2.0], [2.0, 3.0], []], steps=[8, 16, 32]),
}


def maps_of(*sides: int) -> list[Tensor]:
    return [torch.zeros(1, 1, side, side) for side in sides]


@pytest.mark.parametrize(
    ("name", "options", "sides"),
    [("ssd300", LevelAnchors(), (38, 19, 10, 5, 3, 1)), ("ssd512", SSD512, (64, 32, 16, 8, 4, 2, 1))],
)
def test_anchors_of_each_level(name: str, options: LevelAnchors, sides: tuple[int, ...], parts: dict[str, Tensor]):
    size = options.steps[-1]
    found = level_anchors(options, maps_of(*sides), torch.full((1, 2), float(size)), (size, size))
    start = 0
    for level, (side, count) in enumerate(zip(sides, options.counts, strict=True)):
        boxes = found.boxes[start : start + found.counts[level]].view(side, side, count, 4)
        torch.testing.assert_close(boxes[0, 0], parts[f"anchors.{name}.base.{level}"])
        step = torch.tensor([options.steps[level], 0.0] * 2)
        torch.testing.assert_close(boxes[-1, -1], boxes[0, 0] + (step + step.roll(1)) * (side - 1))
        start += found.counts[level]
    assert found.valid.all()
    assert len(found.boxes) == (8732 if size == 300 else 24564)  # the paper's counts


def test_vgg_is_torchvisions_up_to_conv5_and_takes_its_weights(tmp_path: Path):
    """Of its names, with the same maps; behind it conv6 and conv7, which stay at random."""
    plan = [2, 2, "M", 4, 4, "M", 8, 8, 8, "M", 16, 16, 16, "M", 16, 16, 16]
    theirs, images = make_layers(plan), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    weights = {f"features.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({**weights, "classifier.0.weight": torch.ones(3)}, tmp_path / "vgg.pth")
    torch.manual_seed(0)
    ours: Any = Vgg(channels=2, weights=str(tmp_path / "vgg.pth")).build()
    assert ours.channels == [16, 32]
    assert set(ours.state_dict()) - weights.keys() == {
        f"features.{number}.{name}" for number in (31, 33) for name in ("weight", "bias")
    }
    with torch.no_grad():
        found = ours(images)
        fine = theirs[:23](images)
        x = functional.max_pool2d(theirs[23:](fine), 3, 1, 1)
        conv6, conv7 = ours.features[31], ours.features[33]
        x = functional.relu(functional.conv2d(x, conv6.weight, conv6.bias, padding=6, dilation=6))
        x = functional.relu(functional.conv2d(x, conv7.weight, conv7.bias))
        torch.testing.assert_close(found["0"], fine)
        torch.testing.assert_close(found["1"], x)
        assert [one.shape[-1] for one in ours(torch.zeros(1, 3, 60, 60)).values()] == [8, 4]  # 60 -> 30, 15, 8, 4


@pytest.mark.parametrize(("trained", "frozen"), [(5, []), (3, [0, 2, 5, 7]), (0, [0, 2, 5, 7, 10, 31, 33])])
def test_the_first_stages_of_vgg_may_be_frozen(trained: int, frozen: list[int]):
    module: Any = Vgg(channels=1, trainable_layers=trained).build()
    for number in (0, 2, 5, 7, 10, 31, 33):
        assert module.features[number].weight.requires_grad == (number not in frozen)


def test_mmdetections_names_are_those_of_a_whole_ssd300():
    """As its configs have it: 81 logits, four or six anchors at a place."""
    with torch.device("meta"):
        model = Network(Ssd(), [f"class {number}" for number in range(80)])
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {
        "neck.l2_norm.weight": "neck.l2_norm.weight",
        "neck.extra_layers.3.1.conv.weight": "neck.extra.3.reduce.weight",
        "neck.extra_layers.0.0.conv.bias": "neck.extra.0.narrow.bias",
        "bbox_head.cls_convs.5.0.weight": "head.cls.5.weight",
        "bbox_head.reg_convs.1.0.bias": "head.reg.1.bias",
        "backbone.features.33.weight": "backbone.features.33.weight",
    }
    assert renamed(theirs, model.key_maps["MMDetection"]) == {ours: ours for ours in theirs.values()}
    assert {name: own[name] for name in theirs.values()} == {
        "neck.l2_norm.weight": (512,),
        "neck.extra.3.reduce.weight": (256, 128, 3, 3),
        "neck.extra.0.narrow.bias": (256,),
        "head.cls.5.weight": (4 * 81, 256, 3, 3),
        "head.reg.1.bias": (6 * 4,),
        "backbone.features.33.weight": (1024, 1024, 1, 1),
    }


def test_the_neck_of_ssd512_ends_in_one_pixel():
    options = SsdNeck(extra=[8, 4, 4, 4, 4], extra_strides=[2, 2, 2, 2, 1], extra_paddings=[1] * 5, last_size=4)
    neck: Any = options.build([2, 4], [8, 16])
    found = neck([torch.rand(1, 2, 64, 64), torch.rand(1, 4, 32, 32)])
    assert [one.shape[-1] for one in found] == [64, 32, 16, 8, 4, 2, 1]
    assert neck.channels == [2, 4, 8, 4, 4, 4, 4]
    torch.testing.assert_close(found[0].norm(dim=1), torch.full((1, 64, 64), 20.0))


def test_the_first_map_is_normalised_where_asked_for():
    maps = [torch.rand(1, 2, 6, 6), torch.rand(1, 4, 3, 3)]
    maps[0][..., 0, 0] = 0  # a pixel without features has a gradient, too
    maps[0].requires_grad_()
    few: Any = {"extra": [], "extra_strides": [], "extra_paddings": []}
    found = SsdNeck(**few, scale=3.0).build([2, 4], [8, 16])(maps)
    found[0].sum().backward()
    assert maps[0].grad is not None
    assert maps[0].grad.isfinite().all()
    torch.testing.assert_close(found[0].norm(dim=1)[0, 1], torch.full((6,), 3.0))
    assert SsdNeck(**few, scale=None).build([2, 4], [8, 16])(maps)[0] is maps[0]


def test_the_hardest_of_each_image():
    losses = torch.tensor([[5.0, 1, 4, 3, 2], [1.0, 2, 3, 4, 5]])
    among = torch.tensor([[False, True, True, True, True], [True, False, False, False, True]])
    assert hardest(losses, among, torch.tensor([2, 3])).tolist() == [
        [False, False, True, True, False],
        [True, False, False, False, True],
    ]
    assert not hardest(losses, among, torch.tensor([0, 0])).any()


def losses_of(**options: Any) -> dict[str, float]:
    torch.manual_seed(0)
    model = Network(Ssd(**{**TINY, **options}), ["a", "b"]).train()
    images = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = batching.make_batch(images, [Target(torch.tensor([[8.0, 8, 32, 32]]), torch.tensor([1]))], sizes=[(64, 64)])
    return {name: loss.item() for name, loss in model(batch.images, batch.targets, batch.image_sizes).items()}


def test_more_negatives_add_to_the_loss_of_classes_alone():
    none, few, usual, every = (losses_of(negatives=count) for count in (0.0, 1.0, 3.0, 1e3))
    assert none["loss_cls"] < few["loss_cls"] < usual["loss_cls"] < every["loss_cls"]
    assert none["loss_bbox"] == every["loss_bbox"]


def test_a_smaller_convolution_of_the_head():
    head: Any = LevelConvs(size=1).build([2, 3], 2, [Output("cls", 5, "cls", bias=1.5, priors=(4, 6))])
    assert [one.weight.shape for one in head.cls] == [(20, 2, 1, 1), (30, 3, 1, 1)]
    assert {value for one in head.cls for value in one.bias.tolist()} == {1.5}
    same: Any = LevelConvs().build(2, 2, [Output("cls", 5, "cls")])
    assert [one.weight.shape for one in same.cls] == [(5, 2, 3, 3)] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Ssd(**{**TINY, "head": Towers(), "neck": Fpn(channels=8, extra=1)}),
            "head: Towers predicts the same number of boxes at a place of each level",
        ),
        (
            lambda: Ssd(**{**TINY, "head": Towers()}),
            "neck: it gives maps of 8, 16, 8 channels, and the head Towers takes maps of equal channels",
        ),
        (lambda: Ssd(**{**TINY, "anchors": LevelAnchors()}), "expected steps for the 3 levels of the neck, got 6"),
        (
            lambda: Retinanet(**{**TINY, "anchors": Anchors()}),
            "it gives maps of 8, 16, 8 channels, and the head Towers",
        ),
    ],
)
def test_parts_that_do_not_fit_are_one_line(make: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        Network(make(), ["a"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LevelAnchors(steps=[]), "steps: expected at least one"),
        (lambda: LevelAnchors(steps=[8]), "ratios: expected 1 for the 1 steps, got 6"),
        (lambda: LevelAnchors(sides=[8.0]), "sides: expected 7 for the 6 steps, got 1"),
        (lambda: SsdNeck(extra=[8]), "extra_strides: expected one for each of the 1 further levels"),
    ],
)
def test_lists_of_the_wrong_length_are_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_images_of_another_size_are_refused():
    """Anchors would lie in a part of them, or the maps be too small for a convolution."""
    with pytest.raises(ConfigError, match=r"level 1 of images of 64x64 pixels has 4x4 places, which a step of 40"):
        losses_of(anchors=attrs.evolve(TINY["anchors"], steps=[8, 40, 32]))
    deep = SsdNeck(extra=[8, 8, 8], extra_strides=[2, 2, 2], extra_paddings=[0, 0, 0])
    with pytest.raises(UserError, match=r"the images are too small: .* a convolution of 3x3 on a map of 1x1"):
        losses_of(neck=deep, anchors=LevelAnchors(sides=[9.0] * 6, ratios=[[2.0]] * 5, steps=[8, 16, 32, 64, 64]))
