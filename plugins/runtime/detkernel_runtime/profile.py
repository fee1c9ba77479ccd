"""`detkernel profile`: where an iteration goes, and what to change first."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import attrs
import click
from detkernel import Span, UserError
from detkernel.errors import printable, relative
from detkernel.files import write_atomic
from detkernel.terminal import wrapped

if TYPE_CHECKING:
    from detkernel.config import Config

    from detkernel_runtime.profiling import Profiler

WIDTH = 80
ROWS = 12
"""Plugins in the table; all are in the JSON."""
NEVER = Span(2**40, "iters")


@click.command(epilog="\b\nFor example:\n  detkernel profile config.yaml data.workers=4 --chrome trace.json")
@click.argument("config", metavar="CONFIG")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--iterations", type=click.IntRange(min=1), default=10, show_default=True, help="iterations to measure")
@click.option("--warmup", type=click.IntRange(min=1), default=3, show_default=True, help="iterations before them")
@click.option("--json", "as_json", is_flag=True, help="print everything as JSON")
@click.option(
    "--chrome",
    type=click.Path(dir_okay=False, path_type=Path),
    help="also write a trace of two iterations, for chrome://tracing or ui.perfetto.dev",
)
def profile(
    config: str, overrides: tuple[str, ...], iterations: int, warmup: int, as_json: bool, chrome: Path | None
) -> None:
    """Show where a training iteration goes.

    Also how fast data and model are alone, FLOPs, memory, questions to the device, and what to change first. The
    config's own plugins run for some iterations in a folder that is removed; nothing is left behind, and no log's sink
    is told.
    """
    from detkernel.config import load

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler says on standard error that there is no GPU
    found = measured(load(config, overrides, writes=False), iterations, warmup, chrome)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo("\n".join(lines(found)))
    if chrome is not None:
        click.echo(f"wrote {relative(chrome)}: open it at ui.perfetto.dev or chrome://tracing")


def measured(config: Config, iterations: int, warmup: int, chrome: Path | None = None) -> dict[str, Any]:
    """Run some iterations of a config and say where they went: plain values, times in seconds."""
    from detkernel import Kernel

    from detkernel_runtime.profiling import TRACED, Profiler

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("`detkernel profile` measures one process; start it without a launcher")
    for part in config.plugins.values():
        if hasattr(part, "sinks"):
            part.sinks = []  # nothing is to be left, here or at a service
    logger = logging.getLogger("detkernel")
    level = logger.level
    with TemporaryDirectory(prefix="detkernel-profile-") as folder:
        trace = Path(folder) / "trace.json"
        profiler = Profiler(warmup=warmup, iterations=iterations, trace=None if chrome is None else trace)
        options = attrs.evolve(  # type: ignore[misc]
            config.options,
            work_dir=Path(folder) / "work",
            validate=NEVER if config.options.validate else None,
            validate_at_start=False,
            validate_at_end=False,
        )
        parts = {**config.plugins, "the profiler": profiler}
        kernel = Kernel(parts, options, priorities=config.priorities, config=config.plain, versions=config.versions)
        profiler.attach(kernel.state)
        logger.setLevel(logging.WARNING)
        try:
            run = kernel.run()
        finally:
            logger.setLevel(level)
        needed = warmup + iterations + 1 + (TRACED if chrome is not None else 0)
        if len(profiler.seconds) < iterations or run.iter < needed:
            raise UserError(
                f"the run ended after {run.iter} iterations, {needed} are needed: lower --iterations or --warmup, or "
                "raise run.until"
            )
        if chrome is not None:
            try:
                write_atomic(chrome, trace.read_bytes())
            except OSError as error:
                raise UserError(f"{relative(chrome)} cannot be written: {error.strerror}") from None
    return described(profiler)


def described(profiler: Profiler) -> dict[str, Any]:
    """What was measured, as plain values: seconds are those of one iteration."""
    count = len(profiler.seconds)
    costs, total = profiler.costs, sum(profiler.seconds)
    data = max(total - costs.top, 0.0)
    device = profiler.device_seconds
    computing = total - data if device is None else sum(device.values())
    parts = {"data": data, "forward": costs.forward, "backward": costs.backward, "step": costs.step}
    parts["plugins"] = max(costs.top - costs.forward - costs.backward - costs.step, 0.0)
    plugins = [
        {"event": event, "plugin": name, "seconds": seconds / count}
        for (event, name), seconds in costs.exclusive.items()
        if name and name != "the profiler"
    ]
    assert profiler.cold is not None
    assert profiler.warm is not None
    found: dict[str, Any] = {
        "iterations": count,
        "batch_size": profiler.batch_size,
        "seconds": total / count,
        "images_per_second": profiler.images / total,
        "parts": {name: seconds / count for name, seconds in parts.items()},
        "device_parts": None if device is None else {name: seconds / count for name, seconds in device.items()},
        "plugins": sorted(plugins, key=lambda row: -row["seconds"]),
        "loader": {
            name: {"images_per_second": one.rate, "first_batch_seconds": one.first, "images": one.images}
            for name, one in (("cold", profiler.cold), ("warm", profiler.warm))
        },
        "model_images_per_second": profiler.images / computing,
        "flops_per_image": None
        if profiler.flops is None
        else {
            "forward": profiler.flops[0] / profiler.counted_images,
            "training": profiler.flops[1] / profiler.counted_images,
        },
        "questions": [
            {"place": place, "what": what, "count": number}
            for (place, what), number in sorted(profiler.questions.items(), key=lambda item: -item[1])
        ],
        "parameters": {"all": profiler.parameters[0], "trained": profiler.parameters[1]},
        "peak_memory": profiler.peak,
        "facts": profiler.facts,
    }
    found["advice"] = advice(found)
    return found


def advice(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What to change first: each with the share of an iteration that it may save at most, and its evidence."""
    seconds, parts, facts = found["seconds"], found["parts"], found["facts"]
    loader, model = found["loader"]["warm"]["images_per_second"], found["model_images_per_second"]
    items: list[tuple[float, str, str]] = []
    waiting = parts["data"] / seconds
    if waiting > 0.05:
        evidence = (
            f"{waiting:.0%} of an iteration waits for a batch: the loader gives {loader:.3g} images/s, the model takes "
            f"{model:.3g}"
        )
        workers, cores = facts["workers"], cpu_count()
        if workers is not None and workers < cores:
            what = f"raise {facts['loader']}.workers ({workers} now, {cores} cores)"
        else:
            what = (
                "make loading cheaper: smaller images on disk, fewer transforms, or transforms of batches on the device"
            )
        items.append((waiting, what, evidence))
    cold = found["loader"]["cold"]["images_per_second"]
    if loader > 1.5 * cold and cold < model:
        gain = min(1 - cold / model, 1 - cold / loader)
        evidence = f"read for the first time, images come at {cold:.3g} a second, the second time at {loader:.3g}"
        items.append((gain, "keep the images on a faster disk, or in memory, for the first epoch", evidence))
    for row in found["plugins"]:
        share = row["seconds"] / seconds
        if share > 0.03 and not _is_work(row):
            what = f"see whether '{row['plugin']}' is needed, or less often"
            items.append((share, what, f"it takes {share:.0%} of an iteration in {row['event']}"))
    asked = sum(question["count"] for question in found["questions"])
    if asked and facts["cuda"]:
        first = found["questions"][0]
        where = f"{asked} an iteration, {first['count']} of them at {first['place']}: {first['what']}"
        share = (
            0.0 if not facts["cuda"] else max(0.0, 1 - sum((found["device_parts"] or {}).values()) / seconds - waiting)
        )
        items.append((share, "ask the device fewer questions, each of which makes a GPU's host wait", where))
    if facts["cuda"] and facts["precision"] == "fp32":
        share = 0.5 * sum((found["device_parts"] or parts)[name] for name in ("forward", "backward")) / seconds
        items.append((share, "compute in bf16: device.precision=bf16", "the device computes in fp32"))
    if facts["cuda"] and not facts["compiled"]:
        host = (parts["forward"] + parts["backward"]) / seconds
        items.append((0.2 * host, "compile the model: device.compile={}", "it runs operation by operation"))
    free = facts.get("device_memory", 0) - found["peak_memory"].get("device", 0)
    if facts["cuda"] and free > 0.5 * facts["device_memory"]:
        evidence = f"the peak is {found['peak_memory']['device'] / facts['device_memory']:.0%} of the device's memory"
        items.append((0.05, f"raise {facts['loader']}.batch_size (and the learning rate with it)", evidence))
    if not facts["cuda"] and facts["threads"] < cpu_count() and not facts["workers"]:
        evidence = f"torch computes with {facts['threads']} of {cpu_count()} cores, and no worker loads"
        share = (parts["forward"] + parts["backward"]) / seconds * (1 - facts["threads"] / cpu_count())
        items.append((share, "raise device.threads", evidence))
    items.sort(key=lambda item: -item[0])
    return [{"what": what, "evidence": evidence, "saves_at_most": share} for share, what, evidence in items]


