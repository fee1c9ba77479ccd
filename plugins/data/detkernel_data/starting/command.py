"""The command `detkernel init`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import click
from detkernel import DataError, UserError
from detkernel.errors import as_typed, printable, relative
from detkernel.files import write_atomic
from detkernel.terminal import wrapped

from detkernel_data.report import counted

_SHARE = 0.2
_EXAMPLES = 8
_MOST_CLASSES = 30


@click.command(epilog="\b\nFor example:\n  detkernel init data/cells")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="the config to write")
@click.option("--seed", default=0, show_default=True, help="what a split follows from, where there is none yet")
@click.option("--force", is_flag=True, help="replace files that this command wrote before")
def init(path: Path, output: Path | None, seed: int, force: bool) -> None:
    """Write a config that trains on a folder of images.

    It says what the folder holds, draws a validation split where there is none, and chooses a small detector.
    PATH is a folder in Pascal VOC, COCO, YOLO or LabelMe form, a data.yaml, or a JSON file of COCO's or LVIS's form.
    """
    from detkernel_data.starting.look import FORMS, look

    found = look(path)
    click.echo(f"{relative(path)}: {FORMS.get(found.form, 'images')}{' without annotations' if not found.form else ''}")
    for remark in found.remarks:
        click.echo(_wrapped(f"passed over: {remark}"))
    if not found.form:
        raise UserError(_unannotated(path, found.images))
    config = output or Path(f"{_stem(path)}.yaml")
    _Started(found, config, seed, force).write()


def _stem(path: Path) -> str:
    """A name for the config, by the folder's."""
    own = path.resolve()
    name = own.parent.name if own.stem in ("data", "_annotations.coco") else own.stem
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "detector"


def _unannotated(path: Path, images: Sequence[str]) -> str:
    shown = ", ".join(relative(image) for image in images[:3]) + ", ..." * (len(images) > 3)
    return (
        f"{relative(path)}: {counted(len(images), 'image')} ({shown}) and no annotations: nothing to learn from. "
        "Draw boxes with LabelMe, CVAT or Label Studio, save them in Pascal VOC, COCO, YOLO or LabelMe form, and run "
        "this again"
    )


def _wrapped(text: str, indent: str = "  ") -> str:
    return wrapped(printable(text), f"{indent}  ", indent)


@attrs.define
class _Written:
    """Files to write beside the config, the config last."""

    files: dict[Path, str] = attrs.field(factory=dict)
    checked: set[Path] = attrs.field(factory=set)

    def check(self, force: bool) -> None:
        """Raise `UserError` for files that are there, and that nobody has allowed to be replaced."""
        there = [path for path in self.files if path not in self.checked and (path.exists() or path.is_symlink())]
        self.checked.update(self.files)
        if there and not force:
            names = ", ".join(relative(path) for path in there)
            raise UserError(f"{names}: {'is' if len(there) == 1 else 'are'} there already; give another name with "
                            "--output, or --force to write anew")  # fmt: skip

    def write(self) -> None:
        for path, text in self.files.items():
            try:
                write_atomic(path, text)
            except UnicodeEncodeError:
                raise UserError(f"{relative(path)}: a name in it is not UTF-8; rename that file or folder") from None
            except OSError as error:
                raise UserError(f"{relative(path)}: cannot be written: {error.strerror}") from None


