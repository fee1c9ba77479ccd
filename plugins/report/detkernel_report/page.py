"""The page of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detkernel.files import write_atomic
from markupsafe import Markup

from detkernel_report import page_data, page_results
from detkernel_report.advice import Advice, advise
from detkernel_report.analysis import Analysis, analyse, at, numbers, primary
from detkernel_report.charts import Series, chart
from detkernel_report.html import coded, duration, html, joined, number, page, section
from detkernel_report.record import PAGE
from detkernel_report.run_folder import Metric, RunFolder, read_run

STATES = {
    "complete": "good", "running": "", "stopped": "warn", "interrupted": "warn", "failed": "bad", "unknown": "warn",
}  # fmt: skip


def write_report(path: Path, output: Path | None = None) -> RunFolder:
    """Write the page of a run; returns what it was made of. Raises UserError for what is not a run's folder, and
    OSError."""
    run = read_run(path)
    write_atomic(output or path / PAGE, report(run), None if output else path)
    return run


def report(run: RunFolder, version: str = "") -> str:
    """`version`: of the page of `detkernel monitor`, which asks whether there is another one."""
    header, main = report_parts(run)
    scripts = ("page.js", "live.js") if version else ("page.js",)
    return page(f"{run.name} – detkernel report", header, main, scripts=scripts, version=version)


def report_parts(run: RunFolder) -> tuple[Markup, Markup]:
    """What the page begins with, and its content."""
    analyses = [analyse(one) for one in run.results]
    found = advise(run, analyses[0] if analyses else None)
    sections = [
        ("glance", "At a glance", [_problems(run), glance(run, analyses[:1])]),
        ("next", "What to do next", [_next(run, found)]),
        ("curves", "Curves", list(curves(run))),
        *(page_results.sections(run, one, alone=len(analyses) == 1) for one in analyses),
        *page_data.sections(run),
    ]
    sections = [(name, title, parts) for name, title, parts in sections if any(parts)]
    links = joined(html('<li><a href="#{}">{}</a></li>', name, title) for name, title, _ in sections)
    main = joined(section(name, title, *parts) for name, title, parts in sections)
    header = html('{}<nav aria-label="Contents"><ul>{}</ul></nav>', _title(run), links)
    return header, main


def state(run: RunFolder) -> str:
    """How the run ended, as far as the folder says."""
    said = str(run.run.get("state") or "")
    if said in STATES:
        return said
    last, until = (run.train[-1]["step"] if run.train else None), at(run.config, "run", "until")
    return "complete" if last is not None and until == f"{last} iters" else "unknown"


def _title(run: RunFolder) -> Markup:
    name = state(run)
    shown = {"running": "running, or killed", "unknown": "no end recorded"}.get(name, name)
    return html(
        '<h1>{}<span class="pill {}">{}</span></h1><p class="dim">{}last written {}</p>',
        run.name, STATES[name], shown, f"{run.run['work_dir']}, " if run.run.get("work_dir") else "", run.when() or "–",
    )  # fmt: skip


def _problems(run: RunFolder) -> Markup:
    if not run.problems:
        return Markup("")
    lines = joined(html("<li>{}</li>", coded(problem)) for problem in run.problems)
    return html('<div class="notice" role="note">Not everything could be read:<ul>{}</ul></div>', lines)


def glance(run: RunFolder, analyses: Sequence[Analysis]) -> Markup:
    rows = [row for row in _glance(run, analyses) if row[1]]
    cards = joined(
        html(
            '<div><dt>{}</dt><dd class="{}">{}{}</dd></div>',
            name, "big" if at < 2 else "", value, html("<small>{}</small>", small) if small else Markup(""),
        )
        for at, (name, value, small) in enumerate(rows)
    )  # fmt: skip
    return html('<dl class="cards">{}</dl>', cards)


def _glance(run: RunFolder, analyses: Sequence[Analysis]) -> Iterator[tuple[str, str, str]]:
    metric, said = primary(run), run.run
    if metric is not None:
        best = metric.best
        if best is not None:
            yield f"best {metric.name}", number(best[1]), f"at iteration {best[0]}; the last one {number(metric.last)}"
        else:
            yield metric.name, number(metric.last), f"at iteration {metric.history[-1][0]}"
    for one in analyses:
        if not math.isnan(one.best.score):
            yield (
                "score threshold to use", number(one.best.score, 2),
                f"precision {one.best.precision:.0%}, recall {one.best.recall:.0%} on {one.results.name}: the best F1",
            )  # fmt: skip
    for test in [one for one in run.test_metrics if metric is not None and one.name == metric.name]:
        yield f"{test.name} on test", number(test.last), ""
    step = run.train[-1]["step"] if run.train else said.get("iter")
    if type(step) is int:
        total = said.get("max_iters")
        yield "iterations", f"{max(step, _whole(said.get('iter'))):,}", f"of {total:,}" if type(total) is int else ""
    if said.get("reason"):
        yield f"why it {'failed' if said.get('state') == 'failed' else 'ended'}", str(said["reason"]), ""
    if type(said.get("seconds")) in (int, float):
        since = f"since iteration {said.get('from_iter')}" if said.get("from_iter") else ""
        yield "time", duration(said["seconds"]), since
    seconds = [value for _, value in numbers(run, "time") if not math.isnan(value)]
    if seconds:
        yield "an iteration", f"{sum(seconds) / len(seconds):.3f} s", ""
    names = said.get("classes")
    if isinstance(names, list):
        yield "classes", f"{len(names):,}", ", ".join(map(str, names[:6])) + ", …" * (len(names) > 6)
    for line in run.data:
        if type(line.get("images")) is int:
            yield f"images, {line.get('split')}", f"{line['images']:,}", ""
    parameters = said.get("parameters")
    if isinstance(parameters, list) and len(parameters) == 2 and all(type(one) is int for one in parameters):
        yield "parameters", f"{parameters[0] / 1e6:.2f} M", f"{parameters[1] / 1e6:.2f} M of them trained"
    model = at(run.config, "model", "use")
    if model:
        yield "model", str(model), str(at(run.config, "model", "backbone", "use") or "")
    device = at(said, "environment", "GPU") or at(said, "environment", "device")
    if device:
        yield "device", str(device), str(at(said, "environment", "processor") or "") if "cpu" in str(device) else ""
    if run.checkpoints:
        yield "checkpoints", str(len(run.checkpoints)), f"the newest {run.checkpoints[-1].name}"


def _whole(value: Any) -> int:
    return value if type(value) is int else 0


def _next(run: RunFolder, found: Sequence[Advice]) -> Markup:
    if not found and not run.results:
        return html(
            '<p class="none">Nothing stands out. Without the detections of a validation, mistakes are not known: '
            "{}.</p>",
            "the report plugin keeps them (`report: {}` in the config)",
        )
    if not found:
        return html('<p class="none">Nothing stands out: no kind of mistake costs as much as half a point of AP.</p>')
    rows = joined(
        html(
            "<li><strong>{}</strong>{}<p><b>Why:</b> {}.</p><p><b>Do:</b> {}.</p></li>",
            one.title,
            html('<span class="gain">up to +{:.1f} points of AP</span>', 100 * one.gain) if one.gain else Markup(""),
            coded(one.evidence.rstrip(".")), coded(one.action.rstrip(".")),
        )
        for one in found
    )  # fmt: skip
    note = html(
        '<p class="dim">In the order of what each might gain. The points are bounds: what AP at an overlap of 0.5 '
        "would be more if the mistake were never made, or what the last validation gained.</p>"
    )
    return html('<ol class="next">{}</ol>{}', rows, note)


def curves(run: RunFolder, *, prefix: str = "") -> Iterator[Markup]:
    """Charts of the training and of the validations."""
    charts = [*_measured(run.metrics), *_trained(run)]
    if not charts:
        yield html('<p class="none">There are no curves: log.jsonl has no line yet (`log: {}` writes it).</p>', "{}")
        return
    yield html(
        '<p class="dim">Drag across a chart to zoom in, double-click to see everything; two fingers or the buttons do '
        'it too.</p><div class="grid">{}</div>',
        joined(charts),
    )


def _measured(metrics: Sequence[Metric]) -> Iterator[Markup]:
    """The metrics of each evaluator and kind: AP by overlap, by size and by class, recall, and the rest."""
    groups: dict[str, list[Metric]] = {}
    for metric in metrics:
        groups.setdefault(_group(metric.name), []).append(metric)
    for title, group in groups.items():
        series = [Series(one.name.split("/", 1)[-1], one.history, at < 12) for at, one in enumerate(group)]
        yield chart(title, series)


def _group(name: str) -> str:
    head, _, last = name.rpartition("/")
    if head.endswith("_AP") or head.endswith("/AP"):
        return f"{head} of each class"
    for kind, title in ("_mAP", "AP"), ("_AR", "AR"):
        if kind in last:
            stem, _, rest = last.partition(kind)
            if rest[1:].isalpha():
                return f"{head}/{stem} {title} by size"
            return f"{head}/{stem} {title}"
    return head or name


def _trained(run: RunFolder) -> Iterator[Markup]:
    names = [name for name in run.scalars() if numbers(run, name)]
    losses = sorted((name for name in names if "loss" in name), key=lambda name: name != "loss")
    groups = {
        "Losses": losses,
        "Learning rate": [name for name in names if name.startswith("lr")],
        "Seconds an iteration": [name for name in names if name in ("time", "data_time")],
    }
    rest = [name for name in names if not any(name in group for group in groups.values())]
    for title, group in (groups | {f"{name}, MB" if name == "memory" else name: [name] for name in rest}).items():
        if group:
            yield chart(title, [Series(name, numbers(run, name)) for name in group])


def next_steps(run: RunFolder) -> list[Advice]:
    """What the page's section of that name says."""
    return advise(run, analyse(run.results[0]) if run.results else None)
