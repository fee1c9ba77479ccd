"""RT-DETR and D-FINE: what they promise on generated data, and what their parts and options do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import ConfigError
from detkernel_detection import Target, batching
from detkernel_detection.boxes import xyxy
from detkernel_detection.parts import Matches
from detkernel_detection.testing import ModelContract
from detkernel_detection.weights import read_weights, renamed
from detkernel_detectors.backbones import Hgnetv2, Resnet
from detkernel_detectors.backbones.norms import EvalBatchNorm2d
from detkernel_detectors.losses.boxes import L1, Giou
from detkernel_detectors.losses.classes import Varifocal
from detkernel_detectors.models.dfine import Dfine, voted
from detkernel_detectors.models.network import Network
from detkernel_detectors.models.rtdetr import RtDetr
from detkernel_detectors.necks import HybridEncoder
from detkernel_detectors.necks.hybrid import Csp, Elan, positions
from detkernel_detectors.transformers import denoising
from detkernel_detectors.transformers.dfine import bins_of, distances_of, moved, steps
from detkernel_detectors.transformers.rtdetr import proposals
from torch import nn

SMALL: Any = {
    "backbone": Resnet(depth=18, channels=8, stages=2, norm="group"),
    "neck": HybridEncoder(channels=16, finest=4, attention_heads=2, ffn_channels=16, depth=0.34),
    "channels": 16,
    "decoder_layers": 2,
    "queries": 10,
    "attention_heads": 2,
    "ffn_channels": 32,
    "points": [2, 2],
    "denoising": 4,
}


class TestRtDetr(ModelContract):
    lr = 0.01
    steps = 80

    def plugin(self) -> Any:
        return RtDetr(**SMALL)


class TestDfine(ModelContract):
    """The losses of its distributions are weighted by the IoU of its boxes, so that they grow at first; that it learns
    is seen by what it finds."""

    lr = 0.01
    test_overfits_two_images = None

    def plugin(self) -> Any:
        return Dfine(**SMALL)


# what is learned


def made(kind: Any = RtDetr, classes: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Network(kind(**{**SMALL, **options}), [f"class {number}" for number in range(classes)])
    for parameter in model.head.parameters():  # so that no layer gives what it was given
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def losses(kind: Any = RtDetr, **options: Any) -> dict[str, float]:
    return losses_of(made(kind, **options))


def losses_of(model: Any) -> dict[str, float]:
    image = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    target = Target(torch.tensor([[8.0, 8, 40, 30], [20, 30, 50, 60]]), torch.tensor([1, 0]))
    batch = batching.make_batch(image, [target], sizes=[(64, 64)])
    torch.manual_seed(0)
    with torch.no_grad():
        found = model(batch.images, batch.targets, batch.image_sizes)
    return {name: loss.item() for name, loss in found.items()}


def test_every_layer_has_losses():
    assert list(losses()) == [
        f"loss_{part}{of}" for parts in (["_aux_0", "", "_enc_0"], ["_dn_0", "_dn_1"])
        for part in ("vfl", "bbox", "giou") for of in parts
    ]  # fmt: skip
    assert not [name for name in losses(denoising=0) if "_dn_" in name]
    assert not [name for name in losses(Dfine, denoising=0) if "_dn_" in name]
    assert "loss_vfl_aux_1" in losses(decoder_layers=3)
    assert {"loss_fgl", "loss_ddf_aux_0", "loss_vfl_pre", "loss_giou_dn_pre"} < losses(Dfine).keys()
    assert "loss_ddf" not in losses(Dfine)


@pytest.mark.parametrize("kind", [RtDetr, Dfine])
def test_the_losses_are_those_asked_for(kind: Any):
    usual = losses(kind)
    changes: dict[str, Any] = {
        "vfl": {"class_loss": Varifocal(weight=2.0)},
        "bbox": {"box_loss": L1(weight=10.0)},
        "giou": {"iou_loss": Giou(weight=4.0)},
    }
    if kind is Dfine:
        changes |= {"fgl": {"fine_weight": 0.3}, "ddf": {"distill_weight": 3.0}}
    for part, options in changes.items():
        doubled = losses(kind, **options)
        for name, loss in usual.items():
            factor = 2 if name.startswith(f"loss_{part}") else 1
            assert doubled[name] == pytest.approx(factor * loss, rel=1e-5), (part, name)


def test_the_distillation_is_softer_by_its_temperature():
    """At equal scores a high temperature leaves T^2 times the KL of logits that are T times nearer: half a variance."""
    soft, usual = losses(Dfine, temperature=50.0), losses(Dfine)
    assert soft["loss_ddf_aux_0"] != pytest.approx(usual["loss_ddf_aux_0"], rel=1e-6)
    assert {name for name in usual if usual[name] != soft[name]} <= {"loss_ddf_aux_0", "loss_ddf_dn_0", "loss_ddf_dn_1"}


@pytest.mark.parametrize("option", ["label_noise", "box_noise", "denoising"])
def test_noise(option: str, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    real = denoising.noisy
    monkeypatch.setattr(denoising, "noisy", lambda *given: (seen.append(given), real(*given))[1])
    losses(**{option: 1 if option == "denoising" else 0.25})
    _, _, draws, pairs, label_noise, box_noise = seen[0]
    found = {"label_noise": label_noise, "box_noise": box_noise, "denoising": pairs}
    assert found == {"label_noise": 0.5, "box_noise": 1.0, "denoising": 4} | {option: found[option]}
    assert found[option] == (1 if option == "denoising" else 0.25)
    assert draws.change.shape == (1, 16)


def test_most_votes_win():
    """Three sets of three queries, two objects: of query 0 twice the second object; of 1 each once; of 2 none."""
    matched = torch.tensor([[1, 0, 0, 0, 1, 0, 1, 0, 0]])
    positive = torch.tensor([[True, True, False, True, True, False, True, False, False]])
    found = voted(Matches(matched, positive, ~positive), 3, 2)
    assert found.matched.tolist() == [[1, 0, 0]]
    assert found.positive.tolist() == [[True, True, False]]
    assert found.negative.tolist() == [[False, False, True]]


# what decoders consist of


def test_proposals():
    boxes = proposals([(2, 4), (1, 2)], torch.zeros(1)).sigmoid()
    assert boxes[1].tolist() == pytest.approx([0.375, 0.25, 0.05, 0.05])
    assert boxes[9].tolist() == pytest.approx([0.75, 0.5, 0.1, 0.1])
    wide = proposals([(1, 100)], torch.zeros(1))
    assert wide.isfinite().all(-1).tolist() == [False] + [True] * 98 + [False]  # a centre nearer than 0.01 to a border


def test_distances_are_dense_around_zero():
    found = steps(9, 4.0, torch.zeros(1)).tolist()
    assert found == pytest.approx(
        [-4, -2, 1 - 3 ** (2 / 3), 1 - 3 ** (1 / 3), 0, 3 ** (1 / 3) - 1, 3 ** (2 / 3) - 1, 2, 4]
    )
    assert max(steps(9, 8.0, torch.zeros(1)).tolist()) == 8


def test_boxes_and_distances_and_back():
    anchors, scale = torch.tensor([[0.5, 0.4, 0.2, 0.4]]), 4.0
    out = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    box = moved(anchors, out, scale)
    assert xyxy(box)[0].tolist() == pytest.approx([0.35, 0.2, 0.55, 0.8])
    torch.testing.assert_close(distances_of(anchors, xyxy(box), scale), out)
    assert xyxy(moved(anchors, out, 8.0))[0].tolist() == pytest.approx([0.375, 0.2, 0.575, 0.7])


def test_bins_of_distances():
    known = torch.tensor([-4.0, -1, 0, 1, 4])
    below, rest = bins_of(torch.tensor([-9.0, -4, -2.5, 0, 0.25, 1, 3.25, 4, 9]), known)
    assert below.tolist() == [0, 0, 0, 2, 2, 3, 3, 3, 3]
    assert rest.tolist() == [0, 0, 0.5, 0, 0.25, 0, 0.75, 1, 1]


@pytest.mark.parametrize("kind", [RtDetr, Dfine])
def test_the_shape_of_a_decoder(kind: Any):
    model = made(kind, channels=24, decoder_layers=3, queries=7, attention_heads=4, ffn_channels=20, points=[1, 3])
    head = model.head
    assert len(head.layers) == len(head.cls) == len(head.reg) == 3
    layer = head.layers[0]
    assert layer.linear1.weight.shape == (20, 24)
    assert layer.self_attn.num_heads == layer.cross_attn.heads == 4
    assert layer.cross_attn.points == (1, 3)
    assert head.inputs[0].conv.weight.shape == (24, 16, 1, 1)
    encoded = model.forward_outputs(torch.zeros(1, 3, 64, 64))
    queries = model.family.predicted(encoded, model)
    assert queries.boxes.shape == (1, 7, 4)
    assert queries.scale.tolist() == [[[64, 64, 64, 64]]]
    with pytest.raises(ConfigError, match=r"points: expected a number for each map of the neck, got 1 for maps of"):
        made(kind, points=[4])
    with pytest.raises(ConfigError, match="evaluated_layers: there are 2, got 3"):
        made(kind, evaluated_layers=3)


def test_options_of_dfine():
    assert made(Dfine, bins=9).head.reg[0][-1].weight.shape == (36, 16)
    assert losses(Dfine, box_scale=8.0)["loss_fgl"] != losses(Dfine)["loss_fgl"]
    with pytest.raises(ConfigError, match="bins: expected an odd number, with 0 in the middle, got 8"):
        made(Dfine, bins=8)


@pytest.mark.parametrize("kind", [RtDetr, Dfine])
def test_the_last_layers_may_be_for_training_alone(kind: Any):
    """A layer that detects gives the same with and without a layer behind it."""
    model = made(kind, evaluated_layers=1)
    encoded = model.forward_outputs(torch.rand(1, 3, 64, 64))
    with torch.no_grad():
        found, every = model.head(encoded), model.head(encoded, learns=True)
    torch.testing.assert_close(found.boxes[-1], every.boxes[0])
    torch.testing.assert_close(found.logits[-1], every.logits[0])
    assert len(found.boxes) == 1


def test_classes_begin_at_a_hundredth_and_boxes_as_they_came():
    torch.manual_seed(0)
    model: Any = Network(Dfine(**SMALL), ["a", "b"]).eval()
    decoded = model.head(model.forward_outputs(torch.rand(1, 3, 64, 64)), learns=True)
    assert decoded.logits.sigmoid().mean().item() == pytest.approx(0.01, abs=0.01)
    torch.testing.assert_close(decoded.boxes[0], decoded.anchors)
    torch.testing.assert_close(decoded.boxes[1], decoded.anchors)


def test_the_authors_files_hold_an_average(tmp_path: Path):
    """RT-DETR's say what to detect with under ema.module; images of any size are taken as they are."""
    model = made()
    torch.save({"ema": {"module": model.state_dict(), "updates": 3, "warmups": 2000}}, tmp_path / "rtdetr.pth")
    assert read_weights(tmp_path / "rtdetr.pth").tensors.keys() == model.state_dict().keys()
    assert model.normalize(torch.zeros(1, 3, 70, 50)).shape == (1, 3, 70, 50)
    assert model(torch.zeros(1, 3, 70, 50, dtype=torch.uint8)).boxes.shape == (1, 300, 4)


