"""Backbones, their weights, and weights of whole detectors."""

from __future__ import annotations

import io
from urllib.error import URLError

import pytest
import torch
import torchvision
from detkernel import CheckpointError, ConfigError, UserError
from detkernel_detection import Backbone
from detkernel_detection.detector import Detector
from detkernel_detection.predictions import Predictions, to_detections
from detkernel_detection.testing import ModelContract, TinyData, TinyDataset, tiny_kernel
from detkernel_torchvision.backbones import MobilenetV3, Resnet, TorchvisionBackbone
from detkernel_torchvision.models import FasterRcnn, Fcos, Retinanet, Ssd, Ssdlite
from torch import nn


def maps(backbone: Backbone, height=64, width=96):
    module = backbone.build()
    found = list(module(torch.zeros(2, 3, height, width)).values())
    assert [tuple(one.shape[1:]) for one in found] == [
        (channels, -(-height // stride), -(-width // stride))
        for channels, stride in zip(module.channels, module.strides, strict=True)
    ]
    return module


@pytest.mark.parametrize(
    ("backbone", "strides"),
    [
        (Resnet(depth=18), [4, 8, 16, 32]),
        (Resnet(depth=18, stages=2, norm="group"), [4, 8]),
        (Resnet(depth=50, groups=32, width_per_group=4), [4, 8, 16, 32]),
        (MobilenetV3(size="small"), [4, 8, 16, 32]),
        (MobilenetV3(layers=[6, 12]), [8, 16]),
        (TorchvisionBackbone(name="shufflenet_v2_x0_5"), [4, 8, 16, 32]),
        (TorchvisionBackbone(name="regnet_y_400mf", nodes=["trunk_output.block2", "trunk_output.block3"]), [8, 16]),
    ],
    ids=["resnet18", "stages", "resnext", "mobilenet", "layers", "by_name", "nodes"],
)
def test_maps_have_the_channels_and_strides_that_they_say(backbone, strides):
    assert maps(backbone).strides == strides


def test_channels_last_models_are_turned():
    module = maps(TorchvisionBackbone(name="swin_t"), 64, 96)
    assert module.channels == [96, 192, 384, 768]
    assert module.strides == [4, 8, 16, 32]


@pytest.mark.parametrize(
    ("layers", "trained"),
    [(0, set()), (2, {"layer3", "layer4"}), (5, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"})],
)
def test_trainable_layers(layers, trained):
    module = Resnet(depth=18, trainable_layers=layers).build()
    assert {name.split(".")[0] for name, p in module.named_parameters() if p.requires_grad} == trained


def test_frozen_prefixes():
    module = TorchvisionBackbone(name="shufflenet_v2_x0_5", frozen=["conv1", "stage2"]).build()
    frozen = {name.split(".")[1] for name, p in module.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "stage2"}
    with pytest.raises(ConfigError, match="no parameter of shufflenet_v2_x0_5 begins with 'stem'"):
        TorchvisionBackbone(name="shufflenet_v2_x0_5", frozen=["stem"]).build()


def test_eval_norm_keeps_its_statistics_and_trains_its_scale():
    module = Resnet(depth=18, norm="eval").build()
    module.train()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())
    assert all(p.requires_grad for name, p in module.named_parameters() if "bn" in name)


def test_with_weights_the_norms_and_the_first_stages_are_frozen(tmp_path):
    file = tmp_path / "resnet.pt"
    expected = torchvision.models.resnet18()
    torch.save(expected.state_dict(), file)
    module = Resnet(depth=18, weights=str(file)).build()
    assert {name.split(".")[0] for name, p in module.named_parameters() if p.requires_grad} == {
        "layer2",
        "layer3",
        "layer4",
    }
    assert not any(isinstance(child, nn.BatchNorm2d) for child in module.modules())
    assert torch.equal(module.state_dict()["layer1.0.conv1.weight"], expected.layer1[0].conv1.weight)


@pytest.mark.parametrize("wrap", [lambda s: {"model": s, "iter": 3}, lambda s: {"state_dict": s}])
def test_weights_may_lie_in_a_checkpoint(wrap, tmp_path):
    torch.save(wrap(torchvision.models.resnet18().state_dict()), tmp_path / "c.pt")
    assert Resnet(depth=18, weights=str(tmp_path / "c.pt")).build()


def test_weights_that_do_not_fit_are_listed(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "r18.pt")
    with pytest.raises(
        CheckpointError, match=r"r18.pt: \d+ of the model's 267 tensors(.|\n)*\d+ missing: layer1.0.conv3"
    ):
        Resnet(depth=50, weights=str(tmp_path / "r18.pt")).build()


class Harmful:
    def __reduce__(self):
        return print, ("this must not be printed",)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "harmful", {"a": 1}, [1, 2]])
def test_a_file_that_holds_no_weights(content, tmp_path, capsys):
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save({"model": Harmful()} if content == "harmful" else content, path)
    with pytest.raises(CheckpointError, match=r"w.pt: (no weights|cannot be read as weights|holds more than)"):
        Resnet(depth=18, weights=str(path)).build()
    assert "this must not be printed" not in capsys.readouterr().out


def test_unknown_weights_are_told():
    with pytest.raises(ConfigError, match="no weights are named 'IMAGENET1K_V9', did you mean 'IMAGENET1K_V1'"):
        Resnet(depth=18, weights="IMAGENET1K_V9").build()
    with pytest.raises(ConfigError, match=r"there is no file 'weights/none.pt'"):
        Resnet(depth=18, weights="weights/none.pt").build()


def test_without_a_network_it_is_one_line_that_says_where_to_put_the_file(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(UserError, match=r"cannot be downloaded from https://.*resnet18-.*\.pth \(Temporary") as caught:
        Resnet(depth=18, weights="DEFAULT").build()
    assert str(tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth") in str(caught.value)


def test_named_weights_are_loaded_by_torchvision(monkeypatch, tmp_path):
    """The real path, but for the download: the file lies where torchvision keeps it."""
    state = torchvision.models.resnet18().state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "resnet18-f37072fd.pth").write_bytes(buffer.getvalue())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    module = Resnet(depth=18, weights="IMAGENET1K_V1").build()
    assert torch.equal(module.state_dict()["conv1.weight"], state["conv1.weight"])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (TorchvisionBackbone(name="resnet51"), "torchvision has no classification model 'resnet51', did you mean"),
        (TorchvisionBackbone(name="resnet18", nodes=["layer9"]), "layer9"),
        (TorchvisionBackbone(name="resnet18", args={"widht": 3}), "resnet18: .*widht"),
        (Resnet(depth=18, groups=32), "ResNeXt begins at depth 50"),
        (MobilenetV3(layers=[6, 99]), "expected rising numbers below 17"),
    ],
)
def test_what_is_wrong_with_a_backbone(part, message):
    with pytest.raises(ConfigError, match=message):
        part.build()


