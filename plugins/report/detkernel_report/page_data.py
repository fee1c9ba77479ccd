"""The sections of what a run was made of: its data, its time, its config, its environment, its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from detkernel_report.analysis import at
from detkernel_report.html import bar, coded, cut, details, duration, html, joined, paragraph, table
from detkernel_report.metrics import SIZES
from detkernel_report.run_folder import Line, RunFolder
from detkernel_report.statistics import SIDES

FINDINGS = 50
PLACES = 30


def sections(run: RunFolder) -> list[tuple[str, str, list[Markup]]]:
    return [
        ("data", "The data", list(_data(run))),
        ("time", "Where the time went", list(_time(run))),
        ("config", "Config", [_config(run)]),
        ("environment", "Environment and checkpoints", [*_environment(run), *_checkpoints(run)]),
    ]  # fmt: skip


def _config(run: RunFolder) -> Markup:
    if not run.config_text:
        return Markup("")
    text = html('<pre tabindex="0" aria-label="The composed config">{}</pre>', run.config_text)
    return details("The composed config, every default filled in", text)


def _data(run: RunFolder) -> Iterator[Markup]:
    splits = [line for line in run.data if isinstance(line.get("split"), str)]
    if not splits:
        return
    columns = ["split", "images", "without an object", "objects", "an image", *list(SIZES)[1:], "crowd", "difficult"]
    rows = []
    for line in splits:
        objects = sum(many for many, _ in _pairs(line))
        looked = max(_int(line.get("looked")), 1)
        sizes = [f"{_int(at(line, 'sizes', size)) / max(objects, 1):.0%}" for size in list(SIZES)[1:]]
        rows.append([
            line["split"], f"{_int(line.get('images')):,}", f"{_int(line.get('empty')):,}", f"{objects:,}",
            f"{objects / looked:.1f}", *sizes, f"{_int(line.get('crowd')):,}", f"{_int(line.get('difficult')):,}",
        ])  # fmt: skip
    yield table("Images and objects", columns, rows)
    for line in splits:
        if _int(line.get("looked")) < _int(line.get("images")):
            yield paragraph(f"{line['split']}: counted in {line['looked']:,} images, taken evenly.", "dim")
    yield _classes(splits)
    yield html('<div class="grid">{}</div>', joined(_sides(line) for line in splits))
    yield from _findings(splits)


def _pairs(line: Line) -> list[tuple[int, int]]:
    """(objects, images) of each class."""
    classes = line.get("classes")
    found = classes.values() if isinstance(classes, dict) else ()
    return [(_int(at(pair, 0)), _int(at(pair, 1))) for pair in found]


def _int(value: Any) -> int:
    return value if type(value) is int else 0


def _classes(splits: Sequence[Line]) -> Markup:
    names = list(dict.fromkeys(name for line in splits for name in at(line, "classes") or {}))
    most = max([many for line in splits for many, _ in _pairs(line)], default=0) or 1
    rows = []
    for name in names:
        cells: list[Any] = [cut(str(name))]
        for line in splits:
            pair = at(line, "classes", name)
            cells += [f"{_int(at(pair, 0)):,}", f"{_int(at(pair, 1)):,}"]
        first = _int(at(splits[0], "classes", name, 0))
        rows.append([*cells, bar(first / most)])
    columns = ["class", *(f"{what}, {line['split']}" for line in splits for what in ("objects", "images"))]
    return table("Objects by class, and images that have one", [*columns, ""], rows)


def _sides(line: Line) -> Markup:
    """A histogram of the objects' sides, as a table with bars."""
    counts = [_int(one) for one in line.get("sides") or []][: len(SIDES)]
    total, most = max(sum(counts), 1), max([*counts, 1])
    rows = [
        [f"{low} to {SIDES[place + 1]}" if place + 1 < len(SIDES) else f"from {low}", f"{many:,}",
         f"{many / total:.1%}", bar(many / most)]
        for place, (low, many) in enumerate(zip(SIDES, counts, strict=False))
        if many
    ]  # fmt: skip
    columns = ["side, pixels", "objects", "share", ""]
    return html("<div>{}</div>", table(f"Sides of the objects of {line['split']} (root of the area)", columns, rows))


