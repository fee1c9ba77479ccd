"""What each option of the detectors that predict a set changes."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from detkernel import ConfigError
from detkernel_detection import Target, batching
from detkernel_detection.parts import Queries
from detkernel_detection.structures import Batch
from detkernel_detectors.assigners.hungarian import HungarianAssigner, L1Cost
from detkernel_detectors.backbones import Resnet
from detkernel_detectors.losses.boxes import L1, Giou
from detkernel_detectors.losses.classes import Focal, Softmax
from detkernel_detectors.models.conditional_detr import ConditionalDetr
from detkernel_detectors.models.dab_detr import DabDetr
from detkernel_detectors.models.deformable_detr import DeformableDetr
from detkernel_detectors.models.detr import Detr
from detkernel_detectors.models.dino import Dino
from detkernel_detectors.models.network import Network
from detkernel_detectors.models.sets import padded
from detkernel_detectors.necks import ChannelMapper
from torch import nn

SMALL: Any = {
    "backbone": Resnet(depth=18, channels=8, stages=2, norm="group"),
    "neck": ChannelMapper(channels=16, groups=4, extra=0),
    "queries": 8,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "attention_heads": 4,
    "points": 2,
    "ffn_channels": 16,
    "dropout": 0.0,
}


def made(kind: Any = DeformableDetr, classes: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    return Network(kind(**{**SMALL, **options}), [f"class {number}" for number in range(classes)])


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.transformer.named_parameters()}


def batch() -> Batch:
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8, generator=noise)
    objects = [[[4.0, 6, 40, 30]], [[10.0, 10, 40, 50], [1.0, 2, 17, 22]]]
    targets = [Target(torch.tensor(boxes), torch.arange(len(boxes))) for boxes in objects]
    return batching.make_batch(images, targets, sizes=[(64, 64), (50, 44)])


def losses(model: Any, given: Batch | None = None) -> dict[str, float]:
    given = batch() if given is None else given
    torch.manual_seed(1)
    with torch.no_grad():
        return {name: loss.item() for name, loss in model(given.images, given.targets, given.image_sizes).items()}


def encoded(model: Any) -> Any:
    given = batch()
    with torch.no_grad():
        return model.forward_outputs(model.normalize(given.images, given.image_sizes), given.image_sizes)


def test_sizes_of_the_transformer():
    found = shapes(made(encoder_layers=2, decoder_layers=3, queries=5, points=3, attention_heads=2, ffn_channels=24))
    assert found["query_embedding.weight"] == (5, 32)
    assert found["encoder.layers.1.self_attn.sampling_offsets.weight"] == (2 * 3 * 2, 16)  # heads, points, x and y
    assert found["decoder.layers.2.cross_attn.attention_weights.weight"] == (2 * 3, 16)
    assert found["decoder.layers.2.ffn.0.weight"] == (24, 16)
    assert not any(name.startswith(("encoder.layers.2", "decoder.layers.3")) for name in found)
    assert made(attention_heads=2).transformer.decoder.layers[0].self_attn.num_heads == 2


def test_the_stages_have_branches_of_their_own_with_refinement_alone():
    """The same ones for all layers without; one more for the proposals."""
    plain, refined, two = made().transformer, made(refine=True).transformer, made(two_stage=True, refine=True)
    assert plain.reg[0] is plain.reg[1]
    assert plain.cls[0] is plain.cls[1]
    assert refined.reg[0] is not refined.reg[1]
    assert len(two.transformer.reg) == 3
    assert "query_embedding.weight" not in shapes(two)
    assert set(two.class_outputs) == {f"transformer.cls.{n}.{kind}" for n in range(3) for kind in ("weight", "bias")}
    assert {"enc_loss_cls", "enc_loss_bbox", "enc_loss_iou"} == losses(two.train()).keys() - losses(made()).keys()


def test_refinement_starts_from_the_box_of_the_layer_before():
    for refine in (False, True):
        model = made(refine=refine)
        for reg in model.transformer.reg:  # each layer moves a box by as much
            nn.init.constant_(reg[-1].bias, 0.5)
        first, second = model.family.predicted(encoded(model), model).boxes.split(8, 1)
        assert torch.equal(first, second) is not refine
        torch.testing.assert_close(
            second[..., :2].logit() - first[..., :2].logit(), torch.full((2, 8, 2), 0.5 * refine)
        )


def test_dropout_acts_in_training_alone():
    for kind in (DeformableDetr, Dino):
        model, none = made(kind, dropout=0.5), made(kind)
        assert losses(model.train()) != losses(none.train())
        assert torch.equal(encoded(model.eval()).memory, encoded(none.eval()).memory)


@pytest.mark.parametrize("options", [{"temperature": 20.0}, {"position_offset": 0.0}])
def test_the_encoding_of_places(options: Any):
    """It weighs what a place looks at, once there is a weight for it."""
    found = []
    for model in (made(**options), made()):
        nn.init.ones_(model.transformer.encoder.layers[0].self_attn.attention_weights.weight)
        with torch.no_grad():
            model.transformer.encoder.layers[0].self_attn.attention_weights.weight[::2] = -1
        found.append(encoded(model.eval()).memory)
    assert not torch.equal(*found)


def test_the_losses_and_the_assigner_are_replaceable():
    usual = losses(made())
    for name, options in {
        "loss_cls": {"class_loss": Focal(weight=4.0)},
        "loss_bbox": {"box_loss": L1(weight=10.0)},
        "loss_iou": {"iou_loss": Giou(weight=4.0)},
    }.items():
        twice = losses(made(**options))
        for each in usual:
            assert twice[each] == pytest.approx(usual[each] * (2 if each.endswith(name) else 1), rel=1e-5)
    assert losses(made(assigner=HungarianAssigner(costs=[L1Cost()]))) != usual


def test_denoising_options():
    plain, usual = losses(made(Dino, denoising=0)), losses(made(Dino, denoising=9))
    assert {name.removeprefix("d0.") for name in usual.keys() - plain.keys()} == {
        "dn_loss_cls",
        "dn_loss_bbox",
        "dn_loss_iou",
    }
    for name, value in plain.items():
        assert usual[name] == pytest.approx(value, rel=1e-5), "the queries do not see the noisy ones"
    for options in ({"label_noise": 1.0}, {"box_noise": 0.1}):
        assert losses(made(Dino, denoising=9, **options))["dn_loss_cls"] != usual["dn_loss_cls"]


def test_a_noisy_query_starts_from_its_object():
    """Without noise and with branches that move nothing, its box is the object."""
    model = made(Dino, denoising=1, box_noise=0.0, queries=3)
    for reg in model.transformer.reg:
        nn.init.zeros_(reg[-1].bias)
    found = losses(model)
    assert found["d0.dn_loss_bbox"] == pytest.approx(0, abs=1e-3)
    assert found["dn_loss_iou"] == pytest.approx(0, abs=1e-3)
    assert found["enc_loss_bbox"] > 0.1


def test_a_place_whose_box_nearly_leaves_the_image_proposes_nothing():
    model = made(Dino)
    for reg in model.transformer.reg:
        nn.init.zeros_(reg[-1].weight)
        nn.init.zeros_(reg[-1].bias)
    given = encoded(model)
    boxes = model.transformer.proposed(given).boxes.sigmoid()
    assert given.shapes == ((8, 8),)
    assert boxes[0, 0].tolist() == pytest.approx([1 / 16, 1 / 16, 0.05, 0.05])
    there = (boxes < 1).all(-1).view(2, 8, 8)
    assert there[0].all()
    assert there[1].sum() == 7 * 6  # places of the image of 50 x 44
    assert boxes[1, 9].tolist() == pytest.approx([1.5 / 6, 1.5 / 7, 0.05, 0.05])


def test_padding_does_not_reach_what_is_in_the_image():
    """Whatever the neck makes of the padding, the memory of the image is the same."""
    model = made(Dino).eval()
    given = encoded(model)
    maps = [one.clone() for one in given.features]
    maps[0][1].view(16, 64)[:, ~given.valid[1]] += 100
    with torch.no_grad():
        again = model.transformer.encode(maps, batch().image_sizes, (64, 64))
    torch.testing.assert_close(again.memory[given.valid], given.memory[given.valid])


def test_the_sizes_of_images_that_fill_their_batch_need_not_be_said():
    model, given = made(Dino).eval(), batch()
    with torch.no_grad():
        whole = torch.tensor([[64, 64], [64, 64]])
        said, unsaid = model(given.images, None, whole), model(given.images)
    assert torch.equal(said.boxes, unsaid.boxes)


def test_the_best_detections_are_clipped_and_padded():
    family = DeformableDetr(**SMALL, max_detections=5)
    logits = torch.tensor([[[0.0, 3.0], [1.0, -9.0]]])
    queries = Queries(logits, torch.tensor([[[0.5, 0.5, 2.0, 0.5], [0.1, 0.1, 0.1, 0.1]]]), torch.ones(1, 1, 4), (2,))
    queries = queries._replace(scale=torch.tensor([[[100.0, 50, 100, 50]]]))
    found = family.best(queries)
    assert found.labels.tolist() == [[1, 0, 0, 1, 0]]
    assert found.valid.tolist() == [[True] * 4 + [False]]
    assert found.boxes[0, 0].tolist() == [0, 12.5, 100, 37.5]
    assert found.boxes[0, 1].tolist() == pytest.approx([5, 2.5, 15, 7.5])
    few = attrs.evolve(family, max_detections=1).best(queries)
    assert few.scores.tolist() == [[pytest.approx(0.9526, abs=1e-4)]]
    assert padded(few.boxes, few.scores, few.labels, queries.scale, 1).valid.tolist() == [[True]]


PLAIN: Any = {
    **{name: value for name, value in SMALL.items() if name != "points"},
    "neck": ChannelMapper(channels=16, groups=None, extra=0),
}


def plain(kind: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return Network(kind(**{**PLAIN, **options}), ["a", "b", "c"])


@pytest.mark.parametrize("kind", [Detr, ConditionalDetr, DabDetr])
def test_options_of_detrs_with_one_map(kind: Any):
    options: Any = {"encoder_layers": 2, "decoder_layers": 3, "queries": 5, "attention_heads": 2, "ffn_channels": 24}
    model = plain(kind, **options)
    found = shapes(model)
    assert found["query_embedding.weight"][0] == 5
    assert found["encoder.layers.1.ffn.0.weight"] == found["decoder.layers.2.ffn.0.weight"] == (24, 16)
    assert not any(name.startswith(("encoder.layers.2", "decoder.layers.3")) for name in found)
    assert found["cls.weight"] == (4 if kind is Detr else 3, 16)
    few, usual = (plain(kind, attention_heads=heads).transformer.encoder for heads in (2, 4))
    assert few.layers[0].self_attn.num_heads * 2 == usual.layers[0].self_attn.num_heads
    memory = [encoded(plain(kind, temperature=temperature).eval()).memory for temperature in (20.0, 10000.0)]
    assert not torch.equal(*memory)
    assert losses(plain(kind, dropout=0.5).train()) != losses(plain(kind).train())
    with pytest.raises(ConfigError, match=r"neck: expected one that gives one map, got one of strides \[8, 16\]"):
        plain(kind, neck=ChannelMapper(channels=16, groups=None, extra=1))


@pytest.mark.parametrize("kind", [Detr, ConditionalDetr, DabDetr])
def test_padding_does_not_reach_the_memory_or_the_queries(kind: Any):
    model = plain(kind).eval()
    given = encoded(model)
    maps = [given.features[0].clone()]
    maps[0][1].view(16, 64)[:, ~given.valid[1]] += 100
    with torch.no_grad():
        again = model.transformer.encode(maps, batch().image_sizes, (64, 64))
        found, expected = (model.transformer.decode(one) for one in (again, given))
    torch.testing.assert_close(again.memory[given.valid], given.memory[given.valid])
    torch.testing.assert_close(found.boxes, expected.boxes)


def test_no_object_is_a_class_of_detr():
    """Its weight is in the loss and in what the loss is divided by."""
    logits = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    found = Softmax(weight=2.0, background=0.5)(logits, torch.tensor([2, 0]))
    assert found.tolist() == pytest.approx([math.log(3), 2 * math.log(1 + 2 * math.exp(-2))])
    family = Detr(**PLAIN, class_loss=Softmax(background=0.5), max_detections=2)
    assert family.class_counts(torch.tensor([3.0]), torch.tensor([4.0])).tolist() == [5.0]
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1], [0.2, 0.2, 0.2, 0.2]]])
    logits = torch.tensor([[[0.0, 1.0, 9.0], [5.0, 4.0, 0.0], [0.0, 3.0, 0.0]]])
    best = family.best(Queries(logits, boxes, torch.full((1, 1, 4), 10.0), (3,)))
    assert best.labels.tolist() == [[1, 0]]
    assert best.boxes[0, 1].tolist() == pytest.approx([0.5, 0.5, 1.5, 1.5])
    assert set(plain(Detr).class_outputs) == {"transformer.cls.weight", "transformer.cls.bias"}


def test_each_layer_of_dab_detr_starts_from_the_box_of_the_one_before():
    model = plain(DabDetr)
    nn.init.constant_(model.transformer.reg[-1].bias, 0.5)
    first, second = model.family.predicted(encoded(model), model).boxes.split(8, 1)
    torch.testing.assert_close(second.logit() - first.logit(), torch.full((2, 8, 4), 0.5), atol=1e-3, rtol=0)


def test_channel_mapper():
    maps = [torch.randn(1, 4, 9, 7), torch.randn(1, 6, 5, 4)]
    for options, shapes_of, strides in (
        ({"channels": 8, "groups": 2}, [(9, 7), (5, 4), (3, 2)], [8, 16, 32]),
        ({"channels": 8, "groups": None, "finest": 16, "extra": 2}, [(5, 4), (3, 2), (2, 1)], [16, 32, 64]),
    ):
        neck: Any = ChannelMapper(**options).build([4, 6], [8, 16])
        found = neck(maps)
        assert [one.shape[1:] for one in found] == [(8, *size) for size in shapes_of]
        assert (neck.channels, neck.strides) == (8, strides)
        assert (neck.convs[0].conv.bias is None) == (options["groups"] is not None)
        norms = [module.num_groups for module in neck.modules() if isinstance(module, nn.GroupNorm)]
        assert norms == ([2] * 3 if options["groups"] else [])
    with pytest.raises(ConfigError, match=r"the backbone has maps of strides \[8, 16\], none of 32"):
        ChannelMapper(finest=32).build([4, 6], [8, 16])
    with pytest.raises(ValueError, match="channels: expected a multiple of the 32 groups, got 40"):
        ChannelMapper(channels=40)
