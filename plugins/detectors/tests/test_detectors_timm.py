"""timm's models as backbones, where timm is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from detkernel import ConfigError, UserError
from detkernel_detectors.backbones import Timm


@pytest.fixture
def timm() -> ModuleType:
    """The package; the test is skipped without."""
    found: ModuleType = pytest.importorskip("timm")
    return found


def test_without_timm_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"^the backbone `timm` needs timm: pip install 'detkernel-detectors\[timm\]'$"):
        Timm(name="resnet18").build()


@pytest.mark.parametrize(
    ("name", "strides", "channels"),
    [("resnet18", [8, 16], [128, 256]), ("convnext_atto", [4, 32], [40, 320]), ("resnet18", [2, 32], [64, 512])],
)
def test_maps_are_chosen_by_their_strides(name: str, strides: list[int], channels: list[int], timm: ModuleType):
    model: Any = Timm(name=name, strides=strides).build()
    found = model(torch.randn(1, 3, 64, 96))
    assert (model.strides, model.channels) == (strides, channels)
    expected = [(1, depth, 64 // stride, 96 // stride) for depth, stride in zip(channels, strides, strict=True)]
    assert [tuple(one.shape) for one in found.values()] == expected
    sum(one.mean() for one in found.values()).backward()
    assert all(one.grad is not None for one in model.parameters())


def test_maps_with_their_channels_last_are_turned(timm: ModuleType):
    args = {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    model: Any = Timm(name="swin_tiny_patch4_window7_224", args=args).build()
    assert [tuple(one.shape[1:]) for one in model(torch.randn(1, 3, 64, 64)).values()] == [
        (16, 8, 8),
        (32, 4, 4),
        (64, 2, 2),
    ]


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_a_file_of_the_whole_model_is_read(name: str, tmp_path: Path, timm: ModuleType):
    whole = timm.create_model(name, num_classes=3)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    model: Any = Timm(name=name, weights=str(tmp_path / "whole.pth")).build()
    theirs = {key.replace(".", "_"): value for key, value in whole.state_dict().items()}
    own = model.body.state_dict()
    assert own
    for key, value in own.items():
        assert torch.equal(value, theirs[key.replace(".", "_")]), key


def test_what_is_frozen_is_not_trained(timm: ModuleType):
    model: Any = Timm(name="resnet18", frozen=["layer1", "conv1"]).build()
    still = {name.split(".")[0] for name, one in model.body.named_parameters() if not one.requires_grad}
    assert still == {"layer1", "conv1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet19"}, "name: timm has no model 'resnet19', did you mean"),
        ({"strides": [16, 64]}, r"strides: expected some of those of resnet18, \[2, 4, 8, 16, 32\], fine to coarse"),
        ({"strides": [16, 8]}, r"strides: expected some of those of resnet18"),
        ({"strides": []}, r"strides: expected some of those of resnet18"),
        ({"weights": "none.pth"}, "weights: expected 'pretrained' or a file; there is no file 'none.pth'"),
        ({"frozen": ["layer9"]}, "frozen: no parameter of resnet18 begins with 'layer9'"),
        ({"args": {"colour": 1}}, "name: resnet18 cannot be made: .*colour"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], message: str, timm: ModuleType):
    given: dict[str, Any] = {"name": "resnet18", **options}
    with pytest.raises(ConfigError, match=message):
        Timm(**given).build()


def test_weights_that_cannot_be_downloaded_are_told(timm: ModuleType, monkeypatch: pytest.MonkeyPatch):
    create = timm.create_model

    def refuse(*names: Any, pretrained: bool, **arguments: Any) -> Any:
        if pretrained:
            raise OSError("no route")
        return create(*names, **arguments)

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(
        UserError, match=r"timm's weights of resnet18 cannot be had \(no route\); where there is no net"
    ):
        Timm(name="resnet18", weights="pretrained").build()