# the encoder


SIDES = [(15, 23), (8, 12), (4, 6)]
MAPS = [torch.randn(1, count, *sides) for count, sides in zip((2, 3, 4), SIDES, strict=True)]


def encoder(**options: Any) -> Any:
    torch.manual_seed(0)
    small: Any = {"channels": 16, "attention_heads": 2, "ffn_channels": 8, "depth": 0.34, "finest": 4}
    return HybridEncoder(**{**small, **options}).build([2, 3, 4], [4, 8, 16])


@pytest.mark.parametrize("fusion", ["csp", "elan"])
def test_hybrid_encoder(fusion: Any):
    neck = encoder(fusion=fusion)
    assert [tuple(one.shape) for one in neck(MAPS)] == [(1, 16, *sides) for sides in SIDES]
    assert isinstance(neck.top_down[0], Elan if fusion == "elan" else Csp)
    assert isinstance(neck.laterals[0].act, nn.Identity if fusion == "elan" else nn.SiLU)
    assert encoder(finest=8).strides == [8, 16]
    assert encoder(channels=24, fusion=fusion)(MAPS)[0].shape[1] == 24
    deep, wide = encoder(fusion=fusion, depth=1.0), encoder(fusion=fusion, expansion=0.5)
    block = deep.top_down[0].cv2[0] if fusion == "elan" else deep.top_down[0]
    assert len(block.bottlenecks) == 3
    block = wide.top_down[0].cv2[0] if fusion == "elan" else wide.top_down[0]
    assert block.conv1.conv.weight.shape[0] == (4 if fusion == "elan" else 8)
    assert encoder(attention_heads=4).attention.self_attn.num_heads == 4
    assert encoder(ffn_channels=12).attention.linear1.weight.shape == (12, 16)


