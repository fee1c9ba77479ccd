"""Contrastive denoising queries (Zhang et al. 2023): objects with noise, whose decoder output is to be the objects."""

from __future__ import annotations

from typing import NamedTuple

import torch
from detkernel_detection.boxes import cxcywh
from detkernel_detection.parts import Matches
from detkernel_detection.structures import Targets
from torch import Tensor


class Draws(NamedTuple):
    """The random numbers of K noisy queries of B images."""

    change: Tensor
    """[B, K] 0..1: the label changes below a threshold."""
    labels: Tensor
    """int64 [B, K]: to this one."""
    sign: Tensor
    """[B, K, 4] -1 or 1: whether a side moves to the left and up, or to the right and down."""
    part: Tensor
    """[B, K, 4] 0..1: how far."""


class Denoising(NamedTuple):
    """Noisy queries: groups of, for each object, a place with a little noise and later one with much."""

    labels: Tensor
    """int64 [B, K]: with noise."""
    boxes: Tensor
    """float32 [B, K, 4] cxcywh in shares of the image, 0..1: with noise. A side may be negative where two crossed."""
    real: Tensor
    """bool [B, K]: which are of an object. The others are padding of an image with fewer objects than another."""
    matches: Matches
    """[B, K]: little noise is to become its object; much noise, and padding in a group, background."""
    group: Tensor
    """int64 [K]: queries of different groups do not see each other."""


def draw(targets: Targets, classes: int, pairs: int) -> Draws:
    """Random numbers of the device's generator for `noisy`."""
    like = targets.boxes.new_empty((len(targets.labels), places(targets, pairs)))
    change = torch.rand_like(like)
    labels = torch.randint_like(like, classes, dtype=torch.int64)
    four = like[..., None].expand(-1, -1, 4)
    return Draws(change, labels, torch.randint_like(four, 2) * 2 - 1, torch.rand_like(four))


def places(targets: Targets, pairs: int) -> int:
    """K: room for every group, however many objects there are."""
    return 2 * max(pairs, targets.labels.shape[1])


def noisy(
    targets: Targets, scale: Tensor, draws: Draws, pairs: int, label_noise: float = 0.5, box_noise: float = 1.0
) -> Denoising:
    """K queries of the objects. `scale` [B, 1, 4]: (w, h, w, h) of the images, in pixels.

    As many groups as `pairs` has room for with the image of most objects, m, one at least: `max(1, pairs // m)`, each
    of m places with little noise and m with much (a side moves by up to half of the box's width or height times
    `box_noise`, or by that to twice as much). Half of `label_noise` is the chance of another label. How many groups
    there are is known on the device alone: shapes do not depend on it, and what is left over is a group of its own.
    """
    counts = targets.valid.sum(1)  # objects stand first
    most = counts.amax()
    divisor = most.clamp(min=1)
    groups = (pairs // divisor).clamp(min=1)
    number = torch.arange(draws.change.shape[1], device=counts.device)
    group = torch.minimum(number // (2 * divisor), groups)
    place = number % (2 * divisor)
    little, used = place < most, (number < 2 * most * groups).expand_as(draws.change)
    matched = (place % divisor).expand_as(draws.labels)
    real = used & (matched < counts[:, None])

    labels = targets.labels.gather(1, matched)
    labels = torch.where(draws.change < label_noise / 2, draws.labels, labels)
    known = targets.boxes.gather(1, matched[..., None].expand(-1, -1, 4)) / scale
    half = (known[..., 2:] - known[..., :2]).repeat(1, 1, 2) / 2
    moved = draws.sign * (draws.part + torch.where(little, 0.0, 1.0)[:, None])
    boxes = cxcywh((known + moved * half * box_noise).clamp(0, 1))
    positive = real & little
    return Denoising(labels, boxes, real, Matches(torch.where(positive, matched, 0), positive, used & ~positive), group)


def blocked(group: Tensor, queries: int) -> Tensor:
    """bool [K + Q, K + Q], row sees not column: noisy queries do not see other groups, and the others not the noisy."""
    every = torch.cat([group, group.new_full((queries,), -1)])
    return (every[:, None] != every) & (every >= 0)
