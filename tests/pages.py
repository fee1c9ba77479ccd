"""The pages of the documentation, cut into what can be tried: blocks of code, and code within sentences."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")


def blocks(*languages: str) -> list[object]:
    """Every block of these languages, named by its page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            if match[1] in languages:
                line = text.count("\n", 0, match.start()) + 1
                found.append(pytest.param(match[2], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def block(page: str, containing: str) -> str:
    """The one block of a page that has this text in it."""
    found = [match[2] for match in _BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")) if containing in match[2]]
    assert len(found) == 1, f"{page}: {len(found)} blocks have '{containing}'"
    return found[0]


def spans() -> Iterator[tuple[str, str]]:
    """(page:line, code) of the code within sentences and tables, and of each line of the blocks of commands."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            if match[1] == "sh":
                first = text.count("\n", 0, match.start()) + 2
                for number, line in enumerate(match[2].splitlines(), first):
                    yield f"{page.relative_to(ROOT)}:{number}", line
        prose = _BLOCK.sub(lambda match: "\n" * match[0].count("\n"), text)
        for match in _SPAN.finditer(prose):
            yield f"{page.relative_to(ROOT)}:{prose.count(chr(10), 0, match.start()) + 1}", match[1]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a line, or of several, without comments."""
    for line in text.splitlines():
        words: list[str] = []
        for word in shlex.split(line, comments=True):
            if word == "&&":
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words
