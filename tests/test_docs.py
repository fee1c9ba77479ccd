"""Every block of code and every command in the documentation runs, and every config in it is sound."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[object]:
    """Every block of a language, named by its page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            if match[1] == language:
                line = text.count("\n", 0, match.start()) + 1
                found.append(pytest.param(match[2], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, tmp_path: Path) -> None:
    (tmp_path / "block.py").write_text(code)
    command = [sys.executable, "-W", "error::DeprecationWarning", "block.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configs_are_sound(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detkernel.config import load

    (tmp_path / "my_plugin.py").write_text(_my_plugin())
    (tmp_path / "detkernel_configs").symlink_to(ROOT / "configs")  # as an installed detkernel has it
    monkeypatch.syspath_prepend(tmp_path)
    if text.startswith("part: "):  # a value of the loader's, shown on its own
        option, _, value = text.removeprefix("part: ").partition("\nvalue: ")
        text = f"run: {{until: 1 iters}}\ndata:\n  use: loader\n  {option}: {value}"
    elif "\nrun:" not in f"\n{text}":
        text = f"run: {{until: 1 iters}}\n{text}"
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert load("config.yaml").plugins


SMALL = ["run.until=2 iters", "run.validate=null", "data.train.size=16", "data.val.size=4", "data.workers=0"]
MADE_ELSEWHERE = [  # by .ci/run and the tox environment `install`, in fresh environments
    "git clone ... detkernel",
    "cd detkernel",
    "python3 -m venv .venv",
    ".venv/bin/pip install .",
    ".venv/bin/pip install -q tox",
    ".venv/bin/tox -p 2",
]


@pytest.mark.parametrize("text", blocks("sh"))
def test_commands_run(text: str, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "config.yaml").write_text("base: configs/shapes.yaml")
    folder = tmp_path
    for line in text.splitlines():
        for command in line.partition("#")[0].strip().split(" && "):
            program, _, arguments = command.partition(" ")
            if command in MADE_ELSEWHERE:
                continue
            if program == "cd":
                folder /= arguments
                continue
            words = {
                "detkernel": ["-m", "detkernel", *arguments.replace("iter_700", "iter_2").split()],
                "pytest": ["-m", "pytest", "-q", *arguments.split()],
                "pip": ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", "site", "."],
            }[program.removeprefix(".venv/bin/")]
            if words[2:3] in (["check"], ["run"], ["test"]) and words[1] == "detkernel":
                words += SMALL
            result = subprocess.run(
                [sys.executable, *words],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "PYTHONPATH": str(folder / "site")},
            )
            assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def test_continuous_integration_runs_what_the_readme_says() -> None:
    command = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert f"```sh\n{command}\n```" in (ROOT / "README.md").read_text()


def test_every_block_says_its_language() -> None:
    for page in PAGES:
        opened = re.findall(r"^```(\w*)$", page.read_text(encoding="utf-8"), re.MULTILINE)[::2]
        assert "" not in opened, f"{page.relative_to(ROOT)}: a block without a language: text, or should it run?"


def test_every_installed_plugin_is_documented() -> None:
    """A class without a docstring and an option without a meaning are refused; here, that the reference has them."""
    from detkernel.catalog import Catalog
    from detkernel.reference import option_rows, plugin_page

    catalog = Catalog()
    assert len(catalog.entries) > 40
    for name in catalog.entries:
        cls = catalog.load(name)
        page = plugin_page(name, cls, catalog.find(name))
        for option, _, default, meaning in option_rows(cls):
            assert len(meaning.split(" (")[0]) > 5, f"{name}.{option} has no meaning"
            assert option in page
            assert default
        published = [spec for spec in vars(getattr(cls, "events", object)).values() if hasattr(spec, "detkernel_spec")]
        for spec in published:
            assert (spec.__doc__ or "").strip(), f"{name} publishes {spec.__name__} without a word about it"
            assert f"publishes {spec.__name__}(" in page


def _my_plugin() -> str:
    """The plugin that the README shows."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return next(match[2] for match in _BLOCK.finditer(text) if "class MyPlugin" in match[2])


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            made = "reference/" in target  # when the site is built, whose build checks links into it
            assert made or (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