def _is_work(row: Mapping[str, Any]) -> bool:
    """Whether a row is the model's own step."""
    return bool(row["event"] == "train_step")


def cpu_count() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def lines(found: Mapping[str, Any]) -> list[str]:
    """Everything that matters, in 80 columns."""
    facts, seconds = found["facts"], found["seconds"]
    device = found["device_parts"]
    where = f"{facts['device']}, {facts['precision']}" + ("" if facts["cuda"] else f", threads: {facts['threads']}")
    shown = [
        f"an iteration takes {_time(seconds)}: {found['batch_size']} images, {found['images_per_second']:.3g} images/s",
        f"  {where}; the mean of {found['iterations']}",
        "",
        f"  {'part':<14}{'time':>10}{'share':>8}" + (f"{'device':>12}" if device else ""),
    ]
    meaning = {
        "data": "waiting for a batch",
        "forward": "model and losses",
        "backward": "gradients",
        "step": "clipping, optimizer",
        "plugins": "everything else",
    }
    for name, value in found["parts"].items():
        on_device = f"{_time(device[name]):>12}" if device and name in device else " " * 12 if device else ""
        bar = "#" * round(16 * value / seconds)
        shown.append(
            f"  {name:<14}{_time(value):>10}{value / seconds:>8.1%}{on_device}  {bar:<16} {meaning[name]}"[:WIDTH]
        )
    shown += ["", f"  {'plugin':<22}{'event':<26}{'time':>10}{'share':>8}"]
    for row in found["plugins"][:ROWS]:
        plugin, share = _cut(printable(row["plugin"]), 21), row["seconds"] / seconds
        shown.append(f"  {plugin:<22}{_cut(row['event'], 25):<26}{_time(row['seconds']):>10}{share:>8.1%}")
    rest = found["plugins"][ROWS:]
    if rest:
        left = sum(row["seconds"] for row in rest)
        shown.append(f"  {f'{len(rest)} more':<48}{_time(left):>10}{left / seconds:>8.1%}")
    cold, warm = found["loader"]["cold"], found["loader"]["warm"]
    shown += [
        "",
        f"the loader gives {warm['images_per_second']:.3g} images/s, the model takes "
        f"{found['model_images_per_second']:.3g}",
        f"  the loader alone, first time {cold['images_per_second']:.3g} images/s, first batch after "
        f"{_time(cold['first_batch_seconds'])}",
        f"  the same images again        {warm['images_per_second']:.3g} images/s, first batch after "
        f"{_time(warm['first_batch_seconds'])}",
    ]
    shown += _model(found)
    shown += ["", "what to change first" if found["advice"] else "nothing stands out: the model's work is the time"]
    for number, item in enumerate(found["advice"], start=1):
        saves = f" (up to {item['saves_at_most']:.0%})" if item["saves_at_most"] >= 0.01 else ""
        shown.append(wrapped(f"{item['what']}{saves}: {item['evidence']}", "     ", f"  {number}. "))
    return shown


