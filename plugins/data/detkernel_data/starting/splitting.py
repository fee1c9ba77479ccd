"""Training and validation images where nothing says which are which: drawn from a seed, whole groups together."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_ROBOFLOW = re.compile(r"(.+?)[._](?:jpe?g|png|bmp|webp|tiff?)\.rf\.[0-9a-zA-Z]+$", re.IGNORECASE)
_NUMBERED = re.compile(r"(.*?)[-_ .(]*(?:frame|img|image|slice|tile|crop|f|t|z)?[-_ .(]*[0-9]+\)?$", re.IGNORECASE)
_FEWEST = 5
"""Groups that are worth splitting by."""
_LARGEST = 0.4
"""Share of the images that a group may have: beyond it, the part before the number is what all files begin with."""


class Split(NamedTuple):
    """Positions of the images."""

    train: list[int]
    val: list[int]
    how: str
    """By what they were drawn, for people."""


def split(ids: Sequence[str], labels: Sequence[NDArray[np.int64]], share: float, seed: int) -> Split:
    """Draw the validation images. Images of one group (of a video, a patient, a Roboflow original) stay together,
    and no class loses its last training images to validation."""
    keys, how = groups_of(ids)
    train, val = _draw(keys, labels, share, seed)
    if len(val) < max(1, share * len(ids) / 4) and len(set(keys)) < len(ids):
        keys, how = [str(number) for number in range(len(ids))], "image by image"
        train, val = _draw(keys, labels, share, seed)
    return Split(train, val, how)


def groups_of(ids: Sequence[str]) -> tuple[list[str], str]:
    """The group of each image, and what the groups are."""
    stems = [os.path.splitext(name)[0] if os.path.splitext(name)[1].lower() in _SUFFIXES else name for name in ids]  # noqa: PTH122
    originals = [match[1] if (match := _ROBOFLOW.fullmatch(stem)) else stem for stem in stems]
    prefixes = [match[1] if (match := _NUMBERED.fullmatch(stem)) else stem for stem in originals]
    counts: dict[str, int] = {}
    for prefix in prefixes:
        counts[prefix] = counts.get(prefix, 0) + 1
    whole = _FEWEST <= len(counts) <= len(ids) / 2 and max(counts.values()) <= _LARGEST * len(ids)
    if whole:
        example = max(counts, key=lambda prefix: counts[prefix])
        return prefixes, f"by the names' {len(counts)} groups, such as '{example}' ({counts[example]} images)"
    if len(set(originals)) < len(ids):
        return originals, f"by the {len(set(originals))} images that Roboflow made these from"
    return list(originals), "image by image"


_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def _draw(
    keys: Sequence[str], labels: Sequence[NDArray[np.int64]], share: float, seed: int
) -> tuple[list[int], list[int]]:
    members: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        members.setdefault(key, []).append(number)
    classes = 1 + max((int(own.max()) for own in labels if len(own)), default=0)
    left = np.zeros(classes, dtype=np.int64)
    for own in labels:
        left += np.bincount(own, minlength=classes) > 0
    wanted = max(1, round(share * len(keys)))
    val: list[int] = []
    names = list(members)
    for position in np.random.default_rng(seed).permutation(len(names)).tolist():
        group = members[names[position]]
        taken = sum((np.bincount(labels[number], minlength=classes) > 0).astype(np.int64) for number in group)
        fits = len(val) + len(group) <= max(wanted * 1.25, 1) and len(val) + len(group) < len(keys)
        if fits and not ((taken > 0) & (left - taken < 1)).any():
            val += group
            left -= taken
        if len(val) >= wanted:
            break
    chosen = set(val)
    return [number for number in range(len(keys)) if number not in chosen], sorted(chosen)
