"""RegNet, Res2Net and HRNet: their maps and weights are those of MMDetection, torchvision and their authors."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from detkernel import CheckpointError, ConfigError
from detkernel_detection import Target, batching
from detkernel_detection.weights import renamed
from detkernel_detectors.backbones import Hrnet, Regnet, Res2net, hrnet, regnet
from detkernel_detectors.backbones.norms import FrozenBatchNorm2d, norm
from detkernel_detectors.backbones.regnet import DESIGNS, PUBLISHED, RegNet, stages
from detkernel_detectors.backbones.res2net import Res2Net
from detkernel_detectors.heads import Towers
from detkernel_detectors.models.dense import MMDETECTION
from detkernel_detectors.models.fcos import Fcos
from detkernel_detectors.models.network import Network
from detkernel_detectors.necks import Hrfpn
from torch import nn

SMALL: dict[str, Any] = {
    "regnet": Regnet(size="x_400mf"),
    "res2net": Res2net(depth=50, scales=3, width=4),
    "hrnet": Hrnet(width=4),
}


def count(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block a stage and branch, in all of them."""
    monkeypatch.setattr("detkernel_detectors.backbones.res2net.BLOCKS", {50: (1, 1, 1, 1)})
    monkeypatch.setattr(hrnet, "MODULES", {2: 1, 3: 1, 4: 1})
    monkeypatch.setattr(hrnet, "BLOCKS", 1)
    whole = regnet.stages
    monkeypatch.setattr(regnet, "stages", lambda design: [one._replace(blocks=1) for one in whole(design)])


# maps


REFERENCE = {
    "res2net": [(0.097808, 0.074614), (0.137611, 0.093664), (0.173355, 0.127993), (0.191698, 0.196594)],
    "hrnet": [(0.845665, 0.724596), (0.888449, 0.824944), (0.519738, 0.476904), (0.506944, 0.39061)],
    "regnet": [(0.031679, 0.03602), (0.06049, 0.063423), (0.247485, 0.244753), (0.582114, 0.657215)],
}
"""Mean and deviation of each map that MMDetection 3.3.0 gives, with the weights of `filled` and the image below."""


def filled(model: Any) -> Any:
    """The model with weights that follow from their names alone."""
    for place, (name, value) in enumerate(sorted(model.state_dict().items())):
        if value.is_floating_point():
            wave = torch.sin(torch.arange(value.numel()) * 0.7 + place).view(value.shape)
            if value.ndim == 4:
                value.copy_(wave * 0.7 / math.sqrt(value[0].numel()))
            elif name.endswith("running_var"):
                value.copy_(9 + wave)
            else:
                value.copy_(1 + wave / 2 if name.endswith("weight") else wave / 10)
    return model.eval()


@pytest.mark.parametrize("name", SMALL)
def test_maps_are_mmdetections(name: str):
    model = filled(SMALL[name].build())
    image = torch.sin(torch.arange(3 * 64 * 96) * 0.3).view(1, 3, 64, 96)
    with torch.no_grad():
        maps = list(model(image).values())
    assert [tuple(one.shape[1:]) for one in maps] == [
        (channels, 64 // stride, 96 // stride) for channels, stride in zip(model.channels, model.strides, strict=True)
    ]
    assert model.strides == [4, 8, 16, 32]
    for found, (mean, deviation) in zip(maps, REFERENCE[name], strict=True):
        assert (found.mean().item(), found.std().item()) == pytest.approx((mean, deviation), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_maps_of_any_size_compile_as_one_graph_and_reach_every_weight(name: str, shallow: None):
    model = SMALL[name].build()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1.0)  # the last of a block begins at 0
    whole = torch.compile(model, backend="eager", fullgraph=True)
    maps = list(whole(torch.randn(2, 3, 70, 90)).values())
    assert [tuple(one.shape[-2:]) for one in maps] == [(18, 23), (9, 12), (5, 6), (3, 3)]
    sum(one.sum() for one in maps).backward()
    assert [key for key, one in model.named_parameters() if one.grad is None] == []


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_regnet_has_as_many_parameters_as_torchvision_publishes(size: Any):
    meta = torchvision.models.get_model_weights(PUBLISHED[size]).DEFAULT.meta
    with torch.device("meta"):
        model = RegNet(size, "batch")
    assert count(model) + 1000 * (model.channels[-1] + 1) == meta["num_params"]


MMDETECTIONS = {
    "x_400mf": [32, 64, 160, 384],
    "x_800mf": [64, 128, 288, 672],
    "x_1.6gf": [72, 168, 408, 912],
    "x_3.2gf": [96, 192, 432, 1008],
    "x_4.0gf": [80, 240, 560, 1360],
    "x_6.4gf": [168, 392, 784, 1624],
    "x_8.0gf": [80, 240, 720, 1920],
    "x_12gf": [224, 448, 896, 2240],
}
"""The channels that MMDetection's configs give the necks of these."""


def test_stages_of_regnets_are_as_wide_as_in_mmdetections_configs():
    assert {size: [stage.width for stage in stages(DESIGNS[size])] for size in MMDETECTIONS} == MMDETECTIONS


@pytest.mark.parametrize(
    ("options", "published"),
    [
        ({"depth": 101}, 45.23),
        ({"depth": 50, "variant": "original"}, 25.70),
    ],
)
def test_a_res2net_has_as_many_parameters_as_its_authors_publish(options: Any, published: float):
    """In millions, with their classifier of 1000 classes."""
    with torch.device("meta"):
        model = Res2Net(Res2net(**options), "batch")
    assert round((count(model) + 2049 * 1000) / 1e6, 2) == published


@pytest.mark.parametrize(("width", "published"), [(18, 21.3), (40, 57.6)])
def test_an_hrnet_has_as_many_parameters_as_its_authors_publish(width: int, published: float):
    """In millions, with the classifier behind it: a bottleneck for each map, 3x3 convolutions from map to map, and
    layers of 2048 and of 1000."""
    with torch.device("meta"):
        model = hrnet.HrNet(width, "batch")
        heads = [hrnet.Bottleneck(one, planes, "batch") for one, planes in zip(model.channels, HEADS, strict=True)]
    down = sum(9 * 16 * one * other + 3 * 4 * other for one, other in itertools.pairwise(HEADS))
    last = 1024 * 2048 + 3 * 2048 + 2049 * 1000
    assert round((count(model) + sum(map(count, heads)) + down + last) / 1e6, 1) == published


HEADS = (32, 64, 128, 256)


# what options change


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("trained", [0, 3, 5])
def test_as_many_stages_as_asked_for_are_trained(name: str, trained: int, shallow: None):
    model = type(SMALL[name])(**{**_options(SMALL[name]), "trainable_layers": trained}).build()
    sections = [[name for name, _ in model.named_parameters() if name.startswith(tuple(one))] for one in model.sections]
    assert sum(map(len, sections)) == len(list(model.parameters()))
    held = dict(model.named_parameters())
    assert [{held[key].requires_grad for key in one} for one in sections] == [
        {number >= 5 - trained} for number in range(5)
    ]
    before = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("running_mean")}
    model.train()(torch.randn(2, 3, 64, 64))
    moved = {key for key, value in model.state_dict().items() if key in before and not torch.equal(value, before[key])}
    assert {model.sections.index(_section(model, key)) for key in moved} == set(range(5 - trained, 5))


