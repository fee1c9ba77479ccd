"""mkdocs hook: the first time that a page names a plugin, a part, a command or an event, the name leads to its place in
the reference; and each cell of a table knows its column, since a phone shows cells below each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape, unescape
from typing import Any

import click
from detkernel.bus import Bus
from detkernel.catalog import Catalog
from detkernel.cli import cli
from detkernel.plugin import Part
from mkdocs.utils import get_relative_url

_APART = re.compile(
    r'(<pre.*?</pre>|<a\b.*?</a>|<h[1-6].*?</h[1-6]>|<td data-label="type".*?</td>\s*<td.*?</td>)', re.DOTALL
)
"""What has links of its own, or none: of a table of options, types and defaults."""
_CODE = re.compile(r"<code>([^<]+)</code>")
_BLOCK = re.compile(r"(<pre.*?</pre>)", re.DOTALL)
_HEADING = re.compile(r"<h[1-6]\b.*?</h[1-6]>", re.DOTALL)
_JOINT = re.compile(r"[._](?=\w)(?![^<]*>)")
"""Within a name, and not within a tag."""
_NAME = re.compile(r"\b[A-Z]\w*(?:-[A-Z0-9][\w.]*\b)+")
_TOKEN = re.compile(r"(?<!\S)(?=\S*-)[^\s&]{3,32}(?!\S)")
"""What has a hyphen: names in sentences, and words of code that a phone has room for."""
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_WORDS = {"image_folder", "product"}
"""Plugins that are called like an option or a value, which pages name more often."""
_BOOSTS = {
    **{"": 4, "start": 4, "guides": 4, "data": 6, "reference": 0.2, "catalogue": 0.2, "families": 0.5},
    **{"guides/ultralytics": 1, "guides/metrics": 8, "reference/cli": 0.5, "reference/plugins": 0.3},
}
"""How much the search prefers pages, by their address or the first part of it."""
_ANCHORS: dict[str, str] = {}


def on_pre_build(config: Any) -> None:
    """Name -> the page and heading that says all about it."""
    catalog = Catalog()
    top = click.Context(cli, info_name="detkernel")
    _ANCHORS.clear()
    _ANCHORS.update({event: f"reference/events/#{event}" for event in Bus({}).event_names()})
    _ANCHORS.update({f"detkernel {name}": f"reference/cli/#detkernel-{name}" for name in cli.list_commands(top)})
    for name in catalog.entries:
        page = "parts" if issubclass(catalog.load(name), Part) else "plugins"
        _ANCHORS[name] = f"reference/{page}/#{name}"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Searches find how to do a thing before its reference; where the repository's address is known, pages have it."""
    first, *_ = page.url.split("/")
    boost = _BOOSTS.get(page.url.rstrip("/"), _BOOSTS.get(first, 1))
    page.meta.setdefault("search", {"boost": boost})
    if not config.repo_url:
        return markdown
    said = "`REPOSITORY` stands for the address of the repository."
    return markdown.replace("git clone REPOSITORY", f"git clone {config.repo_url}").replace(said, "")


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Link names, and label cells."""
    seen: set[str] = set()

    def linked(match: re.Match[str]) -> str:
        words = unescape(match[1]).split()
        name = " ".join(words[:2]) if words[:1] == ["detkernel"] else match[1]
        target = _ANCHORS.get(name)
        if name in _WORDS or (page.url == "zoo/" and " " not in name):
            return match[0]  # of the zoo, recipes, one of which is called like a data set
        if target is None or target in seen or target.startswith(page.url):
            return match[0]
        seen.add(target)
        return f'<a href="{escape(get_relative_url(target, page.url))}">{match[0]}</a>'

    pieces = _APART.split(_TABLE.sub(_labelled, html))
    pieces[::2] = [_CODE.sub(linked, piece) for piece in pieces[::2]]
    return _HEADING.sub(_breakable, "".join(_whole("".join(pieces))))


def _breakable(heading: re.Match[str]) -> str:
    """A heading, whose names a phone breaks behind a dot or an underscore, and not inside a word."""
    return _JOINT.sub(r"\g<0><wbr>", heading[0])


def _whole(html: str) -> Iterator[str]:
    """The page, in whose sentences and tables no name is broken at a hyphen: R-CNN, `--nproc-per-node`."""
    for piece in _BLOCK.split(html):
        if piece.startswith("<pre"):
            yield piece
            continue
        inside = False
        for part in re.split(r"(<[^>]+>)", piece):
            if part.startswith("<"):
                inside = part == "<code>" or (inside and part != "</code>")
                yield part
            else:
                yield (_TOKEN if inside else _NAME).sub(r'<span class="whole">\g<0></span>', part)


def _labelled(match: re.Match[str]) -> str:
    """A table whose cells have the text of their column's head, from the second column on."""
    head, body, rest = match[0].partition("</thead>")
    titles = [re.sub(r"<[^>]+>", "", title).strip() for title in re.findall(r"<th\b.*?</th>", head, re.DOTALL)]
    if len(titles) < 3:
        return match[0]

    def row(found: re.Match[str]) -> str:
        columns = iter(titles)

        def cell(tag: re.Match[str]) -> str:
            title = next(columns, "")
            return f'<td data-label="{escape(title)}"' if title and title != titles[0] else tag[0]

        return re.sub(r"<td\b", cell, found[0])

    return head + body + re.sub(r"<tr>.*?</tr>", row, rest, flags=re.DOTALL)
