"""The command `detkernel download`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click
from detkernel import UserError
from detkernel.errors import did_you_mean, printable, relative
from detkernel.terminal import rows, wrapped

from detkernel_data.download.fetch import fetch, sized
from detkernel_data.download.published import SETS, File, Published
from detkernel_data.download.unpack import unpack
from detkernel_data.report import counted


@click.command(epilog="\b\nFor example:\n  detkernel download voc2007")
@click.argument("name", required=False)
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    default="data",
    show_default=True,
    help="the folder for data sets",
)
@click.option("--mirror", metavar="URL", help="an address to take the archives from, in place of the authors'")
@click.option("--keep", is_flag=True, help="keep the archives when they are unpacked")
@click.option("-y", "--yes", is_flag=True, help="do not ask")
def download(name: str | None, into: Path, mirror: str | None, keep: bool, yes: bool) -> None:
    """Download a published data set, such as coco2017.

    Without a name, list them. Sizes are told first; what is there is not fetched again, and what was cut off is gone on
    with.
    """
    if name is None:
        about = {key: f"{one.about}{f' ({sized(one.size)})' if one.size else ''}" for key, one in SETS.items()}
        click.echo("detkernel download NAME:")
        click.echo(rows(about.items(), "  "), nl=False)
        return
    if name not in SETS:
        raise UserError(f"there is no data set '{printable(name)}'{did_you_mean(name, SETS)}")
    chosen = SETS[name]
    folder = into / chosen.folder
    missing = [file for file in chosen.files if not _is_there(file, folder)]
    _tell(chosen, missing, folder)
    if not missing:
        return
    if not yes:
        _ask()
    for file in missing:
        _get(file, folder, mirror, keep)
    click.echo(f"{name} is in {relative(folder)}")


def _archive(file: File, folder: Path) -> Path:
    return folder / ".downloads" / file.name


def _marker(file: File, folder: Path) -> Path:
    """There while an archive is moved to its place, and if that was cut short."""
    return folder / ".downloads" / f"{file.name}.unpacking"


def _is_there(file: File, folder: Path) -> bool:
    return (folder / file.proof).exists() and not _marker(file, folder).exists()


def _tell(chosen: Published, missing: list[File], folder: Path) -> None:
    click.echo(wrapped(f"{chosen.about} ({chosen.licence})"))
    for file in chosen.files:
        size = sized(file.size) if file.size else "size not published"
        part = _archive(file, folder).with_name(f"{file.name}.part")
        state = "" if file in missing else f"{relative(folder / file.proof)} is there"
        if file in missing and part.exists():
            state = f"{sized(part.stat().st_size)} of it are here"
        check = "size is checked, no MD5 is published" if file.size else "no size or MD5 is published"
        check = "" if file.md5 else check
        remarks = "; ".join(one for one in (state, check if file in missing else "") if one)
        click.echo(wrapped(f"{file.name}, {size}{f': {remarks}' if remarks else ''}", "    ", "  "))
    if missing:
        parent = next(above for above in (folder, *folder.resolve().parents) if above.is_dir())
        total, free = sum(file.size for file in missing), shutil.disk_usage(parent).free
        click.echo(wrapped(f"to download: {sized(total)} into {relative(folder)}; {sized(free)} are free there"))
        if 2 * max(file.size for file in missing) + total > free:
            raise UserError(
                f"{relative(folder)}: {sized(total)} to download and to unpack do not fit in the {sized(free)} that "
                "are free; give another folder with --into"
            )
    else:
        click.echo("nothing to download")


def _ask() -> None:
    if not sys.stdin.isatty():
        raise UserError("nobody can be asked whether to download this: give --yes")
    click.confirm("download it?", default=True, abort=True)


def _get(file: File, folder: Path, mirror: str | None, keep: bool) -> None:
    url = f"{mirror.rstrip('/')}/{file.name}" if mirror else file.url
    archive, marker = _archive(file, folder), _marker(file, folder)
    advice = "`--mirror URL` takes it from elsewhere"
    try:
        if not (archive.exists() and (not file.size or archive.stat().st_size == file.size)):
            fetch(url, archive, file.size, file.md5, advice)
        marker.touch()
        count = unpack(archive, folder / file.into)
        marker.unlink()
        if not keep:
            archive.unlink()
    except OSError as error:
        raise UserError(f"{relative(folder)}: {error.strerror or error}") from None
    click.echo(f"{file.name}: {counted(count, 'file')}")
    if not (folder / file.proof).exists():
        raise UserError(
            f"{printable(url)}: it was unpacked, but {relative(folder / file.proof)} is not there: another archive "
            "than was expected"
        )
