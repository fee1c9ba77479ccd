"""The page that compares runs: what differs in their configs, their curves, their classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detkernel.config.dump import inline
from detkernel.files import write_atomic
from markupsafe import Markup

from detkernel_report.analysis import Analysis, analyse, numbers, primary
from detkernel_report.charts import Series, chart
from detkernel_report.html import duration, html, joined, number, page, paragraph, section, signed, table
from detkernel_report.mistakes import KINDS
from detkernel_report.page import STATES, state
from detkernel_report.run_folder import Metric, RunFolder, read_run

MISSING = "–"


def write_comparison(paths: Sequence[Path], output: Path) -> list[RunFolder]:
    """Raises UserError for what is not a run's folder, and OSError."""
    runs = [read_run(path) for path in paths]
    write_atomic(output, comparison(runs))
    return runs


def comparison(runs: Sequence[RunFolder]) -> str:
    names = distinct(runs)
    analyses = [analyse(run.results[0]) if run.results else None for run in runs]
    sections = [
        ("glance", "At a glance", [_problems(names, runs), _glance(names, runs)]),
        ("config", "What differs in the config", [_config(names, runs)]),
        ("curves", "Curves", list(_curves(names, runs))),
        ("metrics", "Metrics", [_metrics(names, runs)]),
        ("classes", "Classes", list(_classes(names, analyses))),
        ("mistakes", "Mistakes", list(_mistakes(names, analyses))),
    ]
    sections = [(name, title, parts) for name, title, parts in sections if any(parts)]
    links = joined(html('<li><a href="#{}">{}</a></li>', name, title) for name, title, _ in sections)
    title = " and ".join(names)
    header = html('<h1>{}</h1><nav aria-label="Contents"><ul>{}</ul></nav>', title, links)
    return page(f"{title} – detkernel report", header, joined(section(*one[:2], *one[2]) for one in sections))


def distinct(runs: Sequence[RunFolder]) -> list[str]:
    """A name for each run: its folder's, with so much of the path before it that no two are the same."""
    paths = [run.path.resolve().parts for run in runs]
    for many in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-many:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({number})" for number, run in enumerate(runs, start=1)]


def _problems(names: Sequence[str], runs: Sequence[RunFolder]) -> Markup:
    lines = [html("<li>{}: {}</li>", name, one) for name, run in zip(names, runs, strict=True) for one in run.problems]
    if not lines:
        return Markup("")
    return html('<div class="notice" role="note">Not everything could be read:<ul>{}</ul></div>', joined(lines))


def _glance(names: Sequence[str], runs: Sequence[RunFolder]) -> Markup:
    rows = []
    for name, run in zip(names, runs, strict=True):
        metric, ended = primary(run), state(run)
        best = metric.best if metric else None
        seconds = run.run.get("seconds")
        rows.append([
            name, html('<span class="{}">{}</span>', STATES[ended], ended), metric.name if metric else MISSING,
            number(best[1] if best else None), number(metric.last if metric else None), best[0] if best else MISSING,
            run.train[-1]["step"] if run.train else MISSING,
            duration(seconds) if isinstance(seconds, (int, float)) else MISSING,
        ])  # fmt: skip
    columns = ["run", "state", "metric", "best", "last", "best at iteration", "iterations", "time"]
    return table("The runs", columns, rows, numeric=3)


