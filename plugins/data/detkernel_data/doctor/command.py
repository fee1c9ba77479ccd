"""The command `detkernel doctor`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import click
from detkernel import DataError, UserError
from detkernel.errors import printable, relative
from detkernel.terminal import wrapped
from detkernel_detection.findings import Finding

_EXAMPLES = 3


@click.command(epilog="\b\nFor example:\n  detkernel doctor config.yaml")
@click.argument("config", metavar="CONFIG")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="print the findings as JSON, with every place")
@click.option("--strict", is_flag=True, help="exit with status 1 where there is a finding")
def doctor(config: str, overrides: tuple[str, ...], as_json: bool, strict: bool) -> None:
    """Say what is odd about the data of a config.

    Copies of images across the splits, classes in one split alone, odd boxes and files, and what the readers report.
    Findings are not errors: each comes with its count, examples, what to do, and the option that settles it.
    """
    from detkernel.config import load

    from detkernel_data.loading.loader import Loader

    plugins = load(config, overrides, writes=False).plugins
    loader = next((plugin for plugin in plugins.values() if isinstance(plugin, Loader)), None)
    if loader is None:
        raise UserError(f"{config}: no plugin of it is a `loader`, whose data sets could be looked at")
    found, errors = examine(loader)
    if as_json:
        rows = [{**attrs.asdict(one), "places": list(map(str, one.places))} for one in found]
        click.echo(json.dumps({"findings": rows, "errors": errors}, indent=1, ensure_ascii=True))
    else:
        for line in lines(found):
            click.echo(line)
    if errors:
        raise DataError("\n".join(errors))
    if strict and found:
        sys.exit(1)


def examine(loader: Any) -> tuple[list[Finding], list[str]]:
    """(findings, what cannot be read at all) of all data sets of a loader."""
    from detkernel_data.doctor import checks
    from detkernel_data.doctor.images import look
    from detkernel_data.doctor.told import READERS, Told

    names = {"train": loader.train, "val": loader.val, "test": loader.test, **loader.further_val}
    splits, errors = [], []
    for name, dataset in names.items():
        if dataset is None:
            continue
        try:
            if not dataset.classes:
                dataset.load()
            splits.append(checks.SplitData.of(name, dataset, loader.transforms(name)))
        except DataError as error:
            errors.append(f"{name} data: {error}")
        else:
            Told(dataset).remember(READERS, [Finding.of_note(one) for one in dataset.notes])
    seen = {path: one for split in splits for path, one in look(split.paths, _progress).items()}
    return checks.everything(splits, seen), errors


def _progress(done: int) -> None:
    if sys.stderr.isatty() and done % 50 == 0:
        print(f"\r{done:,} images looked at", end="", file=sys.stderr, flush=True)


def lines(found: Sequence[Finding]) -> Iterator[str]:
    """A table of 80 columns: the count and the split of each finding, what it is, examples, and what to do."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if not found:
        yield "nothing odd was found"
        return
    counts = [f"{one.count:,}" if one.count else "" for one in found]
    width, room = max(5, *map(len, counts)), max(5, *(len(printable(one.split)) for one in found))
    yield f"{'count':>{width}}  {'split':<{room}}  finding"
    for one, count in zip(found, counts, strict=True):
        head = f"{count:>{width}}  {printable(one.split):<{room}}  "
        pad = " " * len(head)
        yield _fitted(one.what, head, pad)
        for place in one.places[:_EXAMPLES]:
            yield _fitted(relative_places(str(place)), f"{pad}- ", f"{pad}  ")
        if len(one.places) > _EXAMPLES:
            yield f"{pad}- and {len(one.places) - _EXAMPLES:,} more"
        option = f" (`{one.option}`)" if one.option and f"`{one.option}" not in one.advice else ""
        if one.advice or option:
            yield _fitted(f"{one.advice}{option}", f"{pad}> ", f"{pad}  ")
    yield f"{len(found)} finding{'s' if len(found) > 1 else ''}; `--json` lists every place"


def relative_places(place: str) -> str:
    """A place whose path is shown as seen from the current folder."""
    path, colon, rest = place.partition(": ")
    return f"{relative(path)}{colon}{rest}" if path.startswith("/") else place


def _fitted(text: str, first: str, others: str) -> str:
    return wrapped(printable(text), others, first)
