"""Where a detector errs: kinds of mistakes and what each costs, classes taken for others, the best and worst images.

The kinds are those of TIDE (Bolya et al. 2020, "TIDE: A General Toolbox for Identifying Object Detection Errors"), at
an overlap of 0.5; a detection below 0.1 is of the background.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import attrs
import numpy as np
from numpy.typing import NDArray

from detkernel_report.metrics import Matches, average_precision, counted_detections, mean
from detkernel_report.results import Bools, Floats, ImageResult, Labels, Results, iou

FOUND, NEAR = 0.5, 0.1

Kind = Literal["right", "ignored", "class", "location", "both", "duplicate", "background"]
KINDS: Mapping[str, str] = {
    "class": "right place, wrong class",
    "location": "right class, box too far off (overlap 0.1 to 0.5)",
    "both": "wrong class and box too far off",
    "duplicate": "an object that was found already",
    "background": "nothing is annotated there",
    "missed": "an object without a detection",
}


@attrs.frozen(eq=False)
class Mistakes:
    """Every detection by what is wrong with it, and the missed objects."""

    kinds: Sequence[Kind]
    """[D] in the order of `Matches`."""
    other: Labels
    """[D] of a class or location mistake: the object of its image that was meant; else -1."""
    missed: Sequence[tuple[int, int]]
    """(image, object), both as positions: those that no detection hit, and that no class or location mistake meant."""
    cost: Mapping[str, float]
    """What AP at 0.5 would gain if no mistake of a kind were made, 0..1."""
    ap: float
    """AP at 0.5, the mean of the classes."""

    def only(self, matches: Matches, kind: str) -> dict[tuple[int, int], int]:
        """(image, object) of those that were found by a mistake of a kind alone, and its label, of the best one."""
        hit = _hit(matches)
        found: dict[tuple[int, int], int] = {}
        for at in (one for one, made in enumerate(self.kinds) if made == kind):
            aim = (int(matches.image[at]), int(self.other[at]))
            if aim not in hit:
                found.setdefault(aim, int(matches.label[at]))
        return found


def find_mistakes(results: Results, matches: Matches) -> Mistakes:
    """Sort what went wrong, and see what each kind costs. `matches`: with a first threshold of 0.5 and all sizes."""
    kinds: list[Kind] = []
    other = np.full(len(matches.label), -1)
    missed: list[tuple[int, int]] = []
    for at, image in enumerate(results.images):
        mine = np.flatnonzero(matches.image == at)
        made, meant = _of_image(image, matches, mine)
        kinds += made
        other[mine] = meant
        hit = matches.truth[mine]
        seen = {*hit[hit >= 0].tolist(), *meant[meant >= 0].tolist()}
        missed += [(at, number) for number in np.flatnonzero(~image.ignore).tolist() if number not in seen]
    return Mistakes(kinds, other, missed, *_costs(results, matches, kinds, other, missed))


def _of_image(image: ImageResult, matches: Matches, mine: Labels) -> tuple[list[Kind], Labels]:
    """The kind of each detection of an image, and which object it meant."""
    labels = matches.label[mine]
    overlap = image.iou()[counted_detections(image)] * ~image.ignore[None]
    same = labels[:, None] == image.labels[None]
    right, wrong = _most(np.where(same, overlap, 0.0)), _most(np.where(same, 0.0, overlap))
    hit, ignored = matches.hit[0, 0, mine], matches.ignored[0, 0, mine]
    rules: list[tuple[Bools, Kind]] = [
        (ignored, "ignored"), (hit, "right"), (right[0] >= FOUND, "duplicate"), (right[0] >= NEAR, "location"),
        (wrong[0] >= FOUND, "class"), (wrong[0] >= NEAR, "both"),
    ]  # fmt: skip
    names: list[Kind] = [*(kind for _, kind in rules), "background"]
    which = np.select([rule for rule, _ in rules], list(range(len(rules))), len(rules))
    meant = np.where(which == names.index("location"), right[1], np.where(which == names.index("class"), wrong[1], -1))
    return [names[place] for place in which.tolist()], meant


def _most(overlap: Floats) -> tuple[Floats, Labels]:
    """The greatest overlap of each row, and where it is; 0 where there is no column."""
    if not overlap.shape[1]:
        return np.zeros(len(overlap)), np.full(len(overlap), -1)
    return overlap.max(1), overlap.argmax(1)


def _costs(
    results: Results, matches: Matches, kinds: Sequence[Kind], other: Labels, missed: Sequence[tuple[int, int]]
) -> tuple[dict[str, float], float]:
    """Repair one kind after the other, each for itself, and see what AP at 0.5 becomes."""
    kind = np.array(kinds, dtype=object)
    counted = ~matches.ignored[0, 0]
    hit, label, positives = matches.hit[0, 0], matches.label, matches.positives[0]
    before = _mean_ap(hit, label, matches.score, counted, positives)
    costs = {}
    for name in KINDS:
        if name == "missed":
            lost = np.bincount([results.images[at].labels[number] for at, number in missed], minlength=len(positives))
            after = _mean_ap(hit, label, matches.score, counted, positives - lost)
        elif name in ("class", "location"):
            repaired, labels = _repaired(results, matches, kind == name, other)
            after = _mean_ap(hit | repaired, labels, matches.score, counted & ((kind != name) | repaired), positives)
        else:
            after = _mean_ap(hit, label, matches.score, counted & (kind != name), positives)
        costs[name] = 0.0 if math.isnan(after) or math.isnan(before) else max(after - before, 0.0)
    return costs, before


def _repaired(results: Results, matches: Matches, chosen: Bools, other: Labels) -> tuple[Bools, Labels]:
    """Which detections become right once they are what they meant to be: the best one of each object that no other
    detection hit; the others would be duplicates, and vanish. And the labels that they then have."""
    repaired, labels = np.zeros(len(chosen), bool), matches.label.copy()
    taken = _hit(matches)
    for at in np.flatnonzero(chosen)[np.argsort(-matches.score[chosen], kind="stable")].tolist():
        aim = (int(matches.image[at]), int(other[at]))
        if aim not in taken:
            taken.add(aim)
            repaired[at] = True
            labels[at] = results.images[aim[0]].labels[aim[1]]
    return repaired, labels


def _hit(matches: Matches) -> set[tuple[int, int]]:
    """(image, object) of every object that was found."""
    hit = matches.truth >= 0
    return set(zip(matches.image[hit].tolist(), matches.truth[hit].tolist(), strict=True))


def _mean_ap(hit: Bools, label: Labels, score: Floats, counted: Bools, positives: NDArray[np.int64]) -> float:
    values = []
    for number, many in enumerate(positives.tolist()):
        mine = counted & (label == number)
        values.append(average_precision(hit[mine], score[mine], many))
    return mean(np.array(values))


@attrs.frozen(eq=False)
class Confusion:
    """Objects by class (rows) and what they were taken for (columns) at a score threshold; the last row and column are
    the background: invented and missed."""

    counts: NDArray[np.int64]
    """[K + 1, K + 1]"""
    score: float


def confusion(results: Results, score: float) -> Confusion:
    """Pairs by falling overlap of at least 0.5, whatever their classes; each object and detection in one pair."""
    many = len(results.classes)
    counts = np.zeros((many + 1, many + 1), np.int64)
    for image in results.images:
        strong = image.scores >= score
        labels = image.found_labels[strong]
        overlap = iou(image.found_boxes[strong], image.boxes)
        free_found, free_truth = np.ones(len(labels), bool), np.ones(len(image.labels), bool)
        # a pair of one class goes before another of the same overlap
        same = labels[:, None] == image.labels[None]
        order = np.lexsort((~same.ravel(), -overlap.ravel()))
        for place in order[overlap.ravel()[order] >= FOUND].tolist():
            row, column = divmod(place, len(image.labels))
            if free_found[row] and free_truth[column]:
                free_found[row] = free_truth[column] = False
                if not image.ignore[column]:
                    counts[image.labels[column], labels[row]] += 1
        counts[many] += np.bincount(labels[free_found], minlength=many + 1)
        counts[:, many] += np.bincount(image.labels[free_truth & ~image.ignore], minlength=many + 1)
    return Confusion(counts, score)


@attrs.frozen(eq=False)
class ImageScore:
    """How well an image was done at a score threshold."""

    at: int
    """A position in `Results.images`."""
    right: int
    wrong: int
    missed: int

    @property
    def f1(self) -> float:
        """1 where there was nothing to find and nothing was found."""
        errors = self.wrong + self.missed
        return 2 * self.right / (2 * self.right + errors) if self.right or errors else 1.0


def image_scores(results: Results, matches: Matches, score: float) -> list[ImageScore]:
    """Each image at a score threshold, worst first: by F1, and of equals the one with more mistakes first."""
    strong = (matches.score >= score) & ~matches.ignored[0, 0]
    many = len(results.images)
    right = np.bincount(matches.image[strong & matches.hit[0, 0]], minlength=many)
    wrong = np.bincount(matches.image[strong & ~matches.hit[0, 0]], minlength=many)
    found = [
        ImageScore(at, int(right[at]), int(wrong[at]), int((~image.ignore).sum()) - int(right[at]))
        for at, image in enumerate(results.images)
    ]
    return sorted(found, key=lambda one: (one.f1, -(one.wrong + one.missed) if one.f1 < 1 else one.right))


def chosen(scores: Sequence[ImageScore], count: int) -> tuple[list[ImageScore], list[ImageScore]]:
    """The worst images, two thirds of `count`, and the best; best first. None is both, and none of the worst is
    without a mistake."""
    worst = [one for one in scores if one.f1 < 1][: -(-2 * count // 3)]
    best = [one for one in reversed(scores) if one not in worst][: count // 3]
    return worst, best