def _findings(splits: Sequence[Line]) -> Iterator[Markup]:
    yield html("<h3>Findings</h3>")
    found = [
        _finding(str(line["split"]), finding)
        for line in splits
        for finding in (line.get("findings") or [])[:FINDINGS]
        if isinstance(at(finding, "text"), str)
    ]
    yield from found
    if not found:
        yield paragraph("Nothing was found to be wrong with the data when it was read.", "none")


def _finding(split: str, finding: Any) -> Markup:
    """What was found, how often, an example, what to do about it and the option that settles it; all places folded."""
    what, many, option = at(finding, "what"), _int(at(finding, "count")), at(finding, "option")
    places = at(finding, "places")
    listed = [one for one in places if isinstance(one, str)] if isinstance(places, list) else []
    said = what if isinstance(what, str) else str(at(finding, "text"))
    parts = [html("<b>{}</b>: {}{}", at(finding, "split") or split, f"{many:,} × " if many else "", said)]
    if listed:
        parts.append(html('<span class="dim">such as {}</span>', listed[0]))
    advice = str(at(finding, "advice") or "")
    if advice or option:
        settles = f" (`{option}`)" if option and f"`{option}" not in advice else ""
        parts.append(html("→ {}", coded(f"{advice}{settles}".strip())))
    text = Markup("<br>").join(parts)
    if len(listed) > 1:
        shown = joined(html("<li>{}</li>", place) for place in listed[:PLACES])
        more = html("<li>and {} more</li>", len(listed) - PLACES) if len(listed) > PLACES else Markup("")
        text += details(f"The {len(listed):,} places", html("<ul>{}{}</ul>", shown, more))
    return html('<div class="notice">{}</div>', text)


def _time(run: RunFolder) -> Iterator[Markup]:
    head = run.times[0] if run.times else {}
    rows = [line for line in run.times[1:] if type(line.get("seconds")) in (int, float)]
    total = head.get("seconds")
    if type(total) not in (int, float) or not total or not rows:
        return
    device = str(head.get("device"))
    yield html(
        '<p class="dim">{} for {} iterations, with the validations and checkpoints of that time.{}</p>',
        duration(total), head.get("iters"),
        " Work for a GPU is queued: its time is found where somebody waits for it." if "cuda" in device else "",
    )  # fmt: skip
    rest = max(total - sum(line["seconds"] for line in rows), 0.0)
    plugins: dict[str, float] = {}
    for line in rows:
        plugins[str(line.get("plugin"))] = plugins.get(str(line.get("plugin")), 0.0) + line["seconds"]
    ordered = sorted([*plugins.items(), ("waiting for batches, and the loop", rest)], key=lambda item: -item[1])
    yield table(
        "Time by plugin", ["plugin", "seconds", "share", ""],
        [[name, f"{seconds:,.1f}", f"{seconds / total:.1%}", bar(seconds / total)] for name, seconds in ordered],
    )  # fmt: skip
    cells = [
        [str(line.get("plugin")), str(line.get("event")), f"{_int(line.get('calls')):,}", f"{line['seconds']:,.2f}",
         f"{1000 * line['seconds'] / max(_int(line.get('calls')), 1):.2f}", f"{line['seconds'] / total:.1%}"]
        for line in rows
    ]  # fmt: skip
    columns = ["plugin", "event", "calls", "seconds", "ms a call", "share"]
    yield details("Time by plugin and event", table("Time by plugin and event", columns, cells, numeric=2))


def _environment(run: RunFolder) -> Iterator[Markup]:
    found = run.run.get("environment")
    if isinstance(found, dict) and found:
        rows = [[str(name), str(value)] for name, value in found.items()]
        yield table("Environment", ["what", "which"], rows, numeric=2)
        return
    versions = [line[2:].rsplit(" ", 1) for line in run.config_text.splitlines() if line.startswith("# ")]
    versions = [pair for pair in versions if len(pair) == 2]
    if versions:
        yield table("Versions", ["distribution", "version"], versions, numeric=2)


def _checkpoints(run: RunFolder) -> Iterator[Markup]:
    if run.checkpoints:
        rows = [
            [one.name, f"{one.bytes / 1e6:.1f} MB", f"{datetime.fromtimestamp(one.saved, UTC):%Y-%m-%d %H:%M} UTC"]
            for one in run.checkpoints
        ]
        yield table("Checkpoints", ["file", "size", "saved"], rows)