def built(plugin, tmp_path):
    run = tiny_kernel({"model": plugin, "data": TinyData(dataset=TinyDataset(size=2))}, work_dir=tmp_path).state
    run.loaders["train"] = run.hook.build_loader(run=run, mode="train")
    return run.hook.build_model(run=run)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (Fcos(backbone=Resnet(depth=18), levels=[8, 64]), r"the backbone has maps of strides \[4, 8, 16, 32\]"),
        (Fcos(backbone=Resnet(depth=18, stages=1)), "the detector needs one of 8 or more"),
        (FasterRcnn(backbone=Resnet(depth=18), anchor_sizes=[[8], [16]]), "a list for each of the 5 levels"),
        (Retinanet(backbone=Resnet(depth=18), anchor_sizes=[[8]] * 4 + [[8, 9]]), "as many sizes at each level"),
    ],
)
def test_what_is_wrong_with_a_detector(plugin, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        built(plugin, tmp_path)


def test_channels_that_fcos_cannot_normalise_are_refused():
    with pytest.raises(ValueError, match=r"neck_channels: .* expected a multiple of 32, got 48"):
        Fcos(backbone=Resnet(depth=18), neck_channels=48)


def test_weights_of_a_detector_from_a_file(tmp_path):
    first = built(Fcos(backbone=MobilenetV3(size="small"), neck_channels=32), tmp_path)
    with torch.no_grad():
        first.head.classification_head.cls_logits.bias.fill_(0.5)
    torch.save(first.state_dict(), tmp_path / "fcos.pt")
    weights = {"weights": str(tmp_path / "fcos.pt"), "weights_classes": "same_order"}
    again = built(Fcos(backbone=MobilenetV3(size="small"), neck_channels=32, **weights), tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())


def test_an_image_of_another_size_is_told_to_ssd(tmp_path):
    run = tiny_kernel({"model": Ssdlite(size=64), "data": TinyData(dataset=TinyDataset(size=2))}, work_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"takes images of 64x64, got one of 32x32: end the loader's"):
        run.run()


def test_detections_are_in_the_coordinates_of_the_file(tmp_path):
    batch = next(iter(TinyData(dataset=TinyDataset()).build_loader(tiny_kernel({}).state, "train").batches(0)))
    batch.scales, batch.original_sizes = [(2.0, 4.0)] * 2, [(20, 10)] * 2
    boxes, valid = torch.tensor([[[8.0, 6, 44, 44]]] * 2), torch.tensor([[True], [False]])
    found = Predictions(boxes, torch.tensor([[0.5]] * 2), torch.tensor([[0]] * 2), valid)
    one, other = to_detections(found, batch, Detector(["a"]))
    assert len(other) == 0
    assert one.boxes.tolist() == [[2, 3, 10, 20]]  # divided by the scale, cut to the image
    assert one.labels.tolist() == [0]


class TestFcos(ModelContract):
    steps = 25

    def plugin(self):
        return Fcos(backbone=Resnet(depth=18, stages=2, norm="group"), neck_channels=32, levels=[8], score_thresh=0)


def test_the_args_of_a_backbone_by_name_are_its_builders():
    plain, reduced = (
        TorchvisionBackbone(name="mobilenet_v3_small", args=args).build() for args in ({}, {"reduced_tail": True})
    )
    assert (plain.channels[-1], reduced.channels[-1]) == (576, 288)


def test_weights_of_the_backbone_of_ssd(tmp_path):
    """Of a classification model, from a file; the classifier in it is passed over."""
    body = torchvision.models.mobilenet_v3_large()
    torch.save(body.state_dict(), tmp_path / "mobilenet.pt")
    found = Ssdlite(size=64, backbone_weights=str(tmp_path / "mobilenet.pt"))._build(4).backbone.features
    assert torch.equal(found[0][0][0].weight, body.features[0][0].weight)
    with torch.device("meta"):
        features = nn.Sequential(*torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"]))
    state = {f"features.{name}": torch.full(one.shape, 0.5) for name, one in features.state_dict().items()}
    torch.save({**state, "classifier.0.weight": torch.zeros(2)}, tmp_path / "vgg.pt")
    model = Ssd(backbone_weights=str(tmp_path / "vgg.pt"))._build(4)
    assert bool((model.backbone.features[0].weight == 0.5).all())
    assert [parameter.requires_grad for parameter in model.backbone.features.parameters()][:6] == [False] * 4 + [
        True
    ] * 2