def _model(found: Mapping[str, Any]) -> list[str]:
    every, trained = found["parameters"]["all"], found["parameters"]["trained"]
    shown = [f"the model has {every / 1e6:.2f} M parameters, {trained / 1e6:.2f} M of them trained"]
    flops = found["flops_per_image"]
    if flops is None:
        shown.append("  FLOPs and questions are not counted in a compiled model; device.compile=null counts them")
    else:
        rate = flops["training"] * found["model_images_per_second"]
        shown.append(
            f"  {_flops(flops['forward'])} an image forward, {_flops(flops['training'])} in training: {_flops(rate)}/s"
        )
    peak = found["peak_memory"]
    parts = [f"{_bytes(peak[name])} of the {name}" for name in ("device", "process") if name in peak]
    if parts:
        shown.append(f"  peak memory {', '.join(parts)}")
    asked = found["questions"]
    if flops is not None:
        total = sum(question["count"] for question in asked)
        what = "on a GPU, the host waits at each" if not found["facts"]["cuda"] else "the host waits at each"
        shown.append(f"questions to the device: {total} an iteration" + (f" ({what})" if total else ""))
        shown += [
            f"  {one['count']:>5}  {_cut(printable(one['place']), 40):<41}{one['what']}"[:WIDTH] for one in asked[:5]
        ]
    return shown


def _time(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1000:.2f} ms"
        if seconds < 0.1
        else f"{seconds * 1000:.0f} ms"
    )


def _flops(count: float) -> str:
    unit, size = next((pair for pair in (("T", 1e12), ("G", 1e9)) if count >= pair[1]), ("M", 1e6))
    return f"{count / size:.3g} {unit}FLOP"


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
