"""The commands `detkernel report`, `monitor` and `browse`."""

from __future__ import annotations

from pathlib import Path

import click
from detkernel import UserError
from detkernel.errors import printable, relative
from detkernel.terminal import wrapped

SHOWN = 3
"""Next steps that the terminal shows; the page has all."""


EXAMPLE = "\b\nFor example:\n  "


@click.command(
    epilog=f"{EXAMPLE}detkernel report runs/shapes\n  detkernel report runs/first runs/second -o comparison.html"
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_DIR...")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="the page's file; else RUN_DIR/report.html, of several runs comparison.html here",
)
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """Write a run's report, or compare several runs.

    It is one page without network, and says what to improve first. The run may be over, killed or still going on.
    """
    try:
        if len(runs) > 1:
            from detkernel_report.compare import write_comparison

            output = output or Path("comparison.html")
            problems = [f"{run.name}: {problem}" for run in write_comparison(runs, output) for problem in run.problems]
            advice = []
        else:
            from detkernel_report.page import next_steps, write_report
            from detkernel_report.record import PAGE

            run = write_report(runs[0], output)
            output = output or runs[0] / PAGE
            problems, advice = run.problems, next_steps(run)
    except OSError as error:
        raise UserError(f"{relative(output or runs[0])}: cannot be written: {error.strerror}") from None
    for problem in problems:
        click.echo(wrapped(printable(problem), " " * 9, "warning: "), err=True)
    click.echo(f"wrote {relative(output)}")
    for number, one in enumerate(advice[:SHOWN], start=1):
        click.echo(wrapped(printable(f"{one.title}: {one.evidence}"), "   ", f"{number}. "))
