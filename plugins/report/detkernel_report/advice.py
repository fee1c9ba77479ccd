"""What to do next: what a run's numbers say should be improved, the most promising first, each with its evidence.

The gain of a mistake is what AP at an overlap of 0.5 would be more if none of its kind were made (see `mistakes`); that
of a longer training is what the last validation gained on the one before. These are upper bounds, or guesses; they are
there to rank.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import numpy as np

from detkernel_report.analysis import Analysis, at, numbers, primary
from detkernel_report.metrics import mean
from detkernel_report.results import iou
from detkernel_report.run_folder import RunFolder

WORTH = 0.005
"""Half a point of AP: less is not mentioned."""
SMALL = 32.0
"""Pixels of an object's side, as the network sees it, below which detectors have a hard time: COCO's small objects."""
FEW = 100
"""Objects of a class to train on that are few."""


@attrs.frozen
class Advice:
    title: str
    evidence: str
    action: str
    gain: float
    """What AP might gain, 0..1; 0 where it is not AP that gains."""
    urgent: bool = False
    """Whether the rest means little before this is settled."""


def advise(run: RunFolder, analysis: Analysis | None) -> list[Advice]:
    """Most important first."""
    found = [*_run(run), *_training(run), *_data(run), *_speed(run)]
    if analysis is not None and analysis.matches.positives[0].sum():
        found += [*_missed(run, analysis), *_mistakes(run, analysis), *_classes(run, analysis)]
    return sorted(found, key=lambda one: (not one.urgent, -one.gain))


def _run(run: RunFolder) -> Iterator[Advice]:
    if run.run.get("state") == "failed":
        yield Advice(
            "The run failed", str(run.run.get("reason") or "log.txt has the message"),
            "Settle that first; the same command then goes on from the last checkpoint", 0, urgent=True,
        )  # fmt: skip
    loss = numbers(run, "loss")
    if any(math.isnan(value) for _, value in loss):
        step = next(step for step, value in loss if math.isnan(value))
        yield Advice(
            "The loss was not a number", f"first in the line of iteration {step}",
            "Lower optimizer.lr, or lengthen schedule.warmup; with 16-bit precision, set optimizer.precision to bf16",
            0, urgent=True,
        )  # fmt: skip
    if primary(run) is None and run.config:
        yield Advice(
            "Nothing was measured", "the run has no validation, so nobody knows how good the detector is",
            "Set run.validate (such as 'every 1 epoch'), data.val, and `evaluation: {use: coco_map}`", 0, urgent=True,
        )  # fmt: skip


def _training(run: RunFolder) -> Iterator[Advice]:
    metric = primary(run)
    history = [pair for pair in metric.history if not math.isnan(pair[1])] if metric else []
    if metric is None or metric.best is None or len(history) < 2:
        return
    sign = 1 if metric.better == "higher" else -1
    (before, last), (step, best) = history[-2:], metric.best
    rise, fall = sign * (last[1] - before[1]), sign * (best - last[1])
    until = at(run.config, "run", "until")
    if step == last[0] and rise > WORTH and run.run.get("state", "complete") != "running":
        yield Advice(
            "Train longer",
            f"{metric.name} still rose in the last validation, from {before[1]:.3f} at iteration {before[0]} to "
            f"{last[1]:.3f} at {last[0]}, which is its best",
            f"Raise run.until (now {until})", rise,
        )  # fmt: skip
    elif fall > 2 * WORTH:
        yield Advice(
            "The detector has become worse again",
            f"{metric.name} was {best:.3f} at iteration {step} and is {last[1]:.3f} at {last[0]}: it learns the "
            "training images by heart",
            f"Use the checkpoint of iteration {step} (checkpoint.best keeps it); then add augmentation "
            "(data.train_transforms) or data, or end sooner with `early_stopping`", fall,
        )  # fmt: skip


def _data(run: RunFolder) -> Iterator[Advice]:
    transforms = at(run.config, "data", "train_transforms")
    names = [one if isinstance(one, str) else at(one, "use") for one in transforms] if transforms is not None else None
    if names is not None and not {str(name) for name in names} - {"resize", "pad", "normalize"}:
        yield Advice(
            "The training images are always the same",
            f"data.train_transforms has {', '.join(map(str, names)) or 'nothing'}, and nothing that varies them",
            "Add `flip`, `color` and a crop that suit what the images show", 0,
        )  # fmt: skip
    for line in run.data:
        findings = line.get("findings") or []
        for one in findings:
            what, split = str(at(one, "what") or ""), str(at(one, "split") or "")
            if what.startswith("identical images in ") and "train and " in split:
                yield Advice(
                    "Images that are validated on are in the training data", f"{what}, {at(one, 'count')} of them",
                    "Keep copies in one split (`subset` takes chosen images); till then, the metrics say too much",
                    0, urgent=True,
                )  # fmt: skip
        own = [one for one in findings if at(one, "split") in (None, "", "train")]
        if line.get("split") == "train" and own:
            yield Advice(
                f"The training data has {len(own)} finding{'s' * (len(own) > 1)}",
                str(at(own, 0, "text")),
                "Look through them below, and repair the annotations or say with an option what is meant", 0,
            )  # fmt: skip


def _speed(run: RunFolder) -> Iterator[Advice]:
    times, waits = (_late(numbers(run, name)) for name in ("time", "data_time"))
    if times and waits and mean(np.array(waits)) > 0.25 * mean(np.array(times)):
        share = mean(np.array(waits)) / mean(np.array(times))
        yield Advice(
            "Training waits for its data",
            f"{share:.0%} of an iteration's {mean(np.array(times)):.3f} s is spent waiting for the batch",
            f"Raise data.workers (now {at(run.config, 'data', 'workers') or 'one a core'}), or store smaller images; "
            "`detkernel profile` says what the loader could give", 0,
        )  # fmt: skip


def _late(pairs: Sequence[tuple[int, float]]) -> list[float]:
    """Values without the first tenth, in which caches are cold."""
    return [value for _, value in pairs[len(pairs) // 10 :] if not math.isnan(value)]


def _missed(run: RunFolder, analysis: Analysis) -> Iterator[Advice]:
    results, gain = analysis.results, analysis.mistakes.cost["missed"]
    missed = [(results.images[image], number) for image, number in analysis.mistakes.missed]
    if gain < WORTH or not missed:
        return
    total = int(analysis.matches.positives[0].sum())
    sides = np.array([image.area[number] ** 0.5 * results.scale for image, number in missed])
    small = float((sides < SMALL).mean())
    crowded = sum(_overlapped(image, number) for image, number in missed) / len(missed)
    names = Counter(results.classes[int(image.labels[number])] for image, number in missed).most_common(3)
    listed = ", ".join(f"{count} {name}" for name, count in names)
    evidence = f"{len(missed)} of {total} objects have no detection ({listed})"
    if crowded > 0.3:
        yield Advice(
            "Objects that overlap are taken for one",
            f"{evidence}; {crowded:.0%} of them overlap another of their class by more than a third",
            f"Raise the model's nms_thresh (now {_option(run, 'nms_thresh')}), or take a detector without NMS, such as "
            "rtdetr", gain,
        )  # fmt: skip
    elif small > 0.5:
        yield Advice(
            "Small objects are missed",
            f"{evidence}; {small:.0%} of them are smaller than {SMALL:.0f} pixels where the network sees them (images "
            f"are scaled by {results.scale:.2g})",
            "Train and validate on larger images (`resize` in data.train_transforms and val_transforms), or crops of "
            "them, and keep a feature map of stride 8 or 4", gain,
        )  # fmt: skip
    else:
        yield Advice(
            "Objects are missed",
            f"{evidence}; their median side is {np.median(sides):.0f} pixels where the network sees them",
            "Look at the worst images below. Train longer, take a stronger backbone or pretrained weights, and add "
            "images like these", gain,
        )  # fmt: skip


def _overlapped(image: Any, number: int) -> bool:
    overlap = iou(image.boxes[number : number + 1], image.boxes)[0]
    same = image.labels == image.labels[number]
    same[number] = False
    return bool((overlap[same] > 1 / 3).any())


def _option(run: RunFolder, name: str) -> Any:
    """An option of the model, wherever it stands in it."""

    def search(values: Any) -> Any:
        if isinstance(values, dict):
            for key, value in values.items():
                found = value if key == name else search(value)
                if found is not None:
                    return found
        return None

    found = search(at(run.config, "model"))
    return "its default" if found is None else found


def _mistakes(run: RunFolder, analysis: Analysis) -> Iterator[Advice]:
    cost, kinds = analysis.mistakes.cost, np.array(analysis.mistakes.kinds, dtype=object)
    strong = analysis.matches.score >= analysis.score
    counts = {
        kind: f"{int((kinds == kind).sum())} detections ({int(((kinds == kind) & strong).sum())} of them with a score "
        f"of at least {analysis.score:.2f})"
        for kind in cost
    }
    total = int(analysis.matches.positives[0].sum())
    only = analysis.mistakes.only(analysis.matches, "location")
    if cost["location"] >= WORTH:
        low, high = analysis.ap(threshold=0), analysis.ap(threshold=5)
        yield Advice(
            "Boxes are not exact",
            f"{len(only)} of {total} objects are found by boxes alone that overlap them by less than half; "
            f"AP is {low:.3f} at an overlap of 0.5 and {high:.3f} at 0.75",
            "Train longer with a learning rate that falls to nothing, on larger images, or with a detector that "
            "refines its boxes (cascade_rcnn, rtdetr); and see below whether the annotated boxes are exact themselves",
            cost["location"],
        )  # fmt: skip
    if cost["class"] >= WORTH:
        yield Advice(
            "Classes are taken for one another",
            f"{counts['class']} are at the right place with a wrong class"
            f"{_confused(analysis, kinds == 'class', strong)}",
            "Look whether the annotations tell these classes apart; then add images of them, and augment less of what "
            "tells them apart (colour, say)", cost["class"],
        )  # fmt: skip
    if cost["duplicate"] >= WORTH:
        yield Advice(
            "One object is found several times",
            f"{counts['duplicate']} are of an object found already",
            f"Lower the model's nms_thresh (now {_option(run, 'nms_thresh')})", cost["duplicate"],
        )  # fmt: skip
    if cost["background"] >= WORTH:
        label, where = _most_invented(analysis, (kinds == "background") & strong)
        yield Advice(
            "Things are found that nobody annotated",
            f"{counts['background']} lie where nothing is annotated{label}{where}",
            "Look at the worst images below: where objects are there and were not annotated, complete the annotations; "
            "where not, add images without objects and train on them (data.skip_empty: false)", cost["background"],
        )  # fmt: skip


def _confused(analysis: Analysis, chosen: Any, strong: Any) -> str:
    """Which classes are taken for which, by the detections that count most."""
    names, images = analysis.results.classes, analysis.results.images
    chosen = chosen & strong if (chosen & strong).any() else chosen
    pairs = Counter(
        (
            int(images[int(analysis.matches.image[at])].labels[analysis.mistakes.other[at]]),
            int(analysis.matches.label[at]),
        )
        for at in np.flatnonzero(chosen)
    )
    listed = [f"{names[truth]} as {names[label]}: {many}" for (truth, label), many in pairs.most_common(3)]
    return f" ({', '.join(listed)})" if listed else ""


def _most_invented(analysis: Analysis, chosen: Any) -> tuple[str, str]:
    """Which class is invented most, and in which image, in words."""
    labels = Counter(analysis.matches.label[chosen].tolist()).most_common(1)
    images = Counter(analysis.matches.image[chosen].tolist()).most_common(1)
    if not labels:
        return "", ""
    name = analysis.results.images[images[0][0]].path.rpartition("/")[2]
    return f", {labels[0][1]} of them as {analysis.results.classes[labels[0][0]]}", f"; {name} alone has {images[0][1]}"


def _classes(run: RunFolder, analysis: Analysis) -> Iterator[Advice]:
    """The class that is behind the others, where it has few objects to learn from."""
    names = analysis.results.classes
    values = np.array([analysis.ap(label) for label in range(len(names))])
    train: Any = next((line for line in run.data if line.get("split") == "train"), None)
    known = np.flatnonzero(~np.isnan(values))
    if len(known) < 2 or train is None:
        return
    worst = int(known[values[known].argmin()])
    others = mean(np.delete(values, worst))
    objects = {name: at(train, "classes", name, 0) for name in names}
    many = [count for name, count in objects.items() if name != names[worst] and type(count) is int]
    mine = objects[names[worst]]
    if type(mine) is not int or not many or others - values[worst] < 0.05:
        return
    few = mine < FEW or mine < 0.2 * float(np.median(many))
    side, rest = (_median_side(analysis, worst, same) for same in (True, False))
    small = side < SMALL and side < 0.7 * rest
    title, action = "", []
    evidence = [f"its AP is {values[worst]:.3f}, that of the other classes {others:.3f} on average"]
    if few:
        title = f"Too little of {names[worst]}" + small * ", which is small"
        evidence.append(f"it has {mine} objects to train on, the others {np.median(many):.0f} (median)")
        action.append("Add images of it; until then, show it more often with `data.sampler: {use: class_balanced}`")
    if small:
        title = title or f"{names[worst]} is small"
        evidence.append(
            f"the median side of its objects is {side:.0f} pixels where the network sees them, of the others "
            f"{rest:.0f} (images are scaled by {analysis.results.scale:.2g})"
        )
        action.append("Train and validate on larger images (`resize` in data.train_transforms and val_transforms)")
    if action:
        gain = (others - float(values[worst])) / len(known)
        yield Advice(title, "; ".join(evidence), ". ".join(reversed(action)), gain)


def _median_side(analysis: Analysis, label: int, same: bool) -> float:
    """Pixels where the network sees them: the root of the median area of a class's objects, or of the others'."""
    areas = np.concatenate([image.area[(image.labels == label) == same] for image in analysis.results.images])
    return float(np.median(areas) ** 0.5 * analysis.results.scale) if len(areas) else math.nan
