"""Every command at 80 columns: each line fits, and no word is broken; what a run says at its end."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from detkernel.catalog import Catalog
from detkernel.cli import cli, rendered
from detkernel.errors import ConfigError, UserError
from detkernel.reference import plugin_page

ROOT = Path(__file__).parents[1]
SHAPES = str(ROOT / "configs" / "shapes.yaml")
Detkernel = Callable[..., subprocess.CompletedProcess[str]]
COMMANDS = ["run", "test", "check", "config", "plugins", "recipes", "hooks", "schema", "new-plugin"]
VIEWS = [
    ["--help"],
    *([command, "--help"] for command in [*COMMANDS, *Catalog("command").entries]),
    ["plugins"],
    ["plugins", "optimizer"],
    ["recipes"],
    ["hooks"],
    ["hooks", "before_optimizer_step"],
    ["hooks", SHAPES],
    ["hooks", "after_val_epoch", SHAPES],
    ["config", "configs/coco_atss_r50_1x.yaml"],
]
WIDE = ("http", "/", "`", "'")
"""What a word that does not fit begins with, or has in it: a path, an address, something to type."""


def said(arguments: list[str], monkeypatch: pytest.MonkeyPatch, columns: int) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert result.exception is None, result.exception
    return result.output


def fits(text: str, columns: int = 80) -> Iterator[str]:
    """The lines that do not, but for those that are one word."""
    for line in text.splitlines():
        if len(line) > columns and not (len(line.split()) == 1 and any(mark in line for mark in WIDE)):
            yield line


@pytest.mark.parametrize("arguments", VIEWS, ids=" ".join)
def test_each_command_fits_80_columns_and_breaks_no_word(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    narrow, wide = (said(arguments, monkeypatch, columns) for columns in (80, 400))
    assert list(fits(narrow)) == []
    assert narrow.split() == wide.split()
    assert "\x1b" not in narrow


@pytest.mark.parametrize("command", [*COMMANDS, *Catalog("command").entries])
def test_each_help_is_short_and_has_an_example(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = said([command, "--help"], monkeypatch, 80)
    assert f"detkernel {command}" in re.split(r"\b[Ee]xample:", text, maxsplit=1)[-1], "no example under --help"
    listed = said(["--help"], monkeypatch, 80).splitlines()
    [row] = [line for line in listed if line.startswith(f"  {command} ")]
    assert 10 < len(row.split(maxsplit=1)[1]) <= 60


def test_every_plugins_page_fits_and_breaks_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog()
    for name in catalog.entries:
        pages = []
        for columns in (80, 400):
            monkeypatch.setenv("COLUMNS", str(columns))
            monkeypatch.setenv("NO_COLOR", "1")
            pages.append(plugin_page(name, catalog.load(name), catalog.find(name)))
        assert list(fits(pages[0])) == [], name
        assert pages[0].split() == pages[1].split(), name


def test_every_kind_has_its_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [line for line in said(["plugins"], monkeypatch, 80).splitlines() if line[:1].isalpha()]
    assert len(heads) == len(set(heads))
    assert {"model", "optimizer", "schedule", "evaluation", "data", "dataset", "transform", "hook", "class loss"} <= {
        head.partition(", of ")[0] for head in heads
    }


def test_errors_are_wrapped_at_words_with_room_between(
    detkernel_here: Detkernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = detkernel_here("check", SHAPES, "model.use=fcosx", "optimizer.lrr=3", "no_such_plugin_at_all={}")
    assert result.returncode == 2
    assert list(fits(result.stderr)) == []
    assert result.stderr.count("\n\nerror: ") == 2
    assert result.stderr.endswith("\n\n3 problems; nothing was run\n")
    long = "x" * 100
    shown = rendered(UserError(f"{'word ' * 20}{long}\n  name=value   what it does {'word ' * 14}"))
    assert long in shown, "a path is broken"
    assert "\n  name=value   what it does word" in shown


def test_colours_come_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    error = UserError("no")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[" in rendered(error)
    monkeypatch.setenv("NO_COLOR", "1")
    assert rendered(error) == "error: no"
    assert rendered(ConfigError([])) == ""


def test_recipes_are_listed_and_copied_ready_to_run(detkernel_here: Detkernel, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    listed = detkernel_here("recipes")
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} <= set(listed.stdout.split())
    assert "Published by MMDetection: box AP 39.4." in listed.stdout
    for arguments, name in (
        (["shapes"], "shapes.yaml"),
        (["coco_atss_r50_1x.yaml", "mine.yaml"], "mine.yaml"),
        (["coco_dfine_s", "."], "coco_dfine_s.yaml"),
    ):
        result = detkernel_here("recipes", *arguments)
        assert (result.returncode, result.stdout) == (0, f"wrote {name}\nnext: detkernel check {name}\n"), result.stderr
        copied = detkernel_here("config", "--plain", name)
        recipe = detkernel_here(
            "config", "--plain", str(ROOT / "configs" / f"{arguments[0].removesuffix('.yaml')}.yaml")
        )
        assert (copied.returncode, copied.stdout) == (0, recipe.stdout), copied.stderr
    again = detkernel_here("recipes", "shapes")
    assert again.returncode == 2
    assert "shapes.yaml is there already" in again.stderr
    assert "did you mean 'shapes'?" in detkernel_here("recipes", "shape").stderr


TINY = [
    *("data.train.size=4", "data.val.size=2", "data.workers=0", "run.until=2 iters", "run.validate=2 iters"),
    *("data.train.side=64", "data.val.side=64", "data.train.sizes=[12, 40]", "data.val.sizes=[12, 40]"),
]


def test_a_run_ends_with_what_it_left_and_what_comes_next(detkernel_here: Detkernel, tmp_path: Path) -> None:
    first = detkernel_here("run", SHAPES, *TINY, "run.work_dir=work", "checkpoint.best=coco/bbox_mAP")
    assert first.returncode == 0, first.stderr
    rows = dict(row for line in first.stderr.splitlines() if len(row := re.split(r" {2,}", line)) == 2)
    assert re.fullmatch(r"coco/bbox_mAP \d\.\d{4} at iteration 2", rows["best"])
    assert rows["checkpoint"] == "work/checkpoints/last.pt"
    assert rows["best checkpoint"] == "work/checkpoints/best.pt"
    assert rows["next"] in {
        f"detkernel {do}" for do in ("predict work/checkpoints/best.pt IMAGES", "test work/checkpoints/best.pt")
    }
    again = detkernel_here("run", "work")
    assert again.returncode == 0, again.stderr
    assert (
        'this run had its 2 iters before, and nothing was trained. To train longer: run.until="4 iters"' in again.stderr
    )
    tested, by_name = detkernel_here("test", "work"), detkernel_here("test", "work/checkpoints/last.pt")
    assert tested.returncode == by_name.returncode == 0, tested.stderr
    assert "coco/bbox_mAP: " in tested.stdout
    assert tested.stdout == by_name.stdout
