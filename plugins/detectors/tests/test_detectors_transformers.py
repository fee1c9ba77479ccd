"""What DETRs are made of: encodings, deformable attention, denoising queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel_detection import boxes
from detkernel_detection.structures import Targets
from detkernel_detectors.transformers import denoising
from detkernel_detectors.transformers.deformable import DeformableAttention, sampled
from detkernel_detectors.transformers.encodings import box_encoding, inverse_sigmoid, map_encoding, y_first
from torch import Tensor


def test_encodings(parts: dict[str, Tensor]):
    valid = torch.ones(1, 3, 4, dtype=torch.bool)
    valid[:, :, 3:] = False
    for name, options in {"deformable": {"offset": -0.5}, "dino": {"temperature": 20.0}, "detr": {}}.items():
        expected = parts[f"pe.{name}"].flatten(2).transpose(1, 2)
        torch.testing.assert_close(map_encoding(valid, 8, **options), expected, rtol=1e-5, atol=1e-5)
    coord = parts["pe.coord"]
    torch.testing.assert_close(box_encoding(y_first(coord), 8), parts["pe.coord.encoded"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(box_encoding(coord, 8), parts["pe.proposals.encoded"], rtol=1e-5, atol=1e-5)


def test_inverse_sigmoid():
    x = torch.tensor([-1.0, 0, 0.25, 1, 2])
    assert inverse_sigmoid(x, 0.1).tolist() == pytest.approx([-2.302585, -2.302585, -1.098612, 2.302585, 2.302585])
    assert inverse_sigmoid(x)[1].item() == pytest.approx(-11.512925)


def by_hand(attention: Any, queries: Tensor, references: Tensor, memory: Tensor, shapes: Any, valid: Tensor) -> Tensor:
    """One query, head and point after the other."""
    heads, total = attention.heads, sum(attention.points)
    values = attention.value_proj(memory) * valid[..., None]
    result = torch.zeros_like(queries)
    size = queries.shape[-1] // heads
    for image, query in ((b, q) for b in range(len(queries)) for q in range(queries.shape[1])):
        offsets = attention.sampling_offsets(queries[image, query]).view(heads, total, 2)
        weights = attention.attention_weights(queries[image, query]).view(heads, total).softmax(-1)
        for head in range(heads):
            number = start = 0
            part = slice(head * size, (head + 1) * size)
            for level, (height, width) in enumerate(shapes):
                one = values[image, start : start + height * width, part].view(height, width, size)
                for _ in range(attention.points[level]):
                    place, offset = references[image, query, level], offsets[head, number]
                    if len(place) == 2:
                        x, y = (place + offset / torch.tensor([width, height])).tolist()
                    else:
                        x, y = (place[:2] + offset / attention.points[level] * place[2:] * 0.5).tolist()
                    x, y = x * width - 0.5, y * height - 0.5
                    for row, column in ((a, b) for a in range(height) for b in range(width)):
                        near = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                        result[image, query, part] += weights[head, number] * near * one[row, column]
                    number += 1
                start += height * width
    return attention.output_proj(result)


@pytest.mark.parametrize("sides", [2, 4])
@pytest.mark.parametrize("projected", [True, False])
def test_deformable_attention(sides: int, projected: bool):
    torch.manual_seed(0)
    attention = DeformableAttention(8, 2, (3, 1), projected)
    for parameter in attention.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    shapes = [(3, 4), (2, 2)]
    memory, queries, references = torch.randn(2, 16, 8), torch.randn(2, 3, 8), torch.rand(2, 3, 2, sides)
    valid = torch.rand(2, 16) > 0.3
    with torch.no_grad():
        found = attention(queries, references, memory, shapes, valid)
        expected = by_hand(attention, queries, references, memory, shapes, valid)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (len(list(attention.parameters())) == 8) == projected


def test_samples_that_repeat_are_the_same():
    """With the algorithms asked for whose results repeat, and without: values and gradients."""
    noise = torch.Generator().manual_seed(0)
    maps, grid = torch.randn(2, 3, 4, 5, generator=noise), 2.6 * torch.rand(2, 6, 2, 2, generator=noise) - 1.3
    grid[0, 0, 0], grid[0, 0, 1] = torch.tensor([-1.0, 1.0]), torch.tensor([1e4, -9.0])
    found = []
    for repeat in (True, False):
        inputs = [value.clone().requires_grad_() for value in (maps, grid)]
        torch.use_deterministic_algorithms(repeat)
        try:
            result = sampled(*inputs)
            found.append([result, *torch.autograd.grad(result.square().sum(), inputs)])
        finally:
            torch.use_deterministic_algorithms(False)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_deformable_attention_begins_with_a_ring_around_the_reference():
    attention = DeformableAttention(8, 4, (2, 1))
    offsets = attention.sampling_offsets.bias.view(4, 3, 2)
    assert offsets[0].tolist() == [[1, 0], [2, 0], [1, 0]]  # the first head to the right
    assert offsets.abs().amax(-1).tolist() == [[1, 2, 1]] * 4
    assert not attention.attention_weights.weight.any()
    with pytest.raises(ValueError, match="expected a multiple of the 3 heads, got 8"):
        DeformableAttention(8, 3, (1,))


def denoised(counts: list[int], pairs: int, **noise: float) -> Any:
    room = 8
    truth = torch.zeros(len(counts), room, 4)
    truth[..., 2:] = 8.0
    truth += torch.arange(room)[:, None] + 8
    valid = torch.arange(room) < torch.tensor(counts)[:, None]
    targets = Targets(truth, torch.arange(room).expand(len(counts), -1), valid)
    torch.manual_seed(0)
    draws = denoising.draw(targets, 9, pairs)
    return denoising.noisy(targets, torch.full((len(counts), 1, 4), 32.0), draws, pairs, **noise)


def test_denoising_groups():
    """Three groups for three objects at most, in room for ten pairs."""
    found = denoised([3, 1], 10, label_noise=0.0, box_noise=0.0)
    assert found.labels.shape == (2, 20)
    assert found.group.tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 2
    assert found.matches.positive[0].tolist() == ([True] * 3 + [False] * 3) * 3 + [False] * 2
    assert found.matches.positive[1].tolist() == ([True] + [False] * 5) * 3 + [False] * 2
    assert (found.matches.positive | found.matches.negative).tolist() == [[True] * 18 + [False] * 2] * 2
    assert found.real[1].tolist() == [True, False, False] * 6 + [False] * 2
    assert found.labels[0, :18].tolist() == [0, 1, 2] * 6
    assert found.boxes[0, 4].tolist() == [13 / 32, 13 / 32, 0.25, 0.25]
    assert denoised([9], 1).labels.shape == (1, 16)  # room for all objects
    assert not denoised([0, 0], 10).matches.negative.any()


def test_denoising_noise():
    """A side moves by up to half of the box's, or by that to twice as much; a quarter of the labels change."""
    found = denoised([8] * 50, 800)
    object_of = torch.arange(16).remainder(8).repeat(100)
    changed = (found.labels != object_of).float().mean().item()
    assert changed == pytest.approx(0.25 * 8 / 9, abs=0.01)
    half = denoised([8] * 50, 800, label_noise=0.25)
    assert (half.labels != object_of).float().mean().item() == pytest.approx(0.125 * 8 / 9, abs=0.01)
    corners = torch.cat([(object_of[:, None] + 8).repeat(1, 2), (object_of[:, None] + 16).repeat(1, 2)], 1) / 32
    little = torch.arange(1600) % 16 < 8
    for scale in (1.0, 0.5):
        moved = (boxes.xyxy(denoised([8] * 50, 800, box_noise=scale).boxes) - corners).abs() / (scale * 0.125)
        assert (moved[:, little].amin().item(), moved[:, little].amax().item()) == pytest.approx((0, 1), abs=0.01)
        assert (moved[:, ~little].amin().item(), moved[:, ~little].amax().item()) == pytest.approx((1, 2), abs=0.01)