def _section(model: Any, name: str) -> Any:
    return next(one for one in model.sections if name.split(".")[0] in one)


def _options(part: Any) -> dict[str, Any]:
    fields = ("size", "depth", "scales", "width")
    return {name: getattr(part, name) for name in fields if hasattr(part, name)}


@pytest.mark.parametrize("name", SMALL)
def test_norms_are_those_asked_for(name: str, shallow: None):
    def norms(**options: Any) -> list[nn.Module]:
        model = type(SMALL[name])(**{**_options(SMALL[name]), **options}).build()
        return [one for one in model.modules() if isinstance(one, (nn.BatchNorm2d, nn.GroupNorm))]

    assert {type(one) for one in norms()} == {nn.BatchNorm2d}
    assert {type(one) for one in norms(norm="group")} == {nn.GroupNorm}
    still = norms(norm="frozen")
    assert {type(one) for one in still} == {FrozenBatchNorm2d}
    assert not any(one.weight.requires_grad for one in still)
    assert all(one.weight.requires_grad for one in norms(norm="eval"))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_frozen_norm_gives_what_batch_norm_gives_and_keeps_no_input(layout: torch.memory_format):
    torch.manual_seed(0)
    frozen, batch = norm("frozen", 48), nn.BatchNorm2d(48).eval()
    held = {
        name: torch.rand_like(value) + 0.1 for name, value in batch.state_dict().items() if value.is_floating_point()
    }
    frozen.load_state_dict(held, strict=False)
    batch.load_state_dict(held, strict=False)
    x = torch.randn(2, 48, 9, 11).to(memory_format=layout).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        found = frozen(x)
    assert found.is_contiguous(memory_format=layout)
    assert not any(value.numel() >= x.numel() for value in kept)
    torch.testing.assert_close(found, batch(x), rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(y.sin().sum(), x)[0] for y in (found, batch(x)))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    frozen.requires_grad_(True)
    given = torch.autograd.grad(frozen(x).sum(), [frozen.weight, frozen.bias])  # thawed, it learns
    assert all(one.abs().sum() > 0 for one in given)


def test_the_last_part_of_a_res2net_is_smoothed_where_asked_for(shallow: None):
    image = torch.randn(1, 3, 32, 32)
    maps = []
    for smooth in (False, True):
        torch.manual_seed(0)
        model = Res2net(depth=50, scales=3, width=4, smooth_first=smooth).build()
        nn.init.ones_(model.layer1[0].bn3.weight)
        maps.append(model.eval()(image)["0"])
    assert not torch.equal(*maps)
    assert isinstance(model.layer1[0].pool, nn.AvgPool2d)


