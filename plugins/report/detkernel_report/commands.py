"""The commands `detkernel report`, `monitor` and `browse`."""

from __future__ import annotations

from pathlib import Path

import click
from detkernel import UserError
from detkernel.errors import printable, relative
from detkernel.files import write_atomic
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


@click.command(
    epilog=f"{EXAMPLE}detkernel browse configs/shapes.yaml\n  detkernel browse configs/shapes.yaml --raw --split train"
)
@click.argument("config", metavar="CONFIG")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--raw", is_flag=True, help="images and annotations as the files have them, without transforms")
@click.option(
    "--split", "splits", multiple=True, help="train, val, test or a further validation set; else all but test"
)
@click.option("--count", type=click.IntRange(min=1), default=24, show_default=True, help="images of each split")
@click.option(
    "--side", type=click.IntRange(min=32), default=480, show_default=True, help="pixels of an image's longer side"
)
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="a folder; else WORK_DIR/browse")
def browse(
    config: str,
    overrides: tuple[str, ...],
    raw: bool,
    splits: tuple[str, ...],
    count: int,
    side: int,
    output: Path | None,
) -> None:
    """Show what the network sees: transformed samples.

    A contact sheet of each split, and a page whose filters go by split, class, size and finding. Boxes, masks and
    keypoints are drawn where the model is trained on them.
    """
    from detkernel import Kernel
    from detkernel.config import load

    from detkernel_report.browse import browse as look
    from detkernel_report.browse import contact_sheet
    from detkernel_report.browse_page import gallery

    loaded = load(config, overrides)
    kernel = Kernel(loaded.plugins, loaded.options, priorities=loaded.priorities, config=loaded.plain)
    found = look(kernel, splits, count, side, raw=raw)
    folder = output or loaded.options.work_dir / "browse"
    files: dict[str, bytes | str] = {f"{split.name}.png": contact_sheet(split, raw=raw) for split in found}
    files["browse.html"] = gallery(Path(config).stem, found, raw=raw)
    for name, content in files.items():
        try:
            write_atomic(folder / name, content, None if output else loaded.options.work_dir)
        except OSError as error:
            raise UserError(f"{relative(folder / name)}: cannot be written: {error.strerror}") from None
        click.echo(f"wrote {relative(folder / name)}")


@click.command(epilog=f"{EXAMPLE}detkernel monitor runs/shapes\n  detkernel monitor runs/shapes --port 8000")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="on 127.0.0.1; 0, the default: one that is free")
def monitor(run_dir: Path, port: int) -> None:
    """Show a run's report while it goes on, in a browser.

    The page renews itself. It is served to this machine alone (127.0.0.1), and shows the run's folder as it is: the run
    need not know of it.
    """
    from detkernel_report.monitor import serve

    serve(run_dir, port, click.echo)
