"""Every block of code in the documentation runs, and every config in it is sound."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
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


def _my_plugin() -> str:
    """The plugin that the README shows."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return next(match[2] for match in _BLOCK.finditer(text) if "class MyPlugin" in match[2])


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            made = "reference/" in target  # when the site is built, whose build checks links into it
            assert made or (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