def flat(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in plain values; lists of scalars are one value."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list) and any(isinstance(one, (Mapping, list)) for one in values):
        for place, value in enumerate(values):
            yield from flat(value, f"{path}.{place}")
    else:
        yield path, values


def _config(names: Sequence[str], runs: Sequence[RunFolder]) -> Markup:
    each = [dict(flat(run.config)) for run in runs]
    if not all(each):
        return paragraph("A run has no config that could be read.", "none")
    rows = []
    for path in dict.fromkeys(path for values in each for path in values):
        shown = [inline(values[path]) if path in values else MISSING for values in each]
        if len(set(shown)) > 1 and path != "run.work_dir":
            rows.append([path, *shown])
    if not rows:
        return paragraph("The configs are the same, but for the work dir.", "none")
    return table(
        "Options that differ; a dash where a config has none", ["option", *names], rows, numeric=len(names) + 1
    )


def _curves(names: Sequence[str], runs: Sequence[RunFolder]) -> Iterator[Markup]:
    """A chart for each metric and scalar that two runs have; a line for each run."""
    charts, empty = [], []
    measured = [{metric.name: metric for metric in run.metrics} for run in runs]
    for name in _shared(measured, lambda name: "_AP/" not in name and "/AP/" not in name):
        lines = [Series(run, each[name].history) for run, each in zip(names, measured, strict=True) if name in each]
        if any(math.isfinite(value) for line in lines for _, value in line.points):
            charts.append(chart(name, lines))
        else:
            empty.append(name)
    scalars = [{name: pairs for name in run.scalars() if (pairs := numbers(run, name))} for run in runs]
    for name in _shared(scalars, lambda _: True):
        lines = [Series(run, each[name]) for run, each in zip(names, scalars, strict=True) if name in each]
        charts.append(chart(name, lines))
    if charts:
        yield html('<div class="grid">{}</div>', joined(charts))
    if empty:
        yield paragraph(f"Without values: {', '.join(empty)}.", "none")


def _shared(each: Sequence[Mapping[str, Any]], wanted: Any) -> list[str]:
    counts: dict[str, int] = {}
    for values in each:
        for name in values:
            counts[name] = counts.get(name, 0) + 1
    return [name for name, count in counts.items() if count > 1 and wanted(name)]


def _metrics(names: Sequence[str], runs: Sequence[RunFolder]) -> Markup:
    """The best of each metric, and how the others differ from the first run."""
    each = [{metric.name: metric for metric in run.metrics} for run in runs]
    rows = []
    for name in dict.fromkeys(name for values in each for name in values):
        values = [_best(one.get(name)) for one in each]
        rows.append([name, *_beside(values)])
    if not rows:
        return Markup("")
    return table("The best value of each metric", ["metric", *_columns(names)], rows)


def _columns(names: Sequence[str]) -> list[str]:
    return [names[0], *(column for name in names[1:] for column in (name, f"against {names[0]}"))]


def _beside(values: Sequence[float], digits: int = 3) -> list[Any]:
    first, *others = values
    cells: list[Any] = [number(first, digits)]
    for value in others:
        gain = value - first
        look = "" if math.isnan(gain) or abs(gain) < 0.5 * 10**-digits else "good" if gain > 0 else "bad"
        cells += [number(value, digits), html('<span class="{}">{}</span>', look, signed(gain, digits))]
    return cells


def _best(metric: Metric | None) -> float:
    if metric is None:
        return math.nan
    return metric.best[1] if metric.best else metric.last


def _classes(names: Sequence[str], analyses: Sequence[Analysis | None]) -> Iterator[Markup]:
    known = [one for one in analyses if one is not None]
    if len(known) < 2:
        return
    classes = dict.fromkeys(name for one in known for name in one.results.classes)
    rows = []
    for label in classes:
        values = [
            one.ap(one.results.classes.index(label)) if one is not None and label in one.results.classes else math.nan
            for one in analyses
        ]
        rows.append([label, *_beside(values)])
    yield table("AP by class, in the last validation", ["class", *_columns(names)], rows)


def _mistakes(names: Sequence[str], analyses: Sequence[Analysis | None]) -> Iterator[Markup]:
    if sum(one is not None for one in analyses) < 2:
        return
    rows = []
    for kind, meaning in KINDS.items():
        costs = [math.nan if one is None else 100 * one.mistakes.cost[kind] for one in analyses]
        rows.append([kind, meaning, *(number(cost, 1) for cost in costs)])
    yield table(
        "What each kind of mistake costs, in points of AP at an overlap of 0.5",
        ["kind", "what it is", *names],
        rows,
        numeric=2,
    )