def test_what_the_hybrid_encoder_refuses():
    with pytest.raises(ConfigError, match=r"finest: the backbone has maps of strides \[4, 8, 16\], none of 32"):
        encoder(finest=32)
    with pytest.raises(ConfigError, match="channels: expected a multiple of 4 and of 3 heads, got 16"):
        encoder(attention_heads=3)


def test_positions_of_places():
    found = positions(torch.zeros(1, 8, 2, 3))
    a, b = torch.tensor([0.0, 0, 1, 1, 2, 2]), torch.tensor([0.0, 1, 0, 1, 0, 1])
    torch.testing.assert_close(found[:, 0], a.sin())
    torch.testing.assert_close(found[:, 3], (a / 100).cos())
    torch.testing.assert_close(found[:, 4], b.sin())


# backbones


def test_sizes_of_hgnetv2():
    expected = {"b0": [64, 256, 512, 1024], "b2": [96, 384, 768, 1536], "b4": [128, 512, 1024, 2048]}
    for size, channels in expected.items():
        made: Any = Hgnetv2(size=size).build()  # type: ignore[arg-type]
        assert made.channels == channels
    assert [tuple(one.shape) for one in made(torch.zeros(1, 3, 64, 64)).values()] == [
        (1, count, 16 // 2**stage, 16 // 2**stage) for stage, count in enumerate(channels)
    ]
    stages = Hgnetv2(size="b5").table.stages
    assert [stage.blocks for stage in stages] == [1, 2, 5, 2]
    assert Hgnetv2(size="b0").table.affine
    assert not Hgnetv2(size="b4").table.affine


def test_weights_norms_and_frozen_stages_of_hgnetv2(tmp_path: Path):
    first: Any = Hgnetv2(size="b0").build()
    torch.save(first.state_dict(), tmp_path / "b0.pth")
    made: Any = Hgnetv2(size="b0", weights=str(tmp_path / "b0.pth"), trainable_layers=3, norm="eval").build()
    name = "stages.3.blocks.0.layers.0.conv1.conv.weight"
    assert torch.equal(made.state_dict()[name], first.state_dict()[name])
    trained = {name.split(".")[1] for name, p in made.named_parameters() if p.requires_grad}
    assert trained == {"1", "2", "3"}
    assert not made.stem.training
    assert made.stages[1].training
    assert isinstance(made.stages[3].downsample.bn, EvalBatchNorm2d)
    with pytest.raises(ConfigError, match=r"weights: there is no file 'none\.pth'"):
        Hgnetv2(weights="none.pth").build()


def test_resnet_vd():
    """Names as PaddlePaddle's; the stem is frozen as one."""
    made: Any = Resnet(depth=18, channels=8, variant="vd").build()
    theirs = {
        "conv1.conv1_1.conv.weight": made.stem[0].weight + 1,
        "conv1.conv1_3.norm.bias": made.stem[7].bias + 1,
        "res_layers.0.blocks.0.short.conv.weight": made.layer1[0].downsample[1].weight + 1,
        "res_layers.1.blocks.0.short.conv.conv.weight": made.layer2[0].downsample[1].weight + 1,
        "res_layers.1.blocks.0.short.conv.norm.bias": made.layer2[0].downsample[2].bias + 1,
        "res_layers.3.blocks.1.branch2b.conv.weight": made.layer4[1].conv2.weight + 1,
    }
    own = made.state_dict()
    ours = renamed(theirs, made.key_maps["RT-DETR"])
    assert all(torch.equal(value, own[name] + 1) for name, value in ours.items())
    assert [tuple(one.shape[1:]) for one in made(torch.zeros(1, 3, 64, 64)).values()] == [
        (8 * 2**stage, 16 // 2**stage, 16 // 2**stage) for stage in range(4)
    ]
    frozen: Any = Resnet(depth=18, channels=8, variant="vd", trainable_layers=4).build()
    assert {name.split(".")[0] for name, p in frozen.named_parameters() if not p.requires_grad} == {"stem"}
    assert not frozen.train().stem.training
