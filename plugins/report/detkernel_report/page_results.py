"""The sections of a validation set: average precision, curves, classes, mistakes, images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from detkernel_report import mistakes
from detkernel_report.analysis import Analysis
from detkernel_report.charts import Series, chart
from detkernel_report.html import bar, cut, html, joined, jpeg_source, number, paragraph, table
from detkernel_report.metrics import RECALLS, SIZES, THRESHOLDS, mean
from detkernel_report.results import ImageResult
from detkernel_report.run_folder import RunFolder

CLASSES = 24
"""Of a confusion matrix; of more classes, those that are confused most."""
LINES = 12
"""Classes whose precision is drawn at first."""
FEW = 5
"""Mistakes of an image up to which their kinds are written beside them; else a pointer over a box says it."""
LABELS = 14
"""Boxes of an image up to which each has its label; of more, only those with a mistake."""


def sections(run: RunFolder, analysis: Analysis, *, alone: bool) -> tuple[str, str, list[Markup]]:
    results = analysis.results
    title = "How good it is" if alone else f"How good it is on {results.name}"
    if not analysis.matches.positives[0].sum():
        text = f"The {len(results.images)} images of {results.name} have no annotations: there is nothing to measure."
        return f"set-{results.name}", title, [paragraph(text, "none")]
    parts = [
        html(
            '<p class="dim">Boxes of {} images of {}{}, by the rules of COCO.{}</p>',
            f"{len(results.images):,}", results.name,
            f" behind iteration {results.iteration}" if results.iteration else "",
            f" {results.invalid} detections that are not finite were left out." if results.invalid else "",
        ),
        _heading("Average precision"), _by_class(analysis),
        html('<div class="grid">{}{}</div>', _by_overlap(analysis), _precision(analysis)),
        _heading("Where the mistakes come from"), _mistakes(analysis),
        _heading("Confusion matrix"), _confusion(analysis),
        _heading("Worst and best images"), *_images(run, analysis),
    ]  # fmt: skip
    return f"set-{results.name}", title, parts


def _heading(text: str) -> Markup:
    return html("<h3>{}</h3>", text)


def _by_class(analysis: Analysis) -> Markup:
    """AP by class, size and overlap, and what the best threshold gives."""
    columns = ["class", "objects", "AP", "AP50", "AP75", *(f"AP {size}" for size in list(SIZES)[1:])]
    columns += ["best score", "precision", "recall"]
    labels: list[int | None] = [None, *range(len(analysis.results.classes))]
    rows = []
    for label in labels:
        best = analysis.best if label is None else analysis.best_of_class[label]
        positives = analysis.matches.positives[0]
        objects = positives.sum() if label is None else positives[label]
        rows.append([
            html("<b>all</b>") if label is None else cut(analysis.results.classes[label]), f"{objects:,}",
            *(number(analysis.ap(label, threshold)) for threshold in (None, 0, 5)),
            *(number(analysis.ap(label, None, size)) for size in range(1, len(SIZES))),
            number(best.score, 2), number(best.precision, 2), number(best.recall, 2),
        ])  # fmt: skip
    small, large = (int(math.sqrt(SIZES["medium"][side])) for side in (0, 1))
    note = (
        f"Small is below {small} x {small} pixels of the file, large above {large} x {large}. The best score is the "
        "threshold of the greatest F1, precision and recall are those at it."
    )
    return joined([table("Average precision by class", columns, rows), paragraph(note, "dim")])


def _by_overlap(analysis: Analysis) -> Markup:
    series = [
        Series(size, [(float(at), analysis.ap(None, number, place)) for number, at in enumerate(THRESHOLDS)])
        for place, size in enumerate(SIZES)
    ]
    return chart("AP by overlap and size", series, x="overlap (IoU)", x_range=(0.5, 0.95), last=False)


def _precision(analysis: Analysis) -> Markup:
    """Precision over recall at an overlap of 0.5; the classes with most objects are drawn at first."""
    precision, positives = analysis.curves.precision[0, 0], analysis.matches.positives[0]
    rank = {label: at for at, label in enumerate(np.argsort(-positives, kind="stable").tolist())}
    series = [Series("all", [(float(x), mean(precision[:, at])) for at, x in enumerate(RECALLS)])]
    series += [
        Series(
            name, [(float(x), float(y)) for x, y in zip(RECALLS, precision[label], strict=True)], rank[label] < LINES
        )
        for label, name in enumerate(analysis.results.classes)
        if positives[label]
    ]
    title, whole = "Precision over recall at an overlap of 0.5", (0.0, 1.0)
    return chart(title, series, x="recall", y_range=whole, x_range=whole, last=False)


def _mistakes(analysis: Analysis) -> Markup:
    made, strong = analysis.mistakes, analysis.matches.score >= analysis.score
    kinds = np.array(made.kinds, dtype=object)
    most = max(*made.cost.values(), 1e-9)
    rows = []
    for kind, meaning in sorted(mistakes.KINDS.items(), key=lambda item: -made.cost[item[0]]):
        many = len(made.missed) if kind == "missed" else int((kinds == kind).sum())
        few = "–" if kind == "missed" else f"{int(((kinds == kind) & strong).sum()):,}"
        cost = made.cost[kind]
        rows.append(
            [html("{}<small>{}</small>", kind, meaning), f"{many:,}", few, f"{100 * cost:.1f}", bar(cost / most)]
        )
    caption = f"Mistakes at an overlap of 0.5, where AP is {number(made.ap)}"
    columns = ["kind", "all", f"score ≥ {analysis.score:.2f}", "cost, points of AP", ""]
    note = html(
        '<p class="dim">The cost is what AP at an overlap of 0.5 would gain if no mistake of that kind were made '
        "(TIDE, Bolya et al. 2020). Most mistakes have a low score, and cost little.</p>"
    )
    return joined([table(caption, columns, rows), note])


def _confusion(analysis: Analysis) -> Markup:
    names, counts = list(analysis.results.classes), analysis.confusion.counts
    shown = list(range(len(names)))
    if len(names) > CLASSES:
        off = counts[:-1, :-1].copy()
        np.fill_diagonal(off, 0)
        shown = sorted(np.argsort(-(off.sum(0) + off.sum(1)), kind="stable")[:CLASSES].tolist())
    places = [*shown, len(names)]
    head = joined(html('<th scope="col">{}</th>', _or(names, at, "missed")) for at in places)
    body = joined(
        html(
            '<tr><th scope="row">{}</th>{}</tr>',
            _or(names, row, "background"),
            joined(_cell(counts, row, column) for column in places),
        )
        for row in places
    )
    caption = (
        f"Rows: what is annotated; columns: what was found with a score of at least {analysis.score:.2f} and an "
        f"overlap of at least 0.5{f'; the {CLASSES} classes that are confused most' if len(names) > CLASSES else ''}"
    )
    return html(
        '<div class="scroll" role="region" aria-label="Confusion matrix" tabindex="0"><table class="matrix"><caption>'
        '<span>{}</span></caption><thead><tr><th scope="col">annotated \\ found</th>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>",
        caption, head, body,
    )  # fmt: skip


def _or(names: Sequence[str], place: int, last: str) -> str:
    """The name at a place, or what stands behind the last one."""
    return last if place == len(names) else cut(names[place], 24)


def _cell(counts: Any, row: int, column: int) -> Markup:
    many = int(counts[row, column])
    last = len(counts) - 1
    if row == column == last:
        return Markup("<td></td>")
    share = many / max(int(counts[row].sum() if row < last else counts[:, column].sum()), 1)
    step = math.ceil(4 * share) if many else 0
    look = f"{'h' if row == column else 'w'}{step}" if step else ""
    return html('<td class="{}">{}</td>', look, f"{many:,}")


def _images(run: RunFolder, analysis: Analysis) -> Iterator[Markup]:
    results = analysis.results
    kept = [one for one in analysis.images if (results.name, results.images[one.at].index) in run.images]
    if not kept:
        yield paragraph("No images were kept (`report.images` says how many are).", "none")
        return
    yield html(
        '<p class="dim">Left, what is annotated; right, what was found with a score of at least {}.'
        '<span class="key right"></span>right<span class="key wrong"></span>wrong<span class="key missed"></span>missed'
        '<span class="key other"></span>does not count</p>',
        f"{analysis.score:.2f}",
    )
    figures = joined(_figure(run, analysis, one) for one in kept)
    yield html('<div class="images">{}</div>', figures)


def _figure(run: RunFolder, analysis: Analysis, one: mistakes.ImageScore) -> Markup:
    results = analysis.results
    image = results.images[one.at]
    name = Markup(f"i-{hashlib.sha256(results.name.encode()).hexdigest()[:8]}-{image.index}")
    mine = np.flatnonzero(analysis.matches.image == one.at)
    mine = mine[analysis.matches.score[mine] >= analysis.score]
    truth, found = _truth(analysis, image, mine), _found(analysis, one.at, mine)
    drawn = html(
        '<svg class="hidden" aria-hidden="true"><defs><image id="{}" href="{}" width="{}" height="{}" '
        'preserveAspectRatio="none"/></defs></svg>',
        name, jpeg_source(run.images[results.name, image.index]), image.width, image.height,
    )  # fmt: skip
    missed = sum(verdict == "missed" for _, _, verdict, _ in truth)
    return html(
        "<figure><figcaption><b>{}</b>: {} right, {} wrong, {} missed</figcaption>{}"
        '<div class="pair"><div><span>annotated</span>{}</div><div><span>found</span>{}</div></div></figure>',
        image.path.rpartition("/")[2], one.right, one.wrong, one.missed, drawn,
        _drawn(name, image, truth, f"Annotated: {len(truth)} objects, {missed} of them missed"),
        _drawn(name, image, found, f"Found: {one.right} right and {one.wrong} wrong detections"),
    )  # fmt: skip


Box = tuple[Sequence[float], str, str, str]
"""xyxy, a label, "right", "wrong", "missed" or "other", and what a pointer over it says."""


def _truth(analysis: Analysis, image: ImageResult, mine: Any) -> list[Box]:
    hit = set(analysis.matches.truth[mine].tolist())
    verdicts = ["other" if ignored else "right" if at in hit else "missed" for at, ignored in enumerate(image.ignore)]
    names = [cut(analysis.results.classes[label], 24) for label in image.labels.tolist()]
    said = [f"{name}: {verdict}" for name, verdict in zip(names, verdicts, strict=True)]
    return list(zip(image.boxes.tolist(), names, verdicts, said, strict=True))


def _found(analysis: Analysis, at: int, mine: Any) -> list[Box]:
    from detkernel_report.metrics import counted_detections

    image = analysis.results.images[at]
    boxes = image.found_boxes[counted_detections(image)]
    first = int(np.searchsorted(analysis.matches.image, at))
    found = []
    few = sum(analysis.mistakes.kinds[one] not in ("right", "ignored") for one in mine.tolist()) <= FEW
    for number_ in mine.tolist():
        kind = analysis.mistakes.kinds[number_]
        verdict = {"right": "right", "ignored": "other"}.get(kind, "wrong")
        name = cut(analysis.results.classes[int(analysis.matches.label[number_])], 24)
        text = f"{name} {analysis.matches.score[number_]:.2f}" + (f", {kind}" if verdict == "wrong" and few else "")
        found.append((boxes[number_ - first].tolist(), text, verdict, f"{name}: {kind}"))
    return found


def _drawn(name: Markup, image: ImageResult, boxes: Sequence[Box], said: str) -> Markup:
    """An image with boxes over it; the ones without a mistake first, so that the others lie on top."""
    size = max(image.width, image.height) / 26
    ordered = sorted(boxes, key=lambda box: box[2] in ("wrong", "missed"))
    labelled = [box for box in ordered if len(boxes) <= LABELS or box[2] in ("wrong", "missed")]
    shapes = joined([*(_box(box) for box in ordered), *_labels(labelled, size, image)])
    return html(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><use href="#{}"/>{}</svg>',
        image.width, image.height, said, name, shapes,
    )  # fmt: skip


def _box(box: Box) -> Markup:
    (x1, y1, x2, y2), _, verdict, said = box
    return html(
        '<g class="box v-{v}"><title>{t}</title><rect class="halo" x="{x}" y="{y}" width="{w}" height="{h}"/>'
        '<rect class="edge" x="{x}" y="{y}" width="{w}" height="{h}"/></g>',
        v=verdict, t=said, x=f"{x1:.1f}", y=f"{y1:.1f}", w=f"{max(x2 - x1, 0):.1f}", h=f"{max(y2 - y1, 0):.1f}",
    )  # fmt: skip


def _labels(boxes: Sequence[Box], size: float, image: ImageResult) -> Iterator[Markup]:
    """A text above each box, or inside at its top; further down where another text stands already."""
    taken: list[tuple[float, float, float]] = []
    for (x1, y1, _, _), text, _, _ in boxes:
        wide = 0.62 * size * len(text)
        left = min(max(x1, 2.0), max(image.width - wide - 2, 2.0))
        low = y1 - size / 5 if y1 > 1.2 * size else y1 + size
        while any(abs(low - other) < size and left < end and start < left + wide for other, start, end in taken):
            low += size
        taken.append((low, left, left + wide))
        yield html(
            '<g class="box"><text x="{:.1f}" y="{:.1f}" font-size="{:.1f}" stroke-width="{:.1f}">{}</text></g>',
            left, low, size, size / 5, text,
        )  # fmt: skip