@pytest.mark.parametrize(("pool", "stride"), [("mean", 1), ("max", 1), ("mean", 2)])
def test_the_neck_of_an_hrnet_pools_what_it_has_joined(pool: Any, stride: int):
    """Of constant maps, whose enlargement is plain."""
    neck: Any = Hrfpn(channels=2, levels=3, stride=stride, pool=pool).build([1, 1], [4, 8])
    nn.init.constant_(neck.reduction.weight, 1.0)
    for output in neck.outputs:
        nn.init.zeros_(output.weight)
        output.weight.data[:, 0, 1, 1] = 1.0
    fine = torch.arange(64.0).view(1, 1, 8, 8)
    found = neck([fine, torch.full((1, 1, 4, 4), 100.0)])
    assert neck.strides == [4 * stride, 8 * stride, 16 * stride]
    assert [one.shape[-1] for one in found] == [8 // stride, 4 // stride, 2 // stride]
    expected = fine[0, 0, :2, :2].mean() if pool == "mean" else fine[0, 0, :2, :2].max()
    assert found[1][0, 0, 0, 0].item() == 100 + expected.item()
    assert found[0][0, 1, 0, 1].item() == 100 + fine[0, 0, 0, stride].item()


# weights


@pytest.mark.parametrize("size", ["x_400mf_torchvision", "y_400mf"])
def test_torchvisions_weights_give_its_maps(size: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    theirs: Any = filled(getattr(torchvision.models, PUBLISHED[size])())
    url = torchvision.models.get_model_weights(PUBLISHED[size])["IMAGENET1K_V1"].url
    (tmp_path / "checkpoints").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "checkpoints" / url.rsplit("/", 1)[-1])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    model: Any = Regnet(size=size, weights="IMAGENET1K_V1").build().eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = theirs.stem(image)
        for found, stage in zip(model(image).values(), theirs.trunk_output, strict=True):
            x = stage(x)
            assert torch.equal(found, x)
    assert model.frozen == ("conv1", "bn1", "layer1"), "as for every backbone with weights"
    assert isinstance(model.bn1, FrozenBatchNorm2d)


def test_weights_of_its_authors_load_into_a_res2net(shallow: None, tmp_path: Path):
    """Their stem is conv1.0 to conv1.6 and bn1; what classifies is left out."""
    source = Res2net(depth=50).build()
    turned = [(r"stem\.7\.", "bn1."), (r"stem\.(\d)\.", r"conv1.\1.")]
    theirs = {**renamed(filled(source).state_dict(), turned), "fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3)}
    assert "conv1.0.weight" in theirs
    assert "bn1.weight" in theirs
    torch.save(theirs, tmp_path / "theirs.pth")
    model: Any = Res2net(depth=50, weights=str(tmp_path / "theirs.pth")).build()
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())


def test_weights_of_its_authors_load_into_an_hrnet(shallow: None, tmp_path: Path):
    source = Hrnet(width=4).build()
    heads = {"incre_modules.0.0.conv1.weight": torch.zeros(1), "final_layer.0.bias": torch.zeros(1)}
    torch.save({"state_dict": {**filled(source).state_dict(), **heads}}, tmp_path / "theirs.pth")
    model: Any = Hrnet(width=4, weights=str(tmp_path / "theirs.pth")).build()
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    assert all(one.requires_grad for one in model.parameters())


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        (Regnet(size="x_3.2gf", weights="IMAGENET"), ConfigError, "weights: no weights are named 'IMAGENET'.*did you"),
        (Regnet(size="x_4.0gf", weights="DEFAULT"), ConfigError, "weights: there is no file 'DEFAULT'"),
        (Hrnet(weights="none.pth"), ConfigError, "weights: there is no file 'none.pth'"),
    ],
)
def test_weights_that_are_not_there_are_told(part: Any, error: type[Exception], message: str, shallow: None):
    with pytest.raises(error, match=message):
        part.build()


def test_weights_of_another_width_are_told(shallow: None, tmp_path: Path):
    torch.save(Hrnet(width=4).build().state_dict(), tmp_path / "four.pth")
    with pytest.raises(CheckpointError, match=r"four\.pth: 83 of the model's 318 tensors fit"):
        Hrnet(width=8, weights=str(tmp_path / "four.pth")).build()


# in a detector


def test_a_detector_learns_on_an_hrnet_and_its_neck_with_mmdetections_names(shallow: None):
    family = Fcos(backbone=Hrnet(width=4), neck=Hrfpn(channels=8, stride=2), head=Towers(convs=1, channels=8, groups=4))
    model = Network(family, ["a"])
    assert model.strides == (8, 16, 32, 64, 128)
    images = torch.randint(0, 255, (1, 3, 128, 128), dtype=torch.uint8)
    target = Target(torch.tensor([[10.0, 10, 70, 90]]), torch.tensor([0]))
    losses = model.train()(images, batching.make_batch(images, [target]).targets)
    sum(losses.values()).backward()
    assert all(one.grad is not None for one in model.parameters())
    theirs = {f"neck.{name}.conv.weight" for name in ("reduction_conv", *(f"fpn_convs.{n}" for n in range(5)))}
    own = {name for name in model.state_dict() if name.startswith("neck.") and name.endswith("weight")}
    assert set(renamed(dict.fromkeys(theirs), MMDETECTION)) == own