class _Started:
    """From what was found to the files that are written."""

    def __init__(self, found: Any, config: Path, seed: int, force: bool) -> None:
        self.found, self.config, self.seed, self.force = found, config, seed, force
        self.folder = config.parent / f"{config.stem}_split"
        self.out = _Written({config: ""})
        self.title: list[str] = []

    def write(self) -> None:
        """Look at the data, print what there is, and write the config; where that fails, nothing is left."""
        self.out.check(self.force)
        with self._label_yaml(self.found.parts):
            self._write_config()

    def _write_config(self) -> None:
        from detkernel_data.starting.look import FORMS
        from detkernel_data.starting.recipe import Machine, choose, config_text

        loaded = self._load(self._by_split())
        surveys, configs = self._surveys(loaded)
        self.out.check(self.force)
        self._print(loaded, surveys)
        machine = Machine.here()
        choice = choose(surveys["train"], machine)
        self._print_choice(choice, machine, len(surveys["train"].ids))
        counts = ", ".join(f"{len(one.ids)} for {name}" for name, one in surveys.items())
        place = printable(as_typed(self.found.place))
        title = [
            f"Written by `detkernel init` for {FORMS[self.found.form]} data in {place}: {counts}.",
            *self.title,
            "Paths are seen from the folder in which detkernel is called. `detkernel check` says what this costs.",
        ]
        self.out.files.pop(self.config)
        self.out.files[self.config] = config_text(title, configs, choice, machine, f"runs/{self.config.stem}")
        self.out.write()
        self._verify()
        for path in self.out.files:
            click.echo(f"wrote {relative(path)}")
        click.echo(f"next: detkernel check {relative(self.config)} && detkernel run {relative(self.config)}")

    def _verify(self) -> None:
        """Read the config as a run would. It names plugins of the standard set, which may be installed in part."""
        from detkernel.catalog import Catalog
        from detkernel.config import load

        from detkernel_data.starting.recipe import NEEDED

        missing = sorted(set(NEEDED) - set(Catalog().entries))
        if missing:
            text = f"not installed here are {', '.join(missing)}, which the config names: `pip install detkernel`"
            click.echo(_wrapped(text))
        else:
            load(str(self.config), (), writes=False)

    @contextmanager
    def _label_yaml(self, parts: Sequence[Any]) -> Iterator[None]:
        """The data.yaml that the reader wants, where there is none; it is removed again if anything fails."""
        from detkernel_data.starting.parts import yolo_yaml

        if self.found.names is None:
            yield
            return
        path = self.folder / "data.yaml"
        text = yolo_yaml(path, self.found.names, parts)
        self.out.files = {path: text, **self.out.files}
        self.out.check(self.force)
        before = path.read_bytes() if path.is_file() else None
        _Written({path: text}).write()
        try:
            yield
        except BaseException:
            path.unlink()
            if before is not None:
                write_atomic(path, before)
            else:
                with suppress(OSError):
                    self.folder.rmdir()
            raise

    def _by_split(self) -> dict[str, list[Any]]:
        """The parts of each split; those that nothing tells of, and a validation set alone, are to be split."""
        splits: dict[str, list[Any]] = {}
        for part in self.found.parts:
            splits.setdefault(part.split, []).append(part)
        if "train" in splits and "" in splits:
            spare = splits.pop("")
            names = ", ".join(printable(str(next(iter(part.options.values())))) for part in spare[:3])
            click.echo(_wrapped(f"passed over: nothing says whether {names} is for training or validation"))
        if "train" not in splits:
            splits["train"] = [part for name in ("", "val") for part in splits.pop(name, [])]
            if not splits["train"]:
                splits["train"] = splits.pop("test")
        return {name: splits[name] for name in ("train", "val", "test") if name in splits}

    def _load(self, splits: dict[str, list[Any]]) -> dict[str, Any]:
        from detkernel_data.starting.parts import load, unknown_classes

        loaded: dict[str, Any] = {}
        for name, parts in splits.items():
            try:
                loaded[name] = load(parts, name)
            except DataError as error:
                if name == "train":
                    raise
                first = str(error).splitlines()[0].partition(";")[0]
                click.echo(_wrapped(f"passed over: the {name} split cannot be used: {first}"))
                continue
            unknown = unknown_classes(loaded["train"].dataset, loaded[name].dataset)
            if unknown:
                self._leave_out(loaded, name, parts, unknown)
        return loaded

    def _leave_out(self, loaded: dict[str, Any], name: str, parts: list[Any], unknown: list[str]) -> None:
        """Classes of another split that the training data has not."""
        from detkernel_data.starting.parts import load

        for part in parts:
            part.options["ignore_classes"] = unknown
        loaded[name] = load(parts, name)
        names = ", ".join(f"'{printable(one)}'" for one in unknown[:_EXAMPLES])
        loaded[name].settled.append(f"no object of {names} to train on: set `ignore_classes`")

    def _surveys(self, loaded: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is in each split, and its place in the config; validation images are drawn where there are none."""
        from detkernel_data.starting.parts import survey

        surveys = {name: survey(one.dataset) for name, one in loaded.items()}
        configs = {name: one.config for name, one in loaded.items()}
        if "val" not in loaded:
            drawn = self._draw(surveys["train"], configs["train"])
            order = [name for name in ("train", "val", "test") if name in drawn or name in surveys]
            surveys = {name: drawn[name][0] if name in drawn else surveys[name] for name in order}
            configs = {name: drawn[name][1] if name in drawn else configs[name] for name in order}
        return surveys, configs

    def _draw(self, data: Any, config: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
        from detkernel_data.starting.splitting import split

        if len(data.ids) == 1:
            text = "One image cannot be split: it is validated on as well, so its AP says nothing about other images."
            click.echo(_wrapped(text))
            self.title.append(text)
            return {"val": (data, config)}
        made = split(data.ids, data.labels, _SHARE, self.seed)
        if not made.val:
            raise UserError(
                f"{relative(self.found.place)}: no image can be validated on: every class would lose its last image to "
                "train on; annotate more images"
            )
        text = (
            f"There was no split for validation: {len(made.val)} of {len(data.ids)} images are drawn from seed "
            f"{self.seed}, {made.how}."
        )
        self.title.append(printable(text))
        click.echo(_wrapped(text))
        drawn = {}
        for name, numbers in (("train", made.train), ("val", made.val)):
            path = self.folder / f"{name}.txt"
            self.out.files = {path: "".join(f"{data.ids[number]}\n" for number in numbers), **self.out.files}
            some = attrs.evolve(
                data,
                ids=[data.ids[number] for number in numbers],
                sizes=data.sizes[numbers],
                labels=[data.labels[number] for number in numbers],
            )
            drawn[name] = some, {"use": "subset", "id_list": as_typed(path), "dataset": config}
        return drawn

    def _print(self, loaded: dict[str, Any], surveys: dict[str, Any]) -> None:
        import numpy as np

        from detkernel_data.starting.parts import sizes_text

        for name, one in surveys.items():
            empty = sum(not len(labels) for labels in one.labels)
            without = f", {counted(empty, 'image')} without a box" if empty else ""
            boxes = sum(map(len, one.labels))
            text = (
                f"{name:<6} {counted(len(one.ids), 'image')}, {counted(boxes, 'box')}{without}; {sizes_text(one.sizes)}"
            )
            click.echo(_wrapped(text))
        sides = surveys["train"].sides
        if len(sides):
            low, middle, high = np.quantile(sides, [0.1, 0.5, 0.9])
            text = f"sides of boxes: median {middle:.0f} pixels; 10% below {low:.0f}, 10% above {high:.0f}"
            click.echo(_wrapped(text))
        for line in _class_table(loaded, surveys):
            click.echo(f"  {line}".rstrip())
        for name, one in loaded.items():
            for text in one.settled:
                click.echo(_wrapped(f"{name}: {text}"))
            for note in one.dataset.notes:
                click.echo(_wrapped(f"{name}: {note}"))

    def _print_choice(self, choice: Any, machine: Any, images: int) -> None:
        size = choice.resize.get("size")
        side = f"{size[1]}x{size[0]}" if size else f"at most {choice.resize['long']}"
        length = f"{choice.epochs} epochs" if choice.epochs else f"{choice.iterations} iterations"
        text = (
            f"for {printable(str(machine))}: FCOS with a MobileNetV3, images of {side} pixels, {length} of batches of "
            f"{choice.batch_size}"
        )
        click.echo(_wrapped(text))
        if choice.few:
            text = (
                "few boxes of each class: random weights learn little of them, so expect an AP near 0; "
                "`weights: DEFAULT` begins with those of ImageNet"
            )
            click.echo(_wrapped(text))
        if choice.smallest < 6:
            text = (
                f"10% of the boxes are smaller than {choice.smallest:.0f} pixels then; tiles or larger images find them"
            )
            click.echo(_wrapped(text))


def _class_table(loaded: dict[str, Any], surveys: dict[str, Any]) -> list[str]:
    """For each class, the boxes in each split and how many images have one; 80 columns at most."""
    import numpy as np

    classes = loaded["train"].dataset.classes
    columns = []
    for name, one in surveys.items():
        own = loaded[name].dataset.classes if name in loaded else classes
        places = np.array([classes.index(each) for each in own], dtype=np.int64)
        boxes, images = np.zeros(len(classes), dtype=np.int64), np.zeros(len(classes), dtype=np.int64)
        for labels in one.labels:
            found = np.bincount(places[labels], minlength=len(classes))
            boxes += found
            images += found > 0
        columns.append([name, *(f"{all_:,} in {some:,}" for all_, some in zip(boxes, images, strict=True))])
    names = [f"{len(classes)} {'classes' if len(classes) > 1 else 'class'} (boxes in images)", *map(printable, classes)]
    columns = [[name if len(name) <= 28 else f"{name[:27]}~" for name in names], *columns]
    rows = list(zip(*columns, strict=True))
    hidden = len(rows) - 1 - _MOST_CLASSES
    rows = rows[: _MOST_CLASSES + 1] if hidden > 0 else rows
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return [*lines, f"and {hidden} more classes"] if hidden > 0 else lines