def test_groups_do_not_see_each_other():
    see = ~denoising.blocked(torch.tensor([0, 0, 1]), 2)
    assert see.int().tolist() == [[1, 1, 0, 1, 1], [1, 1, 0, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]


def test_denoising_is_the_references(oracle: Path, reference_draws: Any):
    folder = oracle / "dino"
    expected, inputs, weights = (
        torch.load(folder / f"{name}.pt", weights_only=True) for name in ("expected", "inputs", "weights")
    )
    given = [(target["boxes"], target["labels"]) for target in inputs["targets"]]
    counts, room = [len(labels) for _, labels in given], 16
    truth, labels = torch.zeros(len(given), room, 4), torch.zeros(len(given), room, dtype=torch.int64)
    for image, (some, names) in enumerate(given):
        truth[image, : len(names)], labels[image, : len(names)] = some, names
    targets = Targets(truth, labels, torch.arange(room) < torch.tensor(counts)[:, None])
    scale = torch.tensor([[[w, h, w, h]] for h, w in inputs["sizes"]]).float()
    theirs = int(expected["dn.num_queries_and_groups"][0])
    found = denoising.noisy(targets, scale, reference_draws(expected, targets, 10), 10)
    used = (found.matches.positive | found.matches.negative).sum(1).tolist()
    assert used == [theirs] * len(given)
    embedded = weights["dn_query_generator.label_embedding.weight"].float()[found.labels]
    label_query = torch.where(found.real[..., None], embedded, 0.0)[:, :theirs]
    torch.testing.assert_close(label_query, expected["dn.label_query"])
    bbox_query = torch.where(found.real[..., None], inverse_sigmoid(found.boxes, 1e-3), 0.0)[:, :theirs]
    torch.testing.assert_close(bbox_query, expected["dn.bbox_query"], rtol=1e-4, atol=1e-5)
    count = len(expected["dn.attn_mask"]) - theirs
    assert torch.equal(denoising.blocked(found.group[:theirs], count), expected["dn.attn_mask"])
